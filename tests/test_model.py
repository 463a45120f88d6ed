"""Backbones of every kind, their input sizes, and weights from files and the hub."""

import json
import os
import pickle
import re

import data_utils as du

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

TINY_SWIN = {"window_size": 4, "embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
SWIN = "swinv2_tiny_window8_256"
BACKBONES = {
    "SwinV2": (SWIN, 64, TINY_SWIN),
    "SwinV2 2:1": (SWIN, (64, 128), TINY_SWIN),
    "ConvNeXt": ("convnext_atto", 64, {}),
    "ResNet": ("resnet10t", 64, {}),
    "EfficientNet-Lite": ("tf_efficientnet_lite0", 64, {}),
    "ViT": ("vit_tiny_patch16_224", 64, {"depth": 2}),
    "ViT 2:1": ("vit_tiny_patch16_224", (32, 64), {"depth": 2}),
}


@pytest.fixture(scope="module", params=BACKBONES)
def built(request):
    name, img_size, kwargs = BACKBONES[request.param]
    torch.manual_seed(0)
    model = du.build_model(name, 3, pretrained=False, img_size=img_size, **kwargs)
    size = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    return model, name, tuple(size)


def test_logits_have_one_column_a_label_and_gradients_reach_the_first_layer(built):
    model, _, size = built
    torch.manual_seed(0)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()
    model.zero_grad()
    (logits * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 3
    assert first.weight.grad.abs().max() > 0
    model.zero_grad()


def test_model_tells_how_to_prepare_its_pictures(built):
    model, name, size = built
    assert model.data_config["input_size"] == (3, *size)
    imagenet = not name.startswith(("tf_", "vit_"))  # these two were trained on -1..1
    assert model.data_config["mean"] == ((0.485, 0.456, 0.406) if imagenet else (0.5, 0.5, 0.5))
    assert model.data_config["std"] == ((0.229, 0.224, 0.225) if imagenet else (0.5, 0.5, 0.5))
    assert model.data_config["interpolation"] == "bicubic"


def test_model_keeps_what_it_takes_to_build_it_again(built):
    model, name, size = built
    spec = dict(model.spec)
    assert (spec["model_name"], spec["head"], spec["num_labels"]) == (name, "linear", 3)
    assert spec["img_size"] == list(size)
    keys = ("num_labels", "head", "img_size")
    again = du.build_model(
        name, pretrained=False, **{k: spec[k] for k in keys}, **spec["model_kwargs"]
    )
    again.load_state_dict(model.state_dict())


def test_seed_decides_the_random_weights():
    def weights(seed):
        torch.manual_seed(seed)
        model = du.build_model(SWIN, 2, pretrained=False, img_size=64, **TINY_SWIN)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_size_none_is_the_size_of_the_model_itself():
    assert du.build_model("resnet10t", 2, pretrained=False).spec["img_size"] == [176, 176]


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        (SWIN, {"img_size": 64, **TINY_SWIN}, False),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, False),
        ("convnext_atto", {"img_size": 64}, True),
        ("resnet10t", {"img_size": 64}, True),
        ("tf_efficientnet_lite0", {"img_size": 64}, True),
    ],
)
def test_channels_last_is_chosen_for_convolutional_backbones_only(name, kwargs, expected):
    model = du.build_model(name, 2, pretrained=False, **kwargs)
    assert du.gains_by_channels_last(model) is expected


# ---------------------------------------------------------------- weights from a file


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(1)
    return du.build_model("resnet10t", 7, pretrained=False, img_size=32)


