"""Pictures of screw heads, and of things that are none, drawn from numbers alone: a height map, lit.

Every part is a height over the plane; its slopes give the surface's direction, a light and an invented room give the
shine, and the recess lies in its own shadow. Coordinates run from -1 to 1 over the picture, lengths are in that unit,
colours are RGB from 0 to 1 in float32 arrays of shape (height, width, 3). One generator of random numbers decides all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from grounds import FINE, SIZE, Plane, Random, grid, ground, noise, rgb, rise, turned
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("cross", "torx", "slotted", "hex")
"""The recesses, as the classes are named."""

Distance: TypeAlias = Callable[[Plane, Plane], Plane]
"""Signed distance from an outline: below zero inside."""

STEEL, BRASS, BLACK, COPPER, ZINC = (
    (0.78, 0.79, 0.81),
    (0.88, 0.70, 0.36),
    (0.36, 0.36, 0.40),
    (0.84, 0.52, 0.38),
    (0.86, 0.82, 0.70),
)
METALS = (STEEL, STEEL, ZINC, BRASS, COPPER, BLACK)
"""As often as they are met."""


@dataclass(frozen=True, slots=True)
class Light:
    """Where the light comes from (a unit vector towards it), how strong it is, and its colour."""

    direction: tuple[float, float, float]
    strength: float
    tint: Plane


# ---------------------------------------------------------------- outlines, in units of the head's radius


def circle(radius: float) -> Distance:
    """Outline a circle."""
    return lambda x, y: np.hypot(x, y) - np.float32(radius)


def bar(length: float, width: float) -> Distance:
    """Outline an upright bar by its half length and half width."""
    return lambda x, y: np.maximum(np.abs(x) - np.float32(width), np.abs(y) - np.float32(length))


def hexagon(apothem: float) -> Distance:
    """Outline a regular hexagon by the distance of its sides from the centre."""

    def distance(x: Plane, y: Plane) -> Plane:
        sides = [np.abs(turned(x, y, turn * np.pi / 3)[0]) for turn in range(3)]
        outside: Plane = np.maximum.reduce(sides) - np.float32(apothem)
        return outside

    return distance


def lobes(radius: float, depth: float) -> Distance:
    """Outline a star of six round lobes, between ``radius - depth`` and ``radius + depth``."""
    return lambda x, y: np.hypot(x, y) - np.float32(radius) - np.float32(depth) * np.cos(6 * np.arctan2(y, x))


def crossed(length: float, width: float) -> Distance:
    """Outline two crossing bars that widen where they meet, as a driver's tip does."""

    def distance(x: Plane, y: Plane) -> Plane:
        throat = np.float32(1.55 * width) * 2**0.5 - (np.abs(x) + np.abs(y))
        bars = np.minimum(bar(length, width)(x, y), bar(length, width)(y, x))
        outside: Plane = np.minimum(bars, -throat / np.float32(2**0.5))
        return outside

    return distance


def recess(kind: str, random: Random) -> Distance:
    """Outline a recess: its size varies, so that its area does not tell its kind."""
    match kind:
        case "cross":
            return crossed(random.uniform(0.70, 0.80), random.uniform(0.15, 0.19))
        case "torx":
            radius = random.uniform(0.56, 0.64)
            return lobes(radius, 0.27 * radius)
        case "slotted":
            return bar(random.uniform(0.85, 1.10), random.uniform(0.15, 0.22))
        case "hex":
            return hexagon(random.uniform(0.52, 0.60))
        case _:
            raise ValueError(f"no such recess: {kind}; there are {', '.join(KINDS)}")


# ---------------------------------------------------------------- light and metal


def lamp(random: Random) -> Light:
    """Place a light somewhere above the picture."""
    angle, height = random.uniform(0, 2 * np.pi), random.uniform(0.75, 1.5)
    length = float(np.hypot(1, height))
    direction = (float(np.cos(angle)) / length, float(np.sin(angle)) / length, height / length)
    warmth = random.uniform(-0.08, 0.08)
    return Light(direction, random.uniform(0.8, 1.15), rgb(1 + warmth, 1, 1 - warmth))


def slopes(height: Plane) -> tuple[Plane, Plane, Plane]:
    """Return the unit normal of a height map, as its three planes."""
    step = np.float32(2 / (FINE))
    down, across = np.gradient(height, step)
    length = np.sqrt(down * down + across * across + 1)
    return -across / length, -down / length, 1 / length


def shine(height: Plane, light: Light, random: Random, *, roughness: float, turning: Plane) -> Plane:
    """Light a height map of metal: what it scatters, the room it mirrors, and the glint; (height, width), about 0 to 1.

    Args:
        height: the surface, over the picture.
        light: what shines on it.
        random: decides the room.
        roughness: 0.1 (polished) to 0.5 (dull): how wide the glint is.
        turning: what a tool's circular marks mirror, around 0.
    """
    x, y, z = slopes(height)
    towards = np.clip(x * light.direction[0] + y * light.direction[1] + z * light.direction[2], 0, 1)
    half = rgb(*light.direction) + rgb(0, 0, 1)
    half = half / np.float32(np.linalg.norm(half))
    glint = np.clip(x * half[0] + y * half[1] + z * half[2], 0, 1) ** np.float32(2 / roughness**2)
    mirrored_x, mirrored_y = 2 * x * z, 2 * y * z
    phase = random.uniform(0, 2 * np.pi)
    room = 0.5 + 0.3 * np.sin(3.0 * mirrored_x + phase) * np.cos(2.4 * mirrored_y - phase)
    shone: Plane = np.float32(light.strength) * (0.16 + 0.42 * towards + 0.22 * room + 0.55 * glint + turning)
    return shone


