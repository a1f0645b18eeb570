"""One training loop, its optimizers, checkpoints and parallelism; steps 1 and 3 run on it."""
