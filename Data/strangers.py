"""Pictures of what gets among screws by mistake and belongs to no class: washers, nuts, coins, leaves, notes, faces."""

from collections.abc import Callable

import numpy as np
from grounds import FINE, Plane, Random, grid, ground, noise, rgb, rise, turned
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from screws import circle, hexagon, lamp, metal, photographed, shadowed


def washer(random: Random) -> Image.Image:
    """Photograph a plain washer."""
    hole = circle(random.uniform(0.42, 0.6))
    return photographed(metal(ground(random), circle(1.0), hole, random, through=True), random)


def nut(random: Random) -> Image.Image:
    """Photograph a hexagonal nut."""
    hole = circle(random.uniform(0.45, 0.58))
    return photographed(metal(ground(random), hexagon(0.86), hole, random, through=True), random)


def coin(random: Random) -> Image.Image:
    """Photograph a coin with its value and a ring of beads."""
    stamp = Image.new("L", (FINE, FINE), 0)
    pen = ImageDraw.Draw(stamp)
    middle = FINE / 2
    value = str(random.choice(["1", "2", "5", "10", "25", "50"]))
    pen.text((middle, middle), value, fill=255, font=ImageFont.load_default(FINE * 0.5), anchor="mm")
    for bead in range(48):
        angle = bead * np.pi / 24
        x, y = middle + 0.42 * FINE * np.cos(angle), middle + 0.42 * FINE * np.sin(angle)
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=255)
    relief = 0.05 * np.asarray(stamp.filter(ImageFilter.GaussianBlur(2.5)), np.float32) / 255
    nothing = circle(-1.0)
    return photographed(metal(ground(random), circle(1.0), nothing, random, relief=relief), random)


def leaf(random: Random) -> Image.Image:
    """Photograph a leaf with its veins."""
    x, y = turned(*grid(), random.uniform(0, 2 * np.pi))
    across, along = np.abs(x), y / np.float32(0.86)
    width = 0.46 * np.maximum(np.cos(np.pi / 2 * np.clip(along, -1, 1)), 0) ** 0.8 * (1 - 0.25 * along)
    shape = rise(width - across, -0.005, 0.008) * (np.abs(along) < 1)
    ribs = np.abs(np.sin(13 * (y - 0.9 * across)))
    veins = np.maximum(1 - rise(across, 0.008, 0.022), 0.7 * (1 - rise(ribs, 0.06, 0.22)))
    green = rgb(*random.choice([(0.22, 0.42, 0.12), (0.62, 0.44, 0.12), (0.55, 0.20, 0.10), (0.34, 0.48, 0.16)]))
    shade = 0.75 + 0.35 * noise(random, 5, 5, 4) + 0.12 * np.sign(x)
    blade = shade[..., None] * green * (1 + 0.55 * veins[..., None])
    return photographed(_laid(blade, shape, random), random)


def note(random: Random) -> Image.Image:
    """Photograph a slip of paper with lines of writing."""

    def write(pen: ImageDraw.ImageDraw) -> None:
        words = ["torx 6 mm", "order 200 pcs", "bin 14, shelf C", "ask Ana", "TO DO", "3 x 40 zinc", "Tuesday"]
        for line in range(6):
            text = f"{random.choice(words)}  {random.choice(words)}"
            pen.text((0.12 * FINE, (0.16 + 0.115 * line) * FINE), text, fill=(40, 44, 90), font=font)

    font = ImageFont.load_default(FINE * 0.072)
    return photographed(_paper(write, random), random)


def face(random: Random) -> Image.Image:
    """Photograph a face doodled on paper."""

    def doodle(pen: ImageDraw.ImageDraw) -> None:
        ink, width = (30, 30, 34), 7
        middle, size = FINE / 2, 0.33 * FINE
        pen.ellipse((middle - size, middle - size, middle + size, middle + size), outline=ink, width=width)
        for side in (-0.38, 0.38):
            x, y = middle + side * size, middle - 0.25 * size
            pen.ellipse((x - 12, y - 18, x + 12, y + 18), fill=ink)
        low = middle + random.uniform(0.0, 0.2) * size
        pen.arc((middle - 0.6 * size, low - 0.4 * size, middle + 0.6 * size, low + 0.5 * size), 20, 160, ink, width)
        for hair in range(7):
            x = middle + (hair - 3) * 0.16 * size
            pen.line((x, middle - 0.95 * size, x + random.uniform(-16, 16), middle - 1.3 * size), fill=ink, width=5)

    return photographed(_paper(doodle, random), random)


def _paper(draw: Callable[[ImageDraw.ImageDraw], None], random: Random) -> Plane:
    """Draw on paper and lay it on a ground, a little turned."""
    paper = Image.new("RGB", (FINE, FINE), tuple(int(v) for v in random.choice([(246, 244, 236), (250, 238, 150)])))
    draw(ImageDraw.Draw(paper))
    frame = Image.new("L", (FINE, FINE), 0)
    ImageDraw.Draw(frame).rectangle((0.06 * FINE, 0.06 * FINE, 0.94 * FINE, 0.94 * FINE), fill=255)
    angle = random.uniform(-25, 25)
    colour = np.asarray(paper.rotate(angle, Image.Resampling.BICUBIC), np.float32) / 255
    shape = np.asarray(frame.rotate(angle, Image.Resampling.BICUBIC), np.float32) / 255
    creased = colour * (0.86 + 0.14 * noise(random, 2, 2, 3))[..., None]
    return _laid(creased, shape, random)


def _laid(thing: Plane, shape: Plane, random: Random) -> Plane:
    """Lay a flat thing on a ground, with its shadow."""
    light = lamp(random)
    below = ground(random) * light.tint * (1 - 0.6 * shadowed(shape, light, 0.05)[..., None])
    return below * (1 - shape[..., None]) + thing * light.tint * shape[..., None]


STRANGERS = (washer, nut, coin, leaf, note, face)
