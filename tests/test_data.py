"""Pictures in: opening, augmenting, caching, mixing and loading them."""

import os
import pickle
import random

import data_utils as du

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import ConcatDataset, Dataset
from torchvision.transforms import v2

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 30), (30, 30, 220), (210, 210, 30)


def quadrants(width=96, height=64):
    """Return a picture that is red, green / blue, yellow: no turn or mirror looks like another."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = YELLOW
    return Image.fromarray(pixels)


def assert_quadrants(image, tolerance=16):
    pixels = np.asarray(image).astype(int)
    height, width = pixels.shape[:2]
    wanted = {(1, 1): RED, (1, 3): GREEN, (3, 1): BLUE, (3, 3): YELLOW}
    for (row, column), colour in wanted.items():
        found = pixels[row * height // 4, column * width // 4]
        assert np.abs(found - colour).max() <= tolerance, (row, column, found)


def noise(width, height, seed=0):
    """Return a smooth random picture, so that every scale of it shows the same."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def resize(height, width):
    return v2.Compose([v2.Resize((height, width))])


class PlainModel:
    """What `make_transforms` asks of a model."""

    def __init__(self, height=32, width=32):
        self.data_config = {
            "input_size": (3, height, width),
            "mean": (0.5, 0.4, 0.2),
            "std": (0.5, 0.2, 0.25),
            "interpolation": "bicubic",
        }


# ---------------------------------------------------------------- open_image

# Orientation → how an upright picture is stored, so that a viewer turns it back.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save_turned(path, image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if STORED[orientation] is None else image.transpose(STORED[orientation])
    stored.save(path, quality=95, exif=exif)


@pytest.mark.parametrize("size", [None, (32, 48), (10, 90), (60, 10)])
@pytest.mark.parametrize("orientation", STORED)
def test_open_image_turns_every_exif_orientation_upright(tmp_path, orientation, size):
    save_turned(tmp_path / "turned.jpg", quadrants(192, 128), orientation)
    image = du.open_image(tmp_path / "turned.jpg", size)
    assert image.mode == "RGB"
    assert image.width * 2 == image.height * 3
    assert_quadrants(image)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        (None, (1200, 800)),
        ((100, 150), (150, 100)),  # 1/8 is just enough
        ((101, 150), (300, 200)),  # one row too few at 1/8
        ((100, 151), (300, 200)),  # one column too few at 1/8
        ((50, 300), (300, 200)),  # the width decides
        ((200, 10), (300, 200)),  # the height decides
        ((400, 600), (600, 400)),
        ((401, 600), (1200, 800)),
        ((3000, 3000), (1200, 800)),  # never enlarged
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_is_decoded_at_the_smallest_scale_that_suffices(tmp_path, orientation, size, decoded):
    save_turned(tmp_path / "large.jpg", quadrants(1200, 800), orientation)
    assert du.open_image(tmp_path / "large.jpg", size).size == decoded


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(8, 400),
    height=st.integers(8, 400),
    wanted=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    orientation=st.sampled_from(list(STORED)),
)
def test_no_axis_is_ever_decoded_smaller_than_asked(
    tmp_path_factory, width, height, wanted, orientation
):
    path = tmp_path_factory.getbasetemp() / "any_size.jpg"
    save_turned(path, Image.new("RGB", (width, height)), orientation)
    image = du.open_image(path, wanted)
    assert image.height >= min(wanted[0], height)
    assert image.width >= min(wanted[1], width)


def test_2976_px_jpeg_for_a_384_px_input_decodes_a_sixteenth_of_its_pixels(tmp_path):
    Image.new("RGB", (2976, 2976), RED).save(tmp_path / "half.jpg")
    image = du.open_image(tmp_path / "half.jpg", (384, 384))
    assert image.size == (744, 744)


def test_reduced_decoding_shows_the_same_picture(tmp_path):
    noise(1024, 512).save(tmp_path / "a.jpg", quality=95)
    full = du.open_image(tmp_path / "a.jpg").resize((128, 64), Image.Resampling.BOX)
    reduced = du.open_image(tmp_path / "a.jpg", (64, 128))
    assert reduced.size == (128, 64)
    assert np.abs(np.asarray(full, int) - np.asarray(reduced, int)).max() <= 4


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    quadrants().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    for size in (None, (16, 24)):
        image = du.open_image(tmp_path / "print.jpg", size)
        assert image.mode == "RGB"
        assert_quadrants(image)


def test_32_bit_grey_with_8_bit_values_keeps_them(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "grey.tif")
    assert np.asarray(du.open_image(tmp_path / "grey.tif")).tolist() == [[[200] * 3] * 4] * 4


