"""SimMIM against its formula, and what else pretraining.ipynb defines."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torch import nn

import data_utils as du
import demo_360

SWIN_V2 = ("swinv2_tiny_window8_256", {"window_size": 4, "embed_dim": 12, "depths": (2, 2)})
SWIN_V2[1]["num_heads"] = (2, 2)
SWIN = ("swin_tiny_patch4_window7_224", {**SWIN_V2[1]})
VIT = ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2})
BACKBONES = {
    "swinv2": SWIN_V2,
    "swin": SWIN,
    "vit": VIT,
    "vit with registers": ("vit_small_patch16_dinov3", {**VIT[1], "num_heads": 2}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "resnet": ("resnet10t", {}),
    "efficientnet": ("tf_efficientnet_lite0", {}),
    "pvt": ("pvt_v2_b0", {}),
}


@pytest.fixture(scope="module")
def nb(notebook_functions):
    return notebook_functions("pretraining")


def backbone_of(kind, size=(32, 64)):
    name, options = BACKBONES[kind]
    torch.manual_seed(0)
    return du.build_model(name, 0, pretrained=False, img_size=size, **options)


@pytest.fixture(params=BACKBONES)
def model(request, nb):
    torch.manual_seed(1)
    return nb.SimMIM(backbone_of(request.param, (64, 128)), 32, 0.6)


IMAGES = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- the model


def test_every_backbone_gives_a_picture_and_hides_what_it_says(model):
    assert model.grid == (2, 4)
    assert model.n_hidden == 5  # 0.6 × 8 = 4.8, rounded up
    mask = model.draw_mask(2)
    assert mask.flatten(1).sum(1).tolist() == [5, 5]
    assert model.reconstruct(IMAGES, mask).shape == IMAGES.shape


def test_guess_does_not_depend_on_hidden_pixels_but_on_visible_ones(model):
    """Also where the kernels of the stem overlap."""
    model.eval()
    mask = torch.zeros(2, 2, 4, dtype=torch.bool)
    mask[:, 0, 1] = mask[:, 1, 2] = True
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    with torch.no_grad():
        guess = model.reconstruct(IMAGES, mask)
        torch.testing.assert_close(model.reconstruct(IMAGES + 9 * hidden, mask), guess)
        assert (model.reconstruct(IMAGES + 9 * ~hidden, mask) - guess).abs().max() > 1e-4


def test_mask_token_and_backbone_learn_and_the_token_reaches_the_guess(model):
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # SwinV2 starts with 0: each position by itself
            nn.init.ones_(module.weight)
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]]).expand(2, 2, 4)
    model(IMAGES, mask).backward()
    assert model.encoder.mask_token.grad.abs().max() > 0
    assert sum(p.grad.abs().sum() for p in find_stem(model).parameters()) > 0


def find_stem(model):
    backbone = model.encoder.backbone
    stems = ("patch_embed", "stem", "conv_stem", "conv1")
    return next(getattr(backbone, name) for name in stems if hasattr(backbone, name))


def test_loss_is_l1_over_hidden_pixels_and_channels_by_hand(nb):
    model = nb.SimMIM(backbone_of("vit"), 16, 0.5)
    mask = torch.zeros(2, 2, 4, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 1, 3] = mask[1, 1, 0] = True
    images = IMAGES[:, :, :32, :64]
    guess = torch.randn(2, 3, 32, 64)
    model.reconstruct = lambda *_: guess
    total, count = 0.0, 0
    for b, row, column in ((0, 0, 1), (0, 1, 3), (1, 1, 0)):
        for y in range(16 * row, 16 * row + 16):
            for x in range(16 * column, 16 * column + 16):
                for c in range(3):
                    total += abs(guess[b, c, y, x].item() - images[b, c, y, x].item())
                    count += 1
    assert count == 3 * 256 * 3
    assert model(images, mask).item() == pytest.approx(total / count, rel=1e-5)


def test_pixels_that_are_visible_get_no_gradient(nb):
    model = nb.SimMIM(backbone_of("vit"), 16, 0.5)
    guess = torch.zeros(2, 3, 32, 64, requires_grad=True)
    model.reconstruct = lambda *_: guess
    mask = model.draw_mask(2)
    model(IMAGES[:, :, :32, :64] + 5, mask).backward()
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(guess)
    assert (guess.grad[~hidden] == 0).all()
    assert (guess.grad[hidden] != 0).all()


def test_token_stands_exactly_where_the_mask_is(nb):
    """Behind the embedding, before anything else: 4 px patches under squares of 16 px."""
    model = nb.SimMIM(backbone_of("swinv2"), 16, 0.5)
    seen = []
    model.encoder.backbone.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = model.draw_mask(1)
    with torch.no_grad():
        model.encoder.mask_token.fill_(7.0)
        model.reconstruct(IMAGES[:1, :, :32, :64], mask)
    expected = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[0]
    assert torch.equal((seen[0][0] == 7).all(-1), expected)


@pytest.mark.parametrize(("patch", "ratio", "n"), [(32, 0.5, 1), (16, 0.25, 2), (8, 0.6, 20)])
def test_size_and_share_of_the_mask_are_honoured(nb, patch, ratio, n):
    model = nb.SimMIM(backbone_of("swinv2"), patch, ratio)
    torch.manual_seed(0)
    masks = model.draw_mask(400)
    assert masks.shape == (400, 32 // patch, 64 // patch)
    assert (masks.flatten(1).sum(1) == n).all()
    share = n / masks[0].numel()
    assert masks.float().mean(0).sub(share).abs().max() < 0.12  # every square alike
    torch.manual_seed(0)
    assert torch.equal(masks, model.draw_mask(400))
    assert not torch.equal(masks[:200], masks[200:])


def test_defaults_are_those_of_the_paper(nb):
    model = nb.SimMIM(backbone_of("swinv2", (64, 64)))
    assert model.grid == (2, 2)
    assert model.n_hidden == math.ceil(0.6 * 4)


@pytest.mark.parametrize(
    ("kind", "size", "patch", "message"),
    [
        ("vit", (48, 64), 32, "mask squares of 32 px do not divide 48 × 64 px; take an image size"),
        (
            "vit",
            (32, 64),
            8,
            "mask squares of 8 px cut through the 16 px patches .* multiple of 16",
        ),
    ],
)
def test_grid_that_does_not_fit_is_refused_in_a_sentence(nb, kind, size, patch, message):
    with pytest.raises(ValueError, match=message):
        nb.SimMIM(backbone_of(kind, size), patch)


@pytest.mark.parametrize("ratio", [0, 1, 60, -0.5, float("nan")])
def test_share_of_hidden_squares_is_a_share(nb, ratio):
    with pytest.raises(ValueError, match="mask_ratio=.*: expected a share between 0 and 1"):
        nb.SimMIM(backbone_of("vit"), 16, ratio)


def test_size_that_the_stride_of_the_network_does_not_divide_is_refused(nb):
    with pytest.raises(ValueError, match="80 × 80 px are no whole number of the network"):
        nb.SimMIM(backbone_of("resnet", (80, 80)), 16)


def test_backbone_is_not_masked_by_itself_and_can_be_wrapped_again(nb):
    backbone = backbone_of("swinv2")
    images = IMAGES[:, :, :32, :64]
    before = backbone.eval().forward_features(images)
    model = nb.SimMIM(backbone, 16)
    masked = model.encoder(images, model.draw_mask(2))
    assert not torch.allclose(masked, before.movedim(-1, 1))
    assert torch.equal(backbone.forward_features(images), before)
    again = nb.SimMIM(backbone, 16)
    assert again.reconstruct(images, again.draw_mask(2)).shape == images.shape


def test_every_trained_parameter_gets_a_gradient(model):
    """Several processes would wait for one that does not."""
    model(IMAGES).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg11", "VGG has no patch embedding or stem"),
        ("xcit_nano_12_p16_224", "ConvPatchEmbed gives no plain patches"),
    ],
)
def test_model_without_a_stem_is_named(nb, name, message):
    backbone = du.build_model(name, 0, pretrained=False, img_size=64)
    with pytest.raises(ValueError, match=message):
        nb.SimMIM(backbone)


# ---------------------------------------------------------------- training


def draw_photos(folder, n):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        ramp = np.linspace(0, 255, 64)[None, :, None] * rng.random(3)
        path = folder / f"{i}.png"
        Image.fromarray(np.broadcast_to(ramp, (32, 64, 3)).astype(np.uint8)).save(path)
        rows.append(str(path))
    return pd.DataFrame({"image_path": rows})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"), 10)


def simmim_trainer(nb, photos, run_dir, **changes):
    backbone = backbone_of("swinv2")
    torch.manual_seed(0)
    model = nb.SimMIM(backbone, 16)
    transform = du.make_transforms(backbone, True, "panorama")
    plain = du.make_transforms(backbone, False)
    sets = du.DataPartition(photos[:8], [], transform), du.DataPartition(photos[:4], [], plain)
    settings = {"epochs": 4, "batch_size": 4, "learning_rate": 3e-3, "warmup_epochs": 1}
    config = du.TrainConfig(**settings | {"precision": "no"} | changes)
    return nb.SimMIMTrainer(model, *sets, config, run_dir)


def test_unlabelled_photos_train_and_the_lowest_loss_is_kept(nb, photos, tmp_path):
    run = simmim_trainer(nb, photos, tmp_path, epochs=25, learning_rate=1e-2, patience=25)
    history = run.fit()
    assert history["val_loss"].min() < 0.8 * history["val_loss"].iloc[0]
    assert "val_mAP" not in history
    assert run.validate()["val_loss"] == pytest.approx(history["val_loss"].min(), rel=1e-5)


def test_stopped_pretraining_resumes_to_the_same_end(nb, photos, tmp_path):
    whole = simmim_trainer(nb, photos, tmp_path / "whole")
    expected = whole.fit()

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    simmim_trainer(nb, photos, tmp_path / "cut").fit(stop)
    resumed = simmim_trainer(nb, photos, tmp_path / "cut")
    history = resumed.resume()
    columns = ["epoch", "step", "learning_rate", "train_loss", "val_loss"]
    pd.testing.assert_frame_equal(history[columns], expected[columns], check_exact=True)
    for one, other in zip(resumed.plain.parameters(), whole.plain.parameters()):
        assert torch.equal(one, other)


def test_names_without_decay_really_get_none(nb, photos, tmp_path):
    run = simmim_trainer(nb, photos, tmp_path, weight_decay=0.1)
    named = run.plain.no_weight_decay()
    decay = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    parameters = dict(run.plain.named_parameters())
    assert named <= parameters.keys()
    assert {n for n in named if n.endswith("logit_scale")}
    assert {n for n in named if n.endswith("cpb_mlp.0.weight")}
    assert "encoder.mask_token" in named
    for name, parameter in parameters.items():
        expected = 0.0 if name in named or parameter.ndim <= 1 else 0.1
        assert decay[id(parameter)] == expected, name


# ---------------------------------------------------------------- the rest of the notebook


def test_lenet_has_the_parameters_of_the_paper_but_for_three_colours(nb):
    counts = [3 * 6 * 25 + 6, 6 * 16 * 25 + 16, 400 * 120 + 120, 120 * 84 + 84, 84 * 10 + 10]
    assert sum(p.numel() for p in nb.lenet(10).parameters()) == sum(counts) == 62_006


def test_alexnet_is_that_of_torchvision(nb):
    torch.manual_seed(0)
    reference, own = torchvision.models.alexnet().eval(), nb.alexnet().eval()
    pairs = list(zip(own.parameters(), reference.parameters(), strict=True))
    for mine, theirs in pairs:
        mine.data.copy_(theirs.data)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(own(image), reference(image))


def test_teaching_networks_are_built_and_loaded_by_name(nb, tmp_path):
    assert nb.lenet is not None  # importing the notebook registered both
    for name, options in (("lenet", {}), ("alexnet", {"hidden": 8})):
        model = du.build_model(name, 4, pretrained=False, img_size=64, **options)
        classifier = du.Classifier(model, list("abcd"), activation="softmax")
        loaded = du.Classifier.load(classifier.save(tmp_path))
        picture = np.zeros((64, 64, 3), np.uint8)
        pd.testing.assert_frame_equal(loaded.predict(picture), classifier.predict(picture))


class Slope(nn.Module):
    """Loss = (w - 1)²: falls while the rate is below 1, explodes above."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(x)


