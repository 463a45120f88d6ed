"""The first step: a head that starts small, the probe, and what fine-tuning makes of it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import data_utils as du

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")
TINY_SWIN = {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}

# ---------------------------------------------------------------- the head's start

FAMILIES = {
    "tf_efficientnet_lite0": {},  # timm would start these four with weights 16 times as large
    "mobilenetv2_100": {},
    "mnasnet_small": {},
    "tf_efficientnetv2_b0": {},
    "resnet18": {},
    "convnext_atto": {},
    "densenet121": {},
    "swinv2_tiny_window8_256": TINY_SWIN,
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},  # two classifiers
}


@pytest.mark.parametrize("num_labels", [1, 5, 1000])
@pytest.mark.parametrize("name", FAMILIES)
def test_first_loss_is_the_entropy_of_the_base_rates(name, num_labels):
    torch.manual_seed(0)
    rng = np.random.default_rng(num_labels)
    targets = (rng.random((400, num_labels)) < rng.uniform(0.02, 0.7, num_labels)).astype(float)
    bias = du.base_rate_logits(targets)
    size = 64 if name != "deit_tiny_distilled_patch16_224" else 224
    options = {"img_size": size, "head_bias": bias} | FAMILIES[name]
    model = du.build_model(name, num_labels, pretrained=False, **options).train()
    logits = model(torch.randn(4, 3, size, size))
    logits = torch.cat(logits) if isinstance(logits, tuple) else logits
    rates = torch.tensor(targets.mean(0).clip(1 / 800, 1 - 1 / 800), dtype=torch.float32)
    entropy = F.binary_cross_entropy(rates, rates)
    loss = F.binary_cross_entropy_with_logits(logits, rates.expand(len(logits), -1))
    assert entropy - 1e-4 <= loss <= entropy + 0.05


@pytest.mark.parametrize("num_labels", [1, 5, 1000])
def test_ml_decoder_starts_small_too(num_labels):
    torch.manual_seed(0)
    bias = np.full(num_labels, -2.0)
    options = {"decoder_embedding": 64, "dim_feedforward": 64, "img_size": 64, "head_bias": bias}
    model = du.build_model("test_resnet", num_labels, "mldecoder", False, **options)
    logits = model(torch.randn(4, 3, 64, 64))
    rate = torch.full_like(logits, 1 / (1 + np.exp(2)))
    loss = F.binary_cross_entropy_with_logits(logits, rate)
    assert loss <= F.binary_cross_entropy(rate, rate) + 0.05


def test_base_rates_count_known_cells_and_are_clipped():
    targets = np.array([[1, 1, NAN, 0.5], [0, 1, NAN, 0], [0, 1, NAN, NAN], [0, NAN, NAN, NAN]])
    odds = np.exp(du.base_rate_logits(targets))
    # 1 of 4; 3 of 3, clipped to 2.5 of 3; nothing known; a quarter of two soft ones
    assert odds.tolist() == pytest.approx([1 / 3, 5, 1, 1 / 3])


def test_base_rates_of_exclusive_classes_are_those_of_a_softmax():
    targets = np.eye(3)[[0, 0, 0, 1]]
    rates = F.softmax(torch.tensor(du.base_rate_logits(targets, exclusive=True)), 0)
    assert rates.tolist() == pytest.approx(np.array([6, 2, 1]) / 9)  # the last clipped to half one


@pytest.mark.parametrize("head", ["linear", "csra", "mldecoder"])
def test_head_starts_from_the_bias_that_is_given(head):
    options = {"decoder_embedding": 16, "dim_feedforward": 16} if head == "mldecoder" else {}
    model = du.build_model("test_resnet", 2, head, False, 64, [3.0, -3.0], **options)
    found = model.get_classifier()
    found = found.decoder.duplicate_pooling_bias if head == "mldecoder" else found.bias
    assert found.tolist() == [3, -3]


def test_published_csra_weights_come_without_a_bias():
    head = du.CSRA(4, 2)
    nn.init.ones_(head.bias)
    head.load_state_dict({"multi_head.0.head.weight": torch.ones(2, 4, 1, 1)})
    assert head.bias.tolist() == [0, 0]
    assert torch.equal(head.weight, torch.ones(1, 2, 4))


# ---------------------------------------------------------------- the probe


def draw(n=120, width=6, labels=3, seed=0, unknown=0.2):
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 3, (n, width))
    logits = (x - 2) @ rng.normal(0, 1, (width, labels)) / 3 - 0.5
    targets = (rng.random((n, labels)) < 1 / (1 + np.exp(-logits))).astype(float)
    targets[rng.random(targets.shape) < unknown] = NAN
    return torch.tensor(x, dtype=torch.float32), targets


def test_probe_is_sklearns_logistic_regression_on_the_known_cells():
    x, targets = draw()
    probe, losses = du.fit_probe(x, targets)
    scaled = ((x - x.mean(0)) / x.std(0)).numpy()
    for label in range(3):
        known = ~np.isnan(targets[:, label])
        model = LogisticRegression(C=losses.idxmin(), tol=1e-8, max_iter=1000)
        model.fit(scaled[known], targets[known, label])
        expected = model.decision_function(scaled)
        assert probe(x)[:, label].tolist() == pytest.approx(expected.tolist(), abs=5e-3)


def test_probe_of_exclusive_classes_is_the_multinomial_regression():
    x, _ = draw(labels=1)
    classes = np.random.default_rng(1).integers(0, 3, len(x))
    x[:, 0] += torch.tensor(classes)
    probe, losses = du.fit_probe(x, np.eye(3)[classes], exclusive=True)
    scaled = ((x - x.mean(0)) / x.std(0)).numpy()
    model = LogisticRegression(C=losses.idxmin(), tol=1e-8, max_iter=1000).fit(scaled, classes)
    expected = model.predict_proba(scaled)
    assert np.allclose(probe(x).softmax(1).detach(), expected, atol=2e-3)


def test_strength_is_chosen_on_groups_left_out():
    """Copies of a photo in one group: with rows left out, the weakest penalty would seem best."""
    rng = np.random.default_rng(0)
    photos = torch.tensor(rng.normal(size=(12, 40)), dtype=torch.float32)
    targets = rng.integers(0, 2, (12, 1)).astype(float)  # nothing to learn
    x = photos.repeat_interleave(10, 0) + 0.01 * torch.randn(120, 40)
    y, groups = targets.repeat(10, 0), np.arange(12).repeat(10)
    _, by_group = du.fit_probe(x, y, groups)
    _, by_row = du.fit_probe(x, y)
    assert by_group.idxmin() < by_row.idxmin() / 100


def test_probe_of_a_label_that_is_never_present_stays_low():
    x, targets = draw()
    targets[:, 1] = 0
    probe, _ = du.fit_probe(x, targets)
    assert probe(x)[:, 1].sigmoid().max() < 0.1
    assert torch.isfinite(probe.weight).all()


def test_one_group_gets_a_probe_without_a_choice():
    x, targets = draw(20)
    probe, losses = du.fit_probe(x, targets, ["one"] * 20)
    assert torch.isfinite(probe(x)).all()
    assert len(losses) >= 1


def test_single_strength_is_taken_as_it_is():
    x, targets = draw()
    chosen, losses = du.fit_probe(x, targets)
    given, one = du.fit_probe(x, targets, strengths=[losses.idxmin()])
    assert torch.equal(given.weight, chosen.weight)
    assert one.index.tolist() == [losses.idxmin()]


@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224"])
def test_model_with_the_probe_in_it_answers_as_the_probe(name):
    torch.manual_seed(0)
    size = 224 if "deit" in name else 64
    model = du.build_model(name, 3, pretrained=False, img_size=size).eval()
    images = torch.randn(2, 3, size, size)
    probe = nn.Linear(model.num_features, 3)
    du.use_probe(model, probe)
    with torch.inference_mode():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        expected = probe(pooled)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "caformer_s18"])
def test_probe_sees_what_the_last_layer_sees_after_a_norm_or_a_layer_of_its_own(name):
    torch.manual_seed(0)
    model = du.build_model(name, 3, pretrained=False).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
    images = torch.randn(2, 3, 224, 224)
    photos = TensorDataset(images, torch.zeros(2, 3))
    pooled = du.extract_features(model, photos, pooled=True)
    probe = nn.Linear(pooled.shape[1], 3)
    du.use_probe(model, probe)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), probe(pooled), atol=3e-2, rtol=3e-2)


# ---------------------------------------------------------------- photos on disk


@pytest.fixture
def survey(tmp_path):
    """Partitions of 24, 12 and 12 small photos; "red" and "green" tell how they are tinted."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 24), ("val", 12), ("test", 12)):
        rows = []
        for i in range(n):
            target = [i % 2, i // 2 % 2]
            pixels = rng.integers(0, 120, (48, 48, 3)) + 100 * np.array([*target, 0])
            path = tmp_path / f"{name}_{i}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            rows.append([str(path), f"{name}{i}", *target])
        table = pd.DataFrame(rows, columns=["image_path", "group_id", "red", "green"])
        du.write_partition(table, tmp_path / f"{name}_partition.csv")
    return tmp_path


def settings(folder, **changes):
    own = {"partition_dir": str(folder), "model_name": "test_resnet", "img_width": 64}
    own |= {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "precision": "no"}
    return du.TrainConfig(**(own | changes))


def test_features_come_from_disk_the_second_time(survey, tmp_path, monkeypatch):
    config = settings(survey, cache_dir=str(tmp_path / "cache"))
    model, sets = du.build_run(config)
    found = du.extract_features(model, sets["val"], config, pooled=True)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1  # photos lie in folders of it
    forward = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda images: 1 / 0)
    again = du.extract_features(model, sets["val"], config, pooled=True)
    assert torch.equal(found, again)
    with torch.no_grad():
        model.get_classifier().weight.add_(1)  # the head is not what they depend on
        assert torch.equal(found, du.extract_features(model, sets["val"], config, pooled=True))
        monkeypatch.setattr(model, "forward_features", forward)
        next(model.parameters()).mul_(1.1)  # other weights of the backbone: other features
    other = du.extract_features(model, sets["val"], config, pooled=True)
    assert not torch.equal(found, other)
    path = sets["val"].paths[0]
    Image.new("RGB", (48, 48)).save(path)  # another photo under the same name
    changed = du.extract_features(model, sets["val"], config, pooled=True)
    assert not torch.equal(changed[0], other[0])
    assert torch.equal(changed[1:], other[1:])


