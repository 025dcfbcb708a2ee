"""A fine-tuned model's folder: its facts without torch, and the network that gives logits for pixels.

``sortd finetune`` writes the folder. Whoever decides by it reads the facts first, which is quick, and loads the network
when it is to serve. Logits come out uncalibrated: ``FinetunedFacts.probabilities`` applies the temperature.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sortd.deciding.confidence import Threshold, balanced_weights, choose_threshold, log_softmax
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from sortd.files import open_regular, read_regular

if TYPE_CHECKING:
    from sortd.finetuning.network import Network

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

FACTS_FILE = "sortd.json"
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
CURVES_FILE = "curves.png"
CONFUSION_FILE = "confusion.png"
CARD_FILE = "README.md"

FORMAT = 1
"""Raised when a folder of before would be read wrongly."""

_MEND = "copy the folder again, whole, or run `sortd finetune` anew"


@dataclass(frozen=True, slots=True, eq=False)
class FinetunedFacts:
    """What a folder says of its model; all but the weights is checked when it is read."""

    folder: Path
    dataset: str
    """The name of the dataset it was trained on."""
    labels: tuple[str, ...]
    """The class of each logit."""
    temperature: float
    """What logits are divided by before the softmax; fitted on validation images (Guo et al. 2017)."""
    base: str
    """The model that it was fine-tuned from."""
    model_id: str
    """Weights, configuration, labels, preprocessing and temperature: equal ids mean equal answers."""
    preprocessing: Preprocessing
    """How images are brought to the size that the network sees."""
    decoding: str
    """How JPEGs were decoded for its training: ``draft`` or ``full``."""
    created: str
    """ISO 8601, UTC."""
    confidence: Array
    """float64 (H,): the calibrated top probability of images that were not trained on."""
    is_right: BoolArray
    """(H,): whether the top class was the right one."""
    classes: IntArray
    """int64 (H,): their right classes, indices of ``labels``."""
    metrics: Mapping[str, Any]
    """What ``metrics.json`` holds; ``metrics["comparison"]["verdict"]`` is weaker, level or stronger."""

    @property
    def verdict(self) -> str:
        """How it does against the best mode of the prototypes: ``weaker``, ``level`` or ``stronger``."""
        return str(self.metrics["comparison"]["verdict"])

    def probabilities(self, logits: FloatArray) -> Array:
        """Return calibrated probabilities, float64 (B, classes), of logits (B, classes)."""
        return probabilities_of(logits, self.temperature)

    def threshold(self, precision: float) -> Threshold:
        """Return the least top probability at which the held-out images vouch for a precision; classes weigh alike."""
        weights = balanced_weights(self.classes, len(self.labels))
        return choose_threshold(self.confidence, self.is_right, weights, precision)


class FinetunedModel:
    """A loaded fine-tuned network. One thread at a time."""

    def __init__(self, facts: FinetunedFacts, network: "Network") -> None:
        """Take over a network whose weights are those of the facts."""
        self.facts = facts
        self._network = network

    @property
    def preprocessing(self) -> Preprocessing:
        """The size, and the way to it, at which images are handed over."""
        return self.facts.preprocessing

    def logits(self, pixels: Pixels) -> FloatArray:
        """Return uncalibrated logits, float32 (B, classes), of RGB pixels uint8 (B, H, W, 3).

        Raises:
            ValueError: the pixels are not of the size that ``preprocessing`` names.
            ModelError: the answer is no number: damaged weights, or a device in a bad state.
        """
        seen = self.preprocessing
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (seen.crop_height, seen.crop_width, 3):
            raise ValueError(
                f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {seen.crop_height}, {seen.crop_width}, 3)"
            )
        answer = self._network.logits(pixels)
        if not bool(np.isfinite(answer).all()):
            raise ModelError(
                f"the fine-tuned model in {self.facts.folder} answers with no number: the device may be in a bad "
                "state; start again with `device: cpu`, and if that does not help, run `sortd finetune` anew"
            )
        return answer


def probabilities_of(logits: FloatArray, temperature: float) -> Array:
    """Return float64 (B, classes) probabilities of logits (B, classes) at a temperature."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature))


def read_facts(folder: Path) -> FinetunedFacts:
    """Read and check what a fine-tuned model's folder says, without torch and without reading the weights.

    Raises:
        ModelError: it is missing, incomplete or damaged; the message names the file and how to mend it.
    """
    if not folder.is_dir():
        raise ModelError(
            f"there is no fine-tuned model in {folder}; run `sortd finetune`, or `sortd models demote` to decide by "
            "the prototypes"
        )
    said = _json_object(folder / FACTS_FILE)
    if said.get("format") != FORMAT:
        raise ModelError(
            f"{folder / FACTS_FILE} is of format {said.get('format')!r}, and this sortd reads {FORMAT}: run "
            "`sortd finetune` anew"
        )
    try:
        facts = _facts(folder, said, _json_object(folder / METRICS_FILE))
        _see_that_it_agrees(facts, said)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / FACTS_FILE} is damaged ({error}): {_MEND}") from error
    return facts


