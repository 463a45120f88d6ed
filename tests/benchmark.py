"""Measure the speed figures of the README, each beside its alternative in one run.

    python tests/benchmark.py           all of them
    python tests/benchmark.py loader    those with the word in their name

Prints a Markdown table. Ratios carry over to other machines better than the times do.
"""

import contextlib
import itertools
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
from torchvision.io import decode_jpeg, read_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data_utils  # noqa: E402
from demo_360 import draw_panorama, plan_survey  # noqa: E402

from conftest import load_notebook_functions  # noqa: E402

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


def decoders(path: Path, least: int) -> dict[str, Callable]:
    """Return ways to decode a JPEG to at least `least` pixels a side, as an array (H, W, 3)."""
    found = {
        "Pillow, whole": lambda: np.asarray(Image.open(path).convert("RGB")),
        "Pillow, scaled (here)": lambda: np.asarray(data_utils.open_image(path, (least, least))),
        "torchvision.io.decode_jpeg": lambda: decode_jpeg(read_file(str(path))).numpy(),
    }
    with contextlib.suppress(ImportError):
        import simplejpeg  # extra: may be left out

        options = {"min_height": least, "min_width": least, "min_factor": 1}
        data = path.read_bytes()
        found["simplejpeg, scaled"] = lambda: simplejpeg.decode_jpeg(data, **options)
        fast = options | {"fastdct": True, "fastupsample": True}
        found["simplejpeg, scaled, fast"] = lambda: simplejpeg.decode_jpeg(data, **fast)
    return found


def measure_decoders(folder: Path) -> None:
    """Compare the decoders on a camera's half for 384 px, with how far their pictures are off."""
    [panorama] = write_photos(folder, 2976, 1)
    Image.open(panorama).crop((0, 0, 2976, 2976)).save(folder / "half.jpg", quality=90)
    shrunk, exact = {}, None
    for name, decode in decoders(folder / "half.jpg", 430).items():
        taken, pixels = seconds(decode, 7), decode()
        pixels = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels
        small = np.asarray(Image.fromarray(pixels).resize((384, 384)), np.int16)
        exact = small if exact is None else exact
        shrunk[name] = taken
        off = f"{np.abs(small - exact).mean():.2f} of 255 off"
        ROWS.append(
            (f"decoding 2976 × 2976 px for 384 px, {name}", f"{1e3 * taken:.1f} ms", off,
             f"{shrunk['Pillow, whole'] / taken:.1f} ×")
        )  # fmt: skip


