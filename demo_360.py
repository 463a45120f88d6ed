"""Draw a demo data set: 360-degree wetland photos with a Labelbox export and exact truth.

Each survey day is a transect through one made-up wetland. The camera walks a few metres from
photo to photo, so that neighbouring photos look alike, as they do in a real survey. Below the
output folder this makes:

    panoramas/SITE/Day N/jpg_export/IMG_*.jpg   seamless equirectangular photos with EXIF and XMP
    demo_360.ndjson                             a Labelbox export of their left and right halves
    truth.csv                                   what is visible in every half, and how much of it

The export is like a real one: a pilot project did not ask all questions and some certainties were
forgotten (unknown cells), a second annotator judged some halves, a few are skipped or flagged.
truth.csv knows all.

Run it as `python demo_360.py OUT_DIR [--n-panoramas N] [--width W] [--seed S]`.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from PIL import Image, ImageColor, ImageDraw
from tqdm.auto import tqdm

Array = np.ndarray
__all__ = ["LABELS", "draw_panorama", "make_demo", "plan_survey", "sort_into_classes"]

LABELS = ["Grass", "Trees", "Water", "Building", "Boardwalk", "Hills", "Sun", "[Lvl2] Lily"]
GRASS, TREES, WATER, BUILDING, BOARDWALK, HILLS, SUN, LILY = range(1, 9)  # 0 is "no label"

# Visible fractions from which a half gets a label as maybe, likely and definitely there. The
# first is what an annotator would notice: anything smaller counts as absent.
CUTS = {
    "Grass": (0.008, 0.06, 0.15),
    "Trees": (0.004, 0.015, 0.04),
    "Water": (0.01, 0.04, 0.12),
    "Building": (0.006, 0.015, 0.03),
    "Boardwalk": (0.005, 0.02, 0.06),
    "Hills": (0.005, 0.015, 0.03),
    "Sun": (0.006, 0.014, 0.022),
    "[Lvl2] Lily": (0.012, 0.03, 0.06),
}
GRADES = ("3 - Maybe", "2 - Likely", "1 - Definitely")
ASKED_LATER = ("Water", "Trees", "Grass")  # the pilot project did not ask these questions yet
PILOT_SHARE = 0.15  # of the panoramas
UNGRADED_SHARE = 0.02  # of the checklists: a distance is ticked, the certainty forgotten
TWICE_SHARE = 0.15  # of the halves: a second annotator judges them as well
MISJUDGED = 1.0  # how far off the second one sees a share: the sd of its logarithm
FOREGROUND_ELEVATION = math.radians(-9)  # what reaches lower stands within about 11 m
NOTES = [
    "Water level higher than on the last visit",
    "Heron took off just before the photo",
    "Path overgrown, check the access next year",
    "Lens was wet",
]

CAMERA_HEIGHT = 1.7
STEP = 6.0  # metres between photos
STRETCH = 60.0  # metres of transect that are furnished together
RANGE = 32.0  # metres beyond which the ground melts into haze
BOARDWALK_HALF_WIDTH = 0.8
SUN_RADIUS, GLOW_RADIUS = math.radians(6), math.radians(15)
LILY_RANGE = 14.0
LILY_CELL = 0.95  # metres; one pad at most grows in each cell of this size

N_DAYS = 10
SOILS = {"mud": "#6d5a48", "sand": "#cdbd9c", "gravel": "#8f8f8e", "peat": "#4a3f38"}
SEASONS = [("#5f9a3a", "#3c7a35"), ("#86a548", "#47793a"), ("#a9a255", "#6b7a35")]  # grass, leaves


@dataclass(frozen=True)
class Site:
    """A wetland: where it lies, its soil, and how much of each thing it has (0 to 1)."""

    name: str
    latitude: float
    longitude: float
    soil: str
    grass: float
    water: float
    trees: float
    houses: float
    boardwalk: float
    hills: float
    lilies: float


SITES = [
    Site("Heron Marsh", 52.694, 1.612, "mud", 0.70, 0.55, 0.35, 0.25, 0.90, 0.00, 0.80),
    Site("Willow Fen", 53.318, -0.927, "peat", 0.85, 0.40, 0.80, 0.30, 0.65, 0.00, 0.55),
    Site("Curlew Flats", 54.872, -3.341, "sand", 0.10, 0.55, 0.15, 0.40, 0.60, 0.65, 0.00),
    Site("Otter Brook", 50.981, -4.213, "gravel", 0.50, 0.40, 0.60, 0.45, 0.50, 0.85, 0.00),
    Site("Lily Mere", 54.391, -2.938, "peat", 0.40, 0.70, 0.50, 0.35, 0.80, 0.90, 1.00),
    Site("Bittern Reach", 52.311, 1.587, "mud", 0.55, 0.60, 0.25, 0.55, 0.75, 0.00, 0.70),
    Site("Alder Carr", 57.148, -3.679, "peat", 0.50, 0.25, 0.90, 0.30, 0.60, 0.75, 0.00),
    Site("Gravel Pit Lake", 51.684, -1.932, "gravel", 0.05, 0.45, 0.40, 0.60, 0.50, 0.40, 0.60),
]


@dataclass(frozen=True)
class Weather:
    """The light of a survey day, and the hours at which such a day may be walked."""

    zenith: str
    horizon: str
    light: str
    cloud: str
    cloud_cover: float
    haze: float
    hours: tuple[float, float]
    sunny: bool


WEATHERS = [
    Weather("#2f6fc4", "#bcdcf2", "#ffffff", "#ffffff", 0.15, 0.15, (9.5, 15.0), True),
    Weather("#3f7fcb", "#cfe3ee", "#fbf7ee", "#ffffff", 0.50, 0.20, (9.0, 16.0), True),
    Weather("#4a62a8", "#ffc078", "#ffdcae", "#ffd2b0", 0.35, 0.25, (17.3, 18.6), True),
    Weather("#8795a4", "#c3cad0", "#cfd3d8", "#dfe3e6", 0.80, 0.25, (8.0, 17.0), False),
    Weather("#b4c2cc", "#dfe4e4", "#dfe3e2", "#edf0f0", 0.60, 0.45, (7.0, 9.0), False),
]
WEATHER_CHANCES = [0.24, 0.26, 0.20, 0.17, 0.13]


@dataclass(frozen=True)
class Thing:
    """Something upright that stands at a world position (metres east and north)."""

    kind: str
    x: float
    y: float
    height: float
    variant: int = 0


# The label each kind of thing counts for, and how far away it is still drawn.
KINDS = {
    "conifer": (TREES, 48.0),
    "round": (TREES, 48.0),
    "house": (BUILDING, 32.0),
    "reeds": (GRASS, 20.0),
    "tuft": (GRASS, 9.0),
    "flower": (LILY, 13.0),
    "heron": (0, 25.0),
}


@dataclass
class Survey:
    """All that the photos of one site and day share."""

    site: Site
    day: int
    start: datetime
    direction: float
    mount: float
    weather: Weather
    sun: tuple[float, float]
    noise: Array
    fields: dict[str, Array]
    hills: Array
    boardwalks: list[tuple[float, float, float, float]]
    things: list[Thing]
    sprites: dict[str, list[Image.Image]]
    jitter: Array


def _rgb(color: str) -> Array:
    return np.array(ImageColor.getrgb(color), np.float32) / 255


def _mix(a: Array, b: Array, t: Array) -> Array:
    return a + (b - a) * t[..., None]


def _ramp(x: Array) -> Array:
    return np.clip(x, 0, 1)


def _tileable_noise(rng: np.random.Generator, size: int = 512, power: float = 1.5) -> Array:
    """Noise with a 1/f**power spectrum whose opposite edges meet, of unit variance."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency**power
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return (noise / noise.std()).astype(np.float32)


