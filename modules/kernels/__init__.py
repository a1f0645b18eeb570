"""Hand-written autograd functions. Each is tested, forward and backward, against a plain twin in PyTorch."""
