"""Decoding: the pixels are those of the encoder's image processor, and other files are refused with a reason."""

import contextlib
import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageFile, ImageOps

from sortd.arrays import Pixels
from sortd.errors import ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.events import Fit, Preprocessing
from sortd.images.decode import DecodeLimits, check_header, decode_file, decode_image
from sortd.images.formats import HEAD_BYTES, format_of, looks_like_image

SMALL = Preprocessing(32, 32, 32)
WHOLE = Preprocessing(64, 64, 64, fit=Fit.WHOLE)
LIMITS = DecodeLimits()
ORIENTATION = 0x0112
LOSSLESS = ("PNG", "BMP", "TIFF", "WEBP")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF", "HEIF")
pillow_heif.register_heif_opener()


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


def decoded(
    content: bytes, preprocessing: Preprocessing = SMALL, limits: DecodeLimits = LIMITS, **how: object
) -> Pixels:
    """Decode bytes as a file."""
    with memory_file(content) as file:
        return decode_image(file, preprocessing, limits, **how)  # type: ignore[arg-type]  # jpeg=


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
    """Formats that are decoded, and others."""

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_decode_every_format_by_content(self, image_format: str) -> None:
        """No name is needed."""
        image = picture()
        pixels = decoded(encode(image, image_format))
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags["C_CONTIGUOUS"]
        assert near(pixels, expected(image), 0 if image_format in LOSSLESS else 12)

    @pytest.mark.parametrize("image_format", ["EPS", "PPM", "ICO", "TGA", "PCX", "PDF", "JPEG2000", "SGI", "MSP"])
    def test_decode_other_formats_are_refused(self, image_format: str) -> None:
        """An EPS named holiday.jpg would start Ghostscript."""
        image = picture().convert("1" if image_format == "MSP" else "RGB")
        with pytest.raises(UnreadableError, match="not an image in a supported format"):
            decoded(encode(image, image_format))

    def test_decode_descriptor_gives_the_pixels_of_the_file(self) -> None:
        """Both are read from their beginning and left open."""
        with memory_file(encode(picture(), "PNG")) as file:
            file.seek(7)
            first = decode_image(file, SMALL, LIMITS)
            assert np.array_equal(first, decode_image(file.fileno(), SMALL, LIMITS))
            assert not file.closed

    def test_decode_heic_without_its_decoder_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A telephone's photos are not set aside as broken where the installation is."""
        monkeypatch.setitem(sys.modules, "pillow_heif", None)  # imports of it fail from now on
        with pytest.raises(NotAnImageError, match="pip install pillow-heif"):
            decoded(encode(picture(), "HEIF"))

    def test_decode_heic_of_several_images_shows_the_primary_one(self) -> None:
        """A burst is the picture that its file calls the primary one, wherever it stands among the others."""
        several = pillow_heif.HeifFile()
        for colour in ("red", "green", "blue"):
            several.add_from_pillow(Image.new("RGB", (64, 64), colour))
        target = io.BytesIO()
        several.save(target, primary_index=1, quality=90)
        assert near(decoded(target.getvalue()), np.full((32, 32, 3), (0, 128, 0), np.uint8), 6)

    @pytest.mark.parametrize("options", [{"tile_size": 256}, {"chroma": 444}, {"quality": -1}])
    def test_decode_heic_kinds_show_their_picture(self, options: dict[str, object]) -> None:
        """Tiles, as an iPhone writes them, full chroma and lossless."""
        assert near(decoded(encode(picture(600, 400), "HEIF", **options)), expected(picture(600, 400)), 6)

    @pytest.mark.parametrize("image_format", ["AVIF", "HEIF"])
    def test_decode_transparent_shows_white(self, image_format: str) -> None:
        """An alpha channel of its own is laid over white as any other."""
        assert decoded(encode(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), image_format)).min() > 250

    @pytest.mark.parametrize(
        ("name", "head", "is_image"),
        [
            ("a.jpg", b"", True),
            ("A.JPEG", b"not at all", True),
            ("a.Tiff", b"", True),
            ("a.HEIC", b"", True),
            ("a.HIF", b"", True),
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
    def test_looks_like_image_by_name_or_content(self, name: str, head: bytes, *, is_image: bool) -> None:
        """Raw files of cameras are TIFF by content and still not images."""
        assert looks_like_image(name, head) is is_image

    @pytest.mark.parametrize(("brands", "name"), [(b"mif1avif", "AVIF"), (b"mif1heic", "HEIF"), (b"msf1miaf", "HEIF")])
    def test_format_of_generic_brand_is_that_of_the_next(self, brands: bytes, name: str) -> None:
        """``mif1`` says still image, but not which codec."""
        head = struct.pack(">I4s4sI", 16 + len(brands), b"ftyp", brands[:4], 0) + brands
        found = format_of(head)
        assert found is not None
        assert found.name == name

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_format_of_head_recognises_every_format(self, image_format: str) -> None:
        """``HEAD_BYTES`` are enough."""
        found = format_of(encode(picture(), image_format)[:HEAD_BYTES])
        assert found is not None
        assert found.name == image_format


class TestModes:
    """Every mode becomes RGB as a viewer would show it."""

    @pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "LA", "RGBA"])
    def test_decode_every_mode_gives_rgb(self, mode: str) -> None:
        """Palette, grey, wide, inked, transparent."""
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

    def test_decode_sixteen_bits_scales_them(self) -> None:
        """32768 of 65535 is middle grey; Pillow's own conversion gives white."""
        image = Image.fromarray(np.full((40, 40), 32768, np.uint16))
        for image_format in ("PNG", "TIFF"):
            assert set(np.unique(decoded(encode(image, image_format)))) == {128}

    def test_decode_wide_integers_are_stretched(self) -> None:
        """Values beyond 16 bits span black to white."""
        ramp = np.tile(np.linspace(0, 10_000_000, 64).astype(np.int32), (64, 1))
        pixels = decoded(encode(Image.fromarray(ramp), "TIFF"))
        assert pixels.min() < 10
        assert pixels.max() > 245

    def test_decode_nan_values_are_dark(self) -> None:
        """The other values of a float image are shown."""
        values = np.full((64, 64), 0.75, np.float32)
        values[:8, :8] = np.nan
        assert np.median(decoded(encode(Image.fromarray(values), "TIFF"))) == 191

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "L", "1"])
    def test_decode_transparency_shows_white(self, mode: str) -> None:
        """An alpha channel, a palette's or a colour's transparency."""
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

    def test_decode_half_transparent_is_blended(self) -> None:
        """Alpha is blended, without a threshold."""
        pixels = decoded(encode(Image.new("RGBA", (40, 40), (0, 0, 0, 128)), "PNG"))
        assert set(np.unique(pixels)) <= {126, 127, 128}

    def test_decode_cmyk_jpeg_with_and_without_adobe_marker_shows_its_colours(self) -> None:
        """Adobe's are inverted and marked; others are not inverted."""
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
    def test_decode_animation_gives_the_first_frame(self, image_format: str) -> None:
        """The others are ignored."""
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
        content = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert near(decoded(content), np.full((32, 32, 3), (255, 0, 0), np.uint8), 3)


