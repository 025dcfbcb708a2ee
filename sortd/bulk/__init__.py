"""Decide on millions of images with Ray Data or in shards, and move them afterwards."""

from importlib.util import find_spec

from sortd.errors import ModelError


def require_bulk_packages(*, with_ray: bool = False) -> None:
    """Raise ModelError if a package of the extra ``cluster`` that a command needs is not installed."""
    missing = [name for name in ("pyarrow", "ray")[: 1 + with_ray] if find_spec(name) is None]
    if missing:
        instead = "; `--shard 1/1` decides without Ray" if missing == ["ray"] else ""
        raise ModelError(f"this needs {' and '.join(missing)}: pip install 'sortd-images[cluster]'{instead}")
