"""A worker's process: one TPM, for as long as it is awake."""
