"""Out-of-fold probabilities; wrong labels, their review, filling, and the queue (in notebooks)."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import data_utils as du

import matplotlib.pyplot
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")
LABELS = ["a", "b", "c"]


@pytest.fixture
def nb(notebook_functions):
    return notebook_functions("relabeling")


def fold_by_fold(probs, groups=None):
    """Return the given probabilities as out of fold, row by row or group by group."""
    probs = np.asarray(probs, float)
    groups = np.arange(len(probs)) if groups is None else np.asarray(groups)
    return du.OutOfFold(probs, pd.factorize(groups)[0], groups)


# ---------------------------------------------------------------- out of fold


def test_no_group_is_trained_on_and_predicted_at_once():
    groups = np.repeat(list("uvwxyz"), [1, 5, 2, 3, 4, 1])
    seen = []

    def fit_predict(train, held_out):
        assert not set(groups[train]) & set(groups[held_out])
        assert sorted([*train, *held_out]) == list(range(16))
        seen.extend(held_out)
        return held_out[:, None] / 16

    oof = du.out_of_fold(fit_predict, groups, n_folds=3, seed=1)
    assert sorted(seen) == list(range(16))
    assert oof.probs[:, 0].tolist() == [i / 16 for i in range(16)]
    assert pd.Series(oof.folds).groupby(groups).nunique().max() == 1
    assert len(set(oof.folds)) == 3


def test_as_many_folds_as_groups_leave_one_group_out():
    groups = ["x", "y", "x", "z"]
    oof = du.out_of_fold(lambda train, held_out: np.full((len(held_out), 1), len(train)), groups, 3)
    assert oof.probs[:, 0].tolist() == [2, 3, 2, 3]
    with pytest.raises(ValueError, match=r"something else than \(2, labels\) numbers"):
        du.out_of_fold(lambda train, held_out: np.zeros(len(held_out)), groups, 3)
    for n_folds in (4, 1):  # with one, nothing is left to learn from
        with pytest.raises(ValueError, match=f"3 groups are too few for {n_folds} folds"):
            du.out_of_fold(lambda *_: None, groups, n_folds)


@pytest.mark.parametrize(
    ("probs", "folds", "groups", "message"),
    [
        ([[0.5]] * 3, [0, 1, 1], ["g", "g", "h"], "not out of fold: g stand in several folds"),
        ([[0.5], [NAN]], [0, 1], ["g", "h"], "a row was left out by no fold"),
        ([[0.5]] * 2, [0, 0], ["g", "h"], "a row was left out by no fold"),
        ([[0.5]] * 2, [0, 1, 2], ["g", "h"], "different lengths"),
    ],
)
def test_probabilities_that_are_not_out_of_fold_are_refused(probs, folds, groups, message):
    with pytest.raises(ValueError, match=message):
        du.OutOfFold(np.array(probs), np.array(folds), np.array(groups))


def test_quick_model_learns_from_known_cells_alone():
    """It is sklearn's own per label; a label without both answers gets its share, or 0.5."""
    x = np.array([[-2.0], [-1.0], [1.0], [2.0], [0.0]])
    y = np.array([[0, 1, NAN, NAN], [0, 1, NAN, 0], [1, 1, NAN, 0], [1, 1, NAN, NAN]] + [[NAN] * 4])
    probs = du.fit_and_predict(x, y, np.array([[-1.5], [0.0], [1.5]]))
    assert probs[:, 0] == pytest.approx([1 - probs[2, 0], 0.5, probs[2, 0]])
    own = LogisticRegression(C=3.0).fit(x[:4], [0, 0, 1, 1])
    assert probs[:, 0] == pytest.approx(own.predict_proba([[-1.5], [0.0], [1.5]])[:, 1], abs=1e-6)
    assert probs[2, 0] > 0.9
    assert probs[:, 1:].tolist() == [[1.0, 0.5, 0.0]] * 3


