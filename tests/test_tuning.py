"""The search of tuning.ipynb: studies that resume and are shared, failures, what it hands over."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings

import data_utils as du

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from conftest import ROOT
from optuna.trial import TrialState
from PIL import Image

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "batch_size": {"choices": [8, 16, 32]},
}
DEFAULT = {"head": "linear", "learning_rate": 1e-3, "weight_decay": 0.1, "layer_decay": None}
DEFAULT |= {"batch_size": 4, "rand_augment": None, "loss": "bce"}


@pytest.fixture(scope="module")
def nb(notebook_functions):
    return notebook_functions("tuning")


def about(space=SPACE, **settings):
    return {"search space": space, "settings": {"TRIAL_EPOCHS": 2, "kernel": (1, 2), **settings}}


def draw(trial, nb):
    values = {name: nb.suggest(trial, name, space) for name, space in SPACE.items()}
    return -abs(np.log(values["learning_rate"] / 1e-3)) - values["batch_size"] / 100


def params_of(study):
    return [trial.params for trial in study.trials]


# ---------------------------------------------------------------- the study


def test_study_is_reproducible_resumes_and_does_not_repeat_itself(nb, tmp_path):
    found = {}
    for name in ("one", "other"):
        for _ in range(2):  # the second time it goes on
            study = nb.open_study(tmp_path / name, "s", about(), 42)
            study.optimize(lambda trial: draw(trial, nb), n_trials=4)
        found[name] = params_of(study)
    assert len(found["one"]) == 8
    assert found["one"] == found["other"]
    rates = [values["learning_rate"] for values in found["one"]]
    assert len(set(rates)) == 8
    another = nb.open_study(tmp_path / "third", "s", about(), 42 + 1000)
    another.optimize(lambda trial: draw(trial, nb), n_trials=4)
    assert params_of(another) != found["one"][:4]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            about({"batch_size": SPACE["batch_size"]}),
            r"another search space \(\['learning_rate'\]\)",
        ),
        (
            about(SPACE | {"batch_size": {"choices": [8, 16]}}),
            r"another search space \(\['batch_size'\]\)",
        ),
        (about(TRIAL_EPOCHS=3), r"another settings \(\['TRIAL_EPOCHS'\]\)"),
        (about(more=1), r"another settings \(\['more'\]\)"),
        (  # equal numbers, but optuna tells whole from other ones
            about(SPACE | {"batch_size": {"choices": [8.0, 16, 32]}}),
            r"another search space \(\['batch_size'\]\)",
        ),
    ],
)
def test_study_of_another_search_is_refused_in_a_sentence(nb, tmp_path, change, named):
    nb.open_study(tmp_path, "s", about(), 42)
    nb.open_study(tmp_path, "s", about(), 42)  # the same is welcome
    message = rf"study\.db: study 's' was begun with {named}; restore it, or give STUDY_NAME"
    with pytest.raises(ValueError, match=message):
        nb.open_study(tmp_path, "s", change, 42)
    nb.open_study(tmp_path, "new", change, 42)


def test_file_that_is_no_study_is_named(nb, tmp_path, monkeypatch):
    monkeypatch.setattr(nb.time, "sleep", lambda seconds: None)
    (tmp_path / "study.db").write_text("no database " * 100)
    with pytest.raises(ValueError, match=r"study\.db: no study can be opened there; delete it"):
        nb.open_study(tmp_path, "s", about(), 42)


def test_settings_that_json_does_not_know_are_stored_as_text(nb, tmp_path):
    study = nb.open_study(tmp_path, "s", about(PRETRAINED=tmp_path / "a.pt"), 42)
    assert study.user_attrs["settings"]["PRETRAINED"] == str(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"another settings \(\['PRETRAINED'\]\)"):
        nb.open_study(tmp_path, "s", about(PRETRAINED=tmp_path / "b.pt"), 42)


@pytest.mark.parametrize(
    ("name", "space", "default", "message"),
    [
        ("loss", {"choices": ["asl"]}, "bce", "leaves out the default, loss = 'bce'; let the"),
        ("loss", {"choices": "bce"}, "bce", "leaves out the default"),
        ("loss", ["bce"], "bce", "expected choices, or low and high"),
        ("weight_decay", {"low": 0.1, "high": 0.01}, 0.05, "low must be below high"),
        ("weight_decay", {"low": 0, "high": 1, "log": True}, 0.05, "low must be below high"),
        ("weight_decay", {"low": 0.1}, 0.05, "see above"),
        ("weight_decay", {"low": 0.1, "high": 1, "lgo": True}, 0.2, "see above"),
        ("weight_decay", {"low": "a", "high": 1}, 0.2, "numbers, please"),
        ("batch_size", {"low": 8.0, "high": 32}, 16, "numbers, please"),
        ("batch_size", {"choices": None, "low": 8, "high": 32}, 16, "choices stand alone"),
    ],
)
def test_mistakes_in_the_search_space_stop_before_the_search(nb, name, space, default, message):
    with pytest.raises(AssertionError, match=message):
        nb.check_space(name, space, default)


def test_whole_bounds_of_a_rate_still_give_rates_between_them(nb):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.enqueue_trial({"weight_decay": 0.05})
    space = {"low": 0, "high": 1}
    nb.check_space("weight_decay", space, 0.05)
    found = [nb.suggest(study.ask(), "weight_decay", space) for _ in range(5)]
    assert found[0] == 0.05
    assert not {*found} & {0, 1}


def test_search_spaces_that_hold_the_default_are_taken(nb):
    for pretrained in (False, True):
        recipe = du.TrainConfig.recipe(pretrained, 300, loss="bce")  # as a run's config.json has it
        for name, space in nb.SEARCH_SPACE.items():
            nb.check_space(name, space, getattr(recipe, name))


def test_processes_share_a_study(nb, tmp_path):
    """Two real processes at once, neither finds a file; each notes which trials it ran."""
    code = """
