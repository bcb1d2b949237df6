"""What each notebook measures: its parameters, its measurements, and the claims it holds them against."""
