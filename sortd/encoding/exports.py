"""Exports: the two towers of a model as ONNX files in the cache, made once, by another process, and checked by content.

    <cache_dir>/onnx/<model>/   manifest.json   what they are and were made of, written last
                                image.onnx, text.onnx             float32
                                image.int8.onnx, text.int8.onnx   where int8 is quicker, see ``onnx_int8.py``
                                tokenizer.json

Making them takes torch, which the process that sorts images never imports; so a child makes them in a folder beside,
which is renamed when it is whole. Whatever does not fit (another model, an older sortd or ONNX Runtime, another kind of
processor, a byte that changed) counts as no export, and is made again.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sortd.encoding import models
from sortd.encoding.export_process import LOOK_SECONDS, STOPPED, Request, Tell, is_awaited, run_child
from sortd.encoding.manifest import Manifest, Precision, tower_file
from sortd.encoding.model_folders import CODE_FREE, ModelFolder
from sortd.encoding.onnx_int8 import weight_range
from sortd.errors import ModelError
from sortd.files import read_regular

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = 1
"""Raised when the same model would be exported in another way than before."""
OPSET = 17
"""The newest that ``onnx_int8`` rewrites; every ONNX Runtime from 1.12 on has it."""
LEAST_GAIN = 1.25
"""How many times as quick int8 must be for its files to be kept: less is not worth another set of embeddings."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
EXTRA = "pip install 'sortd-images[onnx]' (packages onnxruntime and onnx)"
ROOM = 1.25
"""Times the model's size in float32 that stays on the disk; a convolutional one takes twice that while it is made."""


@dataclass(frozen=True, slots=True)
class Exports:
    """The exports of one model, sound when they were looked at."""

    folder: Path
    model: ModelFolder
    words: ModelFolder | None
    manifest: Manifest

    def tower(self, name: str, precision: Precision) -> Path:
        """Return the file of a tower, ``image`` or ``text``."""
        return self.folder / tower_file(name, precision)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that the model is exported in, float32 always."""
        has_int8 = tower_file("image", Precision.INT8) in self.manifest.checksums
        return (Precision.FP32, Precision.INT8) if has_int8 else (Precision.FP32,)

    @property
    def size_bytes(self) -> int:
        """What the files take on the disk."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.checksums)


def is_installed() -> bool:
    """Tell whether ONNX Runtime is here, without importing it."""
    return find_spec("onnxruntime") is not None


def available_providers() -> list[str]:
    """Return what ONNX Runtime, which is installed, was built with."""
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def identity(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path | None) -> str:
    """Return what an export of a model is made of, as a hash: other weights or code give another.

    Raises:
        ModelError: ONNX Runtime is not installed.
    """
    content = [models.digest(part, cache_dir=cache_dir) for part in (model, words) if part is not None]
    facts = (content, FORMAT, OPSET, runtime_version())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def see_that_it_is_installed() -> None:
    """Refuse to go on without ONNX Runtime.

    Raises:
        ModelError: It is not installed.
    """
    if not is_installed():
        raise ModelError(f"`backend: onnx` needs ONNX Runtime, which is not installed: {EXTRA}")


def see_that_it_can_export() -> None:
    """Refuse to go on without what writes an export.

    Raises:
        ModelError: It is not installed.
    """
    if find_spec("onnx") is None:
        raise ModelError(f"exporting a model to ONNX needs the package onnx, which is not installed: {EXTRA}")


def runtime_version() -> str:
    """Return the version of ONNX Runtime.

    Raises:
        ModelError: It is not installed.
    """
    see_that_it_is_installed()
    import onnxruntime

    return str(onnxruntime.__version__)


def folder_of(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path) -> Path:
    """Return where a model's exports lie, whether there are any or not."""
    content = [models.digest(part, cache_dir=cache_dir) for part in (model, words) if part is not None]
    return cache_dir / "onnx" / hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def has_any(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path) -> bool:
    """Tell whether a model was exported before, soundly or not; where nothing ever was, no weight is hashed."""
    return (cache_dir / "onnx").is_dir() and folder_of(model, words, cache_dir=cache_dir).is_dir()


