"""Processors under the names of transformers, one file per family."""
