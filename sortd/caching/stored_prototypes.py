"""The last prototypes of each dataset, a file each: arrays and JSON behind a checksum, nothing pickled.

A line that says what it is, a line with the sha256 of all that follows, a line with the length of the header, the
header as JSON, then the arrays one after the other.

They are files and not rows, since those of 100,000 references are 200 MB, which SQLite would write twice.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sortd.classify.prototypes import PrototypeSet
from sortd.files import read_regular, write_atomic

KIND = b"sortd prototypes "
MAGIC = KIND + b"2"
"""What a file begins with: its number is raised when a prototype set has other arrays or facts than before."""
MOST_BYTES = 4 << 30
KINDS = "biufU"  # what an array may hold: numbers and text, no Python objects
Array = np.ndarray[Any, Any]


class PrototypeFiles:
    """A folder with one file for each key."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        """Keep files in ``folder``, which is made when it is needed; ``tell`` hears of what went wrong."""
        self._folder, self._tell = folder, tell

    def read(self, key: str) -> PrototypeSet | None:
        """Return what was written last, or None where there is nothing or it is damaged."""
        file = self._file(key)
        try:
            content = read_regular(file, limit=MOST_BYTES)
            return PrototypeSet.from_arrays(*unpacked(content))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"the cached prototypes {file} cannot be read: {error.strerror}; they are built anew")
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # damaged, or made by an older sortd
            self._tell(f"the cached prototypes {file} do not serve ({error}); they are built anew")
        return None

    def written_at_ns(self, key: str) -> int:
        """Return when a key's prototypes were written, in nanoseconds since the epoch; 0 where there are none."""
        try:
            return self._file(key).stat().st_mtime_ns
        except OSError:
            return 0

    def write(self, key: str, prototypes: PrototypeSet) -> None:
        """Replace what was written before; a reader sees the one or the other."""
        file = self._file(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, packed(*prototypes.to_arrays()), durable=False)
        except OSError as error:
            self._tell(f"the prototypes cannot be cached in {file}: {error.strerror}; the next start builds them anew")

    def remove(self, key: str) -> None:
        """Remove what was written; nothing written is no mistake."""
        file = self._file(key)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"the cached prototypes {file} cannot be removed: {error.strerror}")

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / f"{name}.prototypes"


def packed(arrays: dict[str, Array], metadata: dict[str, Any]) -> bytes:
    """Return arrays and JSON-able metadata as bytes.

    Raises:
        ValueError: An array holds something else than numbers and text.
    """
    parts, shapes = [], []
    for name, array in arrays.items():
        if array.dtype.kind not in KINDS:
            raise ValueError(f"array {name} holds {array.dtype}, which is neither numbers nor text")
        plain = np.ascontiguousarray(array)
        shapes.append([name, plain.dtype.str, list(array.shape)])
        parts.append(plain.tobytes())
    header = json.dumps({"arrays": shapes, "metadata": metadata}).encode("ascii")
    body = b"".join([f"{len(header)}\n".encode(), header, *parts])
    return b"\n".join([MAGIC, hashlib.sha256(body).hexdigest().encode(), body])


def unpacked(content: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return what ``packed`` took; the arrays are read-only views of ``content``.

    Raises:
        ValueError: A single byte differs from what was written, or another version of sortd wrote it.
    """
    magic, checksum, body = [*content.split(b"\n", 2), b"", b""][:3]
    if magic != MAGIC and magic.startswith(KIND):
        raise ValueError("another version of sortd wrote them")
    if magic != MAGIC or hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("the checksum does not fit")
    length, _, rest = body.partition(b"\n")
    header = json.loads(rest[: int(length)])
    arrays: dict[str, Array] = {}
    offset = int(length)
    for name, kind, shape in header["arrays"]:
        dtype = np.dtype(kind)
        count = int(np.prod(shape, dtype=np.int64))
        # Alignment is not given in the middle of bytes; BLAS wants it, so each array is copied once.
        arrays[name] = np.frombuffer(rest, dtype, count, offset).reshape(shape).copy()
        offset += count * dtype.itemsize
    return arrays, header["metadata"]
