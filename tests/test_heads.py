"""CSRA and ML-Decoder against their papers' formulas in plain loops; where each head looks."""

import copy
import json
import math
import pickle
import re
import shutil
from dataclasses import replace

import data_utils as du
import demo_360

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

TINY_SWIN = {"window_size": 4, "embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
BACKBONES = {  # name, input size, timm arguments, grid of positions
    "SwinV2 (NHWC)": ("swinv2_tiny_window8_256", 64, TINY_SWIN, (2, 2)),
    "SwinV2 2:1": ("swinv2_tiny_window8_256", (64, 128), TINY_SWIN, (2, 4)),
    "ConvNeXt (NCHW, norm in the head)": ("test_convnext", 96, {}, (3, 3)),
    "ResNet (NCHW)": ("test_resnet", 96, {}, (3, 3)),
    "EfficientNet (NCHW)": ("test_efficientnet", 96, {}, (3, 3)),
    "ViT (tokens)": ("test_vit", 96, {}, (6, 6)),
    "ViT 2:1 (tokens)": ("test_vit", (32, 64), {}, (2, 4)),
}
HEAD_KWARGS = {
    "linear": {},
    "csra": {"heads": 4, "lam": 0.5},
    "mldecoder": {"decoder_embedding": 16, "dim_feedforward": 24, "num_of_groups": 2},
}
NEW_HEADS = ["csra", "mldecoder"]
TEMPERATURES = {1: [1], 2: [1, 99], 4: [1, 2, 4, 99], 6: [1, 2, 3, 4, 5, 99]}
TEMPERATURES[8] = [1, 2, 3, 4, 5, 6, 7, 99]


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def feature_maps(batch=2, channels=6, height=2, width=3):
    return seeded(lambda: torch.randn(batch, channels, height, width, dtype=torch.float64))


def as_tokens(features):
    """Return (B, C, h, w) as (B, N, C)."""
    return features.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------- CSRA


def softmax(values):
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def csra_by_hand(weight, features, temperatures, lam):
    """Return logits and mean attention of the paper's equations, in plain loops.

    weight (heads, L, C) and features (B, C, H, W) as nested lists.
    """
    logits, attentions = [], []
    for image in features:
        positions = [
            [image[c][y][x] for c in range(len(image))]
            for y in range(len(image[0]))
            for x in range(len(image[0][0]))
        ]
        logits.append([])
        attentions.append([])
        for label in range(len(weight[0])):
            logit, looked = 0.0, [0.0] * len(positions)
            for head, temperature in enumerate(temperatures):
                w = weight[head][label]
                norm = math.sqrt(sum(v * v for v in w))
                scores = [sum(a * b for a, b in zip(w, p)) / norm for p in positions]
                mean = sum(scores) / len(scores)
                if temperature == 99:
                    attended = max(scores)
                    attention = [float(s == attended) for s in scores]
                else:
                    attention = softmax([temperature * s for s in scores])
                    attended = sum(a * s for a, s in zip(attention, scores))
                logit += mean + lam * attended
                looked = [a + b / len(temperatures) for a, b in zip(looked, attention)]
            logits[-1].append(logit)
            attentions[-1].append(looked)
    return torch.tensor(logits), torch.tensor(attentions)


@pytest.mark.parametrize("heads", TEMPERATURES)
@pytest.mark.parametrize("lam", [0.0, 0.1, 1.7])
def test_csra_is_the_formula_of_the_paper(heads, lam):
    head = seeded(lambda: du.CSRA(6, 3, heads=heads, lam=lam)).double()
    features = feature_maps()
    logits, attention = csra_by_hand(
        head.weight.tolist(), features.tolist(), TEMPERATURES[heads], lam
    )
    torch.testing.assert_close(head(features).float(), logits)
    torch.testing.assert_close(head.attention(features).float(), attention)
    assert (head(features) - logits.double()).abs().max() < 1e-6


def test_csra_is_exact_on_numbers_worked_out_by_hand():
    head = du.CSRA(2, 1, heads=2, lam=0.5).double()
    head.weight.data = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]], dtype=torch.float64)
    features = torch.tensor([[[[5.0, 0.0]], [[0.0, 10.0]]]], dtype=torch.float64)  # (1, 2, 1, 2)
    # head 1: scores 3 and 8, mean 5.5, attention e^3 : e^8; head 2: scores 0 and 10, maximum 10
    share = 1 / (1 + math.exp(-5))
    expected = 5.5 + 0.5 * (3 * (1 - share) + 8 * share) + 5 + 0.5 * 10
    assert head(features).item() == pytest.approx(expected, abs=1e-12)
    assert head.attention(features)[0, 0].tolist() == pytest.approx(
        [(1 - share) / 2, (share + 1) / 2]
    )


def test_csra_without_attention_is_a_mean_and_a_huge_temperature_the_maximum():
    features = feature_maps()
    plain = seeded(lambda: du.CSRA(6, 3, lam=0.0)).double()
    weight = nn.functional.normalize(plain.weight[0], dim=-1)
    torch.testing.assert_close(plain(features), features.mean((2, 3)) @ weight.T)


