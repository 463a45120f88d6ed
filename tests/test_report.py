"""The one-page report of a run."""

import base64
import io
import re
from dataclasses import asdict

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

LABELS = ["tree", "<b>grass</b>", "never"]
SWIN = {"window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose test part shares a panorama and a file with the training part."""
    folder = tmp_path_factory.mktemp("project")
    rng, tables = np.random.default_rng(0), {}
    for part, names in {
        "train": ["P_left", "Q_left", "R_left"],
        "val": ["S_left"],
        "test": ["P_right", "copy", "T_left", "U_left"],
    }.items():
        rows = []
        for number, name in enumerate(names):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.png")
            site = f"site {number % 2}/{part}"
            rows.append([folder / f"{name}.png", site, number % 2, [0, 1, np.nan][number % 3], 0])
        tables[part] = pd.DataFrame(rows, columns=["image_path", "group_id", *LABELS])
        du.write_partition(tables[part], folder / "partitions" / f"{part}_partition.csv")
    (folder / "copy.png").write_bytes((folder / "Q_left.png").read_bytes())
    model = du.build_model("swinv2_tiny_window8_256", 3, pretrained=False, img_size=32, **SWIN)
    du.Classifier(model, LABELS, [0.5, 0.0, 0.5]).save(folder / "run")
    about = {"model_name": "swinv2_tiny_window8_256", "model_kwargs": SWIN, "img_width": 32}
    config = du.TrainConfig(partition_dir=str(folder / "partitions"), seed=7, **about)
    du._write_json(folder / "run" / "config.json", asdict(config))
    history = {"epoch": [1, 2], "train_loss": [0.7, 0.6], "val_loss": [0.7, 0.65]}
    history |= {"val_mAP": [0.5, 0.75], "seconds": [60.0, 84.0]}
    pd.DataFrame(history).to_csv(folder / "run" / "history.csv", index=False)
    return folder / "run"


@pytest.fixture(scope="module")
def page(run_dir):
    return du.write_report(run_dir).read_text(encoding="utf-8")


def cells(page, row):
    """Return the cells of the line of a table that begins with `row`, of each table."""
    lines = re.findall(rf"<th>{re.escape(row)}</th>(.*?)</tr>", page, re.S)
    return [re.findall(r"<td>(.*?)</td>", line) for line in lines]


def test_report_is_one_page_that_needs_no_other_file(run_dir, page):
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "best_classifier.json", "config.json", "history.csv", "model.safetensors", "report.html"
    ]  # fmt: skip
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|url\(|<script|@import", page)
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(pictures) == 3  # curves, reliability, mistakes
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).width > 300


def test_report_counts_photos_unknown_cells_and_leaks(page):
    assert "In two parts: 0 groups, 1 equal files, 1 panoramas" in page
    assert cells(page, "train")[0] == ["3", "2", "3"]
    assert cells(page, "test")[0] == ["4", "2", "4"]
    assert cells(page, "tree")[0] == ["1", "2", "0", "0", "1", "0", "2", "2", "0"]


def test_texts_are_escaped(page):
    assert "<b>" not in page
    counted, scored = cells(page, "&lt;b&gt;grass&lt;/b&gt;")
    assert counted == ["1", "1", "1", "0", "1", "0", "1", "2", "1"]
    assert scored[:3] == ["1", "2", "1"]


def test_label_that_is_never_present_is_too_few_to_judge_and_has_no_ap(page):
    assert "Too few to judge: never." in page
    assert cells(page, "never")[1][3:5] == ["0", "–"]  # groups that show it, AP


def test_training_is_described_with_its_time_seed_versions_and_settings(page):
    assert "2 epochs in 2.4 minutes, seed 7. Python 3." in page
    assert f"torch {du.torch.__version__}" in page
    assert cells(page, "img_width")[0][0] == "32"


def test_sites_are_scored_apart(page):
    assert [cells(page, f"site {i}")[0][0] for i in (0, 1)] == ["2", "2"]


def test_site_of_several_groups_has_an_interval_and_one_of_a_single_group_none():
    table = pd.DataFrame({"image_path": [f"{i}.jpg" for i in range(8)]})
    table["group_id"] = ["a/1", "a/1", "a/2", "a/2", "a/3", "a/3", "b/1", "b/1"]
    table["tree"] = [1, 0, 1, 0, 1, 0, 1, 0]
    probs = np.array([0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.6, 0.4])[:, None]
    part = du.DataPartition(table, ["tree"])
    by_site = du._report_scores(part, probs, 0.5, 0)[-1]
    assert by_site["photos"].tolist() == [6, 2]
    # ranked: 1, 1, 0, 1, 0, 0
    assert by_site["mAP"].tolist() == pytest.approx([(1 + 1 + 3 / 4) / 3, 1])
    low, high = by_site.loc["a", ["mAP low", "mAP high"]]
    assert (low, high) == pytest.approx((0.5, 1))  # group 3 three times, and without it
    assert by_site.loc["b", ["mAP low", "mAP high"]].isna().all()


def test_report_of_classes_counts_them_and_takes_the_most_probable(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "partitions"
    for part, classes in {"train": ["sea", "land"], "val": ["sea"], "test": ["land", ""]}.items():
        paths = [tmp_path / f"{part}{i}.png" for i in range(len(classes))]
        for path in paths:
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        groups = [f"{part}/{i}" for i in range(len(paths))]
        table = pd.DataFrame({"image_path": paths, "group_id": groups, "class": classes})
        path = folder / f"{part}_partition.csv"
        du.write_partition(table.replace("", None), path, ["sea", "land"])
    torch.manual_seed(0)
    model = du.build_model("test_resnet", 2, pretrained=False, img_size=64)  # 2 × 2 cells
    du.Classifier(model, ["sea", "land"], activation="softmax").save(tmp_path / "run")
    about = {"model_name": "test_resnet", "img_width": 64, "loss": "ce"}
    config = du.TrainConfig(partition_dir=str(folder), **about)
    du._write_json(tmp_path / "run" / "config.json", asdict(config))
    history = pd.DataFrame({"epoch": [1], "train_loss": 0.7, "val_loss": 0.7, "val_top1": 0.5})
    history.assign(seconds=60.0).to_csv(tmp_path / "run" / "history.csv", index=False)
    page = du.write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert cells(page, "sea")[0] == ["1", "1", "0"]
    assert cells(page, "land")[0] == ["1", "0", "1"]
    assert "top-1" in page


def test_run_without_its_files_is_named(run_dir, tmp_path):
    for name in ("config.json", "best_classifier.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"history\.csv: .*run training\.ipynb"):
        du.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