def fake_trainer(nb, factor):
    class Fake:
        def __init__(self):
            self.model = Slope()
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

        loader = [(torch.ones(4, 1), torch.ones(4, 1))] * 2

        class accelerator:  # noqa: N801
            @staticmethod
            def backward(loss):
                loss.backward()

        def training_loss(self, images, targets):
            return factor * (self.model(images) - targets).square().mean()

    return Fake()


def test_learning_rate_finder_stops_at_the_explosion_and_suggests_the_steepest_fall(nb):
    """Gradient descent on f·w² with curvature 2 f is stable below the rate 1 / f."""
    for factor in (1.0, 10.0):
        table, suggestion = nb.find_learning_rate(fake_trainer(nb, factor), 1e-4, 1e3, 100)
        assert table["rate"].iloc[0] == pytest.approx(1e-4)
        assert np.ptp(np.diff(np.log(table["rate"]))) < 1e-9
        assert len(table) < 100
        assert table["loss"].iloc[-1] >= 3 * table["loss"].iloc[0]
        assert 0.005 / factor < suggestion < 1 / factor


def test_learning_rate_finder_says_where_nothing_falls(nb):
    with pytest.raises(ValueError, match="the loss fell at no rate; search between other rates"):
        nb.find_learning_rate(fake_trainer(nb, 1.0), 10.0, 1e3, 30)


