"""What the study's measurements cost: side by side with a bare loop, in one process, median of several."""