def test_finder_takes_nothing_but_out_of_fold(nb):
    with pytest.raises(TypeError, match="ndarray: expected what out_of_fold returns"):
        nb.find_wrong_labels(np.eye(3), np.full((3, 3), 0.5), LABELS, list("xyz"))
    with pytest.raises(ValueError, match="3 out-of-fold rows for 2 images"):
        nb.find_wrong_labels(np.eye(3)[:2], fold_by_fold(np.eye(3)), LABELS, list("xy"))
    with pytest.raises(ValueError, match="images: 1 images occur twice: x; keep one row"):
        nb.find_wrong_labels(np.eye(3), fold_by_fold(np.eye(3)), LABELS, list("xyx"))


# ---------------------------------------------------------------- features without labels


def test_patch_features_tell_kinds_of_pictures_apart_and_repeat(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        if i % 2:
            pixels[:, ::4] += 150  # stripes, on every second one
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    paths = du.list_images(tmp_path)
    features = du.patch_features(paths, n_components=8)
    assert features.shape == (40, 8)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert features[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(features, du.patch_features(paths, n_components=8))
    striped = np.arange(40) % 2
    model = LogisticRegression().fit(features[:20], striped[:20])
    assert model.score(features[20:], striped[20:]) == 1
    assert du.patch_features(paths[:5]).shape == (5, 5)
    assert du.patch_features([paths[0]] * 3).isfinite().all()
    with pytest.raises(ValueError, match="1 images: patch_features compares images"):
        du.patch_features(paths[:1])


# ---------------------------------------------------------------- wrong labels


def planted(n=200, seed=0):
    """Return targets with 10 flipped cells of label a, and good probabilities."""
    rng = np.random.default_rng(seed)
    clean = (rng.random((n, 3)) < 0.5).astype(float)
    probs = np.clip(0.8 * clean + 0.1 + rng.normal(0, 0.03, clean.shape), 0.01, 0.99)
    given = clean.copy()
    given[:10, 0] = 1 - clean[:10, 0]
    return clean, given, probs


def test_planted_flips_are_found_with_the_reason(nb):
    clean, given, probs = planted()
    names = [f"{i}.jpg" for i in range(len(given))]
    table = nb.find_wrong_labels(given, fold_by_fold(probs), LABELS, names)
    assert set(table["image_path"]) == set(names[:10])
    assert (table["label"] == "a").all()
    assert table["rank"].tolist() == list(range(1, 11))
    assert table["quality"].is_monotonic_increasing
    for _, line in table.iterrows():
        i = names.index(line["image_path"])
        assert line["given"] == ("present" if given[i, 0] else "absent")
        assert line["predicted"] == ("present" if clean[i, 0] else "absent")
        assert line["prob"] == probs[i, 0]
        assert line["quality"] == pytest.approx(probs[i, 0] if given[i, 0] else 1 - probs[i, 0])


def test_unknown_cells_are_neither_suspected_nor_counted(nb):
    _, given, probs = planted()
    given[:5, 0] = NAN  # five of the flips are unknown
    given[:, 2] = NAN  # nobody judged c
    names = [f"{i}.jpg" for i in range(len(given))]
    table = nb.find_wrong_labels(given, fold_by_fold(probs), LABELS, names)
    assert set(table["image_path"]) == set(names[5:10])
    assert set(table["label"]) == {"a"}


def test_photo_quality_is_the_softmin_over_known_labels_by_hand(nb):
    scores, known = np.array([[0.9, 0.2, 0.5]] * 2), np.array([[True] * 3, [True, False, True]])
    e = [math.exp((1 - s) / 0.1) for s in (0.9, 0.2, 0.5)]
    first = (0.9 * e[0] + 0.2 * e[1] + 0.5 * e[2]) / sum(e)
    second = (0.9 * e[0] + 0.5 * e[2]) / (e[0] + e[2])  # as absent it would be 0.2 and less
    assert nb.masked_softmin(scores, known).tolist() == pytest.approx([first, second])
    assert nb.masked_softmin(scores, ~known & known).tolist() == [1, 1]
    probs = np.array([[0.9, 0.8, 0.5], [0.1, 0.3, 0.4]] * 20)
    given = np.array([[1, 0, NAN], [0, 1, 0]] * 20)
    table = nb.find_wrong_labels(given, fold_by_fold(probs), LABELS, np.arange(40))
    of_first = table.loc[table["image_path"] == 0, "photo_quality"]
    expected = (0.9 * math.exp(1) + 0.2 * math.exp(8)) / (math.exp(1) + math.exp(8))
    assert of_first.tolist() == pytest.approx([expected])


def test_label_that_is_always_the_same_is_not_suspected(nb):
    probs = np.full((20, 3), 0.9)
    given = np.column_stack([np.ones(20), np.zeros(20), np.full(20, NAN)])
    assert nb.find_wrong_labels(given, fold_by_fold(probs), LABELS, np.arange(20)).empty


def test_one_label_alone_and_no_positive_at_all_are_fine(nb):
    clean, given, probs = planted()
    table = nb.find_wrong_labels(given[:, :1], fold_by_fold(probs[:, :1]), ["a"], np.arange(200))
    assert set(table["image_path"]) == set(range(10))
    assert table["photo_quality"].tolist() == pytest.approx(table["quality"].tolist())
    nothing = nb.find_wrong_labels(0 * clean, fold_by_fold(probs), LABELS, np.arange(200))
    assert nothing.empty


# ---------------------------------------------------------------- the review


@pytest.fixture
def part():
    return pd.DataFrame(
        {"image_path": ["x.jpg", "y.jpg"], "group_id": "g", "a": [1.0, 0], "b": NAN}
    )


def test_decisions_are_replayed_and_the_last_one_counts(nb, tmp_path, part):
    path = tmp_path / "review.csv"
    for image, label, decision in [
        ("x.jpg", "a", "absent"),
        ("y.jpg", "b", "present"),
        ("y.jpg", "a", "unsure"),
        ("x.jpg", "a", "present"),
        ("x.jpg", "a", "absent"),
    ]:
        nb.append_decision(path, image, label, decision)
    found = nb.apply_decisions(path, part, ["a", "b"])
    assert np.array_equal(found[["a", "b"]], [[0, NAN], [NAN, 1]], equal_nan=True)
    assert part["a"].tolist() == [1, 0]  # the original stays


def test_names_with_commas_and_quotes_survive(nb, tmp_path):
    names = ['a, "b".jpg', 'c"d.jpg', "ä.jpg"]
    for name in names:
        nb.append_decision(tmp_path / "review.csv", name, "a", "present")
    table = pd.DataFrame({"image_path": names, "a": NAN})
    assert nb.apply_decisions(tmp_path / "review.csv", table, ["a"])["a"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="a name with a line break cannot be reviewed"):
        nb.append_decision(tmp_path / "review.csv", "e\nf.jpg", "a", "present")


def test_torn_quoted_name_swallows_no_later_decision(nb, tmp_path):
    path = tmp_path / "sub" / "review.csv"
    nb.append_decision(path, "a.jpg", "a, b", "present")
    path.write_text(path.read_text() + 'b.jpg,"a, ')
    nb.append_decision(path, "b.jpg", "a, b", "absent")
    table = pd.DataFrame({"image_path": ["a.jpg", "b.jpg"], "a, b": NAN}, index=[7, 7])
    with pytest.warns(UserWarning, match="line 2: cut off"):
        found = nb.apply_decisions(path, table, ["a, b"])
    assert found["a, b"].tolist() == [1, 0]
    assert nb.read_decisions(tmp_path / "none.csv").empty


def test_line_that_was_cut_off_is_named_and_the_others_stay(nb, tmp_path, part):
    path = tmp_path / "review.csv"
    nb.append_decision(path, "x.jpg", "a", "absent")
    with open(path, "a", encoding="utf-8") as file:
        file.write("y.jpg,a,pre")
    with pytest.warns(UserWarning, match=r"review.csv, line 2: cut off, .*decide again"):
        assert nb.apply_decisions(path, part, ["a", "b"])["a"].tolist() == [0, 0]
    nb.append_decision(path, "y.jpg", "a", "present")  # goes on a line of its own
    with pytest.warns(UserWarning, match="line 2"):
        assert nb.apply_decisions(path, part, ["a", "b"])["a"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x.jpg,moose,present", "line 1: no label 'moose'; expected a, b"),
        ("z.jpg,a,present", "line 1: z.jpg is not in the partition"),
    ],
)
def test_decision_about_something_unknown_is_refused(nb, tmp_path, part, line, message):
    (tmp_path / "review.csv").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        nb.apply_decisions(tmp_path / "review.csv", part, ["a", "b"])


def test_decision_must_be_one_of_three_and_an_image_stand_once(nb, tmp_path, part):
    with pytest.raises(ValueError, match="decision='maybe': expected 'present' or 'absent'"):
        nb.append_decision(tmp_path / "review.csv", "x.jpg", "a", "maybe")
    assert not (tmp_path / "review.csv").exists()
    twice = pd.concat([part, part.head(1)], ignore_index=True)
    nb.append_decision(tmp_path / "review.csv", "x.jpg", "a", "absent")
    with pytest.raises(ValueError, match="the partition: 1 images occur twice: x.jpg"):
        nb.apply_decisions(tmp_path / "review.csv", twice, ["a", "b"])


def test_killed_reviewer_loses_no_decision_already_made(nb, tmp_path):
    path = tmp_path / "review.csv"
    code = (
        "import sys, itertools; sys.path.insert(0, 'tests')\n"
        "from conftest import load_notebook_functions\n"
        "nb = load_notebook_functions('relabeling')\n"
        "for i in itertools.count():\n"
        "    nb.append_decision(sys.argv[1], f'{i}.jpg', 'a', 'present')\n"
        "    print(i, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while int(process.stdout.readline()) < 20:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last = max([20, *(int(line) for line in process.stdout.read().split())])
    table = pd.DataFrame({"image_path": [f"{i}.jpg" for i in range(last + 2)], "a": NAN})
    assert nb.apply_decisions(path, table, ["a"])["a"].notna().sum() >= last + 1


def test_file_names_that_are_no_utf8_come_back_to_the_byte(nb, tmp_path):
    raw = b"caf\xe9, \xff.jpg".decode("utf-8", "surrogateescape")
    nb.append_decision(tmp_path / "review.csv", raw, "a", "present")
    assert b"caf\xe9, \xff.jpg" in (tmp_path / "review.csv").read_bytes()
    assert nb.read_decisions(tmp_path / "review.csv")["image_path"].tolist() == [raw]
    table = pd.DataFrame({"image_path": pd.Series([raw], dtype=object), "a": NAN})
    assert nb.apply_decisions(tmp_path / "review.csv", table, ["a"])["a"].tolist() == [1]


# ---------------------------------------------------------------- what to label next


@pytest.fixture
def queue_of(notebook_functions):
    return notebook_functions("labelbox")


def test_queue_is_entropy_times_distance_and_avoids_the_same_twice(queue_of):
    probs = np.array([[0.5], [0.5], [0.9], [0.5]])
    place = np.array([10.0, 10.1, 20.0, 0.1])  # candidates on a line; one labelled photo at 0
    queue = queue_of.rank_for_labelling(probs, place[:, None], np.zeros((1, 1)), 3)
    entropy = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))  # 0.469
    # 1 × 10.1 before 1 × 10 and 0.469 × 20; then 0.469 × 9.9 before 1 × 0.1 (twin) and 1 × 0.1
    assert queue["candidate"].tolist()[:2] == [1, 2]
    assert queue["entropy"].tolist()[:2] == pytest.approx([1, entropy])
    assert queue["distance"].tolist() == pytest.approx([10.1, 9.9, 0.1])
    assert len(queue_of.rank_for_labelling(probs, place[:, None], np.zeros((1, 1)), 99)) == 4


