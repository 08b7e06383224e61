"""Replicas of `unispec serve` on Ray Serve, behind one endpoint; needs the extra `ray`."""
