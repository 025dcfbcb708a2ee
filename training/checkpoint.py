"""Checkpoints: the state of a run in one folder that is replaced atomically; no pickle in it runs code."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NAME = "checkpoint"
EXPORTED = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Standing:
    """The progress of a run: steps, seconds of training, updates of the average."""

    step: int = 0
    seconds: float = 0.0
    updates: int = 0


def save(
    run: Path,
    progress: Standing,
    *,
    weights: dict[str, torch.Tensor],
    average: dict[str, torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Write a checkpoint to a temporary folder and rename it; an interrupted write keeps the previous one."""
    partial, final, old = run / f"{NAME}.partial", run / NAME, run / f"{NAME}.old"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / "weights.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in average.items()}, partial / "average.safetensors")
    torch.save([optimizer.state_dict() for optimizer in optimizers], partial / "optimizers.pt")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Saved:
    """The content of a checkpoint; `optimizers` are state dicts."""

    progress: Standing
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]  # Any: torch types a state dict so.


def load(run: Path) -> Saved | None:
    """Return the checkpoint of a run, or the previous one, or None."""
    for folder in (run / NAME, run / f"{NAME}.old"):
        if (folder / "progress.json").exists():
            return Saved(
                Standing(**json.loads((folder / "progress.json").read_text(encoding="utf-8"))),
                load_file(folder / "weights.safetensors"),
                load_file(folder / "average.safetensors"),
                torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True),
            )
    return None


def load_average(run: Path) -> dict[str, torch.Tensor]:
    """Return the averaged weights of another run, or of an exported folder those of the dual encoder, in float32."""
    if (run / EXPORTED).exists():
        return {f"encoder.{name}": tensor.float() for name, tensor in load_file(run / EXPORTED).items()}
    return load_file(run / NAME / "average.safetensors")
