"""Probabilities that mean something: calibration, bands without an answer, views combined."""

import json

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression

LABELS = ["tree", "water"]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def draw(n, slope, shift, seed=0, n_labels=2):
    """Return probabilities whose logits are slope · z + shift, and targets of rate sigmoid(z)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-0.5, 2, (n, n_labels))
    return sigmoid(slope * z + shift), (rng.random(z.shape) < sigmoid(z)).astype(float)


# ---------------------------------------------------------------- calibration


def test_calibrated_probabilities_by_hand():
    found = du.calibrate(np.array([[0.8, 0.5]]), [[2, 1], [0, np.log(3)]])
    np.testing.assert_allclose(found, [[16 / 17, 0.75]])  # odds 4² to 1, and 1 · 3 to 1
    found = du.calibrate(np.array([[0.8, 0.2]]), [[0.5, 0.5], [0, 0]], exclusive=True)
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3]])  # shares 4 : 1 become √4 : 1


def test_calibration_never_changes_the_order_within_a_label():
    rng = np.random.default_rng(0)
    probs = np.float32(sigmoid(rng.normal(0, 12, (500, 2))))
    probs[:4, 0] = 0, 1, 1 - 2**-24, 1e-37
    calibrated = du.calibrate(probs, [[0.3, 2.5], [-1, 2]])
    for before, after in zip(probs.T, calibrated.T):
        assert (np.diff(after[np.argsort(before, kind="stable")]) >= 0).all()
    targets = (rng.random(probs.shape) < probs).astype(float)
    np.testing.assert_array_equal(
        du.calibrate(probs, [[0.3] * 2, [-1] * 2])[:, 0].argsort(), probs[:, 0].argsort()
    )
    mean = du.mean_average_precision
    assert mean(targets, probs) == mean(targets, du.calibrate(probs, [[0.3] * 2, [-1] * 2]))


def test_none_leaves_probabilities_as_they_are():
    probs = np.float32([[0.1, 0.0, 1.0]])
    assert du.calibrate(probs, None) is probs


def test_overconfident_probabilities_are_brought_back():
    probs, targets = draw(4000, slope=3, shift=1)
    slope, shift = du.fit_calibration(probs, targets)
    np.testing.assert_allclose(slope, 1 / 3, atol=0.03)
    np.testing.assert_allclose(shift, -1 / 3, atol=0.1)


def test_hardly_held_back_it_is_platt_scaling_by_scikit_learn():
    probs, targets = draw(300, slope=2, shift=-1, n_labels=1)
    z = du._to_logits(probs, False)
    found = du._fit_slopes(z, torch.tensor(targets), 1e4, False).numpy()
    platt = LogisticRegression(C=np.inf, tol=1e-8).fit(z.numpy(), targets[:, 0])
    np.testing.assert_allclose(found[:, 0], [platt.coef_[0, 0], platt.intercept_[0]], rtol=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_calibrated_or_too_little_to_tell_stays(seed):
    probs, targets = draw(400, 1, 0, seed)
    found = du.fit_calibration(probs, targets)
    assert found is None or np.abs(found - [[1], [0]]).max() < 0.35
    assert du.fit_calibration(probs, targets, groups=np.zeros(400)) is None  # nothing left out
    assert du.fit_calibration(probs[:12], targets[:12], np.arange(12) // 3) is None


def test_unknown_cells_have_no_say():
    probs, targets = draw(300, 3, 0)
    more = np.vstack([probs, np.full((300, 2), 0.999)]), np.vstack([targets, targets * np.nan])
    groups = np.tile(np.arange(300), 2)
    np.testing.assert_allclose(
        du.fit_calibration(*more, groups), du.fit_calibration(probs, targets, groups[:300]), 1e-4
    )


def test_label_with_few_positives_leans_on_the_others():
    probs, targets = draw(1000, 3, 0)
    targets[:, 1] = np.nan
    targets[:12, 1] = np.arange(12) < 2
    probs[:12, 1] = np.linspace(0.9, 0.1, 12)  # perfect: on its own its slope would have no end
    slope, _ = du.fit_calibration(probs, targets)
    assert 0.05 < slope[0] < slope[1] < 2


def test_label_that_ranks_backwards_is_not_turned_round():
    probs, targets = draw(2000, 1, 0)
    targets[:, 1] = 1 - targets[:, 1]
    slope, _ = du.fit_calibration(probs, targets)
    assert slope[1] > 0


def test_exclusive_classes_share_one_temperature():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (3000, 4))
    true = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    targets = np.eye(4)[[rng.choice(4, p=p) for p in true]]
    sharp = np.exp(2.5 * z) / np.exp(2.5 * z).sum(1, keepdims=True)
    slope, shift = du.fit_calibration(sharp, targets, exclusive=True)
    assert slope[0] == pytest.approx(1 / 2.5, rel=0.08)
    assert len(set(slope)) == 1 and np.abs(shift).max() < 1e-6


# ---------------------------------------------------------------- bands without an answer


def test_bands_by_hand():
    probs = np.array([[0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]]).T
    targets = np.array([[0, 0, 1, 0, 1, 0, 1, 1]]).T.astype(float)
    low, high = du.find_bands(probs, targets, precision=1.0, min_positives=1)
    np.testing.assert_allclose([low[0], high[0]], [0.25, 0.75])
    low, high = du.find_bands(probs, targets, precision=0.75, min_positives=1)
    np.testing.assert_allclose([low[0], high[0]], 0.5)  # three of four, on either side


def test_what_never_is_sure_enough_is_never_said():
    probs = np.array([[0.2, 0.9, 0.9, 0.9]]).T
    low, high = du.find_bands(probs, np.array([[1.0, 0, 1, 0]]).T, 0.95, min_positives=1)
    assert high[0] > 1 and low[0] < 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.6, 0.8, 0.9, 0.95]))
def test_of_what_is_said_the_wished_share_is_right_on_validation(seed, precision):
    probs, targets = draw(60, 1, 0, seed)
    low, high = du.find_bands(probs, targets, precision, min_positives=0)
    assert (low <= high).all()
    for label in range(2):
        y, p = targets[:, label], probs[:, label]
        for said, right in ((p >= high[label], y == 1), (p < low[label], y == 0)):
            open_left = low[label] < high[label]  # else one cut between both serves for either
            assert not (open_left and said.any()) or right[said].mean() >= precision - 1e-9


# ---------------------------------------------------------------- views combined


def test_views_of_a_panorama_by_hand():
    probs, panorama = np.array([[0.5], [0.5], [0.2], [0.8], [0.3]]), ["a", "a", "b", "b", "c"]
    for how, wanted in (("max", [0.5, 0.8, 0.3]), ("noisy-or", [0.75, 0.84, 0.3])):
        np.testing.assert_allclose(du._combine(probs, panorama, how)[:, 0], wanted)
    np.testing.assert_allclose(du._combine(probs, panorama, "mean")[:, 0], [0.5, 0.5, 0.3])
    with pytest.raises(ValueError, match="combine='sum': expected 'max' or 'noisy-or' or 'mean'"):
        du._combine(probs, panorama, "sum")


def tiny_model(img_size=32):
    torch.manual_seed(0)
    model = du.build_model("resnet18", 2, pretrained=False, img_size=img_size)
    model.fc.weight.data *= 300
    return model


def validation(n=40):
    """Return a part of n panoramas in which only both halves together tell of water."""
    both = np.arange(n) % 2
    halves = np.stack([both, both], 1).ravel().astype(float)
    names = [f"p{i}_{side}.jpg" for i in range(n) for side in ("left", "right")]
    df = pd.DataFrame({"image_path": names, "group_id": np.repeat(np.arange(n), 2)})
    df["tree"], df["water"] = halves, halves
    rng = np.random.default_rng(0)
    probs = np.stack([0.2 + 0.6 * halves, 0.3 + 0.1 * halves], 1) + rng.uniform(0, 0.05, (2 * n, 2))
    absent = np.flatnonzero(halves[::2] == 0)
    probs[2 * absent, 1], probs[2 * absent + 1, 1] = 0.6, 0.01  # one half alone raises false alarm
    return du.DataPartition(df, LABELS), probs


def test_combination_with_the_highest_map_is_chosen_and_stored(tmp_path):
    part, probs = validation()
    classifier = du.Classifier.from_validation(tiny_model(), part, probs)
    assert classifier.combine in ("noisy-or", "mean")
    path = classifier.save(tmp_path)
    content = json.loads(path.read_text())
    assert content["combine"] == classifier.combine and content["format_version"] == 4
    assert np.shape(content["bands"]) == np.shape(content["panorama_bands"]) == (2, 2)


@pytest.fixture(scope="module")
def classifier():
    rules = {"calibration": [[0.5, 1], [0.1, 0]], "panorama_calibration": [[2, 2], [0, 1]]}
    rules |= {"bands": [[0.3, 0.2], [0.6, 0.9]], "panorama_bands": [[0.1] * 2, [0.9] * 2]}
    return du.Classifier(tiny_model(), LABELS, [0.5, 0.4], combine="noisy-or", **rules)


def photo(seed, size=(64, 32)):
    cells = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def test_calibration_combination_and_bands_reach_the_table(classifier):
    plain = du.Classifier(classifier.model, LABELS, [0.5, 0.4])
    photos, columns = [photo(i) for i in range(6)], ["tree_prob", "water_prob"]
    raw = plain.predict_panorama(photos)[columns].to_numpy().reshape(6, 3, 2)[:, :2]
    table = classifier.predict_panorama(photos, abstain=True)
    probs = table[columns].to_numpy().reshape(6, 3, 2)
    halves = du.calibrate(raw, classifier.calibration)
    np.testing.assert_allclose(probs[:, :2], halves, rtol=1e-6)
    joint = 1 - (1 - halves[:, 0]) * (1 - halves[:, 1])
    wanted = du.calibrate(joint, classifier.panorama_calibration)
    np.testing.assert_allclose(probs[:, 2], wanted, rtol=1e-6)
    low, high = np.stack([classifier.bands] * 2 + [classifier.panorama_bands], 1)
    wanted = np.where(probs >= high, 1, np.where(probs < low, 0, np.nan))
    found = table[LABELS].astype(float).to_numpy().reshape(6, 3, 2)
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(wanted).any() and not np.isnan(wanted).all()
    assert table[LABELS].dtypes.eq("Int64").all() and ",," in table.to_csv(index=False)


def test_saved_rules_come_back_bit_for_bit(classifier, tmp_path):
    again = du.Classifier.load(classifier.save(tmp_path))
    for abstain in (False, True):
        tables = [c.predict_panorama(photo(3), abstain=abstain) for c in (classifier, again)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_files_of_version_3_answer_as_they_did(classifier, tmp_path):
    plain = du.Classifier(classifier.model, LABELS, [0.5, 0.4])
    path = plain.save(tmp_path)
    content = json.loads(path.read_text()) | {"format_version": 3}
    for name in ("rolls", "combine", "usual", "calibration", "panorama_calibration"):
        del content[name]
    path.write_text(json.dumps({k: v for k, v in content.items() if "bands" not in k}))
    old = du.Classifier.load(path)
    assert old.combine == "max" and old.calibration is None
    tables = [c.predict_panorama(photo(1)) for c in (plain, old)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    with pytest.raises(ValueError, match="abstain=True needs the bands"):
        old.predict(photo(1), abstain=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": [[0, 1], [0, 0]]},
        {"calibration": [[-1, 1], [0, 0]]},
        {"calibration": [1, 0]},
        {"calibration": [["a", 1], [0, 0]]},
        {"panorama_calibration": [[np.nan, 1], [0, 0]]},
        {"bands": [[0.1], [0.9]]},
        {"combine": "sum"},
        {"combine": 5},
        {"rolls": 0},
        {"rolls": 4},
        {"rolls": 1.5},
        {"usual": {"mean": [0]}},
        {"usual": {"mean": ["a"], "std": [1], "distances": [1]}},
    ],
    ids=str,
)
def test_rules_of_strangers_are_checked(classifier, tmp_path, changes):
    path = classifier.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"best_classifier\.json: no "):
        du.Classifier.load(path)


def test_exclusive_classes_are_named_or_left_empty():
    part, _ = validation(40)
    part.targets = np.eye(2, dtype=np.float32)[np.arange(80) % 2]
    sure = np.linspace(0.5, 1, 80)
    right = np.where(sure < 0.75, np.arange(80) % 4 < 2, True)
    first = np.where((np.arange(80) % 2 == 0) == right, sure, 1 - sure)
    found = du.Classifier.from_validation(
        tiny_model(), part, np.stack([first, 1 - first], 1), activation="softmax"
    )
    assert found.combine == "mean" and (found.bands[1] > 0.6).all()
    table = found.predict([photo(i) for i in range(8)], abstain=True)
    unsure = table[["tree_prob", "water_prob"]].max(axis=1) < found.bands[1, 0]
    assert table["tree"].isna().tolist() == unsure.tolist()


def test_answer_does_not_turn_with_the_sphere_when_rolls_are_averaged():
    once = du.Classifier(tiny_model((32, 64)), LABELS, [0.5] * 2, "panorama")
    often = du.Classifier(once.model, LABELS, [0.5] * 2, "panorama", rolls=4)
    pixels = np.asarray(photo(5))
    turned = np.roll(pixels, 16, axis=1)
    columns = ["tree_prob", "water_prob"]
    answers = [often.predict(image)[columns].to_numpy() for image in (pixels, turned)]
    np.testing.assert_allclose(*answers, atol=1e-4)
    answers = [once.predict(image)[columns].to_numpy() for image in (pixels, turned)]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    with pytest.raises(ValueError, match="rolls .* turn whole panoramas"):
        du.Classifier(once.model, LABELS, [0.5] * 2, "half", rolls=4)


def test_rolls_of_the_settings_are_used_for_the_rules_and_saved(tmp_path):
    with pytest.raises(ValueError, match="rolls=4: only panoramas turn"):
        du.TrainConfig(rolls=4)
    table = pd.DataFrame({"image_path": [str(tmp_path / f"{i}.png") for i in range(6)]})
    for i, path in enumerate(table["image_path"]):
        photo(i).save(path)
    table[LABELS] = [[i % 2, (i + 1) % 2] for i in range(6)]
    config = du.TrainConfig(epochs=1, view="panorama", rolls=4, precision="no")
    model = tiny_model((32, 64))
    part = du.DataPartition(table, LABELS, du.make_transforms(model, False, "panorama"))
    trainer = du.Trainer(model, part, part, config, tmp_path / "run")
    once, often = trainer.predict(part), trainer.predict(part, rolls=4)
    assert np.abs(once - often).max() > 1e-4
    used = du.Classifier.from_validation(model, part, often, "panorama", rolls=4)
    trainer.config.cache_dir = None
    found = du.finish_run(trainer)
    assert found.rolls == 4
    assert found.thresholds.tolist() == pytest.approx(used.thresholds.tolist())


@pytest.mark.parametrize("head", ["linear", "csra"])
def test_photo_unlike_the_known_ones_is_flagged(tmp_path, head):
    for i in range(24):
        shade = 90 + 3 * i
        Image.new("RGB", (32, 32), (shade, shade, 120)).save(tmp_path / f"{i:02d}.png")
    torch.manual_seed(0)
    model = du.build_model("resnet18", 2, head=head, pretrained=False, img_size=64)
    classifier = du.Classifier(model, LABELS, [0.5] * 2)
    with pytest.raises(ValueError, match="novelty needs remember"):
        classifier.novelty(tmp_path)
    config = du.TrainConfig(cache_dir=str(tmp_path / "cache"), cache_gb=1e-9)
    classifier.remember(sorted(tmp_path.glob("*.png")), config)
    assert not [*(tmp_path / "cache").rglob("*.npy")]  # its bound holds here too
    odd = tmp_path / "odd" / "noise.png"
    odd.parent.mkdir()
    photo(0, (32, 32)).save(odd)
    again = du.Classifier.load(classifier.save(tmp_path / "run"))
    assert again.novelty([odd]).tolist() == [1.0]
    known = again.novelty(sorted(tmp_path.glob("*.png")))
    assert 0.3 < np.median(known) < 0.7


# ---------------------------------------------------------------- what the notebooks teach


def test_reliability_by_hand():
    targets = np.array([[1, 0], [0, np.nan], [1, 1], [0, 1]])
    probs = np.array([[0.9, 0.1], [0.95, 0.5], [1.0, 0.15], [0.0, 0.9]])
    table = du.reliability(targets, probs)
    assert table.index.tolist() == [0, 1, 9]
    assert table["cells"].tolist() == [1, 2, 4]  # the unknown cell counts nowhere
    np.testing.assert_allclose(table["said"], [0, 0.125, 0.9375])
    np.testing.assert_allclose(table["true"], [0, 0.5, 0.75])
    np.testing.assert_allclose(table["off"], [0, 0.375, 0.1875])
    assert ((table["low"] <= table["true"]) & (table["true"] <= table["high"])).all()
    np.testing.assert_allclose(table.loc[9, ["low", "high"]].tolist(), [0.3006, 0.9544], atol=1e-4)


def test_share_by_rogan_and_gladen_by_hand(notebook_functions):
    counts = [np.array([n]) for n in (45, 100, 90, 100, 95, 100)]
    share, low, high = notebook_functions("survey").true_share(*counts)
    assert share[0] == pytest.approx((0.45 + 0.95 - 1) / 0.85)
    assert low[0] < share[0] < high[0]
    counts = [np.array([n]) for n in (45, 100, 10**9, 10**9, 10**9, 10**9)]  # it never errs
    _, low, high = notebook_functions("survey").true_share(*counts)
    np.testing.assert_allclose([low[0], high[0]], [0.3561, 0.5476], atol=2e-4)  # Agresti-Coull
    nothing = [np.array([n]) for n in (45, 100, 5, 10, 5, 10)]  # as good as a coin
    assert np.isnan(notebook_functions("survey").true_share(*nothing)).all()


@pytest.mark.parametrize("prevalence", [0.03, 0.1, 0.3, 0.7])
def test_intervals_of_the_share_hold_what_they_promise(notebook_functions, prevalence):
    """The reports of simulated surveys, by a classifier whose mistakes are known exactly."""
    rng, se, sp, n = np.random.default_rng(0), 0.85, 0.93, 4000
    reported = rng.binomial(80, prevalence * se + (1 - prevalence) * (1 - sp), n)
    judged = rng.binomial(40, se, n), 40, rng.binomial(100, sp, n), 100
    share, low, high = notebook_functions("survey").true_share(reported, 80, *judged)
    assert 0.93 <= ((low <= prevalence) & (prevalence <= high)).mean() <= 0.99
    naive = np.abs(reported.mean() / 80 - prevalence)
    assert np.abs(np.mean(share) - prevalence) < max(0.02, naive / 2)
