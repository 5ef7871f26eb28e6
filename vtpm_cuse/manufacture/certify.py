"""Who makes the certificates: the local CA in this process, or a program of the user's."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca.certificates import CertificateKind, kind_shown
from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import read_small
from vtpm_cuse.manufacture.plan import RsaKey
from vtpm_cuse.programs import find_program, start_program

if TYPE_CHECKING:
    from vtpm_cuse.ca.keys import PublicKey
    from vtpm_cuse.ca.localca import LocalCa
    from vtpm_cuse.manufacture.config import CertificateConfig, SetupConfig
    from vtpm_cuse.manufacture.plan import (
        Certifier,
        Reporter,
        SetupPlan,
        TpmFacts,
        TpmKey,
    )

_USUAL_PLACES: Final = ("", "/usr/bin", "/usr/local/bin", "/usr/share/swtpm")
_OUR_TOOL: Final = ("swtpm_localca", "swtpm-localca")


class LocalCertifier:
    """The local CA. It is opened, or made, in a thread, while the TPM makes its first key."""

    def __init__(self, config: CertificateConfig, report: Reporter, plan: SetupPlan) -> None:
        self._config, self._report, self._plan = config, report, plan
        self._ca: LocalCa | None = None
        self._failure: BaseException | None = None
        self._opening = threading.Thread(target=self._open)
        self._canceled = False

    def begin(self) -> None:
        """See `Certifier`."""
        with contextlib.suppress(RuntimeError):  # no thread to be had: `certify` does it
            self._opening.start()

    def certify(
        self, kind: CertificateKind, key: TpmKey, facts: TpmFacts, tpm_serial: str = ""
    ) -> bytes:
        """A certificate of the CA. Raises VtpmError."""
        if self._opening.ident is None:
            self._open()
        else:
            self._opening.join()
        if self._ca is None or self._failure is not None:
            raise self._failure or UsageError("There is no local CA")
        request = self._ca.request(
            kind,
            _public_key(key),
            facts.maker,
            facts.specification,
            self._config.vmid or "",
            tpm_serial,
            is_tpm2=self._plan.tpm2,
            allow_signing=_may_sign(kind, self._plan),
            decryption=_may_sign(kind, self._plan) and self._plan.decryption,
        )
        certificate = self._ca.issue(request)
        self._say(f"Successfully created {kind_shown(kind.value)} certificate locally.")
        return certificate

    def cancel(self) -> None:
        """Ends a wait for the CA's lock. A CA that is being made is of use the next time."""
        self._canceled = True
        if (ca := self._ca) is not None:
            ca.give_up()

    def close(self) -> None:
        """See `Certifier`."""
        if self._opening.ident is not None:
            self._opening.join()

    def _open(self) -> None:
        try:
            from vtpm_cuse.ca.localca import LocalCa

            ca = LocalCa.from_files(self._config.configfile, self._config.optsfile, self._say)
            self._ca = ca
            if not self._canceled:
                ca.prepare()
        except BaseException as exc:
            self._failure = exc

    def _say(self, text: str) -> None:
        self._report.line(f"{_OUR_TOOL[0]}: {text}")


def _may_sign(kind: CertificateKind, plan: SetupPlan) -> bool:
    """Whether the key is an endorsement key that signs; its certificate is to say so."""
    return kind is CertificateKind.EK and plan.allow_signing


def _public_key(key: TpmKey) -> PublicKey:
    """As a certificate has it. Raises UsageError for what can be no key."""
    from vtpm_cuse.ca.keys import PublicKey

    try:
        if isinstance(key, RsaKey):
            return PublicKey.from_rsa(int.from_bytes(key.modulus, "big"))
        x, y = int.from_bytes(key.x, "big"), int.from_bytes(key.y, "big")
        return PublicKey.from_point(key.curve, x, y)
    except ValueError as exc:
        raise UsageError(f"A key of the TPM is none: {exc}") from exc