def test_cached_features_are_not_those_of_another_pooling_or_kind_of_head(survey, tmp_path):
    config = settings(survey, model_name="convnext_atto", cache_dir=str(tmp_path / "cache"))
    plain = du.build_run(config, "linear", ("train", "val"))[0]
    model, sets = du.build_run(config, "csra", ("train", "val"))
    model.backbone.load_state_dict(plain.state_dict(), strict=False)
    du.extract_features(plain, sets["val"], config)
    expected = du.extract_features(model, sets["val"])
    torch.testing.assert_close(du.extract_features(model, sets["val"], config), expected)
    kinds = [du.TrainConfig(cache_dir=config.cache_dir, batch_size=8), du.TrainConfig(batch_size=8)]
    for pool in ("avg", "max"):
        torch.manual_seed(0)
        model = du.build_model("test_resnet", 2, pretrained=False, img_size=64, global_pool=pool)
        found = [du.extract_features(model, sets["val"], k, pooled=True) for k in kinds]
        torch.testing.assert_close(*found)


def test_features_of_a_distilled_model_are_kept_on_disk_too(survey, tmp_path):
    cached = {"img_width": 224, "cache_dir": str(tmp_path / "cache")}
    config = settings(survey, model_name="deit_tiny_distilled_patch16_224", **cached)
    model, sets = du.build_run(config, names=("train", "val"))
    found, again = (du.extract_features(model, sets["val"], config, pooled=True) for _ in range(2))
    assert torch.equal(found, again)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1  # photos lie in folders of it


