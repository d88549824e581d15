"""Truncation in torch: the reference on whole rows, the CPU path, and where an operation picks its backend."""
