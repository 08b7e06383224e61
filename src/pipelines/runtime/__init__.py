"""How a compiled graph is driven: requests to inputs, one step of a batch, outputs to requests."""
