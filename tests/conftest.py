"""Order of the tests, and what several test files need."""

import ast
import getpass
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import matplotlib
import nbformat
import pytest
from run_notebooks import NOTEBOOKS, ROOT
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")  # not by environment variable: notebook kernels would inherit that
# Each move of a bar is three messages, which nbval reads only once the cell has ended. ZeroMQ keeps
# a few thousand and drops the rest: on a slow machine the one that a long training is over. So bars
# move every 30 s (in notebooks tqdm does not look at TQDM_DISABLE).
os.environ["TQDM_MININTERVAL"] = "30"
if n := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each process has cores of its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(n), 1)))
if units := os.environ.get("ATEN_CPU_CAPABILITY"):  # which torch.compile's own cache does not know
    cache = Path(tempfile.gettempdir()) / f"inductor_{getpass.getuser()}_{units}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
# Processes of pytest-xdist inherit the next line but one, so what stood there has another name.
GPUS = os.environ.setdefault("NOTEBOOK_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # unit tests compare bits; the notebooks get the GPU back


def collection_rank(path: Path) -> int:
    """Return 0 for test files, then 1, 2, ... for the notebooks in the order of the pipeline."""
    if path.suffix != ".ipynb":
        return 0
    return 1 + [*NOTEBOOKS, path.stem].index(path.stem)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, then each notebook from its first to its last cell (a stable sort)."""
    items.sort(key=lambda item: collection_rank(item.path))
    for item in items:
        if hasattr(item, "output_timeout"):  # a cell: nbval's 5 s are too few for a busy machine
            item.output_timeout = 60


class GpusForNotebooks:
    """Show the GPUs to the kernels of the notebooks alone."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if item.path.suffix == ".ipynb":
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            os.environ.update({} if GPUS == "all" else {"CUDA_VISIBLE_DEVICES": GPUS})


def pytest_configure(config: pytest.Config) -> None:
    """A hook of this file alone would not be called for notebooks, which lie in another folder."""
    config.pluginmanager.register(GpusForNotebooks())


class SideBySide(LoadScopeScheduling):
    """Give whole files to processes: a notebook after those that it needs, tests in between."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _may_start(self, node: WorkerController, file: str) -> bool:
        """Say whether what a notebook needs has ended, or comes before it in the same process."""
        others = [work for other, work in self.assigned_work.items() if other is not node]
        needed = [f"{name}.ipynb" for name in NOTEBOOKS.get(Path(file).stem, ())]
        running = (work.get(name, {}).values() for work in others for name in needed)
        return not any(name in self.workqueue for name in needed) and all(map(all, running))

    def _assign_work_unit(self, node: WorkerController) -> None:
        files = sorted(self.workqueue, key=lambda file: not file.endswith(".ipynb"))  # long ones
        others = [other for other in self.nodes if other is not node and not other.shutting_down]
        if ready := [file for file in files if self._may_start(node, file)]:
            self.workqueue.move_to_end(ready[0], last=False)
            super()._assign_work_unit(node)
        elif others and self._pending_of(self.assigned_work[node]) == 1:
            node.shutdown()  # a process keeps its last item, for which others wait, until then

    def mark_test_complete(self, node: WorkerController, *args: Any, **kwargs: Any) -> None:
        super().mark_test_complete(node, *args, **kwargs)
        for other in self.nodes:  # may have waited for it
            self._reschedule(other)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SideBySide:
    """Let `pytest -n 2` run notebooks and files of tests side by side."""
    config.option.loadscopereorder = False
    return SideBySide(config, log)


@pytest.fixture(autouse=True, scope="module")
def environment_of_its_own() -> Iterator[None]:
    """Give each file of tests the same environment: dask leaves MKL_NUM_THREADS=1 behind."""
    with mock.patch.dict(os.environ):
        yield


def _stands_alone(node: ast.stmt) -> bool:
    """Say whether a statement only imports, defines, or sets an UPPER_CASE constant."""
    if isinstance(node, ast.Assign):
        return all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets)
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id.isupper()
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def load_notebook_functions(notebook: str | Path) -> ModuleType:
    """Return a module with the imports, functions, classes and constants of a notebook.

    Nothing else of the notebook runs. A constant or a default that is computed from what was left
    out is left out as well.

    Args:
        notebook: a name such as "imagesplit", or the path of a notebook.
    """
    path = Path(notebook)
    path = path if path.suffix == ".ipynb" else ROOT / f"{notebook}.ipynb"
    module = ModuleType(f"notebook_{path.stem}")
    sys.modules[module.__name__] = module  # so that its classes can be pickled
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type != "code":
            continue
        lines = cell.source.splitlines()
        plain = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)
        for node in filter(_stands_alone, ast.parse(plain).body):
            code = compile(ast.Module([node], []), f"{path.name}, cell {number}", "exec")
            try:
                exec(code, vars(module))
            except NameError:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    raise
    return module


@pytest.fixture(scope="session")
def notebook_functions() -> Callable[[str], ModuleType]:
    """Give `load_notebook_functions`, which reads each notebook once a session."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            loaded[name] = load_notebook_functions(name)
        return loaded[name]

    return load


# A tiny Labelbox v2 export, put together by hand.


def radio(question: str, option: str, *children: dict) -> dict:
    """Answer a radio question; `children` are the answers nested below the option."""
    return {"name": question, "radio_answer": {"name": option, "classifications": list(children)}}


def checklist(question: str, *options: str | dict) -> dict:
    """Tick options of a checklist; an option is its name or a whole answer object."""
    ticked = [{"name": o, "classifications": []} if isinstance(o, str) else o for o in options]
    return {"name": question, "checklist_answers": ticked}


def text(question: str, content: str) -> dict:
    return {"name": question, "text_answer": {"content": content}}


def labelled(*answers: dict, by: str = "ann@example.invalid", skipped: bool = False) -> dict:
    """What one annotator says about one image; give each its own `by`."""
    return {
        "id": f"label of {by}",
        "label_details": {"created_by": by},
        "performance_details": {"skipped": skipped},
        "annotations": {"objects": [], "classifications": list(answers), "relationships": []},
    }


def data_row(image: str, *labels: dict, **projects: list[dict]) -> dict:
    """One row: `labels` stand in project "wetland", more projects are given by keyword."""
    named = {"wetland": list(labels), **projects} if labels or not projects else projects
    return {
        "data_row": {"id": f"row of {image}", "external_id": image},
        "media_attributes": {"asset_type": "image"},
        "projects": {f"id-{n}": {"name": n, "labels": found} for n, found in named.items()},
    }


@pytest.fixture
def write_ndjson(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or strings as they are) as an NDJSON file and return its path."""

    def write(*rows: Any, name: str = "export.ndjson") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
