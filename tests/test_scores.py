"""Scores against numbers worked out by hand and scikit-learn; thresholds against brute force."""

from data_utils import (
    _average_precision,
    compare_scores,
    find_optimal_thresholds,
    mean_average_precision,
    score_labels,
    summarize_scores,
    to_panorama_level,
)

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics

NAN = float("nan")
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)

# Four images, four labels. At 0.5 the predictions are those of the comments.
TARGETS = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]], float)
PROBS = np.array(
    [
        [0.9, 0.6, 0.3, 0.1],  # 1 1 0 0
        [0.4, 0.7, 0.8, 0.2],  # 0 1 1 0
        [0.6, 0.2, 0.9, 0.6],  # 1 0 1 1
        [0.1, 0.3, 0.7, 0.4],  # 0 0 1 0
    ]
)
LABELS = ["a", "b", "c", "none"]


def draw(n: int, n_labels: int, seed: int, unknown: float = 0.0, digits: int = 3):
    """Return targets and probabilities that know something about them, with ties."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, n_labels)) < 0.35).astype(float)
    probs = np.clip(0.3 * targets + 0.7 * rng.random((n, n_labels)), 0, 1).round(digits)
    targets[rng.random(targets.shape) < unknown] = np.nan
    return targets, probs


# ---------------------------------------------------------------- by hand


def test_scores_of_a_hand_written_4_by_4_matrix():
    table = score_labels(TARGETS, PROBS, LABELS, n_bootstrap=0)
    assert table.index.tolist() == LABELS
    assert table["support"].tolist() == [2, 2, 3, 0]
    assert table["absent"].tolist() == [2, 2, 1, 4]
    assert table["unknown"].tolist() == [0, 0, 0, 0]
    # a: ranks 1 0 present absent: 0.9+ 0.6- 0.4+ 0.1-, so AP = (1/1 + 2/3) / 2
    # b: 0.7+ 0.6- 0.3+ 0.2-; c: 0.9+ 0.8- 0.7+ 0.3+, so AP = (1/1 + 2/3 + 3/4) / 3
    assert table["AP"].tolist() == pytest.approx([5 / 6, 5 / 6, 29 / 36, NAN], nan_ok=True)
    assert table["precision"].tolist() == pytest.approx([1 / 2, 1 / 2, 2 / 3, 0], nan_ok=True)
    assert table["recall"].tolist() == pytest.approx([1 / 2, 1 / 2, 2 / 3, NAN], nan_ok=True)
    assert table["F1"].tolist() == pytest.approx([1 / 2, 1 / 2, 2 / 3, NAN], nan_ok=True)


def test_summary_of_a_hand_written_4_by_4_matrix():
    value = summarize_scores(TARGETS, PROBS, n_bootstrap=0)["value"]
    assert value["mAP"] == pytest.approx((5 / 6 + 5 / 6 + 29 / 36) / 3)
    assert value["macro F1"] == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)
    # cells: true positives 1 + 1 + 2, false positives 1 + 1 + 1 + 1, false negatives 1 + 1 + 1
    assert value["micro F1"] == pytest.approx(2 * 4 / (2 * 4 + 4 + 3))
    assert value["Hamming loss"] == pytest.approx(7 / 16)
    assert value["exact match"] == 0
    perfect = summarize_scores(TARGETS, TARGETS, n_bootstrap=0)["value"]
    assert perfect.tolist() == [1, 1, 1, 0, 1]


def test_unknown_cells_count_nowhere():
    targets = TARGETS.copy()
    targets[0, 1] = targets[3, 0] = targets[2, 2] = targets[2, 3] = targets[2, 0] = NAN
    table = score_labels(targets, PROBS, LABELS, n_bootstrap=0)
    assert table["support"].tolist() == [2, 2, 2, 0]
    assert table["absent"].tolist() == [0, 1, 1, 3]
    assert table["unknown"].tolist() == [2, 1, 1, 1]
    # a: 0.9+ 0.4+; b: 0.7+ 0.3+ 0.2-; c: 0.8- 0.7+ 0.3+, so AP = (1/2 + 2/3) / 2
    assert table["AP"].tolist() == pytest.approx([1, 1, 7 / 12, NAN], nan_ok=True)
    assert table["precision"].tolist() == pytest.approx([1, 1, 1 / 2, NAN], nan_ok=True)
    assert table["recall"].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 2, NAN], nan_ok=True)
    assert table["F1"].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 2, NAN], nan_ok=True)
    value = summarize_scores(targets, PROBS, n_bootstrap=0)["value"]
    # 11 known cells; wrong: row 0 c, row 1 a and c, row 3 b
    assert value["Hamming loss"] == pytest.approx(4 / 11)
    assert value["exact match"] == pytest.approx(1 / 4)  # row 2: its one known cell is right
    assert value["micro F1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 3))


def test_image_that_nobody_judged_leaves_every_score_as_it_was():
    targets = np.vstack([TARGETS, np.full((1, 4), NAN)])
    probs = np.vstack([PROBS, np.full((1, 4), 0.9)])
    expected = summarize_scores(TARGETS, PROBS, n_bootstrap=0)
    pd.testing.assert_frame_equal(summarize_scores(targets, probs, n_bootstrap=0), expected)


def test_label_without_positives_is_nan_noted_and_left_out_of_the_mean():
    table = score_labels(TARGETS, PROBS, LABELS, n_bootstrap=20)
    assert table["note"].tolist() == ["", "", "", "too few to judge"]
    assert table.loc["none", ["AP", "AP_low", "AP_high", "F1", "F1_low", "F1_high"]].isna().all()
    summary = summarize_scores(TARGETS, PROBS, n_bootstrap=0)
    assert set(summary["labels"]) == {"3 of 4"}
    assert summary.loc["mAP", "value"] == pytest.approx(table["AP"].iloc[:3].mean())
    assert mean_average_precision(TARGETS, PROBS) == pytest.approx(table["AP"].iloc[:3].mean())


def test_nothing_present_anywhere_gives_nan_and_not_zero():
    nothing = np.zeros((3, 2))
    assert np.isnan(mean_average_precision(nothing, np.full((3, 2), 0.5)))
    summary = summarize_scores(nothing, np.full((3, 2), 0.1), n_bootstrap=5)
    assert np.isnan(summary.loc["mAP", "value"]) and np.isnan(summary.loc["macro F1", "value"])
    assert summary.loc["mAP", "labels"] == "0 of 2"
    assert summary.loc["exact match", "value"] == 1


def test_soft_targets_count_as_present_from_one_half():
    soft = np.where(TARGETS == 1, 0.5, 0.49)
    expected = score_labels(TARGETS, PROBS, LABELS, n_bootstrap=0)
    pd.testing.assert_frame_equal(score_labels(soft, PROBS, LABELS, n_bootstrap=0), expected)


def test_thresholds_are_met_at_equality_and_may_differ_by_label():
    targets, probs = np.ones((1, 2)), np.array([[0.5, 0.5]])
    assert score_labels(targets, probs, ["a", "b"], 0.5, n_bootstrap=0)["recall"].tolist() == [1, 1]
    by_label = score_labels(targets, probs, ["a", "b"], [0.5, 0.6], n_bootstrap=0)
    assert by_label["recall"].tolist() == [1, 0]


# ---------------------------------------------------------------- against scikit-learn


@SETTINGS
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(0, 2), st.floats(0, 0.6))
def test_average_precision_equals_sklearn_with_ties_weights_and_unknowns(seed, n, digits, unknown):
    targets, probs = draw(n, 3, seed, unknown, digits)
    weights = np.random.default_rng(seed).integers(0, 3, (2, n)).astype(float)
    weights[0] = 1
    found = _average_precision(targets, probs, weights)
    for row, label in np.ndindex(2, 3):
        known = ~np.isnan(targets[:, label])
        y, p, w = targets[known, label], probs[known, label], weights[row, known]
        if (w * y).sum() == 0:
            assert np.isnan(found[row, label])
        else:
            expected = metrics.average_precision_score(y, p, sample_weight=w)
            assert found[row, label] == pytest.approx(expected)


@SETTINGS
@given(st.integers(0, 10_000), st.integers(3, 60), st.floats(0.2, 0.8))
def test_precision_recall_f1_hamming_and_exact_match_equal_sklearn(seed, n, threshold):
    targets, probs = draw(n, 4, seed)
    assume((targets.sum(0) > 0).all())
    y, predicted = targets.astype(int), (probs >= threshold).astype(int)
    table = score_labels(targets, probs, list("abcd"), threshold, n_bootstrap=0)
    scores = metrics.precision_recall_fscore_support(y, predicted, zero_division=0)
    never = predicted.sum(0) == 0  # the precision of what is never predicted is not defined
    assert np.isnan(table["precision"]).tolist() == never.tolist()
    for name, expected in zip(["precision", "recall", "F1", "support"], scores):
        assert table[name].fillna(0).tolist() == pytest.approx(expected.tolist())
    value = summarize_scores(targets, probs, threshold, n_bootstrap=0)["value"]
    assert value.to_dict() == pytest.approx(
        {
            "mAP": metrics.average_precision_score(y, probs, average="macro"),
            "macro F1": metrics.f1_score(y, predicted, average="macro", zero_division=0),
            "micro F1": metrics.f1_score(y, predicted, average="micro", zero_division=0),
            "Hamming loss": metrics.hamming_loss(y, predicted),
            "exact match": metrics.accuracy_score(y, predicted),
        }
    )


# ---------------------------------------------------------------- intervals


def test_intervals_hold_the_value_and_depend_on_the_seed_only():
    targets, probs = draw(120, 3, seed=1)
    table = score_labels(targets, probs, list("abc"), n_bootstrap=200, seed=1)
    for name in ("AP", "F1"):
        assert (table[f"{name}_low"] < table[name]).all()
        assert (table[name] < table[f"{name}_high"]).all()
    again = score_labels(targets, probs, list("abc"), n_bootstrap=200, seed=1)
    pd.testing.assert_frame_equal(table, again)
    other = score_labels(targets, probs, list("abc"), n_bootstrap=200, seed=2)
    assert (table["AP"] == other["AP"]).all() and (table["AP_low"] != other["AP_low"]).any()
    first, second = (summarize_scores(targets, probs, seed=3, n_bootstrap=50) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert (first["low"] < first["value"]).all() and (first["value"] < first["high"]).all()


def test_no_bootstrap_gives_no_interval():
    table = score_labels(TARGETS, PROBS, LABELS, n_bootstrap=0)
    assert table[["AP_low", "AP_high", "F1_low", "F1_high"]].isna().all(axis=None)


def test_bootstrap_draws_whole_groups():
    targets, probs = draw(60, 2, seed=5)
    four = np.repeat(targets, 4, 0), np.repeat(probs, 4, 0)
    panoramas = [f"panorama {i}" for i in np.repeat(range(60), 4)]
    single = summarize_scores(targets, probs, n_bootstrap=100)
    grouped = summarize_scores(*four, groups=panoramas, n_bootstrap=100)
    ungrouped = summarize_scores(*four, n_bootstrap=100)
    # Four copies of each row say nothing new: whole groups know that, single rows do not.
    pd.testing.assert_frame_equal(grouped, single)
    width, too_narrow = grouped["high"] - grouped["low"], ungrouped["high"] - ungrouped["low"]
    assert (width > 1.5 * too_narrow).all()
    table = score_labels(*four, ["a", "b"], groups=panoramas, n_bootstrap=100)
    rows = score_labels(*four, ["a", "b"], n_bootstrap=100)
    for name in ("AP", "F1"):
        wide, narrow = (t[f"{name}_high"] - t[f"{name}_low"] for t in (table, rows))
        assert (wide > narrow).all()
    assert table["groups"].tolist() == (targets >= 0.5).sum(0).tolist()  # a row each of 60
    assert "groups" not in rows


def test_group_without_a_name_is_refused():
    for groups in (["a", "b", None, "a"], ["a", "b"]):
        with pytest.raises(ValueError, match="groups: expected 4 names, none of them NaN"):
            score_labels(TARGETS, PROBS, LABELS, groups=groups, n_bootstrap=0)


def test_interval_has_no_width_if_there_is_only_one_group():
    targets, probs = draw(30, 2, seed=6)
    summary = summarize_scores(targets, probs, groups=["the only one"] * 30, n_bootstrap=20)
    np.testing.assert_allclose(summary["low"], summary["value"])
    np.testing.assert_allclose(summary["high"], summary["value"])


# ---------------------------------------------------------------- thresholds


def f_beta(targets, probs, threshold, beta=1.0) -> float:
    """F-beta of one label on its known cells, written out; 0 if nothing is right."""
    known = ~np.isnan(targets)
    y, predicted = targets[known] >= 0.5, probs[known] >= threshold
    tp, fp, fn = (y & predicted).sum(), (~y & predicted).sum(), (y & ~predicted).sum()
    bottom = (1 + beta**2) * tp + beta**2 * fn + fp
    return (1 + beta**2) * tp / bottom if bottom else 0.0


def one_label(n_max: int = 25):
    """A label's targets (with unknowns) and probabilities (with many ties)."""
    cells = st.tuples(
        st.sampled_from([0.0, 1.0, 1.0, NAN]),
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.75, 1.0]) | st.floats(0, 1),
    )
    return st.lists(cells, min_size=1, max_size=n_max).map(lambda rows: np.array(rows).T)


