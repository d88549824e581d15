"""The requests of a batch as tables on the device, and the kernel that reads them."""
