"""Data sets of multiple-choice questions, one a file."""
