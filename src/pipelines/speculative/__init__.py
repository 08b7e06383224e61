"""The phases of a step, and the ways to string them together.

`target` and `draft` are the stacks, whose caches are `step.caches[0]` and `step.caches[1]`, and
`rule` is the acceptance rule.
"""
