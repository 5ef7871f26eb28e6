"""Response codes in words: what a TPM, or a layer of the software before it, answered.

Sources: TCG TPM 2.0 Library Part 1, section 39 (how a code is read) and Part 2 (TPM_RC, of
versions 1.59 and 1.83, and those of 1.85 that others know); TCG TSS 2.0 Overview and Common
Structures (layers and base codes); TCG TPM 1.2 Main Part 2, section 16. The sentences are ours.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpm_cuse.wire.rc12 import RESULTS as _TPM12

_FORMAT_ONE_BIT: Final = 0x080
_VERSION_BIT: Final = 0x100
_PARAMETER_BIT: Final = 0x040
_SESSION_BIT: Final = 0x800
_VENDOR_BIT: Final = 0x400
_WARNING_BIT: Final = 0x800

_HIGHEST: Final = 0xFFF
"""Of the codes of a TPM."""

_LAYER_SHIFT: Final = 16
_LAYER_TPM: Final = 0

UNKNOWN: Final = "nobody has given this code a meaning"
_OF_A_VENDOR: Final = "a code of the TPM's vendor"


class Explained(NamedTuple):
    """A code, read.

    Attributes:
        code: As it came.
        layer: Who says it: "TPM", "TPM 1.2", "ESYS", "TCTI"...
        name: Its name in its specification; empty for a code that has none.
        where: What the TPM complains about: "session 1", "parameter 2", "handle 1", or empty.
        words: A sentence without capital and full stop.
    """

    code: int
    layer: str
    name: str
    where: str
    words: str


_ERRORS: Final = {
    0x000: ("TPM_RC_INITIALIZE", "the TPM waits for TPM2_Startup, or has had it already"),
    0x001: (
        "TPM_RC_FAILURE",
        "the TPM is in failure mode: only a reset helps, and its log says why",
    ),
    0x003: ("TPM_RC_SEQUENCE", "a sequence is used in a way that does not fit its state"),
    0x00B: ("TPM_RC_PRIVATE", "kept for TPM 1.2 code; a TPM 2.0 does not use it"),
    0x019: ("TPM_RC_HMAC", "kept for TPM 1.2 code; a TPM 2.0 does not use it"),
    0x020: ("TPM_RC_DISABLED", "the command is switched off"),
    0x021: ("TPM_RC_EXCLUSIVE", "another command came between those of an exclusive audit session"),
    0x024: ("TPM_RC_AUTH_TYPE", "this handle takes another kind of authorization"),
    0x025: ("TPM_RC_AUTH_MISSING", "a handle needs authorization and the command has no session"),
    0x026: ("TPM_RC_POLICY", "this object has no policy, or one that cannot be evaluated"),
    0x027: ("TPM_RC_PCR", "the PCR cannot be used this way, or from this locality"),
    0x028: ("TPM_RC_PCR_CHANGED", "a PCR changed after the policy session had looked at it"),
    0x02D: ("TPM_RC_UPGRADE", "the firmware is being replaced: nothing else is taken until then"),
    0x02E: ("TPM_RC_TOO_MANY_CONTEXTS", "the counter of saved contexts is at its end"),
    0x02F: ("TPM_RC_AUTH_UNAVAILABLE", "the entity has no password that may be used for this"),
    0x030: ("TPM_RC_REBOOT", "TPM and system have to be restarted before this works"),
    0x031: ("TPM_RC_UNBALANCED", "hash and cipher of the key are not of the same strength"),
    0x042: ("TPM_RC_COMMAND_SIZE", "the size in the command's header is not the command's size"),
    0x043: ("TPM_RC_COMMAND_CODE", "the TPM does not know this command"),
    0x044: ("TPM_RC_AUTHSIZE", "the size of the authorization area is wrong"),
    0x045: ("TPM_RC_AUTH_CONTEXT", "this command takes no sessions"),
    0x046: ("TPM_RC_NV_RANGE", "beyond the end of the NV index"),
    0x047: ("TPM_RC_NV_SIZE", "this size is not allowed for the NV index"),
    0x048: ("TPM_RC_NV_LOCKED", "the NV index is locked, perhaps until the next start"),
    0x049: ("TPM_RC_NV_AUTHORIZATION", "the NV index's attributes do not let this authority do it"),
    0x04A: ("TPM_RC_NV_UNINITIALIZED", "the NV index has not been written yet"),
    0x04B: ("TPM_RC_NV_SPACE", "there is no room left for NV indices or persistent objects"),
    0x04C: (
        "TPM_RC_NV_DEFINED",
        "there is an NV index or persistent object of this handle already",
    ),
    0x050: ("TPM_RC_BAD_CONTEXT", "the saved context cannot be loaded"),
    0x051: ("TPM_RC_CPHASH", "the policy session is bound to other parameters or names"),
    0x052: ("TPM_RC_PARENT", "this handle is no parent of the object"),
    0x053: ("TPM_RC_NEEDS_TEST", "a self-test has to run first"),
    0x054: ("TPM_RC_NO_RESULT", "the TPM has no result to give; a value of zero perhaps"),
    0x055: ("TPM_RC_SENSITIVE", "the sensitive part does not decrypt to what it should be"),
    0x056: ("TPM_RC_READ_ONLY", "the TPM is in read-only mode"),
}
"""Format zero, version 2.0, by the low seven bits."""

_WARNINGS: Final = {
    0x01: ("TPM_RC_CONTEXT_GAP", "too old a session context stands in the way: load or flush it"),
    0x02: (
        "TPM_RC_OBJECT_MEMORY",
        "no room for another object: flush one, or use a resource manager",
    ),
    0x03: ("TPM_RC_SESSION_MEMORY", "no room for another session: flush or save one"),
    0x04: ("TPM_RC_MEMORY", "too little memory in the TPM: flush objects or sessions"),
    0x05: ("TPM_RC_SESSION_HANDLES", "no session handle is free: flush a session"),
    0x06: ("TPM_RC_OBJECT_HANDLES", "no object handle is free: flush an object"),
    0x07: ("TPM_RC_LOCALITY", "not from this locality"),
    0x08: ("TPM_RC_YIELDED", "the TPM interrupted the command: send it again"),
    0x09: ("TPM_RC_CANCELED", "the command was cancelled: send it again if it is still wanted"),
    0x0A: ("TPM_RC_TESTING", "self-tests are running: send it again"),
    0x20: ("TPM_RC_NV_RATE", "too many writes to NV in a short time: wait"),
    0x21: (
        "TPM_RC_LOCKOUT",
        "too many wrong passwords: the TPM takes none now; wait, or reset with the lockout password",
    ),
    0x22: ("TPM_RC_RETRY", "the TPM could not start the command: send it again"),
    0x23: ("TPM_RC_NV_UNAVAILABLE", "the TPM cannot write its state at the moment"),
    0x7F: ("TPM_RC_NOT_USED", "a value that is never an answer"),
    **{
        0x10 + number: (f"TPM_RC_REFERENCE_H{number}", f"handle {number + 1} is not loaded")
        for number in range(7)
    },
    **{
        0x18 + number: (f"TPM_RC_REFERENCE_S{number}", f"session {number + 1} is not loaded")
        for number in range(7)
    },
}
"""Format zero, version 2.0, severity set, by the low seven bits."""

_FORMAT_ONE: Final = {
    0x01: ("TPM_RC_ASYMMETRIC", "no such asymmetric algorithm here"),
    0x02: ("TPM_RC_ATTRIBUTES", "these attributes do not go together, or not with the command"),
    0x03: ("TPM_RC_HASH", "no such hash algorithm, or not for this"),
    0x04: ("TPM_RC_VALUE", "the value is out of range or does not fit here"),
    0x05: ("TPM_RC_HIERARCHY", "this hierarchy is switched off or wrong here"),
    0x07: ("TPM_RC_KEY_SIZE", "no key of this size here"),
    0x08: ("TPM_RC_MGF", "no such mask generation function here"),
    0x09: ("TPM_RC_MODE", "no such mode of operation here"),
    0x0A: ("TPM_RC_TYPE", "the object is of the wrong type"),
    0x0B: ("TPM_RC_HANDLE", "nothing has this handle, or nothing that fits"),
    0x0C: ("TPM_RC_KDF", "no such key derivation function, or not for this"),
    0x0D: ("TPM_RC_RANGE", "the value is outside the allowed range"),
    0x0E: (
        "TPM_RC_AUTH_FAIL",
        "wrong password or HMAC, which counts towards the lockout of dictionary attacks",
    ),
    0x0F: ("TPM_RC_NONCE", "the nonce is of the wrong size or value"),
    0x10: ("TPM_RC_PP", "somebody has to be present at the machine"),
    0x12: ("TPM_RC_SCHEME", "no such scheme, or not for this key"),
    0x15: ("TPM_RC_SIZE", "the size is wrong"),
    0x16: ("TPM_RC_SYMMETRIC", "no such cipher or key size here, or not for this"),
    0x17: ("TPM_RC_TAG", "the structure has the wrong tag"),
    0x18: ("TPM_RC_SELECTOR", "the choice within a union is none"),
    0x1A: ("TPM_RC_INSUFFICIENT", "the command ends too early"),
    0x1B: ("TPM_RC_SIGNATURE", "the signature is not valid"),
    0x1C: ("TPM_RC_KEY", "the key's fields do not fit, or not this use"),
    0x1D: (
        "TPM_RC_POLICY_FAIL",
        "the policy that was carried out is not the one that is asked for",
    ),
    0x1F: ("TPM_RC_INTEGRITY", "the data was changed, or belongs to another TPM or start of it"),
    0x20: ("TPM_RC_TICKET", "the ticket is not this TPM's, or of another time"),
    0x21: ("TPM_RC_RESERVED_BITS", "bits that must be zero are set"),
    0x22: ("TPM_RC_BAD_AUTH", "wrong password or HMAC; it does not count towards a lockout"),
    0x23: ("TPM_RC_EXPIRED", "the policy or ticket has expired"),
    0x24: ("TPM_RC_POLICY_CC", "the policy is for another command"),
    0x25: ("TPM_RC_BINDING", "public and sensitive part are not of one object"),
    0x26: ("TPM_RC_CURVE", "no such elliptic curve here"),
    0x27: ("TPM_RC_ECC_POINT", "the point is not on the curve"),
    0x28: ("TPM_RC_FW_LIMITED", "the secret of this firmware cannot be had"),
    0x29: ("TPM_RC_SVN_LIMITED", "the secret of this firmware version cannot be had"),
    0x2A: ("TPM_RC_PARMS", "no such set of parameters here"),
    0x2B: ("TPM_RC_EXT_MU", "the message representative has to be computed by the TPM"),
    0x2C: ("TPM_RC_ONE_SHOT_SIGNATURE", "this key signs only what comes in one piece"),
    0x2D: ("TPM_RC_SIGN_CONTEXT_KEY", "the signature was begun with another key"),
    0x30: ("TPM_RC_CHANNEL", "the command has to come over a secure channel"),
    0x31: ("TPM_RC_CHANNEL_KEY", "the secure channel was made with another key"),
}
"""Format one, by the low six bits."""

_LAYERS: Final = {
    6: "FAPI",
    7: "ESYS",
    8: "SYS",
    9: "MU",
    10: "TCTI",
    11: "RESMGR_TPM",
    12: "RESMGR",
    13: "POLICY",
}
"""Bits 16 to 23: who made the code. Linux's /dev/tpmrm0 and resource managers use 11."""

