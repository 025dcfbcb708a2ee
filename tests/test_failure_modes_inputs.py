"""What inputs break sorters, dropped into a real sortd beside sound images; docs/failure-modes.md is the table."""

import os
import socket
import stat
import struct
import unicodedata
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pillow_heif
import pytest
from PIL import Image

from tests.bombs import write_hostile_files
from tests.daemon_process import COLOURS, picture, running, tree

pillow_heif.register_heif_opener()
Write = Callable[..., Path]


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image's bytes in one format."""
    into = BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def bomb() -> bytes:
    """Return a PNG of some hundred bytes that says it is 60,000 pixels wide and as high."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def sixteen_bits(value: int) -> Image.Image:
    """Return a picture of 16 bits a pixel, all of one value."""
    return Image.new("I;16", (64, 64), value)


class TestKindsOfImages:
    """Whatever an image is made of, it is decided by what a person sees in it."""

    def test_every_mode_is_seen_in_its_colour(self, colours: Path, write_config: Write) -> None:
        """Palette, alpha, CMYK, a telephone's HEIC and motion photo, large or tiny: each in the class of its colour."""
        inbox = colours / "Images"
        transparent = picture("red", 7).convert("P")
        transparent.info["transparency"] = 255
        dropped = {
            "palette.png": ("red", encoded(picture("red", 1001).convert("P"), "PNG")),
            "palette.gif": ("green", encoded(picture("green", 1002), "GIF")),
            "transparency.png": ("red", encoded(transparent, "PNG")),
            "alpha.png": ("blue", encoded(picture("blue", 1003).convert("RGBA"), "PNG")),
            "alpha.webp": ("green", encoded(picture("green", 1004).convert("RGBA"), "WEBP", lossless=True)),
            "photo.HEIC": ("green", encoded(picture("green", 1008), "HEIF")),
            "burst named.png": ("blue", encoded(picture("blue", 1009), "HEIF", tile_size=64)),
            "photo.avif": ("red", encoded(picture("red", 1010), "AVIF")),
            "motion.MP.jpg": ("blue", encoded(picture("blue", 1011), "JPEG", quality=95) + b"film" + bytes(4000)),
            "cmyk.jpg": ("red", encoded(picture("red", 1005).convert("CMYK"), "JPEG", quality=95)),
            "cmyk.tif": ("blue", encoded(picture("blue", 1006).convert("CMYK"), "TIFF")),
            "plain.bmp": ("green", encoded(picture("green", 1007), "BMP")),
            "one pixel.png": ("red", encoded(Image.new("RGB", (1, 1), COLOURS["red"]), "PNG")),
            "thin.png": ("blue", encoded(Image.new("RGB", (3000, 1), COLOURS["blue"]), "PNG")),
        }
        with running(write_config()) as daemon:
            for name, (_, content) in dropped.items():
                (inbox / name).write_bytes(content)
            daemon.wait_for("image.filed", count=len(dropped))
        assert tree(colours / "Dataset") == {f"{label}/{name}": content for name, (label, content) in dropped.items()}

    def test_grey_and_sixteen_bits_are_told_by_their_brightness(self, colours: Path, write_config: Write) -> None:
        """One channel, one bit or sixteen bits deep: dark is dark and bright is bright."""
        for label, value in (("dark", 12), ("bright", 243)):
            folder = colours / "Clases" / label
            folder.mkdir()
            for number in range(3):
                Image.new("RGB", (64, 64), (value + number,) * 3).save(folder / f"{number}.png")
        inbox = colours / "Images"
        with running(write_config()) as daemon:
            for label, value in (("dark", 8), ("bright", 250)):
                Image.new("L", (64, 64), value).save(inbox / f"{label} grey.png")
                Image.new("LA", (64, 64), (value, 255)).save(inbox / f"{label} grey and alpha.png")
                Image.new("1", (64, 64), value // 128).save(inbox / f"{label} bit.png")
                sixteen_bits(value * 257).save(inbox / f"{label} deep.png")
                sixteen_bits(value * 257).save(inbox / f"{label} deep.tif")
            daemon.wait_for("image.filed", count=10)
        filed = tree(colours / "Dataset")
        assert len(filed) == 10
        assert all(path.startswith(path.split("/")[1].split(" ")[0] + "/") for path in filed), sorted(filed)

    def test_a_turned_photo_is_decided_upright_and_keeps_its_bytes(self, colours: Path, write_config: Write) -> None:
        """The orientation that a camera noted counts for the decision; the file itself is never written."""
        for label, top, bottom in (("sky", "blue", "green"), ("sea", "green", "blue")):
            folder = colours / "Clases" / label
            folder.mkdir()
            for number in range(3):
                self._two_halves(top, bottom, number).save(folder / f"{number}.png")
        upside_down = self._two_halves("blue", "green", 1001).transpose(Image.Transpose.ROTATE_180)
        exif = Image.Exif()
        exif[0x0112] = 3
        content = encoded(upside_down, "JPEG", quality=95, exif=exif)
        with running(write_config()) as daemon:
            (colours / "Images" / "turned.jpg").write_bytes(content)
            assert daemon.wait_for("image.filed")["label"] == "sky"
        assert tree(colours / "Dataset") == {"sky/turned.jpg": content}

    @staticmethod
    def _two_halves(top: str, bottom: str, seed: int) -> Image.Image:
        image = Image.new("RGB", (64, 64))
        image.paste(picture(top, seed, (64, 32)), (0, 0))
        image.paste(picture(bottom, seed + 500, (64, 32)), (0, 32))
        return image


class TestNames:
    """A name says nothing about the content, and may be anything."""

    def test_content_tells_the_format_whatever_the_suffix(self, colours: Path, write_config: Write) -> None:
        """A JPEG named .png, a PNG named .jpg, a WebP named .gif, and images with no suffix or another one at all."""
        image = picture("green", 1001)
        dropped = {
            "a.png": encoded(image, "JPEG"),
            "b.jpg": encoded(image, "PNG"),
            "c.gif": encoded(image, "WEBP"),
            "d.tiff": encoded(image, "BMP"),
            "without": encoded(image, "PNG"),
            "other.dat": encoded(image, "JPEG"),
        }
        with running(write_config()) as daemon:
            for name, content in dropped.items():
                (colours / "Images" / name).write_bytes(content)
            daemon.wait_for("image.filed", count=len(dropped))
        assert tree(colours / "Dataset" / "green") == dropped

    def test_a_broken_heic_is_set_aside_with_its_reason_whatever_its_name(
        self, colours: Path, write_config: Write
    ) -> None:
        """A broken HEIC photo named .png: known by content, and told that HEIC is read and the file is broken."""
        heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000)
        with running(write_config()) as daemon:
            (colours / "Images" / "IMG_0001.png").write_bytes(heic)
            assert "broken or incomplete HEIC file" in daemon.wait_for("image.rejected")["reason"]
        assert tree(colours / "Rejected")["IMG_0001.png"] == heic

    def test_suffixes_are_read_in_any_case(self, colours: Path, write_config: Write) -> None:
        """Cameras write DSC_0001.JPG."""
        names = ["A.JPG", "B.Png", "C.JPEG", "D.GIF", "E.WebP", "F.TIF", "G.BMP"]
        with running(write_config()) as daemon:
            for number, name in enumerate(names):
                picture("red", 1001 + number).save(colours / "Images" / name)
            daemon.wait_for("image.filed", count=len(names))
        assert sorted(tree(colours / "Dataset" / "red")) == names

    def test_names_that_look_alike_stay_apart(self, colours: Path, write_config: Write) -> None:
        """Composed and decomposed letters are two names on Linux: both files are filed, each under its own bytes."""
        composed = unicodedata.normalize("NFC", "señal café.png")
        decomposed = unicodedata.normalize("NFD", composed)
        assert composed != decomposed
        with running(write_config()) as daemon:
            for number, name in enumerate([composed, decomposed]):
                picture("green", 1001 + number).save(colours / "Images" / name)
            daemon.wait_for("image.filed", count=2)
            assert daemon.stop() == 0
            assert not daemon.noise
        assert sorted(tree(colours / "Dataset" / "green")) == sorted([composed, decomposed])

    def test_strange_names_are_filed_under_themselves(self, colours: Path, write_config: Write) -> None:
        """Spaces, dashes, quotes, dollars, right to left, control characters, raw bytes, and 255 bytes of it."""
        names = [
            " leading and trailing .png",
            "-rf.png",
            "$(reboot);`id`'\"&|.png",
            "100%s {path} \\n.png",
            "new\nline\ttab.png",
            "\u202egnp.exe.png",
            "emoji 📷 家族.png",
            "CON.png",
            os.fsdecode(b"latin-1 \xe9\xff.png"),
            "x" * 251 + ".png",
            "é" * 125 + "y.png",
        ]
        content = {name: encoded(picture("blue", 1001 + number), "PNG") for number, name in enumerate(names)}
        with running(write_config()) as daemon:
            for name in names:
                with open(os.path.join(colours, "Images", name), "wb") as file:
                    file.write(content[name])
            daemon.wait_for("image.filed", count=len(names))
            assert daemon.stop() == 0
            assert not daemon.noise
        assert {name: Path(colours, "Dataset", "blue", name).read_bytes() for name in names} == content


