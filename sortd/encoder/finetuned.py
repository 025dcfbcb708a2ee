"""Fine-tuned models on disk: their facts, their promotion, and their network, for which alone torch is imported."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import Array, BoolArray, FloatArray, IntArray, Pixels
from sortd.classify.calibration import log_softmax
from sortd.encoder.clip import LOADING_ERRORS, check_pixels, normalisation, torch_device
from sortd.encoder.models import first_line
from sortd.errors import DestinationError, ModelError
from sortd.events import Fit, Preprocessing
from sortd.files import read_regular, sha256_of, sync_folder_at, write_json

if TYPE_CHECKING:
    import torch

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
            preprocessing=Preprocessing.from_fields(said["preprocessing"]),
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
    if facts.preprocessing.fit is Fit.WHOLE:
        raise ValueError("its images have different sizes")
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


def _model_id(folder: Path, said: Mapping[str, Any]) -> str:
    """Return a hash of everything that affects decisions, with the recorded hash of the weights."""
    decisive = [said[key] for key in ("labels", "temperature", "preprocessing", "decoding")]
    whole = hashlib.sha256(json.dumps([decisive, said["weights"]["sha256"]]).encode())
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        whole.update(_bytes(folder / name))
    return f"finetuned-{len(said['labels'])}-torch-{whole.hexdigest()[:16]}"


def json_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file of a result folder. Raises ModelError."""
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
    """Return the promotion in the state folder of a dataset, or None. Raises ModelError."""
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
    try:
        state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(file, said, indent=1)
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


TOWER = "sortd-tower"
"""``model_type`` of a vision tower with a linear head, for which transformers has no class."""
MAP = "map"
"""Item of ``features``: the mean of the last convolutional map is appended to the embedding. It contains textures and
colours that the embedding, which was aligned with texts, lacks."""
SHORTEST = 1e-6
"""Least norm by which embeddings are divided."""


def are_logits(rows: FloatArray) -> bool:
    """Return whether rows (B, classes) can be logits: finite, and not zeros as from a device in a bad state."""
    return bool(np.isfinite(rows).all() and rows.any(axis=1).all())


class Network:
    """A module on a device, with the normalisation of pixels."""

    def __init__(self, module: "torch.nn.Module", processor: Mapping[str, Any], device: "torch.device") -> None:
        """Move a module, whose ``module(pixel_values=...)`` returns logits, to the device."""
        import torch

        self.module = module.to(device).eval()
        self.device = device
        self._scale, self._shift = (torch.from_numpy(value).to(device) for value in normalisation(processor))

    @property
    def classes(self) -> int:
        """The number of logits."""
        return int(head_of(self.module).out_features)

    def values(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Return normalised float32 pixels (B, 3, H, W) on the device."""
        import torch

        planes = pixels.to(self.device).to(torch.float32, memory_format=torch.channels_last)  # faster convolutions
        return planes * self._scale - self._shift

    def logits(self, pixels: Pixels) -> FloatArray:
        """Return float32 logits (B, C) of uint8 pixels (B, H, W, 3)."""
        import torch

        if not len(pixels):
            return np.empty((0, self.classes), np.float32)
        with torch.inference_mode():
            planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(0, 3, 1, 2)
            output = self.module(pixel_values=self.values(planes))
            return np.asarray(getattr(output, "logits", output).float().cpu().numpy(), dtype=np.float32)


class FinetunedModel:
    """A loaded fine-tuned network as an ``Encoder``: its rows are logits, and it embeds no texts; not thread-safe."""

    has_text = False

    def __init__(self, facts: FinetunedFacts, network: Network) -> None:
        """Keep the network and its facts."""
        self.facts = facts
        self.encoder_id, self.dimensions, self.preprocessing = facts.model_id, len(facts.labels), facts.preprocessing
        self._network = network

    def encode_images(self, pixels: Pixels) -> FloatArray:
        """Return uncalibrated logits, float32 (B, C), of RGB pixels uint8 (B, H, W, 3).

        Raises:
            ValueError: the pixels do not have the size of ``preprocessing``.
            ModelError: a logit is not finite.
        """
        check_pixels(pixels, self.preprocessing)
        answer = self._network.logits(pixels)
        if not bool(np.isfinite(answer).all()):
            raise ModelError(
                f"the fine-tuned model in {self.facts.folder} returned logits that are not finite; restart with "
                "`device: cpu`, and if that does not help, run `sortd finetune` again"
            )
        return answer

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Raise ModelError."""
        raise ModelError(f"{self.encoder_id} is a fine-tuned model and cannot encode {len(texts)} texts")


def load_finetuned(folder: Path, *, device: str = "auto", threads: int | None = None) -> FinetunedModel:
    """Load a fine-tuned model from its result folder, without code from the folder and without network access.

    ``threads`` are those of a forward pass; None or 0: torch's default.

    Raises:
        ModelError: the folder is invalid (see ``read_facts``), the weights were changed or cannot be loaded, or the
            network does not return logits.
    """
    facts = read_facts(folder)
    wanted = json_object(folder / FACTS_FILE)["weights"]["sha256"]
    try:
        if sha256_of(folder / WEIGHTS_FILE) != wanted:
            raise ModelError(f"{folder / WEIGHTS_FILE} was changed (its sha256 differs): {REPAIR_ADVICE}")
    except OSError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read: {error.strerror}; check its disk") from error
    import torch

    if threads:
        torch.set_num_threads(threads)
    config = json_object(folder / CONFIG_FILE)
    module = build_tower(config) if config.get("model_type") == TOWER else build_image_classifier(folder)
    load_weights(module, folder / WEIGHTS_FILE)
    network = Network(module, json_object(folder / PROCESSOR_FILE), torch_device(device))
    if network.classes != len(facts.labels):
        raise ModelError(
            f"the network in {folder} has {network.classes} classes and {FACTS_FILE} names "
            f"{len(facts.labels)}: {REPAIR_ADVICE}"
        )
    model = FinetunedModel(facts, network)
    shape = (1, model.preprocessing.crop_height, model.preprocessing.crop_width, 3)
    if not are_logits(model.encode_images(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))):
        raise ModelError(
            f"the fine-tuned model {model.encoder_id} returns zeros: it was not trained, or its device is in a "
            "bad state; set `device: cpu`, or run `sortd finetune` again"
        )
    return model


