"""What scratch.ipynb defines: two networks, the learning-rate finder, a submission."""

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
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


def test_submission_has_a_line_a_photo(nb, tmp_path):
    path = tmp_path / "out" / "submission.csv"
    nb.write_submission(path, ["a/1.jpg", "b/2.JPEG"], ["sea, open", "bog"])
    assert path.read_text() == 'id,label\n1,"sea, open"\n2,bog\n'
    with pytest.raises(ValueError, match=r"submission\.csv: 'b/1\.jpg' twice; leave one out"):
        nb.write_submission(path, ["b/1.jpg", "b/1.jpg"], ["sea", "bog"])
    assert len(pd.read_csv(path)) == 2  # the old one stands
    nb.write_submission(path, ["a/1.jpg", "b/1.jpg"], ["sea", "bog"])  # a name twice
    assert pd.read_csv(path)["id"].tolist() == ["a/1.jpg", "b/1.jpg"]
