"""What is decoded: the targets, each described once."""
