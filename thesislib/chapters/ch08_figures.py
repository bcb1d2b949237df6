"""Chapter 8's plots: scores beside losses, agreement, settling, other items, replacements, sets, training, cost."""