@SETTINGS
@given(one_label(), st.sampled_from([0.5, 1.0, 2.0]))
def test_threshold_is_the_best_of_all_cuts(label, beta):
    targets, probs = label
    assume((targets == 1).any())
    found = find_optimal_thresholds(
        probs[:, None], targets[:, None], ["a"], beta=beta, min_positives=1
    ).loc["a"]
    best = max(f_beta(targets, probs, cut, beta) for cut in probs)
    assert found["score"] == pytest.approx(best)
    assert f_beta(targets, probs, found["threshold"], beta) == pytest.approx(best)
    assert found["source"] == "own"
    assert found["positives"] == (targets == 1).sum()


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_never_worse_than_a_grid_of_101_steps(seed):
    targets, probs = draw(300, 6, seed, unknown=0.2, digits=4)
    found = find_optimal_thresholds(probs, targets, list("abcdef"))
    for i, threshold in enumerate(found["threshold"]):
        own = f_beta(targets[:, i], probs[:, i], threshold)
        grid = [f_beta(targets[:, i], probs[:, i], cut) for cut in np.linspace(0, 1, 101)]
        assert own >= max(grid)


def test_threshold_lies_between_two_probabilities():
    targets = np.array([[1, 1, 1, 1, 1, 0, 0, 0.0]]).T
    probs = np.array([[0.9, 0.9, 0.8, 0.8, 0.7, 0.3, 0.2, 0.1]]).T
    found = find_optimal_thresholds(probs, targets, ["a"], min_positives=5).loc["a"]
    assert found["threshold"] == pytest.approx(0.5)
    assert found["score"] == 1