def test_csra_takes_the_published_weights():
    rng = torch.Generator().manual_seed(0)
    published = {
        f"multi_head.{i}.head.weight": torch.randn(5, 6, 1, 1, generator=rng) for i in range(4)
    }
    head = du.CSRA(6, 5, heads=4)
    head.load_state_dict(dict(published))
    for i in range(4):
        assert torch.equal(head.weight[i], published[f"multi_head.{i}.head.weight"][..., 0, 0])
    again = du.CSRA(6, 5, heads=4)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.weight, head.weight)


def test_published_weights_load_below_a_prefix_and_refuse_another_number_of_heads():
    weight = torch.randn(5, 6, 1, 1)
    model = nn.ModuleDict({"classifier": du.CSRA(6, 5, heads=1)})
    model.load_state_dict({"classifier.multi_head.0.head.weight": weight})
    assert torch.equal(model["classifier"].weight[0], weight[..., 0, 0])
    with pytest.raises(RuntimeError, match="multi_head.1.head.weight|size mismatch"):
        du.CSRA(6, 5, heads=1).load_state_dict(
            {f"multi_head.{i}.head.weight": weight for i in range(2)}
        )
    with pytest.raises(RuntimeError, match="size mismatch"):
        du.CSRA(6, 5, heads=2).load_state_dict({"multi_head.0.head.weight": weight})


# ---------------------------------------------------------------- ML-Decoder


def matvec(weight, x, bias):
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)]


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [w * (v - mean) / math.sqrt(variance + 1e-5) + b for v, w, b in zip(x, weight, bias)]


def mldecoder_by_hand(state, tokens, num_labels, heads=8):
    """Return logits (L) and attention (L, N) of one image, as the authors' code computes them."""
    s = {key.removeprefix("decoder."): value.tolist() for key, value in state.items()}
    layer = {k.removeprefix("layers.0."): v for k, v in s.items() if k.startswith("layers.0.")}
    memory = [
        [max(v, 0) for v in matvec(s["embed_standart.weight"], x, s["embed_standart.bias"])]
        for x in tokens
    ]
    width = len(memory[0])
    each = width // heads
    w_in, b_in = layer["multihead_attn.in_proj_weight"], layer["multihead_attn.in_proj_bias"]
    parts = [slice(i * width, (i + 1) * width) for i in range(3)]
    logits, attentions = [], []
    for query, pooling in zip(s["query_embed.weight"], s["duplicate_pooling"]):
        x = layer_norm([2 * q for q in query], layer["norm1.weight"], layer["norm1.bias"])
        q = matvec(w_in[parts[0]], x, b_in[parts[0]])
        keys = [matvec(w_in[parts[1]], m, b_in[parts[1]]) for m in memory]
        values = [matvec(w_in[parts[2]], m, b_in[parts[2]]) for m in memory]
        found, looked = [], [0.0] * len(memory)
        for h in range(heads):
            cut = slice(h * each, (h + 1) * each)
            dots = [sum(a * b for a, b in zip(q[cut], k[cut])) / math.sqrt(each) for k in keys]
            attention = softmax(dots)
            found += [sum(a * v[cut][i] for a, v in zip(attention, values)) for i in range(each)]
            looked = [a + b / heads for a, b in zip(looked, attention)]
        out = matvec(
            layer["multihead_attn.out_proj.weight"], found, layer["multihead_attn.out_proj.bias"]
        )
        x = layer_norm([a + b for a, b in zip(x, out)], layer["norm2.weight"], layer["norm2.bias"])
        hidden = [max(v, 0) for v in matvec(layer["linear1.weight"], x, layer["linear1.bias"])]
        out = matvec(layer["linear2.weight"], hidden, layer["linear2.bias"])
        x = layer_norm([a + b for a, b in zip(x, out)], layer["norm3.weight"], layer["norm3.bias"])
        for j in range(len(pooling[0])):
            logits.append(sum(v * row[j] for v, row in zip(x, pooling)))
            attentions.append(looked)
    bias = s["duplicate_pooling_bias"]
    logits = [a + b for a, b in zip(logits[:num_labels], bias)]
    return torch.tensor(logits), torch.tensor(attentions[:num_labels])


def random_decoder(num_labels, groups, **kwargs):
    """Return a decoder in float64 whose every weight is random, biases and norms too."""
    options = {"decoder_embedding": 16, "dim_feedforward": 12, **kwargs}
    head = seeded(lambda: du.MLDecoder(6, num_labels, groups, **options)).double().eval()
    for parameter in head.parameters():
        parameter.data = torch.randn_like(parameter)
    return head


