"""What a model would cost on a device: analytic projections, and their error against what was measured."""
