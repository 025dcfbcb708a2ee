"""Fine-tuned models on disk: the facts of a result folder, and the promotion of a model; imports no torch."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.calibration import log_softmax
from sortd.errors import DestinationError, ModelError
from sortd.events import Fit, Preprocessing
from sortd.files import read_regular, sha256_of, sync_folder_at, write_atomic

FACTS_FILE = "sortd.json"
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
FORMAT = 1
"""Version of the file format."""

PROMOTION_FILE = "classifier.json"
RESULTS_FOLDER = "finetuned"
UNFINISHED = ".unfinished"
"""Suffix of the work folder of a training."""

REPAIR_ADVICE = "copy the complete folder again, or run `sortd finetune` again"


@dataclass(frozen=True, slots=True, eq=False)
class FinetunedFacts:
    """The facts of a result folder."""

    folder: Path
    dataset: str
    labels: tuple[str, ...]  # the class of each logit
    temperature: float  # see ``calibrated``
    base: str
    model_id: str  # identity of weights, configuration, labels, preprocessing and temperature
    preprocessing: Preprocessing
    decoding: str  # ``draft`` or ``full``: how JPEGs were decoded for the training
    created: str  # ISO 8601, UTC
    confidence: Array  # float64 (H,): calibrated top probability of the held-out images
    is_right: BoolArray  # (H,): whether the top class is correct
    classes: IntArray  # int64 (H,): the correct classes
    metrics: Mapping[str, Any]  # the content of ``metrics.json``

    @property
    def verdict(self) -> str:
        """Comparison with the best mode of the prototypes: ``weaker``, ``level`` or ``stronger``."""
        return str(self.metrics["comparison"]["verdict"])


def calibrated(logits: FloatArray, temperature: float) -> Array:
    """Return float64 (B, classes) probabilities of logits (B, classes) at a temperature (Guo et al. 2017)."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature))