_LIKE_A_TPM: Final = frozenset({_LAYER_TPM, 11})
"""Layers whose codes are those of a TPM."""

_BASE: Final = {
    1: ("GENERAL_FAILURE", "it failed, and for no reason that has a code; see the log"),
    2: ("NOT_IMPLEMENTED", "this library has not got that function"),
    3: ("BAD_CONTEXT", "the context is not valid, or of another kind"),
    4: ("ABI_MISMATCH", "the library has another interface than the program was built for"),
    5: ("BAD_REFERENCE", "a pointer is null that must not be"),
    6: ("INSUFFICIENT_BUFFER", "the buffer is too small"),
    7: ("BAD_SEQUENCE", "the function was called out of its order"),
    8: ("NO_CONNECTION", "nobody answers where the TPM should be: does it run, is the path right"),
    9: ("TRY_AGAIN", "not ready yet: call again"),
    10: ("IO_ERROR", "reading or writing failed: does the TPM run, may this user open it"),
    11: ("BAD_VALUE", "a parameter has a value that is not allowed"),
    12: ("NOT_PERMITTED", "it may not be done"),
    13: ("INVALID_SESSIONS", "the sessions do not fit the command or each other"),
    14: ("NO_DECRYPT_PARAM", "the command has no parameter that can be encrypted"),
    15: ("NO_ENCRYPT_PARAM", "the response has no parameter that can be encrypted"),
    16: ("BAD_SIZE", "a size is wrong"),
    17: ("MALFORMED_RESPONSE", "what came is no response of a TPM"),
    18: ("INSUFFICIENT_CONTEXT", "the memory for the context is too small"),
    19: ("INSUFFICIENT_RESPONSE", "the response is too short"),
    20: ("INCOMPATIBLE_TCTI", "the TCTI is of a version that this library cannot use"),
    21: ("NOT_SUPPORTED", "it is not supported here"),
    22: ("BAD_TCTI_STRUCTURE", "the TCTI lacks a function or is damaged"),
    23: ("MEMORY", "too little memory"),
    24: ("BAD_TR", "the ESYS_TR handle is not valid, or of another kind"),
    25: ("MULTIPLE_DECRYPT_SESSIONS", "two sessions are to decrypt; one may"),
    26: ("MULTIPLE_ENCRYPT_SESSIONS", "two sessions are to encrypt; one may"),
    27: (
        "RSP_AUTH_FAILED",
        "the response's HMAC is wrong: it was changed, or the password is another",
    ),
    28: ("NO_CONFIG", "there is no configuration"),
    29: ("BAD_PATH", "the path is not well formed"),
    30: ("NOT_DELETABLE", "the object cannot be deleted"),
    31: ("PATH_ALREADY_EXISTS", "there is something of this path already"),
    32: ("KEY_NOT_FOUND", "there is no such key"),
    33: ("SIGNATURE_VERIFICATION_FAILED", "the signature is not valid"),
    34: ("HASH_MISMATCH", "the hashes are not the same"),
    35: ("KEY_NOT_DUPLICABLE", "the key cannot be duplicated"),
    36: ("PATH_NOT_FOUND", "there is nothing of this path"),
    37: ("NO_CERT", "there is no certificate"),
    38: ("NO_PCR", "there is no such PCR"),
    39: ("PCR_NOT_RESETTABLE", "the PCR cannot be reset"),
    40: ("BAD_TEMPLATE", "the template is not valid"),
    41: ("AUTHORIZATION_FAILED", "the authorization failed"),
    42: ("AUTHORIZATION_UNKNOWN", "nobody can say what authorizes this: is a callback set"),
    43: ("NV_NOT_READABLE", "the NV index cannot be read"),
    44: ("NV_TOO_SMALL", "the NV index is too small"),
    45: ("NV_NOT_WRITEABLE", "the NV index cannot be written"),
    46: ("POLICY_UNKNOWN", "there is no such policy"),
    47: ("NV_WRONG_TYPE", "the NV index is of another type"),
    48: ("NAME_ALREADY_EXISTS", "the name is taken"),
    49: ("NO_TPM", "there is no TPM: does it run, is it named right"),
    50: ("BAD_KEY", "the key is not valid, or not for this"),
    51: ("NO_HANDLE", "there is no handle"),
    52: ("NOT_PROVISIONED", "FAPI has not been set up: 'tss2_provision' does that"),
    53: ("ALREADY_PROVISIONED", "FAPI has been set up already"),
    54: ("CALLBACK_NULL", "a callback that is needed is not set"),
}
"""Base codes of the TSS, which all its layers share."""

