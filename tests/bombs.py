"""Hostile images: small files that decompress to large ones, have false headers, or never end."""

import io
import lzma
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG, see https://www.w3.org/TR/png-3/#5Chunk-layout."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int, channels: int) -> bytes:
    """Write a black PNG of that size in a few kilobytes, a row at a time; 1 channel is grey, 4 are RGB and alpha."""
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 4: 6}[channels], 0, 0, 0)
    packer, row = zlib.compressobj(1), bytes(1 + (width * channels * depth + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def one_bit_png(width: int, height: int) -> bytes:
    """Write a black PNG of one bit a pixel."""
    return png(width, height, depth=1, channels=1)


def png_with(kind: bytes, data: bytes) -> bytes:
    """Write a small PNG with one more chunk behind its header."""
    small = one_bit_png(40, 40)
    return small[:33] + chunk(kind, data) + small[33:]


def png_with_text(size: int) -> bytes:
    """Write a small PNG with a compressed text that unpacks to that many bytes."""
    return png_with(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size)))


def gif(width: int, height: int) -> bytes:
    """Write a GIF whose canvas has that size and whose only frame has one pixel."""
    one = saved(Image.new("P", (1, 1)), "GIF")
    return one[:6] + struct.pack("<HH", width, height) + one[10:]


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Encode an image."""
    target = io.BytesIO()
    image.save(target, image_format, **options)
    return target.getvalue()


def tiff_in_circles() -> bytes:
    """Write a TIFF whose directory is followed by itself."""
    entries = struct.pack("<HHII", 256, 4, 1, 1) + struct.pack("<HHII", 257, 4, 1, 1)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2) + entries + struct.pack("<I", 8)


def tiff_of_many_bytes() -> bytes:
    """Write a TIFF whose only strip has a declared size of four gigabytes."""
    tags = ((256, 30_000), (257, 30_000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 30_000))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*tags, (279, 0xFFFF_FFF0)))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 9) + entries + struct.pack("<I", 0)


def many_frames(frames: int) -> bytes:
    """Write a GIF of many frames; only the first one counts."""
    pictures = [Image.new("P", (64, 64), number % 256) for number in range(frames)]
    return saved(pictures[0], "GIF", save_all=True, append_images=pictures[1:], disposal=2)


def bombs(side: int = 7000) -> dict[str, bytes]:
    """Return all of them by name; those that may be decoded have sides of at most so many pixels."""
    wide = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    jpeg = saved(Image.new("RGB", (64, 64)), "JPEG")
    return {
        "black.png": one_bit_png(side, side),
        "deep.png": png(side, side, depth=16, channels=4),
        "alpha.png": png(side, side, depth=8, channels=4),
        "wide.png": one_bit_png(side * side // 49, 49),
        "endless.png": one_bit_png(80_000_000, 1),
        "huge.png": one_bit_png(30_000, 30_000),
        "said.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", wide) + chunk(b"IDAT", zlib.compress(bytes(1000))),
        "text.png": png_with_text(40_000_000),
        "profile.png": png_with(b"iCCP", b"icc\0\0" + zlib.compress(bytes(200_000_000))),
        "canvas.gif": gif(60_000, 60_000),
        "canvas49.gif": gif(side, side),
        "frames.gif": many_frames(2_000),
        "plain.bmp": saved(Image.new("1", (side, side)), "BMP"),
        "grey16.tif": saved(Image.new("I;16", (side, side)), "TIFF", compression="tiff_lzw"),
        "inks.tif": saved(Image.new("CMYK", (side, side)), "TIFF", compression="tiff_lzw"),
        "circles.tif": tiff_in_circles(),
        "strip.tif": tiff_of_many_bytes(),
        "slow.jpg": saved(Image.new("RGB", (side, side)), "JPEG", progressive=True, subsampling=0),
        "comments.jpg": jpeg[:2] + 400 * (b"\xff\xfe\xff\xff" + bytes(65_533)) + jpeg[2:],
        "scans.jpg": jpeg[:-2] + 20_000 * b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00" + jpeg[-2:],
        "empty.webp": saved(Image.new("RGB", (side, side)), "WEBP"),
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{ } loop\n",
        "zip.jpg": b"PK\x03\x04" + bytes(1000),
        "page.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script>while(1);</script></svg>",
    }


CORPUS = Path(__file__).parents[2] / "shared" / "data" / "hostile" / "hostile.tar.xz"
"""Regression and fuzzing corpora of image libraries: added to the made files where they are there."""


def write_hostile_files(folder: Path) -> list[Path]:
    """Write damaged images, images with false headers, and other files to an empty folder; return the intact ones."""
    chance = random.Random(1)  # noqa: S311 - the same files each time
    sound = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        image = Image.frombytes("RGB", (60, 40), chance.randbytes(60 * 40 * 3))
        whole = saved(image, kind)
        sound.append(folder / f"sound.{kind.lower()}")
        sound[-1].write_bytes(whole)
        for number in range(6):
            for way, damage in DAMAGES.items():
                (folder / f"{way} {number}.{kind.lower()}").write_bytes(damage(whole, chance))
    lies = {
        "wide.png": one_bit_png(2_000_000, 2),
        "text.png": png_with_text(50 << 20),
        "canvas.gif": gif(60_000, 60_000),
        "circles.tiff": tiff_in_circles(),
        "large.tiff": tiff_of_many_bytes(),
    }
    for name, content in lies.items():
        (folder / name).write_bytes(content)
    for number in range(20):
        (folder / f"words {number}.jpg").write_bytes(chance.randbytes(50 * number) + b"no image")
    (folder / "words without a name of an image").write_bytes(b"no image")
    if CORPUS.is_file():
        with lzma.open(CORPUS) as packed, tarfile.open(fileobj=packed) as archive:
            archive.extractall(folder / "corpus", filter="data")
    return sound


def _flipped(whole: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(whole)
    for _ in range(chance.randint(1, 20)):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _spliced(whole: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(whole)) for _ in range(2))
    return whole[:first] + whole[second:] + whole[first:second]


def _large_numbers(whole: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(whole)
    at = chance.randrange(min(len(damaged) - 4, 120))  # sizes and offsets stand near the beginning
    damaged[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"])
    return bytes(damaged)


DAMAGES: Mapping[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda whole, chance: whole[: chance.randrange(1, len(whole))],
    "flipped": _flipped,
    "spliced": _spliced,
    "numbers": _large_numbers,
    "zeros": lambda whole, chance: whole[: (at := chance.randrange(len(whole)))] + bytes(len(whole) - at),
    "longer": lambda whole, chance: whole + chance.randbytes(chance.randrange(1, 5000)),
}
"""Ways to damage the bytes of an image, by name."""
