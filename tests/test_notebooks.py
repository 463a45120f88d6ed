"""Hygiene of the notebooks as committed; what they compute, nbval compares."""

import json
import re
import subprocess
import sys

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
    assert lines[len(lines) // 2] <= 8
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


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_style_is_clean_in_code_and_notebooks(command):
    ruff = [sys.executable, "-m", "ruff", *command, "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_commands_name_every_notebook_in_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"jupyter execute --inplace ((?:\w+\.ipynb ?)+)", readme)
    assert found[1].split() == [f"{name}.ipynb" for name in PRESENT]


def test_bars_of_tested_notebooks_move_seldom():
    """Or their messages pile up while a cell runs, and some are lost: see conftest.py."""
    assert tqdm_notebook(range(3), display=False).mininterval == 30