def test_queue_without_any_labelled_photo_starts_with_the_most_uncertain(queue_of):
    probs = np.array([[0.99, 0.5], [0.5, 0.5], [0.5, 0.9]])
    queue = queue_of.rank_for_labelling(probs, np.eye(3), np.empty((0, 3)), 3)
    assert queue["candidate"].tolist() == [1, 2, 0]


# ---------------------------------------------------------------- filling, buttons


def test_confidence_is_the_lowest_that_reaches_the_precision_on_validation(nb):
    probs = np.array([0.95, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05])[:, None]
    targets = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0, 0], float)[:, None]
    present, absent = nb.choose_confidence(probs, targets, ["a"], 1.0)
    # the first four are all present: between 0.7 and 0.6; the last four absent: 0.4 and 0.3
    assert (present[0], absent[0]) == pytest.approx((0.65, 0.35))
    hopeless = nb.choose_confidence(1 - probs, targets, ["a"], 1.0)
    assert (hopeless[0][0], hopeless[1][0]) == (math.inf, -math.inf)


def test_sure_unknown_cells_become_soft_targets_up_to_the_cap(nb):
    given = np.array([[NAN], [NAN], [NAN], [NAN], [0], [NAN]])
    probs = fold_by_fold([[0.9], [0.99], [0.5], [0.02], [0.99], [0.2]])
    filled = nb.fill_cells(given, probs, (np.array([0.8]), np.array([0.1])), 1.0)
    expected = [[0.9], [0.99], [NAN], [0.02], [0], [NAN]]
    assert np.array_equal(filled, expected, equal_nan=True)
    # of 5 unknown cells at most 2, the surest: 0.99 (0.49 from 0.5) and 0.02 (0.48)
    capped = nb.fill_cells(given, probs, (np.array([0.8]), np.array([0.1])), 0.4)
    expected = [[NAN], [0.99], [NAN], [0.02], [0], [NAN]]
    assert np.array_equal(capped, expected, equal_nan=True)
    with pytest.raises(TypeError, match="ndarray: expected what out_of_fold returns"):
        nb.fill_cells(given, probs.probs, (np.array([0.8]), np.array([0.1])), 1.0)