def build_tower(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Return the vision tower of a config.json with a linear head over unit embeddings, with random weights."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    vision = dict(config["vision_config"])
    vision_config = AutoConfig.for_model(vision.pop("model_type"), **vision)
    width, classes = int(config["projection_dim"]), len(config["id2label"])
    uses_map = MAP in config["features"]
    map_width = int(vision_config.backbone_config.hidden_sizes[-1]) if uses_map else 0

    class Tower(nn.Module):
        """Normalised image features of the dual encoder, optionally the last map, and a linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.vision_model = AutoModel.from_config(vision_config)
            self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
            self.classifier = nn.Linear(width + map_width, classes)
            self._maps: list[torch.Tensor] = []
            if uses_map:  # the tower does not return its last map
                self.vision_model.embeddings.backbone.register_forward_hook(self._keep_map)

        def _keep_map(self, _module: nn.Module, _given: object, output: Any) -> None:  # noqa: ANN401 - of transformers
            self._maps.append(output.feature_maps[-1].mean(dim=(2, 3)))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            self._maps.clear()
            pooled = self.vision_model(pixel_values=pixel_values).pooler_output
            seen = [self.visual_projection(pooled), *self._maps]
            self._maps.clear()
            features = [nn.functional.normalize(one.float(), dim=-1, eps=SHORTEST) for one in seen]
            answer: torch.Tensor = self.classifier(torch.cat(features, dim=1))
            return answer

    return Tower()


def build_image_classifier(folder: Path) -> "torch.nn.Module":
    """Return the image classifier of a folder's config.json, with random weights. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        module: torch.nn.Module = AutoModelForImageClassification.from_config(config)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{folder / CONFIG_FILE} is no image classifier of the installed transformers: {first_line(error)}"
        ) from error
    return module


def load_weights(module: "torch.nn.Module", file: Path) -> None:
    """Load a safetensors file into a module.

    Raises:
        ModelError: the file is damaged, or its weights are not exactly those of the module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file), strict=True)
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(f"{file} cannot be loaded: {first_line(error)}; {REPAIR_ADVICE}") from error


def head_of(module: "torch.nn.Module") -> "torch.nn.Linear":
    """Return the last linear layer of ``classifier``, which computes the logits; raise ModelError if there is none."""
    from torch import nn

    classifier = getattr(module, "classifier", None)
    linear = [one for one in classifier.modules() if isinstance(one, nn.Linear)] if classifier is not None else []
    if not linear:
        raise ModelError(
            f"{type(module).__name__} has no linear layer `classifier`, which fine-tuning needs; choose another base"
        )
    return linear[-1]