@pytest.mark.parametrize("head", ["linear", "csra", "mldecoder"])
def test_head_learns_on_the_frozen_backbone(survey, head, monkeypatch):
    monkeypatch.setattr(du, "fast_precision", lambda *_, **__: "no")  # bf16 would move the scores
    options = {"decoder_embedding": 16, "dim_feedforward": 16} if head == "mldecoder" else {}
    model, sets = du.build_run(settings(survey), head, **options)
    layers = {id(p) for p in model.get_classifier().parameters()}
    before = {n: p.clone() for n, p in model.named_parameters() if id(p) not in layers}
    reached = du.start_from_probe(model, sets, settings(survey))
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight), name
    with torch.inference_mode():
        logits = model.eval()(torch.stack([sets["val"][i][0] for i in range(12)]))
    found = du.mean_average_precision(sets["val"].targets, logits.numpy())
    assert found == pytest.approx(reached, abs=1e-6)
    assert found > 0.9  # colours are plain to see, for random features as well


def test_probe_takes_part_as_epoch_0_and_stays_where_training_ruins_it(survey, tmp_path):
    config = settings(survey, start="probe", learning_rate=1.0, clip_grad=None)
    model, sets = du.build_run(config)
    reached = du.start_from_probe(model, sets, config)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    history = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run").fit()
    assert history["epoch"].tolist() == [0, 1, 2]
    assert history["val_mAP"][0] == pytest.approx(reached, abs=1e-6)
    assert history["val_mAP"][1:].max() < reached
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_training_from_a_probe_is_resumed_to_the_bit(survey, tmp_path):
    config = settings(survey, start="probe", epochs=3)

    def trainer(folder):
        model, sets = du.build_run(config)
        du.start_from_probe(model, sets, config)
        return du.Trainer(model, sets["train"], sets["val"], config, tmp_path / folder)

    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    expected = trainer("whole").fit()
    trainer("parts").fit(stop)
    found = trainer("parts").resume()
    clock = ["seconds", "images_per_second"]
    pd.testing.assert_frame_equal(found.drop(columns=clock), expected.drop(columns=clock))