def test_button_saves_its_decision_at_once_and_goes_on_after_a_restart(nb, tmp_path):
    pytest.importorskip("ipywidgets")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    suspects = pd.DataFrame(
        {"image_path": str(tmp_path / "x.png"), "label": LABELS, "given": "absent"}
    )
    path = tmp_path / "review.csv"
    nb.display = lambda _: None
    buttons = nb.review_with_buttons(path, suspects, lambda _: None).children[0].children
    buttons[0].click()
    assert path.read_text().splitlines() == [f"{tmp_path / 'x.png'},a,present"]
    buttons = nb.review_with_buttons(path, suspects, lambda _: None).children[0].children
    for button in (buttons[1], buttons[2], buttons[0]):  # nothing is left for the last
        button.click()
    decisions = [line.split(",")[1:] for line in path.read_text().splitlines()]
    assert decisions == [["a", "present"], ["b", "absent"], ["c", "unsure"]]


# ---------------------------------------------------------------- one class per photo

CLASSES = ["cat", "catfish", "dog, wild"]
ANSWERS = {**dict(zip(CLASSES, CLASSES)), "unsure": NAN}


@pytest.fixture
def of_classes(nb, monkeypatch):
    """The notebook's functions, with four photos to train on and one to test, of three classes."""
    names = ["cat", "catfish", "dog, wild", NAN, "cat"]
    photos = pd.DataFrame({"part": ["train"] * 4 + ["test"], "class": names})
    photos["image_path"] = [f"{i}.jpg" for i in range(5)]
    own = {"EXCLUSIVE": True, "label_columns": CLASSES, "photos": photos, "ANSWERS": ANSWERS}
    for name, value in own.items():
        monkeypatch.setattr(nb, name, value, raising=False)
    monkeypatch.setattr(nb, "truth", nb.to_cells(photos), raising=False)
    return nb


