"""The commands of the `unispec` command line, one module each, and what they share."""
