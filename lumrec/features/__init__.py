"""Statistics of a row."""
