"""Run the notebooks in their order, on copies, and write them as web pages with an index.

python tests/run_notebooks.py                 all of them, into runs/report/index.html
python tests/run_notebooks.py training csra   only these; what they read must be there already
python tests/run_notebooks.py --pictures      run nothing; docs/ gets the figures of cells that
                                              are tagged "picture" or "overview", as they are now,
                                              and results.jpg from the numbers of docs/results.md
"""

import argparse
import base64
import html
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {  # in the order of the pipeline, with those whose results each needs
    "imagesplit": (),
    "partitioning": ("imagesplit",),
    "training": ("partitioning",),
    "csra": ("training",),
    "mldecoder": ("training",),
    "classifier": ("csra", "mldecoder"),
    "survey": ("csra",),
    "relabeling": ("survey",),
    "labelbox": ("relabeling",),
    "pretraining": ("partitioning",),
    "scratch": ("imagesplit",),
    "tuning": ("training",),
}
VOC, REAL = "900 photos of PASCAL VOC, 5 labels", "62 real panoramas (halves), 7 labels"
RESULTS = [  # data, model, how its line in docs/results.md begins, and in which column it stands
    (VOC, "probe", "| voc5, 900 photos", 5),
    (VOC, "fine-tuned", "| voc5, 900 photos", 4),
    (VOC, "… with the CSRA head", "| CSRA |", 2),
    (VOC, "… with the ML-Decoder head", "| ML-Decoder |", 2),
    (REAL, "probe", "| 62 real panoramas", 5),
    (REAL, "fine-tuned", "| 62 real panoramas", 4),
    (REAL, "… with the CSRA head", "| CSRA, panoramas |", 2),
    (REAL, "… with the ML-Decoder head", "| ML-Decoder, panoramas |", 2),
]
STYLE = """body {font: 16px sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em}
li {margin: 1.5em 0} img {display: block; max-width: 24em; max-height: 14em; margin-top: 0.5em}"""


def pictures(cell: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """Yield the type and the base64 text of each picture among the outputs of a cell."""
    for output in cell.get("outputs", []):
        for kind in ("image/png", "image/jpeg"):
            if data := output.get("data", {}).get(kind):
                yield kind, "".join(data.split())


def first_picture(notebook: nbformat.NotebookNode) -> str:
    """Return an <img> of the first picture among the outputs, or nothing."""
    for kind, data in (found for cell in notebook.cells for found in pictures(cell)):
        return f'<img alt="" src="data:{kind};base64,{data}">'
    return ""


def keep_pictures(root: Path, names: Sequence[str], most_bytes: int = 60_000) -> list[Path]:
    """Write the figure of each tagged cell to docs/, small enough for a README."""
    kept = []
    for name in names:
        for cell in nbformat.read(root / f"{name}.ipynb", as_version=4).cells:
            tags = set(cell.metadata.get("tags", [])) & {"picture", "overview"}
            for tag, (_, data) in zip(tags, pictures(cell)):
                image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
                image.thumbnail((1100, 1100))
                path = root / "docs" / f"{tag if tag == 'overview' else name}.jpg"
                for quality in range(90, 30, -5):
                    image.save(path, quality=quality, optimize=True)
                    if path.stat().st_size <= most_bytes:
                        break
                kept.append(path)
    return kept


def read_results(text: str) -> dict[str, dict[str, list[float]]]:
    """Return {data: {model: test mAP of each seed}} from the first line that begins as it should.

    A cell is "0.92 ± 0.01 (0.91, 0.93)", seeds in brackets, or "0.91, 0.93", or "0.92".
    """
    results: dict[str, dict[str, list[float]]] = {}
    for data, model, start, column in RESULTS:
        line = next((line for line in text.splitlines() if line.startswith(start)), None)
        if line is None:
            raise ValueError(f"docs/results.md: no line begins with {start!r}; change RESULTS.")
        cell = line.split("|")[column]
        numbers = [float(number) for number in re.findall(r"\d\.\d+", cell)]
        results.setdefault(data, {})[model] = numbers[2:] if "±" in cell else numbers
    return results


def draw_results(root: Path) -> Path:
    """Draw the test mAP of docs/results.md: the mean over the seeds ± sd, and each seed."""
    results = read_results((root / "docs" / "results.md").read_text(encoding="utf-8"))
    rows = {"height_ratios": [len(models) for models in results.values()]}
    options = {"sharex": True, "figsize": (7.5, 3.2), "layout": "constrained"}
    figure, axes = plt.subplots(len(results), 1, gridspec_kw=rows, **options)
    for axis, (data, models) in zip(axes, results.items()):
        for model, seeds in models.items():
            spread = np.std(seeds, ddof=1) if len(seeds) > 1 else None
            axis.errorbar(np.mean(seeds), model, xerr=spread, fmt="o", color="tab:blue")
            if spread is not None:
                axis.plot(seeds, [model] * len(seeds), "|", color="tab:orange", ms=11, mew=1.5)
        axis.set_title(data, fontsize=10, loc="left")
        axis.margins(y=0.2)
        axis.invert_yaxis()
    axes[-1].set_xlabel("test mAP: mean over the seeds ± standard deviation; a tick is one seed")
    path = root / "docs" / "results.jpg"
    figure.savefig(path, dpi=130, pil_kwargs={"quality": 85})
    plt.close(figure)
    return path


def entry(name: str, notebook: nbformat.NotebookNode, state: str) -> str:
    title = re.match(r"# (.+)", notebook.cells[0].source)
    title = html.escape(title[1] if title else name)
    link = f'<a href="{name}.html"><b>{name}</b></a>'
    return f"<li>{link}: {title} ({state}){first_picture(notebook)}</li>"


def write_index(folder: Path, entries: Sequence[str]) -> None:
    head = f'<!doctype html><meta charset="utf-8"><title>Notebooks</title><style>{STYLE}</style>'
    body = f"<h1>What the notebooks made</h1><ol>{''.join(entries)}</ol>"
    (folder / "index.html").write_text(head + body, encoding="utf-8")


def execute(name: str, folder: Path, root: Path) -> tuple[str, str | None]:
    """Run a copy of a notebook and write its page; return its entry in the index and the error."""
    notebook = nbformat.read(root / f"{name}.ipynb", as_version=4)
    began, failed = time.perf_counter(), None
    resources = {"metadata": {"path": str(root)}}
    try:
        NotebookClient(notebook, timeout=None, resources=resources).execute()
    except CellExecutionError as error:
        failed = f"stopped: {error.ename}: {error.evalue}"
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook, resources)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    took = f"{time.perf_counter() - began:.0f} s"
    return entry(name, notebook, html.escape(failed or took)), failed


