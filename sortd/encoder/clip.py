"""A CLIP that sentence-transformers runs on torch, and what all encoders share: their interface and their checks.

Images arrive at the size of the model, so all that remains of its image processor is one multiplication and one
subtraction for a batch.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.models import (
    PADS_TEXTS,
    LocatedModel,
    ModelFolder,
    Use,
    first_line,
    repr_digest,
    transformer_folder,
    weight_files,
)
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from sortd.files import read_regular

if TYPE_CHECKING:
    import torch

_MIN_LENGTH = 1e-6  # a shorter row has no direction
_MAX_DIFFERENCE = 1e-3  # between two runs on one image: GPUs may add in another order
_MIN_DISTANCE = 1e-6  # 1 - cosine of two unlike images; less means that the model ignores its input
_REMEDY = "its weights are damaged or the device is in a bad state; fetch the model again or set `device: cpu`"


class Encoder(Protocol):
    """Embeds pixels, or texts, as unit-length rows in one space. Used by one thread at a time."""

    @property
    def encoder_id(self) -> str:
        """Identifies weights, decoding, preprocessing and backend; equal IDs mean equal embeddings."""

    @property
    def dimensions(self) -> int:
        """The length of an embedding."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The size of the images, and the way of resizing."""

    @property
    def has_text(self) -> bool:
        """Whether it can embed texts."""

    def encode_images(self, pixels: Pixels) -> FloatArray:
        """Embed RGB pixels (B, H, W, 3) of the size in ``preprocessing`` as unit rows (B, d)."""

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts as unit rows (T, d) in the space of the images."""


def check_pixels(pixels: Pixels, preprocessing: Preprocessing) -> None:
    """Raise ValueError unless pixels have the type and size that the encoder takes."""
    height, width = preprocessing.crop_height, preprocessing.crop_width
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, 3):
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {height}, {width}, 3)")


def normalise_rows(rows: FloatArray, encoder_id: str) -> FloatArray:
    """Return float32 rows (B, d) scaled to length 1; raise ModelError if one is zero or not finite."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not bool(np.isfinite(lengths).all()) or float(lengths.min()) < _MIN_LENGTH:
        raise ModelError(f"model {encoder_id} returned zeros or values that are not finite: {_REMEDY}")
    scaled: FloatArray = rows / lengths
    return scaled


def valid_utf8(text: str) -> str:
    """Return a text with invalid UTF-8 replaced, which tokenizers reject; folder names may contain it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def probe(encoder: Encoder, *, texts: Sequence[str] = ("a photo",)) -> FloatArray:
    """Test an encoder on two known images and return their rows; a device in a bad state gives no error, but noise.

    Raises:
        ModelError: rows are not finite, equal for unlike images, or different for the same image.
    """
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    first, second, again = encoder.encode_images(np.stack([smooth, noise, smooth]))
    if float(np.abs(first - again).max()) > _MAX_DIFFERENCE:
        raise ModelError(f"model {encoder.encoder_id} gives two embeddings for one image: {_REMEDY}")
    if float(np.dot(first, second)) > 1 - _MIN_DISTANCE:
        raise ModelError(f"model {encoder.encoder_id} gives one embedding for two unlike images: {_REMEDY}")
    if encoder.has_text and texts:
        encoder.encode_texts(texts)
    return np.stack([first, second])


_CHANNELS = 3
_RESCALE_FACTOR = 1 / 255  # the default of image processors
_CONVNEXT_STRETCHES_FROM = 384
_UNSUPPORTED_STEPS = {
    *("do_pad", "do_flip_channel_order", "do_image_splitting", "do_thumbnail", "do_align_long_axis"),
    *("do_reduce_labels", "include_top"),
}


def preprocessing_of(processor: Mapping[str, Any]) -> Preprocessing:
    """Return the input size of a model from its image processor's settings (``to_dict()`` of transformers).

    Raises:
        ModelError: the settings contain a step that sortd does not implement.
    """
    kind = f"the {processor.get('image_processor_type', 'image processor')} of this model"
    if not processor.get("do_resize", True):
        raise ModelError(f"{kind} takes images of any size, which cannot form a batch")
    for step in _UNSUPPORTED_STEPS & {key for key, value in processor.items() if value}:
        raise ModelError(f"{kind} requires {step}, which sortd does not implement; choose another model")
    if processor.get("do_convert_rgb") is False or processor.get("rescale_offset"):
        raise ModelError(f"{kind} does not take plain RGB; choose another model")
    size, crop = _sides(processor, "size"), _sides(processor, "crop_size")
    crop = crop if processor.get("do_center_crop") else {}
    resample = int(processor.get("resample", 3))
    share = processor.get("crop_pct")  # ConvNeXt's parameter of the crop; from 384 pixels on it stretches instead
    match size:
        case {"height": int(height), "width": int(width)} if crop in ({}, size):
            return Preprocessing(min(height, width), height, width, resample, Fit.STRETCH)
        case {"shortest_edge": int(edge)} if share and edge >= _CONVNEXT_STRETCHES_FROM:
            return Preprocessing(edge, edge, edge, resample, Fit.STRETCH)
        case {"shortest_edge": int(edge)} if share:
            return Preprocessing(int(edge / share), edge, edge, resample)
        case {"shortest_edge": int(edge)} if crop.keys() == {"height", "width"} and edge >= max(crop.values()):
            return Preprocessing(edge, crop["height"], crop["width"], resample)
    raise ModelError(
        f"{kind} resizes to {size} and crops to {crop or 'nothing'}, which sortd does not implement; choose a model "
        f"with one fixed input size"
    )


def _sides(processor: Mapping[str, Any], key: str) -> dict[str, int]:
    found = processor.get(key)
    return {name: side for name, side in found.items() if side is not None} if isinstance(found, Mapping) else {}


def normalisation(processor: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return factor and shift, float32 (1, 3, 1, 1) each: the network takes ``pixels * factor - shift``.

    The ``encoder_id`` of cached embeddings does not include the rounding of these numbers. The order of the operations
    must therefore not change: the reciprocal of the deviation first, all in float32.

    Raises:
        KeyError: mean or deviation is missing.
    """
    rescale = float(processor.get("rescale_factor", _RESCALE_FACTOR)) if processor.get("do_rescale", True) else 1.0
    normalises = bool(processor.get("do_normalize", True))
    mean = _by_channel(processor["image_mean"] if normalises else 0.0)
    deviation = _by_channel(processor["image_std"] if normalises else 1.0)
    return np.float32(1.0) / deviation * np.float32(rescale), mean / deviation


