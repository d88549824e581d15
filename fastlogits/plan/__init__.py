"""Lists of processors compiled into plans: stages, what fuses, where each call stands."""