def test_learning_rate_finder_stands_noise(nb):
    """Noise of 5 % of the loss on every batch; nineteen in twenty suggestions must be usable."""
    rng, suggestions = np.random.default_rng(0), []
    for _ in range(40):
        trainer = fake_trainer(nb, 1.0)
        clean = trainer.training_loss
        trainer.training_loss = lambda *batch: clean(*batch) + 0.05 * rng.normal()  # noqa: B023
        suggestions.append(nb.find_learning_rate(trainer, 1e-4, 1e3, 60)[1])
    assert np.quantile(suggestions, 0.05) > 1e-3
    assert np.quantile(suggestions, 0.95) < 1


def test_learning_rate_finder_scales_layers_by_their_share(nb):
    trainer = fake_trainer(nb, 1.0)
    trainer.optimizer.param_groups[0]["lr_scale"] = 0.5
    nb.find_learning_rate(trainer, 1e-3, 1e-1, 30)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_submission_has_a_line_a_photo(nb, tmp_path):
    path = tmp_path / "out" / "submission.csv"
    nb.write_submission(path, ["a/1.jpg", "b/2.JPEG"], ["sea, open", "bog"])
    assert path.read_text() == 'id,label\n1,"sea, open"\n2,bog\n'
    with pytest.raises(ValueError, match=r"submission\.csv: 'b/1\.jpg' twice; leave one out"):
        nb.write_submission(path, ["b/1.jpg", "b/1.jpg"], ["sea", "bog"])
    assert len(pd.read_csv(path)) == 2  # the old one stands
    nb.write_submission(path, ["a/1.jpg", "b/1.jpg"], ["sea", "bog"])  # a name twice
    assert pd.read_csv(path)["id"].tolist() == ["a/1.jpg", "b/1.jpg"]


