"""Losses with unknown cells, and every promise of the training loop."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from torch import nn
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")
LABELS = ["red", "green", "blue"]
BEST = getattr(du, "WEIGHTS", "best_model.pt")

# ---------------------------------------------------------------- losses

LOSSES = ["bce", "asl", "zlpr", "twoway", "db"]
LOGITS = [[0.5, -1.2, 2.0], [-0.3, 0.8, -2.5], [1.5, 0.1, 0.4], [-0.7, -1.6, 0.9]]
KNOWN = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
PARTLY = [[1, NAN, 0], [NAN, 1, 0], [1, 1, NAN], [0, NAN, 0]]
TRAINING = np.array(  # label counts 2, 4 and 5 of 8
    [[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 1, 0]], float
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x)) if x < 30 else x


def cells(targets):
    """Yield (row, column, logit, target) of the known cells."""
    for row, line in enumerate(targets):
        for column, target in enumerate(line):
            if not math.isnan(target):
                yield row, column, LOGITS[row][column], target


def bce(targets):
    losses = [-math.log(sigmoid(x) if y else 1 - sigmoid(x)) for _, _, x, y in cells(targets)]
    return sum(losses) / len(losses)


def asl(targets):
    """Ridnik et al. 2021 with γ+ 1, γ- 4 and margin 0.05."""
    losses = []
    for _, _, x, y in cells(targets):
        p = sigmoid(x)
        shifted = max(p - 0.05, 0)
        losses.append(-(1 - p) * math.log(p) if y else -(shifted**4) * math.log(1 - shifted))
    return sum(losses) / len(losses)


def zlpr(targets):
    """Su et al. 2022."""
    total = 0
    for row in range(len(targets)):
        mine = [(x, y) for r, _, x, y in cells(targets) if r == row]
        total += math.log(1 + sum(math.exp(x) for x, y in mine if not y))
        total += math.log(1 + sum(math.exp(-x) for x, y in mine if y))
    return total / len(targets)


def twoway(targets):
    """Kobayashi 2023 with temperatures 4 (present) and 1 (absent)."""
    total = 0
    for axis, size in ((0, len(targets)), (1, len(targets[0]))):
        losses = []
        for index in range(size):
            mine = [(c[2], c[3]) for c in cells(targets) if c[axis] == index]
            present, absent = [x for x, y in mine if y], [x for x, y in mine if not y]
            if not present:
                continue
            hard_present = 4 * math.log(sum(math.exp(-x / 4) for x in present))
            hard_absent = math.log(sum(math.exp(x) for x in absent)) if absent else -math.inf
            losses.append(softplus(hard_absent + hard_present))
        total += sum(losses) / len(losses)
    return total


def db(targets):
    """Wu et al. 2020 with α 0.1, β 10, μ 0.2, λ 2, κ 0.05 and a focal term of γ 2, scale 2."""
    counts, n = (2, 4, 5), 8
    losses = []
    for row, column, x, y in cells(targets):
        repeat = sum(1 / counts[c] for r, c, _, t in cells(targets) if r == row and t)
        unknown = sum(
            math.isnan(t) for t in targets[row]
        )  # present by rate: count / n of 1 / count
        repeat += unknown / n
        ratio = (1 / counts[column]) / repeat if repeat else math.inf
        weight = 0.1 + (sigmoid(10 * (ratio - 0.2)) if ratio < math.inf else 1)
        z = x - 0.05 * math.log(n / counts[column] - 1) / 2
        if y:
            losses.append(weight * softplus(-z) * 2 * sigmoid(-z) ** 2)
        else:
            losses.append(weight * softplus(2 * z) / 2 * 2 * sigmoid(2 * z) ** 2)
    return sum(losses) / len(losses)


FORMULAS = {"bce": bce, "asl": asl, "zlpr": zlpr, "twoway": twoway, "db": db}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_fully_known_batch_is_the_published_formula(name):
    loss = du.MaskedLoss(name, TRAINING)(torch.tensor(LOGITS), torch.tensor(KNOWN).float())
    assert loss.item() == pytest.approx(FORMULAS[name](KNOWN), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_with_unknown_cells_is_the_formula_over_the_known_ones(name):
    loss = du.MaskedLoss(name, TRAINING)(torch.tensor(LOGITS), torch.tensor(PARTLY))
    assert loss.item() == pytest.approx(FORMULAS[name](PARTLY), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_cells_have_no_gradient_and_their_logits_no_say(name):
    criterion, targets = du.MaskedLoss(name, TRAINING), torch.tensor(PARTLY)
    unknown = targets.isnan()
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = criterion(logits, targets)
    loss.backward()
    assert (logits.grad[unknown] == 0).all()
    assert logits.grad[~unknown].any()
    for other in (60.0, -60.0):
        changed = logits.detach().masked_fill(unknown, other)
        assert criterion(changed, targets).item() == loss.item()


@pytest.mark.parametrize("name", LOSSES)
def test_batch_that_nobody_judged_teaches_nothing(name):
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = du.MaskedLoss(name, TRAINING)(logits, torch.full((4, 3), NAN))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("name", ["bce", "asl", "db"])
def test_soft_target_is_neither_of_the_hard_ones(name):
    criterion = du.MaskedLoss(name, TRAINING, soft=True)
    absent, soft, present = (
        criterion(torch.ones(1, 3), torch.full((1, 3), y)).item() for y in (0.0, 0.5, 1.0)
    )
    assert len({absent, soft, present}) == 3
    assert np.isfinite([absent, soft, present]).all()


def test_soft_bce_is_the_cross_entropy():
    loss = du.MaskedLoss("bce", TRAINING[:, :1], soft=True)(
        torch.tensor([[1.0]]), torch.tensor([[0.3]])
    )
    assert loss.item() == pytest.approx(-0.3 * math.log(sigmoid(1)) - 0.7 * math.log(sigmoid(-1)))


@pytest.mark.parametrize(
    "options", [{"bce_sum": True}, {"smoothing": 0.1}, {"bce_target_thresh": 0.2}]
)
def test_no_option_of_a_loss_unmasks_unknown_cells(options):
    targets = torch.tensor(PARTLY)
    logits = torch.tensor(LOGITS, requires_grad=True)
    try:
        du.MaskedLoss("bce", TRAINING, **options)(logits, targets).backward()
    except ValueError:  # refusing it is as good
        return
    assert not logits.grad[targets.isnan()].any()


# Label 0: 2 of 8 present. Label 1: 1 present, 3 absent, 4 unknown. Label 2: 4 of 8.
COUNTED = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1], *[[0, NAN, 0]] * 4], float)


@pytest.mark.parametrize(
    ("method", "present", "absent"),
    [
        ("neg_pos", [3, 3, 1], [1, 1, 1]),  # absent / present among the judged
        ("inv_freq", [1.2, 1.2, 0.6], [1.2, 1.2, 0.6]),  # 4, 4, 2 scaled to a mean of 1
    ],
)
def test_class_weights_from_counts_leave_unknown_cells_out(method, present, absent):
    criterion = du.MaskedLoss("bce", COUNTED, class_weights=method)
    for value, weights in ((1.0, present), (0.0, absent)):
        for label, weight in enumerate(weights):
            targets = torch.full((1, 3), NAN)
            targets[0, label] = value
            loss = criterion(torch.zeros(1, 3), targets).item()
            assert loss == pytest.approx(weight * math.log(2), rel=1e-6), (label, value)


def test_effective_number_weights_by_hand():
    criterion = du.MaskedLoss("bce", TRAINING, class_weights="effective_num")
    raw = [0.001 / (1 - 0.999**n) for n in (2, 4, 5)]
    for label in range(3):
        targets = torch.full((1, 3), NAN)
        targets[0, label] = 1
        loss = criterion(torch.zeros(1, 3), targets).item()
        assert loss == pytest.approx(raw[label] / (sum(raw) / 3) * math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", ["mse", "BCE", "focal"])
def test_unknown_loss_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        du.MaskedLoss(name, TRAINING)


def test_unknown_class_weights_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'balanced', expected .*neg_pos.*inv_freq"):
        du.MaskedLoss("bce", TRAINING, class_weights="balanced")


@pytest.mark.parametrize("name", ["zlpr", "twoway"])
def test_ranking_losses_refuse_soft_targets(name):
    with pytest.raises(ValueError, match=f"'{name}' requires binary targets"):
        du.MaskedLoss(name, TRAINING, soft=True)


@pytest.mark.parametrize("name", ["zlpr", "twoway", "db"])
def test_losses_that_take_no_class_weights_say_so(name):
    with pytest.raises(ValueError, match=r"only supported by bce and .*asl"):
        du.MaskedLoss(name, TRAINING, class_weights="neg_pos")


# ---------------------------------------------------------------- tiny models and pictures


class ChannelNet(nn.Module):
    """One logit a label from the mean colour, some noise from dropout; no batch norm."""

    def __init__(self, dropout=0.0, seed=0, gain=None):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        if gain is not None:  # channel l → logit l, so that it is right from the start
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
            for label in range(3):
                self.stem.weight.data[label, label] = 1 / 16
                self.head.weight.data[label, label] = gain

    def forward(self, x):
        return self.head(self.dropout(self.stem(x).mean((2, 3))))


class ToUnit:
    """PIL image → (3, H, W) in 0..1, with random flips in training."""

    def __init__(self, train):
        self.steps = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
            + [v2.RandomHorizontalFlip(), v2.ColorJitter(0.3)] * train
        )

    def __call__(self, image):
        return self.steps(image)


def draw_pictures(folder, n, seed, size=16):
    """Draw `n` pictures whose colour channel l is bright where label l is present."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, (n, 3))
    targets[:2] = [[1, 0, 1], [0, 1, 0]]
    rows = []
    for number, target in enumerate(targets):
        pixels = rng.integers(0, 60, (size, size, 3)) + 150 * target
        path = folder / f"{seed}_{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        rows.append([str(path), number, *target])
    return pd.DataFrame(rows, columns=["image_path", "group_id", *LABELS])


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return draw_pictures(folder, 10, 1), draw_pictures(folder, 7, 2)


