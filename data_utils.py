"""Helpers that the 360° photo notebooks share: labels, partitions, models, training, scores.

Sections follow the data: files, labels, partition, data, heads, model, probe, loss, settings,
training, scores, classifier, plots, report. `open_image` decodes, `MaskedLoss` leaves unknown cells
out, `Trainer._end_epoch` keeps the best weights, `find_optimal_thresholds` chooses the thresholds,
`HEADS` says how to add a head. `TrainConfig.read` and `build_run` make a run again from its folder,
`Classifier.load` what came of it. Everything is picklable for DataLoader workers and launched
processes; copy this file beside a notebook of your own.

Shape letters: B batch, C channels, H height, W width, N images, L labels, G groups.
A label cell is 1 (present), 0 (absent), NaN (nobody judged it) or in between (soft target); of
classes that exclude each other a target is one number an image, -1 where nobody judged it.
"""

import base64
import contextlib
import copy
import csv
import difflib
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

# Threads of two trainings that spin while they wait take the cores from each other: spin briefly.
# OpenMP reads this when torch is loaded, so import this file before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import safetensors.torch
import timm
import torch
import torchvision
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast, broadcast_object_list, parse_flag_from_env, set_seed
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from scipy.sparse import csr_array
from scipy.stats import binomtest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from timm.data import Mixup, resolve_model_data_config
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import compute_class_weights, create_classification_loss
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, default_collate
from torchvision.transforms import v2
from tqdm.auto import tqdm

pd.options.mode.string_storage = "python"  # pyarrow's refuses file names that are no UTF-8
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # PostScript would start a program
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2))))  # by Orientation
_SWAPPING = [TURNS[orientation] for orientation in (5, 6, 7, 8)]  # width and height
NOT_LABELS = ("image_path", "group_id")
CLASS = "class"  # the one column of classes that exclude each other; "classes.txt" has their order
VIEWS = ("half", "panorama")
COMBINE = ("max", "noisy-or", "mean")  # of what both halves say
PARTS = ("train", "val", "test")
SCHEDULES = ("cosine", "one-cycle", "flat-cosine", "step", "warm-restarts")
PRECISIONS = ("auto", "no", "bf16", "fp16", "measure")
PROBE_STRENGTHS = tuple(10.0 ** np.arange(-4, 1.1, 0.5))
FORMAT_VERSION = 4  # 1 knew no "activation", 2 had weights in a pickle, 3 was not calibrated
WEIGHTS = "model.safetensors"
PathLike = str | os.PathLike
Array = np.ndarray
Cuts = float | Sequence[float] | str
Groups = Sequence | None
AfterEpoch = Callable[[dict[str, float]], None] | None
# How a full disk, or one that is gone, is known: by the number of an error or by its words.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTDIR)
_SAYS = "requested and|file write failed|unexpected pos|[Nn]o space|I/O error|Parent directory"
_SAYS += "|IoError|cannot be written"  # IoError: safetensors, in older releases
_GRADE = re.compile(r"\s*(\d+)\s*-\s")
_NO = (  # answers that raise no flag; "not useful" raises it
    r"(\d+ ?- ?)?(0|no?|none|never|nothing|false|nein|non|nee|ok|okay|fine|good|no[,;:] .*"
    r"|not (problematic|flagged)|(no|without)( a| any)? (problems?|issues?|need))[.!]?"
)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: PathLike, each_process: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only if all went well.

    Of the processes of `accelerate launch`, which all write one, only the first renames it, unless
    each has files of its own. What a disk refuses raises an OSError that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")  # of one thread alone
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        try:
            yield temporary
            if each_process or _is_main():
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _is_main() -> bool:
    launched = "LOCAL_RANK" in os.environ  # by accelerate or torchrun; some queues set RANK alone
    return not launched or os.environ["RANK"] == "0"


def this_process() -> PartialState:
    """Return which process of `accelerate launch` this is; sets its GPU."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@functools.cache
def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left half written, an hour ago or more, once a process."""
    for file in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - file.stat().st_mtime > 3600:
                file.unlink()


@contextlib.contextmanager
def writing(path: Path, how: str = "what stood there is unchanged, run this again") -> Iterator:
    """Turn what a disk refuses into one sentence; `how` says how to go on with room for it."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        name = Path(str(getattr(error, "filename", None) or os.devnull))
        ours = path.is_relative_to(name) or name.is_relative_to(path)  # its folder, or in it
        ours |= name.name.startswith(f".{path.name}.") or getattr(error, "errno", None) in _NO_ROOM
        if not ours and not re.search(_SAYS, str(error)):
            raise
        said = getattr(error, "strerror", None) or first_line(error)
        fix = f"free some space or take another folder; {how}"
        told = OSError(f"{path}: cannot be written ({said}); {fix}.")
        told.strerror = said  # for a `writing` around this one
        raise told from None


def write_text(path: PathLike, text: str) -> None:
    """Write a file that is complete or absent, what is no UTF-8 in file names as an escape."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_line(path: PathLike, cells: Sequence[str]) -> None:
    """Append a line to a review CSV and wait until it is safe on the disk."""
    path = Path(path)
    if {"\n", "\r"} & set("".join(cells)):
        raise ValueError(f"{brief(map(repr, cells))}: a name with a line break cannot be reviewed.")
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(",\n" * torn)  # what a crash cut off stays apart, with a cell too many
        csv.writer(file, lineterminator="\n").writerow(cells)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=np.ndarray.tolist))


def _save_weights(model: nn.Module, path: Path) -> str:
    """Write a plain state dict on the CPU and return the sha256 of the file."""
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with replacing(path) as temporary:  # clones: tensors that share memory are refused
        safetensors.torch.save_file(weights, temporary)
        return sha256(temporary)


def sha256(path: Path) -> str:
    """Return the checksum of a file, which is read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def brief(names: Iterable[Any], most: int = 5) -> str:
    """List names in a message: the first ones, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its type."""
    return [*str(error).splitlines(), type(error).__name__][0].rstrip(". ")


def _need_file(path: PathLike, fix: str) -> Path:
    """Return `path` if it is a file; `fix` ends the sentence that is raised otherwise."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; {fix}.")
    return Path(path)


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; whatever else it holds raises a ValueError."""
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _bad_line(path: PathLike, number: int, problem: str) -> ValueError:
    return ValueError(f"{path}, line {number}: {problem}.")


def read_tuned(path: PathLike, head: str, network: dict | None = None) -> dict[str, Any]:
    """Return what tuning.ipynb found for a head: fields of `TrainConfig`, as OPTIONS takes them.

    Warns of each field of `network` (e.g. model_name) that was another in the search.
    """
    path = _need_file(path, "run tuning.ipynb to make it")
    try:
        values = _read_object(path)
        made_for, before = values.pop("head"), dict(values.pop("found_with", {}))
        check_choice("head", made_for, HEADS)
        _check_options(values, TUNABLE)
        TrainConfig(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no best_parameters.json of tuning.ipynb ({error}).") from None
    if made_for != head:
        fix = f"use {'training' if made_for == 'linear' else made_for}.ipynb"
        raise ValueError(f"{path}: found for head={made_for!r}, not {head!r}; {fix}.")
    now = json.loads(json.dumps(network or {}))  # tuples become lists, as in the file
    if other := [name for name in now if before.get(name, now[name]) != now[name]]:
        warnings.warn(f"{path}: found with another {brief(other)}; search again.", stacklevel=2)
    return values


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}.")


def list_images(folder: PathLike) -> list[Path]:
    """Return every image file below `folder`, sorted, without hidden, thumbnail and recycled ones.

    Links to other folders are followed, each folder once; those to a photo that is gone are listed.
    """
    return [Path(folder, name) for name in image_names(folder)]


def image_names(folder: PathLike) -> Iterator[str]:
    """Yield the same as POSIX paths below `folder`; only one folder's names are in memory."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the images.")
    root, seen = folder.resolve(), {folder.resolve()}

    def shows_nothing_new(real: Path) -> bool:  # it lies where photos are seen anyway, or around
        inside = real.is_relative_to(root) and all(map(_is_wanted, real.relative_to(root).parts))
        return inside or root.is_relative_to(real)

    def walk(below: str) -> Iterator[str]:
        entries = os.scandir(os.path.join(folder, below))
        for entry in sorted(entries, key=lambda entry: os.path.normcase(entry.name)):
            name = entry.name.lower()
            is_link = entry.is_symlink()  # is_dir() alone raises an error at a link to itself
            is_dir = os.path.isdir(entry.path) if is_link else entry.is_dir()
            is_photo = _suffix(name) in IMAGE_SUFFIXES and (is_link or entry.is_file())
            if is_dir and _is_wanted(name):
                real = Path(entry.path).resolve()
                if real not in seen and not (is_link and shows_nothing_new(real)):
                    seen.add(real)
                    yield from walk(f"{below}{entry.name}/")
            elif name[0] != "." and is_photo:
                yield below + entry.name

    yield from walk("")


def _is_wanted(folder: str) -> bool:
    unwanted = {"@eadir", "$recycle.bin", "recycler", "#recycle", "@recycle", "#snapshot"}
    unwanted |= {"@recently-snapshot", "__macosx", "system volume information", "lost+found"}
    return folder[0] != "." and folder.lower() not in unwanted


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# ---------------------------------------------------------------- labels


def _row_problem(row: Any) -> str | None:
    match row:
        case list() | {"Labeled Data": _} | {"Label": _}:
            return "this looks like a v1 or array export, export it again"
        case {"projects": dict(), "data_row": dict() as image} if image_name(image):
            return None
        case {"projects": dict()}:
            keys = "'external_id' and no 'global_key'"
            return f"data_row has no {keys}, expected the image's file name"
    return "no 'projects' object"


def image_name(data_row: dict) -> str | None:
    """Return the file name of a data row; many exports have it in the global key alone."""
    name = data_row.get("external_id") or data_row.get("global_key")
    return name.strip() if isinstance(name, str) else None


def _read_export(path: PathLike) -> Iterator[list[dict]]:
    """Yield the answers of each row of a Labelbox v2 export."""
    hint = "expected a Labelbox v2 export: NDJSON, one row (a JSON object) per line"
    path = _need_file(path, "name the export of a Labelbox project")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if not (text := line.decode("utf-8-sig").strip()):
                    continue
                row = json.loads(text)
                problem = _row_problem(row)
                answers = [] if problem else _row_answers(row)
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason}), save it in that encoding"
            except (ValueError, RecursionError) as error:  # ValueError: also of 5 000 digits
                encoding = "UTF-16, save it as UTF-8" if b"\0" in line else error
                problem = f"not JSON ({encoding})"
            except (AttributeError, KeyError, TypeError) as error:
                problem = f"an answer is not built as expected ({error})"
            if problem:
                raise _bad_line(path, number, f"{problem}; {hint}")
            yield answers


def _row_answers(row: dict) -> list[dict]:
    """Return every answer of every annotator in every project; one record of a bare image."""
    data_row = row["data_row"]
    image = {"image": image_name(data_row), "data_row_id": data_row.get("id")}
    image |= {"global_key": data_row.get("global_key")}
    image |= {"project": None, "annotator": None, "label_id": None, "judged": False}
    image |= {"path": None, "kind": None, "answer": None, "unread": False, "rework": False}
    records = []
    for project_id, project in row["projects"].items():
        status = (project.get("project_details") or {}).get("workflow_status")
        for number, label in enumerate(project.get("labels") or []):
            skipped = bool((label.get("performance_details") or {}).get("skipped"))
            key = {"project": project.get("name") or project_id, "judged": not skipped}
            key["annotator"] = (label.get("label_details") or {}).get("created_by")
            key["label_id"] = label.get("id") or f"{project_id}-{number}"
            given = label.get("annotations", {})
            others = ("objects", "frames", "segments")  # boxes, and what stands in a video
            key |= {"unread": any(map(given.get, others)), "rework": status == "IN_REWORK"}
            answers = [] if skipped else list(_walk_answers(given.get("classifications") or []))
            records += [image | key | answer for answer in answers or [{}]]
    records = records or [image]
    for value in itertools.chain.from_iterable(r.values() for r in records):
        if not isinstance(value, str | bool | tuple | None):  # a path is made of texts alone
            raise TypeError(f"text instead of {value!r}")
    return records


