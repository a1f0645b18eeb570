"""A simulated log whose true click probabilities are known."""
