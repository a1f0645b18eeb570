"""One training loop, its optimizers, checkpoints and parallelism."""
