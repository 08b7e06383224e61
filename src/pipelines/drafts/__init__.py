"""What drafts of every method share: the target's vocabulary, and the checks of a checkpoint."""
