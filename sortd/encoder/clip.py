"""A CLIP that sentence-transformers runs on torch, and what all encoders share: their interface and their checks.

Images arrive at the size of the model, so all that remains of its image processor is one multiplication and one
subtraction for a batch.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.models import (
    LocatedModel,
    ModelFolder,
    Use,
    first_line,
    repr_digest,
    transformer_folder,
    weight_files,
)
from sortd.encoder.texts import LEAST_FOUND, SPACE_WORDS, limit_texts, readable_folder, valid_utf8, words_found
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from sortd.files import read_regular

if TYPE_CHECKING:
    import torch

_MIN_LENGTH = 1e-6  # a shorter row has no direction
_UNIT_TOLERANCE = 1e-2  # of the length of an embedding; ten times the error of half precision
_MAX_DIFFERENCE = 1e-3  # between two runs on one image: GPUs may add in another order
SAME_COSINE = 0.999
"""The least cosine of two rows that stand for one image in one ``encoder_id``, or in two precisions."""
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


def are_of_unit_length(rows: FloatArray) -> bool:
    """Return whether rows (B, d) are embeddings: a device in a bad state returns zeros or NaN."""
    lengths = np.linalg.norm(rows, axis=1)
    return bool((np.abs(lengths - 1) < _UNIT_TOLERANCE).all())  # false for NaN, too


def lowest_cosine(left: FloatArray, right: FloatArray) -> float:
    """Return the least cosine of paired unit rows, (B, d) each; NaN if one is."""
    return float((left * right).sum(axis=1).min())


def probe_images(preprocessing: Preprocessing) -> Pixels:
    """Return a ramp and noise, two images that any encoder must distinguish."""
    height, width = preprocessing.crop_height, preprocessing.crop_width
    ramp = np.broadcast_to(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, width, 3))
    return np.stack([ramp, np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)])


def probe(encoder: Encoder, *, texts: Sequence[str] = ("a photo",)) -> FloatArray:
    """Test an encoder on two known images and return their rows; a device in a bad state gives no error, but noise.

    Raises:
        ModelError: rows are not finite, equal for unlike images, or different for the same image.
    """
    images = probe_images(encoder.preprocessing)
    first, second, again = encoder.encode_images(images[[0, 1, 0]])
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
    *("do_reduce_labels", "include_top", "rescale_offset"),
}


def preprocessing_of(processor: Mapping[str, Any]) -> Preprocessing:
    """Return the input size of a model from its image processor's settings (``to_dict()`` of transformers).

    Raises:
        ModelError: the settings contain a step that sortd does not implement.
    """
    kind = f"the {processor.get('image_processor_type', 'image processor')} of this model"
    if not processor.get("do_resize", True):
        raise ModelError(f"{kind} takes images of any size, which cannot form a batch")
    for step in sorted(_UNSUPPORTED_STEPS & {key for key, value in processor.items() if value}):
        raise ModelError(f"{kind} requires {step}, which sortd does not implement; choose another model")
    if processor.get("do_convert_rgb") is False:
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
        """Load; see ``backends.load_model``."""
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
        self.text_limit = limit_texts(self.words) if self.has_text else None
        processor = _image_settings(self.clip, folder)
        self.preprocessing = preprocessing_of(processor)
        self.scale, self.shift = (torch.from_numpy(value).to(self._device) for value in normalisation(processor))
        self.dimensions = self._row_length(folder)
        self.precision = "fp32"
        self.encoder_id = torch_encoder_id(model, self.dimensions, self.preprocessing, decoding)
        if words is not None:
            self._check_space(folder, words)
        if self._device.type != "cpu":  # float16 is slow there
            self.use_half_precision()

    def _check_space(self, folder: ModelFolder, words: ModelFolder) -> None:
        """Raise ModelError unless the rows of a text model for English words are near those of the CLIP itself."""
        pair = f"text model {words.name!r} and model {folder.name!r}"
        remedy = "that were trained together, or leave `text_model` out"
        dimensions = int(self.words.get_embedding_dimension() or 0)
        if dimensions != self.dimensions:
            raise ModelError(
                f"{pair} do not share a space, with {dimensions} and {self.dimensions} dimensions; choose two {remedy}"
            )
        limit_texts(self.clip)
        own, other = (self._encode_texts(SPACE_WORDS, model) for model in (self.clip, self.words))
        found = words_found(own, other)
        if found < LEAST_FOUND:
            raise ModelError(
                f"{pair} do not share a space: for {found} of {len(SPACE_WORDS)} English words the nearest row of the "
                f"other model is that of the same word, and at least {LEAST_FOUND} must be; choose two {remedy}"
            )

    def use_half_precision(self) -> bool:
        """Compute in float16 from now on if the rows of the probe agree with those in float32; return whether they do.

        The rows differ slightly, so the ``encoder_id`` is another one.
        """
        exact, clip, words = self._probe_rows(), self.clip, self.words
        self.clip = copy.deepcopy(clip).half()
        self.words = self.clip if words is clip else copy.deepcopy(words).half()
        try:
            agrees = lowest_cosine(exact, self._probe_rows()) >= SAME_COSINE
        except (ModelError, *LOADING_ERRORS):  # rows that are not finite, or an operation that has no half precision
            agrees = False
        if agrees:
            self.precision, self.encoder_id = "fp16", self.encoder_id.replace("-torch-", "-torch-fp16-")
        else:
            self.clip, self.words = clip, words
        return agrees

    def _probe_rows(self) -> FloatArray:
        """Return the rows of the images and, if it reads texts, of the words that test a precision."""
        rows = [self.encode_images(probe_images(self.preprocessing))]
        return np.concatenate([*rows, self.encode_texts(SPACE_WORDS)] if self.has_text else rows)

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
            values = planes.mul_(self.scale).sub_(self.shift).to(next(self.clip.parameters()).dtype)
            output = self.clip({"pixel_values": values, "modality": "image"})["sentence_embedding"]
            return normalise_rows(output.to(torch.float32).cpu().numpy(), self.encoder_id)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """See ``Encoder``; long texts are truncated."""
        if not self.has_text:
            raise ModelError(f"model {self.encoder_id} takes images only; set `model:` to a CLIP")
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        return self._encode_texts(texts, self.words)

    def _encode_texts(self, texts: Sequence[str], model: Any) -> FloatArray:  # noqa: ANN401
        output = model.encode([valid_utf8(text) for text in texts], convert_to_numpy=True, show_progress_bar=False)
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
        if model.use is Use.IMAGES and not (model.folder / "modules.json").exists():
            loaded = _load_image_network(model, safely | weights).to(device)
        else:
            with readable_folder(model) as folder:
                loaded = SentenceTransformer(str(folder), device=str(device), **safely, model_kwargs=weights)
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
