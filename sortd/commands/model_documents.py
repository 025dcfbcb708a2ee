"""The JSON that commands about models print with ``--json``, as types."""

from sortd.commands.documents import Document, Figures, Interval, ServingClassifier, UnreadableImage


class BackendSpeed(Document):
    """The speed of one backend."""

    backend: str
    encoder_id: str
    encode: float
    images_per_second: float
    serves: bool


class BenchDocument(Document, commands=("bench",)):
    """``sortd bench``; stages in milliseconds for each image."""

    model: str
    encoder_id: str
    configured: str
    int8_refusal: str | None
    onnx_hint: str | None
    device: str
    cores: int
    files: int
    megabytes: float
    load_seconds: float
    best_batch: int
    stages: dict[str, float | None]
    embedded_per_second: float | None
    filed_per_second: float | None
    bound_per_second: float | None
    share_of_bound: float | None
    limit: str
    backends: list[BackendSpeed]
    advice: list[str]


class DatasetEvaluated(Document):
    """The leave-one-out evaluation of one dataset; an ``_interval`` is the 95 % confidence interval of its share."""

    root: str
    encoder_id: str
    classes: int
    references: int
    distinct: int
    mode: str
    modes: list[Figures]
    class_reports: list[Figures]
    macro_f1: float | None
    """Mean F1 of the classes that have one."""
    confusion: list[tuple[str, str, int]]
    """Class, decided class, and number."""
    trade_offs: list[Figures]
    suspects: list[Figures]
    half_accuracy: float | None
    half_judged: int
    whole_accuracy: float | None
    whole_judged: int
    is_labelled_enough: bool | None
    advice: Figures
    calibration: Figures
    unreadable: list[UnreadableImage]
    serving: ServingClassifier
    next_model: str | None


class EvalDocument(Document, commands=("eval",)):
    """``sortd eval``."""

    datasets: dict[str, DatasetEvaluated]


class FinetunedResult(Document):
    """A fine-tuned model of a dataset; a damaged one has only ``folder`` and ``problem``."""

    folder: str
    problem: str | None
    model_id: str | None = None
    base: str | None = None
    created: str | None = None
    classes: int | None = None
    verdict: str | None = None
    accuracy: float | None = None
    accuracy_interval: Interval = None
    prototypes_accuracy: float | None = None
    prototypes_accuracy_interval: Interval = None
    images: int | None = None
    best_mode: str | None = None


class ListedResult(FinetunedResult):
    """A fine-tuned model in the list of models."""

    promoted: bool
    serves: bool


class DatasetModels(ServingClassifier):
    """The classifier and the fine-tuned models of a dataset."""

    results: list[ListedResult]


class LocalModel(Document):
    """A model on this machine."""

    name: str
    folder: str
    kind: str
    size_bytes: int
    content: str | None
    chosen: bool


class ModelBackend(Document):
    """The backend of the configured model."""

    configured: str
    name: str | None
    why: str | None
    problem: str | None
    is_installed: bool
    export: Figures | None
    agreement: Figures | None


class ExportedDocument(ModelBackend, commands=("models export",)):
    """``sortd models export``."""


class RunningModel(Document):
    """The model of the running sortd."""

    model: str | None
    encoder_id: str | None


class ModelsDocument(Document, commands=("models", "models list")):
    """``sortd models`` and ``sortd models list``."""

    model: str
    models: list[LocalModel]
    problem: str | None
    why: str
    advice: list[str]
    backend: ModelBackend
    running: RunningModel | None
    datasets: dict[str, DatasetModels]


class AvailableModel(Document):
    """A published model that sortd reads."""

    name: str
    megabytes: int
    speed: float
    reads: str
    licence: str
    published: str
    source: str
    is_here: bool


class AvailableDocument(Document, commands=("models",)):
    """``sortd models --available``."""

    models: list[AvailableModel]
    text_models: dict[str, str]


class FetchDocument(Document, commands=("models fetch",)):
    """``sortd models fetch``."""

    name: str
    folder: str
    use: str


class ConvertDocument(Document, commands=("models convert",)):
    """``sortd models convert``."""

    folder: str
    written: list[str]


class PromoteDocument(FinetunedResult, commands=("models promote",)):
    """``sortd models promote``."""

    dataset: str
    classifier: str
    serves: bool
    told: str


class DemoteDocument(Document, commands=("models demote",)):
    """``sortd models demote``."""

    dataset: str
    demoted: bool
    told: str | None


class RemovableEntry(Document):
    """A file or folder of sortd's cache that nothing needs."""

    path: str
    size_bytes: int
    why: str


class ModelsPruneDocument(Document, commands=("models prune",)):
    """``sortd models prune``."""

    removed: bool
    """false: it was only listed."""
    entries: list[RemovableEntry]
    size_bytes: int


class FinetuneDocument(Document, commands=("finetune",)):
    """``sortd finetune``: the figures of ``metrics.json`` in the folder of the result."""

    folder: str
    model_id: str
    version: str
    """Of sortd."""
    dataset: str
    created: str
    base: str
    labels: list[str]
    recipe: Figures
    extra: list[str]
    """What was given with --set."""
    data: Figures
    """Where the images are from, and how many."""
    left_out: list[Figures]
    classes: list[Figures]
    """Images of each class by part, with precision, recall and F1 on the test images."""
    share: float
    """Weight of the fine-tuned parameters in the mean with those of the base."""
    shares: dict[str, float]
    """Validation score by share."""
    temperature: float
    validation: Figures
    comparison: Figures
    """With the prototypes, on the test images."""
    best_step: int | None
    """The step with the best validation score."""
    seconds: float
    """Of the training."""
