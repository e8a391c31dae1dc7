"""What callers call: each function describes its call as an `AttentionProblem` and hands it to `dispatch`."""
