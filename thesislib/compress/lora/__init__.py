"""Low-rank adaptation: the stage, its sequences, its training."""
