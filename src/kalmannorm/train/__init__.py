"""Training, evaluation and checkpoints of one run."""