@pytest.mark.parametrize(
    ("num_labels", "groups"), [(1, None), (3, None), (3, 1), (5, 2), (7, 3), (7, 7), (9, 4)]
)
def test_mldecoder_is_the_formula_of_the_paper(num_labels, groups):
    head = random_decoder(num_labels, groups)
    features = feature_maps()
    tokens = as_tokens(features)
    logits, attention = head(features), head.attention(features)
    assert logits.shape == (2, num_labels)
    for image in range(2):
        expected = mldecoder_by_hand(head.state_dict(), tokens[image].tolist(), num_labels)
        torch.testing.assert_close(logits[image].float(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(attention[image].float(), expected[1], rtol=1e-5, atol=1e-6)


def test_number_of_queries_is_the_paper_s():
    assert du.MLDecoder(4, 250).decoder.query_embed.weight.shape == (100, 768)
    assert du.MLDecoder(4, 250).decoder.duplicate_pooling.shape == (100, 768, 3)
    assert du.MLDecoder(4, 8).decoder.query_embed.weight.shape == (8, 768)
    assert du.MLDecoder(4, 8, 3).decoder.duplicate_pooling.shape == (3, 768, 3)


def test_queries_are_fixed_and_everything_else_learns():
    head = random_decoder(5, 5)
    head(feature_maps()).square().sum().backward()
    fixed = [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert fixed == ["decoder.query_embed.weight"]
    assert all(p.grad.abs().max() > 0 for p in head.parameters() if p.grad is not None)


def test_mldecoder_has_the_keys_and_shapes_of_published_weights():
    shapes = {key: tuple(value.shape) for key, value in du.MLDecoder(20, 250).state_dict().items()}
    layer = "decoder.layers.0."
    assert shapes == {
        "decoder.embed_standart.weight": (768, 20),
        "decoder.embed_standart.bias": (768,),
        "decoder.query_embed.weight": (100, 768),
        f"{layer}multihead_attn.in_proj_weight": (2304, 768),
        f"{layer}multihead_attn.in_proj_bias": (2304,),
        f"{layer}multihead_attn.out_proj.weight": (768, 768),
        f"{layer}multihead_attn.out_proj.bias": (768,),
        **{f"{layer}norm{i}.{kind}": (768,) for i in (1, 2, 3) for kind in ("weight", "bias")},
        f"{layer}linear1.weight": (2048, 768),
        f"{layer}linear1.bias": (2048,),
        f"{layer}linear2.weight": (768, 2048),
        f"{layer}linear2.bias": (768,),
        "decoder.duplicate_pooling": (100, 768, 3),
        "decoder.duplicate_pooling_bias": (250,),
    }


def test_mldecoder_takes_published_weights_and_gives_their_logits():
    source = random_decoder(7, 3)
    published = {key: value.clone() for key, value in source.state_dict().items()}
    head = du.MLDecoder(6, 7, 3, decoder_embedding=16, dim_feedforward=12).double().eval()
    head.load_state_dict(published)
    features = feature_maps()
    assert torch.equal(head(features), source(features))


def test_dropout_is_active_in_training_only():
    head = random_decoder(3, None, dropout=0.5)
    features = feature_maps()
    assert torch.equal(head(features), head(features))
    head.train()
    assert not torch.equal(head(features), head(features))


# ---------------------------------------------------------------- both: layouts, types, gradients


def make_head(name, **kwargs):
    options = HEAD_KWARGS[name] | kwargs
    return seeded(lambda: du.HEADS[name](6, 3, **options)).eval()


@pytest.mark.parametrize("name", NEW_HEADS)
@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 2, 6), (2, 4, 6)])
def test_head_takes_nothing_but_a_map_with_its_channels(name, shape):
    found = re.escape(str(shape))
    with pytest.raises(ValueError, match=rf"features {found}: a head needs a map \(B, 6, h, w\)"):
        make_head(name)(torch.zeros(shape))


class Layout:
    """What a timm model tells about its features."""

    def __init__(self, output_fmt="NCHW", num_prefix_tokens=0):
        self.output_fmt, self.num_prefix_tokens = output_fmt, num_prefix_tokens


def test_features_of_every_layout_become_the_same_map():
    features = feature_maps(height=2, width=4)
    tokens = as_tokens(features)
    with_tokens = torch.cat([torch.full((2, 2, 6), 100.0), tokens], dim=1)
    layouts = [(Layout(), features), (Layout("NHWC"), features.permute(0, 2, 3, 1))]
    layouts += [(Layout(), tokens), (Layout(num_prefix_tokens=2), with_tokens)]
    layouts += [(Layout(), with_tokens), (nn.Identity(), with_tokens[:, 1:])]  # undeclared tokens
    for layout, given in layouts:
        assert torch.equal(du.feature_map(layout, given, (64, 128)), features)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1, 1), (2, 7, 6), (2, 1, 6)])
def test_features_that_are_no_map_are_refused(shape):
    with pytest.raises(ValueError, match="pooled features or tokens without a grid"):
        du.feature_map(Layout(), torch.zeros(shape), (64, 128))


@pytest.mark.parametrize("name", NEW_HEADS)
def test_gradients_are_those_of_the_function(name):
    head = make_head(name).double()
    assert torch.autograd.gradcheck(head, (feature_maps(batch=1).requires_grad_(),))