def test_training_that_is_stopped_in_its_first_epoch_goes_on_from_the_probe(
    survey, tmp_path, monkeypatch
):
    config = settings(survey, start="probe", epochs=1)

    def trainer():
        model, sets = du.build_run(config)
        du.start_from_probe(model, sets, config)
        return du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run")

    stopped = trainer()
    monkeypatch.setattr(
        stopped, "training_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert stopped.fit()["epoch"].tolist() == [0]
    assert trainer().resume()["epoch"].tolist() == [0, 1]


def test_better_of_moving_average_and_current_weights_is_kept(survey, tmp_path):
    config = settings(survey, ema_decay=0.9999, learning_rate=3e-3, epochs=3)
    model, sets = du.build_run(config)
    trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path)
    history = trainer.fit()
    assert set(history["weights"]) <= {"ema", "current"}
    kept = du.mean_average_precision(sets["val"].targets, trainer.predict(sets["val"]))
    assert kept == pytest.approx(history["val_mAP"].max(), abs=1e-6)


def test_frozen_batch_norm_keeps_the_pretrained_statistics(survey, tmp_path):
    for batch_norm in ("frozen", "trained"):
        config = settings(survey, batch_norm=batch_norm, epochs=1)
        model, sets = du.build_run(config)
        before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
        weights = {n: p.clone() for n, p in model.named_parameters() if "bn" in n}
        trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / batch_norm)
        trainer.fit()
        same = [torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before]
        assert len(same) > 4
        assert all(same) == (batch_norm == "frozen")
        assert not all(
            torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights
        )


def test_layers_far_from_the_head_are_not_trained(survey, tmp_path):
    config = settings(survey, layer_decay=0.5, frozen_below=0.2, epochs=1, batch_norm="frozen")
    model, sets = du.build_run(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    du.Trainer(model, sets["train"], sets["val"], config, tmp_path).fit()
    changed = {
        n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    # shares of the rate: head 1, layer4 1/2 (its last block), ..., stem far below 0.2
    assert "fc" in changed and "layer4" in changed
    assert not changed & {"conv1", "bn1", "layer1"}
    with pytest.raises(ValueError, match=r"frozen_below=1: expected 0 to below 1"):
        du.TrainConfig(frozen_below=1)


def test_measuring_the_time_leaves_no_trace(survey, tmp_path, notebook_functions):
    nb = notebook_functions("training")

    def run(folder, measure):
        config = settings(survey, mixup_alpha=0.2)
        model, sets = du.build_run(config)
        trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / folder)
        seconds = nb.seconds_per_epoch(trainer) if measure else 1.0
        assert seconds > 0
        return trainer.fit().drop(columns=["seconds", "images_per_second"])

    pd.testing.assert_frame_equal(run("a", True), run("b", False))


def test_gradient_checkpointing_is_one_field(survey, tmp_path):
    options = {"model_name": "swinv2_tiny_window8_256", "model_kwargs": TINY_SWIN}
    histories = []
    for checkpointing in (False, True):
        config = settings(survey, grad_checkpointing=checkpointing, epochs=1, **options)
        model, sets = du.build_run(config)
        trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run")
        assert (
            any(getattr(m, "grad_checkpointing", False) for m in model.modules()) is checkpointing
        )
        histories.append(trainer.fit()["train_loss"][0])
    assert histories[0] == pytest.approx(histories[1], abs=1e-6)


# ---------------------------------------------------------------- flip at test time


def test_flip_averages_the_logits_of_both_sides(survey, tmp_path):
    config = settings(survey, epochs=1)
    model, sets = du.build_run(config)
    trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path)
    images = torch.stack([sets["val"][i][0] for i in range(12)])
    with torch.inference_mode():
        model.eval()
        expected = ((model(images) + model(images.flip(3))) / 2).sigmoid()
        plain = model(images).sigmoid()
    assert np.allclose(trainer.predict(sets["val"], flip=True), expected, atol=1e-6)
    assert np.allclose(trainer.predict(sets["val"]), plain, atol=1e-6)