def _walk_answers(items: list[dict], above: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield each answer with its path: question, or question, option, nested question, ..."""
    for item in items:
        path = (*above, plain_name(item["name"]))
        if "text_answer" in item:
            content = (item["text_answer"] or {}).get("content")
            yield {"path": path, "kind": "text", "answer": content}
        kind = "checklist" if "checklist_answers" in item else "radio"
        given = item.get("radio_answer") or item.get("checklist_answers") or []
        for answer in given if isinstance(given, list) else [given]:
            option = plain_name(answer["name"])
            yield {"path": path, "kind": kind, "answer": option}
            yield from _walk_answers(answer.get("classifications") or [], (*path, option))


def plain_name(name: str) -> str:
    """Return a name without spaces at its ends, double ones, or a second way to write an umlaut."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def _graded_questions(answers: pd.DataFrame) -> set[tuple]:
    """Return the questions whose options are grades ("1 - Definitely") and not "6 - 20".

    Each number up to 9 has a word of its own. They count from 1, or each answer holds one, or they
    are known from a question that does: "2 - stemmed palm" beside a photo of "Grass" is no grade.
    """
    given: dict[tuple, dict[tuple, set[str]]] = {}
    keys = zip(answers["image"], answers["label_id"])
    for key, path, option in zip(keys, answers["path"], answers["answer"]):
        given.setdefault(path[::2], {}).setdefault(key, set()).add(option)
    schemes, complete = {}, set()
    for question, each in given.items():
        matches = [*filter(None, map(_GRADE.match, sorted(set().union(*each.values()))))]
        pairs = {(int(m[1]), m.string[m.end() :].casefold()) for m in matches}
        unique = all(len(set(values)) == len(pairs) for values in zip(*pairs))
        if matches and unique and all(n < 10 and word[:1].isalpha() for n, word in pairs):
            schemes[question] = scheme = {m.string for m in matches}
            if any(int(m[1]) == 1 for m in matches) or all(scheme & one for one in each.values()):
                complete.add(question)
    known = set().union(*(schemes[question] for question in complete))
    return {question for question, scheme in schemes.items() if scheme <= known}


def _name_answers(answers: pd.DataFrame, path: PathLike) -> pd.DataFrame:
    """Add question, grade and label to the paths; no two paths may give one label."""
    chosen = answers["path"].notna() & (answers["kind"] != "text")
    graded = _graded_questions(answers[chosen])

    def parts(way: tuple[str, ...]) -> tuple[str, ...]:  # below a grade: the same for any grade
        is_grade = [way[: i + 1 : 2] in graded and _GRADE.match(way[i]) for i in range(len(way))]
        return tuple(name for i, name in enumerate(way) if i % 2 == 0 or not is_grade[i])

    asked = [parts(way) if way else None for way in answers["path"]]
    in_scheme = chosen & np.array([bool(w) and w[::2] in graded for w in answers["path"]])
    each = zip(asked, answers["answer"], in_scheme, chosen)
    ways = [(w if grade else (*w, option)) if ticked else None for w, option, grade, ticked in each]
    labels = [" / ".join(way) if way else None for way in ways]
    paths_per_label = pd.Series(ways, labels, dtype=object).groupby(level=0, sort=False).nunique()
    if twofold := [*paths_per_label.index[paths_per_label > 1]]:
        problem = "a question and an option of another one give the same label, rename one"
        raise ValueError(f"{path}: {problem}: {brief(twofold)}.")
    question = [" / ".join(names) if names else None for names in asked]
    grade = answers["answer"].astype("string").str.extract(_GRADE)[0].astype(float)
    named = answers.assign(path=question, grade=grade.where(in_scheme), label=labels)
    return named.assign(graded=in_scheme).rename(columns={"path": "question"})


def _tell_apart(rows: list[list[dict]], path: PathLike) -> None:
    """Call photos of one name by their global keys, where these are the paths of such files."""
    photos: dict[str, dict] = {}
    for first in (row[0] for row in rows):
        key = first["data_row_id"] or first["global_key"]
        photos.setdefault(first["image"], {})[key] = first["global_key"]
    for name, keys in photos.items():
        global_keys = {key.replace("\\", "/") for key in keys.values() if isinstance(key, str)}
        files = {key.rpartition("/")[2] for key in global_keys}
        if len(keys) > 1 and (len(global_keys) < len(keys) or files != {name.rpartition("/")[2]}):
            problem = "several data rows of one name, give each a global_key that is its path"
            raise ValueError(f"{path}: {problem}: {name}.")
    for record in itertools.chain(*rows):
        if len(photos.get(record["image"], ())) > 1:
            record["image"] = record["global_key"].replace("\\", "/")


def read_labelbox(
    path: PathLike, problematic: str = "drop", flags: Sequence[str] = ("Problematic", "Revisit")
) -> pd.DataFrame:
    """Read a Labelbox v2 NDJSON export as annotated, one line per answer.

    A question with options like "1 - Definitely" is graded and is one label; its other options
    ("Foreground") only describe it. An ungraded question gives one label per option, named
    "question / option". Texts and `flags` (radio questions about the photo itself) are no labels.
    `problematic` "drop" leaves out the images that carry the first of `flags` (not those where it
    is answered "No").

    Returns columns image, data_row_id, project, annotator, label_id, judged (False in the one line
    of an image that nobody labelled), question, kind, answer, grade (1 = most certain) and label, a
    categorical with the vocabulary of all rows as they appear; `.attrs["report"]` says what needs
    attention.
    """
    check_choice("problematic", problematic, ("drop", "keep"))
    rows = list(_read_export(path))
    if not rows:
        raise ValueError(f"{path}: no rows; expected a Labelbox v2 export.")
    _tell_apart(rows, path)
    images = pd.Series([row[0]["image"] for row in rows])
    answers = pd.DataFrame(itertools.chain(*rows))
    noted = {key: answers["image"][answers.pop(key)].unique() for key in ("unread", "rework")}
    answers = answers.drop(columns="global_key")
    answers = _name_answers(answers.drop_duplicates(ignore_index=True), path)
    graded = answers.pop("graded")
    answers.loc[answers["question"].isin(flags), "label"] = None
    answers["label"] = pd.Categorical(answers["label"], answers["label"].dropna().unique())
    check_label_names(answers["label"].cat.categories, path)
    key = ["image", "label_id", "label"]
    ungraded = graded & (answers.groupby(key, observed=True)["grade"].transform("count") == 0)
    judged = answers.groupby("image", sort=False)["judged"].any()
    raised = answers[answers["question"].isin(flags[:1])]
    denied = raised["answer"].astype("string").str.fullmatch(_NO, case=False).fillna(False)
    bad = raised.loc[~denied.astype(bool), "image"].unique()
    answers.attrs["report"] = {
        "images": len(judged),
        "duplicated": images[images.duplicated()].tolist(),
        "unlabelled": judged.index[~judged].tolist(),
        "problematic": list(bad),
        "without a grade": sorted(answers.loc[ungraded, "image"].unique()),
        "boxes not read": list(noted["unread"]),
        "in rework": list(noted["rework"]),
    }
    if problematic == "drop":
        return answers[~answers["image"].isin(bad)].reset_index(drop=True)
    return answers


def check_label_names(labels: Iterable[str], path: PathLike, what: str = "label") -> None:
    """Refuse labels that are called like another column, or that no CSV brings back."""
    labels = sorted(labels)
    if odd := [label for label in labels if re.search(r"^$|[\0-\x1f\x7f\ud800-\udfff]", label)]:
        raise ValueError(f"{path}: {odd[0]!r} is no name that can be written; rename that {what}.")
    reserved = {"image", "part", CLASS, *NOT_LABELS, *(f"{label}_prob" for label in labels)}
    if clashing := [label for label in labels if label in reserved]:
        raise ValueError(f"{path}: {clashing[0]!r} is the name of a column; rename that {what}.")


def to_targets(
    answers: pd.DataFrame,
    positive_max: int = 3,
    unanswered: str = "absent",
    soft: dict[int, float] | None = None,
    hard: bool = False,
) -> pd.DataFrame:
    """Turn the answers of `read_labelbox` into `image` and one column per label: 1, 0, NaN or soft.

    Several annotators are averaged; without `soft` the majority decides and a tie is present. An
    image that nobody labelled, or an answer that lacks its grade, is unknown (NaN).

    Args:
        positive_max: grades 1..positive_max are present, a lower certainty is absent.
        unanswered: an unticked question of a project that asks it is "absent" (0) or "unknown".
        soft: soft target per grade, e.g. {1: 1.0, 2: 0.9, 3: 0.6}; None gives 1.
        hard: with `soft`, decide by the mean certainty (present from 0.5) instead of keeping it.
    """
    check_choice("unanswered", unanswered, ("absent", "unknown"))
    vocabulary = answers["label"].cat.categories
    key = ["image", "project", "label_id"]
    given = answers[answers["judged"] & answers["label"].notna()].copy()
    graded = given["label"].astype(str) == given["question"]
    grade = given["grade"].where(graded, 1)
    present = grade.between(1, positive_max)
    if lacking := sorted(set(grade[present]) - set(soft or grade)):
        raise ValueError(f"soft={soft}: no target for grade {brief(lacking)}.")
    value = (grade.map(soft) if soft else present).astype(float).where(present, 0)
    given["value"] = value.where(grade.notna(), -1)  # -1 loses to any grade beside it
    table = given.pivot_table("value", key, "label", aggfunc="max", observed=True, sort=False)
    everyone = answers.loc[answers["judged"], key].drop_duplicates()
    table = table.reindex(index=pd.MultiIndex.from_frame(everyone), columns=vocabulary)
    if unanswered == "absent":
        asked = pd.crosstab(given["project"], given["label"]).reindex(columns=vocabulary)
        asked = asked.reindex(everyone["project"]).fillna(0).to_numpy() > 0
        table = table.mask(table.isna() & asked, 0.0)
    targets = table.mask(table < 0).groupby(level="image", sort=False).mean()
    if soft is None or hard:  # rounded: 0.2, 0.6 and 0.7 average just below 0.5
        targets = (targets.round(9) >= 0.5).astype(float).where(targets.notna())
    targets = targets.reindex(answers["image"].unique())
    return targets.rename_axis(index="image", columns=None).reset_index()


# ---------------------------------------------------------------- labels of CSVs, class folders


def _split_cell(cell: str, separator: str | None = None) -> list[str]:
    """Return the labels of a cell: "a, b; c", or a list as pandas writes it ("['a', 'b']")."""
    bare = re.fullmatch(r"(?:array\()?[\[({]([^][(){}]*)[])}]\)?", cell)
    quoted = re.findall(r"""'([^']*)'|"([^"]*)\"""", bare[1]) if bare else []
    if quoted:
        return [plain_name("".join(pair)) for pair in quoted]
    pattern = r"[,;|]" if separator is None else re.escape(separator)
    return [plain_name(name) for name in re.split(pattern, bare[1] if bare else cell)]


def _split_lists(cells: pd.Series, unlisted: str, separator: str | None = None) -> pd.DataFrame:
    """Turn cells with lists into one 0/1 column per label, in order of appearance."""
    listed = cells.map(lambda cell: [name for name in _split_cell(cell, separator) if name])
    names = listed.explode().dropna().unique()
    labels = pd.DataFrame({n: [float(n in row) for row in listed] for n in names}, cells.index)
    return labels.mask(cells == "") if unlisted == "unknown" else labels


def _read_words(column: pd.Series) -> pd.Series:
    """Turn a column of yes and no (in one way of writing) into one of 1 and 0."""
    yes = column.str.fullmatch("true|yes|y|t|x|✓|✔|present|wahr|ja|vrai|oui", case=False)
    no = column.str.fullmatch("false|no|n|f|absent|falsch|nein|faux|non", case=False)
    ways = [column[matches].str.casefold().nunique() for matches in (yes, no)]
    is_words = (yes | no | (column == "")).all() and max(ways) == 1
    return column.mask(yes, "1").mask(no, "0") if is_words else column


def _take_names(table: pd.DataFrame, path: PathLike) -> pd.Series:
    """Return the first column as `image`; every file name must be there, and once."""
    names = table.iloc[:, 0].rename("image")
    if names.empty:
        raise ValueError(f"{path}: no rows; expected one row per image.")
    for problem, what in [(names == "", "no file name"), (names.duplicated(), "file name twice")]:
        if problem.any():
            lines = brief([f"line {i + 2}: {names[i]!r}" for i in names.index[problem]])
            raise ValueError(f"{path}: {what}, expected one row per image: {lines}.")
    return names


def _check_lists(cells: pd.Series, path: PathLike) -> None:
    """Refuse what could be a list as well as one label: "haze primary", "1 2"."""
    given = cells[cells != ""].drop_duplicates()
    spaced = given[given.str.contains(r"\s")]
    words = spaced.str.split().map(set).explode()
    doubtful = words.duplicated().any() or spaced.str.fullmatch(r"[\d\s]+").any()
    if doubtful and (given.map(_split_cell).map(len) == 1).all():
        problem = f"is {spaced.iloc[0]!r} one label or several? Set LIST_SEPARATOR to ',' or ' '"
        raise ValueError(f"{path}: {problem} (read_csv_labels: separator).")


def read_csv_labels(
    path: PathLike, unlisted: str = "unknown", keep: Sequence = (), separator: str | None = None
) -> pd.DataFrame:
    """Read `image`, the columns to keep as text, and labels as 1, 0 or NaN (empty: not judged).

    With a `separator` the one label column holds lists, whatever they look like.
    """
    check_choice("unlisted", unlisted, ("unknown", "absent"))
    table = read_table(path)
    if table.shape[1] < 2:
        raise ValueError(f"{path}: expected a file name column and at least one label column.")
    if lost := {*keep} - {*table.columns[1:]} | {*keep} & {"image"}:  # the file names' own
        raise ValueError(f"{path}: no column {brief(lost)} to keep, beside that of file names.")
    names, cells = _take_names(table, path), table.iloc[:, 1:].drop(columns=list(keep))
    cells = cells if separator else cells.apply(_read_words)
    texts = (cells != "").any(axis=None) and cells.apply(pd.to_numeric, errors="coerce").isna()
    if cells.shape[1] == 1 and (separator or np.all(texts)):
        if not separator:
            _check_lists(cells.iloc[:, 0], path)
        labels = _split_lists(cells.iloc[:, 0], unlisted, separator)
    else:
        labels = parse_cells(cells, path, soft=False)
    check_label_names(labels, path)
    return pd.concat([names, table[list(keep)], labels], axis=1).reset_index(drop=True)


def _flat_images(part: Path, names: pd.Series) -> pd.DataFrame:
    """Return class and name of images without folders, from the ground truth beside them."""
    places = [path for place in (part, part.parent) for path in sorted(place.iterdir())]
    truth = [p for p in places if re.search(r"(val_solution\.csv|ground_truth\.txt)$", p.name)]
    if part.name != "val" or not truth:
        problem = f"no images in class folders; expected {part}/<class>/*.jpg"
        raise ValueError(f"{part}: {problem}, or for val/ LOC_val_solution.csv beside it.")
    if truth[0].suffix == ".csv":  # ImageId,PredictionString
        table = read_table(truth[0])
        class_of = dict(zip(_take_names(table, truth[0]), table.iloc[:, -1].str.split().str[0]))
        classes = names.map(lambda name: class_of.get(Path(name).stem, class_of.get(name)))
    else:  # a number per photo, in the order of their names
        from scipy.io import loadmat

        try:
            meta = loadmat(truth[0].with_name("meta.mat"), squeeze_me=True)["synsets"]
            of_number = dict(zip(meta["ILSVRC2012_ID"].astype(int), meta["WNID"].tolist()))
            numbers = [int(number) for number in truth[0].read_text().split()]
        except Exception as error:  # scipy raises errors of many types
            raise ValueError(f"{truth[0]}: no numbers of meta.mat beside it ({error}).") from None
        if len(numbers) != len(names):
            raise ValueError(f"{truth[0]}: {len(numbers)} classes and {len(names)} photos.")
        classes = pd.Series([of_number.get(number) for number in numbers])
    if (lost := names[classes.isna()]).size:
        raise ValueError(f"{truth[0]}: no class of {brief(lost)}; add a line each.")
    return pd.DataFrame({CLASS: classes, "image": names})


def _class_images(part: Path) -> pd.DataFrame:
    """Return class and name of each image in class folders; refuses empty ones, counts loose."""
    names = pd.Series([*image_names(part)], dtype=object)
    folder = names.str.partition("/")[0].where(names.str.contains("/"))
    if folder.isna().all():
        return _flat_images(part, names)
    folders = {p.name for p in part.iterdir() if p.is_dir() and _is_wanted(p.name)}
    if empty := [part / name for name in sorted(folders - set(folder))]:
        fix = "add photos, or delete the folder if the class is not wanted"
        raise ValueError(f"{brief(empty)}: a class folder without images; {fix}.")
    loose = [part / name for name in names[folder.isna()]]
    if loose and part.name in ("train", "val"):  # elsewhere: photos that nobody sorted yet
        problem = f"{len(loose)} images lie in no class folder and are left out"
        warnings.warn(f"{part}: {problem}: {brief(loose)}.", stacklevel=4)
    return pd.DataFrame({CLASS: folder, "image": names}).dropna()


def _list_classes(root: Path) -> pd.DataFrame:
    """Return part, class and image (below `root`); the parts are train/ and val/, or `root`."""
    split = [root / name for name in ("train", "val") if (root / name).is_dir()]
    parts = split if len(split) == 2 else [root]
    table = pd.concat({part.relative_to(root).as_posix(): _class_images(part) for part in parts})
    table = table.reset_index(level=0, names="part")
    if len(split) == 2:
        table["image"] = table["part"] + "/" + table["image"]
    deep = table["image"].str.count("/") > 1
    if len(split) == 1 and deep.all() and set(table[CLASS]) == {split[0].name}:
        problem = f"expected train/ and val/ in it, found {split[0].name}/ alone"
        raise ValueError(f"{root}: {problem}; add the other, or read {split[0]}.")
    classes = table.groupby("part", sort=False)[CLASS].agg(set)
    if untrained := sorted(classes.iloc[-1] - classes.iloc[0]):
        problem = f"holds classes that {parts[0]} lacks: {brief(untrained)}"
        raise ValueError(f"{parts[-1]}: {problem}; a class must be trained to be tested.")
    return table


def _class_names(path: PathLike, folders: Sequence[str]) -> dict[str, str]:
    """Return folder → its words up to the first comma; words of two classes get the folder too."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        expected = "expected a text file (UTF-8) with a line `folder words` per class"
        raise ValueError(f"{path}: {expected}, {type(error).__name__}.") from None
    longest = sorted(map(re.escape, folders), key=len, reverse=True)  # "sand dry" before "sand"
    lines = re.findall(rf'(?m)^[ \t]*({"|".join(longest)})[ \t,;]+"?([^,\n]*)', text)
    words = pd.DataFrame(lines, columns=["folder", "words"])
    words["words"] = words["words"].str.strip(' \t"')
    words = words[words["words"] != ""].drop_duplicates().set_index("folder")["words"]
    if missing := [folder for folder in folders if folder not in words.index]:
        fix = "add one `folder words` each, or give no names"
        raise ValueError(f"{path}: no line with words for {brief(missing)}; {fix}.")
    if several := words.index[words.index.duplicated()].tolist():
        problem = f"lines that contradict each other for {brief(several)}"
        raise ValueError(f"{path}: {problem}; keep one.")
    words = words[list(folders)]
    names = words.where(~words.duplicated(keep=False), words + " (" + words.index + ")")
    if twice := names[names.duplicated()].tolist():
        raise ValueError(f"{path}: two classes would be called {brief(twice)}; name one otherwise.")
    return names.to_dict()


def read_class_folders(root: PathLike, names_path: PathLike | None = None) -> pd.DataFrame:
    """Return `image` (path below root) and `class`; attrs: "classes", "class_depth", "root"."""
    listed = _list_classes(Path(root))
    folders = sorted(listed[CLASS].unique())  # train/ has them all
    names = _class_names(names_path, folders) if names_path else dict(zip(folders, folders))
    check_label_names(names.values(), root, "class")
    table = pd.DataFrame({"image": listed["image"], CLASS: listed[CLASS].map(names)})
    depth = listed["part"].nunique()  # 2: train/<class>/, 1: <class>/
    table.attrs = {"classes": [*names.values()], "class_depth": depth, "root": Path(root)}
    return table.reset_index(drop=True)


def read_class_column(path: PathLike, column: str, keep: Sequence[str] = ()) -> pd.DataFrame:
    """Return `image`, the columns to keep and `class` of a CSV; an empty cell is unknown."""
    table = read_table(path)
    if lost := {column, *keep} - set(table.columns[1:]) | {*keep} & {"image"}:
        given = f"its columns are {brief(table.columns)}"
        raise ValueError(f"{path}: no column {brief(sorted(lost))}; {given}.")
    names, cells = _take_names(table, path), table[column].map(plain_name)
    labelled = pd.concat([names, table[list(keep)], cells.mask(cells == "").rename(CLASS)], axis=1)
    labelled.attrs["classes"] = sorted(labelled[CLASS].dropna().unique())
    return labelled.reset_index(drop=True)


# ---------------------------------------------------------------- partition


def _without_suffix(name: str) -> str:
    return os.path.splitext(name)[0] if _suffix(name) in IMAGE_SUFFIXES else name


def panorama_name(path: PathLike) -> str:
    """Return the path of a photo without suffix and side; the halves of a panorama share it."""
    return re.sub(r"_(left|right)$", "", _without_suffix(str(path)))


def combine_halves(targets: pd.DataFrame) -> pd.DataFrame:
    """Combine the rows of NAME_left and NAME_right into one row NAME of the whole panorama.

    Present if in either half; unknown if neither says present and one is unknown or missing. A
    class is that of its halves, which must be one.
    """
    stem = targets["image"].map(_without_suffix)
    is_half = stem.str.endswith(("_left", "_right"))
    panorama = targets["image"].map(panorama_name)
    labels = targets.select_dtypes(["number", "bool"]).columns
    by = targets.drop(columns="image").astype(dict.fromkeys(labels, float))
    by = by.groupby(panorama, sort=False)
    if CLASS in targets and (several := by[CLASS].nunique().loc[lambda n: n > 1].index).size:
        problem = "halves of one panorama are of two classes; set VIEW = 'half', or correct them"
        raise ValueError(f"{brief(several)}: {problem}.")
    combined = by.first()
    enough = by[labels].count().ge(1 + is_half.groupby(panorama, sort=False).any(), axis=0)
    combined[labels] = by[labels].max().where(lambda highest: (highest >= 0.5) | enough)
    return combined.reset_index()


def read_table(path: PathLike) -> pd.DataFrame:
    """Read a CSV (commas, semicolons, tabs) as stripped text; its index is the line less 2."""
    text = {"dtype": str, "header": None, "keep_default_na": False, "skip_blank_lines": False}
    path = _need_file(path, "name a CSV")
    try:
        lines = path.read_text(encoding="utf-8-sig")
        first, _, rest = lines.partition("\n")
        named = re.fullmatch(r'"?sep=(.)"?[,;\t\r]*', first, re.IGNORECASE)  # as Excel writes it
        separator = named[1] if named else _separator(lines)
        table = pd.read_csv(io.StringIO(rest if named else lines), sep=separator, **text).fillna("")
    except (ValueError, csv.Error) as error:  # pandas' own errors and UnicodeDecodeError
        problem = f"no CSV with a header, a label column and equal rows ({str(error).strip()})."
        raise ValueError(f"{path}: {problem}") from None
    table = table.apply(lambda column: column.str.strip())
    names = table.iloc[0].tolist()
    if len(set(names)) < len(names) or "" in names[1:]:
        raise _bad_line(path, 1, f"a column without a name or twice: {brief(names)}")
    table = table.iloc[1:].set_axis(names, axis=1).reset_index(drop=True)
    table.index += bool(named)
    if separator != ",":  # and so a comma may be a decimal one
        cells = table.iloc[:, 1:].replace(r"^([01]),(0+)$|^(0),(\d+)$", r"\1\3.\2\4", regex=True)
        table = pd.concat([table.iloc[:, :1], cells], axis=1)
    return table[(table != "").any(axis=1)]


def _separator(text: str) -> str:
    """Return what divides all rows into as many cells, two or more; a comma if several do."""
    for separator in ",;\t|":
        rows = csv.reader(io.StringIO(text), delimiter=separator)
        widths = {len(row) for row in rows if "".join(row).strip()}
        if len(widths) == 1 and max(widths) > 1:
            return separator
    return ","


def parse_cells(cells: pd.DataFrame, path: PathLike, soft: bool) -> pd.DataFrame:
    """Turn the text of `read_table` into 1, 0, NaN (empty) and, if `soft`, values between."""
    values = cells.apply(pd.to_numeric, errors="coerce")
    good = ((values >= 0) & (values <= 1)) if soft else values.isin([0, 1])
    wrong = np.argwhere((~good & (cells != "")).to_numpy())
    if len(wrong):
        line, name = cells.index + 2, cells.columns
        shown = brief([f"line {line[r]}, {name[c]}: {cells.iloc[r, c]!r}" for r, c in wrong])
        expected = "0 to 1" if soft else "0, 1"
        raise ValueError(f"{path}: expected {expected} or an empty cell, found {shown}.")
    return values.astype(float)


def read_partition(path: PathLike) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of a partition CSV, paths seen from the working directory, and its labels.

    Classes that exclude each other are one column `class`, a name or NaN; the labels are those of
    classes.txt beside the CSV.
    """
    path = _need_file(path, "run partitioning.ipynb to make it")
    df = read_table(path)
    labels = [column for column in df.columns if column not in NOT_LABELS]
    if not labels or not set(NOT_LABELS) <= set(df.columns):
        raise ValueError(f"{path}: expected columns image_path, group_id and at least one label.")
    if CLASS in labels:
        labels, df[CLASS] = _check_classes(df, path), df[CLASS].mask(df[CLASS] == "")
    else:
        df[labels] = parse_cells(df[labels], path, soft=True)
    df["image_path"] = [resolve_image_path(path, name) for name in df["image_path"]]
    return df.reset_index(drop=True), labels


def resolve_image_path(table: Path, name: str) -> str:
    """Return where a file is that a table in its folder names, also by bytes that are no UTF-8."""
    name = re.sub(r"\\udc([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), name)
    return os.path.normpath(os.path.join(table.parent, name)).replace(os.sep, "/")


def _check_classes(df: pd.DataFrame, path: Path) -> list[str]:
    """Return the classes of a partition of `read_table`; a name must be known, a photo one row."""
    names = _need_file(path.with_name("classes.txt"), "a partition of classes needs it beside it")
    try:
        classes = names.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{names}: not UTF-8 ({error}); save it in that encoding.") from None
    if len(set(classes)) < len(classes) or "" in classes:
        raise ValueError(f"{names}: expected one class per line, each once.")
    if others := set(df.columns) - {CLASS, *NOT_LABELS}:
        raise ValueError(f"{path}: {brief(sorted(others))} beside the column class; keep one kind.")
    wrong, twice = ~df[CLASS].isin(["", *classes]), df["image_path"].duplicated()
    if wrong.any():
        first = df[wrong].iloc[0]
        problem = f"{first[CLASS]!r} is no class of {names.name} ({brief(classes, 3)})"
        raise _bad_line(path, first.name + 2, f"{problem}; {wrong.sum()} such cells")
    if twice.any():
        first = df[twice].iloc[0]
        given = df.loc[df["image_path"] == first["image_path"], CLASS]
        problem = f"{first['image_path']} stands twice, as {brief(given)}"
        raise _bad_line(path, first.name + 2, f"{problem}; keep one row per photo")
    return classes


def load_parts(
    folder: PathLike, names: Sequence[str] = PARTS
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Read the partitions of `folder` and their labels; no group may stand in two parts."""
    paths = {name: Path(folder) / f"{name}_partition.csv" for name in names}
    read = {name: read_partition(path) for name, path in paths.items()}
    labels = read[names[0]][1]
    for name, (table, columns) in read.items():
        if columns != labels or (CLASS in table) != (CLASS in read[names[0]][0]):
            other = brief(sorted({*columns} ^ {*labels})) or "in another order or of another kind"
            raise ValueError(f"{paths[name]}: other labels than {paths[names[0]].name}: {other}.")
    parts = {name: table for name, (table, _) in read.items()}
    for one, two in itertools.combinations(names, 2):
        if shared := set(parts[one]["group_id"]) & set(parts[two]["group_id"]):
            problem = f"group {brief(sorted(shared))} is in {one} and in {two}"
            raise ValueError(f"{folder}: {problem}; run partitioning.ipynb again.")
    trained = set(parts["train"][CLASS]) if CLASS in parts.get("train", ()) else set(labels)
    if lost := [name for name in labels if name not in trained]:
        fix = "add photos, or take it from classes.txt and the other parts"
        raise ValueError(f"{paths['train']}: no photo of class {brief(lost)}; {fix}.")
    return parts, labels


def write_partition(df: pd.DataFrame, path: PathLike, classes: Sequence[str] = ()) -> None:
    """Write a partition CSV; `image_path` becomes relative to the CSV's folder.

    `classes`, in their order, become classes.txt beside it, which a column `class` needs.
    """
    start = Path(path).parent
    seen = functools.cache(lambda folder: os.path.relpath(folder or ".", start))
    pairs = [os.path.split(image) for image in df["image_path"]]
    relative = [os.path.normpath(os.path.join(seen(folder), name)) for folder, name in pairs]
    table = df.assign(image_path=[name.replace(os.sep, "/") for name in relative])
    if len(classes):
        class_numbers(df[CLASS], classes)  # refuses a name that is none of them
        write_text(start / "classes.txt", "".join(f"{name}\n" for name in classes))
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, errors="backslashreplace")


def class_numbers(names: pd.Series, classes: Sequence[str]) -> Array:
    """Return the place of each name in `classes`, (N,) of int64, -1 for NaN."""
    numbers = pd.Index(classes).get_indexer(names).astype(np.int64)
    if lost := sorted(set(names[numbers < 0].dropna())):
        raise ValueError(f"class {brief(map(repr, lost))}: none of the classes {brief(classes)}.")
    return numbers


# ---------------------------------------------------------------- data


def open_image(image: Any, size: tuple[int, int] | None = None) -> Image.Image:
    """Return a path, PIL image or array (H, W, 3) as an upright image of 8-bit RGB.

    Where `size` (height, width) is enough, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size. A file
    that is missing, truncated or no image is named by an OSError.
    """
    if not isinstance(image, PathLike):
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        turn = _find_turn(image)
        return _to_rgb(image if turn is None else image.transpose(turn))
    if not os.path.isfile(image):  # nor a pipe, which would be waited for
        raise FileNotFoundError(f"{image}: no such image; check the folder or the CSV.")
    try:
        with Image.open(image, formats=_FORMATS) as file:
            turn = _find_turn(file)
            if size is not None and file.format in ("JPEG", "MPO"):
                file.draft("RGB", size if turn in _SWAPPING else size[::-1])
            return _to_rgb(file if turn is None else file.transpose(turn))
    except Exception as error:  # whatever a damaged file makes a decoder raise
        problem = f"cannot be read as an image ({error}); replace it or leave it out."
        raise OSError(f"{image}: {problem}") from None


def is_whole_panorama(path: PathLike) -> bool:
    """Say whether a photo is twice as wide as high, as a full sphere is; False if unreadable."""
    with contextlib.suppress(Exception), Image.open(path, formats=_FORMATS) as image:
        return _is_sphere(image)  # whatever a damaged file makes a decoder raise
    return False


def _is_sphere(image: Image.Image) -> bool:
    return abs(image.width - 2 * image.height) <= 0.02 * image.width


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what sets an image upright; broken EXIF never costs a photo."""
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, convert() would clip
        grey = np.asarray(image)
        is_8_bit = image.mode == "I" and grey.max() < 256
        image = Image.fromarray((grey >> (0 if is_8_bit else 8)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class RandomHorizontalRoll(v2.Transform):
    """Turn a whole panorama by a random angle: columns leaving on the right re-enter left."""

    def __init__(self, view: str) -> None:
        super().__init__()
        if view != "panorama":  # a half does not wrap: it would get a seam that is not there
            raise ValueError(f"view={view!r}: only panoramas wrap; halves must not be rolled.")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"turn": float(torch.rand(()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return torch.roll(inpt, round(params["turn"] * inpt.shape[-1]), dims=-1)


class RandomSqueezedCrop(v2.RandomResizedCrop):
    """Cut shapes around the photo's own, not around a square: testing squeezes whole photos."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        area, shape, top, left = torch.rand(4).tolist()
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        widest = min(np.log(4 / 3), -np.log(area))  # by a third at most, no wider than the photo
        shape = np.exp((2 * shape - 1) * widest)
        h, w = round(height * (area / shape) ** 0.5), round(width * (area * shape) ** 0.5)
        box = {"top": round(top * (height - h)), "left": round(left * (width - w))}
        return box | {"height": max(h, 1), "width": max(w, 1)}


def make_transforms(
    model: nn.Module,
    train: bool,
    view: str = "half",
    crop_scale: tuple[float, float] = (0.8, 1.0),
    rand_augment: str | None = None,
    random_erasing: float = 0.0,
) -> v2.Compose:
    """Return PIL image → normalised float tensor (3, H, W) of the size that `model` takes.

    The whole picture is squeezed, never cropped at its centre: labels may lie anywhere. For
    training, a random crop keeps `crop_scale` of it; `rand_augment` (arXiv 1909.13719, e.g.
    "rand-m9-n2-mstd0.5") takes the place of the colour jitter; a rectangle becomes noise
    (arXiv 1708.04896) with the probability `random_erasing`.
    """
    check_choice("view", view, VIEWS)
    if not 0 <= random_erasing <= 1:
        raise ValueError(f"random_erasing={random_erasing}: expected a probability from 0 to 1.")
    config = model.data_config
    size = config["input_size"] if train else config.get("test_input_size", config["input_size"])
    size, mode = size[1:], v2.InterpolationMode(config["interpolation"])
    steps: list[nn.Module] = [v2.ToImage(), v2.Resize(size, mode)]
    if train:
        steps[1:] = [RandomHorizontalRoll(view)] if view == "panorama" else []
        steps += [RandomSqueezedCrop(size, crop_scale, interpolation=mode)]
        colours = [] if rand_augment else [v2.ColorJitter(0.2, 0.2, 0.2)]
        steps += [v2.RandomHorizontalFlip(), *(colours or _rand_augment(rand_augment, config))]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    if train and random_erasing:
        steps += [RandomErasing(random_erasing, mode="pixel", device="cpu")]
    return v2.Compose(steps)


def _rand_augment(settings: str, config: dict) -> list[Callable]:
    """Return RandAugment, which works on PIL images; what it moves in from outside is grey."""
    grey = tuple(round(255 * value) for value in config["mean"])
    reach = {"translate_const": int(0.45 * min(config["input_size"][1:])), "img_mean": grey}
    known = r"rand(-(m|n|p|mstd|mmax|inc)\d[\d.]*|-tweights)*"
    if not re.fullmatch(known, settings):  # timm passes over what it does not know
        raise ValueError(f"rand_augment={settings!r}: expected e.g. 'rand-m9-n2-mstd0.5'.")
    return [v2.ToPILImage(), rand_augment_transform(settings, reach), v2.ToImage()]


def _needed_size(transform: Callable | None) -> tuple[int, int] | None:
    """Return the height and width that about suffice for the first resizing of `transform`."""
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, (RandomSqueezedCrop, v2.Resize)) and len(step.size) == 2:
            least = getattr(step, "scale", (1.0,))[0] ** 0.5
            return tuple(int(np.ceil(side / least)) for side in step.size)
    return None


class DataPartition(Dataset):
    """The images (3, H, W) and targets (L,), float32 with NaN for unknown, of a partition.

    With a column `class` a target is its number (int64, -1 for unknown), and `exclusive` is true.
    Paths and groups are kept as bytes, which worker processes share, and decoded at each look at
    `paths` and `groups`: take these once, not in a loop. JPEGs are decoded no larger than the
    resizing step of `transform` (PIL image → tensor) needs; `cache_dir` keeps the decoded, shrunk
    copies, so that no photo is decoded twice: `cache_gb` of them, the oldest go. Several processes
    may share it; each may exceed its bound by 2 %.
    """

    def __init__(
        self,
        df: pd.DataFrame,
        label_columns: Sequence[str],
        transform: Callable | None = None,
        cache_dir: PathLike | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        self.label_columns, self.transform = list(label_columns), transform
        self.exclusive = CLASS in df
        wanted = ("image_path", *(() if self.exclusive else label_columns))
        if missing := [c for c in wanted if c not in df.columns]:
            raise ValueError(f"the partition has no column {brief(missing)}.")
        self._paths = _as_bytes(df["image_path"])
        groups = df["group_id"].to_numpy() if "group_id" in df else np.arange(len(df))
        self._groups = _as_bytes(groups) if groups.dtype.kind in "OU" else groups
        targets = read_targets(df, self.label_columns)  # (N,) or (N, L)
        self.targets = targets if self.exclusive else targets.astype(np.float32)
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.cache_gb, self._room = cache_gb, 0.0  # GB that may be written before the next look

    @property
    def paths(self) -> list[str]:
        return [os.fsdecode(path) for path in self._paths]

    @property
    def groups(self) -> Array:
        texts = self._groups.dtype.kind == "S"
        return np.array([*map(os.fsdecode, self._groups)], object) if texts else self._groups

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        size = _needed_size(self.transform)
        read = self._open_cached if self.cache_dir and size else open_image
        image = read(os.fsdecode(self._paths[index]), size)
        image = self.transform(image) if self.transform else image
        return image, torch.tensor(self.targets[index])

    def rows(self, rows: slice | Array) -> "DataPartition":
        """Return a part of it, small to send to another machine."""
        part = copy.copy(self)
        for name in ("_paths", "_groups", "targets"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def _open_cached(self, path: str, size: tuple[int, int]) -> Image.Image:
        stamp = os.stat(path).st_mtime_ns if os.path.exists(path) else None
        key = hashlib.sha1(os.fsencode(f"{os.path.abspath(path)}|{stamp}|{size}")).hexdigest()
        copy = self.cache_dir / key[:2] / f"{key}.npy"
        if (pixels := _read_cached(copy, np.uint8, 3)) is not None:
            return Image.fromarray(pixels)
        image = open_image(path, size)
        if image.height > size[0] and image.width > size[1]:
            image = ImageOps.cover(image, size[::-1])
        with replacing(copy, each_process=True) as temporary, open(temporary, "wb") as file:
            np.save(file, np.asarray(image), allow_pickle=False)
        self._room -= 3e-9 * image.height * image.width
        if self._room < 0:
            used = trim_cache(self.cache_dir, self.cache_gb)
            self._room = min(self.cache_gb - used, self.cache_gb / 50)
        return image


def read_targets(df: pd.DataFrame, labels: Sequence[str]) -> Array:
    """Return the numbers of the classes, (N,) with -1 for unknown, or (N, L) with NaN for it."""
    return class_numbers(df[CLASS], labels) if CLASS in df else df[list(labels)].to_numpy(float)


def _as_bytes(texts: Iterable[Any]) -> Array:
    return np.array([os.fsencode(str(text)) for text in texts], bytes)


def _as_shares(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Turn class numbers (B,) into shares (B, C), NaN in a row where the number is -1."""
    shares = F.one_hot(targets.clamp(min=0), num_classes).float()
    return shares.masked_fill(targets[:, None] < 0, torch.nan)


def _read_cached(path: Path, dtype: type, ndim: int) -> Array | None:
    """Return an array that was kept, or None: it is not there or damaged, make it (again)."""
    try:
        array = np.load(path, allow_pickle=False)
        return array if array.dtype == dtype and array.ndim == ndim else None
    except Exception:  # numpy raises errors of many types at a file that is cut off or garbage
        return None


def trim_cache(folder: PathLike, most_gb: float = np.inf) -> float:
    """Return the GB kept in `folder`; above `most_gb`, the oldest go until a tenth is free."""
    kept, ours = [], re.compile(r"[0-9a-f]{32,40}\.npy")  # what else lies there is left alone
    for path in filter(lambda path: ours.fullmatch(path.name), Path(folder).rglob("*.npy")):
        with contextlib.suppress(FileNotFoundError):  # another process removed it first
            kept.append((path.stat().st_mtime_ns, path.stat().st_size / 1e9, path))
    total = sum(size for _, size, _ in kept)
    if total > most_gb:
        for _, size, path in sorted(kept):
            with contextlib.suppress(OSError):  # Windows: somebody reads it
                path.unlink()
            total -= size
            if total <= 0.9 * most_gb:
                break
    return total


class FeatureSet(TensorDataset):
    """Features (N, ...) instead of photos, for a Trainer of a head alone; no paths, no groups."""

    def __init__(self, features: torch.Tensor, targets: Array, label_columns: Sequence[str]):
        if len(features) != len(targets):
            raise ValueError(f"{len(features)} features and {len(targets)} rows of targets.")
        self.features, self.label_columns = features, list(label_columns)
        self.exclusive = np.ndim(targets) == 1  # (N,) class numbers, or (N, L), NaN for unknown
        self.targets = np.asarray(targets, np.int64 if self.exclusive else np.float32)
        super().__init__(features, torch.from_numpy(self.targets))


class TriStateMixup(Mixup):
    """timm's MixUp/CutMix; a cell is unknown (NaN) where an image contributes an unknown one."""

    def __init__(self, num_labels: int, mixup_alpha: float, cutmix_alpha: float) -> None:
        dense = {"num_classes": 2 * num_labels, "multi_label": True, "label_smoothing": 0.0}
        super().__init__(mixup_alpha, cutmix_alpha, **dense)

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stacked = torch.cat([target.nan_to_num(0.0), target.isnan().float()], dim=1)  # (B, 2L)
        x, stacked = super().__call__(x, stacked)
        mixed, unknown = stacked.chunk(2, dim=1)
        return x, mixed.masked_fill(unknown > 0, torch.nan)


def make_loader(
    dataset: Dataset, batch_size: int, train: bool = False, num_workers: int = 0, seed: int = 42
) -> DataLoader:
    """Return a DataLoader whose order and whose workers' random numbers follow from `seed`."""
    options = {"num_workers": num_workers, "worker_init_fn": _seed_by_rank}
    options["generator"] = generator = torch.Generator().manual_seed(seed)
    if train:  # without the photo, another each epoch, that is left alone: batch norm needs two
        n = len(dataset) - (1 < batch_size < len(dataset) and len(dataset) % batch_size == 1)
        options["sampler"] = RandomSampler(dataset, num_samples=n, generator=generator)
    return DataLoader(dataset, batch_size, pin_memory=torch.cuda.is_available(), **options)


def read_ahead(dataset: Dataset, batch_size: int) -> Iterator[Any]:
    """Yield batches in order; threads on all cores read the next two while one is being used.

    Decoding lets other threads run, so that nothing is copied between processes as in `DataLoader`.
    """
    threads = joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of a process
    waiting, pool = deque(), ThreadPoolExecutor(max(threads, 1))
    try:
        for index in range(len(dataset)):
            waiting.append(pool.submit(dataset.__getitem__, index))
            if len(waiting) == 3 * batch_size:
                yield default_collate([waiting.popleft().result() for _ in range(batch_size)])
        while waiting:
            rest = range(min(batch_size, len(waiting)))
            yield default_collate([waiting.popleft().result() for _ in rest])
    finally:
        pool.shutdown(cancel_futures=True)


def _seed_by_rank(worker: int) -> None:
    """PyTorch seeds workers from the loader's generator, the same in all launched processes."""
    rank = int(os.environ.get("RANK", 0))  # as set by accelerate launch and torchrun
    if rank:  # numpy's, too: timm's MixUp and others draw from it
        set_seed((torch.initial_seed() + 1_000_003 * rank) % 2**32)


# ---------------------------------------------------------------- features of patches, out of fold


def _patches(images: torch.Tensor, side: int = 6) -> torch.Tensor:
    """Return every second patch of (B, 3, H, W), normalised: (B, P, 3 side²)."""
    patches = F.unfold(images, side, stride=2).transpose(1, 2)
    patches = patches - patches.mean(-1, keepdim=True)
    return patches / (patches.std(-1, keepdim=True) + 0.05)


def patch_features(paths: Sequence, n_components: int = 128, seed: int = 42) -> torch.Tensor:
    """Return features (N, D ≤ N) learnt from patches of the images (Coates et al., AISTATS 2011).

    They tell how a quick model would fare: 64 × 64 px, 256 whitened patches as filters, PCA.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} images: patch_features compares images, give two or more.")
    squeeze = v2.Compose([v2.Resize((64, 64)), v2.PILToTensor(), v2.ToDtype(torch.float, True)])
    images = torch.stack([squeeze(open_image(path, (64, 64))) for path in paths])
    rng = np.random.default_rng(seed)
    some = rng.choice(len(images), min(len(images), 500), replace=False)
    sample = _patches(images[some]).flatten(0, 1)
    sample = sample[rng.choice(len(sample), min(len(sample), 20_000), replace=False)]
    mean, (variance, axes) = sample.mean(0), torch.linalg.eigh(sample.T.cov())
    whiten = axes @ torch.diag((variance + 0.1).rsqrt()) @ axes.T
    filters = F.normalize((sample[:256] - mean) @ whiten, dim=1)
    pooled = []
    for batch in images.split(16):
        maps = ((_patches(batch) - mean) @ whiten @ filters.T).mT.unflatten(2, (30, 30))
        rectified = (torch.cat([maps, -maps], dim=1) - 0.5).relu()
        pooled.append(F.adaptive_avg_pool2d(rectified, 4).flatten(1))
    pca = PCA(min(n_components, len(images)), svd_solver="randomized", random_state=seed)
    features = pca.fit_transform(StandardScaler().fit_transform(torch.cat(pooled).numpy()))
    return torch.from_numpy(features / max(features[:, 0].std(), 1e-6)).float()


def fit_and_predict(features: Array, targets: Array, new: Array) -> Array:
    """Fit a logistic regression per label on its known cells; return probabilities (n, L) of `new`.

    A label that is always or never present gets its share, one that nobody judged 0.5.
    """
    probs = np.full((len(new), targets.shape[1]), 0.5)
    for label, cells in enumerate(targets.T):
        known = ~np.isnan(cells)
        present = cells[known] >= 0.5
        if 0 < present.sum() < len(present):
            model = LogisticRegression(C=3.0, max_iter=500).fit(features[known], present)
            probs[:, label] = model.predict_proba(new)[:, 1]
        elif len(present):
            probs[:, label] = present.mean()
    return probs


@dataclass(frozen=True)
class OutOfFold:
    """Probabilities (N, L) of models that saw neither image nor group, made by `out_of_fold`."""

    probs: np.ndarray
    folds: np.ndarray  # (N,), in which one a row was left out
    groups: np.ndarray  # (N,)

    def __post_init__(self) -> None:
        if not len(self.probs) == len(self.folds) == len(self.groups):
            raise ValueError("probs, folds and groups have different lengths.")
        leaks = pd.Series(self.folds).groupby(self.groups).nunique().loc[lambda n: n > 1].index
        if len(leaks):
            raise ValueError(f"not out of fold: {brief(leaks)} stand in several folds.")
        if np.isnan(self.probs).any() or len(set(self.folds)) < 2:
            raise ValueError("not out of fold: a row was left out by no fold; use out_of_fold.")


def out_of_fold(
    fit_predict: Callable, groups: Sequence[str], n_folds: int = 5, seed: int = 42
) -> OutOfFold:
    """Predict each image without its group: fit_predict(rows, held-out rows) → (held out, L)."""
    groups, tables = np.asarray(groups), []
    if n_folds < 2 or len(set(groups)) < n_folds:
        raise ValueError(f"{len(set(groups))} groups are too few for {n_folds} folds.")
    for train, held_out in _folds(groups, n_folds, seed):
        probs = np.asarray(fit_predict(train, held_out))
        if probs.ndim != 2 or len(probs) != len(held_out) or np.isnan(probs).any():
            wanted = f"({len(held_out)}, labels) numbers: {probs.shape} or NaN"
            raise ValueError(f"fit_predict returned something else than {wanted}.")
        tables.append(pd.DataFrame(probs, held_out))
    table = pd.concat(tables, keys=range(n_folds)).sort_index(level=1)
    return OutOfFold(table.to_numpy(), table.index.get_level_values(0).to_numpy(), groups)


# ---------------------------------------------------------------- heads


def _positions(features, num_features):
    """Return the positions of a feature map (B, C, h, w) one after the other, (B, N, C)."""
    if features.ndim != 4 or features.shape[1] != num_features:
        expected = f"a head needs a map (B, {num_features}, h, w), see feature_map"
        raise ValueError(f"features {tuple(features.shape)}: {expected}.")
    return features.flatten(2).transpose(1, 2)


class CSRA(nn.Module):
    """Class-specific residual attention (Zhu & Wu, ICCV 2021, arXiv 2108.02456).

    With scores s = x·w / ‖w‖ at every position, a label's logit is mean(s) + λ Σ softmax(T s) s,
    summed over heads, each with weights and a temperature T of its own; T = 99 is the maximum.
    """

    TEMPERATURES = {1: [1], 2: [1, 99], 4: [1, 2, 4, 99]} | {n: [*range(1, n), 99] for n in (6, 8)}
    frozen_rate = 1e-2  # learning rate where the backbone rests

    def __init__(self, num_features: int, num_labels: int, heads: int = 1, lam: float = 0.1):
        super().__init__()
        check_choice("heads", heads, self.TEMPERATURES)
        if not 0 <= lam < float("inf"):
            raise ValueError(f"lam={lam}: the weight of the attention must be 0 or more.")
        self.lam = lam
        self.weight = nn.Parameter(torch.empty(heads, num_labels, num_features))
        nn.init.kaiming_uniform_(self.weight.flatten(0, 1), a=5**0.5)  # as a 1×1 convolution
        self.bias = nn.Parameter(torch.zeros(num_labels))
        temperatures = torch.tensor(self.TEMPERATURES[heads], dtype=torch.float).view(-1, 1, 1)
        self.register_buffer("temperatures", temperatures, persistent=False)
        self.register_load_state_dict_pre_hook(_stack_published_csra)

    def _scores(self, features):
        """Return scores and attention of each head and label at each position, (B, heads, L, N)."""
        positions = _positions(features, self.weight.shape[-1])
        scores = torch.einsum("bnc,hlc->bhln", positions, F.normalize(self.weight, dim=-1))
        attention = (self.temperatures * scores).softmax(-1)
        highest = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(attention.dtype)
        return scores, torch.where(self.temperatures == 99, highest, attention)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (B, L) of a feature map (B, C, h, w)."""
        scores, attention = self._scores(features)
        attended = (attention * scores).sum(-1)
        return (scores.mean(-1) + self.lam * attended).sum(1) + self.bias

    def attention(self, features: torch.Tensor) -> torch.Tensor:
        """Return the class-specific attention (B, L, N), the mean over heads; a row sums to 1."""
        return self._scores(features)[1].mean(1)


def _stack_published_csra(module, state, prefix, *_):
    """Turn the keys of the authors' code, one convolution per head, into this module's."""
    state.setdefault(f"{prefix}bias", torch.zeros_like(module.bias))
    keys = [f"{prefix}multi_head.{i}.head.weight" for i in range(len(module.weight))]
    if keys[0] in state:
        weights = [state.pop(key) for key in keys if key in state]  # too many or few: no fit, named
        state[f"{prefix}weight"] = torch.stack(weights).flatten(2)


class _DecoderLayer(nn.Module):
    """Cross-attention and feed-forward, post-norm; no self-attention among the queries."""

    def __init__(self, width: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.multihead_attn = nn.MultiheadAttention(width, 8, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)

    def forward(self, queries, memory, need_weights=False):
        """Return answers (B, K, D) and, if wanted, where they were found (B, K, N)."""
        # where self-attention would stand, the authors' code adds the queries to themselves
        x = self.norm1(queries + self.dropout(queries))
        attended, weights = self.multihead_attn(x, memory, memory, need_weights=need_weights)
        x = self.norm2(x + self.dropout(attended))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm3(x + self.dropout(self.linear2(hidden))), weights


class MLDecoder(nn.Module):
    """ML-Decoder (Ridnik et al., WACV 2023, arXiv 2111.12933); published weights load.

    K fixed queries look for labels in all positions by cross-attention; a group fully-connected
    layer turns each of the K answers, of the width D = decoder_embedding, into ⌈L/K⌉ logits.
    """

    frozen_rate = 1e-3

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        num_of_groups: int | None = None,  # K; None: one per label, at most 100
        decoder_embedding: int = 768,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        groups = min(100, num_labels) if num_of_groups is None else num_of_groups
        if not 1 <= groups <= num_labels:
            expected = f"expected 1 to {num_labels}, the number of labels, or None"
            raise ValueError(f"num_of_groups={num_of_groups}: {expected}.")
        if decoder_embedding < 8 or decoder_embedding % 8:
            raise ValueError(f"decoder_embedding={decoder_embedding}: expected a multiple of 8.")
        self.num_labels, self.labels_per_group = num_labels, -(-num_labels // groups)
        decoder = nn.Module()  # the names, one of them misspelt, are those of published weights
        decoder.embed_standart = nn.Linear(num_features, decoder_embedding)
        decoder.query_embed = nn.Embedding(groups, decoder_embedding).requires_grad_(False)
        decoder.layers = nn.ModuleList([_DecoderLayer(decoder_embedding, dim_feedforward, dropout)])
        pooling = torch.empty(groups, decoder_embedding, self.labels_per_group)
        decoder.duplicate_pooling = nn.Parameter(0.4 * nn.init.xavier_normal_(pooling))
        decoder.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_labels))
        self.decoder = decoder

    @property
    def bias(self) -> nn.Parameter:
        return self.decoder.duplicate_pooling_bias

    def _ask(self, features, need_weights=False):
        embed, queries = self.decoder.embed_standart, self.decoder.query_embed.weight
        memory = embed(_positions(features, embed.in_features)).relu()  # (B, N, D)
        queries = queries.to(memory.dtype).expand(len(memory), -1, -1)  # (B, K, D)
        return self.decoder.layers[0](queries, memory, need_weights)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (B, L) of a feature map (B, C, h, w)."""
        answers, _ = self._ask(features)
        logits = torch.einsum("bkd,kdj->bkj", answers, self.decoder.duplicate_pooling)
        return logits.flatten(1)[:, : self.num_labels] + self.decoder.duplicate_pooling_bias

    def attention(self, features: torch.Tensor) -> torch.Tensor:
        """Return the cross-attention of each label's query (B, L, N); a row sums to 1."""
        maps = self._ask(features, need_weights=True)[1]  # (B, K, N)
        return maps.repeat_interleave(self.labels_per_group, 1)[:, : self.num_labels]


# A head of your own: a class (num_features, num_labels, options that timm has not, e.g. no
# drop_rate) with forward, attention, bias (L,) and frozen_rate as in CSRA, and a name here.
# `Classifier.load` takes whole numbers up to 16384, or None, for its options (lam, dropout: any).
HEADS: dict[str, type[nn.Module] | None] = {"linear": None, "csra": CSRA, "mldecoder": MLDecoder}


# ---------------------------------------------------------------- model


def feature_map(model: nn.Module, features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return unpooled features of any timm model as a map (B, C, h, w).

    `size`, height and width of the images, says in which grid tokens (B, N, C) stand.
    """
    maps = features
    if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        maps = features.permute(0, 3, 1, 2)
    if features.ndim == 3:  # class tokens stand first; some models have one undeclared
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0, 1, 2):
            n = max(features.shape[1] - prefix, 0)
            height = round((n * size[0] / size[1]) ** 0.5)
            if n and height * round(height * size[1] / size[0]) == n:
                maps = features[:, prefix:].transpose(1, 2).unflatten(2, (height, -1))
                break
    if maps.ndim != 4 or maps.shape[2] * maps.shape[3] < 2:
        problem = "pooled features or tokens without a grid form no map of two or more positions"
        raise ValueError(f"features {tuple(features.shape)}: {problem}")
    return maps


class _HeadedModel(nn.Module):
    """A timm backbone that gives its feature map to a head of this file."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return feature_map(self.backbone, self.backbone(images), images.shape[2:])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.head


def build_model(
    name: str,
    num_labels: int,
    head: str = "linear",
    pretrained: bool | PathLike = True,
    img_size: int | Sequence[int] | None = None,
    head_bias: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm backbone with a new head that starts small: (B, 3, H, W) → logits (B, L).

    `.data_config` says how to prepare images, `.spec` how to build it again.

    Args:
        pretrained: True (Hugging Face hub), False (random weights) or a weight file; a JSON of the
            same name beside it may hold its "img_size" and "pretrained_window_sizes" (SwinV2).
        img_size: input height and width in pixels; None is the model's own.
        head_bias: the logits that the head starts from (L,), see `base_rate_logits`; None: zeros.
        **kwargs: options of `CSRA` or `MLDecoder` go to the head, all else to timm.
    """
    check_choice("head", head, HEADS)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f"timm has no model {name!r}; did you mean {brief(close) or 'another'}?")
    options = {key: [*inspect.signature(h).parameters][2:] for key, h in HEADS.items() if h}
    head_kwargs = {key: kwargs.pop(key) for key in [*kwargs] if key in options.get(head, ())}
    if foreign := kwargs.keys() & set(itertools.chain(*options.values())):
        raise ValueError(f"the {head} head has no option {brief(sorted(foreign))}.")
    stages = len(kwargs.get("depths", range(4)))
    note = _read_note(Path(pretrained), stages) if pretrained and pretrained is not True else {}
    if timm.models.model_entrypoint(name).__module__.endswith("swin_transformer_v2"):
        windows = ("pretrained_window_sizes",)  # SwinV2 measures positions in shares of them
        kwargs = {key: note[key] for key in windows if key in note} | kwargs
    size = timm.layers.to_2tuple(img_size) if img_size else None
    try:
        model = _create_model(name, size, dict(kwargs, num_classes=num_labels))
    except (AssertionError, LookupError, RuntimeError, TypeError, ZeroDivisionError) as error:
        said = f"timm cannot build {name} with {kwargs} ({type(error).__name__}: {error})"
        raise ValueError(f"{said}.") from None
    bias = torch.zeros(num_labels) if head_bias is None else head_bias
    _start_head(model, bias)
    if pretrained:
        model.pretrained_model_args = note  # "img_size": timm takes positions for square without
        _load_weights(model, name, pretrained, num_labels)
    config = resolve_model_data_config(model)
    config["input_size"] = (3, *size) if size else config["input_size"]
    if head != "linear":
        num_features = _unpool(model, config["input_size"], head)
        model = _HeadedModel(model, HEADS[head](num_features, num_labels, **head_kwargs))
        _start_head(model, bias)
    model.data_config = {k: config[k] for k in ("input_size", "mean", "std", "interpolation")}
    model.spec = {"model_name": name, "head": head, "head_kwargs": head_kwargs}
    model.spec |= {"num_labels": num_labels, "img_size": list(config["input_size"][1:])}
    model.spec["model_kwargs"] = kwargs
    return model


def _unpool(model, input_size, head):
    """Take the pooling and the classifier from a timm model and return its channels."""
    try:
        model.reset_classifier(0, "")
        with torch.no_grad():
            features = model.eval()(torch.zeros(1, *input_size))
        model.train()
        return feature_map(model, features, input_size[1:]).shape[1]
    except Exception as error:  # whatever a model does that cannot go without its pooling
        problem = f"{type(model).__name__} gives no feature map for head={head!r}"
        raise ValueError(f"{problem} ({type(error).__name__}: {error}).") from None


def _build(name, size, kwargs):
    """Return timm's model, or None if it would not fill `size` with whole patches or windows."""
    try:
        model = timm.create_model(name, img_size=size, **kwargs)  # None: the model's own
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **kwargs)  # convolutional: takes any size
    except (AssertionError, RuntimeError, ZeroDivisionError):
        if size is None:
            raise
        return None
    usual = getattr(model, "pretrained_cfg", {}).get("input_size", ())[1:]  # LeViT: 224 px, 7 / 2
    as_published = size == usual and not kwargs.keys() & {"patch_size", "window_size"}
    whole = not as_published and getattr(model, "feature_info", None)
    pairs = [(size, whole[-1]["reduction"])] if whole else []
    for block in model.modules():
        if hasattr(block, "window_size") and hasattr(block, "input_resolution"):
            pairs.append((block.input_resolution, block.window_size))
    pairs = [(sides, timm.layers.to_2tuple(parts)) for sides, parts in pairs if size]
    return None if any(s % p for sides, parts in pairs for s, p in zip(sides, parts)) else model


def _create_model(name, size, kwargs):
    if size and (len(size) != 2 or not all(type(s) is int and 0 < s <= 8192 for s in size)):
        raise ValueError(f"img_size={size}: expected a positive height and width, at most 8192 px.")
    model = _build(name, size, kwargs)
    if model is not None:
        return model
    nearest = []
    for side in size:
        ranges = range(side // 8 * 8, 7, -8), range(-(-side // 8) * 8, 2 * side + 512, 8)
        with torch.device("meta"):
            fitting = [next((s for s in r if _build(name, (s, s), kwargs)), 0) for r in ranges]
            if not any(fitting):
                _build(name, None, kwargs)  # the options may be at fault, which it says
        nearest.append(" or ".join(str(s) for s in sorted({*fitting} - {0})) or "none")
    raise ValueError(
        f"{name} cannot take {size[0]} × {size[1]} px (height × width): its patches or windows do"
        f" not divide it; the nearest sizes are {' × '.join(nearest)}, or pass another window_size."
    )


def _classifier(model: nn.Module) -> nn.Module:
    """Return what gives the logits as one module; distilled models have two, a bare one none."""
    head = getattr(model, "get_classifier", nn.Identity)()
    return nn.ModuleList(head) if isinstance(head, tuple) else head


def _last_layers(model):
    """Return the layers that give the logits of a model with a linear head; distilled have two."""
    layers = [m for m in _classifier(model).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [layer for layer in layers if len(layer.weight) == model.num_classes]


@torch.no_grad()
def _start_head(model, bias):
    """Make the first logits nearly `bias`: large ones would tear up the pretrained features."""
    bias = torch.as_tensor(bias, dtype=torch.float32)
    if isinstance(model, _HeadedModel):
        model.head.bias.copy_(bias)
        return
    for layer in _last_layers(model):  # timm's start of EfficientNet is 16 times as large
        nn.init.trunc_normal_(layer.weight, std=0.3 / layer.weight[0].numel() ** 0.5)
        if layer.bias is not None:
            layer.bias.copy_(bias)


def base_rate_logits(targets: Array, exclusive: bool = False, num_classes: int = 0) -> Array:
    """Return the logit (`exclusive`: log, for a softmax) of each label's rate in known cells, (L,).

    A head that starts there has no loss to lose by learning the rates. Of class numbers (N,)
    `num_classes` says how many there are.
    """
    if targets.ndim == 1:
        exclusive, judged = True, targets[targets >= 0]
        counts, known = np.bincount(judged, minlength=num_classes), max(len(judged), 1)
    else:
        counts, known = np.nansum(targets, 0), (~np.isnan(targets)).sum(0).clip(1)
    rates = counts / known
    rates = rates.clip(0.5 / known, 1 - 0.5 / known)  # half a photo more than none, less than all
    return np.log(rates) if exclusive else np.log(rates / (1 - rates))


def _load_weights(model, name, source, num_labels):
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if source is not True:
        return _load_file(model, name, Path(source), rename)
    try:
        timm.models.load_pretrained(model, num_classes=num_labels, filter_fn=rename)
    except Exception as error:
        raise RuntimeError(
            f"the pretrained weights of {name} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {str(error)[:200]}). Check the connection, give a local "
            "weight file as PRETRAINED, or set PRETRAINED = False."
        ) from error


def _read_note(weights, stages):
    """Return the JSON that pretraining.ipynb writes beside its weights, if there is one."""
    note = weights.with_suffix(".json")
    try:
        content = _read_object(note) if note.is_file() else {}
        windows = content.get("pretrained_window_sizes", [0] * stages)
        pairs = [timm.layers.to_2tuple(window) for window in windows]
        is_size = [len(p) == 2 and all(type(n) is int and 0 <= n <= 8192 for n in p) for p in pairs]
        if len(pairs) < stages or not all(is_size):
            raise ValueError(f"pretrained_window_sizes: expected {stages} sizes in patches")
        return content
    except (TypeError, ValueError) as error:
        raise ValueError(f"{note}: no JSON of pretraining.ipynb ({error}).") from None


def _load_file(model, name, path, rename):
    """Load all weights but the classifier's; timm alone would silently keep missing ones random."""
    if not path.is_file() or path.suffix in (".npz", ".npy"):
        raise ValueError(f"{path}: no such weight file; give a state dict or PRETRAINED = False.")
    expected = model.state_dict()
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        with contextlib.suppress(KeyError):  # weights of another architecture: named below
            state = rename(state, model) if rename else state
        kinds = {k: (v.shape, v.is_floating_point()) for k, v in expected.items()}
        given = {k: (v.shape, v.is_floating_point()) for k, v in state.items() if k in expected}
        state = {k: state[k] for k in given if given[k] == kinds[k]}
        missing = model.load_state_dict(state, strict=False).missing_keys
    except Exception as error:
        problem = f"not a state dict that is safe to load ({first_line(error)})"
        raise ValueError(f"{path}: {problem}.") from None
    new = tuple(f"{n}." for n, m in model.named_modules() if m in _last_layers(model))
    if lost := [k for k in missing if not k.startswith(new)]:
        count = f"{len(lost)} of {len(expected)}"
        raise ValueError(f"{path}: lacks {count} weights of {name} in its shape: {brief(lost)}.")


def gains_by_channels_last(model: nn.Module) -> bool:
    """Say whether convolutions do the work; patch-embedding models gain nothing."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 8


def _memory_format(model: nn.Module, wanted: bool | None = None) -> torch.memory_format:
    last = gains_by_channels_last(model) if wanted is None else wanted
    return torch.channels_last if last else torch.contiguous_format


def _autocast(model: nn.Module, device: str, precision: str = "") -> torch.autocast:
    precision = precision or fast_precision(model, device, training=False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast(device, dtype, enabled=precision != "no")


def extract_features(
    model: nn.Module,
    part: DataPartition,
    config: "TrainConfig | None" = None,  # its batch_size, num_workers and cache_dir
    pooled: bool = False,
    n_jobs: int = 1,
    chunk: int = 1000,
) -> torch.Tensor:
    """Return the feature map of every image, (N, C, h, w); a head learns from it in seconds.

    `pooled` is what the last layer of a linear head sees, (N, C). The cache keeps them for the same
    photos (name, size, time), weights and preparation. With `n_jobs` other than 1, joblib's
    backend, e.g. dask, takes them by the `chunk`, each with a file of its own in the cache.
    """
    if n_jobs != 1:
        pieces = [part.rows(slice(i, i + chunk)) for i in range(0, len(part), chunk)]
        jobs = (joblib.delayed(extract_features)(model, p, config, pooled) for p in pieces)
        return torch.cat(joblib.Parallel(n_jobs)(jobs))
    if pooled and isinstance(model, _HeadedModel):
        raise ValueError("pooled=True takes a model with a linear head; the others do not pool.")
    config, cached = config or TrainConfig(), None
    if config.cache_dir:
        cached = Path(config.cache_dir) / f"{_features_key(model, part, pooled)}.npy"
        stored = _read_cached(cached, np.float32, 2 if pooled else 4)
        if stored is not None and len(stored) == len(part):
            return torch.from_numpy(stored)
    device, layout = next(model.parameters()).device, _memory_format(model)
    model.to(memory_format=layout).eval()
    batches, loader = [], make_loader(part, config.batch_size, num_workers=config.num_workers)
    # not inference_mode: a head could not be trained on its tensors
    with torch.no_grad(), _autocast(model, device.type), contextlib.ExitStack() as hooks:
        for layer in _last_layers(model) if pooled else ():  # returns what it sees, not logits
            hooks.enter_context(layer.register_forward_hook(lambda _, seen, __: seen[0].flatten(1)))
        for images, _ in tqdm(loader, desc="features", leave=False, delay=2):
            features = model.forward_features(images.to(device).contiguous(memory_format=layout))
            if pooled:
                features = model.forward_head(features)
            elif not isinstance(model, _HeadedModel):
                features = feature_map(model, features, images.shape[2:])
            batches.append(features.float().cpu())
    features = torch.cat(batches)
    if cached:
        with replacing(cached, each_process=True) as temporary, open(temporary, "wb") as file:
            np.save(file, features.contiguous().numpy(), allow_pickle=False)
        trim_cache(config.cache_dir, config.cache_gb)
    return features


def store_features(model: nn.Module, part: DataPartition, config: "TrainConfig") -> FeatureSet:
    """Return the feature maps of a part as a data set for heads, see `extract_features`."""
    return FeatureSet(extract_features(model, part, config), part.targets, part.label_columns)


def _features_key(model, dataset, pooled):
    """Return a name that changes with the photos, the backbone's weights or the preparation."""
    files = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in dataset.paths]
    heads = [model.head] if isinstance(model, _HeadedModel) else _last_layers(model)
    in_head = {id(tensor) for head in heads for tensor in (*head.parameters(), *head.buffers())}
    weights = model.state_dict(keep_vars=True).values()  # flat: strides are part of the hash
    backbone = [w.detach().cpu().reshape(-1).numpy() for w in weights if id(w) not in in_head]
    architecture = type(model).__name__, model.spec["model_kwargs"]  # e.g. another pooling
    return joblib.hash((files, str(dataset.transform), pooled, backbone, architecture))


# ---------------------------------------------------------------- probe


def _fit_logistic(x, y, strength, exclusive, num_labels):
    """Return weights (C + 1, L), the optimum of sklearn's LogisticRegression(C=strength)."""

    def penalised(weights):
        loss = _log_loss(x @ weights[:-1] + weights[-1], y, exclusive)
        return (loss + weights[:-1].square().sum() / (2 * strength)) / len(x)

    return _minimize(penalised, x.new_zeros(x.shape[1] + 1, num_labels))


def _minimize(convex, weights, **options):
    """Return the weights at which a convex function of them is lowest."""
    options = {"max_iter": 200, "line_search_fn": "strong_wolfe"} | options
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], **options)

    def closure():
        optimizer.zero_grad()
        loss = convex(weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _folds(groups, most=5, seed=42):
    """Return rows to learn from and rows of other groups to judge by, `most` times if it can be."""
    if (n_folds := min(most, len(set(groups)))) < 2:
        return []
    return [*GroupKFold(n_folds, shuffle=True, random_state=seed).split(groups, groups=groups)]


def _log_loss(logits, y, exclusive):
    """Return the sum of the log losses over the known cells, or over the judged images."""
    if y.ndim == 1:
        return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
    known, y = ~y.isnan(), y.nan_to_num(0.0)
    if exclusive:
        return (F.cross_entropy(logits, y, reduction="none") * known.all(1)).sum()
    return F.binary_cross_entropy_with_logits(logits, y, known.to(y.dtype), reduction="sum")


def fit_probe(
    features: torch.Tensor,
    targets: Array,
    groups: Groups = None,
    exclusive: bool = False,
    strengths: Sequence[float] = PROBE_STRENGTHS,
    num_classes: int = 0,
) -> tuple[nn.Linear, pd.Series]:
    """Fit one logistic regression per label (`exclusive`: one softmax) on features (N, C).

    Targets are (N, L), or (N,) class numbers, of which `num_classes` says how many there are.

    Returns the layer, features (B, C) → logits (B, L), and the log loss of each strength on groups
    left out in turn, by which one strength for all labels is chosen. A single one is not judged.
    """
    groups = np.arange(len(targets)) if groups is None else np.asarray(groups)
    by_number = np.ndim(targets) == 1
    y = torch.as_tensor(np.asarray(targets), dtype=torch.int64 if by_number else torch.float32)
    kind = exclusive, num_classes if by_number else y.shape[1]
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    x, losses, folds = (features - mean) / std, [], _folds(groups) if len(strengths) > 1 else []
    judged = (y >= 0).all(1) if exclusive and not by_number else y >= 0
    for strength in strengths:
        total = 0.0
        for train, held_out in folds:
            weights = _fit_logistic(x[train], y[train], strength, *kind)
            logits = x[held_out] @ weights[:-1] + weights[-1]
            total += _log_loss(logits, y[held_out], exclusive).item()
        losses.append(total / max(int(judged.sum()), 1))
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break  # it only overfits more from here
    table = pd.Series(losses, strengths[: len(losses)], name="log loss")
    weights = _fit_logistic(x, y, table.idxmin(), *kind)  # without folds: the first strength
    layer = nn.Linear(features.shape[1], weights.shape[1])
    with torch.no_grad():
        layer.weight.copy_((weights[:-1] / std[:, None]).T)
        layer.bias.copy_(weights[-1] - layer.weight @ mean)
    return layer, table.rename_axis("strength")


@torch.no_grad()
def use_probe(model: nn.Module, probe: nn.Linear) -> None:
    """Make the last layer of a model with a linear head the probe's."""
    for layer in _last_layers(model):
        layer.weight.copy_(probe.weight.view_as(layer.weight))
        layer.bias.copy_(probe.bias)


def _label_maps(model: nn.Module, images: torch.Tensor, label: int) -> torch.Tensor:
    """Return a label's attention (B, h, w), for a linear head its map of arXiv 1512.04150."""
    features = model.forward_features(images)
    if isinstance(model, _HeadedModel):
        return model.head.attention(features)[:, label].unflatten(1, features.shape[2:]).float()
    maps = feature_map(model, features, images.shape[2:])
    alone = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C): each position as an image
    if features.ndim == 3:  # in the place of the class tokens, too
        n_tokens = 1 + features.shape[1] - maps[0, 0].numel()
        alone = alone[:, None].expand(-1, n_tokens, -1)
    else:
        alone = alone[:, :, None, None] if maps is features else alone[:, None, None]
    return model.forward_head(alone)[:, label].view(len(maps), *maps.shape[2:]).float()


# ---------------------------------------------------------------- precision


def _fastest_device() -> str:
    if "LOCAL_RANK" in os.environ:  # `accelerate launch`: "cuda" becomes the GPU of this process
        return this_process().device.type
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return next((name for name, is_there in available.items() if is_there), "cpu")


def fast_precision(model: nn.Module, device: str | None = None, training: bool = True) -> str:
    """Return accelerate's name of the precision in which a device trains or uses `model` fastest.

    A rule of thumb, alike on all machines of a kind; `time_steps` measures.
    """
    device = device or _fastest_device()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    depth_wise = any(m.groups == m.in_channels > 1 for m in layers)
    slower = depth_wise and gains_by_channels_last(model)  # some of MobileNet, EfficientNet
    slower &= training or not torch.cpu.get_capabilities().get("amx_bf16")  # docs/results.md
    return "no" if slower and device == "cpu" else _half_precision(device)


def _half_precision(device: str) -> str:
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = torch.cpu.get_capabilities()
    units = any(cpu.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    # torch's attention in bf16 fails where its kernels may not use AVX-512
    held_back = os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2")
    return "bf16" if units and device == "cpu" and not held_back else "no"


def time_steps(
    model: nn.Module, images: torch.Tensor, layouts: Sequence[bool] = (False, True)
) -> dict[tuple[str, bool], float]:
    """Return the seconds of a training step by (precision, channels_last), the fastest first.

    All of it takes a second or two, and spoils gradients and running statistics.
    """
    seconds = {}
    for precision in dict.fromkeys(("no", _half_precision(images.device.type))):
        for is_last in layouts:
            layout, times = torch.channels_last if is_last else torch.contiguous_format, []
            network, batch = model.to(memory_format=layout), images.contiguous(memory_format=layout)
            dtype = torch.float16 if precision == "fp16" else torch.bfloat16
            while len(times) < 2 or (len(times) < 5 and sum(times) < 1):
                start = time.perf_counter()
                with torch.autocast(images.device.type, dtype, enabled=precision != "no"):
                    loss = network.train()(batch).float().square().mean()
                loss.backward()
                grads = [p.grad for p in network.parameters() if p.grad is not None]
                grads[0].sum().item()  # waits for a GPU, whose first layer is the last to be done
                times.append(time.perf_counter() - start)
            seconds[precision, is_last] = min(times)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


# ---------------------------------------------------------------- loss


class MaskedLoss(nn.Module):
    """A loss of timm by name, or "ce" (one class an image): the mean over known (not NaN) cells.

    "ce" takes class numbers (B,), -1 for unknown, or shares (B, C). For "ce" and "zlpr" it is over
    images with known cells. "zlpr" and "twoway" compare labels: an unknown cell is a negative with
    logit -1e4, whose share is zero. To "db" it is present by the label's rate in `targets`, those
    of the training part. "auto" is "ce" for (N,) and "bce" for (N, L). `kwargs`: asl_gamma_neg, …
    """

    def __init__(
        self,
        name: str,
        targets: np.ndarray,
        class_weights: str | None = None,
        soft: bool = False,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        name = _resolve_loss(name, targets.ndim == 1)
        if name == "ce" and (class_weights is not None or kwargs):
            raise ValueError(f"loss='ce' takes no {brief(kwargs or ['class_weights'])}.")
        if name != "ce" and label_smoothing:
            raise ValueError("label_smoothing goes with loss='ce', one class an image.")
        if kwargs.get("bce_sum"):
            raise ValueError("bce_sum sums unknown cells too; leave it out.")
        self.name, n = name, len(targets)
        # One sample count for all labels, as timm expects: each label's rate scaled to N images.
        known = np.maximum((~np.isnan(targets)).sum(0), 1)
        counts = np.nansum(targets, axis=0) / known * n * (name != "ce")
        if class_weights is not None:
            kind, weights = compute_class_weights(counts, n, class_weights)
            kwargs[kind] = weights
        if name == "db":
            kwargs |= {"class_counts": counts, "num_samples": n}
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing, ignore_index=-1)
        if name != "ce":
            kwargs |= {"multi_label": True, "soft_targets": soft}
            self.loss = create_classification_loss(name, **kwargs)
        if name not in ("zlpr", "twoway"):
            self.loss.reduction = "none"
        prior = torch.as_tensor(counts / n * (name == "db"), dtype=torch.float)
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        known, logits = targets >= 0, logits.float()  # neither NaN nor -1
        if targets.ndim == 2:
            targets = torch.where(known, targets, self.prior.to(targets.dtype))
        if self.name in ("zlpr", "twoway"):
            loss = self.loss(logits.masked_fill(~known, -1e4), targets)
            n_judged = known.any(1).sum().clamp(min=1)
            return loss * len(known) / n_judged if self.name == "zlpr" else loss
        counted = known.view(len(known), -1).all(1) if self.name == "ce" else known  # as the losses
        return (self.loss(logits, targets) * counted).sum() / counted.sum().clamp(min=1)


def _resolve_loss(loss: str, exclusive: bool) -> str:
    """Return "ce" for classes and "bce" for labels in place of "auto"; refuse the wrong one."""
    if exclusive and loss not in ("auto", "ce"):
        problem = "is for labels that may come together, and this partition has one class a photo"
        raise ValueError(f"loss={loss!r}: {problem}; leave it out, or set 'ce'.")
    return loss if loss != "auto" else "ce" if exclusive else "bce"


def _check_exclusive(part: DataPartition, name: str) -> None:
    """Refuse targets that are no shares of one class an image; unjudged images may be there."""
    if part.exclusive:
        return
    shares = part.targets.sum(1)  # NaN where a cell is unknown
    wrong = ~np.isnan(part.targets).all(1) & ~(np.abs(shares - 1) <= 1e-3)
    if wrong.any():
        first = getattr(part, "paths", np.arange(len(part)))[int(wrong.argmax())]
        problem = f"{wrong.sum()} {name} images have not exactly one class (the first: {first})"
        raise ValueError(f"loss='ce': {problem}; use 'bce' where several labels may be present.")


def _mean_of_views(model: nn.Module, images: torch.Tensor, flip: bool, rolls: int) -> torch.Tensor:
    """Return the mean logits of images in `rolls` even turns, with `flip` each mirrored as well."""
    width = images.shape[-1]
    views = [images, *(images.roll(turn * width // rolls, -1) for turn in range(1, rolls))]
    views += [view.flip(-1) for view in views if flip]
    return sum(model(view) for view in views) / len(views)


def to_probs(logits: torch.Tensor, exclusive: bool) -> np.ndarray:
    """Return probabilities of the same shape, of labels each on its own or of exclusive classes."""
    logits = logits.float()
    return (logits.softmax(-1) if exclusive else logits.sigmoid()).cpu().numpy()


# ---------------------------------------------------------------- settings


# Measured in docs/results.md: at least `steps` steps and `min_epochs` epochs, 40 at most.
PRETRAINED_RECIPE: dict[str, Any] = {"steps": 100, "min_epochs": 5, "batch_size": 32}
PRETRAINED_RECIPE |= {"learning_rate": 2e-3, "weight_decay": 0.05, "layer_decay": 0.8}
PRETRAINED_RECIPE |= {"frozen_below": 0.2, "warmup_epochs": 1, "ema_decay": 0.98, "min_crop": 0.4}
PRETRAINED_RECIPE |= {"batch_norm": "frozen", "start": "probe", "flip_test": True}
PRETRAINED_RECIPE |= {"precision": "measure", "test_scale": None}
PRETRAINED_RECIPE |= {"patience": 40}  # to the end: the best epochs are the last, at a low rate
SCRATCH_RECIPE: dict[str, Any] = {"steps": 840, "min_epochs": 20, "batch_size": 16, "patience": 15}
SCRATCH_RECIPE |= {"learning_rate": 1e-3, "weight_decay": 0.2, "warmup_epochs": 3, "min_crop": 0.95}

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_KINDS |= {dict: "a dict", list: "a list", type(None): "None"}
_RANGES: dict[str, Callable[[Any], bool]] = {
    "a whole number from 1": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "more than 0": lambda value: value > 0,
    "more than 0 and at most 1": lambda value: 0 < value <= 1,
    "0 to below 1": lambda value: 0 <= value < 1,
    "a name": bool,
    "a dict without label_smoothing": lambda value: "label_smoothing" not in value,
}
_FROM_1, _FROM_0, _ABOVE_0, _SHARE, _BELOW_1, _NAME, _NO_SMOOTHING = _RANGES


def _option(default: Any, meaning: str, values: str | Sequence[str] = "") -> Any:
    """Return a dataclass field; `values` are one of `_RANGES`, or all that there are."""
    start = {"default_factory": default} if default in (dict, list) else {"default": default}
    return field(**start, metadata={"help": meaning, "values": values}, compare=default is not list)


def _check_options(names: Iterable[str], known: Sequence[str] = ()) -> None:
    """Refuse a name that does not exist, with the nearest one that does."""
    known = known or list(TrainConfig.__dataclass_fields__)
    for name in sorted(set(names) - set(known)):
        nearest = difflib.get_close_matches(name.lower(), known, 1, 0)[0]
        expected = f"expected some of {brief(known)}"
        raise ValueError(f"no option {name}; {expected}; did you mean {nearest}?")


@dataclass
class TrainConfig:
    """A run's config.json; a step sees batch_size × grad_accum_steps × processes photos."""

    # How to learn: what tuning.ipynb may search.
    epochs: int = _option(30, "how often every training photo is seen", _FROM_1)
    batch_size: int = _option(32, "photos per step, in each process", _FROM_1)
    learning_rate: float = _option(5e-4, "the highest one of the schedule", _ABOVE_0)
    head_learning_rate: float | None = _option(None, "of the head; None: the same", _ABOVE_0)
    weight_decay: float = _option(0.05, "how strongly AdamW pulls weights to 0", _FROM_0)
    layer_decay: float | None = _option(None, "rate × this for each layer below the head", _SHARE)
    warmup_epochs: float = _option(2, "in these the rate rises from 0", _FROM_0)
    grad_accum_steps: int = _option(1, "batches per step, where memory is short", _FROM_1)
    clip_grad: float | None = _option(1.0, "longest gradient; None: any length", _ABOVE_0)
    ema_decay: float | None = _option(None, "of a moving average of the weights, e.g. 0.98", _SHARE)
    mixup_alpha: float = _option(0.0, "blends pairs of photos (MixUp); try 0.2", _FROM_0)
    cutmix_alpha: float = _option(0.0, "pastes a box of another photo (CutMix)", _FROM_0)
    loss: str = _option(
        "auto", "auto: ce for classes, bce for labels; asl, zlpr, twoway, db", _NAME
    )
    loss_kwargs: dict = _option(dict, "options of timm's loss, e.g. asl_gamma_neg", _NO_SMOOTHING)
    label_smoothing: float = _option(0.0, "share spread over all classes (ce)", _BELOW_1)
    class_weights: str | None = _option(None, "for bce, asl: neg_pos, inv_freq, effective_num")
    schedule: str = _option("cosine", "how the rate falls: see SCHEDULES", SCHEDULES)
    frozen_below: float = _option(0.0, "layer_decay: layers of less rate stay frozen", _BELOW_1)
    start: str = _option("small", "of the head; probe: fitted before epoch 1", ("small", "probe"))
    batch_norm: str = _option("trained", "statistics of batch norm", ("trained", "frozen"))
    grad_checkpointing: bool = _option(False, "half the memory for a third more time")
    min_crop: float = _option(0.8, "the least share of a photo that a crop keeps", _SHARE)
    test_scale: float | None = _option(1.0, "size in use: × img_width; None: 1 or 9/7", _ABOVE_0)
    rand_augment: str | None = _option(None, "e.g. rand-m6-n2, in place of colour jitter")
    drop_rate: float = _option(0.0, "dropout before the head", _BELOW_1)
    flip_test: bool = _option(False, "answer for a photo and its mirror image together")
    rolls: int = _option(1, "answer for so many turns of a panorama, up to 64", _FROM_1)
    head: str = _option("linear", "linear, csra or mldecoder")
    # What is trained from what, where.
    head_kwargs: dict = _option(dict, "options of the head, e.g. lam of csra")
    partition_dir: str = _option("", "the CSVs of partitioning.ipynb")
    view: str = _option("half", "what a photo shows: half or panorama", VIEWS)
    labels: list = _option(list, "order of the labels; empty: as in the CSVs")  # not compared
    model_name: str = _option("", "any timm model")
    model_kwargs: dict = _option(dict, "options of the timm model, e.g. drop_path_rate")
    pretrained: bool | str = _option(False, "True (hub), or the path of a state dict")
    img_width: int = _option(0, "pixels; the height is the same, or half (panorama)", _FROM_0)
    cache_dir: str | None = _option(None, "folder that keeps shrunk photos, and features")
    cache_gb: float = _option(50.0, "most that cache_dir holds; the oldest go", _ABOVE_0)
    patience: int = _option(10, "ends after so many epochs without a better one", _FROM_1)
    seed: int = _option(42, "where all random numbers start")
    num_workers: int = _option(0, "processes that read photos; 0: none beside this", _FROM_0)
    precision: str = _option("auto", "auto: by a rule; measure: the fastest here", PRECISIONS)
    channels_last: bool | None = _option(None, "memory layout; None: by a rule or measured")
    compile: bool = _option(False, "torch.compile: pays in long trainings")

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value, values = option.name, getattr(self, option.name), option.metadata["values"]
            if isinstance(values, tuple):
                check_choice(name, value, values)
            kinds = get_args(option.type) or (option.type,)
            accepted = (*kinds, int) if float in kinds else kinds
            fits = isinstance(value, accepted) and (bool in kinds or not isinstance(value, bool))
            if not fits or (value is not None and values in _RANGES and not _RANGES[values](value)):
                expected = values or " or ".join(_KINDS[kind] for kind in kinds)
                raise ValueError(f"{name}={value!r}: expected {expected}.")
            if dict in kinds:  # tuples become lists, as in config.json
                setattr(self, name, json.loads(json.dumps(value)))
        if self.rolls > 1 and self.view == "half":
            raise ValueError(f"rolls={self.rolls}: only panoramas turn; a turned half has a seam.")

    @classmethod
    def recipe(cls, pretrained: bool | str, n_images: int, **changes: Any) -> "TrainConfig":
        """Return the settings that were measured best, with the `changes` that are not None.

        Weights of pretraining.ipynb, whose features no label has formed, are fine-tuned like random
        ones; the JSON beside them says so.
        """
        _check_options(changes)
        given = {name: value for name, value in changes.items() if value is not None}
        is_path = isinstance(pretrained, str) and pretrained
        note = _read_note(Path(pretrained), 0) if is_path else {}
        has_features = pretrained and note.get("recipe") != "scratch"
        settings = PRETRAINED_RECIPE if has_features else SCRATCH_RECIPE
        settings = dict(settings, pretrained=pretrained)
        steps, least = settings.pop("steps"), settings.pop("min_epochs")
        config = cls(**settings | given)
        epochs = round(steps * config.batch_size * config.grad_accum_steps / max(n_images, 1))
        return config if "epochs" in given else replace(config, epochs=min(max(epochs, least), 40))

    @classmethod
    def read(cls, path: PathLike, **changes: Any) -> "TrainConfig":
        """Return the settings of a config.json, with `changes`."""
        _check_options(changes)
        path = _need_file(path, "run training.ipynb to make it")
        try:
            saved = _read_object(path)
            _check_options(saved)
            saved = asdict(cls(**saved))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: no config.json of a training ({error}).") from None
        return cls(**saved | changes)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.img_width // (2 if self.view == "panorama" else 1), self.img_width


_FREE = {"patience", "num_workers", "compile", "cache_dir", "cache_gb", "flip_test", "rolls"}
TUNABLE = [*itertools.takewhile("head_kwargs".__ne__, TrainConfig.__dataclass_fields__)]


# ---------------------------------------------------------------- training


def build_run(
    config: TrainConfig, head: str | None = None, names: Sequence[str] = PARTS, **head_kwargs: Any
) -> tuple[nn.Module, dict[str, DataPartition]]:
    """Return the model, its head at the base rates, and its data sets by their `names`.

    "plain" has the photos of "train" without augmentation. A `head` replaces the configuration's.
    """
    parts, labels = load_parts(config.partition_dir, names)
    if config.labels and config.labels != labels:
        raise ValueError(f"{config.partition_dir}: other labels than the run's; restore them.")
    head_kwargs = head_kwargs if head else config.head_kwargs | head_kwargs
    rates = base_rate_logits(read_targets(parts["train"], labels), config.loss == "ce", len(labels))
    set_seed(config.seed)
    options = {"drop_rate": config.drop_rate, **config.model_kwargs, **head_kwargs}
    options |= {"head": head or config.head, "pretrained": config.pretrained, "head_bias": rates}
    model = build_model(config.model_name, len(labels), img_size=config.img_size, **options)
    _set_test_scale(model, config, config.test_scale or 1)
    shared = labels, make_transforms(model, False, config.view), config.cache_dir, config.cache_gb
    tables = parts | {"plain": parts["train"]}
    sets = {name: DataPartition(table, *shared) for name, table in tables.items()}
    crops = {"crop_scale": (config.min_crop, 1.0), "rand_augment": config.rand_augment}
    sets["train"].transform = make_transforms(model, True, config.view, **crops)
    return model, sets


def _set_test_scale(model: nn.Module, config: TrainConfig, scale: float) -> bool:
    """Let a model that takes any size be used on photos of `scale` × the size in training."""
    timms = getattr(getattr(model, "backbone", model), "pretrained_cfg", {})
    if scale == 1 or timms.get("fixed_input_size", True) or "test_input_size" in model.data_config:
        return False
    larger = (max(round(side * scale / 32), 1) * 32 for side in config.img_size)
    model.data_config["test_input_size"] = [3, *larger]  # timm's own name for it
    return True


def choose_test_size(trainer: "Trainer", *others: DataPartition) -> tuple[Array, pd.Series | None]:
    """Return probabilities on validation, of photos 9/7 as large as in training if that is better.

    A crop shows things larger than a whole photo does (arXiv 1906.06423). The larger size, which
    the `others` then get as well, must gain more than its standard error: see the line of
    `compare_scores` that is returned. It is None where `test_scale` says the size, or the network.
    """
    config, val, model = trainer.config, trainer.val_set, trainer.plain
    views = {"flip": config.flip_test, "rolls": config.rolls}
    probs = trainer.predict(val, **views)
    if config.test_scale is not None or not _set_test_scale(model, config, 9 / 7):
        return probs, None
    larger = copy.copy(val)
    larger.transform = make_transforms(model, False, config.view)
    larger_probs = trainer.predict(larger, **views)
    compared = val.targets, larger_probs, probs, val.label_columns, val.groups
    versus = compare_scores(*compared, seed=config.seed).iloc[-1]  # mAP, or top-1
    if versus["difference"] <= (versus["high"] - versus["low"]) / 3.92:  # 95 %: 2 × 1.96
        del model.data_config["test_input_size"]
        return probs, versus
    for part in (val, *others):
        part.transform = larger.transform
    return larger_probs, versus


def start_from_probe(model: nn.Module, parts: dict, config: TrainConfig) -> float:
    """Let the head learn "plain" of `parts` on the frozen backbone; return its mAP on "val".

    A linear head becomes a probe, another has 20 epochs on feature maps of 4 000 photos at most.
    """
    train, val = parts["plain"], parts["val"]
    if model.spec["head"] == "linear":
        x, x_val = (extract_features(model, part, config, pooled=True) for part in (train, val))
        exclusive, num_classes = config.loss == "ce", len(train.label_columns)
        probe, _ = fit_probe(x, train.targets, train.groups, exclusive, num_classes=num_classes)
        use_probe(model, probe)
        probs = to_probs(probe(x_val).detach(), exclusive)
        return mean_average_precision(val.targets, probs)
    rows = np.sort(np.random.default_rng(config.seed).permutation(len(train))[:4000])
    sets = [store_features(model, part, config) for part in (train.rows(rows), val)]
    shared = ("batch_size", "loss", "loss_kwargs", "class_weights", "seed", "precision")
    settings = {key: getattr(config, key) for key in shared} | {"epochs": 20, "warmup_epochs": 1}
    settings["learning_rate"] = model.get_classifier().frozen_rate
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model.get_classifier(), *sets, TrainConfig(**settings), folder)
        return trainer.fit_whole()["val_mAP"].max()


def read_state(path: Path, fix: str = "call fit() to start again") -> dict[str, Any]:
    """Return the JSON object that says how far something is; `fix` ends the error's sentence."""
    try:
        return _read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}); {fix}.") from None


@contextlib.contextmanager
def alone_in(folder: Path, wanted: bool, what: str = "training", name: str = "RUN_DIR") -> Iterator:
    """Refuse a second writer of a run; the system takes the lock from a process that was killed."""
    with contextlib.ExitStack() as held:
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if wanted:
                    held.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            fix = f"let it end or stop it first, or give this one another {name}"
            raise RuntimeError(f"{folder}: another {what} runs in this folder; {fix}.") from None
        yield


def _remove_resume_point(folder: Path) -> None:
    (folder / "trainer.json").unlink(missing_ok=True)  # first: half of it never looks complete
    shutil.rmtree(folder, ignore_errors=True)


def _make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates: int) -> Any:
    """Return timm's schedule, one value per optimizer step, `updates` of them per epoch."""
    epochs, warmup = config.epochs, min(config.warmup_epochs, config.epochs - 1)
    rest, first = epochs - warmup, {"warmup_prefix": True}
    options = {"sched": "cosine", "num_epochs": epochs, "warmup_epochs": warmup, "warmup_lr": 0.0}
    rise = {"warmup_epochs": 0.3 * epochs, "warmup_lr": config.learning_rate / 25}
    by_name: dict[str, dict[str, Any]] = {
        "cosine": {},  # Loshchilov & Hutter 2017, arXiv 1608.03983
        "one-cycle": first | rise | {"num_epochs": 0.7 * epochs},  # Smith 2019, arXiv 1708.07120
        "flat-cosine": {"sched": "wsd", "decay_epochs": 0.28 * epochs / rest, "decay_fn": "cosine"},
        "step": first | {"sched": "step", "decay_epochs": rest / 3, "decay_rate": 0.1},
        "warm-restarts": first | {"num_epochs": rest / 3, "cycle_limit": 3, "cycle_decay": 1.0},
    }
    per_step = {"step_on_epochs": False, "updates_per_epoch": updates}
    return create_scheduler_v2(optimizer, **(options | by_name[config.schedule]), **per_step)[0]


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Return timm's parameter groups, those of the head apart: its learning rate is its own."""
    head, decay = _classifier(model), config.weight_decay
    backbone = model.backbone if isinstance(model, _HeadedModel) else model
    options = {"no_weight_decay_list": getattr(backbone, "no_weight_decay", set)()}
    make = param_groups_weight_decay
    if config.layer_decay is not None:
        make = param_groups_layer_decay
        options |= {"layer_decay": config.layer_decay, "no_opt_scale": config.frozen_below or None}
    groups = make(backbone, decay, **options)
    in_head = {id(parameter) for parameter in head.parameters()}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in in_head]
    scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
    groups += [group | {"lr_scale": scale} for group in param_groups_weight_decay(head, decay)]
    return [group for group in groups if group["params"]]


class Trainer:
    """Train a model, keeping the weights of the best validation mAP (loss="ce": top-1 accuracy).

    `run_dir` receives config.json, history.csv, the best weights and last/, the resume point; all
    processes of `accelerate launch` see it. Random numbers follow from (seed, epoch): a resumed
    run ends like one that was not stopped (on a GPU: but for the rounding of sums in any order).
    Another task overrides `prepare_loss`, `training_loss` and `validate`.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: DataPartition,
        val_set: DataPartition,
        config: TrainConfig,
        run_dir: PathLike,
    ) -> None:
        kinds = {(*part.label_columns, part.exclusive) for part in (train_set, val_set)}
        if len(kinds) > 1:
            raise ValueError("training and validation partitions have different labels or order.")
        self.run_dir, self.best_path, self.val_set = Path(run_dir), Path(run_dir) / WEIGHTS, val_set
        spec = getattr(model, "spec", {}).items()
        from_model = {key: value for key, value in spec if key in ("head", "head_kwargs")}
        from_model["loss"] = _resolve_loss(config.loss, train_set.exclusive)
        config = replace(config, labels=list(train_set.label_columns), **from_model)
        if config.precision == "measure":
            config = self._measured(config, model, train_set)
        self.config = config
        precision = fast_precision(model) if config.precision == "auto" else config.precision
        AcceleratorState._reset_state()  # accelerate keeps one state a process, a notebook may
        GradientState._reset_state()  # train more than once
        loading = DataLoaderConfiguration(non_blocking=True)
        self.accelerator = Accelerator(mixed_precision=precision, dataloader_config=loading)
        set_seed(config.seed)
        self.metric = "val_top1" if config.loss == "ce" else "val_mAP"
        self.prepare_loss(train_set)
        self._prepare_model(model, train_set)
        self.epoch, self.step, self.history, self.stopped = 0, 0, [], False
        self.circumstances = {"processes": self.accelerator.num_processes, "precision": precision}
        self.circumstances["images"] = len(train_set)

    def _measured(self, config: TrainConfig, model: nn.Module, photos: Dataset) -> TrainConfig:
        """Put the fastest precision and layout into `config`; a resumed run keeps what it had."""
        if not hasattr(model, "data_config"):  # a head alone: too small to be worth it
            return replace(config, precision="auto")
        names, last = ("precision", "channels_last"), self.run_dir / "last" / "trainer.json"
        saved, fix = {}, f"delete {last.parent} to start again"
        if last.is_file():  # new options: their defaults
            saved = asdict(TrainConfig()) | read_state(self.run_dir / "config.json", fix)
        if all(saved.get(k) == v for k, v in asdict(config).items() if k not in {*names, *_FREE}):
            return replace(config, **{name: saved[name] for name in names})
        state, trial = this_process(), copy.deepcopy(model)
        if config.grad_checkpointing:
            getattr(trial, "backbone", trial).set_grad_checkpointing()
        n, said = min(8, max(2, config.batch_size)), config.channels_last
        images = torch.stack([photos[i % len(photos)][0] for i in range(n)]).to(state.device)
        layouts = (False, True)[: 1 + gains_by_channels_last(model)] if said is None else (said,)
        rates = {c: n / s for c, s in time_steps(trial.to(state.device), images, layouts).items()}
        shown = ", ".join(f"{p}{' channels_last' * c} {r:.1f}" for (p, c), r in rates.items())
        state.print(f"photos/s measured, the first is taken: {shown}")
        best = broadcast_object_list([next(iter(rates))])[0]  # all processes as the first one
        return replace(config, **dict(zip(names, best)))

    def prepare_loss(self, train_set: DataPartition) -> None:
        """Check the targets and set `criterion`; another task may set `metric` to "val_loss"."""
        config, targets, exclusive = self.config, train_set.targets, train_set.exclusive
        if not (targets >= 0).any():
            raise ValueError("the training part has no judged label: nothing to learn from.")
        if not (self.val_set.targets >= (0 if exclusive else 0.5)).any():
            raise ValueError("no label is present in the validation part: nothing to select by.")
        if config.loss == "ce":
            _check_exclusive(train_set, "training")
            _check_exclusive(self.val_set, "validation")
        alphas = config.mixup_alpha, config.cutmix_alpha
        self.num_labels = len(train_set.label_columns)
        self.mixup = TriStateMixup(self.num_labels, *alphas) if max(alphas) > 0 else None
        soft = self.mixup is not None or bool(((targets > 0) & (targets < 1)).any())
        options = config.loss_kwargs | {"label_smoothing": config.label_smoothing}
        loss = MaskedLoss(config.loss, targets, config.class_weights, soft, **options)
        self.criterion = loss.to(self.accelerator.device)

    def _prepare_model(self, model: nn.Module, train_set: DataPartition) -> None:
        """Set up model, moving average, optimizer, loader and the schedule over all steps."""
        config, decay = self.config, self.config.ema_decay
        self.layout = _memory_format(model, config.channels_last)
        # plain: timm's own, which is saved; self.model: wrapped by accelerate for several processes
        self.plain = model = model.to(self.accelerator.device, memory_format=self.layout)
        if config.grad_checkpointing:
            getattr(model, "backbone", model).set_grad_checkpointing()
        self.ema = ModelEmaV3(model, decay, use_warmup=True) if decay else None
        if config.compile:
            model.compile()
        groups = _parameter_groups(model, config)
        optimizer = create_optimizer_v2(groups, "adamw", lr=config.learning_rate, fused=True)
        loader = make_loader(train_set, config.batch_size, True, config.num_workers, config.seed)
        self.generator = loader.generator
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        for name in ("forward", "_original_forward"):  # accelerate's autocast, which is called here
            model.__dict__.pop(name, None)  # anyway; tied to itself, a model is not freed at once
        self.steps_per_epoch = -(-len(self.loader) // config.grad_accum_steps)
        self.scheduler = _make_schedule(self.optimizer, config, self.steps_per_epoch)

    def learning_rates(self) -> np.ndarray:
        """Return the rates that the optimizer gets at each step of the run, (steps, groups)."""
        rates = []
        for step in range(self.config.epochs * self.steps_per_epoch):
            self.scheduler.step_update(step)
            rates.append([group["lr"] for group in self.optimizer.param_groups])
        self.scheduler.step_update(self.step)
        return np.array(rates)

    def fit(self, after_epoch: AfterEpoch = None) -> pd.DataFrame:
        """Train from the start and return the history; the model then holds the best weights.

        The stop button ends it and sets `stopped`; what `after_epoch` raises at a row ends it too.
        """
        if self.history or self.step:
            raise RuntimeError("this Trainer has trained; call resume() or make a new Trainer.")
        with alone_in(self.run_dir, self.accelerator.is_main_process):
            if self.accelerator.is_main_process:
                for old in ("last", "last.tmp"):
                    _remove_resume_point(self.run_dir / old)
                _write_json(self.run_dir / "config.json", asdict(self.config))
            if self.config.start == "probe":
                self._end_epoch(0, float("nan"), 0.0)
            return self._run(after_epoch)

    def fit_whole(self, after_epoch: AfterEpoch = None) -> pd.DataFrame:
        """Do as `fit`, for one of several trainings: the stop button ends what called it, too."""
        history = self.fit(after_epoch)
        if self.stopped:  # a half-trained one would be compared with whole ones
            raise KeyboardInterrupt
        return history

    def resume(self, after_epoch: AfterEpoch = None) -> pd.DataFrame:
        """Go on from last/ and return the whole history; settings and data must be the same."""
        with alone_in(self.run_dir, self.accelerator.is_main_process):
            last, newer = self.run_dir / "last", self.run_dir / "last.tmp"
            if (newer / "trainer.json").is_file() and self.accelerator.is_main_process:
                _remove_resume_point(last)  # killed before this: the only copy gets its own name,
                os.replace(newer, last)  # or the next one would be written over it
            self.accelerator.wait_for_everyone()
            if not (last / "trainer.json").is_file():
                raise FileNotFoundError(f"{self.run_dir}: no finished epoch to resume; call fit().")
            config, state = map(read_state, (self.run_dir / "config.json", last / "trainer.json"))
            self._check_same(asdict(TrainConfig()) | config, state)  # new options: their defaults
            self._load_last(last, state)
            return self._run(after_epoch)

    def _load_last(self, last: Path, state: dict[str, Any]) -> None:
        """Take the resume point; the best weights must be there, or the last would be the best."""
        try:
            history = state["history"]
            if self._has_best(history):
                self._load_best()
            self.accelerator.load_state(str(last))
            if self.ema is not None:
                weights = torch.load(last / "ema.pt", map_location="cpu", weights_only=True)
                self.ema.module.load_state_dict(weights)
            self.epoch, self.step = (int(history[-1][name]) for name in ("epoch", "step"))
        except Exception as error:  # whatever a damaged file makes torch raise
            fix = "if it is damaged, make a new Trainer and call fit() to start again"
            raise ValueError(f"{last}: cannot be read ({first_line(error)}); {fix}.") from None
        self.history = history

    def _load_best(self) -> None:
        self.plain.load_state_dict(safetensors.torch.load_file(self.best_path))

    def _check_same(self, config: dict[str, Any], state: dict[str, Any]) -> None:
        start, again = f"{self.run_dir} was trained with", "or call fit() to start again"
        changed = [k for k, v in asdict(self.config).items() if config[k] != v and k not in _FREE]
        if changed:
            raise ValueError(f"{start} another {brief(changed)}; restore it to resume, {again}.")
        for what, now in self.circumstances.items():
            before = state.get(what, now)
            may_differ = what == "precision" and "fp16" not in (before, now)  # another machine
            if before != now and not may_differ:
                difference = f"{what}={before!r}, now it is {now!r}"
                raise ValueError(f"{start} {difference}; resume as it was trained, {again}.")

    def predict(
        self, dataset: Dataset, weights: str = "current", flip: bool = False, rolls: int = 1
    ) -> np.ndarray:
        """Return probabilities (N, L); weights="ema": the moving average; flip: both ways round."""
        check_choice("weights", weights, ("current", "ema") if self.ema else ("current",))
        logits = self._predict_logits(dataset, weights, flip, rolls)
        return to_probs(logits, self.config.loss == "ce")

    def _predict_logits(
        self, dataset: Dataset, weights: str, flip: bool = False, rolls: int = 1
    ) -> torch.Tensor:
        model, accelerator = self.ema.module if weights == "ema" else self.model, self.accelerator
        model.eval()
        if weights == "ema" and accelerator.num_processes > 1:  # each has its own batch norm
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer))
        loader = make_loader(dataset, self.config.batch_size, num_workers=self.config.num_workers)
        # accelerator.prepare would keep this loader as long as the trainer
        options = {"put_on_device": True, "non_blocking": True}
        loader = prepare_data_loader(loader, accelerator.device, **options)
        logits = [torch.empty(0, len(dataset.label_columns), device=accelerator.device)]
        with torch.inference_mode(), self.autocast():
            for images, _ in loader:
                images = images.contiguous(memory_format=self.layout)
                batch_logits = _mean_of_views(model, images, flip, rolls)
                logits.append(accelerator.gather_for_metrics(batch_logits).float())
        return torch.cat(logits)

    def _run(self, after_epoch: AfterEpoch) -> pd.DataFrame:
        """Train the remaining epochs, then take the best weights."""
        config, n_batches = self.config, len(self.loader)
        self.accelerator.gradient_accumulation_steps = config.grad_accum_steps
        options = {} if self.accelerator.is_main_process else {"disable": True}  # or TQDM_DISABLE
        options |= {"total": config.epochs * n_batches, "initial": self.epoch * n_batches}
        try:
            with tqdm(desc="training", leave=False, delay=2, **options) as bar:
                while self.epoch < config.epochs and self._has_patience():
                    start = time.perf_counter()
                    train_loss = self._train_epoch(bar)
                    self._end_epoch(self.epoch + 1, train_loss, time.perf_counter() - start)
                    row, shown = self.history[-1], ("epoch", "train_loss", self.metric)
                    bar.set_postfix({name: row[name] for name in shown}, refresh=False)
                    if after_epoch is not None:
                        after_epoch(dict(row))
        except KeyboardInterrupt:
            self.stopped = True
            kept = f"{self.run_dir} keeps finished epochs, Trainer.resume() goes on from there"
            kept = kept if self.history else "nothing is kept"
            print(told := f"Stopped in epoch {self.epoch + 1}; {kept}.")
            # with several processes the others may be anywhere: none waits
            if not self.history or self.accelerator.num_processes > 1:
                raise KeyboardInterrupt(told) from None
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            fix = "take a batch_size of 2 or more, or batch_norm='frozen'"
            raise ValueError(f"batch norm cannot learn from one photo at a time; {fix}.") from None
        self.accelerator.wait_for_everyone()
        if self._has_best(self.history):
            self._load_best()
        return pd.DataFrame(self.history)

    def _has_best(self, history: list[dict[str, Any]]) -> bool:
        """Say whether an epoch had a score; else the weights there are those of an older run."""
        return any(np.isfinite(self._score(row)) for row in history)

    def _has_patience(self) -> bool:
        scores = [self._score(row) for row in self.history]
        best = np.nanargmax(scores) if self._has_best(self.history) else -1
        return len(scores) - 1 - best < self.config.patience

    def _score(self, row: dict[str, float]) -> float:
        """Return what is best when highest."""
        return -row[self.metric] if self.metric == "val_loss" else row[self.metric]

    def _end_epoch(self, epoch: int, train_loss: float, seconds: float) -> None:
        """Add a row to the history, keep the weights if they are the best so far, write last/."""
        rates = [g["lr"] / g.get("lr_scale", 1.0) for g in self.optimizer.param_groups]
        row = {"epoch": epoch, "step": self.step, "learning_rate": max(rates) if epoch else 0.0}
        row |= {"train_loss": train_loss} | self.validate() | {"seconds": seconds}
        row["images_per_second"] = len(self.loader.dataset) / seconds if epoch else 0.0
        best = np.nanmax([-np.inf, *map(self._score, self.history)])
        with writing(self.run_dir, "Trainer.resume() goes on from the last finished epoch"):
            if self._score(row) > best and self.accelerator.is_main_process:
                model = self.ema.module if row.get("weights") == "ema" else self.plain
                _save_weights(model, self.best_path)
            self.epoch = epoch
            self.history.append(row)
            self._save_last()

    def validate(self) -> dict[str, Any]:
        """Return `metric` and whatever else history shall hold; of the better weights with EMA."""
        if self.ema is None:
            return self._validate("current")
        scores = [self._validate(name) | {"weights": name} for name in ("ema", "current")]
        return max(scores, key=self._score)

    def _validate(self, weights: str) -> dict[str, float]:
        logits = self._predict_logits(self.val_set, weights)
        if logits.isnan().any():  # the last steps of the epoch may spoil what its loss was for
            problem = f"the model answers NaN after epoch {self.epoch + 1}"
            raise FloatingPointError(f"{problem}; lower learning_rate.")
        targets = torch.tensor(self.val_set.targets, device=logits.device)
        probs = to_probs(logits, self.config.loss == "ce")
        scores = {"val_loss": self.criterion(logits, targets).item()}
        scores |= {"val_mAP": mean_average_precision(self.val_set.targets, probs)}
        if self.config.loss == "ce":
            judged = (targets >= 0).view(len(targets), -1).all(1)  # NaN is not
            numbers = targets.argmax(1) if targets.ndim == 2 else targets
            shares = accuracy(logits[judged], numbers[judged], topk=(1, 5))
            scores |= {f"val_top{k}": share.item() / 100 for k, share in zip((1, 5), shares)}
        return scores

    def autocast(self) -> torch.autocast:
        """Compute in this training's precision; accelerate's own is that of the newest Trainer."""
        return _autocast(self.plain, self.accelerator.device.type, self.circumstances["precision"])

    def training_loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, a number; called where gradients are recorded."""
        pairs = len(images) // 2 * 2  # timm mixes pairs; the last of an odd batch stays
        if self.mixup is not None and pairs:
            targets = _as_shares(targets, self.num_labels) if targets.ndim == 1 else targets
            images[:pairs], targets[:pairs] = self.mixup(images[:pairs], targets[:pairs])
        with self.autocast():
            logits = self.model(images.contiguous(memory_format=self.layout))
        return self.criterion(logits, targets)

    def _start_epoch(self) -> None:
        seed = self.config.seed + 7919 * (self.epoch + 1)
        set_seed(seed, device_specific=True)
        self.generator.manual_seed(seed)
        self.model.train()
        frozen = nn.modules.batchnorm._BatchNorm if self.config.batch_norm == "frozen" else ()
        for module in self.plain.modules():
            if isinstance(module, frozen):
                module.eval()
        self.model.zero_grad()  # of a batch that an interrupt broke off
        if self.accelerator.scaler is not None:  # fp16: that batch may be half unscaled
            self.accelerator.scaler._per_optimizer_states.clear()

    def _train_epoch(self, bar: tqdm) -> float:
        """Return the mean loss of one epoch."""
        self._start_epoch()
        accelerator = self.accelerator
        sums = torch.zeros(2, device=accelerator.device)  # of losses, of images
        for images, targets in self.loader:
            with accelerator.accumulate(self.model):
                loss = self.training_loss(images, targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.config.clip_grad:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                self.step += 1
                self.scheduler.step_update(self.step)
                if self.ema is not None:
                    self.ema.update(self.plain, self.step)
            sums += torch.stack([loss.detach() * len(images), loss.new_tensor(len(images))])
            bar.update()
        total, n_images = accelerator.reduce(sums).tolist()  # of all processes
        if not np.isfinite(total):  # looked at once an epoch: each look waits for the GPU
            problem = f"the loss became {total / n_images} in epoch {self.epoch + 1}"
            raise FloatingPointError(f"{problem}; lower learning_rate.")
        return total / n_images

    def _save_last(self) -> None:
        """Write history.csv and the resume point: last.tmp/, trainer.json last, then rename it."""
        last, temporary = self.run_dir / "last", self.run_dir / "last.tmp"
        if self.accelerator.is_main_process:
            _remove_resume_point(temporary)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary))
        except BaseException:  # a full disk: what is half written takes its last bytes
            _remove_resume_point(temporary)
            raise
        self.accelerator.wait_for_everyone()  # every process has its random state in there
        if self.accelerator.is_main_process:
            if self.ema is not None:
                torch.save(self.ema.module.state_dict(), temporary / "ema.pt")
            with replacing(self.run_dir / "history.csv") as path:
                pd.DataFrame(self.history).to_csv(path, index=False)
            state = self.circumstances | {"history": self.history}
            _write_json(temporary / "trainer.json", state)
            _remove_resume_point(last)
            os.replace(temporary, last)
        self.accelerator.wait_for_everyone()


# ---------------------------------------------------------------- scores


def _average_precision(targets: Array, probs: Array, weights: Array) -> Array:
    """Return sklearn's average_precision_score for each row of weights and label, (R, L).

    Weights are counts: their sums are exact in float32. A sparse product adds them up between the
    cuts at which recall grows, without a sorted copy of (N, R).
    """
    counts = np.ascontiguousarray(weights.T, np.float32)  # (N, R)
    result = np.full((len(weights), targets.shape[1]), np.nan)
    for label in np.flatnonzero((targets >= 0.5).any(0)):
        known = np.flatnonzero(~np.isnan(targets[:, label]))
        order = known[np.argsort(-probs[known, label], kind="stable")]
        p, y = probs[order, label], targets[order, label] >= 0.5
        cuts = np.flatnonzero(np.append(p[1:] != p[:-1], True))  # equal probabilities are one cut
        hits = np.cumsum(y)[cuts]
        grown = np.diff(hits, prepend=0) > 0
        gained = _sum_between(order[y], hits[grown], counts)  # (cuts, R)
        predicted = _sum_between(order, cuts[grown] + 1, counts).cumsum(0, float)
        tp = gained.cumsum(0, float)
        with np.errstate(invalid="ignore"):
            result[:, label] = (gained * tp / np.maximum(predicted, 1e-12)).sum(0) / tp[-1]
    return result


def _sum_between(order: Array, ends: Array, counts: Array) -> Array:
    """Return the sums of `counts` (N, R) over rows `order[a:b]` between neighbouring ends."""
    rows = order[: ends[-1]], np.append(0, ends)
    pieces = csr_array((np.ones(ends[-1], np.float32), *rows), shape=(len(ends), len(counts)))
    return pieces @ counts


def mean_average_precision(targets: Array, probs: Array) -> float:
    """Return the mean AP over the labels that are present at least once; NaN if none is."""
    ap = _average_precision(*_as_scored(targets, probs), np.ones((1, len(targets))))
    return float(np.nanmean(ap)) if np.isfinite(ap).any() else float("nan")


def decide(probs: Array, cuts: Cuts) -> Array:
    """Return what is said to be present, (N, L); "argmax": the most probable class alone."""
    if isinstance(cuts, str) and cuts == "argmax":
        return np.arange(probs.shape[1]) == probs.argmax(1)[:, None]
    return probs >= np.asarray(cuts, float)


def to_cells(targets: Any, num_labels: int) -> Array:
    """Return targets as cells (N, L): 1, 0, NaN for unknown; of class numbers one is 1 a row."""
    if (targets := np.asarray(targets)).ndim == 2:
        return np.asarray(targets, float)
    one_hot = targets[:, None] == np.arange(num_labels)
    return np.where(targets[:, None] < 0, np.float32(np.nan), one_hot)


def _as_scored(targets: Any, probs: Any) -> tuple[Array, Array]:
    """Return both as float (N, L); probabilities that are NaN are refused."""
    if np.isnan(probs := np.asarray(probs, float)).any():
        raise ValueError("probs holds NaN; leave out the images that could not be read.")
    return to_cells(targets, probs.shape[1]), probs


def rank_classes(targets: Array, probs: Array) -> Array:
    """Return how many classes came before the true one (N,): top-k is rank < k; -1 is unknown."""
    true_probs = np.take_along_axis(probs, np.maximum(targets, 0)[:, None], axis=1)
    earlier = np.arange(probs.shape[1]) < targets[:, None]  # of equal ones the first is taken
    before = (probs > true_probs) | ((probs == true_probs) & earlier)
    return np.where(targets >= 0, before.sum(1), -1)


def _replicates(
    targets: Any, probs: Any, thresholds: Cuts, groups: Groups, n_bootstrap: int, seed: int
) -> dict[str, Array]:
    """Return every score for the data itself (row 0) and for bootstrap samples of groups."""
    numbers, (targets, probs) = np.asarray(targets), _as_scored(targets, probs)
    known, true = ~np.isnan(targets), targets >= 0.5
    predicted = decide(probs, "argmax" if numbers.ndim == 1 else thresholds)
    index = np.arange(len(targets)) if groups is None else pd.factorize(np.asarray(groups))[0]
    if len(index) != len(targets) or index.min(initial=0) < 0:
        raise ValueError(f"groups: expected {len(targets)} names, none of them NaN.")
    ones, rng = np.ones(index.max() + 1), np.random.default_rng(seed)
    drawn = rng.multinomial(len(ones), ones / len(ones), size=n_bootstrap)
    weights = np.vstack([ones, drawn])[:, index]  # (1 + n_bootstrap, N)
    chunks = np.array_split(weights, max(1, weights.size // 20_000_000))
    scores = {"AP": np.vstack([_average_precision(targets, probs, chunk) for chunk in chunks])}
    cells = (true & predicted, ~true & predicted, true & ~predicted)
    counts = weights.astype(np.float32)  # their sums are exact, in half the time and memory
    products = [counts @ (known & c).astype(np.float32) for c in cells]
    tp, fp, fn = np.array(products, float)  # each (1 + n_bootstrap, L)
    wrong, judged = known & (true != predicted), known.any(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores |= {"precision": tp / (tp + fp), "recall": tp / (tp + fn)}
        scores["F1"] = np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
        scores["micro F1"] = 2 * tp.sum(1) / (2 * tp + fp + fn).sum(1)
        scores["Hamming loss"] = weights @ wrong.sum(1) / (weights @ known.sum(1))
        scores["exact match"] = weights @ (judged & ~wrong.any(1)) / (weights @ judged)
        if numbers.ndim == 1:
            rank = rank_classes(numbers, probs)
            for k in (1, 5):
                scores[f"top-{k}"] = weights @ (judged & (rank < k)) / (weights @ judged)
    for mean, name in (("mAP", "AP"), ("macro F1", "F1")):  # of labels that a sample shows
        scores[mean] = np.ma.masked_invalid(scores[name]).mean(1).filled(np.nan)
    return scores


def _interval(values: Array) -> tuple[Array, Array]:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        samples = values[1:] if len(values) > 1 else values * np.nan
        return tuple(np.nanquantile(samples, [0.025, 0.975], axis=0))


def score_labels(
    targets: Array,
    probs: Array,
    label_columns: Sequence[str],
    thresholds: Cuts = 0.5,
    groups: Groups = None,
    n_bootstrap: int = 500,
    seed: int = 42,
) -> pd.DataFrame:
    """Score each label on the cells that somebody judged, one line per label.

    Args:
        targets, probs: (N, L); NaN targets are unknown, soft ones count as present from 0.5.
            Or targets (N,) of class numbers, -1 for unknown: the most probable class decides.
        thresholds: one for all or one per label; "argmax" for classes that exclude each other.
        groups: (N,), what the bootstrap behind the 95 % intervals draws whole; None draws rows.
    """
    scores = _replicates(targets, probs, thresholds, groups, n_bootstrap, seed)
    table, (targets, _) = pd.DataFrame(index=label_columns), _as_scored(targets, probs)
    table.index.name = "label"
    table["support"], table["absent"] = (targets >= 0.5).sum(0), (targets < 0.5).sum(0)
    table["unknown"] = np.isnan(targets).sum(0)
    if groups is not None:  # that show the label: of few, an interval is too narrow
        there = pd.DataFrame(targets >= 0.5).groupby(np.asarray(groups)).any()
        table["groups"] = there.sum().to_numpy()
    for name in ("AP", "precision", "recall", "F1"):
        table[name] = scores[name][0]
        if name in ("AP", "F1"):
            table[f"{name}_low"], table[f"{name}_high"] = _interval(scores[name])
    return table.assign(note=np.where(table["support"] > 0, "", "too few to judge"))


def summarize_scores(
    targets: Array,
    probs: Array,
    thresholds: Cuts = 0.5,
    groups: Groups = None,
    n_bootstrap: int = 500,
    seed: int = 42,
) -> pd.DataFrame:
    """Score all labels together, see `score_labels`; with "argmax", exact match is top-1."""
    scores = _replicates(targets, probs, thresholds, groups, n_bootstrap, seed)
    names = ["mAP", "macro F1", "micro F1", "Hamming loss", "exact match"]
    names = ["top-1", "top-5", "mAP", "macro F1"] if "top-1" in scores else names
    rows = [(scores[name][0], *_interval(scores[name])) for name in names]
    table = pd.DataFrame(rows, pd.Index(names, name="score"), ["value", "low", "high"])
    return table.assign(labels=f"{np.isfinite(scores['AP'][0]).sum()} of {scores['AP'].shape[1]}")


def compare_scores(
    targets: Array,
    probs: Array,
    baseline: Array,
    label_columns: Sequence[str],
    groups: Groups = None,
    n_bootstrap: int = 500,
    seed: int = 42,
) -> pd.DataFrame:
    """Compare the AP of two models on the same bootstrap samples, so that what they share cancels.

    `probs` and `baseline` may be (S, N, L), of S trainings whose scores are averaged. Of class
    numbers (N,) the last line compares the top-1 accuracy.
    """
    lines = ["mAP", "top-1"] if np.ndim(targets) == 1 else ["mAP"]
    if clashing := [name for name in lines if name in label_columns]:
        raise ValueError(f"a label is named {clashing[0]!r}, as a line for all labels; rename it.")

    def replicates(runs: Array) -> Array:
        shape, given = (len(targets), len(label_columns)), np.shape(runs)
        if given[-2:] != shape:
            expected = f"expected {shape}, as the targets, or several of these"
            raise ValueError(f"probabilities of shape {given}: {expected}.")
        runs = np.reshape(runs, (-1, *shape))
        scores = [_replicates(targets, p, 0.5, groups, n_bootstrap, seed) for p in runs]
        columns = [np.column_stack([one["AP"], *(one[name] for name in lines)]) for one in scores]
        return np.mean(columns, axis=0)

    new, old = replicates(probs), replicates(baseline)
    table = pd.DataFrame(index=pd.Index([*label_columns, *lines], name="label"))
    table["baseline"], table["AP"], table["difference"] = old[0], new[0], new[0] - old[0]
    table["low"], table["high"] = _interval(new - old)
    return table


def _best_cut(targets: Array, probs: Array, beta: float, min_precision: float | None) -> tuple:
    """Return the threshold of the highest F-beta (`min_precision`: recall), and that; -1: none."""
    known = ~np.isnan(targets)
    if not known.any():
        return 0.5, -1.0
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a label never present
        curve = precision_recall_curve(targets[known] >= 0.5, probs[known])
    precision, recall, cuts = curve[0][-2::-1], curve[1][-2::-1], curve[2][::-1]  # highest first
    score = (1 + beta**2) * precision * recall / (beta**2 * precision + recall).clip(1e-12)
    if min_precision is not None:
        score = np.where((precision >= min_precision) & (precision > 0), recall, -1.0)
    best = score.round(12).argmax()  # equal fractions may differ in their last digit
    middle = (cuts[best] + (lower := [*cuts, 0.0][best + 1])) / 2
    return (middle if middle > lower else cuts[best]), score[best]


def _best_cuts(targets: Array, probs: Array, beta: float, least: float | None = None) -> Array:
    """Return thresholds and scores (2, L + 1) of (N, L); the last is for all labels together."""
    columns = [*zip(targets.T, probs.T), (targets.ravel(), probs.ravel())]
    return np.array([_best_cut(y, p, beta, least) for y, p in columns]).T


def _shrunk_cuts(targets: Array, probs: Array, groups: Groups, beta: float, seed: int) -> Array:
    """Return thresholds (L + 1,): the mean of 30 bootstrap samples of groups, in logits.

    It lies in the middle of the plateau of good cuts; n / (n + 10) of it are the label's own.
    """
    rng, draws = np.random.default_rng(seed), []
    index = np.arange(len(probs)) if groups is None else pd.factorize(pd.Series(groups))[0]
    rows = [np.flatnonzero(index == group) for group in range(index.max() + 1)]
    for _ in range(30):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        cuts, scores = _best_cuts(targets[drawn], probs[drawn], beta)
        draws.append(np.where(scores > 0, cuts, cuts[-1]))  # 0: the sample has no positive
    clipped = np.clip(draws, 1e-6, 1 - 1e-6)
    *per_label, common = np.log(clipped / (1 - clipped)).mean(0)  # in logits
    n = (targets >= 0.5).sum(0)
    per_label = np.array(per_label) * n / (n + 10) + common * 10 / (n + 10)
    return 1 / (1 + np.exp(-np.append(per_label, common)))


def find_optimal_thresholds(
    probs: Array,
    targets: Array,
    label_columns: Sequence[str],
    mode: str = "per_label",
    beta: float = 1.0,
    min_precision: float | None = None,
    min_positives: int = 10,
    groups: Groups = None,
    seed: int = 42,
) -> pd.DataFrame:
    """Find the thresholds with the highest F-beta, exactly; choose on validation, report on test.

    Args:
        mode: "per_label"; "global" for one threshold for all; "shrunk" for thresholds that hold on
            other photos, averaged over bootstrap samples of `groups` (N,).
        min_precision: instead, the highest recall at this precision or better; not with "shrunk".
        min_positives: a label with fewer falls back to the global threshold; see "source".
    """
    check_choice("mode", mode, ("per_label", "global", "shrunk"))
    if mode == "shrunk" and min_precision is not None:
        raise ValueError("min_precision goes with mode='per_label' or 'global'.")
    targets, probs = _as_scored(targets, probs)
    cuts, (*score, reached) = _best_cuts(targets, probs, beta, min_precision)
    positives = (targets >= 0.5).sum(0)
    if mode == "shrunk" and positives.any():
        cuts = _shrunk_cuts(targets, probs, groups, beta, seed)
        said = (probs >= cuts[:-1]) & ~np.isnan(targets)
        right = (said & (targets >= 0.5)).sum(0)
        score = (1 + beta**2) * right / (beta**2 * positives + said.sum(0)).clip(1e-12)
    few, missed = f"global: fewer than {min_positives} positives", "global: precision not reached"
    chosen = "shrunk" if mode == "shrunk" else "own"
    source = np.select([positives < min_positives, np.less(score, 0)], [few, missed], chosen)
    if mode == "global":
        source = np.full(len(positives), "global" if reached >= 0 else missed)
    table = pd.DataFrame(index=pd.Index(label_columns, name="label"))
    table["threshold"] = np.where(source == chosen, cuts[:-1], cuts[-1] if reached >= 0 else 0.5)
    table["score"] = np.where(source == chosen, score, np.nan)
    return table.assign(positives=positives, source=source)


def _to_logits(probs: Array, exclusive: bool) -> torch.Tensor:
    """Return logits (`exclusive`: logs) in double precision; 0 and 1 stay finite and apart."""
    probs = torch.as_tensor(np.clip(np.asarray(probs, float), 1e-38, 1 - 1e-8))
    return probs.log() if exclusive else probs.logit()


def calibrate(probs: Array, calibration: Array | None, exclusive: bool = False) -> Array:
    """Return probabilities (..., L) from logits that are scaled and shifted by (2, L).

    Within a label the order of the photos stays as it is, and so does its AP; with softmax
    (`exclusive`) photos may change places.
    """
    if calibration is None:
        return np.asarray(probs)
    slope, shift = np.asarray(calibration, float)
    logits = _to_logits(probs, exclusive) * torch.tensor(slope) + torch.tensor(shift)
    return (logits.softmax(-1) if exclusive else logits.sigmoid()).numpy()


def _fit_slopes(z, y, spread, exclusive):
    """Return slopes and shifts (2, L) at which z, scaled and shifted, has the lowest log loss.

    They are 1 and 0 plus a change that all labels share and one of each label's own, both from
    normal distributions; `spread` is the standard deviation of the latter.
    """
    scale = z.new_tensor([[3.0] + [spread] * z.shape[1]])  # 3: hardly held back
    same = z.new_tensor([[1.0], [0.0]])

    def lines(weights):
        change = scale * weights
        return same + change[:, :1] + change[:, 1:]

    def penalised(weights):
        slope, shift = lines(weights)
        loss = _log_loss(z * slope + shift, y, exclusive)
        return (loss + weights.square().sum() / 2) / len(z)

    start = z.new_zeros(2, 1 + z.shape[1])
    best = lines(_minimize(penalised, start, max_iter=30, tolerance_change=1e-6))
    best[0].clamp_(min=0.05)  # a label that cannot be told is not turned round
    return best


def fit_calibration(
    probs: Array, targets: Array, groups: Groups = None, exclusive: bool = False
) -> Array | None:
    """Return slopes and shifts (2, L) for `calibrate`, fitted on validation.

    Platt scaling in which labels with few positives lean on the others. How much, `groups` (N,)
    left out in turn decide by their log loss; None if that is not lowered by more than its
    standard error. `exclusive` classes share a slope, 1 / temperature (arXiv 1706.04599).
    """
    z = _to_logits(_as_scored(targets, probs)[1], exclusive)
    y = torch.as_tensor(np.asarray(targets))
    if not exclusive:
        y = torch.where(y.isnan(), y, (y >= 0.5).double())
    folds = _folds(np.arange(len(z)) if groups is None else np.asarray(groups))
    losses = {None: [_log_loss(z[out], y[out], exclusive).item() for _, out in folds]}
    for spread in (0.0,) if exclusive else (0.0, 0.5):
        fits = [(_fit_slopes(z[rows], y[rows], spread, exclusive), out) for rows, out in folds]
        losses[spread] = [_log_loss(z[i] * a + b, y[i], exclusive).item() for (a, b), i in fits]
    spread = min(losses, key=lambda name: sum(losses[name]))
    gain = np.subtract(losses[None], losses[spread])
    if spread is None or gain.mean() <= gain.std(ddof=1) / len(gain) ** 0.5:
        return None
    return _fit_slopes(z, y, spread, exclusive).numpy()


def find_bands(
    probs: Array,
    targets: Array,
    precision: float = 0.95,
    min_positives: int = 10,
    exclusive: bool = False,
) -> Array:
    """Return (2, L): absent is said below the first, present from the second probability on.

    Of what is said either way, at least that share is right on validation; labels with (or
    without) fewer than `min_positives` take the bounds of all labels together. Below 0 or
    above 1: never said. Of `exclusive` classes the most probable one is said from one bound on.
    """
    targets, probs = _as_scored(targets, probs)
    if exclusive:
        judged = ~np.isnan(targets).any(1)
        right = (targets.argmax(1) == probs.argmax(1))[judged, None].astype(float)
        high = find_bands(probs.max(1)[judged, None], right, precision, min_positives)[1]
        return np.outer([0, 1], high.repeat(probs.shape[1]))
    bounds = []
    for p, y in ((1 - probs, 1 - targets), (probs, targets)):
        cuts, reached = _best_cuts(y, p, 1.0, precision)
        cuts = np.where(reached < 0, 1.01, cuts)
        bounds.append(np.where((y >= 0.5).sum(0) < min_positives, cuts[-1], cuts[:-1]))
    low, high = 1 - bounds[0], bounds[1]
    return np.where(low > high, (low + high) / 2, [low, high])  # between them either is sure


def _choose_rules(
    probs: Array, targets: Array, labels: list[str], groups: Groups, exclusive: bool = False
) -> dict[str, Any]:
    """Return what turns probabilities on validation into answers, calibration first."""
    calibration = fit_calibration(probs, targets, groups, exclusive)
    probs = calibrate(probs, calibration, exclusive)
    rules = {"calibration": calibration, "bands": find_bands(probs, targets, exclusive=exclusive)}
    if not exclusive:
        table = find_optimal_thresholds(probs, targets, labels, "shrunk", groups=groups)
        rules["thresholds"] = table["threshold"]
    return rules


def _combine(probs: Array, panorama: Sequence, combine: str) -> Array:
    """Return a probability (P, L) of the views (N, L); "noisy-or": as if they were independent."""
    check_choice("combine", combine, COMBINE)
    if combine == "noisy-or":
        return 1 - (1 - pd.DataFrame(probs)).groupby(panorama, sort=False).prod().to_numpy()
    return pd.DataFrame(probs).groupby(panorama, sort=False).agg(combine).to_numpy()


def to_panorama_level(
    df: pd.DataFrame, label_columns: Sequence[str], probs: Array, combine: str = "max"
) -> tuple[Array, Array]:
    """Return the targets of `combine_halves` and one probability of both halves, (P, L)."""
    images, labels = df["image_path"].rename("image"), list(label_columns)
    targets = combine_halves(pd.concat([images, df[labels]], axis=1))
    panorama = images.map(panorama_name).to_numpy()
    _, probs = _as_scored(df[labels], probs)
    return targets[labels].to_numpy(float), _combine(probs, panorama, combine)


# ---------------------------------------------------------------- classifier


@dataclass
class _Views(Dataset):
    """Images, paths or arrays as the views (V, 3, H, W) of a model, their names, what is wrong."""

    images: Sequence[Any]
    transform: Callable
    panorama: bool
    halves: bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str, str]:
        item, (height, width) = self.images[index], _needed_size(self.transform)
        name = str(item) if isinstance(item, PathLike) else f"image {index}"
        try:
            image = open_image(item, (height, width * (1 + self.halves)))
            if self.panorama and not _is_sphere(image):
                raise OSError(f"{name}: {image.width} × {image.height} px is no 2:1 panorama.")
        except OSError as error:
            return torch.full((1 + self.halves, 3, height, width), torch.nan), name, str(error)
        edges = (0, image.width // 2, image.width) if self.halves else (0, image.width)
        parts = [image.crop((a, 0, b, image.height)) for a, b in itertools.pairwise(edges)]
        return torch.stack([self.transform(part) for part in parts]), name, ""


@dataclass(eq=False, repr=False)
class Classifier:
    """A trained model with its labels, thresholds and view, ready to use."""

    model: nn.Module  # from `build_model`
    labels: Sequence[str]  # in the order of its logits
    thresholds: Sequence[float] = ()  # one per label; present means prob >= threshold
    view: str = "half"  # or "panorama": what the model was trained on
    panorama_thresholds: Sequence[float] | None = None  # of panoramas that a half model answers
    activation: str = "sigmoid"  # "softmax": the most probable class is present, no thresholds
    flip: bool = False  # answer with the mean over a photo and its mirror image, in twice the time
    rolls: int = 1  # and over so many turns of the whole sphere, in as many times the time
    combine: str = "max"  # how halves answer for their panorama, see COMBINE; softmax: "mean"
    calibration: Any = None  # (2, L), see `calibrate`; None: probabilities as they are
    panorama_calibration: Any = None
    bands: Any = None  # (2, L), see `find_bands`
    panorama_bands: Any = None
    usual: dict[str, list[float]] | None = None  # features of known photos, see `remember`

    def __post_init__(self) -> None:
        check_choice("view", self.view, VIEWS)
        check_choice("activation", self.activation, ("sigmoid", "softmax"))
        model, whole = self.model, self.panorama_thresholds
        self.labels, self.thresholds = list(self.labels), np.asarray(self.thresholds, float)
        self.panorama_thresholds = np.asarray(self.thresholds if whole is None else whole, float)
        counts = [len(x) for x in (self.labels, self.thresholds, self.panorama_thresholds)]
        n, self.exclusive = model.spec["num_labels"], self.activation == "softmax"
        if counts != ([n, 0, 0] if self.exclusive else [n, n, n]):
            counted = "{} labels, {} thresholds and {} panorama_thresholds".format(*counts)
            raise ValueError(f"{counted} ({self.activation}) and {n} logits do not match.")
        self._normalize_rules()
        columns = ["image", "part", *self.labels, *(f"{name}_prob" for name in self.labels)]
        if twice := [name for name in self.labels if columns.count(name) > 1]:
            raise ValueError(f"labels {brief(twice)}: names of columns of the table; rename them.")
        self.device = _fastest_device()
        self.model = model.to(self.device, memory_format=_memory_format(model)).eval()
        self.transform = make_transforms(model, train=False)
        self.img_size = _needed_size(self.transform)  # height, width of what it looks at

    @property
    def cuts(self) -> Array | str:
        """What `decide` and the scores take: thresholds, or "argmax" of exclusive classes."""
        return "argmax" if self.exclusive else self.thresholds

    def _normalize_rules(self) -> None:
        """Make arrays of calibrations and bands, (2, L), and of what is usual."""
        check_choice("combine", self.combine, COMBINE)
        self.combine = "mean" if self.exclusive else self.combine
        if self.rolls not in range(1, 2 if self.view == "half" else 65):
            raise ValueError("rolls (1 to 64) turn whole panoramas; a turned half has a seam.")
        if self.panorama_bands is None:
            self.panorama_bands = self.bands
        shape = (2, len(self.labels))
        for name in ("calibration", "panorama_calibration", "bands", "panorama_bands"):
            if getattr(self, name) is not None:
                setattr(self, name, rule := np.asarray(getattr(self, name), float))
                wrong = rule.shape != shape or not np.isfinite(rule).all()
                if wrong or name.endswith("calibration") and rule[0].min() <= 0:
                    raise ValueError(f"{name}: expected {shape} numbers, slopes above 0.")
        if self.usual is not None:
            self.usual = {k: np.asarray(self.usual[k], float) for k in ("mean", "std", "distances")}

    def save(self, run_dir: PathLike, metrics: dict[str, float] | None = None) -> Path:
        """Write model.safetensors and best_classifier.json; of several processes in one only."""
        weights, path = Path(run_dir) / WEIGHTS, Path(run_dir) / "best_classifier.json"
        content = {"format_version": FORMAT_VERSION, **self.model.spec, **self.model.data_config}
        content |= {option.name: getattr(self, option.name) for option in fields(self)[1:]}
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
        trained_in = _is_main() and (path.parent / ".lock").exists()  # a Trainer may still write
        with alone_in(path.parent, trained_in):
            content |= {"weights": weights.name, "sha256": _save_weights(self.model, weights)}
            _write_json(path, content | {"validation": metrics or {}, "versions": versions})
        this_process().wait_for_everyone()
        return path

    @classmethod
    def from_validation(
        cls, model: nn.Module, part: DataPartition, probs: Array, view: str = "half", **options: Any
    ) -> "Classifier":
        """Take from `probs` (N, L) on validation what turns probabilities into answers.

        The calibration, the thresholds with the best F1 after it and the bands without an answer;
        for panoramas of two halves again, after the combination with the highest mAP.
        """
        labels, usual = part.label_columns, "softmax" if part.exclusive else "sigmoid"
        options = {"view": view, "activation": usual, **options}
        exclusive = options["activation"] != "sigmoid"
        rules = _choose_rules(probs, part.targets, labels, part.groups, exclusive)
        if exclusive or view == "panorama":
            return cls(model, labels, **rules | options)
        df = pd.DataFrame(part.targets, columns=labels)
        df.insert(0, "image_path", [str(path) for path in part.paths])
        groups = pd.Series(part.groups).groupby(df["image_path"].map(panorama_name), sort=False)
        probs = calibrate(probs, rules["calibration"])
        by_combination = {how: to_panorama_level(df, labels, probs, how) for how in COMBINE}
        combine = max(by_combination, key=lambda how: mean_average_precision(*by_combination[how]))
        targets, joint = by_combination[combine]
        whole = _choose_rules(joint, targets, labels, groups.first().to_numpy())
        rules |= {f"panorama_{name}": rule for name, rule in whole.items()} | {"combine": combine}
        return cls(model, labels, **rules | options)

    @classmethod
    def load(cls, path: PathLike, labels: Sequence[str] | None = None) -> "Classifier":
        """Load a best_classifier.json with these labels (None: any); safe with strangers' files."""
        path = _need_file(path, "run training.ipynb to make it")
        try:
            newer = {option.name: option.default for option in fields(cls)[6:]}
            content = newer | _read_object(path)
            if content["format_version"] == 1:
                content |= {"activation": "sigmoid"}
            _check_description(content)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"no valid best_classifier.json: {first_line(error)}"
            raise ValueError(f"{path}: {problem}.") from None
        if labels is not None:
            _check_labels(path, content["labels"], list(labels))
        weights = _need_file(path.parent / content["weights"], f"keep it beside {path.name}")
        stored = weights.read_bytes()
        if hashlib.sha256(stored).hexdigest() != content["sha256"]:
            raise ValueError(f"{weights}: not the file that {path.name} was saved with (sha256).")
        kwargs = {key: content[key] for key in ("num_labels", "head", "img_size")}
        try:
            options = content["head_kwargs"] | content["model_kwargs"]
            model = build_model(content["model_name"], pretrained=False, **kwargs, **options)
            preparation = {"mean", "std", "interpolation", "test_input_size"} & content.keys()
            model.data_config |= {key: content[key] for key in preparation}
            classifier = cls(model, *(content[option.name] for option in fields(cls)[1:]))
        except Exception as error:  # a stranger's values may fail anywhere inside timm
            raise ValueError(f"{path}: no model can be made of it ({first_line(error)}).") from None
        try:
            if content["format_version"] < 3:  # a pickle, of which only plain tensors are read
                state = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
            else:
                state = safetensors.torch.load(stored)
            model.load_state_dict(state)
        except Exception as error:
            fit = f"does not fit {content['model_name']}, or is no plain state dict"
            raise ValueError(f"{weights}: {fit} ({type(error).__name__}).") from None
        classifier.description = content
        return classifier

    def predict(
        self,
        images: Any,
        batch_size: int = 32,
        num_workers: int = 0,
        unreadable: str = "raise",
        flip: bool | None = None,
        panorama: bool = False,
        abstain: bool = False,
        bar: tqdm | None = None,
    ) -> pd.DataFrame:
        """Classify images as they are: one line each with a 0/1 decision and LABEL_prob per label.

        They are a PIL image, an array (H, W, 3), a path, a folder, or a list of any of these.
        `unreadable="skip"` leaves files out: `.attrs["unreadable"]` of the table has names and
        reasons; `flip` looks at the mirror images, too, in twice the time (None: as it was
        saved). With `abstain`, decisions that are not sure enough stay empty, see `find_bands`.
        `bar`: a tqdm bar to move, of a longer work; `.attrs["busy"]`: seconds that the model took.
        """
        check_choice("unreadable", unreadable, ("raise", "skip"))
        if abstain and self.bands is None:
            raise ValueError("abstain=True needs the bands that from_validation chooses.")
        items, flip = _as_items(images), self.flip if flip is None else flip
        halves, busy = panorama and self.view == "half", 0.0
        views = _Views(items, self.transform, panorama, halves)
        loader = read_ahead(views, batch_size)  # a generator: nothing is read before it is used
        if num_workers:
            loader = make_loader(views, batch_size, num_workers=num_workers)
        probs, names, failed = [np.empty((0, 1 + halves, len(self.labels)))], [], []
        options = {"desc": "classifying", "leave": False, "delay": 2}
        progress = tqdm(total=len(items), **options) if bar is None else contextlib.nullcontext(bar)
        with torch.inference_mode(), _autocast(self.model, self.device), progress as bar:
            for batch, batch_names, problems in loader:
                failed += [pair for pair in zip(batch_names, problems) if pair[1]]
                if failed and unreadable == "raise":
                    raise OSError(failed[0][1])
                start, good = time.perf_counter(), [not problem for problem in problems]
                photos = batch.flatten(0, 1).to(self.device)
                logits = _mean_of_views(self.model, photos, flip, self.rolls)
                answers = to_probs(logits, self.exclusive).reshape(*batch.shape[:2], -1)
                busy += time.perf_counter() - start
                probs.append(answers[good])
                names += itertools.compress(batch_names, good)
                bar.update(len(batch_names))
        table = self._table(names, np.concatenate(probs), panorama, abstain)
        table.attrs |= {"unreadable": failed, "busy": busy}
        return table

    def predict_panorama(self, images: Any, batch_size: int = 16, *rest, **named) -> pd.DataFrame:
        """Classify whole 2:1 panoramas, as `predict`, with a column part.

        A model of halves answers for "left", "right" and "panorama": both probabilities combined
        as was best on validation, against thresholds that were tuned for panoramas.
        """
        return self.predict(images, batch_size, *rest, panorama=True, **named)

    def calibrate(self, probs: Array) -> Array:
        """Return what `predict` makes of the probabilities (..., L) of the model itself."""
        return calibrate(probs, self.calibration, self.exclusive)

    def _table(self, names: list[str], probs: Array, panorama: bool, abstain: bool) -> pd.DataFrame:
        """Return one line per image and view of `probs` (N, V, L), and one for both halves."""
        parts, levels, probs = ["panorama"], [""], self.calibrate(probs)
        if probs.shape[1] == 2:
            parts, levels = ["left", "right", "panorama"], ["", "", "panorama_"]
            photo = np.arange(len(names)).repeat(2)
            joint = _combine(probs.reshape(len(photo), len(self.labels)), photo, self.combine)
            joint = calibrate(joint, self.panorama_calibration, self.exclusive)
            probs = np.concatenate([probs, joint[:, None]], axis=1)
        rows = probs.reshape(-1, len(self.labels))
        cuts = [getattr(self, f"{level}thresholds") for level in levels]
        if abstain:
            low, cuts = np.stack([getattr(self, f"{level}bands") for level in levels], axis=1)
            sure = probs.max(-1, keepdims=True) if self.exclusive else probs
            unsure = ((sure >= low) & (sure < cuts)).reshape(rows.shape)
        present = decide(rows, "argmax") if self.exclusive else (probs >= cuts).reshape(rows.shape)
        table = pd.DataFrame(present.astype(int), columns=self.labels)
        table = table.astype("Int64").mask(unsure) if abstain else table
        lines = [name for name in names for _ in parts]
        table.insert(0, "image", pd.Series(lines, dtype=object))  # pyarrow takes no odd file names
        if panorama:
            table.insert(1, "part", pd.Series(parts * len(names), dtype=str))
        return table.join(pd.DataFrame(rows, columns=[f"{name}_prob" for name in self.labels]))

    def _features(self, images: Any, config: TrainConfig | None) -> Array:
        """Return what the last layer sees of paths, (N, C)."""
        config, paths = config or TrainConfig(), pd.DataFrame({"image_path": _as_items(images)})
        part = DataPartition(paths, [], self.transform, config.cache_dir, config.cache_gb)
        features = extract_features(self.model, part, config, self.model.spec["head"] == "linear")
        return (features if features.ndim == 2 else features.mean((2, 3))).double().numpy()

    def _distance(self, features: Array) -> Array:
        away = (features - self.usual["mean"]) / self.usual["std"]
        return np.sqrt((away**2).mean(1))  # (N,), in standard deviations per channel

    def remember(self, images: Any, config: TrainConfig | None = None) -> None:
        """Keep what the photos (paths or a folder) that it learnt from are like, for `novelty`."""
        features = self._features(images, config)
        self.usual = {"mean": features.mean(0), "std": features.std(0) + 1e-6}
        self.usual["distances"] = np.quantile(self._distance(features), np.linspace(0, 1, 101))

    def novelty(self, images: Any, config: TrainConfig | None = None) -> Array:
        """Return per path how much of what was remembered is more usual than it, (N,), 0 to 1.

        More usual: its features lie nearer to their mean. From 0.99 on a photo is unlike what was
        trained on.
        """
        if self.usual is None:
            raise ValueError("novelty needs remember(photos) of the training part first.")
        distances = self._distance(self._features(images, config))
        return np.searchsorted(self.usual["distances"], distances).clip(max=100) / 100

    def explain(self, image: Any, label: str, panorama: bool = False) -> np.ndarray:
        """Show where the model looks for a label, from 0 to 1, (H, W) in pixels of its input.

        The attention of the head (linear: the class activation map), see `overlay_heat_map`. Of a
        panorama, maps of halves stand side by side, (H, 2W), each as strong as its probability.
        """
        check_choice("label", label, self.labels)
        halves, index = panorama and self.view == "half", self.labels.index(label)
        views, _, problem = _Views([image], self.transform, panorama, halves)[0]
        if problem:
            raise OSError(problem)
        views = views.to(self.device)
        with torch.inference_mode():
            maps = _label_maps(self.model, views, index).cpu()
            probs = self.calibrate(to_probs(self.model(views), self.exclusive))[:, index]
        maps = F.interpolate(maps[:, None], views.shape[2:])[:, 0].numpy()
        maps = maps - maps.min((1, 2), keepdims=True)
        strength = probs / probs.max().clip(1e-12) / maps.max((1, 2)).clip(1e-12)
        return np.concatenate(list(maps * strength[:, None, None]), axis=1)


def _as_items(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple, pd.Series)):
        return [item for image in images for item in _as_items(image)]
    if isinstance(images, PathLike) and Path(images).is_dir():
        return list_images(images)
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim not in (2, 3)):
        raise TypeError(f"array {images.shape} {images.dtype}: expected (H, W, 3) of uint8.")
    if isinstance(images, PathLike | Image.Image | np.ndarray):
        return [images]
    raise TypeError(f"{type(images).__name__}: expected an image, an array, a path or a folder.")


def _check_labels(path: Path, given: list[str], wanted: list[str]) -> None:
    wrong = [(i, *pair) for i, pair in enumerate(zip(given, wanted), 1) if pair[0] != pair[1]]
    problem = "its label {} is {!r}, not {!r}".format(*wrong[0]) if wrong else ""
    if len(given) != len(wanted):
        problem = f"it knows {len(given)} labels, not the {len(wanted)} wanted"
    if problem:
        raise ValueError(f"{path}: {problem}; train on the same partitions to compare.")


def _check_description(content: dict) -> None:
    """Refuse a best_classifier.json that is broken or would reach outside its folder."""
    if (version := content["format_version"]) not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"format_version {version}, expected 1 to {FORMAT_VERSION}.")
    kinds = {str: "model_name head weights sha256 view activation interpolation combine"}
    kinds |= {list: "labels img_size thresholds panorama_thresholds mean std", bool: "flip"}
    kinds |= {dict: "model_kwargs head_kwargs", int: "num_labels rolls"}
    for kind, key in ((kind, key) for kind, keys in kinds.items() for key in keys.split()):
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}.")
    weights, labels = content["weights"], content["labels"]
    texts = {label for label in labels if isinstance(label, str)}
    numbers = [v for k in ("thresholds", "panorama_thresholds", "mean", "std") for v in content[k]]
    finite = all(type(v) in (int, float) and np.isfinite(v) for v in numbers)
    rgb = len(content["mean"]) == len(content["std"]) == 3
    sizes = [v for k, v in content["head_kwargs"].items() if k not in ("lam", "dropout")]
    sides = content.get("test_input_size", [3, *content["img_size"]])
    reaching = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    reaching &= content["model_kwargs"].keys() | content["head_kwargs"].keys()
    rules = {
        "weights must be a file name beside it": Path(weights).name == weights.replace("\\", "/"),
        f"{len(labels)} labels are not num_labels": len(labels) == content["num_labels"],
        "labels should be different texts": len(texts) == len(labels),
        "thresholds, mean and std should be numbers": finite,
        "mean and std should be three, std above 0": rgb and finite and min(content["std"]) > 0,
        "test_input_size should be [3, height, width], at most 8192 px": isinstance(sides, list)
        and len(sides) == 3
        and all(type(v) is int and 0 < v <= 8192 for v in sides),
        "head_kwargs should be whole numbers from 1 to 16384": all(
            v is None or type(v) is int and 0 < v <= 16_384 for v in sizes
        ),
        f"model_kwargs may not hold {brief(sorted(reaching))}": not reaching,
    }
    if wrong := [problem for problem, is_met in rules.items() if not is_met]:
        raise ValueError(f"{wrong[0]}.")


# ---------------------------------------------------------------- plots


def show_images(
    images: Sequence, titles: Sequence = (), columns: int = 4, width: float = 2.6, bar: str = ""
) -> plt.Figure:
    """Draw images (paths, PIL or arrays), each `width` inches wide, in a grid.

    `bar` names a colour bar of heat maps, see `overlay_heat_map`.
    """
    small = (384, 384)  # pixels: paths are decoded no larger than a grid can show
    pictures = [np.asarray(open_image(i, small) if isinstance(i, PathLike) else i) for i in images]
    given = [str(title).encode(errors="backslashreplace") for title in titles or [""] * len(images)]
    lines = [title.decode().splitlines() for title in given]  # Matplotlib draws no lone surrogates
    texts = ["\n".join(textwrap.fill(line, int(14 * width)) for line in parts) for parts in lines]
    rows = -(-len(pictures) // columns)
    height = 0.2 + 0.14 * (1 + max(text.count("\n") for text in texts))
    height += width * max(p.shape[0] / p.shape[1] for p in pictures)
    options = {"figsize": (columns * width, rows * height), "squeeze": False}
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, text in zip(axes.flat, pictures, texts):
        axis.imshow(picture)
        axis.set_title(text, fontsize=8)
    if bar:
        figure.colorbar(plt.cm.ScalarMappable(cmap="plasma"), ax=axes, label=bar, shrink=0.8)
    return figure


def show_predictions(part: DataPartition, probs: Array, cuts: Cuts, seed: int = 42) -> None:
    """Draw nine photos of a part; below each, of what is known, what is right, missed and wrong."""
    paths = part.paths
    shown = np.sort(np.random.default_rng(seed).permutation(len(paths))[:9])
    figure = show_images([paths[i] for i in shown], columns=3)
    figure.get_layout_engine().set(h_pad=0.28)  # inches: room for the lines below
    cells, reported = to_cells(part.targets, len(part.label_columns)), decide(probs, cuts)
    kinds = [("right", (cells >= 0.5) & reported, "tab:green")]
    kinds += [("missed", (cells >= 0.5) & ~reported, "chocolate")]
    kinds += [("wrong", (cells < 0.5) & reported, "tab:red")]
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    for i, axis in zip(shown, figure.axes):
        below = 3  # points
        for word, cells, color in kinds:
            if cells[i].any():
                names = ", ".join(itertools.compress(part.label_columns, cells[i]))
                text = textwrap.fill(f"{word}: {names}", 39)
                axis.annotate(text, (0, 0), (0, -below), color=color, fontsize=8, **place)
                below += 11 * (text.count("\n") + 1)


def to_picture(image: torch.Tensor, data_config: dict[str, Any]) -> Array:
    """Return a normalised photo (3, H, W) as (H, W, 3) from 0 to 1, in its real colours."""
    std, mean = (torch.tensor(data_config[key]).view(3, 1, 1) for key in ("std", "mean"))
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def overlay_heat_map(image: Any, heat_map: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Return a photo (H, W, 3) under a heat map from 0 to 1; `opacity` is that of a 1."""
    photo = open_image(image, (384, 384))
    cells = Image.fromarray(np.asarray(heat_map, np.float32))
    heat = np.asarray(cells.resize(photo.size, Image.Resampling.NEAREST))
    alpha = opacity * heat[..., None].astype(float)
    drawn = (1 - alpha) * np.asarray(photo, float) / 255 + alpha * plt.cm.plasma(heat)[..., :3]
    return np.rint(255 * drawn).astype(np.uint8)


def plot_intervals(
    names: Sequence[str], value: Any, low: Any, high: Any, axis: plt.Axes | None = None
) -> None:
    """Draw values with their intervals, a line per name, into `axis` or the current axes."""
    sides = np.stack([np.subtract(value, low), np.subtract(high, value)])
    axis = axis or plt.gca()
    axis.errorbar(value, names, xerr=sides.clip(0), fmt="o", color="tab:blue")


def plot_comparison(table: pd.DataFrame, most: int = 30) -> plt.Figure:
    """Draw the AP differences of `compare_scores` with 95 % intervals, those of all labels apart.

    Of more than `most` labels the ones that differ most, either way.
    """
    last = [name for name in ("top-1", "mAP") if name in table.index]
    labels = table["difference"].drop(last).sort_values().index
    labels = labels if len(labels) <= most else [*labels[: most // 2], *labels[-most // 2 :]]
    rows = table.loc[[*labels, *last]]
    figure, axis = plt.subplots(figsize=(6.5, 0.35 * len(rows) + 0.9), layout="constrained")
    plot_intervals(rows.index, rows["difference"], rows["low"], rows["high"], axis)
    axis.axvline(0, ls=":", color="grey")
    axis.axhline(len(labels) - 0.5, lw=0.5, color="grey")
    axis.set_xlabel("← baseline better   difference in AP, 95 % interval   this model better →")
    return figure


def plot_history(history: pd.DataFrame) -> plt.Figure:
    """Draw the losses and the validation score (top-1 accuracy or mAP), with the best epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    names = ["training", "validation"]
    history.plot("epoch", ["train_loss", "val_loss"], label=names, ylabel="loss", ax=left)
    score = "val_top1" if "val_top1" in history else "val_mAP"
    right.plot(history["epoch"], history[score], color="tab:green")
    best = history.loc[history[score].idxmax()]
    right.axvline(best["epoch"], ls=":", color="grey")
    right.set_title(f"best: {best[score]:.3f} in epoch {best['epoch']:.0f}")
    right.set(xlabel="epoch", ylabel=score.replace("val_", "validation ").replace("top1", "top-1"))
    return figure


def reliability(targets: Array, probs: Array) -> pd.DataFrame:
    """Return per tenth of probability what was said, what was true (95 %, Wilson), how often."""
    known = ~np.isnan(targets)
    cells = pd.DataFrame({"said": probs[known], "true": targets[known] >= 0.5}).astype(float)
    tenths = cells.groupby((cells["said"] * 10).astype(int).clip(upper=9))
    table = tenths.mean().assign(cells=tenths.size(), off=lambda t: (t["said"] - t["true"]).abs())
    tests = [binomtest(int(k), int(n)) for k, n in zip(tenths["true"].sum(), table["cells"])]
    ends = [test.proportion_ci(method="wilson") for test in tests]
    return table.assign(low=[end.low for end in ends], high=[end.high for end in ends])


def plot_reliability(tables: dict[str, pd.DataFrame]) -> plt.Figure:
    """Draw what `reliability` returns, titled with the expected calibration error."""
    size = 4 * len(tables), 3.4
    figure, axes = plt.subplots(1, len(tables), figsize=size, sharey=True, layout="constrained")
    for axis, (name, table) in zip(np.atleast_1d(axes), tables.items()):
        sides = np.stack([table["true"] - table["low"], table["high"] - table["true"]])
        axis.errorbar(table["said"], table["true"], yerr=sides.clip(0), fmt="o-")
        axis.plot([0, 1], [0, 1], ls="--", color="grey")
        error = np.average(table["off"], weights=table["cells"])
        axis.set(title=f"{name}: error {error:.3f}", xlabel="probability", ylabel="share present")
    return figure


def plot_answer(axis: plt.Axes, answer: pd.Series, labels: list[str], cuts: Array = ()) -> None:
    """Draw a line of `Classifier.predict`: bars, green where present, and the thresholds as ticks.

    Classes that exclude each other have no `cuts`.
    """
    colors = np.where(answer[labels] == 1, "seagreen", "lightgrey")
    probs = [float(answer[f"{label}_prob"]) for label in labels]
    axis.barh(labels, probs, color=colors)
    if len(cuts):
        axis.scatter(cuts, labels, color="black", marker="|", s=250)
    axis.invert_yaxis()  # the first label above, as in the tables
    axis.set(xlim=(0, 1), xlabel="probability; the tick is the threshold")


# ---------------------------------------------------------------- finishing and comparing runs


def finish_run(trainer: Trainer) -> Classifier:
    """Choose size and rules on validation, save best_classifier.json, load what was saved."""
    config, part = trainer.config, trainer.val_set
    probs, _ = choose_test_size(trainer)
    options = {"view": config.view, "flip": config.flip_test, "rolls": config.rolls}
    options["activation"] = "softmax" if config.loss == "ce" else "sigmoid"
    classifier = Classifier.from_validation(trainer.plain, part, probs, **options)
    answers = part.targets, classifier.calibrate(probs), classifier.cuts
    scores = summarize_scores(*answers, n_bootstrap=0)
    classifier.remember(trainer.loader.dataset.paths, config)
    path = classifier.save(trainer.run_dir, scores["value"].round(4).to_dict())
    return Classifier.load(path, part.label_columns)


def differing_settings(
    config: TrainConfig, model: nn.Module, other: TrainConfig, other_model: nn.Module
) -> pd.DataFrame:
    """Return a line for each setting, of training or of the model, that two runs do not share."""
    runs = [asdict(c) | m.spec | m.data_config for c, m in ((config, model), (other, other_model))]
    here, baseline = (json.loads(json.dumps(run)) for run in runs)  # tuples and lists alike
    names = [key for key in here | baseline if here.get(key) != baseline.get(key)]
    rows = [[str(here.get(name)), str(baseline.get(name))] for name in names]
    return pd.DataFrame(rows, names, ["here", "baseline"])


def compare_classifiers(
    one: Classifier, other: Classifier, part: DataPartition, config: TrainConfig
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return `compare_scores` of two classifiers on a part, and the probabilities of the first."""
    options, columns = (config.batch_size, config.num_workers), [f"{n}_prob" for n in one.labels]
    probs = [c.predict(part.paths, *options)[columns].to_numpy() for c in (one, other)]
    names = part.label_columns, part.groups
    return compare_scores(part.targets, *probs, *names, seed=config.seed), probs[0]


def describe_comparison(table: pd.DataFrame, name: str) -> str:
    """Say what `compare_scores` found of two heads, and nothing that it did not."""
    low, high = table[["low", "high"]].iloc[-1]  # of the mAP, or of classes the top-1 accuracy
    ahead = f"{name} is" if low > 0 else "the linear head is" if high < 0 else "neither head is"
    lines = [f"{n} {d:+.3f} ({a:+.3f} to {b:+.3f})" for n, _, _, d, a, b in table.itertuples()]
    labels = table.iloc[:-1].drop("mAP", errors="ignore").sort_values("difference")
    told = pd.Series(lines, table.index)[labels.index]
    worse = "; ".join(told[labels["high"] < 0][:10]) or "none"
    better = "; ".join(told[labels["low"] > 0][-10:]) or "none"
    told = f"Worse, interval below zero: {worse}.\nBetter, interval above zero: {better}."
    return f"{ahead} ahead on this test part, one seed: {lines[-1]}.\n{told}"


def plot_label_maps(
    classifiers: dict[str, Classifier], examples: Sequence[tuple[str, str]]
) -> plt.Figure:
    """Draw where each classifier (a row) looks for a label in a photo (a column), cell by cell."""
    pictures, titles = [], []
    for name, classifier in classifiers.items():
        answers = classifier.predict([path for path, _ in examples])
        for i, (path, label) in enumerate(examples):
            pictures.append(overlay_heat_map(path, classifier.explain(path, label)))
            titles.append(f"{name}\n{label} ({answers[f'{label}_prob'][i]:.2f})")
    bar = "strongest cell of each map = 1"
    return show_images(pictures, titles, columns=len(examples), width=1.9, bar=bar)


# ---------------------------------------------------------------- report

_PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width"><style>
body {font: 15px/1.5 sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em}
div {overflow-x: auto} table {border-collapse: collapse; font-size: 13px} img {max-width: 100%}
th, td {border-bottom: 1px solid #ddd; padding: 2px 9px} tbody th {text-align: left}
</style></head><body><h1>{{ title }}</h1>{% for heading, items in sections.items() %}
<h2>{{ heading }}</h2>{% for item in items %}{% if item is string %}<p>{{ item }}</p>
{% else %}<div>{{ draw(item)|safe }}</div>{% endif %}{% endfor %}{% endfor %}</body></html>"""


def _to_html(item: pd.DataFrame | plt.Figure) -> str:
    """Return a table (its texts escaped) or a figure, which is closed, as HTML on its own."""
    if isinstance(item, pd.DataFrame):
        return item.to_html(na_rep="–", border=0, float_format="{:.3f}".format)
    item.savefig(file := io.BytesIO(), format="jpeg", dpi=110)
    plt.close(item)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _report_data(parts: dict[str, pd.DataFrame], labels: list[str]) -> list:
    rows = pd.concat(parts, names=["part"]).reset_index("part").reset_index(drop=True)
    rows["panorama"] = rows["image_path"].map(panorama_name)
    counts = rows.groupby("part", sort=False)[["image_path", "group_id", "panorama"]].nunique()
    counts.columns = ["photos", "groups", "panoramas"]
    cells = [("present", lambda y: y >= 0.5), ("absent", lambda y: y < 0.5), ("unknown", pd.isna)]
    if CLASS in rows:
        table = pd.crosstab(rows[CLASS], rows["part"])[list(parts)]
    else:
        cell_counts = {(part, k): f(parts[part][labels]).sum() for part in parts for k, f in cells}
        table = pd.DataFrame(cell_counts)
    sizes = rows["image_path"].map(os.path.getsize)
    alike = rows[sizes.duplicated(keep=False)]  # only files of one size can be equal
    digests = alike["image_path"].map(sha256)
    twice = [alike.groupby(digests), rows.groupby("panorama")]
    twice = "{} equal files, {} panoramas".format(*(g["part"].nunique().gt(1).sum() for g in twice))
    below = os.path.relpath(os.path.commonpath([*map(os.path.abspath, rows["image_path"])]))
    source = f"Photos below {below}. In two parts: 0 groups,"
    said = f"{source} {twice}; near-duplicates are counted in partitioning.ipynb."
    return [said, counts, table]


def _report_training(config: TrainConfig, history: pd.DataFrame, about: dict[str, Any]) -> list:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    time = f"{history['epoch'].max():.0f} epochs in {history['seconds'].sum() / 60:.1f} minutes"
    said = f"{time}, seed {config.seed}. Python {sys.version.split()[0]}, {versions}."
    settings = {o.name: [str(getattr(config, o.name)), o.metadata["help"]] for o in fields(config)}
    table = pd.DataFrame.from_dict(settings, "index", columns=["value", "what it does"])
    return [said, plot_history(history), table]


def _report_scores(part: DataPartition, probs: Array, cut: Cuts, seed: int) -> list:
    scored = part.targets, probs
    table = score_labels(*scored, part.label_columns, cut, part.groups, seed=seed)
    few = ", ".join(table.index[table["note"] != ""]) or "no label"
    groups = pd.Series(part.groups, dtype=str)
    sites = {}
    for site, rows in groups.groupby(groups.str.split("/").str[0], sort=False).indices.items():
        draws = 500 if len(set(groups[rows])) > 1 else 0  # one group: no interval
        scores = summarize_scores(*(x[rows] for x in scored), cut, groups[rows], draws, seed)
        ends = scores.loc["mAP", ["low", "high"]].rename("mAP {}".format)
        sites[site] = pd.concat([pd.Series({"photos": len(rows)}), scores["value"], ends])
    said = f"Intervals of 95 % by a bootstrap of whole groups. Too few to judge: {few}."
    overall = summarize_scores(*scored, cut, part.groups, seed=seed)
    by_site = pd.DataFrame(sites).T.astype({"photos": int})
    return [said, overall, table.drop(columns="note"), "Site by site:", by_site]


def _report_mistakes(
    used: Classifier, part: DataPartition, probs: Array, reported: Array, most: int
) -> list:
    targets, probs = _as_scored(part.targets, probs)
    true = targets >= 0.5
    error = np.where(~np.isnan(targets) & (true != reported), np.abs(probs - true), 0)
    worst = np.argsort(-error, axis=None, kind="stable")[: min(most, np.count_nonzero(error))]
    rows, columns = np.unravel_index(worst, error.shape)
    pictures, titles = [], []
    paths = part.paths
    for i, j in zip(rows, columns):
        path, label = paths[i], part.label_columns[j]
        pictures += [path, overlay_heat_map(path, used.explain(path, label))]
        word = "missed" if true[i, j] else "wrongly reported"
        titles += [f"{label}: {word}\nprobability {probs[i, j]:.2f}", Path(path).stem]
    drawn = [show_images(pictures, titles, columns=4, width=2.4)] if pictures else []
    return ["Each photo, and beside it where the model looks for that label.", *drawn]


def _read_history(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
        score = "val_top1" if "val_top1" in table else "val_mAP"
        names = ("epoch", "train_loss", "val_loss", "seconds", score)
        table = table.astype(dict.fromkeys(names, float)).dropna(subset=score)
        if table.empty:
            raise ValueError("no finished epoch")
    except (KeyError, ValueError) as error:  # pandas' own errors and UnicodeDecodeError
        raise ValueError(f"{path}: no history.csv of a training ({first_line(error)}).") from None
    return table


def write_report(run_dir: PathLike, most: int = 8) -> Path:
    """Write RUN_DIR/report.html, one page that needs no other file: data, training, test, mistakes.

    All is read from the run's files and its partitions; the `most` surest mistakes are shown.
    """
    import jinja2

    run, path = Path(run_dir), Path(run_dir) / "report.html"
    config = TrainConfig.read(run / "config.json")
    parts, labels = load_parts(config.partition_dir)
    used, part = Classifier.load(run / "best_classifier.json", labels), parts["test"]
    history = _read_history(_need_file(run / "history.csv", "run training.ipynb to make it"))
    part = DataPartition(part, labels)
    table = used.predict(part.paths, config.batch_size, config.num_workers)
    probs, reported = table[[f"{n}_prob" for n in labels]].to_numpy(), table[labels] == 1
    dots = "Where dots lie on the dashed line, as many cells show the label as was said."
    tenths = reliability(*_as_scored(part.targets, probs))
    sections = {
        "Data": _report_data(parts, labels),
        "Training": _report_training(config, history, used.description),
        "Scores on the test part": _report_scores(part, probs, used.cuts, config.seed),
        "Do the probabilities come true?": [dots, plot_reliability({"test part": tenths})],
        "The surest mistakes": _report_mistakes(used, part, probs, reported.to_numpy(), most),
    }
    title = f"{run.name}: {config.model_name}, {used.model.spec['head']} head"
    page = jinja2.Template(_PAGE, autoescape=True)
    write_text(path, page.render(title=title, sections=sections, draw=_to_html))
    return path
