"""Concepts: the classes of all data sets with their names, merged if data sets share one."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BACKGROUND = "BACKGROUND Google"
"""Caltech-101's class of unrelated images; it has no caption."""

CALTECH_NAMES = {
    "Faces": "face",
    "Faces easy": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike, motorcycle",
    "airplanes": "airplane, airliner, plane",
    "car side": "car, side of a car",
    "cougar body": "cougar",
    "cougar face": "face of a cougar",
    "crocodile head": "head of a crocodile",
    "flamingo head": "head of a flamingo",
    "water lilly": "water lily",
    "sea horse": "seahorse, sea horse",
    "yin yang": "yin yang symbol",
}
"""Replacements of names that read badly in a caption."""

TEMPLATES = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "{}",
)
"""The seven of Tip-Adapter (https://github.com/gaopengcuhk/Tip-Adapter), CLIP's plain one, and the bare name."""


@dataclass(frozen=True, slots=True)
class Concept:
    """One concept with its names, the most common first."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All concepts, and the concept of each label of each data set (-1: none)."""

    concepts: tuple[Concept, ...]
    of_label: Mapping[str, tuple[int, ...]]


def key(name: str) -> str:
    """Return a name without case, punctuation and plural s, so that `Binoculars` equals `binocular`."""
    folded = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    return folded[:-1] if folded.endswith("s") and not folded.endswith("ss") else folded


def names_of(data_set: str, label: str) -> tuple[str, ...]:
    """Split a label into its names."""
    text = CALTECH_NAMES.get(label, label) if data_set == "caltech101" else label
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_vocabulary(path: Path) -> Vocabulary:
    """Read `class_names.json`: for each data set its labels in order."""
    return merge(json.loads(path.read_text(encoding="utf-8")))


def merge(labels: Mapping[str, Sequence[str]]) -> Vocabulary:
    """Merge labels of different data sets into one concept if the first name of one is a name of the other.

    Two labels of one data set stay separate (ImageNet has two cranes), unless their first names are equal.
    """
    concepts: list[list[str]] = []
    owner: dict[str, int] = {}
    of_label: dict[str, tuple[int, ...]] = {}
    for data_set, texts in labels.items():
        before = dict(owner)
        indices = []
        for text in texts:
            if text == BACKGROUND:
                indices.append(-1)
                continue
            names = names_of(data_set, text)
            first = key(names[0])
            index = before.get(first, owner.get(first))
            if index is None:
                index = len(concepts)
                concepts.append([])
            concepts[index] += [name for name in names if name not in concepts[index]]
            owner.setdefault(first, index)
            indices.append(index)
        for text, index in zip(texts, indices, strict=True):
            if index >= 0:
                for name in names_of(data_set, text):
                    owner.setdefault(key(name), index)
        of_label[data_set] = tuple(indices)
    return Vocabulary(tuple(Concept(tuple(names)) for names in concepts), of_label)
