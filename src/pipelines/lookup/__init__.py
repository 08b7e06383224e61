"""Proposals without a draft: what followed the same words before."""
