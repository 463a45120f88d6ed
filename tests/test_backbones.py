"""The networks that training.ipynb names: each builds, is probed and fine-tuned at its size."""

import re

import data_utils as du

import nbformat
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image

TEXT = "\n".join(cell.source for cell in nbformat.read(ROOT / "training.ipynb", 4).cells)
LARGE = ("vit_large", "vit_so400m", "eva02_large")  # built with 6 of their blocks, which are alike
NAMED = re.findall(r"`([\w.]+)` \((\d+)[;)]", TEXT.partition("| machine |")[2].partition("\n\n")[0])


def test_three_purses_have_two_or_three_networks_each():
    assert len(NAMED) == len(set(NAMED)) == 9
    families = " ".join(name for name, _ in NAMED)
    assert all(family in families for family in ("swinv2", "dinov3", "siglip", "eva02"))
    assert {name for name, _ in NAMED} <= set(timm.list_pretrained())


@pytest.mark.parametrize(("name", "width"), NAMED)
def test_named_network_is_probed_and_fine_tuned_at_its_size(name, width, tmp_path):
    rows = []
    for i, color in enumerate(["red", "green"]):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{i}.png")
        rows.append([str(tmp_path / f"{i}.png"), str(i), i, 1 - i])
    table = pd.DataFrame(rows, columns=["image_path", "group_id", "green", "red"])
    for part in ("train", "val"):
        own = table.assign(group_id=part + table["group_id"])  # no group in two parts
        du.write_partition(own, tmp_path / f"{part}_partition.csv")
    data = {"partition_dir": str(tmp_path), "model_name": name, "img_width": int(width)}
    data["model_kwargs"] = {"depth": 6} if name.startswith(LARGE) else {}
    short = {"epochs": 1, "batch_size": 2, "precision": "auto"}
    config = du.TrainConfig.recipe(True, 2, **short, **data)
    config.pretrained, config.ema_decay = False, None  # random weights; a copy less in memory
    model, sets = du.build_run(config, names=("train", "val"))
    assert timm.get_pretrained_cfg(name).input_size == (3, int(width), int(width))
    reached = du.start_from_probe(model, sets, config)
    assert 0 < reached <= 1
    before = next(p for n, p in model.named_parameters() if "blocks.0" in n and p.ndim > 1).clone()
    history = du.Trainer(model, sets["train"], sets["val"], config, tmp_path / "run").fit()
    assert history["epoch"].tolist() == [0, 1]
    assert np.isfinite(history["train_loss"][1])
    after = next(p for n, p in model.named_parameters() if "blocks.0" in n and p.ndim > 1)
    assert history["val_mAP"].idxmax() == 0 or not torch.equal(before, after)
