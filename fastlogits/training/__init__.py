"""The distribution that tokens were sampled from, in training."""
