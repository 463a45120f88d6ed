"""Classes that exclude each other, on the same Trainer, scores and Classifier; schedules; seeds."""

import hashlib
import json
import math
import pickle
import random

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

NAN = float("nan")
CLASSES = ["red", "green", "blue"]

# ---------------------------------------------------------------- loss

LOGITS = [[0.5, -1.2, 2.0], [-0.3, 0.8, -2.5], [1.5, 0.1, 0.4]]
SOFT = [[1, 0, 0], [0.3, 0.7, 0], [0, 0, 1]]


def cross_entropy(logits, target, smoothing):
    """-Σ q log p with q = (1 - ε) y + ε / K (Szegedy et al. 2016)."""
    total = sum(math.exp(x) for x in logits)
    shares = [(1 - smoothing) * y + smoothing / len(target) for y in target]
    return -sum(q * math.log(math.exp(x) / total) for q, x in zip(shares, logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula_over_judged_images(smoothing):
    loss = du.MaskedLoss("ce", np.eye(3), soft=True, label_smoothing=smoothing)
    expected = [cross_entropy(x, y, smoothing) for x, y in zip(LOGITS, SOFT)]
    found = loss(torch.tensor(LOGITS), torch.tensor(SOFT))
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    partly = torch.tensor([SOFT[0], [NAN] * 3, SOFT[2]])
    found = loss(torch.tensor(LOGITS), partly)
    assert found.item() == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-5)


def test_unjudged_images_give_no_gradient_and_a_batch_of_them_no_loss():
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = du.MaskedLoss("ce", np.eye(3))
    targets = torch.tensor([[1, 0, 0], [NAN] * 3, [0, 1, 0]])
    loss(logits, targets).backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()
    assert loss(logits, torch.full((3, 3), NAN)).item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ce", "class_weights": "neg_pos"}, "loss='ce' takes no class_weights"),
        ({"name": "ce", "asl_gamma_neg": 2.0}, "loss='ce' takes no asl_gamma_neg"),
        ({"name": "bce", "label_smoothing": 0.1}, "label_smoothing goes with loss='ce'"),
    ],
)
def test_options_of_another_loss_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        du.MaskedLoss(targets=np.eye(3), **options)


@pytest.mark.parametrize("value", [-0.1, 1.0, NAN])
def test_label_smoothing_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match="label_smoothing"):
        du.TrainConfig(loss="ce", label_smoothing=value)


# ---------------------------------------------------------------- training


class ColorNet(nn.Module):
    """A logit a class from the mean colour."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def draw(folder, n, size=16, seed=0):
    """Draw `n` noisy pictures, each in one of three colours."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        pixels = rng.integers(0, 60, (size, size, 3))
        pixels[..., i % 3] += 120
        path = folder / f"{seed}_{i}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        rows.append([str(path), *np.eye(3)[i % 3]])
    return pd.DataFrame(rows, columns=["image_path", *CLASSES])


def to_unit(image):
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors")
    return draw(folder, 12, seed=1), draw(folder, 9, seed=2)


@pytest.fixture
def sets(tables):
    return [du.DataPartition(table, CLASSES, to_unit) for table in tables]


def train(sets, run_dir, **changes):
    settings = {"epochs": 30, "batch_size": 4, "learning_rate": 0.1, "warmup_epochs": 0}
    settings |= {"precision": "no", "loss": "ce", "patience": 30}
    return du.Trainer(ColorNet(), *sets, du.TrainConfig(**settings | changes), run_dir)


def test_training_learns_exclusive_classes_and_keeps_the_best_top1(sets, tmp_path):
    run = train(sets, tmp_path, label_smoothing=0.1, mixup_alpha=0.2, cutmix_alpha=0.5)
    history = run.fit()
    probs = run.predict(sets[1])
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    top1 = (probs.argmax(1) == sets[1].targets.argmax(1)).mean()
    assert top1 == history["val_top1"].max() == 1.0
    assert (history["val_top5"] == 1).all()  # of three classes, five guesses hit
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]


def test_best_epoch_is_chosen_by_top1_and_not_by_map(sets, tmp_path):
    run = train(sets, tmp_path, epochs=3)
    scores = iter([(0.4, 0.9), (0.8, 0.1), (0.6, 0.95)])
    weights = []

    def validate():
        weights.append({k: v.clone() for k, v in run.plain.state_dict().items()})
        top1, mean_ap = next(scores)
        return {"val_loss": 1.0, "val_mAP": mean_ap, "val_top1": top1, "val_top5": 1.0}

    run.validate = validate
    run.fit()
    for key, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, weights[1][key])