@pytest.fixture(scope="module")
def weight_file(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "seven.pt"
    torch.save(source.state_dict(), path)
    return path


def backbone_weights(model):
    return {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}


def assert_same_backbone(model, source):
    wanted, found = backbone_weights(source), backbone_weights(model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("as_text", [True, False])
def test_weight_file_fills_the_backbone_and_leaves_a_new_head(weight_file, source, as_text):
    torch.manual_seed(2)
    path = str(weight_file) if as_text else weight_file
    model = du.build_model("resnet10t", 3, pretrained=path, img_size=32)
    assert_same_backbone(model, source)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert model.fc.weight.abs().max() > 0


def test_weight_file_with_the_same_number_of_labels_fills_the_head_too(weight_file, source):
    torch.manual_seed(2)
    model = du.build_model("resnet10t", 7, pretrained=weight_file, img_size=32)
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_safetensors_file_is_read(tmp_path, source):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    assert_same_backbone(du.build_model("resnet10t", 2, pretrained=path, img_size=32), source)


def test_training_checkpoint_that_wraps_a_state_dict_is_read(tmp_path, source):
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    model = du.build_model("resnet10t", 2, pretrained=tmp_path / "wrapped.pth", img_size=32)
    assert_same_backbone(model, source)


def test_swin_weights_move_to_another_input_size_and_window(tmp_path):
    torch.manual_seed(1)
    small = du.build_model(SWIN, 4, pretrained=False, img_size=64, **TINY_SWIN)
    torch.save(small.state_dict(), tmp_path / "swin.pt")
    kwargs = TINY_SWIN | {"window_size": 8}
    wide = du.build_model(SWIN, 2, pretrained=tmp_path / "swin.pt", img_size=(256, 512), **kwargs)
    for name, weight in small.named_parameters():
        if not name.startswith("head."):
            assert torch.equal(wide.get_parameter(name), weight), name


def test_vit_position_embedding_is_resampled_to_another_input_size(tmp_path):
    torch.manual_seed(1)
    small = du.build_model("vit_tiny_patch16_224", 4, pretrained=False, img_size=64, depth=1)
    small.pos_embed.data = torch.ones_like(small.pos_embed) * torch.arange(192.0)
    torch.save(small.state_dict(), tmp_path / "vit.pt")
    wide = du.build_model(
        "vit_tiny_patch16_224", 2, pretrained=tmp_path / "vit.pt", img_size=(64, 128), depth=1
    )
    assert wide.pos_embed.shape == (1, 1 + 4 * 8, 192)
    torch.testing.assert_close(wide.pos_embed[0, 5], torch.arange(192.0), atol=1e-3, rtol=1e-3)


class Attack:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".tar"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, source, writer, suffix):
    content = {**source.state_dict(), "extra": Attack(tmp_path / "pwned")}
    path = tmp_path / f"evil{suffix}"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=rf"evil{re.escape(suffix)}: not a state dict"):
        du.build_model("resnet10t", 2, pretrained=path, img_size=32)
    assert not (tmp_path / "pwned").exists()


