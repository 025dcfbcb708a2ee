"""The review page: a local web server to look at what waits, confirm it, correct it, and undo."""

from collections.abc import Callable
from importlib.util import find_spec

from sortd.errors import ModelError


def require_review_packages(find: Callable[[str], object | None] = find_spec) -> None:
    """Raise ModelError if the extra ``review`` is not installed."""
    missing = [name for name in ("babel", "python_multipart", "starlette", "uvicorn") if find(name) is None]
    if missing:
        raise ModelError(f"the review page needs {' and '.join(missing)}: pip install 'sortd-images[review]'")
