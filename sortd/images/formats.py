"""Image formats: recognition by content, detection of truncated files, removal of chunks that a PNG does not need.

Pillow knows some fifty formats, and most of its security advisories are about formats that no camera writes. A decoder
gets only files whose first bytes are of its format.

Some programs reserve a file at its full size and fill it gradually; if they stop, zeros remain at its end. Decoders do
not report it: libjpeg paints the rest grey, libwebp black, libde265 and dav1d return some picture, libheif leaves out
missing tiles. In uncompressed formats (BMP, most TIFF) zeros are black pixels, so nothing is detected there. Data after
the end of the picture (the film of a motion photo, a maker's trailer, padding) is ignored.
"""

import io
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from sortd.companions import IMAGES, RAWS

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HEAD_BYTES = 64  # enough to recognise every format

_ZERO_TAIL_BYTES = 512  # compressed files do not end in so many zeros
_ZERO_DATA_BYTES = 64  # nor does the compressed data of one image end in so many
_BLOCK_BYTES = 1 << 15
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # after fill bytes; not an escaped 255, nor a restart marker
_JPEG_EOI = 0xD9
_WEBP_IMAGE_CHUNKS = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
_MACROBLOCK_PIXELS = 256  # a block of a lossy WebP that is like its neighbours takes up to one zero byte
_BOX_HEAD_BYTES = 8
_WIDE_VERSION = {b"infe": 3, b"iloc": 2}  # from this version of a box on, item numbers have four bytes, before two
_MAX_META_BYTES = 1 << 22
_MAX_EXTENTS = 100_000
_CODED_ITEMS = frozenset({b"hvc1", b"av01", b"avc1", b"vvc1", b"jpeg"})
"""Items of an ISO image file (ISO/IEC 23008-12) that hold compressed pixels: an image, a tile, an alpha channel."""
_PNG_SIGNATURE_BYTES = 8
_PNG_CHECKED = frozenset({b"tRNS", b"eXIf"})  # change how the picture looks; dropped if their checksum is wrong
_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_ORIENTED = {b"Raw profile type exif", b"XML:com.adobe.xmp"}  # keywords of texts that hold the orientation
_PNG_TEXT_BYTES = 1_000_000  # longer texts, packed or unpacked, are dropped; Pillow's limit is a little higher


@dataclass(frozen=True, slots=True)
class Format:
    """An image format."""

    name: str  # Pillow's
    plugin: str
    """The module that registers it with Pillow; only that of the file's format is imported for a file."""
    remedy: str = ""  # how to install a missing decoder
    held_bytes: int = 4  # memory for each pixel during a usual decoding; Pillow's image itself takes 4
    peak_bytes: int = 12  # the same for the most costly kind of this format

    @property
    def title(self) -> str:
        """The name that users know."""
        return "HEIC" if self.name == "HEIF" else self.name


_JPEG = Format("JPEG", "PIL.JpegImagePlugin")
_PNG = Format("PNG", "PIL.PngImagePlugin")
_GIF = Format("GIF", "PIL.GifImagePlugin")
_BMP = Format("BMP", "PIL.BmpImagePlugin")
# A strip may be the whole image, in 16 bits a channel, beside the file itself, which libtiff maps.
_TIFF = Format("TIFF", "PIL.TiffImagePlugin", peak_bytes=20)
# Two canvases of WebPAnimDecoder and a copy of one, and the whole file twice.
_WEBP = Format("WEBP", "PIL.WebPImagePlugin", "install a Pillow that was built with libwebp", 12, 20)
# The planes in up to 16 bits a channel, once more for a grid or a rotation, RGB, a copy of it, and the image.
_AVIF = Format("AVIF", "PIL.AvifImagePlugin", "install a Pillow that was built with libavif", 12, 28)
_HEIF = Format("HEIF", "pillow_heif", "install its decoder: pip install pillow-heif", 12, 28)

FORMATS = (_JPEG, _PNG, _GIF, _BMP, _TIFF, _WEBP, _AVIF, _HEIF)
SUPPORTED = "JPEG, PNG, GIF, BMP, WEBP, TIFF, AVIF or HEIC"

_MAGIC: Mapping[bytes, Format] = {
    b"\xff\xd8\xff": _JPEG,
    b"\x89PNG\r\n\x1a\n": _PNG,
    **dict.fromkeys((b"GIF87a", b"GIF89a"), _GIF),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _TIFF),  # with +: BigTIFF
}
_BRANDS: Mapping[bytes, Format] = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), _HEIF),
}
"""Brands of still images in an ISO base media file; after ``mif1`` and ``msf1`` the next brands name the codec."""
_BMP_HEADER_SIZES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})


