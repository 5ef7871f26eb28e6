"""Making a TPM: its certificates, the local CA that issues them, the set-up sequences."""
