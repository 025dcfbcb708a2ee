"""Files and objects by their URI: listed and read on this disk, in S3, Google Cloud Storage or on the Hugging Face hub.

A URI is an absolute path, or SCHEME://PATH with the path as the store has it, not percent-encoded. Only a path on this
disk that is not UTF-8 is a percent-encoded ``file:`` URL. Credentials, region and endpoint (``AWS_ENDPOINT_URL``) come
from the environment, as pyarrow and fsspec read them.
"""

import errno
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

import fsspec
from fsspec.utils import glob_translate
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, GcsFileSystem, PyFileSystem, S3FileSystem

from sortd.errors import DataError
from sortd.files import read_regular
from sortd.images.formats import HEAD_BYTES, looks_like_image
from sortd.layout import owner_of, rule_for
from sortd.watch.scan import scan, stamp

FILE_URL = "file://"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)", re.DOTALL)
_BLOCK_BYTES = 1 << 20
_UNBLOCKED = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # an open does not wait for the other end of a pipe
_WILDCARD = re.compile(r"[*?\[]")

Report = Callable[[OSError], None]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One version of a file or an object."""

    uri: str
    size: int
    mtime_ns: int | None = None
    etag: str | None = None


def local_path(uri: str) -> str | None:
    """Return the path of a URI on this disk; None for an object in a store."""
    if uri.startswith(FILE_URL):
        return os.fsdecode(unquote_to_bytes(uri.removeprefix(FILE_URL)))
    return None if _SCHEME.fullmatch(uri) else uri


def uri_of(path: str) -> str:
    """Return the URI of an absolute path: the path itself, or a ``file:`` URL if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return FILE_URL + quote_from_bytes(os.fsencode(path))
    return path


@lru_cache
def store_of(scheme: str) -> FileSystem:
    """Return the store of a scheme, connected with its first use; raise DataError if no package knows the scheme."""
    if scheme == "s3":
        # S3FileSystem reads credentials and region from the environment, but not the endpoint (pyarrow 26).
        url = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "https://")
        return S3FileSystem(scheme=url.scheme, endpoint_override=url.netloc + url.path)
    if scheme in {"gs", "gcs"}:
        return GcsFileSystem()
    try:
        return PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))
    except (ImportError, ValueError) as error:
        raise DataError(f"{scheme}:// cannot be read: {error}") from error


def open_store(uri: str) -> tuple[FileSystem, str]:
    """Return the store of an object and its path there; raise DataError for an unknown scheme."""
    found = _SCHEME.fullmatch(uri)
    assert found is not None, uri
    return store_of(found[1]), found[2]


def read_bytes(uri: str, *, limit: int) -> bytes:
    """Return the content of a file or an object; raise OSError if it cannot be read or is over ``limit`` bytes."""
    path = local_path(uri)
    return read_regular(path, limit=limit) if path is not None else b"".join(read_blocks(uri, limit=limit))


def read_blocks(uri: str, *, limit: int) -> Iterator[bytes]:
    """Yield the content of an object in a store, block by block; raise as ``read_bytes``."""
    store, path = open_store(uri)
    with store.open_input_stream(path, compression=None) as stream:
        while block := stream.read(_BLOCK_BYTES):
            limit -= len(block)
            if limit < 0:
                raise OSError(errno.EFBIG, "it is larger than the limit on bytes")
            yield block


def list_images(source: str, *, report: Report) -> Iterator[StoredFile]:
    """Yield the images of a folder (recursively), a glob, or a URL of a folder, a glob or one object.

    On this disk the rules are those of the daemon: no links, hidden or unfinished files, and a file without the suffix
    of an image is one by its content. In a store, an image is known by its suffix. The names of one folder of a store
    are held in memory, and on this disk none.

    Args:
        source: ``**`` in a glob stands for any folders.
        report: called with the error for what cannot be read.

    Raises:
        DataError: the source does not exist or cannot be listed.
    """
    path = local_path(source)
    if path is not None:
        yield from _list_disk(os.path.abspath(path), report)
    elif "@" in source.split("/")[2]:
        raise DataError("a source must not have a user or a password: they come from the environment")
    else:
        yield from _list_store(source, report)


def _parts_of_glob(pattern: str) -> tuple[str, re.Pattern[str]]:
    """Return the folder in which a glob begins, and the pattern of whole paths."""
    fixed = pattern[: found.start()] if (found := _WILDCARD.search(pattern)) else pattern
    return fixed.rpartition("/")[0] or "/", re.compile(glob_translate(pattern))


def _list_disk(source: str, report: Report) -> Iterator[StoredFile]:
    is_glob = _WILDCARD.search(source) and not os.path.lexists(source)
    root, pattern = _parts_of_glob(source) if is_glob else (source, None)
    if not os.path.isdir(root):
        raise DataError(f"{source} is no folder; name a folder, a glob or a URL")
    owners = lru_cache(maxsize=64)(_owners)  # of the folder that is being listed and those above it
    for path, version in scan(root, report=report):
        try:
            if (pattern is None or pattern.match(path)) and _is_image(path) and not _is_unfinished(path, root, owners):
                yield StoredFile(uri_of(path), version.size, version.mtime_ns)
        except OSError as error:
            report(error)


def _owners(folder: str) -> frozenset[str]:
    """Return the files and folders in a folder that a control file beside them marks as unfinished."""
    with os.scandir(folder) as entries:
        return frozenset(owner for entry in entries if (owner := owner_of(entry.path)) is not None)


def _is_unfinished(path: str, root: str, owners: Callable[[str], frozenset[str]]) -> bool:
    """Tell what ``why_unfinished`` does, with one listing of each folder instead of eleven looks for each file."""
    while len(path) > len(root):
        folder = os.path.dirname(path)
        if path in owners(folder):
            return True
        path = folder
    return False


def _is_image(path: str) -> bool:
    """Tell whether a file on this disk is an image, by its name or else by its content."""
    if looks_like_image(path, b""):
        return True
    if stamp(path) is None:
        return False
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _UNBLOCKED)) as file:
        return looks_like_image(path, file.read(HEAD_BYTES))


def _list_store(source: str, report: Report) -> Iterator[StoredFile]:
    store, path = open_store(source)
    scheme, path = source.partition("://")[0], path.rstrip("/")
    try:
        found = store.get_file_info([path])[0]
        pattern = None
        if found.type == FileType.NotFound and _WILDCARD.search(path):
            path, pattern = _parts_of_glob(path)
        first = [found] if found.type == FileType.File else _entries(store, path)
    except OSError as error:
        raise DataError(f"{source} cannot be listed: {error}") from error
    for entry in _walk(store, first, report):
        if looks_like_image(entry.path, b"") and (pattern is None or pattern.match(entry.path)):
            yield StoredFile(f"{scheme}://{entry.path}", entry.size or 0, entry.mtime_ns)


def _walk(store: FileSystem, entries: list[Any], report: Report) -> Iterator[Any]:
    """Yield the objects among some entries of a store and in their folders."""
    waiting = deque(entries)
    while waiting:
        entry = waiting.pop()
        if rule_for(entry.base_name) is not None:
            continue
        if entry.type != FileType.Directory:
            yield entry
            continue
        try:
            found = _entries(store, entry.path)
        except OSError as error:
            report(error)
            continue
        if itself := [one for one in found if one.path == entry.path]:  # it would be listed again without end
            report(OSError(errno.EINVAL, "a key with // cannot be read", entry.path))
        waiting.extend(one for one in found if one not in itself)


def _entries(store: FileSystem, path: str) -> list[Any]:
    return list(store.get_file_info(FileSelector(path)))