def format_of(head: bytes) -> Format | None:
    """Return the format of a file by its first ``HEAD_BYTES``; None if sortd does not decode it."""
    for magic, image_format in _MAGIC.items():
        if head.startswith(magic):
            return image_format
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    # Texts may begin with "BM", too; a bitmap has a valid header size in addition.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return _BMP
    if head[4:8] != b"ftyp":
        return None
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if brands[0] not in {*_BRANDS, b"mif1", b"msf1"}:
        return None
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _HEIF)


def looks_like_image(name: str, head: bytes) -> bool:
    """Tell whether a file is treated as an image, by its name in any letter case or its first ``HEAD_BYTES``.

    Raw files of cameras, which are TIFF by content, thumbnails of films (``.thm``) and originals that exiftool keeps
    (``.jpg_original``) are not images but companions of images.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in RAWS or suffix == ".thm" or suffix.endswith("_original"):
        return False
    return suffix in IMAGES or format_of(head) is not None


# ------------------------------------------------------------ truncated files


def is_truncated(file: BinaryIO, format_name: str) -> bool:
    """Tell whether the end of a compressed image was never written; moves the file's position."""
    size = os.fstat(file.fileno()).st_size
    if format_name == "WEBP":
        return _lacks_chunk_data(file, size)
    if format_name in {"AVIF", "HEIF"}:
        return _lacks_item_data(file, size)
    if format_name not in _HAS_END:
        return False
    file.seek(max(0, size - _ZERO_TAIL_BYTES))
    return not any(file.read(_ZERO_TAIL_BYTES)) and not _HAS_END[format_name](file, size)


# ------------------------------------------------------------ JPEG, PNG, GIF: an end marker


def _jpeg_has_end(file: BinaryIO, size: int) -> bool:
    """Walk from marker to marker (ITU-T T.81, annex B), since thumbnails in segments have end markers, too."""
    at: int | None = 2
    while at is not None and (at := _next_marker(file, at)) is not None and at + 4 <= size + 2:
        file.seek(at)
        head = file.read(4)
        if head[1] == _JPEG_EOI:
            return True
        at += 2 + int.from_bytes(head[2:], "big")
    return False


def _next_marker(file: BinaryIO, at: int) -> int | None:
    """Return the offset of the last 255 byte of the next marker; None if there is none."""
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
    "PNG": lambda file, size: any(one.kind == b"IEND" and one.end <= size for one in _png_chunks(file, size)),
    "GIF": _gif_has_end,
}


# ------------------------------------------------------------ WEBP: chunks with lengths


def _lacks_chunk_data(file: BinaryIO, size: int) -> bool:
    """Tell whether a chunk of a RIFF file is missing, or the data of an image chunk ends in zeros."""
    file.seek(4)
    whole = min(size, 8 + int.from_bytes(file.read(4), "little"))
    at = 12
    while at + 8 <= whole:
        file.seek(at)
        head = file.read(8)
        kind, end = head[:4], at + 8 + int.from_bytes(head[4:], "little")
        if kind == bytes(4):
            return True
        has_pixels = kind in _WEBP_IMAGE_CHUNKS and end <= size
        if has_pixels and _ends_in_zeros(file, at + 8, end, _max_zeros(kind, file.read(16))):
            return True
        at = end + end % 2
    return False


