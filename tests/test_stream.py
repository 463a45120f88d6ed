"""Classification of any number of photos into a table that is complete or absent."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import test_classifier as t
from conftest import load_notebook_functions
from hypothesis import given, settings
from hypothesis import strategies as st
from run_notebooks import ROOT
from test_classifier import classifier  # noqa: F401 - a fixture

nb = load_notebook_functions("survey")
SIZES = {"batch_size": 2, "chunk": 3}


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Ten photos in sub-folders, two of them damaged."""
    folder = tmp_path_factory.mktemp("survey")
    for i in range(10):
        path = folder / f"day {i // 4}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        t.picture(i).save(path, quality=95)
    (folder / "day 0" / "1.jpg").write_bytes(b"no photo")
    whole = (folder / "day 2" / "8.jpg").read_bytes()
    (folder / "day 2" / "8.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def expected(classifier, photos, **options):  # noqa: F811
    table = classifier.predict(photos, batch_size=2, unreadable="skip", **options)
    errors = [reason for _, reason in table.attrs["unreadable"]]
    return errors, table.assign(image=table["image"].astype(str))


def stored(path):
    return pd.read_csv(path, dtype={"image": str}, float_precision="round_trip")


def check(classifier, survey, out, **options):  # noqa: F811
    errors, table = expected(classifier, survey, **options)
    pd.testing.assert_frame_equal(stored(out / "predictions.csv"), table, check_exact=True)
    failed = pd.read_csv(out / "failed.csv")
    assert failed["image"].tolist() == [str(survey / n) for n in ("day 0/1.jpg", "day 2/8.jpg")]
    assert failed["reason"].tolist() == errors
    assert sorted(p.name for p in out.iterdir()) == ["failed.csv", "predictions.csv"]


def test_folder_is_classified_in_chunks_as_at_once(classifier, survey, tmp_path):  # noqa: F811
    found = nb.predict_to(classifier, survey, tmp_path / "predictions.csv", **SIZES)
    check(classifier, survey, tmp_path)
    assert found["photos"] == 10
    assert 0 <= found["waited"] <= 1
    assert found["photos_per_second"] > 0


def test_parquet_holds_the_same_table(classifier, survey, tmp_path):  # noqa: F811
    pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    nb.predict_to(classifier, survey, tmp_path / "trees.parquet", **SIZES)
    _, table = expected(classifier, survey)
    found = pd.read_parquet(tmp_path / "trees.parquet")
    pd.testing.assert_frame_equal(found, table, check_exact=True, check_dtype=False)
    assert [str(kind) for kind in found.dtypes[1:]] == [str(kind) for kind in table.dtypes[1:]]
    assert len(pd.read_csv(tmp_path / "trees_failed.csv")) == 2


def test_csv_glob_and_list_keep_their_order(classifier, survey, tmp_path):  # noqa: F811
    names = [f"day {i // 4}/{i}.jpg" for i in (9, 0, 5, 1, 5, 3)]
    table = pd.DataFrame({"image_path": names, "group_id": "g", "tree": 1})
    table.to_csv(survey / "photos.csv", index=False)
    ways = {"csv": survey / "photos.csv", "list": [survey / name for name in names]}
    for way, images in ways.items():
        nb.predict_to(classifier, images, tmp_path / f"{way}.csv", **SIZES)
        found = [
            os.path.relpath(image, survey) for image in stored(tmp_path / f"{way}.csv")["image"]
        ]
        assert found == [name for name in names if name != "day 0/1.jpg"]
        assert len(pd.read_csv(tmp_path / f"{way}_failed.csv")) == 1
    nb.predict_to(classifier, f"{survey}/**/*.jpg", tmp_path / "glob.csv", **SIZES)
    assert len(stored(tmp_path / "glob.csv")) == 8


def test_panoramas_have_a_line_per_part(classifier, tmp_path):  # noqa: F811
    folder = tmp_path / "panoramas"
    folder.mkdir()
    for i in range(4):
        t.picture(i, 160, 80).save(folder / f"{i}.jpg")
    t.picture(4).save(folder / "no panorama.jpg")
    path = tmp_path / "panorama_predictions.csv"
    nb.predict_to(classifier, folder, path, **SIZES, panorama=True)
    _, table = expected(classifier, folder, panorama=True)
    pd.testing.assert_frame_equal(stored(path), table, check_exact=True)
    assert "no 2:1 panorama" in pd.read_csv(tmp_path / "panorama_failed.csv")["reason"].item()


def test_photos_that_all_fail_give_an_empty_table(classifier, tmp_path):  # noqa: F811
    (tmp_path / "a.jpg").write_bytes(b"")
    for suffix in ("csv", *(["parquet"] if find_spec("pyarrow") else [])):
        nb.predict_to(classifier, [tmp_path / "a.jpg"], tmp_path / f"predictions.{suffix}")
    assert len(stored(tmp_path / "predictions.csv")) == 0
    assert len(pd.read_csv(tmp_path / "failed.csv")) == 1


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ("gone", "gone: no such folder, CSV or photo."),
        ("empty", "empty: no image in it."),
        ("em*/*.jpg", r"em\*/\*.jpg: no image in it."),
        ("names.csv", "names.csv: expected a CSV with commas and a column image_path .*"),
        ("torn.csv", "torn.csv: expected a CSV with commas and a column image_path .*"),
        ("raw.csv", "raw.csv: expected a CSV with commas and a column image_path .*"),
        ("gap.csv", r"gap.csv: expected .* image_path \(photo 2 has no name\)."),
        ("a.txt", "a.txt: expected a folder, a CSV, a pattern or a photo."),
    ],
)
def test_input_without_photos_is_named(classifier, tmp_path, monkeypatch, images, problem):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("names.csv").write_text("name\na.jpg\n")
    Path("torn.csv").write_text('image_path,tree\na.jpg,1\n"b,1\n')
    Path("raw.csv").write_bytes(b"image_path\n\xff\xfe\x00.jpg\n")
    Path("gap.csv").write_text("image_path,tree\na.jpg,1\n,1\n")
    Path("a.txt").write_text("a.jpg")
    with pytest.raises((FileNotFoundError, ValueError), match=f"^{problem}$"):
        nb.predict_to(classifier, images, "out/predictions.csv")
    assert not Path("out").exists() or not [*Path("out").iterdir()]