def test_classes_become_rows_of_cells_and_names_again(of_classes):
    nb, photos = of_classes, of_classes.photos
    cells = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [NAN] * 3, [1, 0, 0]]
    assert np.array_equal(nb.to_cells(photos), cells, equal_nan=True)
    pd.testing.assert_frame_equal(nb.with_cells(photos, nb.to_cells(photos)), photos)
    changed = nb.with_cells(photos, np.array([[0.2, 0.7, 0.1], *cells[1:]]))  # the most probable
    assert changed["class"].tolist()[:2] == ["catfish", "catfish"]
    same = nb.agrees(np.array([[0.3, 0.4, 0.3], [0.9, 0, 0.1]]), np.array(cells[:2]))
    assert same.tolist() == [[False] * 3, [False] * 3]
    assert nb.score(np.array(cells), np.eye(3)[[0, 1, 0, 0, 0]]) == 0.75  # the unknown one left out
    hidden = np.isnan(nb.hide(np.eye(3)[np.arange(3000) % 3], 0.6, 1))
    assert (hidden.all(1) == hidden.any(1)).all()
    assert hidden.mean() == pytest.approx(0.6, abs=0.03)


def test_rows_without_a_class_cost_no_steps(of_classes):
    config = of_classes.equal_steps(du.TrainConfig(epochs=8, patience=3), range(50), range(20), 7)
    assert (config.epochs, config.patience, config.seed, config.loss) == (20, 8, 7, "ce")