def test_validation_scores_are_those_of_hand(sets, tmp_path):
    run = train(sets, tmp_path, label_smoothing=0.2)
    targets = sets[1].targets.copy()
    targets[0] = NAN  # nobody judged it
    run.val_set.targets = targets
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 3))).float()
    run._predict_logits = lambda *_: logits
    scores = run.validate()
    right = logits.argmax(1).numpy() == sets[1].targets.argmax(1)
    losses = [cross_entropy(x, y, 0.2) for x, y in zip(logits.tolist(), targets.tolist())]
    assert scores["val_top1"] == pytest.approx(right[1:].mean())
    assert scores["val_loss"] == pytest.approx(np.mean(losses[1:]), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 1, 0], r"1 training images have not exactly one class \(the first: .*1_3\.png\)"),
        ([0, 0, 0], "use 'bce'"),
        ([1, NAN, 0], "1 training images"),
    ],
)
def test_several_classes_or_none_are_refused_with_the_first_image(tables, tmp_path, row, message):
    table = tables[0].copy()
    table.loc[3, CLASSES] = row
    parts = [du.DataPartition(t, CLASSES, to_unit) for t in (table, tables[1])]
    with pytest.raises(ValueError, match=message):
        train(parts, tmp_path)
    train(parts, tmp_path, loss="bce")  # where several may be present
    table.loc[3, CLASSES] = NAN  # unlabelled: left out
    train([du.DataPartition(table, CLASSES, to_unit), parts[1]], tmp_path)


def test_feature_sets_train_single_label_heads_too(tmp_path):
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    part = du.FeatureSet(features, np.eye(3)[np.arange(12) % 3], CLASSES)
    part.targets[0] = [1, 1, 0]
    config = du.TrainConfig(epochs=1, loss="ce", precision="no")
    with pytest.raises(ValueError, match=r"the first: 0\)"):
        du.Trainer(nn.Linear(4, 3), part, part, config, tmp_path)


def test_what_after_epoch_raises_ends_training_and_what_it_sees_is_the_history(sets, tmp_path):
    rows = []

    def stop(row):
        rows.append(row)
        if len(rows) == 2:
            raise StopIteration("enough")

    run = train(sets, tmp_path, epochs=5)
    with pytest.raises(StopIteration, match="enough"):
        run.fit(stop)
    assert rows == run.history
    again = train(sets, tmp_path, epochs=5)
    again.resume(rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]


def test_stopped_training_says_so(sets, tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    run = train(sets, tmp_path, epochs=3)
    assert not run.stopped
    run.fit(stop)
    assert run.stopped


def test_run_of_before_an_option_existed_can_be_resumed(sets, tmp_path):
    train(sets, tmp_path, epochs=1).fit()
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for key in ("schedule", "label_smoothing"):
        del content[key]
    path.write_text(json.dumps(content))
    assert len(train(sets, tmp_path, epochs=1).resume()) == 1
    with pytest.raises(ValueError, match="another schedule"):
        train(sets, tmp_path, epochs=1, schedule="step").resume()


# ---------------------------------------------------------------- scores


def test_argmax_decisions_give_top1_and_per_class_scores_by_hand():
    probs = np.array([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.9, 0.1, 0.0], [0.1, 0.2, 0.7]])
    targets = np.eye(3)[[0, 1, 1, 2]]
    table = du.score_labels(targets, probs, CLASSES, "argmax", n_bootstrap=0)
    assert table["precision"].tolist() == [0.5, 1.0, 1.0]
    assert table["recall"].tolist() == [1.0, 0.5, 1.0]
    assert table["F1"].tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])
    overall = du.summarize_scores(targets, probs, "argmax", n_bootstrap=0)["value"]
    assert overall["exact match"] == 0.75  # top-1 accuracy
    assert overall["micro F1"] == 0.75


# ---------------------------------------------------------------- classifier

SWIN = {"window_size": 4, "embed_dim": 8, "depths": (1,), "num_heads": (1,)}


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    options = {"pretrained": False, "img_size": 32, **SWIN}
    model = du.build_model("swinv2_tiny_window8_256", 3, **options)
    return du.Classifier(model, CLASSES, activation="softmax")


