"""A CLIP run by sentence-transformers on torch.

Images come in at the size that the model sees, so what is left of its own image processor is one multiplication and
one subtraction for a whole batch.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import Pixels
from sortd.encoder import models
from sortd.encoder.base import Rows, check_pixels, normalise_rows, valid_utf8
from sortd.encoder.models import CODE_FREE, ModelFolder, first_line
from sortd.encoder.preprocessing import normalisation, preprocessing_of
from sortd.errors import ModelError

if TYPE_CHECKING:
    import torch

PATIENT_THREADS = ("OMP_WAIT_POLICY", "PASSIVE")
"""Read by OpenMP when torch is loaded: threads that spin at each barrier burn the cores that decode. Beside busy
decoders a forward of 16 took 0.6 of the time without spinning, one of a lone image 0.3 (OpenMP 5.2, 21.7)."""

_NO_LIMIT = 10**9  # tokens: transformers says 1e30 for a tokenizer that does not know how much its network reads


class TorchEncoder:
    """A loaded CLIP, maybe with another model for words; see ``Encoder``.

    ``clip`` and ``words`` are models of sentence-transformers, ``scale`` and ``shift`` what is left of the image
    processor, (1, 3, 1, 1) each, ``text_limit`` how many tokens of a text are read (None: all): the export to ONNX is
    made of them.
    """

    def __init__(
        self,
        folder: ModelFolder,
        words: ModelFolder | None,
        *,
        device: str,
        cache_dir: Path | None,
        threads: int | None,
        decoding: str,
    ) -> None:
        """Load; see ``backends.load``."""
        os.environ.setdefault(*PATIENT_THREADS)
        import torch

        if threads:
            torch.set_num_threads(threads)
        self._device = _device(device)
        self.runs_on = self._device.type.upper()
        """``CPU``, ``CUDA`` (which is torch's word for AMD's GPUs as well) or ``MPS``."""
        self.clip = _load(folder, self._device)
        _see_that_it_is_a_clip(self.clip, folder.name)
        self.words = self.clip if words is None else _load(words, self._device)
        self.text_limit = _limit_texts(self.words)
        processor = _image_processor(self.clip, folder.name).to_dict()
        self.preprocessing = preprocessing_of(processor)
        self.scale, self.shift = (torch.from_numpy(value).to(self._device) for value in normalisation(processor))
        self.dimensions = int(self.clip.get_embedding_dimension())
        if words is not None and int(self.words.get_embedding_dimension() or 0) != self.dimensions:
            raise ModelError(
                f"text model {words.name!r} has {self.words.get_embedding_dimension()} dimensions and model "
                f"{folder.name!r} has {self.dimensions}: they do not share a space; choose the pair that was "
                f"trained together, or leave `text_model` out"
            )
        self.has_text = True
        content = [models.digest(part, cache_dir=cache_dir) for part in (folder, words) if part is not None]
        identity = hashlib.sha256(repr((content, self.preprocessing, decoding)).encode()).hexdigest()
        self.encoder_id = f"{folder.kind}-{self.dimensions}-torch-{identity[:16]}"

    def encode_images(self, pixels: Pixels) -> Rows:
        """See ``Encoder``."""
        import torch

        check_pixels(pixels, self.preprocessing)
        if len(pixels) == 0:
            return np.empty((0, self.dimensions), np.float32)
        with torch.inference_mode():
            interleaved = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
            # Channel by channel in memory, one factor for each runs three times as fast as interleaved.
            planes = interleaved.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            values = planes.mul_(self.scale).sub_(self.shift)
            output = self.clip({"pixel_values": values, "modality": "image"})["sentence_embedding"]
            return normalise_rows(output.to(torch.float32).cpu().numpy(), self.encoder_id)

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """See ``Encoder``; a text longer than the model reads is cut at its end."""
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        output = self.words.encode([valid_utf8(text) for text in texts], convert_to_numpy=True, show_progress_bar=False)
        return normalise_rows(np.asarray(output, np.float32), self.encoder_id)


def _device(device: str) -> "torch.device":
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


# What third-party loaders raise on a folder that is damaged or not what it says; each of them means the same to us.
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


# sentence-transformers and transformers publish no types, hence Any from here to the end.
def _load(model: ModelFolder, device: "torch.device") -> Any:  # noqa: ANN401
    """Load a folder: no network, no code of the model's own, no pickle, numbers in float32."""
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded = SentenceTransformer(
            str(model.folder),
            device=str(device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except (*_LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"model {model.name!r} in {model.folder} does not load: {first_line(error)}; fetch or copy it again, or "
            f"set `model: packaged`"
        ) from error
    _see_that_no_weight_is_missing(loaded, model)
    loaded.eval()
    return loaded


def _see_that_no_weight_is_missing(loaded: Any, model: ModelFolder) -> None:  # noqa: ANN401
    """Refuse a folder that holds fewer numbers than its network: transformers makes up the rest at random."""
    from safetensors import safe_open

    held = 0
    for path in model.files:
        if path.suffix == CODE_FREE:
            with safe_open(path, "np") as file:
                held += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    wanted = sum(parameter.numel() for parameter in loaded.parameters())
    if held < wanted:
        raise ModelError(
            f"model {model.name!r} in {model.folder} holds {held:,} of the {wanted:,} numbers that its configuration "
            f"asks for; fetch or copy it again, whole"
        )


def _see_that_it_is_a_clip(loaded: Any, name: str) -> None:  # noqa: ANN401
    lacking = sorted({"image", "text"} - {str(modality) for modality in loaded.modalities})
    if lacking:
        raise ModelError(f"model {name!r} is no CLIP: it takes no {' and no '.join(lacking)}")
    if getattr(loaded[0], "module_output_name", "sentence_embedding") != "sentence_embedding":
        raise ModelError(f"model {name!r} is no CLIP: it gives many embeddings for one image, not one")


def _limit_texts(words: Any) -> int | None:  # noqa: ANN401
    """Let a tokenizer cut texts at what its network can read, where it does not know that; return the limit in tokens.

    A network with a table of positions fails on a text that is longer. RoBERTa and its kin count positions from behind
    the number that pads, so their first places are no token's; a network without a table has no limit.
    """
    config = words.transformers_model.config
    places = getattr(getattr(config, "text_config", None) or config, "max_position_embeddings", None)
    known = words.max_seq_length
    if places is None:
        return None if known is None or known > _NO_LIMIT else int(known)
    limit = min(int(places) - _unused_places(words), int(known or places))
    words.max_seq_length = limit
    return limit


def _unused_places(words: Any) -> int:  # noqa: ANN401
    """Return how many of a network's positions come before that of the first token."""
    from torch.nn import Embedding

    for module in words.transformers_model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), Embedding):
            return padding + 1
    return 0


def _image_processor(loaded: Any, name: str) -> Any:  # noqa: ANN401
    processor = getattr(loaded.processor, "image_processor", None)
    if processor is None:
        raise ModelError(
            f"model {name!r} does not say how its images are prepared (preprocessor_config.json); copy it again, whole"
        )
    return processor
