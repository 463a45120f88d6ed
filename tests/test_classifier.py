"""Classifiers that are saved, loaded and used; and files from strangers."""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import data_utils as du

import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from run_notebooks import ROOT

LABELS = ["tree", "grass", "open water"]
THRESHOLDS = [0.5, 0.45, 0.55]
PANORAMA_THRESHOLDS = [0.6, 0.5, 0.4]
SWIN = {"window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}


def tiny_model(img_size=32):
    """Return a SwinV2 whose random logits differ a lot between pictures."""
    torch.manual_seed(0)
    model = du.build_model(
        "swinv2_tiny_window8_256", 3, pretrained=False, img_size=img_size, **SWIN
    )
    model.head.fc.weight.data *= 60
    return model


def picture(seed, width=80, height=60):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def probs_of(table):
    return table[[f"{label}_prob" for label in LABELS]].to_numpy()


@pytest.fixture(scope="module")
def classifier():
    return du.Classifier(tiny_model(), LABELS, THRESHOLDS, "half", PANORAMA_THRESHOLDS)


@pytest.fixture(scope="module")
def saved(classifier, tmp_path_factory):
    return classifier.save(tmp_path_factory.mktemp("run"), {"mAP": 0.75})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "site" / "Day 1").mkdir(parents=True)
    paths = [folder / "b.jpg", folder / "a.JPG", folder / "site" / "Day 1" / "c.jpeg"]
    for seed, path in enumerate(paths):
        picture(seed).save(path, quality=95)
    return folder, paths


# ---------------------------------------------------------------- save and load


def test_loaded_classifier_predicts_bit_for_bit_the_same(classifier, saved, photos):
    loaded = du.Classifier.load(saved)
    pd.testing.assert_frame_equal(
        loaded.predict(photos[0]), classifier.predict(photos[0]), check_exact=True
    )
    panorama = picture(7, 160, 80)
    pd.testing.assert_frame_equal(
        loaded.predict_panorama(panorama), classifier.predict_panorama(panorama), check_exact=True
    )


