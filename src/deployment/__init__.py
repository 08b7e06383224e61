"""Replicas of `unispec serve` on Ray Serve, behind one endpoint; needs the extra `ray`."""

from __future__ import annotations

from .app import app

__all__ = ["app"]
