"""CA keys in PKCS #11 tokens, named by a URI. Source: RFC 7512.

Needs python-pkcs11, which is imported when such a key is used. Without a module
in the URI the token is looked for in the modules that p11-kit knows, as GnuTLS
does it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

from vtpm_cuse.ca import der
from vtpm_cuse.ca.keys import ecdsa_signature, own_digest, signature_algorithm
from vtpm_cuse.errors import CertificateError, VtpmError
from vtpm_cuse.files import read_small

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_P11_KIT: Final = "libp11-kit.so.0"  # is itself a module: all those of the system in one
_TOKEN: Final = {
    "token": "label",
    "serial": "serial",
    "manufacturer": "manufacturer_id",
    "model": "model",
}
_DIGESTS: Final = {
    "sha1": "1.3.14.3.2.26",
    "sha256": "2.16.840.1.101.3.4.2.1",
    "sha384": "2.16.840.1.101.3.4.2.2",
    "sha512": "2.16.840.1.101.3.4.2.3",
}


_CURVE_BITS: Final = {der.oid("1.3.132.0.34"): 384, der.oid("1.3.132.0.35"): 521}


def parse_uri(uri: str) -> dict[str, bytes]:
    """The attributes of path and query, decoded.

    Raises:
        ValueError: It is no pkcs11: URI, or has an attribute twice.
    """
    attributes: dict[str, bytes] = {}
    for part in re.split(r"[;?&]", uri.removeprefix("pkcs11:")):
        if not part:
            continue
        name, equals, value = part.partition("=")
        if not equals or name in attributes:
            raise ValueError(f"'{name}' stands twice or without a value")
        attributes[name] = unquote_to_bytes(value)
    if not attributes.keys() & {*_TOKEN, "object", "id", "slot-id"}:
        raise ValueError("it names neither token nor object")
    return attributes


class TokenKey:
    """A private key that stays in its token; a session is opened for each use."""

    def __init__(self, uri: str, pin: bytes | None, environment: Mapping[str, str]) -> None:
        """Finds the key, and so proves the PIN.

        Args:
            uri: Of the key; a PIN in it counts more than *pin*.
            pin: Of the token.
            environment: Variables for the token's library, set in this process.

        Raises:
            CertificateError: The library, token or key is not there, or the PIN is wrong.
        """
        self.name = re.sub(r"pin-value=[^&]*", "pin-value=...", uri)
        try:
            self._attributes = parse_uri(uri)
        except ValueError as exc:
            raise self._error(str(exc)) from exc
        self._pin = self._own_pin() or pin
        os.environ.update(environment)
        self._is_rsa, self._digest = True, "sha256"
        self._use(self._learn_type)

    def digest(self, usual: str) -> str:
        """See `Signer`."""
        return self._digest if usual == "sha256" else usual

    def algorithm(self, digest: str) -> bytes:
        """AlgorithmIdentifier of its signatures."""
        return signature_algorithm(digest, rsa_key=self._is_rsa)

    def sign(self, data: bytes, digest: str) -> bytes:
        """PKCS #1 v1.5, or ECDSA as DER. Raises CertificateError."""
        hashed = hashlib.new(digest, data, usedforsecurity=False).digest()
        signature: bytes = self._use(lambda key: self._sign(key, hashed, digest))
        return signature

    def _sign(self, key: Any, hashed: bytes, digest: str) -> bytes:  # noqa: ANN401 - untyped library
        import pkcs11

        if self._is_rsa:
            # The token only pads and signs: all of them can do that.
            algorithm = der.sequence(der.oid(_DIGESTS[digest]), der.NULL)
            info = der.sequence(algorithm, der.octet_string(hashed))
            return bytes(key.sign(info, mechanism=pkcs11.Mechanism.RSA_PKCS))
        raw = bytes(key.sign(hashed, mechanism=pkcs11.Mechanism.ECDSA))
        half = len(raw) // 2
        return ecdsa_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))

    def _learn_type(self, key: Any) -> None:  # noqa: ANN401 - untyped library
        import pkcs11

        if key.key_type not in {pkcs11.KeyType.RSA, pkcs11.KeyType.EC}:
            raise self._error("it is neither an RSA nor an elliptic curve key")
        self._is_rsa = key.key_type is pkcs11.KeyType.RSA
        self._digest = own_digest(_bits(key, rsa_key=self._is_rsa), rsa_key=self._is_rsa)

    def _use(self, work: Any) -> Any:  # noqa: ANN401 - of each caller's type
        try:
            import pkcs11
        except ImportError as exc:
            raise self._error(f"it needs python-pkcs11; type: {_installing()}") from exc
        try:
            for token in self._tokens():
                pin = self._pin.decode() if self._pin is not None else None
                with token.open(user_pin=pin) as session:
                    # To its end: a token does nothing else while it searches.
                    if keys := list(session.get_objects(self._wanted())):
                        return work(keys[0])
        except pkcs11.PKCS11Error as exc:
            # Their names say it: PinIncorrect, PinLocked, TokenNotPresent.
            raise self._error(" ".join(filter(None, (type(exc).__name__, str(exc))))) from exc
        except UnicodeDecodeError as exc:
            raise self._error("its PIN is not text in UTF-8") from exc
        except VtpmError:
            raise
        except Exception as exc:  # of a library that is none, and of a token's odd values
            raise self._error(" ".join(str(exc).split()) or type(exc).__name__) from exc
        raise self._error("there is no such token, or no such private key in it")

    def _wanted(self) -> dict[Any, Any]:
        from pkcs11 import Attribute, ObjectClass

        wanted: dict[Any, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY}
        if "object" in self._attributes:
            wanted[Attribute.LABEL] = self._attributes["object"].decode(errors="replace")
        if "id" in self._attributes:
            wanted[Attribute.ID] = self._attributes["id"]
        return wanted

    def _tokens(self) -> Iterator[Any]:
        import pkcs11

        module = self._attributes.get("module-path", _P11_KIT.encode())
        for slot in pkcs11.lib(os.fsdecode(module)).get_slots(token_present=True):
            number = self._attributes.get("slot-id")
            token = slot.get_token()
            if (number is None or number == b"%d" % slot.slot_id) and all(
                _same(getattr(token, attribute), self._attributes[name])
                for name, attribute in _TOKEN.items()
                if name in self._attributes
            ):
                yield token

    def _own_pin(self) -> bytes | None:
        if "pin-value" in self._attributes:
            return self._attributes["pin-value"]
        source = self._attributes.get("pin-source")
        if source is None:
            return None
        path = os.fsdecode(source).removeprefix("file://").removeprefix("file:")
        try:
            return read_small(path)[:256].rstrip(b"\n")
        except (OSError, ValueError) as exc:  # ValueError: a zero byte in it
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise self._error(f"its pin-source cannot be read: {reason}") from exc

    def _error(self, reason: str) -> CertificateError:
        return CertificateError(f"Could not import pkcs11 key {self.name}", reason)


def _bits(key: Any, *, rsa_key: bool) -> int:  # noqa: ANN401 - untyped library
    """The size of a key, where that makes a difference and the token says it; else 0."""
    import pkcs11

    try:
        if rsa_key:
            return int.from_bytes(key[pkcs11.Attribute.MODULUS], "big").bit_length()
        return _CURVE_BITS.get(key[pkcs11.Attribute.EC_PARAMS], 0)
    except (pkcs11.PKCS11Error, NotImplementedError):
        return 0


def _installing() -> str:
    python = shlex.quote(sys.executable)
    own = importlib.util.find_spec("pip") is not None  # a deployed one has none
    pip = f"{python} -m pip" if own else f"python3 -m pip --python {python}"
    return f"{pip} install python-pkcs11"


def _same(found: str | bytes, wanted: bytes) -> bool:
    octets = found.encode() if isinstance(found, str) else found
    return octets.rstrip(b" \0") == wanted.rstrip(b" ")
