"""How kernels are compiled, launched and registered, and where torch takes their place."""
