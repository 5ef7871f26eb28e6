"""What the manager has on the disk: the TPMs by their names, and the state of each."""
