"""Fold, truncate and sample in kernels that read the logits once; ``launch`` is where to begin."""
