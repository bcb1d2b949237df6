"""Many configurations, or one notebook with many parameters: described in few lines, carried out by many processes,
resumable."""
