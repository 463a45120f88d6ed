"""The split of panoramas into halves: nothing lost, nothing half-written."""

import io
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

from data_utils import open_image
from demo_360 import draw_panorama, plan_survey

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageOps, JpegImagePlugin, TiffImagePlugin

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
def test_exif_heading_turns_and_that_of_the_sphere_stays(nb, tmp_path, form, heading, left, right):
    xmp = gpano(heading, 512, form)
    path = write_with_metadata(tmp_path / "in" / "A.jpg", heading, xmp=xmp)
    for half, expected, start in zip(split(nb, tmp_path, path), (left, right), (0, 256)):
        with Image.open(half) as image:
            gps = image.getexif().get_ifd(IFD.GPSInfo)
            assert b"equirectangular" in image.info["xmp"]
        assert float(gps[GPS.GPSImgDirection]) == pytest.approx(expected, abs=1e-3)
        assert xmp_value(half, "PoseHeadingDegrees") == heading
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
start = time.perf_counter()
nb.split_panorama(paths[0], folder / "in", folder / "out")
seconds = time.perf_counter() - start  # more on a busy machine
for _ in range(kills):
    child = os.fork()
    if not child:
        while True:
            for path in paths:
                for half in nb.half_paths(path, folder / "in", folder / "out"):
                    half.unlink(missing_ok=True)
                nb.split_panorama(path, folder / "in", folder / "out")
    time.sleep(rng.uniform(0.4, 2.4) * seconds)
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


# ---------------------------------------------------------------- headings and parts of a sphere


NAMESPACE = "http://ns.google.com/photos/1.0/panorama/"


def packet(form: str = '"', prefix: str = "GPano", **values: object) -> bytes:
    """An XMP packet with GPano values: in double or single quotes, or as elements."""
    space = f'xmlns:{prefix}="{NAMESPACE}"'
    inside = attributes = ""
    if form in ("'", '"'):
        attributes = " ".join(f"{prefix}:{n}={form}{v}{form}" for n, v in values.items())
    elif form == "element":
        inside = "".join(f"<{prefix}:{n}>{v}</{prefix}:{n}>\n" for n, v in values.items())
    else:  # each element declares the prefix for itself
        inside = "".join(f"<{prefix}:{n} {space}>{v}</{prefix}:{n}>" for n, v in values.items())
    about = f'<rdf:Description rdf:about="" {space if form != "local" else ""} {attributes}>'
    rdf = '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    end = "</rdf:Description></rdf:RDF></x:xmpmeta>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}{about}{inside}{end}'.encode()


def read_gpano(xmp: bytes, prefix: str = "GPano") -> dict[str, str]:
    pattern = rf"(?<!/){prefix}:(\w+)(?:=[\"']| xmlns[^>]*>|>)([^<>\"']*)"
    return dict(re.findall(pattern, xmp.decode()))


def seen_at(tags: dict[str, str], size: tuple[int, int], column: float) -> float:
    """The compass direction in which Photo Sphere Viewer shows a column of a picture.

    `mergePanoData` (packages/core/src/utils/psv.ts) fills in what is missing, and
    `textureCoordsToSphericalCoords` (EquirectangularAdapter.ts) puts the middle of the full sphere
    at yaw 0: yaw = (column + croppedX) / fullWidth * 360 - 180, plus PoseHeadingDegrees.
    """
    number = {n: float(v) for n, v in tags.items() if re.fullmatch(r"-?[\d.]+", v)}
    full = number.get("FullPanoWidthPixels") or 2 * number.get("FullPanoHeightPixels", 0)
    full = full or max(size[0], 2 * size[1])
    left = number.get("CroppedAreaLeftPixels", round((full - size[0]) / 2))
    left = max(0, full - size[0] if left + size[0] > full else left)
    return ((column + left) / full * 360 - 180 + number.get("PoseHeadingDegrees", 0)) % 360


WHOLE = {"CroppedAreaLeftPixels": 0, "CroppedAreaImageWidthPixels": 512, "FullPanoWidthPixels": 512}
PART = {"CroppedAreaLeftPixels": 300, "CroppedAreaImageWidthPixels": 512}
PART |= {"FullPanoWidthPixels": 1024, "FullPanoHeightPixels": 512, "CroppedAreaTopPixels": 90}
SPHERES = {  # GPano tags of a picture of 512 x 256 px
    "whole": {"PoseHeadingDegrees": 100, **WHOLE},
    "whole, no heading": WHOLE,
    "a part": {"PoseHeadingDegrees": 33.5, **PART},
    "the right end": {"PoseHeadingDegrees": 350, **PART, "CroppedAreaLeftPixels": 512},
    "projection only": {"ProjectionType": "equirectangular", "UsePanoramaViewer": "True"},
    "heading only": {"PoseHeadingDegrees": "0.0"},
    "full width only": {"PoseHeadingDegrees": 10, "FullPanoWidthPixels": 2048},
    "full height only": {"PoseHeadingDegrees": 10, "FullPanoHeightPixels": 512},
    "no left edge": {
        "PoseHeadingDegrees": 10,
        **{k: v for k, v in PART.items() if "Left" not in k},
    },
    "a left edge beyond the sphere": {"CroppedAreaLeftPixels": 900, "FullPanoWidthPixels": 1024},
    "empty values": {
        "PoseHeadingDegrees": 7,
        "FullPanoWidthPixels": "",
        "CroppedAreaLeftPixels": "",
    },
    "zeros": {"PoseHeadingDegrees": 7, "FullPanoWidthPixels": 0, "FullPanoHeightPixels": 0},
}