def test_description_holds_everything_it_takes_to_build_the_model_again(saved):
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert content["format_version"] == 4
    assert content["weights"] == "model.safetensors"
    assert content["activation"] == "sigmoid"
    assert content["model_name"] == "swinv2_tiny_window8_256"
    assert content["model_kwargs"] == SWIN
    assert content["head"] == "linear"
    assert content["num_labels"] == 3
    assert content["labels"] == LABELS
    assert content["thresholds"] == THRESHOLDS
    assert content["panorama_thresholds"] == PANORAMA_THRESHOLDS
    assert content["view"] == "half"
    assert content["input_size"] == [3, 32, 32]
    assert content["mean"] == [0.485, 0.456, 0.406]
    assert content["std"] == [0.229, 0.224, 0.225]
    assert content["interpolation"] == "bicubic"
    assert content["validation"] == {"mAP": 0.75}
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["timm"] == timm.__version__
    weights = saved.parent / content["weights"]
    assert content["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_saved_weights_are_a_plain_state_dict(classifier, saved):
    state = safetensors.torch.load_file(saved.parent / "model.safetensors")
    assert state.keys() == classifier.model.state_dict().keys()
    assert all(type(weight) is torch.Tensor for weight in state.values())


def test_saving_leaves_nothing_but_the_two_files(classifier, tmp_path):
    classifier.save(tmp_path / "new" / "run")
    names = sorted(path.name for path in (tmp_path / "new" / "run").iterdir())
    assert names == ["best_classifier.json", "model.safetensors"]


def test_folder_of_a_classifier_can_be_moved(saved, photos, tmp_path):
    shutil.copytree(saved.parent, tmp_path / "elsewhere")
    loaded = du.Classifier.load(tmp_path / "elsewhere" / saved.name)
    assert loaded.labels == LABELS
    assert len(loaded.predict(photos[1][0])) == 1


def test_normalisation_is_that_of_the_file_and_not_of_timm(saved, tmp_path):
    path = tamper(saved, tmp_path, mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    tensor = du.Classifier.load(path).transform(Image.new("RGB", (10, 10), (255, 255, 255)))
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([0.9, 0.8, 0.7]))


def test_labels_thresholds_and_logits_must_match_in_number():
    model = tiny_model()
    for labels, thresholds in ((LABELS[:2], THRESHOLDS), (LABELS, [0.5]), (LABELS[:2], [0.5] * 2)):
        with pytest.raises(ValueError, match="do not match"):
            du.Classifier(model, labels, thresholds)


@pytest.mark.parametrize("view", ["sphere", "", None])
def test_unknown_view_is_refused(view):
    with pytest.raises(ValueError, match="expected 'half' or 'panorama'"):
        du.Classifier(tiny_model(), LABELS, THRESHOLDS, view)


def test_panorama_thresholds_must_match_in_number():
    with pytest.raises(ValueError, match="match"):
        du.Classifier(tiny_model(), LABELS, THRESHOLDS, "half", [0.5, 0.5])


def test_two_files_and_the_helper_are_all_it_takes(classifier, saved, photos, tmp_path):
    """In an empty folder and a fresh Python, as somebody else would use it."""
    for file in (du.__file__, saved, saved.parent / "model.safetensors"):
        shutil.copy(file, tmp_path)
    script = (
        "import sys; from data_utils import Classifier; "
        "c = Classifier.load('best_classifier.json'); "
        "print(c.predict(sys.argv[1])[c.labels].iloc[0].tolist())"
    )
    command = [sys.executable, "-c", script, str(photos[1][0])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = classifier.predict(photos[1][0])[LABELS].iloc[0].tolist()
    assert json.loads(result.stdout) == expected


# ---------------------------------------------------------------- predict


def test_probabilities_are_the_models_own(monkeypatch, photos):
    monkeypatch.setattr(du, "fast_precision", lambda *_, **__: "no")
    model = tiny_model()
    table = du.Classifier(model, LABELS, THRESHOLDS).predict(photos[1][0])
    image = du.make_transforms(model, train=False)(du.open_image(photos[1][0]))
    with torch.inference_mode():
        expected = model(image[None]).sigmoid().numpy()
    np.testing.assert_allclose(probs_of(table), expected, atol=1e-5)


def test_table_has_an_image_its_decisions_and_its_probabilities(classifier, photos):
    table = classifier.predict(photos[1][0])
    assert list(table) == ["image", *LABELS, *(f"{label}_prob" for label in LABELS)]
    assert table["image"].tolist() == [str(photos[1][0])]
    assert table[LABELS].isin([0, 1]).all(axis=None)
    assert ((probs_of(table) > 0) & (probs_of(table) < 1)).all()


def test_every_kind_of_input_gives_the_same_answer(classifier, photos):
    path = photos[1][0]
    with Image.open(path) as image:
        pixels = np.asarray(image)
    expected = probs_of(classifier.predict(path))
    for given in (str(path), Image.fromarray(pixels), pixels, [path], (str(path),)):
        np.testing.assert_allclose(probs_of(classifier.predict(given)), expected, atol=2e-2)


def test_list_may_mix_kinds_and_keeps_its_order(classifier, photos):
    folder, paths = photos
    one, two = picture(11), np.asarray(picture(12))
    table = classifier.predict([paths[2], one, folder, two, str(paths[0])], batch_size=2)
    names = [str(p) for p in (paths[2], paths[1], paths[0], paths[2], paths[0])]
    assert table["image"].tolist() == [names[0], "image 1", *names[1:4], "image 5", names[4]]
    singly = [classifier.predict(x) for x in (paths[2], one, paths[1], paths[0], paths[2], two)]
    expected = np.concatenate([probs_of(single) for single in singly] + [probs_of(singly[3])])
    np.testing.assert_allclose(probs_of(table), expected, atol=2e-2)
    assert np.ptp(expected, axis=0).min() > 0.05  # else any order would do


def test_folder_is_searched_below_and_in_sorted_order(classifier, photos):
    folder, paths = photos
    table = classifier.predict(folder)
    assert table["image"].tolist() == [str(paths[1]), str(paths[0]), str(paths[2])]


def test_workers_change_nothing(classifier, photos):
    plain = classifier.predict(photos[0], batch_size=2)
    workers = classifier.predict(photos[0], batch_size=2, num_workers=2)
    pd.testing.assert_frame_equal(plain, workers, check_exact=True)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_pictures_of_every_mode_are_taken(classifier, mode):
    image = picture(3).convert(mode)
    assert np.isfinite(probs_of(classifier.predict(image))).all()


def test_grey_array_is_taken_like_its_rgb_copy(classifier):
    grey = np.asarray(picture(3).convert("L"))
    rgb = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(probs_of(classifier.predict(grey)), probs_of(classifier.predict(rgb)))


@pytest.mark.parametrize("opened", [False, True])
def test_photo_is_classified_upright_whether_path_or_opened_image(classifier, tmp_path, opened):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(5)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    given = Image.open(tmp_path / "turned.png") if opened else tmp_path / "turned.png"
    found, expected = (probs_of(classifier.predict(x)) for x in (given, upright))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_decision_is_present_from_the_threshold_on(photos):
    model = tiny_model()
    probs = probs_of(du.Classifier(model, LABELS, THRESHOLDS).predict(photos[1][0]))[0]
    at = [float(p) for p in probs]
    above = [float(np.nextafter(p, 1)) for p in at]
    below = [float(np.nextafter(p, 0)) for p in at]
    for thresholds, expected in (
        (at, [1, 1, 1]),
        (above, [0, 0, 0]),
        (below, [1, 1, 1]),
        ([below[0], above[1], at[2]], [1, 0, 1]),
    ):
        table = du.Classifier(model, LABELS, thresholds).predict(photos[1][0])
        assert table[LABELS].to_numpy().tolist() == [expected]


def test_unreadable_file_stops_by_its_name(classifier, photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"broken\.jpg"):
        classifier.predict([photos[1][0], tmp_path / "broken.jpg"])
    with pytest.raises(OSError, match=r"gone\.jpg"):
        classifier.predict(tmp_path / "gone.jpg")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_files_are_left_out_and_listed_when_asked(
    classifier, photos, tmp_path, num_workers
):
    whole = photos[1][1].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    items = [photos[1][0], tmp_path / "cut.jpg", photos[1][2], tmp_path / "gone.jpg"]
    table = classifier.predict(items, batch_size=3, num_workers=num_workers, unreadable="skip")
    assert table["image"].tolist() == [str(photos[1][0]), str(photos[1][2])]
    (_, first), (_, second) = table.attrs["unreadable"]
    assert "cut.jpg" in first
    assert "gone.jpg" in second
    expected = classifier.predict([photos[1][0], photos[1][2]])
    np.testing.assert_allclose(probs_of(table), probs_of(expected), atol=2e-2)


def test_nothing_readable_gives_an_empty_table_with_all_columns(classifier, tmp_path):
    table = classifier.predict(tmp_path / "gone.jpg", unreadable="skip")
    assert len(table) == 0
    assert list(table) == ["image", *LABELS, *(f"{label}_prob" for label in LABELS)]
    assert len(table.attrs["unreadable"]) == 1


def test_nothing_to_classify_gives_an_empty_table(classifier, tmp_path):
    assert len(classifier.predict([])) == 0
    assert len(classifier.predict(tmp_path)) == 0


@pytest.mark.parametrize("given", [5, None, {"a": 1}])
def test_what_is_no_picture_is_refused_with_what_was_expected(classifier, given):
    with pytest.raises(TypeError, match="expected an image, an array, a path or a folder"):
        classifier.predict(given)


def test_unknown_word_for_unreadable_is_refused(classifier, photos):
    with pytest.raises(ValueError, match="unreadable"):
        classifier.predict(photos[1][0], unreadable="ignore")


# ---------------------------------------------------------------- panoramas


@pytest.fixture
def panoramas(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths, start=20):
        picture(seed, 160, 80).save(path)
    return paths


def test_panorama_answers_for_both_halves_and_for_the_whole(classifier, panoramas, tmp_path):
    table = classifier.predict_panorama(panoramas)
    assert table["image"].tolist() == [str(panoramas[0])] * 3 + [str(panoramas[1])] * 3
    assert table["part"].tolist() == ["left", "right", "panorama"] * 2
    for number, path in enumerate(panoramas):
        with Image.open(path) as image:
            halves = [image.crop((0, 0, 80, 80)), image.crop((80, 0, 160, 80))]
        for half, name in zip(halves, ("left", "right")):
            half.save(tmp_path / f"{name}.png")
        expected = classifier.predict([tmp_path / "left.png", tmp_path / "right.png"])
        rows = table.iloc[3 * number : 3 * number + 3]
        np.testing.assert_allclose(probs_of(rows)[:2], probs_of(expected), atol=1e-2)
        assert np.array_equal(probs_of(rows)[2], probs_of(rows)[:2].max(0))


def test_halves_use_their_thresholds_and_the_panorama_its_own(panoramas):
    model = tiny_model()
    first = du.Classifier(model, LABELS, THRESHOLDS).predict_panorama(panoramas[0])
    highest = probs_of(first)[2]
    half = [0.0, 1.1, float(highest[2])]
    panorama = [1.1, 0.0, float(np.nextafter(highest[2], 1))]
    table = du.Classifier(model, LABELS, half, "half", panorama).predict_panorama(panoramas[0])
    decisions = table[LABELS].to_numpy().tolist()
    assert [row[:2] for row in decisions] == [[1, 0], [1, 0], [0, 1]]
    assert decisions[0][2] + decisions[1][2] == 1  # the half that reaches the maximum
    assert decisions[2][2] == 0


def test_panorama_thresholds_default_to_those_of_the_halves(panoramas):
    table = du.Classifier(tiny_model(), LABELS, [0.0, 1.1, 0.0]).predict_panorama(panoramas[0])
    assert table[LABELS].to_numpy().tolist() == [[1, 0, 1]] * 3


def test_large_panorama_jpeg_is_answered_like_the_whole_decoded_one(classifier, tmp_path):
    picture(30, 1280, 640).save(tmp_path / "large.jpg", quality=98)
    with Image.open(tmp_path / "large.jpg") as image:
        whole = Image.fromarray(np.asarray(image))
    found, expected = (
        probs_of(classifier.predict_panorama(x)) for x in (tmp_path / "large.jpg", whole)
    )
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_model_of_whole_panoramas_answers_once_with_its_thresholds(panoramas):
    model = tiny_model((32, 64))
    classifier = du.Classifier(model, LABELS, [0.0, 1.1, 0.0], "panorama", [1.1, 0.0, 1.1])
    table = classifier.predict_panorama(panoramas)
    assert table["part"].tolist() == ["panorama", "panorama"]
    assert table[LABELS].to_numpy().tolist() == [[1, 0, 1]] * 2
    np.testing.assert_array_equal(probs_of(table), probs_of(classifier.predict(panoramas)))


@pytest.mark.parametrize(("view", "img_size"), [("half", 32), ("panorama", (32, 64))])
def test_picture_that_is_not_2_to_1_is_refused_by_name_and_size(tmp_path, view, img_size):
    classifier = du.Classifier(tiny_model(img_size), LABELS, THRESHOLDS, view)
    picture(1, 120, 80).save(tmp_path / "flat.png")
    with pytest.raises(OSError, match=r"flat\.png: 120 × 80 px is no 2:1 panorama"):
        classifier.predict_panorama(tmp_path / "flat.png")


@pytest.mark.parametrize("names", [[], ["gone.jpg"]])
def test_no_panorama_that_can_be_read_gives_an_empty_table(classifier, tmp_path, names):
    paths = [tmp_path / name for name in names]
    table = classifier.predict_panorama(paths, unreadable="skip")
    assert len(table) == 0
    assert list(table)[:2] == ["image", "part"]
    assert [Path(name).name for name, _ in table.attrs["unreadable"]] == names


def test_pictures_that_are_not_2_to_1_can_be_left_out(classifier, panoramas, tmp_path):
    picture(1, 120, 80).save(tmp_path / "flat.png")
    table = classifier.predict_panorama([tmp_path / "flat.png", panoramas[1]], unreadable="skip")
    assert table["image"].unique().tolist() == [str(panoramas[1])]
    assert len(table) == 3
    assert "flat.png" in table.attrs["unreadable"][0][1]


def test_array_that_is_not_2_to_1_is_named_by_its_number(classifier):
    arrays = [np.asarray(picture(1, 160, 80)), np.asarray(picture(1, 120, 80))]
    with pytest.raises(OSError, match="image 1: 120 × 80 px") as caught:
        classifier.predict_panorama(arrays)
    assert len(str(caught.value)) < 200


# ---------------------------------------------------------------- files from strangers


def tamper(saved, folder, remove=(), **changes):
    """Copy a saved classifier and change its description."""
    shutil.copytree(saved.parent, folder / "stranger")
    path = folder / "stranger" / saved.name
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= changes
    for key in remove:
        del content[key]
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def refused(path, *errors, match=None):
    """Load it, see it refused with one readable sentence that names the file; return that."""
    with pytest.raises(errors or ValueError, match=match) as caught:
        du.Classifier.load(path)
    message = str(caught.value)
    assert re.search(
        r"best_classifier\.json|model\.safetensors|best_model\.pt|gone\.pt|stranger", message
    ), message
    assert len(message) < 600
    assert "\n" not in message.strip()
    return message


def test_untouched_copy_loads(saved, tmp_path):
    """Else the refusals below would prove nothing."""
    assert du.Classifier.load(tamper(saved, tmp_path)).labels == LABELS


@pytest.mark.parametrize("kind", ["parent", "absolute", "folder", "backslash", "link-like"])
def test_weights_outside_the_folder_are_refused(saved, tmp_path, kind):
    names = {
        "parent": "../model.safetensors",
        "absolute": str(tmp_path / "model.safetensors"),
        "folder": "inner/model.safetensors",
        "backslash": "..\\model.safetensors",
        "link-like": "./../model.safetensors",
    }
    path = tamper(saved, tmp_path, weights=names[kind])
    (path.parent / "inner").mkdir()
    for folder in (tmp_path, path.parent / "inner"):  # there is a valid file to be found
        shutil.copy(saved.parent / "model.safetensors", folder)
    assert "weights must be a file name" in refused(path)


@pytest.mark.parametrize("name", ["", ".", "..", "gone.pt"])
def test_weights_that_are_no_file_are_refused(saved, tmp_path, name):
    refused(tamper(saved, tmp_path, weights=name), FileNotFoundError, ValueError)


def test_changed_weights_are_refused(saved, tmp_path):
    path = tamper(saved, tmp_path)
    weights = path.parent / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors" in refused(path, match="sha256")


def as_version_2(path, write):
    """Give a saved classifier the weight file of format version 2, which `write` makes."""
    weights = path.parent / "best_model.pt"
    write(safetensors.torch.load_file(path.parent / "model.safetensors"), weights)
    (path.parent / "model.safetensors").unlink()
    content = json.loads(path.read_text(encoding="utf-8")) | {"format_version": 2}
    content |= {"weights": weights.name}
    content |= {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    path.write_text(json.dumps(content), encoding="utf-8")
    return weights


def test_file_of_version_2_with_its_pickled_weights_still_loads(saved, classifier, tmp_path):
    path = tamper(saved, tmp_path)
    as_version_2(path, torch.save)
    loaded = du.Classifier.load(path)
    pd.testing.assert_frame_equal(loaded.predict(picture(1)), classifier.predict(picture(1)))
    again = loaded.save(tmp_path / "again")
    assert json.loads(again.read_text())["format_version"] == 4


class Attack:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["whole", "beside the weights"])
def test_pickle_with_code_is_refused_and_not_run(saved, tmp_path, place):
    path = tamper(saved, tmp_path)
    attack = Attack(tmp_path / "pwned")

    def write(state, weights):
        torch.save(attack if place == "whole" else {**state, "extra": attack}, weights)

    weights = as_version_2(path, write)
    refused(path, match=r"best_model\.pt")
    assert not (tmp_path / "pwned").exists()
    torch.load(weights, weights_only=False)  # and it would have run
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"head": torch.zeros(2)}, {"head.fc.weight": "text"}, torch.zeros(3)]
)
def test_weights_of_something_else_are_refused(saved, tmp_path, content):
    path = tamper(saved, tmp_path)
    as_version_2(path, lambda _, weights: torch.save(content, weights))
    refused(path, match=r"best_model\.pt: does not fit swinv2_tiny_window8_256")


