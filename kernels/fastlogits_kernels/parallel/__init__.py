"""Sampling from parts of a vocabulary that several ranks have: what each sends of its part, and what follows of all."""