def test_folder_in_a_list_is_no_photo(classifier, survey, tmp_path):  # noqa: F811
    photos = [survey / "day 1" / "4.jpg", survey / "day 0"]
    nb.predict_to(classifier, photos, tmp_path / "predictions.csv", **SIZES)
    assert stored(tmp_path / "predictions.csv")["image"].tolist() == [str(photos[0])]
    failed = pd.read_csv(tmp_path / "failed.csv")
    assert failed.to_numpy().tolist() == [[str(photos[1]), "a folder, not a photo"]]


def test_a_hundred_photos_lost_in_a_row_stop_it(classifier, survey, tmp_path):  # noqa: F811
    photos = [survey / "day 1" / "4.jpg"] * 20 + [f"gone/{i}.jpg" for i in range(180)]
    path = tmp_path / "predictions.csv"
    with pytest.raises(OSError, match=r"gone/129\.jpg: the 100th in a row; is the disk still"):
        nb.predict_to(classifier, photos, path, chunk=150)
    assert not path.exists()
    assert nb.predict_to(classifier, photos[:70], tmp_path / "other.csv", chunk=150)["photos"] == 70


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="may write everywhere")
def test_read_only_folder_is_one_sentence(classifier, survey, tmp_path):  # noqa: F811
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match=r"predictions\.csv\.parts: cannot be written \(Permission"):
        nb.predict_to(classifier, survey, tmp_path / "predictions.csv", **SIZES)
    tmp_path.chmod(0o755)


def test_file_in_the_place_of_a_folder_is_one_sentence(classifier, survey, tmp_path):  # noqa: F811
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match=r"csv\.parts: cannot be written \(.*\); free some space or"):
        nb.predict_to(classifier, survey, tmp_path / "out" / "predictions.csv", **SIZES)