import os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import optuna
from conftest import load_notebook_functions
import test_tuning as t
nb = load_notebook_functions("tuning")
study = nb.open_study(sys.argv[2], "s", t.about(), 42 + 1000 * int(sys.argv[3]))

def objective(trial):
    trial.set_user_attr("worker", int(sys.argv[3]))
    time.sleep(0.05)
    return t.draw(trial, nb)

states = (optuna.trial.TrialState.COMPLETE,)
enough = optuna.study.MaxTrialsCallback(10, states)
study.optimize(objective, None, callbacks=[enough])
"""
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(worker)]) for worker in (0, 1)]
    assert [process.wait(300) for process in processes] == [0, 0]
    trials = nb.open_study(tmp_path, "s", about(), 42).trials
    assert 10 <= len(trials) <= 11  # the last two may end together
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert {trial.user_attrs["worker"] for trial in trials} == {0, 1}
    rates = [trial.params["learning_rate"] for trial in trials]
    assert len(set(rates)) == len(trials)


def test_trial_of_a_killed_process_is_failed_when_the_search_goes_on(nb, tmp_path):
    code = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from conftest import load_notebook_functions
import test_tuning as t
study = load_notebook_functions("tuning").open_study(sys.argv[2], "s", t.about(), 42)
study.optimize(lambda trial: print("begun", flush=True) or time.sleep(600), n_trials=1)
"""
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    with sqlite3.connect(tmp_path / "study.db", timeout=60) as file:
        for _ in range(100):  # its first heartbeat comes from a thread
            if file.execute("SELECT COUNT(*) FROM trial_heartbeats").fetchone()[0]:
                break
            time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with sqlite3.connect(tmp_path / "study.db") as file:  # an hour later
        file.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
    study = nb.open_study(tmp_path, "s", about(), 42)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    study.optimize(lambda trial: draw(trial, nb), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


# ---------------------------------------------------------------- a trial


@pytest.mark.parametrize(
    ("name", "space", "kind", "is_inside"),
    [
        ("x", {"choices": [None, 0.9]}, (type(None), float), lambda v: v in (None, 0.9)),
        ("x", {"low": 1e-4, "high": 1e-2, "log": True}, float, lambda v: 1e-4 <= v <= 1e-2),
        ("x", {"low": 0.5, "high": 1}, float, lambda v: 0.5 <= v <= 1),
        ("batch_size", {"low": 2, "high": 5}, int, lambda v: 2 <= v <= 5),
    ],
)
def test_values_are_drawn_from_their_space(nb, name, space, kind, is_inside):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    drawn = [nb.suggest(study.ask(), name, space) for _ in range(50)]
    assert all(isinstance(value, kind) and is_inside(value) for value in drawn)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        FloatingPointError("nan"),
        MemoryError("full"),
        RuntimeError("shapes differ"),
        ValueError("Expected more than 1 value per channel"),
        KeyError("oops"),
    ],
)
def test_failed_trial_is_recorded_with_its_reason_and_the_study_goes_on(nb, error):
    def objective(trial):
        if trial.number == 1:
            raise error
        return 1.0

    study = optuna.create_study(direction="maximize")
    study.optimize(nb.recording(objective), n_trials=3, catch=(Exception,))
    complete, failed = TrialState.COMPLETE, TrialState.FAIL
    assert [trial.state for trial in study.trials] == [complete, failed, complete]
    assert study.trials[1].user_attrs["error"] == f"{type(error).__name__}: {error}"


