"""The manifest of an export: what the files beside it hold, by which they are found sound, and how to feed them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from sortd.events import Fit, Preprocessing


class Precision(StrEnum):
    """In what numbers a model computes."""

    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class TextInputs:
    """How texts become the inputs of the text tower."""

    names: tuple[str, ...]  # of input_ids, attention_mask, token_type_ids
    padding: int  # the token that fills the rows of a batch to one length
    length: int | None  # of every row, where the model was taught with that; None fills to the longest


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export holds, as it is written beside it."""

    identity: str
    dimensions: int
    preprocessing: Preprocessing
    text: TextInputs
    gain: float
    """How many times as quick int8 was as float32, image by image, when it was made; 0 where nothing can be int8."""
    weight_range: int
    """The largest quantized weight of the int8 files: a processor whose own ``onnx_int8.weight_range`` is smaller
    would overflow on them."""
    checksums: Mapping[str, str]
    """sha256 of each file by its name."""
    made_with: Mapping[str, str] = field(default_factory=dict)
    """Versions, for people."""

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Return what ``to_json`` wrote.

        Raises:
            ValueError: It is something else.
        """
        try:
            said: dict[str, Any] = json.loads(text)
            seen, words = said.pop("preprocessing"), said.pop("text")
            preprocessing = Preprocessing(**{**seen, "fit": Fit(seen["fit"])})
            return cls(
                preprocessing=preprocessing, text=TextInputs(**{**words, "names": tuple(words["names"])}), **said
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no manifest of an export: {error}") from error


def tower_file(name: str, precision: Precision) -> str:
    """Return the file name of a tower."""
    return f"{name}.onnx" if precision is Precision.FP32 else f"{name}.{precision}.onnx"
