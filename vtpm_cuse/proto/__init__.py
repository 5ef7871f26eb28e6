"""Sans-IO state machines: bytes in, bytes out."""
