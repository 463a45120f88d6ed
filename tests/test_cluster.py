"""The same loops on a cluster: joblib's dask backend, and scripts of notebooks in two processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import FunctionType

import data_utils as du

import joblib
import nbformat
import numpy as np
import pandas as pd
import pytest
import test_classifier as t
import torch
from cloudpickle import register_pickle_by_value
from nbconvert import ScriptExporter
from PIL import Image
from run_notebooks import ROOT
from test_imagesplit import scene, write_panorama

# ---------------------------------------------------------------- dask


@pytest.fixture(scope="module")
def dask_cluster():
    """Start two worker processes; what runs inside `with joblib.parallel_config` goes to them."""
    distributed = pytest.importorskip("distributed", reason="dask is an extra")
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None}
    cluster = distributed.LocalCluster(n_workers=2, **options)
    with cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def in_time():
    """Fail instead of waiting for ever for workers that do not come."""

    def stop(*_):
        raise TimeoutError("the cluster has not answered in five minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def as_in_a_kernel(module):
    """Functions of a notebook live in __main__: dask sends them whole, not by their names."""
    register_pickle_by_value(module)
    for function in vars(module).values():
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            function.__module__ = "__main__"
    return module


def split_or_die(split, log, path, *folders):
    """Split a panorama; the process that first meets number 5 is killed."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {path.stem}\n")
    first = Path(f"{log}.killed")
    if path.stem == "5" and not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return split(path, *folders)


