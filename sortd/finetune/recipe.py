"""The request for a fine-tuning: recipe, options and callbacks; imports neither numpy nor torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from sortd.errors import StartupError
from sortd.layout import Area, Layout

CLASSIFIER_RATE = 1e-4
"""Default learning rate of pretrained networks."""
TOWER_RATE = 5e-4
"""Default learning rate of a small convolutional tower. 1e-3 improved a weak tower by 4 and 8 points in ten epochs, but
first worsened a better one."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The hyperparameters of a fine-tuning; see docs/finetuning.md for their sources."""

    epochs: int | None = None  # None: ``usual_epochs``, or as many as make ``fewest_steps``
    usual_epochs: int = 20
    fewest_steps: int = 300  # small datasets are trained for more epochs
    views: int = 8
    """Views of each image, whose features by the lower blocks are computed once; only the last blocks are trained on
    them. 0: all blocks are trained, on new views in each epoch."""
    batch_size: int = 32
    learning_rate: float | None = None  # peak rate of the head and the layers next to it; None: the base's own
    layer_decay: float = 0.75
    """Factor of the rate from each layer to the layer below it (Clark et al. 2020; Bao et al. 2021)."""
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps in which the rate rises; a cosine follows
    label_smoothing: float = 0.1
    balance: float = 0.5
    """Power of a class's rarity by which its images are weighted; 0: images count alike, 1: classes count alike."""
    smallest_area: float = 0.35  # smallest share of the image in a random crop (RandomResizedCrop)
    jitter: float = 0.2  # largest change of brightness, contrast and saturation
    flips: bool = True
    evaluations: int = 10  # evaluations on the validation images, each with a checkpoint
    patience: int = 3  # evaluations without a better score after which training ends
    test: float = 0.15  # share of the images for the evaluation of model and prototypes
    validation: float = 0.15  # share of the images for the choice of checkpoint, averaging and temperature
    lora_rank: int | None = None
    """Rank of LoRA layers (Hu et al. 2021; needs peft); None: all weights are trained."""
    seed: int = 0

    def epochs_for(self, images: int, *, images_per_step: int) -> int:
        """Return the number of epochs."""
        steps = math.ceil(images / images_per_step)
        return self.epochs or max(self.usual_epochs, math.ceil(self.fewest_steps / steps))


class Effort(StrEnum):
    """The processor time that a fine-tuning may take."""

    QUICK = "quick"
    STANDARD = "standard"
    THOROUGH = "thorough"

    @property
    def recipe(self) -> Recipe:
        """The recipe: thorough trains all blocks, the others the last ones."""
        match self:
            case Effort.QUICK:
                return Recipe(usual_epochs=8, fewest_steps=100, views=4)
            case Effort.THOROUGH:
                return Recipe(views=0, patience=6)
        return Recipe()


class Source(StrEnum):
    """The folders of a dataset that are trained on."""

    CLASES = "clases"
    DATASET = "dataset"
    BOTH = "both"

    @property
    def areas(self) -> tuple[Area, ...]:
        """The folders; of an image in both, the first one counts."""
        return {"clases": (Area.CLASES,), "dataset": (Area.DATASET,), "both": (Area.CLASES, Area.DATASET)}[self.value]


class LabelSource(StrEnum):
    """Where the class of an image of a bulk run comes from."""

    DECISIONS = "decisions"  # of ``sortd bulk decide``
    FOLDERS = "folders"  # the folder that the image is in, which a person chose


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A file with a class, outside of the folders of the dataset."""

    path: str
    label: str
    is_placed: bool  # whether a person chose the class


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """The options of ``sortd finetune``."""

    layout: Layout
    source: Source = Source.CLASES
    base: str = "auto"
    side: int | None = None  # side in pixels of the network's input; None: the base's own
    recipe: Recipe = field(default_factory=Recipe)
    extra: tuple[str, ...] = ()  # ``NAME=VALUE`` of transformers' TrainingArguments, in place of the recipe's
    images: tuple[LabelledImage, ...] = ()  # trained on beside those of the folders


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """The state of a training after a step or an evaluation."""

    step: int
    steps: int
    accuracy: float | None = None  # accuracy on the validation images, after an evaluation


@dataclass(frozen=True, slots=True)
class Observer:
    """Callbacks of a fine-tuning."""

    finished: Callable[[str], None] = lambda _: None  # called with the name of each part that is done
    progress: Callable[[TrainingProgress], None] = lambda _: None  # called after each step and each evaluation
    is_asked_to_stop: Callable[[], bool] = lambda: False  # asked after each step


class TrainingStoppedError(StartupError):
    """The training was interrupted and can be resumed from its checkpoint."""

    exit_code = 130
