"""Where models and text come from."""
