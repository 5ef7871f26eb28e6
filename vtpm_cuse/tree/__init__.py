"""TPMs of a manager to look at: a folder for each, in a mount that nobody can write to."""