@pytest.fixture
def sets(tables):
    return tuple(du.DataPartition(table, LABELS, ToUnit(t)) for table, t in zip(tables, (1, 0)))


def config(**changes):
    settings = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "warmup_epochs": 1}
    return du.TrainConfig(**{**settings, "precision": "no", **changes})


def trainer(sets, run_dir, model=None, **changes):
    return du.Trainer(model or ChannelNet(), *sets, config(**changes), run_dir)


def weights_of(path_or_trainer):
    if isinstance(path_or_trainer, du.Trainer):
        model = path_or_trainer.accelerator.unwrap_model(path_or_trainer.model)
        return {k: v.clone() for k, v in model.state_dict().items()}
    if path_or_trainer.suffix == ".safetensors":
        return load_file(path_or_trainer)
    return torch.load(path_or_trainer, weights_only=True)


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


def assert_same_history(found, wanted):
    """Bit for bit, but for the clock."""
    columns = ["epoch", "step", "learning_rate", "train_loss", "val_loss", "val_mAP"]
    pd.testing.assert_frame_equal(found[columns], wanted[columns], check_exact=True)


def interrupt_at(model, batch, signal_number=None):
    """Stop training (not validation) in the middle of its `batch`-th batch, as ■ would."""
    state = {"seen": 0}

    def stop(module, _):
        state["seen"] += module.training
        if module.training and state["seen"] == batch:
            if signal_number is not None:
                os.kill(os.getpid(), signal_number)
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(stop)


def record_steps(trainer):
    """Return a list that each optimizer step extends with its learning rates and gradient norm."""
    steps = []

    def note(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
        steps.append({"rates": [g["lr"] for g in optimizer.param_groups], "norm": norm})

    trainer.optimizer.optimizer.register_step_pre_hook(note)
    return steps


def mean_ap(targets, probs):
    return np.mean([average_precision_score(targets[:, i], probs[:, i]) for i in range(3)])


def probabilities(model, dataset):
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    with torch.inference_mode():
        return model.eval()(images).sigmoid().numpy()


# ---------------------------------------------------------------- learning


def test_small_set_with_random_labels_is_learnt_by_heart(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.permutation([[1, 0, 1], [0, 1, 0]] * 4), columns=LABELS)
    table["image_path"] = [str(tmp_path / f"{number}.png") for number in range(8)]
    for path in table["image_path"]:
        pattern = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        pattern.resize((32, 32), Image.Resampling.NEAREST).save(path)
    torch.manual_seed(0)
    kwargs = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "ls_init_value": None}
    model = du.build_model("convnext_atto", 3, pretrained=False, img_size=32, **kwargs)
    data = du.DataPartition(table, LABELS, du.make_transforms(model, train=False))
    run = trainer((data, data), tmp_path / "run", model, epochs=15, learning_rate=5e-3)
    before = mean_ap(data.targets, run.predict(data))
    history = run.fit()
    assert before < 0.9
    assert history["train_loss"].iloc[-1] < 0.3 * history["train_loss"].iloc[0]
    assert history["val_mAP"].max() == 1.0
    assert mean_ap(data.targets, run.predict(data)) == 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_although_cells_are_unknown(tables, tmp_path, loss):
    train = tables[0].astype(dict.fromkeys(LABELS, float))
    train.loc[::3, "red"] = np.nan
    train.loc[1::4, "blue"] = np.nan
    sets = [du.DataPartition(t, LABELS, ToUnit(False)) for t in (train, tables[1])]
    run = trainer(sets, tmp_path, loss=loss, epochs=12, learning_rate=0.05, patience=12)
    assert mean_ap(sets[1].targets, run.predict(sets[1])) < 0.9
    assert run.fit()["val_mAP"].max() > 0.95


