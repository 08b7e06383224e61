"""The composer: a target and a draft method, whichever they are, in one graph."""