@pytest.mark.parametrize(
    ("names", "images", "sites"),
    [
        (["a/1.jpg", "b/c/2.jpg"], "{}", ["a", "b"]),
        (["a/1.jpg", "b/c/2.jpg"], "{}/*/**/*.jpg", ["a", "b"]),
        (["s/a/1.jpg", "s/b/2.jpg"], "{}/list.csv", ["a", "b"]),
        (["1.jpg", "2.jpg"], "{}/[12].jpg", ["all", "all"]),
        (["a/1.jpg"], "{}/*/1.jpg", ["a"]),
    ],
)
def test_site_is_the_first_folder_of_what_is_asked_for(tmp_path, names, images, sites):
    paths = [str(tmp_path / name) for name in names]
    found = nb.with_places(pd.DataFrame({"image": paths}), images.format(tmp_path))
    assert found["site"].tolist() == sites


def test_other_suffix_is_refused(classifier, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"suffix of the table='.xlsx': expected '.csv' or"):
        nb.predict_to(classifier, tmp_path, tmp_path / "a.xlsx")


# ---------------------------------------------------------------- stopped and begun again


def stop_at(monkeypatch, photo, error):
    """Raise `error` when a photo is opened, once."""
    real, left = du.open_image, [error]

    def opened(image, size=None):
        if Path(image).name == photo and left:
            raise left.pop()
        return real(image, size)

    monkeypatch.setattr(du, "open_image", opened)


def test_stopped_by_hand_it_goes_on_with_the_photos_it_began_with(
    classifier,  # noqa: F811
    survey,
    tmp_path,
    monkeypatch,
):
    stop_at(monkeypatch, "7.jpg", KeyboardInterrupt())
    path = tmp_path / "predictions.csv"
    with pytest.raises(KeyboardInterrupt, match="keeps what is done; the same call goes on from"):
        nb.predict_to(classifier, survey, path, **SIZES)
    assert not path.exists()
    added = survey / "day 0" / "added later.jpg"
    t.picture(11).save(added)
    again = nb.predict_to(classifier, survey, path, **SIZES)
    added.unlink()
    assert again["photos"] == 4  # chunks of 3: two were done
    check(classifier, survey, tmp_path)


