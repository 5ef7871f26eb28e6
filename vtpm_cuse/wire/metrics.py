"""What many TPMs do, as text for monitoring: OpenMetrics 1.0, and the format of Prometheus before it.

By hand: prometheus-client keeps figures of its own, which would be a second truth, and takes 50 ms
to import.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple, get_args

from vtpm_cuse.wire.manager import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpm_cuse.wire.manager import Tpm

OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
"""The media type of what `text` gives."""

_BOUNDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_COUNTERS: Final = {
    "commands": "Commands that the TPM was given.",
    "wakes": "How often it went on in a process.",
    "sleeps": "How often it gave up its process, because nobody used it.",
    "failures": "How often it had to wait for a reset.",
}


class Histogram:
    """How long something takes that happens again and again.

    Attributes:
        counts: How often it took up to each of the bounds and more than the last bound, and longer.
        seconds: All together.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """It has happened once more."""
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.seconds += seconds


class _Family(NamedTuple):
    """Samples that are alike: endings of the name with labels, and values."""

    name: str
    kind: str
    what: str
    samples: Sequence[tuple[str, float]]


def text(tpms: Sequence[Tpm], wakes: Histogram | None = None, *, openmetrics: bool = True) -> str:
    """All figures of *tpms*, and how long wakes took, if that is known.

    Without *openmetrics*, as node_exporter's collector of text files understands it.
    """
    lines = []
    for name, kind, what, samples in _families(tpms, wakes):
        # The older format has no name for all that a counter has.
        family = f"{name}_total" if kind == "counter" and not openmetrics else name
        lines += [f"# HELP {family} {what}", f"# TYPE {family} {kind}"]
        lines += [f"{name}{ending} {value:g}" for ending, value in samples]
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _families(tpms: Sequence[Tpm], wakes: Histogram | None) -> Iterator[_Family]:
    states = Counter(tpm.state for tpm in tpms)
    every = [(f'{{state="{state}"}}', states[state]) for state in get_args(State)]
    yield _Family("vtpm_tpms", "gauge", "TPMs by what they do.", every)
    # Quoted as in JSON: a name has nothing that is quoted in another way here.
    labels = [f'tpm={json.dumps(tpm.name)},owner="{tpm.owner}"' for tpm in tpms]
    now = [(f'{{{of},state="{tpm.state}"}}', 1) for of, tpm in zip(labels, tpms, strict=True)]
    yield _Family("vtpm_state", "gauge", "What the TPM does, as a label.", now)
    for name, what in _COUNTERS.items():
        counted = [
            (f"_total{{{of}}}", tpm.counters.get(name, 0))
            for of, tpm in zip(labels, tpms, strict=True)
        ]
        yield _Family(f"vtpm_{name}", "counter", what, counted)
    if wakes is not None:
        what = "From the first byte for a sleeping TPM to the process that has it."
        yield _Family("vtpm_wake_seconds", "histogram", what, tuple(_buckets(wakes)))


def _buckets(histogram: Histogram) -> Iterator[tuple[str, float]]:
    count = 0
    for bound, more in zip((*_BOUNDS, "+Inf"), histogram.counts, strict=True):
        count += more
        yield f'_bucket{{le="{bound}"}}', count
    yield "_sum", histogram.seconds
    yield "_count", count