def run(folder: Path, root: Path, names: Sequence[str], at_once: int = 2) -> str | None:
    """Run copies of `names` below `root`, each after those that it needs, `at_once` side by side.

    Returns the one that failed, after which no other is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = max((os.cpu_count() or 1) // at_once, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # each has cores of its own
    needs = {name: {*NOTEBOOKS.get(name, ())} & {*names} for name in names}
    order, entries, running, stopped = TopologicalSorter(needs), {}, {}, None
    order.prepare()
    ready = []
    with ThreadPoolExecutor(at_once) as pool:
        while order.is_active() and not stopped:
            ready = sorted([*ready, *order.get_ready()], key=names.index)
            while ready and len(running) < at_once:
                name = ready.pop(0)
                running[pool.submit(execute, name, folder, root)] = name
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(done)
                entries[name], failed = done.result()
                print(f"{len(entries)} of {len(names)}: {name}", flush=True)
                in_order = [entries[name] for name in names if name in entries]
                write_index(folder, in_order)  # after each: a look is possible before the last
                if failed:
                    print(f"{name}.ipynb {failed}", file=sys.stderr)
                    stopped = stopped or name
                order.done(name)
    return stopped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*NOTEBOOKS], help="in their order")
    parser.add_argument("--to", type=Path, default=ROOT / "runs" / "report", help="folder")
    parser.add_argument("--at-once", type=int, default=2, help="how many side by side")
    parser.add_argument("--pictures", action="store_true", help="only write those of docs/")
    arguments = parser.parse_args()
    names = [name.removesuffix(".ipynb") for name in arguments.names]
    unknown = [name for name in names if name not in NOTEBOOKS]
    if unknown:
        parser.error(f"no notebook {', '.join(unknown)}; expected some of {', '.join(NOTEBOOKS)}")
    if arguments.pictures:
        print(*keep_pictures(ROOT, names), draw_results(ROOT), sep="\n")
        return 0
    failed = run(arguments.to, ROOT, names, arguments.at_once)
    print(f"Open {arguments.to / 'index.html'} in a browser.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