def test_beta_weighs_recall_against_precision():
    targets, probs = draw(400, 1, seed=2)
    cuts = [
        find_optimal_thresholds(probs, targets, ["a"], beta=beta).loc["a", "threshold"]
        for beta in (0.25, 1, 4)
    ]
    assert cuts[0] > cuts[1] > cuts[2]


@SETTINGS
@given(one_label(), st.sampled_from([0.3, 0.5, 0.55, 0.75, 0.9, 1.0]))
def test_min_precision_is_reached_at_the_highest_recall_or_said_to_be_out_of_reach(label, least):
    targets, probs = label
    assume((targets == 1).any())
    found = find_optimal_thresholds(
        probs[:, None], targets[:, None], ["a"], min_precision=least, min_positives=1
    ).loc["a"]
    known = ~np.isnan(targets)
    y, p = targets[known] == 1, probs[known]
    recalls = [y[p >= cut].sum() / y.sum() for cut in p if y[p >= cut].mean() >= least]
    if any(recalls):
        predicted = p >= found["threshold"]
        assert found["source"] == "own"
        assert y[predicted].mean() >= least
        assert found["score"] == pytest.approx(max(recalls))
        assert y[predicted].sum() / y.sum() == pytest.approx(max(recalls))
    else:
        assert "precision not reached" in found["source"]
        assert np.isnan(found["score"])


