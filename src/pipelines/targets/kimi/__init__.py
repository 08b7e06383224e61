"""Kimi K2.5: a DeepSeek-V3 stack that reads images through a vision tower."""
