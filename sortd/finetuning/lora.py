"""Low-rank additions: instead of its layers, a network's small additions to them are trained (LoRA, by peft)."""

from typing import TYPE_CHECKING

from sortd.errors import ModelError
from sortd.finetuning.network import head_of

if TYPE_CHECKING:
    import torch

SCALE = 2
"""``lora_alpha`` as a multiple of the rank, as is usual."""


def add_lora(module: "torch.nn.Module", rank: int) -> "torch.nn.Module":
    """Return the module with additions of a rank to all its linear layers; they and the head alone are trained.

    Raises:
        ModelError: peft is not installed, or the network has no linear layer but its head.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("--lora needs peft: pip install 'sortd-images[lora]'") from error
    from torch import nn

    head = head_of(module)
    linear = [name for name, one in module.named_modules() if isinstance(one, nn.Linear) and one is not head]
    names = {one: name for name, one in module.named_modules()}
    if not linear:
        raise ModelError(f"a {type(module).__name__} has no linear layer but its head; leave --lora out")
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=linear, modules_to_save=[names[head]])
    added: torch.nn.Module = get_peft_model(module, config)
    return added


def merge_lora(module: "torch.nn.Module") -> "torch.nn.Module":
    """Return the network itself with its additions put into its layers."""
    merged: torch.nn.Module = module.merge_and_unload()  # type: ignore[operator]  # a method that peft added
    return merged
