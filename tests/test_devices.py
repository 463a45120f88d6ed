"""Every tensor on one device: models, losses and mixing on a GPU that is only pretended.

Fake tensors have shapes, types and devices, but no numbers, and need no GPU; an operation on
tensors of two devices raises, as it would on a real one.
"""

import copy

import data_utils as du

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

SWIN = {"patch_size": 8, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
BACKBONES = {
    "swinv2_tiny_window8_256": SWIN,
    "resnet10t": {},
    "vit_tiny_patch16_224": {"depth": 1},
    "convnext_atto": {},
}


def on_gpu(module, mode):
    """Return a copy of a real module as `module.to("cuda")` would leave it."""
    module = copy.deepcopy(module)
    with mode:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = mode.from_tensor(tensor).detach().to("cuda")
                        is_weight = isinstance(tensor, torch.nn.Parameter)
                        tensors[name] = torch.nn.Parameter(moved) if is_weight else moved
    return module


def test_pretended_gpu_refuses_tensors_of_two_devices():
    with FakeTensorMode() as mode:
        linear = torch.zeros(3, 3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            linear @ torch.zeros(3, 3)
    left_behind = torch.nn.BatchNorm1d(3)
    left_behind.scale = torch.ones(3)  # neither parameter nor buffer: stays where it is
    moved = on_gpu(left_behind, mode)
    with mode, pytest.raises((RuntimeError, AssertionError)):
        moved(torch.zeros(2, 3, device="cuda")) * moved.scale


@pytest.mark.parametrize("head", ["linear", "csra", "mldecoder"])
@pytest.mark.parametrize("name", BACKBONES)
def test_model_and_its_maps_stay_on_the_gpu(name, head):
    real = du.build_model(name, 3, head, False, img_size=64, **BACKBONES[name])
    mode = FakeTensorMode()
    model = on_gpu(real, mode)
    with mode:
        images = torch.zeros(2, 3, 64, 64, device="cuda")
        for is_training in (True, False):
            logits = model.train(is_training)(images)
            assert (logits.device.type, tuple(logits.shape)) == ("cuda", (2, 3))
        assert du._label_maps(model, images, 1).device.type == "cuda"


LOSSES = [(name, None) for name in ("bce", "asl", "zlpr", "twoway", "db", "ce")]
LOSSES += [("bce", weights) for weights in ("neg_pos", "inv_freq", "effective_num")]


@pytest.mark.parametrize(("name", "class_weights"), LOSSES)
def test_loss_and_its_weights_stay_on_the_gpu(name, class_weights):
    targets = np.array([[1, 0, 0], [0, 1, np.nan], [0, 0, 1]], np.float32)
    real = du.MaskedLoss(name, targets, class_weights)
    mode = FakeTensorMode(shape_env=ShapeEnv())  # "twoway" picks cells: how many, is not known
    loss = on_gpu(real, mode)
    with mode:
        logits = torch.zeros(4, 3, device="cuda", dtype=torch.bfloat16)
        value = loss(logits, torch.zeros(4, 3, device="cuda"))
        assert (value.device.type, value.dtype, value.ndim) == ("cuda", torch.float32, 0)


@pytest.mark.parametrize("alphas", [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_photos_are_mixed_on_the_gpu(alphas):
    with FakeTensorMode():
        mixup = du.TriStateMixup(3, *alphas)
        images = torch.zeros(4, 3, 32, 32, device="cuda")
        for _ in range(5):  # MixUp or CutMix, as it draws
            images, targets = mixup(images, torch.zeros(4, 3, device="cuda"))
            assert (images.device.type, targets.device.type) == ("cuda", "cuda")
            assert tuple(targets.shape) == (4, 3)


@pytest.mark.parametrize("name", BACKBONES)
def test_simmim_masks_guesses_and_judges_on_the_gpu(name, notebook_functions):
    nb = notebook_functions("pretraining")
    backbone = du.build_model(name, 0, pretrained=False, img_size=64, **BACKBONES[name])
    mode = FakeTensorMode()
    simmim = on_gpu(nb.SimMIM(backbone, 32, 0.5), mode)
    with mode:
        images = torch.zeros(2, 3, 64, 64, device="cuda")
        assert simmim.draw_mask(2).device.type == "cuda"
        assert simmim(images).device.type == "cuda"
        assert tuple(simmim.reconstruct(images, simmim.draw_mask(2)).shape) == (2, 3, 64, 64)