def test_a_second_trainer_leaves_the_precision_of_the_first_alone(sets, tmp_path):
    first = trainer(sets, tmp_path / "a", precision="bf16")
    second = trainer(sets, tmp_path / "b", precision="no")
    for used, kind in ((first, torch.bfloat16), (second, torch.float32)):
        seen = []
        used.plain.register_forward_hook(lambda *found, seen=seen: seen.append(found[-1].dtype))
        used.predict(sets[1])
        assert set(seen) == {kind}


def test_predictions_keep_the_order_of_the_partition(sets, tmp_path):
    run = trainer(sets, tmp_path, batch_size=3)
    expected = probabilities(ChannelNet(), sets[1])
    np.testing.assert_allclose(run.predict(sets[1]), expected, atol=1e-6)


# ---------------------------------------------------------------- best, history, early stopping


@pytest.fixture(scope="module")
def spoilt(tables, tmp_path_factory):
    """A run that starts out right and is taught the opposite: its first epoch is its best."""
    train, val = tables
    opposite = train.assign(**{label: 1 - train[label] for label in LABELS})
    sets = [du.DataPartition(table, LABELS, ToUnit(False)) for table in (opposite, val)]
    run_dir = tmp_path_factory.mktemp("spoilt")
    rows_on_disk, per_epoch = [], {}
    model = ChannelNet(gain=1.0)
    run = du.Trainer(
        model, *sets, config(epochs=30, learning_rate=0.1, warmup_epochs=4, patience=5), run_dir
    )

    def note(module, _):
        if module.training:
            path = run_dir / "history.csv"
            rows_on_disk.append((run.epoch, len(pd.read_csv(path)) if path.exists() else 0))
        per_epoch[run.epoch] = {k: v.clone() for k, v in module.state_dict().items()}

    hook = model.register_forward_pre_hook(note)
    history = run.fit()
    hook.remove()
    return run, history, run_dir, rows_on_disk, per_epoch


def test_best_model_is_the_best_epoch_and_not_the_last(spoilt):
    run, history, run_dir, _, per_epoch = spoilt
    assert history["val_mAP"].iloc[-1] < history["val_mAP"].max() - 0.1  # it did get worse
    best = int(history["val_mAP"].idxmax())
    saved = weights_of(run_dir / BEST)
    assert_same_weights(saved, per_epoch[best])  # what the validation of that epoch saw
    model = ChannelNet()
    model.load_state_dict(saved)
    score = mean_ap(run.val_set.targets, probabilities(model, run.val_set))
    assert score == pytest.approx(history["val_mAP"].max(), abs=1e-9)


def test_model_holds_the_best_weights_after_training(spoilt):
    run, _, run_dir, _, _ = spoilt
    assert_same_weights(weights_of(run), weights_of(run_dir / BEST))


def test_training_ends_after_exactly_patience_epochs_without_a_better_score(spoilt):
    _, history, _, _, _ = spoilt
    scores = history["val_mAP"].tolist()
    best = scores.index(max(scores))
    assert len(scores) == best + 1 + 5
    assert len(scores) < 30


@pytest.mark.parametrize(
    ("scores", "epochs"),
    [
        ([NAN, 0.3, 0.4, 0.5, 0.4, 0.4, 0.9], 6),  # the best is that of the fourth
        ([NAN, NAN, NAN], 2),
    ],
)
def test_patience_counts_from_the_best_known_score(sets, tmp_path, scores, epochs):
    class Judged(du.Trainer):
        def validate(self):
            return {"val_mAP": scores[self.epoch]}

    run = Judged(ChannelNet(), *sets, config(epochs=len(scores), patience=2), tmp_path)
    assert len(run.fit()) == epochs


def test_weights_of_an_older_run_are_not_taken_for_the_best(sets, tmp_path):
    class Silent(du.Trainer):
        def validate(self):
            return {"val_mAP": NAN}

    trainer(sets, tmp_path, epochs=1).fit()
    run = Silent(ChannelNet(), *sets, config(epochs=1, seed=7), tmp_path)
    run.fit()
    older = weights_of(tmp_path / BEST)
    assert any(not torch.equal(older[name], tensor) for name, tensor in weights_of(run).items())


def test_unknown_weights_are_refused(sets, tmp_path):
    run = trainer(sets, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="weights='emma': expected 'current'"):
        run.predict(sets[1], "emma")
    with pytest.raises(ValueError, match="weights='ema': expected 'current'"):
        run.predict(sets[1], "ema")  # this training has no moving average


def test_history_has_a_row_an_epoch_written_as_it_happens(spoilt):
    _, history, run_dir, rows_on_disk, _ = spoilt
    assert all(epoch == rows for epoch, rows in rows_on_disk)
    assert history["epoch"].tolist() == list(range(1, len(history) + 1))
    saved = pd.read_csv(run_dir / "history.csv", float_precision="round_trip")
    assert_same_history(saved, history)
    assert (saved["seconds"] > 0).all()


def test_validation_loss_is_that_of_the_known_cells(tables, sets, tmp_path):
    table = tables[1].astype({"green": float})
    table.loc[:2, "green"] = np.nan
    val = du.DataPartition(table, LABELS, ToUnit(False))
    history = trainer((sets[0], val), tmp_path, epochs=1).fit()
    model = ChannelNet()
    model.load_state_dict(weights_of(tmp_path / BEST))
    probs, known = probabilities(model, val).astype(float), ~np.isnan(val.targets)
    cross_entropy = -np.log(np.where(val.targets > 0.5, probs, 1 - probs))[known].mean()
    assert history["val_loss"].iloc[0] == pytest.approx(cross_entropy, rel=1e-4)


def test_settings_are_saved_beside_the_results(sets, tmp_path):
    trainer(sets, tmp_path, epochs=1, learning_rate=0.003).fit()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["learning_rate"] == 0.003
    assert du.TrainConfig(**saved) == config(epochs=1, learning_rate=0.003, loss="bce")


def measurable():
    model = ChannelNet()
    model.data_config = {}  # as build_model gives it
    return model


