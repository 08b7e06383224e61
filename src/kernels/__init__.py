"""Kernels of our own, and what they read."""
