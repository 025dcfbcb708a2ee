"""The frozen blocks of a network: their output is computed once for each view of an image, and kept in a file.

A forward pass then starts at the first trained block. Modules below it return what they returned for one image when
the network was divided, without computing anything; the input of that block is replaced by the stored features. Two
images prove, before any training, that the network gives the same logits in this way.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.finetuned import Network
from sortd.finetune.data import Features, disk_errors_translated

if TYPE_CHECKING:
    import torch

TRAINED_SHARE = 1 / 3
"""Share of a network's blocks that are trained, rounded up: its last ones."""
FEATURE_BYTES = 8_000_000_000
"""Most bytes of stored features; more images have fewer views."""
BLOCK = re.compile(r"^(.*?\.\d+)\.")
"""The outermost numbered part of a parameter's name: ``encoder.layer.3``, ``stages.1``."""
BATCH = 64
_TOLERANCE = 1e-3  # of the largest logit; the order of additions changes with the number of images
_STORED_TOLERANCE = 1e-2  # the same for features in float16, in which they are stored


class _CutReachedError(Exception):
    """Ends a forward pass at the first trained block."""


class FrozenPart:
    """The blocks of a network below its trained ones; see ``divide``."""

    def __init__(self, network: Network, cut: "torch.nn.Module", skipped: "dict[torch.nn.Module, Any]") -> None:
        """Let the network start at ``cut`` where features are given; ``skipped`` are the modules below, and outputs."""
        self._network, self._skipped = network, skipped
        self._given: torch.Tensor | None = None
        self._reached: torch.Tensor | None = None
        self._is_asked = False
        self.images = 0  # whose features were computed
        self.shape: tuple[int, ...] = ()  # of the features of one image
        self._handle = cut.register_forward_pre_hook(self._at_cut, with_kwargs=True)
        for module, output in skipped.items():
            module.forward = self._skipping(module.forward, output)
            module.requires_grad_(requires_grad=False)

    def close(self) -> None:
        """Restore the network's own forward pass."""
        self._handle.remove()
        for module in self._skipped:
            del module.forward

    def features(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the input of the first trained block for values as of ``Network.values``."""
        self._is_asked = True
        try:
            self._network.module(pixel_values=values)
        except _CutReachedError:
            pass
        finally:
            self._is_asked = False
        found, self._reached = self._reached, None
        assert found is not None, "the block was reached when the network was divided"
        self.images += len(values)
        self.shape = tuple(found.shape[1:])
        return found

    def views_within(self, views: int, images: int) -> int:
        """Return how many views of each image are stored."""
        return max(1, min(views, FEATURE_BYTES // max(1, 2 * images * int(np.prod(self.shape)))))

    def has_features(self, file: Path, *, images: int) -> bool:
        """Return whether a file has the features of so many images in at least one view."""
        size, each = file.stat().st_size if file.is_file() else 0, 2 * images * int(np.prod(self.shape))
        return size > 0 and size % each == 0

    def read_features(self, file: Path) -> Features:
        """Return the features of a file, memory-mapped."""
        count = file.stat().st_size // (2 * int(np.prod(self.shape)))
        return np.memmap(file, np.float16, mode="r", shape=(count, *self.shape))

    def start_at(self, features: "torch.Tensor", size: tuple[int, int]) -> Any:  # noqa: ANN401 - of the network
        """Return the network's output for features (B, ...); ``size`` is height and width of its input."""
        import torch

        given = features.to(self._network.device).float()
        self._given = given.contiguous(memory_format=torch.channels_last) if given.ndim == 4 else given  # noqa: PLR2004 - a map
        nothing = torch.zeros((1, 1, 1, 1), device=given.device).expand(len(given), 3, *size)
        try:
            return self._network.module(pixel_values=nothing)
        finally:
            self._given = None

    def logits(self, features: Features, size: tuple[int, int]) -> FloatArray:
        """Return float32 (N, C) logits of features (N, ...)."""
        import torch

        found = []
        with torch.inference_mode():
            for start in range(0, len(features), BATCH):
                output = self.start_at(torch.from_numpy(np.array(features[start : start + BATCH])), size)
                found.append(getattr(output, "logits", output).float().cpu().numpy())
        return np.concatenate(found)

    def _at_cut(self, _: object, given: tuple[Any, ...], named: dict[str, Any]) -> Any:  # noqa: ANN401 - of torch
        if self._is_asked:
            self._reached = given[0] if given else named["hidden_states"]
            raise _CutReachedError
        if self._given is None:
            return None
        return ((self._given, *given[1:]), named) if given else (given, named | {"hidden_states": self._given})

    def _skipping(self, own: Callable[..., Any], output: Any) -> Callable[..., Any]:  # noqa: ANN401 - of any module
        def forward(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - of any module
            return own(*given, **named) if self._given is None else _repeated(output, len(self._given))

        return forward


def divide(network: Network, size: tuple[int, int]) -> FrozenPart | None:
    """Freeze the lower blocks of a network; None if it has no blocks, or cannot start at one of them."""
    import torch

    blocks = dict.fromkeys(
        found.group(1) for name, _ in network.module.named_parameters() if (found := BLOCK.match(name))
    )
    names = [name for name in blocks if not name.startswith("classifier")]
    if len(names) < 2:  # noqa: PLR2004 - one to train, one to freeze
        return None
    cut = network.module.get_submodule(names[-max(1, -int(-len(names) * TRAINED_SHARE // 1))])
    dice = torch.Generator().manual_seed(0)
    values = torch.rand((2, 3, *size), generator=dice).to(network.device) * 2 - 1
    values[1] = values[1] / 4 + 0.5  # of another mean and contrast
    with torch.no_grad():  # tensors of the inference mode could not be used in training
        skipped = _outputs_before(network, cut, values[:1])
        if not skipped:
            return None
        whole = network.module(pixel_values=values)
        part = FrozenPart(network, cut, skipped)
        try:
            features = part.features(values)
            logits, exact, stored = (
                getattr(one, "logits", one)
                for one in (whole, part.start_at(features, size), part.start_at(features.half(), size))
            )
            is_equal = all(
                bool(((logits - partial).abs().max() <= tolerance * logits.abs().max()).item())
                for partial, tolerance in ((exact, _TOLERANCE), (stored, _STORED_TOLERANCE))
            )
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
            is_equal = False  # its blocks take something else than the output of the block before
    part.images = 0
    if is_equal:
        return part
    part.close()
    network.module.requires_grad_(requires_grad=True)
    return None


def _outputs_before(network: Network, cut: "torch.nn.Module", values: "torch.Tensor") -> "dict[torch.nn.Module, Any]":
    """Return the outermost modules with weights that end before ``cut`` begins, with their outputs for one image."""
    ended: dict[torch.nn.Module, Any] = {}

    def end(module: "torch.nn.Module", _: object, output: Any) -> None:  # noqa: ANN401 - of any module
        ended[module] = output

    def reach(*_: object) -> None:
        raise _CutReachedError

    handles = [module.register_forward_hook(end) for module in network.module.modules()]
    handles.append(cut.register_forward_pre_hook(reach))
    try:
        network.module(pixel_values=values)
    except _CutReachedError:
        pass
    else:
        return {}
    finally:
        for handle in handles:
            handle.remove()
    inner = {within for module in ended for within in module.modules() if within is not module}
    return {
        module: output
        for module, output in ended.items()
        if module not in inner and any(True for _ in module.parameters())
    }


def _repeated(output: Any, count: int) -> Any:  # noqa: ANN401 - of any module
    """Return an output for one image as one for several, without copying."""
    import torch

    if isinstance(output, torch.Tensor):
        is_of_images = output.ndim > 0 and output.shape[0] == 1
        return output.expand(count, *output.shape[1:]) if is_of_images else output
    if isinstance(output, dict):
        return type(output)(**{key: _repeated(value, count) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(_repeated(value, count) for value in output)
    return output


def write_features(
    part: FrozenPart,
    network: Network,
    pixels: Pixels,
    views: "Sequence[Callable[[torch.Tensor], torch.Tensor]]",
    file: Path,
) -> None:
    """Write the features of all images in the first view, then of all in the second, and so on.

    Raises DestinationError.
    """
    import torch

    beside = file.with_name(f"{file.name}.part")
    try:
        with disk_errors_translated(file.parent), open(beside, "wb") as target, torch.inference_mode():
            for view in views:
                for start in range(0, len(pixels), BATCH):
                    planes = torch.from_numpy(np.array(pixels[start : start + BATCH])).permute(0, 3, 1, 2)
                    values = network.values(view(planes.to(network.device)))
                    target.write(part.features(values).half().contiguous().cpu().numpy().tobytes())
            target.flush()
            os.fsync(target.fileno())
            beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
