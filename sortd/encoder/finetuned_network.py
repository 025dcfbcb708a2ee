"""The network of a fine-tuned model: an image classifier of transformers, or the vision tower of a dual encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.finetuned import (
    CONFIG_FILE,
    FACTS_FILE,
    PROCESSOR_FILE,
    REPAIR_ADVICE,
    WEIGHTS_FILE,
    FinetunedFacts,
    json_object,
    read_facts,
)
from sortd.encoder.models import first_line
from sortd.encoder.preprocessing import normalisation
from sortd.encoder.torch_encoder import torch_device
from sortd.errors import ModelError
from sortd.files import sha256_of

if TYPE_CHECKING:
    import torch

TOWER = "sortd-tower"
"""``model_type`` of a vision tower with a linear head, for which transformers has no class."""
MAP = "map"
"""Item of ``features``: the mean of the last convolutional map is appended to the embedding. It contains textures and
colours that the embedding, which was aligned with texts, lacks."""
SHORTEST = 1e-6
"""Least norm by which embeddings are divided."""
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""Errors of torch and transformers for a damaged or inconsistent folder."""


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
    """A loaded fine-tuned network; not thread-safe."""

    def __init__(self, facts: FinetunedFacts, network: Network) -> None:
        """Keep the network and its facts."""
        self.facts = facts
        self.preprocessing = facts.preprocessing
        self._network = network

    def logits(self, pixels: Pixels) -> FloatArray:
        """Return uncalibrated logits, float32 (B, C), of RGB pixels uint8 (B, H, W, 3).

        Raises:
            ValueError: the pixels do not have the size of ``preprocessing``.
            ModelError: a logit is not finite.
        """
        height, width = self.preprocessing.crop_height, self.preprocessing.crop_width
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, 3):
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {height}, {width}, 3)")
        answer = self._network.logits(pixels)
        if not bool(np.isfinite(answer).all()):
            raise ModelError(
                f"the fine-tuned model in {self.facts.folder} returned logits that are not finite; restart with "
                "`device: cpu`, and if that does not help, run `sortd finetune` again"
            )
        return answer


def load_finetuned(folder: Path, *, device: str = "auto", threads: int | None = None) -> FinetunedModel:
    """Load a fine-tuned model from its result folder, without code from the folder and without network access.

    ``threads`` are those of a forward pass; None or 0: torch's default.

    Raises:
        ModelError: the folder is invalid (see ``read_facts``), or the weights were changed or cannot be loaded.
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
    model.logits(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))  # fail early
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
    """Return the image classifier of a folder's config.json, with random weights.

    Raises:
        ModelError: transformers does not support it.
    """
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