@pytest.mark.parametrize("name", NEW_HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_type_of_the_features_is_the_type_of_the_logits(name, dtype):
    features = feature_maps()
    head = make_head(name)
    exact = head.double()(features)
    logits = copy.deepcopy(head).to(dtype)(features.to(dtype))
    assert logits.dtype == dtype
    assert (logits.double() - exact).abs().max() < {8: 1e-12, 4: 1e-5, 2: 0.1}[dtype.itemsize]


@pytest.mark.parametrize("name", NEW_HEADS)
def test_autocast_to_bf16_stays_close(name):
    features = feature_maps().float()
    head = make_head(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert (logits.float() - head(features)).abs().max() < 0.05


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("name", NEW_HEADS)
@pytest.mark.parametrize("num_labels", [1, 5])
def test_compiled_head_in_channels_last_gives_the_same(name, num_labels):
    options = HEAD_KWARGS[name] | ({"num_of_groups": None} if name == "mldecoder" else {})
    head = seeded(lambda: du.HEADS[name](6, num_labels, **options)).eval()
    features = feature_maps().float().contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(head, fullgraph=True)
    torch.testing.assert_close(compiled(features), head(features))


@pytest.mark.parametrize("head", NEW_HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_heads_stand_on_every_kind_of_backbone(head, backbone):
    name, size, kwargs, grid = BACKBONES[backbone]
    model = seeded(
        lambda: du.build_model(
            name, 3, head, pretrained=False, img_size=size, **HEAD_KWARGS[head], **kwargs
        )
    )
    assert model.training
    images = torch.randn(2, *model.data_config["input_size"])
    logits = model(images)
    assert logits.shape == (2, 3)
    (logits * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().max() > 0
    with torch.inference_mode():
        maps = du._label_maps(model.eval(), images, 1)
    assert maps.shape == (2, *grid)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))
    pickle.loads(pickle.dumps(model)).load_state_dict(model.state_dict())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_heads_change_nothing_in_the_backbone(backbone):
    name, size, kwargs, _ = BACKBONES[backbone]

    def build(head):
        options = {**HEAD_KWARGS[head], **kwargs, "pretrained": False, "img_size": size}
        return seeded(lambda: du.build_model(name, 3, head, **options))

    linear = build("linear").state_dict()
    for head in NEW_HEADS:
        backbone = build(head).backbone.state_dict()
        assert backbone
        assert all(torch.equal(linear[key], value) for key, value in backbone.items())


@pytest.mark.parametrize("head", HEAD_KWARGS)
def test_one_batch_can_be_learnt_by_heart(head):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 64, 64)
    targets = torch.randint(0, 2, (8, 3)).float()
    model = du.build_model(
        "test_resnet", 3, head, pretrained=False, img_size=64, **HEAD_KWARGS[head]
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = nn.functional.binary_cross_entropy_with_logits(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.3
    assert losses[-1] < 0.02


def test_model_of_a_users_own_trains_all_its_parameters(tmp_path):
    model = nn.Module()
    model.backbone, model.head = nn.Linear(4, 4), nn.Linear(4, 2)
    groups = du._parameter_groups(model, du.TrainConfig())
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_token_grid_is_found_behind_an_undeclared_class_token():
    model = du.build_model("volo_d1_224", 2, "csra", pretrained=False)
    assert getattr(model.backbone, "num_prefix_tokens", 0) == 0
    with torch.inference_mode():
        assert du._label_maps(model.eval(), torch.zeros(1, 3, 224, 224), 0).shape == (1, 14, 14)


def test_feature_map_of_one_position_is_refused():
    with pytest.raises(ValueError, match="form no map of two or more positions"):
        du.build_model("test_resnet", 2, "csra", pretrained=False, img_size=32)


class MeanHead(nn.Module):
    """A head of a user's own: a linear layer on the mean position."""

    frozen_rate = 1e-2

    def __init__(self, num_features, num_labels, scale=1):
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_labels, num_features), scale / 9))
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def forward(self, features):
        return features.mean((2, 3)) @ self.weight.T + self.bias

    def attention(self, features):
        return torch.einsum("bchw,lc->blhw", features, self.weight).flatten(2)


def test_head_of_a_users_own_is_one_class_and_one_name(monkeypatch, tmp_path):
    monkeypatch.setitem(du.HEADS, "mean", MeanHead)
    options = {"pretrained": False, "img_size": 64, "head_bias": [-1.0, 0.0, 1.0], "scale": 2}
    model = du.build_model("test_resnet", 3, "mean", **options).eval()
    assert model.head.bias.tolist() == [-1, 0, 1]
    assert model.spec["head_kwargs"] == {"scale": 2}
    images = torch.ones(1, 3, 64, 64)
    logits, maps = model(images), du._label_maps(model, images, 1)
    assert maps.mean().item() == pytest.approx(logits[0, 1].item(), abs=1e-5)
    path = du.Classifier(model, ["a", "b", "c"], [0.5] * 3).save(tmp_path)
    torch.testing.assert_close(du.Classifier.load(path).model(images), logits)


def test_building_a_head_leaves_a_backbone_that_can_be_trained():
    model = du.build_model("convit_tiny", 2, "csra", pretrained=False, img_size=224, depth=1)
    model(torch.zeros(1, 3, 224, 224)).sum().backward()


def test_backbone_that_only_gives_pooled_features_is_refused():
    with pytest.raises(ValueError, match="gives no feature map for head='csra'.*pooled features"):
        du.build_model(
            "deit_tiny_distilled_patch16_224", 3, "csra", pretrained=False, img_size=32, depth=1
        )


# ---------------------------------------------------------------- options


def build_resnet(head, num_labels=3, **kwargs):
    return du.build_model("test_resnet", num_labels, head, pretrained=False, img_size=64, **kwargs)