def _look_up(tile: Array, x: Array, y: Array) -> Array:
    last = len(tile) - 1  # tiles are a power of two wide, so that "&" wraps around
    return tile[np.floor(y).astype(np.int32) & last, np.floor(x).astype(np.int32) & last]


def _random_waves(rng: np.random.Generator, longest: float, shortest: float, n: int) -> Array:
    """Rows (kx, ky, phase, amplitude) of a smooth random field of about unit variance."""
    length = np.geomspace(longest, shortest, n)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, n))
    k = 2 * np.pi / length
    amplitude = length**0.8 / np.sqrt((length**1.6).sum() / 2)
    return np.stack([k * np.cos(angle), k * np.sin(angle), phase, amplitude], 1).astype(np.float32)


def _evaluate(waves: Array, x: Array, y: Array) -> Array:
    return sum(a * np.sin(kx * x + ky * y + phase) for kx, ky, phase, a in waves)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGBA", (width, height))
    return image, ImageDraw.Draw(image)


def _shade(color: str, factor: float) -> tuple[int, ...]:
    return tuple(int(min(255, c * factor)) for c in ImageColor.getrgb(color))


def _conifer(rng: np.random.Generator, color: str) -> Image.Image:
    image, draw = _canvas(150, 256)
    draw.rectangle((69, 220, 81, 255), fill="#5a4030")
    for tier in range(8):
        top, bottom = 2 + tier * 24, 62 + tier * 24
        half = 16 + tier * 7.5
        for side, factor in ((-1, 1.15), (1, 0.75)):
            tips = np.linspace(0, half, 6)
            hem = [(75 + side * t, bottom - 0.15 * t + rng.uniform(-9, 5)) for t in tips]
            draw.polygon([(75, top), *hem[::-1]], fill=_shade(color, factor + 0.03 * tier - 0.2))
    return image


def _round_tree(rng: np.random.Generator, color: str) -> Image.Image:
    image, draw = _canvas(220, 256)
    draw.polygon([(102, 256), (106, 120), (116, 120), (122, 256)], fill="#6b4e38")
    draw.line([(110, 190), (70, 120)], fill="#6b4e38", width=7)
    draw.line([(112, 180), (150, 115)], fill="#6b4e38", width=6)
    for light in np.linspace(0.62, 1.35, 110):
        angle, distance = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform())
        x = 110 + 78 * distance * np.cos(angle) - 26 * (light - 1)
        y = 95 + 66 * distance * np.sin(angle) - 40 * (light - 1)
        r = rng.uniform(14, 26) * (1.45 - 0.6 * light)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_shade(color, light))
    return image


def _house(wall: str, trim: str, roof: str) -> Image.Image:
    image, draw = _canvas(264, 200)
    draw.rectangle((182, 8, 200, 60), fill="#8a4b3c")
    draw.rectangle((104, 100, 250, 199), fill=_shade(wall, 0.82))
    draw.polygon([(16, 199), (16, 100), (60, 36), (104, 100), (104, 199)], fill=wall)
    draw.polygon([(60, 30), (208, 30), (260, 106), (110, 106)], fill=roof)
    draw.line([(10, 106), (60, 32), (110, 106)], fill=trim, width=8)
    draw.rectangle((44, 138, 76, 199), fill=trim)
    draw.rectangle((49, 143, 71, 199), fill="#3d5a4a")
    for x, y in ((128, 128), (172, 128), (216, 128), (48, 82)):
        draw.rectangle((x - 3, y - 3, x + 25, y + 31), fill=trim)
        draw.rectangle((x + 1, y + 1, x + 21, y + 27), fill="#9cc4dc")
        draw.line([(x + 11, y), (x + 11, y + 28)], fill=trim, width=3)
    return image


def _blades(rng: np.random.Generator, color: str, n: int, cattails: int = 0) -> Image.Image:
    image, draw = _canvas(200, 256)
    for i in range(n + cattails):
        x, lean = rng.normal(100, 26), rng.normal(0, 26)
        top = rng.uniform(20, 150) if i < n else rng.uniform(10, 60)
        stem = [(x, 256), (x + lean * 0.3, (256 + top) / 2), (x + lean, top)]
        draw.line(stem, fill=_shade(color, rng.uniform(0.7, 1.45)), width=5 if i < n else 4)
        if i >= n:
            x, top = x + lean, top - 8
            draw.rounded_rectangle((x - 6, top, x + 6, top + 44), 6, fill="#6a4020")
    return image


