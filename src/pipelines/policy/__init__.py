"""How many tokens each step verifies and proposes, and whose."""
