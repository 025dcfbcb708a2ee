"""The optimizer Muon, also for convolution kernels: its steps are the orthogonalised momentum.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); the size of a step is matched to
AdamW's by 0.2 sqrt(max(rows, columns)) (arXiv:2502.16982, equation 4), so that both can use one learning rate.
`torch.optim.Muon` takes matrices only, not the kernels that hold most of this model.
"""

from collections.abc import Iterable
from typing import Any

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, from Jordan's page: steep at zero, approximate at one."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an AdamW step at learning rate 1 (arXiv:2502.16982)."""


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (r, c) with its singular values near 1, in bfloat16."""
    first, second, third = QUINTIC
    turned = matrix.shape[0] > matrix.shape[1]
    near = (matrix.mT if turned else matrix).bfloat16()
    near = near / near.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = near @ near.mT
        near = torch.addmm(near, torch.addmm(square, square, square, beta=second, alpha=third), near, beta=first)
    return near.mT if turned else near


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; a group is {params, lr, weight_decay}."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        """Take parameters of two dimensions or more."""
        super().__init__(list(groups), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's signature.
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(momentum, group["momentum"])
                update = orthogonal(ahead.reshape(len(ahead), -1))
                rows, columns = update.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = RMS * max(rows, columns) ** 0.5
                parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * size)
