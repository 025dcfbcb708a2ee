"""The champion: what every mode of the prototypes makes of the images by which a fine-tuned model is judged."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sortd import mends
from sortd.daemon.embedder import Embedder
from sortd.deciding.decision import judge
from sortd.deciding.prompts import GENERIC_NOUNS, prompts
from sortd.errors import ModelError
from sortd.events import FloatArray
from sortd.finetuning.measures import Judged
from sortd.finetuning.photos import Photos
from sortd.finetuning.split import Split
from sortd.layout import Area, Layout
from sortd.prototypes import DecisionSettings, Mode, SupportSet, build
from sortd.references import class_texts, read_descriptions


def judge_by_prototypes(
    photos: Photos, split: Split, named: tuple[FloatArray, FloatArray] | None, encoder_id: str
) -> list[Judged]:
    """Return what each mode says of the test images, taught by all others, validation included: it needs none.

    Args:
        photos: the images and their embeddings.
        split: which ones teach.
        named: prototypes of the names (C, d) and the generic mean (d,), as ``embed_names`` gives them; without them
            ``text`` is left out and ``mixed`` is ``best``.
        encoder_id: of the encoder.
    """
    taught = split.taught
    support = SupportSet(
        labels=photos.labels,
        embeddings=photos.embeddings[taught],
        classes=photos.classes[taught],
        sources=tuple(photos.files[index][0] for index in taught),
        text=None if named is None else named[0],
        text_mean=None if named is None else named[1],
        strangers=np.zeros((0, photos.embeddings.shape[1]), np.float32),
        encoder_id=encoder_id,
        fingerprint="",
    )
    queries = photos.embeddings[split.test].astype(np.float64)
    odd = photos.strangers.astype(np.float64)
    found = []
    for mode in Mode:
        if mode is Mode.TEXT and named is None:
            continue
        prototypes = build(support, DecisionSettings(mode=mode, abstain=None), generation=1)
        known = judge(prototypes, queries, mode).probabilities
        strangers = judge(prototypes, odd, mode).probabilities.max(axis=1) if len(odd) else np.zeros(0)
        found.append(Judged(mode.value, known, strangers))
    return found


def embed_names(
    layout: Layout, labels: Sequence[str], templates: Sequence[str], embedder: Embedder
) -> tuple[FloatArray, FloatArray] | None:
    """Return the prototypes of the classes' names, float32 (C, d), and a generic mean (d,); None without text.

    Raises:
        ModelError: a class's description cannot be read.
    """
    if not embedder.encoder.has_text:
        return None
    descriptions = {label: _descriptions(layout.area(Area.CLASES) / label) for label in labels}
    texts = class_texts(embedder, [prompts(label, descriptions[label], tuple(templates)) for label in labels])
    generic = [prompt for noun in GENERIC_NOUNS for prompt in prompts(noun, (), tuple(templates))]
    return texts, embedder.embed_texts(generic).mean(axis=0).astype(np.float32)


def _descriptions(folder: Path) -> tuple[str, ...]:
    try:
        return read_descriptions(str(folder))
    except NotADirectoryError:
        return ()
    except OSError as error:
        raise ModelError(mends.unreadable(error)) from error