def test_16_bit_grey_png_keeps_its_high_byte(tmp_path):
    values = np.array([[0, 255, 256, 32768, 51200, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(du.open_image(tmp_path / "deep.png"))
    assert pixels.shape == (1, 6, 3)
    assert pixels[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 200, 255)]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),  # clear: white paper
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # a fifth of red on white
        ("LA", (0, 51), (204, 204, 204)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_transparent_grey_and_two_level_pngs_become_rgb_on_white(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 3), colour).save(tmp_path / "x.png")
    image = du.open_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert image.size == (4, 3)
    assert (np.asarray(image) == expected).all()


def test_palette_with_a_transparent_entry_becomes_white_there_and_only_there(tmp_path):
    image = Image.new("P", (4, 1))
    image.putpalette([200, 0, 0, 0, 0, 200] + [0] * 762)
    image.putdata([0, 1, 1, 0])
    image.save(tmp_path / "palette.png", transparency=0)
    pixels = np.asarray(du.open_image(tmp_path / "palette.png"))[0].tolist()
    assert pixels == [[255] * 3, [0, 0, 200], [0, 0, 200], [255] * 3]


def test_palette_without_transparency_keeps_its_colours(tmp_path):
    quadrants().quantize(8).save(tmp_path / "palette.gif")
    assert_quadrants(du.open_image(tmp_path / "palette.gif"))


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_grey_jpeg_becomes_rgb(tmp_path, size):
    Image.new("L", (256, 256), 90).save(tmp_path / "grey.jpg")
    image = du.open_image(tmp_path / "grey.jpg", size)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - 90).max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_named_and_never_half_read(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    noise(300, 200).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for size in (None, (20, 30)):
        with pytest.raises(OSError, match=rf"cut\.{suffix}.*cannot be read"):
            du.open_image(path, size)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff\xd8\xff", bytes(5000)])
def test_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "page.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"page\.jpg: cannot be read as an image"):
        du.open_image(tmp_path / "page.jpg")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such image"):
        du.open_image(tmp_path / "gone.jpg", (10, 10))


def test_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(OSError, match=tmp_path.name):
        du.open_image(tmp_path)


@pytest.mark.parametrize("kind", ["image", "array"])
def test_what_is_open_already_becomes_upright_rgb_too(kind):
    image = quadrants().convert("RGBA" if kind == "image" else "RGB")
    given = image if kind == "image" else np.asarray(image)
    opened = du.open_image(given, (10, 10))
    assert (opened.mode, opened.size) == ("RGB", (96, 64))
    assert_quadrants(opened, 0)


# ---------------------------------------------------------------- RandomHorizontalRoll


def rolled_by(before, after):
    """Return every shift k for which torch.roll(before, k) is `after`."""
    width = before.shape[-1]
    return [k for k in range(width) if torch.equal(torch.roll(before, k, -1), after)]


def test_roll_is_a_true_circular_shift_of_every_possible_width():
    picture = torch.arange(1, 3 * 4 * 8 + 1).reshape(3, 4, 8)
    roll = du.RandomHorizontalRoll("panorama")
    torch.manual_seed(0)
    shifts = [rolled_by(picture, roll(picture)) for _ in range(400)]
    assert all(len(found) == 1 for found in shifts)  # a roll, and no other change
    counts = np.bincount([found[0] for found in shifts], minlength=8)
    assert counts.min() >= 25  # 50 expected each: no angle is left out
    assert counts.max() <= 90


def test_roll_repeats_with_the_seed():
    picture = torch.rand(3, 8, 64, generator=torch.Generator().manual_seed(0))
    roll = du.RandomHorizontalRoll("panorama")

    def draw(seed):
        torch.manual_seed(seed)
        return torch.stack([roll(picture) for _ in range(5)])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("view", ["half", "left", "", None])
def test_roll_is_refused_for_anything_but_a_whole_panorama(view):
    with pytest.raises(ValueError, match="halves must not be rolled"):
        du.RandomHorizontalRoll(view)


def test_only_training_on_panoramas_rolls():
    def rolls(train, view):
        steps = du.make_transforms(PlainModel(), train=train, view=view).transforms
        return sum(isinstance(step, du.RandomHorizontalRoll) for step in steps)

    assert rolls(True, "panorama") == 1
    assert rolls(True, "half") == 0
    assert rolls(False, "panorama") == 0
    assert rolls(False, "half") == 0


def test_roll_joins_both_edges_of_a_panorama_without_a_black_bar():
    """One bright column on the left edge: after a roll its neighbour is the former right edge."""
    panorama = torch.full((3, 4, 16), 100, dtype=torch.uint8)
    panorama[..., 0], panorama[..., -1] = 200, 250
    roll = du.RandomHorizontalRoll("panorama")
    torch.manual_seed(1)
    for _ in range(20):
        turned = roll(panorama)[0, 0].tolist()
        assert min(turned) == 100
        assert turned[(turned.index(250) + 1) % 16] == 200


# ---------------------------------------------------------------- make_transforms


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("view", ["half", "panorama"])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_transforms_give_the_input_size_of_the_model(size, view, train):
    transform = du.make_transforms(PlainModel(*size), train=train, view=view)
    for image in (quadrants(101, 77), quadrants(20, 10), quadrants(33, 130)):
        tensor = transform(image)
        assert tensor.shape == (3, *size)
        assert tensor.dtype == torch.float32


def test_normalisation_by_hand_on_a_constant_picture():
    tensor = du.make_transforms(PlainModel(), train=False)(Image.new("RGB", (50, 40), (51, 102, 0)))
    # (0.2 - 0.5) / 0.5, (0.4 - 0.4) / 0.2, (0 - 0.2) / 0.25
    expected = torch.tensor([-0.6, 0.0, -0.8])[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(torch.as_tensor(tensor), expected, atol=1e-6, rtol=0)


def test_evaluation_keeps_the_whole_picture():
    pixels = np.full((200, 400, 3), 128, np.uint8)
    pixels[:, :20], pixels[:, -20:] = 0, 255
    pixels[:10, 100:300], pixels[-10:, 100:300] = 0, 255
    tensor = du.make_transforms(PlainModel(40, 40), train=False)(Image.fromarray(pixels))
    brightness = (tensor[0] * 0.5 + 0.5) * 255
    assert brightness[20, 0] < 20
    assert brightness[20, -1] > 235
    assert brightness[0, 20] < 20
    assert brightness[-1, 20] > 235


def test_evaluation_is_the_same_each_time_and_training_is_not():
    image = noise(80, 60)
    evaluate = du.make_transforms(PlainModel(), train=False)
    augment = du.make_transforms(PlainModel(), train=True)
    assert torch.equal(evaluate(image), evaluate(image))
    torch.manual_seed(0)
    assert not torch.equal(augment(image), augment(image))


@pytest.mark.parametrize("view", ["half", "panorama"])
def test_augmentation_paints_nothing_into_a_uniform_picture(view):
    augment = du.make_transforms(PlainModel(), train=True, view=view)
    torch.manual_seed(0)
    for _ in range(10):
        tensor = augment(Image.new("RGB", (90, 45), (120, 120, 120)))
        assert (tensor.amax((1, 2)) - tensor.amin((1, 2))).max() < 1e-5


# ---------------------------------------------------------------- DataPartition


@pytest.fixture
def partition(tmp_path):
    """Four pictures of 300 × 200 px with three labels, some unknown."""
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"p{number}.jpg")
        noise(300, 200, seed=number).save(paths[-1], quality=95)
    return pd.DataFrame(
        {
            "image_path": [str(path) for path in paths],
            "group_id": ["a", "a", "b", "c"],
            "tree": [1, 0, np.nan, 0.6],
            "grass": [0, 1, 1, np.nan],
            "water": [np.nan, 0, 0, 1],
        }
    )


def test_targets_follow_the_order_of_label_columns_and_keep_unknowns(partition):
    data = du.DataPartition(partition, ["water", "tree"], resize(20, 30))
    assert len(data) == 4
    assert data.label_columns == ["water", "tree"]
    targets = torch.stack([data[i][1] for i in range(4)])
    expected = torch.tensor([[torch.nan, 1], [0, 0], [0, torch.nan], [1, 0.6]])
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, expected, equal_nan=True, atol=0, rtol=0)
    turned = du.DataPartition(partition, ["tree", "water"])
    torch.testing.assert_close(turned[0][1], expected[0].flip(0), equal_nan=True)


