"""JSON schemas as the grammar engine has to be given them.

The engine rounds large numbers, lets quotes and backslashes into some character classes, wants
properties in the schema's order, and recurses. What it would get wrong is written differently
here, or refused by name.
"""

from .rewrite import rewrite_schema

__all__ = ["rewrite_schema"]