def test_photo_gets_its_class_as_a_whole_up_to_the_share_of_a_class(nb):
    given = np.array([[NAN, NAN]] * 5 + [[1, 0]])
    probs = np.array([[0.9, 0.1], [0.99, 0.01], [0.6, 0.4], [0.05, 0.95], [0.8, 0.2], [0.1, 0.9]])
    bounds = np.array([0.7, 0.7]), np.array([0.3, 0.3])  # absence alone fills no class
    filled = nb.fill_cells(given, fold_by_fold(probs), bounds, 1.0, exclusive=True)
    # 5 unknown photos of 2 classes: at most 2 each, so of 0.99, 0.9 and 0.8 the surest two
    expected = [probs[0], probs[1], [NAN, NAN], probs[3], [NAN, NAN], [1, 0]]
    assert np.array_equal(filled, expected, equal_nan=True)
    hard = nb.fill_cells(given, fold_by_fold(probs), bounds, 1.0, exclusive=True, soft=False)
    expected = [[1, 0], [1, 0], [NAN, NAN], [0, 1], [NAN, NAN], [1, 0]]
    assert np.array_equal(hard, expected, equal_nan=True)
    capped = nb.fill_cells(given, fold_by_fold(probs), bounds, 0.4, exclusive=True)
    assert np.flatnonzero(~np.isnan(capped[:5, 0])).tolist() == [1, 3]


def planted_classes(n=300, seed=0):
    """Return rows of three classes of which the first 10 are wrong, and good probabilities."""
    rng = np.random.default_rng(seed)
    true = np.arange(n) % 3
    probs = 0.1 + 0.7 * np.eye(3)[true] + rng.uniform(0, 0.02, (n, 3))
    given = np.eye(3)[np.where(np.arange(n) < 10, (true + 1) % 3, true)]
    return true, given, probs / probs.sum(1, keepdims=True)


def test_planted_wrong_classes_are_found_with_both_names(nb):
    true, given, probs = planted_classes()
    given[20:40] = NAN
    assert not nb.suspect_cells(given, probs, exclusive=True)[20:40].any()
    names = [f"{i}.jpg" for i in range(len(given))]
    table = nb.find_wrong_labels(given, fold_by_fold(probs), CLASSES, names, exclusive=True)
    assert sorted(table["image_path"]) == names[:10]
    assert set(table["label"]) == {"class"}
    assert table["quality"].is_monotonic_increasing
    for _, line in table.iterrows():
        i = names.index(line["image_path"])
        said = CLASSES[given[i].argmax()], CLASSES[true[i]]
        assert (line["given"], line["predicted"]) == said
        assert (line["prob"], line["quality"]) == (probs[i].max(), probs[i, given[i].argmax()])
        assert line["photo_quality"] == pytest.approx(line["quality"])


def test_confusions_say_which_class_is_mistaken_for_which(nb):
    true, given, probs = planted_classes()
    joint = nb.count_confusions(given, probs, exclusive=True)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (given.argmax(1)[:10], true[:10]), 1)
    assert joint.tolist() == expected.tolist()
    _, given, probs = planted()  # several labels: a has the ten flips, b and c none
    absent = int(given[:10, 0].sum())  # given, and looking absent
    assert nb.count_confusions(given, probs).tolist() == [[absent, 10 - absent], [0, 0], [0, 0]]


