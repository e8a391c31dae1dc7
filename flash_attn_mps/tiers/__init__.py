"""What computes an `AttentionProblem`."""
