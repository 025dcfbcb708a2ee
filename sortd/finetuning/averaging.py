"""Averaging of weights: fine-tuned ones with those that they started from (WiSE-FT, Wortsman et al. 2022).

What a model has learnt elsewhere is partly forgotten while it is fine-tuned on few images; on the straight line between
the two there is often a point that knows both.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sortd.arrays import FloatArray

if TYPE_CHECKING:
    import torch


SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the fine-tuned weights that are tried; of equally good ones the first is taken."""


def weights_of(module: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """Return a copy of all weights and statistics, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def put_average(
    module: "torch.nn.Module", start: "Mapping[str, torch.Tensor]", end: "Mapping[str, torch.Tensor]", share: float
) -> None:
    """Give a module the weights ``share * end + (1 - share) * start``; what is no float is that of the end."""
    mixed = {
        name: value.lerp(end[name], share) if value.is_floating_point() else end[name] for name, value in start.items()
    }
    module.load_state_dict(mixed)


def choose_share(
    module: "torch.nn.Module",
    start: "Mapping[str, torch.Tensor]",
    *,
    logits: Callable[[], FloatArray],
    score: Callable[[FloatArray], float],
) -> tuple[float, dict[str, float]]:
    """Leave the best average of the start and the module's own weights in the module.

    Args:
        module: fine-tuned.
        start: the weights that it had before.
        logits: asks the module about the validation images.
        score: says how good logits are; higher is better.

    Returns:
        The share of the fine-tuned weights that was chosen, and the score of each that was tried, by its name.
    """
    end = weights_of(module)
    found: dict[float, float] = {}
    for share in SHARES:
        put_average(module, start, end, share)
        found[share] = score(logits())
    best = max(SHARES, key=lambda share: found[share])
    put_average(module, start, end, best)
    return best, {f"{share:g}": value for share, value in found.items()}
