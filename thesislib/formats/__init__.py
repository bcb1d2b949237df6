"""What a subject is on disk."""
