"""Log-probabilities of given tokens under the distribution that is sampled, and their gradients."""
