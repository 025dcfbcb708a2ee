"""The verdict on int8: whether it may serve these references, what that rests on, and where it is remembered."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sortd.classify.held_out import Agreement, pooled
from sortd.encoding.exports import Exports
from sortd.encoding.manifest import Precision
from sortd.files import read_regular, write_atomic


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether int8 may serve these references, and what that rests on."""

    fingerprint: str
    """Identity of references, settings and export."""
    refusal: str | None
    """Why it may not, as a sentence; None where it may."""
    datasets: Mapping[str, Agreement]

    @property
    def precision(self) -> Precision:
        """What serves."""
        return Precision.FP32 if self.refusal else Precision.INT8

    def facts(self) -> dict[str, Any]:
        """Return it for people and programs, as plain values."""
        return {
            "serves": self.precision.value,
            "refusal": self.refusal,
            **_figures(pooled(self.datasets)),
            "datasets": {name: _figures(part) for name, part in sorted(self.datasets.items())},
        }


def _figures(part: Agreement) -> dict[str, Any]:
    return {
        "references": part.references,
        "judged": part.judged,
        "right_fp32": part.right_exact,
        "right_int8": part.right_quick,
        "filed": part.filed,
        "same": part.same,
        "share": None if part.share is None else round(part.share, 4),
        "mean_cosine": None if part.mean_cosine is None else round(part.mean_cosine, 5),
        "lowest_cosine": round(part.lowest_cosine, 5),
    }


def read_verdict(exported: Exports, root: Path) -> Verdict | None:
    """Return the last verdict on the datasets below a root, or None where there is none that can be read."""
    try:
        said = json.loads(read_regular(_verdict_file(exported, root)))
        datasets = {str(name): Agreement(**part) for name, part in said["datasets"].items()}
        return Verdict(str(said["fingerprint"]), said["refusal"], datasets)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_verdict(exported: Exports, root: Path, verdict: Verdict) -> None:
    """Keep a verdict beside its export; what cannot be kept is found again at the next start."""
    text = json.dumps(asdict(verdict), indent=1) + "\n"
    with suppress(OSError):  # a full disk or a read-only cache: the next start judges again
        write_atomic(_verdict_file(exported, root), text.encode(), durable=False)


def _verdict_file(exported: Exports, root: Path) -> Path:
    """One for each root: several configurations may share a cache."""
    return exported.folder / f"agreement-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.json"
