"""The recipe of a fine-tuning: every number that is chosen beforehand, in one frozen value."""

import math
from dataclasses import dataclass

CLASSIFIER_RATE = 1e-4
"""Learning rate for networks of transformers that were taught on millions of images: they are to be moved little."""
TOWER_RATE = 5e-4
"""For a small convolutional tower. At 1e-3 a weak one gained 4 and 8 points over its frozen features in ten passes, and
a better one lost some of what it knew before it gained."""
USUAL_EPOCHS = 20
FEWEST_STEPS = 300
"""Small datasets are gone through more often: warm-up and cosine need some steps to do their work."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is fine-tuned; docs/finetuning.md says where each number comes from."""

    epochs: int | None = None
    """Passes over the photos; None: 20, or as many as make 300 steps."""
    batch_size: int = 32
    learning_rate: float | None = None
    """Of the head and the layers next to it, for AdamW, at its highest; None: what suits the base."""
    layer_decay: float = 0.75
    """The rate of each layer as a share of that of the layer above it (Clark et al. 2020; Bao et al. 2021)."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the steps in which the rate rises; it falls by a cosine afterwards."""
    label_smoothing: float = 0.1
    balance: float = 0.5
    """The power of a class's rarity that its images are weighed by: 0 not at all, 1 so that classes count alike."""
    smallest_area: float = 0.35
    """Share of the photo that a view shows at least (RandomResizedCrop)."""
    jitter: float = 0.2
    """How far brightness, contrast and saturation go from one."""
    flips: bool = True
    evaluations: int = 10
    """How often the validation images are looked at, and a checkpoint is written."""
    patience: int = 6
    """After so many looks without a better one training ends."""
    test: float = 0.15
    """Share of the images that judge the model and the prototypes."""
    validation: float = 0.15
    """Share of the images by which it is decided when to stop, how far to average, and the temperature."""
    lora_rank: int | None = None
    """Train low-rank additions of this rank instead of the layers themselves (Hu et al. 2021; needs peft)."""
    seed: int = 0

    def passes(self, images: int, *, together: int) -> int:
        """Return how many passes over so many images are made, with ``together`` of them in each step."""
        return self.epochs or max(USUAL_EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(images / together)))
