"""What a subject is in memory."""