def test_pruned_trial_is_no_failed_one(nb):
    def objective(trial):
        raise optuna.TrialPruned

    study = optuna.create_study()
    study.optimize(nb.recording(objective), n_trials=1, catch=(Exception,))
    assert study.trials[0].state == TrialState.PRUNED and not study.trials[0].user_attrs


def test_pruner_of_the_study_judges_from_the_second_epoch_on(nb, tmp_path):
    study = nb.open_study(tmp_path, "s", about(), 42)
    for _ in range(4):
        trial = study.ask()
        for epoch in (1, 2, 3):
            trial.report(0.5 + epoch / 10, epoch)
        study.tell(trial, 0.8)
    bad = study.ask()
    bad.report(0.1, 1)
    assert not bad.should_prune()
    bad.report(0.1, 2)
    assert bad.should_prune()
    good = study.ask()
    good.report(0.9, 2)
    assert not good.should_prune()


class FakeTrainer:
    scores = (0.2, 0.6, 0.4)
    stopped = False
    fit_whole = du.Trainer.fit_whole

    def fit(self, report):
        rows = []
        for epoch, score in enumerate(self.scores, start=1):
            rows.append({"epoch": epoch, "val_mAP": score})
            report(rows[-1])
        return pd.DataFrame(rows)


@pytest.fixture
def trial_nb(nb, monkeypatch):
    values = {"SEARCH_SPACE": SPACE, "TRIAL_EPOCHS": 3, "seen": []}
    for name, value in values.items():
        monkeypatch.setattr(nb, name, value, raising=False)

    def build_trainer(values, folder, seed):
        nb.seen.append(values)
        return FakeTrainer()

    monkeypatch.setattr(nb, "build_trainer", build_trainer)
    return nb


def test_trial_reports_every_epoch_and_returns_its_best(trial_nb):
    study = optuna.create_study(direction="maximize")
    study.optimize(trial_nb.train_trial, n_trials=1)
    trial = study.trials[0]
    assert trial.intermediate_values == {1: 0.2, 2: 0.6, 3: 0.4}
    assert trial.value == 0.6
    assert trial_nb.seen == [trial.params]


def test_pruner_ends_a_trial_between_epochs(trial_nb):
    pruner = optuna.pruners.ThresholdPruner(lower=0.5, n_warmup_steps=1)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    study.optimize(trial_nb.train_trial, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].intermediate_values == {1: 0.2}


def test_stop_button_ends_the_search_and_not_only_a_trial(trial_nb, monkeypatch):
    monkeypatch.setattr(FakeTrainer, "scores", (0.2,))  # Trainer.fit() returns early
    monkeypatch.setattr(FakeTrainer, "stopped", True)
    study = optuna.create_study(direction="maximize")
    with pytest.raises(KeyboardInterrupt):
        study.optimize(trial_nb.recording(trial_nb.train_trial), 5, catch=(Exception,))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    assert study.trials[0].user_attrs["error"] == "KeyboardInterrupt"


LABELS = ["red", "green"]
SWIN = {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}


@pytest.fixture
def real_nb(nb, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        target = [i % 2, i // 2 % 2]
        pixels = rng.integers(0, 60, (32, 32, 3)) + 150 * np.array([*target, 0])
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append([str(tmp_path / f"{i}.png"), str(i), *target])
    table = pd.DataFrame(rows, columns=["image_path", "group_id", *LABELS])
    for name in ("train", "val"):
        own = table.assign(group_id=name + table["group_id"])  # no group in two parts
        du.write_partition(own, tmp_path / f"{name}_partition.csv")
    base = du.TrainConfig.recipe(
        False, 8, partition_dir=str(tmp_path), img_width=32, model_kwargs=SWIN,
        model_name="swinv2_tiny_window8_256", grad_accum_steps=2, batch_size=4,
    )  # fmt: skip
    values = {"base": base, "HEAD_KWARGS": {"csra": {"lam": 0.3}}}
    values |= {"TRIAL_EPOCHS": 2, "SEARCH_SPACE": SPACE}
    for name, value in values.items():
        monkeypatch.setattr(nb, name, value, raising=False)
    return nb


def test_every_searched_value_reaches_the_training(real_nb, tmp_path):
    values = {"head": "csra", "learning_rate": 0.01, "weight_decay": 0.3, "layer_decay": 0.5}
    values |= {"batch_size": 3, "rand_augment": "rand-m5-n1", "loss": "asl"}
    run = real_nb.build_trainer(values, tmp_path / "run", 7)
    assert run.plain.spec["head"] == "csra"
    assert run.plain.spec["head_kwargs"] == {"lam": 0.3}
    groups = run.optimizer.param_groups
    assert max(group["weight_decay"] for group in groups) == 0.3
    full = run.learning_rates().max(0)
    assert full.max() / full.min() > 2  # layers below learn at half the rate and less
    config = run.config
    assert (config.learning_rate, config.batch_size, config.loss) == (0.01, 3, "asl")
    assert (config.seed, config.epochs, config.patience) == (7, 2, 2)
    assert config.grad_accum_steps == 2  # of the baseline
    assert (config.start, config.weight_decay) == ("small", 0.3)  # its recipe; the trial
    assert (config.head, config.head_kwargs) == ("csra", {"lam": 0.3})
    steps = [type(step).__name__ for step in run.loader.dataset.transform.transforms]
    assert "RandAugment" in steps
    assert "RandAugment" not in [type(s).__name__ for s in run.val_set.transform.transforms]


def test_real_trial_trains(real_nb):
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"learning_rate": 1e-3, "batch_size": 8})
    study.optimize(real_nb.train_trial, n_trials=1)
    trial = study.trials[0]
    assert list(trial.intermediate_values) == [1, 2]
    assert trial.value == max(trial.intermediate_values.values())


