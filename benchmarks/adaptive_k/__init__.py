"""What `adaptive.py` consists of."""
