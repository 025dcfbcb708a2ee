"""What screws lie on: wood, concrete, cloth, brushed metal and board; and the noise that all surfaces are made of.

Coordinates run from -1 to 1 over the picture; colours are RGB from 0 to 1 in float32 arrays (height, width, 3).
One generator of random numbers decides all.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

SIZE = 240
"""Pixels along each edge of a picture."""

FINENESS = 2
"""How many times finer than the picture the drawing is, so that edges come out smooth."""

FINE = SIZE * FINENESS

Plane: TypeAlias = npt.NDArray[np.floating[Any]]
Random: TypeAlias = np.random.Generator


def rgb(*values: float) -> Plane:
    """Make a colour of three numbers."""
    return np.array(values, np.float32)


def grid() -> tuple[Plane, Plane]:
    """Return x and y over the picture, from -1 to 1."""
    line = np.linspace(-1, 1, FINE, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    return x, y


def rise(value: Plane, start: float, end: float) -> Plane:
    """Climb smoothly from 0 at ``start`` to 1 at ``end`` (the cubic smoothstep)."""
    share = np.clip((value - start) / (end - start), 0, 1)
    climbed: Plane = share * share * (3 - 2 * share)
    return climbed


def noise(random: Random, cells_x: float, cells_y: float, octaves: int = 4) -> Plane:
    """Draw cloudy noise from 0 to 1 whose coarsest features are ``1 / cells`` of the picture wide and high."""
    total = np.zeros((FINE, FINE), np.float32)
    for octave in range(octaves):
        shape = (max(2, round(cells_y * 2**octave)), max(2, round(cells_x * 2**octave)))
        values = Image.fromarray(random.random(shape, dtype=np.float32))
        total += np.asarray(values.resize((FINE, FINE), Image.Resampling.BICUBIC)) / 2**octave
    low, high = total.min(), total.max()
    clouds: Plane = (total - low) / (high - low)
    return clouds


def turned(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    """Turn the coordinates about the origin by an angle in radians."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def paint(plane: Plane, *stops: tuple[float, float, float]) -> Plane:
    """Colour a plane of 0 to 1 by colours at equal steps."""
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(plane, places, [stop[channel] for stop in stops]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def wood(random: Random) -> Plane:
    """Draw planed boards with their grain."""
    x, y = turned(*grid(), random.uniform(0, np.pi))
    grain = np.sin(24 * (x + 0.35 * noise(random, 2, 2, 3)) + 5 * noise(random, 3, 3, 2) + 0.7 * y)
    fibre = noise(random, 60, 4, 2)
    dark, light = [((0.30, 0.18, 0.10), (0.55, 0.36, 0.20)), ((0.60, 0.44, 0.28), (0.84, 0.70, 0.50))][
        random.integers(2)
    ]
    return paint(np.clip(0.5 + 0.25 * grain + 0.5 * (fibre - 0.5), 0, 1), dark, light)


def concrete(random: Random) -> Plane:
    """Draw poured concrete with pores."""
    shade = 0.55 + 0.3 * (noise(random, 3, 3, 6) - 0.5) + 0.25 * (noise(random, 120, 120, 1) - 0.5)
    pores = rise(noise(random, 26, 26, 2), 0.78, 0.86)
    level = random.uniform(0.7, 1.3)
    warmth = random.uniform(-0.04, 0.04)
    concreted: Plane = (np.clip(shade - 0.35 * pores, 0, 1)[..., None] * level) * rgb(1 + warmth, 1, 1 - warmth)
    return concreted


def cloth(random: Random) -> Plane:
    """Draw a woven cloth in one colour."""
    x, y = turned(*grid(), random.uniform(0, np.pi))
    threads = random.uniform(55, 90)
    weave = 0.5 + 0.25 * np.sin(threads * x) * np.sign(np.sin(threads * y / 2)) + 0.25 * np.sin(threads * y)
    colour = rgb(*random.choice([(0.20, 0.28, 0.42), (0.45, 0.16, 0.16), (0.72, 0.68, 0.60), (0.24, 0.34, 0.26)]))
    woven: Plane = (0.72 + 0.25 * weave + 0.2 * (noise(random, 3, 3, 3) - 0.5))[..., None] * colour
    return woven


def brushed(random: Random) -> Plane:
    """Draw a sheet of brushed metal."""
    x, y = turned(*grid(), random.uniform(0, np.pi))
    columns = (np.clip(0.5 + 0.35 * y, 0, 1) * (FINE - 1)).astype(np.intp)
    strokes = noise(random, 1, 200, 2)[columns, FINE // 2]
    sheen = np.exp(-((x - random.uniform(-0.6, 0.6)) ** 2) / 0.5)
    shade = random.uniform(0.35, 0.6) + 0.22 * (strokes - 0.5) + 0.22 * sheen
    metallic: Plane = shade[..., None] * rgb(0.97, 1.0, 1.04)
    return metallic


def sheet(random: Random) -> Plane:
    """Draw smooth coloured board, lit unevenly."""
    x, _y = turned(*grid(), random.uniform(0, 2 * np.pi))
    colour = rgb(*random.choice([(0.86, 0.86, 0.84), (0.34, 0.40, 0.48), (0.80, 0.66, 0.42), (0.16, 0.17, 0.19)]))
    return (0.9 + 0.16 * x + 0.04 * noise(random, 90, 90, 1))[..., None] * colour


GROUNDS = (wood, concrete, cloth, brushed, sheet)


def ground(random: Random) -> Plane:
    """Draw one of the grounds."""
    return GROUNDS[random.integers(len(GROUNDS))](random)
