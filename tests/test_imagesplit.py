"""The split of panoramas into halves: nothing lost, nothing half-written."""

import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffImagePlugin

from demo_360 import draw_panorama, plan_survey

BASE, GPS, IFD = ExifTags.Base, ExifTags.GPS, ExifTags.IFD
TABLES = {  # a coarse and a fine table, unlike any that a quality setting gives
    0: [3 + i // 3 for i in range(64)],
    1: [5 + i // 2 for i in range(64)],
}


@pytest.fixture(scope="module")
def nb(notebook_functions):
    return notebook_functions("imagesplit")


def scene(width: int = 512, height: int = 256, mode: str = "RGB") -> Image.Image:
    """A picture like a photo: textured light and dark, colours that change more slowly."""
    rng = np.random.default_rng(0)

    def plane(cell: int, low: int, high: int, grain: float) -> Image.Image:
        shape = (height // cell + 2, width // cell + 2)
        coarse = Image.fromarray(rng.integers(low, high, shape, dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
        pixels += rng.normal(0, grain, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    planes = [plane(16, 40, 216, 3), plane(64, 90, 166, 0), plane(64, 90, 166, 0)]
    return Image.merge("YCbCr", planes).convert("RGB").convert(mode)


def gpano(heading: float, width: int, form: str) -> bytes:
    """An XMP packet as cameras write it: GPano values as attributes or as elements."""
    values = {
        "ProjectionType": "equirectangular",
        "PoseHeadingDegrees": heading,
        "CroppedAreaImageWidthPixels": width,
        "CroppedAreaImageHeightPixels": width // 2,
        "FullPanoWidthPixels": width,
        "CroppedAreaLeftPixels": 0,
    }
    inside = ""
    if form == "attribute":
        attributes = "".join(f' GPano:{name}="{value}"' for name, value in values.items())
    else:
        attributes = ""
        inside = "".join(f"<GPano:{n}>{v}</GPano:{n}>\n" for n, v in values.items())
    space = 'xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"'
    description = f"<rdf:Description {space}{attributes}>{inside}</rdf:Description>"
    rdf = 'rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
    packet = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><{rdf}>{description}</rdf:RDF></x:xmpmeta>"
    return packet.encode()


def xmp_value(path: Path, name: str) -> float:
    with Image.open(path) as image:
        found = re.search(rf"GPano:{name}(?:=\"|>)([^\"<]+)".encode(), image.info["xmp"])
    return float(found[1])


def write_panorama(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or scene()).save(path, "JPEG", **{"quality": 88, **options})
    return path


def split(nb, tmp_path: Path, path: Path) -> tuple[Path, Path]:
    """Split a panorama below tmp_path/in into tmp_path/out and return its halves."""
    assert nb.split_panorama(path, tmp_path / "in", tmp_path / "out") == ("written", "")
    left, right = nb.half_paths(path, tmp_path / "in", tmp_path / "out")
    return left, right


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def psnr(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-12))


# ---------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("A.jpg", "A"),
        ("site/Day 1/jpg_export/IMG_1.JPG", "site/Day 1/jpg_export/IMG_1"),
        ("x/y.z/GS.01.jpeg", "x/y.z/GS.01"),
    ],
)
def test_nested_folders_and_all_common_names_are_kept(nb, tmp_path, name, stem):
    path = write_panorama(tmp_path / "in" / name)
    split(nb, tmp_path, path)
    assert files(tmp_path / "out") == {f"{stem}_left.jpg", f"{stem}_right.jpg"}
    assert files(tmp_path / "in") == {name}


def test_folders_may_be_given_as_text(nb, tmp_path, monkeypatch):
    write_panorama(tmp_path / "in" / "a" / "A.jpg")
    monkeypatch.chdir(tmp_path)
    assert nb.split_panorama(Path("in/a/A.jpg"), "in", "out") == ("written", "")
    assert files(tmp_path / "out") == {"a/A_left.jpg", "a/A_right.jpg"}


def test_odd_width_loses_no_column(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg", scene(255, 128), quality=95)
    left, right = (Image.open(half) for half in split(nb, tmp_path, path))
    assert left.size == (127, 128) and right.size == (128, 128)
    joined = np.hstack([np.asarray(left), np.asarray(right)])
    assert psnr(Image.fromarray(joined), Image.open(path)) > 35


# ---------------------------------------------------------------- pixels


KINDS = {
    "4:4:4": ("RGB", {"subsampling": 0}, 0),
    "4:2:2": ("RGB", {"subsampling": 1}, 1),
    "4:2:0": ("RGB", {"subsampling": 2}, 2),
    "grey": ("L", {}, -1),
    "CMYK": ("CMYK", {}, -1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantisation", [{"qtables": TABLES}, {"quality": 75}, {"quality": 96}])
def test_tables_subsampling_and_pixels_are_kept(nb, tmp_path, kind, quantisation):
    mode, options, sampling = KINDS[kind]
    options = options | quantisation
    if mode == "L" and "qtables" in options:
        options["qtables"] = {0: TABLES[0]}
    path = tmp_path / "in" / "A.jpg"
    path.parent.mkdir()
    scene(512, 256, mode).save(path, "JPEG", **options)
    halves = split(nb, tmp_path, path)
    with Image.open(path) as whole:
        assert JpegImagePlugin.get_sampling(whole) == sampling
        for half, box in zip(halves, [(0, 0, 256, 256), (256, 0, 512, 256)]):
            with Image.open(half) as found:
                assert found.mode == mode and found.size == (256, 256)
                assert found.quantization == whole.quantization
                assert JpegImagePlugin.get_sampling(found) == sampling
                # the cut at 256 lies on a block boundary
                assert psnr(found, whole.crop(box)) >= 50


@pytest.mark.parametrize("quality", [75, 88, 94])
@pytest.mark.parametrize(("site", "day"), [(0, 0), (4, 2)])
def test_hard_edges_between_bright_colours_are_kept_with_subsampled_colour(
    nb, tmp_path, site, day, quality
):
    pixels = draw_panorama(plan_survey(site, day, 2, seed=1), 1, width=512)[0]
    path = write_panorama(tmp_path / "in" / "A.jpg", Image.fromarray(pixels), quality=quality)
    for half, box in zip(split(nb, tmp_path, path), [(0, 0, 256, 256), (256, 0, 512, 256)]):
        with Image.open(path) as whole:
            assert JpegImagePlugin.get_sampling(whole) == 2
            assert psnr(Image.open(half), whole.convert("RGB").crop(box)) >= 50


def test_a_plain_save_loses_what_the_split_keeps(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg", quality=92)
    left, _ = split(nb, tmp_path, path)
    original = nb.cut_halves(Image.open(path).convert("RGB"))[0]
    plain = io.BytesIO()
    original.save(plain, "JPEG")
    kept = nb.psnr(original, Image.open(left))
    assert kept >= 50 and kept > nb.psnr(original, Image.open(plain)) + 8


def test_photo_stored_as_rgb_is_split_too(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg", keep_rgb=True, subsampling=0)
    left, right = (Image.open(half) for half in split(nb, tmp_path, path))
    with Image.open(path) as whole:
        assert psnr(left, whole.crop((0, 0, 256, 256))) > 35
        assert psnr(right, whole.crop((256, 0, 512, 256))) > 35


def test_several_pictures_in_one_file_are_no_obstacle(nb, tmp_path):
    path = tmp_path / "in" / "A.jpg"
    path.parent.mkdir()
    scene().save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 32))])
    assert Image.open(path).format == "MPO"
    left, right = (Image.open(half) for half in split(nb, tmp_path, path))
    assert left.format == "JPEG" and left.size == right.size == (256, 256)


# ---------------------------------------------------------------- metadata


def write_with_metadata(path: Path, heading: float = 30.0, **options: object) -> Path:
    exif = Image.Exif()
    exif[BASE.Make], exif[BASE.Model] = "Maker", "Model 360"
    exif[IFD.Exif] = {BASE.DateTimeOriginal: "2024:05:03 10:11:12", BASE.ExifImageWidth: 512}
    exif[IFD.Exif][BASE.ExifImageHeight] = 256
    exif[IFD.GPSInfo] = {
        GPS.GPSLatitudeRef: "S",
        GPS.GPSLatitude: (33.0, 51.0, 25.5),
        GPS.GPSLongitudeRef: "E",
        GPS.GPSLongitude: (151.0, 12.0, 40.25),
        GPS.GPSImgDirectionRef: "T",
        GPS.GPSImgDirection: TiffImagePlugin.IFDRational(round(heading * 100), 100),
    }
    return write_panorama(path, exif=exif, **options)


def test_exif_place_and_colour_profile_are_kept(nb, tmp_path):
    profile = b"a colour profile " * 20
    path = write_with_metadata(tmp_path / "in" / "A.jpg", icc_profile=profile)
    for half in split(nb, tmp_path, path):
        with Image.open(half) as image:
            assert image.info["icc_profile"] == profile
            exif = image.getexif()
        assert (exif[BASE.Make], exif[BASE.Model]) == ("Maker", "Model 360")
        details, gps = exif.get_ifd(IFD.Exif), exif.get_ifd(IFD.GPSInfo)
        assert details[BASE.DateTimeOriginal] == "2024:05:03 10:11:12"
        assert (details[BASE.ExifImageWidth], details[BASE.ExifImageHeight]) == (256, 256)
        assert (gps[GPS.GPSLatitudeRef], gps[GPS.GPSLongitudeRef]) == ("S", "E")
        assert tuple(map(float, gps[GPS.GPSLatitude])) == pytest.approx((33, 51, 25.5))
        assert tuple(map(float, gps[GPS.GPSLongitude])) == pytest.approx((151, 12, 40.25))
        assert gps[GPS.GPSImgDirectionRef] == "T"


HEADINGS = [
    (30, 300, 120),
    (90, 0, 180),
    (0, 270, 90),
    (300.25, 210.25, 30.25),
    (359.5, 269.5, 89.5),
]


@pytest.mark.parametrize("form", ["attribute", "element"])
@pytest.mark.parametrize(("heading", "left", "right"), HEADINGS)
def test_headings_are_turned_in_exif_and_xmp(nb, tmp_path, form, heading, left, right):
    xmp = gpano(heading, 512, form)
    path = write_with_metadata(tmp_path / "in" / "A.jpg", heading, xmp=xmp)
    for half, expected, start in zip(split(nb, tmp_path, path), (left, right), (0, 256)):
        with Image.open(half) as image:
            gps = image.getexif().get_ifd(IFD.GPSInfo)
            assert b"equirectangular" in image.info["xmp"]
        assert float(gps[GPS.GPSImgDirection]) == pytest.approx(expected, abs=1e-3)
        assert xmp_value(half, "PoseHeadingDegrees") == pytest.approx(expected, abs=1e-3)
        assert xmp_value(half, "CroppedAreaLeftPixels") == start
        assert xmp_value(half, "CroppedAreaImageWidthPixels") == 256
        assert xmp_value(half, "CroppedAreaImageHeightPixels") == 256
        assert xmp_value(half, "FullPanoWidthPixels") == 512


def test_other_xmp_is_left_alone_and_missing_metadata_stays_missing(nb, tmp_path):
    note = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>heading 30, no GPano</x:xmpmeta>"
    for half in split(nb, tmp_path, write_panorama(tmp_path / "in" / "A.jpg", xmp=note)):
        assert Image.open(half).info["xmp"] == note
    for half in split(nb, tmp_path, write_panorama(tmp_path / "in" / "B.jpg")):
        with Image.open(half) as image:
            assert not image.info.get("xmp") and not image.info.get("icc_profile")
            assert GPS.GPSImgDirection not in image.getexif().get_ifd(IFD.GPSInfo)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(nb, tmp_path, orientation):
    upright = scene()
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = upright
    for method in undo:
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[BASE.Orientation] = orientation
    path = write_panorama(tmp_path / "in" / "A.jpg", stored, exif=exif, quality=95)
    assert nb.read_size(path) == (512, 256, "")
    boxes = [(0, 0, 256, 256), (256, 0, 512, 256)]
    for half, box in zip(split(nb, tmp_path, path), boxes):
        with Image.open(half) as image:
            assert image.getexif().get(BASE.Orientation, 1) == 1
            seen = ImageOps.exif_transpose(image)
        assert psnr(seen, upright.crop(box)) > 33


def test_size_survey_names_what_cannot_be_read(nb, tmp_path):
    path = tmp_path / "A.jpg"
    path.write_text("no picture")
    width, height, problem = nb.read_size(path)
    assert (width, height) == (0, 0) and "cannot be read" in problem


# ---------------------------------------------------------------- failures and restarts


@pytest.mark.parametrize("kept", [0, 200, 0.5, 0.95])
def test_truncated_file_fails_with_its_name_and_leaves_nothing(nb, tmp_path, kept):
    path = write_panorama(tmp_path / "in" / "a" / "Broken.jpg")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed"
    assert "Broken.jpg" in reason
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_other_format_under_a_jpeg_name_fails_with_its_name(nb, tmp_path):
    path = tmp_path / "in" / "Disguised.jpg"
    path.parent.mkdir()
    scene().save(path, "PNG")
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed" and "Disguised.jpg" in reason
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_missing_file_fails_with_its_name(nb, tmp_path):
    path = tmp_path / "in" / "Gone.jpg"
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed" and "Gone.jpg" in reason


def test_failed_write_leaves_no_temporary_file_and_the_old_half(nb, tmp_path, monkeypatch):
    target = tmp_path / "A_left.jpg"
    nb.save_jpeg(scene(), target, quality=80)
    before = target.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        nb.save_jpeg(scene(), target, quality=10)
    assert files(tmp_path) == {"A_left.jpg"} and target.read_bytes() == before


def test_second_run_keeps_what_is_done(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    halves = split(nb, tmp_path, path)
    before = [(half.stat().st_mtime_ns, half.read_bytes()) for half in halves]
    assert nb.split_panorama(path, tmp_path / "in", tmp_path / "out") == ("kept", "")
    assert [(half.stat().st_mtime_ns, half.read_bytes()) for half in halves] == before


@pytest.mark.parametrize("side", [0, 1])
def test_missing_half_is_made_again(nb, tmp_path, side):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    halves = split(nb, tmp_path, path)
    halves[side].unlink()
    split(nb, tmp_path, path)
    assert all(half.exists() for half in halves)


def test_changed_panorama_is_split_again(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    left, _ = split(nb, tmp_path, path)
    write_panorama(path, Image.new("RGB", (512, 256), "white"))
    later = left.stat().st_mtime + 5
    os.utime(path, (later, later))
    split(nb, tmp_path, path)
    assert np.asarray(Image.open(left)).min() > 250


KILL_SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from unittest.mock import MagicMock

tests, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, tests)
for slow in ("matplotlib_inline", "matplotlib_inline.backend_inline", "demo_360"):
    sys.modules[slow] = MagicMock()  # splitting does without them
from conftest import load_notebook_functions

nb = load_notebook_functions("imagesplit")
paths = sorted((folder / "in").rglob("*.jpg"))
rng = random.Random(0)
for _ in range(kills):
    child = os.fork()
    if not child:
        while True:
            for path in paths:
                for half in nb.half_paths(path, folder / "in", folder / "out"):
                    half.unlink(missing_ok=True)
                nb.split_panorama(path, folder / "in", folder / "out")
    time.sleep(rng.uniform(0.02, 0.12))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for half in (folder / "out").rglob("*.jpg"):
        if not half.name.startswith("."):
            nb.Image.open(half).load()  # raises if it is half a file
            print("whole", half.name, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_process_never_leaves_a_half_written_file_under_its_final_name(nb, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 2048, 3), dtype=np.uint8)
    for name in ("A", "B", "C"):
        write_panorama(tmp_path / "in" / f"{name}.jpg", Image.fromarray(noise))
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILL_SCRIPT, tests, str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("whole") >= 10  # it was killed at work and not before it
    for path in sorted((tmp_path / "in").glob("*.jpg")):  # and the next run completes the work
        status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
        assert status in ("written", "kept"), reason
    finished = {p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")}
    assert finished == {f"{name}_{side}.jpg" for name in "ABC" for side in ("left", "right")}


def test_order_of_panoramas_does_not_matter(nb, tmp_path):
    names = [f"{i}.jpg" for i in range(4)]
    for i, name in enumerate(names):
        write_panorama(tmp_path / "in" / name, scene().point(lambda v, i=i: v // (i + 1)))
    results = []
    for seed in (0, 1):
        out = tmp_path / f"out {seed}"
        for name in random.Random(seed).sample(names, 4):
            nb.split_panorama(tmp_path / "in" / name, tmp_path / "in", out)
        results.append({name: (out / name).read_bytes() for name in files(out)})
    assert results[0] == results[1] and len(results[0]) == 8