def test_measured_choice_is_the_fastest_and_a_resumed_run_keeps_it(sets, tmp_path, monkeypatch):
    def measured(*fastest):
        monkeypatch.setattr(du, "time_steps", lambda *_: {fastest: 0.1, ("no", False): 0.2})

    measured("bf16", True)
    run = trainer(sets, tmp_path, measurable(), epochs=2, precision="measure")
    assert (run.accelerator.mixed_precision, run.layout) == ("bf16", torch.channels_last)
    run.fit(lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["rand_augment"]  # an option that is newer than the run
    (tmp_path / "config.json").write_text(json.dumps(saved))
    measured("no", False)  # the machine is busy with something else now
    again = trainer(sets, tmp_path, measurable(), epochs=2, precision="measure")
    assert (again.config.precision, again.config.channels_last) == ("bf16", True)
    assert len(again.resume()) == 2
    other = trainer(
        sets, tmp_path, measurable(), epochs=2, precision="measure", seed=1
    )  # another run
    assert (other.config.precision, other.config.channels_last) == ("no", False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read .*; delete .*last"):
        trainer(sets, tmp_path, measurable(), epochs=2, precision="measure")


def test_measuring_leaves_the_model_as_it_was(sets, tmp_path, capsys):
    model, ruled = measurable(), measurable()
    ruled.load_state_dict(model.state_dict())
    run = trainer(sets, tmp_path, model, precision="measure")
    assert run.config.precision in ("no", "bf16")
    assert "photos/s measured, the first is taken" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ruled.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_head_alone_is_not_measured(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(du, "time_steps", lambda *_: 1 / 0)
    assert trainer(sets, tmp_path, precision="measure").config.precision == "auto"


def test_every_precision_and_layout_is_timed():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)), nn.Flatten())
    for layouts in ((False, True), (True,)):
        seconds = du.time_steps(model, torch.rand(2, 3, 8, 8), layouts)
        half = {"no", du._half_precision("cpu")}
        assert seconds.keys() == {(name, is_last) for name in half for is_last in layouts}
        assert list(seconds.values()) == sorted(seconds.values())
        assert min(seconds.values()) > 0


def test_fit_starts_afresh_in_a_folder_that_was_used_before(sets, tmp_path):
    trainer(sets, tmp_path, epochs=3).fit()
    history = trainer(sets, tmp_path, epochs=1).fit()
    assert history["epoch"].tolist() == [1]
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1


# ---------------------------------------------------------------- optimizer steps


def test_schedule_warms_up_then_follows_a_cosine_per_optimizer_step(sets, tmp_path):
    """10 pictures in batches of 2, two a step: 3 steps an epoch, the last from one batch."""
    run = trainer(sets, tmp_path, epochs=4, batch_size=2, grad_accum_steps=2, learning_rate=0.02)
    steps = record_steps(run)
    history = run.fit()
    expected = [0.02 * t / 3 for t in range(3)]
    expected += [0.02 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(3, 12)]
    assert len(steps) == 12
    for step, rate in zip(steps, expected):
        assert step["rates"] == pytest.approx([rate] * len(step["rates"]), abs=1e-12)
    assert history["step"].tolist() == [3, 6, 9, 12]


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 5), (2, 3), (3, 2), (5, 1), (8, 1)])
def test_last_incomplete_accumulation_is_stepped(sets, tmp_path, accumulated, steps):
    run = trainer(sets, tmp_path, epochs=1, batch_size=2, grad_accum_steps=accumulated)
    taken = record_steps(run)
    run.fit()
    assert len(taken) == steps


def test_accumulating_small_batches_equals_one_large_batch(tables, tmp_path):
    train = du.DataPartition(tables[0].iloc[:8], LABELS, ToUnit(False))
    val = du.DataPartition(tables[1], LABELS, ToUnit(False))
    final = []
    for size, accumulated in ((8, 1), (2, 4)):
        run_dir = tmp_path / str(size)
        run = trainer((train, val), run_dir, batch_size=size, grad_accum_steps=accumulated)
        run.fit()
        final.append(weights_of(run))
        assert run.step == 3
    for key in final[0]:
        torch.testing.assert_close(final[0][key], final[1][key], atol=1e-6, rtol=1e-5)
    assert not torch.equal(final[0]["head.weight"], ChannelNet().state_dict()["head.weight"])


def test_gradients_are_clipped_to_the_norm_asked_for(sets, tmp_path):
    norms = {}
    for clip in (None, 0.01):
        run = trainer(sets, tmp_path, epochs=1, clip_grad=clip)
        steps = record_steps(run)
        run.fit()
        norms[clip] = [step["norm"] for step in steps]
    assert min(norms[None]) > 0.02  # there was something to clip
    assert norms[0.01] == pytest.approx([0.01] * 3, rel=1e-3)