@pytest.mark.parametrize(
    ("head", "kwargs", "message"),
    [
        ("csra", {"lam": -0.1}, "lam=-0.1: the weight of the attention must be 0 or more"),
        ("csra", {"lam": float("nan")}, "lam=nan"),
        ("csra", {"heads": 3}, "heads=3: expected 1 or 2 or 4 or 6 or 8"),
        ("mldecoder", {"num_of_groups": 4}, "num_of_groups=4: expected 1 to 3, the number of lab"),
        ("mldecoder", {"num_of_groups": 0}, "num_of_groups=0: expected 1 to 3"),
        ("mldecoder", {"decoder_embedding": 20}, "decoder_embedding=20: expected a multiple of 8"),
        ("lstm", {}, "head='lstm': expected 'linear' or 'csra' or 'mldecoder'"),
    ],
)
def test_wrong_option_is_named_in_one_sentence(head, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_resnet(head, **kwargs)


def test_options_of_the_head_and_of_timm_part_ways():
    model = build_resnet("csra", heads=2, lam=0.3, drop_rate=0.2)
    assert model.spec["head_kwargs"] == {"heads": 2, "lam": 0.3}
    assert model.spec["model_kwargs"] == {"drop_rate": 0.2}
    assert (model.head.lam, len(model.head.weight)) == (0.3, 2)
    with pytest.raises(ValueError, match="the linear head has no option lam"):
        build_resnet("linear", lam=0.3)


# ---------------------------------------------------------------- the learning rate of the head


class Photos(torch.utils.data.Dataset):
    """Random pictures with the interface of DataPartition."""

    label_columns, exclusive = ("a", "b", "c"), False

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = torch.from_numpy(rng.normal(size=(8, 3, 64, 64)).astype(np.float32))
        self.targets = np.array([[1, 0, 1], [0, 1, 0]] * 4, np.float32)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], torch.from_numpy(self.targets[index])


@pytest.mark.parametrize("head", HEAD_KWARGS)
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_head_has_its_own_learning_rate_through_the_schedule(tmp_path, head, layer_decay):
    model = build_resnet(head, **HEAD_KWARGS[head])
    config = du.TrainConfig(
        epochs=3, batch_size=4, learning_rate=1e-3, head_learning_rate=7e-3,
        layer_decay=layer_decay, warmup_epochs=1,
    )  # fmt: skip
    trainer = du.Trainer(model, Photos(), Photos(), config, tmp_path)
    trainer.scheduler.step_update(2)  # the end of the warm-up
    own = {id(p) for p in model.get_classifier().parameters()}
    rates = {True: set(), False: set()}
    decays = {}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            rates[id(p) in own].add(round(group["lr"], 9))
            decays[id(p)] = group["weight_decay"]
    peak = 1e-3 * (1 + math.cos(math.pi * 2 / 6)) / 2  # timm's cosine runs from step 0
    assert rates[True] == {round(7 * peak, 9)}
    assert max(rates[False]) <= round(peak, 9)
    assert (len(rates[False]) == 1) == (layer_decay is None)
    learnt = {id(p): p for p in model.parameters() if p.requires_grad}
    assert decays.keys() == learnt.keys()  # each once, and none left out
    assert all((decays[key] == 0) == (p.ndim <= 1) for key, p in learnt.items())


def test_rate_of_the_head_must_be_positive():
    with pytest.raises(ValueError, match="head_learning_rate=0"):
        du.TrainConfig(head_learning_rate=0)


# ---------------------------------------------------------------- saved, loaded, explained


def noise(seed, width=64, height=64):
    pixels = np.random.default_rng(seed).integers(60, 120, (height, width, 3), dtype=np.uint8)
    return pixels


def see_colours(backbone):
    """Set a tiny ViT by hand: each position tells how red and how blue its own patch is.

    Attention and feed-forward add nothing, so positions do not mix, whatever the rounding. A
    feature is about +20 where the colour is and -4 where it is not.
    """
    with torch.no_grad():
        backbone.pos_embed.zero_()
        for block in backbone.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        patches = backbone.patch_embed.proj
        patches.weight.zero_()
        patches.bias.zero_()
        n_pixels = patches.weight[0, 0].numel()
        patches.weight[0, 0], patches.weight[0, 1:] = 1 / n_pixels, -0.5 / n_pixels
        patches.weight[1, 2], patches.weight[1, :2] = 1 / n_pixels, -0.5 / n_pixels
        patches.bias[2] = 10  # keeps the layer norm from blowing up what is nearly nothing
        norm = backbone.norm if isinstance(backbone.norm, nn.LayerNorm) else backbone.fc_norm
        width = len(norm.weight)
        norm.weight.fill_(20)
        zero = -(10 / width) / (100 / width - (10 / width) ** 2) ** 0.5  # what 0 becomes
        norm.bias.fill_(-4 - 20 * zero)


