"""The stop button in cells that take longer: nothing half written, and running it again goes on."""

import shutil

import data_utils as du
import demo_360

import numpy as np
import pandas as pd
import pytest
import test_classifier as c
import torch


def at_call(number, function):
    """Return the function, which is stopped once, when it is called for the `number`-th time."""
    calls = []

    def called(*args, **options):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **options)

    return called


def content_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        c.picture(number, 96, 48).save(tmp_path / "photos" / f"{number}.jpg")
    return du.list_images(tmp_path / "photos")


def test_drawing_the_demo(tmp_path, monkeypatch):
    """Cell 3 of imagesplit.ipynb draws unless truth.csv is there, which is written last."""
    options = {"n_panoramas": 12, "width": 128, "n_jobs": 1}
    demo_360.make_demo(tmp_path / "whole", **options)
    monkeypatch.setattr(demo_360, "draw_panorama", at_call(5, demo_360.draw_panorama))
    with pytest.raises(KeyboardInterrupt):
        demo_360.make_demo(tmp_path / "demo", **options)
    drawn = content_of(tmp_path / "demo")
    assert drawn and all(name.endswith(".jpg") for name in drawn)
    demo_360.make_demo(tmp_path / "demo", **options)
    assert content_of(tmp_path / "demo") == content_of(tmp_path / "whole")


def test_sorting_the_demo_into_classes(tmp_path, monkeypatch):
    """The folder is there when it is whole: scratch.ipynb looks for it alone."""
    truth = demo_360.make_demo(tmp_path / "demo", n_panoramas=12, width=128, n_jobs=1)
    (tmp_path / "halves").mkdir()
    for name in truth["image"]:
        c.picture(0).save(tmp_path / "halves" / name)
    sort = (tmp_path / "classes", tmp_path / "halves", truth)
    monkeypatch.setattr(shutil, "copyfile", at_call(5, shutil.copyfile))
    with pytest.raises(KeyboardInterrupt):
        demo_360.sort_into_classes(*sort)
    assert not (tmp_path / "classes").exists()
    demo_360.sort_into_classes(*sort)
    assert len(du.list_images(tmp_path / "classes")) == len(truth)


def test_hashing(photos, notebook_functions, monkeypatch):
    nb = notebook_functions("partitioning")
    wanted = nb.find_near_duplicates(photos, 64, n_jobs=2)
    monkeypatch.setattr(nb, "image_hash", at_call(4, nb.image_hash))
    with pytest.raises(KeyboardInterrupt):
        nb.find_near_duplicates(photos, 64, n_jobs=2)
    pd.testing.assert_frame_equal(nb.find_near_duplicates(photos, 64, n_jobs=2), wanted)


@pytest.mark.parametrize("moment", ["while photos are read", "while features are kept"])
def test_features(moment, photos, tmp_path, monkeypatch):
    model, cache = c.tiny_model(), tmp_path / "cache"
    table = pd.DataFrame({"image_path": map(str, photos)})
    part = du.DataPartition(table, [], du.make_transforms(model, train=False), cache)
    config = du.TrainConfig(batch_size=2, cache_dir=str(cache))
    wanted = du.extract_features(model, part, du.TrainConfig(batch_size=2))
    if moment == "while photos are read":
        monkeypatch.setattr(du, "_read_cached", at_call(5, du._read_cached))
    else:
        shutil.rmtree(cache)
        monkeypatch.setattr(du.os, "replace", at_call(7, du.os.replace))  # six photos before it
    with pytest.raises(KeyboardInterrupt):
        du.extract_features(model, part, config)
    kept = [path for path in cache.rglob("*") if path.is_file()]
    assert kept and all(np.load(path).ndim == 3 for path in kept)  # photos, whole ones
    assert torch.equal(du.extract_features(model, part, config), wanted)


def test_out_of_fold():
    groups = np.repeat(np.arange(6), 2)

    def fit_predict(train, held_out):
        return np.full((len(held_out), 2), groups[train].mean())

    wanted = du.out_of_fold(fit_predict, groups, 3, 42)
    with pytest.raises(KeyboardInterrupt):
        du.out_of_fold(at_call(2, fit_predict), groups, 3, 42)
    np.testing.assert_array_equal(du.out_of_fold(fit_predict, groups, 3, 42).probs, wanted.probs)


class Stopped:
    """A Trainer that somebody stops: fit() returns what there is so far."""

    fit_whole = du.Trainer.fit_whole

    def __init__(self, *args):
        self.stopped = False

    def fit(self, after_epoch=None):
        self.stopped = True
        return pd.DataFrame({"val_mAP": [0.5]})

    def predict(self, *args):
        return "of a half-trained model"


def test_stop_button_ends_all_the_short_trainings_of_a_cell(notebook_functions, monkeypatch):
    """Else the next one begins, and a half-trained one is compared with whole ones."""
    stored = du.FeatureSet(torch.zeros(4, 8, 2, 2), np.zeros((4, 2)), ["a", "b"])
    rows = np.arange(4)
    own = {"label_columns": ["a", "b"], "features": torch.zeros(4, 8), "truth": np.zeros((4, 2))}
    own |= {"rows_of": {"val": rows}, "EXCLUSIVE": False, "stored": [stored] * 2}
    own |= {"ABLATION_EPOCHS": 1, "Trainer": Stopped}
    used = type("Classifier", (), {"labels": ["a", "b"]})
    calls = {"csra": ("score_head", 0, 1, 0.1), "mldecoder": ("score_decoder", 0, 1, 32)}
    calls["relabeling"] = "train_layer", rows, np.zeros((4, 2)), 0
    for notebook, (name, *args) in calls.items():
        nb = notebook_functions(notebook)
        for key, value in own.items():
            monkeypatch.setattr(nb, key, value, raising=False)
        monkeypatch.setattr(nb, "classifier", used, raising=False)
        with pytest.raises(KeyboardInterrupt):
            getattr(nb, name)(*args)


def test_stop_button_ends_a_head_that_learns_before_the_network(monkeypatch):
    monkeypatch.setattr(du, "Trainer", Stopped)
    monkeypatch.setattr(du, "store_features", lambda *_: None)
    options = {"pretrained": False, "img_size": 32, **c.SWIN}
    model = du.build_model("swinv2_tiny_window8_256", 3, "csra", **options)
    table = pd.DataFrame({"image_path": ["a.jpg"], **dict.fromkeys(c.LABELS, 1.0)})
    part = du.DataPartition(table, c.LABELS)
    with pytest.raises(KeyboardInterrupt):
        du.start_from_probe(model, {"plain": part, "val": part}, du.TrainConfig(head="csra"))


def test_pretrained_weights_are_never_without_their_note(notebook_functions, tmp_path, monkeypatch):
    nb, model = notebook_functions("pretraining"), c.tiny_model()
    monkeypatch.setattr(nb, "save_file", at_call(1, nb.save_file))
    path = tmp_path / "pretrained.safetensors"
    with pytest.raises(KeyboardInterrupt):
        nb.save_backbone(model, path, 3)
    assert sorted(content_of(tmp_path)) == ["pretrained.json"]
    nb.save_backbone(model, path, 3)
    assert sorted(content_of(tmp_path)) == ["pretrained.json", "pretrained.safetensors"]
