"""Prompts: the sentences that the text encoder embeds for the name of a class."""

from collections.abc import Sequence

GENERIC_NOUNS = (
    "animal", "building", "car", "chair", "child", "city", "cloth", "computer", "cup", "dog", "door", "face",
    "flower", "food", "fruit", "garden", "hand", "house", "machine", "man", "mountain", "person", "phone", "plant",
    "river", "room", "sea", "sky", "street", "table", "tool", "tree", "wall", "water", "window", "woman",
)  # fmt: skip
"""Nouns whose mean embedding estimates the centre of all text embeddings; class names are too few for that."""


def written_name(label: str) -> str:
    """Return the name of a class for messages: in quotes if it has blanks that would be invisible."""
    return label if label == " ".join(label.split()) else f"'{label}'"


def prompts(label: str, descriptions: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the prompts of one class: its descriptions, or else its name, of words with spaces, in each template."""
    name = " ".join(label.replace("_", " ").replace("-", " ").split())
    return list(descriptions) or [template.replace("{}", name) for template in templates]