def _flower() -> Image.Image:
    image, draw = _canvas(200, 128)
    layers = ((92, 6, "#d85a9c"), (64, 5, "#f08abf"), (36, 4, "#ffc4e0"))
    for reach, n, color in layers:
        for angle in np.linspace(0.12 * np.pi, 0.88 * np.pi, n):
            tip = np.array([100 + reach * np.cos(angle), 122 - 1.15 * reach * np.sin(angle)])
            side = np.array([np.sin(angle), np.cos(angle)]) * 15
            middle = (tip + (100, 122)) / 2
            petal = [tip, middle + side, (100, 122), middle - side]
            draw.polygon([tuple(map(float, p)) for p in petal], fill=color)
    draw.ellipse((88, 92, 112, 116), fill="#ffd84a")
    return image


def _heron() -> Image.Image:
    image, draw = _canvas(150, 256)
    for x in (74, 88):
        draw.line([(x, 160), (x - 4, 256)], fill="#5b5240", width=5)
    draw.polygon([(52, 120), (84, 102), (110, 130), (132, 178), (84, 166)], fill="#aab6c2")
    draw.polygon([(84, 120), (112, 134), (136, 186), (98, 160)], fill="#6f7e8e")
    neck = [(66, 128), (48, 104), (66, 70), (52, 40)]
    draw.line(neck, fill="#f2f4f4", width=13, joint="curve")
    draw.ellipse((38, 24, 68, 50), fill="#f2f4f4")
    draw.polygon([(42, 32), (2, 44), (42, 46)], fill="#e0a030")
    draw.line([(52, 28), (92, 38)], fill="#28303c", width=6)
    return image