def parameter_settings(run):
    """Return {name: parameter group}."""
    model = run.accelerator.unwrap_model(run.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = run.optimizer.param_groups
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_biases_norms_and_what_the_backbone_names_get_no_weight_decay(sets, tmp_path):
    kwargs = {"window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    model = du.build_model("swinv2_tiny_window8_256", 3, pretrained=False, img_size=16, **kwargs)
    groups = parameter_settings(trainer(sets, tmp_path, model, weight_decay=0.05))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or "cpb_mlp" in name or "logit_scale" in name
        assert groups[name]["weight_decay"] == (0 if free else 0.05), name
    assert groups["layers.0.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.05


def test_layer_decay_lowers_the_rate_layer_by_layer_towards_the_input(sets, tmp_path):
    kwargs = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
    model = du.build_model("vit_tiny_patch16_224", 3, pretrained=False, img_size=16, **kwargs)
    run = trainer(sets, tmp_path, model, layer_decay=0.5, learning_rate=0.01, epochs=3)
    seen = {}

    def note(optimizer, *_):
        for name, group in parameter_settings(run).items():
            seen[name] = max(seen.get(name, 0), group["lr"])

    run.optimizer.optimizer.register_step_pre_hook(note)
    run.fit()
    peak = seen["head.weight"]
    assert peak == pytest.approx(0.01 * (1 + math.cos(math.pi / 3)) / 2)  # at the end of warm-up
    assert seen["head.bias"] == peak
    share = {name: rate / peak for name, rate in seen.items()}
    assert share["blocks.1.mlp.fc1.weight"] == pytest.approx(0.5)
    assert share["blocks.0.mlp.fc1.weight"] == pytest.approx(0.25)
    assert share["patch_embed.proj.weight"] == pytest.approx(0.125)


def test_ema_weights_are_the_average_by_hand(sets, tmp_path):
    run = trainer(sets, tmp_path, epochs=3, ema_decay=0.6, learning_rate=0.05)
    model = run.accelerator.unwrap_model(run.model)
    after = []
    run.optimizer.optimizer.register_step_post_hook(
        lambda *_: after.append(model.head.weight.detach().clone())
    )
    run.fit()
    average = after[0]  # the average starts at the first step
    for step, weight in enumerate(after[1:], start=2):
        decay = min(0.6, 1 - step ** (-2 / 3))  # warms up: 0.37, 0.52, 0.6, 0.6, ...
        average = decay * average + (1 - decay) * weight
    assert len(after) == 9
    torch.testing.assert_close(run.ema.module.head.weight, average, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(average, after[-1], atol=1e-4)


def test_ema_weights_are_the_ones_validated_and_saved(sets, tmp_path):
    run = trainer(sets, tmp_path, epochs=1, ema_decay=0.6, learning_rate=0.05, warmup_epochs=0)
    history = run.fit()
    assert_same_weights(weights_of(tmp_path / BEST), run.ema.module.state_dict())
    score = mean_ap(sets[1].targets, probabilities(run.ema.module, sets[1]))
    assert history["val_mAP"].iloc[0] == pytest.approx(score, abs=1e-9)


def targets_seen(run):
    """Return a list that each training batch extends with the targets its loss is taken from."""
    batches = []
    run.criterion.register_forward_pre_hook(
        lambda _, inputs: batches.append(inputs[1]) if run.model.training else None
    )
    return batches


def is_soft(targets):
    return bool(((targets > 0) & (targets < 1)).any())


@pytest.mark.parametrize("batch_size", [4, 3, 1])
def test_mixing_copes_with_every_size_of_batch(sets, tmp_path, batch_size):
    run = trainer(sets, tmp_path, epochs=1, batch_size=batch_size, mixup_alpha=1, cutmix_alpha=1)
    batches = targets_seen(run)
    history = run.fit()
    training = batches[: len(run.loader)]
    assert np.isfinite(history["train_loss"]).all()
    trained = {4: 10, 3: 9, 1: 10}  # of 10, without a photo that is left over alone
    assert sum(len(targets) for targets in training) == trained[batch_size]
    assert all(is_soft(targets) for targets in training if len(targets) % 2 == 0)
    assert not any(is_soft(targets) for targets in training if len(targets) == 1)


def test_odd_batch_size_does_not_switch_mixing_off(sets, tmp_path):
    run = trainer(sets, tmp_path, epochs=1, batch_size=5, mixup_alpha=1.0)
    batches = targets_seen(run)
    run.fit()
    assert [len(targets) for targets in batches[:2]] == [5, 5]
    assert all(is_soft(targets) for targets in batches[:2])


def test_nothing_is_mixed_unless_asked(sets, tmp_path):
    run = trainer(sets, tmp_path, epochs=1)
    batches = targets_seen(run)
    run.fit()
    assert not any(is_soft(targets) for targets in batches)


@pytest.mark.parametrize("loss", ["zlpr", "twoway"])
def test_mixing_is_refused_for_losses_of_hard_targets(sets, tmp_path, loss):
    with pytest.raises(ValueError, match="does not support Mixup/CutMix"):
        trainer(sets, tmp_path, loss=loss, mixup_alpha=0.4)


# ---------------------------------------------------------------- stopping and resuming

EVERYTHING = {
    "epochs": 4,
    "learning_rate": 0.02,
    "mixup_alpha": 0.5,
    "cutmix_alpha": 0.5,
    "ema_decay": 0.7,
    "grad_accum_steps": 2,
}


def assert_same_run(run_dir, whole_dir):
    for name in (BEST, "last/ema.pt"):
        assert_same_weights(weights_of(run_dir / name), weights_of(whole_dir / name))
    last = [next((d / "last").glob("model*.safetensors")) for d in (run_dir, whole_dir)]
    assert last[0].read_bytes() == last[1].read_bytes()  # bit-equal, not nearly
    histories = [pd.read_csv(d / "history.csv") for d in (run_dir, whole_dir)]
    assert_same_history(*histories)


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory):
    """Uninterrupted runs, by number of workers."""
    folders = {}
    for workers in (0, 1):
        folders[workers] = tmp_path_factory.mktemp(f"whole{workers}")
        sets = [du.DataPartition(table, LABELS, ToUnit(t)) for table, t in zip(tables, (1, 0))]
        model = ChannelNet(dropout=0.2)
        trainer(sets, folders[workers], model, num_workers=workers, **EVERYTHING).fit()
    return folders


SCRIPT = """
import json, os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import pandas as pd
import data_utils as du
import test_training as t

def sets(tables):
    frames = [pd.read_csv(path) for path in tables]
    return [du.DataPartition(f, t.LABELS, t.ToUnit(train)) for f, train in zip(frames, (1, 0))]

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    parts = sets(job["tables"])
{body}
"""


def write_script(tmp_path, tables, body, **job):
    """Write `body` as a script that has `parts` and `job` at hand; return how it is called."""
    paths = [str(tmp_path / f"table{i}.csv") for i in (0, 1)]
    for table, path in zip(tables, paths):
        table.to_csv(path, index=False)
    script = tmp_path / "script.py"
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), body=lines))
    return [str(script), json.dumps({**job, "tables": paths})]


