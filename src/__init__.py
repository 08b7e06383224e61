"""unispec: speculative decoding as one compiled MAX graph."""
