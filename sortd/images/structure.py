"""The structure of image files: whether one was written to its end, and a PNG without what its picture does not need.

Some writers reserve a file in full and fill it bit by bit; a lost writer leaves zeros. libjpeg paints the rest grey,
libwebp black, libde265 and dav1d make a picture of anything, libheif leaves out tiles that are not there, and none
reports it. In uncompressed formats (BMP, most TIFF) zeros are black: nothing can be told. What stands behind the end of
the picture (the film of a motion photo, a maker's trailer, padding) does not matter.
"""

import io
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ZERO_TAIL_BYTES = 512
"""So many zeros at the end of a file do not occur in compressed data."""
_HOLLOW_BYTES = 64
"""So many zeros at the end of the compressed data of one image do not occur, either."""
_BLOCK_BYTES = 1 << 15
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
"""A marker, after any fill bytes; not a byte of 255 among the data (255, 0), nor a restart."""
_JPEG_EOI = 0xD9
_WEBP_IMAGE_CHUNKS = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
_MACROBLOCK_PIXELS = 256
"""A block of a lossy WebP that looks like those around it takes up to a byte of zeros."""
_BOX_HEAD_BYTES = 8
_WIDE_VERSION = {b"infe": 3, b"iloc": 2}
"""From this version of a box on the numbers of items have four bytes, before it two."""
_MOST_META_BYTES = 1 << 22
_MOST_PARTS = 100_000
_CODED_ITEMS = frozenset({b"hvc1", b"av01", b"avc1", b"vvc1", b"jpeg"})
"""Items of an ISO image file (ISO/IEC 23008-12) that hold compressed pixels: an image, a tile, an alpha channel."""
_PNG_SIGNATURE_BYTES = 8
_PNG_CHECKED = frozenset({b"tRNS", b"eXIf"})
"""Chunks that change how the picture looks; dropped where their checksum is wrong."""
_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_ORIENTED = {b"Raw profile type exif", b"XML:com.adobe.xmp"}
"""Keywords of the texts in which some writers say which side is up."""
_PNG_TEXT_BYTES = 1_000_000
"""A longer text, packed or unpacked, is dropped; Pillow's limit is a little higher."""


def is_truncated(file: BinaryIO, format_name: str) -> bool:
    """Tell whether the end of a compressed image was never written; moves the file's position."""
    size = os.fstat(file.fileno()).st_size
    if format_name == "WEBP":
        return _has_hollow_chunk(file, size)
    if format_name in {"AVIF", "HEIF"}:
        return _lacks_items(file, size)
    if format_name not in _HAS_END:
        return False
    file.seek(max(0, size - ZERO_TAIL_BYTES))
    return not any(file.read(ZERO_TAIL_BYTES)) and not _HAS_END[format_name](file, size)


# ------------------------------------------------------------ JPEG, PNG, GIF: they have an end marker


def _jpeg_has_end(file: BinaryIO, size: int) -> bool:
    """Walk from marker to marker (ITU-T T.81, annex B): the end of a thumbnail lies inside of a segment."""
    at: int | None = 2
    while at is not None and (at := _next_marker(file, at)) is not None and at + 4 <= size + 2:
        file.seek(at)
        head = file.read(4)
        if head[1] == _JPEG_EOI:
            return True
        at += 2 + int.from_bytes(head[2:], "big")
    return False


def _next_marker(file: BinaryIO, at: int) -> int | None:
    """Return where the last byte of 255 of the next marker stands; None where there is no marker."""
    file.seek(at)
    block = b""
    while more := file.read(_BLOCK_BYTES):
        kept = len(block)
        block += more
        found = _JPEG_MARKER.search(block)
        if found:
            return at - kept + found.end() - 2
        at += len(more)
        block = block[-1:]
    return None


def _png_has_end(file: BinaryIO, size: int) -> bool:
    return any(chunk.kind == b"IEND" and chunk.end <= size for chunk in _png_chunks(file, size))


def _gif_has_end(file: BinaryIO, size: int) -> bool:
    """Walk from block to block (the specification GIF89a, appendix A)."""
    file.seek(10)
    at = 13 + _gif_table_bytes(file.read(1))
    while at < size:
        file.seek(at)
        head = file.read(10)
        if head[:1] == b";":
            return True
        if head[:1] == b"!":
            at += 2
        elif head[:1] == b",":
            at += 11 + _gif_table_bytes(head[9:])
        else:
            return False
        file.seek(at)
        while length := file.read(1):
            at += 1 + length[0]
            if length == b"\0":
                break
            file.seek(at)
    return False