# ---------------------------------------------------------------- what other notebooks take


def write(tmp_path, content):
    path = tmp_path / "best_parameters.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_found_values_come_back_by_their_names(tmp_path):
    path = write(tmp_path, DEFAULT)
    found = du.read_tuned(path, "linear")
    assert found == {name: value for name, value in DEFAULT.items() if name != "head"}
    found_with = {"model_name": "a"}
    path = write(tmp_path, DEFAULT | {"found_with": found_with})
    assert du.read_tuned(path, "linear", found_with) == found


@pytest.mark.parametrize("notebook", ["training", "csra", "mldecoder"])
def test_notebooks_know_every_name_that_the_search_hands_over(notebook_functions, notebook):
    assert DEFAULT.keys() <= set(du.TUNABLE) <= vars(du.TrainConfig()).keys()
    assert not {"partition_dir", "pretrained", "cache_dir"} & set(du.TUNABLE)
    assert "TUNED" in vars(notebook_functions(notebook))


@pytest.mark.parametrize(
    ("content", "head", "message"),
    [
        (DEFAULT, "csra", r"found for head='linear', not 'csra'; use training\.ipynb"),
        (DEFAULT | {"head": "mldecoder"}, "linear", r"use mldecoder\.ipynb"),
        (DEFAULT | {"run_dir": "/etc"}, "linear", "no option run_dir; expected some of epochs"),
        (DEFAULT | {"partition_dir": "/etc"}, "linear", "no option partition_dir; expected some"),
        (DEFAULT | {"lerning_rate": 1}, "linear", r"lerning_rate; .*did you mean learning_rate\?"),
        (DEFAULT | {"learning_rate": "abc"}, "linear", "learning_rate='abc': expected more than 0"),
        (DEFAULT | {"batch_size": 2.5}, "linear", "batch_size=2.5: expected a whole number"),
        (DEFAULT | {"weight_decay": None}, "linear", "weight_decay=None: expected 0 or more"),
        (DEFAULT | {"layer_decay": True}, "linear", "layer_decay=True: expected more than 0"),
        ("{", "linear", r"no best_parameters\.json of tuning\.ipynb"),
        ([1], "linear", r"no best_parameters\.json"),
        ({"learning_rate": 1}, "linear", r"no best_parameters\.json"),
    ],
)
def test_file_that_does_not_fit_is_refused_in_a_sentence(tmp_path, content, head, message):
    with pytest.raises(ValueError, match=rf"best_parameters\.json: .*{message}"):
        du.read_tuned(write(tmp_path, content), head)


def test_search_with_a_head_of_ones_own_is_read(tmp_path, monkeypatch):
    path = write(tmp_path, DEFAULT | {"head": "mine"})
    with pytest.raises(ValueError, match="head='mine': expected 'linear' or 'csra'"):
        du.read_tuned(path, "mine")
    monkeypatch.setitem(du.HEADS, "mine", du.CSRA)
    assert du.read_tuned(path, "mine").keys() == DEFAULT.keys() - {"head"}


def test_values_of_another_network_are_taken_with_a_warning(tmp_path):
    found_with = {"model_name": "a", "model_kwargs": {"depths": (2, 2)}, "img_width": 64}
    path = write(tmp_path, DEFAULT | {"found_with": found_with})
    expected = {name: value for name, value in DEFAULT.items() if name != "head"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert du.read_tuned(path, "linear", found_with) == expected
    with pytest.warns(UserWarning, match="found with another model_name, img_width; search again"):
        now = found_with | {"model_name": "b", "img_width": 96}
        assert du.read_tuned(path, "linear", now) == expected


def test_missing_file_names_the_notebook_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run tuning\.ipynb"):
        du.read_tuned(tmp_path / "gone.json", "linear")