class TestPoison:
    """One bad file must cost nobody else anything."""

    def test_bad_files_are_set_aside_or_left_and_the_images_beside_them_filed(
        self, colours: Path, write_config: Write
    ) -> None:
        """Truncated, bombs, lies, texts, programs and archives: each with its reason, none of them twice."""
        inbox = colours / "Images"
        sound = encoded(picture("green", 1001, (300, 200)), "JPEG")
        set_aside = {
            "truncated.jpg": sound[: len(sound) // 2],
            "truncated.png": encoded(picture("red", 1002, (300, 200)), "PNG")[:5000],
            "bomb.png": bomb(),
            "header only.png": b"\x89PNG\r\n\x1a\n",
            "text.jpg": b"I am not an image, I only say so.",
            "zeros.png": bytes(10_000),
            "archive.jpg": b"PK\x03\x04" + bytes(3000),
            "page.gif": b"<!DOCTYPE html><title>404 Not Found</title>",
        }
        left = {"notes.txt": b"buy screws", "film.mp4": b"\0\0\0\x18ftypisom" + bytes(500), "empty.png": b""}
        with running(write_config()) as daemon:
            for number, (name, content) in enumerate((set_aside | left).items()):
                (inbox / name).write_bytes(content)
                picture("blue", 1001 + number).save(inbox / f"sound {number}.png")
            daemon.wait_for("image.filed", count=len(set_aside) + len(left))
            daemon.wait_for("image.rejected", count=len(set_aside))
            daemon.wait_for("image.left", count=len(left))
            assert daemon.stop() == 0
            assert all(line["reason"] for line in daemon.events("image.rejected") + daemon.events("image.left"))
            assert len(daemon.events("image.rejected")) == len(set_aside)
        assert tree(inbox) == left
        rejected = tree(colours / "Rejected")
        assert {name: rejected[name] for name in set_aside} == set_aside
        assert set(rejected) == {*set_aside, *(f"{name}.reason.json" for name in set_aside)}

    def test_a_bad_image_does_not_spoil_the_batch_that_it_is_in(self, colours: Path, write_config: Write) -> None:
        """Forty images and a broken one are decided together: the forty are filed, the one is named."""
        inbox = colours / "Images"
        for number in range(40):
            picture("red", 1001 + number).save(inbox / f"{number}.png")
        (inbox / "20 broken.png").write_bytes(encoded(picture("red", 1, (300, 200)), "PNG")[:3000])
        with running(write_config()) as daemon:
            assert daemon.wait_for("image.rejected")["path"] == str(inbox / "20 broken.png")
            daemon.wait_for("image.filed", count=40)

    def test_what_is_no_regular_file_is_never_opened(self, colours: Path, write_config: Write) -> None:
        """A pipe would hang whoever opens it for ever, a device would never end; both stay, the images go on."""
        inbox = colours / "Images"
        os.mkfifo(inbox / "pipe.png")
        listener = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(inbox)  # the name of a socket is at most 108 bytes long
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(here)
        (inbox / "zero.png").symlink_to("/dev/zero")
        (inbox / "folder.png").mkdir()
        with listener, running(write_config()) as daemon:
            picture("green", 1001).save(inbox / "a.png")
            daemon.wait_for("image.filed")
            assert daemon.stop() == 0
        assert stat.S_ISFIFO((inbox / "pipe.png").stat().st_mode)
        assert sorted(path.name for path in inbox.iterdir()) == ["folder.png", "pipe.png", "socket.png", "zero.png"]

    def test_a_file_of_many_holes_costs_no_memory(self, colours: Path, write_config: Write) -> None:
        """Two gigabytes of nothing behind a PNG's beginning: refused by its size, without being read."""
        with running(write_config(decoding="{max_bytes: 50_000_000}")) as daemon:
            with (colours / "Images" / "holes.png").open("wb") as file:
                file.write(bomb()[:40])
                file.truncate(2 << 30)
            assert "too_large" in daemon.wait_for("image.rejected")["reason"]
            picture("green", 1001).save(colours / "Images" / "a.png")
            daemon.wait_for("image.filed")

    def test_an_image_over_a_limit_is_filed_once_the_limit_is_raised(self, colours: Path, write_config: Write) -> None:
        """It went to Rejected/ for its pixels; the next start, with a higher limit, tries it there."""
        picture("green", 1001, (100, 100)).save(colours / "Images" / "a.png")
        with running(write_config(decoding="{max_pixels: 5000}")) as daemon:
            assert "over the limit of 5,000; see decoding.max_pixels" in daemon.wait_for("image.rejected")["reason"]
            assert daemon.stop() == 0
        with running(write_config(decoding="{max_pixels: 10_000}")) as daemon:
            daemon.wait_for("image.filed")
            assert daemon.stop() == 0
        assert list(tree(colours / "Dataset")) == ["green/a.png"]
        assert not tree(colours / "Rejected")

    def test_hostile_images_harm_nobody(self, colours: Path, write_config: Write) -> None:
        """Hundreds of damaged images: each filed, set aside or left, the sound ones filed."""
        inbox = colours / "Images"
        (inbox / "hostile").mkdir()
        write_hostile_files(inbox / "hostile")
        for number in range(20):
            picture("green", 1001 + number).save(inbox / f"sound {number}.png")
        files = sum(1 for path in inbox.rglob("*") if path.is_file())
        hidden = sum(1 for path in inbox.rglob(".*") if path.is_file())
        names = {"image.filed", "image.rejected", "image.left"}
        with running(write_config(decoding="{timeout_seconds: 5, max_pixels: 50_000_000}")) as daemon:
            daemon.wait_until(
                lambda: sum(line["event"] in names for line in daemon.lines) >= files - hidden,
                "an outcome for each",
                seconds=240,
            )
            assert daemon.stop() == 0
        reasons = [name for name in tree(colours / "Rejected") if name.endswith(".reason.json")]
        rejected = [name for name in tree(colours / "Rejected") if not name.endswith(".reason.json")]
        assert len(reasons) == len(rejected) == len(daemon.events("image.rejected"))
        assert {f"sound {number}.png" for number in range(20)} <= set(tree(colours / "Dataset" / "green"))
