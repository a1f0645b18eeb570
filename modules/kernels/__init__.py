"""Hand-written autograd functions; tests compare each, forward and backward, with a plain twin in PyTorch."""
