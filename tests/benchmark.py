"""Measure the speed figures of the README, each beside its alternative in one run.

    python tests/benchmark.py
    python tests/benchmark.py classes   # 0.1, 0.4 and 1.28 million photos in 1 000 classes
    python tests/benchmark.py scores    # bootstrap intervals of 1 000 classes, of 100 labels

Prints a Markdown table. Ratios carry over to other machines better than the times do.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cloudpickle import register_pickle_by_value
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit
from joblib import Parallel, delayed
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import load_notebook_functions  # noqa: E402

import data_utils  # noqa: E402
from demo_360 import draw_panorama, plan_survey  # noqa: E402

ROWS: list[tuple[str, str, str, str]] = []


def seconds(call: Callable, repeats: int = 5) -> float:
    """Return the median time of a call, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(what: str, ours: float, other: float, alternative: str, unit: str = "ms") -> None:
    """Add a line: both times and how many times faster ours is."""
    scale = {"ms": 1e3, "s": 1.0}[unit]
    ROWS.append(
        (what, f"{ours * scale:.1f} {unit}", f"{other * scale:.1f} {unit} ({alternative})",
         f"{other / ours:.1f} ×")
    )  # fmt: skip


def write_photos(folder: Path, size: int, n: int) -> list[Path]:
    """Write noisy JPEG halves of a demo panorama, as large as a camera's."""
    rng = np.random.default_rng(0)
    survey = plan_survey(0, 0, n)
    paths = []
    for i in range(n):
        pixels, _ = draw_panorama(survey, i, 1024)
        photo = Image.fromarray(pixels).resize((2 * size, size), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo, np.int16) + rng.normal(0, 5, (size, 2 * size, 1)).astype(np.int16)
        paths.append(folder / f"photo_{i}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def measure_decoding(folder: Path) -> None:
    """Compare DataPartition with opening at full size, without and with its cache."""
    [panorama] = write_photos(folder, 2976, 1)
    half = folder / "half.jpg"
    Image.open(panorama).crop((0, 0, 2976, 2976)).save(half, quality=90)
    model = data_utils.build_model("resnet10t", 1, pretrained=False, img_size=384)
    transform = data_utils.make_transforms(model, train=False)
    df = pd.DataFrame({"image_path": [str(half)], "a": [1.0]})
    plain = data_utils.DataPartition(df, ["a"], transform)
    cached = data_utils.DataPartition(df, ["a"], transform, folder / "cache")
    full = seconds(lambda: Image.open(half).convert("RGB").resize((384, 384)))
    report(
        "a 2976 × 2976 JPEG for a 384 px input", seconds(lambda: plain[0]), full, "full decoding"
    )
    report("the same from `cache_dir`", seconds(lambda: cached[0], 30), full, "full decoding")


def measure_split(folder: Path) -> None:
    """Compare the split into halves with a plain crop and save in one process."""
    panoramas = folder / "panoramas"
    panoramas.mkdir()
    paths = write_photos(panoramas, 2976, 8)
    functions = load_notebook_functions("imagesplit")
    register_pickle_by_value(functions)  # the worker processes cannot import a notebook
    run = [0]

    def ours() -> None:
        run[0] += 1
        out = str(folder / f"split_{run[0]}")
        jobs = [delayed(functions.split_panorama)(p, str(panoramas), out) for p in paths]
        assert all(status == "written" for status, _ in Parallel(-1)(jobs))

    def plain() -> None:
        for path in paths:
            image = Image.open(path)
            for i in (0, 1):
                image.crop((i * 2976, 0, (i + 1) * 2976, 2976)).save(folder / f"{i}.jpg")

    times = seconds(ours, 3) / len(paths), seconds(plain, 3) / len(paths)
    report("a 5952 × 2976 panorama to halves, all cores", *times, "one process, quality 75")


def measure_partition() -> None:
    """Time the split and compare how far label rates are from equal."""
    split = load_notebook_functions("partitioning").group_stratified_split
    for n_groups in (200, 2000, 10_000):
        rng = np.random.default_rng(0)
        rates = np.linspace(0.03, 0.4, 12)
        values = (rng.random((n_groups, 2, 12)) < rates).astype(float).reshape(-1, 12)
        labels = [f"label {i}" for i in range(12)]
        df = pd.DataFrame(values, columns=labels).assign(group_id=np.arange(2 * n_groups) // 2)
        start = time.perf_counter()
        parts = split(df, labels)
        taken = time.perf_counter() - start
        worst = max(
            np.abs(part[labels].mean() - df[labels].mean()).max() for part in parts.values()
        )
        group_labels = df.groupby("group_id")[labels].max().to_numpy()
        draw = MultilabelStratifiedShuffleSplit(1, test_size=0.15, random_state=0)
        _, test = next(draw.split(group_labels, group_labels))
        rows = df[df["group_id"].isin(test)]
        once = np.abs(rows[labels].mean() - df[labels].mean()).max()
        ROWS.append(
            (f"{n_groups} groups × 12 labels, largest deviation", f"{100 * worst:.2f} points",
             f"{100 * once:.2f} points (one draw)", f"in {taken:.2f} s")
        )  # fmt: skip


def measure_channels_last() -> None:
    """Compare the memory layouts on a training step of EfficientNet-Lite0."""
    images, times = torch.randn(16, 3, 224, 224), {}
    for layout in (torch.channels_last, torch.contiguous_format):
        model = data_utils.build_model("tf_efficientnet_lite0", 5, pretrained=False).train()
        model, batch = model.to(memory_format=layout), images.contiguous(memory_format=layout)

        def step(model: torch.nn.Module = model, batch: torch.Tensor = batch) -> None:
            model(batch).square().mean().backward()

        times[layout] = seconds(step, 3) / len(images)
    report(
        "training step a photo, EfficientNet-Lite0 224 px, channels_last", *times.values(), "NCHW"
    )


def measure_mldecoder() -> None:
    """Compare 100 queries with full decoding, a query a label, at 1 000 labels: the head alone."""
    features, times = torch.randn(8, 2048, 7, 7), []
    for groups in (100, 1000):
        head = data_utils.MLDecoder(2048, 1000, groups).eval()

        def forward(head: torch.nn.Module = head) -> None:
            with torch.inference_mode():
                head(features)

        times.append(seconds(forward) / len(features))
    report("ML-Decoder head a photo, 1 000 labels, 100 queries", *times, "1 000 queries")


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
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory() as folder:
        measure_decoding(Path(folder))
        measure_split(Path(folder))
    measure_partition()
    measure_channels_last()
    measure_mldecoder()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | here | alternative | gain |\n|---|---|---|---|")
    for row in ROWS:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