_OF_EMULATORS: Final = {
    0x107: ("TPM_RC_LOCALITY", "not from this locality, as emulators say it; TPMs say 0x907"),
}
"""What the C suite's programs answer, and so ours, and no specification has."""


def explain(code: int, *, tpm12: bool = False) -> Explained:
    """Reads a response code of any layer; of any number, a negative one too.

    Args:
        code: TPM_RC, TSS2_RC or, of a TPM 1.2, of libtpms' functions and of PTM requests,
            TPM_RESULT. Which of them it is, its bits say.
        tpm12: It is a TPM 1.2's, whatever its bits say: vendors' codes there may look like
            those of a TPM 2.0.
    """
    if tpm12:
        return _explain12(code)
    layer = code >> _LAYER_SHIFT
    if layer in _LIKE_A_TPM:
        found = _explain_tpm(code & 0xFFFF)
        said = _LAYERS.get(layer)
        if said is None:
            return found._replace(code=code)
        words = f"a resource manager in the TPM's place: {found.words}"
        return found._replace(code=code, layer=said, words=words)
    said = _LAYERS.get(layer, f"layer {layer}" if 0 < layer <= 0xFF else "")
    base, words = _BASE.get(code & 0xFFFF, ("", UNKNOWN))
    if not base or layer not in _LAYERS:
        return Explained(code, said, "", "", UNKNOWN)
    return Explained(code, said, f"TSS2_{said}_RC_{base}", "", words)


