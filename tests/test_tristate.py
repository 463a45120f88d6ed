"""Cells that nobody judged, from the label file to the plots: never read as absent."""

import math

import data_utils as du

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import data_row, labelled, load_notebook_functions, radio
from PIL import Image

partitioning = load_notebook_functions("partitioning")
NAN = float("nan")
SURE, LIKELY, UNLIKELY, ASIDE = "1 - Definitely", "2 - Likely", "4 - Unlikely", "Foreground"


def grid(**columns: list[float]) -> np.ndarray:
    """Return (N, L) from one list a label."""
    return np.array(list(columns.values()), float).T


def put_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


# ---------------------------------------------------------------- labels


def test_labelbox_share_is_over_the_photos_that_were_graded(write_ndjson):
    given = {"A": [SURE], "B": [UNLIKELY], "C": [ASIDE], "D": [LIKELY], "E": []}
    rows = [
        data_row(image, *(labelled(radio("Sun", option)) for option in options))
        for image, options in given.items()
    ]
    targets = du.to_targets(du.read_labelbox(write_ndjson(*rows)))
    # A 1, B 0, D 1; C lacks its grade, E has no annotator: 2 of 3 (as absent 2 of 5)
    assert targets["Sun"].mean() == pytest.approx(2 / 3)


def test_labelbox_question_of_another_project_and_unticked_question(write_ndjson):
    rows = [
        data_row("A", labelled(radio("Sun", SURE))),
        data_row("B", labelled(radio("Sea", SURE))),
        data_row("C", coast=[labelled(radio("Sea", UNLIKELY))]),
    ]
    answers = du.read_labelbox(write_ndjson(*rows))
    # Sun: A 1, B unticked, C not asked. Sea: A unticked, B 1, C 0
    absent, unknown = (du.to_targets(answers, unanswered=u) for u in ("absent", "unknown"))
    assert absent[["Sun", "Sea"]].mean().tolist() == pytest.approx([1 / 2, 1 / 3])  # 1/3, 1/3
    assert unknown[["Sun", "Sea"]].mean().tolist() == [1, 1 / 2]  # as absent 1/3, 1/3


