"""The program that makes a TPM as a manufacturer does."""