def measure_loader(folder: Path, n: int = 24) -> None:
    """Count the photos per second of the loader alone, by workers, without and with the cache."""
    paths = write_photos(folder, 2976, n // 2)
    halves = []
    for path in paths:
        for left in (0, 2976):
            halves.append(folder / f"{path.stem}_{left}.jpg")
            Image.open(path).crop((left, 0, left + 2976, 2976)).save(halves[-1], quality=90)
    model = data_utils.build_model("resnet10t", 1, pretrained=False, img_size=384)
    df = pd.DataFrame({"image_path": [*map(str, halves)] * 4, "a": 1.0})
    rates = {}
    for cache in (None, folder / "loader_cache"):
        data = data_utils.DataPartition(df, ["a"], data_utils.make_transforms(model, True), cache)
        for i in range(n if cache else 0):
            data[i]
        for workers in (0, 1, 2):
            loader = data_utils.make_loader(data, 16, True, workers)
            start = time.perf_counter()
            for _ in loader:
                pass
            rates[bool(cache), workers] = len(data) / (time.perf_counter() - start)
    for (cached, workers), rate in rates.items():
        name = (
            f"the loader alone, {workers} workers, {'from `cache_dir`' if cached else 'decoding'}"
        )
        gain = rate / rates[False, 0]
        ROWS.append((name, f"{rate:.0f} photos/s", "0 workers, decoding", f"{gain:.1f} ×"))


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


def measure_prediction(folder: Path) -> None:
    """Compare `predict_to` on a folder of photos with one photo at a time, decoded in full."""
    (folder / "halves").mkdir()
    for i, path in enumerate(write_photos(folder, 2976, 8) * 12):
        image = Image.open(path).crop((2976 * (i % 2), 0, 2976 * (i % 2 + 1), 2976))
        image.save(folder / "halves" / f"{i}.jpg", quality=90)
    model = data_utils.build_model("tf_efficientnet_lite0", 6, pretrained=False, img_size=224)
    used = data_utils.Classifier(model, list("abcdef"), [0.5] * 6)
    paths, found = data_utils.list_images(folder / "halves") * 5, []  # the start weighs little
    predict_to = load_notebook_functions("survey").predict_to

    def one_at_a_time() -> None:
        for path in paths[:24]:
            image = used.transform(Image.open(path).convert("RGB"))[None].to(used.device)
            with torch.inference_mode():
                used.model(image).sigmoid().cpu()

    def streamed(**options: int) -> None:
        found.append(predict_to(used, paths, folder / "predictions.csv", **options)["waited"])

    alone = seconds(one_at_a_time, 3) / 24
    for name, options in {"threads": {}, "2 workers": {"num_workers": 2}}.items():
        taken = seconds(lambda options=options: streamed(**options), 3) / len(paths)
        what = f"classifying a 2976 × 2976 JPEG at 224 px, {name}, waiting {found[-1]:.0%}"
        report(what, taken, alone, "one at a time, full decoding")


SURVEY = """
import resource, sys
sys.path[:0] = {paths!r}
import data_utils
from conftest import load_notebook_functions
model = data_utils.build_model("test_efficientnet", 3, pretrained=False, img_size=32)
used = data_utils.Classifier(model, list("abc"), [0.5] * 3)
load_notebook_functions("survey").predict_to(used, {folder!r}, {folder!r} + ".csv", 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux: kB
"""


def measure_memory(folder: Path) -> None:
    """Compare the most memory that `predict_to` takes for 2 000 and for 200 000 photos."""
    Image.new("RGB", (32, 32), "teal").save(folder / "a.jpg")
    content, found = (folder / "a.jpg").read_bytes(), []
    for n in (2000, 200_000):
        photos = folder / str(n)
        photos.mkdir()
        for i in range(n):
            (photos / f"{i:06}.jpg").write_bytes(content)
        code = SURVEY.format(paths=sys.path[:2], folder=str(photos))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        lines = (folder / f"{n}.csv").read_text().count("\n")
        assert lines == n + 1, lines
        found.append(float(done.stdout))
    what = "memory for the table of 200 000 photos"
    ROWS.append((what, f"{found[1]:.0f} MB", f"{found[0]:.0f} MB (2 000)", ""))


def measure_partition(_: Path) -> None:
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


def measure_channels_last(_: Path) -> None:
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


def measure_mldecoder(_: Path) -> None:
    """Compare 100 queries with full decoding, a query a label, at 1 000 labels: the head alone."""
    features, times = torch.randn(8, 2048, 7, 7), []
    for groups in (100, 1000):
        head = data_utils.MLDecoder(2048, 1000, groups).eval()

        def forward(head: torch.nn.Module = head) -> None:
            with torch.inference_mode():
                head(features)

        times.append(seconds(forward) / len(features))
    report("ML-Decoder head a photo, 1 000 labels, 100 queries", *times, "1 000 queries")


STEPS = """
import sys, time, timm, torch
options = {"window_size": 4, "embed_dim": 32, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
model = timm.create_model("swinv2_tiny_window8_256", img_size=128, **options)
images = torch.rand(16, 3, 128, 128)
for seconds in map(float, sys.stdin):
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()
        steps += 1
    print(steps / seconds, flush=True)
"""


def measure_threads(_: Path, rounds: int = 5) -> None:
    """Count the steps of the demo's network, alone and two at a time, by how long threads spin."""
    clean = {k: v for k, v in os.environ.items() if k[:4] not in ("OMP_", "GOMP")}
    spins = {"as is": {}, "3000 (here)": {"GOMP_SPINCOUNT": "3000"}}
    spins["passive"] = {"OMP_WAIT_POLICY": "passive"}
    pipes, rates = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}, {}
    with contextlib.ExitStack() as stack:
        start = [sys.executable, "-c", STEPS]
        runs = {
            name: [
                stack.enter_context(subprocess.Popen(start, env=clean | own, **pipes)) for _ in "ab"
            ]
            for name, own in spins.items()
        }
        for name, n, seconds in [(name, 2, 1) for name in runs] + rounds * [
            (name, n, 3) for name in runs for n in (1, 2)
        ]:
            for run in runs[name][:n]:
                print(seconds, file=run.stdin, flush=True)
            found = [float(run.stdout.readline()) for run in runs[name][:n]]
            rates.setdefault((name, n), []).append(statistics.mean(found))
        for run in itertools.chain(*runs.values()):
            run.stdin.close()
    for (name, n), found in rates.items():
        rate, usual = statistics.median(found), statistics.median(rates["as is", n])
        what = f"training steps of the demo, {n} at a time, threads spin {name}"
        ROWS.append((what, f"{rate:.1f} per s each", "as is", f"{rate / usual:.2f} ×"))


MEASUREMENTS = (measure_decoding, measure_decoders, measure_loader, measure_split)
MEASUREMENTS += (measure_prediction, measure_memory)
MEASUREMENTS += (measure_partition, measure_channels_last, measure_mldecoder, measure_threads)


def main() -> None:
    """Run all measurements, or those whose names contain the word that is given."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    for measure in MEASUREMENTS:
        if all(word in measure.__name__ for word in sys.argv[1:]):
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | here | alternative | gain |\n|---|---|---|---|")
    for row in ROWS:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
