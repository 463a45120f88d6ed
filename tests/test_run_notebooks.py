"""Running all notebooks on copies, and the pages that come of it."""

import base64
import io
import os
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from run_notebooks import NOTEBOOKS, ROOT, draw_results, keep_pictures, read_results, run


@pytest.fixture
def folder(tmp_path):
    sources = {"good": "open('made.txt', 'w').write('x')\n6 * 7", "bad": "1 / 0", "after": "1"}
    for name, source in sources.items():
        title = f"# About <{name}>\n\n![seen](docs/{name}.png)"
        cells = [new_markdown_cell(title), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    (tmp_path / "docs").mkdir()
    for name in sources:
        Image.new("RGB", (8, 8)).save(tmp_path / "docs" / f"{name}.png")
    return tmp_path


def test_pages_and_index_are_written_and_the_notebooks_left_alone(folder):
    before = (folder / "good.ipynb").read_bytes()
    assert run(folder / "report", folder, ["good"]) is None
    assert (folder / "good.ipynb").read_bytes() == before
    assert (folder / "made.txt").exists(), "a notebook runs in its own folder"
    assert ">42<" in (folder / "report/good.html").read_text().replace("\n", "")
    assert 'src="data:image/png;base64,' in (folder / "report/good.html").read_text()
    index = (folder / "report/index.html").read_text()
    assert 'href="good.html"' in index and "About &lt;good&gt;" in index


def test_a_failing_notebook_is_named_and_ends_the_run(folder, capsys):
    assert run(folder / "report", folder, ["good", "bad", "after"], at_once=1) == "bad"
    assert "bad.ipynb stopped: ZeroDivisionError: division by zero" in capsys.readouterr().err
    index = (folder / "report/index.html").read_text()
    assert "stopped: ZeroDivisionError" in index and "after" not in index
    assert "ZeroDivisionError" in (folder / "report/bad.html").read_text()
    assert not (folder / "report/after.html").exists()


def test_the_figure_of_a_tagged_cell_is_kept_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 1400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    data = {"image/png": base64.encodebytes(file.getvalue()).decode()}
    cell = new_code_cell("draw()", outputs=[new_output("display_data", data)])
    cell.metadata["tags"] = ["nbval-ignore-output", "picture"]
    nbformat.write(new_notebook(cells=[new_code_cell("1"), cell]), tmp_path / "a.ipynb")
    (tmp_path / "docs").mkdir()
    assert keep_pictures(tmp_path, ["a"], 200_000) == [tmp_path / "docs/a.jpg"]
    assert (tmp_path / "docs/a.jpg").stat().st_size <= 200_000
    with Image.open(tmp_path / "docs/a.jpg") as image:
        assert image.size == (1100, 471)


RESULTS = """
| voc5, 900 photos, by photo | net | 42 | 0.915 ± 0.006 (0.922, 0.910, 0.914) | 0.911 | 0.8 |
| 62 real panoramas (halves) | net | 42 | 0.879 ± 0.019 (0.889, 0.892, 0.857) | 0.829 | 0.6 |
| 62 real panoramas (halves) | another | 42 | 0.1 | 0.1 | 0.1 |
| CSRA | 0.924 ± 0.006 (0.922, 0.931, 0.919) | -0.001 (-0.023 to +0.015) |
| ML-Decoder | 0.903, 0.902 | -0.019 |
| CSRA, panoramas | 0.943, 0.732 | +0.054 |
| ML-Decoder, panoramas | 0.905 | +0.016 |
"""


def test_figure_of_results_has_the_seeds_of_the_tables(tmp_path):
    voc, panoramas = read_results(RESULTS).values()
    assert voc == {
        "probe": [0.911],
        "fine-tuned": [0.922, 0.910, 0.914],
        "… with the CSRA head": [0.922, 0.931, 0.919],
        "… with the ML-Decoder head": [0.903, 0.902],
    }
    assert panoramas == {
        "probe": [0.829],
        "fine-tuned": [0.889, 0.892, 0.857],
        "… with the CSRA head": [0.943, 0.732],
        "… with the ML-Decoder head": [0.905],
    }
    with pytest.raises(ValueError, match=r"results\.md: no line begins with '\| CSRA \|'"):
        read_results(RESULTS.replace("| CSRA |", "| head |"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(RESULTS, encoding="utf-8")
    assert draw_results(tmp_path).stat().st_size <= 60_000
    assert read_results((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))


CELLS = (
    "from pathlib import Path",
    "assert all(Path(f'{name}.done').exists() for name in NEEDED)",
    "import os\nfound = os.environ.get('CUDA_VISIBLE_DEVICES')\nassert found == '7', found",
    "Path(f'{NAME}.done').touch()",
)


def test_notebooks_run_side_by_side_after_those_that_they_need(tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "run_notebooks.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    shown = [*NOTEBOOKS][: [*NOTEBOOKS].index("relabeling")]
    for name in shown:
        needed = NOTEBOOKS[name]
        head = f"NAME, NEEDED = {name!r}, {needed!r}"
        notebook = new_notebook(cells=[new_code_cell(cell) for cell in (head, *CELLS)])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    for i in range(3):
        (tmp_path / "tests" / f"test_{i}.py").write_text("def test_it():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--nbval-lax", "-q"]
    clean = {key: value for key, value in os.environ.items() if key != "NOTEBOOK_GPUS"}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **options, env=clean | {"CUDA_VISIBLE_DEVICES": "7"})
    n_cells = len(shown) * (1 + len(CELLS))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{n_cells + 3} passed" in done.stdout
