"""A virtual TPM for Linux in user space, on libtpms."""

__version__ = "0.1.0"
PEER_VERSION = "0.10.2"
"""The C suite's version whose options and outputs are ours; scripts compare with it."""