def _season(day: int) -> tuple[str, str]:
    return SEASONS[day * len(SEASONS) // N_DAYS]


def _draw_sprites(rng: np.random.Generator, day: int) -> dict[str, list[Image.Image]]:
    grass, leaves = _season(day)
    autumn = [leaves, leaves, "#b5762c"] if _season(day) is SEASONS[-1] else [leaves] * 3
    return {
        "conifer": [_conifer(rng, "#2f5f3c") for _ in range(3)],
        "round": [_round_tree(rng, color) for color in autumn],
        "house": [
            _house("#b3382c", "#f4f0e6", "#4b4446"),
            _house("#f3efe4", "#8e3a2c", "#b4472f"),
            _house("#c94a38", "#ffffff", "#7a3026"),
        ],
        "reeds": [_blades(rng, grass, 30, cattails=7) for _ in range(3)],
        "tuft": [_blades(rng, grass, 26) for _ in range(3)],
        "flower": [_flower()],
        "heron": [_heron()],
    }


def plan_survey(site_index: int, day: int, n_photos: int, seed: int = 42) -> Survey:
    """Lay out the world around the transect that one survey day follows."""
    site = SITES[site_index]
    site_rng = np.random.default_rng([seed, site_index])
    fields = {
        name: _random_waves(site_rng, longest, shortest, 7)
        for name, longest, shortest in (("water", 90, 8), ("grass", 150, 8), ("lily", 45, 8))
    }
    hills, noise = _hill_profile(site_rng, site.hills), _tileable_noise(site_rng)
    rng = np.random.default_rng([seed, site_index, day])
    weather = WEATHERS[rng.choice(len(WEATHERS), p=WEATHER_CHANCES)]
    hour = rng.uniform(*weather.hours)
    direction = rng.uniform(0, 2 * np.pi)
    survey = Survey(
        site=site,
        day=day,
        start=datetime(2024, 5, 3 + 3 * site_index)
        + timedelta(days=18 * day, hours=int(hour), seconds=int(hour % 1 * 3600)),
        direction=direction,
        mount=rng.uniform(-1, 1),
        weather=weather,
        sun=(
            math.radians(180 + 15 * (hour - 12.5)),
            math.radians(58) * math.sin(math.pi * (hour - 5) / 15),
        ),
        noise=noise,
        fields=fields,
        hills=hills,
        boardwalks=[],
        things=[],
        sprites=_draw_sprites(np.random.default_rng([seed, site_index, day, 1]), day),
        jitter=rng.normal(0, 0.06, n_photos),
    )
    for stretch in range(math.ceil(n_photos * STEP / STRETCH)):
        _furnish(survey, stretch, np.random.default_rng([seed, site_index, day, 2, stretch]))
    return survey


def _hill_profile(rng: np.random.Generator, size: float, n: int = 2048) -> Array:
    """Elevation of three ridges, far to near, around the full circle (integer frequencies)."""
    azimuth = np.arange(n) / n * 2 * np.pi
    ridges, side = [], rng.uniform(0, 2 * np.pi)
    for ridge in range(3):
        frequency = np.arange(2, 60)
        phase = rng.uniform(0, 2 * np.pi, len(frequency))
        waves = np.cos(np.outer(azimuth, frequency) + phase) / frequency**1.3
        shape = 0.9 * np.cos(azimuth - side) + 0.45 * waves.sum(1) + 0.9 * size - 0.45 - 0.2 * ridge
        ridges.append(np.clip(shape, 0, None) * (0.22 - 0.04 * ridge))
    return (np.array(ridges) * (size > 0)).astype(np.float32)


def _place(survey: Survey, along: float, across: float) -> tuple[float, float]:
    """World position of a point on (or to the right of) the transect of the day."""
    east, north = math.sin(survey.direction), math.cos(survey.direction)
    x, y = along * east + across * north, along * north - across * east
    return x, y + 300 * survey.day


def _furnish(survey: Survey, stretch: int, rng: np.random.Generator) -> None:
    """Put groves, houses, boardwalks and plants along one stretch of the transect."""
    start = stretch * STRETCH
    for side in (-1, 1):
        for _ in range(rng.binomial(2, 0.75 * survey.site.trees)):
            _plant_grove(survey, start + rng.uniform(0, STRETCH), side, rng)
        if rng.uniform() < survey.site.houses:
            x, y = _place(survey, start + rng.uniform(0, STRETCH), side * rng.uniform(9, 17))
            survey.things.append(Thing("house", x, y, rng.uniform(10, 13), rng.integers(3)))
    if rng.uniform() < 0.9 * survey.site.boardwalk:
        _build_boardwalk(survey, start, rng)
    _sow_plants(survey, start, rng)


def _plant_grove(survey: Survey, along: float, side: int, rng: np.random.Generator) -> None:
    kind = rng.choice(["conifer", "round"])
    distance = rng.uniform(9, 19)
    for _ in range(rng.integers(5, 14)):
        across = side * max(6, distance + rng.normal(0, 4))
        x, y = _place(survey, along + rng.normal(0, 9), across)
        height = rng.uniform(8, 14) if kind == "conifer" else rng.uniform(6.5, 10.5)
        survey.things.append(Thing(str(kind), x, y, height, rng.integers(3)))


def _build_boardwalk(survey: Survey, start: float, rng: np.random.Generator) -> None:
    """A straight walk that runs under the camera, beside it, or away from the transect."""
    first, length = start + rng.uniform(-15, 20), rng.uniform(35, 60)
    side = rng.choice([-1, 1])
    near, far = rng.choice([(0.0, 0.0), (2.2, 3.2), (2.0, 16.0)], p=[0.35, 0.35, 0.3])
    ends = _place(survey, first, side * near), _place(survey, first + length, side * far)
    survey.boardwalks.append((*ends[0], *ends[1]))


def _sow_plants(survey: Survey, start: float, rng: np.random.Generator) -> None:
    along, across = rng.uniform(start - 10, start + STRETCH + 10, 1000), rng.uniform(-14, 14, 1000)
    x, y = _place(survey, along, across)
    wet, green = _wetness(survey, x, y), _greenness(survey, x, y)
    walk = _on_boardwalks(survey, x, y, margin=0.3)
    for i in np.flatnonzero((np.abs(across) > 1.0) & ~walk):
        height = rng.uniform(0.7, 1.3)
        if abs(wet[i]) < 0.22 and green[i] > 0.1 and abs(across[i]) > 2.5:
            survey.things.append(Thing("reeds", x[i], y[i], 1.7 * height, i % 3))
        elif wet[i] < -0.1 and green[i] > 0.1:
            survey.things.append(Thing("tuft", x[i], y[i], 0.55 * height, i % 3))
        elif 0.02 < wet[i] < 0.12 and i % 9 == 0 and abs(across[i]) > 4:
            survey.things.append(Thing("heron", x[i], y[i], 1.3 * height))


def _wetness(survey: Survey, x: Array, y: Array) -> Array:
    """Positive on water."""
    return _evaluate(survey.fields["water"], x, y) + 2.2 * (survey.site.water - 0.75)


def _greenness(survey: Survey, x: Array, y: Array) -> Array:
    """Positive where grass grows, unless there is water."""
    return _evaluate(survey.fields["grass"], x, y) + 3.2 * (survey.site.grass - 0.5)


def _along_and_across(
    walk: tuple[float, float, float, float], x: Array, y: Array
) -> tuple[Array, Array, float]:
    x0, y0, x1, y1 = walk
    length = math.hypot(x1 - x0, y1 - y0)
    east, north = (x1 - x0) / length, (y1 - y0) / length
    x, y = x - x0, y - y0
    return x * east + y * north, x * north - y * east, length


def _on_boardwalks(survey: Survey, x: Array, y: Array, margin: float) -> Array:
    inside = np.zeros(np.shape(x), bool)
    for walk in survey.boardwalks:
        along, across, length = _along_and_across(walk, x, y)
        inside |= (np.abs(across) < BOARDWALK_HALF_WIDTH + margin) & (along > 0) & (along < length)
    return inside


def _lily_pads(survey: Survey, i: Array, j: Array) -> tuple[Array, ...]:
    """Centre, radius and notch direction of the pads in the cells (i, j); radius 0: no pad."""
    dx, dy, size, turn = (
        _look_up(survey.noise, 7 * i + k, 11 * j + 3 * k) for k in (0, 91, 182, 273)
    )
    radius = LILY_CELL * (0.36 + 0.06 * np.sin(5 * size))
    x = (i + 0.5) * LILY_CELL + 0.07 * np.sin(9 * dx)
    y = (j + 0.5) * LILY_CELL + 0.07 * np.sin(9 * dy)
    thrives = _evaluate(survey.fields["lily"], x, y) + 1.7 * (survey.site.lilies - 0.6)
    grows = (thrives > 0) & (survey.site.lilies > 0) & (_wetness(survey, x, y) > 0.08)
    return x, y, np.where(grows & (np.sin(40 * turn) > -0.75), radius, 0), 20 * turn


def draw_panorama(survey: Survey, photo: int, width: int = 1024) -> tuple[Array, Array]:
    """Draw one photo of a survey: RGB pixels, and the label id of every pixel (0 for none)."""
    x, y, heading = _camera(survey, photo)
    azimuth = (heading + (np.arange(width) + 0.5) / width * 2 * np.pi - np.pi).astype(np.float32)
    half = width // 4
    elevation = ((half - np.arange(half) - 0.5) / half * np.pi / 2).astype(np.float32)[:, None]
    layer, alpha, layer_ids = _paint_things(survey, x, y, heading, width)
    sky, sky_ids = _paint_sky(survey, azimuth, elevation, photo)
    sky = sky * (1 - alpha[:half]) + layer[:half]
    ground, ground_ids = _paint_ground(survey, _project(x, y, azimuth, elevation[::-1]), sky[::-1])
    ground = ground * (1 - alpha[half:]) + layer[half:]
    ids = np.where(alpha[..., 0] > 0.5, layer_ids, np.concatenate([sky_ids, ground_ids]))
    return (_ramp(np.concatenate([sky, ground])) * 255 + 0.5).astype(np.uint8), ids


def _camera(survey: Survey, photo: int) -> tuple[float, float, float]:
    """World position and heading (clockwise from north) of the picture centre."""
    x, y = _place(survey, STEP * (photo + 0.5), 0.0)
    return x, y, survey.direction + survey.mount + float(survey.jitter[photo])


def _paint_sky(survey: Survey, azimuth: Array, elevation: Array, photo: int) -> tuple[Array, Array]:
    weather = survey.weather
    sky = np.empty((len(elevation), len(azimuth), 3), np.float32)
    sky[:] = _mix(_rgb(weather.horizon), _rgb(weather.zenith), np.sin(elevation) ** 0.6)
    ids = np.zeros(sky.shape[:2], np.uint8)
    density = _cloud_density(survey, azimuth, elevation, photo)
    clouds = _ramp(density * 0.8) * _ramp(elevation * 5) * 0.95
    shadow = _ramp(_cloud_density(survey, azimuth, elevation + 0.06, photo) * 0.3)
    cloud_color = _mix(_rgb(weather.cloud), _rgb(weather.cloud) * 0.7, shadow)
    if not weather.sunny:
        sky = _mix(sky, cloud_color, clouds)
    else:
        cosine = _cosine_to_sun(survey.sun, azimuth, elevation)
        warm = _mix(_rgb(weather.light), _rgb("#fff3b8"), np.float32(0.5))
        sky = _mix(sky, warm, 0.55 * np.exp((cosine - 1) * 22))
        sky = _mix(sky, _rgb("#fff6c4"), np.exp((cosine - 1) * 160) * 0.95)
        sky = _mix(sky, cloud_color, clouds * (1 - np.exp((cosine - 1) * 60)))  # it shines through
        disc = _ramp((cosine - math.cos(SUN_RADIUS)) * 900)
        sky = _mix(sky, _rgb("#ffe14a"), disc)
        ids[cosine > math.cos(GLOW_RADIUS)] = SUN
    _paint_hills(survey, azimuth, elevation, sky, ids)
    return sky, ids


def _cosine_to_sun(sun: tuple[float, float], azimuth: Array, elevation: Array) -> Array:
    across = np.cos(elevation) * math.cos(sun[1]) * np.cos(azimuth - sun[0])
    return across + np.sin(elevation) * math.sin(sun[1])


def _cloud_density(survey: Survey, azimuth: Array, elevation: Array, photo: int) -> Array:
    """Clouds are a flat layer of noise overhead, which drifts from photo to photo."""
    reach = 110 * np.cos(elevation) / (np.sin(elevation) + 0.2)
    x, y = reach * np.sin(azimuth) + 4 * photo, reach * np.cos(azimuth) + 170 * survey.day
    return _look_up(survey.noise, x, y) + 2.6 * (survey.weather.cloud_cover - 0.55)


def _paint_hills(survey: Survey, azimuth: Array, elevation: Array, sky: Array, ids: Array) -> None:
    n = survey.hills.shape[1]
    column = np.mod(np.round(azimuth / (2 * np.pi) * n), n).astype(int)
    low = elevation[:, 0] < survey.hills.max() + 0.02
    light, haze = _rgb(survey.weather.light), _rgb(survey.weather.horizon)
    for ridge, color in zip(survey.hills, ("#8d8fc0", "#6a6ba6", "#4f5488"), strict=True):
        edge = _ramp((ridge[column] - elevation[low]) * len(elevation) / (np.pi / 2) + 0.5)
        depth = _ramp(1 - elevation[low] / 0.25) * survey.weather.haze + np.zeros_like(edge)
        sky[low] = _mix(sky[low], _mix(_rgb(color) * light, haze, depth), edge)
        ids[low] = np.where(edge > 0.5, HILLS, ids[low])


class Ground(NamedTuple):
    """Where the rays of the pixels below the horizon meet the ground."""

    x: Array
    y: Array
    reach: Array
    azimuth: Array
    depression: Array


def _project(east: float, north: float, azimuth: Array, depression: Array) -> Ground:
    reach = CAMERA_HEIGHT / np.tan(depression) + np.zeros_like(azimuth)
    x, y = east + reach * np.sin(azimuth), north + reach * np.cos(azimuth)
    return Ground(x, y, reach, azimuth, depression)


def _paint_ground(survey: Survey, ground: Ground, mirror: Array) -> tuple[Array, Array]:
    wet = _wetness(survey, ground.x, ground.y)
    green = _greenness(survey, ground.x, ground.y)
    light = _rgb(survey.weather.light)
    colors = _land_color(survey, ground, wet, green) * light
    ids = np.where(green > 0.06, GRASS, 0).astype(np.uint8)
    water = wet > 0
    colors[water] = _water_color(light, ground, mirror)[water]
    ids[water] = WATER
    _paint_lilies(survey, ground, colors, ids)
    _paint_boardwalks(survey, ground, colors, ids)
    ids[ground.reach > RANGE] = 0
    far = 0.5 * (_rgb(survey.weather.horizon) + _rgb("#8f9a8c") * light)
    return _mix(colors, far, _ramp((ground.reach / RANGE) ** 2)), ids


def _land_color(survey: Survey, ground: Ground, wet: Array, green: Array) -> Array:
    grain = _look_up(survey.noise, 14 * ground.x, 14 * ground.y) * np.exp(-ground.reach / 6)
    soil = 1 + 0.07 * grain - 0.25 * _ramp(1 + 3 * wet)
    streaks = survey.noise - np.roll(survey.noise, 2, axis=1)
    turns = ground.azimuth / (2 * np.pi) + np.zeros_like(grain)  # whole tiles fit around: no seam
    blades = _look_up(streaks, turns * 2 * len(streaks), ground.depression * 70)
    grass = 0.84 + 0.24 * blades + 0.09 * np.sin(3 * green) + 0.05 * grain
    soil_color, grass_color = _rgb(SOILS[survey.site.soil]), _rgb(_season(survey.day)[0])
    return _mix(soil[..., None] * soil_color, grass[..., None] * grass_color, _ramp(green * 8))


def _water_color(light: Array, ground: Ground, mirror: Array) -> Array:
    """The mirrored sky, broken by ripples; looking down, the deep shows through."""
    x, y, depression = ground.x, ground.y, ground.depression
    rows, columns = np.indices(x.shape)
    ripple = np.sin(5.5 * x + 2 * np.sin(2.1 * y)) + np.sin(4.1 * y + 2.3 * np.sin(1.7 * x))
    shift = 0.014 * len(mirror) * ripple * _ramp(6 * depression)
    reflected = mirror[np.clip(rows + shift, 0, len(mirror) - 1).astype(np.int32), columns]
    deep = _rgb("#1f5a6b") * light * (1 + 0.06 * ripple)[..., None]
    return _mix(deep, reflected * np.float32(0.92), 0.22 + 0.62 * np.exp(-2.2 * depression))


def _paint_lilies(survey: Survey, ground: Ground, colors: Array, ids: Array) -> None:
    rows, columns = np.nonzero((ids == WATER) & (ground.reach < LILY_RANGE))
    x, y = ground.x[rows, columns], ground.y[rows, columns]
    cx, cy, radius, turn = _lily_pads(survey, np.floor(x / LILY_CELL), np.floor(y / LILY_CELL))
    distance, angle = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx) - turn
    pad = (distance < radius) & ((np.cos(angle) < 0.93) | (distance < 0.08))
    rim = distance[pad] / radius[pad]
    shade = 0.9 + 0.12 * np.cos(9 * angle[pad]) * rim - 0.3 * (rim > 0.9)
    colors[rows[pad], columns[pad]] = shade[:, None] * _rgb("#4fae4a") * _rgb(survey.weather.light)
    ids[rows[pad], columns[pad]] = LILY


