"""Files from anywhere: damaged, disguised, or made to reach out of their folder.

Whatever a reader is given, one sentence of ours that names the file comes out, or a result; nothing
is written, nothing outside the folder is read, and no program is started.
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import sqlite3
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import test_classifier as c
import test_training as t
import torch
from conftest import checklist, data_row, labelled, load_notebook_functions, radio, text
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from safetensors.torch import save
from test_training import sets, tables  # noqa: F401 - fixtures

survey = load_notebook_functions("survey")

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ---------------------------------------------------------------- what a reader may do

SEEN: list[tuple[str, object, object]] = []
WATCHED = ("open", "subprocess.Popen", "os.system", "socket.connect", "os.remove", "os.rename")


def watch(event, args):
    if SEEN and event in WATCHED:
        SEEN.append((event, *args[:2]))


sys.addaudithook(watch)  # sees builtins.open, Path.open, os.open, and so all of Python's libraries
OURS = tuple(os.path.realpath(p) for p in {sys.prefix, sys.base_prefix, str(c.ROOT)})
HARMLESS = (*OURS, "/dev/null", "/dev/urandom", "/proc/", "/sys/", "/usr/lib/", "/usr/share/")


def tree(folder):
    """Return what changes with any name or content below a folder."""
    files = sorted(Path(folder).rglob("*"))
    return [(str(f), f.read_bytes() if f.is_file() else os.path.islink(f)) for f in files]


def reached_out(folder, events, readable=()):
    """Return what was done outside of the folder, but for Python's own libraries."""
    found = []
    for event, target, mode in events:
        if event == "os.remove" and mode != -1:  # by shutil.rmtree, from within a folder
            continue
        path = os.path.realpath(os.fsdecode(target)) if isinstance(target, (str, bytes)) else ""
        writes = event != "open" or (isinstance(mode, str) and set(mode) & set("wax+"))
        inside = path.startswith(os.path.realpath(folder) + os.sep)
        if path and not inside and (writes or not path.startswith((*HARMLESS, *readable))):
            found.append((event, target, mode))
    return found


def survives(read, folder, names, writes=False, readable=()):
    """Call a reader; it gives a result, or one sentence of ours with the name of a file."""
    before, answer = tree(folder), None
    SEEN[:] = [("begin", None, None)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = read()
    except (ValueError, OSError) as error:
        told = str(error)
        assert any(name in told for name in names), f"no file is named: {told!r}"
        assert "\n" not in told.strip(), told
        if getattr(error, "errno", None) is None:  # else the system's own sentence
            assert told.endswith((".", "?")), told
    finally:
        events, SEEN[:] = SEEN[1:], []
    assert not reached_out(folder, events, readable)
    assert writes or tree(folder) == before
    return answer


# ---------------------------------------------------------------- hostile bytes and values

TOKENS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n", b"\r", b",", b";", b"{", b"[" * 99]
TOKENS += [
    b"9" * 5000,
    b"NaN",
    b"-Infinity",
    b"null",
    b"../../x",
    b"/etc/passwd",
    b"C:\\x",
    b"=1+1",
]
TOKENS += ["e\u0301\u2028\x85".encode(), b"\\ud800", b"1e999", b"-1", b"true", b"'"]
VALUES = [None, [], {}, "", "../../x", "/etc/passwd", "C:\\x", "\0", "\ud800", "x" * 99, True, -1]
VALUES += [0, 10**30, 1e308, math.nan, math.inf, [[1, 2]], [None], {"a": None}, ["a", 1], 0.5]


@st.composite
def damaged(draw, whole):
    """Cut, flip, drop, repeat or put in bytes or lines, once to three times."""
    found = whole
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(found))] * 2)))
        kind = draw(st.sampled_from(["cut", "flip", "drop", "repeat", "put", "lines", "any"]))
        if kind == "cut":
            found = found[:a]
        elif kind == "flip" and a < len(found):
            found = found[:a] + bytes([found[a] ^ draw(st.integers(1, 255))]) + found[a + 1 :]
        elif kind == "drop":
            found = found[:a] + found[b:]
        elif kind == "repeat":
            found = found[:b] + found[a:]
        elif kind == "put":
            found = found[:a] + draw(st.sampled_from(TOKENS)) + found[a:]
        elif kind == "lines":
            lines = found.splitlines(keepends=True)
            found = b"".join(draw(st.permutations(lines)) if len(lines) < 20 else lines[::-1])
        elif kind == "any":
            found = draw(st.binary(max_size=60) | st.text(max_size=40).map(to_bytes))
    return found