@pytest.mark.parametrize("form", ['"', "'", "element", "local"])
@pytest.mark.parametrize("kind", SPHERES)
def test_a_viewer_shows_each_half_where_it_showed_it_in_the_panorama(nb, tmp_path, kind, form):
    values = {n: str(v) for n, v in SPHERES[kind].items()}
    path = write_panorama(tmp_path / "in" / "A.jpg", xmp=packet(form, **SPHERES[kind]))
    for half, start in zip(split(nb, tmp_path, path), (0, 256)):
        tags = read_gpano(Image.open(half).info["xmp"])
        for column in (0, 100, 128, 256):
            expected = seen_at(values, (512, 256), start + column)
            difference = (seen_at(tags, (256, 256), column) - expected + 180) % 360 - 180
            assert abs(difference) < 0.001, (kind, start, column)
        assert tags.get("PoseHeadingDegrees") == values.get("PoseHeadingDegrees")
        assert int(tags["CroppedAreaImageWidthPixels"]) == 256 < int(tags["FullPanoWidthPixels"])
        assert int(tags["CroppedAreaImageHeightPixels"]) == 256 <= int(tags["FullPanoHeightPixels"])
        assert {"CroppedAreaLeftPixels", "CroppedAreaTopPixels"} <= tags.keys()


@pytest.mark.parametrize(
    ("values", "turn"),
    [
        (WHOLE, 90),
        ({"ProjectionType": "equirectangular"}, 90),
        (PART, 45),
        ({"FullPanoWidthPixels": 2048}, 22.5),
        ({"CroppedAreaImageWidthPixels": 5120, "FullPanoWidthPixels": 10240}, 45),  # scaled down
    ],
)
def test_exif_heading_turns_by_the_angle_that_the_picture_covers(nb, tmp_path, values, turn):
    path = write_with_metadata(tmp_path / "in" / "A.jpg", 30, xmp=packet(**values))
    for half, sign in zip(split(nb, tmp_path, path), (-1, 1)):
        heading = Image.open(half).getexif().get_ifd(IFD.GPSInfo)[GPS.GPSImgDirection]
        assert float(heading) == pytest.approx((30 + sign * turn) % 360)


def test_tags_of_a_scaled_file_count_its_own_pixels(nb, tmp_path):
    values = {"FullPanoWidthPixels": 20480, "FullPanoHeightPixels": 10240}
    values |= {"CroppedAreaImageWidthPixels": 5120, "CroppedAreaImageHeightPixels": 2560}
    values |= {"CroppedAreaLeftPixels": 1000, "CroppedAreaTopPixels": 500}
    path = write_panorama(tmp_path / "in" / "A.jpg", xmp=packet(**values))
    for half, left in zip(split(nb, tmp_path, path), (100, 356)):
        tags = {n: int(v) for n, v in read_gpano(Image.open(half).info["xmp"]).items()}
        assert (tags["FullPanoWidthPixels"], tags["FullPanoHeightPixels"]) == (2048, 1024)
        assert (tags["CroppedAreaLeftPixels"], tags["CroppedAreaTopPixels"]) == (left, 50)


def test_odd_width_turns_each_half_by_its_own_angle(nb, tmp_path):
    path = write_with_metadata(tmp_path / "in" / "A.jpg", 100, image=scene(255, 128))
    for half, columns in zip(split(nb, tmp_path, path), (-64, 63.5)):
        heading = Image.open(half).getexif().get_ifd(IFD.GPSInfo)[GPS.GPSImgDirection]
        assert float(heading) == pytest.approx((100 + columns / 256 * 360) % 360, abs=1e-3)


def test_heading_of_a_photo_of_unknown_angle_is_left_out_by_name(nb, tmp_path):
    path = write_with_metadata(tmp_path / "in" / "A.jpg", 30, image=scene(400, 300))
    result = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert result == ("written", "EXIF GPSImgDirection")
    gps = Image.open(tmp_path / "out/A_left.jpg").getexif().get_ifd(IFD.GPSInfo)
    assert GPS.GPSImgDirection not in gps and gps[GPS.GPSLatitudeRef] == "S"