def test_attack_is_a_real_one(tmp_path):
    """The test above would be worth nothing if its pickle were harmless."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


def test_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: not a state dict"):
        du.build_model("resnet10t", 2, pretrained=tmp_path / "model.pt", img_size=32)


@pytest.mark.parametrize("content", [[1, 2, 3], torch.zeros(3), 5, {"epoch": 3}, {}, {1: 2}])
def test_file_without_weights_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt"):
        du.build_model("resnet10t", 2, pretrained=tmp_path / "odd.pt", img_size=32)


@pytest.mark.parametrize("content", [b"", b"not weights", bytes(200)])
def test_broken_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pt: not a state dict"):
        du.build_model("resnet10t", 2, pretrained=tmp_path / "broken.pt", img_size=32)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", SWIN, "resnet18"])
def test_weights_of_another_model_are_refused_with_the_names_of_both(weight_file, name):
    kwargs = TINY_SWIN if name == SWIN else {}
    with pytest.raises(ValueError, match=rf"seven\.pt: .*{name}"):
        du.build_model(name, 2, pretrained=weight_file, img_size=64, **kwargs)


def test_incomplete_weights_are_refused_by_key(tmp_path, source):
    state = source.state_dict()
    del state["layer3.0.conv1.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ weights.*layer3\.0\.conv1\.weight"):
        du.build_model("resnet10t", 2, pretrained=tmp_path / "part.pt", img_size=32)


@pytest.mark.parametrize("name", ["gone.pt", "gone.safetensors", "."])
def test_missing_weight_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}.*PRETRAINED"):
        du.build_model("resnet10t", 2, pretrained=tmp_path / name, img_size=32)


def test_weights_file_of_numpy_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "flax.npz", kernel=np.zeros(3))
    with pytest.raises(ValueError, match=r"flax\.npz"):
        du.build_model("vit_tiny_patch16_224", 2, pretrained=tmp_path / "flax.npz", img_size=64)


# ---------------------------------------------------------------- weights of pretraining

PRETRAINED = {
    "swinv2": (SWIN, {"window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)}),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
}
PRETRAINED["swin"] = ("swin_tiny_patch4_window7_224", PRETRAINED["swinv2"][1])


def save(backbone, path, windows=None):
    """Write weights as pretraining.ipynb does, in plain tensors and a JSON beside them."""
    safetensors.torch.save_file(backbone.state_dict(), path)
    note = {"img_size": backbone.spec["img_size"]} | (
        {"pretrained_window_sizes": windows} if windows else {}
    )
    path.with_suffix(".json").write_text(json.dumps(note))


def saved_backbone(kind, folder, size=(32, 64), windows=None):
    torch.manual_seed(0)
    name, options = PRETRAINED[kind]
    backbone = du.build_model(name, 0, pretrained=False, img_size=size, **options)
    save(backbone, folder / "pretrained.safetensors", windows)
    return backbone, folder / "pretrained.safetensors"


def test_position_tables_are_resized_for_another_window_and_size(tmp_path):
    backbone, path = saved_backbone("swin", tmp_path)
    name, options = PRETRAINED["swin"]
    larger = {**options, "window_size": 8}
    model = du.build_model(name, 3, pretrained=path, img_size=(64, 128), **larger)
    table = model.layers[0].blocks[0].attn.relative_position_bias_table
    assert len(table) == 15**2  # from 7²
    old = backbone.layers[0].blocks[0].attn.relative_position_bias_table
    assert table[112].tolist() == pytest.approx(old[24].tolist(), abs=1e-6)  # no offset: the centre


def test_position_embedding_of_wide_images_is_resized(tmp_path):
    backbone, path = saved_backbone("vit", tmp_path)
    name, options = PRETRAINED["vit"]
    model = du.build_model(name, 3, pretrained=path, img_size=(64, 128), **options)
    assert backbone.pos_embed.shape[1] == 1 + 2 * 4
    assert model.pos_embed.shape[1] == 1 + 4 * 8
    old, new = backbone.pos_embed[0, 1:].view(2, 4, -1), model.pos_embed[0, 1:].view(4, 8, -1)
    with torch.no_grad():  # rows stay rows: far corners stay alike
        for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            same = torch.cosine_similarity(old[row, column], new[row, column], dim=0)
            assert same > 0.9


def offset_bias(model):
    """Return the bias of every offset of the first block's window, (2w-1, 2w-1, heads)."""
    attention = model.layers[0].blocks[0].attn
    with torch.no_grad():
        return attention.cpb_mlp(attention.relative_coords_table)[0]


def test_window_of_pretraining_is_known_to_the_saved_classifier(tmp_path):
    _, path = saved_backbone("swinv2", tmp_path, windows=[[4, 4], [4, 4], [0, 0], [0, 0]])
    name, options = PRETRAINED["swinv2"]
    options = {**options, "window_size": 8}
    model = du.build_model(name, 2, "csra", pretrained=path, img_size=64, **options)
    assert model.spec["model_kwargs"]["pretrained_window_sizes"][:2] == [[4, 4], [4, 4]]
    classifier = du.Classifier(model, ["a", "b"], [0.5, 0.5])
    loaded = du.Classifier.load(classifier.save(tmp_path / "run"))
    torch.testing.assert_close(offset_bias(loaded.model.backbone), offset_bias(model.backbone))


