"""Keeps a secret that this TPM gives back as long as PCR 16 has the value that it has now.

seal.py seal FILE <secret      writes FILE, which is worth nothing on another machine
seal.py unseal FILE            prints the secret

Needs tpm2-tools, which find the TPM by TPM2TOOLS_TCTI.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from pathlib import Path

PCR = "sha256:16"
ATTRIBUTES = "fixedtpm|fixedparent"  # no password: the policy alone opens it


def tool(folder: Path, name: str, *words: str, data: bytes | None = None) -> bytes:
    """What one of the tpm2-tools prints; it works in *folder*. Raises CalledProcessError."""
    command = [f"tpm2_{name}", *words]
    return subprocess.run(
        command, cwd=folder, input=data, check=True, capture_output=True, timeout=300
    ).stdout


def make_parent(folder: Path) -> None:
    """The storage key, which a TPM makes the same each time."""
    tool(folder, "createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "parent")


def seal(secret: bytes) -> str:
    """The secret as text that only this TPM can open."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_parent(folder)
        tool(folder, "createpolicy", "-Q", "--policy-pcr", "-l", PCR, "-L", "policy")
        words = ["-L", "policy", "-a", ATTRIBUTES, "-u", "pub", "-r", "priv", "-i", "-"]
        tool(folder, "create", "-Q", "-C", "parent", *words, data=secret)
        parts = {part: b64encode((folder / part).read_bytes()).decode() for part in ("pub", "priv")}
        return json.dumps(parts)


def unseal(sealed: str) -> bytes:
    """The secret in what `seal` made."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, text in json.loads(sealed).items():
            (folder / Path(part).name).write_bytes(b64decode(text))
        make_parent(folder)
        tool(folder, "load", "-Q", "-C", "parent", "-u", "pub", "-r", "priv", "-c", "object")
        return tool(folder, "unseal", "-c", "object", "-p", f"pcr:{PCR}")


def main(words: list[str]) -> int:
    """The program; returns its exit status."""
    if len(words) != 2 or words[0] not in {"seal", "unseal"}:
        print(__doc__, file=sys.stderr)
        return 2
    verb, path = words[0], Path(words[1])
    try:
        if verb == "seal":
            path.write_text(seal(sys.stdin.buffer.read()))
        else:
            sys.stdout.buffer.write(unseal(path.read_text()))
    except subprocess.CalledProcessError as exc:
        print(f"seal: the TPM refuses:\n{exc.stderr.decode()}", end="", file=sys.stderr)
        return 1
    except (OSError, ValueError) as exc:
        print(f"seal: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