def test_initial_view_stays_and_what_depends_on_the_cut_is_left_out_by_name(nb, tmp_path):
    values = {
        "InitialViewHeadingDegrees": 77,
        "PosePitchDegrees": 1.5,
        "StitchingSoftware": "S &amp; T",
    }
    xmp = packet(
        **values, **WHOLE, LargestValidInteriorRectLeft=0, LargestValidInteriorRectWidth=512
    )
    path = write_panorama(tmp_path / "in" / "A.jpg", xmp=xmp)
    status, lost = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "written" and "LargestValidInteriorRectLeft" in lost
    tags = read_gpano(Image.open(tmp_path / "out/A_right.jpg").info["xmp"])
    assert tags.items() >= {n: str(v) for n, v in values.items()}.items()
    assert not [name for name in tags if name.startswith("Largest")]


def test_another_prefix_and_other_namespaces_are_understood(nb, tmp_path):
    xmp = packet(prefix="ns1", ProjectionType="equirectangular", PoseHeadingDegrees=5)
    more = b' xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6" tiff:Make="M" '
    xmp = xmp.replace(b' rdf:about=""', b' rdf:about=""' + more)
    path = write_panorama(tmp_path / "in" / "A.jpg", xmp=xmp)
    for half, left in zip(split(nb, tmp_path, path), ("0", "256")):
        found = Image.open(half).info["xmp"]
        assert read_gpano(found, "ns1")["CroppedAreaLeftPixels"] == left
        assert b'tiff:Orientation="1"' in found and b'tiff:Make="M"' in found


# ---------------------------------------------------------------- metadata that is wrong


def raw_exif(main: list = (), gps: list = (), order: str = "<", end: bytes = b"") -> bytes:
    """An EXIF block from (tag, type, count, value in bytes); `end` follows all of it."""
    main = [*main, (0x8825, 4, 1, None)] if gps else [*main]
    start, later = 8, b""
    tables = [main, list(gps)] if gps else [main]
    sizes = [2 + 12 * len(entries) + 4 for entries in tables]
    body, place = b"", start + sum(sizes)
    for entries in tables:
        body += struct.pack(order + "H", len(entries))
        for tag, kind, count, value in entries:
            value = struct.pack(order + "I", start + sizes[0]) if value is None else value
            if len(value) > 4:
                place_of_value = struct.pack(order + "I", place + len(later))
                later, value = later + value, place_of_value
            body += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
        body += bytes(4)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return b"Exif\0\0" + head + body + later + end


def rational(*numbers: int, order: str = "<") -> bytes:
    return struct.pack(f"{order}{len(numbers)}I", *numbers)


MAKE, NORTH = (0x010F, 2, 6, b"Maker\0"), (1, 2, 2, b"N\0")
DIRECTION = (17, 5, 1, rational(100, 1))
SOUND = raw_exif([MAKE], [NORTH, DIRECTION])
BROKEN_EXIF = {  # the block, and what is said about it
    "empty": (b"Exif\0\0", ""),
    "cut off in its header": (b"Exif\0\0II*\0", "EXIF block"),
    "garbage": (b"Exif\0\0garbagegarbage", "EXIF block"),
    "zeros": (b"Exif\0\0" + bytes(60), "EXIF block"),
    "cut off in its directory": (SOUND[:20], "EXIF block"),
    "cut off in its GPS directory": (SOUND[:52], "EXIF GPSInfo"),
    "first directory far outside": (b"Exif\0\0II*\0" + rational(9_999_999), "EXIF block"),
    "65 535 entries": (b"Exif\0\0II*\0" + rational(8) + b"\xff\xff" + bytes(40), "EXIF block"),
    "a directory that names itself": (raw_exif([(0x8825, 4, 1, rational(8)), MAKE]), ""),
    "zero denominator": (raw_exif([MAKE], [(17, 5, 1, rational(100, 0))]), "EXIF GPSImgDirection"),
    "heading as text": (raw_exif([MAKE], [(17, 2, 4, b"100\0")]), "EXIF GPSImgDirection"),
    "heading that is no number": (
        raw_exif([MAKE], [(17, 12, 1, struct.pack("<d", float("nan")))]),
        "EXIF GPSImgDirection",
    ),
    "heading of an unknown type": (raw_exif([MAKE], [(17, 99, 1, rational(1))]), None),
    "altitude reference as text": (raw_exif([MAKE], [(5, 2, 2, b"0\0")]), ""),
    "version as text": (raw_exif([MAKE], [(0, 2, 4, b"2.3\0")]), ""),
    "latitude with zero denominators": (raw_exif([MAKE], [(2, 5, 3, rational(*[0] * 6))]), ""),
    "place as text": (raw_exif([MAKE], [(2, 2, 6, b"33.5 S"), (4, 2, 4, b"70 W")]), ""),
    "GPS pointer as text": (raw_exif([MAKE, (0x8825, 2, 4, b"abc\0")]), "EXIF GPSInfo"),
    "orientation as text": (raw_exif([MAKE, (0x0112, 2, 2, b"6\0")]), ""),
    "orientation 77": (raw_exif([MAKE, (0x0112, 3, 1, b"\x4d\0")]), ""),
    "orientation 0": (raw_exif([MAKE, (0x0112, 3, 1, b"\0\0")]), ""),
    "text that is no UTF-8": (raw_exif([(0x010E, 2, 6, b"Caf\xe9s\0")]), ""),
}