def _gif_table_bytes(packed: bytes) -> int:
    """Return the size of the colour table that a packed field announces."""
    return 3 << ((packed[0] & 7) + 1) if packed and packed[0] & 0x80 else 0


_HAS_END: Mapping[str, Callable[[BinaryIO, int], bool]] = {
    "JPEG": _jpeg_has_end,
    "PNG": _png_has_end,
    "GIF": _gif_has_end,
}


# ------------------------------------------------------------ WEBP: chunks have lengths


def _has_hollow_chunk(file: BinaryIO, size: int) -> bool:
    """Tell whether a chunk of a RIFF file is missing, or one that holds the image ends in zeros."""
    file.seek(4)
    whole = min(size, 8 + int.from_bytes(file.read(4), "little"))
    at = 12
    while at + 8 <= whole:
        file.seek(at)
        head = file.read(8)
        kind, end = head[:4], at + 8 + int.from_bytes(head[4:], "little")
        if kind == bytes(4):
            return True
        holds_image = kind in _WEBP_IMAGE_CHUNKS and end <= size
        if holds_image and _is_hollow(file, at + 8, end, _most_zeros(kind, file.read(16))):
            return True
        at = end + end % 2
    return False


def _most_zeros(kind: bytes, head: bytes) -> int:
    """Return how many zeros a WebP image may end in, where its lower part is all of one colour."""
    if kind == b"VP8L":
        return _HOLLOW_BYTES
    if kind == b"VP8 ":  # RFC 6386, 9.1
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (6, 9))
    return max(_HOLLOW_BYTES, width * height // _MACROBLOCK_PIXELS)


def _is_hollow(file: BinaryIO, start: int, end: int, zeros: int = _HOLLOW_BYTES) -> bool:
    if end - start < zeros:
        return False
    file.seek(end - zeros)
    return not any(file.read(zeros))


# ------------------------------------------------------------ AVIF, HEIC: boxes (ISO/IEC 14496-12)


def _lacks_items(file: BinaryIO, size: int) -> bool:
    """Tell whether compressed pixels are missing or end in zeros; what is not understood is left to the decoder."""
    meta = next((box for box in _boxes_of_file(file, size) if box[0] == b"meta"), None)
    if meta is None:
        return False
    _, start, end = meta
    if end > size:
        return True
    if end - start > _MOST_META_BYTES:
        return False
    file.seek(start)
    parts = dict(_boxes(file.read(end - start), 4))
    try:
        coded = _coded_items(parts.get(b"iinf", b""))
        extents = [extent for item, extent in _extents(parts.get(b"iloc", b"")) if item in coded]
    except (IndexError, ValueError):
        return False
    return any(stop > size or _is_hollow(file, begin, stop) for begin, stop in extents)


def _boxes_of_file(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start of the content and end of each box of a file (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, begins = int.from_bytes(head[:4], "big"), at + 8
        if length == 1:
            length, begins = int.from_bytes(head[8:], "big"), at + 16
        end = size if length == 0 else at + length
        if end < begins:
            return
        yield head[4:8], begins, end
        at = end


def _boxes(content: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each box within a box, from ``at`` on."""
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if length < _BOX_HEAD_BYTES:
            return
        yield content[at + 4 : at + 8], content[at + 8 : at + length]
        at += length


def _coded_items(information: bytes) -> set[int]:
    """Return the numbers of the items that hold compressed pixels, by an ``iinf`` box."""
    found = set()
    for kind, entry in _boxes(information, 8 if information[:1] == b"\1" else 6):
        if kind != b"infe" or entry[:1] not in {b"\2", b"\3"}:
            continue
        length = 4 if entry[0] == _WIDE_VERSION[kind] else 2
        if entry[6 + length : 10 + length] in _CODED_ITEMS:
            found.add(int.from_bytes(entry[4 : 4 + length], "big"))
    return found


def _extents(locations: bytes) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield each item's number with where in the file its parts begin and end, by an ``iloc`` box.

    Raises:
        IndexError: the box ends before that.
        ValueError: it has more parts than any image.
    """
    at, parts_left = 0, _MOST_PARTS

    def read(length: int) -> int:
        nonlocal at
        at += length
        if at > len(locations):
            raise IndexError(at)
        return int.from_bytes(locations[at - length : at], "big")

    version = read(4) >> 24
    sizes = read(2)
    offset, length, base, index = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15, sizes & 15 if version else 0
    wide = 4 if version == _WIDE_VERSION[b"iloc"] else 2
    for _ in range(read(wide)):
        item = read(wide)
        in_file = version == 0 or read(2) & 15 == 0
        is_here = read(2) == 0 and in_file
        begins = read(base)
        parts = read(2)
        parts_left -= parts
        if parts_left < 0:
            raise ValueError("too many parts")
        for _ in range(parts):
            read(index)
            start = begins + read(offset)
            extent = read(length)
            if is_here and extent:
                yield item, (start, start + extent)


# ------------------------------------------------------------ PNG without what its picture does not need


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk of a PNG; ``end`` is where the next one begins, which may be beyond the end of the file."""

    kind: bytes
    start: int
    end: int


def _png_chunks(file: BinaryIO, size: int) -> Iterator[_Chunk]:
    """Yield the chunks of a PNG up to ``IEND``, or up to where there is no chunk any more; moves the position."""
    at = _PNG_SIGNATURE_BYTES
    while at + 8 <= size:
        file.seek(at)
        head = file.read(8)
        chunk = _Chunk(head[4:], at, at + 12 + int.from_bytes(head[:4], "big"))
        if not chunk.kind.isalpha():
            return
        yield chunk
        if chunk.kind == b"IEND":
            return
        at = chunk.end


def png_picture(file: BinaryIO) -> BinaryIO:
    """Return a PNG without the chunks that its picture does not need; what is not whole stays as it is.

    Pillow refuses a whole PNG for one ancillary chunk: over a megabyte of compressed text, a wrong checksum, a broken
    colour profile. A decoder is to drop such a chunk and go on (https://www.w3.org/TR/png-3/#13Error-handling).
    """
    size = os.fstat(file.fileno()).st_size
    parts, end, is_whole = [(0, _PNG_SIGNATURE_BYTES)], _PNG_SIGNATURE_BYTES, False
    for chunk in _png_chunks(file, size):
        end, is_whole = chunk.end, chunk.kind == b"IEND"
        if chunk.end > size or _is_needed(file, chunk):
            parts.append((chunk.start, min(chunk.end, size)))
    if end < size and not is_whole:
        parts.append((end, size))  # no chunk: that is for the decoder to refuse
    return io.BufferedReader(_Spliced(file, parts))


def _is_needed(file: BinaryIO, chunk: _Chunk) -> bool:
    if chunk.kind[:1].isupper():  # critical
        return True
    if chunk.kind in _PNG_CHECKED:
        return _has_right_checksum(file, chunk)
    if chunk.kind not in _PNG_TEXTS or chunk.end - chunk.start > _PNG_TEXT_BYTES:
        return False
    file.seek(chunk.start + 8)
    keyword, _, rest = file.read(chunk.end - chunk.start - 12).partition(b"\0")
    return keyword in _PNG_ORIENTED and _has_right_checksum(file, chunk) and _unpacks_to_little(chunk.kind, rest)


def _has_right_checksum(file: BinaryIO, chunk: _Chunk) -> bool:
    file.seek(chunk.start + 4)
    checksum = zlib.crc32(file.read(chunk.end - chunk.start - 8))
    return file.read(4) == checksum.to_bytes(4, "big")


def _unpacks_to_little(kind: bytes, text: bytes) -> bool:
    """Tell whether a text unpacks to no more than Pillow allows (https://www.w3.org/TR/png-3/#11textinfo)."""
    if kind == b"zTXt":
        packed = text[1:]
    elif kind == b"iTXt" and text[:1] == b"\1":
        packed = text[2:].split(b"\0", 2)[-1]
    else:
        return True
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _PNG_TEXT_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


class _Spliced(io.RawIOBase):
    """Parts of a file, one behind the other, as a file of its own."""

    def __init__(self, file: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
        self._file, self._at, self._size = file, 0, 0
        self._parts: list[tuple[int, int, int]] = []  # where it begins here, and from where to where it stands there
        for start, end in parts:
            self._parts.append((self._size, start, end))
            self._size += end - start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, into: "WriteableBuffer", /) -> int:
        if self._at >= self._size:
            return 0
        here, start, end = self._parts[bisect_right(self._parts, self._at, key=itemgetter(0)) - 1]
        self._file.seek(start + self._at - here)
        room = memoryview(into).cast("B")
        data = self._file.read(min(len(room), end - start - self._at + here))
        room[: len(data)] = data
        self._at += len(data)
        return len(data)
