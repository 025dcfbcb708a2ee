"""Decoding: what comes out is what the encoder would have been shown, and what cannot be is refused by name."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from sortd.decoding.formats import HEAD_BYTES, format_of
from sortd.errors import ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.images import Limits, Pixels, decode, decode_file, look_at_file, looks_like_image
from sortd.messages import Fit, Preprocessing

SMALL = Preprocessing(32, 32, 32)
LIMITS = Limits()
ORIENTATION = 0x0112
LOSSLESS = ("PNG", "BMP", "TIFF", "WEBP")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", *(("AVIF",) if features.check("avif") else ()))


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Draw smooth colours with some noise, so that no two corners are alike."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    values = np.stack([red, green, 255 - (red + green) / 2], axis=-1) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Encode an image; losslessly where the format can."""
    target = io.BytesIO()
    image.save(target, image_format, **({"lossless": True} if image_format == "WEBP" else {}), **options)
    return target.getvalue()


def decoded(content: bytes, preprocessing: Preprocessing = SMALL, limits: Limits = LIMITS, **how: object) -> Pixels:
    """Decode bytes as a file."""
    with memory_file(content) as file:
        return decode(file, preprocessing, limits, **how)  # type: ignore[arg-type]  # jpeg=


def memory_file(content: bytes) -> io.BufferedRandom:
    """Return an open file without a name."""
    file = os.fdopen(os.memfd_create("image", os.MFD_CLOEXEC), "w+b")
    file.write(content)
    file.flush()
    return file