def test_demo_class_folders_sort_by_what_is_seen_and_keep_two_days_for_validation(nb, tmp_path):
    rows = []
    for number, site in enumerate(("Heron Marsh", "Willow Fen")):
        for day in range(1, 11):
            photo = tmp_path / "halves" / site / f"Day {day}" / f"{site}{day}_left.jpg"
            photo.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(photo)
            rows.append({"image": photo.name, "site": site, "day": day})
            rows[-1] |= {"Trees": number, "Water": day % 2}
    folder, truth = tmp_path / "classes", pd.DataFrame(rows)
    nb.draw_class_folders(folder, tmp_path / "halves", truth)
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    assert len(found) == 20
    days = [path.split("/")[2].split()[-1] for path in found if path.startswith("val/")]
    assert sorted(days) == ["4", "4", "9", "9"]
    names = dict(line.split(" ", 1) for line in (folder / "names.txt").read_text().splitlines())
    assert len(set(names.values())) == 8
    for path in found:
        _, wnid, place, _ = path.split("/")
        number, day = int(place.startswith("Willow")), int(place.split()[-1])
        sunny = demo_360.plan_survey(number, day - 1, 1).weather.sunny
        ground = (("open land", "open water"), ("wooded land", "wooded shore"))[number][day % 2]
        assert names[wnid] == f"{ground} {'sunny' if sunny else 'overcast'}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes", "halves"]