def test_classifier_flips_as_it_was_saved_unless_told_otherwise(survey, tmp_path):
    model, sets = du.build_run(settings(survey))
    plain, flipped = (
        du.Classifier(model, ["red", "green"], [0.5, 0.5], flip=flip) for flip in (False, True)
    )
    path = flipped.save(tmp_path / "run")
    loaded = du.Classifier.load(path)
    assert loaded.flip is True
    photos = sets["test"].paths[:3]
    expected = flipped.predict(photos)
    assert not expected.equals(plain.predict(photos))
    assert loaded.predict(photos).equals(expected)
    assert loaded.predict(photos, flip=False).equals(plain.predict(photos))
    mirrored = np.asarray(Image.open(photos[0]))[:, ::-1]
    names = ["red_prob", "green_prob"]
    found = flipped.predict(np.ascontiguousarray(mirrored))[names].to_numpy()
    assert np.allclose(found, expected[names].to_numpy()[0], atol=1e-5)  # sees both sides anyway


def test_file_without_the_option_does_not_flip(survey, tmp_path):
    model, _ = du.build_run(settings(survey))
    path = du.Classifier(model, ["red", "green"], [0.5, 0.5], flip=True).save(tmp_path)
    content = json.loads(path.read_text())
    del content["flip"]
    path.write_text(json.dumps(content))
    assert du.Classifier.load(path).flip is False


# ---------------------------------------------------------------- larger photos in use


def test_larger_photos_are_for_validation_and_use_only(survey, tmp_path, notebook_functions):
    """1.29 × 64 px is 83, of which 96 is the nearest multiple of 32."""
    config = settings(survey, model_name="resnet10t", model_kwargs={}, img_width=64)
    model, sets = du.build_run(dataclasses.replace(config, test_scale=1.29))
    shapes = {name: tuple(part[0][0].shape) for name, part in sets.items()}
    assert shapes.pop("train") == (3, 64, 64)
    assert set(shapes.values()) == {(3, 96, 96)}
    classifier = du.Classifier(model, ["red", "green"], [0.5, 0.5])
    loaded = du.Classifier.load(classifier.save(tmp_path / "run"))
    photo = sets["test"].paths[0]
    assert loaded.explain(photo, "red").shape == (96, 96)
    assert loaded.predict(photo).equals(classifier.predict(photo))
    at_64 = du.Classifier(du.build_run(config)[0], ["red", "green"], [0.5, 0.5])
    assert at_64.explain(photo, "red").shape == (64, 64)
    fingerprint = notebook_functions("survey").fingerprint
    assert fingerprint(at_64) != fingerprint(loaded)


@pytest.fixture
def undecided(survey, tmp_path):
    """A trainer whose answers on validation (16 photos or more) the test says, by the size."""

    def make(at_64, at_96, **changes):
        options = {"model_name": "resnet10t", "model_kwargs": {}, "img_width": 64}
        config = settings(survey, **{**options, "test_scale": None, **changes})
        model, sets = du.build_run(config)
        trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run")
        truth = sets["val"].targets

        def predict(part, flip=False, rolls=1):
            wrong = at_64 if part[0][0].shape[-1] == 64 else at_96  # so many answers turned round
            return np.abs(truth - 0.1 - 0.8 * (np.arange(truth.size) < wrong).reshape(truth.shape))

        trainer.predict = predict
        return trainer, sets

    return make


@pytest.mark.parametrize(
    ("at_64", "at_96", "size"), [(8, 0, 96), (0, 8, 64), (8, 8, 64)], ids=["gain", "loss", "equal"]
)
def test_larger_photos_are_kept_where_validation_gains(undecided, at_64, at_96, size):
    trainer, sets = undecided(at_64, at_96)
    probs, versus = du.choose_test_size(trainer, sets["test"])
    assert np.sign(versus["difference"]) == np.sign(at_64 - at_96)
    assert sets["test"][0][0].shape == sets["val"][0][0].shape == (3, size, size)
    assert sets["train"][0][0].shape == (3, 64, 64)
    assert np.array_equal(probs, trainer.predict(sets["val"]))
    du.choose_test_size(trainer, sets["test"])  # a cell that is run once more
    assert du.Classifier(trainer.plain, ["red", "green"], [0.5] * 2).img_size == (size, size)


def test_finished_run_uses_the_size_that_validation_chose(undecided):
    trainer, sets = undecided(8, 0)
    used = du.finish_run(trainer)
    assert used.explain(sets["test"].paths[0], "red").shape == (96, 96)


