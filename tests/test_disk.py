"""Full disks, folders that vanish or are read-only, and processes that were killed."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import data_utils as du

import numpy as np
import pandas as pd
import pytest
import test_training as t
from test_training import sets, tables, trainer  # noqa: F401 - fixtures

resource = pytest.importorskip("resource", reason="limits of a process: not on Windows")


@contextlib.contextmanager
def full_after(n_bytes):
    """Let the system refuse what would make any file longer, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


WRITERS = {
    "table": lambda path: du.write_partition(
        pd.DataFrame({"image_path": [str(path.parent / "a.jpg")] * 50, "group_id": "g"}), path
    ),
    "json": lambda path: du._write_json(path, {"a": "b" * 500}),
    "weights": lambda path: du._save_weights(t.ChannelNet(), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_one_sentence_and_the_old_file_stays(writer, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with full_after(100), pytest.raises(OSError) as told:
        WRITERS[writer](path)
    sentence = str(told.value)
    assert sentence.startswith(f"{path}: cannot be written (")
    assert sentence.endswith(
        "); free some space or take another folder; what stood there is unchanged, run this again."
    )
    assert content_of(tmp_path) == {"file": b"old"}  # and nothing half written
    WRITERS[writer](path)
    assert path.stat().st_size > 100


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_refusals_of_the_system_name_the_file_and_the_reason(number, tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(OSError, match="free some space or take another folder") as told:
        du._write_json(tmp_path / "a.json", {})
    expected = f"{tmp_path / 'a.json'}: cannot be written ({os.strerror(number)}); "
    assert str(told.value).startswith(expected)


def test_folder_that_cannot_be_made_or_vanishes_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"a\.json: cannot be written \(.*free some space"):
        du._write_json(tmp_path / "file" / "a.json", {})
    with (
        pytest.raises(OSError, match=r"gone/a\.json: cannot be written \(No such file"),
        du.replacing(tmp_path / "gone" / "a.json") as temporary,
    ):
        shutil.rmtree(tmp_path / "gone")
        temporary.write_text("{}")


def test_other_errors_inside_stay_what_they_are(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "photo.jpg"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)) as told, du.replacing(tmp_path / "a.json"):
            raise error
        assert told.value is error


def test_what_torch_says_of_a_full_disk_is_the_same_sentence(tmp_path):
    said = "[enforce fail at inline_container.cc:672] . unexpected pos 10359616 vs 10359508"
    told = pytest.raises(OSError, match="last: cannot be written .* free some space")
    with told, du.writing(tmp_path / "last"):
        raise RuntimeError(said)


def test_remains_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    old, new, other = (tmp_path / n for n in (".a.json.1.tmp", ".a.json.2.tmp", "b.tmp"))
    for file in (old, new, other):
        file.write_text("half")
    for file in (old, other):
        os.utime(file, (time.time() - 7200,) * 2)
    du._remove_stale.cache_clear()
    du._write_json(tmp_path / "a.json", {})
    assert sorted(content_of(tmp_path)) == [".a.json.2.tmp", "a.json", "b.tmp"]


def test_only_the_first_of_launched_processes_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    du._write_json(tmp_path / "b.json", {})  # a queue sets that for a process that is alone
    (tmp_path / "b.json").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    du._write_json(tmp_path / "a.json", {})
    assert content_of(tmp_path) == {}
    monkeypatch.setenv("RANK", "0")
    du._write_json(tmp_path / "a.json", {})
    assert sorted(content_of(tmp_path)) == ["a.json"]


# ---------------------------------------------------------------- trainings


@pytest.mark.parametrize("what", ["state", "weights", "trainer.json"])
def test_disk_that_fills_up_costs_no_finished_epoch(sets, tmp_path, monkeypatch, what):  # noqa: F811
    """The trainer says how to go on, and ends like one that was never stopped."""
    run = trainer(sets, tmp_path / "run", t.ChannelNet(0.2), **t.EVERYTHING)
    limits = {"state": 1000, "weights": 100, "trainer.json": 10**9}

    def save_last():
        if run.epoch < 2:
            return real()
        with full_after(limits[what]):
            return real()

    real = run._save_last
    monkeypatch.setattr(run, "_save_last", save_last)
    if what == "weights":
        monkeypatch.setattr(run, "_score", lambda row: row.get("epoch", row["val_mAP"]))
        monkeypatch.setattr(du, "_save_weights", full_from_the_second(du._save_weights))
    if what == "trainer.json":
        monkeypatch.setattr(du, "_write_json", full_from_the_second(du._write_json, skip=1))
    with pytest.raises(OSError) as told:
        run.fit()
    assert str(told.value).startswith(f"{tmp_path / 'run'}: cannot be written (")
    assert "; Trainer.resume() goes on from the last finished epoch." in str(told.value)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run/last/trainer.json").read_text())["history"][-1]["epoch"] == 1
    run.resume()
    whole = trainer(sets, tmp_path / "whole", t.ChannelNet(0.2), **t.EVERYTHING)
    whole.fit()
    np.testing.assert_array_equal(run.predict(sets[1]), whole.predict(sets[1]))


def full_from_the_second(write, skip=0):
    calls = []

    def limited(*args):
        calls.append(1)
        with full_after(100) if len(calls) > 1 + skip else contextlib.nullcontext():
            return write(*args)

    return limited


def test_history_has_every_epoch_of_a_run_that_is_killed_at_its_end(sets, tmp_path, monkeypatch):  # noqa: F811
    def killed(old, new):
        replace(old, new)
        if os.path.basename(new) == "last":
            raise SystemExit("killed")

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        trainer(sets, tmp_path, epochs=1).fit()
    assert len(trainer(sets, tmp_path, epochs=1).resume()) == 1
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1


def test_resume_point_that_waits_for_its_name_is_never_the_one_written_over(sets, tmp_path):  # noqa: F811
    """Killed between the removal of last/ and the renaming of last.tmp/, and again later."""
    run = trainer(sets, tmp_path, t.ChannelNet(0.2), **t.EVERYTHING)
    t.interrupt_at(run.model, 8)
    run.fit()
    os.rename(tmp_path / "last", tmp_path / "last.tmp")
    again = trainer(sets, tmp_path, t.ChannelNet(0.2), **t.EVERYTHING)

    def killed(*_):
        raise SystemExit("killed while it writes")

    again.accelerator.save_state = killed
    with pytest.raises(SystemExit):
        again.resume()
    last = trainer(sets, tmp_path, t.ChannelNet(0.2), **t.EVERYTHING)
    assert len(last.resume()) == t.EVERYTHING["epochs"]


def test_what_a_disk_refused_a_worker_process_can_tell(tmp_path):
    outer, inner = du.writing(tmp_path / "outer"), du.writing(tmp_path / "a")
    with pytest.raises(OSError) as caught, outer, inner:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'outer'}: cannot be written (No space left")
    assert str(caught.value).count("cannot be written") == 1


def test_threads_write_the_same_file_side_by_side(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: du.write_text(tmp_path / "a.txt", str(i) * 99), range(400)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