def launch(tmp_path, tables, body, launcher=(), check=True, env=None, **job):
    """Run `body` in a new process, with `parts` and `job` at hand."""
    done = subprocess.run(
        [sys.executable, *launcher, *write_script(tmp_path, tables, body, **job)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(env or {})},
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def test_run_resumed_in_a_new_process_ends_like_one_that_was_not_stopped(
    tables, sets, whole, tmp_path
):
    for workers in (0, 1):
        run = trainer(
            sets, tmp_path / str(workers), ChannelNet(0.2), num_workers=workers, **EVERYTHING
        )
        interrupt_at(run.model, 8)  # 3 batches an epoch: in the middle of epoch 3
        assert len(run.fit()) == 2
    body = """
for workers in (0, 1):
    run_dir, model = job["dir"] + f"/{workers}", t.ChannelNet(dropout=0.2, seed=5)
    t.trainer(parts, run_dir, model, num_workers=workers, **t.EVERYTHING).resume()
"""
    launch(tmp_path, tables, body, dir=str(tmp_path))
    for workers in (0, 1):
        assert_same_run(tmp_path / str(workers), whole[workers])


def test_killed_process_leaves_a_loadable_best_model_and_can_be_resumed(
    tables, sets, whole, tmp_path
):
    body = """
run = t.trainer(parts, job["dir"], t.ChannelNet(dropout=0.2), **t.EVERYTHING)
t.interrupt_at(run.model, 8, signal.SIGKILL)
run.fit()
"""
    run_dir = tmp_path / "run"
    done = launch(tmp_path, tables, body, dir=str(run_dir), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    ChannelNet().load_state_dict(weights_of(run_dir / BEST))
    assert len(pd.read_csv(run_dir / "history.csv")) == 2
    trainer(sets, run_dir, ChannelNet(0.2, seed=9), **EVERYTHING).resume()
    assert_same_run(run_dir, whole[0])


def test_interrupt_keeps_the_best_and_says_how_to_go_on(sets, tmp_path, capsys):
    run = trainer(sets, tmp_path, ChannelNet(0.2), **EVERYTHING)
    interrupt_at(run.model, 8)
    history = run.fit()
    assert history["epoch"].tolist() == [1, 2]
    assert_same_weights(weights_of(run), weights_of(tmp_path / BEST))
    message = capsys.readouterr().out
    assert "epoch 3" in message
    assert "resume()" in message


@pytest.mark.parametrize("batch", [7, 8, 9])
def test_interrupted_trainer_itself_resumes_like_one_that_was_not_stopped(
    sets, whole, tmp_path, batch
):
    """Gradients and accumulation of the broken-off epoch must not leak into the new one."""
    run = trainer(sets, tmp_path, ChannelNet(0.2), **EVERYTHING)
    hook = interrupt_at(run.model, batch)
    run.fit()
    hook.remove()
    run.resume()
    assert_same_run(tmp_path, whole[0])


def test_fit_again_after_an_interrupt_starts_from_the_start_or_is_refused(sets, whole, tmp_path):
    run = trainer(sets, tmp_path, ChannelNet(0.2), **EVERYTHING)
    hook = interrupt_at(run.model, 7)
    run.fit()
    hook.remove()
    try:
        history = run.fit()
    except (RuntimeError, ValueError):
        assert (tmp_path / "last" / "trainer.json").is_file()  # still there to resume
    else:
        saved = pd.read_csv(whole[0] / "history.csv", float_precision="round_trip")
        assert_same_history(history, saved)


@pytest.mark.parametrize("moment", ["before the save", "between delete and rename"])
def test_stop_while_the_resume_point_is_written_loses_nothing(
    sets, whole, tmp_path, monkeypatch, moment
):
    run = trainer(sets, tmp_path, ChannelNet(0.2), **EVERYTHING)
    replace = os.replace

    def stop(source, target):
        if Path(target).name == "last" and run.epoch == 2:
            if moment == "between delete and rename":
                shutil.rmtree(target, ignore_errors=True)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    run.fit()
    monkeypatch.setattr(os, "replace", replace)
    trainer(sets, tmp_path, ChannelNet(0.2, seed=4), **EVERYTHING).resume()
    assert_same_run(tmp_path, whole[0])


def test_interrupt_before_the_first_epoch_ended_leaves_nothing_to_resume(sets, tmp_path):
    run = trainer(sets, tmp_path)
    interrupt_at(run.model, 2)
    with pytest.raises(KeyboardInterrupt, match="Stopped in epoch 1; nothing is kept"):
        run.fit()
    assert not (tmp_path / BEST).exists()
    with pytest.raises(RuntimeError, match="has trained"):  # half an epoch: no fresh start
        run.fit()
    with pytest.raises(FileNotFoundError, match=r"no finished epoch to resume; call fit\(\)"):
        trainer(sets, tmp_path).resume()


def test_resuming_a_finished_run_returns_its_history_and_best_weights(sets, tmp_path):
    history = trainer(sets, tmp_path).fit()
    before = weights_of(tmp_path / BEST)
    run = trainer(sets, tmp_path, ChannelNet(seed=3))
    assert_same_history(run.resume(), history)
    assert_same_weights(weights_of(run), before)


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.5}, {"batch_size": 2}, {"loss": "asl"}, {"seed": 1}]
)
def test_resuming_with_another_setting_is_refused_by_its_name(sets, tmp_path, changes):
    trainer(sets, tmp_path, epochs=1).fit()
    with pytest.raises(ValueError, match=f"another {next(iter(changes))}; restore it"):
        trainer(sets, tmp_path, **{"epochs": 1, **changes}).resume()


def test_same_seed_gives_the_same_run_and_another_seed_does_not(sets, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = trainer(sets, tmp_path / name, ChannelNet(0.2), seed=seed, epochs=2)
        runs[name] = (run.fit(), weights_of(run))
    assert_same_history(runs["a"][0], runs["b"][0])
    assert_same_weights(runs["a"][1], runs["b"][1])
    assert runs["a"][0]["train_loss"].tolist() != runs["c"][0]["train_loss"].tolist()


def test_two_trainers_in_one_process_do_not_change_each_other(sets, tmp_path):
    first = trainer(sets, tmp_path / "a", epochs=1, batch_size=2)
    trainer(sets, tmp_path / "b", epochs=1, batch_size=2, grad_accum_steps=5)
    taken = record_steps(first)
    first.fit()
    assert len(taken) == 5


def test_second_training_in_a_run_folder_is_refused(sets, tmp_path):
    """Else the first one would end with the weights of the second."""
    refused = []

    def start_another(row):
        if row["epoch"] == 2:
            for begin in (trainer(sets, tmp_path, ChannelNet(seed=7)), run):
                for call in (begin.resume, begin.fit):
                    with pytest.raises(RuntimeError) as error:
                        call()
                    refused.append(str(error.value))
            other = trainer(sets, tmp_path / "other", ChannelNet(seed=7))
            assert len(other.fit()) == 3

    run = trainer(sets, tmp_path, ChannelNet())
    found = run.fit(start_another)
    fix = "let it end or stop it first, or give this one another RUN_DIR"
    assert refused[0] == f"{tmp_path}: another training runs in this folder; {fix}."
    assert len(refused) == 4
    alone = trainer(sets, tmp_path / "alone", ChannelNet())
    assert_same_history(found, alone.fit())
    assert_same_weights(weights_of(run), weights_of(alone))
    assert len(trainer(sets, tmp_path, ChannelNet()).fit()) == 3  # it is free again


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_in_another_process_is_refused_until_that_one_is_killed(
    tables, sets, tmp_path, num_workers
):
    body = """
run = t.trainer(parts, job["dir"], t.ChannelNet(), epochs=9999, num_workers=job["workers"])
run.fit(lambda row: print("epoch", flush=True))
"""
    call = write_script(tmp_path, tables, body, dir=str(tmp_path / "run"), workers=num_workers)
    first = subprocess.Popen([sys.executable, *call], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"epoch\n"
        for call in ("fit", "resume"):
            with pytest.raises(RuntimeError, match="another training runs in this folder"):
                getattr(trainer(sets, tmp_path / "run"), call)()
    finally:
        first.kill()
        first.wait()
    for _ in range(600):  # its workers notice after some seconds that they are alone
        try:
            history = trainer(sets, tmp_path / "run").fit()
            break
        except RuntimeError:
            time.sleep(0.5)
    assert len(history) == 3


def test_folder_is_free_after_a_training_that_failed(sets, tmp_path):
    def fail(row):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        trainer(sets, tmp_path).fit(fail)
    assert len(trainer(sets, tmp_path).resume()) == 3


def test_classifier_is_not_saved_over_a_training_that_runs(tables, tmp_path):
    def model():
        return du.build_model("test_vit", 3, pretrained=False, img_size=16, patch_size=4)

    one = du.Classifier(model(), LABELS, [0.5] * 3)
    parts = [du.DataPartition(table, LABELS, one.transform) for table in tables]

    def save(row):
        with pytest.raises(RuntimeError, match="another training runs in this folder"):
            one.save(tmp_path)

    trainer(parts, tmp_path, model(), epochs=1, warmup_epochs=0).fit(save)
    assert not (tmp_path / "best_classifier.json").exists()
    assert one.save(tmp_path).is_file()


# ---------------------------------------------------------------- what stops a run


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "repvit_m0_9", "resnet10t"])
def test_every_backbone_trains_where_one_photo_is_left_over(tables, tmp_path, name):
    """Batch norm after the pooling, or on maps of one position, cannot learn from one photo."""
    model = du.build_model(name, 3, pretrained=False, img_size=32)
    parts = [
        du.DataPartition(table.iloc[:5], LABELS, du.make_transforms(model, train))
        for table, train in zip(tables, (True, False))
    ]
    history = trainer(parts, tmp_path, model, epochs=2, learning_rate=1e-3).fit()
    assert history["step"].tolist() == [1, 2]
    if name == "mobilenetv4_conv_small":
        with pytest.raises(ValueError, match="one photo at a time; take a batch_size of 2 or more"):
            trainer(parts, tmp_path, model, epochs=1, warmup_epochs=0, batch_size=1).fit()
        options = {"batch_norm": "frozen", "batch_size": 1, "learning_rate": 1e-3}
        trainer(parts, tmp_path, model, epochs=1, warmup_epochs=0, **options).fit()