def test_file_with_fewer_stages_is_refused_in_a_sentence(tmp_path):
    _, path = saved_backbone("swinv2", tmp_path, windows=[[4, 4], [4, 4], [0, 0], [0, 0]])
    more = {**PRETRAINED["swinv2"][1], "depths": (2, 2, 2), "num_heads": (2, 2, 2)}
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ weights of swinv2_tiny_window8_256"):
        du.build_model(SWIN, 2, pretrained=path, img_size=64, **more)


def test_windows_that_are_not_square_and_windows_that_are_given(tmp_path):
    windows = [[4, 4], [2, 4], [0, 0], [0, 0]]
    backbone, path = saved_backbone("swinv2", tmp_path, (16, 32), windows)  # maps 4 × 8, 2 × 4
    assert [m.window_size for m in backbone.modules() if hasattr(m, "cpb_mlp")][2:] == [(2, 4)] * 2
    name, options = PRETRAINED["swinv2"]
    model = du.build_model(name, 2, pretrained=path, img_size=64, **options)
    assert model.spec["model_kwargs"]["pretrained_window_sizes"] == windows
    table = model.layers[1].blocks[0].attn.relative_coords_table[0]  # (2h - 1, 2w - 1, 2)
    furthest = np.log2(8 * 3 / np.array([1, 3]) + 1) / 3  # 3 px of windows of 2 and 4
    assert table[-1, -1].tolist() == pytest.approx(furthest.tolist(), rel=1e-5)
    own = {**options, "pretrained_window_sizes": (6, 6)}
    given = du.build_model(name, 2, pretrained=path, img_size=64, **own)
    assert given.spec["model_kwargs"]["pretrained_window_sizes"] == (6, 6)


def test_windows_of_another_architecture_are_of_no_use(tmp_path):
    _, path = saved_backbone("vit", tmp_path, windows=[[4, 4]] * 4)
    name, options = PRETRAINED["vit"]
    model = du.build_model(name, 2, pretrained=path, img_size=(32, 64), **options)
    assert model.spec["model_kwargs"] == options


def test_broken_json_beside_the_weights_is_named(tmp_path):
    _, path = saved_backbone("swinv2", tmp_path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"pretrained\.json: no JSON of pretraining\.ipynb"):
        du.build_model(SWIN, 2, pretrained=path, img_size=64, **PRETRAINED["swinv2"][1])


def test_positions_that_cannot_be_resized_are_named(tmp_path):
    name, options = "hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1, 1, 1), "num_heads": 1}
    backbone = du.build_model(name, 0, pretrained=False, img_size=(64, 128), **options)
    torch.save(backbone.state_dict(), tmp_path / "b.pt")
    with pytest.raises(
        ValueError, match=r"lacks 1 of \d+ weights of hiera_tiny_224 in its shape: pos"
    ):
        du.build_model(name, 3, pretrained=tmp_path / "b.pt", img_size=(128, 256), **options)


# ---------------------------------------------------------------- weights from the hub


