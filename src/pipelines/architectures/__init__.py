"""One package per architecture, plus the stacks that they share."""
