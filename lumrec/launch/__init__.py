"""Entry points: the apps' main, torchrun, TorchX, the check of the environment."""
