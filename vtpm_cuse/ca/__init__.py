"""A TPM's certificates, and the local CA that issues them."""
