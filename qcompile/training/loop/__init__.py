"""The training loop: batches, gradients, rates, evaluations, checkpoints, several processes."""
