"""Classes that exclude each other as one column: files, numbers, loss, training, scores."""

import copy
import pickle
from types import SimpleNamespace

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import data_row, labelled, load_notebook_functions, radio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import average_precision_score
from test_single_label import CLASSES, ColorNet, cross_entropy, draw, to_unit
from torch.nn import functional as F

NAN = float("nan")
ONE_HOT = np.eye(3)[[0, 2, 1, 0]]
NUMBERS = np.array([0, 2, 1, 0])
PROBS = np.array([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])


def table_of(names, folder="photos"):
    paths = [f"{folder}/{i}.jpg" for i in range(len(names))]
    return pd.DataFrame({"image_path": paths, "group_id": paths, "class": names})


# ---------------------------------------------------------------- files


def test_partition_of_classes_is_one_column_and_comes_back_in_the_order_given(tmp_path):
    df = table_of(["sea", NAN, "bog", "1"], tmp_path)
    du.write_partition(df, tmp_path / "parts" / "train_partition.csv", ["sea", "bog", "1"])
    lines = (tmp_path / "parts" / "train_partition.csv").read_text().splitlines()
    assert lines[:3] == [
        "image_path,group_id,class",
        f"../0.jpg,{tmp_path}/0.jpg,sea",
        f"../1.jpg,{tmp_path}/1.jpg,",
    ]
    assert (tmp_path / "parts" / "classes.txt").read_text() == "sea\nbog\n1\n"
    found, classes = du.read_partition(tmp_path / "parts" / "train_partition.csv")
    assert classes == ["sea", "bog", "1"]
    assert found["class"].tolist()[::2] == ["sea", "bog"] and found["class"].isna()[1]
    assert found["image_path"].tolist() == df["image_path"].tolist()
    part = du.DataPartition(found, classes)
    assert part.exclusive
    assert part.targets.dtype == np.int64
    assert part.targets.tolist() == [0, -1, 1, 2]


@pytest.mark.parametrize(
    ("rows", "classes", "message"),
    [
        ("a.jpg,g,sea\nb.jpg,h,see", "sea\nbog", r"p\.csv, line 3: 'see' is no class of classes"),
        ("a.jpg,g,7", "sea\nbog", r"line 2: '7' is no class of classes\.txt \(sea, bog\)"),
        ("a.jpg,g,sea\na.jpg,g,bog", "sea\nbog", "line 3: a.jpg stands twice, as sea, bog; keep"),
        ("a.jpg,g,sea", "sea\nsea", r"classes\.txt: expected one class per line, each once"),
        ("a.jpg,g,sea", None, r"classes\.txt: no such file; a partition of classes needs it"),
    ],
)
def test_what_is_wrong_with_classes_is_one_sentence(tmp_path, rows, classes, message):
    (tmp_path / "p.csv").write_text(f"image_path,group_id,class\n{rows}\n")
    if classes is not None:
        (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        du.read_partition(tmp_path / "p.csv")


def test_classes_beside_labels_and_unknown_names_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("image_path,group_id,class,tree\na.jpg,g,sea,1\n")
    (tmp_path / "classes.txt").write_text("sea")
    with pytest.raises(ValueError, match="tree beside the column class; keep one kind"):
        du.read_partition(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="class 'fen': none of the classes sea, bog"):
        du.write_partition(table_of(["fen"]), tmp_path / "q.csv", ["sea", "bog"])
    assert not (tmp_path / "q.csv").exists()
    with pytest.raises(ValueError, match="class 'fen': none of the classes"):
        du.DataPartition(table_of(["fen"]), ["sea"])
    with pytest.raises(ValueError, match="'class' is the name of a column; rename that label"):
        du.check_label_names(["class"], "x.csv")


def write_parts(folder, **names):
    for part, own in names.items():
        own = table_of(own, folder / part)
        du.write_partition(own, folder / f"{part}_partition.csv", ["sea", "bog"])


def test_class_without_a_training_photo_is_refused(tmp_path):
    write_parts(tmp_path, train=["sea", "sea"], val=["bog"], test=["sea"])
    with pytest.raises(ValueError, match=r"train_partition\.csv: no photo of class bog; add"):
        du.load_parts(tmp_path)
    assert du.load_parts(tmp_path, ["val", "test"])[1] == ["sea", "bog"]
    write_parts(tmp_path, train=["sea", "bog"])
    assert len(du.load_parts(tmp_path)[0]["train"]) == 2


def test_one_hot_part_beside_a_part_of_classes_is_refused(tmp_path):
    write_parts(tmp_path, train=["sea", "bog"], test=["sea"])
    text = "image_path,group_id,sea,bog\nv.jpg,v,1,0\n"
    (tmp_path / "val_partition.csv").write_text(text)
    with pytest.raises(ValueError, match="of another kind"):
        du.load_parts(tmp_path)


# ---------------------------------------------------------------- memory


def test_paths_and_groups_are_bytes_that_come_back_as_they_were():
    df = table_of(["sea", "bog"]).astype(object)  # pyarrow's strings hold no odd bytes
    df["image_path"] = pd.Series(["Müll/\udce9 1.jpg", "a.jpg"], dtype=object)
    df["group_id"] = pd.Series(["é", "a long name of a group"], dtype=object)
    part = pickle.loads(pickle.dumps(du.DataPartition(df, ["sea", "bog"])))
    assert part.paths == df["image_path"].tolist()
    assert part.groups.tolist() == df["group_id"].tolist()
    assert copy.copy(part).groups.tolist() == part.groups.tolist()
    held = [v for v in vars(part).values() if isinstance(v, np.ndarray)]
    assert len(held) == 3 and not any(array.dtype.hasobject for array in held)


# ---------------------------------------------------------------- loss and probe


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_numbers_is_that_of_shares_and_leaves_out_unknown_ones(smoothing):
    logits = torch.tensor(np.log(PROBS), requires_grad=True)
    loss = du.MaskedLoss("auto", NUMBERS, label_smoothing=smoothing)
    expected = [cross_entropy(x, y, smoothing) for x, y in zip(logits.tolist(), ONE_HOT)]
    assert loss(logits, torch.tensor(NUMBERS)).item() == pytest.approx(np.mean(expected))
    assert loss(logits, torch.tensor(ONE_HOT)).item() == pytest.approx(np.mean(expected))
    found = loss(logits, torch.tensor([0, -1, 1, -1]))
    assert found.item() == pytest.approx((expected[0] + expected[2]) / 2)
    found.backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).all()
    assert loss(logits, torch.full((4,), -1)).item() == 0