@pytest.mark.parametrize("kind", ["pickle", "other tensors", "empty", "huge header"])
def test_no_weights_but_tensors_are_read_from_a_safetensors_file(saved, tmp_path, kind):
    path = tamper(saved, tmp_path)
    weights = path.parent / "model.safetensors"
    attack = Attack(tmp_path / "pwned")
    if kind == "pickle":
        torch.save(attack, weights)
    elif kind == "other tensors":
        safetensors.torch.save_file({"head": torch.zeros(2)}, weights)
    else:
        weights.write_bytes(b"" if kind == "empty" else b"\xff" * 100)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(path, match=r"model\.safetensors: does not fit swinv2_tiny_window8_256")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("option", ["checkpoint_path", "cache_dir", "pretrained_cfg_overlay"])
def test_head_options_cannot_reach_out_either(saved, tmp_path, option):
    """They go the same way into timm as those of the model."""
    message = refused(tamper(saved, tmp_path, head_kwargs={option: None}))
    assert option in message


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:someone/model",
        "hf_hub:someone/model",
        "hf-hub:timm/resnet10t.c3_in1k",
        "local-dir:elsewhere",
        "https://example.org/model",
        "../model",
        "resnet10t.no_such_tag",
        "no_such_model",
        "",
    ],
)
def test_model_that_is_no_name_of_timm_is_refused(saved, tmp_path, monkeypatch, name):
    def no_download(*_, **__):
        raise AssertionError("tried to reach the hub")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_download)
    refused(tamper(saved, tmp_path, model_name=name))


