"""Splitting by groups, label rates in the parts, and near-duplicates."""

import itertools
import os
import warnings

from data_utils import load_parts, read_csv_labels, read_partition, write_partition

import numpy as np
import pandas as pd
import pytest
from conftest import load_notebook_functions
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

notebook = load_notebook_functions("partitioning")
find_near_duplicates = notebook.find_near_duplicates
group_stratified_split = notebook.group_stratified_split
label_distribution = notebook.label_distribution
NAN = float("nan")
PARTS = ["train", "val", "test"]


def draw_rows(n_groups: int, seed: int, unknown: float = 0.0, labels: int = 12) -> pd.DataFrame:
    """Two halves a group; a label's halves are correlated; positive rates from 3 to 40 %."""
    rng = np.random.default_rng(seed)
    shared = np.repeat(rng.random((n_groups, labels)), 2, axis=0)
    own = rng.random((2 * n_groups, labels))
    values = np.where(rng.random(own.shape) < 0.5, shared, own) < np.linspace(0.03, 0.4, labels)
    values = np.where(rng.random(own.shape) < unknown, np.nan, values)
    df = pd.DataFrame(values, columns=[f"label {i}" for i in range(labels)])
    return df.assign(group_id=np.repeat(np.arange(n_groups), 2))


def labels_in(df: pd.DataFrame) -> list[str]:
    return [column for column in df.columns if column.startswith("label")]


def assert_whole(parts: dict[str, pd.DataFrame], df: pd.DataFrame) -> None:
    """Every row exactly once, unchanged, and no group in two parts."""
    assert list(parts) == PARTS
    pd.testing.assert_frame_equal(pd.concat(parts.values()).sort_index(), df)
    for a, b in itertools.combinations(parts.values(), 2):
        assert set(a["group_id"]).isdisjoint(b["group_id"])


