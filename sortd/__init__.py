"""sortd files the images dropped into a folder into classes that reference images define; see ``docs/api.md``.

The names below are the library. They are imported with their first use, so that ``import sortd`` loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sortd.api.classifier import Classifier as Classifier
    from sortd.api.dataset import DatasetHandle as DatasetHandle
    from sortd.api.dataset import open_dataset as open_dataset
    from sortd.api.estimator import SortdClassifier as SortdClassifier
    from sortd.api.images import LoadedEncoder as LoadedEncoder
    from sortd.api.images import load_encoder as load_encoder
    from sortd.errors import SortdError as SortdError
    from sortd.events import Abstained as Abstained
    from sortd.events import Assigned as Assigned

__version__ = "0.1.0"

_MODULES = {
    "Abstained": "sortd.events",
    "Assigned": "sortd.events",
    "Classifier": "sortd.api.classifier",
    "DatasetHandle": "sortd.api.dataset",
    "LoadedEncoder": "sortd.api.images",
    "SortdClassifier": "sortd.api.estimator",
    "SortdError": "sortd.errors",
    "load_encoder": "sortd.api.images",
    "open_dataset": "sortd.api.dataset",
}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604 -- a table of names


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- any of the names above
    """Import a name of the library with its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'sortd' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the names of the library."""
    return sorted(__all__)
