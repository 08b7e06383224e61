"""How a compiled graph is driven: requests to inputs, one step of a batch, outputs to requests.

`max_batch_size` is the most rows in one step, of each replica, `max_batch_input_tokens` the most
new tokens; `name` is what errors call a prompt or a value.
"""
