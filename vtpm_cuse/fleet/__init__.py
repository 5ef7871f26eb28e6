"""Many TPMs on one host."""