def test_softmax_classifier_decides_for_one_class_before_and_after_loading(classifier, tmp_path):
    photos = [np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8) for i in range(4)]
    table = classifier.predict(photos)
    probs = table[[f"{name}_prob" for name in CLASSES]].to_numpy()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(table[CLASSES].to_numpy(), np.eye(3)[probs.argmax(1)])
    path = classifier.save(tmp_path)
    assert json.loads(path.read_text())["activation"] == "softmax"
    pd.testing.assert_frame_equal(du.Classifier.load(path).predict(photos), table)
    panorama = np.concatenate(photos[:2], axis=1)
    parts = du.Classifier.load(path).predict_panorama(panorama)
    assert (parts[CLASSES].sum(axis=1) == 1).all()
    found = parts.set_index("part")[[f"{name}_prob" for name in CLASSES]]
    mean = (found.loc["left"] + found.loc["right"]) / 2  # the higher ones would not add up to 1
    np.testing.assert_allclose(found.loc["panorama"], mean, atol=1e-6)
    heat = classifier.explain(photos[0], "green")
    assert heat.shape == (32, 32)
    assert heat.max() == pytest.approx(1)


def test_equal_probabilities_still_give_one_class(classifier):
    for parameter in classifier.model.parameters():
        nn.init.zeros_(parameter)
    table = classifier.predict(np.zeros((32, 32, 3), np.uint8))
    assert table[CLASSES].to_numpy().tolist() == [[1, 0, 0]]


def test_map_of_a_class_without_any_probability_is_no_nan(classifier):
    with torch.no_grad():
        classifier.model.head.fc.bias.copy_(torch.tensor([-500.0, 500.0, 0.0]))
    heat = classifier.explain(np.zeros((32, 32, 3), np.uint8), CLASSES[0])
    assert np.isfinite(heat).all()


def test_thresholds_belong_to_sigmoids(classifier):
    with pytest.raises(ValueError, match="3 thresholds"):
        du.Classifier(classifier.model, CLASSES, [0.5] * 3, activation="softmax")
    with pytest.raises(ValueError, match="0 thresholds"):
        du.Classifier(classifier.model, CLASSES)
    with pytest.raises(ValueError, match="activation='relu'"):
        du.Classifier(classifier.model, CLASSES, activation="relu")


def test_classifier_from_validation_of_exclusive_classes_needs_no_thresholds(classifier, sets):
    found = du.Classifier.from_validation(
        classifier.model, sets[1], np.full((9, 3), 1 / 3), activation="softmax"
    )
    assert found.activation == "softmax"
    assert found.thresholds.shape == (0,)
    with pytest.raises(ValueError, match="activation='Softmax': expected 'sigmoid' or 'softmax'"):
        du.Classifier.from_validation(
            classifier.model, sets[1], np.full((9, 3), 1 / 3), activation="Softmax"
        )


def test_file_of_version_1_is_read_as_sigmoid(classifier, tmp_path):
    path = du.Classifier(classifier.model, CLASSES, [0.5, 0.2, 0.7]).save(tmp_path)
    content = json.loads(path.read_text())
    del content["activation"]
    weights = tmp_path / "best_model.pt"
    torch.save(load_file(tmp_path / "model.safetensors"), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    content |= {"format_version": 1, "weights": weights.name, "sha256": digest}
    path.write_text(json.dumps(content))
    loaded = du.Classifier.load(path)
    assert loaded.activation == "sigmoid"
    assert loaded.thresholds.tolist() == [0.5, 0.2, 0.7]


@pytest.mark.parametrize("activation", ["tanh", 1, None])
def test_file_with_another_activation_is_refused(classifier, tmp_path, activation):
    path = classifier.save(tmp_path)
    content = json.loads(path.read_text()) | {"activation": activation}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"best_classifier\.json.*activation"):
        du.Classifier.load(path)


# ---------------------------------------------------------------- augmentation


class FakeModel:
    data_config = {"input_size": (3, 32, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    data_config |= {"interpolation": "bicubic"}


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))


def augmented(seed=1, **options):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what timm draws from
    torch.manual_seed(seed)
    return du.make_transforms(FakeModel, True, crop_scale=(1.0, 1.0), **options)(PHOTO)


def test_rand_augment_and_erasing_follow_the_seed_pickle_and_keep_the_size():
    options = {"rand_augment": "rand-m9-n2-mstd0.5", "random_erasing": 1.0}
    first = augmented(**options)
    assert first.shape == (3, 32, 48)
    assert first.dtype == torch.float32
    assert torch.equal(first, augmented(**options))
    assert not torch.equal(first, augmented(seed=2, **options))
    transform = du.make_transforms(FakeModel, True, **options)
    assert pickle.loads(pickle.dumps(transform))(PHOTO).shape == (3, 32, 48)


