"""Hygiene of the notebooks as committed; what they compute, nbval compares."""

import json
import os
import re
import subprocess
import sys
from inspect import getsource

import data_utils

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from tqdm.notebook import tqdm_notebook

PRESENT = [name for name in NOTEBOOKS if (ROOT / f"{name}.ipynb").exists()]


@pytest.fixture(params=PRESENT)
def notebook(request):
    return nbformat.read(ROOT / f"{request.param}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_of_the_folder_is_in_the_pipeline_order():
    assert {path.stem for path in ROOT.glob("*.ipynb")} == set(PRESENT)


def test_exactly_one_cell_holds_the_parameters_and_an_assert_follows(notebook):
    cells = code_cells(notebook)
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert "assert " in cells[tagged[0] + 1].source
    for line in cells[tagged[0]].source.splitlines():
        assert re.match(r"[A-Z][A-Z_0-9]* \|?= |    |\}|#|$", line), line


def test_outputs_are_of_one_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for c in code_cells(notebook) for o in c.outputs if o.output_type == "error"]


def test_nothing_was_printed_to_stderr(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_no_path_of_a_machine_is_stored(notebook):
    text = json.dumps(notebook)
    found = re.search(r"(?<![\w.])/(home|root|tmp|work|Users|private|mnt)/|[A-Z]:\\\\Users", text)
    assert found is None, text[found.start() - 60 : found.end() + 60]


def test_file_and_cells_are_short(notebook, request):
    name = request.node.callspec.params["notebook"]
    # what `jupyter execute` adds about every progress bar is no output, and not committed
    notebook.metadata.pop("widgets", None)
    assert len(nbformat.writes(notebook).encode()) < 1_000_000, name
    lines = sorted(len(cell.source.splitlines()) for cell in code_cells(notebook))
    assert 25 <= len(lines) <= 35
    assert lines[len(lines) // 2] <= 6
    assert lines[-1] <= 40


def test_a_reader_gets_at_least_a_text_a_code_cell(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= kinds.count("code")
    assert 30 <= len(kinds) <= 75
    assert notebook.cells[0].source.startswith("# ")
    assert kinds[-1] == "markdown"
    assert "Next:" in notebook.cells[-1].source


def test_same_parameter_name_has_the_same_demo_value_everywhere():
    values: dict[str, dict[str, str]] = {}
    for name in PRESENT:
        for cell in code_cells(nbformat.read(ROOT / f"{name}.ipynb", as_version=4)):
            if "parameters" in cell.metadata.get("tags", []):
                for key, value in re.findall(r"(?m)^([A-Z_0-9]+) = ([^#{\n]+)", cell.source):
                    values.setdefault(key, {})[name] = value.strip()
    shared = {key: found for key, found in values.items() if len(found) > 1}
    assert "RANDOM_SEED" in shared
    # folders of their own; use: larger batches; photos that many trainings read
    free = {"RUN_DIR", "OUTPUT_DIR", "BATCH_SIZE", "CACHE_DIR"}
    assert {k: v for k, v in shared.items() if len(set(v.values())) > 1 and k not in free} == {}


def blocks_of_four(cell):
    """Return every four code lines of a cell that follow each other; imports do not count."""
    lines = [line.strip() for line in cell.source.splitlines()]
    lines = [line for line in lines if line and not re.match(r"import |from .* import|#", line)]
    return {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}


def test_no_four_code_lines_stand_in_two_notebooks():
    """What two notebooks do belongs into data_utils.py."""
    found: dict[tuple[str, ...], set[str]] = {}
    for name in PRESENT:
        for cell in code_cells(nbformat.read(ROOT / f"{name}.ipynb", as_version=4)):
            for block in blocks_of_four(cell):
                found.setdefault(block, set()).add(name)
    shared = [(sorted(names), *block) for block, names in found.items() if len(names) > 1]
    assert not shared, "\n".join("\n    ".join(map(str, lines)) for lines in shared)


def test_blocks_are_found_across_blank_lines_and_comments():
    one = nbformat.v4.new_code_cell("import a\nx = 1\n\n# why\nif x:\n    y = 2\nz = 3")
    assert blocks_of_four(one) == {("x = 1", "if x:", "y = 2", "z = 3")}


@pytest.mark.parametrize(("name", "module"), [("csra", "CSRA"), ("mldecoder", "MLDecoder")])
def test_code_that_a_text_shows_is_that_of_the_helper(name, module):
    cells = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
    shown = "\n".join(re.findall(r"```python\n(.*?)```", "\n".join(c.source for c in cells), re.S))
    real = {
        re.sub(r" +# .*", "", s.strip()) for s in getsource(getattr(data_utils, module)).split("\n")
    }
    lines = [re.sub(r" +# .*", "", line.strip()) for line in shown.splitlines()]
    assert len(lines) >= 10
    assert [
        line for line in lines if line and not line.startswith("def ") and line not in real
    ] == []


@pytest.mark.parametrize("name", ["csra", "mldecoder"])
def test_head_notebook_takes_everything_but_its_head_from_the_baseline(name):
    cells = code_cells(nbformat.read(ROOT / f"{name}.ipynb", as_version=4))
    cell = next(c for c in cells if "parameters" in c.metadata.get("tags", []))
    names = re.findall(r"(?m)^([A-Z_0-9]+) =", cell.source)
    assert {"BASELINE_DIR", "RUN_DIR", "OPTIONS"} <= set(names)
    assert len(names) <= 9


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_style_is_clean_in_code_and_notebooks(command):
    ruff = [sys.executable, "-m", "ruff", *command, "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_runs_all_and_links_every_notebook_in_order_with_its_picture():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "&& python tests/run_notebooks.py\n" in readme
    links = re.findall(r"^\| \d+ \| \[(\w+)\]\(\1\.ipynb\) <br> <img src=\"(\S+)\"", readme, re.M)
    assert links == [(name, f"docs/{name}.jpg") for name in NOTEBOOKS]
    pictures = {*re.findall(r"docs/\w+\.jpg", readme)}
    assert {picture for picture in pictures if not (ROOT / picture).exists()} == set()
    assert len(readme.split()) <= 1200


@pytest.mark.parametrize("given", [None, "7"])
def test_threads_spin_for_a_short_time_unless_told_otherwise(given, monkeypatch):
    """OpenMP reads the variable when torch is loaded: data_utils has to set it before."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    source = (ROOT / "data_utils.py").read_text(encoding="utf-8")
    beginning, _, rest = source.partition("\nimport joblib\n")
    exec(beginning, {})
    assert os.environ["GOMP_SPINCOUNT"] == (given or "3000")
    assert "\nimport torch\n" in rest


def test_notebooks_import_data_utils_before_torch(notebook):
    code = "\n".join(cell.source for cell in code_cells(notebook))
    places = [code.find(name) for name in ("import data_utils", "from data_utils", "import torch")]
    *ours, torch = (place if place >= 0 else len(code) for place in places)
    assert min(ours) <= torch


def test_bars_of_tested_notebooks_move_seldom():
    """Or their messages pile up while a cell runs, and some are lost: see conftest.py."""
    assert tqdm_notebook(range(3), display=False).mininterval == 30