def _by_channel(value: Any) -> FloatArray:  # noqa: ANN401 -- a setting, as JSON has it
    return np.broadcast_to(np.asarray(value, np.float32), (_CHANNELS,)).reshape(1, _CHANNELS, 1, 1)


PASSIVE_WAIT = ("OMP_WAIT_POLICY", "PASSIVE")
"""OpenMP reads it when torch is loaded: threads that spin at each barrier take cores from the decoders. Beside busy
decoders, a batch of 16 took 0.6 of the time without spinning, a single image 0.3 (OpenMP 5.2, 21.7)."""

_FIRST_TOKEN = frozenset({"vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers", "dinov3_vit"})
_POOLED = "sentence_embedding"
_SHOWN_NAMES = 4  # of missing weights
_NO_LIMIT = 10**9  # tokens; transformers uses 1e30 if a tokenizer has no limit
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""Errors of torch and transformers for a damaged or inconsistent folder."""


# sentence-transformers and transformers publish no types, hence Any in this module.
class TorchEncoder:
    """A loaded CLIP, with an optional separate text model, or an encoder of images; see ``Encoder``.

    ``clip`` and ``words`` are models of sentence-transformers, ``scale`` and ``shift`` the normalisation, (1, 3, 1, 1)
    each, and ``text_limit`` is the number of tokens of a text that are read (None: all). The export to ONNX uses them.
    """

    def __init__(
        self,
        model: LocatedModel,
        *,
        device: str = "auto",
        threads: int | None = None,
        decoding: str = "draft",
    ) -> None:
        """Load; see ``backends.load_encoder``."""
        folder, words = model.clip, model.words
        os.environ.setdefault(*PASSIVE_WAIT)
        import torch

        if threads:
            torch.set_num_threads(threads)
        self._device = torch_device(device)
        self.runs_on = self._device.type.upper()  # CPU, CUDA (AMD's GPUs, too) or MPS
        self.clip = _load(folder, self._device)
        self.has_text = folder.use is Use.CLIP
        _check_modalities(self.clip, folder)
        self.words = self.clip if words is None else _load(words, self._device)
        self.text_limit = _limit_texts(self.words) if self.has_text else None
        processor = _image_settings(self.clip, folder)
        self.preprocessing = preprocessing_of(processor)
        self.scale, self.shift = (torch.from_numpy(value).to(self._device) for value in normalisation(processor))
        self.dimensions = self._row_length(folder)
        if words is not None and int(self.words.get_embedding_dimension() or 0) != self.dimensions:
            raise ModelError(
                f"text model {words.name!r} has {self.words.get_embedding_dimension()} dimensions and model "
                f"{folder.name!r} has {self.dimensions}: they do not share a space; choose the pair that was "
                f"trained together, or leave `text_model` out"
            )
        self.encoder_id = torch_encoder_id(model, self.dimensions, self.preprocessing, decoding)

    def _row_length(self, folder: ModelFolder) -> int:
        """Return the number of dimensions of a row; an encoder of images is asked for the row of a black image."""
        import torch

        if self.has_text:
            return int(self.clip.get_embedding_dimension())
        black = torch.zeros(
            1, _CHANNELS, self.preprocessing.crop_height, self.preprocessing.crop_width, device=self._device
        )
        try:
            with torch.inference_mode():
                rows = self.clip({"pixel_values": black, "modality": "image"})["sentence_embedding"]
        except LOADING_ERRORS as error:
            raise ModelError(
                f"model {folder.name!r}, a {folder.kind}, gives no row for an image of the size in its "
                f"preprocessor_config.json ({first_line(error)}); choose another model"
            ) from error
        return int(rows.shape[1])

    def encode_images(self, pixels: Pixels) -> FloatArray:
        """See ``Encoder``."""
        import torch

        check_pixels(pixels, self.preprocessing)
        if len(pixels) == 0:
            return np.empty((0, self.dimensions), np.float32)
        with torch.inference_mode():
            interleaved = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
            # With channels contiguous in memory, one factor for each is three times as fast as interleaved.
            planes = interleaved.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            values = planes.mul_(self.scale).sub_(self.shift)
            output = self.clip({"pixel_values": values, "modality": "image"})["sentence_embedding"]
            return normalise_rows(output.to(torch.float32).cpu().numpy(), self.encoder_id)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """See ``Encoder``; long texts are truncated."""
        if not self.has_text:
            raise ModelError(f"model {self.encoder_id} takes images only; set `model:` to a CLIP")
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        output = self.words.encode([valid_utf8(text) for text in texts], convert_to_numpy=True, show_progress_bar=False)
        return normalise_rows(np.asarray(output, np.float32), self.encoder_id)


def torch_encoder_id(model: LocatedModel, dimensions: int, preprocessing: Preprocessing, decoding: str) -> str:
    """Return the ``encoder_id`` of a model in torch, without loading it."""
    identity = repr_digest((model.content_digests(), preprocessing, decoding))
    return f"{model.clip.kind}-{dimensions}-torch-{identity[:16]}"


def torch_device(device: str) -> "torch.device":
    """Return the device of the setting ``device``; raise ModelError if it cannot be used on this machine."""
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


def _load(model: ModelFolder, device: "torch.device") -> Any:  # noqa: ANN401
    """Load a folder in float32, without network, remote code or pickle."""
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print which weights are missing, which is checked below
    safely = {"local_files_only": True, "trust_remote_code": False}
    weights = {"use_safetensors": True, "dtype": torch.float32}
    try:
        if model.kind in PADS_TEXTS and (transformer_folder(model) / "tokenizer.json").exists():
            _prefer_tokenizer_file()
        if model.use is Use.IMAGES and not (model.folder / "modules.json").exists():
            loaded = _load_image_network(model, safely | weights).to(device)
        else:
            loaded = SentenceTransformer(str(model.folder), device=str(device), **safely, model_kwargs=weights)
        _check_weights(loaded, model)
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"model {model.name!r} in {model.folder} does not load: {first_line(error)}; fetch or copy it again, or "
            f"set `model: packaged`"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    loaded.eval()
    return loaded


def _load_image_network(model: ModelFolder, options: dict[str, Any]) -> "torch.nn.Module":
    """Load an encoder of images, in the form that sentence-transformers gives a CLIP.

    Its row of an image is the first token of a ViT and its relatives, which was trained to describe the image; their
    pooler is an addition that published weights often lack. Other networks have a pooler of their own.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel

    network = AutoModel.from_pretrained(str(model.folder), **options)
    try:
        processor = AutoImageProcessor.from_pretrained(str(model.folder), local_files_only=True).to_dict()
    except (ImportError, ValueError):  # some exist for torchvision only; their settings are enough
        processor = json.loads(read_regular(model.folder / "preprocessor_config.json", follow=True))
        if not {"image_mean", "image_std", "size"} <= processor.keys():
            raise

    class ImageNetwork(torch.nn.Module):
        modalities = ("image",)

        def __init__(self) -> None:
            super().__init__()
            self.transformers_model = network
            self.image_settings = processor

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            output = self.transformers_model(pixel_values=features["pixel_values"])
            if model.kind in _FIRST_TOKEN:
                return {"sentence_embedding": output.last_hidden_state[:, 0]}
            return {"sentence_embedding": output.pooler_output.flatten(1)}

    return ImageNetwork()