def test_partition_needs_no_transform_and_then_gives_the_whole_picture(partition):
    image, _ = du.DataPartition(partition, ["tree"])[1]
    assert image.size == (300, 200)


def test_changing_an_item_does_not_change_the_partition(partition):
    data = du.DataPartition(partition, ["tree", "grass"])
    data[0][1].fill_(7)
    assert data[0][1].tolist() == [1, 0]


def test_missing_label_column_is_named(partition):
    with pytest.raises(ValueError, match="no column lily, moss"):
        du.DataPartition(partition, ["tree", "lily", "moss"])


def test_unreadable_picture_stops_and_is_named(partition, tmp_path):
    (tmp_path / "p2.jpg").write_bytes(b"nothing")
    os.remove(tmp_path / "p3.jpg")
    for cache in (None, tmp_path / "cache"):
        data = du.DataPartition(partition, ["tree"], resize(20, 30), cache)
        with pytest.raises(OSError, match=r"p2\.jpg"):
            data[2]
        with pytest.raises(FileNotFoundError, match=r"p3\.jpg"):
            data[3]


def test_partition_survives_pickling_with_its_transforms(partition):
    transform = du.make_transforms(PlainModel(16, 24), train=False)
    data = du.DataPartition(partition, ["tree", "grass"], transform)
    copy = pickle.loads(pickle.dumps(data))
    for number in range(4):
        assert torch.equal(copy[number][0], data[number][0])
        torch.testing.assert_close(copy[number][1], data[number][1], equal_nan=True)