def scratches(random: Random, count: int) -> Plane:
    """Draw thin straight scratches as heights from -1 (cut) to 0."""
    size = FINE
    sheet_of_lines = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(sheet_of_lines)
    for _ in range(count):
        x, y, angle = random.uniform(0, size), random.uniform(0, size), random.uniform(0, 2 * np.pi)
        length = random.uniform(0.05, 0.5) * size
        end = (x + length * float(np.cos(angle)), y + length * float(np.sin(angle)))
        pen.line(((x, y), end), fill=int(random.integers(90, 256)), width=int(random.integers(1, 3)))
    return -np.asarray(sheet_of_lines, np.float32) / 255


def shadowed(inside: Plane, light: Light, reach: float) -> Plane:
    """Shift a mask away from the light and soften it: the shadow that its edge throws, 0 to 1."""
    pixels = reach * FINE / 2
    shift = (round(-light.direction[1] * pixels), round(-light.direction[0] * pixels))
    mask = Image.fromarray((np.roll(inside, shift, axis=(0, 1)) * 255).astype(np.uint8))
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(max(1.0, pixels / 3))), np.float32) / 255


def metal(
    ground: Plane,
    outline: Distance,
    hollow: Distance,
    random: Random,
    *,
    through: bool = False,
    relief: Plane | None = None,
) -> Plane:
    """Lay a metal part on a ground: domed or flat, with a hollow cut into it.

    Args:
        ground: the picture so far.
        outline: of the part, in units of its radius.
        hollow: what is cut into it, in the same units.
        random: decides size, place, turn, metal, light and wear.
        through: the hollow shows the ground.
        relief: heights added on top, over the part's own square.
    """
    light = lamp(random)
    radius = random.uniform(0.87, 0.96)
    spare = max(0.0, 1.0 - radius)
    place_x, place_y = random.uniform(-1, 1, 2) * (0.7 * spare + 0.03)
    x, y = grid()
    x, y = (x - np.float32(place_x)) / np.float32(radius), (y - np.float32(place_y)) / np.float32(radius)
    turned_x, turned_y = turned(x, y, random.uniform(0, 2 * np.pi))
    edge, cut = outline(turned_x, turned_y), hollow(turned_x, turned_y)
    cut = np.maximum(cut, edge)
    away = np.hypot(x, y)

    dome = random.choice([0.0, 0.16, 0.32])
    rim = random.uniform(0.05, 0.14)
    body = -dome * away**2 - 0.20 * (1 - rise(-edge, 0, rim)) ** 2
    cone = random.uniform(0.0, 0.25) * (1 - away)
    depth = rise(-cut, -0.012, random.uniform(0.03, 0.06))
    wear = 0.012 * scratches(random, int(random.integers(4, 40))) + 0.006 * noise(random, 40, 40, 2)
    height = np.float32(radius) * (body + wear - depth * (0.30 + cone))
    if relief is not None:
        rows, columns = (np.clip((at + 1) * relief.shape[0] / 2, 0, relief.shape[0] - 1) for at in (turned_y, turned_x))
        height = height + relief[rows.astype(np.intp), columns.astype(np.intp)]

    tool = np.sin(away * random.uniform(60, 130)) * random.uniform(0.0, 0.05)
    fan = np.cos(2 * (np.arctan2(y, x) - random.uniform(0, np.pi))) * random.uniform(0.0, 0.12)
    bright = shine(height, light, random, roughness=random.uniform(0.12, 0.4), turning=(tool + fan) * (1 - depth))
    inside = rise(-cut, 0, 0.02)
    dusk = inside * (0.70 + 0.28 * shadowed(1 - inside, light, 0.22 * radius))
    bright = bright * (1 - np.float32(random.uniform(0.86, 0.97)) * dusk)

    tint = rgb(*METALS[random.integers(len(METALS))])
    rust = rise(noise(random, 4, 4, 5), random.uniform(0.62, 0.95), 1.0)[..., None] * np.float32(random.random() < 0.25)
    colour = tint * (1 - rust) + rgb(0.42, 0.22, 0.12) * rust
    part = bright[..., None] * colour * light.tint * 1.15

    shape = 1 - rise(edge, -0.006, 0.006)
    if through:
        shape = shape * rise(cut, -0.006, 0.006)
    cast = shadowed(shape, light, random.uniform(0.06, 0.14))
    lit_ground = ground * np.float32(0.55 + 0.45 * light.strength) * light.tint * (1 - 0.7 * cast[..., None])
    laid: Plane = lit_ground * (1 - shape[..., None]) + part * shape[..., None]
    return laid


def photographed(drawing: Plane, random: Random) -> Image.Image:
    """Turn a drawing into a photograph of it: exposure, vignette, grain, a little blur."""
    x, y = grid()
    drawing = (
        drawing * np.float32(random.uniform(0.8, 1.2)) * (1 - random.uniform(0, 0.12) * (x * x + y * y))[..., None]
    )
    pixels = (np.clip(drawing, 0, 1) ** np.float32(1 / 1.25) * 255).astype(np.uint8)
    small = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BOX)
    small = small.filter(ImageFilter.GaussianBlur(random.uniform(0.0, 0.7)))
    grain = random.normal(0, random.uniform(1, 6), (SIZE, SIZE, 1)) + random.normal(0, 1.2, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(small, np.float32) + grain, 0, 255).astype(np.uint8))


def screw(kind: str, random: Random) -> Image.Image:
    """Photograph a screw head with that recess (one of ``KINDS``)."""
    return photographed(metal(ground(random), circle(1.0), recess(kind, random), random), random)