@st.composite
def tables(draw):
    """Rows of 3 to 40 groups of 1 to 4 rows with 1 to 5 labels, some unknown."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=3, max_size=40))
    n_labels = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    shape = (sum(sizes), n_labels)
    values = (rng.random(shape) < draw(st.floats(0, 1))).astype(float)
    values[rng.random(shape) < draw(st.sampled_from([0, 0.3, 1]))] = np.nan
    df = pd.DataFrame(values, columns=[f"label {i}" for i in range(n_labels)])
    df["group_id"] = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    return df.sample(frac=1, random_state=draw(st.integers(0, 100))).reset_index(drop=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables(), st.integers(0, 3))
def test_groups_stay_whole_and_every_row_is_in_exactly_one_part(df, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some labels are rare by design
        parts = group_stratified_split(df, labels_in(df), seed=seed)
        again = group_stratified_split(df, labels_in(df), seed=seed)
    assert_whole(parts, df)
    for name in PARTS:
        pd.testing.assert_frame_equal(parts[name], again[name])
        assert parts[name].index.is_monotonic_increasing


@pytest.mark.filterwarnings("ignore:Labels present in fewer")
@pytest.mark.parametrize("n_groups", [3, 4, 5, 7, 10])
def test_no_part_is_empty_however_few_groups_there_are(n_groups):
    df = pd.DataFrame({"group_id": range(n_groups), "label": np.arange(n_groups) % 2 * 1.0})
    for seed in range(3):
        parts = group_stratified_split(df, ["label"], seed=seed)
        assert all(len(parts[name]) for name in PARTS)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("n_groups", "most"), [(2000, 0.2), (200, 2.5)])
def test_largest_deviation_of_a_label_rate_in_any_part(n_groups, most, seed):
    df = draw_rows(n_groups, seed)
    parts = group_stratified_split(df, labels_in(df), seed=seed)
    assert label_distribution(parts, labels_in(df))["deviation"].abs().max() <= most
    assert_whole(parts, df)


def test_parts_have_the_wished_sizes():
    df = draw_rows(400, seed=3)
    parts = group_stratified_split(df, labels_in(df), ratios=(6, 3, 1))
    shares = [len(parts[name]) / len(df) for name in PARTS]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.02)


def test_seed_decides_the_split_and_does_not_touch_the_global_generator():
    df = draw_rows(60, seed=0, labels=3)
    np.random.seed(5)  # noqa: NPY002 - the legacy generator is what must not be touched
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = group_stratified_split(df, labels_in(df), seed=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    np.random.seed(6)  # noqa: NPY002
    assert first["test"].index.equals(
        group_stratified_split(df, labels_in(df), seed=1)["test"].index
    )
    other = group_stratified_split(df, labels_in(df), seed=2)
    assert not first["test"].index.equals(other["test"].index)


def test_unknown_cells_are_not_counted_as_absent():
    df = draw_rows(600, seed=4, unknown=0.6, labels=4)
    half = df["group_id"] < 300
    df.loc[half, "label 0"] = np.where(df.loc[half, "label 1"].isna(), np.nan, 1.0)
    parts = group_stratified_split(df, labels_in(df))
    found = label_distribution(parts, labels_in(df))
    assert found["deviation"].abs().max() <= 1.0  # rates among the known cells
    assert found["unknown"].sum() == df[labels_in(df)].isna().sum().sum()


def test_group_column_and_index_of_any_kind():
    df = (
        draw_rows(40, seed=1, labels=2).drop(columns="label 0").rename(columns={"group_id": "site"})
    )
    df["site"] = "site " + df["site"].astype(str)
    df.index = [f"row {i}" for i in range(len(df))]
    parts = group_stratified_split(df, labels_in(df), group_col="site")
    pd.testing.assert_frame_equal(pd.concat(parts.values()).loc[df.index], df)
    assert sum(parts[name]["site"].nunique() for name in PARTS) == 40


def test_warns_of_labels_that_fewer_than_three_groups_show():
    df = pd.DataFrame({"group_id": np.repeat(range(10), 2), "two": 0.0, "three": 0.0, "none": 0.0})
    df.loc[[0, 1, 2], "two"] = 1  # three rows, but only the groups 0 and 1
    df.loc[[0, 2, 4], "three"] = 1
    with pytest.warns(UserWarning, match=r"fewer than 3 groups: two \(2\), none \(0\)\.") as caught:
        parts = group_stratified_split(df, ["two", "three", "none"])
    assert len(caught) == 1
    assert_whole(parts, df)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_stratified_split(df, ["three"])


@pytest.mark.parametrize("ratios", [(0.8, 0.2), (0.8, 0.2, 0.0), (1.2, -0.1, -0.1), (1, 1, 1, 1)])
def test_ratios_that_are_not_three_positive_numbers_are_refused(ratios):
    df = draw_rows(10, seed=0, labels=1)
    with pytest.raises(ValueError, match="three positive numbers"):
        group_stratified_split(df, labels_in(df), ratios=ratios)


@pytest.mark.filterwarnings("ignore:Labels present in fewer")
def test_ratios_are_left_as_they_were():
    ratios = np.array([7.0, 2.0, 1.0])
    df = draw_rows(10, seed=0, labels=1)
    group_stratified_split(df, labels_in(df), ratios=ratios)
    assert ratios.tolist() == [7, 2, 1]


def test_too_few_groups_and_rows_without_a_group_are_refused():
    df = draw_rows(2, seed=0, labels=1)
    with pytest.raises(ValueError, match="2 groups cannot fill 3 parts"):
        group_stratified_split(df, labels_in(df))
    df = draw_rows(10, seed=0, labels=1).astype({"group_id": float})
    df.loc[[3, 4], "group_id"] = NAN
    with pytest.raises(ValueError, match="2 rows have no group_id"):
        group_stratified_split(df, labels_in(df))


# ---------------------------------------------------------------- label_distribution


def test_label_distribution_counts_a_hand_made_case():
    parts = {
        "train": pd.DataFrame({"Sun": [1, 1, 0, 0.0], "Sea": [1, NAN, NAN, 0.6], "x": "?"}),
        "test": pd.DataFrame({"Sun": [1, 0, 0, 0.0], "Sea": [NAN, 0.4, 0, 1], "x": "?"}),
    }
    found = label_distribution(parts, ["Sun", "Sea"])
    assert found[["label", "part", "present", "absent", "unknown"]].values.tolist() == [
        ["Sun", "train", 2, 2, 0],
        ["Sun", "test", 1, 3, 0],
        ["Sea", "train", 2, 0, 2],
        ["Sea", "test", 1, 2, 1],
    ]
    assert found["rate"].tolist() == pytest.approx([0.5, 0.25, 1, 1 / 3])
    # overall 3 of 8 suns and 3 of 5 seas
    assert found["deviation"].tolist() == pytest.approx([12.5, -12.5, 40, 100 / 3 - 60])


def test_rate_of_a_label_that_nobody_judged_in_a_part_is_unknown():
    parts = {"train": pd.DataFrame({"Sun": [1.0, 0.0]}), "test": pd.DataFrame({"Sun": [NAN]})}
    found = label_distribution(parts, ["Sun"]).set_index("part")
    assert found.loc["test", ["present", "absent", "unknown"]].tolist() == [0, 0, 1]
    assert np.isnan(found.loc["test", "rate"]) and np.isnan(found.loc["test", "deviation"])
    assert found.loc["train", "deviation"] == 0


# ---------------------------------------------------------------- find_near_duplicates


def scene(seed: int) -> Image.Image:
    """A picture of random coloured discs."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 320), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y, r = rng.integers(0, 320), rng.integers(0, 320), rng.integers(15, 70)
        color = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse([int(x - r), int(y - r), int(x + r), int(y + r)], fill=color)
    return image