def test_cached_picture_equals_the_decoded_one(partition, tmp_path):
    transform = du.make_transforms(PlainModel(40, 40), train=False)
    plain = du.DataPartition(partition, ["tree"], transform)
    cached = du.DataPartition(partition, ["tree"], transform, tmp_path / "cache")
    for number in range(4):
        first, second = cached[number][0], cached[number][0]
        # Values are in units of std; 0.1 there is about 10 of 255 grey levels in a smooth picture.
        assert (first - plain[number][0]).abs().max() < 0.1
        assert (second - plain[number][0]).abs().max() < 0.1


def test_first_and_later_reads_through_the_cache_are_identical(partition, tmp_path):
    data = du.DataPartition(partition, ["tree"], resize(40, 40), tmp_path / "cache")
    assert np.array_equal(np.asarray(data[0][0]), np.asarray(data[0][0]))


def test_cached_picture_is_read_without_the_photo_being_decoded_again(partition, tmp_path):
    data = du.DataPartition(partition, ["tree"], resize(20, 30), tmp_path / "cache")
    before = np.asarray(data[1][0])
    path = tmp_path / "p1.jpg"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"cannot be decoded any more")
    os.utime(path, ns=(stamp, stamp))
    assert np.array_equal(np.asarray(data[1][0]), before)


def test_cache_is_used_for_a_transform_that_is_a_single_step(partition, tmp_path):
    du.DataPartition(partition, ["tree"], v2.Resize((20, 30)), tmp_path / "cache")[0]
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


def test_cached_copies_are_shrunk_but_never_below_what_the_transform_needs(partition, tmp_path):
    augment = du.make_transforms(PlainModel(32, 32), train=True, crop_scale=(0.7, 1.0))
    du.DataPartition(partition, ["tree"], augment, tmp_path / "cache")[0]
    (copy,) = (tmp_path / "cache").rglob("*.npy")
    height, width = np.load(copy).shape[:2]
    # A crop of 70 % of the area, enlarged to nothing: 32 / sqrt(0.7) = 38.2 px a side.
    assert height in (39, 40)
    assert width == pytest.approx(1.5 * height, abs=1)


def test_changed_photo_is_not_read_from_the_cache(partition, tmp_path):
    data = du.DataPartition(partition, ["tree"], resize(20, 30), tmp_path / "cache")
    path = tmp_path / "p0.jpg"
    before = path.stat().st_mtime_ns
    data[0]
    Image.new("RGB", (300, 200), GREEN).save(path, quality=95)
    os.utime(path, ns=(before + 1_000_000_000, before + 1_000_000_000))
    assert np.abs(np.asarray(data[0][0]).astype(int) - GREEN).max() <= 4


def test_another_input_size_gets_its_own_copy(partition, tmp_path):
    cache = tmp_path / "cache"
    small = du.DataPartition(partition, ["tree"], resize(10, 10), cache)
    large = du.DataPartition(partition, ["tree"], resize(100, 100), cache)
    plain = du.DataPartition(partition, ["tree"], resize(100, 100))
    small[0]
    difference = np.asarray(large[0][0]).astype(int) - np.asarray(plain[0][0]).astype(int)
    assert np.abs(difference).max() <= 10


