"""The cost of a model on a device: analytic projections, and their error against measurements."""