@pytest.mark.parametrize(
    "extra",
    [
        {"pretrained_cfg": {"file": "x.pt"}},
        {"pretrained_cfg": "hf-hub:someone/model"},
        {"pretrained_cfg_overlay": {"file": "x.pt"}},
        {"checkpoint_path": "x.pt"},
        {"cache_dir": "elsewhere"},
        {"pretrained": True},
        {"pretrained": "x.pt"},
        {"num_labels": 3},
        {"name": "resnet10t"},
        {"head": "linear"},
        {"img_size": 32},
        {"features_only": True},
        {"no_such_argument": 1},
        {"embed_dim": "wide"},
        {"depths": [1]},
        {"depths": None},
        {"norm_layer": "os.system"},
        {"act_layer": "no such"},
    ],
    ids=str,
)
def test_model_kwargs_that_reach_out_or_do_not_fit_are_refused(saved, tmp_path, extra):
    refused(tamper(saved, tmp_path, model_kwargs=SWIN | extra))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", "abc"),
        ("labels", {"0": "tree", "1": "grass", "2": "water"}),
        ("labels", [1, 2, 3]),
        ("labels", ["tree", None, "grass"]),
        ("labels", ["tree", "tree", "grass"]),
        ("thresholds", "0.5"),
        ("thresholds", [0.5, "high", 0.5]),
        ("thresholds", [0.5, None, 0.5]),
        ("thresholds", [0.5, [0.5], 0.5]),
        ("panorama_thresholds", None),
        ("panorama_thresholds", ["a", "b", "c"]),
        ("num_labels", "3"),
        ("num_labels", 3.0),
        ("num_labels", -3),
        ("model_name", 5),
        ("model_name", None),
        ("model_kwargs", []),
        ("model_kwargs", None),
        ("head", None),
        ("head", "mlp"),
        ("view", "sphere"),
        ("view", 1),
        ("img_size", 32),
        ("img_size", ["a", "b"]),
        ("img_size", [32]),
        ("img_size", [33, 32]),
        ("img_size", [-32, 32]),
        ("img_size", [32, 32, 32]),
        ("mean", "grey"),
        ("mean", [0.5]),
        ("mean", ["a", "b", "c"]),
        ("std", [0.0, 0.0, 0.0]),
        ("std", None),
        ("interpolation", "guess"),
        ("weights", 5),
        ("sha256", None),
        ("sha256", ""),
    ],
)
def test_wrong_values_are_refused(saved, tmp_path, key, value):
    refused(tamper(saved, tmp_path, **{key: value}))


