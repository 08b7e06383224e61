"""Caches of target and draft: in-graph views, and the manager of their pages."""