def test_wrong_classes_are_planted_at_random_or_among_those_alike(of_classes, monkeypatch):
    nb, true = of_classes, np.arange(3000) % 3
    monkeypatch.setattr(nb, "truth", np.eye(3)[true])
    photos = pd.DataFrame({"part": ["train"] * 2400 + ["test"] * 600})
    monkeypatch.setattr(nb, "photos", photos)
    wrong = nb.plant(0.2, 5).argmax(1)
    assert not (wrong != true)[2400:].any()
    assert (wrong != true)[:2400].mean() == pytest.approx(0.2, abs=0.02)
    assert set((wrong - true)[wrong != true] % 3) == {1, 2}
    probs = np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]])[true]
    probs[true == 1] += [0, 0, 0.01]
    alike = nb.most_alike(np.eye(3)[true], probs)
    assert alike.tolist() == [1, 2, 0]
    wrong = nb.plant(0.2, 5, alike).argmax(1)
    assert ((wrong == true) | (wrong == alike[true])).all()


def test_review_of_classes_changes_classes(of_classes, tmp_path):
    nb, path = of_classes, tmp_path / "review.csv"
    part = nb.photos.drop(columns="part").assign(group_id="g")
    for image, answer in [("0.jpg", "dog, wild"), ("1.jpg", "unsure"), ("3.jpg", "catfish")]:
        nb.append_decision(path, image, "class", answer, ANSWERS)
    found = nb.apply_decisions(path, part, ["class"], ANSWERS)["class"]
    assert found.fillna("?").tolist() == ["dog, wild", "?", "dog, wild", "catfish", "cat"]
    with pytest.raises(ValueError, match="decision='cow': expected 'cat' or 'catfish'"):
        nb.append_decision(path, "0.jpg", "class", "cow", ANSWERS)
    suspects = pd.DataFrame({"image_path": ["0.jpg", "2.jpg"], "label": "class"})
    nb.review_by_truth(path, suspects)
    assert nb.read_decisions(path, ANSWERS)["decision"].tolist() == ["cat", "dog, wild"]


def test_class_that_a_crash_cut_off_is_no_other_class(of_classes, tmp_path):
    path = tmp_path / "review.csv"
    path.write_text("0.jpg,class,cat")  # of "catfish"
    with pytest.warns(UserWarning, match="line 1: cut off"):
        assert of_classes.read_decisions(path, ANSWERS).empty
    of_classes.append_decision(path, "1.jpg", "class", "catfish", ANSWERS)
    with pytest.warns(UserWarning, match="line 1: cut off"):
        found = of_classes.read_decisions(path, ANSWERS)
    assert found[["image_path", "decision"]].to_numpy().tolist() == [["1.jpg", "catfish"]]


def test_buttons_offer_the_classes_and_many_of_them_in_a_list(nb, tmp_path):
    pytest.importorskip("ipywidgets")
    names = [f"class {i}" for i in range(40)]
    answers = {**dict(zip(names, names)), "unsure": NAN}
    given = {"given": ["class 3", "class 0"], "predicted": ["class 7", "class 9"]}
    suspects = pd.DataFrame({"image_path": ["x.jpg", "y.jpg"], "label": "class"} | given)
    nb.display = lambda _: None
    path = tmp_path / "review.csv"
    row = nb.review_with_buttons(path, suspects, lambda _: None, answers).children[0]
    *buttons, others = row.children
    assert [button.description for button in buttons] == ["class 3", "class 7", "unsure"]
    others.value = "class 21"
    assert [button.description for button in row.children[:-1]] == ["class 0", "class 9", "unsure"]
    row.children[0].click()
    assert nb.read_decisions(path, answers)["decision"].tolist() == ["class 21", "class 0"]
    few = nb.review_with_buttons(tmp_path / "few.csv", suspects, lambda _: None, ANSWERS)
    assert [b.description for b in few.children[0].children] == [*CLASSES, "unsure"]


def test_top1_of_two_times_three_trainings_is_compared_photo_by_photo():
    targets = np.array([0, 1, 1, -1])
    right = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.5, 0.5]])
    wrong = right[:, ::-1]
    new, old = np.stack([right, right, wrong]), np.stack([wrong] * 3)
    table = du.compare_scores(targets, new, old, ["a", "b"], n_bootstrap=50)
    assert table.loc["top-1", "AP"] == pytest.approx(2 / 3)
    assert table.loc["top-1", "baseline"] == 0
    assert table.loc["top-1", "low"] == table.loc["top-1", "high"] == pytest.approx(2 / 3)
    assert "top-1" not in du.compare_scores(np.eye(2), right[:2], wrong[:2], ["a", "b"]).index
    with pytest.raises(ValueError, match="a label is named 'top-1'"):
        du.compare_scores(targets, new, old, ["a", "top-1"])