def test_model_that_answers_nan_on_validation_stops_with_a_sentence(sets, tmp_path):
    """The last step of an epoch may spoil the weights after all its losses were numbers."""
    run = trainer(sets, tmp_path)
    spoil = lambda *_: run.step == 2 and run.plain.head.bias.data.fill_(NAN)  # noqa: E731
    run.optimizer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(FloatingPointError, match="answers NaN after epoch 1; lower learning_rate"):
        run.fit()
    assert not (tmp_path / BEST).exists()


def test_loss_that_is_not_a_number_stops_with_a_sentence(sets, tmp_path):
    model = ChannelNet()
    model.head.bias.data[0] = NAN
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 1; lower learning_rate"):
        trainer(sets, tmp_path, model).fit()


def test_partitions_with_other_labels_or_another_order_are_refused(tables, tmp_path):
    train = du.DataPartition(tables[0], LABELS, ToUnit(True))
    for labels in (LABELS[:2], LABELS[::-1]):
        val = du.DataPartition(tables[1], labels, ToUnit(False))
        with pytest.raises(ValueError, match="different labels or order"):
            trainer((train, val), tmp_path)


def test_validation_part_without_any_present_label_is_refused(tables, sets, tmp_path):
    empty = tables[1].assign(**dict.fromkeys(LABELS, 0))
    val = du.DataPartition(empty, LABELS, ToUnit(False))
    with pytest.raises(ValueError, match="no label is present in the validation part"):
        trainer((sets[0], val), tmp_path)


IMPOSSIBLE = [(name, v) for name in ("epochs", "batch_size", "patience") for v in (0, -1, 1.5)]
IMPOSSIBLE += [(name, v) for name in ("learning_rate", "clip_grad") for v in (0, -1, NAN)]
IMPOSSIBLE += [(name, v) for name in ("layer_decay", "ema_decay") for v in (0, -1, 2)]
IMPOSSIBLE += [(name, -1) for name in ("weight_decay", "mixup_alpha", "cutmix_alpha")]
IMPOSSIBLE += [("learning_rate", None)]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_settings_that_cannot_be_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        du.TrainConfig(**{name: value})


def test_unreadable_picture_stops_training_by_its_name(tables, tmp_path):
    table = tables[0].copy()
    (tmp_path / "broken.png").write_bytes(b"nothing")
    table.loc[3, "image_path"] = str(tmp_path / "broken.png")
    sets = [du.DataPartition(t, LABELS, ToUnit(False)) for t in (table, tables[1])]
    with pytest.raises(OSError, match=r"broken\.png"):
        trainer(sets, tmp_path / "run").fit()


# ---------------------------------------------------------------- device


@pytest.mark.parametrize("precision", ["no", "bf16", "auto"])
def test_precision_is_what_was_asked_for(sets, tmp_path, precision):
    run = trainer(sets, tmp_path, precision=precision, epochs=2)
    wanted = du.fast_precision(run.model) if precision == "auto" else precision
    assert run.accelerator.mixed_precision == wanted
    kinds = set()
    run.model.head.register_forward_hook(lambda _, __, output: kinds.add(output.dtype))
    history = run.fit()
    assert kinds == {{"no": torch.float32, "bf16": torch.bfloat16}.get(wanted, torch.float16)}
    assert np.isfinite(history[["train_loss", "val_loss"]]).all(axis=None)
    assert all(v.dtype == torch.float32 for v in weights_of(tmp_path / BEST).values())


@pytest.mark.parametrize(("units", "wanted"), [(["avx512_bf16"], "bf16"), (["avx2"], "no")])
def test_half_precision_only_where_the_cpu_has_it_and_not_for_depth_wise_convolutions(
    monkeypatch, units, wanted
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    products = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(12)))
    dense = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(12)))
    depth_wise = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1, groups=4) for _ in range(12)))
    assert du.fast_precision(products) == wanted
    assert du.fast_precision(dense) == wanted
    assert du.fast_precision(depth_wise) == du.fast_precision(depth_wise, training=False) == "no"
    capabilities = {"avx512_bf16": True, "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert du.fast_precision(depth_wise) == "no"
    assert du.fast_precision(depth_wise, training=False) == "bf16"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert du.fast_precision(products) == "no"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert du.fast_precision(products) == "bf16"


def test_model_that_stays_on_the_cpu_gets_the_precision_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    depth_wise = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1, groups=4) for _ in range(12)))
    assert du.fast_precision(depth_wise) == "fp16"
    assert du.fast_precision(depth_wise, "cpu") == "no"


def test_memory_of_a_model_is_free_as_soon_as_it_is_let_go(sets, tmp_path):
    model = ChannelNet()
    run = trainer(sets, tmp_path, model, precision="bf16", epochs=1)
    run.fit()
    alive = weakref.ref(model)
    gc.disable()
    try:
        del run, model
        assert alive() is None  # with no help of the garbage collector
    finally:
        gc.enable()