class TestUpright:
    """EXIF says which side is up."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
    def test_decode_orientation_gives_an_upright_image(self, orientation: int, image_format: str) -> None:
        """All eight orientations of EXIF, in every format."""
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
        content = encode(stored, image_format, exif=exif.tobytes())
        assert near(decoded(content), expected(upright), 0 if image_format in LOSSLESS else 6)

    @pytest.mark.parametrize("value", [0, 9, 65535])
    def test_decode_invalid_orientation_is_ignored(self, value: int) -> None:
        """EXIF has eight values."""
        exif = Image.Exif()
        exif[ORIENTATION] = value
        assert near(decoded(encode(picture(), "PNG", exif=exif)), expected(picture()), 0)

    def test_decode_broken_exif_is_ignored(self) -> None:
        """The image is decoded without it."""
        content = encode(picture(), "JPEG", exif=b"Exif\0\0" + bytes(range(200)))
        assert near(decoded(content), expected(picture()), 4)

    def test_decode_large_rotated_image_is_reduced(self) -> None:
        """Large images are reduced before the rotation and show the same."""
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
    def test_decode_full_equals_transformers_bit_for_bit(self, seed: int) -> None:
        """Odd sizes, tall and wide, grey and colour: as from CLIP's image processor."""
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
    def test_decode_draft_keeps_at_least_twice_the_size(self, side: int) -> None:
        """A JPEG in draft mode looks like the full one at the encoder's size."""
        content = encode(picture(side, side + 30), "JPEG", quality=92)
        assert near(decoded(content, jpeg="draft"), decoded(content, jpeg="full"), 2.5)

    def test_decode_draft_is_used_for_large_jpegs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large JPEG is decoded at 1/8, a small one at full scale."""
        sizes: list[tuple[int, int]] = []
        load = ImageFile.ImageFile.load

        def noting(image: ImageFile.ImageFile) -> object:
            sizes.append(image.size)
            return load(image)

        monkeypatch.setattr(ImageFile.ImageFile, "load", noting)
        decoded(encode(picture(1024, 768), "JPEG"))
        assert set(sizes) == {(128, 96)}

    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (5000, 3), (3, 39_000)])
    def test_decode_any_shape_gives_the_encoders_shape(self, size: tuple[int, int]) -> None:
        """Also a single pixel and a very long strip, in little memory."""
        assert decoded(encode(picture(*size), "PNG")).shape == (32, 32, 3)

    def test_decode_long_strip_shows_its_middle(self) -> None:
        """The part that is resized is the right one."""
        pixels = np.zeros((10, 900, 3), np.uint8)
        pixels[:, 445:455] = 255
        assert decoded(encode(Image.fromarray(pixels), "PNG"))[:, 8:24].min() > 200

    def test_decode_stretch_uses_the_whole_image(self) -> None:
        """For encoders that do not crop."""
        preprocessing = Preprocessing(24, 24, 48, fit=Fit.STRETCH)
        image = picture(100, 300)
        wanted = np.asarray(image.resize((48, 24), Image.Resampling.BICUBIC))
        assert np.array_equal(decoded(encode(image, "PNG"), preprocessing), wanted)

    @pytest.mark.parametrize(("size", "wanted"), [
        ((300, 100), (64, 21)), ((100, 300), (21, 64)), ((64, 64), (64, 64)), ((9, 7), (9, 7)), ((1, 1), (1, 1)),
        ((40_000, 1), (64, 1)), ((1, 40_000), (1, 64)), ((4001, 3000), (64, 48)),
    ])  # fmt: skip
    @pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
    def test_decode_whole_keeps_the_shape_and_enlarges_nothing(
        self, size: tuple[int, int], wanted: tuple[int, int], image_format: str
    ) -> None:
        """No side is more than the limit or less than a pixel."""
        pixels = decoded(encode(Image.new("RGB", size, "red"), image_format), WHOLE)
        assert pixels.shape == (wanted[1], wanted[0], 3)
        assert pixels[..., 0].min() > 250

    def test_decode_whole_turns_and_reduces_at_once(self) -> None:
        """A large photo that lies on its side stands upright, and its corners are where they belong."""
        drawn = Image.new("RGB", (6000, 3000), "red")
        drawn.paste((0, 0, 255), (0, 0, 1500, 1500))
        exif = Image.Exif()
        exif[0x0112] = 6
        for image_format in ("JPEG", "PNG"):
            pixels = decoded(encode(drawn, image_format, exif=exif), WHOLE)
            assert pixels.shape == (64, 32, 3)
            assert pixels[2, 29, 2] > 200
            assert pixels[2, 2, 2] < 50

    def test_decode_whole_jpeg_panorama_within_the_limit_at_its_scale(self) -> None:
        """The longer side decides at which scale a JPEG is decoded."""
        panorama = encode(Image.new("L", (12_000, 200), "white"), "JPEG")
        assert decoded(panorama, WHOLE, DecodeLimits(max_pixels=100_000)).shape == (1, 64, 3)

    def test_decode_uses_the_configured_filter(self) -> None:
        """Bilinear and bicubic give the pixels of Pillow."""
        image = picture(99, 99)
        bilinear = decoded(encode(image, "PNG"), Preprocessing(32, 32, 32, resample=Image.Resampling.BILINEAR))
        assert np.array_equal(bilinear, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """Write a PNG of that size, black, one bit a pixel, in a few kilobytes."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