def test_whole_network_is_trained_on_small_photos_first(of_classes, monkeypatch, tmp_path):
    nb, true = of_classes, np.arange(18) % 3
    for i, c in enumerate(true):
        Image.new("RGB", (40, 40), ["red", "lime", "blue"][c]).save(tmp_path / f"{i}.png")
    photos = pd.DataFrame({"image_path": [str(tmp_path / f"{i}.png") for i in range(18)]})
    photos["group_id"], photos["class"] = photos.index.astype(str), np.array(CLASSES)[true]
    rows = {"train": np.arange(9), "val": np.arange(9, 15), "test": np.arange(15, 18)}
    for name, own in rows.items():
        du.write_partition(photos.iloc[own], tmp_path / f"{name}_partition.csv", CLASSES)
    options = {"model_name": "test_resnet", "partition_dir": str(tmp_path), "learning_rate": 0.01}
    widths, build = [], du.build_run
    monkeypatch.setattr(du, "build_run", lambda own: (widths.append(own.img_width), build(own))[1])
    for name, value in {
        "config": du.TrainConfig(epochs=2, batch_size=4, loss="ce", **options),
        "IMG_WIDTHS": (32, 48),
        "photos": photos,
        "rows_of": rows,
        "truth": np.eye(3)[true],
    }.items():
        monkeypatch.setattr(nb, name, value, raising=False)
    targets = np.eye(3)[true]
    targets[:2], targets[2] = NAN, [0.1, 0.2, 0.7]  # unknown; filled softly
    probs = nb.train_network(rows["train"], targets, 1)(rows["test"])
    assert widths == [32, 48]
    assert probs.sum(1) == pytest.approx(np.ones(3), abs=1e-3)


def test_notebook_runs_on_classes_from_top_to_bottom(tmp_path, monkeypatch):
    """The same cells that serve several labels; features that tell, so that seconds are enough."""
    rng, true = np.random.default_rng(0), np.arange(90) % 3
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    part = pd.DataFrame({"image_path": [str(tmp_path / f"{i}.png") for i in range(90)]})
    for path in part["image_path"]:
        os.link(tmp_path / "x.png", path)
    part["group_id"], part["class"] = [f"g{i // 3}" for i in range(90)], np.array(CLASSES)[true]
    for name, rows in {"train": (0, 60), "val": (60, 75), "test": (75, 90)}.items():
        du.write_partition(part[slice(*rows)], tmp_path / f"{name}_partition.csv", CLASSES)
    features = torch.tensor(9 * np.eye(3)[true] + rng.normal(0, 1, (90, 3)), dtype=torch.float)
    monkeypatch.setattr(du, "patch_features", lambda *_, **__: features)
    du._write_json(tmp_path / "config.json", {"loss": "ce", "pretrained": False})
    own = {"PARTITION_DIR": str(tmp_path), "BASELINE_DIR": str(tmp_path), "FLIP_RATES": (0.2,)}
    own |= {"OUTPUT_DIR": str(tmp_path / "out"), "N_FOLDS": 2, "N_REPEATS": 1, "N_ROUNDS": 1}
    space = {"display": lambda _: None}
    for cell in nbformat.read(ROOT / "relabeling.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(
                cell.source.replace("epochs=20, learning_rate=3e-2", "epochs=4, learning_rate=1.0"),
                space,
            )
            space |= own if "parameters" in cell.metadata.get("tags", []) else {}
            matplotlib.pyplot.close("all")
    known = space["photos"]["part"] == "train"
    assert np.isnan(space["given"][known]).any(1).mean() == pytest.approx(0.4, abs=0.15)
    table, labels = du.read_partition(tmp_path / "out" / "planted" / "train_partition.csv")
    assert labels == CLASSES
    before = space["labels"][known].argmax(1) != true[:60]
    after = table["class"].map(CLASSES.index) != true[:60]
    assert after.sum() < before.sum()  # reviewed by the truth
    test, _ = du.read_partition(tmp_path / "out" / "planted" / "test_partition.csv")
    assert test["class"].tolist() == part["class"].tolist()[75:]