def write_blocks(path: Path, *bodies: bytes, code: int = 0xE1, junk: bytes = b"") -> Path:
    """A panorama with these blocks behind its JFIF header."""
    data = write_panorama(path).read_bytes()
    blocks = [struct.pack(">BBH", 0xFF, code, len(body) + 2) + body for body in bodies]
    path.write_bytes(data[:20] + junk.join([b"", *blocks, b""]) + data[20:])
    return path


def check_pixels(nb, tmp_path: Path, path: Path) -> tuple[str, list[Path]]:
    """Split a panorama; its pixels must be kept, whatever else is wrong. Returns what was lost."""
    assert nb.read_size(path) == (512, 256, "")
    status, lost = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "written", lost
    halves = nb.half_paths(path, tmp_path / "in", tmp_path / "out")
    clean = Image.open(write_panorama(tmp_path / "clean.jpg"))
    for half, box in zip(halves, [(0, 0, 256, 256), (256, 0, 512, 256)]):
        assert psnr(open_image(half), clean.crop(box)) >= 50  # as the next notebook opens it
        image = Image.open(half)
        ImageOps.exif_transpose(image)
        dict(image.getexif()), image.getexif().get_ifd(IFD.GPSInfo)
    assert nb.split_panorama(path, tmp_path / "in", tmp_path / "out") == ("kept", lost)
    return lost, halves


