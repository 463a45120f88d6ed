"""A thousand broken files: each is read, or refused in one sentence that names it."""

import io
import json
import shutil
from dataclasses import asdict

import data_utils as du

import pytest
import test_classifier as t
import test_training
from conftest import checklist, data_row, labelled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JUNK = [None, True, -1, 0, 10**30, 1e300, float("nan"), "", "../a", "a\0b", "x" * 3000, [], {}]
JUNK += [[[]], {"a": 1}, ["a", None], "torch.nn.Linear", "/etc/passwd", "\ud800"]


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut off, overwritten, with something put in, or doubled."""
    place = st.integers(0, len(content))
    some = st.binary(max_size=8)

    def change(a, b, new):
        a, b = sorted((a, b))
        return st.sampled_from(
            [content[:a], content[:a] + new + content[a:], content[:a] + content[b:]]
            + [content[:a] + new + content[b:], content * 2, new, content[::-1]]
        )

    return st.tuples(place, place, some).flatmap(lambda drawn: change(*drawn))


def places(value, above=()):
    """Return the way to each value inside of JSON."""
    if not isinstance(value, (dict, list)):
        return [above]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [above, *(way for key, inner in items for way in places(inner, (*above, key)))]


def twisted(content: dict) -> st.SearchStrategy[bytes]:
    """JSON with one value of another kind, or one missing."""

    def change(way, new, is_left_out):
        result = json.loads(json.dumps(content))
        if not way:
            return json.dumps(new).encode()
        inner = result
        for key in way[:-1]:
            inner = inner[key]
        if is_left_out:
            del inner[way[-1]]
        else:
            inner[way[-1]] = new
        return json.dumps(result).encode()

    ways = st.sampled_from(places(content))
    return st.builds(change, ways, st.sampled_from(JUNK), st.booleans())


def check(read, path, content, start=None):
    """Read a file, or get one of our sentences: it begins with the file or its folder."""
    path.write_bytes(content)
    try:
        read(path)
    except (ValueError, OSError, RuntimeError) as error:
        lines = str(error).splitlines()
        assert lines, repr(error)
        assert str(error).startswith(str(start or path.parent)), repr(error)
        assert error.__cause__ is None, repr(error)


def hostile(n):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=quiet)


PARTITION = b"image_path,group_id,tree,grass\na.jpg,g,1,0\nb/c.jpg,h,,1\nd.jpg,h,0.5,0\n"
CLASSES = b"image_path,group_id,class\na.jpg,g,tree\nb.jpg,h,\n"
EXPORT = b"".join(
    json.dumps(data_row(f"{name}.jpg", labelled(checklist("Grass", "1 - Definitely")))).encode()
    + b"\n"
    for name in "ab"
)


@hostile(150)
@given(damaged(PARTITION) | damaged(CLASSES))
def test_partitions(tmp_path, content):
    (tmp_path / "classes.txt").write_text("tree\ngrass\n")
    check(du.read_partition, tmp_path / "train_partition.csv", content)


@hostile(150)
@given(damaged(EXPORT) | twisted(json.loads(EXPORT.splitlines()[0])))
def test_label_exports(tmp_path, content):
    check(du.read_labelbox, tmp_path / "export.ndjson", content)


@hostile(100)
@given(damaged(b"image_path,b\na.jpg,1\nb.jpg,2\n"))
def test_lists_of_photos(tmp_path, content):
    check(lambda path: list(du._each_path(str(path))), tmp_path / "photos.csv", content)


def photo(kind, **options):
    file = io.BytesIO()
    t.picture(0).save(file, kind, **options)
    return file.getvalue()


@hostile(200)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "MPO"]).flatmap(
    lambda kind: damaged(photo(kind))
))  # fmt: skip
def test_photos(tmp_path, content):
    check(du.open_image, tmp_path / "photo.jpg", content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    used = du.Classifier(t.tiny_model(), t.LABELS, t.THRESHOLDS, "half", t.PANORAMA_THRESHOLDS)
    return used.save(tmp_path_factory.mktemp("run"))


@hostile(120)
@given(st.data())
def test_descriptions_of_classifiers(saved, tmp_path, data):
    shutil.copy(saved.with_name(du.WEIGHTS), tmp_path)
    content = saved.read_bytes()
    changed = data.draw(twisted(json.loads(content)) | damaged(content))
    check(du.Classifier.load, tmp_path / saved.name, changed)


@hostile(40)
@given(st.data())
def test_weights(saved, tmp_path, data):
    """With a checksum that fits, as a stranger's would."""
    content = json.loads(saved.read_text())
    weights = data.draw(damaged(saved.with_name(du.WEIGHTS).read_bytes()))
    content["sha256"] = du.hashlib.sha256(weights).hexdigest()
    (tmp_path / saved.name).write_text(json.dumps(content))
    check(lambda _: du.Classifier.load(tmp_path / saved.name), tmp_path / du.WEIGHTS, weights)


@hostile(150)
@given(twisted(json.loads(json.dumps(asdict(du.TrainConfig())))) | damaged(b'{"epochs": 3}'))
def test_configurations(tmp_path, content):
    check(du.TrainConfig.read, tmp_path / "config.json", content)


@hostile(100)
@given(twisted({"head": "csra", "learning_rate": 0.1, "found_with": {"model_name": "a"}}))
def test_results_of_a_search(tmp_path, content):
    check(lambda path: du.read_tuned(path, "csra"), tmp_path / "best_parameters.json", content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tables = (test_training.draw_pictures(folder, 6, seed) for seed in (1, 2))
    transform = test_training.ToUnit(False)
    parts = [du.DataPartition(table, test_training.LABELS, transform) for table in tables]
    run = test_training.trainer(parts, folder, epochs=1, warmup_epochs=0)
    run.fit()
    return folder, parts


@hostile(40)
@given(st.data())
def test_resume_points(trained, tmp_path, data):
    folder, parts = trained
    name = data.draw(st.sampled_from(["last/trainer.json", "config.json"]))
    content = json.loads((folder / name).read_text())
    changed = data.draw(twisted(content) | damaged(json.dumps(content).encode()))
    run_dir = tmp_path / "run"
    shutil.copytree(folder, run_dir, dirs_exist_ok=True)
    run = test_training.trainer(parts, run_dir, epochs=1, warmup_epochs=0)
    check(lambda _: run.resume(), run_dir / name, changed, run_dir)