@pytest.mark.parametrize(
    "key",
    [
        "format_version",
        "model_name",
        "model_kwargs",
        "head",
        "num_labels",
        "img_size",
        "labels",
        "thresholds",
        "panorama_thresholds",
        "view",
        "mean",
        "std",
        "interpolation",
        "weights",
        "sha256",
        "activation",
    ],
)
def test_missing_entry_is_named(saved, tmp_path, key):
    assert key in refused(tamper(saved, tmp_path, remove=[key]))


@pytest.mark.parametrize("version", [0, 5, "1", None, [1]])
def test_other_format_versions_are_refused_with_both_numbers(saved, tmp_path, version):
    message = refused(tamper(saved, tmp_path, format_version=version))
    assert f"format_version {version}" in message
    assert "expected 1" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": LABELS[:2]},
        {"labels": [*LABELS, "more"]},
        {"thresholds": [0.5]},
        {"panorama_thresholds": [0.5]},
        {"labels": LABELS[:2], "thresholds": [0.5, 0.5]},
        {"num_labels": 2},
    ],
    ids=str,
)
def test_counts_that_do_not_match_are_refused(saved, tmp_path, changes):
    refused(tamper(saved, tmp_path, **changes))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"5", b"[]", b'"text"', b"\xff\xfe\x00", b"{}"]
)
def test_file_that_is_no_description_is_refused(saved, tmp_path, content):
    path = tamper(saved, tmp_path)
    path.write_bytes(content)
    refused(path)