def test_other_photos_or_another_classifier_do_not_go_on_with_it(
    classifier,  # noqa: F811
    survey,
    tmp_path,
    monkeypatch,
):
    path = tmp_path / "predictions.csv"
    stop_at(monkeypatch, "7.jpg", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        nb.predict_to(classifier, survey, path, **SIZES)
    other = du.Classifier(t.tiny_model(), t.LABELS, [0.1] * 3, "half", t.PANORAMA_THRESHOLDS)
    for used, images, what in ((other, survey, "classifier"), (classifier, [survey], "images")):
        fix = f"restore them to go on, or delete {path}.parts to begin again"
        with pytest.raises(ValueError, match=f"not begun with these {what}; {fix}"):
            nb.predict_to(used, images, path, **SIZES)
    (tmp_path / "predictions.csv.parts" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json: cannot be read .*; delete .* to begin"):
        nb.predict_to(classifier, survey, path, **SIZES)
    shutil.rmtree(f"{path}.parts")
    nb.predict_to(classifier, survey, path, **SIZES)
    check(classifier, survey, tmp_path)


def test_full_disk_is_one_sentence_and_the_same_call_goes_on(
    classifier,  # noqa: F811
    survey,
    tmp_path,
    monkeypatch,
):
    path, real, calls = tmp_path / "predictions.csv", nb.write_piece, []

    def write(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28), str(path))
        return real(*args)

    monkeypatch.setattr(nb, "write_piece", write)
    with pytest.raises(OSError, match=r"parts: cannot be written \(No space left.*\); free some"):
        nb.predict_to(classifier, survey, path, **SIZES)
    assert nb.predict_to(classifier, survey, path, **SIZES)["photos"] == 4
    check(classifier, survey, tmp_path)


def test_chunks_that_a_finished_run_left_are_not_taken_for_new_ones(
    classifier,  # noqa: F811
    survey,
    tmp_path,
):
    parts = tmp_path / "predictions.csv.parts"
    parts.mkdir()
    (parts / "00000001.csv").write_text("left,0,0,0,0,0,0\n")
    nb.predict_to(classifier, survey, tmp_path / "predictions.csv", **SIZES)
    check(classifier, survey, tmp_path)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import os, random, signal, threading, time
import data_utils as du
import test_classifier as t
from conftest import load_notebook_functions
nb = load_notebook_functions("survey")
for attempt in range(100):
    child = os.fork()
    if child == 0:
        if attempt < 10:  # the time it takes is unknown: kill at a random photo
            real, left = du.open_image, [random.Random(attempt).randrange(2, 8)]
            def opened(image, size=None):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(image, size)
            du.open_image = opened
        # not before the fork: OpenMP's threads do not come along
        model = t.tiny_model()
        classifier = du.Classifier(model, t.LABELS, t.THRESHOLDS, "half", t.PANORAMA_THRESHOLDS)
        nb.predict_to(classifier, {photos!r}, {path!r}, batch_size=2, chunk=3)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
    if status == 0:
        break
    assert not os.path.exists({path!r})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_ten_times_it_loses_no_row_and_writes_none_twice(classifier, tmp_path):  # noqa: F811
    photos, path = tmp_path / "photos", tmp_path / "out" / "predictions.csv"
    photos.mkdir()
    for i in range(70):  # more than ten attempts of two chunks
        t.picture(i).save(photos / f"{i:02}.jpg")
    (photos / "07.jpg").write_bytes(b"no photo")
    code = KILLED.format(root=str(ROOT), photos=str(photos), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split().count(str(-signal.SIGKILL)) == 10
    _, table = expected(classifier, photos)
    pd.testing.assert_frame_equal(stored(path), table, check_exact=True)
    assert pd.read_csv(tmp_path / "out" / "failed.csv")["image"].tolist() == [
        str(photos / "07.jpg")
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == ["failed.csv", "predictions.csv"]


# ---------------------------------------------------------------- names and order


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=9), max_size=6)
)
def test_any_file_name_comes_back(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    made = set()
    for name in names:
        name = f"x{name}.jpg"
        with contextlib.suppress(OSError, UnicodeEncodeError):  # no name of a file here
            (folder / name).write_bytes(b"")
            made.add(str(folder / name))
    assert list(nb.each_path(str(folder))) == [str(p) for p in sorted(map(Path, made))]


def test_photos_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    for name in ("b/1.jpg", "b.jpg", "a/z/2.jpg", "a.jpg", "a/z.jpg", "B/3.jpg", "a b/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert du.list_images(tmp_path) == sorted(tmp_path.rglob("*.jpg"))


def test_threads_read_ahead_in_order_and_no_further_than_two_batches(tmp_path):
    class Slow:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 23

        def __getitem__(self, index):
            time.sleep(0.002 * random.random())
            self.read.append(index)
            return np.float32(index), f"photo {index}"

    data, found = Slow(), []
    for numbers, names in du.read_ahead(data, 4):
        assert len(data.read) <= len(found) + 3 * 4
        assert list(names) == [f"photo {int(number)}" for number in numbers]
        found += numbers.tolist()
    assert found == list(range(23))


def test_memory_does_not_grow_with_the_number_of_photos(classifier, tmp_path, monkeypatch):  # noqa: F811
    def answer(paths, *_, **__):
        table = classifier._table(paths, np.zeros((len(paths), 1, 3)), False, False)
        table.attrs |= {"busy": 0.0, "unreadable": []}
        return table

    monkeypatch.setattr(classifier, "predict", answer)
    peaks = []
    for n in (1_000, 20_000, 40_000):  # warms up; as large as the blocks that pandas reads
        names = pd.DataFrame({"image_path": [f"{i:09}.jpg" for i in range(n)]})
        names.to_csv(tmp_path / "photos.csv", index=False)
        del names
        tracemalloc.start()
        nb.predict_to(classifier, tmp_path / "photos.csv", tmp_path / f"{n}.csv", chunk=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(stored(tmp_path / f"{n}.csv")) == n
    assert peaks[2] < 1.2 * peaks[1]