def _prefer_tokenizer_file() -> None:
    """Let transformers read the tokenizer.json of a SigLIP: its own class needs sentencepiece and has no export."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    TOKENIZER_MAPPING_NAMES["siglip"] = "TokenizersBackend"


def _check_weights(loaded: Any, model: ModelFolder) -> None:  # noqa: ANN401
    """Raise ModelError if a folder lacks weights of its network, by name: transformers would fill them at random."""
    from safetensors import safe_open

    folder, network = transformer_folder(model), loaded.transformers_model
    held: set[str] = set()
    for path in weight_files(model.name, folder):
        with safe_open(path, "np") as file:
            held |= set(file.keys())
    if network.state_dict().keys() <= held:
        return
    # Names of older versions, or of a network with a head, are known to transformers only.
    _, report = type(network).from_pretrained(
        str(folder), config=network.config, output_loading_info=True, use_safetensors=True, local_files_only=True
    )
    if model.kind in _FIRST_TOKEN:
        is_pooled = False
    else:
        is_pooled = model.use is not Use.WORDS or loaded[0].module_output_name == _POOLED
    lacking = sorted(key for key in report["missing_keys"] if is_pooled or not key.startswith("pooler."))
    if lacking:
        unknown = sorted(report["unexpected_keys"])
        named = f"; it holds {_some(unknown)}, which the network does not know" if unknown else ""
        raise ModelError(
            f"model {model.name!r} in {model.folder} lacks weights of its network: {_some(lacking)}{named}; fetch or "
            f"copy it again completely, from where it was published for transformers"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


def _image_settings(loaded: Any, model: ModelFolder) -> Mapping[str, Any]:  # noqa: ANN401
    """Return the settings of the image processor."""
    if hasattr(loaded, "image_settings"):
        return dict(loaded.image_settings)
    image_processor = getattr(loaded.processor, "image_processor", None if model.use is Use.CLIP else loaded.processor)
    if image_processor is None:
        raise ModelError(f"model {model.name!r} has no preprocessor_config.json; copy it again completely")
    return dict(image_processor.to_dict())


def _check_modalities(loaded: Any, model: ModelFolder) -> None:  # noqa: ANN401
    wanted = {"image", "text"} if model.use is Use.CLIP else {"image"}
    kind = "a CLIP" if model.use is Use.CLIP else "an encoder of images"
    lacking = sorted(wanted - {str(modality) for modality in loaded.modalities})
    if lacking:
        raise ModelError(f"model {model.name!r} is not {kind}: it takes no {' and no '.join(lacking)}")
    if model.use is Use.CLIP and getattr(loaded[0], "module_output_name", _POOLED) != _POOLED:
        raise ModelError(f"model {model.name!r} is not {kind}: it gives several embeddings for one image")


def _limit_texts(words: Any) -> int | None:  # noqa: ANN401
    """Make a tokenizer truncate texts at the limit of its network, and return that limit in tokens (None: no limit).

    A network with position embeddings fails on longer texts. RoBERTa and its relatives number positions from
    ``padding_idx + 1`` on, so the first positions hold no token.
    """
    config = words.transformers_model.config
    positions = getattr(getattr(config, "text_config", None) or config, "max_position_embeddings", None)
    known = words.max_seq_length
    if positions is None:
        return None if known is None or known > _NO_LIMIT else int(known)
    limit = min(int(positions) - _unused_positions(words), int(known or positions))
    words.max_seq_length = limit
    if config.model_type in PADS_TEXTS:
        _pad_texts(words[0], limit)
    return limit


def _pad_texts(module: Any, length: int) -> None:  # noqa: ANN401
    """Make a SigLIP read texts as in its training; Gemma's tokenizer, which SigLIP 2 uses, keeps capitals by itself.

    The network attends to the padding, so a text padded to another length has another row.
    https://huggingface.co/docs/transformers/model_doc/siglip2
    """
    from tokenizers.normalizers import Lowercase, Sequence

    module.processing_kwargs = {
        "text": {"padding": "max_length", "max_length": length, "padding_side": "right", "return_attention_mask": False}
    }
    tokenizer = module.tokenizer.backend_tokenizer
    tokenizer.normalizer = Sequence([Lowercase(), *([] if tokenizer.normalizer is None else [tokenizer.normalizer])])


def _unused_positions(words: Any) -> int:  # noqa: ANN401
    """Return the number of positions before that of the first token."""
    from torch.nn import Embedding

    for module in words.transformers_model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), Embedding):
            return padding + 1
    return 0