def test_class_folders_too_shallow_for_their_groups_are_refused(nb, monkeypatch):
    monkeypatch.setattr(nb, "CLASS_GROUP_BY", 1)
    with pytest.raises(ValueError, match=r"a\.jpg does not lie in 1 folders below its class; set"):
        nb.group_of("train/w01/a.jpg")


@pytest.mark.parametrize(
    ("group_by", "image", "group"),
    [
        (1, "train/w01/Mere 4/a_left.jpg", "Mere 4"),
        (2, "val/w02/Mere/4/a.jpg", "Mere/4"),
        (1, "train/w02/Mere 4/a_right.jpg", "Mere 4"),  # of another class
    ],
)
def test_class_folders_are_grouped_across_classes(nb, monkeypatch, group_by, image, group):
    monkeypatch.setattr(nb, "CLASS_GROUP_BY", group_by)
    assert nb.group_of(image) == group


def test_photo_is_held_back_with_its_walk_or_as_a_panorama(nb, monkeypatch, tmp_path):
    monkeypatch.setattr(nb, "PANORAMA_DIR", str(tmp_path))
    places = nb.places_of(tmp_path / "Mere" / "Day 2" / "a_left.jpg")
    assert places == {"Mere/Day 2/a", "Mere/Day 2", "Mere", "."}


TWO_PROCESSES = """
import json, os, sys
job = json.loads(sys.argv[1])
sys.path[:0] = [job["root"], job["root"] + "/tests"]
import pandas as pd
from conftest import load_notebook_functions
import test_pretraining as t
nb = load_notebook_functions("pretraining")
run = t.simmim_trainer(nb, pd.DataFrame({"image_path": job["photos"]}), job["dir"], batch_size=2)
run.fit()
assert run.accelerator.num_processes == 2
path = job["dir"] + f"/rank{run.accelerator.process_index}.json"
with open(path, "w") as file:
    json.dump({"loss": run.validate()["val_loss"], "rows": len(run.history)}, file)
run.accelerator.wait_for_everyone()
run.accelerator.end_training()
os._exit(0)  # threads of torch may abort while the interpreter is taken down
"""


def test_two_processes_pretrain_one_network(photos, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    run_dir = tmp_path / "run"
    job = {"root": str(ROOT), "dir": str(run_dir), "photos": photos["image_path"].tolist()}
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command = [sys.executable, "-m", *launcher, json.dumps(job)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]  # the same weights, the same masks
    history = pd.read_csv(run_dir / "history.csv")
    assert history["step"].tolist() == [2, 4, 6, 8]  # 8 photos, 2 × 2 at once
    assert history["val_loss"].min() == pytest.approx(ranks[0]["loss"], rel=1e-5)