def test_unreachable_hub_is_one_sentence_that_names_the_alternatives(monkeypatch, tmp_path):
    """Without a network: huggingface_hub reads its offline switch once, so it is set here too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        du.build_model("resnet10t", 2, pretrained=True, img_size=32)
    message = str(caught.value)
    assert message.startswith("the pretrained weights of resnet10t could not be loaded")
    assert "local weight file" in message
    assert "PRETRAINED = False" in message
    assert len(message) < 500


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("swinv2_bas_window8_256", "swinv2_base_window8_256"),
        ("resnet_50", "resnet50"),
        ("efficientnet-lite0", "efficientnet_lite0"),
    ],
)
def test_unknown_model_suggests_names_that_exist(name, suggested):
    with pytest.raises(ValueError, match=f"no model '{name}'; did you mean .*{suggested}"):
        du.build_model(name, 2, pretrained=False)


def test_name_that_resembles_nothing_is_refused_too():
    with pytest.raises(ValueError, match="no model '###'"):
        du.build_model("###", 2, pretrained=False)


@pytest.mark.parametrize("head", ["mlp", "", None])
def test_unknown_head_lists_the_heads_there_are(head):
    with pytest.raises(ValueError, match=f"head={head!r}: expected .*linear"):
        du.build_model("resnet10t", 2, head=head, pretrained=False)


@pytest.mark.parametrize("img_size", [(64, 70), (50, 90), 33])
def test_size_that_swin_cannot_take_names_the_nearest_ones_and_these_work(img_size):
    with pytest.raises(ValueError, match="cannot take") as caught:
        du.build_model(SWIN, 2, pretrained=False, img_size=img_size, **TINY_SWIN)
    message = str(caught.value)
    asked = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    assert f"{asked[0]} × {asked[1]} px" in message
    sides = message.split("the nearest sizes are ")[1].split(", or pass")[0].split(" × ")
    offers = [[int(number) for number in re.findall(r"\d+", side)] for side in sides]
    assert len(offers) == 2
    for side, offer in zip(asked, offers):
        assert 1 <= len(offer) <= 2
        assert min(abs(number - side) for number in offer) < 32  # patch 4 × stride 8 = 32 px apart
    for size in [(height, width) for height in offers[0] for width in offers[1]]:
        model = du.build_model(SWIN, 2, pretrained=False, img_size=size, **TINY_SWIN)
        assert model(torch.zeros(1, 3, *size)).shape == (1, 2)


@pytest.mark.parametrize("img_size", [(224, 224), (256, 512), (512, 256)])
def test_published_swin_takes_every_size_its_windows_allow(img_size):
    kwargs = {"window_size": 7} if img_size == (224, 224) else {}
    with torch.device("meta"):
        model = du.build_model(SWIN, 2, pretrained=False, img_size=img_size, **kwargs)
    assert model.spec["img_size"] == list(img_size)


@pytest.mark.parametrize("img_size", [70, (64, 65)])
def test_size_that_a_vit_cannot_take_is_refused_with_sizes_that_work(img_size):
    with pytest.raises(ValueError, match=r"nearest sizes are .*64"):
        du.build_model("vit_tiny_patch16_224", 2, pretrained=False, img_size=img_size, depth=1)


@pytest.mark.parametrize("img_size", [None, 224])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 100, "num_heads": 3}),
        ("vit_tiny_patch16_224", {"act_layer": "nope"}),
        ("convnext_atto", {"depths": (1, 1)}),
    ],
)
def test_options_that_do_not_go_together_are_named_whatever_the_size(name, wrong, img_size):
    with pytest.raises(ValueError, match=f"cannot build {name} with .*'{[*wrong][-1]}'"):
        du.build_model(name, 2, pretrained=False, img_size=img_size, **wrong)


def test_patches_that_would_cut_off_pixels_are_refused_at_the_usual_size_too():
    with pytest.raises(ValueError, match="cannot take 224 × 224 px"):
        du.build_model("vit_tiny_patch16_224", 2, pretrained=False, img_size=224, patch_size=100)


@pytest.mark.parametrize("img_size", [-64, (0, 64), (64, -1)])
def test_size_below_one_pixel_is_refused(img_size):
    with pytest.raises(ValueError, match="positive"):
        du.build_model("resnet10t", 2, pretrained=False, img_size=img_size)


@pytest.mark.parametrize("img_size", [(64,), (64, 64, 64), (3, 64, 64)])
def test_size_that_is_no_height_and_width_is_refused(img_size):
    with pytest.raises(ValueError, match="height"):
        du.build_model("resnet10t", 2, pretrained=False, img_size=img_size)


def test_keyword_that_no_model_takes_is_named():
    with pytest.raises((TypeError, ValueError), match="windw_size"):
        du.build_model(SWIN, 2, pretrained=False, img_size=64, windw_size=4)


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0"])
def test_network_takes_the_size_of_its_own_weights(name):
    model = du.build_model(name, 2, pretrained=False, img_size=224, drop_rate=0.1).eval()
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 2)