class TestLimits:
    """Nothing is unpacked to find out that it is too much."""

    def test_decode_too_many_pixels_is_refused(self) -> None:
        """178 million pixels in a few kilobytes are detected in the header."""
        with pytest.raises(TooLargeError, match="max_pixels"):
            decoded(png_bomb(13_000, 13_700))

    @pytest.mark.parametrize("pixels", [51_000_000, 99_000_000])
    def test_decode_over_the_limit_but_below_pillows_is_refused(self, pixels: int) -> None:
        """Pillow alone would only warn."""
        with pytest.raises(TooLargeError):
            decoded(png_bomb(10_000, pixels // 10_000))

    def test_decode_too_long_side_is_refused(self) -> None:
        """One endless row would take gigabytes in the resize."""
        with pytest.raises(TooLargeError, match="a side"):
            decoded(png_bomb(45_000, 1))

    def test_decode_too_many_bytes_is_refused(self) -> None:
        """Its decoder is not called."""
        with pytest.raises(TooLargeError, match="bytes"):
            decoded(encode(picture(), "BMP"), limits=DecodeLimits(max_bytes=1000))

    def test_decode_jpeg_of_hundred_megapixels_passes_in_draft_mode(self) -> None:
        """The limit applies to the decoded scale."""
        content = encode(Image.new("L", (12_000, 9_000), 90), "JPEG")
        assert near(decoded(content), np.full((32, 32, 3), 90, np.uint8), 1)
        with pytest.raises(TooLargeError):
            decoded(content, jpeg="full")

    def test_decode_restores_the_settings_of_pillow(self) -> None:
        """The limits apply only during a decoding."""
        before = Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            with pytest.raises(UnreadableError):
                decoded(encode(picture(), "PNG")[:-200])
            assert before == Image.MAX_IMAGE_PIXELS
            assert ImageFile.LOAD_TRUNCATED_IMAGES is True
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    def test_decode_out_of_memory_is_too_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The image is not refused as broken."""

        def starve(*_args: object, **_options: object) -> None:
            raise MemoryError

        monkeypatch.setattr(ImageFile.ImageFile, "load", starve)
        with pytest.raises(TooLargeError, match="memory"):
            decoded(encode(picture(), "PNG"))

    def test_decode_disk_error_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """EIO is not the fault of the image."""

        def fail(*_args: object, **_options: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(OSError, match="Input/output") as caught:
            decoded(encode(picture(), "PNG"))
        assert not isinstance(caught.value, ImageError)


class TestBroken:
    """Incomplete and broken files are refused."""

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_decode_truncated_file_is_refused(self, image_format: str) -> None:
        """Cut at any of twenty places, in every format."""
        content = encode(picture(200, 150), image_format, **({"quality": 90} if image_format == "JPEG" else {}))
        for cut in np.linspace(0, len(content) * 0.97, 20).astype(int):
            with pytest.raises(UnreadableError):
                decoded(content[:cut])

    @pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "PNG", "GIF", "AVIF", "HEIF"])
    def test_decode_file_filled_in_part_is_refused(self, image_format: str) -> None:
        """A download that reserves its full size first ends in zeros; libjpeg would paint them grey."""
        content = encode(picture(300, 300), image_format)
        for filled in (0.3, 0.6, 0.9):
            cut = int(len(content) * filled)
            with pytest.raises(UnreadableError):
                decoded(content[:cut] + bytes(len(content) - cut))

    def test_decode_jpeg_with_padding_ignores_it(self) -> None:
        """Some cameras fill the last block of their card with zeros."""
        content = encode(picture(), "JPEG")
        assert near(decoded(content + bytes(5000)), decoded(content), 0)

    def test_decode_tiles_missing_at_the_end_is_refused(self) -> None:
        """Libheif leaves out the tiles of a HEIC that are not there, and shows the others."""
        content = encode(picture(900, 600), "HEIF", tile_size=256)
        for kept in (0.5, 0.9, 0.99):
            with pytest.raises(UnreadableError, match="incomplete HEIC file"):
                decoded(content[: int(len(content) * kept)])
            with pytest.raises(UnreadableError, match="incomplete HEIC file"):
                decoded(content[: int(len(content) * kept)] + bytes(len(content) - int(len(content) * kept)))

    def test_decode_broken_heic_is_refused_as_broken(self) -> None:
        """The message does not say that a decoder is missing."""
        head = struct.pack(">I4s4sI8s", 24, b"ftyp", b"heic", 0, b"mif1heic")
        with pytest.raises(UnreadableError, match="broken or incomplete HEIC file"):
            decoded(head + bytes(100))

    def test_decode_random_damage_raises_image_errors(self) -> None:
        """Whatever Pillow raises becomes an ``ImageError``."""
        random = np.random.default_rng(5)
        for image_format in FORMATS:
            content = encode(picture(), image_format)
            for _ in range(60):
                damaged = bytearray(content)
                for place in random.integers(8, len(content), 6):
                    damaged[place] = random.integers(256)
                with contextlib.suppress(ImageError):
                    decoded(bytes(damaged), limits=DecodeLimits(max_pixels=4_000_000))

    @pytest.mark.parametrize("content", [b"", b"\xff", b"hello, this is no image", bytes(1000), b"\xff\xd8\xff" * 50])
    def test_decode_other_content_is_refused(self, content: bytes) -> None:
        """Nothing, text, zeros, and a beginning without an end."""
        with pytest.raises(UnreadableError):
            decoded(content)


class TestSound:
    """Oddities of a file that do not affect its picture are ignored."""

    TRAILERS = (
        b"more",
        bytes(5000),
        bytes(600) + b"SEFH" + bytes(600),
        b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(range(256)) * 40 + bytes(4000),
        b"\0\0\0\x10mpvd" + bytes(8),
        b"\xff\xd8\xff\xe0 a second image that was cut" + bytes(700),
    )
    """What telephones and programs append: text, padding, a maker's trailer, films, a second image."""

    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("trailer", TRAILERS, ids=["text", "zeros", "maker", "film", "box", "image"])
    def test_decode_with_a_trailer_ignores_it(self, image_format: str, trailer: bytes) -> None:
        """A motion photo is a JPEG or HEIC with a film behind its end; some of these end in zeros."""
        content = encode(picture(200, 150), image_format)
        assert near(decoded(content + trailer), decoded(content), 0)

    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF"])
    def test_decode_cut_before_a_trailer_of_zeros_is_refused(self, image_format: str) -> None:
        """An end marker inside of a thumbnail or a text is not the end of the picture."""
        with_preview = encode(picture(64, 64), "JPEG")
        options = {"exif": b"Exif\0\0" + with_preview} if image_format == "JPEG" else {"comment": b"; ;"}
        content = encode(picture(300, 200), image_format, **({} if image_format == "PNG" else options))
        with pytest.raises(UnreadableError, match=r"^incomplete"):
            decoded(content[: int(len(content) * 0.7)] + bytes(5000))

    @pytest.mark.parametrize("colour", ["black", "white", "red"])
    @pytest.mark.parametrize("quality", [20, 75, 100])
    def test_decode_webp_with_one_colour_below_is_no_hole(self, colour: str, quality: int) -> None:
        """A lossy WebP whose lower part is uniform ends in hundreds of zeros, and is whole."""
        image = Image.new("RGB", (1000, 1000), colour)
        image.paste(picture(1000, 500))
        target = io.BytesIO()
        image.save(target, "WEBP", quality=quality, method=0)
        assert near(decoded(target.getvalue()), expected(image), 6)

    @pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"eXIf", b"prVt"])
    def test_decode_png_with_a_wrong_checksum_drops_the_chunk(self, kind: bytes) -> None:
        """An ancillary chunk that is damaged is not the picture."""
        content = encode(picture(), "PNG")
        damaged = png_chunk(kind, b"Comment\0\0" + zlib.compress(b"x"))[:-4] + b"\0\0\0\0"
        assert near(decoded(content[:33] + damaged + content[33:]), expected(picture()), 0)

    @pytest.mark.parametrize("behind", [True, False])
    @pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt", b"iCCP"])
    def test_decode_png_with_a_long_text_drops_it(self, kind: bytes, *, behind: bool) -> None:
        """Programs write megabytes of settings beside a picture, before or behind it."""
        text = b"workflow\0" + {b"zTXt": b"\0", b"iTXt": b"\1\0\0\0", b"tEXt": b"", b"iCCP": b"\0"}[kind]
        unpacked = b"{settings}" * 700_000
        chunk = png_chunk(kind, text + (unpacked if kind == b"tEXt" else zlib.compress(unpacked)))
        content = encode(picture(), "PNG")
        at = -12 if behind else 33
        assert near(decoded(content[:at] + chunk + content[at:]), expected(picture()), 0)

    @pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
    def test_decode_png_with_a_wrong_checksum_of_the_picture_is_refused(self, kind: bytes) -> None:
        """What the picture is made of must be right."""
        content = bytearray(encode(picture().convert("P"), "PNG"))
        at = content.index(kind)
        content[at + 4 + int.from_bytes(content[at - 4 : at], "big")] ^= 0xFF
        with pytest.raises(UnreadableError, match="checksum"):
            decoded(bytes(content))

    def test_decode_png_turned_by_a_text_is_upright(self) -> None:
        """ImageMagick and Adobe write the orientation into texts."""
        upright = picture(96, 64)
        stored = upright.transpose(Image.Transpose.ROTATE_90)
        xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6"/>'
        content = encode(stored, "PNG")
        assert near(decoded(content[:33] + png_chunk(b"iTXt", xmp) + content[33:]), expected(upright), 0)

    def test_decode_float_with_infinite_values_shows_the_others(self) -> None:
        """A map of depths has places that are infinitely far away."""
        values = np.full((64, 64), 0.75, np.float32)
        values[:8, :8] = np.inf
        assert np.median(decoded(encode(Image.fromarray(values), "TIFF"))) == 191


