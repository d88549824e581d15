"""Looking inside: what a plan is and costs, what each processor did, whether it is right, what this machine runs."""
