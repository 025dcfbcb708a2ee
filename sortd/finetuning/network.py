"""The network of a fine-tuned model: pixels to logits, for any image classifier of transformers and for CLIP towers.

A CLIP of two separate models (``vision-text-dual-encoder``, as the packaged one is) has no classifier class of its own
in transformers: its vision model, its projection and a linear head are put together here, under the model type
``sortd-tower``. Everything else goes through ``AutoModelForImageClassification``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.encoding.normalisation import normalisation
from sortd.errors import ModelError

if TYPE_CHECKING:
    import torch


TOWER = "sortd-tower"
"""The ``model_type`` in the configuration of a vision tower with a linear head."""

MAP = "map"
"""In ``features`` of such a configuration: the mean of the convolutions' last map stands beside the embedding. It knows
textures and colours that the embedding, made to be like words, has let go."""

SHORTEST = 1e-6
"""Embeddings shorter than this are not scaled up to length one."""

# What third-party loaders raise on a folder that is damaged or not what it says; each of them means the same to us.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


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
        """How many logits it gives."""
        return int(head_of(self.module).out_features)

    def values(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Return normalised float32 (B, 3, H, W) of uint8 or float (B, 3, H, W), on the network's device."""
        import torch

        planes = pixels.to(self.device).to(torch.float32, memory_format=torch.channels_last)  # convolutions like it
        return planes * self._scale - self._shift

    def logits(self, pixels: Pixels) -> FloatArray:
        """Return float32 (B, classes) of uint8 (B, H, W, 3)."""
        import torch

        if not len(pixels):
            return np.empty((0, self.classes), np.float32)
        with torch.inference_mode():
            planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(0, 3, 1, 2)
            answer = logits_of(self.module(pixel_values=self.values(planes)))
            return np.asarray(answer.float().cpu().numpy(), dtype=np.float32)


def load_network(folder: Path, *, device: str = "auto", threads: int | None = None) -> Network:
    """Load the network of a folder that ``sortd finetune`` wrote.

    Raises:
        ModelError: it does not load, lacks weights, or the device cannot be used.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    processor = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    module = build_tower(config) if config.get("model_type") == TOWER else build_classifier(folder)
    load_weights(module, folder / "model.safetensors")
    return Network(module, processor, device_of(device))


def build_tower(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Return a vision tower with a projection and a linear head over unit embeddings, its weights made up.

    Args:
        config: ``vision_config``, ``projection_dim``, ``features`` and ``id2label``, as in the folder's config.json.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    vision = dict(config["vision_config"])
    vision_config = AutoConfig.for_model(vision.pop("model_type"), **vision)
    width, classes = int(config["projection_dim"]), len(config["id2label"])
    reads_map = MAP in config["features"]
    map_width = int(vision_config.backbone_config.hidden_sizes[-1]) if reads_map else 0

    class Tower(nn.Module):
        """``get_image_features`` of the dual encoder to unit length, maybe the last map too, and a linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.vision_model = AutoModel.from_config(vision_config)
            self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
            self.classifier = nn.Linear(width + map_width, classes)
            self._maps: list[torch.Tensor] = []
            if reads_map:  # the tower does not hand its last map out
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


def build_classifier(folder: Path) -> "torch.nn.Module":
    """Return the image classifier that a folder's config.json describes, its weights made up."""
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        module: torch.nn.Module = AutoModelForImageClassification.from_config(config)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{folder / 'config.json'} describes no image classifier that this transformers knows: {_first_line(error)}"
        ) from error
    return module


def load_weights(module: "torch.nn.Module", file: Path) -> None:
    """Put every weight of a safetensors file into a module that has exactly these.

    Raises:
        ModelError: the file is damaged, or lacks weights or has others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file), strict=True)
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"{file} does not load: {_first_line(error)}; copy the folder again, whole, or run `sortd finetune` anew"
        ) from error


def head_of(module: "torch.nn.Module") -> "torch.nn.Linear":
    """Return the linear layer that gives the logits: the last one of a classifier.

    Raises:
        ModelError: the module ends in no linear layer.
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


def logits_of(output: Any) -> "torch.Tensor":  # noqa: ANN401 - what transformers' classifiers return has no types
    """Return the logits of what a network answered."""
    answer: torch.Tensor = getattr(output, "logits", output)
    return answer


def device_of(device: str) -> "torch.device":
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
            f"device {device!r} cannot be used: {_first_line(error)}; set `device: auto` or `cpu`"
        ) from error
    return chosen


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
