"""What scratch.ipynb defines: networks, recipes, the learning-rate finder, published weights."""

from dataclasses import replace

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def nb(notebook_functions):
    return notebook_functions("scratch")


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


RECIPES = {"resnet50": (100, 256, 5, 2.5e-4), "vit_base": (300, 1024, 5, 1e-3)}
RECIPES["swin_base"] = (300, 1024, 20, 1e-3)  # epochs, batch, epochs of warm-up, highest rate


def hundredth(nb, name, run_dir, n=12_811, **changes):
    """Return a Trainer of a recipe on a hundredth of ImageNet's photos, 4 × 4 pixels in 10 classes.

    A linear layer stands for the network; half a step is taken at once.
    """
    recipe = nb.accumulate(nb.RECIPES[name], RECIPES[name][1] // 2)
    config = replace(du.TrainConfig(**recipe), **changes)
    targets = torch.arange(n) % 10
    images = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images.flatten(1)[torch.arange(n), targets] += 3  # a pixel per class: to be learnt
    sets = [
        du.FeatureSet(images[part], targets[part], list("abcdefghij")) for part in (..., slice(99))
    ]
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return du.Trainer(model, *sets, config, run_dir)


@pytest.mark.parametrize("name", RECIPES)
def test_schedule_of_a_recipe_on_a_hundredth_of_the_photos(nb, name, tmp_path):
    epochs, batch, warmup, highest = RECIPES[name]
    trainer = hundredth(nb, name, tmp_path)
    assert nb.RECIPES[name]["batch_size"] == batch
    steps = -(-12_811 // batch)  # an epoch: 51 or 13
    rates = trainer.learning_rates().max(1)
    assert len(rates) == epochs * steps
    assert rates[0] == 0
    rise = warmup * steps  # then timm's cosine goes on as if it had fallen meanwhile
    np.testing.assert_allclose(rates[:rise], highest * np.arange(rise) / rise)
    assert 0.98 * highest < rates.max() <= highest
    assert rates[rise] == pytest.approx(highest * (1 + np.cos(np.pi * warmup / epochs)) / 2)
    assert rates[-1] < highest / 1000


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_on_a_hundredth_of_the_photos_and_epochs(nb, name, tmp_path):
    epochs, batch, warmup, _ = RECIPES[name]
    shorter = {"epochs": epochs // 100, "warmup_epochs": warmup / 100}
    history = hundredth(nb, name, tmp_path, **shorter).fit()
    assert history["step"].tolist() == [(e + 1) * -(-12_811 // batch) for e in range(epochs // 100)]
    assert history["val_loss"].iloc[-1] < np.log(10)  # that of the start


def test_half_a_step_twice_is_the_whole_step(nb, tmp_path):
    """Plain photos and no warm-up: what accumulation does is all that is left."""
    plain = {"epochs": 1, "warmup_epochs": 0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    weights = []
    for changes in ({}, {"batch_size": 1024, "grad_accum_steps": 1}):
        trainer = hundredth(nb, "swin_base", tmp_path, 1024, precision="no", **plain, **changes)
        assert trainer.fit()["step"].tolist() == [1]
        weights.append(trainer.plain[1].weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_a_network_and_an_augmentation_that_exist(nb, name):
    config = du.TrainConfig(**nb.RECIPES[name])
    assert (config.patience, config.img_size) == (config.epochs, (224, 224))
    with torch.device("meta"):
        model = timm.create_model(config.model_name, **config.model_kwargs)
    model.data_config = timm.data.resolve_model_data_config(model)
    assert model.data_config["input_size"] == (3, 224, 224)
    crops = {"crop_scale": (config.min_crop, 1.0), "rand_augment": config.rand_augment}
    photo = Image.new("RGB", (300, 200))
    assert du.make_transforms(model, True, **crops)(photo).shape == (3, 224, 224)


def test_batches_and_processes_make_the_batch_of_the_paper(nb):
    recipe = {"batch_size": 1024, "epochs": 300}
    for at_once, processes in ((1024, 1), (32, 1), (64, 8), (128, 8)):
        own = nb.accumulate(recipe, at_once, processes)
        assert own["batch_size"] * own["grad_accum_steps"] * processes == 1024
        assert (own["batch_size"], own["epochs"]) == (at_once, 300)
    for at_once, processes in ((48, 1), (2048, 1), (512, 3)):
        with pytest.raises(ValueError, match=f"{at_once} photos × {processes} processes do not"):
            nb.accumulate(recipe, at_once, processes)


class MeanColour(nn.Module):
    """Answer for 1 000 classes by the mean colour of a photo (3,) and random weights."""

    pretrained_cfg = {"input_size": (3, 8, 8), "crop_pct": 0.5, "interpolation": "bilinear"}
    pretrained_cfg |= {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.25, 1.0)}
    num_classes = 1000

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        assert x.shape[1:] == (3, 8, 8)
        return x.mean((2, 3)) @ self.weight


@pytest.fixture
def photos(tmp_path):
    """Return a table of 66 photos of one colour in a black frame."""
    rng, rows = np.random.default_rng(0), []
    for i in range(66):
        photo = Image.new("RGB", (80, 40))
        photo.paste(colour := tuple(rng.integers(0, 256, 3).tolist()), (24, 4, 56, 36))
        photo.save(tmp_path / f"{i}.png")
        rows.append({"image_path": str(tmp_path / f"{i}.png"), "group_id": i, "colour": colour})
    return pd.DataFrame(rows)


def test_published_weights_are_scored_on_the_centre_among_the_classes_at_hand(nb, photos):
    """Half of the short side is seen: the frame is not, or the mean colours were darker."""
    model, classes = MeanColour(), ["n03888257", "tench", "n02102040", "n01440764"]
    numbers = timm.data.ImageNetInfo().label_names()
    own = [numbers.index(n) for n in ("n03888257", "n01440764", "n02102040")]
    x = (np.array(photos["colour"].tolist()) / 255 - [0.25, 0.5, 0.75]) / [0.5, 0.25, 1.0]
    logits = x @ model.weight.detach().numpy()
    best = logits[:, own].argmax(1)
    given = np.where(np.arange(66) % 4 == 0, (best + 1) % 3, best)  # a quarter is wrong
    part = photos.assign(**{"class": np.array(classes, object)[given]})
    part.loc[[64, 65], "class"] = None
    table = nb.score_published(model, part, classes[:3])
    assert table.loc["top-1", "value"] == 48 / 64
    among_all = (logits.argmax(1) == np.array(own)[given])[:64].mean()
    assert table.loc["top-1 among all 1000", "value"] == among_all
    assert table.loc["top-5", "value"] == 1


def test_published_weights_of_other_classes_are_refused(nb, photos):
    message = r"no class of ImageNet: grass, crane; expected folders such as n01440764"
    with pytest.raises(ValueError, match=message):  # two birds and machines are a crane
        nb.score_published(
            MeanColour(), photos.assign(**{"class": "tench"}), ["tench", "grass", "crane"]
        )
    nb.score_published(
        MeanColour(), photos.assign(**{"class": "crane (n02012849)"}), ["crane (n02012849)"]
    )
    other = MeanColour()
    other.num_classes = 21_841
    with pytest.raises(ValueError, match="the model has 21841 classes; expected ImageNet's 1000"):
        nb.score_published(other, photos.assign(**{"class": "tench"}), ["tench"])