def ask_for_red_and_blue(head):
    """Set a head by hand: label 0 is the first feature, label 1 the second."""
    with torch.no_grad():
        if isinstance(head, nn.Linear):
            head.weight.copy_(torch.eye(*head.weight.shape))
            head.bias.zero_()
        elif isinstance(head, du.CSRA):
            head.weight[:] = torch.eye(*head.weight.shape[1:])
        else:  # in each of the 8 attention heads the triple (red, blue, nothing)
            decoder, attention = head.decoder, head.decoder.layers[0].multihead_attn
            for parameter in head.parameters():
                if parameter.ndim > 1:
                    parameter.zero_()
            decoder.embed_standart.bias.zero_()
            for i in range(24):
                if i % 3 < 2:
                    decoder.embed_standart.weight[i, i % 3] = 1
            decoder.query_embed.weight[0] = torch.tensor([1.0, -1.0, 0.0] * 8)
            decoder.query_embed.weight[1] = torch.tensor([-1.0, 1.0, 0.0] * 8)
            attention.in_proj_weight.copy_(torch.eye(24).repeat(3, 1))
            attention.out_proj.weight.copy_(torch.eye(24))
            decoder.duplicate_pooling[:, 2::3] = -1
            decoder.duplicate_pooling_bias.fill_(-3)


@pytest.fixture(scope="module", params=HEAD_KWARGS)
def finder(request):
    """A classifier set by hand that sees red and blue squares; nothing in it is trained."""
    options = {"class_token": False, "global_pool": "avg", "img_size": 128}
    if request.param == "mldecoder":
        options |= {"decoder_embedding": 24, "dim_feedforward": 8}
    model = du.build_model("test_vit", 2, request.param, pretrained=False, **options)
    see_colours(getattr(model, "backbone", model))
    ask_for_red_and_blue(model.get_classifier())
    return du.Classifier(model, ["red", "blue"], [0.5, 0.5])


def hottest(heat_map):
    return np.unravel_index(heat_map.argmax(), heat_map.shape)


@pytest.mark.parametrize("corner", [(0, 0), (32, 96), (96, 32), (64, 64)])
def test_map_points_at_a_planted_patch(finder, corner):
    y, x = corner
    pixels = noise(5, 128, 128)
    pixels[y : y + 32, x : x + 32] = (230, 20, 20)
    heat_map = finder.explain(pixels, "red")
    assert heat_map.shape == (128, 128)
    assert (heat_map.min(), heat_map.max()) == pytest.approx((0, 1), abs=1e-6)
    row, column = hottest(heat_map)
    assert abs(row - (y + 16)) <= 24  # a position is 16 pixels wide, the patch 32
    assert abs(column - (x + 16)) <= 24


def test_each_label_has_its_own_map(finder):
    pixels = noise(6, 128, 128)
    pixels[0:32, 0:32] = (230, 20, 20)
    pixels[96:128, 96:128] = (20, 20, 230)
    assert max(hottest(finder.explain(pixels, "red"))) < 48
    assert min(hottest(finder.explain(pixels, "blue"))) > 80


@pytest.mark.parametrize(("x", "columns"), [(32, (24, 72)), (160, (152, 200))])
def test_map_of_a_panorama_puts_the_halves_together(finder, x, columns):
    pixels = noise(7, 256, 128)
    pixels[64:96, x : x + 32] = (230, 20, 20)
    heat_map = finder.explain(Image.fromarray(pixels), "red", panorama=True)
    assert heat_map.shape == (128, 256)
    assert columns[0] <= hottest(heat_map)[1] < columns[1]
    other = heat_map[:, 128:] if x < 128 else heat_map[:, :128]
    assert other.max() < 0.5  # the half without it stays cool


def test_explain_refuses_what_it_cannot_answer(finder):
    with pytest.raises(ValueError, match="label='green': expected 'red' or 'blue'"):
        finder.explain(noise(0), "green")
    with pytest.raises(OSError, match="no 2:1 panorama"):
        finder.explain(noise(0), "red", panorama=True)


def test_map_of_a_linear_head_adds_up_to_the_logit():
    model = seeded(
        lambda: du.build_model(
            "swinv2_tiny_window8_256", 3, pretrained=False, img_size=64, **TINY_SWIN
        )
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps, logits = du._label_maps(model, images, 2), model(images)[:, 2]
    torch.testing.assert_close(maps.mean((1, 2)), logits)


@pytest.mark.parametrize("head", NEW_HEADS)
def test_classifier_with_a_head_answers_alike_after_loading(tmp_path, head):
    model = seeded(lambda: build_resnet(head, **HEAD_KWARGS[head]))
    classifier = du.Classifier(model, ["a", "b", "c"], [0.5] * 3)
    loaded = du.Classifier.load(classifier.save(tmp_path))
    assert loaded.model.spec == model.spec
    photo = noise(1)
    for label in "abc":
        assert np.array_equal(loaded.explain(photo, label), classifier.explain(photo, label))
    assert loaded.predict(photo).equals(classifier.predict(photo))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["a", "b"], "knows 3 labels, not the 2 wanted"),
        (["a", "c", "b"], "label 2 is 'b', not 'c'"),
    ],
)
def test_checkpoint_with_other_labels_is_refused_in_one_sentence(tmp_path, wanted, message):
    path = du.Classifier(build_resnet("csra"), ["a", "b", "c"], [0.5] * 3).save(tmp_path)
    du.Classifier.load(path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        du.Classifier.load(path, wanted)


def test_overlay_leaves_a_cold_photo_alone_and_colours_the_hot_place():
    photo = np.full((4, 6, 3), 100, np.uint8)
    heat_map = np.zeros((4, 6))
    heat_map[1, 2] = 1
    drawn = du.overlay_heat_map(photo, heat_map, opacity=0.5)
    assert drawn.shape == (4, 6, 3)
    yellow = np.array([0.940015, 0.975158, 0.131326])  # the upper end of matplotlib's plasma
    assert drawn[1, 2].tolist() == np.rint(50 + 127.5 * yellow).tolist()
    drawn[1, 2] = 100
    assert (drawn == 100).all()


# ---------------------------------------------------------------- features, speed


def test_head_on_stored_features_gives_the_logits_of_the_whole_model():
    for name in ("test_resnet", "test_vit"):
        model = seeded(
            lambda name=name: du.build_model(name, 3, "csra", pretrained=False, img_size=64)
        )
        photos = Photos()
        features = du.extract_features(model, photos, du.TrainConfig(batch_size=3))
        assert features.shape[1] == model.head.weight.shape[-1]
        with torch.inference_mode():
            expected = model.eval()(photos.images)
        stored = du.FeatureSet(features, photos.targets, photos.label_columns)
        assert len(stored) == 8
        logits = torch.stack([model.head(stored[i][0][None])[0] for i in range(8)])
        torch.testing.assert_close(logits, expected, atol=2e-2, rtol=0)
        assert stored[3][1].tolist() == [0, 1, 0]
        model.head(stored[0][0][None]).sum().backward()
        assert model.head.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="8 features and 7 rows"):
        du.FeatureSet(features, photos.targets[:7], photos.label_columns)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "convnext_atto"])
