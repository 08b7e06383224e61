"""What a token is sampled from and which drafts are kept: distribution, rules, seeds, grammars."""