@pytest.mark.parametrize(
    "changes",
    [{"test_scale": 1.0}, {"model_name": "swinv2_tiny_window8_256", "model_kwargs": TINY_SWIN}],
    ids=["said", "one size"],
)
def test_larger_photos_are_not_tried_against_the_settings_or_the_network(undecided, changes):
    trainer, sets = undecided(8, 0, **changes)
    probs, versus = du.choose_test_size(trainer, sets["test"])
    assert versus is None
    assert sets["test"][0][0].shape == (3, 64, 64)
    assert np.array_equal(probs, trainer.predict(sets["val"]))


@pytest.mark.parametrize("value", ["large", [3, 96], [3, 96, 0], [3, 96.5, 96], [3, 96, 9000]])
def test_size_in_use_of_a_stranger_is_checked(survey, tmp_path, value):
    model, _ = du.build_run(settings(survey))
    path = du.Classifier(model, ["red", "green"], [0.5, 0.5]).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_input_size": value}))
    with pytest.raises(ValueError, match="test_input_size should be"):
        du.Classifier.load(path)


def test_model_of_one_size_stays_at_it(survey):
    swin = {"model_name": "swinv2_tiny_window8_256", "model_kwargs": TINY_SWIN}
    model, sets = du.build_run(settings(survey, **swin, test_scale=1.29))
    assert sets["val"][0][0].shape == sets["train"][0][0].shape


# ---------------------------------------------------------------- thresholds that travel


def test_shrunk_threshold_is_drawn_to_the_common_one_by_the_number_of_positives():
    """Every bootstrap sample finds the same cuts, so the weights n / (n + 10) can be read off."""
    n = 400
    targets = np.zeros((n, 2))
    targets[:200, 0] = targets[:30, 1] = 1
    probs = np.where(targets == 1, [0.8, 0.4], [0.6, 0.2])
    found = du.find_optimal_thresholds(probs, targets, ["often", "seldom"], "shrunk")
    assert found["source"].tolist() == ["shrunk", "shrunk"]

    def logit(p):
        return np.log(p / (1 - p))

    # the cut that is best for both together: 0.8 | 0.6 (TP 200 of 230) against 0.4 | 0.2
    common = logit(0.7)
    for label, own, n_positives in (("often", 0.7, 200), ("seldom", 0.3, 30)):
        weight = n_positives / (n_positives + 10)
        expected = weight * logit(own) + (1 - weight) * common
        assert logit(found.loc[label, "threshold"]) == pytest.approx(expected, abs=1e-6)
    assert found["score"].tolist() == [1, 1]


def test_shrunk_threshold_of_too_few_positives_is_the_common_one():
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 3)) < [0.5, 0.3, 0.02]).astype(float)
    probs = (0.4 * targets + 0.6 * rng.random((200, 3))).clip(0.01, 0.99)
    found = du.find_optimal_thresholds(probs, targets, list("abc"), "shrunk", min_positives=10)
    assert found.loc["c", "source"] == "global: fewer than 10 positives"
    assert np.isnan(found.loc["c", "score"])
    low, high = found["threshold"][:2].min(), found["threshold"][:2].max()
    assert low - 0.05 <= found.loc["c", "threshold"] <= high + 0.05


def test_shrunk_thresholds_vary_less_than_exact_ones():
    spread = {}
    for mode in ("per_label", "shrunk"):
        cuts = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            targets = (rng.random((80, 4)) < 0.2).astype(float)
            probs = 1 / (1 + np.exp(-(2 * targets - 1 + rng.normal(0, 1, (80, 4)))))
            cuts.append(du.find_optimal_thresholds(probs, targets, list("abcd"), mode)["threshold"])
        spread[mode] = np.std(cuts, axis=0).mean()
    assert spread["shrunk"] < 0.6 * spread["per_label"]