def test_last_layer_on_pooled_features_gives_the_logits_of_the_whole_model(name):
    photos = Photos()
    model = seeded(lambda: du.build_model(name, 3, pretrained=False, img_size=64)).eval()
    with torch.inference_mode():
        expected = model(photos.images)
    pooled = du.extract_features(model, photos, du.TrainConfig(batch_size=3), pooled=True)
    assert pooled.shape == (8, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_of_a_linear_model_are_maps_that_any_head_takes(backbone):
    name, size, kwargs, grid = BACKBONES[backbone]
    model = du.build_model(name, 3, pretrained=False, img_size=size, **kwargs).eval()
    photos = Photos()
    photos.images = torch.randn(3, *model.data_config["input_size"])
    features = du.extract_features(model, photos, du.TrainConfig(batch_size=2))
    assert features.shape == (3, model.num_features, *grid)
    pooled = du.extract_features(model, photos, du.TrainConfig(batch_size=2), pooled=True)
    if backbone.startswith("SwinV2"):
        torch.testing.assert_close(features.mean((2, 3)), pooled, atol=2e-2, rtol=0)
    assert du.CSRA(model.num_features, 3)(features).shape == (3, 3)


def test_pooled_features_of_a_head_that_does_not_pool_are_refused():
    with pytest.raises(ValueError, match="a model with a linear head"):
        du.extract_features(build_resnet("csra"), Photos(), pooled=True)


def test_throughput_counts_parameters_and_sets_the_first_model_to_one(notebook_functions):
    models = {head: build_resnet(head, **HEAD_KWARGS[head]) for head in HEAD_KWARGS}
    measure = notebook_functions("mldecoder").measure_throughput
    table = measure(models, batch_size=2, repeats=1)
    assert list(table.index) == ["linear", "csra", "mldecoder"]
    counted = [sum(p.numel() for p in m.parameters()) / 1e6 for m in models.values()]
    assert table["parameters"].tolist() == counted
    assert table["relative"].iloc[0] == 1
    assert (table["images_per_second"] > 0).all()


# ---------------------------------------------------------------- two heads side by side


TINY_VIT = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def build_with(head="linear", **changes):
    config = du.TrainConfig(model_name="vit_tiny_patch16_224", model_kwargs=TINY_VIT, img_width=32)
    config = replace(config, **changes)
    options = config.model_kwargs | {"drop_rate": config.drop_rate}
    model = du.build_model(config.model_name, 3, head, False, config.img_size, **options)
    return config, model


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"drop_rate": 0.5}, ["drop_rate", "model_kwargs"]),
        ({"img_width": 64}, ["img_width", "img_size", "input_size"]),
        ({"model_name": "vit_small_patch16_224"}, ["model_name"]),
        ({"model_kwargs": {**TINY_VIT, "depth": 2}}, ["model_kwargs"]),
        ({"learning_rate": 0.1, "min_crop": 0.3}, ["learning_rate", "min_crop"]),
        ({"pretrained": True}, ["pretrained"]),
    ],
)
def test_everything_that_two_runs_do_not_share_is_named(changes, names):
    config, model = build_with("csra", **changes)
    found = du.differing_settings(config, model, *build_with())
    assert {*found.index} == {"head", *names}
    assert found.loc["head"].tolist() == ["csra", "linear"]


def test_loaded_baseline_differs_in_nothing_from_the_model_that_was_saved(tmp_path):
    config, model = build_with()
    path = du.Classifier(model, ["a", "b", "c"], [0.5] * 3).save(tmp_path)
    loaded = du.Classifier.load(path).model
    assert du.differing_settings(config, model, config, loaded).empty


def test_options_of_a_head_are_named_too():
    config, _ = build_with()
    options = {"lam": 0.3, "img_size": 32, **TINY_VIT}
    model = du.build_model(config.model_name, 3, "csra", False, drop_rate=0.0, **options)
    found = du.differing_settings(config, model, *build_with())
    assert found.loc["head_kwargs", "here"] == "{'lam': 0.3}"


