"""fastlogits inside ``generate``: all that it builds as one plan, a decoding method, continuous batching."""
