"""Running all notebooks on copies, and the pages that come of it."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from run_notebooks import run


@pytest.fixture
def folder(tmp_path):
    sources = {"good": "open('made.txt', 'w').write('x')\n6 * 7", "bad": "1 / 0", "after": "1"}
    for name, source in sources.items():
        cells = [new_markdown_cell(f"# About <{name}>"), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    return tmp_path


def test_pages_and_index_are_written_and_the_notebooks_left_alone(folder):
    before = (folder / "good.ipynb").read_bytes()
    assert run(folder / "report", folder, ["good"]) is None
    assert (folder / "good.ipynb").read_bytes() == before
    assert (folder / "made.txt").exists(), "a notebook runs in its own folder"
    assert ">42<" in (folder / "report/good.html").read_text().replace("\n", "")
    index = (folder / "report/index.html").read_text()
    assert 'href="good.html"' in index and "About &lt;good&gt;" in index


def test_a_failing_notebook_is_named_and_ends_the_run(folder, capsys):
    assert run(folder / "report", folder, ["good", "bad", "after"]) == "bad"
    assert "bad.ipynb stopped: ZeroDivisionError: division by zero" in capsys.readouterr().err
    index = (folder / "report/index.html").read_text()
    assert "stopped: ZeroDivisionError" in index and "after" not in index
    assert "ZeroDivisionError" in (folder / "report/bad.html").read_text()
    assert not (folder / "report/after.html").exists()