def _paint_boardwalks(survey: Survey, ground: Ground, colors: Array, ids: Array) -> None:
    for walk in survey.boardwalks:
        along, across, length = _along_and_across(walk, ground.x, ground.y)
        inside, width = (along > 0) & (along < length), np.abs(across)
        colors[inside & (width < BOARDWALK_HALF_WIDTH + 0.2)] *= 0.55
        planks = inside & (width < BOARDWALK_HALF_WIDTH)
        along, width = along[planks] / 0.22, width[planks]
        tone = 0.12 * np.sin(77.7 * np.floor(along)) - 0.45 * (along % 1 < 0.12)
        tone = 1 + tone * np.exp(-ground.reach[planks] / 9)
        tone -= 0.22 * (width > BOARDWALK_HALF_WIDTH - 0.1)
        colors[planks] = tone[:, None] * _rgb("#d39a5a") * _rgb(survey.weather.light)
        ids[planks] = BOARDWALK


def _paint_things(
    survey: Survey, east: float, north: float, heading: float, width: int
) -> tuple[Array, Array, Array]:
    """Paint upright things, far to near: premultiplied colour, opacity and label ids."""
    layer = Image.new("RGB", (width, width // 2))
    alpha, ids = Image.new("L", layer.size), Image.new("L", layer.size)
    scale = width / (2 * np.pi)
    things = [*survey.things, *_flowers(survey, east, north)]
    for distance, thing in sorted(_in_range(things, east, north), key=lambda item: -item[0]):
        azimuth = math.atan2(thing.x - east, thing.y - north)
        column = ((azimuth - heading) / (2 * math.pi) + 0.5) % 1 * width
        top = width / 4 - math.atan((thing.height - CAMERA_HEIGHT) / distance) * scale
        bottom = width / 4 + math.atan(CAMERA_HEIGHT / distance) * scale
        sprite = _fit(survey, thing, distance, bottom - top)
        for left in (column - width, column, column + width):
            corner = round(left - sprite.width / 2), round(bottom) - sprite.height
            mask = sprite.getchannel("A")
            layer.paste(sprite, corner, mask)
            alpha.paste(255, corner, mask)
            ids.paste(KINDS[thing.kind][0], corner, mask.point(lambda a: 255 * (a > 127)))
    light = _rgb(survey.weather.light)
    opacity = np.asarray(alpha, np.float32)[..., None] / 255
    return np.asarray(layer, np.float32) / 255 * light, opacity, np.asarray(ids)


def _in_range(things: list[Thing], east: float, north: float) -> Iterator[tuple[float, Thing]]:
    for thing in things:
        distance = math.hypot(thing.x - east, thing.y - north)
        if 1.2 < distance < KINDS[thing.kind][1]:
            yield distance, thing


def _flowers(survey: Survey, east: float, north: float) -> list[Thing]:
    """Flowers on some of the lily pads near the camera."""
    cells = int(KINDS["flower"][1] / LILY_CELL)
    i, j = np.mgrid[-cells : cells + 1, -cells : cells + 1]
    i, j = (i + round(east / LILY_CELL)).ravel(), (j + round(north / LILY_CELL)).ravel()
    x, y, radius, turn = _lily_pads(survey, i, j)
    blooms = (radius > 0) & (np.sin(55 * turn) > 0.55) & ~_on_boardwalks(survey, x, y, 0.1)
    return [Thing("flower", x[k], y[k], 0.32) for k in np.flatnonzero(blooms)]


def _fit(survey: Survey, thing: Thing, distance: float, height: float) -> Image.Image:
    """The sprite of a thing, scaled, and tinted by the haze between it and the camera."""
    sprite = survey.sprites[thing.kind][thing.variant]
    size = max(2, round(height * sprite.width / sprite.height)), max(2, round(height))
    sprite = sprite.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    haze = Image.new("RGB", size, survey.weather.horizon)
    haze.putalpha(sprite.getchannel("A"))
    return Image.blend(sprite, haze, survey.weather.haze * min(1, distance / RANGE))


def _taken(survey: Survey, photo: int) -> datetime:
    return survey.start + timedelta(seconds=47 * photo)


def _exif(survey: Survey, photo: int) -> bytes:
    x, y, heading = _camera(survey, photo)
    latitude = survey.site.latitude + y / 111_320
    longitude = survey.site.longitude + x / (111_320 * math.cos(math.radians(latitude)))
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Demo", "Wetland 360"
    exif[0x8769] = {0x9003: f"{_taken(survey, photo):%Y:%m:%d %H:%M:%S}"}
    exif[0x8825] = {
        1: "N" if latitude >= 0 else "S",
        2: _degrees_minutes_seconds(latitude),
        3: "E" if longitude >= 0 else "W",
        4: _degrees_minutes_seconds(longitude),
        16: "T",
        17: round(math.degrees(heading), 2) % 360,  # of the picture's middle
    }
    return exif.tobytes()


def _degrees_minutes_seconds(angle: float) -> tuple[float, float, float]:
    minutes, seconds = divmod(round(abs(angle) * 3600, 3), 60)
    degrees, minutes = divmod(minutes, 60)
    return degrees, minutes, round(seconds, 3)


def _xmp(heading: float, width: int) -> bytes:
    values = {
        "ProjectionType": "equirectangular",
        "UsePanoramaViewer": "True",
        "PoseHeadingDegrees": f"{round(math.degrees(heading), 2) % 360:.2f}",  # of the sphere's
        "CroppedAreaImageWidthPixels": width,
        "CroppedAreaImageHeightPixels": width // 2,
        "FullPanoWidthPixels": width,
        "FullPanoHeightPixels": width // 2,
        "CroppedAreaLeftPixels": 0,
        "CroppedAreaTopPixels": 0,
    }
    tags = "".join(f"<GPano:{name}>{value}</GPano:{name}>" for name, value in values.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/">'
        f'{tags}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _draw_survey(
    out_dir: Path, site_index: int, day: int, first: int, n_photos: int, width: int, seed: int
) -> list[dict[str, Any]]:
    """Write the photos of one survey day; return a truth row for each half."""
    survey = plan_survey(site_index, day, n_photos, seed)
    folder = out_dir / "panoramas" / survey.site.name / f"Day {day + 1}" / "jpg_export"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for photo in range(n_photos):
        taken = _taken(survey, photo)
        name = f"IMG_{taken:%Y%m%d_%H%M%S}_{first + photo:04d}"
        pixels, ids = draw_panorama(survey, photo, width)
        _save_jpeg(folder / f"{name}.jpg", pixels, survey, photo)
        place = {"site": survey.site.name, "day": day + 1, "taken": taken}
        for side, half in zip(("left", "right"), np.hsplit(ids, 2), strict=True):
            rows.append({"image": f"{name}_{side}.jpg", **place, **_measure(half)})
    return rows


def _save_jpeg(path: Path, pixels: Array, survey: Survey, photo: int) -> None:
    xmp = _xmp(_camera(survey, photo)[2], pixels.shape[1])
    temporary = path.with_suffix(".part")
    image = Image.fromarray(pixels)
    image.save(temporary, "JPEG", quality=88, exif=_exif(survey, photo), xmp=xmp)
    os.replace(temporary, path)


def _measure(ids: Array) -> dict[str, Any]:
    """Visible fraction of each label in a half, and whether its nearest part is close by."""
    counts = np.bincount(ids.ravel(), minlength=len(LABELS) + 1)
    measured: dict[str, Any] = {}
    for label, name in enumerate(LABELS, start=1):
        fraction = round(float(counts[label] / ids.size), 4)
        rows = np.flatnonzero((ids == label).any(axis=1))
        lowest = rows[-1] if len(rows) else 0
        elevation = (0.5 - (lowest + 1) / len(ids)) * math.pi
        measured[name] = int(fraction >= CUTS[name][0])
        measured[f"{name}_fraction"] = fraction
        measured[f"{name}_near"] = elevation < FOREGROUND_ELEVATION
    return measured


def _make_id(*parts: object) -> str:
    return "c" + hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:24]


def _feature(seed: int, image: str, *path: str) -> dict[str, Any]:
    """What an export says of every question and answer; path is the question, then the answer."""
    kept = "".join(c for c in path[-1].lower() if c.isalnum() or c == " ")
    return {
        "feature_id": _make_id(seed, image, *path),
        "feature_schema_id": _make_id(seed, "schema", *path),
        "name": path[-1],
        "value": "_".join(kept.split()),
    }


def _answer(seed: int, image: str, question: str, choice: str | list[str]) -> dict[str, Any]:
    """One choice answers a radio question, a list of choices answers a checklist."""
    is_radio = isinstance(choice, str)
    choices = [choice] if is_radio else choice
    ticked = [_feature(seed, image, question, name) | {"classifications": []} for name in choices]
    answered = {"radio_answer": ticked[0]} if is_radio else {"checklist_answers": ticked}
    return _feature(seed, image, question) | answered


def _classify(row: dict[str, Any], who: str, rng: np.random.Generator, seed: int) -> list[dict]:
    """Answer the question of each label that the half shows."""
    answers = []
    for name, forgets in zip(LABELS, rng.random(len(LABELS)) < UNGRADED_SHARE):
        passed = sum(row[f"{name}_fraction"] >= cut for cut in CUTS[name])
        if passed and not (row["pilot"] and name in ASKED_LATER):
            grade = GRADES[passed - 1]
            distance = "Foreground" if row[f"{name}_near"] else "Background"
            ticked = [distance] if forgets else [grade, distance]
            choice = grade if name.startswith("[Lvl2]") else ticked
            answers.append(_answer(seed, row["image"] + who, name, choice))
    return answers


def _misjudge(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Return what somebody else sees: every share a little larger or smaller."""
    factors = np.exp(MISJUDGED * rng.standard_normal(len(LABELS)))
    seen = zip((f"{name}_fraction" for name in LABELS), factors)
    return row | {column: row[column] * factor for column, factor in seen}


def _flag_rows(n_rows: int, seed: int) -> dict[str, list[int]]:
    """Pick distinct rows for each of the odd cases that a real export has."""
    shuffled = iter(np.random.default_rng([seed, 10_000]).permutation(n_rows).tolist())
    few = min(2, n_rows // 20)
    sizes = {"unlabelled": few, "skipped": few, "noted": min(len(NOTES), n_rows // 20)}
    sizes |= {"problematic": round(0.02 * n_rows), "revisit": round(0.03 * n_rows)}
    sizes |= {"twice": round(TWICE_SHARE * n_rows)}
    return {case: [next(shuffled) for _ in range(size)] for case, size in sizes.items()}


def _pilot_rows(n_rows: int, seed: int) -> set[int]:
    """Pick the panoramas, both halves of each, that were labelled in the pilot project."""
    order = np.random.default_rng([seed, 10_001]).permutation(n_rows // 2)
    panoramas = order[: round(PILOT_SHARE * len(order))].tolist()
    return {2 * number + side for number in panoramas for side in (0, 1)}


def _add_flags(answers: list, image: str, index: int, flags: dict[str, list], seed: int) -> None:
    if index in flags["problematic"]:
        flag = "Flag image as not useful or problematic"
        answers.append(_answer(seed, image, "Problematic", flag))
    if index in flags["revisit"]:
        answers.append(_answer(seed, image, "Revisit", "Image needs further study"))
    if index in flags["noted"]:
        note = {"content": NOTES[flags["noted"].index(index)], "classifications": []}
        answers.append(_feature(seed, image, "Extra Notes") | {"text_answer": note})


def _annotate(
    row: dict[str, Any], index: int, flags: dict[str, list], second: bool, seed: int
) -> dict[str, Any]:
    """The label of one half, as its first or its second annotator left it."""
    rng = np.random.default_rng([seed, 10_002, index, second])
    skipped, who = index in flags["skipped"], " again" if second else ""
    seen = _misjudge(row, rng) if second else row
    answers = [] if skipped else _classify(seen, who, rng, seed)
    if not second:
        _add_flags(answers, row["image"], index, flags, seed)
    labelled = row["taken"] + timedelta(days=37 if second else 30, minutes=index)
    return {
        "label_kind": "Default",
        "version": "1.0.0",
        "id": _make_id(seed, row["image"] + who, "label"),
        "label_details": {
            "created_at": f"{labelled:%Y-%m-%dT%H:%M:%S}.000+00:00",
            "created_by": f"annotator_{1 + (index // 2 + second) % 2}@example.invalid",
        },
        "performance_details": {"skipped": skipped},
        "annotations": {"objects": [], "classifications": answers, "relationships": []},
        "z_order": [],
    }


def _export_row(row: dict[str, Any], labels: list[dict], size: int, seed: int) -> str:
    image, name = row["image"], "demo_360 pilot" if row["pilot"] else "demo_360"
    url = f"https://example.invalid/{image}"
    project = {"name": name, "labels": labels, "project_tags": []}
    media = {"height": size, "width": size, "asset_type": "image", "mime_type": "image/jpeg"}
    exported = {
        "data_row": {"id": _make_id(seed, image), "external_id": image, "row_data": url},
        "media_attributes": media | {"exif_rotation": "1"},
        "projects": {_make_id(seed, "project", name): project},
    }
    return json.dumps(exported) + "\n"


def _export(rows: list[dict[str, Any]], width: int, seed: int) -> str:
    flags, pilot = _flag_rows(len(rows), seed), _pilot_rows(len(rows), seed)
    lines = []
    for index, row in enumerate(rows):
        row = row | {"pilot": index in pilot}
        times = 0 if index in flags["unlabelled"] else 1 + (index in flags["twice"])
        labels = [_annotate(row, index, flags, again > 0, seed) for again in range(times)]
        lines.append(_export_row(row, labels, width // 2, seed))
    done = [i for i in range(len(rows)) if i not in flags["unlabelled"] + flags["skipped"]]
    return "".join([*lines, lines[done[len(done) // 2]]])  # exports do repeat a row at times


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def make_demo(
    out_dir: str | Path, n_panoramas: int = 240, width: int = 1024, seed: int = 42, n_jobs: int = -1
) -> pd.DataFrame:
    """Draw the demo data set below out_dir and return its truth table.

    The same seed gives the same files, whatever n_jobs is. Raises ValueError if n_panoramas is
    below 1, or if width is below 128 or not a multiple of 16.
    """
    if n_panoramas < 1:
        raise ValueError(f"n_panoramas must be at least 1, not {n_panoramas}.")
    if width < 128 or width % 16:
        raise ValueError(f"width must be a multiple of 16 and at least 128, not {width}.")
    out_dir = Path(out_dir)
    n_surveys = len(SITES) * N_DAYS
    bounds = [n_panoramas * i // n_surveys for i in range(n_surveys + 1)]
    jobs = (
        delayed(_draw_survey)(out_dir, *divmod(i, N_DAYS), first, last - first, width, seed)
        for i, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        if last > first
    )
    rows: list[dict[str, Any]] = []
    with tqdm(total=n_panoramas, desc="Drawing panoramas", unit="photo") as progress:
        for drawn in Parallel(n_jobs=n_jobs, return_as="generator")(jobs):
            rows += drawn
            progress.update(len(drawn) // 2)
    # The next to use these workers may load torch: joblib would take that for a leak of memory.
    get_reusable_executor().shutdown()
    columns = ["image", "site", "day", *LABELS, *(f"{name}_fraction" for name in LABELS)]
    truth = pd.DataFrame(rows)[columns]
    _write_text(out_dir / "demo_360.ndjson", _export(rows, width, seed))
    _write_text(out_dir / "truth.csv", truth.to_csv(index=False, lineterminator="\n"))
    return truth


def sort_into_classes(folder: str | Path, photos: str | Path, truth: pd.DataFrame) -> None:
    """Copy the halves below `photos` into class folders, as ImageNet has them.

    Eight classes: trees or not, water or not, an overcast or a sunny sky. `folder` gets
    train/wNN/WALK/, val/wNN/WALK/ (days 4 and 9) and names.txt, a line `wNN words` per class.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    sites, truth = [site.name for site in SITES], truth.set_index("image")
    for photo in sorted(Path(photos).rglob("*.jpg")):
        row = truth.loc[photo.name]
        sunny = plan_survey(sites.index(row["site"]), int(row["day"]) - 1, 1).weather.sunny
        number = 1 + 4 * row["Trees"] + 2 * row["Water"] + sunny
        part = "val" if row["day"] in (4, 9) else "train"
        copy = temporary / part / f"w{number:02}" / f"{row['site']} {row['day']}" / photo.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, copy)
    places = ("open land", "open water", "wooded land", "wooded shore")
    words = [f"{place} {sky}" for place in places for sky in ("overcast", "sunny")]
    names = [f"w{number:02} {word}\n" for number, word in enumerate(words, start=1)]
    _write_text(temporary / "names.txt", "".join(names))
    os.replace(temporary, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="folder to write the data set to")
    parser.add_argument("--n-panoramas", type=int, default=240, help="number of photos")
    parser.add_argument("--width", type=int, default=1024, help="width of a photo in pixels")
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random")
    arguments = parser.parse_args()
    try:
        make_demo(arguments.out_dir, arguments.n_panoramas, arguments.width, arguments.seed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