def test_shares_of_numbers_are_one_hot_and_unknown_where_unknown():
    shares = du._as_shares(torch.tensor([1, -1]), 3)
    np.testing.assert_array_equal(shares, [[0, 1, 0], [NAN] * 3])


def test_probe_and_base_rates_of_numbers_are_those_of_one_hot_rows():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(60, 4)), dtype=torch.float32)
    numbers = x[:, :3].argmax(1).numpy()
    layer, losses = du.fit_probe(x, numbers, num_classes=3)
    other, other_losses = du.fit_probe(x, np.eye(3)[numbers], exclusive=True)
    torch.testing.assert_close(layer.weight, other.weight, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-3)
    rates = du.base_rate_logits(np.array([0, 0, 1, -1]), num_classes=3)
    np.testing.assert_allclose(F.softmax(torch.tensor(rates), 0), np.array([4, 2, 1]) / 7)
    hidden = np.where(np.arange(60) < 20, -1, numbers)
    partly, _ = du.fit_probe(x, hidden, num_classes=4)
    fewer, _ = du.fit_probe(x[20:], numbers[20:], np.arange(20, 60), num_classes=4)
    assert partly.weight.shape == (4, 4)
    assert (partly(x).argmax(1) == fewer(x).argmax(1)).float().mean() > 0.9


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same photos as one-hot columns and as one column of classes."""
    folder = tmp_path_factory.mktemp("colors")
    wide = [draw(folder, 12, seed=1), draw(folder, 9, seed=2)]
    narrow = [t[["image_path"]].assign(**{"class": t[CLASSES].idxmax(axis=1)}) for t in wide]
    return [[du.DataPartition(t, CLASSES, to_unit) for t in kind] for kind in (wide, narrow)]


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.2, "cutmix_alpha": 0.5}])
def test_training_on_numbers_is_training_on_one_hot_rows(both, tmp_path, mixing):
    settings = {"epochs": 4, "batch_size": 5, "learning_rate": 0.1, "warmup_epochs": 0} | mixing
    histories = []
    for i, (sets, loss) in enumerate(zip(both, ("ce", "auto"))):
        config = du.TrainConfig(loss=loss, precision="no", label_smoothing=0.1, **settings)
        run = du.Trainer(ColorNet(), *sets, config, tmp_path / str(i))
        histories.append(run.fit().drop(columns=["seconds", "images_per_second"]))
        assert run.config.loss == "ce"
        assert du.TrainConfig.read(tmp_path / str(i) / "config.json").loss == "ce"
    pd.testing.assert_frame_equal(*histories, rtol=1e-5)


def test_loss_of_many_labels_is_refused_for_classes(both, tmp_path):
    for loss in ("bce", "asl"):
        with pytest.raises(ValueError, match=f"loss='{loss}': is for labels.*set 'ce'"):
            du.Trainer(ColorNet(), *both[1], du.TrainConfig(loss=loss), tmp_path)
    with pytest.raises(ValueError, match="different labels or order"):
        du.Trainer(ColorNet(), both[0][0], both[1][1], du.TrainConfig(), tmp_path)


def test_unknown_classes_are_left_out_of_training_and_validation_scores(both, tmp_path):
    train, val = (copy.copy(part) for part in both[1])
    val.targets = val.targets.copy()
    val.targets[0] = -1
    run = du.Trainer(ColorNet(), train, val, du.TrainConfig(precision="no"), tmp_path)
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 3))).float()
    run._predict_logits = lambda *_: logits
    right = logits.argmax(1).numpy() == both[1][1].targets
    assert run.validate()["val_top1"] == pytest.approx(right[1:].mean())
    train.targets = np.full(12, -1)
    with pytest.raises(ValueError, match="no judged label"):
        du.Trainer(ColorNet(), train, val, du.TrainConfig(), tmp_path)


# ---------------------------------------------------------------- scores


def test_scores_of_numbers_by_hand():
    """Ranks of the true class: 0, 1, 0 and 1 (of two equal ones the first is taken)."""
    assert du.rank_classes(NUMBERS, PROBS).tolist() == [0, 1, 0, 1]
    assert du.rank_classes(np.array([1, -1]), np.array([[0.5, 0.5], [1, 0]])).tolist() == [1, -1]
    numbers = np.array([*NUMBERS, -1])
    probs = np.vstack([PROBS, [0.9, 0.1, 0.0]])
    overall = du.summarize_scores(numbers, probs, n_bootstrap=0)
    assert overall["value"].loc[["top-1", "top-5"]].tolist() == [0.5, 1.0]
    table = du.score_labels(numbers, probs, CLASSES, n_bootstrap=0)
    assert table["support"].tolist() == [2, 1, 1]
    assert table["unknown"].tolist() == [1, 1, 1]
    assert table["precision"].fillna(-1).tolist() == [1.0, 0.5, 0.0]
    assert table["recall"].tolist() == [0.5, 1.0, 0.0]


def test_scores_of_numbers_are_those_of_one_hot_rows():
    rng = np.random.default_rng(0)
    numbers, groups = rng.integers(0, 3, 40), rng.integers(0, 9, 40).astype(str)
    probs = rng.dirichlet(np.ones(3), 40)
    one_hot = np.eye(3)[numbers]
    wide = du.score_labels(one_hot, probs, CLASSES, "argmax", groups, 50)
    pd.testing.assert_frame_equal(du.score_labels(numbers, probs, CLASSES, 0.5, groups, 50), wide)
    assert wide["AP"].iloc[0] == pytest.approx(average_precision_score(one_hot[:, 0], probs[:, 0]))
    wide = du.summarize_scores(one_hot, probs, "argmax", groups, 50)
    narrow = du.summarize_scores(numbers, probs, groups=groups, n_bootstrap=50)
    pd.testing.assert_series_equal(narrow.loc["top-1"], wide.loc["exact match"], check_names=False)
    pd.testing.assert_series_equal(narrow.loc["mAP"], wide.loc["mAP"])
    pd.testing.assert_frame_equal(
        du.compare_scores(numbers, probs, probs[::-1], CLASSES, groups, 50).drop("top-1"),
        du.compare_scores(one_hot, probs, probs[::-1], CLASSES, groups, 50),
    )


# ---------------------------------------------------------------- classifier


def test_finished_run_of_classes_is_a_softmax_classifier(tmp_path):
    for name, n in (("train", 12), ("val", 9), ("test", 6)):
        own = draw(tmp_path, n, size=32, seed=n)
        own = own[["image_path"]].assign(**{"class": own[CLASSES].idxmax(axis=1)})
        own.insert(1, "group_id", own["image_path"])
        du.write_partition(own, tmp_path / f"{name}_partition.csv", CLASSES)
    options = {"partition_dir": str(tmp_path), "model_name": "resnet10t", "img_width": 32}
    config = du.TrainConfig(epochs=1, start="probe", precision="no", **options)
    model, sets = du.build_run(config)
    assert du.start_from_probe(model, sets, config) > 0.9
    trainer = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run")
    trainer.fit()
    classifier = du.finish_run(trainer)
    assert classifier.exclusive and classifier.labels == CLASSES
    assert {"top-1", "mAP"} <= set(classifier.description["validation"])
    table, probs = du.compare_classifiers(classifier, classifier, sets["test"], config)
    assert table["difference"].eq(0).all() and probs.shape == (6, 3)


def test_probe_of_classes_is_scored_by_its_probabilities(monkeypatch):
    logits = torch.tensor([[3.0, 2.9], [1.0, -5.0], [0.0, -9.0]])  # rank otherwise than softmax
    probe = torch.nn.Linear(2, 2)
    probe.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    monkeypatch.setattr(du, "extract_features", lambda *_, **__: logits)
    monkeypatch.setattr(du, "fit_probe", lambda *_, **__: (probe, None))
    monkeypatch.setattr(du, "use_probe", lambda *_: None)
    targets, model = np.array([1, 0, 0]), SimpleNamespace(spec={"head": "linear"})
    part = SimpleNamespace(targets=targets, groups=targets, label_columns=["a", "b"])
    parts, config = {"plain": part, "val": part}, du.TrainConfig(loss="ce")
    assert du.start_from_probe(model, parts, config) == 1.0


# ---------------------------------------------------------------- partitioning


partitioning = load_notebook_functions("partitioning")


def photos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_class_column_of_a_csv_takes_numbers_as_names_and_empty_cells_as_unknown(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("sample,site,label\na.jpg,x,10\nb.jpg,y,\nc.jpg,y, 9 \nd.jpg,x,sea  dry\n")
    table = partitioning.read_class_column(path, "label", ["site"])
    assert table["class"].fillna("").tolist() == ["10", "", "9", "sea dry"]
    assert table.attrs["classes"] == ["10", "9", "sea dry"]
    assert table["site"].tolist() == ["x", "y", "y", "x"]
    with pytest.raises(ValueError, match="no column kind; its columns are sample, site, label"):
        partitioning.read_class_column(path, "kind")
    path.write_text("image,label\na.jpg,1\n")
    with pytest.raises(ValueError, match="no column image; its columns are image, label"):
        partitioning.read_class_column(path, "label", ["image"])
    path.write_text("sample,label\na.jpg,1\na.jpg,2\n")
    with pytest.raises(ValueError, match="file name twice, .*line 3: 'a.jpg'"):
        partitioning.read_class_column(path, "label")


def test_radio_question_is_a_class_by_majority_and_a_tie_is_unknown(write_ndjson, capsys):
    people = [f"{name}@example.invalid" for name in "abc"]
    said = {"a.jpg": ["Bog", "Fen", "Bog"], "b.jpg": ["Fen", "Bog"], "c.jpg": ["Fen"], "d.jpg": []}
    rows = [
        data_row(image, *(labelled(radio("Kind", a), by=p) for a, p in zip(options, people)))
        for image, options in said.items()
    ]
    answers = du.read_labelbox(write_ndjson(*rows))
    table = partitioning.answered_class(answers, "Kind")
    assert table["class"].fillna("").tolist() == ["Bog", "", "Fen", ""]
    assert table.attrs["classes"] == ["Bog", "Fen"]
    assert "2 images got several answers, 1 of them a tie" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no radio question 'Sort'; there are Kind"):
        partitioning.answered_class(answers, "Sort")


@pytest.mark.parametrize("kind", ["csv", "kit"])
def test_flat_val_of_imagenet_gets_its_classes_from_the_ground_truth(tmp_path, kind):
    photos(tmp_path, "train/n02/n02_1.JPEG", "train/n01/n01_7.JPEG")
    photos(tmp_path, *(f"val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2)))
    truth = tmp_path / "LOC_val_solution.csv"
    if kind == "csv":
        lines = ["ImageId,PredictionString", "ILSVRC2012_val_00000002,n01 1 2 3 4 n01 5 6 7 8 "]
        truth.write_text("\n".join([*lines, "ILSVRC2012_val_00000001,n02 1 2 3 4\n"]))
    else:  # the numbers of the kit are not the order of the folders
        truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
        truth.write_text("7\n3\n")
        synsets = np.array([(3, "n01"), (7, "n02")], [("ILSVRC2012_ID", "f8"), ("WNID", "O")])
        savemat(tmp_path / "meta.mat", {"synsets": synsets})
    table = partitioning.read_class_folders(tmp_path).set_index("image")["class"]
    assert table.to_dict() == {
        "train/n01/n01_7.JPEG": "n01",
        "train/n02/n02_1.JPEG": "n02",
        "val/ILSVRC2012_val_00000001.JPEG": "n02",
        "val/ILSVRC2012_val_00000002.JPEG": "n01",
    }
    photos(tmp_path, "val/ILSVRC2012_val_00000003.JPEG")
    wrong = "no class of ILSVRC2012_val_00000003" if kind == "csv" else "2 classes and 3 photos"
    with pytest.raises(ValueError, match=f"{truth.name}: {wrong}"):
        partitioning.read_class_folders(tmp_path)


def test_classes_are_split_alike_with_groups_whole_and_every_class_in_every_part():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(400), rng.integers(1, 5, 400))
    own = rng.integers(0, 7, 400)[group]
    number = np.where(rng.random(len(group)) < 0.1, rng.integers(0, 7, len(group)), own)
    df = pd.DataFrame({"group_id": group.astype(str), "class": np.array(list("abcdefg"))[number]})
    parts = partitioning.group_stratified_split(df, list("abcdefg"))
    found = partitioning.label_distribution(parts, list("abcdefg"))
    assert found["deviation"].abs().max() < 1
    assert found.groupby("part")["present"].sum().sum() == len(df)
    assert pd.concat([p["group_id"].drop_duplicates() for p in parts.values()]).is_unique
    same = partitioning.group_stratified_split(df, list("abcdefg"))
    assert all(parts[name].equals(same[name]) for name in parts)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_class_trains_and_three_groups_of_it_reach_every_part(seed, n_classes, most):
    rng = np.random.default_rng(seed)
    n_groups = rng.integers(1, most + 1, n_classes)
    number = np.repeat(np.arange(n_classes), n_groups)
    group = np.repeat(rng.permutation(len(number)), 2)
    part = partitioning.deal_classes(np.repeat(number, 2), group, np.array([0.7, 0.15, 0.15]), seed)
    reached = pd.Series(part[group]).groupby(np.repeat(number, 2)).agg(set)
    for own, n in zip(reached, n_groups):
        assert 0 in own
        assert n < 3 or own == {0, 1, 2}


def test_counts_of_classes_are_those_of_their_columns():
    names = pd.Series(["a", "b", None, "a", "b", "b"])
    df = pd.DataFrame({"class": names})
    part = pd.Series(["train", "train", "train", "test", "test", "test"])
    wide = partitioning.label_cells(df, ["a", "b", "c"])
    found = partitioning.label_counts(part, df, ["a", "b", "c"])
    columns = ["present", "absent"]
    expected = partitioning.label_counts(part, wide, ["a", "b", "c"])[columns]
    pd.testing.assert_frame_equal(found[columns], expected, check_dtype=False)


def test_halves_of_two_classes_are_refused():
    table = pd.DataFrame({"image": ["x_left.jpg", "x_right.jpg", "y_left.jpg"]})
    table["class"] = ["a", None, "b"]
    assert du.combine_halves(table)["class"].tolist() == ["a", "b"]
    table["class"] = ["a", "b", "b"]
    with pytest.raises(ValueError, match="x: halves of one panorama are of two classes"):
        du.combine_halves(table)


def test_halves_combined_keep_the_column_to_group_by():
    table = pd.DataFrame({"image": ["x_left.jpg", "x_right.jpg"], "site": ["fen", "fen"]})
    found = du.combine_halves(table.assign(**{"class": ["a", "a"]}))
    assert found.to_dict("list") == {"image": ["x"], "site": ["fen"], "class": ["a"]}


def test_folders_of_a_disk_are_no_classes(tmp_path):
    for name in ("a", "b", "@eaDir"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.jpg")
    assert du.read_class_folders(tmp_path).attrs["classes"] == ["a", "b"]