def read_facts(folder: Path) -> FinetunedFacts:
    """Read and check a result folder without its weights; raise ModelError if it is missing, incomplete or damaged."""
    if not folder.is_dir():
        raise ModelError(
            f"there is no fine-tuned model in {folder}; run `sortd finetune`, or `sortd models demote` to use the "
            "prototypes"
        )
    said = json_object(folder / FACTS_FILE)
    if said.get("format") != FORMAT:
        raise ModelError(
            f"{folder / FACTS_FILE} has format {said.get('format')!r}, but this sortd reads {FORMAT}: run "
            "`sortd finetune` again"
        )
    try:
        held_out = said["held_out"]
        facts = FinetunedFacts(
            folder=folder,
            dataset=str(said["dataset"]),
            labels=tuple(str(label) for label in said["labels"]),
            temperature=float(said["temperature"]),
            base=str(said["base"]),
            model_id=_model_id(folder, said),
            preprocessing=preprocessing_from(said["preprocessing"]),
            decoding=str(said["decoding"]),
            created=str(said["created"]),
            confidence=np.array(held_out["confidence"], dtype=np.float64),
            is_right=np.array(held_out["is_right"], dtype=np.bool_),
            classes=np.array(held_out["classes"], dtype=np.int64),
            metrics=json_object(folder / METRICS_FILE),
        )
        _check(facts, int(said["weights"]["bytes"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{folder / FACTS_FILE} is damaged ({error}): {REPAIR_ADVICE}") from error
    return facts


def _check(facts: FinetunedFacts, weights_bytes: int) -> None:
    """Raise ValueError if facts are inconsistent, and ModelError if the weights are missing or have a wrong size."""
    labels, held = facts.labels, len(facts.confidence)
    if len(labels) < 2 or len(set(labels)) != len(labels):  # noqa: PLR2004 - a choice needs two
        raise ValueError("labels are not two or more different names")
    if not (math.isfinite(facts.temperature) and facts.temperature > 0):
        raise ValueError(f"temperature is {facts.temperature}")
    if facts.is_right.shape != (held,) or facts.classes.shape != (held,):
        raise ValueError("held_out has columns of different lengths")
    if held and not (facts.confidence.min() >= 0 and facts.confidence.max() <= 1 + 1e-9):
        raise ValueError("a confidence is not a probability")
    if held and not (facts.classes.min() >= 0 and facts.classes.max() < len(labels)):
        raise ValueError("a held-out image has an unknown class")
    if facts.verdict not in {"weaker", "level", "stronger"}:
        raise ValueError(f"the verdict is {facts.verdict!r}")
    named = json_object(facts.folder / CONFIG_FILE).get("id2label", {})
    if [named.get(str(index)) for index in range(len(named))] != list(labels):
        raise ValueError(f"{CONFIG_FILE} names other classes")
    weights = facts.folder / WEIGHTS_FILE
    size = weights.stat().st_size if weights.is_file() else None
    if size != weights_bytes:
        state = "is missing" if size is None else f"has {size:,} bytes instead of {weights_bytes:,}"
        raise ModelError(f"{weights} {state}: {REPAIR_ADVICE}")


def facts_json(facts: FinetunedFacts) -> str:
    """Return the content of ``sortd.json``; all other files must exist."""
    weights = facts.folder / WEIGHTS_FILE
    plain = ("dataset", "labels", "temperature", "base", "created", "decoding")
    said = {
        "format": FORMAT,
        **{key: getattr(facts, key) for key in plain},
        "preprocessing": asdict(facts.preprocessing),
        "weights": {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)},
        "held_out": {
            "confidence": [round(float(one), 6) for one in facts.confidence],
            "is_right": facts.is_right.tolist(),
            "classes": facts.classes.tolist(),
        },
    }
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def preprocessing_from(said: Mapping[str, Any]) -> Preprocessing:
    """Return a preprocessing from its fields in JSON."""
    numbers = {key: int(value) for key, value in said.items() if key != "fit"}
    return Preprocessing(**numbers, fit=Fit(said["fit"]))


def _model_id(folder: Path, said: Mapping[str, Any]) -> str:
    """Return a hash of everything that affects decisions, with the recorded hash of the weights."""
    decisive = [said[key] for key in ("labels", "temperature", "preprocessing", "decoding")]
    whole = hashlib.sha256(json.dumps([decisive, said["weights"]["sha256"]]).encode())
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        whole.update(_bytes(folder / name))
    return f"finetuned-{len(said['labels'])}-torch-{whole.hexdigest()[:16]}"


def json_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file of a result folder.

    Raises:
        ModelError: the file is missing, unreadable or damaged.
    """
    try:
        loaded = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): {REPAIR_ADVICE}") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} is not a JSON object: {REPAIR_ADVICE}")
    return loaded


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path, follow=True)
    except FileNotFoundError as error:
        where = f"the fine-tuned model in {path.parent}"
        raise ModelError(f"{where} is incomplete, {path.name} is missing: {REPAIR_ADVICE}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from error


@dataclass(frozen=True, slots=True)
class Promotion:
    """The promoted model of a dataset."""

    folder: Path
    model_id: str  # identity of the model that was promoted; another model in the same folder is not promoted
    verdict: str
    promoted_at: float  # seconds since the epoch


def read_promotion(state_folder: Path) -> Promotion | None:
    """Return the promotion in the state folder of a dataset, or None.

    Raises:
        ModelError: the file is unreadable or damaged.
    """
    file = state_folder / PROMOTION_FILE
    try:
        said: dict[str, Any] = json.loads(read_regular(file))
        folder, promoted_at = Path(str(said["folder"])), float(said["promoted_at"])
        return Promotion(folder, str(said["model_id"]), str(said["verdict"]), promoted_at)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}; run this as the user of sortd") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{file} is damaged ({error}): promote the model again, or run `sortd models demote`"
        ) from error


def write_promotion(state_folder: Path, promotion: Promotion) -> None:
    """Replace the promotion atomically; raise DestinationError if the state folder cannot be written."""
    file = state_folder / PROMOTION_FILE
    said = asdict(promotion) | {"folder": str(promotion.folder), "promoted_at": round(promotion.promoted_at, 3)}
    text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
    try:
        state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(file, text.encode("utf-8", "backslashreplace"))  # a lone surrogate is escaped
    except OSError as error:
        raise DestinationError(
            f"{file} cannot be written: {error.strerror}; free space, or run this as the user of sortd"
        ) from error


def remove_promotion(state_folder: Path) -> bool:
    """Remove the promotion; return whether there was one. Raise DestinationError if the file cannot be removed."""
    file = state_folder / PROMOTION_FILE
    try:
        file.unlink()
        sync_folder_at(state_folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DestinationError(f"{file} cannot be removed: {error.strerror}; run this as the user of sortd") from error
    return True


def finetuning_results(state_folder: Path) -> list[Path]:
    """Return the result folders of finished fine-tunings, the newest first; their names begin with the time."""
    found = [facts.parent for facts in (state_folder / RESULTS_FOLDER).glob(f"*/{FACTS_FILE}")]
    finished = (folder for folder in found if not folder.name.endswith(UNFINISHED))
    return sorted(finished, key=lambda folder: folder.name, reverse=True)
