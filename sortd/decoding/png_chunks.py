"""The chunks of a PNG: where each stands, and the file without those that its picture does not need.

Pillow refuses a whole PNG for one ancillary chunk: over a megabyte of compressed text, a wrong checksum, a broken
colour profile. A decoder is to drop such a chunk and go on (https://www.w3.org/TR/png-3/#13Error-handling).
"""

import io
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_SIGNATURE_BYTES = 8
_PICTURE = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_CHECKED = frozenset({b"tRNS", b"eXIf"})
"""What changes how the picture looks, and is dropped where its checksum is wrong."""
_ORIENTED = {b"Raw profile type exif", b"XML:com.adobe.xmp"}
"""Keywords of the texts in which some writers say which side is up."""
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_TEXT_BYTES = 1_000_000
"""A longer text, packed or unpacked, is dropped; Pillow's limit is a little higher."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk; ``end`` is where the next one begins, which may be beyond the end of the file."""

    kind: bytes
    start: int
    end: int


def chunks_of(file: BinaryIO, size: int) -> Iterator[Chunk]:
    """Yield the chunks of a PNG up to ``IEND``, or up to where there is no chunk any more; moves the position."""
    at = _SIGNATURE_BYTES
    while at + 8 <= size:
        file.seek(at)
        head = file.read(8)
        chunk = Chunk(head[4:], at, at + 12 + int.from_bytes(head[:4], "big"))
        if not chunk.kind.isalpha():
            return
        yield chunk
        if chunk.kind == b"IEND":
            return
        at = chunk.end


def picture_of(file: BinaryIO) -> BinaryIO:
    """Return a PNG without the chunks that its picture does not need; what is not whole stays as it is."""
    size = os.fstat(file.fileno()).st_size
    parts, end, is_whole = [(0, _SIGNATURE_BYTES)], _SIGNATURE_BYTES, False
    for chunk in chunks_of(file, size):
        end, is_whole = chunk.end, chunk.kind == b"IEND"
        if chunk.end > size or _is_needed(file, chunk):
            parts.append((chunk.start, min(chunk.end, size)))
    if end < size and not is_whole:
        parts.append((end, size))  # no chunk: that is for the decoder to refuse
    return io.BufferedReader(_Spliced(file, parts))


def _is_needed(file: BinaryIO, chunk: Chunk) -> bool:
    if chunk.kind[:1].isupper():  # critical
        return True
    if chunk.kind in _CHECKED:
        return _is_sound(file, chunk)
    if chunk.kind not in _TEXTS or chunk.end - chunk.start > _TEXT_BYTES:
        return False
    file.seek(chunk.start + 8)
    body = file.read(chunk.end - chunk.start - 12)
    return body.partition(b"\0")[0] in _ORIENTED and _is_sound(file, chunk) and _is_short(chunk.kind, body)


def _is_sound(file: BinaryIO, chunk: Chunk) -> bool:
    """Tell whether a chunk's checksum is right."""
    file.seek(chunk.start + 4)
    checksum = zlib.crc32(file.read(chunk.end - chunk.start - 8))
    return file.read(4) == checksum.to_bytes(4, "big")


def _is_short(kind: bytes, body: bytes) -> bool:
    """Tell whether a text unpacks to no more than Pillow allows (https://www.w3.org/TR/png-3/#11textinfo)."""
    _, _, rest = body.partition(b"\0")
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return True
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _TEXT_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


class _Spliced(io.RawIOBase):
    """Parts of a file, one behind the other, as a file of its own."""

    def __init__(self, file: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
        self._file, self._at = file, 0
        self._parts: list[tuple[int, int, int]] = []  # where it begins here, and from where to where it stands there
        here = 0
        for start, end in parts:
            self._parts.append((here, start, end))
            here += end - start
        self._size = here

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read from anywhere."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, into: "WriteableBuffer", /) -> int:
        """Read from the part at hand; 0 at the end."""
        if self._at >= self._size:
            return 0
        here, start, end = self._parts[bisect_right(self._parts, self._at, key=itemgetter(0)) - 1]
        self._file.seek(start + self._at - here)
        room = memoryview(into).cast("B")
        data = self._file.read(min(len(room), end - start - self._at + here))
        room[: len(data)] = data
        self._at += len(data)
        return len(data)
