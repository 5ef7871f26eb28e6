"""Structures, constants and codes of every interface: bytes to values and back, no I/O."""