@pytest.fixture
def pictures(tmp_path):
    """0 a picture, 1 re-encoded and smaller, 2 slightly cropped, 3 to 6 other pictures."""
    image = scene(0)
    copies = [image, image.resize((240, 240)), image.crop((3, 3, 317, 317))]
    paths = []
    for i, copy in enumerate([*copies, *(scene(seed) for seed in (1, 2, 3, 4))]):
        paths.append(tmp_path / f"{i}.jpg")
        copy.save(paths[-1], quality=60 if i == 1 else 90)
    return paths


def test_copies_are_found_and_different_pictures_are_not(pictures):
    pairs = find_near_duplicates(pictures, n_jobs=1)
    assert pairs.columns.tolist() == ["first", "second", "distance"]
    assert {(a, b) for a, b in zip(pairs["first"], pairs["second"])} == {(0, 1), (0, 2), (1, 2)}
    assert pairs["distance"].is_monotonic_increasing
    assert pairs["distance"].max() <= 6
    assert pairs.attrs["unreadable"] == []


def test_max_distance_bounds_the_pairs(pictures):
    every = find_near_duplicates(pictures, max_distance=64, n_jobs=1)
    assert len(every) == 7 * 6 / 2
    far = every.iloc[-1]["distance"]
    assert len(find_near_duplicates(pictures, max_distance=far - 1, n_jobs=1)) < len(every)
    same = find_near_duplicates([pictures[3], pictures[3]], max_distance=0, n_jobs=1)
    assert same.values.tolist() == [[0, 1, 0]]


def test_pairs_are_found_among_more_images_than_are_compared_at_once(pictures):
    paths = [pictures[0]] + [pictures[3]] * 1099 + [pictures[1]]
    pairs = find_near_duplicates(paths, max_distance=6, n_jobs=2)
    assert ((pairs["first"] == 0) & (pairs["second"] == 1100)).sum() == 1
    assert len(pairs) == 1 + 1099 * 1098 // 2


def test_unreadable_files_are_named_or_skipped(pictures, tmp_path):
    broken, gone = tmp_path / "broken.jpg", tmp_path / "gone.jpg"
    broken.write_bytes(pictures[0].read_bytes()[:2000])
    paths = [broken, *pictures[:2], gone]
    with pytest.raises(OSError, match=r"2 images cannot be read: .*broken\.jpg.*gone\.jpg"):
        find_near_duplicates(paths, n_jobs=1)
    pairs = find_near_duplicates(paths, unreadable="skip", n_jobs=1)
    assert pairs[["first", "second"]].values.tolist() == [[1, 2]]  # positions in `paths`
    first, second = pairs.attrs["unreadable"]
    assert "broken.jpg" in first and "gone.jpg" in second