def test_min_precision_that_is_met_exactly_counts_as_reached():
    # 14 of the 25 highest are present: 14 / 25 is 0.56, though 0.56 * 25 > 14 in floating point
    targets = np.r_[np.zeros(11), np.ones(14), np.zeros(30)][:, None]
    probs = np.r_[np.full(25, 0.8), np.linspace(0.1, 0.4, 30)][:, None]
    found = find_optimal_thresholds(probs, targets, ["a"], min_precision=0.56).loc["a"]
    assert found["source"] == "own" and found["score"] == 1


def test_label_with_too_few_positives_takes_the_global_threshold_and_says_so():
    targets, probs = draw(200, 3, seed=7)
    targets[:, 1] = 0
    targets[:4, 1] = 1
    found = find_optimal_thresholds(probs, targets, ["a", "rare", "c"])
    whole = find_optimal_thresholds(probs, targets, ["a", "rare", "c"], mode="global")
    assert found["source"].tolist() == ["own", "global: fewer than 10 positives", "own"]
    assert found.loc["rare", "threshold"] == whole.loc["rare", "threshold"]
    assert found.loc["rare", "positives"] == 4
    assert np.isnan(found.loc["rare", "score"])
    own = find_optimal_thresholds(probs, targets, ["a", "rare", "c"], min_positives=4)
    assert own.loc["rare", "source"] == "own"