def test_random_erasing_replaces_a_rectangle_of_a_training_photo_only():
    """At most a third of the area becomes noise, the rest stays as it was."""
    plain, erased = augmented(), augmented(random_erasing=1.0)
    changed = (plain != erased).any(0)
    assert 0 < changed.float().mean() <= 1 / 3
    rows, columns = np.nonzero(changed.numpy())
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert changed.sum() >= 0.95 * box
    evaluation = du.make_transforms(FakeModel, False, rand_augment="rand-m9", random_erasing=1.0)
    assert torch.equal(evaluation(PHOTO), du.make_transforms(FakeModel, False)(PHOTO))


def test_magnitude_of_rand_augment_is_its_strength():
    change = {
        m: np.mean(
            [
                (augmented(s, rand_augment=f"rand-m{m}-n2-p1-inc1") - augmented(s)).abs().mean()
                for s in range(30)
            ]
        )
        for m in (1, 9)
    }
    assert change[9] > change[1]


@pytest.mark.parametrize(("view", "size"), [("half", (64, 64)), ("panorama", (64, 128))])
def test_crops_keep_the_shape_of_the_view(view, size):
    """A crop of 2:1 photos is about 2:1, else it cuts a third off and is squeezed wide."""

    class Model:
        data_config = {**FakeModel.data_config, "input_size": (3, *size)}

    steps = du.make_transforms(Model, True, view, crop_scale=(0.9, 1.0)).transforms
    crop = next(step for step in steps if type(step).__name__ == "RandomSqueezedCrop")
    torch.manual_seed(0)
    for photo in (torch.zeros(3, 200, 200 * size[1] // size[0]), torch.zeros(3, 200, 300)):
        drawn = [tuple(crop.make_params([photo]).values()) for _ in range(200)]
        whole = photo.shape[2] / photo.shape[1]
        shares = [h * w / photo[0].numel() for _, _, h, w in drawn]
        shapes = [w / h / whole for _, _, h, w in drawn]
        assert 0.89 < min(shares) < 0.92 < 0.98 < max(shares) <= 1
        assert 0.9 - 0.01 < min(shapes) < 0.95 < 1.05 < max(shapes) < 1 / 0.9 + 0.01
        assert np.mean(shapes) == pytest.approx(1, abs=0.02)
        assert all(top >= 0 and top + h <= 200 for top, _, h, _ in drawn)
        assert all(left >= 0 and left + w <= photo.shape[2] for _, left, _, w in drawn)
        assert crop(photo).shape == (3, *size)


def test_small_crops_differ_from_the_photo_in_shape_by_a_third_at_most():
    crop = du.RandomSqueezedCrop((8, 8), (0.1, 0.3))
    torch.manual_seed(0)
    drawn = [crop.make_params([torch.zeros(3, 400, 600)]) for _ in range(300)]
    shapes = [box["width"] / box["height"] for box in drawn]
    assert 3 / 4 - 0.02 < min(shapes) / 1.5 < 0.78
    assert 1.28 < max(shapes) / 1.5 < 4 / 3 + 0.02


def test_crop_shows_the_part_that_its_box_names():
    photo = torch.arange(12.0).view(1, 3, 4).expand(3, -1, -1)
    mode = torchvision.transforms.InterpolationMode.NEAREST
    crop = du.RandomSqueezedCrop((2, 2), (0.5, 1.0), interpolation=mode)
    shown = crop.transform(photo, {"top": 1, "left": 2, "height": 2, "width": 2})
    assert shown[0].tolist() == [[6, 7], [10, 11]]


@pytest.mark.parametrize("wrong", ["9", "rand-x3", "augmix", "rand-mfoo"])
def test_unknown_rand_augment_is_refused_with_an_example(wrong):
    with pytest.raises(ValueError, match=f"rand_augment='{wrong}': expected e.g. 'rand-m9"):
        du.make_transforms(FakeModel, True, rand_augment=wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, NAN])
def test_random_erasing_is_a_probability(wrong):
    with pytest.raises(ValueError, match="random_erasing"):
        du.make_transforms(FakeModel, True, random_erasing=wrong)


# ---------------------------------------------------------------- schedules


def rates_of(sets, run_dir, schedule, **changes):
    """12 epochs of 3 steps."""
    settings = {"epochs": 12, "learning_rate": 1.0, "warmup_epochs": 2, **changes}
    return train(sets, run_dir, schedule=schedule, **settings).learning_rates()[:, 0]


def falling_cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


def test_cosine_warms_up_and_falls(sets, tmp_path):
    rates = rates_of(sets, tmp_path, "cosine")
    assert len(rates) == 36
    assert rates[:6].tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates[6:] == pytest.approx([falling_cosine(t / 36) for t in range(6, 36)])


def test_one_cycle_rises_from_a_25th_for_30_percent_then_falls(sets, tmp_path):
    rates = rates_of(sets, tmp_path, "one-cycle")
    assert rates[0] == pytest.approx(1 / 25)
    rise = [1 / 25 + (1 - 1 / 25) * t / 10.8 for t in range(11)]  # 30 % of 36 is 10.8
    assert rates == pytest.approx(
        [*rise, *(falling_cosine((t - 10.8) / 25.2) for t in range(11, 36))]
    )


def test_flat_cosine_is_flat_until_the_last_28_percent(sets, tmp_path):
    rates = rates_of(sets, tmp_path, "flat-cosine")
    assert (rates[6:27] == 1).all()  # 28 % of 36 is 10
    assert rates[27:] == pytest.approx([falling_cosine((t - 26) / 10) for t in range(27, 36)])


def test_step_divides_by_ten_after_each_third(sets, tmp_path):
    rates = rates_of(sets, tmp_path, "step", warmup_epochs=0)
    assert rates == pytest.approx([1.0] * 12 + [0.1] * 12 + [0.01] * 12)


def test_step_takes_thirds_of_what_follows_the_warm_up(sets, tmp_path):
    rates = rates_of(sets, tmp_path, "step", warmup_epochs=9)  # 27 of 36 steps
    assert max(rates) == rates[27] == pytest.approx(1.0)
    assert rates[27:] == pytest.approx([1.0] * 3 + [0.1] * 3 + [0.01] * 3)


def test_warm_restarts_come_back_to_the_full_rate_twice(sets, tmp_path):
    rates = rates_of(sets, tmp_path, "warm-restarts", warmup_epochs=0)
    assert rates == pytest.approx([falling_cosine(t % 12 / 12) for t in range(36)])


@pytest.mark.parametrize("schedule", du.SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_optimizer_really_gets_the_rates_that_are_drawn(sets, tmp_path, schedule, epochs):
    run = train(sets, tmp_path, schedule=schedule, epochs=epochs, warmup_epochs=1)
    planned, seen = run.learning_rates()[:, 0], []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"])
    )
    run.fit()
    assert seen == pytest.approx(planned.tolist(), abs=1e-12)


def test_layer_wise_rates_keep_their_ratio_under_every_schedule(sets, tmp_path):
    options = {"pretrained": False, "img_size": 32, **SWIN, "depths": (1, 1), "num_heads": (1, 1)}
    for schedule in du.SCHEDULES:
        model = du.build_model("swinv2_tiny_window8_256", 3, **options)
        settings = {"layer_decay": 0.5, "schedule": schedule, "learning_rate": 0.01}
        config = du.TrainConfig(
            epochs=6, warmup_epochs=1, batch_size=4, loss="ce", precision="no", **settings
        )
        rates = du.Trainer(model, *sets, config, tmp_path).learning_rates()
        full = rates[rates.max(1).argmax()]
        assert full.max() > 0.009
        assert full.min() <= 0.5 * full.max()
        late = rates[len(rates) // 2 :]
        late = late[late.max(1) > 0]
        np.testing.assert_allclose(late / late.max(1, keepdims=True), full / full.max() + 0 * late)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule='linear'.*cosine"):
        du.TrainConfig(schedule="linear")


# ---------------------------------------------------------------- random numbers of ranks


class Draws(torch.utils.data.Dataset):
    """What a worker draws: python, numpy and torch."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        numpy = np.random.rand()  # noqa: NPY002 - the global generator is the one in question
        return torch.tensor([random.random(), numpy, torch.rand(()).item()], dtype=torch.float64)


def test_workers_of_different_ranks_draw_different_numbers(monkeypatch):
    """Real spawned workers, as of two processes with the same generator."""
    drawn = {}
    for rank in ("0", "1", "1 again"):
        monkeypatch.setenv("RANK", rank.split()[0])
        loader = du.make_loader(Draws(), 2, num_workers=2, seed=7)
        loader.multiprocessing_context = "spawn"
        drawn[rank] = torch.cat(list(loader))
    assert torch.equal(drawn["1"], drawn["1 again"])
    assert (drawn["0"] != drawn["1"]).all()
    assert len(drawn["1"].unique()) == 12  # workers differ as well
