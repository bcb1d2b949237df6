"""Compression stages: each takes a subject and gives a subject."""