def test_batch_that_was_broken_off_half_unscaled_is_forgotten(sets, tmp_path):
    run = trainer(sets, tmp_path, epochs=1)
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu")
    optimizer = run.optimizer.optimizer
    scaler.scale(sum(p.sum() for p in run.plain.parameters())).backward()
    scaler.unscale_(optimizer)  # here the stop button was pressed
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scales = []
    run.plain.register_forward_pre_hook(lambda *_: scales.append(len(scaler._per_optimizer_states)))
    run.fit()
    assert scales[0] == 0


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"processes": 4}, "trained with processes=4, now it is 1; resume as"),
        ({"precision": "fp16"}, "trained with precision='fp16', now it is 'no'; resume as"),
        ({"images": 999}, "trained with images=999, now it is"),
    ],
)
def test_resume_on_a_machine_that_cannot_go_on_is_refused(sets, tmp_path, saved, message):
    trainer(sets, tmp_path, epochs=1).fit()
    path = tmp_path / "last" / "trainer.json"
    state = json.loads(path.read_text())
    assert (state["processes"], state["precision"]) == (1, "no")
    path.write_text(json.dumps(state | saved))
    with pytest.raises(ValueError, match=message):
        trainer(sets, tmp_path, epochs=1).resume()


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "{"), ("config.json", None), ("last/trainer.json", "[1]")]
)
def test_broken_run_folder_is_named_with_what_to_do(sets, tmp_path, name, content):
    trainer(sets, tmp_path, epochs=1).fit()
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read .*; call fit\(\) to start"):
        trainer(sets, tmp_path, epochs=1).resume()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "abc"}, "learning_rate='abc': expected more than 0"),
        ({"weight_decay": None}, "weight_decay=None: expected 0 or more"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha=nan: expected 0 or more"),
        ({"loss": None}, "loss=None.*: expected a name"),
        ({"loss_kwargs": {"label_smoothing": 0.5}}, "a dict without label_smoothing"),
        ({"loss_kwargs": None}, "a dict without label_smoothing"),
        ({"label_smoothing": "0.1"}, "label_smoothing='0.1': expected 0 to below 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number"),
    ],
)
def test_values_of_another_kind_are_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        du.TrainConfig(**options)


def test_unknown_precision_is_refused(sets, tmp_path):
    with pytest.raises(ValueError, match="half"):
        trainer(sets, tmp_path, precision="half")


@pytest.mark.parametrize(
    ("name", "kwargs", "wish", "expected"),
    [
        ("resnet10t", {}, None, True),
        ("resnet10t", {}, False, False),
        (
            "swinv2_tiny_window8_256",
            {"window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
            None,
            False,
        ),
    ],
)
def test_channels_last_reaches_convolutional_backbones_only(
    sets, tmp_path, name, kwargs, wish, expected
):
    model = du.build_model(name, 3, pretrained=False, img_size=16, **kwargs)
    run = trainer(sets, tmp_path, model, channels_last=wish, epochs=1)
    inputs = []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    run.fit()
    assert {x.is_contiguous(memory_format=torch.channels_last) for x in inputs} == {expected}
    saved = weights_of(tmp_path / BEST)
    assert all(weight.is_contiguous() for weight in saved.values())  # the same file either way


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl")),
    reason="torch.compile needs a C++ compiler on the CPU",
)
def test_compiled_model_trains_and_saves_plain_weights(tables, tmp_path):
    sets = [du.DataPartition(table.iloc[:4], LABELS, ToUnit(False)) for table in tables]
    runs = {}
    for switch in (True, False):
        run = trainer(sets, tmp_path / str(switch), compile=switch, epochs=2)
        history = run.fit()
        runs[switch] = history
        ChannelNet().load_state_dict(weights_of(tmp_path / str(switch) / BEST))
    assert runs[True]["train_loss"].tolist() == pytest.approx(
        runs[False]["train_loss"].tolist(), rel=1e-4
    )


def test_two_processes_share_the_work_and_agree_on_validation(tables, tmp_path):
    """10 training and 7 validation pictures: neither divides evenly."""
    body = """
import numpy as np
run = t.trainer(parts, job["dir"], batch_size=2, epochs=3, patience=3)
run.fit()
assert run.accelerator.num_processes == 2
assert len(run.loader) == 3
rank = run.accelerator.process_index
np.save(job["dir"] + f"/probs{rank}.npy", run.predict(parts[1]))
np.save(job["dir"] + f"/loss{rank}.npy", [row["train_loss"] for row in run.history])
run.accelerator.wait_for_everyone()
run.accelerator.end_training()  # or a process may abort while the other still talks to it
os._exit(0)  # threads of torch may abort while the interpreter is taken down
"""
    run_dir = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    cpu = {"ACCELERATE_USE_CPU": "true"}  # what `accelerate launch --cpu` sets
    launch(tmp_path, tables, body, launcher, env=cpu, dir=str(run_dir))
    model = ChannelNet()
    model.load_state_dict(weights_of(run_dir / BEST))
    val = du.DataPartition(tables[1], LABELS, ToUnit(False))
    expected = probabilities(model, val)
    for rank in (0, 1):
        np.testing.assert_allclose(np.load(run_dir / f"probs{rank}.npy"), expected, atol=1e-5)
    history = pd.read_csv(run_dir / "history.csv")
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["step"].tolist() == [3, 6, 9]  # 10 pictures, 2 × 2 at once
    for rank in (0, 1):  # the loss is that of all processes
        losses = np.load(run_dir / f"loss{rank}.npy")
        assert losses == pytest.approx(history["train_loss"].tolist())
    best = history["val_mAP"].max()
    assert mean_ap(val.targets, expected) == pytest.approx(best, abs=1e-6)


def normed_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def test_moving_average_of_batch_norm_is_that_of_the_main_process_in_all(tables, tmp_path):
    body = """
import numpy as np, torch
options = {"batch_size": 2, "epochs": 2, "ema_decay": 0.5}
run = t.trainer(parts, job["dir"], t.normed_net(), **options)
run.fit()
rank = run.accelerator.process_index
np.save(job["dir"] + f"/probs{rank}.npy", run.predict(parts[1], "ema"))
torch.save(run.ema.module.state_dict(), job["dir"] + f"/ema{rank}.pt")
run.accelerator.wait_for_everyone()
run.accelerator.end_training()
os._exit(0)
"""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    cpu = {"ACCELERATE_USE_CPU": "true"}
    launch(tmp_path, tables, body, launcher, env=cpu, dir=str(tmp_path))
    model = normed_net()
    model.load_state_dict(weights_of(tmp_path / "ema0.pt"))
    expected = probabilities(model, du.DataPartition(tables[1], LABELS, ToUnit(False)))
    for rank in (0, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"probs{rank}.npy"), expected, atol=1e-5)
    assert_same_weights(weights_of(tmp_path / "ema1.pt"), weights_of(tmp_path / "ema0.pt"))
