"""Device code of fastlogits: kernels that know tensors and no processor, each beside its torch reference."""