class ToolCertifier:
    """Calls a program that leaves ``ek.cert``, ``platform.cert`` and so on in a directory."""

    def __init__(
        self, tool: str, config: CertificateConfig, report: Reporter, plan: SetupPlan
    ) -> None:
        self._tool, self._config, self._report, self._plan = tool, config, report, plan
        self._directory = tempfile.mkdtemp(prefix="swtpm_setup.certs.")
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """See `Certifier`: nothing."""

    def certify(
        self, kind: CertificateKind, key: TpmKey, facts: TpmFacts, tpm_serial: str = ""
    ) -> bytes:
        """The certificate that the program made. Raises UsageError."""
        words = self._words(kind, key, facts, tpm_serial)
        self._report.line(f"  Invoking {' '.join(words)}")
        name = os.path.basename(self._tool)
        try:
            self._process = start_program(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as exc:
            raise UsageError(f"An error occurred running {self._tool}: {exc.strerror}") from exc
        said, complaint = self._process.communicate()
        if self._process.returncode:
            text = complaint.decode(errors="replace").strip()
            raise UsageError(f"{self._tool} exit with status {self._process.returncode}: {text}")
        for line in said.decode(errors="replace").splitlines():
            self._report.line(f"{name}: {line}")
        path = Path(self._directory, f"{kind.value}.cert")
        try:
            certificate = read_small(str(path))
            path.unlink()
        except (OSError, ValueError) as exc:
            raise UsageError(f"{self._tool} made no certificate: {exc}") from exc
        return certificate

    def _words(
        self, kind: CertificateKind, key: TpmKey, facts: TpmFacts, tpm_serial: str
    ) -> list[str]:
        config = self._config
        words = [self._tool, "--type", kind.value, "--key" if kind.is_identity else "--ek"]
        words += [key.text, "--dir", self._directory]
        for option, value in (("--logfile", config.logfile), ("--vmid", config.vmid)):
            if value is not None:
                words += [option, value]
        words += ["--tpm-spec-family", facts.specification.family]
        words += ["--tpm-spec-level", str(facts.specification.level)]
        words += ["--tpm-spec-revision", str(facts.specification.revision)]
        words += ["--tpm-manufacturer", facts.maker.manufacturer]
        words += ["--tpm-model", facts.maker.model]
        words += ["--tpm-version", facts.maker.version]
        if self._plan.tpm2:
            words.append("--tpm2")
        if _may_sign(kind, self._plan):
            words += ["--allow-signing", *(["--decryption"] if self._plan.decryption else [])]
        for option, value in (("--configfile", config.configfile), ("--optsfile", config.optsfile)):
            if value is not None:
                words += [option, value]
        return [*words, "--tpm-serial-num", tpm_serial] if kind.is_identity else words

    def cancel(self) -> None:
        """See `Certifier`."""
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """See `Certifier`."""
        shutil.rmtree(self._directory, ignore_errors=True)


def make_certifier(config: SetupConfig, report: Reporter) -> Certifier:
    """Whoever the configuration names. Raises VtpmError when it cannot work."""
    wanted = config.certificates
    if wanted.tool is None or is_local_ca(wanted.tool):
        return LocalCertifier(wanted, report, config.plan)
    if os.geteuid() == 0 and "/" in wanted.tool and not os.path.isabs(wanted.tool):
        # Who wrote to the current folder would choose what root runs.
        raise UsageError(f"create_certs_tool = {wanted.tool} must be an absolute path for root.")
    tool = find_program(wanted.tool)
    if tool is None:
        raise UsageError(f"Could not find {wanted.tool} in PATH.")
    return ToolCertifier(tool, wanted, report, config.plan)


def is_local_ca(tool: str) -> bool:
    """Whether *tool* is the local CA, which this process has itself, in one of its usual places."""
    beside = os.path.dirname(os.path.abspath(sys.argv[0]))
    return os.path.basename(tool) in _OUR_TOOL and os.path.dirname(tool) in {*_USUAL_PLACES, beside}
