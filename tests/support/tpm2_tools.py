"""What tpm2-tools do with a TPM 2.0, step by step, whatever they reach it by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from pathlib import Path

SIGNING: Final = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"
NV_INDEX: Final = "0x1500020"
DIGEST: Final = "a5" * 32


class Said(Protocol):
    """What a tool printed."""

    @property
    def stdout(self) -> str: ...

    @property
    def stderr(self) -> str: ...


class Tool(Protocol):
    """Runs ``tpm2_NAME`` in one folder, and asserts its exit status."""

    def __call__(self, name: str, *arguments: str | Path, status: int = 0) -> Said: ...


def sign_and_verify(tool: Tool, folder: Path, parent: str, kind: str) -> None:
    """With a key of this kind below *parent*; another message does not verify."""
    message = folder / "message"
    message.write_text("one message\n")
    key = ("-u", "key.pub", "-r", "key.priv")
    tool("create", "-Q", "-C", parent, "-G", kind, "-a", SIGNING, *key)
    tool("load", "-Q", "-C", parent, *key, "-c", "key.ctx")
    tool("sign", "-c", "key.ctx", "-g", "sha256", "-o", "signature", message)
    verify = ("verifysignature", "-c", "key.ctx", "-g", "sha256", "-m", message, "-s", "signature")
    tool(*verify)
    message.write_text("another message\n")
    assert "0x2DB" in tool(*verify, status=1).stderr


def quote_and_check(tool: Tool, parent: str) -> None:
    """With a restricted key below *parent*; another nonce does not check."""
    attributes = SIGNING + "|restricted"
    files = ("-u", "ak.pub", "-r", "ak.priv", "-c", "ak.ctx")
    kind = ("-G", "ecc:ecdsa-sha256:null", "-a", attributes)
    tool("create", "-Q", "-C", parent, *kind, *files)
    tool("readpublic", "-Q", "-c", "ak.ctx", "-f", "pem", "-o", "ak.pem")
    quoted = ("-m", "quote", "-s", "quote.sig")
    what = ("-l", "sha256:0,7", "-q", "11223344", "-g", "sha256")
    tool("quote", "-Q", "-c", "ak.ctx", *what, *quoted, "-o", "pcrs")
    check = ("checkquote", "-Q", "-u", "ak.pem", *quoted, "-f", "pcrs", "-g", "sha256")
    tool(*check, "-q", "11223344")
    tool(*check, "-q", "11223345", status=1)


def seal_under_a_pcr_policy(tool: Tool, folder: Path, parent: str) -> None:
    """Below *parent*; once the PCR has another value the secret stays where it is."""
    (folder / "secret").write_text("a secret")
    tool("createpolicy", "-Q", "--policy-pcr", "-l", "sha256:12", "-L", "policy")
    sealed = ("-u", "seal.pub", "-r", "seal.priv")
    rules = ("-L", "policy", "-a", "fixedtpm|fixedparent")
    tool("create", "-Q", "-C", parent, "-i", "secret", *rules, *sealed)
    tool("load", "-Q", "-C", parent, *sealed, "-c", "seal.ctx")
    unseal = ("unseal", "-c", "seal.ctx", "-p", "pcr:sha256:12")
    assert tool(*unseal).stdout == "a secret"
    tool("pcrextend", f"12:sha256={DIGEST}")
    refused = tool(*unseal, status=1)
    assert "policy check failed" in refused.stderr
    assert refused.stdout == ""