@pytest.mark.parametrize("kind", BROKEN_EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_exif_never_costs_the_photo(nb, tmp_path, kind):
    block, said = BROKEN_EXIF[kind]
    lost, halves = check_pixels(nb, tmp_path, write_blocks(tmp_path / "in/A.jpg", block))
    assert lost == said or said is None
    if lost != "EXIF block" and MAKE[3] in block:
        assert Image.open(halves[0]).getexif()[BASE.Make] == "Maker"


@pytest.mark.parametrize("order", ["<", ">"])
def test_what_cannot_be_written_anew_is_kept_byte_for_byte(nb, tmp_path, order):
    gps = [(5, 2, 2, b"0\0"), (17, 5, 1, rational(100, 1, order=order))]
    block = raw_exif([MAKE], gps, order=order)
    path = write_blocks(tmp_path / "in/A.jpg", block)
    for half, heading in zip(check_pixels(nb, tmp_path, path)[1], (100_000, 1_900_000)):
        kept = block.replace(rational(100, 1, order=order), rational(heading, 10_000, order=order))
        assert kept in half.read_bytes()


@pytest.mark.parametrize(("kind", "value"), [(3, b"\x64\0"), (4, b"\x64\0\0\0"), (1, b"\x64")])
def test_heading_of_another_number_type_is_turned(nb, tmp_path, kind, value):
    path = write_blocks(tmp_path / "in/A.jpg", raw_exif([MAKE], [(17, kind, 1, value)]))
    for half, heading in zip(split(nb, tmp_path, path), (10, 190)):
        assert Image.open(half).getexif().get_ifd(IFD.GPSInfo)[17] == heading


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("with_gps", [False, True])
def test_offsets_in_maker_notes_stay_right(nb, tmp_path, order, with_gps):
    note = b"Ricoh\0\0\0" + struct.pack(order + "HHHI", 1, 0x4001, 4, 1)
    start = 8 + (2 + 24 + 4 if with_gps else 2 + 12 + 4)
    details = start + (2 + 24 + 4 if with_gps else 0)
    at = details + 2 + 12 + 4  # of the note; its last offset counts from the TIFF header
    note += struct.pack(order + "I", at + len(note) + 4 + 4) + bytes(4) + b"ZENITH"
    main = [(0x8769, 4, 1, struct.pack(order + "I", details))]
    gps = [(16, 2, 2, b"T\0"), (17, 3, 1, struct.pack(order + "H", 5))]
    body = raw_exif(main, gps if with_gps else [], order=order)
    body += struct.pack(order + "HHHII", 1, 0x927C, 7, len(note), at) + bytes(4) + note
    path = write_blocks(tmp_path / "in/A.jpg", body)
    lost, halves = check_pixels(nb, tmp_path, path)
    assert lost == ""
    for half in halves:
        tiff = half.read_bytes().partition(b"Exif\0\0")[2]
        found = tiff.find(b"Ricoh\0\0\0")
        (offset,) = struct.unpack_from(order + "I", tiff, found + 18)
        assert tiff[offset : offset + 6] == b"ZENITH"


def test_sizes_and_thumbnail_do_not_speak_of_the_whole_panorama(nb, tmp_path):
    sides = [(0x0100, 3, 1, struct.pack("<H", 512)), (0x0101, 4, 1, rational(256))]
    body = bytearray(raw_exif(sides))
    body[6 + 8 + 2 + 24 : 6 + 8 + 2 + 28] = rational(len(body) - 6)  # the thumbnail's directory
    body += struct.pack("<H", 1) + struct.pack("<HHII", 0x0201, 4, 1, 200) + bytes(4)
    lost, halves = check_pixels(nb, tmp_path, write_blocks(tmp_path / "in/A.jpg", bytes(body)))
    assert lost == "EXIF thumbnail"
    exif = Image.open(halves[1]).getexif()
    assert (exif[0x0100], exif[0x0101]) == (256, 256) and not exif.get_ifd(IFD.IFD1)


XMP = b"http://ns.adobe.com/xap/1.0/\0"
EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
GPANO = packet(PoseHeadingDegrees=5, ProjectionType="equirectangular")


def padded(size: int, inside: bool) -> bytes:
    """A packet of this size, its padding inside or behind its end."""
    end = b'<?xpacket end="w"?>'
    pad = (b" " * 99 + b"\n") * 700
    head = GPANO + pad[: size - len(GPANO) - len(end)] + end if inside else GPANO + pad
    return head[:size]


@pytest.mark.parametrize("size", [65_300, 65_400, 65_500, 65_502, 65_504])
@pytest.mark.parametrize("inside", [True, False])
def test_xmp_near_the_limit_loses_its_padding_only(nb, tmp_path, size, inside):
    path = write_blocks(tmp_path / "in/A.jpg", XMP + padded(size, inside))
    lost, halves = check_pixels(nb, tmp_path, path)
    assert lost == ""
    tags = read_gpano(Image.open(halves[1]).info["xmp"])
    assert (tags["PoseHeadingDegrees"], tags["CroppedAreaLeftPixels"]) == ("5", "256")


BROKEN_XMP = {
    "full of text": GPANO.replace(b"</rdf:Desc", b"x" * (65_450 - len(GPANO)) + b"</rdf:Desc"),
    "cut off": GPANO[:-30],
    "garbage": bytes(range(256)) * 9,
    "no UTF-8": GPANO.replace(b"equi", b"\xe9qui"),
    "two roots": GPANO + GPANO,
}


@pytest.mark.parametrize("kind", BROKEN_XMP)
def test_wrong_xmp_never_costs_the_photo(nb, tmp_path, kind):
    path = write_blocks(tmp_path / "in/A.jpg", XMP + BROKEN_XMP[kind], SOUND)
    lost, halves = check_pixels(nb, tmp_path, path)
    assert lost == "XMP block"
    assert "xmp" not in Image.open(halves[0]).info
    assert Image.open(halves[0]).getexif()[BASE.Make] == "Maker"


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 50, b"\n \n"])
def test_xmp_may_end_in_zeros_or_white_space_and_be_utf_16(nb, tmp_path, tail):
    path = write_blocks(tmp_path / "in/A.jpg", XMP + GPANO + tail)
    assert check_pixels(nb, tmp_path, path)[0] == ""
    path = write_blocks(tmp_path / "in/B.jpg", XMP + GPANO.decode().encode("utf-16"))
    lost, halves = check_pixels(nb, tmp_path, path)
    assert lost == "" and read_gpano(Image.open(halves[1]).info["xmp"])["PoseHeadingDegrees"] == "5"


@pytest.mark.parametrize("parts", [1, 3])
def test_extended_xmp_goes_with_its_pointer_and_by_name(nb, tmp_path, parts):
    note = b' xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="' + b"A" * 32
    main = GPANO.replace(b' rdf:about=""', b' rdf:about=""' + note + b'"')
    more = [
        EXTENSION + b"A" * 32 + struct.pack(">II", 300, 100 * i) + b"E" * 100 for i in range(parts)
    ]
    path = write_blocks(tmp_path / "in/A.jpg", XMP + main, *more)
    lost, halves = check_pixels(nb, tmp_path, path)
    assert lost == "extended XMP block"
    for half in halves:
        assert b"HasExtendedXMP" not in half.read_bytes()
        assert EXTENSION not in half.read_bytes()
        assert read_gpano(Image.open(half).info["xmp"])["PoseHeadingDegrees"] == "5"