def test_shrunk_thresholds_draw_whole_groups_and_follow_the_seed():
    rng = np.random.default_rng(0)
    targets = (rng.random((90, 2)) < 0.4).astype(float)
    probs = (0.3 * targets + 0.7 * rng.random((90, 2))).clip(0.01, 0.99)

    def cuts(**options):
        found = du.find_optimal_thresholds(probs, targets, ["a", "b"], "shrunk", **options)
        return found["threshold"].tolist()

    assert cuts() == cuts(groups=np.arange(90))
    assert cuts() != cuts(groups=np.arange(90) // 9)
    assert cuts() != cuts(seed=1)
    whole = cuts(groups=np.zeros(90))  # one group: every sample is the data themselves
    exact = du.find_optimal_thresholds(probs, targets, ["a", "b"])["threshold"]
    common = du.find_optimal_thresholds(probs, targets, ["a", "b"], "global")["threshold"]
    n = targets.sum(0)
    logit = [np.log(t / (1 - t)) for t in (exact.to_numpy(), common.to_numpy(), np.array(whole))]
    assert logit[2].tolist() == pytest.approx((logit[0] * n + logit[1] * 10) / (n + 10))


def test_shrunk_thresholds_go_with_no_precision():
    with pytest.raises(ValueError, match="min_precision goes with mode='per_label' or 'global'"):
        du.find_optimal_thresholds(
            np.ones((2, 1)), np.ones((2, 1)), ["a"], "shrunk", min_precision=0.9
        )


# ---------------------------------------------------------------- one place for the settings


def test_recipe_depends_on_pretrained_weights():
    own, scratch = du.TrainConfig.recipe(True, 1000), du.TrainConfig.recipe(False, 1000)
    assert (own.start, own.batch_norm, own.pretrained) == ("probe", "frozen", True)
    assert (scratch.start, scratch.batch_norm, scratch.pretrained) == ("small", "trained", False)
    assert du.TrainConfig.recipe("weights.pth", 1000).start == "probe"


def test_weights_of_pretraining_without_labels_are_fine_tuned_like_random_ones(tmp_path):
    weights = str(tmp_path / "pretrained.safetensors")
    assert du.TrainConfig.recipe(weights, 1000).start == "probe"
    (tmp_path / "pretrained.json").write_text('{"recipe": "scratch", "img_size": [64, 64]}')
    scratch = du.TrainConfig.recipe(False, 1000, learning_rate=1e-4)
    assert du.TrainConfig.recipe(weights, 1000, learning_rate=1e-4) == dataclasses.replace(
        scratch, pretrained=weights
    )
    (tmp_path / "pretrained.json").write_text("[]")
    with pytest.raises(ValueError, match=r"pretrained\.json: no JSON of pretraining\.ipynb"):
        du.TrainConfig.recipe(weights, 1000)


def test_few_photos_are_seen_more_often():
    epochs = [du.TrainConfig.recipe(True, n).epochs for n in (50, 500, 5_000, 500_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[1] > epochs[2] >= epochs[3] >= 2
    assert epochs[0] <= 40


def test_changes_win_over_the_recipe_and_none_leaves_it():
    for size, steps in ((32, 1), (16, 2), (64, 1), (32, 2)):  # photos a step: 32, 32, 64, 64
        found = du.TrainConfig.recipe(True, 600, batch_size=size, grad_accum_steps=steps).epochs
        assert found == round(100 * size * steps / 600)
    config = du.TrainConfig.recipe(True, 100, epochs=7, learning_rate=None, mixup_alpha=0.3)
    assert (config.epochs, config.mixup_alpha) == (7, 0.3)
    assert config.learning_rate == du.TrainConfig.recipe(True, 100).learning_rate
    with pytest.raises(ValueError, match="grad_accum_steps='2': expected a whole number"):
        du.TrainConfig.recipe(True, 100, grad_accum_steps="2")
    with pytest.raises(ValueError, match="no option lerning_rate; expected some of epochs, batch"):
        du.TrainConfig.recipe(True, 100, lerning_rate=1)
    with pytest.raises(ValueError, match=r"did you mean learning_rate\?"):
        du.TrainConfig.recipe(True, 100, LERNING_RATE=1)


def test_none_in_the_options_of_the_notebook_wins_over_the_recipe(survey):
    """N_EPOCHS = None asks for the recipe's number; OPTIONS say what they say."""
    cells = [c for c in nbformat.read(ROOT / "training.ipynb", 4).cells if c.cell_type == "code"]
    space = {"data_utils": du, "TrainConfig": du.TrainConfig, "dataclasses": dataclasses}
    exec(next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])), space)  # noqa: S102
    folder = settings(survey).partition_dir
    options = {"layer_decay": None, "ema_decay": None, "clip_grad": None, "min_crop": 0.9}
    space |= {"PARTITION_DIR": folder, "PRETRAINED": "weights.pth", "OPTIONS": options}
    exec(next(c.source for c in cells if "TrainConfig.recipe(" in c.source), space)  # noqa: S102
    config, recipe = space["config"], du.TrainConfig.recipe(True, len(space["parts"]["train"]))
    assert {name: getattr(config, name) for name in options} == options
    assert (config.epochs, config.start) == (recipe.epochs, "probe")


