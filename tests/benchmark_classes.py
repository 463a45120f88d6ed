"""Measure classes at ImageNet's size: files, memory of workers, scores with intervals (Linux).

python tests/benchmark_classes.py classes   # 0.1, 0.4 and 1.28 million photos, 1 000 classes
python tests/benchmark_classes.py scores    # 1 000 classes, and 100 labels
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data_utils  # noqa: E402

from conftest import load_notebook_functions  # noqa: E402


def megabytes(field: str, pid: int | str = "self") -> float:
    """Return a line of /proc (Linux), e.g. VmHWM: the most memory that a process ever had."""
    text = Path(f"/proc/{pid}/status" if field == "VmHWM" else f"/proc/{pid}/smaps_rollup")
    return int(next(x for x in text.read_text().splitlines() if field in x).split()[1]) / 1e3


def measure_classes(n: int) -> None:
    """Read, group, split, write and read again `n` empty files in train/, 50 000 in val/."""
    partitioning, times = load_notebook_functions("partitioning"), []
    with tempfile.TemporaryDirectory() as folder:
        root, out = f"{folder}/photos", Path(folder, "partitions")
        for part, each in (("train", n // 1000), ("val", 50)):
            for c in range(1000):
                here = Path(root, part, f"n{c:08d}")
                here.mkdir(parents=True)
                for i in range(each):
                    (here / f"{here.name}_{part}_{i}.JPEG").touch()
        start, cpu = time.perf_counter(), time.process_time()
        targets = partitioning.read_class_folders(root)
        classes = targets.attrs["classes"]
        df = partitioning.attach_images(targets, root, "panorama", class_depth=2)
        held = df["image_path"].str.startswith(f"{root}/val/")
        parts = partitioning.split_beside(df, held, classes)
        for name, part in parts.items():
            data_utils.write_partition(part, out / f"{name}_partition.csv", classes)
        times += [time.perf_counter() - start, time.process_time() - cpu, megabytes("VmHWM")]
        size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
        del df, targets, parts, held
        start = time.perf_counter()
        train, labels = data_utils.read_partition(out / "train_partition.csv")
        part = data_utils.DataPartition(train, labels, lambda image: torch.zeros(1))
        times.append(time.perf_counter() - start)
        del train
        worker = measure_workers(part)
    cells = "{:.1f} | {:.1f} | {:.0f} | {:.1f} |".format(*times)
    print(f"| {n:,} + 50 000 | {cells} {size:.0f} | {worker:.0f} |", flush=True)


def measure_workers(part: data_utils.DataPartition) -> float:
    """Return how many MB of its own the larger of two workers has after reading every path."""
    part._open_cached = data_utils.open_image = lambda *_: None  # the files are empty
    loader = data_utils.make_loader(part, 1000, train=True, num_workers=2)
    batches = iter(loader)
    for _ in range(len(loader) - 5):
        next(batches)
    return max(megabytes("Private_Dirty", worker.pid) for worker in batches._workers)


def measure_scores() -> None:
    """Time the scores of 50 000 photos of 1 000 classes, and of 20 000 with 100 labels."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 1000, 50_000)
    logits = rng.normal(size=(50_000, 1000)).astype(np.float32)
    logits[np.arange(50_000), numbers] += 4  # top-1 near 75 %
    start, cpu = time.perf_counter(), time.process_time()
    names = [str(i) for i in range(1000)]
    data_utils.score_labels(numbers, logits, names)
    top = data_utils.summarize_scores(numbers, logits).loc[["top-1", "top-5"], "value"].tolist()
    taken = time.perf_counter() - start, time.process_time() - cpu, megabytes("VmHWM")
    print("50 000 × 1 000 classes: {:.0f} s, {:.0f} s of CPU, {:.0f} MB".format(*taken), top)
    targets = (rng.random((20_000, 100)) < np.linspace(0.02, 0.4, 100)).astype(float)
    probs = rng.random(targets.shape) * 0.7 + 0.3 * targets
    start, cpu = time.perf_counter(), time.process_time()
    data_utils.score_labels(targets, probs, names[:100])
    taken = time.perf_counter() - start, time.process_time() - cpu
    print("20 000 × 100 labels: {:.0f} s, {:.0f} s of CPU".format(*taken))


def main() -> None:
    if sys.argv[1:] == ["classes"]:  # each size in a process of its own: memory is its peak
        print("| photos | s | s of CPU | MB | s to read again | MB of CSV | MB a worker |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for n in ("100000", "400000", "1280000"):
            subprocess.run([sys.executable, __file__, "classes", n], check=True)
        return
    if sys.argv[1:2] == ["classes"]:
        return measure_classes(int(sys.argv[2]))
    if sys.argv[1:] == ["scores"]:
        return measure_scores()


if __name__ == "__main__":
    main()
