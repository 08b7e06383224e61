"""Independent references that the tests compare the package with; nothing here imports it."""
