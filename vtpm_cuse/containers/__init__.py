"""What a container takes that is to have a TPM: device nodes, and what its runtime is told."""