def test_global_mode_gives_all_labels_the_best_common_threshold():
    targets, probs = draw(80, 3, seed=8, unknown=0.2, digits=2)
    found = find_optimal_thresholds(probs, targets, list("abc"), mode="global")
    assert len(set(found["threshold"])) == 1
    assert set(found["source"]) == {"global"}
    best = max(f_beta(targets.ravel(), probs.ravel(), cut) for cut in probs.ravel())
    common = found["threshold"].iloc[0]
    assert f_beta(targets.ravel(), probs.ravel(), common) == pytest.approx(best)


def test_global_mode_says_when_the_precision_is_out_of_reach():
    targets, probs = np.array([[0.0, 1.0] * 6]).T, np.full((12, 1), 0.4)
    found = find_optimal_thresholds(probs, targets, ["a"], mode="global", min_precision=0.9)
    assert "precision not reached" in found.loc["a", "source"]


def test_label_that_nobody_judged_falls_back_and_says_so():
    targets, probs = draw(100, 2, seed=9)
    targets[:, 1] = NAN
    found = find_optimal_thresholds(probs, targets, ["a", "unjudged"])
    assert found["source"].tolist() == ["own", "global: fewer than 10 positives"]
    assert found.loc["unjudged", "positives"] == 0
    assert np.isfinite(found["threshold"]).all()