def to_bytes(words):
    return words.encode("utf-8", "surrogatepass")


def places(value, path=()):
    """Return the path of every value inside a JSON document."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    return [p for k in keys for p in [(*path, k), *places(value[k], (*path, k))]]


@st.composite
def rewritten(draw, document):
    """Replace or take out a value or two of a JSON document, or damage its bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(json.dumps(document).encode()))
    found = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 2))):
        spots = places(found)
        if not spots:
            break
        *parents, last = draw(st.sampled_from(spots))
        target = functools.reduce(lambda inner, key: inner[key], parents, found)
        if draw(st.integers(0, 4)) == 0:
            del target[last]
        else:
            target[last] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return json.dumps(found).encode()


@pytest.fixture
def folder(tmp_path):
    """Give a folder of its own, beside which there is something to be found."""
    (tmp_path / "x").write_text("not yours")
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


# ---------------------------------------------------------------- label files

ROWS = [
    data_row("a.jpg", labelled(radio("Grass", "1 - Sure", checklist("Where", "Near")))),
    data_row("b.jpg", labelled(checklist("Light", "Sun", "Haze"), text("Note", "n"))),
]
NDJSON = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def odd_name(name):
    return json.dumps(data_row(name, labelled(radio("Grass", "1 - Sure")))).encode()


def odd_label(name):
    return json.dumps(data_row("a.jpg", labelled(radio(name, "1 - Sure")))).encode()


NDJSON_FILES = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "deep row": b'{"projects":' * 5000,
    "NaN": NDJSON.replace(b'"a.jpg"', b"NaN"),
    "long number": NDJSON.replace(b'"a.jpg"', b"9" * 5000),
    "NUL": b"\0" * 1000,
    "UTF-16": NDJSON.decode().encode("utf-16"),
    "array": json.dumps(ROWS).encode(),
    "cut off": NDJSON[:-30],
    "no label name": odd_label(""),
    "label of a NUL": odd_label("Gr\0ass"),
    "label of a lone surrogate": odd_label("Gr\ud800ass"),
    "path up": odd_name("../../x"),
    "absolute path": odd_name("/etc/passwd"),
    "drive letter": odd_name("C:\\x.jpg"),
    "name of a lone surrogate": odd_name("\ud800.jpg"),
}


def read_ndjson(path):
    return du.to_targets(du.read_labelbox(path))


@pytest.mark.parametrize("name", NDJSON_FILES)
def test_hostile_ndjson(name, folder):
    path = folder / "export.ndjson"
    path.write_bytes(NDJSON_FILES[name])
    survives(lambda: read_ndjson(path), folder, ["export.ndjson"])


@settings(FUZZ, max_examples=120)
@given(content=damaged(NDJSON) | rewritten(ROWS[0]))
def test_damaged_ndjson(content, folder):
    path = folder / "export.ndjson"
    path.write_bytes(content)
    survives(lambda: read_ndjson(path), folder, ["export.ndjson"])


CSV = b"image,site,Grass,Open water\na.jpg,north,1,0\nb.jpg,north,,1\nd/c.jpg,south,0,0\n"
LISTS = b'image,labels\na.jpg,"Grass, Sand"\nb.jpg,Sand\nc.jpg,\n'
CSV_FILES = {
    "empty": b"",
    "ragged": CSV + b"d.jpg,1\ne.jpg,1,1,1,1,1,1\n",
    "NUL": CSV.replace(b"north", b"no\0rth"),
    "all NUL": b"\0" * 500,
    "BOM": b"\xef\xbb\xbf" + CSV,
    "UTF-16": CSV.decode().encode("utf-16"),
    "open quote": CSV + b'"never closed,1,0\n' * 50,
    "huge cell": CSV.replace(b"north", b"n" * 300_000),
    "formulas": CSV.replace(b"a.jpg", b'=HYPERLINK("http://x")').replace(b"north", b"+1+1"),
    "path up": CSV.replace(b"a.jpg", b"../../x"),
    "absolute path": CSV.replace(b"a.jpg", b"/etc/passwd"),
    "sep of Excel": b'sep="\n' + CSV,
    "header alone": CSV.splitlines()[0],
    "returns alone": CSV.replace(b"\n", b"\r"),
    "huge numbers": CSV.replace(b",1,0", b",1e999," + b"9" * 400),
}
CSV_READERS = {
    "labels": du.read_csv_labels,
    "lists": functools.partial(du.read_csv_labels, separator=" "),
    "kept": functools.partial(du.read_csv_labels, keep=["site"]),
    "class": functools.partial(du.read_class_column, column="site"),
    "photos": lambda path: list(survey.each_path(str(path))),
}