IPTC = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x04abcd"


@pytest.mark.parametrize(
    ("code", "body", "lost"),
    [
        (0xED, IPTC, ""),
        (0xFE, b"a comment \xff", ""),
        (0xE2, b"ICC_PROFILE\0\x01\x01profile", ""),
        (0xE2, b"MPF\0MM\0*garbage", ""),
        (
            0xED,
            b"Photoshop 3.0\0" + b"8BIM\x04\x04",
            "captions block",
        ),  # Pillow cannot open such a file
        (0xE2, b"ICC_PROFILE\0", "colour profile block"),
        (0xEB, b"JP\0\x01signature", "APP11 block"),
        (0xE4, b"", "APP4 block"),
    ],
)
def test_other_blocks_are_kept_or_named(nb, tmp_path, code, body, lost):
    path = write_blocks(tmp_path / "in/A.jpg", body, code=code)
    found, halves = check_pixels(nb, tmp_path, path)
    assert found == lost
    kept = struct.pack(">BBH", 0xFF, code, len(body) + 2) + body
    assert (kept in halves[0].read_bytes()) == (lost == "" and not body.startswith(b"MPF"))


def test_junk_between_blocks_is_skipped_as_decoders_do(nb, tmp_path):
    path = write_blocks(tmp_path / "in/A.jpg", SOUND, XMP + GPANO, junk=b"\0junk\xff\0\xff\xff")
    assert check_pixels(nb, tmp_path, path)[0] == ""


def test_random_damage_in_metadata_never_raises_nor_stops_the_next_notebook(nb, tmp_path):
    path = write_with_metadata(tmp_path / "in/A.jpg", 33, xmp=GPANO, icc_profile=b"profile" * 9)
    data, rng = path.read_bytes(), random.Random(0)
    statuses = []
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 3, 20])):
            damaged[rng.randrange(24, data.index(b"\xff\xdb"))] = rng.randrange(256)
        path.write_bytes(damaged)
        assert len(nb.read_size(path)) == 3
        status, _ = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
        statuses.append(status)
        if status == "written":
            for half in nb.half_paths(path, tmp_path / "in", tmp_path / "out"):
                assert open_image(half).size in ((256, 256), (128, 512), (128, 256))
    assert statuses.count("written") > 100  # the rest: a length was hit, and pixels were swallowed


@pytest.mark.parametrize(
    "error", [TypeError, MemoryError, RecursionError, struct.error, AttributeError]
)
def test_no_exception_of_any_type_leaves_the_functions_for_one_photo(
    nb, tmp_path, monkeypatch, error
):
    def fail(*args, **kwargs):
        raise error

    path = write_panorama(tmp_path / "in" / "A.jpg")
    monkeypatch.setattr(nb, "open_jpeg", fail)
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed" and "A.jpg" in reason and error.__name__ in reason
    assert error.__name__ in nb.read_size(path)[2]
    assert nb.can_open(path) is False


