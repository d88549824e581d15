"""fastlogits inside other engines: one module an engine, none imported until it is named."""