def comparison(**rows):
    columns = ["baseline", "AP", "difference", "low", "high"]
    return pd.DataFrame({k: [0.5, 0.5 + v[0], *v] for k, v in rows.items()}, columns).T


@pytest.mark.parametrize(
    ("total", "start"),
    [
        ((0.05, 0.01, 0.09), "CSRA is ahead"),
        ((-0.05, -0.09, -0.01), "the linear head is ahead"),
        ((0.05, -0.01, 0.09), "neither head is ahead"),
    ],
)
def test_comparison_is_told_with_its_interval_and_what_got_worse(total, start):
    rows = {"Sun": (0.1, 0, 0.2), "Reed": (-0.05, -0.1, 0.02)}  # both may be luck
    table = comparison(**rows, Tree=(-0.064, -0.194, -0.007), mAP=total)
    text = du.describe_comparison(table, "CSRA")
    interval = "mAP {:+.3f} ({:+.3f} to {:+.3f}).".format(*total)
    assert text.startswith(f"{start} on this test part, one seed: {interval}")
    worse = "Worse, interval below zero: Tree -0.064 (-0.194 to -0.007)."
    assert f"{worse}\nBetter, interval above zero: none." in text
    assert "Worse, interval below zero: none." in du.describe_comparison(table.drop("Tree"), "CSRA")


def test_demo_knows_which_cells_show_a_label(notebook_functions, tmp_path):
    """The pointing game of csra.ipynb redraws a photo of the demo."""
    nb = notebook_functions("csra")
    nb.config, nb.grid = du.TrainConfig(img_width=64), (4, 4)
    survey = demo_360.plan_survey(0, 1, 3)  # the fourth to sixth photo
    ids = demo_360.draw_panorama(survey, 2, 128)[1][:, 64:]
    for label in ("Grass", "Sun", "Hills"):
        shown = ids == demo_360.LABELS.index(label) + 1
        cells = [[shown[y : y + 16, x : x + 16].mean() >= 0.1 for x in range(0, 64, 16)]
                 for y in range(0, 64, 16)]  # fmt: skip
        found = nb.cells_with("a/IMG_20240503_115659_0005_right.jpg", label)
        assert found.tolist() == cells
    assert nb.cells_with("a/IMG_20240503_115659_0005_right.jpg", "Grass").any()


def test_two_classifiers_are_compared_on_the_same_photos(tmp_path):
    rows = []
    for i in range(6):
        Image.fromarray(noise(i)).save(tmp_path / f"{i}.png")
        rows.append([str(tmp_path / f"{i}.png"), str(i), i % 2, 1, 0])
    names = ["a", "b", "c"]
    table = pd.DataFrame(rows, columns=["image_path", "group_id", *names])
    config, model = build_with("csra")
    one, other = (du.Classifier(m, names, [0.5] * 3) for m in (model, build_with()[1]))
    part = du.DataPartition(table, names, one.transform)
    found, probs = du.compare_classifiers(one, other, part, config)
    assert np.allclose(probs, one.predict(part.paths)[["a_prob", "b_prob", "c_prob"]])
    expected = du.score_labels(part.targets, probs, names)["AP"]
    assert found.loc["a", "AP"] == pytest.approx(expected["a"])
    figure = du.plot_label_maps({"one": one, "other": other}, [(part.paths[0], "a")] * 2)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == f"one\na ({probs[0, 0]:.2f})"
    assert titles[2].startswith("other\na (0.")
    picture = figure.axes[0].images[0].get_array()
    heat_map = one.explain(part.paths[0], "a")
    assert picture.shape[:2] == (64, 64)  # the photo's own pixels
    assert len(np.unique(heat_map)) <= 4  # 2 × 2 cells, drawn as cells


def test_finished_run_is_the_saved_classifier_with_its_thresholds(tmp_path):
    rows = []
    for i in range(8):
        Image.fromarray(noise(i)).save(tmp_path / f"{i}.png")
        rows.append([str(tmp_path / f"{i}.png"), str(i), i % 2, i // 2 % 2, 1])
    names = ["a", "b", "c"]
    table = pd.DataFrame(rows, columns=["image_path", "group_id", *names])
    config, model = build_with(epochs=1, flip_test=True)
    part = du.DataPartition(table, names, du.make_transforms(model, False))
    trainer = du.Trainer(model, part, part, config, tmp_path / "run")
    trainer.fit()
    classifier = du.finish_run(trainer)
    assert classifier.flip
    probs = classifier.predict(part.paths)[["a_prob", "b_prob", "c_prob"]].to_numpy()
    raw = trainer.predict(part, flip=True)
    assert np.allclose(probs, classifier.calibrate(raw), atol=0.02)
    saved = json.loads((tmp_path / "run/best_classifier.json").read_text())
    assert saved["thresholds"] == classifier.thresholds.tolist()
    assert "mAP" in saved["validation"]


def test_stored_features_are_a_data_set_for_heads(tmp_path):
    config, model = build_with(batch_size=3)
    part = Photos()
    part.images = part.images[:, :, :32, :32]
    stored = du.store_features(model, part, config)
    assert stored.features.shape == (8, 24, 2, 2)
    assert np.array_equal(stored.targets, part.targets)
