"""Where a photo was taken, as its EXIF block says, and how that reaches a map."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import ExifTags, Image
from test_imagesplit import rational, raw_exif

GPS = ExifTags.GPS


@pytest.fixture(scope="module")
def nb(notebook_functions):
    return notebook_functions("survey")


def position(nb, tmp_path, exif: object) -> tuple[float, float] | None:
    Image.new("RGB", (64, 32)).save(tmp_path / "A.jpg", exif=exif)
    east, north, *_ = nb.read_place(str(tmp_path / "A.jpg"))
    return None if np.isnan([east, north]).all() else (east, north)


def place(
    latitude: object, longitude: object, north: object = "N", east: object = "E"
) -> Image.Exif:
    exif = Image.Exif()
    tags = {GPS.GPSLatitudeRef: north, GPS.GPSLatitude: latitude}
    tags |= {GPS.GPSLongitudeRef: east, GPS.GPSLongitude: longitude}
    exif[ExifTags.IFD.GPSInfo] = {tag: value for tag, value in tags.items() if value is not None}
    return exif


def raw_place(south: bytes, west: bytes, kind: int = 2) -> bytes:
    """33° 30' and 70° 30' with letters in bytes, of a type that Pillow would not write."""
    latitude, longitude = (rational(d, 1, 30, 1, 0, 1) for d in (33, 70))
    letters = [(1, kind, len(south), south), (3, kind, len(west), west)]
    return raw_exif([], sorted([*letters, (2, 5, 3, latitude), (4, 5, 3, longitude)]))


@pytest.mark.parametrize("kind", [1, 2, 7])
@pytest.mark.parametrize("form", ["{}\0", "{}", "{}\0\0", "{} \0", " {}\0"])
@pytest.mark.parametrize("change", [str.upper, str.lower])
def test_letter_of_the_hemisphere_is_read_in_every_form(nb, tmp_path, kind, form, change):
    south, west = (change(form.format(letter)).encode() for letter in "SW")
    assert position(nb, tmp_path, raw_place(south, west, kind)) == (-70.5, -33.5)
    north, east = (change(form.format(letter)).encode() for letter in "NE")
    assert position(nb, tmp_path, raw_place(north, east, kind)) == (70.5, 33.5)


@pytest.mark.parametrize(
    "letters", [(b"X\0", b"W\0"), (b"S\0", b"\0\0"), (b"W\0", b"S\0"), (b"?", b"O")]
)
def test_unknown_letter_is_no_place(nb, tmp_path, letters):
    assert position(nb, tmp_path, raw_place(*letters)) is None


def test_decimal_degrees_are_read(nb, tmp_path):
    assert position(nb, tmp_path, place((33.5, 0.0, 0.0), (70.25, 0.0, 0.0), "S", "E")) == (
        70.25,
        -33.5,
    )
    assert position(nb, tmp_path, place(33.5, 70.25, "S", "E")) == (70.25, -33.5)
    assert position(nb, tmp_path, place((33.5,), (70.25,), "N", "W")) == (-70.25, 33.5)
    text = [(1, 2, 2, b"S\0"), (2, 2, 5, b"33.5\0"), (3, 2, 2, b"W\0"), (4, 2, 6, b"70.25\0")]
    assert position(nb, tmp_path, raw_exif([], text)) == (-70.25, -33.5)


def test_without_letters_a_sign_is_needed(nb, tmp_path):
    assert position(nb, tmp_path, place((33.5, 0.0, 0.0), (70.25, 0.0, 0.0), None, None)) is None
    signed = [(2, 10, 1, rational(2**32 - 67, 2)), (4, 10, 1, rational(2**32 - 141, 2))]
    assert position(nb, tmp_path, raw_exif([], signed)) == (-70.5, -33.5)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [
        ((0.0,) * 3, (0.0,) * 3),  # a camera without a fix
        ((95.0, 0.0, 0.0), (10.0, 0.0, 0.0)),
        ((50.0, 0.0, 0.0), (370.0, 0.0, 0.0)),
        ((90.0, 0.0, 1.0), (10.0, 0.0, 0.0)),
        ((50.0, 0.0, 0.0), None),
        (None, None),
    ],
)
def test_what_is_no_place_on_earth_is_none(nb, tmp_path, latitude, longitude):
    assert position(nb, tmp_path, place(latitude, longitude)) is None


def test_zero_divided_by_zero_is_no_place(nb, tmp_path):
    latitude, longitude = rational(*[0, 0] * 3), rational(10, 1, 0, 1, 0, 1)
    tags = [(1, 2, 2, b"N\0"), (2, 5, 3, latitude), (3, 2, 2, b"E\0"), (4, 5, 3, longitude)]
    assert position(nb, tmp_path, raw_exif([], tags)) is None


def test_the_equator_and_the_prime_meridian_are_places(nb, tmp_path):
    assert position(nb, tmp_path, place((0.0,) * 3, (10.0, 0.0, 0.0))) == (10, 0)
    assert position(nb, tmp_path, place((51.0, 0.0, 0.0), (0.0,) * 3)) == (0, 51)
    assert position(nb, tmp_path, place((90.0, 0.0, 0.0), (180.0, 0.0, 0.0), "S", "W")) == (
        -180,
        -90,
    )


@pytest.mark.parametrize("block", [b"Exif\0\0II*\0", b"Exif\0\0garbage", b"Exif\0\0" + bytes(40)])
def test_wrong_exif_and_files_that_cannot_be_read_have_no_place(nb, tmp_path, block):
    assert position(nb, tmp_path, block) is None
    (tmp_path / "B.jpg").write_text("no picture")
    assert np.isnan(nb.read_place(str(tmp_path / "B.jpg"))[:2]).all()


def test_nan_never_reaches_the_map(nb):
    table = pd.DataFrame({"image": ["A.jpg", "B.jpg", "C.jpg"], "Grass": [0, 1, np.nan]})
    table["Grass_prob"] = [float("nan"), 0.75, float("inf")]
    places = [(7.5, 51.5), (float("nan"), 51.5), (7.5, 51.5)]
    text = json.dumps(nb.to_geojson(table, places, ["Grass"]), allow_nan=False)
    found = [feature["properties"] for feature in json.loads(text)["features"]]
    assert [row["image"] for row in found] == ["A.jpg", "C.jpg"]
    assert [row["Grass"] for row in found] == [None, None]
