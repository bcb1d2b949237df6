"""Sweeps: many configurations, or one notebook with many values of its parameters, by many processes, resumable."""