class TestUnsupported:
    """Unsupported kinds are refused as unsupported, not as broken."""

    @staticmethod
    def tiff(*tags: tuple[int, int]) -> bytes:
        """Write a TIFF of 8 x 8 pixels, each 4 bytes in 3 channels, with these tags beside the usual ones."""
        usual = {256: 8, 257: 8, 258: 32, 259: 1, 262: 2, 273: 8, 277: 3, 278: 8, 279: 768} | dict(tags)
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(usual.items()))
        pixels = bytes(768)
        directory = struct.pack("<H", len(usual)) + entries + bytes(4)
        return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory

    @staticmethod
    def bmp(bits: int, compression: int) -> bytes:
        """Write a BMP of 8 x 8 pixels of that kind."""
        header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, bits, compression, 256, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54 + 256, 0, 0, 54) + header + bytes(256)

    @pytest.mark.parametrize(
        ("content", "title"),
        [
            (tiff((339, 3)), "TIFF"),
            (tiff((258, 64), (277, 1), (262, 1), (339, 3)), "TIFF"),
            (tiff((259, 34_887), (258, 8)), "TIFF"),
            (tiff((259, 65_000), (258, 8)), "TIFF"),
            (tiff((262, 32_803), (258, 16)), "TIFF"),
            (tiff((258, 8), (277, 12)), "TIFF"),
            (bmp(3, 0), "BMP"),
            (bmp(24, 4), "BMP"),
            (bmp(24, 9), "BMP"),
        ],
        ids=[
            "float RGB",
            "double",
            "LERC",
            "no such compression",
            "colour filter",
            "12 channels",
            "3 bits",
            "JPEG in BMP",
            "9",
        ],
    )
    def test_decode_a_kind_that_is_not_supported_says_so(self, content: bytes, title: str) -> None:
        """The reason names the kind, and what can be done."""
        with pytest.raises(UnreadableError, match=rf"unsupported kind of {title} \(.+\); save it"):
            decoded(content)

    def test_decode_a_twelve_bit_jpeg_says_that_it_is_not_supported(self) -> None:
        """Medical devices write them."""
        content = bytearray(encode(picture(), "JPEG"))
        content[content.index(b"\xff\xc0") + 4] = 12
        with pytest.raises(UnreadableError, match="unsupported kind of JPEG"):
            decoded(bytes(content))

    def test_decode_another_codec_in_heif_says_that_it_is_not_supported(self) -> None:
        """VVC, JPEG 2000 or uncompressed: the container is known, the codec is not."""
        content = encode(picture(), "HEIF").replace(b"hvc1", b"vvc1").replace(b"hvcC", b"vvcC")
        with pytest.raises(UnreadableError, match="unsupported kind of HEIC"):
            decoded(content)

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_decode_cut_is_not_called_unsupported(self, image_format: str) -> None:
        """A broken file is broken."""
        content = encode(picture(200, 150), image_format)
        for cut in np.linspace(40, len(content) * 0.97, 20).astype(int):
            with pytest.raises(UnreadableError, match=r"incomplete|not an image"):
                decoded(content[:cut])