def _facts(folder: Path, said: Mapping[str, Any], metrics: Mapping[str, Any]) -> FinetunedFacts:
    seen = said["preprocessing"]
    held_out = said["held_out"]
    return FinetunedFacts(
        folder=folder,
        dataset=str(said["dataset"]),
        labels=tuple(str(label) for label in said["labels"]),
        temperature=float(said["temperature"]),
        base=str(said["base"]),
        model_id=_identity(folder, said),
        preprocessing=Preprocessing(
            int(seen["shortest_edge"]),
            int(seen["crop_height"]),
            int(seen["crop_width"]),
            int(seen["resample"]),
            Fit(seen["fit"]),
        ),
        decoding=str(said["decoding"]),
        created=str(said["created"]),
        confidence=np.array(held_out["confidence"], dtype=np.float64),
        is_right=np.array(held_out["is_right"], dtype=np.bool_),
        classes=np.array(held_out["classes"], dtype=np.int64),
        metrics=metrics,
    )


def _see_that_it_agrees(facts: FinetunedFacts, said: Mapping[str, Any]) -> None:
    """Hold what was read against itself and the other files.

    Raises:
        ValueError: what does not agree.
        ModelError: a file is missing or of another size.
    """
    labels, held = facts.labels, len(facts.confidence)
    if len(labels) < 2 or len(set(labels)) != len(labels):  # noqa: PLR2004 - a choice needs two
        raise ValueError("labels are not two or more different names")
    if not (math.isfinite(facts.temperature) and facts.temperature > 0):
        raise ValueError(f"temperature is {facts.temperature}")
    if facts.is_right.shape != (held,) or facts.classes.shape != (held,):
        raise ValueError("held_out has columns of different lengths")
    if held and not (facts.confidence.min() >= 0 and facts.confidence.max() <= 1 + 1e-9):
        raise ValueError("a confidence is no probability")
    if held and not (facts.classes.min() >= 0 and facts.classes.max() < len(labels)):
        raise ValueError("a held-out image is of no class")
    if facts.verdict not in {"weaker", "level", "stronger"}:
        raise ValueError(f"the verdict is {facts.verdict!r}")
    named = _json_object(facts.folder / CONFIG_FILE).get("id2label", {})
    if [named.get(str(index)) for index in range(len(named))] != list(labels):
        raise ValueError(f"{CONFIG_FILE} names other classes")
    weights = facts.folder / WEIGHTS_FILE
    size, wanted = weights.stat().st_size if weights.is_file() else None, int(said["weights"]["bytes"])
    if size != wanted:
        state = "is missing" if size is None else f"has {size:,} bytes instead of {wanted:,}"
        raise ModelError(f"{weights} {state}: {_MEND}")


def load(folder: Path, *, device: str = "auto", threads: int | None = None) -> FinetunedModel:
    """Load a fine-tuned model from its folder: safetensors only, no code of the folder's own, no network.

    Args:
        folder: as ``sortd finetune`` wrote it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        threads: how many threads a forward may use; None or 0 leaves it to torch.

    Raises:
        ModelError: what ``read_facts`` raises; or the weights are not those that were written, or do not load.
    """
    facts = read_facts(folder)
    wanted = _json_object(folder / FACTS_FILE)["weights"]["sha256"]
    try:
        if sha256_of(folder / WEIGHTS_FILE) != wanted:
            raise ModelError(f"{folder / WEIGHTS_FILE} is not what was written (its sha256 differs): {_MEND}")
    except OSError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read: {error.strerror}; look at its disk") from error
    from sortd.finetuning.network import load_network

    network = load_network(folder, device=device, threads=threads)
    if network.classes != len(facts.labels):
        raise ModelError(
            f"the network in {folder} has {network.classes} classes and {FACTS_FILE} names {len(facts.labels)}: {_MEND}"
        )
    model = FinetunedModel(facts, network)
    seen = facts.preprocessing
    noise = np.random.default_rng(0).integers(0, 256, (1, seen.crop_height, seen.crop_width, 3), dtype=np.uint8)
    model.logits(noise)  # a model that cannot answer is to fail here, not on somebody's image
    return model


def facts_json(facts: FinetunedFacts) -> str:
    """Return what ``sortd.json`` holds for facts whose folder has its weights, configuration and processor already."""
    weights = facts.folder / WEIGHTS_FILE
    said = {
        "format": FORMAT,
        "dataset": facts.dataset,
        "labels": list(facts.labels),
        "temperature": facts.temperature,
        "base": facts.base,
        "created": facts.created,
        "decoding": facts.decoding,
        "preprocessing": asdict(facts.preprocessing),
        "weights": {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)},
        "held_out": {
            "confidence": [round(float(one), 6) for one in facts.confidence],
            "is_right": [bool(one) for one in facts.is_right],
            "classes": [int(one) for one in facts.classes],
        },
    }
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with os.fdopen(open_regular(path, follow=True), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(folder: Path, said: Mapping[str, Any]) -> str:
    """Say what the model is by content; the weights count by the hash that was taken when they were written."""
    decisive = [said[key] for key in ("labels", "temperature", "preprocessing", "decoding")]
    whole = hashlib.sha256(json.dumps([decisive, said["weights"]["sha256"]]).encode())
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        whole.update(_bytes(folder / name))
    return f"finetuned-{len(said['labels'])}-torch-{whole.hexdigest()[:16]}"


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        loaded = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): {_MEND}") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} is no JSON object: {_MEND}")
    return loaded


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path, follow=True)
    except FileNotFoundError as error:
        raise ModelError(f"the fine-tuned model in {path.parent} is incomplete, {path.name} is missing: {_MEND}") from (
            error
        )
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; look at its disk and rights") from error