@pytest.mark.parametrize("reader", CSV_READERS)
@pytest.mark.parametrize("name", CSV_FILES)
def test_hostile_csv(name, reader, folder):
    path = folder / "labels.csv"
    path.write_bytes(CSV_FILES[name])
    survives(lambda: CSV_READERS[reader](path), folder, ["labels.csv"])


@settings(FUZZ, max_examples=150)
@given(content=damaged(CSV) | damaged(LISTS), reader=st.sampled_from(sorted(CSV_READERS)))
def test_damaged_csv(content, reader, folder):
    path = folder / "labels.csv"
    path.write_bytes(content)
    survives(lambda: CSV_READERS[reader](path), folder, ["labels.csv"])


PARTITION = b"image_path,group_id,Grass,Sand\n../a.jpg,g,1,0\n../b.jpg,h,0.5,\n"
CLASSES = b"image_path,group_id,class\n../a.jpg,g,Grass\n../b.jpg,h,Sand\n../c.jpg,i,\n"


@settings(FUZZ, max_examples=120)
@given(table=damaged(PARTITION) | damaged(CLASSES), names=damaged(b"Grass\nSand\n"))
@example(table=CLASSES, names=b"\xff\xfeG\0")
@example(table=CLASSES, names="Grass\u2028Sand\n".encode())
@example(table=PARTITION.replace(b"g,", b"h,"), names=b"")
def test_damaged_partitions(table, names, folder):
    (folder / "train_partition.csv").write_bytes(table)
    (folder / "val_partition.csv").write_bytes(table.replace(b",g", b",k").replace(b",h", b",l"))
    (folder / "classes.txt").write_bytes(names)
    named = ["partition.csv", "classes.txt", str(folder)]
    survives(lambda: du.load_parts(folder, ["train", "val"]), folder, named)


NAMES = b"n01 grass, lawn\nn02 sand\n"
TRUTH = b"ImageId,PredictionString\na,n01 1 2 3 4\nb,n02 1 2 3 4\n"


@settings(FUZZ, max_examples=100)
@given(names=damaged(NAMES), truth=damaged(TRUTH), numbers=damaged(b"1\n2\n"), matlab=st.booleans())
@example(names=NAMES, truth=b"ImageId\na\n", numbers=b"1\n2\n", matlab=False)
@example(names=NAMES, truth=TRUTH + b"a,n02 1\n", numbers=b"1\n2\n", matlab=False)
@example(names=NAMES, truth=TRUTH, numbers=b"one\ntwo\n", matlab=True)
def test_damaged_files_beside_class_folders(names, truth, numbers, matlab, folder):
    for name in ("train/n01/a.jpg", "train/n02/b.jpg", "val/a.jpg", "val/b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("val_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"):
        (folder / name).unlink(missing_ok=True)
    if matlab:
        (folder / "val_ground_truth.txt").write_bytes(numbers)
        (folder / "meta.mat").write_bytes(truth)
    else:
        (folder / "LOC_val_solution.csv").write_bytes(truth)
    (folder / "names.txt").write_bytes(names)
    named = ["names.txt", "val_solution.csv", "ground_truth.txt", "meta.mat", str(folder)]
    survives(lambda: du.read_class_folders(folder, folder / "names.txt"), folder, named)


# ---------------------------------------------------------------- images


def encoded(form, size=(64, 32), **options):
    image = Image.fromarray(
        np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size[::-1], 3)
    )
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


