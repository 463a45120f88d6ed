"""Running all notebooks on copies, and the pages that come of it."""

import base64
import io

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from run_notebooks import keep_pictures, run


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
    assert run(folder / "report", folder, ["good", "bad", "after"]) == "bad"
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