def test_killed_dask_worker_is_replaced_and_no_panorama_is_lost_or_done_twice(
    dask_cluster, in_time, notebook_functions, tmp_path
):
    nb = as_in_a_kernel(notebook_functions("imagesplit"))
    for i in range(8):
        write_panorama(tmp_path / "in" / f"{i}.jpg", scene(128, 64))
    paths, folders = sorted((tmp_path / "in").glob("*.jpg")), (tmp_path / "in", tmp_path / "out")
    log = tmp_path / "log"
    split = joblib.delayed(partial(split_or_die, nb.split_panorama, log))
    before = {worker["pid"] for worker in dask_cluster.run(lambda: {"pid": os.getpid()}).values()}
    with joblib.parallel_config(backend="dask"):  # as in the notebook:
        jobs = [split(path, *folders) for path in paths]
        done = list(joblib.Parallel(-1, return_as="generator")(jobs))
    assert len(done) == 8
    assert {status for status, _ in done} <= {"written", "kept"}  # kept: done, but not yet told
    expected = {f"{i}_{side}.jpg" for i in range(8) for side in ("left", "right")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    tried = [line.split() for line in log.read_text().splitlines()]
    assert sum(name == "5" for _, name in tried) == 2  # by the killed one and by another
    assert len({pid for pid, _ in tried} & {str(pid) for pid in before}) >= 1
    dask_cluster.wait_for_workers(2, timeout=60)  # a new one has taken its place


def test_hashes_features_and_cached_photos_are_the_same_from_dask(
    dask_cluster, in_time, notebook_functions, tmp_path
):
    nb = as_in_a_kernel(notebook_functions("partitioning"))
    paths = [tmp_path / f"{i}.jpg" for i in range(7)]
    for i, path in enumerate(paths):
        t.picture(i % 6).save(path, quality=95)  # the last looks like the first
    model = t.tiny_model()
    table = pd.DataFrame({"image_path": map(str, paths), "tree": 1.0})
    part = du.DataPartition(table, ["tree"], du.make_transforms(model, train=False))
    part.cache_dir = tmp_path / "here"  # a copy is shrunk a little differently
    pieces = [part.rows(slice(i, i + 3)) for i in (0, 3, 6)]  # bf16: as many at once as there
    expected = torch.cat([du.extract_features(model, piece) for piece in pieces])
    here = nb.find_near_duplicates(paths)
    part.cache_dir = tmp_path / "cache"
    with joblib.parallel_config(backend="dask"):
        pairs = nb.find_near_duplicates(paths)
        features = du.extract_features(model, part, n_jobs=-1, chunk=3)
    pd.testing.assert_frame_equal(pairs, here)
    assert pairs[["first", "second"]].to_numpy().tolist() == [[0, 6]]
    torch.testing.assert_close(features, expected, atol=0.02, rtol=0.02)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 7


# ---------------------------------------------------------------- scripts of notebooks


def write_script(name, parameters):
    """Turn a notebook into a script as docs/cluster.md says, with other parameters."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    return ScriptExporter().from_notebook_node(notebook)[0]  # as `jupyter nbconvert --to script`


LOG_WRITES = """
import os
_replace = os.replace
def replace(source, target):
    with open(f"writes{os.environ['RANK']}.txt", "a") as file:
        file.write(f"{target}\\n")
    _replace(source, target)
os.replace = replace
"""


def test_training_classifier_and_survey_run_as_scripts_on_two_machines(tmp_path):
    """A process each, as SLURM does it: the first writes, each photo is classified once."""
    for i in range(36):  # red where there is a tree, green where there is grass
        path = tmp_path / "photos" / f"place {i % 6}" / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(t.picture(i)) // 4 + np.uint8(
            [180 * (i // 6 % 2), 180 * (i % 4 > 1), 0]
        )
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    table = pd.DataFrame({"image_path": paths, "group_id": [p.parent.name for p in paths]})
    number = np.array([int(path.stem) for path in paths])
    table["tree"], table["grass"] = number // 6 % 2, (number % 4 > 1).astype(int)
    for name, places in (("train", "0123"), ("val", "4"), ("test", "5")):
        rows = table["group_id"].str[-1].isin(list(places))
        du.write_partition(table[rows], tmp_path / "partitions" / f"{name}_partition.csv")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photo")
    network = {"MODEL_NAME": "test_vit", "MODEL_KWARGS": {"patch_size": 8}, "IMG_WIDTH": 16}
    network |= {"N_EPOCHS": 1, "BATCH_SIZE": 4, "OPTIONS": {"warmup_epochs": 0}}
    use = {"RUN_DIR": "runs/linear", "IMAGE_DIR": "photos", "PANORAMA_DIR": None}
    use |= {"OUTPUT_DIR": "out", "BATCH_SIZE": 4}
    where = {"PARTITION_DIR": "partitions"}
    script = LOG_WRITES + write_script("training", network | where)
    script += write_script("classifier", use | where | {"VIEW": "half"})
    pieces = write_script("survey", use | where)
    script += pieces.replace("chunk: int = 1000", "chunk: int = 5")
    assert "chunk: int = 5" in script
    (tmp_path / "survey.py").write_text(script, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines"]
    launch += ["2", "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--mixed_precision"]
    launch += ["no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    machines = [[*launch, "--machine_rank", str(rank), "survey.py"] for rank in (0, 1)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(m, cwd=tmp_path, env=ON_CPUS, **pipes) for m in machines]
    said = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "".join(said)[-6000:]
    found = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert found["image"].tolist() == [str(p.relative_to(tmp_path)) for p in paths]
    assert pd.read_csv(tmp_path / "out" / "failed.csv")["image"].tolist() == ["photos/broken.jpg"]
    classifier = du.Classifier.load(tmp_path / "runs/linear/best_classifier.json")
    expected = classifier.predict(paths)[["tree_prob", "grass_prob"]]
    np.testing.assert_allclose(found[["tree_prob", "grass_prob"]], expected, atol=1e-5)
    written = [(tmp_path / f"writes{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert {Path(path).name for path in written[0]} >= {"best_classifier.json", "predictions.csv"}
    assert written[1]
    assert all("predictions.csv.parts" in path for path in written[1])
    assert pd.read_csv(tmp_path / "runs" / "linear" / "history.csv")["epoch"].max() == 1
    launch_from_notebook(tmp_path)


ON_CPUS = os.environ | {"ACCELERATE_USE_CPU": "true", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
ON_CPUS |= {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
NO_CUDA_BEFORE = """
import sys

import torch

import accelerate

real, used = accelerate.notebook_launcher, (torch.cuda.is_available, torch.cuda._lazy_init)


def refuse(*_):
    raise AssertionError("a call of CUDA before the launch")


def launch(train, num_processes):
    torch.cuda.is_available, torch.cuda._lazy_init = used
    real(train, num_processes=2, use_port=sys.argv[1])


accelerate.notebook_launcher = launch
torch.cuda.is_available = torch.cuda._lazy_init = refuse
"""


def launch_from_notebook(folder):
    """Run the cell of docs/cluster.md: two forked processes train the run that is there."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    cell = re.search(r"```python\n(from accelerate import notebook_launcher.*?)```", page, re.S)[1]
    cell = cell.replace("epochs=40", "epochs=1")
    command = [sys.executable, "-c", NO_CUDA_BEFORE + cell, str(free_port())]
    done = subprocess.run(command, cwd=folder, env=ON_CPUS, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert json.loads((folder / "runs/eight/last/trainer.json").read_text())["processes"] == 2
    du.Classifier.load(folder / "runs" / "eight" / "best_classifier.json", ["tree", "grass"])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