def _explain_tpm(code: int) -> Explained:
    """Part 2, TPM_RC: bit 7 is format one; else bit 8 is TPM 2.0 and not 1.2."""
    if code == 0:
        return Explained(code, "TPM", "TPM_RC_SUCCESS", "", "it was done")
    if code > _HIGHEST:
        return Explained(code, "TPM", "", "", UNKNOWN)
    where = ""
    if code & _FORMAT_ONE_BIT:
        where = _where(code)
        name, words = _FORMAT_ONE.get(code & 0x3F, ("", UNKNOWN))
    elif not code & _VERSION_BIT:
        return _explain12(code)
    elif code & _VENDOR_BIT:
        name, words = "", _OF_A_VENDOR
    elif code in _OF_EMULATORS:
        name, words = _OF_EMULATORS[code]
    else:  # a reserved bit, 9, makes it a code of nobody's
        table = _WARNINGS if code & _WARNING_BIT else _ERRORS
        name, words = table.get(code & 0x27F, ("", UNKNOWN))
    return Explained(code, "TPM", name, where, words)


def _where(code: int) -> str:
    """What a code of format one is about; N of 0 is nothing in particular."""
    number = code >> 8 & 0xF
    if code & _PARAMETER_BIT:
        kind = "parameter"
    elif code & _SESSION_BIT:
        kind, number = "session", number & 7
    else:
        kind = "handle"
    return f"{kind} {number}" if number else ""


def _explain12(code: int) -> Explained:
    name, words = _TPM12.get(code, ("", UNKNOWN))
    if not name and 0 < code <= _HIGHEST and code & _VENDOR_BIT:
        words = _OF_A_VENDOR
    return Explained(code, "TPM 1.2", name, "", words)
