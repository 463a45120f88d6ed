"""SimMIM against its formula, and what else pretraining.ipynb defines."""

import json
import math
import os
import subprocess
import sys

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn

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


# ---------------------------------------------------------------- its weights elsewhere


def saved_backbone(nb, kind, folder, size=(32, 64)):
    model = nb.SimMIM(backbone_of(kind, size), 16)
    path = folder / "pretrained.safetensors"
    nb.save_backbone(model.encoder.backbone, path, epochs=3)
    return model.encoder.backbone, path


def windows_in(path):
    """Return what the note beside a weight file says of windows, as an option of timm."""
    note, key = json.loads(path.with_suffix(".json").read_text()), "pretrained_window_sizes"
    return {key: note[key]} if key in note else {}


def test_note_beside_the_weights_names_the_network_and_its_windows(nb, tmp_path):
    _, path = saved_backbone(nb, "swinv2", tmp_path)
    name, options = BACKBONES["swinv2"]
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "model_name": name,
        "model_kwargs": options | {"depths": [2, 2], "num_heads": [2, 2]},
        "img_size": [32, 64],
        "epochs": 3,
        "recipe": "scratch",
        "pretrained_window_sizes": [[4, 4], [4, 4], 0, 0],
    }
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"pretrained.safetensors", "pretrained.json"}


@pytest.mark.parametrize("kind", ["swin", "vit", "convnext", "resnet"])
def test_networks_that_compute_no_positions_have_no_windows_in_their_note(nb, tmp_path, kind):
    assert windows_in(saved_backbone(nb, kind, tmp_path)[1]) == {}


@pytest.mark.parametrize("kind", ["swinv2", "swin", "vit", "convnext"])
@pytest.mark.parametrize("head", ["linear", "csra"])
def test_saved_weights_are_taken_by_build_model(nb, tmp_path, kind, head):
    backbone, path = saved_backbone(nb, kind, tmp_path)
    name, options = BACKBONES[kind]
    model = du.build_model(name, 3, head, pretrained=path, img_size=(32, 64), **options)
    images = IMAGES[:, :, :32, :64]
    features = getattr(model, "backbone", model).eval().forward_features(images)
    backbone.eval()
    torch.testing.assert_close(features, backbone.forward_features(images))


def offset_bias(model):
    """Return the bias of every offset of the first block's window, (2w-1, 2w-1, heads)."""
    attention = model.layers[0].blocks[0].attn
    with torch.no_grad():
        return attention.cpb_mlp(attention.relative_coords_table)[0]


def test_swinv2_computes_the_same_bias_for_the_same_offset_in_a_larger_window(nb, tmp_path):
    backbone, path = saved_backbone(nb, "swinv2", tmp_path, (32, 32))
    name, options = BACKBONES["swinv2"]
    options = {**options, "window_size": 8}
    model = du.build_model(name, 3, pretrained=path, img_size=(64, 64), **options)
    small, large = offset_bias(backbone), offset_bias(model)
    assert small.shape[:2] == (7, 7)
    assert large.shape[:2] == (15, 15)
    torch.testing.assert_close(large[4:-4, 4:-4], small)
    # twice: the file of the larger window still counts from the first
    again = tmp_path / "again.safetensors"
    nb.save_backbone(model, again, epochs=3)
    assert windows_in(again) == windows_in(path)
    model = du.build_model(name, 3, pretrained=again, img_size=64, **options)
    torch.testing.assert_close(offset_bias(model), large)
    # without a note the positions are shares of the new window
    bare = tmp_path / "bare.safetensors"
    save_file(backbone.state_dict(), bare)
    model = du.build_model(name, 3, pretrained=bare, img_size=(64, 64), **options)
    torch.testing.assert_close(offset_bias(model)[::14, ::14], small[::6, ::6])
    assert not torch.allclose(offset_bias(model), large)


def test_windows_that_are_not_square(nb, tmp_path):
    backbone, path = saved_backbone(nb, "swinv2", tmp_path, (16, 32))  # maps of 4 × 8, 2 × 4
    assert [m.window_size for m in backbone.modules() if hasattr(m, "cpb_mlp")][2:] == [(2, 4)] * 2
    assert windows_in(path)["pretrained_window_sizes"] == [[4, 4], [2, 4], 0, 0]


def test_weights_with_two_classifiers_are_loaded_again(nb, tmp_path):
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    name = "deit_tiny_distilled_patch16_224"
    backbone = du.build_model(name, 0, pretrained=False, img_size=32, **options)
    nb.save_backbone(backbone, tmp_path / "b.safetensors", epochs=3)
    model = du.build_model(name, 3, pretrained=tmp_path / "b.safetensors", img_size=32, **options)
    assert torch.equal(model.dist_token, backbone.dist_token)


# ---------------------------------------------------------------- the rest of the notebook


def test_photo_is_held_back_with_its_walk_or_as_a_panorama(nb, monkeypatch, tmp_path):
    monkeypatch.setattr(nb, "PHOTO_DIR", str(tmp_path))
    places = nb.places_of(tmp_path / "Mere" / "Day 2" / "a_left.jpg")
    assert places == {"Mere/Day 2/a", "Mere/Day 2", "Mere", "."}


def test_share_of_the_photos_is_repeated_to_the_same_number_of_steps(nb, photos):
    labels = photos.assign(group_id=range(10), grass=[1.0, 0.0] * 5)
    whole = du.DataPartition(labels, ["grass"])
    few = nb.with_share(whole, 0.3, seed=0)
    assert len(few) == len(whole) == 10
    assert len(set(few.paths)) == 3 and len(few.targets) == len(few.groups) == 10
    for path, target, group in zip(few.paths, few.targets, few.groups):
        row = labels[labels["image_path"] == path].iloc[0]
        assert (target.item(), group) == (row["grass"], row["group_id"])
    assert sorted(nb.with_share(whole, 1.0, seed=0).paths) == sorted(whole.paths)
    assert nb.with_share(whole, 0.3, seed=0).paths == few.paths
    assert whole.paths == labels["image_path"].tolist()


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