def test_wrong_mode_and_probabilities_that_are_nan_are_refused():
    targets, probs = draw(10, 2, seed=0)
    with pytest.raises(ValueError, match="mode='best'.*'per_label' or 'global'"):
        find_optimal_thresholds(probs, targets, ["a", "b"], mode="best")
    probs[3, 1] = NAN
    with pytest.raises(ValueError, match="probs holds NaN"):
        find_optimal_thresholds(probs, targets, ["a", "b"])
    for score in (summarize_scores, lambda *given: score_labels(*given, ["a", "b"])):
        with pytest.raises(ValueError, match="probs holds NaN; leave out the images"):
            score(targets, probs)


@pytest.mark.parametrize("mode", ["per_label", "global", "shrunk"])
def test_label_that_nobody_judged_or_nobody_saw_is_no_obstacle(mode):
    targets, probs = draw(60, 3, seed=4)
    targets[:, 1], targets[:, 2] = NAN, 0
    found = find_optimal_thresholds(probs, targets, list("abc"), mode)
    assert np.isfinite(found["threshold"]).all()
    assert found["positives"].tolist()[1:] == [0, 0]


@SETTINGS
@given(arrays(float, (12, 3), elements=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])))
def test_thresholds_depend_on_values_and_not_on_the_order_of_rows(probs):
    targets = (np.arange(36).reshape(12, 3) % 2).astype(float)
    order = np.random.default_rng(0).permutation(12)
    found = find_optimal_thresholds(probs, targets, list("abc"))
    shuffled = find_optimal_thresholds(probs[order], targets[order], list("abc"))
    pd.testing.assert_frame_equal(found, shuffled)


NAMES = ["a", "b"]
SCORES = {
    "score_labels": lambda y, p: score_labels(y, p, NAMES),
    "summarize_scores": lambda y, p: summarize_scores(y, p, n_bootstrap=0),
    "summarize_scores, argmax": lambda y, p: summarize_scores(y, p, "argmax"),
    "compare_scores": lambda y, p: compare_scores(y, p, np.zeros_like(p), NAMES),
    "compare_scores, baseline": lambda y, p: compare_scores(y, np.zeros_like(p), p, NAMES),
    "mean_average_precision": mean_average_precision,
    "find_optimal_thresholds": lambda y, p: find_optimal_thresholds(p, y, NAMES),
    "to_panorama_level": lambda y, p: to_panorama_level(
        pd.DataFrame(y, columns=NAMES).assign(image_path=[f"{i}_left.jpg" for i in range(len(y))]),
        NAMES,
        p,
    ),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_probabilities_that_are_nan_are_refused_by_every_score(name, kind):
    targets, probs = draw(10, 2, seed=0)
    SCORES[name](targets, probs.astype(kind))
    targets[3, 1], probs[3, 1] = NAN, NAN  # even where nobody judged
    with pytest.raises(ValueError, match="probs holds NaN; leave out the images"):
        SCORES[name](targets, probs.astype(kind))


# ---------------------------------------------------------------- panorama level


def test_halves_are_combined_to_panoramas_by_hand():
    df = pd.DataFrame(
        {
            "image_path": [
                "x/B_left.jpg",
                "A_right.jpg",
                "x/B_right.jpg",
                "A_left.jpg",
                "y/B_left.jpg",
            ],
            "Sun": [0, 1, 0, 0, 0.0],
            "Sea": [NAN, NAN, 1, 0, 1],
        }
    )
    probs = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.1], [0.2, 0.8], [0.7, 0.6]])
    targets, highest = to_panorama_level(df, ["Sun", "Sea"], probs)
    # x/B: absent in both, present in one; A: present in one, unknown and absent;
    # y/B: its right half is missing, so only what is present is known
    np.testing.assert_array_equal(targets, [[0, 1], [1, NAN], [NAN, 1]])
    np.testing.assert_array_equal(highest, [[0.5, 0.2], [0.3, 0.8], [0.7, 0.6]])
