"""The programs that serve a TPM: their options, and what these become."""