def test_pictures_without_content_are_no_duplicates(tmp_path):
    """A hash of nothing but noise and a slope of light says nothing: skies all look alike."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    slope = np.linspace(180, 200, 64)[:, None, None]
    for path in paths[:3]:
        sky = slope + rng.normal(0, 0.5, (64, 64, 3))
        Image.fromarray(sky.astype(np.uint8)).save(path)
    scene(0).save(paths[3])
    assert notebook.image_hash(paths[0]) is None
    pairs = find_near_duplicates([*paths, paths[3]], max_distance=64, n_jobs=1)
    assert pairs.values.tolist() == [[3, 4, 0]]


def test_pairs_are_those_of_comparing_every_two_hashes():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (300, 64)).astype(bool)
    bits[150:] = bits[:150] ^ (rng.random((150, 64)) < 0.06)
    bits[7] = bits[11]
    differ = (bits[:, None] != bits[None]).sum(-1)
    expected = [(differ[i, j], i, j) for i, j in zip(*np.triu_indices(300, 1)) if differ[i, j] < 7]
    found = notebook.close_pairs(bits, 6)[["distance", "first", "second"]]
    assert found.values.tolist() == [list(map(int, pair)) for pair in sorted(expected)]
    assert len(found) > 100


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_have_no_pairs(pictures, n):
    pairs = find_near_duplicates(pictures[:n], n_jobs=1)
    assert pairs.empty and pairs.columns.tolist() == ["first", "second", "distance"]


def write_parts(folder, **groups):
    for name, ids in groups.items():
        rows = {"image_path": [f"{folder}/{i}.jpg" for i in ids], "group_id": ids, "Tree": 1.0}
        write_partition(pd.DataFrame(rows), folder / f"{name}_partition.csv")


def test_the_three_parts_are_read_with_their_labels(tmp_path):
    write_parts(tmp_path, train=["a", "b"], val=["c"], test=["d"])
    parts, labels = load_parts(tmp_path)
    assert labels == ["Tree"] and {name: len(t) for name, t in parts.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }


def test_a_missing_part_names_the_notebook_that_makes_it(tmp_path):
    write_parts(tmp_path, train=["a"], test=["d"])
    with pytest.raises(FileNotFoundError, match=r"val_partition.csv: .* partitioning.ipynb"):
        load_parts(tmp_path)
    assert list(load_parts(tmp_path, ("train", "test"))[0]) == ["train", "test"]


def test_a_group_in_two_parts_is_refused(tmp_path):
    write_parts(tmp_path, train=["a", "b"], val=["c"], test=["b"])
    with pytest.raises(ValueError, match="group b is in train and in test; run partitioning.ipynb"):
        load_parts(tmp_path)


def test_parts_with_other_labels_are_refused(tmp_path):
    write_parts(tmp_path, train=["a"], val=["c"], test=["d"])
    (tmp_path / "val_partition.csv").write_text("image_path,group_id,Tree,Lake\nx.jpg,c,1,0\n")
    with pytest.raises(ValueError, match="val_partition.csv: .* train_partition.csv: Lake"):
        load_parts(tmp_path)


def test_groups_of_an_earlier_test_stay_the_test_when_more_is_labelled(tmp_path):
    df = draw_rows(40, seed=2)
    df["image_path"] = [f"photos/{i:03}.jpg" for i in range(len(df))]
    df["group_id"] = df["group_id"].astype(str)
    labels = [c for c in df if c not in ("group_id", "image_path")]
    first = df[df["group_id"].isin(df["group_id"].unique()[:25])].reset_index(drop=True)
    test = group_stratified_split(first, labels, seed=3)["test"]
    write_partition(test, tmp_path / "test_partition.csv")
    held = notebook.held_out(df, str(tmp_path / "test_partition.csv"))
    parts = notebook.split_beside(df, held, labels, seed=3)
    assert set(parts["test"]["group_id"]) == set(test["group_id"])
    assert_whole(parts, df)


def test_test_is_known_by_its_photos_where_the_names_of_groups_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"image_path": ["a.jpg", "b.jpg"], "group_id": ["007", "Mo\u0308we"], "Sea": [1.0, 0.0]}
    write_partition(pd.DataFrame(rows), "test_partition.csv")
    names = ["7", "7", "M\u00f6we ", "another"]
    new = [os.path.abspath("a.jpg"), "c.jpg", "d.jpg", "e.jpg"]
    df = pd.DataFrame({"image_path": new, "group_id": names})
    with pytest.warns(UserWarning, match=r"no labelled photo of 007; was GROUP_BY another\?"):
        held = notebook.held_out(df, "test_partition.csv")
    assert held.tolist() == [True, True, True, False]  # c.jpg shares a group with a.jpg


def test_folder_of_the_test_is_one_of_the_images_or_a_path(monkeypatch):
    monkeypatch.setattr(notebook, "IMAGE_DIR", ".")
    paths = ["val/a.jpg", "val2/b.jpg", "None/c.jpg", "x/val/d.jpg"]
    df = pd.DataFrame({"image_path": paths, "group_id": list("abcd")})
    for fixed in ("val", "val/", "./val"):
        assert notebook.held_out(df, fixed).tolist() == [True, False, False, False]


def test_label_that_the_given_test_lacks_is_told():
    df = draw_rows(30, seed=1, labels=3)
    held = df["group_id"].isin(df["group_id"].unique()[:6])
    df.loc[held, "label 2"] = 0.0
    with pytest.warns(UserWarning, match="no group of some part shows: .*label 2"):
        notebook.split_beside(df, held, labels_in(df), seed=3)


def test_given_test_photos_are_the_test_and_the_rest_is_drawn_as_ever():
    df = draw_rows(60, seed=1)
    labels = [c for c in df if c != "group_id"]
    nobody = pd.Series(False, index=df.index)
    own = notebook.split_beside(df, nobody, labels, seed=3)
    for name, part in group_stratified_split(df, labels, seed=3).items():
        pd.testing.assert_frame_equal(own[name], part)
    held = df["group_id"].isin(df["group_id"].unique()[::6])
    parts = notebook.split_beside(df, held, labels, ratios=(0.6, 0.2, 0.2), seed=3)
    assert list(parts) == PARTS
    pd.testing.assert_frame_equal(parts["test"], df[held])
    pd.testing.assert_frame_equal(pd.concat(parts.values()).sort_index(), df)
    assert len(parts["val"]) / (~held).sum() == pytest.approx(0.2, abs=0.02)
    assert not set(parts["train"]["group_id"]) & set(parts["val"]["group_id"])


@pytest.mark.parametrize(("n_groups", "n_rare"), [(100, 3), (100, 4), (30, 4), (3000, 3)])
def test_a_label_of_three_groups_or_more_is_in_every_part(n_groups, n_rare):
    for seed in range(5 if n_groups > 1000 else 20):
        rng = np.random.default_rng(seed)
        df = pd.DataFrame({"common": (rng.random(4 * n_groups) > 0.6) * 1.0})
        df["group_id"] = np.repeat(np.arange(n_groups), 4)
        for label in ("rare", "other"):
            df[label] = df["group_id"].isin(rng.choice(n_groups, n_rare, replace=False)) * 1.0
        parts = group_stratified_split(df, ["common", "rare", "other"], seed=seed)
        assert all((part[["rare", "other"]].sum() > 0).all() for part in parts.values())


def test_labels_that_cannot_be_in_every_part_are_named():
    shown = {f"label {i}": np.isin(np.arange(4), [a for a in range(4) if a != i]) for i in range(4)}
    df = pd.DataFrame(shown, dtype=float).assign(group_id=list("abcd"))
    split = group_stratified_split  # of 4 groups one part gets two; each other lacks a label
    with pytest.warns(UserWarning, match=r"no group of some part shows: label \d, label \d\."):
        split(df, list(shown))


def test_label_may_be_called_self(tmp_path):
    (tmp_path / "a.csv").write_text("image_path,group_id,self\na.jpg,g,1\n")
    table, labels = read_partition(tmp_path / "a.csv")
    assert labels == ["self"]
    assert table["self"].tolist() == [1.0]


def test_column_of_file_names_cannot_be_kept_as_another(tmp_path):
    (tmp_path / "a.csv").write_text("image,tree\na.jpg,1\n")
    with pytest.raises(ValueError, match="no column image to keep"):
        read_csv_labels(tmp_path / "a.csv", keep=["image"])