def test_missing_description_names_the_notebook_that_makes_it(tmp_path):
    path = tmp_path / "best_classifier.json"
    message = refused(path, FileNotFoundError, match=re.escape(str(path)))
    assert "training.ipynb" in message


def test_missing_weights_are_named(saved, tmp_path):
    path = tamper(saved, tmp_path)
    (path.parent / "model.safetensors").unlink()
    refused(path, FileNotFoundError, match=r"model\.safetensors: no such file; keep it beside")


def test_model_that_answers_with_nan_loses_no_photo(photos):
    model = tiny_model()
    with torch.no_grad():
        next(iter(model.get_classifier().parameters())).fill_(torch.nan)
    broken = du.Classifier(model, LABELS, THRESHOLDS)
    table = broken.predict(photos[0])
    assert len(table) == 3
    assert np.isnan(probs_of(table)).all()


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["tree", "image", "sky"], "image"),
        (["part", "tree", "sky"], "part"),
        (["tree", "tree_prob", "sky"], "tree_prob"),
        (["tree", "sky", "tree"], "tree, tree"),
    ],
)
def test_label_that_is_a_column_of_the_table_is_refused_by_name(labels, named):
    with pytest.raises(ValueError, match=f"labels {named}: names of columns .*; rename them"):
        du.Classifier(tiny_model(), labels, THRESHOLDS)


