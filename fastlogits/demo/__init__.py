"""A chat demonstration on a tiny language model that is trained on the spot."""
