"""Synthetic data for the smoke run: coloured shapes in the format of the real files."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 210), "yellow": (220, 200, 40)}
SHAPES = ("circle", "square", "triangle")
IMAGES_PER_NAME = 30
PIXELS = 64


def write_made_up(folder: Path, *, seed: int = 0) -> Path:
    """Write one data set of twelve names with 30 images each, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    dice = np.random.default_rng(seed)
    pieces = []
    labels = np.tile(np.arange(len(names)), IMAGES_PER_NAME).astype(np.int16)
    for label in labels:
        buffer = io.BytesIO()
        draw(names[label], dice).save(buffer, "WEBP", lossless=True)
        pieces.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
    np.savez(folder / "shapes.npz", webp=np.frombuffer(b"".join(pieces), np.uint8), offsets=offsets, labels=labels)
    (folder / "class_names.json").write_text(json.dumps({"shapes": names}), encoding="utf-8")
    return folder


def draw(name: str, dice: np.random.Generator) -> Image.Image:
    """Draw one shape at a random place on grey, RGB 64 x 64."""
    colour, shape = name.split()
    ground = int(dice.integers(60, 200))
    image = Image.new("RGB", (PIXELS, PIXELS), (ground, ground, ground))
    pen = ImageDraw.Draw(image)
    size = int(dice.integers(20, 44))
    x, y = (int(v) for v in dice.integers(2, PIXELS - size - 2, 2))
    box = (x, y, x + size, y + size)
    match shape:
        case "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        case "square":
            pen.rectangle(box, fill=COLOURS[colour])
        case _:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    return image