def near(first: Pixels, second: Pixels, most: float) -> bool:
    """Tell whether two images differ by no more than that on the average."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean()) <= most


def expected(image: Image.Image, edge: int = 32) -> Pixels:
    """Resize and crop with whole numbers, apart from the code under test."""
    width, height = image.size
    scaled = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    resized = image.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - edge) // 2, (scaled[1] - edge) // 2
    return np.asarray(resized.crop((left, top, left + edge, top + edge)))


class TestFormats:
    """What is decoded, and what is left alone."""

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_every_format_decodes_by_its_content(self, image_format: str) -> None:
        """The bytes alone say what they are; no name is ever asked."""
        image = picture()
        pixels = decoded(encode(image, image_format))
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags["C_CONTIGUOUS"]
        assert near(pixels, expected(image), 0 if image_format in LOSSLESS else 12)

    @pytest.mark.parametrize("image_format", ["EPS", "PPM", "ICO", "TGA", "PCX", "PDF", "JPEG2000", "SGI", "MSP"])
    def test_other_formats_never_reach_a_decoder(self, image_format: str) -> None:
        """An EPS named holiday.jpg would start Ghostscript; off the list means refused."""
        image = picture().convert("1" if image_format == "MSP" else "RGB")
        with pytest.raises(UnreadableError, match="no image that sortd reads"):
            decoded(encode(image, image_format))

    def test_a_descriptor_and_a_file_give_the_same(self) -> None:
        """Both are read from their beginning, and left open."""
        with memory_file(encode(picture(), "PNG")) as file:
            file.seek(7)
            first = decode(file, SMALL, LIMITS)
            assert np.array_equal(first, decode(file.fileno(), SMALL, LIMITS))
            assert not file.closed

    def test_heic_without_its_decoder_stays_and_says_what_to_install(self) -> None:
        """A telephone's photos are not thrown among the broken ones for want of an extra."""
        head = struct.pack(">I4s4sI8s", 24, b"ftyp", b"heic", 0, b"mif1heic")
        try:
            import pillow_heif  # noqa: F401
        except ImportError:
            with pytest.raises(NotAnImageError, match=r"sortd-images\[heic\]"):
                decoded(head + bytes(100))
        else:
            with pytest.raises(UnreadableError):
                decoded(head + bytes(100))

    @pytest.mark.parametrize(
        ("name", "head", "is_image"),
        [
            ("a.jpg", b"", True),
            ("A.JPEG", b"not at all", True),
            ("a.Tiff", b"", True),
            ("a.HEIC", b"", True),
            ("camera", b"\xff\xd8\xff\xe0", True),
            ("scan.dat", b"\x89PNG\r\n\x1a\n", True),
            ("a.txt", b"hello", False),
            ("BMW.txt", b"BMW builds cars, and this is a text about them.", False),
            ("a.pdf", b"%PDF-1.7", False),
            ("film.mp4", b"\0\0\0\x18ftypisom\0\0\0\0isommp42", False),
            ("film.mov", b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", False),
            ("live.avif", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", True),
            ("sound.wav", b"RIFF\0\0\0\0WAVEfmt ", False),
            ("raw.NEF", b"MM\0*\0\0\0\x08", False),
            ("raw.cr2", b"II*\0\x10\0\0\0CR", False),
            ("a.psd", b"8BPS", False),
            ("jpg", b"", False),
            ("name\udce9.jpg", b"", True),
        ],
    )
    def test_what_looks_like_an_image(self, name: str, head: bytes, *, is_image: bool) -> None:
        """By name in any case or by content; a raw file is TIFF by content and still none."""
        assert looks_like_image(name, head) is is_image

    @pytest.mark.parametrize(("brands", "name"), [(b"mif1avif", "AVIF"), (b"mif1heic", "HEIF"), (b"msf1miaf", "HEIF")])
    def test_a_vague_brand_leaves_it_to_the_next(self, brands: bytes, name: str) -> None:
        """``mif1`` alone says still image, not which codec."""
        head = struct.pack(">I4s4sI", 16 + len(brands), b"ftyp", brands[:4], 0) + brands
        found = format_of(head)
        assert found is not None
        assert found.name == name

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_a_head_is_enough(self, image_format: str) -> None:
        """The bytes that are read first tell every format."""
        found = format_of(encode(picture(), image_format)[:HEAD_BYTES])
        assert found is not None
        assert found.name == image_format


class TestModes:
    """Every mode becomes RGB as a viewer would show it."""

    @pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "LA", "RGBA"])
    def test_no_mode_is_too_strange(self, mode: str) -> None:
        """Palette, grey, wide, inked, transparent: an image comes out, and it shows what went in."""
        source = picture()
        grey = np.asarray(source.convert("L"))
        match mode:
            case "I;16" | "I;16B":
                wide = grey.astype(np.uint16) * 257
                image = Image.fromarray(wide if mode == "I;16" else wide.astype(">u2"))
            case "I":
                image = Image.fromarray(grey.astype(np.int32) * 257)
            case "F":
                image = Image.fromarray(grey.astype(np.float32) / 255)
            case _:
                image = source.convert(mode)
        shown = source if mode in {"RGB", "P", "CMYK", "YCbCr", "RGBA"} else source.convert("L")
        most = {"1": 130, "P": 25, "YCbCr": 3, "CMYK": 3}.get(mode, 1)
        assert near(decoded(encode(image, "TIFF" if mode not in {"P", "1"} else "PNG")), expected(shown), most)

    def test_sixteen_bits_are_scaled_and_not_cut(self) -> None:
        """Grey 32768 of 65535 is middle grey; Pillow's own conversion has shown it white."""
        image = Image.fromarray(np.full((40, 40), 32768, np.uint16))
        for image_format in ("PNG", "TIFF"):
            assert set(np.unique(decoded(encode(image, image_format)))) == {128}

    def test_wide_integers_are_stretched_where_no_range_is_usual(self) -> None:
        """Values beyond 16 bits span black to white."""
        ramp = np.tile(np.linspace(0, 10_000_000, 64).astype(np.int32), (64, 1))
        pixels = decoded(encode(Image.fromarray(ramp), "TIFF"))
        assert pixels.min() < 10
        assert pixels.max() > 245

    def test_values_that_are_no_numbers_do_not_hide_the_image(self) -> None:
        """A float image with a hole in it is shown with a dark hole."""
        values = np.full((64, 64), 0.75, np.float32)
        values[:8, :8] = np.nan
        assert np.median(decoded(encode(Image.fromarray(values), "TIFF"))) == 191

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "L", "1"])
    def test_what_is_transparent_shows_white(self, mode: str) -> None:
        """An alpha channel, a palette's or a colour's transparency: none of it turns black."""
        image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        options: dict[str, object] = {}
        match mode:
            case "RGBA" | "LA" | "PA":
                image = image.convert(mode)
            case "P":
                image = Image.new("P", (40, 40), 0)
                options = {"transparency": 0}
            case "RGB":
                image = Image.new("RGB", (40, 40), (1, 2, 3))
                options = {"transparency": (1, 2, 3)}
            case "L" | "1":
                image = Image.new(mode, (40, 40), 0)
                options = {"transparency": 0}
        saved = "TIFF" if mode == "PA" else "PNG"
        if mode == "PA":
            image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        assert decoded(encode(image, saved, **options)).min() == 255

    def test_half_transparent_is_half_white(self) -> None:
        """Alpha is mixed, not cut at a threshold."""
        pixels = decoded(encode(Image.new("RGBA", (40, 40), (0, 0, 0, 128)), "PNG"))
        assert set(np.unique(pixels)) <= {126, 127, 128}

    def test_both_kinds_of_cmyk_jpeg_show_their_colours(self) -> None:
        """Adobe's are inverted and say so by a marker; without it the inks mean what they say."""
        red = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
        adobe = encode(red, "JPEG", quality=95)
        assert b"Adobe" in adobe
        assert near(decoded(adobe), np.full((32, 32, 3), (255, 0, 0), np.uint8), 6)
        upside_down = encode(Image.new("CMYK", (64, 64), (255, 0, 0, 255)), "JPEG", quality=95)
        at = upside_down.index(b"\xff\xee")
        length = int.from_bytes(upside_down[at + 2 : at + 4], "big")
        plain = upside_down[:at] + upside_down[at + 2 + length :]
        assert near(decoded(plain), np.full((32, 32, 3), (255, 0, 0), np.uint8), 6)

    @pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_only_the_first_frame_counts(self, image_format: str) -> None:
        """An animation is the picture that it begins with."""
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
        content = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert near(decoded(content), np.full((32, 32, 3), (255, 0, 0), np.uint8), 3)


