"""How a model reads texts: its tokenizer, their longest length and their padding."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sortd.arrays import FloatArray
from sortd.encoder.models import PADS_TEXTS, ModelFolder, transformer_folder
from sortd.files import read_regular, write_json

SPACE_WORDS = (
    *("a dog", "a cat", "a horse", "a bird", "a fish", "a tree", "a flower", "an apple", "bread", "a cup", "a chair"),
    *("a table", "a house", "a bridge", "a car", "a boat", "an airplane", "a bicycle", "a shirt", "a shoe", "a book"),
    *("a clock", "a screw", "a guitar"),
)
"""Words that show whether two text towers share a space."""
LEAST_FOUND = len(SPACE_WORDS) // 2
"""Of ``words_found``: chance finds one of them; a text model that was distilled from a CLIP nearly all."""

_NO_LIMIT = 10**9  # tokens; transformers uses 1e30 if a tokenizer has no limit


def valid_utf8(text: str) -> str:
    """Return a text with invalid UTF-8 replaced, which tokenizers reject; folder names may contain it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def words_found(own: FloatArray, other: FloatArray) -> int:
    """Return for how many texts the nearest of a model's rows is that of the same text in another model, (T, d) each.

    A text model for other languages is trained to give an English text the row of its CLIP (arXiv:2004.09813), which
    two spaces that were trained apart never do, even if their dimensions agree.
    """
    return int(((own @ other.T).argmax(axis=1) == np.arange(len(own))).sum())


@contextmanager
def readable_folder(model: ModelFolder) -> Iterator[Path]:
    """Yield a folder whose tokenizer transformers reads from tokenizer.json.

    The class that a SigLIP names for its tokenizer needs sentencepiece and has no export, and that of SigLIP 2 changes
    what the file says. The settings beside the links name the class that takes the file as it is; they do so in
    config.json, since transformers 5.2 fails where tokenizer_config.json names one and sentencepiece is missing.
    """
    at = transformer_folder(model)
    if model.kind not in PADS_TEXTS or at / "tokenizer.json" not in model.files:
        yield model.folder
        return
    named = {"config.json": "PreTrainedTokenizerFast", "tokenizer_config.json": None}
    with TemporaryDirectory(prefix="sortd-model-") as place:
        for file in model.files:
            link = Path(place) / file.relative_to(model.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if file.parent == at and file.name in named:
                settings = json.loads(read_regular(file, follow=True)) | {"tokenizer_class": named[file.name]}
                write_json(link, settings, durable=False)
            else:
                link.symlink_to(file.absolute())
        yield Path(place)


# sentence-transformers and transformers publish no types, hence Any below.
def limit_texts(words: Any) -> int | None:  # noqa: ANN401
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

    The network attends to the padding, so a text padded to another length, or on the left, has another row. SigLIP 2
    was trained on texts padded on the right: https://github.com/google-research/big_vision, SigLIP2_demo.ipynb and
    big_vision/pp/proj/paligemma/ops.py (``tok``); its class in transformers pads on the left by default.
    The length: https://huggingface.co/docs/transformers/model_doc/siglip2
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
