"""Pointwise maps of logits in one pass, and the search for the tokens that they speak of."""
