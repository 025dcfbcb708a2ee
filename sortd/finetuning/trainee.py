"""The trainee: a network as ``transformers.Trainer`` wants it, from raw pixels to the loss."""

import re
from typing import TYPE_CHECKING, Any

from sortd.finetuning.network import Network, head_of, logits_of
from sortd.finetuning.recipe import Recipe
from sortd.finetuning.views import plain_views, random_views

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def make_trainee(
    network: Network, size: tuple[int, int], class_weights: "torch.Tensor", recipe: Recipe
) -> "torch.nn.Module":
    """Return the module that is trained: views, normalisation, network, and the weighed loss.

    Its batch norms keep the statistics that they came with: those of a few images are worse than those of many.

    Args:
        network: what is taught.
        size: height and width of what it sees.
        class_weights: float32 (C,): how much an image of each class counts.
        recipe: how far views go, and how smooth the labels are.
    """
    import torch
    from torch import nn

    class Trainee(nn.Module):
        """Raw pixels, uint8 (B, h, w, 3), to a loss."""

        def __init__(self) -> None:
            super().__init__()
            self.module = network.module
            self.register_buffer("class_weights", class_weights, persistent=False)

        def train(self, mode: bool = True) -> "Trainee":  # noqa: FBT001 - torch's own signature
            super().train(mode)
            for one in self.module.modules():
                if isinstance(one, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the one name for all of them
                    one.eval()
            return self

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
                planes = pixels.permute(0, 3, 1, 2)
                seen = random_views(planes, size, recipe) if self.training else plain_views(planes, size)
                values = network.values(seen)
            logits = logits_of(self.module(pixel_values=values)).float()
            smoothing = recipe.label_smoothing if self.training else 0.0
            losses = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            shares = weights * self.get_buffer("class_weights")[labels]
            return {"loss": (losses * shares).sum() / shares.sum().clamp(min=1e-6), "logits": logits}

    return Trainee()


def class_weights_of(counts: "torch.Tensor", recipe: Recipe) -> "torch.Tensor":
    """Return float32 (C,) weights of classes by their images: the rarer, the more; an image counts 1 on average."""
    import torch

    raw = torch.where(counts > 0, counts.clamp(min=1e-6), 1.0) ** -recipe.balance
    return (raw * counts.sum() / (raw * counts).sum()).float()


def parameter_groups(module: "torch.nn.Module", recipe: Recipe, *, learning_rate: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: layer-wise rates, and no decay of biases and norms.

    Layers are counted as they come: every new numbered block (``encoder.layer.3``, ``stages.1``) is one deeper, and
    what has no number belongs to the block before it.
    """
    head = {id(parameter) for parameter in head_of(module).parameters()}
    depths, depth, blocks = {}, 0, set()
    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    for name, _ in named:
        found = _BLOCK.match(name)
        if found is not None and found.group(1) not in blocks:
            blocks.add(found.group(1))
            depth += 1
        depths[name] = depth
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        above = 0 if id(parameter) in head else depth + 1 - depths[name]
        rate = learning_rate * recipe.layer_decay**above
        decay = recipe.weight_decay if parameter.ndim > 1 and id(parameter) not in head else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