def test_config_comes_back_from_its_file(survey, tmp_path):
    swin = {"model_name": "swinv2_tiny_window8_256", "model_kwargs": TINY_SWIN}
    config = settings(survey, **swin, epochs=1)
    model, sets = du.build_run(config)
    du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run").fit()
    found = du.TrainConfig.read(tmp_path / "run" / "config.json")
    assert found == dataclasses.replace(config, loss="bce")  # what "auto" became
    again, _ = du.build_run(found)
    assert again.spec == du.build_run(config)[0].spec
    changed = du.TrainConfig.read(tmp_path / "run" / "config.json", epochs=5)
    assert changed.epochs == 5
    with pytest.raises(ValueError, match=r"^no option epoch; .*; did you mean epochs\?"):
        du.TrainConfig.read(tmp_path / "run" / "config.json", epoch=5)


def test_run_folder_says_which_head_and_labels_it_has(survey, tmp_path):
    model, sets = du.build_run(settings(survey, epochs=1), "csra", lam=0.7)
    du.Trainer(model, sets["train"], sets["val"], settings(survey, epochs=1), tmp_path).fit()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["head"], saved["head_kwargs"]) == ("csra", {"lam": 0.7})
    assert saved["labels"] == ["red", "green"]
    found = du.TrainConfig.read(tmp_path / "config.json")
    again, _ = du.build_run(found)
    assert again.spec == model.spec
    assert du.build_run(found, "linear")[0].spec["head_kwargs"] == {}
    assert du.build_run(found, lam=0.2)[0].spec["head_kwargs"] == {"lam": 0.2}
    with pytest.raises(ValueError, match="other labels than the run's"):
        du.build_run(du.TrainConfig.read(tmp_path / "config.json", labels=["green", "red"]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("compile", "yes", "compile='yes': expected True or False"),
        ("model_kwargs", None, "model_kwargs=None: expected a dict"),
        ("img_width", -1, "img_width=-1: expected 0 or more"),
        ("batch_size", True, "batch_size=True: expected a whole number from 1"),
        ("cache_dir", 3, "cache_dir=3: expected a text or None"),
        ("precision", "half", "precision='half': expected 'auto' or 'no'"),
        ("view", "left", "view='left': expected 'half' or 'panorama'"),
    ],
)
def test_every_field_is_checked_by_its_kind_and_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        du.TrainConfig(**{field: value})


def test_every_setting_has_a_line_of_explanation():
    for option in dataclasses.fields(du.TrainConfig):
        assert 8 < len(option.metadata["help"]) < 60, option.name


@pytest.mark.parametrize("content", ["{", "[1]", '{"epochs": 0}', '{"colour": "red"}'])
def test_file_that_is_no_config_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: no config\.json of a training"):
        du.TrainConfig.read(path)
    with pytest.raises(FileNotFoundError, match=r"gone: no such file; run training\.ipynb"):
        du.TrainConfig.read(tmp_path / "gone")


def test_run_reads_only_the_parts_that_it_is_asked_for(survey):
    (survey / "test_partition.csv").unlink()
    _, sets = du.build_run(settings(survey), names=("train", "val"))
    assert sorted(sets) == ["plain", "train", "val"]
    with pytest.raises(FileNotFoundError, match=r"test_partition\.csv.*partitioning\.ipynb"):
        du.build_run(settings(survey))
    names = [type(step).__name__ for step in sets["plain"].transform.transforms]
    assert "RandomSqueezedCrop" not in names
    assert "RandomSqueezedCrop" in [type(s).__name__ for s in sets["train"].transform.transforms]


# ---------------------------------------------------------------- photos with their labels


def test_predictions_are_marked_right_missed_and_wrong():
    targets = np.array([[1, 1, 0, NAN], [0, 0, 0, 0]])
    probs = np.array([[0.9, 0.1, 0.8, 0.9], [0.1, 0.1, 0.1, 0.1]])
    photos = [np.zeros((8, 8, 3), np.uint8)] * 2
    part = SimpleNamespace(paths=photos, targets=targets, label_columns=list("abcd"))
    du.show_predictions(part, probs, [0.5] * 4)
    texts = [[text.get_text() for text in axis.texts] for axis in plt.gcf().axes[:2]]
    assert texts == [["right: a", "missed: b", "wrong: c"], []]  # of d nobody knows
    plt.close()


def test_nine_photos_are_drawn_each_with_its_own_answers():
    labels = list("abcdefghijklmnopqrst")
    photos = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(20)]
    part = SimpleNamespace(paths=photos, targets=np.eye(20), label_columns=labels)
    du.show_predictions(part, np.eye(20), np.full(20, 0.5), seed=1)
    axes = plt.gcf().axes
    drawn = [axis.images[0].get_array()[0, 0, 0] // 10 for axis in axes]
    assert len(set(drawn)) == 9
    assert [axis.texts[0].get_text() for axis in axes] == [f"right: {labels[i]}" for i in drawn]
    plt.close()