JPEG = encoded("JPEG", quality=90, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40)
PNG = encoded("PNG")


def png_of(width, height, pixels=b""):
    """Return a PNG that says how large it is, and holds these bytes."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    blocks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    crcs = [(len(b), k + b, zlib.crc32(k + b)) for k, b in blocks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        n.to_bytes(4, "big") + b + crc.to_bytes(4, "big") for n, b, crc in crcs
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
IMAGES = {
    "empty": b"",
    "cut off": JPEG[:-40],
    "header alone": JPEG[:200],
    "gigantic header": png_of(2**31 - 1, 2**31 - 1),
    "zip bomb": png_of(14_000, 14_000, b"\0" * 10_000_000),
    "no size": png_of(0, 10),
    "ICC garbage": encoded("JPEG", icc_profile=b"\xff" * 5000),
    "EXIF garbage": JPEG,
    "wrong suffix": PNG,
    "GIF": encoded("GIF"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    "PostScript": EPS,
    "web page": b"<html>404</html>",
    "NUL": b"\0" * 5000,
    "TIFF that loops": b"II*\0\x08\0\0\0\x01\0\x11\x01\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
}


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_images(name, folder, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("a program is run"))
    path = folder / "photo.jpg"
    path.write_bytes(IMAGES[name])
    for size in (None, (8, 8)):
        image = survives(lambda size=size: du.open_image(path, size), folder, ["photo.jpg"])
        shown = ("EXIF garbage", "ICC garbage", "wrong suffix", "GIF")
        assert (image is not None) == (name in shown)


FORMS = [JPEG, PNG, encoded("WEBP"), encoded("TIFF", compression="tiff_lzw"), encoded("BMP")]


@settings(FUZZ, max_examples=200)
@given(content=st.one_of([damaged(form) for form in FORMS]))
def test_damaged_images(content, folder):
    path = folder / "photo.jpg"
    path.write_bytes(content)
    survives(lambda: du.open_image(path, (8, 8)), folder, ["photo.jpg"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
def test_what_is_no_file_is_listed_or_named_and_never_waited_for(folder):
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to(folder / "unmounted" / "gone.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "good.jpg").write_bytes(JPEG)
    assert [*du.image_names(folder)] == ["gone.jpg", "good.jpg", "loop.jpg"]  # failing by name
    for name in ("folder.jpg", "gone.jpg", "loop.jpg", "pipe.jpg", "nul\0.jpg"):
        with pytest.raises(OSError, match=re.escape(name)):
            du.open_image(folder / name)
    for read in (du.read_table, du.read_labelbox, du.read_partition, du.TrainConfig.read):
        with pytest.raises(OSError, match=r"pipe\.jpg"):
            read(folder / "pipe.jpg")


# ---------------------------------------------------------------- settings and models

CONFIG = json.loads(json.dumps(du.asdict(du.TrainConfig(labels=["a"], head_kwargs={"lam": 0.1}))))
TUNED = {"head": "linear", "learning_rate": 1e-3, "loss": "bce", "found_with": {"model_name": "m"}}


@settings(FUZZ, max_examples=150)
@given(config=rewritten(CONFIG), tuned=rewritten(TUNED))
@example(config=b"[[1, 2]]", tuned=b'{"head": "linear", "found_with": []}')
@example(config=b'[["epochs", 2]]', tuned=b'{"head": []}')
@example(config=b"[]", tuned=b"[" * 100_000)
@example(config=b"[" * 100_000, tuned=b"null")
def test_damaged_settings(config, tuned, folder):
    (folder / "config.json").write_bytes(config)
    (folder / "best_parameters.json").write_bytes(tuned)
    read = functools.partial(du.TrainConfig.read, folder / "config.json")
    assert isinstance(survives(read, folder, ["config.json"]), du.TrainConfig | None)
    path = folder / "best_parameters.json"
    read = functools.partial(du.read_tuned, path, "linear", {"model_name": "m"})
    survives(read, folder, ["best_parameters.json"])


def test_json_that_is_no_object_is_no_configuration(folder):
    for content in ("[]", '""', '[["epochs", 2]]'):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json: no config\.json of a training"):
            du.TrainConfig.read(folder / "config.json")


MODEL = "convnext_atto"
TINY = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a saved classifier: its description and its weights."""
    model = du.build_model(MODEL, 3, pretrained=False, img_size=32, **TINY)
    used = du.Classifier(model, t.LABELS, [0.5] * 3, calibration=np.ones((2, 3)))
    path = used.save(tmp_path_factory.mktemp("run"), {"mAP": 0.7})
    return json.loads(path.read_text()), (path.parent / du.WEIGHTS).read_bytes(), used