DAMAGED = {
    "empty": lambda whole: b"",
    "cut off in its header": lambda whole: whole[:40],
    "cut off in its pixels": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "a zip": lambda whole: b"PK\3\4" + whole[4:],
    "a header that lies": lambda whole: whole.replace(b"'shape': (", b"'shape': (9"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_cache_file_is_made_again(partition, tmp_path, kind):
    data = du.DataPartition(partition, ["tree"], resize(20, 30), tmp_path / "cache")
    before = np.asarray(data[0][0])
    (copy,) = (tmp_path / "cache").rglob("*.npy")
    whole = copy.read_bytes()
    copy.write_bytes(DAMAGED[kind](whole))
    assert np.array_equal(np.asarray(data[0][0]), before)
    assert copy.read_bytes() == whole


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_features_are_made_again(partition, tmp_path, kind):
    model = du.build_model("resnet10t", 1, pretrained=False, img_size=32)
    data = du.DataPartition(partition, ["tree"], du.make_transforms(model, train=False))
    config = du.TrainConfig(cache_dir=str(tmp_path / "cache"))
    before = du.extract_features(model, data, config, pooled=True)
    (kept,) = (tmp_path / "cache").glob("*.npy")
    whole = kept.read_bytes()
    kept.write_bytes(DAMAGED[kind](whole))
    again = du.extract_features(model, data, config, pooled=True)
    assert torch.equal(again, before)
    assert kept.read_bytes() == whole


def test_photo_whose_name_is_no_utf8_goes_through_csv_cache_and_loader(partition, tmp_path):
    """A name of bytes such as an old USB disk has it, in a folder of that kind."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/site \xfc")
    path = os.path.join(folder, os.fsdecode(b"IMG_\xe4.jpg"))
    try:
        os.mkdir(folder)
        os.rename(tmp_path / "p0.jpg", path)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    df = partition.replace({"image_path": {str(tmp_path / "p0.jpg"): path}})
    df["group_id"] = [os.fsdecode(b"\xfc"), *df["group_id"][1:]]
    du.write_partition(df, tmp_path / "parts" / "train.csv")
    (tmp_path / "parts" / "train.csv").read_text(encoding="utf-8")
    read, labels = du.read_partition(tmp_path / "parts" / "train.csv")
    assert os.path.samefile(read["image_path"][0], path)
    data = du.DataPartition(read, labels, resize(20, 30), tmp_path / "cache")
    assert np.array_equal(np.asarray(data[0][0]), np.asarray(data[0][0]))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


def test_two_processes_may_write_the_same_cache_entry(partition, tmp_path):
    same = partition.iloc[[0] * 24]
    transform = du.make_transforms(PlainModel(24, 24), train=False)
    cached = du.DataPartition(same, ["tree"], transform, tmp_path / "cache")
    plain = du.DataPartition(same, ["tree"], transform)[0][0]
    for images, _ in du.make_loader(cached, 1, num_workers=2):
        assert (images[0] - plain).abs().max() < 0.1
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".npy"]  # one entry, nothing half-written


def kept_copies(cache):
    return sorted(cache.glob("??/*.npy"), key=lambda path: path.stat().st_mtime_ns)


def test_full_cache_loses_its_oldest_copies_and_pictures_stay_the_same(partition, tmp_path):
    cache = tmp_path / "cache"
    roomy = du.DataPartition(partition, ["tree"], resize(20, 30), tmp_path / "roomy")
    copy_gb = 30 * 20 * 3 / 1e9 + 128e-9  # numpy's header
    data = du.DataPartition(partition, ["tree"], resize(20, 30), cache, 2.5 * copy_gb)
    data[0], data[1]
    first, second = kept_copies(cache)
    os.utime(first, (1, 1))  # not left to the clock of the file system
    os.utime(second, (2, 2))
    (cache / "mine.npy").write_bytes(bytes(9000))  # neither counted nor removed
    for number in (2, 3, 0, 1):
        assert np.array_equal(np.asarray(data[number][0]), np.asarray(roomy[number][0]))
        assert len(kept_copies(cache)) <= 2
        assert du.trim_cache(cache) <= 2.5 * copy_gb
    assert (cache / "mine.npy").exists()
    assert not first.exists() or first.stat().st_mtime > 3  # made again


def test_cache_that_fits_is_never_trimmed(partition, tmp_path):
    data = du.DataPartition(partition, ["tree"], resize(20, 30), tmp_path / "cache", 1e-3)
    pictures = [np.asarray(data[number][0]) for number in range(4)]
    assert len(kept_copies(tmp_path / "cache")) == 4
    sizes = sum(path.stat().st_size for path in kept_copies(tmp_path / "cache"))
    assert du.trim_cache(tmp_path / "cache") == pytest.approx(sizes / 1e9)
    assert all(np.array_equal(data[number][0], pictures[number]) for number in range(4))


def test_processes_share_a_cache_that_is_far_too_small(partition, tmp_path):
    many = partition.iloc[[0, 1, 2, 3] * 6]
    transform = du.make_transforms(PlainModel(24, 24), train=False)
    data = du.DataPartition(many, ["tree"], transform, tmp_path / "cache", 5e-6)
    plain = du.DataPartition(many, ["tree"], transform)
    for number, (images, _) in enumerate(du.make_loader(data, 1, num_workers=2)):
        assert (images[0] - plain[number][0]).abs().max() < 0.1
    assert du.trim_cache(tmp_path / "cache") <= 5e-6
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".npy"]


# ---------------------------------------------------------------- TriStateMixup


def fix_draws(monkeypatch, lam, centre=(0, 0)):
    """Let numpy draw this λ and this centre of the CutMix box."""
    coordinates = iter(centre * 100)
    monkeypatch.setattr(np.random, "beta", lambda *_, **__: lam)
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(coordinates))


def two_pictures(height=8, width=8):
    """Return a white and a black picture, so that a mean pixel is the share of the white one."""
    return torch.stack([torch.ones(3, height, width), torch.zeros(3, height, width)])


def test_mixup_mixes_targets_as_it_mixes_pixels(monkeypatch):
    fix_draws(monkeypatch, 0.75)
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    images, mixed = du.TriStateMixup(3, mixup_alpha=0.4, cutmix_alpha=0.0)(two_pictures(), targets)
    assert torch.equal(images[0], torch.full((3, 8, 8), 0.75))
    assert torch.equal(images[1], torch.full((3, 8, 8), 0.25))
    assert mixed.tolist() == [[0.75, 1.0, 0.0], [0.25, 1.0, 0.0]]


def test_cutmix_counts_only_the_pixels_of_a_clipped_box(monkeypatch):
    """λ 0.75 asks for a 4 × 4 box; at the corner 2 × 2 of 64 pixels remain: 60 / 64."""
    fix_draws(monkeypatch, 0.75, centre=(0, 0))
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images, mixed = du.TriStateMixup(2, mixup_alpha=0.0, cutmix_alpha=1.0)(two_pictures(), targets)
    assert (images[0, 0] == 0).sum() == 4
    assert not images[0, :, :2, :2].any()
    assert mixed.tolist() == [[0.9375, 0.0625], [0.0625, 0.9375]]


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_target_is_the_true_share_of_pixels_whatever_is_drawn(alphas):
    mix = du.TriStateMixup(1, *alphas)
    np.random.seed(0)  # noqa: NPY002 - timm draws from numpy's global generator
    shares = []
    for _ in range(60):
        images, mixed = mix(two_pictures(9, 15), torch.tensor([[1.0], [0.0]]))
        share = images[0].double().mean().item()
        assert mixed[0, 0].item() == pytest.approx(share, abs=1e-5)
        assert mixed[1, 0].item() == pytest.approx(images[1].double().mean().item(), abs=1e-5)
        shares.append(round(share, 3))
    assert len(set(shares)) > 20


def test_unknown_stays_unknown_where_it_contributes_and_only_there(monkeypatch):
    fix_draws(monkeypatch, 0.25)
    nan = torch.nan
    targets = torch.tensor([[1, nan, 0, nan, 1], [0, 1, nan, nan, 1]])
    _, mixed = du.TriStateMixup(5, 0.4, 0.0)(two_pictures(), targets)
    expected = torch.tensor([[0.25, nan, nan, nan, 1], [0.75, nan, nan, nan, 1]])
    torch.testing.assert_close(mixed, expected, equal_nan=True, atol=0, rtol=0)


def test_pairs_are_first_with_last(monkeypatch):
    fix_draws(monkeypatch, 0.5)
    targets = torch.tensor([[1.0], [0.0], [torch.nan], [1.0]])
    _, mixed = du.TriStateMixup(1, 0.4, 0.0)(torch.zeros(4, 3, 4, 4), targets)
    expected = torch.tensor([[1.0], [torch.nan], [torch.nan], [1.0]])
    torch.testing.assert_close(mixed, expected, equal_nan=True)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_partner_that_contributes_nothing_makes_nothing_unknown(monkeypatch, mixup, cutmix):
    fix_draws(monkeypatch, 1.0, centre=(4, 4))
    targets = torch.tensor([[1.0, torch.nan], [torch.nan, 0.0]])
    images, mixed = du.TriStateMixup(2, mixup, cutmix)(two_pictures(), targets.clone())
    assert torch.equal(images, two_pictures())
    torch.testing.assert_close(mixed, targets, equal_nan=True, atol=0, rtol=0)


def test_cutmix_box_smaller_than_a_pixel_keeps_known_labels_known(monkeypatch):
    fix_draws(monkeypatch, 0.999, centre=(4, 4))
    targets = torch.tensor([[1.0], [torch.nan]])
    images, mixed = du.TriStateMixup(1, 0.0, 1.0)(two_pictures(), targets.clone())
    assert torch.equal(images, two_pictures())
    torch.testing.assert_close(mixed, targets, equal_nan=True, atol=0, rtol=0)


def test_picture_replaced_altogether_takes_the_partners_targets(monkeypatch):
    fix_draws(monkeypatch, 0.0, centre=(4, 4))
    targets = torch.tensor([[1.0, torch.nan], [torch.nan, 0.0]])
    _, mixed = du.TriStateMixup(2, 0.0, 1.0)(two_pictures(), targets.clone())
    torch.testing.assert_close(mixed, targets.flip(0), equal_nan=True, atol=0, rtol=0)


# ---------------------------------------------------------------- make_loader


class Draws(Dataset):
    """Items that are random numbers: (item, numpy, python, torch)."""

    def __init__(self, length=8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        numbers = (np.random.rand(), random.random(), torch.rand(()).item())  # noqa: NPY002
        return torch.tensor([index, *numbers], dtype=torch.float64)


def draw_epochs(seed, epochs=2, **kwargs):
    loader = du.make_loader(Draws(), 2, seed=seed, **kwargs)
    return torch.stack([torch.cat(list(loader)) for _ in range(epochs)])  # (epochs, items, 4)


def test_random_numbers_differ_between_workers_and_epochs():
    drawn = draw_epochs(5, num_workers=2)
    for generator in (1, 2, 3):  # numpy, python, torch
        assert len(drawn[..., generator].unique()) == 16


def test_workers_random_numbers_and_order_repeat_with_the_seed():
    assert torch.equal(
        draw_epochs(5, num_workers=2, train=True), draw_epochs(5, num_workers=2, train=True)
    )
    other = draw_epochs(6, num_workers=2)
    for generator in (1, 2, 3):
        assert not torch.isin(other[..., generator], draw_epochs(5, num_workers=2)).any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_order_follows_from_the_seed_and_changes_each_epoch(num_workers):
    def order(seed):
        return draw_epochs(seed, 3, train=True, num_workers=num_workers)[..., 0]

    first = order(1)
    torch.manual_seed(99)  # the order is the loader's own
    assert torch.equal(order(1), first)
    assert not torch.equal(order(2), first)
    assert not torch.equal(first[0], first[1])
    for epoch in first:
        assert epoch.sort().values.tolist() == list(range(8))


def test_order_does_not_depend_on_the_number_of_workers():
    orders = [draw_epochs(3, 2, train=True, num_workers=n)[..., 0] for n in (0, 1, 2)]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_keeps_the_order_of_the_partition(num_workers):
    drawn = draw_epochs(1, 1, num_workers=num_workers)
    assert drawn[0, :, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("length", "batch_size", "sizes"),
    [(8, 3, [3, 3, 2]), (6, 3, [3, 3]), (2, 4, [2]), (3, 1, [1, 1, 1]), (1, 4, [1])],
)
def test_last_incomplete_batch_is_kept(length, batch_size, sizes):
    loader = du.make_loader(Draws(length), batch_size, train=True)
    assert [len(batch) for batch in loader] == sizes
    assert len(loader) == len(sizes)
    assert sorted(torch.cat(list(loader))[:, 0].tolist()) == list(range(length))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_photo_that_would_be_a_last_batch_alone_is_left_out_of_training_only(num_workers):
    loader = du.make_loader(Draws(7), 3, train=True, num_workers=num_workers)
    epochs = [[batch[:, 0].tolist() for batch in loader] for _ in range(8)]
    assert {tuple(map(len, batches)) for batches in epochs} == {(3, 3)}
    assert len(loader) == 2
    left_out = [set(range(7)) - set(sum(batches, [])) for batches in epochs]
    assert len(set.union(*left_out)) > 2  # another one each epoch
    assert [len(batch) for batch in du.make_loader(Draws(7), 3)] == [3, 3, 1]


def test_spawned_workers_load_cache_and_augment(partition, tmp_path):
    """Partitions with their transforms pickle; caches are shared; augmentation differs."""
    evaluate = du.make_transforms(PlainModel(16, 32), train=False)
    augment = du.make_transforms(PlainModel(16, 32), train=True, view="panorama")
    plain = du.DataPartition(partition, ["tree", "grass"], evaluate, tmp_path / "cache")
    same = du.DataPartition(partition.iloc[[0] * 4], ["tree", "grass"], augment)
    loader = du.make_loader(ConcatDataset([plain, same]), 1, num_workers=2)
    loader.multiprocessing_context = "spawn"
    batches = list(loader)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 4
    for number, (images, targets) in enumerate(batches[:4]):
        assert torch.equal(images[0], plain[number][0])  # read here from the workers' cache
        torch.testing.assert_close(targets[0], plain[number][1], equal_nan=True)
    augmented = torch.cat([images for images, _ in batches[4:]])
    assert augmented.shape == (4, 3, 16, 32)
    for one, other in [(0, 1), (0, 2), (1, 3)]:
        assert not torch.equal(augmented[one], augmented[other])


# ---------------------------------------------------------------- pictures of tensors


def drawn(figure):
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


def test_normalised_tensor_is_drawn_in_the_colours_of_its_photo():
    """A dull photo stays dull: no channel is stretched to its own range."""
    photo = Image.fromarray(np.asarray(noise(32, 32)) // 4 + 60)
    tensor = du.make_transforms(PlainModel(), train=False)(photo)
    picture = du.to_picture(tensor, PlainModel().data_config)
    figure = du.show_images([picture])
    assert np.abs(255 * drawn(figure)[0] - np.asarray(photo)).max() < 1
    plt.close(figure)


def test_caption_of_a_file_name_that_is_no_utf8_is_drawn():
    figure = du.show_images([noise(8, 8, seed=0)], [os.fsdecode(b"IMG_\xe4.jpg")])
    figure.canvas.draw()
    assert figure.axes[0].get_title() == r"IMG_\udce4.jpg"
    plt.close(figure)


def test_captions_hold_all_labels_between_words_and_keep_their_lines():
    title = "Grass, Water, [Lvl2] Lily, Trees, Building, Sun, Hills, Boardwalk\nsecond line"
    figure = du.show_images([quadrants()] * 2, [title, "short"], columns=2, width=1.5)
    text = figure.axes[0].get_title()
    assert text.replace("\n", " ") == title.replace("\n", " ")
    assert all(len(line) <= 21 for line in text.splitlines())
    assert text.splitlines()[-1] == "second line"
    plt.close(figure)


def test_heat_map_of_four_cells_is_drawn_as_four_cells_over_the_whole_photo():
    heat_map = np.kron(np.array([[0.0, 0.5], [0.25, 1.0]]), np.ones((8, 8)))
    photo = Image.new("RGB", (120, 60), (100, 100, 100))
    over = du.overlay_heat_map(photo, heat_map)
    assert over.shape == (60, 120, 3)
    assert len(np.unique(over.reshape(-1, 3), axis=0)) == 4  # no colour between cells
    assert (over[:30, :60] == 100).all()
    assert (over[30:, 60:] == over[-1, -1]).all()


def test_colour_bar_is_drawn_when_it_has_a_name():
    figure = du.show_images([quadrants()], columns=1, bar="strength")
    assert [axis.get_ylabel() for axis in figure.axes] == ["", "strength"]
    plt.close(figure)


TIFF = b"Exif\0\0II*\0\x08\0\0\0"
BROKEN_EXIF = {
    "cut off": TIFF + b"\x05\0\x12",
    "garbage": b"Exif\0\0" + bytes(range(200)),
    "no TIFF at all": b"Exif\0\0",
    "loop": TIFF + b"\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0" + b"\x08\0\0\0",
    "orientation 99": TIFF + b"\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0" + b"\0" * 4,
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("size", [None, (16, 32)])
def test_broken_exif_never_costs_a_photo(tmp_path, exif, size):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.jpg")
    Image.fromarray(pixels).save(tmp_path / "broken.jpg", exif=exif)
    assert exif in (tmp_path / "broken.jpg").read_bytes()
    good, broken = (du.open_image(tmp_path / f"{n}.jpg", size) for n in ("good", "broken"))
    assert np.array_equal(good, broken)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(du.open_image(image), expected)
    assert np.array_equal(du.open_image(tmp_path / "a.jpg"), expected)
    assert np.array_equal(du.open_image(tmp_path / "a.jpg", expected.shape[:2]), expected)


@pytest.mark.parametrize(("size", "is_whole"), [((64, 32), True), ((32, 32), False)])
def test_whole_panoramas_are_told_by_their_shape(tmp_path, size, is_whole):
    Image.new("RGB", size).save(tmp_path / "a.jpg")
    assert du.is_whole_panorama(tmp_path / "a.jpg") == is_whole
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    assert not du.is_whole_panorama(tmp_path / "a.jpg")


def test_picture_too_large_to_decode_is_no_panorama(tmp_path, monkeypatch):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow raises a DecompressionBombError
    assert not du.is_whole_panorama(tmp_path / "a.png")