def find(
    model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path, largest: int | None = None
) -> Exports | None:
    """Return the exports of a model, or None where there are none that serve as they are.

    Exports made on another machine (a moved disk, a container image, a shared cache) serve if this processor multiplies
    their weights without overflow.

    Args:
        model: the image model.
        words: the text model, where it is another.
        cache_dir: the folder of the cache.
        largest: the largest quantized weight that this processor multiplies; None asks ``onnx_int8.weight_range``.

    Raises:
        ModelError: ONNX Runtime is not installed.
    """
    if not has_any(model, words, cache_dir=cache_dir):
        return None
    folder = folder_of(model, words, cache_dir=cache_dir)
    try:
        manifest = Manifest.from_json(read_regular(folder / MANIFEST).decode())
        if manifest.identity != identity(model, words, cache_dir=cache_dir):
            return None
        files = {name: folder / name for name in manifest.checksums}
        sums = models.checksums(files.values(), cache_dir=cache_dir)
    except (OSError, ValueError):
        return None
    found = Exports(folder, model, words, manifest)
    if Precision.INT8 in found.precisions and manifest.weight_range > (largest or weight_range()):
        return None
    is_sound = all(sums[files[name]] == checksum for name, checksum in manifest.checksums.items())
    return found if is_sound else None


def make(
    model: ModelFolder,
    words: ModelFolder | None,
    *,
    cache_dir: Path,
    least_gain: float = LEAST_GAIN,
    tell: Tell = lambda _: None,
    run: Callable[[Request, Tell], None] = run_child,
) -> Exports:
    """Export a model in a process of its own, in place of what was there; another process that does so is awaited.

    Args:
        model: the CLIP.
        words: another model for words, or None.
        cache_dir: sortd's cache.
        least_gain: how many times as quick int8 must be to be kept.
        tell: is told what is under way, again and again.
        run: carries a request out; a child process unless said.

    Raises:
        ModelError: The extra is not installed, the model cannot be exported faithfully, or there is no room.
    """
    from filelock import FileLock

    wanted = identity(model, words, cache_dir=cache_dir)
    see_that_it_can_export()
    folder = folder_of(model, words, cache_dir=cache_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _acquired(FileLock(f"{folder}.lock"), model.name, tell):
            made = find(model, words, cache_dir=cache_dir)  # by whoever held the lock before us
            if made is None:
                request = Request(
                    model, words, wanted, folder.with_name(f"{folder.name}.{os.getpid()}.part"), least_gain
                )
                _replace(folder, request, lambda request: run(request, tell))
                made = find(model, words, cache_dir=cache_dir)
    except OSError as error:
        raise ModelError(
            f"cannot export {model.name!r} to {folder}: {error.strerror or error}; sortd has to be able to write "
            f"there, or set `cache_dir`"
        ) from error
    if made is None:
        raise ModelError(f"the export of {model.name!r} in {folder} changed as soon as it was made; check that disk")
    return made


@contextmanager
def _acquired(lock: "BaseFileLock", name: str, tell: Tell) -> Iterator[None]:
    """Hold a lock as soon as whoever has it lets go, unless nobody waits for that any more."""
    from filelock import Timeout

    while is_awaited():
        with suppress(Timeout):
            lock.acquire(timeout=LOOK_SECONDS)
            break
        tell("waiting for another process that exports the same model")
    else:
        raise ModelError(f"exporting {name!r} to ONNX {STOPPED}")
    try:
        yield
    finally:
        lock.release()


def _replace(folder: Path, request: Request, run: Callable[[Request], None]) -> None:
    aside = folder.with_name(f"{folder.name}.old")
    # A process that was killed left its folder, and maybe a child that still writes there: it ends where that is gone.
    for left_over in (*folder.parent.glob(f"{folder.name}.*part"), aside):
        shutil.rmtree(left_over, ignore_errors=True)
    _see_that_there_is_room(request)
    request.into.mkdir()
    try:
        run(request)
        _make_durable(request.into)
        with suppress(FileNotFoundError):
            folder.rename(aside)
        request.into.rename(folder)
    finally:
        shutil.rmtree(request.into, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _see_that_there_is_room(request: Request, *, usage: Callable[[Path], Any] = shutil.disk_usage) -> None:
    """Say before a minute of work that it would end on a full disk.

    Raises:
        ModelError: it would.
    """
    place = request.into.parent
    room = ROOM * sum(_float32_bytes(part) for part in (request.model, request.words) if part is not None)
    free = usage(place).free
    if free < room:
        raise ModelError(
            f"cannot export {request.model.name!r} to ONNX: that takes at least {room / 1e6:.0f} MB in {place}, where "
            f"{free / 1e6:.0f} MB are free; make room there, or set `cache_dir` to another disk"
        )


def _float32_bytes(model: ModelFolder) -> int:
    """Return what a model's weights take in float32, in which an export is written; many are stored in half of that."""
    from safetensors import SafetensorError, safe_open

    size = 0
    for path in model.files:
        if path.suffix == CODE_FREE:
            try:
                with safe_open(path, "np") as file:
                    size += sum(4 * math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
            except SafetensorError:  # damaged: whoever loads it says so
                size += path.stat().st_size
    return size


def _make_durable(folder: Path) -> None:
    """Bring files to the disk before their folder gets its name: their sums are remembered by stamp from then on."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