def test_empty_csv_cells_are_left_out_of_the_share(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("photo,Sun,Sea\na,1,\nb,,0\nc,0,\nd,1,1\ne,,\n", encoding="utf-8")
    targets = partitioning.read_csv_labels(path)
    # Sun 1 - 0 1 -: 2 of 3 (as absent 2 of 5). Sea - 0 - 1 -: 1 of 2 (as absent 1 of 5)
    assert targets[["Sun", "Sea"]].mean().tolist() == pytest.approx([2 / 3, 1 / 2])


def test_empty_list_in_a_csv_is_no_list_of_absent_labels(tmp_path):
    path = tmp_path / "lists.csv"
    path.write_text('photo,shows\na,"sun,sea"\nb,\nc,sun\nd,sea\ne,\n', encoding="utf-8")
    targets = partitioning.read_csv_labels(path)
    # a, c, d: 2 of 3 each (as absent 2 of 5)
    assert targets[["sun", "sea"]].mean().tolist() == pytest.approx([2 / 3, 2 / 3])


def test_class_folders_say_nothing_about_a_half_that_is_in_none(tmp_path):
    put_images(tmp_path, "fen/A_left.jpg", "sea/B_left.jpg", "sea/B_right.jpg", "fen/C_left.jpg")
    targets = partitioning.read_class_folders(tmp_path)
    cells = pd.get_dummies(targets["class"], dtype=float)
    targets = cells.assign(image=targets["image"].str.split("/").str[1])
    whole = du.combine_halves(targets).set_index("image")
    # fen: A 1, C 1, B 0 by both halves. sea: B 1, A and C by one half only, so unknown
    assert whole["fen"].mean() == pytest.approx(2 / 3)
    assert whole["sea"].mean() == 1  # as absent 1/3


def test_halves_of_which_one_is_unknown_do_not_lower_the_mean():
    halves = [f"{name}_{side}.jpg" for name in "ABCD" for side in ("left", "right")]
    sun = [NAN, 0.9, 0, NAN, 0.3, 0, NAN, NAN]
    whole = du.combine_halves(pd.DataFrame({"image": halves, "Sun": sun}))
    # A 0.9, B unknown, C 0.3, D unknown: 1.2 / 2 (as absent 1.2 / 4)
    assert whole["Sun"].mean() == pytest.approx(0.6)


def test_attached_images_keep_what_is_unknown(tmp_path):
    put_images(tmp_path, "x/a.jpg", "x/b.jpg", "y/c.jpg", "y/d.jpg")
    targets = pd.DataFrame({"image": list("abcde"), "Sun": [1, NAN, NAN, 0, NAN]})
    df = partitioning.attach_images(targets, tmp_path, group_by=1, missing="skip")
    # x: 1 of 1 (as absent 1 of 2), y: 0 of 1; both: 1 of 2 (as absent 1 of 4)
    assert df.groupby("group_id")["Sun"].mean().tolist() == [1, 0]
    assert df["Sun"].mean() == 1 / 2


# ---------------------------------------------------------------- partition


def test_every_part_has_the_label_rate_of_the_judged_photos():
    df = pd.DataFrame({"group_id": [f"g{i}" for i in range(36)]})
    df["Sun"] = [1, NAN, NAN, 0, NAN, NAN] * 3 + [NAN, NAN, 0, NAN, 1, NAN] * 3
    parts = partitioning.group_stratified_split(df, ["Sun"], ratios=(1, 1, 1), seed=1)
    # 6 present and 6 absent of 36: 6 / 12 (as absent 6 / 36, whatever the judged cells say)
    assert [part["Sun"].mean() for part in parts.values()] == [1 / 2, 1 / 2, 1 / 2]


@pytest.mark.parametrize("seed", range(4))
def test_sparsely_judged_label_is_judged_in_every_part(seed):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame((rng.random((400, 5)) < 0.3).astype(float), columns=list("abcde"))
    df["group_id"] = [f"g{i // 2}" for i in range(400)]
    df.loc[40:, "e"] = NAN  # 20 of 200 groups
    parts = partitioning.group_stratified_split(df, list("abcde"), seed=seed)
    assert all(part["e"].notna().any() for part in parts.values())
    assert min(part["a"].mean() for part in parts.values()) > df["a"].mean() - 0.03


def test_label_that_a_part_cannot_judge_is_named():
    df = pd.DataFrame({"group_id": list("abcdef"), "Sun": [1.0, 0, 1, 0, 1, 0]})
    df["Sea"] = [1.0, NAN, NAN, NAN, NAN, NAN]
    with pytest.warns(UserWarning, match="nobody judged in some part: Sea"):
        partitioning.group_stratified_split(df, ["Sun", "Sea"], ratios=(1, 1, 1))


def test_label_rate_and_deviation_are_among_judged_cells():
    train, test = [1, NAN, 0.7, NAN, 0, NAN], [NAN, 0, 1, 0]
    parts = {"train": pd.DataFrame({"Sun": train}), "test": pd.DataFrame({"Sun": test})}
    found = partitioning.label_distribution(parts, ["Sun"])
    # 2 of 3 and 1 of 3, overall 3 of 6 (as absent 2 of 6 and 1 of 4, overall 3 of 10)
    assert found["rate"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found["deviation"].tolist() == pytest.approx([100 / 6, -100 / 6])
    assert found["unknown"].tolist() == [3, 1]


def test_partition_csv_has_empty_cells_and_gives_them_back(tmp_path):
    df = pd.DataFrame({"image_path": ["a", "b", "c"], "group_id": ["g", "g", "h"]})
    df = df.assign(Sun=[NAN, 0, 0.5], Sea=[1, NAN, NAN])
    df["image_path"] = [str(tmp_path / name) for name in df["image_path"]]
    du.write_partition(df, tmp_path / "part.csv")
    lines = (tmp_path / "part.csv").read_text(encoding="utf-8").split()
    assert lines[1:] == ["a,g,,1.0", "b,g,0.0,", "c,h,0.5,"]
    again, labels = du.read_partition(tmp_path / "part.csv")
    # Sun 0.5 / 2 (as absent 0.5 / 3), Sea 1 / 1 (as absent 1 / 3)
    assert again[labels].mean().tolist() == [0.25, 1]


# ---------------------------------------------------------------- training


LN2 = math.log(2)  # what a logit of 0 costs, whether present or absent
LOSSES = {
    "bce": (LN2 + LN2) / 2,
    "asl": (0.5 * LN2 - 0.45**4 * math.log(0.55)) / 2,  # γ+ 1, γ- 4, margin 0.05
    "zlpr": math.log(1 + 1) + math.log(1 + 1),
    "twoway": math.log(1 + 1),  # of the photo; its one judged present label has no rival
    # Σ y_j / n_j is 1 / 2 + 1 / 2 · 1 / 2, the unknown one by its rate; 1 / n_i over it is 2 / 3
    "db": (1 / (1 + math.exp(-10 * (2 / 3 - 0.2))) + 0.1) * (LN2 / 2 + LN2 / 4) / 2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_photo_with_one_unknown_label(name):
    training = grid(a=[1, NAN, NAN, 0], b=[1, 0, 1, 0], c=[NAN, 0, 1, NAN])  # rates of 1/2
    criterion = du.MaskedLoss(name, training)
    targets = torch.tensor([[1, NAN, 0]])
    loss = criterion(torch.tensor([[0.0, 3.0, 0.0]]), targets)
    assert loss.item() == pytest.approx(LOSSES[name], rel=1e-5)
    as_absent = du.MaskedLoss(name, np.nan_to_num(training))
    wrong = as_absent(torch.tensor([[0.0, 3.0, 0.0]]), targets.nan_to_num(0.0))
    assert abs(wrong.item() - LOSSES[name]) > 0.02


@pytest.mark.parametrize("name", LOSSES)
def test_photos_that_nobody_judged_do_not_dilute_the_loss(name):
    training = grid(a=[1, NAN, NAN, 0], b=[1, 0, 1, 0], c=[NAN, 0, 1, NAN])
    criterion = du.MaskedLoss(name, training)
    logits, targets = torch.tensor([[0.0, 3.0, 0.0]] * 4), torch.full((4, 3), NAN)
    targets[0] = torch.tensor([1, NAN, 0])
    assert criterion(logits, targets).item() == pytest.approx(LOSSES[name], rel=1e-5)


def test_class_weights_come_from_judged_cells():
    training = grid(a=[1, NAN, NAN, NAN, 0], b=[1, 0, 0, 0, 0])
    criterion = du.MaskedLoss("bce", training, "neg_pos")
    loss = criterion(torch.zeros(1, 2), torch.tensor([[1.0, NAN]]))
    # a: 1 absent a present, so weight 1 (as absent 4 a present, so weight 4)
    assert loss.item() == pytest.approx(1 * LN2)


@pytest.mark.parametrize(("alphas", "share"), [((1.0, 0.0), 0.6), ((0.0, 1.0), 1 - 25 / 64)])
def test_mixed_photo_is_unknown_where_one_of_both_is(monkeypatch, alphas, share):
    monkeypatch.setattr(np.random, "beta", lambda *_, **__: 0.6)
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: 4)
    targets = torch.tensor([[1, NAN, 1], [0, 1, 1]])
    _, mixed = du.TriStateMixup(3, *alphas)(torch.zeros(2, 3, 8, 8), targets)
    # CutMix: a box of int(8 √0.4) = 5 by 5 of 64 pixels
    assert mixed[:, 0].tolist() == pytest.approx([share, 1 - share])
    assert mixed.isnan().tolist() == [[False, True, False]] * 2
    assert mixed.nanmean().item() == pytest.approx((1 + 2) / 4)  # as absent (1 + 1 + 2) / 6


# ---------------------------------------------------------------- scores


def test_label_scores_of_judged_photos():
    probs = grid(Sun=[0.9, 0.8, 0.7, 0.6], Sea=[0.2, 0.9, 0.4, 0.8])
    targets = grid(Sun=[1, NAN, 0, 1], Sea=[0, NAN, NAN, NAN])
    table = du.score_labels(targets, probs, ["Sun", "Sea"], n_bootstrap=20)
    # Sun: 0.9+ 0.7- 0.6+, AP (1/1 + 2/3) / 2, precision 2/3 (as absent (1/1 + 2/4) / 2, 2/4)
    sun = table.loc["Sun", ["AP", "precision", "recall", "F1"]].tolist()
    assert sun == pytest.approx([5 / 6, 2 / 3, 1, 4 / 5])
    assert table[["support", "absent", "unknown"]].values.tolist() == [[2, 1, 1], [0, 1, 3]]
    assert table["note"].tolist() == ["", "too few to judge"]


def test_summary_of_judged_cells():
    targets = grid(Sun=[1, NAN, 0, NAN], Sea=[NAN, 0, 1, NAN])
    probs = grid(Sun=[0.8, 0.9, 0.2, 0.9], Sea=[0.9, 0.6, 0.7, 0.9])
    value = du.summarize_scores(targets, probs, n_bootstrap=0)["value"]
    # + - and - + are ranked right; of 4 cells the absent Sea at 0.6 is wrong, the last photo out
    expected = {"mAP": 1, "macro F1": (1 + 2 / 3) / 2, "micro F1": 4 / 5}
    expected |= {"Hamming loss": 1 / 4, "exact match": 2 / 3}  # as absent 5/8 and 1/4
    assert value.to_dict() == pytest.approx(expected)


def test_intervals_do_not_count_unknown_cells():
    targets, probs = grid(Sun=[1, NAN, 0, NAN]), grid(Sun=[0.8, 0.9, 0.2, 0.7])
    groups = ["a", "a", "a", "b"]
    table = du.score_labels(targets, probs, ["Sun"], groups=groups, n_bootstrap=50)
    # any sample with group a: 0.8+ 0.2-, F1 1 and AP 1 (as absent at best 2 / (2 + 1) and 1/2)
    found = table.loc["Sun", ["AP_low", "AP_high", "F1_low", "F1_high"]].tolist()
    assert found == [1, 1, 1, 1]


def test_mean_average_precision_leaves_out_what_nobody_judged():
    targets = grid(Sun=[1, NAN, 1, 0], Sea=[NAN, 0, NAN, 1], Fog=[NAN, NAN, NAN, NAN])
    probs = grid(Sun=[0.3, 0.9, 0.8, 0.5], Sea=[0.9, 0.2, 0.8, 0.7], Fog=[0.1, 0.2, 0.3, 0.4])
    # Sun 0.8+ 0.5- 0.3+: (1 + 2/3) / 2; Sea 0.7+ 0.2-: 1 (as absent (1/2 + 2/4) / 2 and 1/3)
    assert du.mean_average_precision(targets, probs) == pytest.approx((5 / 6 + 1) / 2)


COMPARED = {
    "targets": grid(Sun=[1, NAN, 0, 1], Sea=[NAN, NAN, NAN, 0], Fog=[0, 1, NAN, 0]),
    "probs": grid(Sun=[0.9, 0.8, 0.2, 0.7], Sea=[0.9] * 4, Fog=[0.6, 0.7, 0.8, 0.3]),
    "baseline": grid(Sun=[0.6, 0.9, 0.7, 0.8], Sea=[0.1] * 4, Fog=[0.9, 0.2, 0.8, 0.1]),
    "label_columns": ["Sun", "Sea", "Fog"],
}


def test_models_are_compared_on_judged_cells():
    table = du.compare_scores(**COMPARED, n_bootstrap=0)
    # Sun + + - against + - +: 1 - 5/6 (as absent 5/6 - 1/2). Fog + - - against - + -: 1 - 1/2
    expected = [1 / 6, NAN, 1 / 2, (1 / 6 + 1 / 2) / 2]
    assert table["difference"].tolist() == pytest.approx(expected, nan_ok=True)


def test_several_trainings_are_compared_by_their_mean_scores_and_not_by_mean_probabilities():
    probs, baseline = COMPARED["probs"], COMPARED["baseline"]
    swapped = {"probs": [probs, baseline, probs], "baseline": [baseline, probs, baseline]}
    table = du.compare_scores(**COMPARED | swapped, n_bootstrap=20)
    alone = du.compare_scores(**COMPARED, n_bootstrap=20)
    # two of three trainings differ as the one above, the third the other way round
    assert table["difference"].tolist() == pytest.approx(
        (alone["difference"] / 3).tolist(), nan_ok=True
    )
    # Sun: 1 and 5/6 are the APs of the two
    assert table.loc["Sun", ["baseline", "AP"]].tolist() == pytest.approx([8 / 9, 17 / 18])
    np.testing.assert_allclose(table[["low", "high"]], alone[["low", "high"]] / 3)
    with pytest.raises(ValueError, match=r"shape \(3, 4\): expected \(4, 3\), as the targets"):
        du.compare_scores(**COMPARED | {"probs": COMPARED["probs"].T})


# ---------------------------------------------------------------- thresholds and panoramas


def test_threshold_lies_between_judged_probabilities():
    probs, targets = grid(Sun=[0.9, 0.6, 0.4]), grid(Sun=[1, NAN, 0])
    row = du.find_optimal_thresholds(probs, targets, ["Sun"], min_positives=1).loc["Sun"]
    # halfway from 0.9 to 0.4 (as absent to 0.6)
    assert row["threshold"] == pytest.approx(0.65)
    assert row["score"] == 1


def test_least_precision_and_global_threshold_count_judged_cells():
    probs = grid(Sun=[0.9, 0.6, 0.4], Sea=[0.5, 0.48, 0.2])
    targets = grid(Sun=[1, NAN, 0], Sea=[1, NAN, 0])
    found = du.find_optimal_thresholds(probs, targets, ["Sun", "Sea"], mode="global")
    # 0.9+ 0.5+ 0.4- 0.2-: halfway from 0.5 to 0.4 (as absent to 0.48)
    assert found["threshold"].tolist() == pytest.approx([0.45, 0.45])
    options = {"min_precision": 1.0, "min_positives": 1}
    found = du.find_optimal_thresholds(probs[:, [1]], grid(Sea=[0, NAN, 1]), ["Sea"], **options)
    assert found["source"].tolist() == ["global: precision not reached"]
    found = du.find_optimal_thresholds(probs[:, [1]], grid(Sea=[NAN, 1, 0]), ["Sea"], **options)
    # 0.48+ 0.2-: precision 1 from 0.34 on (as absent never: the first of 0.5- 0.48+ is wrong)
    assert found["threshold"].tolist() == pytest.approx([0.34])


def test_panorama_with_an_unknown_half_does_not_move_the_threshold():
    paths = [f"{name}_{side}.jpg" for name in "ABC" for side in ("left", "right")]
    df = pd.DataFrame({"image_path": paths, "Sun": [NAN, 1, 0, NAN, 0, 0]})
    probs = grid(Sun=[0.2, 0.9, 0.8, 0.3, 0.4, 0.1])
    targets, highest = du.to_panorama_level(df, ["Sun"], probs)
    found = du.find_optimal_thresholds(highest, targets, ["Sun"], min_positives=1)
    # A 1 at 0.9, B unknown at 0.8, C 0 at 0.4: halfway from 0.9 to 0.4 (as absent to 0.8)
    assert found.loc["Sun", "threshold"] == pytest.approx(0.65)
    assert np.nanmean(targets) == 1 / 2  # as absent 1/3


# ---------------------------------------------------------------- plots


def test_comparison_is_drawn_without_unknown_cells():
    figure = du.plot_comparison(du.compare_scores(**COMPARED, n_bootstrap=5))
    points = figure.axes[0].lines[0].get_xdata()
    # by size: Sun 1/6, Fog 1/2, Sea without a point (as absent Fog 1/2 - 1/3), then the mean
    assert points.tolist() == pytest.approx([1 / 6, 1 / 2, NAN, 1 / 3], nan_ok=True)
    plt.close(figure)


def test_chance_level_of_training_is_the_rate_among_judged_cells(notebook_functions):
    targets = grid(Sun=[1, NAN, 0, NAN], Sea=[NAN, 1, 1, 0], Fog=[NAN, 0, NAN, NAN])
    # 1 of 2 and 2 of 3; Fog never occurs (as absent 1 of 4 and 2 of 4)
    assert notebook_functions("training").chance_level(targets) == pytest.approx(7 / 12)


def test_precision_recall_curve_of_training_leaves_unknown_cells_out(notebook_functions):
    targets = grid(Sun=[1, NAN, 0, 1], Sea=[NAN] * 4)
    probs = grid(Sun=[0.9, 0.8, 0.7, 0.6], Sea=[0.9] * 4)
    scores = du.score_labels(targets, probs, ["Sun", "Sea"], n_bootstrap=0)
    drawn = plt.figure().subplots()
    curve_of = notebook_functions("training").draw_curve
    curve_of(drawn, targets[:, 0], probs[:, 0], scores.loc["Sun"])
    curve, chance, dot = (line.get_ydata().tolist() for line in drawn.lines)
    # from 0.6 2 of 3, from 0.7 1 of 2, from 0.9 1 of 1 (as absent 2 of 4, 1 of 3, 1 of 2, 1 of 1)
    assert curve == pytest.approx([2 / 3, 1 / 2, 1, 1])
    assert chance == pytest.approx([2 / 3, 2 / 3]) and dot == pytest.approx([2 / 3])
    plt.close()


# ---------------------------------------------------------------- all stages


def test_six_photos_from_the_export_to_the_thresholds(write_ndjson, tmp_path):
    sun = dict(zip("ABCDEF", [SURE, LIKELY, UNLIKELY, None, ASIDE, UNLIKELY]))
    sea = {"A": UNLIKELY, "C": SURE, "E": UNLIKELY}
    rows = [data_row("D")]
    for image in "ABCEF":
        asked = [radio("Sun", sun[image])] + [radio("Sea", o) for o in [sea.get(image)] if o]
        rows.append(data_row(image, labelled(*asked)))
    targets = du.to_targets(du.read_labelbox(write_ndjson(*rows)), unanswered="unknown")
    targets = targets.sort_values("image")[["image", "Sun", "Sea"]]
    # Sun 1 1 0 - - 0 and Sea 0 - 1 - 0 -
    assert targets[["Sun", "Sea"]].mean().tolist() == pytest.approx([2 / 4, 1 / 3])  # 2/6, 1/6

    put_images(tmp_path, *(f"{image}.jpg" for image in "ABCDEF"))
    du.write_partition(partitioning.attach_images(targets, tmp_path), tmp_path / "val.csv")
    df, labels = du.read_partition(tmp_path / "val.csv")
    found = partitioning.label_distribution({"val": df}, labels)
    assert found[["present", "absent", "unknown"]].values.tolist() == [[2, 2, 2], [1, 2, 3]]
    data = du.DataPartition(df, labels)
    assert np.isnan([data[i][1].numpy() for i in range(6)]).sum() == 2 + 3

    logits = torch.where(torch.tensor(data.targets).isnan(), 9.0, 0.0)
    loss = du.MaskedLoss("bce", data.targets)(logits, torch.tensor(data.targets))
    assert loss.item() == pytest.approx(LN2)  # as absent (7 ln 2 + 5 · 9) / 12

    probs = grid(Sun=[0.9, 0.6, 0.7, 0.95, 0.8, 0.2], Sea=[0.3, 0.7, 0.8, 0.6, 0.5, 0.9])
    cuts = du.find_optimal_thresholds(probs, data.targets, labels, min_positives=1)
    # Sun 0.9+ 0.7- 0.6+ 0.2-: F1 4 / 5 from 0.6 on (as absent 4 / 7)
    # Sea 0.8+ 0.5- 0.3-: F1 1 from 0.8 on (as absent 2 / 3, halfway to 0.7)
    assert cuts["score"].tolist() == pytest.approx([4 / 5, 1])
    assert cuts["threshold"].tolist() == pytest.approx([(0.6 + 0.2) / 2, (0.8 + 0.5) / 2])
    value = du.summarize_scores(data.targets, probs, cuts["threshold"], n_bootstrap=0)["value"]
    # AP (1 + 2/3) / 2 and 1; of 7 cells only the 0.7 of C is wrong, a photo of 5
    assert value["mAP"] == pytest.approx((5 / 6 + 1) / 2)
    assert value["Hamming loss"] == pytest.approx(1 / 7)
    assert value["exact match"] == pytest.approx(4 / 5)