def test_a_name_that_is_no_utf_8_is_split_and_can_be_printed(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    other = path.rename(path.with_name(os.fsdecode(b"caf\xe9.jpg")))
    left, right = split(nb, tmp_path, other)
    assert left.exists() and right.exists()
    other.write_bytes(b"")
    reason = nb.split_panorama(other, tmp_path / "in", tmp_path / "out")[1]
    assert "caf\\xe9.jpg" in reason and reason.encode()


# ---------------------------------------------------------------- how colour is stored


def bright(width: int = 512, height: int = 256) -> np.ndarray:
    """Small saturated objects on green, the hardest for subsampled colour."""
    rng, pixels = np.random.default_rng(0), np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = 200
    colours = np.array([[255, 0, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]])
    for y, x in zip(rng.integers(0, height - 5, 300), rng.integers(0, width - 5, 300)):
        pixels[y : y + 5, x : x + 5] = colours[rng.integers(4)]
    return pixels


def write_440(path: Path, pixels: np.ndarray) -> Path:
    """A JPEG whose colour has half the height. Pillow cannot write it, but its blocks are in the
    order of another picture of 4:2:2; that is written, and its header changed."""
    planes = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    height, width, _ = planes.shape
    units = planes.reshape(height // 16, 16, width // 8, 8, 3).swapaxes(1, 2).reshape(-1, 16, 8, 3)
    light = np.concatenate([units[:, :8], units[:, 8:]], axis=2)
    colour = units[..., 1:].reshape(-1, 8, 2, 8, 2).mean(2).repeat(2, axis=2)
    pairs = np.concatenate([light[..., :1], colour.round().astype(np.uint8)], axis=-1)
    other = pairs.reshape(height // 8, width // 16, 8, 16, 3).swapaxes(1, 2).reshape(planes.shape)
    Image.fromarray(other, "YCbCr").save(path, "JPEG", quality=88, subsampling=1)
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xc0") + 11  # the sampling of the first component
    assert data[place] == 0x21
    data[place] = 0x12
    path.write_bytes(data)
    assert Image.open(path).layer[0][1:3] == (1, 2)
    return path


def renumber_tables(path: Path, numbers: dict[int, int]) -> Path:
    data = bytearray(path.read_bytes())
    place = 0
    while (place := data.find(b"\xff\xdb\0\x43", place)) >= 0:
        data[place + 4] = numbers[data[place + 4]]
        place += 4
    start = data.index(b"\xff\xc0") + 12
    for component in range(3):
        data[start + 3 * component] = numbers[data[start + 3 * component]]
    path.write_bytes(data)
    return path


def check_quality(nb, tmp_path: Path, path: Path, at_the_cut: bool = False) -> list[Path]:
    """Compare both halves with the panorama, but for the columns on both sides of the cut: a
    decoder smooths colour across the cut in the panorama only, and no half can look like that."""
    whole, halves = Image.open(path).convert("RGB"), list(split(nb, tmp_path, path))
    middle, (width, height) = whole.width // 2, whole.size
    for half, start, end in zip(halves, (0, middle), (middle, width)):
        inside = (0 if start == 0 else 1, 0, end - start - (1 if start == 0 else 0), height)
        box = (0, 0, end - start, height) if at_the_cut else inside
        expected = whole.crop((start, 0, end, height)).crop(box)
        assert psnr(Image.open(half).convert("RGB").crop(box), expected) >= 50
    return halves


@pytest.mark.parametrize("quality", [75, 88, 95])
@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_saturated_colours_are_kept_on_a_block_boundary(nb, tmp_path, sampling, quality):
    image = Image.fromarray(bright())
    path = write_panorama(tmp_path / "in/A.jpg", image, subsampling=sampling, quality=quality)
    for half in check_quality(nb, tmp_path, path):
        assert JpegImagePlugin.get_sampling(Image.open(half)) == sampling


@pytest.mark.parametrize("width", [510, 509, 502])
def test_half_colour_width_of_any_width_is_split(nb, tmp_path, width):
    image = Image.fromarray(bright(width, width // 2))
    path = write_panorama(tmp_path / "in/A.jpg", image, subsampling=1)
    left, right = (Image.open(half) for half in split(nb, tmp_path, path))
    assert left.width + right.width == width


@pytest.mark.parametrize("pixels", [bright(), np.asarray(scene())], ids=["saturated", "smooth"])
def test_half_colour_height_is_kept(nb, tmp_path, pixels):
    (tmp_path / "in").mkdir()
    path = write_440(tmp_path / "in/A.jpg", pixels)
    for half in check_quality(nb, tmp_path, path, at_the_cut=True):
        assert JpegImagePlugin.get_sampling(Image.open(half)) == 0


@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize("numbers", [{0: 1, 1: 0}, {0: 2, 1: 3}, {0: 3, 1: 0}])
def test_tables_may_have_any_number(nb, tmp_path, numbers, sampling):
    path = write_panorama(tmp_path / "in/A.jpg", subsampling=sampling)
    before = Image.open(path).quantization
    assert set(Image.open(renumber_tables(path, numbers)).quantization) == set(numbers.values())
    for half in check_quality(nb, tmp_path, path):
        assert Image.open(half).quantization == before


def test_each_colour_may_have_a_table_of_its_own(nb, tmp_path):
    tables = [TABLES[0], TABLES[1], [9 + i // 5 for i in range(64)]]
    path = write_panorama(tmp_path / "in/A.jpg", qtables=tables)
    before = Image.open(path).quantization
    path = renumber_tables(path, {0: 2, 1: 0, 2: 1})
    for half in check_quality(nb, tmp_path, path):
        assert Image.open(half).quantization == before and len(before) == 3


# ---------------------------------------------------------------- what is no panorama, what is done


def discs(radius: float = 1.0, shift: int = 0, corner: int = 0, size: int = 256) -> Image.Image:
    """Two fisheye discs with sky and ground."""
    grain = np.random.default_rng(0).integers(0, 6, (size, 2 * size, 3), dtype=np.uint8)
    photo = Image.fromarray(grain + np.uint8(corner))
    for x in (0, size):
        disc = Image.new("L", (size, size))
        low, high = size / 2 * (1 - radius), size / 2 * (1 + radius)
        ImageDraw.Draw(disc).ellipse((low + shift, low, high + shift, high), fill=255)
        inside = Image.new("RGB", (size, size), (90, 140, 60))
        ImageDraw.Draw(inside).rectangle((0, 0, size, size // 2), fill=(150, 180, 230))
        photo.paste(inside, (x, 0), disc)
    return photo


def bands(top: int, bottom: int) -> Image.Image:
    """A panorama whose zenith and nadir were not photographed."""
    pixels = np.asarray(scene()).copy()
    pixels[:top], pixels[256 - bottom :] = 0, 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "photo", [discs(), discs(0.92), discs(0.95, 6), discs(corner=12), discs(1.04)], ids=range(5)
)
@pytest.mark.parametrize("xmp", [b"", packet(ProjectionType="equirectangular")], ids=["", "XMP"])
def test_black_corners_show_an_unstitched_photo(nb, tmp_path, photo, xmp):
    path = write_panorama(tmp_path / "in" / "A.jpg", photo, xmp=xmp)
    assert "fisheye" in nb.read_size(path)[2] or xmp  # with XMP the pixels are not looked at there
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed" and "A.jpg" in reason and "fisheye" in reason
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dualfisheye", "Dual-Fisheye", "fisheye", "cubemap", "cubestrip"])
def test_unstitched_photos_are_named_by_their_xmp(nb, tmp_path, name):
    path = write_panorama(tmp_path / "in/A.jpg", xmp=packet(ProjectionType=name))
    assert name in nb.read_size(path)[2]
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed" and name in reason and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "photo",
    [
        Image.new("RGB", (512, 256)),
        Image.new("RGB", (512, 256), "white"),
        bands(60, 60),
        bands(0, 90),
        bands(100, 100),
        scene().point(lambda v: v // 8),
        Image.fromarray(draw_panorama(plan_survey(4, 2, 2, seed=1), 1, width=512)[0]),
    ],
    ids=["black", "white", "bands", "no nadir", "a strip", "night", "demo"],
)
def test_dark_panoramas_are_panoramas(nb, tmp_path, photo):
    path = write_panorama(tmp_path / "in" / "A.jpg", photo)
    assert nb.read_size(path) == (512, 256, "")
    split(nb, tmp_path, path)


def test_damaged_name_of_the_projection_does_not_cost_the_photo(nb, tmp_path):
    path = write_panorama(tmp_path / "in/A.jpg", xmp=packet(ProjectionType="equirectanguxar"))
    assert nb.read_size(path)[2] == ""
    split(nb, tmp_path, path)


def test_too_large_a_photo_is_named_before_it_is_decoded(nb, tmp_path, monkeypatch):
    path = write_panorama(tmp_path / "in" / "A.jpg", Image.new("L", (1024, 512)))
    monkeypatch.setattr(nb, "MAX_MEGAPIXELS", 0.5)
    monkeypatch.setattr(nb, "read_planes", None)
    width, height, problem = nb.read_size(path)
    assert (width, height) == (1024, 512) and "MAX_MEGAPIXELS = 0.5" in problem
    status, reason = nb.split_panorama(path, tmp_path / "in", tmp_path / "out")
    assert status == "failed" and "more than MAX_MEGAPIXELS" in reason


def test_our_limit_and_not_that_of_pillow_decides(nb, tmp_path, monkeypatch, recwarn):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert nb.read_size(path) == (512, 256, "")
    split(nb, tmp_path, path)
    assert Image.MAX_IMAGE_PIXELS == 1000 and not recwarn.list


@pytest.mark.parametrize("seconds", [-1e8, -1, 1, 1e6])
@pytest.mark.parametrize("same_size", [False, True])
def test_replaced_panorama_is_split_again_whatever_its_time(nb, tmp_path, seconds, same_size):
    path = write_panorama(tmp_path / "in" / "A.jpg", Image.new("RGB", (512, 256)))
    left, _ = split(nb, tmp_path, path)
    size, changed = path.stat().st_size, path.stat().st_mtime
    write_panorama(path, Image.new("RGB", (512, 256), "white"))
    padding = size - path.stat().st_size if same_size else 7
    path.write_bytes(path.read_bytes() + bytes(max(padding, 0)))
    os.utime(path, (changed + seconds, changed + seconds))
    split(nb, tmp_path, path)
    assert np.asarray(Image.open(left)).min() > 250


def test_panorama_of_the_same_time_but_another_size_is_split_again(nb, tmp_path):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    left, _ = split(nb, tmp_path, path)
    status = path.stat()
    write_panorama(path, Image.new("RGB", (512, 256), "white"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    split(nb, tmp_path, path)
    assert np.asarray(Image.open(left)).min() > 250


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_foreign_or_emptied_half_is_made_again(nb, tmp_path, content):
    path = write_panorama(tmp_path / "in" / "A.jpg")
    halves = split(nb, tmp_path, path)
    halves[1].write_bytes(path.read_bytes() if content is None else content)
    split(nb, tmp_path, path)
    assert Image.open(halves[1]).size == (256, 256)