class TestFiles:
    """Images by their path, for the checks."""

    def test_check_header_of_truncated_file_passes(self, tmp_path: Path) -> None:
        """``decode_file`` refuses its pixels."""
        path = tmp_path / "a.png"
        content = encode(picture(), "PNG")
        path.write_bytes(content)
        assert near(decode_file(os.fspath(path), SMALL, LIMITS), expected(picture()), 0)
        path.write_bytes(content[:-300])
        check_header(os.fspath(path), LIMITS)
        with pytest.raises(UnreadableError):
            decode_file(os.fspath(path), SMALL, LIMITS)

    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
    def test_decode_file_pipes_and_links_are_refused(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        """Opening them neither blocks nor follows."""
        path = tmp_path / "trap.jpg"
        make(path)
        with pytest.raises(ImageError):
            decode_file(os.fspath(path), SMALL, LIMITS)

    def test_check_header_missing_file_raises(self, tmp_path: Path) -> None:
        """The error is ``FileNotFoundError``."""
        with pytest.raises(FileNotFoundError):
            check_header(os.fspath(tmp_path / "gone.jpg"), LIMITS)


def test_decode_orientation_agrees_with_pillow() -> None:
    """For every orientation."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        content = encode(picture(60, 40), "PNG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.array_equal(decoded(content), expected(upright))
