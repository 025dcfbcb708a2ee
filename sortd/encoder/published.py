"""The published models that sortd reads, from the smallest to the largest, and what each needs.

docs/models.md explains the figures and has the same table.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model that ``sortd models fetch`` downloads, or the packaged one."""

    name: str
    megabytes: int  # of weights on disk; float32 in memory takes as much, for the packaged one twice as much
    speed: float  # images a second on a CPU, relative to ViT-B/32
    reads: str  # the languages of class names
    licence: str
    published: str  # accuracy in percent, from ``source``; "" if none was found in a source that could be read
    source: str


PUBLISHED = (
    PublishedModel("packaged", 19, 7.0, "English", "Apache-2.0", "", "sortd/model/MODEL_CARD.md"),
    PublishedModel(
        "facebook/dinov2-small", 88, 0.8, "none", "Apache-2.0", "ImageNet k-NN 79.0",
        "github.com/facebookresearch/dinov2",
    ),
    PublishedModel(
        "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M", 94, 2.4, "English", "MIT", "ImageNet zero-shot 41.1",
        "huggingface.co/wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
    ),
    PublishedModel(
        "clip-ViT-B-32", 605, 1.0, "English", "MIT (OpenAI)", "ImageNet zero-shot 63.3",
        "huggingface.co/sentence-transformers/clip-ViT-B-32",
    ),
    PublishedModel(
        "google/siglip2-base-patch16-224", 1501, 0.3, "many", "Apache-2.0", "ImageNet zero-shot 78.2",
        "github.com/google-research/big_vision/blob/main/big_vision/configs/proj/image_text/README_siglip2.md",
    ),
    PublishedModel(
        "clip-ViT-L-14", 1710, 0.06, "English", "MIT (OpenAI)", "ImageNet zero-shot 75.4",
        "huggingface.co/sentence-transformers/clip-ViT-B-32",
    ),
)  # fmt: skip
CLIP_OF = {"clip-ViT-B-32-multilingual-v1": "clip-ViT-B-32"}
"""By text model, for class names in more than 50 languages: the ``model`` whose space it shares."""