class TestUpright:
    """EXIF says which side is up."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_all_eight_orientations_come_out_upright(self, orientation: int, image_format: str) -> None:
        """Stored turned and tagged so, an image decodes as it was before."""
        turns = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        upright = picture(96, 64)
        stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        content = encode(stored, image_format, exif=exif)
        assert near(decoded(content), expected(upright), 0 if image_format in LOSSLESS else 4)

    @pytest.mark.parametrize("value", [0, 9, 65535])
    def test_an_orientation_that_does_not_exist_turns_nothing(self, value: int) -> None:
        """What EXIF says beyond its eight values is nothing."""
        exif = Image.Exif()
        exif[ORIENTATION] = value
        assert near(decoded(encode(picture(), "PNG", exif=exif)), expected(picture()), 0)

    def test_broken_exif_does_not_cost_the_image(self) -> None:
        """A picture with garbage for EXIF is still a picture."""
        content = encode(picture(), "JPEG", exif=b"Exif\0\0" + bytes(range(200)))
        assert near(decoded(content), expected(picture()), 4)

    def test_a_large_image_that_lies_is_turned_in_little_memory(self) -> None:
        """Large images are made smaller on the way, and show the same."""
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        upright = picture(42, 40).resize((4200, 4000))
        content = encode(upright.transpose(Image.Transpose.ROTATE_90), "BMP")
        turned = encode(upright.transpose(Image.Transpose.ROTATE_90), "TIFF", exif=exif)
        assert near(decoded(turned), expected(upright), 3)
        assert not near(decoded(content), expected(upright), 20)


class TestSize:
    """What the encoder sees is what transformers would have shown it."""

    @pytest.mark.parametrize("seed", range(12))
    def test_decoded_in_full_it_is_bit_for_bit_what_transformers_makes(self, seed: int) -> None:
        """Odd sizes, tall and wide, grey and colour: no pixel differs from CLIP's image processor."""
        transformers = pytest.importorskip("transformers")
        random = np.random.default_rng(seed)
        width, height = (int(side) for side in random.integers(33, 700, 2))
        edge, crop = [(224, 224), (64, 64), (96, 80)][seed % 3]
        # From transformers 5 on the plain name is the one that works by torchvision.
        by_pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        processor = by_pillow(
            size={"shortest_edge": edge},
            crop_size={"height": crop, "width": crop},
            do_normalize=False,
            do_rescale=False,
        )
        image = picture(width, height, seed)
        if seed % 4 == 3:
            image = image.convert("L")
        content = encode(image, "JPEG" if seed % 2 else "PNG")
        stored = Image.open(io.BytesIO(content))
        wanted = np.asarray(processor(stored, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        ours = decoded(content, Preprocessing(edge, crop, crop), jpeg="full")
        assert np.array_equal(ours, wanted.astype(np.uint8))

    @pytest.mark.parametrize("side", [40, 64, 129, 500, 1023])
    def test_draft_never_goes_below_twice_the_size(self, side: int) -> None:
        """A drafted JPEG looks like the full one at the encoder's size."""
        content = encode(picture(side, side + 30), "JPEG", quality=92)
        assert near(decoded(content, jpeg="draft"), decoded(content, jpeg="full"), 2.5)

    def test_draft_is_used_where_it_is_ample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a large JPEG an eighth is decoded, of a small one everything."""
        sizes: list[tuple[int, int]] = []
        load = ImageFile.ImageFile.load

        def noting(image: ImageFile.ImageFile) -> object:
            sizes.append(image.size)
            return load(image)

        monkeypatch.setattr(ImageFile.ImageFile, "load", noting)
        decoded(encode(picture(1024, 768), "JPEG"))
        assert set(sizes) == {(128, 96)}

    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (5000, 3), (3, 39_000)])
    def test_any_shape_comes_to_the_shape_of_the_encoder(self, size: tuple[int, int]) -> None:
        """A single pixel and a very long strip are images, too, and no reason to take gigabytes."""
        assert decoded(encode(picture(*size), "PNG")).shape == (32, 32, 3)

    def test_a_long_strip_shows_its_middle(self) -> None:
        """What is resized in part only is the same part."""
        pixels = np.zeros((10, 900, 3), np.uint8)
        pixels[:, 445:455] = 255
        assert decoded(encode(Image.fromarray(pixels), "PNG"))[:, 8:24].min() > 200

    def test_stretching_takes_the_whole_image(self) -> None:
        """Encoders that do not crop see all of it, whatever its proportions."""
        preprocessing = Preprocessing(24, 24, 48, fit=Fit.STRETCH)
        image = picture(100, 300)
        wanted = np.asarray(image.resize((48, 24), Image.Resampling.BICUBIC))
        assert np.array_equal(decoded(encode(image, "PNG"), preprocessing), wanted)

    def test_the_filter_is_the_one_asked_for(self) -> None:
        """Bilinear and bicubic differ, and each is what Pillow makes."""
        image = picture(99, 99)
        bilinear = decoded(encode(image, "PNG"), Preprocessing(32, 32, 32, resample=Image.Resampling.BILINEAR))
        assert np.array_equal(bilinear, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))


def png_bomb(width: int, height: int) -> bytes:
    """Write a PNG of that size, black, one bit a pixel, in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class TestLimits:
    """Nothing is unpacked to find out that it is too much."""

    def test_too_many_pixels_are_refused_before_they_are_decoded(self) -> None:
        """A few kilobytes that unpack to 178 million pixels are told by their header."""
        with pytest.raises(TooLargeError, match="max_pixels"):
            decoded(png_bomb(13_000, 13_700))

    @pytest.mark.parametrize("pixels", [51_000_000, 99_000_000])
    def test_between_our_limit_and_pillows_it_is_refused_as_well(self, pixels: int) -> None:
        """Pillow only warns there."""
        with pytest.raises(TooLargeError):
            decoded(png_bomb(10_000, pixels // 10_000))

    def test_a_side_that_is_too_long_is_refused(self) -> None:
        """Few pixels in one endless row end in gigabytes at the resize."""
        with pytest.raises(TooLargeError, match="a side"):
            decoded(png_bomb(45_000, 1))

    def test_too_many_bytes_are_refused(self) -> None:
        """A file that is too large is not even opened by a decoder."""
        with pytest.raises(TooLargeError, match="bytes"):
            decoded(encode(picture(), "BMP"), limits=Limits(max_bytes=1000))

    def test_a_telephones_hundred_megapixels_pass_where_draft_makes_few_of_them(self) -> None:
        """The limit is on what is decoded: a JPEG of 108 million pixels takes as little as one of 2."""
        content = encode(Image.new("L", (12_000, 9_000), 90), "JPEG")
        assert near(decoded(content), np.full((32, 32, 3), 90, np.uint8), 1)
        with pytest.raises(TooLargeError):
            decoded(content, jpeg="full")

    def test_pillows_own_settings_come_back(self) -> None:
        """The limits are in force while an image is decoded, and nowhere else."""
        before = Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            with pytest.raises(UnreadableError):
                decoded(encode(picture(), "PNG")[:-200])
            assert before == Image.MAX_IMAGE_PIXELS
            assert ImageFile.LOAD_TRUNCATED_IMAGES is True
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    def test_memory_that_is_not_to_be_had_is_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image that the process has no room for is too large, not broken."""

        def starve(*_args: object, **_options: object) -> None:
            raise MemoryError

        monkeypatch.setattr(ImageFile.ImageFile, "load", starve)
        with pytest.raises(TooLargeError, match="memory"):
            decoded(encode(picture(), "PNG"))

    def test_a_disk_that_fails_is_not_a_broken_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """EIO says nothing of the image: it must not be set aside for it."""

        def fail(*_args: object, **_options: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(OSError, match="Input/output") as caught:
            decoded(encode(picture(), "PNG"))
        assert not isinstance(caught.value, ImageError)


class TestBroken:
    """What is not whole is refused, not shown in part."""

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_truncated_anywhere_it_is_refused(self, image_format: str) -> None:
        """Cut at any of twenty places, no format comes out as an image."""
        content = encode(picture(200, 150), image_format, **({"quality": 90} if image_format == "JPEG" else {}))
        for cut in np.linspace(0, len(content) * 0.97, 20).astype(int):
            with pytest.raises(UnreadableError):
                decoded(content[:cut])

    @pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "PNG", "GIF"])
    def test_laid_out_in_full_and_filled_in_part_it_is_refused(self, image_format: str) -> None:
        """A download that was given its full length first is half zeros; libjpeg would paint them grey."""
        content = encode(picture(300, 300), image_format)
        for filled in (0.3, 0.6, 0.9):
            cut = int(len(content) * filled)
            with pytest.raises(UnreadableError):
                decoded(content[:cut] + bytes(len(content) - cut))

    def test_zeros_after_the_end_of_a_jpeg_are_padding(self) -> None:
        """Some cameras fill the last block of their card."""
        content = encode(picture(), "JPEG")
        assert near(decoded(content + bytes(5000)), decoded(content), 0)

    def test_random_damage_never_escapes_as_another_error(self) -> None:
        """Whatever Pillow raises over bytes that were hit by chance, it is an error of that image."""
        random = np.random.default_rng(5)
        for image_format in FORMATS:
            content = encode(picture(), image_format)
            for _ in range(60):
                damaged = bytearray(content)
                for place in random.integers(8, len(content), 6):
                    damaged[place] = random.integers(256)
                with contextlib.suppress(ImageError):
                    decoded(bytes(damaged), limits=Limits(max_pixels=4_000_000))

    @pytest.mark.parametrize("content", [b"", b"\xff", b"hello, this is no image", bytes(1000), b"\xff\xd8\xff" * 50])
    def test_what_is_no_image_is_refused(self, content: bytes) -> None:
        """Nothing, text, zeros, and a beginning without an end."""
        with pytest.raises(UnreadableError):
            decoded(content)


class TestFiles:
    """Images by their path, for the checks."""

    def test_a_file_is_decoded_and_its_header_looked_at(self, tmp_path: Path) -> None:
        """The header of a truncated file is fine; its pixels are not."""
        path = tmp_path / "a.png"
        content = encode(picture(), "PNG")
        path.write_bytes(content)
        assert near(decode_file(os.fspath(path), SMALL, LIMITS), expected(picture()), 0)
        path.write_bytes(content[:-300])
        look_at_file(os.fspath(path), LIMITS)
        with pytest.raises(UnreadableError):
            decode_file(os.fspath(path), SMALL, LIMITS)

    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
    def test_pipes_and_links_are_no_images(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        """Opening neither waits nor follows."""
        path = tmp_path / "trap.jpg"
        make(path)
        with pytest.raises(ImageError):
            decode_file(os.fspath(path), SMALL, LIMITS)

    def test_a_file_that_is_gone_is_an_error_of_the_disk(self, tmp_path: Path) -> None:
        """The caller hears which."""
        with pytest.raises(FileNotFoundError):
            look_at_file(os.fspath(tmp_path / "gone.jpg"), LIMITS)


def test_pillow_agrees_on_which_side_is_up() -> None:
    """The table of turns is the one that Pillow has, for every orientation."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        content = encode(picture(60, 40), "PNG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.array_equal(decoded(content), expected(upright))
