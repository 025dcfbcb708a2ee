"""The stored prototypes: what each dataset decided with last, read from the cache without a model or a change."""

from collections.abc import Callable
from pathlib import Path

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
        layout: the dataset. Two roots may hold datasets of one name: prototypes of another place are not returned.
        report: is told what is damaged.
    """
    found = PrototypeFiles(config.cache_dir / PROTOTYPES_FOLDER, report).read(layout.name)
    if found is None or not all(Path(source).is_relative_to(layout.root) for source in found.sources[:1]):
        return None
    return found
