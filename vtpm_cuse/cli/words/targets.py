"""Where a tool finds its TPM, as its options say it."""

from __future__ import annotations

from vtpm_cuse.errors import UsageError


def split_tcp(target: str, default_port: int) -> tuple[str, int]:
    """Host and port of ``[HOST]:[PORT]``. Raises UsageError."""
    host, colon, port = target.rpartition(":")
    if not colon:
        return target, default_port
    if not host and not port:
        return "127.0.0.1", default_port
    from vtpm_cuse.cli.words.numbers import leading_number

    found = leading_number(port, base=10)
    if found is None:
        raise UsageError(f"Invalid port '{port}'")
    if not 0 <= found[0] < 1 << 16:
        raise UsageError(f"Port '{port}' outside valid range.")
    return host.strip("[]") or "127.0.0.1", found[0]