@settings(FUZZ, max_examples=120)
@given(data=st.data())
def test_damaged_descriptions(data, small, folder):
    path = folder / "best_classifier.json"
    path.write_bytes(data.draw(rewritten(small[0])))
    (folder / du.WEIGHTS).write_bytes(small[1])
    survives(lambda: du.Classifier.load(path), folder, ["best_classifier.json", du.WEIGHTS])


def safetensors_of(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHT_FILES = {
    "empty": b"",
    "header too long": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "header of 1 GB": (10**9).to_bytes(8, "little") + b"{}",
    "overlapping": safetensors_of({"a": ONE, "b": ONE}, bytes(8)),
    "beyond the end": safetensors_of({"a": ONE | {"data_offsets": [0, 10**12]}}, bytes(8)),
    "huge shape": safetensors_of({"a": ONE | {"shape": [2**62, 2**62]}}, bytes(8)),
    "unknown type": safetensors_of({"a": ONE | {"dtype": "X9"}}, bytes(8)),
    "no header": safetensors_of(b"\xff" * 40),
    "deep header": safetensors_of(b"[" * 50_000),
    "other weights": save({"a": torch.zeros(2)}),
}


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_hostile_weights(name, small, folder):
    stored = WEIGHT_FILES[name]
    about = small[0] | {"sha256": hashlib.sha256(stored).hexdigest()}
    (folder / "best_classifier.json").write_text(json.dumps(about))
    for file in (du.WEIGHTS, "weights.safetensors", "weights.pth"):
        (folder / file).write_bytes(stored)
    path = folder / "best_classifier.json"
    assert survives(lambda: du.Classifier.load(path), folder, [du.WEIGHTS]) is None
    for file in ("weights.safetensors", "weights.pth"):
        build = functools.partial(du.build_model, MODEL, 3, pretrained=folder / file, **TINY)
        assert survives(build, folder, [file]) is None


def test_whole_numbers_in_place_of_weights_are_refused(small, folder):
    state = small[2].model.state_dict().items()
    path = folder / "weights.safetensors"
    path.write_bytes(save({k: v.to(torch.int64).contiguous() for k, v in state}))
    build = functools.partial(du.build_model, MODEL, 3, pretrained=path, **TINY)
    assert survives(build, folder, ["weights.safetensors"]) is None


NOTE = {"model_name": "m", "img_size": [32, 32], "pretrained_window_sizes": [[4, 4], [4, 4]]}


@settings(FUZZ, max_examples=80)
@given(data=st.data())
def test_damaged_pretrained_weights_and_their_note(data, small, folder):
    state = {k: v.contiguous() for k, v in small[2].model.state_dict().items()}
    (folder / "weights.safetensors").write_bytes(data.draw(damaged(save(state))))
    (folder / "weights.json").write_bytes(data.draw(rewritten(NOTE)))
    build = functools.partial(
        du.build_model, MODEL, 3, pretrained=folder / "weights.safetensors", **TINY
    )
    survives(build, folder, ["weights."])


@settings(FUZZ, max_examples=40)
@given(note=rewritten(NOTE))
def test_damaged_note_of_a_network_with_windows(note, folder):
    (folder / "weights.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    (folder / "weights.json").write_bytes(note)
    options = {"pretrained": folder / "weights.safetensors", "img_size": 32, **c.SWIN}
    build = functools.partial(du.build_model, "swinv2_tiny_window8_256", 3, **options)
    assert survives(build, folder, ["weights."]) is None


# ---------------------------------------------------------------- what is begun and goes on


@pytest.fixture(scope="module")
def run_dir(tables, tmp_path_factory):  # noqa: F811
    """Return the folder of a training that has ended, so that resuming trains nothing."""
    folder = tmp_path_factory.mktemp("ended")
    sets = [du.DataPartition(table, t.LABELS, t.ToUnit(False)) for table in tables]  # noqa: F811
    t.trainer(sets, folder, t.ChannelNet(), epochs=1, ema_decay=0.7).fit()
    return folder


UNREAD = ("csv", "lock")


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_damaged_resume_points(data, run_dir, sets, folder):  # noqa: F811
    shutil.rmtree(folder)
    shutil.copytree(run_dir, folder)
    files = [
        f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix not in (".csv", ".lock")
    ]
    file = data.draw(st.sampled_from(files))
    whole, is_json = file.read_bytes(), file.suffix == ".json"
    file.write_bytes(data.draw(rewritten(json.loads(whole)) if is_json else damaged(whole)))
    run = t.trainer(sets, folder, t.ChannelNet(), epochs=1, ema_decay=0.7)
    survives(run.resume, folder, ["last", "config.json", du.WEIGHTS, str(folder)], writes=True)


@pytest.mark.parametrize(
    "file", [du.WEIGHTS, "last/ema.pt", "last/optimizer.bin", "last/trainer.json"]
)
def test_lost_file_of_a_resume_point_is_named_and_nothing_is_trained(file, run_dir, sets, folder):  # noqa: F811
    shutil.rmtree(folder)
    shutil.copytree(run_dir, folder)
    (folder / file).unlink()
    before = {path for path in folder.rglob("*")}
    run = t.trainer(sets, folder, t.ChannelNet(), epochs=1, ema_decay=0.7)
    with pytest.raises((ValueError, FileNotFoundError), match=r"; .*call fit\(\)") as told:
        run.resume()
    assert file.rpartition("/")[2] in str(told.value) or file.endswith("json")
    assert {path for path in folder.rglob("*")} - {folder / ".lock"} == before - {folder / ".lock"}


@pytest.fixture(scope="module")
def begun(small, tmp_path_factory):
    """Return a folder with photos, and with predictions of which two of three chunks are done."""
    folder, real = tmp_path_factory.mktemp("begun"), du.open_image
    (folder / "photos").mkdir()
    for number in range(5):
        c.picture(number).save(folder / "photos" / f"{number}.jpg")
    (folder / "photos" / "1.jpg").write_bytes(b"no photo")

    def stop(image, size=None):
        if Path(image).name == "4.jpg":
            raise KeyboardInterrupt
        return real(image, size)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(du, "open_image", stop)
        survey.predict_to(small[2], folder / "photos", folder / "out.csv", 2, chunk=2)
    return folder


def lines_of(path):
    return max(len(path.read_bytes().splitlines()) - 1, 0)


def go_on(begun, small, folder, harm):
    """Damage a copy of what was begun, go on, and count what came out."""
    shutil.rmtree(folder)
    shutil.copytree(begun / "out.csv.parts", folder / "out.csv.parts")
    harm(folder / "out.csv.parts")
    out, options = folder / "out.csv", {"batch_size": 2, "chunk": 2}
    read = functools.partial(survey.predict_to, small[2], begun / "photos", out, **options)
    photos = [os.path.realpath(begun / "photos")]
    survives(read, folder, ["out.csv.parts"], writes=True, readable=photos)
    assert out.exists() == (folder / "out_failed.csv").exists()
    return lines_of(out) + lines_of(folder / "out_failed.csv") if out.exists() else None


@pytest.mark.parametrize("name", ["00000000.csv", "00000000.failed.csv", "00000001.csv"])
@pytest.mark.parametrize("kept", [None, 0, 12, -1])
def test_chunk_that_lost_something_is_done_again(name, kept, begun, small, folder):
    def harm(parts):
        content = (parts / name).read_bytes()
        (parts / name).write_bytes(content[:kept]) if kept is not None else (parts / name).unlink()

    assert go_on(begun, small, folder, harm) == 5


@pytest.mark.parametrize("name", ["plan.json", "paths.jsonl"])
def test_list_that_lost_a_photo_is_refused(name, begun, small, folder):
    def harm(parts):
        lines = (parts / name).read_text().splitlines(keepends=True)
        (parts / name).write_text("".join(lines[:-2]))

    assert go_on(begun, small, folder, harm) is None


@settings(FUZZ, max_examples=30)
@given(data=st.data())
def test_damaged_folders_of_parts_lose_no_photo(data, begun, small, folder):
    def harm(parts):
        file = data.draw(st.sampled_from(sorted(f for f in parts.iterdir() if f.name[0] != ".")))
        whole, is_json = file.read_bytes(), file.suffix == ".json"
        file.write_bytes(data.draw(rewritten(json.loads(whole)) if is_json else damaged(whole)))

    assert go_on(begun, small, folder, harm) in (5, None)


# ---------------------------------------------------------------- tables and files of notebooks

REVIEW = b'a.jpg,Grass,present\n"b, c.jpg",Grass,absent\nd.jpg,Sand,unsure\n'


@settings(FUZZ, max_examples=120)
@given(content=damaged(REVIEW))
@example(content=b"a.jpg,Gr\rass,present\n")
@example(content=b"a.jpg," + b"x" * 200_000 + b",present\n")
def test_damaged_reviews(content, folder, notebook_functions):
    nb, path = notebook_functions("relabeling"), folder / "review.csv"
    path.write_bytes(content)
    part = pd.DataFrame({"image_path": ["a.jpg", "b, c.jpg", "d.jpg"], "Grass": 0.5, "Sand": 1.0})
    found = survives(lambda: nb.read_decisions(path), folder, ["review.csv"])
    assert isinstance(found, pd.DataFrame)  # what it cannot read is warned of, line by line
    survives(lambda: nb.apply_decisions(path, part, ["Grass", "Sand"]), folder, ["review.csv"])


def test_review_saved_by_a_spreadsheet_is_read(folder, notebook_functions):
    (folder / "review.csv").write_bytes(b"\xef\xbb\xbf" + REVIEW.replace(b"\n", b"\r\n"))
    found = notebook_functions("relabeling").read_decisions(folder / "review.csv")
    assert found["image_path"].tolist() == ["a.jpg", "b, c.jpg", "d.jpg"]


HISTORY = b"epoch,train_loss,val_loss,val_mAP,seconds\n0,,0.7,0.5,0.0\n1,0.6,0.5,0.6,2.1\n"


@settings(FUZZ, max_examples=100)
@given(content=damaged(HISTORY))
def test_damaged_history(content, folder):
    (folder / "history.csv").write_bytes(content)
    found = survives(lambda: du._read_history(folder / "history.csv"), folder, ["history.csv"])
    if found is not None:
        du.plt.close(du.plot_history(found))


ABOUT = {"settings": {"a": 1}}
SPOILT = {
    "attribute": "UPDATE study_user_attributes SET value_json = '[1'",
    "kind": "UPDATE study_user_attributes SET value_json = '[1]'",
    "value": "UPDATE trial_params SET distribution_json = '{}'",
    "version": "UPDATE alembic_version SET version_num = 'v99'",
    "direction": "UPDATE study_directions SET direction = 'UP'",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory, notebook_functions):
    folder = tmp_path_factory.mktemp("study")
    found = notebook_functions("tuning").open_study(folder, "s", ABOUT, 1)
    found.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    found._storage.remove_session()
    return folder / "study.db"


def open_again(folder, nb):
    return nb.open_study(folder, "s", ABOUT, 1)


@pytest.mark.parametrize("harm", SPOILT)
def test_study_with_odd_values_is_named(harm, study, folder, notebook_functions, monkeypatch):
    nb = notebook_functions("tuning")
    monkeypatch.setattr(nb, "time", SimpleNamespace(sleep=lambda _: None))
    shutil.copy(study, folder / "study.db")
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as file, file:
        file.execute(SPOILT[harm])
    assert survives(lambda: open_again(folder, nb), folder, ["study.db"], writes=True) is None


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_damaged_studies(data, study, folder, notebook_functions):
    nb = notebook_functions("tuning")
    (folder / "study.db").write_bytes(data.draw(damaged(study.read_bytes())))
    with mock.patch.object(nb, "time", SimpleNamespace(sleep=lambda _: None)):
        survives(lambda: open_again(folder, nb), folder, ["study.db"], writes=True)
