"""The network of a fine-tuned model: pixels to logits, for any image classifier of transformers and for CLIP towers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.models import first_line
from sortd.encoder.preprocessing import normalisation
from sortd.errors import ModelError
from sortd.files import sha256_of
from sortd.finetuned import (
    CONFIG_FILE,
    FACTS_FILE,
    MEND,
    PROCESSOR_FILE,
    WEIGHTS_FILE,
    FinetunedFacts,
    json_object,
    read_facts,
)

if TYPE_CHECKING:
    import torch


TOWER = "sortd-tower"
"""``model_type`` of a vision tower of a dual encoder with a linear head, for which transformers has no class."""
MAP = "map"
"""In ``features`` of such a configuration: the mean of the last convolutional map is concatenated to the embedding. It
holds textures and colours that the embedding, which was aligned with texts, does not."""
SHORTEST = 1e-6
"""Smallest norm by which embeddings are divided."""
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""What torch and transformers raise on a folder that is damaged or does not agree with itself."""


class Network:
    """A module on a device, with the normalisation of its pixels."""

    def __init__(self, module: "torch.nn.Module", processor: Mapping[str, Any], device: "torch.device") -> None:
        """Take over a module that answers ``module(pixel_values=...)`` with logits."""
        import torch

        self.module = module.to(device).eval()
        self.device = device
        self._scale, self._shift = (torch.from_numpy(value).to(device) for value in normalisation(processor))

    @property
    def classes(self) -> int:
        """The number of logits."""
        return int(head_of(self.module).out_features)

    def values(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Return normalised float32 (B, 3, H, W) of uint8 or float (B, 3, H, W), on the network's device."""
        import torch

        planes = pixels.to(self.device).to(torch.float32, memory_format=torch.channels_last)  # faster convolutions
        return planes * self._scale - self._shift

    def logits(self, pixels: Pixels) -> FloatArray:
        """Return float32 (B, classes) of uint8 (B, H, W, 3)."""
        import torch

        if not len(pixels):
            return np.empty((0, self.classes), np.float32)
        with torch.inference_mode():
            planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(0, 3, 1, 2)
            output = self.module(pixel_values=self.values(planes))
            return np.asarray(getattr(output, "logits", output).float().cpu().numpy(), dtype=np.float32)


class FinetunedModel:
    """A loaded fine-tuned network. One thread at a time."""

    def __init__(self, facts: FinetunedFacts, network: Network) -> None:
        """Take over a network whose weights are those of the facts."""
        self.facts = facts
        self.preprocessing = facts.preprocessing
        self._network = network

    def logits(self, pixels: Pixels) -> FloatArray:
        """Return uncalibrated logits, float32 (B, classes), of RGB pixels uint8 (B, H, W, 3).

        Raises:
            ValueError: the pixels are not of the size that ``preprocessing`` names.
            ModelError: a logit is no number.
        """
        height, width = self.preprocessing.crop_height, self.preprocessing.crop_width
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, 3):
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {height}, {width}, 3)")
        answer = self._network.logits(pixels)
        if not bool(np.isfinite(answer).all()):
            raise ModelError(
                f"the fine-tuned model in {self.facts.folder} answers with no number: the device may be in a bad "
                "state; start again with `device: cpu`, and if that does not help, run `sortd finetune` anew"
            )
        return answer


def load_finetuned(folder: Path, *, device: str = "auto", threads: int | None = None) -> FinetunedModel:
    """Load a fine-tuned model from its folder: safetensors only, no code of the folder's own, no network access.

    Args:
        folder: as ``sortd finetune`` wrote it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        threads: threads of a forward pass; None or 0 leaves it to torch.

    Raises:
        ModelError: see ``read_facts``; or the weights are not those that were written, or do not load.
    """
    facts = read_facts(folder)
    wanted = json_object(folder / FACTS_FILE)["weights"]["sha256"]
    try:
        if sha256_of(folder / WEIGHTS_FILE) != wanted:
            raise ModelError(f"{folder / WEIGHTS_FILE} is not what was written (its sha256 differs): {MEND}")
    except OSError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read: {error.strerror}; look at its disk") from error
    import torch

    if threads:
        torch.set_num_threads(threads)
    config = json_object(folder / CONFIG_FILE)
    module = build_tower(config) if config.get("model_type") == TOWER else build_image_classifier(folder)
    load_weights(module, folder / WEIGHTS_FILE)
    network = Network(module, json_object(folder / PROCESSOR_FILE), torch_device(device))
    if network.classes != len(facts.labels):
        raise ModelError(
            f"the network in {folder} has {network.classes} classes and {FACTS_FILE} names {len(facts.labels)}: {MEND}"
        )
    model = FinetunedModel(facts, network)
    shape = (1, model.preprocessing.crop_height, model.preprocessing.crop_width, 3)
    model.logits(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))  # it fails here, if at all
    return model


def build_tower(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Return a vision tower with a projection and a linear head over unit embeddings, with random weights.

    Args:
        config: ``vision_config``, ``projection_dim``, ``features`` and ``id2label``, as in the folder's config.json.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    vision = dict(config["vision_config"])
    vision_config = AutoConfig.for_model(vision.pop("model_type"), **vision)
    width, classes = int(config["projection_dim"]), len(config["id2label"])
    uses_map = MAP in config["features"]
    map_width = int(vision_config.backbone_config.hidden_sizes[-1]) if uses_map else 0

    class Tower(nn.Module):
        """``get_image_features`` of the dual encoder, normalised, the last map too if wanted, and a linear layer."""

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
    """Return the image classifier that a folder's config.json describes, with random weights.

    Raises:
        ModelError: transformers does not know it.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        module: torch.nn.Module = AutoModelForImageClassification.from_config(config)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{folder / CONFIG_FILE} describes no image classifier that this transformers knows: {first_line(error)}"
        ) from error
    return module


def load_weights(module: "torch.nn.Module", file: Path) -> None:
    """Load every weight of a safetensors file into a module that has exactly these.

    Raises:
        ModelError: the file is damaged, or lacks weights or has others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file), strict=True)
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(f"{file} does not load: {first_line(error)}; {MEND}") from error


def head_of(module: "torch.nn.Module") -> "torch.nn.Linear":
    """Return the linear layer that gives the logits: the last one of ``classifier``.

    Raises:
        ModelError: there is none.
    """
    from torch import nn

    classifier = getattr(module, "classifier", None)
    linear = [one for one in classifier.modules() if isinstance(one, nn.Linear)] if classifier is not None else []
    if not linear:
        raise ModelError(
            f"a {type(module).__name__} ends in no linear layer named `classifier`, which fine-tuning needs; choose "
            "another base"
        )
    return linear[-1]


def torch_device(device: str) -> "torch.device":
    """Return the device that a configuration means.

    Raises:
        ModelError: it cannot be used here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used: {first_line(error)}; set `device: auto` or `cpu`"
        ) from error
    return chosen
