"""The stored prototypes: what each dataset decided with last, read from the cache without a model or a change."""

from collections.abc import Callable

from sortd.caching.stored_prototypes import PrototypeFiles
from sortd.config import Config
from sortd.layout import Layout
from sortd.prototypes import PrototypeSet

PROTOTYPES_FOLDER = "prototypes"


def stored_prototypes(
    config: Config, layout: Layout, *, report: Callable[[str], None] = lambda _: None
) -> PrototypeSet | None:
    """Return the prototypes that a dataset was served with last, or None.

    Args:
        config: where the cache is.
        layout: the dataset.
        report: is told what is damaged.
    """
    return PrototypeFiles(config.cache_dir / PROTOTYPES_FOLDER, report).read(layout.key)
