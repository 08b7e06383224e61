"""What the stacks of targets and drafts are made of."""
