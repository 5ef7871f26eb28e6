"""A virtual TPM for Linux in user space, on libtpms."""

__version__ = "0.1.0"
