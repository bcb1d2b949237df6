"""Measurements, and the files that they are recorded in."""
