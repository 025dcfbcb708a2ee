"""The request for a fine-tuning: its recipe, and who is told of its progress; numpy and torch are not imported."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from sortd.errors import StartupError
from sortd.layout import Area, Layout

CLASSIFIER_RATE = 1e-4
"""Learning rate of networks that were pretrained on millions of images."""
TOWER_RATE = 5e-4
"""Learning rate of a small convolutional tower. At 1e-3 a weak one gained 4 and 8 points of accuracy over its frozen
features in ten epochs, and a better one fell below its start before it gained."""
USUAL_EPOCHS = 20
FEWEST_STEPS = 300
"""Small datasets get more epochs: warm-up and cosine need some steps."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number of a fine-tuning that is chosen beforehand; docs/finetuning.md says where each comes from."""

    epochs: int | None = None
    """None: 20, or as many as make 300 steps."""
    batch_size: int = 32
    learning_rate: float | None = None
    """Peak rate of the head and the layers next to it; None: the base's own."""
    layer_decay: float = 0.75
    """The rate of each layer as a share of that of the layer above it (Clark et al. 2020; Bao et al. 2021)."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the steps in which the rate rises; a cosine follows."""
    label_smoothing: float = 0.1
    balance: float = 0.5
    """Power of a class's rarity by which its images are weighted; 0: images count alike, 1: classes count alike."""
    smallest_area: float = 0.35
    """Smallest share of the image in a random crop (RandomResizedCrop)."""
    jitter: float = 0.2
    """Largest change of brightness, contrast and saturation."""
    flips: bool = True
    evaluations: int = 10
    """Evaluations on the validation images, each with a checkpoint."""
    patience: int = 6
    """Evaluations without a better score after which training ends."""
    test: float = 0.15
    """Share of the images that the model and the prototypes are evaluated on."""
    validation: float = 0.15
    """Share of the images that choose the checkpoint, the averaging and the temperature."""
    lora_rank: int | None = None
    """Rank of the low-rank additions that are trained in place of the layers (Hu et al. 2021; needs peft)."""
    seed: int = 0

    def epochs_for(self, images: int, *, images_per_step: int) -> int:
        """Return the number of epochs over so many images."""
        return self.epochs or max(USUAL_EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(images / images_per_step)))


class Source(StrEnum):
    """The folders of a dataset that are learnt from."""

    CLASES = "clases"
    DATASET = "dataset"
    BOTH = "both"

    @property
    def areas(self) -> tuple[Area, ...]:
        """The folders; where an image lies in both, the first decides whether a person placed it."""
        return {"clases": (Area.CLASES,), "dataset": (Area.DATASET,), "both": (Area.CLASES, Area.DATASET)}[self.value]


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """What ``sortd finetune`` was asked for."""

    layout: Layout
    source: Source = Source.CLASES
    base: str = "auto"
    side: int | None = None
    """Side in pixels of the network's input; None: the base's own."""
    recipe: Recipe = field(default_factory=Recipe)
    extra: tuple[str, ...] = ()
    """``NAME=VALUE`` of transformers' TrainingArguments, in place of the recipe's."""


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """The state of a training after a step or an evaluation."""

    step: int
    steps: int
    accuracy: float | None = None
    """Accuracy on the validation images, after an evaluation."""


@dataclass(frozen=True, slots=True)
class Observer:
    """Callbacks of a fine-tuning."""

    finished: Callable[[str], None] = lambda _: None
    """Called with the name of each part that is done."""
    progress: Callable[[TrainingProgress], None] = lambda _: None
    """Called after each step and each evaluation."""
    is_asked_to_stop: Callable[[], bool] = lambda: False
    """Asked after each step."""


class TrainingStoppedError(StartupError):
    """Training was interrupted; its checkpoint is whole and it can be resumed."""

    exit_code = 130
