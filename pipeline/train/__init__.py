"""The training step: engines, loop, loss, checkpoints."""