def test_label_that_only_looks_like_a_column_works(photos):
    table = du.Classifier(tiny_model(), ["sea_prob", "Image", "left"], THRESHOLDS).predict(
        photos[0]
    )
    assert len(set(table)) == 7


def test_photo_whose_name_is_no_utf8_reaches_the_csv(classifier, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/IMG_\xe4.png")
    try:
        picture(0).save(path)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    table = classifier.predict(tmp_path)
    assert table["image"].tolist() == [path]
    du.write_text(tmp_path / "out" / "predictions.csv", table.to_csv(index=False))
    read = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert read["image"].tolist() == [f"{tmp_path}/IMG_\\udce4.png"]
    np.testing.assert_allclose(probs_of(read), probs_of(table))


@pytest.mark.parametrize(
    ("run_dir", "found"),
    [
        ("p/run[1]", ["p/run[1]"]),
        ("site [a-c]/*", ["site [a-c]/x", "site [a-c]/y"]),
        ("p/run*", ["p/run1", "p/run[1]"]),
        ("p/run?", ["p/run1"]),
        ("site */x", ["site [a-c]/x"]),
        ("p/ru[n]1", ["p/run1"]),  # nothing is called like that: a pattern
        ("q*/run", ["q*/run"]),
        ("none[1]", []),
    ],
)
def test_run_folder_is_found_by_its_name_or_by_a_pattern(tmp_path, monkeypatch, run_dir, found):
    for name in ("p/run[1]", "p/run1", "site [a-c]/x", "site [a-c]/y", "q*/run", "qq/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "best_classifier.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    cells = [cell.source for cell in nbformat.read(ROOT / "classifier.ipynb", 4).cells]
    search = next(source for source in cells if source.startswith("patterns = [glob."))
    names = {"glob": glob, "Path": Path, "RUN_DIR": run_dir}
    exec(search.partition("assert files")[0], names)
    assert [path.parent.as_posix() for path in names["files"]] == found
