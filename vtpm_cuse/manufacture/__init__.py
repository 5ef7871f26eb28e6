"""The service behind ``swtpm_setup``: a TPM is made in memory and put in its place at the end."""