def _max_zeros(kind: bytes, head: bytes) -> int:
    """Return how many zeros a complete WebP image may end in if its lower part has one colour."""
    if kind == b"VP8L":
        return _ZERO_DATA_BYTES
    if kind == b"VP8 ":  # RFC 6386, 9.1
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (6, 9))
    return max(_ZERO_DATA_BYTES, width * height // _MACROBLOCK_PIXELS)


def _ends_in_zeros(file: BinaryIO, start: int, end: int, zeros: int = _ZERO_DATA_BYTES) -> bool:
    if end - start < zeros:
        return False
    file.seek(end - zeros)
    return not any(file.read(zeros))


# ------------------------------------------------------------ AVIF, HEIC: boxes (ISO/IEC 14496-12)


def _lacks_item_data(file: BinaryIO, size: int) -> bool:
    """Tell whether compressed pixels are missing or end in zeros; False for structures that are not understood."""
    meta = next((box for box in _file_boxes(file, size) if box[0] == b"meta"), None)
    if meta is None:
        return False
    _, start, end = meta
    if end > size:
        return True
    if end - start > _MAX_META_BYTES:
        return False
    file.seek(start)
    parts = dict(_boxes(file.read(end - start), 4))
    try:
        coded = _coded_items(parts.get(b"iinf", b""))
        extents = [extent for item, extent in _extents(parts.get(b"iloc", b"")) if item in coded]
    except (IndexError, ValueError):
        return False
    return any(stop > size or _ends_in_zeros(file, begin, stop) for begin, stop in extents)


def _file_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
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
    """Yield kind and content of each box within a box, beginning at an offset."""
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if length < _BOX_HEAD_BYTES:
            return
        yield content[at + 4 : at + 8], content[at + 8 : at + length]
        at += length


def _coded_items(information: bytes) -> set[int]:
    """Return the numbers of the items that hold compressed pixels, from an ``iinf`` box."""
    found = set()
    for kind, entry in _boxes(information, 8 if information[:1] == b"\1" else 6):
        if kind != b"infe" or entry[:1] not in {b"\2", b"\3"}:
            continue
        length = 4 if entry[0] == _WIDE_VERSION[kind] else 2
        if entry[6 + length : 10 + length] in _CODED_ITEMS:
            found.add(int.from_bytes(entry[4 : 4 + length], "big"))
    return found


def _extents(locations: bytes) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the number of each item with start and end of each of its parts in the file, from an ``iloc`` box.

    Raises:
        IndexError: the box is too short.
        ValueError: it has more parts than any image.
    """
    at, parts_left = 0, _MAX_EXTENTS

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


# ------------------------------------------------------------ PNG: chunks


class _Chunk(NamedTuple):
    """One chunk of a PNG; ``end``, where the next one begins, may be beyond the end of the file."""

    kind: bytes
    start: int
    end: int


def _png_chunks(file: BinaryIO, size: int) -> Iterator[_Chunk]:
    """Yield the chunks of a PNG up to ``IEND`` or the first invalid one; moves the position."""
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


def strip_png(file: BinaryIO) -> BinaryIO:
    """Return a PNG without the chunks that its picture does not need; incomplete chunks are kept.

    Pillow refuses an intact PNG because of one ancillary chunk: over a megabyte of compressed text, a wrong checksum, a
    broken colour profile. A decoder should ignore such chunks (https://www.w3.org/TR/png-3/#13Error-handling).
    """
    size = os.fstat(file.fileno()).st_size
    parts, end, has_end = [(0, _PNG_SIGNATURE_BYTES)], _PNG_SIGNATURE_BYTES, False
    for chunk in _png_chunks(file, size):
        end, has_end = chunk.end, chunk.kind == b"IEND"
        if chunk.end > size or _is_needed(file, chunk):
            parts.append((chunk.start, min(chunk.end, size)))
    if end < size and not has_end:
        parts.append((end, size))  # an invalid chunk, which the decoder refuses
    return io.BufferedReader(_FileParts(file, parts))


def _is_needed(file: BinaryIO, chunk: _Chunk) -> bool:
    if chunk.kind[:1].isupper():  # critical
        return True
    if chunk.kind in _PNG_CHECKED:
        return _has_valid_checksum(file, chunk)
    if chunk.kind not in _PNG_TEXTS or chunk.end - chunk.start > _PNG_TEXT_BYTES:
        return False
    file.seek(chunk.start + 8)
    keyword, _, rest = file.read(chunk.end - chunk.start - 12).partition(b"\0")
    return keyword in _PNG_ORIENTED and _has_valid_checksum(file, chunk) and _is_short_unpacked(chunk.kind, rest)


def _has_valid_checksum(file: BinaryIO, chunk: _Chunk) -> bool:
    file.seek(chunk.start + 4)
    checksum = zlib.crc32(file.read(chunk.end - chunk.start - 8))
    return file.read(4) == checksum.to_bytes(4, "big")


def _is_short_unpacked(kind: bytes, text: bytes) -> bool:
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


class _FileParts(io.RawIOBase):
    """Parts of a file, concatenated, as a file."""

    def __init__(self, file: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
        self._file, self._at, self._size = file, 0, 0
        self._parts: list[tuple[int, int, int]] = []  # start here, start and end in the file
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
