"""Prompts: the sentences by which a class's name is shown to the text tower."""

from collections.abc import Sequence

DEFAULT_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of a {}.",
)
"""The seven templates that Tip-Adapter and CoOp chose for ImageNet, and CLIP's plain one."""

GENERIC_NOUNS = (
    "animal", "building", "car", "chair", "child", "city", "cloth", "computer", "cup", "dog", "door", "face",
    "flower", "food", "fruit", "garden", "hand", "house", "machine", "man", "mountain", "person", "phone", "plant",
    "river", "room", "sea", "sky", "street", "table", "tool", "tree", "wall", "water", "window", "woman",
)  # fmt: skip
"""Everyday nouns whose mean embedding stands for text in general; class names alone are too few to centre on."""


def spoken_name(label: str) -> str:
    """Return a class's folder name as it is spoken: underscores and dashes are spaces."""
    return " ".join(label.replace("_", " ").replace("-", " ").split())


def written_name(label: str) -> str:
    """Return a class's name as it is written in a sentence: in quotes where blanks would not be seen."""
    return label if label == " ".join(label.split()) else f"'{label}'"


def prompts(label: str, descriptions: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the sentences for one class: its own descriptions as they stand, or its name in each template."""
    if descriptions:
        return list(descriptions)
    return [template.replace("{}", spoken_name(label)) for template in templates]
