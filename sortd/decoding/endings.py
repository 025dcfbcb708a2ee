"""Was a file written to its end? Some writers lay a file out in full and fill it bit by bit; a lost one leaves zeros.

libjpeg paints the rest grey, libwebp black, zlib may make rows of anything, and none of them minds. In uncompressed
formats (BMP, most TIFF) zeros are black and nothing can be told.
"""

import os
from typing import BinaryIO

ZERO_TAIL_BYTES = 512
"""So many zeros at the end are no accident of compressed data."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
"""What stands last in a whole file; zeros behind it are padding."""

_WEBP_IMAGE_CHUNKS = {b"VP8 ", b"VP8L", b"ALPH", b"ANMF"}
_WEBP_ZEROS = 64
_BLOCK_BYTES = 1 << 15


def is_unfinished(file: BinaryIO, format_name: str) -> bool:
    """Tell whether the end of a compressed image was never written; moves the file's position."""
    size = os.fstat(file.fileno()).st_size
    if format_name == "WEBP":
        return _has_hollow_chunk(file, size)
    if format_name not in _ENDS:
        return False
    zeros, filled = _zero_tail(file, size)
    return zeros >= ZERO_TAIL_BYTES and not filled.endswith(_ENDS[format_name])


def _zero_tail(file: BinaryIO, size: int) -> tuple[int, bytes]:
    """Return how many zeros a file ends in, and some of what stands before them."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        filled = file.read(end - start).rstrip(b"\0")
        if filled:
            return size - start - len(filled), filled
        end = start
    return size, b""


def _has_hollow_chunk(file: BinaryIO, size: int) -> bool:
    """Tell whether a chunk of a RIFF file is missing, or one that holds the image ends in zeros."""
    at = 12
    while at + 8 <= size:
        file.seek(at)
        head = file.read(8)
        kind, end = head[:4], at + 8 + int.from_bytes(head[4:], "little")
        if kind == bytes(4):
            return True
        if kind in _WEBP_IMAGE_CHUNKS and end - at - 8 >= _WEBP_ZEROS and end <= size:
            file.seek(end - _WEBP_ZEROS)
            if not any(file.read(_WEBP_ZEROS)):
                return True
        at = end + end % 2
    return False
