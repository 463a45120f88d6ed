"""Helpers that the 360° photo notebooks share: labels, partitions, models, training, scores.

The sections follow the data. Everything is importable at the top level and picklable, so that
DataLoader workers and launched processes can use it; copy this file beside a notebook of your own.

Shape letters: B batch, C channels, H height, W width, N images, L labels, G groups.
A label cell is 1 (present), 0 (absent), NaN (nobody judged it) or in between (soft target).
"""

import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import textwrap
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import safetensors.torch
import timm
import torch
import torchvision
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, broadcast, set_seed
from iterstrat.ml_stratifiers import IterativeStratification
from joblib import Parallel, delayed
from PIL import Image, ImageOps
from sklearn.decomposition import PCA
from sklearn.metrics import cohen_kappa_score, pairwise_distances_argmin_min, precision_recall_curve
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from timm.data import Mixup, resolve_model_data_config
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import resample_abs_pos_embed
from timm.loss import CLASS_WEIGHT_METHODS, compute_class_weights, create_classification_loss
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}
NOT_LABELS = ("image_path", "group_id")
VIEWS = ("half", "panorama")
PARTS = ("train", "val", "test")
SCHEDULES = ("cosine", "one-cycle", "flat-cosine", "step", "warm-restarts")
_NUMBER, _NOTHING = (int, float), type(None)
TUNABLE = {"LEARNING_RATE": _NUMBER, "WEIGHT_DECAY": _NUMBER, "LAYER_DECAY": (*_NUMBER, _NOTHING)}
TUNABLE |= {"BATCH_SIZE": int, "RAND_AUGMENT": (str, _NOTHING), "LOSS": str}
FORMAT_VERSION = 3  # 1 knew no "activation", 2 had its weights in a pickle
WEIGHTS = "model.safetensors"
Array = np.ndarray
Cuts = float | Sequence[float] | str
Groups = Sequence | None
_GRADE = re.compile(r"\s*(\d+)\s*-\s")
_HALF = re.compile(r"_(left|right)$")


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only if all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: str | os.PathLike, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _save_weights(model: nn.Module, path: Path) -> str:
    """Write a plain state dict on the CPU and return the sha256 of the file."""
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with replacing(path) as temporary:  # clones: tensors that share memory are refused
        safetensors.torch.save_file(weights, temporary)
        return hashlib.sha256(temporary.read_bytes()).hexdigest()


def _some(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _need_file(path: str | os.PathLike, fix: str) -> Path:
    """Return `path` if it is a file; `fix` ends the sentence that is raised otherwise."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; {fix}.")
    return Path(path)


def _bad_line(path: str | os.PathLike, number: int, problem: str) -> ValueError:
    return ValueError(f"{path}, line {number}: {problem}.")


def read_tuned(
    path: str | os.PathLike, head: str, network: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the parameters that tuning.ipynb found, by their names in the notebooks.

    Args:
        path: its best_parameters.json.
        head: "linear", "csra" or "mldecoder": the one they must have been found for.
        network: parameters that say what will be trained, e.g. MODEL_NAME; warns of each that was
            another in the search.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, another head, or a name or a value that cannot be in it.
    """
    path = _need_file(path, "run tuning.ipynb to make it")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        own, before = found.pop("HEAD"), dict(found.pop("found_with", {}))
        notebook = {"linear": "training", "csra": "csra", "mldecoder": "mldecoder"}[own]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path}: no best_parameters.json of tuning.ipynb.") from None
    if own != head:
        raise ValueError(f"{path}: found for HEAD={own!r}, not {head!r}; use {notebook}.ipynb.")
    unknown = sorted(found.keys() - TUNABLE.keys())
    if unknown:
        raise ValueError(f"{path}: {_some(unknown)} cannot be tuned; expected {_some(TUNABLE, 9)}.")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, TUNABLE[name]):
            raise ValueError(f"{path}: {name}={value!r} is no such value; run tuning.ipynb again.")
    now = json.loads(json.dumps(network or {}))  # tuples become lists, as in the file
    other = [name for name, value in now.items() if name in before and before[name] != value]
    if other:
        warnings.warn(f"{path}: found with another {_some(other)}; search again.", stacklevel=2)
    return found


def _check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}.")


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Return every image file below `folder`, sorted, without hidden, thumbnail and recycled ones.

    Links to folders are followed, each folder once and by its own path if it has one in `folder`.

    Raises:
        FileNotFoundError: `folder` does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the images.")
    unwanted = {"@eadir", "$recycle.bin", "recycler", "#recycle", "@recycle", "#snapshot"}
    unwanted |= {"@recently-snapshot", "__macosx", "system volume information", "lost+found"}
    found, seen, starts = [], set(), [folder]
    for start in starts:  # links are put at its end, so that real folders come first
        if start != folder and folder.resolve().is_relative_to(start.resolve()):
            continue  # a link back to where we come from
        for here, folders, files in ((Path(h), d, f) for h, d, f in os.walk(start)):
            shown = [n for n in folders if n[0] != "." and n.lower() not in unwanted]
            folders[:] = [] if here.resolve() in seen else shown
            if here.resolve() not in seen:
                seen.add(here.resolve())
                starts += sorted(here / name for name in shown if (here / name).is_symlink())
                found += [here / name for name in files if name[0] != "."]
    return sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


# ---------------------------------------------------------------- labels


def _parse_row(line: str, where: str) -> dict:
    """Return one row of a Labelbox v2 export, or say what is wrong with it."""
    hint = "expected a Labelbox v2 export: NDJSON, one row (a JSON object) a line"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5 000 digits
        raise ValueError(f"{where}: not JSON ({error}); {hint}.") from None
    if isinstance(row, list) or (isinstance(row, dict) and {"Labeled Data", "Label"} & set(row)):
        raise ValueError(f"{where}: this looks like a v1 or array export; {hint}. Export it again.")
    if not isinstance(row, dict) or not isinstance(row.get("projects"), dict):
        raise ValueError(f"{where}: no 'projects' object; {hint}.")
    data_row = row.get("data_row")
    name = data_row.get("external_id") if isinstance(data_row, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: data_row has no 'external_id'; expected the image's file name.")
    return row


def _walk_answers(
    items: list[dict], above: tuple | None = None, prefix: str = ""
) -> Iterator[tuple[str, str, tuple | None, dict, dict]]:
    """Yield (question, kind, above, item, answer) an answer; nested ones are "parent / child".

    `above` is None at the top and (question, option) below an option; any grade is option None.
    A text is an answer whose name is its content.
    """
    for item in items:
        question = prefix + item["name"]
        if "text_answer" in item:
            content = (item["text_answer"] or {}).get("content")
            yield question, "text", above, item, {"name": content}
        given = item.get("radio_answer") or item.get("checklist_answers") or []
        kind = "checklist" if "checklist_answers" in item else "radio"
        for answer in given if isinstance(given, list) else [given]:
            yield question, kind, above, item, answer
            option = None if _GRADE.match(answer["name"]) else answer["name"]
            below = question if option is None else f"{question} / {option}"
            nested = answer.get("classifications") or []
            yield from _walk_answers(nested, (question, option), f"{below} / ")


def _row_answers(row: dict) -> Iterator[dict]:
    """Yield the answers of one row: every project, every annotator; at least one record a row."""
    data_row = row["data_row"]
    base = {"image": data_row["external_id"], "data_row_id": data_row.get("id")}
    base |= dict.fromkeys(["project", "annotator", "label_id"]) | {"judged": False}
    base |= dict.fromkeys(["question", "kind", "answer"])
    if not any(project.get("labels") for project in row["projects"].values()):
        yield base
    for project_id, project in row["projects"].items():
        for number, label in enumerate(project.get("labels") or []):
            annotator = (label.get("label_details") or {}).get("created_by")
            skipped = bool((label.get("performance_details") or {}).get("skipped"))
            key = {"project": project.get("name") or project_id, "annotator": annotator}
            key |= {"label_id": label.get("id") or f"{project_id}-{number}", "judged": not skipped}
            classifications = label.get("annotations", {}).get("classifications") or []
            walked = [] if skipped else _walk_answers(classifications)
            answers = [{"question": q, "kind": k, "answer": a["name"]} for q, k, _, _, a in walked]
            yield from (base | key | answer for answer in answers or [{}])


def _checked_answers(row: dict, where: str) -> list[dict]:
    try:
        answers = list(_row_answers(row))
        wrong = [v for a in answers for v in a.values() if not isinstance(v, str | bool | None)]
        if wrong:
            raise TypeError(f"text instead of {wrong[0]!r}")
    except (AttributeError, KeyError, TypeError) as error:
        hint = "expected the classifications of a Labelbox v2 export"
        raise ValueError(f"{where}: an answer lacks {error}; {hint}.") from None
    return answers


def read_labelbox(
    path: str | os.PathLike,
    problematic: str = "drop",
    flags: Sequence[str] = ("Problematic", "Revisit"),
) -> pd.DataFrame:
    """Read a Labelbox v2 NDJSON export as annotated, one line an answer.

    A question with any option like "1 - Definitely" is graded and is one label; its other options
    ("Foreground") only describe it. An ungraded question gives one label an option, named
    "question / option". Texts and `flags` are no labels.

    Args:
        path: the export, one JSON object a line.
        problematic: "drop" leaves out images that carry the first of `flags`, "keep" keeps them.
        flags: radio questions about the photo itself.

    Returns:
        Columns image, data_row_id, project, annotator, label_id, judged, question, kind, answer,
        grade (1 = most certain, NaN if ungraded) and label, a categorical whose categories are the
        vocabulary over all rows in order of first appearance. An image that nobody labelled has
        one line with judged = False. `.attrs["report"]` counts and lists rows, duplicates,
        unlabelled and skipped images, problematic images and answers without a grade.

    Raises:
        ValueError: the file or a line is no v2 export; names file, line and what was expected.
    """
    _check_choice("problematic", problematic, ("drop", "keep"))
    records, images = [], []
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = _parse_row(line, f"{path}, line {number}")
                images.append(row["data_row"]["external_id"])
                records += _checked_answers(row, f"{path}, line {number}")
    if not records:
        raise ValueError(f"{path}: no rows; expected a Labelbox v2 export, one JSON object a line.")
    answers = pd.DataFrame(records).drop_duplicates(ignore_index=True)
    images = pd.Series(images)
    duplicates = images[images.duplicated()].tolist()
    return _name_labels(answers, duplicates, problematic, flags)


def _name_labels(
    answers: pd.DataFrame, duplicates: list[str], problematic: str, flags: Sequence[str]
) -> pd.DataFrame:
    answers["grade"] = answers["answer"].astype("string").str.extract(_GRADE)[0].astype(float)
    option = answers["question"] + " / " + answers["answer"]
    graded = answers.groupby("question")["grade"].transform("count").fillna(0) > 0
    label = answers["question"].where(graded, option)
    label[(answers["kind"] == "text") | answers["question"].isin(flags)] = None
    answers["label"] = pd.Categorical(label, categories=label.dropna().unique())
    key = ["image", "label_id", "label"]
    ungraded = graded & (answers.groupby(key, observed=True)["grade"].transform("count") == 0)
    judged = answers.groupby("image", sort=False)["judged"].any()
    bad = answers.loc[answers["question"].isin(flags[:1]), "image"].unique()
    report = {
        "images": len(judged),
        "duplicated": duplicates,
        "unlabelled": judged.index[~judged].tolist(),
        "problematic": list(bad),
        "without a grade": sorted(answers.loc[ungraded, "image"].unique()),
    }
    if problematic == "drop":
        answers = answers[~answers["image"].isin(bad)].reset_index(drop=True)
    answers.attrs["report"] = report
    return answers


def to_targets(
    answers: pd.DataFrame,
    positive_max: int = 3,
    unanswered: str = "absent",
    soft: dict[int, float] | None = None,
    hard: bool = False,
) -> pd.DataFrame:
    """Turn annotated answers into targets.

    Args:
        answers: what `read_labelbox` returns.
        positive_max: grades 1..positive_max are present, a lower certainty is absent.
        unanswered: what an unticked question means where somebody labelled the image in a project
            that asks it: "absent" (0) or "unknown" (NaN).
        soft: soft target a grade, e.g. {1: 1.0, 2: 0.9, 3: 0.6}; None gives 1.
        hard: decide by the mean certainty: with `soft`, 1 where the mean over the annotators is
            0.5 or more, else 0. False keeps the mean, and so any disagreement, as soft target.

    Returns:
        `image` and one column a label: 1, 0, NaN (unknown) or soft. Several annotators are
        averaged; without `soft` the majority decides and a tie counts as present. An image that
        nobody labelled, or an answer that lacks its grade, is unknown.
    """
    _check_choice("unanswered", unanswered, ("absent", "unknown"))
    vocabulary = answers["label"].cat.categories
    key = ["image", "project", "label_id"]
    given = answers[answers["judged"] & answers["label"].notna()].copy()
    graded = given["label"].astype(str) == given["question"]
    grade = given["grade"].where(graded, 1)
    present = grade.between(1, positive_max)
    lacking = sorted(set(grade[present]) - set(soft or grade))
    if lacking:
        raise ValueError(f"soft={soft}: no target for grade {_some(lacking)}.")
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


def _pair_agreement(counts: np.ndarray) -> float:
    """Return the mean over images of the share of agreeing pairs of raters; counts (N, K)."""
    n = counts.sum(1)
    return ((counts * (counts - 1)).sum(1) / (n * (n - 1))).mean()


def _fleiss_kappa(counts: np.ndarray) -> float:
    """Return Fleiss' kappa, (P - Pe) / (1 - Pe), of how many raters chose each category.

    P is the mean over the images of P_i = sum_j n_ij (n_ij - 1) / (n_i (n_i - 1)), the share of
    agreeing pairs of raters, and Pe = sum_j p_j² with p_j the share of category j in all
    judgements (Fleiss, Psychological Bulletin 76(5), 1971). With the image's own n_i in place of
    Fleiss' fixed n, images may have different numbers of raters.

    Args:
        counts: (N, K), images by categories; every image has at least 2 raters.

    Returns:
        1 for perfect agreement, 0 for chance; NaN if only one category was ever chosen.
    """
    counts = np.asarray(counts, float)
    observed = _pair_agreement(counts)
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def annotator_agreement(
    answers: pd.DataFrame, positive_max: int = 3, unanswered: str = "absent"
) -> pd.DataFrame:
    """Say how far annotators agree on which images show each label.

    Each annotator's answers are read as `to_targets` reads them; unknown cells are no judgement.
    Answers without an annotator count as one annotator a label record.

    Args:
        answers: what `read_labelbox` returns.
        positive_max, unanswered: as in `to_targets`. With "unknown" an unticked box is no
            judgement, so agreement on absence is not seen.

    Returns:
        A line a label: label; images, judged by 2 or more; annotators among them; agreement, the
        mean share of agreeing pairs of annotators an image; statistic and kappa. Exactly two
        annotators give Cohen's kappa (Educational and Psychological Measurement 20, 1960), more
        give Fleiss' (Psychological Bulletin 76, 1971; images may differ in their annotators).
        No image judged twice, or all judgements alike, gives NaN.
    """
    record = answers.groupby("image")["label_id"].transform(lambda ids: pd.factorize(ids)[0])
    annotator = answers["annotator"].fillna("annotator " + record.astype(str))
    pairs = pd.MultiIndex.from_arrays([answers["image"], annotator])
    code, pairs = pairs.factorize()
    each = to_targets(answers.assign(image=code), positive_max, unanswered).set_index("image")
    each = each.set_axis(pairs[each.index])
    tables = {label: cells.unstack() for label, cells in each.items()}  # noqa: PD010 (a Series)
    return pd.DataFrame([_agree(label, judged) for label, judged in tables.items()])


def _agree(label: str, judged: pd.DataFrame) -> dict:
    """Return the line of one label; judged (images, annotators) is 1, 0 or NaN."""
    judged = judged[judged.count(axis=1) >= 2].dropna(axis=1, how="all")
    counts = np.stack([judged.eq(0).sum(axis=1), judged.eq(1).sum(axis=1)], axis=1)
    line = {"label": label, "images": len(judged), "annotators": judged.shape[1]}
    line |= {"agreement": np.nan, "statistic": None, "kappa": np.nan}
    if len(judged):
        line["agreement"] = _pair_agreement(counts)
        line["statistic"] = "Cohen" if judged.shape[1] == 2 else "Fleiss"
        if counts.any(0).all():
            both = judged.to_numpy().T
            line["kappa"] = cohen_kappa_score(*both) if len(both) == 2 else _fleiss_kappa(counts)
    return line


def _read_table(path: str | os.PathLike) -> pd.DataFrame:
    """Read a CSV as stripped text; its index is the line in the file less 2."""
    text = {"dtype": str, "header": None, "keep_default_na": False, "skip_blank_lines": False}
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", **text).fillna("")
    except ValueError as error:  # pandas' own errors and UnicodeDecodeError
        problem = f"no CSV with a header, a label column and equal rows ({str(error).strip()})."
        raise ValueError(f"{path}: {problem}") from None
    table = table.apply(lambda column: column.str.strip())
    names = table.iloc[0].tolist()
    if len(set(names)) < len(names) or "" in names[1:]:
        raise ValueError(f"{path}: line 1 has a column without a name or twice: {_some(names)}.")
    table = table.iloc[1:].set_axis(names, axis=1).reset_index(drop=True)
    return table[(table != "").any(axis=1)]


def _parse_cells(cells: pd.DataFrame, path: str | os.PathLike, soft: bool) -> pd.DataFrame:
    """Turn text into 1, 0, NaN (empty) and, if `soft`, values between."""
    values = cells.apply(pd.to_numeric, errors="coerce")
    good = ((values >= 0) & (values <= 1)) if soft else values.isin([0, 1])
    rows, columns = np.nonzero((~good & (cells != "")).to_numpy())
    if len(rows):
        places = [
            (cells.index[r] + 2, cells.columns[c], cells.iloc[r, c]) for r, c in zip(rows, columns)
        ]
        found = [f"line {line}, {column}: {cell!r}" for line, column, cell in places]
        expected = "0 to 1" if soft else "0, 1"
        raise ValueError(f"{path}: expected {expected} or an empty cell, found {_some(found)}.")
    return values.astype(float)


def read_csv_labels(
    path: str | os.PathLike, unlisted: str = "unknown", keep: Sequence[str] = ()
) -> pd.DataFrame:
    """Read labels from a CSV: one 0/1 column a label, or `filename, "desert,mountains"` lists.

    Args:
        path: the CSV; its first column, whatever its name, holds the image file names.
        unlisted: for lists, what an empty list means: "unknown" or "absent" for every label.
        keep: columns that are no labels, e.g. the site to group by; kept as text.

    Returns:
        `image`, the columns to keep, and one column a label: 1, 0 or NaN (empty cell: nobody
        judged it).

    Raises:
        ValueError: a value outside 0/1/empty, a file name twice, or no label column; with line.
    """
    _check_choice("unlisted", unlisted, ("unknown", "absent"))
    table = _read_table(path)
    if table.shape[1] < 2:
        raise ValueError(f"{path}: expected a file name column and at least one label column.")
    names = table.iloc[:, 0].rename("image")
    for problem, what in [(names == "", "no file name"), (names.duplicated(), "file name twice")]:
        if problem.any():
            lines = [f"line {i + 2}: {names[i]!r}" for i in names.index[problem]]
            raise ValueError(f"{path}: {what}, expected one row an image: {_some(lines)}.")
    if set(keep) - set(table.columns):
        raise ValueError(f"{path}: no column {_some(set(keep) - set(table.columns))} to keep.")
    cells = table.iloc[:, 1:].drop(columns=list(keep))
    if cells.shape[1] == 1 and _holds_lists(cells.iloc[:, 0]):
        labels = _split_lists(cells.iloc[:, 0], unlisted)
    else:
        labels = _parse_cells(cells, path, soft=False)
    return pd.concat([names, table[list(keep)], labels], axis=1).reset_index(drop=True)


def _holds_lists(cells: pd.Series) -> bool:
    return (cells != "").any() and pd.to_numeric(cells, errors="coerce").isna().all()


def _split_lists(cells: pd.Series, unlisted: str) -> pd.DataFrame:
    """Turn "desert,mountains" cells into one 0/1 column a label, in order of first appearance."""
    joined = cells.str.replace(r"\s*[,;|]\s*", "|", regex=True)
    names = pd.unique(joined.str.split("|").explode())
    labels = joined.str.get_dummies("|").astype(float)[[name for name in names if name]]
    return labels.mask(cells == "") if unlisted == "unknown" else labels


def read_class_folders(
    root: str | os.PathLike, names_path: str | os.PathLike | None = None
) -> pd.DataFrame:
    """Read `root/<class>/*.jpg`, or ImageNet's `root/train/<class>/` and `root/val/<class>/`.

    Args:
        root: with `train/` and `val/` in it, only these two are read.
        names_path: says what folder names mean, a line a class: `n01440764 tench, Tinca tinca`
            (ImageNet's LOC_synset_mapping.txt); the words up to the first comma name the class.

    Returns:
        `image` (path below root) and one column a class: 1 in its own folder, else 0.

    Raises:
        ValueError: no class folder holds an image, one of them holds none, val/ has a class that
            train/ lacks, or `names_path` leaves a class out.
    """
    root = Path(root)
    is_split = _is_split(root)
    parts = [root / "train", root / "val"] if is_split else [root]
    found = [(part, path.relative_to(part)) for part in parts for path in list_images(part)]
    loose = [part / path for part, path in found if len(path.parts) == 1]
    found = [(part, path) for part, path in found if len(path.parts) > 1]
    empty = sorted(set(parts) - {part for part, _ in found})
    if empty:
        raise ValueError(
            f"{empty[0]}: no images in class folders; expected {empty[0]}/<class>/*.jpg."
        )
    if loose and is_split:  # without train/ and val/ they are photos that nobody sorted yet
        problem = f"{len(loose)} images lie in no class folder and are left out"
        warnings.warn(f"{root}: {problem}: {_some(loose)}.", stacklevel=2)
    classes = pd.Series([path.parts[0] for _, path in found])
    _check_class_folders(parts, {(part, path.parts[0]) for part, path in found})
    folders = sorted(set(classes))
    names = _class_names(names_path, folders) if names_path else dict(zip(folders, folders))
    classes = classes.map(names)
    taken = sorted({"image", *NOT_LABELS} & set(classes))
    if taken:
        raise ValueError(f"{root}: {taken[0]!r} is the name of a column; rename that class.")
    images = [(part / path).relative_to(root).as_posix() for part, path in found]
    labels = pd.get_dummies(classes, dtype=float)
    labels = labels[list(names.values())]  # in the order of the folders
    return pd.concat([pd.Series(images, name="image", dtype=object), labels], axis=1)


def _is_split(root: Path) -> bool:
    """Say whether there are train/ and val/, refuse one of them alone with classes in it."""
    there = [name for name in ("train", "val") if (root / name).is_dir()]
    if len(there) == 1:
        inside = [path.relative_to(root) for path in list_images(root)]
        if inside and all(p.parts[0] == there[0] and len(p.parts) > 2 for p in inside):
            problem = f"expected train/ and val/ in it, found {there[0]}/ alone"
            raise ValueError(f"{root}: {problem}; add the other, or read {root / there[0]}.")
    return len(there) == 2


def _check_class_folders(parts: Sequence[Path], filled: set[tuple[Path, str]]) -> None:
    """Refuse empty class folders and untrained classes; `filled` has (part, class) with images."""
    folders = [p for part in parts for p in sorted(part.iterdir()) if p.is_dir()]
    empty = [p for p in folders if p.name[0] != "." and (p.parent, p.name) not in filled]
    if empty:
        fix = "add photos (links are not followed), or delete the folder if the class is not wanted"
        raise ValueError(f"{_some(empty)}: a class folder without images; {fix}.")
    untrained = sorted({name for _, name in filled if (parts[0], name) not in filled})
    if untrained:
        problem = f"holds classes that {parts[0]} lacks: {_some(untrained)}"
        raise ValueError(f"{parts[-1]}: {problem}; a class must be trained to be tested.")


def _class_names(path: str | os.PathLike, folders: Sequence[str]) -> dict[str, str]:
    """Return folder name → words; words that two classes share are told apart by the folder."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        expected = "expected a text file (UTF-8) with a line `folder words` a class"
        raise ValueError(f"{path}: {expected}, {type(error).__name__}.") from None
    found: dict[str, set[str]] = {folder: set() for folder in folders}
    longest = sorted(folders, key=len, reverse=True)  # "sand dry" before "sand"
    for line in map(str.strip, lines):
        own = [f for f in longest if line == f or (line.startswith(f) and line[len(f)] in " \t,;")]
        if own:
            words = line[len(own[0]) :].lstrip(" \t,;").lstrip('"').split(",")[0]
            found[own[0]].add(words.strip(' \t"'))
    missing = [folder for folder, words in found.items() if not words - {""}]
    if missing:
        fix = "add one `folder words` each, or give no names"
        raise ValueError(f"{path}: no line with words for {_some(missing)}; {fix}.")
    several = [folder for folder, words in found.items() if len(words) > 1]
    if several:
        raise ValueError(
            f"{path}: lines that contradict each other for {_some(several)}; keep one."
        )
    words = {folder: next(iter(words)) for folder, words in found.items()}
    count = pd.Series(words).value_counts()
    names = {f: w if count[w] == 1 else f"{w} ({f})" for f, w in words.items()}
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two classes would be called {_some(twice)}; name one otherwise.")
    return names


def _without_suffix(name: str) -> str:
    path = Path(name)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def panorama_name(path: str | os.PathLike) -> str:
    """Return the path of a photo without suffix and side; the halves of a panorama share it."""
    return _HALF.sub("", _without_suffix(str(path)))


def combine_halves(targets: pd.DataFrame) -> pd.DataFrame:
    """Combine the rows of NAME_left and NAME_right into one row NAME of the whole panorama.

    Present if in either half; unknown if neither says present and one is unknown or missing.
    """
    stem = targets["image"].map(_without_suffix)
    is_half = stem.str.endswith(("_left", "_right"))
    panorama = targets["image"].map(panorama_name)
    labels = targets.select_dtypes(["number", "bool"]).columns
    by = targets.drop(columns="image").astype(dict.fromkeys(labels, float))
    by = by.groupby(panorama, sort=False)
    combined = by.first()
    enough = by[labels].count().ge(1 + is_half.groupby(panorama, sort=False).any(), axis=0)
    combined[labels] = by[labels].max().where(lambda highest: (highest >= 0.5) | enough)
    return combined.reset_index()


def attach_images(
    targets: pd.DataFrame,
    image_dir: str | os.PathLike,
    group_by: str | int = "panorama",
    missing: str = "raise",
) -> pd.DataFrame:
    """Find each labelled image below a folder, by file name, and give it a group.

    Args:
        targets: `image` (a file name, a path below the folder, or either without its suffix) and
            label columns.
        image_dir: searched with all its sub-folders.
        group_by: "panorama" (both halves together), the number of leading folders that make a
            group (1: site, 2: site and day), or the name of a column of `targets`.
        missing: "raise", or "skip" to leave images out; `.attrs["missing"]` then lists them.

    Returns:
        `image_path`, `group_id` and the label columns.

    Raises:
        FileNotFoundError: images are not there.
        ValueError: a name fits several files, a name occurs twice, or `group_by` does not apply.
    """
    _check_choice("missing", missing, ("raise", "skip"))
    image_dir = Path(image_dir)
    matches = _find_images(targets["image"], image_dir)
    several = [f"{name} ({_some(m, 3)})" for name, m in zip(targets["image"], matches) if m[1:]]
    if several:
        raise ValueError(
            f"{image_dir}: {len(several)} image names fit several files, give paths below"
            f" the folder: {_some(several)}."
        )
    lost = targets.loc[matches.map(len) == 0, "image"].tolist()
    if lost and (missing == "raise" or len(lost) == len(targets)):
        raise FileNotFoundError(
            f"{image_dir}: {len(lost)} of {len(targets)} labelled images are not there:"
            f" {_some(lost)}. Check the folder, or use missing='skip' to leave them out."
        )
    kept = targets[matches.map(len) == 1]
    paths = matches[kept.index].str[0]
    if paths.duplicated().any():
        raise ValueError(f"{image_dir}: labelled twice: {_some(paths[paths.duplicated()])}.")
    found = pd.DataFrame({"image_path": paths.map(lambda p: (image_dir / p).as_posix())})
    found["group_id"] = _group_ids(kept, paths, group_by)
    columns = [c for c in kept.columns if c not in ("image", group_by)]
    found = pd.concat([found, kept[columns]], axis=1).reset_index(drop=True)
    found.attrs["missing"] = lost
    return found


def _find_images(images: pd.Series, image_dir: Path) -> pd.Series:
    """Return for each image name the files it fits, relative to `image_dir`."""
    by_name: dict[str, list[Path]] = {}
    for path in list_images(image_dir):
        for name in {path.name, path.stem}:
            by_name.setdefault(name, []).append(path.relative_to(image_dir))

    def fitting(image: str) -> list[Path]:
        folders = Path(image).parts[:-1]
        found = by_name.get(Path(image).name, [])
        return [p for p in found if p.parts[-len(folders) - 1 : -1] == folders]

    return images.map(fitting)


def _panorama_groups(paths: pd.Series) -> pd.Series:
    """Return the panorama of each path, also where class folders lie between its two halves."""
    panorama = paths.map(lambda p: Path(panorama_name(p)).as_posix())
    file = paths.map(lambda p: _without_suffix(p.name))
    name = file.map(panorama_name)
    # a half whose other one lies elsewhere; two left ones of a name are of two panoramas
    alone = (file != name) & ~panorama.duplicated(keep=False) & ~file.duplicated(keep=False)
    return panorama.mask(alone & name.map(name[alone].value_counts()).eq(2), name)


def _group_ids(targets: pd.DataFrame, paths: pd.Series, group_by: str | int) -> pd.Series:
    if isinstance(group_by, str) and group_by in targets.columns:
        return targets[group_by].astype(str)
    if group_by == "panorama":
        return _panorama_groups(paths)
    if not isinstance(group_by, int) or group_by < 1:
        wanted = f"'panorama', a number of folders or a column of {_some(targets.columns)}"
        raise ValueError(f"group_by={group_by!r}: expected {wanted}.")
    shallow = [p for p in paths if len(p.parts) <= group_by]
    if shallow:
        problem = f"{len(shallow)} images lie less than {group_by} folders deep: {_some(shallow)}"
        raise ValueError(f"group_by={group_by}: {problem}.")
    return paths.map(lambda p: "/".join(p.parts[:group_by]))


# ---------------------------------------------------------------- back to Labelbox


def _read_questions(path: str | os.PathLike) -> tuple[dict[str, set], dict[str, dict]]:
    """Return the data rows by name, and each question with the options that the export holds."""
    rows, questions = {}, {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        where, line = f"{path}, line {number}", line.decode("utf-8-sig", "replace")
        if not line.strip():
            continue
        row = _parse_row(line, where)
        _checked_answers(row, where)
        key = next((k for k in ("global_key", "id") if row["data_row"].get(k)), None)
        if not key:
            raise ValueError(f"{where}: data_row has no 'id' or 'global_key'; export it again.")
        names = [row["data_row"]["external_id"], row["data_row"].get("global_key")]
        for name in dict.fromkeys(name for name in names if name):
            found = "globalKey" if key == "global_key" else "id", row["data_row"][key]
            rows.setdefault(name, set()).add(found)
        for label in (label for p in row["projects"].values() for label in p.get("labels") or []):
            items = label.get("annotations", {}).get("classifications") or []
            for question, kind, above, item, answer in _walk_answers(items):
                fresh = {"kind": kind, "above": above, "item": item, "options": {}}
                node = questions.setdefault(question, fresh)
                if (node["kind"], node["above"]) != (kind, above):
                    problem = f"{question!r} is asked as {node['kind']} and as {kind}"
                    raise ValueError(f"{where}: {problem}; export one project at a time.")
                if kind != "text":
                    node["options"].setdefault(answer["name"], answer)
    for question, node in questions.items():
        grades = [(int(found[1]), o) for o in node["options"] if (found := _GRADE.match(o))]
        node["grades"] = dict(reversed(grades))  # the first option of a grade wins
        whole = grades or node["kind"] == "text"
        options = {question: None} if whole else {f"{question} / {o}": o for o in node["options"]}
        node["labels"] = options
    return rows, questions


def _choose(node: dict, cells: dict, threshold: float, floors: dict, absent: int | None) -> dict:
    """Return {option: (confidence, is present)} for a question that is no text."""
    chosen = {}
    for label, option in node["labels"].items():
        value = cells.get(label)
        if pd.isna(value):
            continue
        prob, present = cells.get(f"{label}_prob", value), value >= threshold
        if option is None and present:
            wanted = min((g for g, floor in floors.items() if prob >= floor), default=max(floors))
            nearest = min(set(node["grades"]) & set(floors), key=lambda g: (abs(g - wanted), -g))
            chosen[node["grades"][nearest]] = prob, True
        elif option is None and absent in node["grades"]:
            chosen[node["grades"][absent]] = 1 - prob, False
        elif option is not None and present:
            chosen[option] = prob, True
    if node["kind"] == "radio" and chosen:
        best = max(chosen, key=lambda option: chosen[option][0])
        return {best: chosen[best]}
    return chosen


def _answers(
    questions: dict[str, dict], above: tuple | None, cells: dict, by: str, *rule
) -> Iterator[tuple[str, dict]]:
    """Yield (question, its import object) for the questions right below `above`."""

    def named(feature: dict) -> dict:
        schema_id = feature.get("feature_schema_id") if by == "schemaId" else None
        return {"schemaId": schema_id} if schema_id else {"name": feature["name"]}

    for question, node in questions.items():
        if node["above"] != above:
            continue
        if node["kind"] == "text":
            if not pd.isna(cells.get(question)):
                yield question, named(node["item"]) | {"answer": str(cells[question])}
            continue
        given = []
        for option, (confidence, present) in _choose(node, cells, *rule).items():
            answer = named(node["options"][option]) | {"confidence": round(float(confidence), 6)}
            below = question, None if _GRADE.match(option) else option
            nested = _answers(questions, below, cells, by, *rule) if present else ()
            nested = [child for _, child in nested]
            given.append(answer | ({"classifications": nested} if nested else {}))
        if given:
            content = given if node["kind"] == "checklist" else given[0]
            yield question, named(node["item"]) | {"answer": content}


def _match_rows(images: pd.Series, rows: dict[str, set], path: str | os.PathLike) -> list[tuple]:
    """Return ("globalKey" or "id", value) of each image, by its name or its file name."""
    images = images.astype(str)
    found = [rows.get(name) or rows.get(Path(name).name) or set() for name in images]
    keys = pd.Series([tuple(sorted(keys)) for keys in found], index=images.index)
    for problem, what in [
        (keys.map(len) == 0, "not in the export, leave them out or export them as well"),
        (keys.map(len) > 1, "several data rows of one name, give their global keys as image"),
        (keys.duplicated(), "predicted twice, expected one row an image"),
    ]:
        if problem.any():
            raise ValueError(f"{path}: {what}: {_some(images[problem])}.")
    return [key[0] for key in keys]


def _check_cells(
    predictions: pd.DataFrame, questions: dict[str, dict], floors: dict, path: str | os.PathLike
) -> None:
    nodes = {label: node for node in questions.values() for label in node["labels"]}
    nodes = {c: n for c, n in nodes.items() if not n["grades"] or set(n["grades"]) & set(floors)}
    columns = [c for c in predictions if c != "image" and c.removesuffix("_prob") not in nodes]
    unknown = [column for column in columns if column not in nodes]
    if unknown:
        hint = "drop or rename them"
        raise ValueError(f"{path}: no answer shows the labels {_some(unknown)}; {hint}.")
    for column in [c for c in predictions if c != "image"]:
        if nodes.get(column, nodes.get(column.removesuffix("_prob")))["kind"] == "text":
            continue
        values = pd.to_numeric(predictions[column], errors="coerce")
        wrong = predictions[predictions[column].notna() & ~values.between(0, 1)]
        for image, value in zip(wrong["image"], wrong[column]):
            problem = f"{column}={value!r}, expected 0 to 1, or NaN for unknown"
            raise ValueError(f"predictions of {image}: {problem}.")


def write_labelbox(
    predictions: pd.DataFrame,
    export_path: str | os.PathLike,
    path: str | os.PathLike,
    threshold: float = 0.5,
    grade_floors: dict[int, float] | None = None,
    absent: int | None = 0,
    by: str = "name",
) -> int:
    """Write predictions as pre-labels that Labelbox imports, one question (a JSON object) a line.

    A present label is answered with its option, or, where the question is graded, with the most
    certain grade whose floor its probability reaches; of a grade that the export never uses, with
    the nearest one it does (the less certain of two). An absent label is no answer, except where
    its question has an option of grade `absent`, whose confidence is 1 - probability. NaN writes
    nothing. A radio question takes its most probable present option. A nested answer is written
    only below a present answer, as Labelbox cannot hold it elsewhere. Descriptive options of a
    graded question ("Foreground") are never answered.

    Args:
        predictions: `image` (external id, global key, or a path that ends in one) and a column a
            label, named as `read_labelbox` names it: a probability, 0 or 1, or NaN. Where
            LABEL_prob stands beside LABEL, as in `Classifier.predict`, LABEL decides and
            LABEL_prob is the confidence. A column named like a text question holds texts.
        export_path: the Labelbox v2 export that the labels were read from; it gives the data rows
            and says which question and option a label is.
        path: the NDJSON file to write; the same input gives the same bytes.
        threshold: a label is present from this value on.
        grade_floors: the least probability of each grade; None takes {1: 0.9, 2: 0.7, 3: 0.0}.
        absent: the grade that means absent; None never answers an absent label.
        by: "name" fits any project that asks these questions; "schemaId" only the exported one.

    Returns:
        The number of lines.

    Raises:
        ValueError: an image that the export does not hold, holds several times, or that is
            predicted twice; a column that is no label; a value outside 0..1; no v2 export.
    """
    _check_choice("by", by, ("name", "schemaId"))
    if "image" not in predictions.columns:
        raise ValueError("predictions: no column 'image'; expected image and one column a label.")
    floors = grade_floors or {1: 0.9, 2: 0.7, 3: 0.0}
    rows, questions = _read_questions(export_path)
    keys = _match_rows(predictions["image"], rows, export_path)
    _check_cells(predictions, questions, floors, export_path)
    lines = []
    for key, cells in zip(keys, predictions.to_dict("records")):
        for question, found in _answers(questions, None, cells, by, threshold, floors, absent):
            name = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([*key, question]))
            lines.append(found | {"dataRow": dict([key]), "uuid": str(name)})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return len(lines)


def _walk_import(items: list[dict], names: dict[str, str], prefix: str = "") -> Iterator[dict]:
    """Yield each answer of import objects as {question, kind, answer, confidence}."""
    for item in items:
        question, given = prefix + (item.get("name") or names[item["schemaId"]]), item["answer"]
        if isinstance(given, str):
            yield {"question": question, "kind": "text", "answer": given, "confidence": None}
            continue
        kind = "checklist" if isinstance(given, list) else "radio"
        for answer in given if isinstance(given, list) else [given]:
            option = answer.get("name") or names[answer["schemaId"]]
            base = {"question": question, "kind": kind, "answer": option}
            yield base | {"confidence": answer.get("confidence")}
            below = question if _GRADE.match(option) else f"{question} / {option}"
            yield from _walk_import(answer.get("classifications") or [], names, f"{below} / ")


def read_labelbox_import(path: str | os.PathLike, export_path: str | os.PathLike) -> pd.DataFrame:
    """Read pre-labels as `read_labelbox` reads an export, so that `to_targets` takes them.

    Returns:
        The columns of `read_labelbox` and confidence (NaN for texts); `image` is the external id
        or global key, `annotator` is None. Images without any answer have no line.

    Raises:
        ValueError: a line is no import of this export; names file, line and what was expected.
    """
    rows, questions = _read_questions(export_path)
    images = {key: name for name, keys in reversed(rows.items()) for key in keys}
    features = [f for n in questions.values() for f in [n["item"], *n["options"].values()]]
    names = {feature.get("feature_schema_id"): feature["name"] for feature in features}
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            item = json.loads(line)
            (key,) = item["dataRow"].items()
            base = {"image": images[key], "data_row_id": key[1], "project": "import"}
            base |= {"annotator": None, "label_id": f"import of {key[1]}", "judged": True}
            records += [base | answer for answer in _walk_import([item], names)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            hint = f"expected an answer to a data row of {export_path}"
            raise ValueError(f"{path}, line {number}: {hint} ({error!r}).") from None
    columns = ["image", "data_row_id", "project", "annotator", "label_id", "judged"]
    columns += ["question", "kind", "answer", "confidence"]
    answers = pd.DataFrame(records, columns=columns)
    return _name_labels(answers, [], "keep", ())


# ---------------------------------------------------------------- partition


def group_stratified_split(
    df: pd.DataFrame,
    label_columns: Sequence[str],
    group_col: str = "group_id",
    ratios: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 42,
) -> dict[str, pd.DataFrame]:
    """Split rows into train, val and test with whole groups and alike label rates.

    Iterative stratification of the groups (Sechidis et al., ECML PKDD 2011) gives the start;
    swaps of two groups that bring every part's label rates closer to the overall ones refine it.
    Unknown cells (NaN) count neither as present nor as absent.

    Returns:
        {"train", "val", "test"} → rows of `df`, in their order. Warns of labels that fewer than 3
        groups show, which no split can put into every part, and of labels without a judged cell
        in some part.

    Raises:
        ValueError: fewer groups than parts, a row without a group, or ratios that are not three
            positive numbers.
    """
    share = np.array(ratios, float)
    if share.shape != (3,) or (share <= 0).any():
        raise ValueError(f"ratios={ratios}: expected three positive numbers (train, val, test).")
    if df[group_col].isna().any():
        raise ValueError(f"{int(df[group_col].isna().sum())} rows have no {group_col}.")
    group, names = pd.factorize(df[group_col])
    if len(names) < 3:
        raise ValueError(f"{len(names)} groups cannot fill 3 parts; group by something finer.")
    values = df[list(label_columns)].to_numpy(float)
    sums = pd.DataFrame(np.hstack([values >= 0.5, ~np.isnan(values)]).astype(float))
    positive, known = np.hsplit(sums.groupby(group).sum().to_numpy(), 2)  # each (G, L)
    rare = [f"{c} ({n})" for c, n in zip(label_columns, (positive > 0).sum(0)) if n < 3]
    if rare:
        warnings.warn(f"Labels present in fewer than 3 groups: {_some(rare)}.", stacklevel=2)
    share /= share.sum()
    sparse = np.isnan(values).any(0)  # of these labels the judged cells are dealt as well
    dealt = np.hstack([positive > 0, (known > positive)[:, sparse]])
    start = IterativeStratification(dealt, share, np.random.RandomState(seed))
    for i in range(3):
        if not (start == i).any():  # very few groups: no part may stay empty
            start[np.flatnonzero(start == np.bincount(start).argmax())[0]] = i
    part = _refine_split(start, positive, known, np.bincount(group), share, seed)
    judged = np.stack([known[part == i].sum(0) for i in range(3)]) > 0  # (3, L)
    lost = [c for c, found in zip(label_columns, judged.T) if found.any() and not found.all()]
    if lost:
        warnings.warn(f"Labels that nobody judged in some part: {_some(lost)}.", stacklevel=2)
    part = part[group]
    parts = {name: df[part == i] for i, name in enumerate(("train", "val", "test"))}
    n_found = sum(rows[group_col].nunique() for rows in parts.values())
    assert n_found == len(names), "a group is in two parts"
    return parts


def _split_cost(totals: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return how unlike the parts are; totals (..., 3, 2L + 1) as in `_refine_split`."""
    deviation, known = np.split(totals[..., :-1], 2, axis=-1)
    total = known.sum(-2, keepdims=True)
    expected = share[:, None] * total
    sparse = total < totals[..., -1:].sum(-2, keepdims=True)  # some cells unknown
    enough = np.where(sparse, np.maximum(known, expected), known)  # few cells are no good rate
    deviation = deviation / np.maximum(enough, 1)
    unjudged = (sparse * ((known - expected) / np.maximum(total, 1)) ** 2).sum((-1, -2))
    size_error = totals[..., -1] / totals[..., -1].sum(-1, keepdims=True) - share
    worst = np.abs(deviation).max((-1, -2))
    return (deviation**2).sum((-1, -2)) + 4 * worst**2 + unjudged + (size_error**2).sum(-1)


def _refine_split(
    part: np.ndarray,
    positive: np.ndarray,
    known: np.ndarray,
    size: np.ndarray,
    share: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return `part` (G,) after the best of 64 random swaps, if it helps, in each of 800 rounds."""
    rng = np.random.default_rng(seed)
    rate = positive.sum(0) / np.maximum(known.sum(0), 1)
    # A part's deviation is its sum of `positive - rate * known` over its number of known cells.
    features = np.hstack([positive - rate * known, known, size[:, None]])  # (G, 2L + 1)
    totals = np.stack([features[part == i].sum(0) for i in range(len(share))])  # (3, 2L + 1)
    best = _split_cost(totals, share)
    for _ in range(800):
        i, j = rng.integers(len(part), size=(2, 64))
        i, j = i[part[i] != part[j]], j[part[i] != part[j]]
        if not len(i):
            continue
        swapped = np.repeat(totals[None], len(i), axis=0)
        swapped[np.arange(len(i)), part[i]] += features[j] - features[i]
        swapped[np.arange(len(i)), part[j]] -= features[j] - features[i]
        costs = _split_cost(swapped, share)
        k = costs.argmin()
        if costs[k] < best:
            best, totals = costs[k], swapped[k]
            part[i[k]], part[j[k]] = part[j[k]], part[i[k]]
    return part


def label_distribution(
    parts: dict[str, pd.DataFrame], label_columns: Sequence[str]
) -> pd.DataFrame:
    """Count each label in each part.

    Returns:
        One line a label and part: label, part, present, absent, unknown, rate (present among
        known) and deviation, the part's rate less the overall rate in percentage points.
    """
    long = pd.concat(parts, names=["part"])[list(label_columns)]
    long = long.melt(var_name="label", ignore_index=False)
    value = long["value"]
    cells = {"present": value >= 0.5, "absent": value < 0.5, "unknown": value.isna()}
    counts = long.assign(**cells).groupby(["label", "part"], sort=False)[list(cells)].sum()
    known = counts["present"] + counts["absent"]
    overall = counts.groupby("label", sort=False).transform("sum")
    overall = overall["present"] / (overall["present"] + overall["absent"])
    counts["rate"] = counts["present"] / known
    counts["deviation"] = 100 * (counts["rate"] - overall)
    return counts.reset_index()


def read_partition(path: str | os.PathLike) -> tuple[pd.DataFrame, list[str]]:
    """Read a partition CSV.

    Returns:
        The rows, with `image_path` leading from the working directory, and the label columns.

    Raises:
        FileNotFoundError: the file is missing; names the notebook that makes it.
        ValueError: a column is missing or a label cell lies outside 0..1.
    """
    path = _need_file(path, "run partitioning.ipynb to make it")
    df = _read_table(path)
    labels = [column for column in df.columns if column not in NOT_LABELS]
    if not labels or not set(NOT_LABELS) <= set(df.columns):
        raise ValueError(f"{path}: expected columns image_path, group_id and at least one label.")
    df = df.assign(**_parse_cells(df[labels], path, soft=True)).reset_index(drop=True)
    paths = [os.path.normpath(path.parent / p) for p in df["image_path"]]
    return df.assign(image_path=[Path(p).as_posix() for p in paths]), labels


def load_parts(
    folder: str | os.PathLike, names: Sequence[str] = PARTS
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Read the partitions of `folder`.

    Returns:
        {name: rows} as `read_partition` gives them, and the label columns, the same in all.

    Raises:
        FileNotFoundError: one is missing; says which notebook makes it.
        ValueError: parts with other labels, or a group that stands in two parts.
    """
    paths = {name: Path(folder) / f"{name}_partition.csv" for name in names}
    read = {name: read_partition(path) for name, path in paths.items()}
    first, labels = names[0], read[names[0]][1]
    for name, (_, own) in read.items():
        if own != labels:
            other = _some(sorted(set(own) ^ set(labels))) or "in another order"
            raise ValueError(f"{paths[name]}: other labels than {paths[first].name}: {other}.")
    parts = {name: table for name, (table, _) in read.items()}
    for one, two in itertools.combinations(names, 2):
        shared = set(parts[one]["group_id"]) & set(parts[two]["group_id"])
        if shared:
            problem = f"group {_some(sorted(shared, key=str))} is in {one} and in {two}"
            raise ValueError(f"{folder}: {problem}; run partitioning.ipynb again.")
    return parts, labels


def write_partition(df: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a partition CSV; `image_path` becomes relative to the CSV's folder."""
    relative = [Path(os.path.relpath(p, Path(path).parent)).as_posix() for p in df["image_path"]]
    with replacing(path) as temporary:
        df.assign(image_path=relative).to_csv(temporary, index=False)


def _image_hash(path: str | os.PathLike) -> np.ndarray | str:
    import imagehash

    try:
        return imagehash.phash(open_image(path, (64, 64))).hash.ravel()
    except OSError as error:
        return str(error)


def find_near_duplicates(
    paths: Sequence[str | os.PathLike],
    max_distance: int = 8,
    unreadable: str = "raise",
    n_jobs: int = -1,
) -> pd.DataFrame:
    """Find pairs of images that look the same, by 64-bit perceptual hash (imagehash.phash).

    Args:
        max_distance: most bits of 64 in which two hashes may differ.
        unreadable: "raise", or "skip" to list files that cannot be read in `.attrs["unreadable"]`.

    Returns:
        One line a pair: first, second (positions in `paths`), distance in bits; closest first.
    """
    _check_choice("unreadable", unreadable, ("raise", "skip"))
    jobs = tqdm([delayed(_image_hash)(path) for path in paths], desc="hashing", leave=False)
    hashes = Parallel(n_jobs, prefer="threads")(jobs)  # decoding releases the interpreter lock
    errors = [found for found in hashes if isinstance(found, str)]
    if errors and unreadable == "raise":
        raise OSError(f"{len(errors)} images cannot be read: {_some(errors)}")
    readable = np.array([i for i, found in enumerate(hashes) if not isinstance(found, str)], int)
    bits = np.array([hashes[i] for i in readable], bool).reshape(-1, 64)
    bits = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    pairs = [np.empty((0, 3), int)]
    for start in range(0, len(bits), 1024):  # a block of rows at a time bounds the memory
        distance = np.bitwise_count(bits[start : start + 1024, None] ^ bits[start:])
        i, j = np.nonzero(np.triu(distance <= max_distance, 1))
        pairs.append(np.stack([readable[i + start], readable[j + start], distance[i, j]], axis=1))
    table = pd.DataFrame(np.concatenate(pairs), columns=["first", "second", "distance"])
    table = table.sort_values(["distance", "first", "second"], ignore_index=True)
    table.attrs["unreadable"] = errors
    return table


# ---------------------------------------------------------------- data


def open_image(image: Any, size: tuple[int, int] | None = None) -> Image.Image:
    """Return a path, PIL image or array (H, W, 3) as an upright image of 8-bit RGB.

    Where `size` (height, width) is enough, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size. A file
    that is missing, truncated or no image is named by an OSError.
    """
    if not isinstance(image, (str, os.PathLike)):
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        return _to_rgb(ImageOps.exif_transpose(image))
    try:
        with Image.open(image) as file:
            if size is not None and file.format in ("JPEG", "MPO"):
                turned = file.getexif().get(0x0112, 1) >= 5  # Orientation swaps width and height
                file.draft("RGB", size if turned else size[::-1])
            return _to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"{image}: no such image; check the folder or the CSV.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = f"cannot be read as an image ({error}); replace it or leave it out."
        raise OSError(f"{image}: {problem}") from None


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

    The whole picture is squeezed, never cropped at its centre: labels may lie anywhere.

    Args:
        crop_scale: share of the picture that a random crop keeps; a small one may cut a label off.
        rand_augment: timm's RandAugment (arXiv 1909.13719) in the place of the colour jitter, e.g.
            "rand-m9-n2-mstd0.5": two operations of magnitude 9.
        random_erasing: probability that a rectangle becomes noise (arXiv 1708.04896).
    """
    _check_choice("view", view, VIEWS)
    if not 0 <= random_erasing <= 1:
        raise ValueError(f"random_erasing={random_erasing}: expected a probability from 0 to 1.")
    config = model.data_config
    size, mode = config["input_size"][1:], v2.InterpolationMode(config["interpolation"])
    steps: list[nn.Module] = [v2.ToImage(), v2.Resize(size, mode)]
    if train:
        steps[1:] = [RandomHorizontalRoll(view)] if view == "panorama" else []
        steps += [RandomSqueezedCrop(size, crop_scale, interpolation=mode)]
        steps += [v2.RandomHorizontalFlip()]
        augment = _rand_augment(rand_augment, config) if rand_augment else None
        steps += augment or [v2.ColorJitter(0.2, 0.2, 0.2)]
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
    """Return the height and width that suffice for the first resizing step of `transform`."""
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, (RandomSqueezedCrop, v2.Resize)) and len(step.size) == 2:
            least = getattr(step, "scale", (1.0,))[0] ** 0.5
            return tuple(int(np.ceil(side / least)) for side in step.size)
    return None


class DataPartition(Dataset):
    """The images (3, H, W) and targets (L,), float32 with NaN for unknown, of a partition.

    JPEGs are decoded no larger than the resizing step of `transform` (PIL image → tensor) needs;
    `cache_dir` keeps the decoded, shrunk copies, so that no photo is decoded twice.
    """

    def __init__(
        self,
        df: pd.DataFrame,
        label_columns: Sequence[str],
        transform: Callable | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        missing = [c for c in ("image_path", *label_columns) if c not in df.columns]
        if missing:
            raise ValueError(f"the partition has no column {_some(missing)}.")
        self.paths = df["image_path"].astype(str).tolist()
        self.groups = df["group_id"].to_numpy() if "group_id" in df else np.arange(len(df))
        self.label_columns, self.transform = list(label_columns), transform
        self.targets = df[self.label_columns].to_numpy(np.float32)  # (N, L)
        self.cache_dir = Path(cache_dir) if cache_dir else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        size = _needed_size(self.transform)
        read = self._open_cached if self.cache_dir and size else open_image
        image = read(self.paths[index], size)
        image = self.transform(image) if self.transform else image
        return image, torch.tensor(self.targets[index])

    def _open_cached(self, path: str, size: tuple[int, int]) -> Image.Image:
        stamp = os.stat(path).st_mtime_ns if os.path.exists(path) else None
        key = hashlib.sha1(f"{os.path.abspath(path)}|{stamp}|{size}".encode()).hexdigest()
        copy = self.cache_dir / key[:2] / f"{key}.npy"
        if copy.exists():
            return Image.fromarray(np.load(copy, allow_pickle=False))
        image = open_image(path, size)
        if image.height > size[0] and image.width > size[1]:
            image = ImageOps.cover(image, size[::-1])
        with replacing(copy) as temporary, open(temporary, "wb") as file:
            np.save(file, np.asarray(image), allow_pickle=False)
        return image


class FeatureSet(TensorDataset):
    """Features (N, ...) instead of photos: trains a head alone, goes where DataPartition goes."""

    def __init__(
        self, features: torch.Tensor, targets: np.ndarray, label_columns: Sequence[str]
    ) -> None:
        if len(features) != len(targets):
            raise ValueError(f"{len(features)} features and {len(targets)} rows of targets.")
        self.features, self.label_columns = features, list(label_columns)
        self.targets = np.asarray(targets, np.float32)  # (N, L), NaN for unknown
        super().__init__(features, torch.from_numpy(self.targets))


class TriStateMixup(Mixup):
    """timm's MixUp/CutMix for multi-hot targets in which unknown cells (NaN) stay unknown.

    A mixed cell is unknown if one of the two images contributes an unknown cell with weight > 0.
    """

    def __init__(self, num_labels: int, mixup_alpha: float, cutmix_alpha: float) -> None:
        dense = {"num_classes": 2 * num_labels, "multi_label": True, "label_smoothing": 0.0}
        super().__init__(mixup_alpha, cutmix_alpha, **dense)

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([target.nan_to_num(0.0), target.isnan().float()], dim=1)  # (B, 2L)
        x, both = super().__call__(x, both)
        mixed, unknown = both.chunk(2, dim=1)
        return x, mixed.masked_fill(unknown > 0, torch.nan)


def make_loader(
    dataset: Dataset, batch_size: int, train: bool = False, num_workers: int = 0, seed: int = 42
) -> DataLoader:
    """Return a DataLoader whose order and whose workers' random numbers follow from `seed`."""
    options = {"shuffle": train, "num_workers": num_workers, "worker_init_fn": _seed_by_rank}
    options |= {"generator": torch.Generator().manual_seed(seed)}
    return DataLoader(dataset, batch_size, pin_memory=torch.cuda.is_available(), **options)


def _seed_by_rank(worker: int) -> None:
    """PyTorch seeds workers from the loader's generator, the same in all launched processes."""
    rank = int(os.environ.get("RANK", 0))  # as set by accelerate launch and torchrun
    if rank:
        seed = (torch.initial_seed() + 1_000_003 * rank) % 2**32
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what timm's MixUp and others draw from
        random.seed(seed)


# ---------------------------------------------------------------- features, out of fold


def _patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """Return every second patch of (B, 3, H, W), normalised: (B, P, 3 side²)."""
    patches = F.unfold(images, side, stride=2).transpose(1, 2)
    patches = patches - patches.mean(-1, keepdim=True)
    return patches / (patches.std(-1, keepdim=True) + 0.05)


def patch_features(
    paths: Sequence[str | os.PathLike],
    n_components: int = 128,
    n_filters: int = 256,
    size: int = 64,
    seed: int = 42,
) -> torch.Tensor:
    """Describe images with neither labels nor pretrained weights (Coates et al., AISTATS 2011).

    Whitened random patches of the images themselves are the filters; their rectified responses are
    averaged over a 4 × 4 grid and reduced by PCA. Weaker than a pretrained network, but ready in
    seconds, and no label can leak through it.

    Args:
        n_components: D, at most the number of images.
        n_filters: patches that serve as filters.
        size: height and width to which the images are squeezed.

    Returns:
        (N, D), each column with mean 0, the first with variance 1.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} images: patch_features compares images, give two or more.")
    side, rng = 6, np.random.default_rng(seed)
    squeeze = v2.Compose([v2.Resize((size, size)), v2.PILToTensor(), v2.ToDtype(torch.float, True)])
    images = torch.stack([squeeze(open_image(path, (size, size))) for path in paths])
    some = images[rng.choice(len(images), min(len(images), 500), replace=False)]
    found = _patches(some, side).flatten(0, 1)
    found = found[rng.choice(len(found), min(len(found), 20_000), replace=False)]
    mean, (variance, axes) = found.mean(0), torch.linalg.eigh(found.T.cov())
    whiten = axes @ torch.diag((variance + 0.1).rsqrt()) @ axes.T
    filters = F.normalize((found[:n_filters] - mean) @ whiten, dim=1)
    pooled = []
    for batch in images.split(16):
        response = (_patches(batch, side) - mean) @ whiten @ filters.T  # (B, P, K)
        response = torch.cat([(response - 0.5).relu(), (-response - 0.5).relu()], dim=2)
        grid = int(response.shape[1] ** 0.5)
        maps = response.transpose(1, 2).unflatten(2, (grid, grid))
        pooled.append(F.adaptive_avg_pool2d(maps, 4).flatten(1))
    pca = PCA(min(n_components, len(images)), svd_solver="randomized", random_state=seed)
    features = pca.fit_transform(StandardScaler().fit_transform(torch.cat(pooled).numpy()))
    return torch.from_numpy(features / max(features[:, 0].std(), 1e-6)).float()


@dataclass(frozen=True)
class OutOfFold:
    """Probabilities (N, L), each from a model that saw neither the image nor its group.

    Only `out_of_fold` should make one: `folds` (N,) says in which fold a row was left out.
    """

    probs: np.ndarray
    folds: np.ndarray
    groups: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.probs) == len(self.folds) == len(self.groups):
            raise ValueError("probs, folds and groups have different lengths.")
        spread = pd.Series(self.folds).groupby(pd.Series(self.groups)).nunique()
        if (spread > 1).any():
            leaks = _some(spread.index[spread > 1])
            raise ValueError(f"not out of fold: {leaks} stand in several folds; use out_of_fold.")
        if np.isnan(self.probs).any() or len(set(self.folds)) < 2:
            raise ValueError("not out of fold: a row was left out by no fold; use out_of_fold.")


def out_of_fold(
    fit_predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    groups: Sequence[str],
    n_folds: int = 5,
    seed: int = 42,
) -> OutOfFold:
    """Predict every image with a model that was trained without its group.

    Args:
        fit_predict: (rows to train on, rows to predict) → probabilities (len(second), L).
        groups: (N,), never divided between folds.
        n_folds: at most the number of groups, which is leave-one-group-out.

    Raises:
        ValueError: fewer groups than folds.
    """
    groups = np.asarray(groups)
    if len(set(groups)) < max(n_folds, 2):
        raise ValueError(f"{len(set(groups))} groups are too few for {n_folds} folds.")
    probs, folds = None, np.full(len(groups), -1)
    splitter = GroupKFold(n_folds, shuffle=True, random_state=seed)
    for fold, (train, held_out) in enumerate(splitter.split(groups, groups=groups)):
        found = np.asarray(fit_predict(train, held_out))
        if found.ndim != 2 or len(found) != len(held_out) or np.isnan(found).any():
            expected = f"({len(held_out)}, labels) numbers, not {found.shape} or NaN"
            raise ValueError(f"fit_predict returned something else than {expected}.")
        probs = np.full((len(groups), found.shape[1]), np.nan) if probs is None else probs
        probs[held_out], folds[held_out] = found, fold
    return OutOfFold(probs, folds, groups)


# ---------------------------------------------------------------- wrong labels and their review


def _check_unique(images: Iterable[Any], where: str) -> None:
    images = pd.Series(images)
    if images.duplicated().any():
        twice = images[images.duplicated()].unique()
        raise ValueError(f"{where}: {len(twice)} images occur twice: {_some(twice)}; keep one row.")


def _check_out_of_fold(oof: OutOfFold, n_images: int) -> None:
    if not isinstance(oof, OutOfFold):
        kind = type(oof).__name__
        raise TypeError(f"{kind}: expected what out_of_fold returns; others have seen the labels.")
    if len(oof.probs) != n_images:
        raise ValueError(f"{len(oof.probs)} out-of-fold rows for {n_images} images.")


def _masked_softmin(
    scores: np.ndarray, known: np.ndarray, temperature: float = 0.1, **_: Any
) -> np.ndarray:
    """Return Σ s softmax((1 - s) / T) over the known labels (N,); 1 where none is known."""
    weights = np.where(known, np.exp((1 - scores) / temperature), 0)
    total = weights.sum(1)
    return np.where(total > 0, (weights * scores).sum(1) / np.maximum(total, 1e-12), 1.0)


def find_wrong_labels(
    targets: np.ndarray, oof: OutOfFold, label_columns: Sequence[str], images: Sequence[Any]
) -> pd.DataFrame:
    """Find labels that are probably wrong by confident learning (Northcutt et al., JAIR 2021).

    cleanlab judges each label on the images on which it is known, and ranks images by the softmin
    over their known labels (Thyagarajan et al., arXiv 2211.13895).

    Args:
        targets: (N, L) as given, NaN for unknown.
        oof: of the same N images, see `out_of_fold`.
        images: N names, each once.

    Returns:
        A line a suspected cell, the most suspicious first: rank, image_path, label, given,
        predicted, prob (out of fold), quality (probability of the given answer), photo_quality.

    Raises:
        TypeError: probabilities that were not made by `out_of_fold`.
        ValueError: an image occurs twice.
    """
    from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
    from cleanlab.multilabel_classification.rank import get_label_quality_scores

    _check_out_of_fold(oof, len(targets))
    _check_unique(images, "images")
    known, present, issues = ~np.isnan(targets), targets >= 0.5, np.zeros(targets.shape, bool)
    for j in range(targets.shape[1]):
        judged = np.flatnonzero(known[:, j])
        if 0 < present[judged, j].sum() < len(judged):
            labels = [[0] if y else [] for y in present[judged, j]]
            probs = oof.probs[judged][:, [j]]
            issues[judged, j] = np.ravel(find_multilabel_issues_per_class(labels, probs, n_jobs=1))
    softmin = {"method": functools.partial(_masked_softmin, known=known)}
    labels = [np.flatnonzero(row).tolist() for row in present]
    if present.any() and targets.shape[1] > 1:
        photo_quality = get_label_quality_scores(labels, oof.probs, aggregator_kwargs=softmin)
    else:  # cleanlab wants several labels, one of them present; the formula does not
        photo_quality = _masked_softmin(np.where(present, oof.probs, 1 - oof.probs), known)
    i, j = np.nonzero(issues)
    prob, answers = oof.probs[i, j], np.array(["absent", "present"])
    table = pd.DataFrame({"image_path": np.asarray(images)[i], "label": np.array(label_columns)[j]})
    is_given = present[i, j]
    table["given"], table["predicted"] = answers[is_given * 1], answers[~is_given * 1]
    table["prob"], table["quality"] = prob, np.where(is_given, prob, 1 - prob)
    table = table.assign(photo_quality=photo_quality[i]).sort_values("quality", ignore_index=True)
    table.insert(0, "rank", table.index + 1)
    return table


def find_wrong_classes(
    targets: np.ndarray, oof: OutOfFold, classes: Sequence[str], images: Sequence[Any]
) -> pd.DataFrame:
    """Do the same for images with one class each; arguments and errors as `find_wrong_labels`.

    Returns:
        rank, image_path, given, predicted, prob (of predicted), quality (of given).
    """
    from cleanlab.filter import find_label_issues

    _check_out_of_fold(oof, len(targets))
    _check_unique(images, "images")
    if not (np.nan_to_num(targets).sum(1) == 1).all():
        raise ValueError("some images have not exactly one class; use find_wrong_labels.")
    given, shares = np.nanargmax(targets, axis=1), oof.probs / oof.probs.sum(1, keepdims=True)
    ranked_by = "self_confidence"
    found = find_label_issues(given, shares, return_indices_ranked_by=ranked_by, n_jobs=1)
    table = pd.DataFrame({"rank": np.arange(1, len(found) + 1)})
    table["image_path"] = np.asarray(images)[found]
    table["given"] = np.array(classes)[given[found]]
    table["predicted"] = np.array(classes)[shares[found].argmax(1)]
    return table.assign(prob=shares[found].max(1), quality=shares[found, given[found]])


DECISIONS = {"present": 1.0, "absent": 0.0, "unsure": np.nan}


def append_decision(path: str | os.PathLike, image: str, label: str, decision: str) -> None:
    """Append "present", "absent" or "unsure" about a cell to a review CSV, safe on the disk."""
    _check_choice("decision", decision, DECISIONS)
    if "\n" in f"{image}{label}" or "\r" in f"{image}{label}":
        raise ValueError(f"{image!r}, {label!r}: a name with a line break cannot be reviewed.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        is_empty = file.tell() == 0
        file.seek(-1 + is_empty, os.SEEK_END)
        is_torn = file.read() not in (b"\n", b"")  # what a crash cut off stays on its own line
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([image, label, decision])
        file.write(("\n" * is_torn + line.getvalue()).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def read_decisions(path: str | os.PathLike) -> pd.DataFrame:
    """Read a review CSV: image_path, label, decision, line; a line that was cut off is named in a
    warning and left out. No file is no decision.
    """
    text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        cells = next(csv.reader([line]), [])
        if len(cells) == 3 and cells[2] in DECISIONS:
            rows.append([*cells, number])
        elif line:
            problem = f"{path}, line {number}: cut off, {line!r} is skipped; decide again."
            warnings.warn(problem, stacklevel=2)
    return pd.DataFrame(rows, columns=["image_path", "label", "decision", "line"])


def apply_decisions(
    path: str | os.PathLike, part: pd.DataFrame, label_columns: Sequence[str]
) -> pd.DataFrame:
    """Return `part` with the decisions of a review CSV; of a cell, the last one counts.

    "unsure" makes a cell unknown. Lines that were cut off are skipped, see `read_decisions`.

    Raises:
        ValueError: a label or an image that `part` lacks; an image that it holds twice.
    """
    _check_unique(part["image_path"], "the partition")
    row_of = {image: row for row, image in enumerate(part["image_path"])}
    values = part[list(label_columns)].to_numpy(float, copy=True)
    for image, label, decision, number in read_decisions(path).itertuples(index=False):
        if label not in label_columns:
            expected = _some(label_columns, 99)
            raise ValueError(f"{path}, line {number}: no label {label!r}; expected {expected}.")
        if image not in row_of:
            problem = f"{image} is not in the partition; remove the line"
            raise ValueError(f"{path}, line {number}: {problem}.")
        values[row_of[image], list(label_columns).index(label)] = DECISIONS[decision]
    return part.assign(**dict(zip(label_columns, values.T)))


def rank_for_labelling(
    probs: np.ndarray, features: np.ndarray, labelled: np.ndarray, n: int
) -> pd.DataFrame:
    """Rank unlabelled photos by entropy × distance to the nearest labelled or chosen one.

    Args:
        probs: (N, L).
        features: (N, D), what they look like.
        labelled: (M, D), what the labelled photos look like; M may be 0.

    Returns:
        Up to n lines, the first one to label first: candidate (a row of `probs`), entropy in bits,
        distance (when it was chosen; 1 where nothing is labelled or chosen).
    """
    p = probs.clip(1e-7, 1 - 1e-7)
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean(1)
    nearest = np.ones(len(probs))
    if len(probs) and len(labelled):
        nearest = pairwise_distances_argmin_min(features, labelled)[1]  # in pieces: N × M is large
    free, lines = np.ones(len(probs), bool), []
    for _ in range(min(n, len(probs))):
        best = np.where(free, entropy * nearest, -1).argmax()
        lines.append((best, entropy[best], nearest[best]))
        free[best] = False
        to_best = np.linalg.norm(features - features[best], axis=1)
        nearest = np.minimum(nearest, to_best)
    return pd.DataFrame(lines, columns=["candidate", "entropy", "distance"])


# ---------------------------------------------------------------- heads


class _SpatialHead(nn.Module):
    """What heads that look at positions share: how features become tokens.

    Args:
        num_features: C, channels of the backbone.
        input_fmt: of features with four dimensions, "NCHW" or "NHWC".
        num_prefix_tokens: class and register tokens before the positions of (B, N, C) features.
    """

    def __init__(self, num_features: int, input_fmt: str, num_prefix_tokens: int) -> None:
        super().__init__()
        _check_choice("input_fmt", input_fmt, ("NCHW", "NHWC"))
        self.num_features = num_features
        self.input_fmt, self.num_prefix_tokens = input_fmt, num_prefix_tokens

    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Return (B, N, C), one row a position of the feature map.

        Raises:
            ValueError: pooled features, or another number of channels.
        """
        if features.ndim == 4:
            is_last = self.input_fmt == "NHWC"
            tokens = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
        elif features.ndim == 3:
            tokens = features[:, self.num_prefix_tokens :]
        else:
            raise ValueError(
                f"pooled features {tuple(features.shape)}: a head that looks at positions needs a"
                " map (B, C, H, W) or (B, H, W, C), or tokens (B, N, C)."
            )
        if tokens.shape[-1] != self.num_features:
            problem = f"features {tuple(features.shape)} ({self.input_fmt})"
            raise ValueError(f"{problem} do not have the {self.num_features} channels expected.")
        return tokens


class CSRA(_SpatialHead):
    """Class-specific residual attention (Zhu & Wu, ICCV 2021, arXiv 2108.02456).

    With scores s = x·w / ‖w‖ at every position, a label's logit is
    mean(s) + λ Σ softmax(T s) s, summed over heads, each with weights and a temperature T of its
    own; T = 99 stands for the maximum. Published weights (`multi_head.{i}.head.weight`) load; the
    bias, which they lack, is then zero.

    Args:
        heads: 1, 2, 4, 6 or 8.
        lam: λ, weight of the attention against the mean; 0 or more.
    """

    MAX_POOLING = 99
    TEMPERATURES = {1: [1], 2: [1, 99], 4: [1, 2, 4, 99], 6: [1, 2, 3, 4, 5, 99]}
    TEMPERATURES[8] = [1, 2, 3, 4, 5, 6, 7, 99]

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        heads: int = 1,
        lam: float = 0.1,
        input_fmt: str = "NCHW",
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(num_features, input_fmt, num_prefix_tokens)
        _check_choice("heads", heads, self.TEMPERATURES)
        if not 0 <= lam < float("inf"):
            raise ValueError(f"lam={lam}: the weight of the attention must be 0 or more.")
        self.lam = lam
        self.weight = nn.Parameter(torch.empty(heads, num_labels, num_features))
        nn.init.kaiming_uniform_(self.weight.flatten(0, 1), a=5**0.5)  # as a 1×1 convolution
        self.bias = nn.Parameter(torch.zeros(num_labels))
        temperatures = torch.tensor(self.TEMPERATURES[heads], dtype=torch.float)
        self.register_buffer("temperatures", temperatures.view(-1, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(_stack_published_csra)

    def _scores(self, features: torch.Tensor) -> torch.Tensor:
        """Return the score of each head and label at each position, (B, heads, L, N)."""
        weight = F.normalize(self.weight, dim=-1)
        return torch.einsum("bnc,hlc->bhln", self.tokens(features), weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (B, L)."""
        scores = self._scores(features)
        attention = (self.temperatures * scores).softmax(-1)
        pooled = (attention * scores).sum(-1)
        is_max = self.temperatures[..., 0] == self.MAX_POOLING
        attended = torch.where(is_max, scores.amax(-1), pooled)
        return (scores.mean(-1) + self.lam * attended).sum(1) + self.bias

    def attention(self, features: torch.Tensor) -> torch.Tensor:
        """Return the class-specific attention (B, L, N), the mean over heads; a row sums to 1."""
        scores = self._scores(features)
        attention = (self.temperatures * scores).softmax(-1)
        highest = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(attention.dtype)
        is_max = self.temperatures == self.MAX_POOLING
        return torch.where(is_max, highest, attention).mean(1)


def _stack_published_csra(module: CSRA, state: dict, prefix: str, *_: Any) -> None:
    """Turn the keys of the authors' code, one convolution a head, into this module's."""
    state.setdefault(f"{prefix}bias", torch.zeros_like(module.bias))
    keys = [f"{prefix}multi_head.{i}.head.weight" for i in range(len(module.weight))]
    if keys[0] in state:
        found = [state.pop(key) for key in keys if key in state]  # too many or few: no fit, named
        state[f"{prefix}weight"] = torch.stack(found).flatten(2)


class _DecoderLayer(nn.Module):
    """Cross-attention and feed-forward, post-norm; no self-attention among the queries."""

    def __init__(self, width: int, dim_feedforward: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.multihead_attn = nn.MultiheadAttention(
            width, num_heads, dropout=dropout, batch_first=True
        )
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)

    def normed(self, queries: torch.Tensor) -> torch.Tensor:
        """Where self-attention would stand, the authors' code adds the queries to themselves."""
        return self.norm1(queries + self.dropout(queries))

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.normed(queries)  # (B, K, D)
        found = self.multihead_attn(x, memory, memory, need_weights=False)[0]
        x = self.norm2(x + self.dropout(found))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class MLDecoder(_SpatialHead):
    """ML-Decoder (Ridnik et al., WACV 2023, arXiv 2111.12933).

    K fixed queries look for labels in the positions x by cross-attention; a group fully-connected
    layer turns each of the K answers into ⌈L/K⌉ logits. Published weights load.

    Args:
        num_of_groups: K; None is 100, or L where L is smaller.
        decoder_embedding: D, width of the decoder, a multiple of 8 (its attention heads).
        dim_feedforward: width of the hidden layer.
        dropout: inside the decoder.
    """

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        num_of_groups: int | None = None,
        decoder_embedding: int = 768,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        input_fmt: str = "NCHW",
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(num_features, input_fmt, num_prefix_tokens)
        groups = min(100, num_labels) if num_of_groups is None else num_of_groups
        if not 1 <= groups <= num_labels:
            limits = f"expected 1 to {num_labels}, the number of labels, or None"
            raise ValueError(f"num_of_groups={num_of_groups}: {limits}.")
        if decoder_embedding < 8 or decoder_embedding % 8:
            raise ValueError(f"decoder_embedding={decoder_embedding}: expected a multiple of 8.")
        self.num_labels = num_labels
        self.labels_per_group = -(-num_labels // groups)
        decoder = nn.Module()  # the names, one of them misspelt, are those of published weights
        decoder.embed_standart = nn.Linear(num_features, decoder_embedding)
        decoder.query_embed = nn.Embedding(groups, decoder_embedding).requires_grad_(False)
        layer = _DecoderLayer(decoder_embedding, dim_feedforward, 8, dropout)
        decoder.layers = nn.ModuleList([layer])
        shape = groups, decoder_embedding, self.labels_per_group
        decoder.duplicate_pooling = nn.Parameter(nn.init.xavier_normal_(torch.empty(shape)))
        decoder.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_labels))
        self.decoder = decoder

    def _memory_and_queries(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.decoder.embed_standart(self.tokens(features)).relu()  # (B, N, D)
        queries = self.decoder.query_embed.weight.to(memory.dtype)
        return memory, queries.expand(len(memory), -1, -1)  # (B, K, D)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (B, L)."""
        decoder = self.decoder
        memory, queries = self._memory_and_queries(features)
        answers = decoder.layers[0](queries, memory)
        logits = torch.einsum("bkd,kdj->bkj", answers, decoder.duplicate_pooling)  # (B, K, ⌈L/K⌉)
        return logits.flatten(1)[:, : self.num_labels] + decoder.duplicate_pooling_bias

    def attention(self, features: torch.Tensor) -> torch.Tensor:
        """Return the cross-attention of each label's query (B, L, N); a row sums to 1."""
        memory, queries = self._memory_and_queries(features)
        layer = self.decoder.layers[0]
        maps = layer.multihead_attn(layer.normed(queries), memory, memory)[1]  # (B, K, N)
        return maps.repeat_interleave(self.labels_per_group, 1)[:, : self.num_labels]


HEADS: dict[str, type[_SpatialHead] | None] = {"linear": None, "csra": CSRA, "mldecoder": MLDecoder}


def _head_options(head: str) -> set[str]:
    """Return the keyword arguments that a user may give to a head."""
    found = set(inspect.signature(HEADS[head]).parameters) if HEADS[head] else set()
    return found - {"num_features", "num_labels", "input_fmt", "num_prefix_tokens"}


# ---------------------------------------------------------------- model


class _HeadedModel(nn.Module):
    """A timm backbone that gives its feature map to a head of this file."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Return unpooled features in the layout of the backbone."""
        return self.backbone(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm models do."""
        return self.head


def feature_layout(
    backbone: nn.Module, features: torch.Tensor, size: Sequence[int]
) -> dict[str, Any]:
    """Return how a head reads unpooled features: num_features, input_fmt, num_prefix_tokens.

    Args:
        features: (B, C, H, W), (B, H, W, C) or (B, N, C).
        size: height and width of the images.

    Raises:
        ValueError: pooled features, a single position, or tokens that form no grid.
    """
    is_last = features.ndim != 4 or str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC"
    layout = {"num_features": features.shape[-1 if is_last else 1], "num_prefix_tokens": 0}
    layout |= {"input_fmt": "NHWC" if is_last else "NCHW"}
    if features.ndim == 3:
        own = getattr(backbone, "num_prefix_tokens", 0)
        fits = (n for n in (own, 0, 1, 2) if np.prod(_grid(features.shape[1] - n, size)) > 0)
        layout["num_prefix_tokens"] = next(fits, own)
    n_positions = _SpatialHead(**layout).tokens(features).shape[1]  # refuses pooled features
    if n_positions < 2 or features.ndim == 3 and not np.prod(_grid(n_positions, size)):
        raise ValueError(f"features {tuple(features.shape)} form no map of two or more positions")
    return layout


def _grid(n_positions: int, size: Sequence[int]) -> tuple[int, int]:
    """Return height and width of a grid of square patches; (0, 0) if there is none."""
    height = round((n_positions * size[0] / size[1]) ** 0.5) if n_positions > 0 else 0
    fits = height and height * round(height * size[1] / size[0]) == n_positions
    return (height, n_positions // height) if fits else (0, 0)


def _replace_head(
    model: nn.Module, head: str, num_labels: int, size: Sequence[int], head_kwargs: dict
) -> _HeadedModel:
    """Return the backbone of a timm model with another head on its feature map."""
    try:
        model.reset_classifier(0, "")  # timm's way to leave the features unpooled
        probe = copy.deepcopy(model).to("meta").eval()  # shapes alone: costs no computation
        features = probe(torch.zeros(1, *size, device="meta"))
        layout = feature_layout(model, features, size[1:])
    except Exception as error:  # whatever a model does that cannot go without its pooling
        problem = f"{type(model).__name__} gives no feature map for head={head!r}"
        raise ValueError(f"{problem} ({type(error).__name__}: {error}).") from None
    return _HeadedModel(model, HEADS[head](num_labels=num_labels, **layout, **head_kwargs))


def build_model(
    name: str,
    num_labels: int,
    head: str = "linear",
    pretrained: bool | str | os.PathLike = True,
    img_size: int | Sequence[int] | None = None,
    head_bias: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm backbone with a new head that starts small.

    Args:
        name: any timm model, e.g. "swinv2_base_window12to24_192to384".
        head: "linear", "csra" or "mldecoder".
        pretrained: True (Hugging Face hub), False (random weights) or a state-dict file.
        img_size: input height and width in pixels; None is the model's own.
        head_bias: the logits that the head starts from (L,), see `base_rate_logits`; None: zeros.
        **kwargs: what `CSRA` or `MLDecoder` takes (e.g. lam) goes to the head, all else to timm
            (e.g. drop_rate or window_size).

    Returns:
        (B, 3, H, W) → logits (B, L). `.data_config` says how to prepare images, `.spec` how to
        build the model again.

    Raises:
        ValueError: unknown model or head, a size the model cannot take, a file that does not fit,
            an option that the head refuses.
        RuntimeError: pretrained weights could not be had.
    """
    _check_choice("head", head, HEADS)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f"timm has no model {name!r}; did you mean {_some(close) or 'another'}?")
    size = timm.layers.to_2tuple(img_size) if img_size else None
    head_kwargs = {key: kwargs.pop(key) for key in _head_options(head) & kwargs.keys()}
    foreign = kwargs.keys() & {option for other in HEADS for option in _head_options(other)}
    if foreign:
        raise ValueError(f"the {head} head has no option {_some(sorted(foreign))}.")
    if pretrained and pretrained is not True:
        kwargs = _pretrained_windows(name, Path(pretrained)) | kwargs
    model = _create_model(name, size, dict(kwargs, num_classes=num_labels))
    bias = torch.zeros(num_labels) if head_bias is None else head_bias
    _start_head(model, bias)
    if pretrained:
        _load_pretrained(model, name, pretrained, num_labels)
    config = resolve_model_data_config(model)
    config["input_size"] = (3, *size) if size else config["input_size"]
    if head != "linear":
        model = _replace_head(model, head, num_labels, config["input_size"], head_kwargs)
        _start_head(model, bias)
    model.data_config = {k: config[k] for k in ("input_size", "mean", "std", "interpolation")}
    model.spec = {"model_name": name, "head": head, "head_kwargs": head_kwargs}
    model.spec |= {"num_labels": num_labels, "img_size": list(config["input_size"][1:])}
    model.spec["model_kwargs"] = kwargs
    return model


def base_rate_logits(targets: np.ndarray, exclusive: bool = False) -> np.ndarray:
    """Return the logit of each label's share of present among its known cells, (L,).

    A head that starts there has no loss to lose by learning the rates. They are clipped to half a
    photo more than none and less than all.

    Args:
        targets: (N, L) of the training part, NaN for unknown.
        exclusive: one class an image: the logarithms of the shares, for a softmax.
    """
    known = (~np.isnan(targets)).sum(0)
    least = 0.5 / np.maximum(known, 1)
    rates = (np.nansum(targets, 0) / np.maximum(known, 1)).clip(least, 1 - least)
    return np.log(rates) if exclusive else np.log(rates / (1 - rates))


def _classifier(model: nn.Module) -> nn.Module:
    """Return the head of a model as one module; distilled models have two."""
    head = getattr(model, "get_classifier", nn.Identity)()
    return nn.ModuleList(head) if isinstance(head, tuple) else head


def _last_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that give the logits of a model with a linear head; distilled have two."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else model
    found = found if isinstance(found, tuple) else (found,)
    kinds = nn.Linear, nn.Conv2d
    layers = [[m for m in part.modules() if isinstance(m, kinds)][-1:] for part in found]
    return sum(layers, [])  # none of a backbone without a head


@torch.no_grad()
def _start_head(model: nn.Module, bias: Sequence[float] | np.ndarray | torch.Tensor) -> None:
    """Make the first logits nearly `bias`: large ones would tear up the pretrained features.

    timm starts some families (EfficientNet, MobileNet, MNASNet) with weights that grow as labels
    get fewer: 16 times as large as `nn.Linear`'s for 5 labels.
    """
    head, bias = getattr(model, "head", None), torch.as_tensor(bias, dtype=torch.float32)
    if isinstance(head, CSRA):  # of its weights only the directions count
        head.bias.copy_(bias)
    elif isinstance(head, MLDecoder):
        head.decoder.duplicate_pooling.mul_(0.4)
        head.decoder.duplicate_pooling_bias.copy_(bias)
    else:
        for layer in _last_layers(model):
            nn.init.trunc_normal_(layer.weight, std=0.3 / layer.weight[0].numel() ** 0.5)
            if layer.bias is not None:
                layer.bias.copy_(bias)


def _create_model(name: str, size: tuple[int, int] | None, kwargs: dict) -> nn.Module:
    try:
        if size is not None:
            _check_img_size(name, size, kwargs)
            return timm.create_model(name, img_size=size, **kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **kwargs)  # convolutional: takes any size


def _fits(name: str, size: tuple[int, int], kwargs: dict) -> bool:
    """Say whether no pixel is cut off and no window is padded at this input size."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, img_size=size, **kwargs)
    except (AssertionError, RuntimeError, ZeroDivisionError):
        return False
    info = getattr(model, "feature_info", None)
    blocks = [m for m in model.modules() if hasattr(m, "window_size")]
    pairs = [(size, (info[-1]["reduction"] if info else 1,) * 2)]
    pairs += [
        (block.input_resolution, timm.layers.to_2tuple(block.window_size))
        for block in blocks
        if hasattr(block, "input_resolution")
    ]
    return not any(side % part for sides, parts in pairs for side, part in zip(sides, parts))


def _check_img_size(name: str, size: tuple[int, int], kwargs: dict) -> None:
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= 8192 for side in size):
        raise ValueError(f"img_size={size}: expected a positive height and width, at most 8192 px.")
    if _fits(name, size, kwargs):
        return
    nearest = []
    for side in size:
        ranges = range(side // 8 * 8, 7, -8), range(-(-side // 8) * 8, 2 * side + 512, 8)
        found = {next((s for s in r if _fits(name, (s, s), kwargs)), None) for r in ranges}
        nearest.append(sorted(found - {None}))
    sides = " × ".join(" or ".join(map(str, sizes)) or "none" for sizes in nearest)
    raise ValueError(
        f"{name} cannot take {size[0]} × {size[1]} px (height × width): its patches or windows do"
        f" not divide it; the nearest sizes are {sides}, or pass another window_size."
    )


def _load_pretrained(
    model: nn.Module, name: str, source: bool | str | os.PathLike, num_labels: int
) -> None:
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if source is not True:
        _load_file(model, name, Path(source), filter_fn)
        return
    try:
        timm.models.load_pretrained(model, num_classes=num_labels, filter_fn=filter_fn)
    except Exception as error:
        raise RuntimeError(
            f"the pretrained weights of {name} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {str(error)[:200]}). Check the connection, give a local "
            "weight file as PRETRAINED, or set PRETRAINED = False."
        ) from error


def _pretrained_windows(name: str, path: Path) -> dict[str, Any]:
    """Return timm's option for the windows that a SwinV2 file was trained in, where it tells them.

    SwinV2 measures positions in shares of the pretraining window, so that a larger window goes on
    where the smaller one ended. The authors' files and those of pretraining.ipynb hold each block's
    table of offsets, sign(x) log2(8 |x| / (window - 1) + 1) / log2(8) for x in pixels of the
    feature map (Liu et al. 2022, arXiv 2111.09883, eq. 4, scaled as in their code).
    """
    is_swin_v2 = timm.models.model_entrypoint(name).__module__.endswith("swin_transformer_v2")
    if not is_swin_v2 or not path.is_file():
        return {}
    state: dict[str, torch.Tensor] = {}
    with contextlib.suppress(Exception):  # a file that cannot be read is named when it is loaded
        state = timm.models.load_state_dict(str(path), weights_only=True)
    windows, key = [], "layers.{}.blocks.0.attn.relative_coords_table"
    while key.format(len(windows)) in state:
        table = state[key.format(len(windows))][0]  # (2 h - 1, 2 w - 1, 2)
        windows.append([_window(table[:, 0, 0]), _window(table[0, :, 1])])
    unknown = [0] * (4 - len(windows))  # of a network with more stages, which is refused later
    return {"pretrained_window_sizes": windows + unknown} if windows else {}


def _window(offsets: torch.Tensor) -> int:
    """Return the window whose offsets of -x to x pixels these are, see `_pretrained_windows`."""
    most = len(offsets) // 2
    return round(1 + 8 * most / (8 ** offsets[-1].item() - 1)) if most else 1


def _load_file(model: nn.Module, name: str, path: Path, filter_fn: Callable | None) -> None:
    """Load all weights but the classifier's from a state dict, through timm's own key filter."""
    if not path.is_file() or path.suffix in (".npz", ".npy"):
        raise ValueError(f"{path}: no such weight file; give a state dict or PRETRAINED = False.")
    own = model.state_dict()

    def fitting(state: dict, model: nn.Module) -> dict:
        with contextlib.suppress(KeyError):  # weights of another architecture: named below
            state = _resize_wide_positions(state, model)
            state = filter_fn(state, model) if filter_fn else state
        return {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}

    try:
        result = timm.models.load_checkpoint(model, str(path), strict=False, filter_fn=fitting)
    except Exception as error:
        raise ValueError(f"{path}: not a state dict that is safe to load ({error}).") from None
    layers = _last_layers(model)
    classifier = tuple(f"{n}." for n, m in model.named_modules() if any(m is h for h in layers))
    lost = [k for k in result.missing_keys if not k.startswith(classifier)]
    lost = [k for k in lost if not k.endswith("num_batches_tracked")]  # files of old PyTorch
    if lost:
        problem = f"lacks {len(lost)} of {len(own)} weights of {name} in its shape: {_some(lost)}"
        raise ValueError(f"{path}: {problem}.")


def _resize_wide_positions(state: dict, model: nn.Module) -> dict:
    """Resize position embeddings of 2:1 panoramas; timm takes all of them for square."""
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not torch.is_tensor(table) or own is None or grid is None:
        return state
    if table.ndim != 3 or table.shape == own.shape:
        return state
    alone = getattr(model, "no_embed_class", False)
    prefix = 0 if alone else getattr(model, "num_prefix_tokens", 0)
    height = round(((table.shape[1] - prefix) / 2) ** 0.5)
    if 2 * height**2 != table.shape[1] - prefix:
        return state
    resized = resample_abs_pos_embed(table, list(grid), [height, 2 * height], prefix)
    return state | {"pos_embed": resized}


def _autocast(model: nn.Module, device: str) -> torch.autocast:
    """Return the context in which `model` answers fastest."""
    precision = fast_precision(model, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast(device, dtype, enabled=precision != "no")


def extract_features(
    model: nn.Module,
    dataset: DataPartition,
    batch_size: int = 32,
    num_workers: int = 0,
    pooled: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> torch.Tensor:
    """Return what the model's head sees of every image, unpooled, e.g. (N, H, W, C) of SwinV2.

    Computed once, a head is trained on them in seconds (`FeatureSet`, `fit_probe`).

    Args:
        model: one of timm's, or with a head of this file.
        pooled: (N, C) instead, what the last layer of one of timm's models sees; a small part of
            the memory.
        cache_dir: keeps them there; asked again for the same photos (name, size, time), weights and
            preparation, they are read instead of computed.

    Raises:
        ValueError: pooled features of a model with a head of this file, which does not pool.
    """
    if pooled and isinstance(model, _HeadedModel):
        raise ValueError("pooled=True takes a model with a linear head; the others do not pool.")
    cached = cache_dir and Path(cache_dir) / f"{_features_key(model, dataset, pooled)}.npy"
    if cached and cached.is_file():
        return torch.from_numpy(np.load(cached, allow_pickle=False))
    device = next(model.parameters()).device
    layout = torch.channels_last if gains_by_channels_last(model) else torch.contiguous_format
    model.to(memory_format=layout).eval()
    found, loader = [], make_loader(dataset, batch_size, num_workers=num_workers)
    # not inference_mode: a head could not be trained on its tensors
    with torch.no_grad(), _autocast(model, device.type):
        for images, _ in tqdm(loader, desc="features", leave=False, delay=2):
            images = images.to(device).contiguous(memory_format=layout)
            features = model.forward_features(images)
            features = model.forward_head(features, pre_logits=True) if pooled else features
            found.append(features.float().cpu())
    features = torch.cat(found)
    if cached:
        with replacing(cached) as temporary, open(temporary, "wb") as file:
            np.save(file, features.contiguous().numpy(), allow_pickle=False)
    return features


def _features_key(model: nn.Module, dataset: DataPartition, pooled: bool) -> str:
    """Return a name that changes with the photos, the backbone's weights or the preparation."""
    stats = [os.stat(path) for path in dataset.paths]
    files = [(p, s.st_size, s.st_mtime_ns) for p, s in zip(dataset.paths, stats)]
    digest = hashlib.sha256(repr((files, str(dataset.transform), pooled)).encode())
    in_head = {id(tensor) for tensor in _classifier(model).state_dict(keep_vars=True).values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in in_head:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


PROBE_STRENGTHS = tuple(10.0 ** np.arange(-4, 1.1, 0.5))


def _fit_logistic(
    x: torch.Tensor, y: torch.Tensor, strength: float, exclusive: bool
) -> torch.Tensor:
    """Return (C + 1, L) of ridge logistic regressions: least Σ loss + ‖w‖² / 2 strength.

    The same optimum as sklearn.linear_model.LogisticRegression(C=strength), all labels at once.
    """
    known = ~y.isnan()
    weights = torch.zeros(x.shape[1] + 1, y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _log_loss(x @ weights[:-1] + weights[-1], y, known, exclusive)
        loss = (loss + weights[:-1].square().sum() / (2 * strength)) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _log_loss(
    logits: torch.Tensor, y: torch.Tensor, known: torch.Tensor, exclusive: bool
) -> torch.Tensor:
    """Return the sum of the log losses over the known cells, or over the judged images."""
    if exclusive:
        losses = F.cross_entropy(logits, y.nan_to_num(0.0), reduction="none")
        return (losses * known.all(1)).sum()
    losses = F.binary_cross_entropy_with_logits(logits, y.nan_to_num(0.0), reduction="none")
    return (losses * known).sum()


def fit_probe(
    features: torch.Tensor,
    targets: np.ndarray,
    groups: Sequence | None = None,
    n_folds: int = 5,
    exclusive: bool = False,
    seed: int = 42,
) -> tuple[nn.Linear, pd.Series]:
    """Fit a linear probe: one logistic regression a label on features of a frozen backbone.

    How strongly it is held back (one strength for all labels) is chosen by the log loss on groups
    left out in turn.

    Args:
        features: (N, C), e.g. of `extract_features(pooled=True)`.
        targets: (N, L) of the training part, NaN for unknown.
        groups: (N,), never divided between folds; None: every row is its own.
        exclusive: one class an image: one softmax instead of L sigmoids.

    Returns:
        The layer, features (B, C) → logits (B, L), and the log loss of each strength.
    """
    groups = np.arange(len(targets)) if groups is None else np.asarray(groups)
    y = torch.as_tensor(np.asarray(targets), dtype=torch.float32)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    x, losses = (features - mean) / std, []
    n_folds = min(n_folds, len(set(groups)))
    folds = []  # of a single group: the strongest penalty
    if n_folds > 1:
        splitter = GroupKFold(n_folds, shuffle=True, random_state=seed)
        folds = list(splitter.split(x, groups=groups))
    for strength in PROBE_STRENGTHS:
        total = 0.0
        for train, held_out in folds:
            weights = _fit_logistic(x[train], y[train], strength, exclusive)
            logits, rest = x[held_out] @ weights[:-1] + weights[-1], y[held_out]
            total += _log_loss(logits, rest, ~rest.isnan(), exclusive).item()
        losses.append(total / max(int((~y.isnan()).sum()), 1))
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break  # it only overfits more from here
    table = pd.Series(losses, PROBE_STRENGTHS[: len(losses)], name="log loss")
    weights = _fit_logistic(x, y, table.idxmin(), exclusive)
    layer = nn.Linear(features.shape[1], y.shape[1])
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


def measure_throughput(
    models: dict[str, nn.Module], batch_size: int = 32, repeats: int = 5
) -> pd.DataFrame:
    """Measure models side by side on a batch of noise: they take turns, the median counts.

    Returns:
        A line a model: parameters (millions), images_per_second (forward pass), relative (to the
        first model).
    """
    seconds = {name: [] for name in models}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, model in models.items():
            device = next(model.parameters()).device
            images = torch.randn(batch_size, *model.data_config["input_size"], device=device)
            if gains_by_channels_last(model):
                images = images.contiguous(memory_format=torch.channels_last)
            model.eval()
            images.sum().item()  # waits until the batch is there
            start = time.perf_counter()
            with torch.inference_mode(), _autocast(model, device.type):
                model(images).sum().item()  # waits for the device
            if turn:
                seconds[name].append(time.perf_counter() - start)
    table = pd.DataFrame(index=pd.Index(models, name="model"))
    table["parameters"] = [sum(p.numel() for p in m.parameters()) / 1e6 for m in models.values()]
    table["images_per_second"] = [batch_size / np.median(times) for times in seconds.values()]
    table["relative"] = table["images_per_second"] / table["images_per_second"].iloc[0]
    return table


def _label_maps(model: nn.Module, images: torch.Tensor, label: int) -> torch.Tensor:
    """Return where the model looks for a label, (B, h, w) on its grid of positions.

    The head's attention; for a linear head the class activation map (Zhou et al., CVPR 2016,
    arXiv 1512.04150): the logit that each position would have alone.
    """
    features, head = model.forward_features(images), model.get_classifier()
    backbone = model.backbone if isinstance(model, _HeadedModel) else model
    layout = feature_layout(backbone, features, images.shape[2:])
    is_last = layout["input_fmt"] == "NHWC"
    if isinstance(head, _SpatialHead):
        maps = head.attention(features)[:, label]  # (B, N)
    else:
        tokens = _SpatialHead(**layout).tokens(features)  # (B, N, C)
        alone = tokens.flatten(0, 1)[:, None]  # for tokens: in the place of the class token, too
        count = 1 + layout["num_prefix_tokens"]
        alone = alone.expand(-1, count, -1) if features.ndim == 3 else alone[:, None]
        alone = alone if is_last else alone.permute(0, 3, 1, 2)
        maps = model.forward_head(alone)[:, label].view(tokens.shape[:2])
    grid = features.shape[1:3] if is_last else features.shape[2:]
    if features.ndim == 3:
        grid = _grid(maps.shape[1], images.shape[2:])
    return maps.view(len(maps), *grid).float()


def gains_by_channels_last(model: nn.Module) -> bool:
    """Say whether convolutions do the work; patch-embedding models gain nothing."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 8


# ---------------------------------------------------------------- training


def _fastest_device() -> str:
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return next((name for name, is_there in found.items() if is_there), "cpu")


def fast_precision(model: nn.Module, device: str | None = None) -> str:
    """Return the accelerate precision in which a device trains `model` fastest.

    "bf16" or "fp16" on a GPU; on a CPU "bf16" where it has instructions for that, but "no" for
    networks with depth-wise convolutions, of which some are slower then (MobileNet, EfficientNet).

    Args:
        device: "cuda", "mps" or "cpu"; None is the fastest of this machine.
    """
    device = device or _fastest_device()
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = torch.cpu.get_capabilities()
    units = any(cpu.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    depth_wise = gains_by_channels_last(model) and any(
        m.groups == m.in_channels > 1 for m in convolutions
    )
    return "bf16" if units and device == "cpu" and not depth_wise else "no"


class MaskedLoss(nn.Module):
    """A timm multi-label loss by name that leaves unknown (NaN) targets out.

    "bce", "asl" and "db" are averaged over the known cells; the weights of "db" take an unknown
    cell as present by the label's rate in training. "zlpr" and "twoway" compare labels with each
    other: an unknown cell enters as a negative with logit -1e4, whose share in their log-sum-exp
    is exactly zero. "zlpr" is averaged over the images with a known cell. "ce", softmax
    cross-entropy for classes that exclude each other, is averaged over the images without an
    unknown cell.

    Args:
        name: "bce", "asl", "zlpr", "twoway" or "db"; "ce" for one class an image.
        targets: (N, L) training targets, from which class weights and counts are taken.
        class_weights: None, "neg_pos", "inv_freq" or "effective_num" ("bce" and "asl").
        soft: targets lie between 0 and 1 ("zlpr" and "twoway" refuse these).
        label_smoothing: share of the target that all classes get in equal parts ("ce").
        **kwargs: passed to `timm.loss.create_classification_loss`, e.g. asl_gamma_neg.
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
        self.exclusive = name == "ce"
        if self.exclusive:
            if class_weights is not None or kwargs:
                raise ValueError(f"loss='ce' takes no {_some(kwargs or ['class_weights'])}.")
            self.loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=label_smoothing)
            return
        if label_smoothing:
            raise ValueError("label_smoothing goes with loss='ce', one class an image.")
        known = np.maximum((~np.isnan(targets)).sum(0), 1)
        # One sample count for all labels, as timm expects: scale each label's rate to N images.
        counts = np.nansum(targets, axis=0) / known * len(targets)
        if class_weights is not None:
            _check_choice("class_weights", class_weights, CLASS_WEIGHT_METHODS)
            kind, weights = compute_class_weights(counts, len(targets), class_weights)
            kwargs[kind] = weights
        if name == "db":
            kwargs |= {"class_counts": counts, "num_samples": len(targets)}
        if kwargs.get("bce_sum"):
            raise ValueError("bce_sum sums unknown cells too; leave it out.")
        loss = create_classification_loss(name, multi_label=True, soft_targets=soft, **kwargs)
        self.averages_cells = name not in ("zlpr", "twoway")
        if self.averages_cells:
            loss.reduction = "none"
        self.loss = loss
        prior = torch.as_tensor(counts / len(targets) * (name == "db"), dtype=torch.float)
        self.register_buffer("prior", prior, persistent=False)
        self.averages_images = name == "zlpr"

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        known = ~targets.isnan()
        if self.exclusive:
            judged = known.all(1)  # (B,)
            losses = self.loss(logits.float(), targets.nan_to_num(0.0).float())
            return (losses * judged).sum() / judged.sum().clamp(min=1)
        targets = torch.where(known, targets, self.prior.to(targets.dtype))
        if not self.averages_cells:
            loss = self.loss(logits.float().masked_fill(~known, -1e4), targets)
            n_judged = known.any(1).sum().clamp(min=1)
            return loss * len(known) / n_judged if self.averages_images else loss
        cells = self.loss(logits.float(), targets)  # (B, L)
        return (cells * known).sum() / known.sum().clamp(min=1)


def _check_exclusive(part: DataPartition, name: str) -> None:
    """Refuse targets that are no shares of one class an image; unjudged images may be there."""
    known = ~np.isnan(part.targets)
    sums = np.where(known, part.targets, 0).sum(1)
    wrong = known.any(1) & (~known.all(1) | (np.abs(sums - 1) > 1e-3))
    if wrong.any():
        first = getattr(part, "paths", np.arange(len(part)))[int(wrong.argmax())]
        problem = f"{wrong.sum()} {name} images have not exactly one class (the first: {first})"
        raise ValueError(f"loss='ce': {problem}; use 'bce' where several labels may be present.")


def _look(model: nn.Module, images: torch.Tensor, flip: bool) -> torch.Tensor:
    """Return logits, with `flip` the mean of those of the images and of their mirror images."""
    logits = model(images)
    return (logits + model(images.flip(-1))) / 2 if flip else logits


def _to_probs(logits: torch.Tensor, exclusive: bool) -> np.ndarray:
    """Return (..., L): the softmax of classes that exclude each other, else sigmoids."""
    logits = logits.float()
    return (logits.softmax(-1) if exclusive else logits.sigmoid()).cpu().numpy()


def _read_state(path: Path) -> dict[str, Any]:
    """Return a JSON object of a run folder."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        problem = f"{path}: cannot be read ({type(error).__name__})"
        raise ValueError(f"{problem}; call fit() to start again.") from None


def _remove_resume_point(folder: Path) -> None:
    """Delete last/, its trainer.json first: half of it never looks complete."""
    (folder / "trainer.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


# What `TrainConfig.recipe` starts from: at least `steps` steps and `min_epochs` epochs.
PRETRAINED_RECIPE: dict[str, Any] = {
    "steps": 100,
    "min_epochs": 5,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "layer_decay": 0.8,
    "frozen_below": 0.2,
    "warmup_epochs": 1,
    "ema_decay": 0.98,
    "batch_norm": "frozen",
    "patience": 40,  # to the end: the best epochs are the last, when the rate is low
    "min_crop": 0.4,
    "start": "probe",
    "flip_test": True,
}
SCRATCH_RECIPE: dict[str, Any] = {
    "steps": 840,
    "min_epochs": 20,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "weight_decay": 0.2,
    "warmup_epochs": 3,
    "patience": 15,
    "min_crop": 0.95,
}


@dataclass
class TrainConfig:
    """Everything that decides a training run; saved as config.json beside its results.

    Rates are for one optimizer step, which sees batch_size × grad_accum_steps × processes images.
    The first block says how to learn, the second from what; `build_run` makes it all.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 5e-4
    head_learning_rate: float | None = None  # None: learning_rate
    weight_decay: float = 0.05
    layer_decay: float | None = None  # learning rate × layer_decay a layer towards the input
    warmup_epochs: int = 2
    grad_accum_steps: int = 1
    clip_grad: float | None = 1.0
    ema_decay: float | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    loss: str = "bce"  # "ce": one class an image
    loss_kwargs: dict = field(default_factory=dict)
    label_smoothing: float = 0.0  # "ce" only
    class_weights: str | None = None
    schedule: str = "cosine"  # of the learning rate, one of SCHEDULES
    frozen_below: float = 0.0  # with layer_decay: layers with a smaller share stay as they are
    start: str = "small"  # or "probe": the head is a probe already, which epoch 0 validates
    batch_norm: str = "trained"  # or "frozen": statistics as they were pretrained
    grad_checkpointing: bool = False  # half the memory for a third more time
    min_crop: float = 0.8  # share of a photo that a random crop keeps
    rand_augment: str | None = None  # in the place of the colour jitter, see `make_transforms`
    drop_rate: float = 0.0  # before the head
    flip_test: bool = False  # answer for a photo and its mirror image together

    partition_dir: str = ""  # of partitioning.ipynb
    view: str = "half"
    model_name: str = ""  # of timm
    model_kwargs: dict = field(default_factory=dict)
    pretrained: bool | str = False  # True (hub), or the path of a state dict
    img_width: int = 0  # pixels; the height is the same, or half of it for panoramas
    cache_dir: str | None = None  # keeps decoded, shrunk photos, and features
    patience: int = 10  # epochs without a better validation score
    seed: int = 42
    num_workers: int = 0
    precision: str = "auto"  # "no", "bf16" or "fp16"
    channels_last: bool | None = None  # None: where the backbone gains by it
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum_steps", "patience"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number from 1.")
        highest = {"learning_rate": np.inf, "head_learning_rate": np.inf, "clip_grad": np.inf}
        highest |= {"layer_decay": 1, "ema_decay": 1}
        for name, high in highest.items():
            value = getattr(self, name)
            optional = value is None and name != "learning_rate"
            if not optional and not (isinstance(value, (int, float)) and 0 < value <= high):
                raise ValueError(f"{name}={value!r}: expected more than 0 and at most {high}.")
        for name in ("weight_decay", "warmup_epochs", "mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"{name}={value!r}: expected 0 or more.")
        smoothing = self.label_smoothing
        if not (isinstance(smoothing, (int, float)) and 0 <= smoothing < 1):
            raise ValueError(f"label_smoothing={smoothing!r}: expected 0 to below 1.")
        own = isinstance(self.loss_kwargs, dict) and "label_smoothing" not in self.loss_kwargs
        if not (isinstance(self.loss, str) and own):
            problem = f"loss={self.loss!r}, loss_kwargs={self.loss_kwargs}"
            raise ValueError(f"{problem}: expected a name and a dict without label_smoothing.")
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not (isinstance(self.frozen_below, (int, float)) and 0 <= self.frozen_below < 1):
            raise ValueError(f"frozen_below={self.frozen_below!r}: expected 0 to below 1.")
        _check_choice("start", self.start, ("small", "probe"))
        _check_choice("view", self.view, VIEWS)
        self.model_kwargs = json.loads(json.dumps(self.model_kwargs))  # tuples as in config.json
        if not (isinstance(self.min_crop, (int, float)) and 0 < self.min_crop <= 1):
            raise ValueError(f"min_crop={self.min_crop!r}: expected more than 0 and at most 1.")
        _check_choice("batch_norm", self.batch_norm, ("trained", "frozen"))

    @classmethod
    def recipe(cls, pretrained: bool | str, n_images: int, **changes: Any) -> "TrainConfig":
        """Return the settings that were measured best (docs/results.md), with `changes`.

        Args:
            pretrained: as in `build_model`; random weights want another recipe.
            n_images: of the training part: few photos are seen more often.
            **changes: other fields; None leaves one to the recipe.

        Raises:
            ValueError: a field that does not exist.
        """
        unknown = changes.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            known = _some(cls.__dataclass_fields__, 99)
            raise ValueError(f"no option {_some(sorted(unknown))}; expected some of {known}.")
        found = dict(PRETRAINED_RECIPE if pretrained else SCRATCH_RECIPE, pretrained=pretrained)
        batch_size = changes.get("batch_size") or found["batch_size"]
        epochs = round(found.pop("steps") * batch_size / max(n_images, 1))
        found["epochs"] = min(max(epochs, found.pop("min_epochs")), 40)
        return cls(**(found | {key: v for key, v in changes.items() if v is not None}))

    @classmethod
    def read(cls, path: str | os.PathLike, **changes: Any) -> "TrainConfig":
        """Return the settings of a config.json, with `changes`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file.
        """
        path = _need_file(path, "run training.ipynb to make it")
        try:
            return cls(**(json.loads(path.read_text(encoding="utf-8")) | changes))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: no config.json of a training ({error}).") from None

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.img_width // (2 if self.view == "panorama" else 1), self.img_width


def build_run(
    config: TrainConfig, head: str = "linear", names: Sequence[str] = PARTS, **head_kwargs: Any
) -> tuple[nn.Module, dict[str, DataPartition]]:
    """Return the model and the data sets that a configuration describes.

    Args:
        head, head_kwargs: as in `build_model`.
        names: of the partitions to read, "train" among them.

    Returns:
        The model, its head at the base rates of the training part, and the parts: "train" with
        augmentation, "plain" (the training part without), and the others.

    Raises:
        FileNotFoundError: a partition is missing; it says which notebook makes it.
    """
    parts, labels = load_parts(config.partition_dir, names)
    rates = base_rate_logits(parts["train"][labels].to_numpy(float), config.loss == "ce")
    set_seed(config.seed)
    model = build_model(
        config.model_name,
        len(labels),
        head,
        config.pretrained,
        config.img_size,
        rates,
        drop_rate=config.drop_rate,
        **config.model_kwargs,
        **head_kwargs,
    )
    crops = {"crop_scale": (config.min_crop, 1.0), "rand_augment": config.rand_augment}
    augment = make_transforms(model, True, config.view, **crops)
    plain = make_transforms(model, False, config.view)
    tables = parts | {"plain": parts["train"]}
    return model, {
        name: DataPartition(table, labels, augment if name == "train" else plain, config.cache_dir)
        for name, table in tables.items()
    }


HEAD_RATES = {"csra": 1e-2, "mldecoder": 1e-3}


def start_from_probe(
    model: nn.Module, parts: dict[str, DataPartition], config: TrainConfig, most: int = 4000
) -> float:
    """Let the head of a model learn its labels on the frozen backbone, before fine-tuning.

    A linear head becomes a probe (`fit_probe`). CSRA and ML-Decoder are trained for 20 epochs on
    feature maps, the best epoch chosen on validation.

    Args:
        parts: "plain" and "val" of `build_run`.
        config: loss, batch size, seed and cache are taken from it.
        most: photos whose maps a head learns from, drawn at random; they lie in memory.

    Returns:
        The validation mAP of the head.
    """
    options = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    options |= {"pooled": model.spec["head"] == "linear", "cache_dir": config.cache_dir}
    train, val = copy.copy(parts["plain"]), parts["val"]
    if not options["pooled"]:
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(train))[:most])
        train.paths, train.targets = [train.paths[i] for i in rows], train.targets[rows]
    x, x_val = (extract_features(model, part, **options) for part in (train, val))
    if options["pooled"]:
        probe, _ = fit_probe(x, train.targets, train.groups, exclusive=config.loss == "ce")
        use_probe(model, probe)
        with torch.inference_mode():
            return mean_average_precision(val.targets, probe(x_val).numpy())
    sets = [FeatureSet(f, p.targets, p.label_columns) for f, p in ((x, train), (x_val, val))]
    taken = ("loss", "loss_kwargs", "class_weights", "seed", "precision")
    own = {key: getattr(config, key) for key in taken}
    rate = HEAD_RATES[model.spec["head"]]
    short = TrainConfig(20, config.batch_size, rate, warmup_epochs=1, **own)
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(model.get_classifier(), *sets, short, folder).fit()["val_mAP"].max()


def _make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates: int) -> Any:
    """Return timm's schedule, one value an optimizer step, `updates` of them an epoch.

    After a linear warm-up: "cosine" to zero (Loshchilov & Hutter 2017, arXiv 1608.03983);
    "warm-restarts", the same in three equal cycles; "step", a tenth after each third of the rest;
    "flat-cosine", the last 28 % of the steps fall. "one-cycle" rises from 1/25 for 30 % of the
    steps, then falls (the rates of Smith & Topin 2019, arXiv 1708.07120; no cycle of momentum).
    """
    epochs, warmup = config.epochs, min(config.warmup_epochs, config.epochs - 1)
    rest, top = epochs - warmup, config.learning_rate
    options = {"sched": "cosine", "num_epochs": epochs, "warmup_epochs": warmup, "warmup_lr": 0.0}
    own: dict[str, dict[str, Any]] = {
        "cosine": {},
        "one-cycle": {"num_epochs": 0.7 * epochs, "warmup_prefix": True}
        | {"warmup_epochs": 0.3 * epochs, "warmup_lr": top / 25},
        "flat-cosine": {"sched": "wsd", "decay_epochs": 0.28 * epochs / rest, "decay_fn": "cosine"},
        "step": {"sched": "step", "decay_epochs": rest / 3, "decay_rate": 0.1}
        | {"warmup_prefix": True},
        "warm-restarts": {"num_epochs": rest / 3, "warmup_prefix": True}
        | {"cycle_limit": 3, "cycle_decay": 1.0},
    }
    per_step = {"step_on_epochs": False, "updates_per_epoch": updates}
    return create_scheduler_v2(optimizer, **(options | own[config.schedule]), **per_step)[0]


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Return timm's parameter groups, those of the head apart: its learning rate is its own."""
    head = _classifier(model)
    backbone = model.backbone if isinstance(model, _HeadedModel) else model
    decay = config.weight_decay
    exempt = {"no_weight_decay_list": getattr(backbone, "no_weight_decay", set)()}
    if config.layer_decay is None:
        groups = param_groups_weight_decay(backbone, decay, **exempt)
    else:
        layers = {"layer_decay": config.layer_decay, "no_opt_scale": config.frozen_below or None}
        groups = param_groups_layer_decay(backbone, decay, **layers, **exempt)
    in_head = {id(parameter) for parameter in head.parameters()}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in in_head]
    scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
    groups += [group | {"lr_scale": scale} for group in param_groups_weight_decay(head, decay)]
    return [group for group in groups if group["params"]]


class Trainer:
    """Train a model on a training partition, keeping the weights of the best validation score.

    With loss="ce" the classes exclude each other: probabilities are a softmax, and the best epoch
    is the one with the highest top-1 accuracy; else they are sigmoids, and it is the one with the
    highest mAP. `prepare_loss`, `training_loss` and `validate` are what another task overrides.

    `run_dir` receives config.json, history.csv (a row an epoch), model.safetensors and last/, the
    complete resume point. Every epoch's random numbers follow from (seed, epoch), so a run that was
    stopped and resumed ends like one that was not (on a GPU: but for the rounding of kernels that
    add in any order). Works in one process, or in several with DistributedDataParallel under
    `accelerate launch`; several machines need a `run_dir` that all of them see.

    Args:
        model: (B, 3, H, W) → logits (B, L).
        train_set, val_set: partitions with the same labels in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: DataPartition,
        val_set: DataPartition,
        config: TrainConfig,
        run_dir: str | os.PathLike,
    ) -> None:
        if train_set.label_columns != val_set.label_columns:
            raise ValueError("training and validation partitions have different labels or order.")
        self.config, self.run_dir, self.val_set = config, Path(run_dir), val_set
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # accelerate keeps one global state a process; a notebook may train more than once.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        precision = fast_precision(model) if config.precision == "auto" else config.precision
        self.accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.grad_accum_steps,
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
        set_seed(config.seed)
        self.metric = "val_top1" if config.loss == "ce" else "val_mAP"
        self.prepare_loss(train_set)
        self._prepare_model(model, train_set)
        self.epoch, self.step, self.best, self.history = 0, 0, -np.inf, []
        self.stopped = False  # by hand, before its end

    def prepare_loss(self, train_set: DataPartition) -> None:
        """Check the targets and set `criterion`; another task may set `metric` to "val_loss"."""
        config, targets = self.config, train_set.targets
        if not (targets >= 0).any():
            raise ValueError("the training part has no judged label: nothing to learn from.")
        if not (self.val_set.targets >= 0.5).any():
            raise ValueError("no label is present in the validation part: nothing to select by.")
        if config.loss == "ce":
            for name, part in (("training", train_set), ("validation", self.val_set)):
                _check_exclusive(part, name)
        mixes = config.mixup_alpha > 0 or config.cutmix_alpha > 0
        soft = mixes or bool(((targets > 0) & (targets < 1)).any())
        options = config.loss_kwargs | {"label_smoothing": config.label_smoothing}
        loss = MaskedLoss(config.loss, targets, config.class_weights, soft, **options)
        self.criterion = loss.to(self.accelerator.device)
        alphas = config.mixup_alpha, config.cutmix_alpha
        self.mixup = TriStateMixup(targets.shape[1], *alphas) if mixes else None

    def _prepare_model(self, model: nn.Module, train_set: DataPartition) -> None:
        """Set up model, moving average, optimizer, loader and the schedule over all steps."""
        config, wanted = self.config, self.config.channels_last
        self.channels_last = gains_by_channels_last(model) if wanted is None else wanted
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model = model.to(self.accelerator.device, memory_format=layout)
        decay = config.ema_decay
        self.plain = model  # without what accelerate wraps around it
        if config.grad_checkpointing:
            getattr(model, "backbone", model).set_grad_checkpointing()
        self.ema = ModelEmaV3(model, decay, use_warmup=True) if decay else None
        if config.compile:
            model.compile()
        groups = _parameter_groups(model, config)
        optimizer = create_optimizer_v2(groups, "adamw", lr=config.learning_rate)
        loader = make_loader(train_set, config.batch_size, True, config.num_workers, config.seed)
        self.generator = loader.generator
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        for name in ("forward", "_original_forward"):  # accelerate's autocast, which is called here
            self.plain.__dict__.pop(name, None)  # anyway; they would tie the model to itself, so
            # that its memory is not free when it is let go
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

    def seconds_per_epoch(self, steps: int = 3) -> float:
        """Measure some training steps on this machine, after one to warm up, and leave no trace.

        Returns:
            Seconds an epoch of training takes, without its validation.
        """
        config, device = self.config, self.accelerator.device
        buffers = [buffer.clone() for buffer in self.plain.buffers()]  # batch norm's statistics
        loader = make_loader(
            self.loader.dataset, config.batch_size, True, config.num_workers, config.seed
        )
        self._train_mode()
        seconds, start = [], time.perf_counter()
        for images, targets in itertools.islice(loader, steps + 1):
            loss = self.training_loss(images.to(device), targets.to(device))
            self.accelerator.backward(loss)
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        self.model.zero_grad()
        for buffer, before in zip(self.plain.buffers(), buffers):
            buffer.copy_(before)
        return float(np.median(seconds[1:] or seconds)) * len(self.loader)

    def fit(self, after_epoch: Callable[[dict[str, float]], None] | None = None) -> pd.DataFrame:
        """Train from the start and return the history; the model then holds the best weights.

        A KeyboardInterrupt (the stop button) ends training early, keeps the best weights and sets
        `stopped`, which a loop over trainings should ask.

        Args:
            after_epoch: called with each new row of the history; what it raises ends the training.
        """
        if self.history:
            raise RuntimeError("this Trainer has trained; call resume() or make a new Trainer.")
        if self.accelerator.is_main_process:
            for old in ("last", "last.tmp"):
                _remove_resume_point(self.run_dir / old)
            _write_json(self.run_dir / "config.json", asdict(self.config))
        if self.config.start == "probe":
            row = {"epoch": 0, "step": 0, "learning_rate": 0.0, "train_loss": float("nan")}
            self._note(row | self.validate() | {"seconds": 0.0, "images_per_second": 0.0})
            self._save_last()
        return self._run(after_epoch)

    def resume(self, after_epoch: Callable[[dict[str, float]], None] | None = None) -> pd.DataFrame:
        """Go on from last/ and return the whole history; `after_epoch` as in `fit`.

        Raises:
            FileNotFoundError: no complete resume point.
            ValueError: the run was made with other settings.
        """
        places = [self.run_dir / "last.tmp", self.run_dir / "last"]  # if complete, tmp is newer
        last = next((p for p in places if (p / "trainer.json").is_file()), None)
        if last is None:
            raise FileNotFoundError(f"{self.run_dir}: no finished epoch to resume; call fit().")
        saved, state = (
            _read_state(p) for p in (self.run_dir / "config.json", last / "trainer.json")
        )
        saved = asdict(TrainConfig()) | saved  # options that are newer than the run
        free = {"patience", "num_workers", "compile", "cache_dir", "flip_test"}
        changed = [k for k, v in asdict(self.config).items() if saved.get(k) != v and k not in free]
        if changed:
            fix = "restore it to resume, or call fit() to start again"
            raise ValueError(f"{self.run_dir} was trained with another {_some(changed)}; {fix}.")
        self._check_same(state)
        self.accelerator.load_state(str(last))
        if self.ema is not None:
            weights = torch.load(last / "ema.pt", map_location="cpu", weights_only=True)
            self.ema.module.load_state_dict(weights)
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.history = state["history"]
        return self._run(after_epoch)

    def _check_same(self, state: dict[str, Any]) -> None:
        """Refuse what would not go on as it began, e.g. another number of images or processes."""
        now = self._circumstances()
        before = now | state  # a resume point of before an entry existed is taken
        fix = "resume as it was trained, or call fit() to start again"
        for what in ("processes", "images"):
            if now[what] != before[what]:
                found = f"{before[what]} {what}, and now there are {now[what]}"
                raise ValueError(f"{self.run_dir} was trained with {found}; {fix}.")
        if now["labels"] != before["labels"]:
            raise ValueError(f"{self.run_dir} was trained with other labels; {fix}.")
        if (now["precision"] == "fp16") != (before["precision"] == "fp16"):
            found = f"{before['precision']!r}, and precision is now {now['precision']!r}"
            raise ValueError(f"{self.run_dir} was trained with {found}; {fix}.")

    def _circumstances(self) -> dict[str, Any]:
        """Return what the machine and the data, and not the configuration, decide."""
        accelerator = self.accelerator
        found = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
        labels = self.val_set.label_columns
        return {**found, "images": len(self.loader.dataset), "labels": labels}

    def predict(
        self, dataset: DataPartition, weights: str = "current", flip: bool = False
    ) -> np.ndarray:
        """Return probabilities (N, L) in the order of `dataset`.

        Args:
            dataset: its transform should be the one for evaluation.
            weights: "current", or "ema" for the moving average.
            flip: look at every image and its mirror image; the mean of their logits counts.
        """
        logits = self._predict_logits(dataset, weights, flip)
        return _to_probs(logits, self.config.loss == "ce")

    def _predict_logits(
        self, dataset: DataPartition, weights: str, flip: bool = False
    ) -> torch.Tensor:
        model = self.ema.module if weights == "ema" else self.model
        model.eval()
        if weights == "ema" and self.accelerator.num_processes > 1:  # each has its own batch norm
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer))
        loader = make_loader(dataset, self.config.batch_size, num_workers=self.config.num_workers)
        accelerator = self.accelerator
        processes = accelerator.num_processes, accelerator.process_index
        options = {"put_on_device": True, "non_blocking": True}
        loader = prepare_data_loader(loader, accelerator.device, *processes, **options)
        if not len(dataset):
            return torch.empty(0, len(dataset.label_columns))
        logits = []
        with torch.inference_mode(), accelerator.autocast():
            for images, _ in loader:
                found = _look(model, self._arrange(images), flip)
                logits.append(accelerator.gather_for_metrics(found))
        return torch.cat(logits).float()

    def _arrange(self, images: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def _run(self, after_epoch: Callable[[dict[str, float]], None] | None) -> pd.DataFrame:
        """Train the remaining epochs."""
        self.accelerator.gradient_accumulation_steps = self.config.grad_accum_steps
        config, main = self.config, self.accelerator.is_main_process
        total = config.epochs * len(self.loader)
        done = self.epoch * len(self.loader)
        hidden = {} if main else {"disable": True}  # leaves TQDM_DISABLE to the user
        bar = tqdm(total=total, initial=done, desc="training", leave=False, delay=2, **hidden)
        try:
            with bar:
                while self.epoch < config.epochs and self._waited() < config.patience:
                    self._run_epoch(bar)
                    if after_epoch is not None:
                        after_epoch(dict(self.history[-1]))
        except KeyboardInterrupt:
            self.stopped = True
            kept = f"{self.run_dir} keeps finished epochs, Trainer.resume() goes on from there."
            kept = kept if self.history else "nothing is kept."
            print(f"Stopped in epoch {self.epoch + 1};", kept)
            if self.accelerator.num_processes > 1:  # the others may be anywhere: none waits
                raise
        self.accelerator.wait_for_everyone()
        best = self.run_dir / WEIGHTS
        if self.history and best.is_file():
            self.plain.load_state_dict(safetensors.torch.load_file(best))
        return pd.DataFrame(self.history)

    def _score(self, row: dict[str, float]) -> float:
        """Return what is best when highest."""
        return -row[self.metric] if self.metric == "val_loss" else row[self.metric]

    def _waited(self) -> int:
        """Return the number of epochs since the best one."""
        scores = [self._score(row) for row in self.history]
        return len(scores) - 1 - int(np.argmax(scores)) if scores else 0

    def _run_epoch(self, bar: tqdm) -> None:
        start = time.perf_counter()
        train_loss = self._train_epoch(bar)
        seconds = time.perf_counter() - start
        scores = self.validate()
        self.epoch += 1
        rate = max(g["lr"] / g.get("lr_scale", 1.0) for g in self.optimizer.param_groups)
        row = {"epoch": self.epoch, "step": self.step, "learning_rate": rate}
        row |= {"train_loss": train_loss, **scores}
        row |= {"seconds": seconds, "images_per_second": len(self.loader.dataset) / seconds}
        self._note(row)
        self._save_last()
        shown = {"epoch": self.epoch, "loss": f"{train_loss:.3f}"}
        shown |= {self.metric: f"{row[self.metric]:.3f}"}
        bar.set_postfix(shown, refresh=False)  # short trainings need no bar

    def _note(self, row: dict[str, Any]) -> None:
        """Add a row to the history, and keep the weights if they are the best so far."""
        if self._score(row) > self.best:
            self._save_best(row.get("weights", "current"))
            self.best = self._score(row)
        self.history.append(row)

    def validate(self) -> dict[str, Any]:
        """Return the validation scores of an epoch: `metric` and whatever else history shall hold.

        Here val_loss and val_mAP; with loss="ce" val_top1 and val_top5 as well. With a moving
        average, the scores are those of the better weights, and `weights` says which these are.
        """
        if self.ema is None:
            return self._validate("current")
        found = [self._validate(weights) | {"weights": weights} for weights in ("ema", "current")]
        return max(found, key=self._score)

    def _validate(self, weights: str) -> dict[str, float]:
        logits = self._predict_logits(self.val_set, weights)
        targets = torch.tensor(self.val_set.targets, device=logits.device)
        exclusive = self.config.loss == "ce"
        probs = _to_probs(logits, exclusive)
        scores = {"val_loss": self.criterion(logits, targets).item()}
        scores |= {"val_mAP": mean_average_precision(self.val_set.targets, probs)}
        if exclusive:
            judged = ~targets.isnan().any(1)
            shares = accuracy(logits[judged], targets[judged].argmax(1), topk=(1, 5))
            scores |= {f"val_top{k}": share.item() / 100 for k, share in zip((1, 5), shares)}
        return scores

    def training_loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, a number; called where gradients are recorded."""
        pairs = len(images) // 2 * 2  # timm mixes pairs; the last of an odd batch stays
        if self.mixup is not None and pairs:
            images[:pairs], targets[:pairs] = self.mixup(images[:pairs], targets[:pairs])
        with self.accelerator.autocast():
            logits = self.model(self._arrange(images))
        return self.criterion(logits, targets)

    def _train_epoch(self, bar: tqdm) -> float:
        """Return the mean loss of one epoch."""
        set_seed(self.config.seed + 7919 * (self.epoch + 1), device_specific=True)
        self.generator.manual_seed(self.config.seed + 7919 * (self.epoch + 1))
        self._train_mode()
        self.model.zero_grad()  # of a batch that an interrupt broke off
        if self.accelerator.scaler is not None:  # fp16: that batch may be half unscaled
            self.accelerator.scaler._per_optimizer_states.clear()
        sums = torch.zeros(2, device=self.accelerator.device)  # of losses, of images
        for images, targets in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.training_loss(images, targets)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.config.clip_grad:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self._after_step()
            sums[0] += loss.detach() * len(images)
            sums[1] += len(images)
            bar.update()
        total, n_images = self.accelerator.reduce(sums).tolist()  # of all processes
        mean = total / n_images  # looked at once an epoch: each look waits for the GPU
        if not np.isfinite(mean):
            problem = f"the loss became {mean} in epoch {self.epoch + 1}"
            raise FloatingPointError(f"{problem}; lower learning_rate.")
        return mean

    def _train_mode(self) -> None:
        self.model.train()
        norms = nn.modules.batchnorm._BatchNorm
        if self.config.batch_norm == "frozen":
            for module in filter(lambda m: isinstance(m, norms), self.plain.modules()):
                module.eval()

    def _after_step(self) -> None:
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.plain, self.step)

    def _save_best(self, weights: str) -> None:
        if self.accelerator.is_main_process:
            model = self.ema.module if weights == "ema" else self.plain
            _save_weights(model, self.run_dir / WEIGHTS)

    def _save_last(self) -> None:
        """Write last/ under another name, its trainer.json last, then rename it."""
        last, temporary = self.run_dir / "last", self.run_dir / "last.tmp"
        if self.accelerator.is_main_process:
            _remove_resume_point(temporary)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()  # every process has its random state in there
        if self.accelerator.is_main_process:
            if self.ema is not None:
                torch.save(self.ema.module.state_dict(), temporary / "ema.pt")
            state = {"epoch": self.epoch, "step": self.step, "best": self.best}
            state |= {**self._circumstances(), "history": self.history}
            _write_json(temporary / "trainer.json", state)
            _remove_resume_point(last)
            os.replace(temporary, last)
            with replacing(self.run_dir / "history.csv") as path:
                pd.DataFrame(self.history).to_csv(path, index=False)
        self.accelerator.wait_for_everyone()


# ---------------------------------------------------------------- scores


def _average_precision(targets: Array, probs: Array, weights: Array) -> Array:
    """Return sklearn's average_precision_score for each row of weights and label, (R, L)."""
    result = np.full((len(weights), targets.shape[1]), np.nan)
    for label in np.flatnonzero((targets >= 0.5).any(0)):
        known = ~np.isnan(targets[:, label])
        order = np.argsort(-probs[known, label], kind="stable")
        p, y = probs[known, label][order], targets[known, label][order] >= 0.5
        w = weights[:, known][:, order]
        cut = np.append(p[1:] != p[:-1], True)  # equal probabilities are one cut
        tp, predicted = (np.cumsum(counted, axis=1)[:, cut] for counted in (w * y, w))
        gained = np.diff(tp, axis=1, prepend=0)
        with np.errstate(invalid="ignore"):
            result[:, label] = (gained * tp / np.maximum(predicted, 1e-12)).sum(1) / tp[:, -1]
    return result


def mean_average_precision(targets: Array, probs: Array) -> float:
    """Return the mean AP over the labels that are present at least once; NaN if none is."""
    ap = _average_precision(targets, probs, np.ones((1, len(targets))))
    return float(np.nanmean(ap)) if np.isfinite(ap).any() else float("nan")


def _most_probable(probs: Array) -> Array:
    return np.arange(probs.shape[1]) == probs.argmax(1)[:, None]  # (N, L), true once a row


def _as_scored(targets: Any, probs: Any) -> tuple[Array, Array]:
    """Return both as (N, L) of float; the one place where NaN probabilities are refused."""
    if np.isnan(probs := np.asarray(probs, float)).any():
        raise ValueError("probs holds NaN; leave out the images that could not be read.")
    return np.asarray(targets, float), probs


def _replicates(
    targets: Any, probs: Any, thresholds: Cuts, groups: Groups, n_bootstrap: int, seed: int
) -> dict[str, Array]:
    """Return every score for the data itself (row 0) and for bootstrap samples of groups."""
    targets, probs = _as_scored(targets, probs)
    known, true = ~np.isnan(targets), targets >= 0.5
    is_top1 = isinstance(thresholds, str) and thresholds == "argmax"
    predicted = _most_probable(probs) if is_top1 else probs >= np.asarray(thresholds, float)
    index = pd.factorize(pd.Series(groups))[0] if groups is not None else np.arange(len(targets))
    n_groups = index.max() + 1
    rates = np.full(n_groups, 1 / n_groups)
    drawn = np.random.default_rng(seed).multinomial(n_groups, rates, size=n_bootstrap)
    weights = np.vstack([np.ones(n_groups), drawn])[:, index]  # (1 + n_bootstrap, N)
    chunks = np.array_split(weights, max(1, weights.size // 20_000_000))
    scores = {"AP": np.vstack([_average_precision(targets, probs, chunk) for chunk in chunks])}
    cells = (true & predicted, ~true & predicted, true & ~predicted)
    tp, fp, fn = (weights @ (known & c).astype(float) for c in cells)  # (1 + n_bootstrap, L)
    wrong, judged = known & (true != predicted), known.any(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores |= {"precision": tp / (tp + fp), "recall": tp / (tp + fn)}
        scores["F1"] = np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
        scores["micro F1"] = 2 * tp.sum(1) / (2 * tp + fp + fn).sum(1)
        scores["Hamming loss"] = weights @ wrong.sum(1) / (weights @ known.sum(1))
        scores["exact match"] = weights @ (judged & ~wrong.any(1)) / (weights @ judged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # labels that no bootstrap sample shows
        means = {"mAP": np.nanmean(scores["AP"], 1), "macro F1": np.nanmean(scores["F1"], 1)}
    return scores | means


def _interval(values: Array, level: float = 0.95) -> tuple[Array, Array]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        samples = values[1:] if len(values) > 1 else values * np.nan
        return tuple(np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0))


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
        thresholds: present means prob >= threshold; one for all or one per label. "argmax": the
            most probable class is present, for classes that exclude each other.
        groups: (N,), what the bootstrap behind the 95 % intervals draws whole; None draws rows.
        n_bootstrap: number of its samples; 0 for no intervals.
    """
    scores = _replicates(targets, probs, thresholds, groups, n_bootstrap, seed)
    table = pd.DataFrame(index=pd.Index(label_columns, name="label"))
    table["support"], table["absent"] = (targets >= 0.5).sum(0), (targets < 0.5).sum(0)
    table["unknown"] = np.isnan(targets).sum(0)
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
    """Score all labels together, see `score_labels`.

    Hamming loss is the share of wrong cells, exact match of images whose known cells are all right
    (with "argmax": the top-1 accuracy).
    """
    scores = _replicates(targets, probs, thresholds, groups, n_bootstrap, seed)
    names = ["mAP", "macro F1", "micro F1", "Hamming loss", "exact match"]
    rows = {name: (scores[name][0], *_interval(scores[name])) for name in names}
    table = pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high"])
    n_judged, n_labels = int(np.isfinite(scores["AP"][0]).sum()), targets.shape[1]
    return table.assign(labels=f"{n_judged} of {n_labels}").rename_axis("score")


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

    `probs` and `baseline` may be (S, N, L), of S trainings whose scores are averaged.
    """
    if "mAP" in label_columns:
        raise ValueError("a label is named 'mAP', as the line for all labels; rename it.")

    def replicates(runs: Array) -> Array:
        shape, runs = np.shape(targets), np.asarray(runs, float)
        if runs.shape[-2:] != shape:
            expected = f"expected {shape}, as the targets, or several of these"
            raise ValueError(f"probabilities of shape {runs.shape}: {expected}.")
        runs = runs.reshape(-1, *shape)
        scores = [_replicates(targets, p, 0.5, groups, n_bootstrap, seed) for p in runs]
        return np.mean([np.column_stack([one["AP"], one["mAP"]]) for one in scores], axis=0)

    new, old = replicates(probs), replicates(baseline)
    low, high = _interval(new - old)
    table = {"baseline": old[0], "AP": new[0], "difference": new[0] - old[0], "low": low}
    index = pd.Index([*label_columns, "mAP"], name="label")
    return pd.DataFrame(table | {"high": high}, index)


def _best_cut(targets: Array, probs: Array, beta: float, min_precision: float | None) -> tuple:
    """Return the threshold with the highest F-beta, midway between two probabilities, and that."""
    known = ~np.isnan(targets)
    if not known.any():
        return 0.5, -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label that is never present
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
    """Return thresholds (L + 1,), as `_best_cuts`, that hold on other photos.

    The mean cut of 30 bootstrap samples of groups lies in the middle of the plateau of good cuts;
    from few positives it is drawn towards the common one: n / (n + 10) of it is the label's own.
    """
    rng, draws = np.random.default_rng(seed), []
    index = np.arange(len(probs)) if groups is None else pd.factorize(pd.Series(groups))[0]
    rows = [np.flatnonzero(index == group) for group in range(index.max() + 1)]
    for _ in range(30):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        cuts, scores = _best_cuts(targets[drawn], probs[drawn], beta)
        draws.append(np.where(scores > 0, cuts, cuts[-1]))  # 0: the sample has no positive
    clipped = np.clip(draws, 1e-6, 1 - 1e-6)
    *own, common = np.log(clipped / (1 - clipped)).mean(0)  # in logits
    n = (targets >= 0.5).sum(0)
    own = np.array(own) * n / (n + 10) + common * 10 / (n + 10)
    return 1 / (1 + np.exp(-np.append(own, common)))


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
        probs, targets: (N, L); NaN targets are left out.
        mode: "per_label"; "global" for one threshold for all; "shrunk" for thresholds that hold on
            other photos, averaged over bootstrap samples of `groups` (N,).
        beta: weight of recall against precision.
        min_precision: instead, the highest recall at this precision or better; not with "shrunk".
        min_positives: a label with fewer falls back to the global threshold; see "source".
    """
    _check_choice("mode", mode, ("per_label", "global", "shrunk"))
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
    own = "shrunk" if mode == "shrunk" else "own"
    source = np.select([positives < min_positives, np.less(score, 0)], [few, missed], own)
    if mode == "global":
        source = np.full(len(positives), "global" if reached >= 0 else missed)
    table = pd.DataFrame(index=pd.Index(label_columns, name="label"))
    table["threshold"] = np.where(source == own, cuts[:-1], cuts[-1] if reached >= 0 else 0.5)
    table["score"] = np.where(source == own, score, np.nan)
    return table.assign(positives=positives, source=source)


def to_panorama_level(
    df: pd.DataFrame, label_columns: Sequence[str], probs: Array
) -> tuple[Array, Array]:
    """Return the targets of `combine_halves` and the higher probability of both halves, (P, L)."""
    images, labels = df["image_path"].rename("image"), list(label_columns)
    targets = combine_halves(pd.concat([images, df[labels]], axis=1))
    panorama = images.map(panorama_name).to_numpy()
    highest = pd.DataFrame(probs).groupby(panorama, sort=False).max()
    return targets[labels].to_numpy(float), highest.to_numpy()


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
        name = str(item) if isinstance(item, (str, os.PathLike)) else f"image {index}"
        try:
            image = open_image(item, (height, width * (1 + self.halves)))
            if self.panorama and abs(image.width - 2 * image.height) > 0.02 * image.width:
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

    def __post_init__(self) -> None:
        _check_choice("view", self.view, VIEWS)
        _check_choice("activation", self.activation, ("sigmoid", "softmax"))
        model, whole = self.model, self.panorama_thresholds
        self.labels, self.thresholds = list(self.labels), np.asarray(self.thresholds, float)
        self.panorama_thresholds = np.asarray(self.thresholds if whole is None else whole, float)
        counts = [len(x) for x in (self.labels, self.thresholds, self.panorama_thresholds)]
        n, self.exclusive = model.spec["num_labels"], self.activation == "softmax"
        if counts != ([n, 0, 0] if self.exclusive else [n, n, n]):
            found = "{} labels, {} thresholds and {} panorama_thresholds".format(*counts)
            raise ValueError(f"{found} ({self.activation}) and {n} logits do not match.")
        self.device = _fastest_device()
        layout = torch.channels_last if gains_by_channels_last(model) else torch.contiguous_format
        self.model = model.to(self.device, memory_format=layout).eval()
        self.transform = make_transforms(model, train=False)

    def save(self, run_dir: str | os.PathLike, metrics: dict[str, float] | None = None) -> Path:
        """Write model.safetensors and best_classifier.json; of several processes in one only."""
        weights, path = Path(run_dir) / WEIGHTS, Path(run_dir) / "best_classifier.json"
        content = {"format_version": FORMAT_VERSION, **self.model.spec, **self.model.data_config}
        content |= {name: getattr(self, name) for name in ("labels", "view", "activation", "flip")}
        for name in ("thresholds", "panorama_thresholds"):
            content[name] = getattr(self, name).tolist()
        content |= {"weights": weights.name, "sha256": _save_weights(self.model, weights)}
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
        _write_json(path, content | {"validation": metrics or {}, "versions": versions})
        return path

    @classmethod
    def from_validation(
        cls,
        model: nn.Module,
        val_set: DataPartition,
        probs: np.ndarray,
        view: str = "half",
        mode: str = "shrunk",
        **options: Any,
    ) -> "Classifier":
        """Take the thresholds with the best F1 of `probs` (N, L) on validation."""
        labels, options = val_set.label_columns, {"view": view, **options}
        if options.get("activation", "sigmoid") != "sigmoid":
            return cls(model, labels, **options)
        find = functools.partial(find_optimal_thresholds, label_columns=labels, mode=mode)
        own = find(probs, val_set.targets, groups=val_set.groups)["threshold"]
        if view == "panorama":
            return cls(model, labels, own, **options)
        df = pd.DataFrame(val_set.targets, columns=labels)
        df.insert(0, "image_path", [str(path) for path in val_set.paths])
        targets, highest = to_panorama_level(df, labels, probs)
        whole = find(highest, targets)["threshold"]
        return cls(model, labels, own, panorama_thresholds=whole, **options)

    @classmethod
    def load(cls, path: str | os.PathLike, labels: Sequence[str] | None = None) -> "Classifier":
        """Load a best_classifier.json with these labels (None: any); safe with strangers' files."""
        path = _need_file(path, "run training.ipynb to make it")
        try:
            content = {"flip": False} | json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] == 1:
                content |= {"activation": "sigmoid"}
            _check_description(content)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no valid best_classifier.json: {error}") from None
        if labels is not None:
            _check_labels(path, content["labels"], list(labels))
        weights = _need_file(path.parent / content["weights"], f"keep it beside {path.name}")
        stored = weights.read_bytes()
        if hashlib.sha256(stored).hexdigest() != content["sha256"]:
            raise ValueError(f"{weights}: not the file that {path.name} was saved with (sha256).")
        kwargs = {key: content[key] for key in ("num_labels", "head", "img_size")}
        names = ("labels", "thresholds", "view", "panorama_thresholds", "activation", "flip")
        try:
            kwargs |= content["head_kwargs"] | content["model_kwargs"]
            model = build_model(content["model_name"], pretrained=False, **kwargs)
            model.data_config |= {k: content[k] for k in ("mean", "std", "interpolation")}
            classifier = cls(model, **{name: content[name] for name in names})
        except Exception as error:  # a stranger's values may fail anywhere inside timm
            raise ValueError(f"{path}: no model can be made of it ({error}).") from None
        read = safetensors.torch.load if content["format_version"] >= 3 else _read_pickled
        try:
            model.load_state_dict(read(stored))
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
    ) -> pd.DataFrame:
        """Classify images as they are: one line each with a 0/1 decision and LABEL_prob per label.

        Args:
            images: a PIL image, an array (H, W, 3), a path, a folder, or a list of any of these.
            unreadable: "raise", or "skip" to leave files out; `.attrs["unreadable"]` lists them.
            flip: look at the mirror images, too; False is twice as fast, None as it was saved.
            panorama: see `predict_panorama`.
        """
        _check_choice("unreadable", unreadable, ("raise", "skip"))
        flip, halves = self.flip if flip is None else flip, panorama and self.view == "half"
        views = _Views(_as_items(images), self.transform, panorama, halves)
        loader = make_loader(views, batch_size, num_workers=num_workers)
        probs, names, errors = [np.empty((0, 1 + halves, len(self.labels)))], [], []
        with torch.inference_mode(), _autocast(self.model, self.device):
            for batch, found, problems in tqdm(loader, "classifying", leave=False, delay=2):
                errors += filter(None, problems)
                if errors and unreadable == "raise":
                    raise OSError(errors[0])
                good = [not problem for problem in problems]
                logits = _look(self.model, batch.flatten(0, 1).to(self.device), flip)
                answers = _to_probs(logits, self.exclusive).reshape(*batch.shape[:2], -1)
                probs.append(answers[good])
                names += itertools.compress(found, good)
        table = self._table(names, np.concatenate(probs), panorama)
        table.attrs["unreadable"] = errors
        return table

    def predict_panorama(
        self, images: Any, batch_size: int = 16, *options: Any, **named: Any
    ) -> pd.DataFrame:
        """Classify whole 2:1 panoramas, as `predict`, with a column part.

        A model of halves answers for "left", "right" and "panorama": the higher probability of both
        (softmax: the mean) against thresholds that were tuned for panoramas.
        """
        return self.predict(images, batch_size, *options, panorama=True, **named)

    def _table(self, names: Sequence[str], probs: np.ndarray, panorama: bool) -> pd.DataFrame:
        """Return one line per image and view of `probs` (N, V, L), and one for both halves."""
        parts, cuts = ["panorama"], self.thresholds
        if probs.shape[1] == 2:
            parts, cuts = ["left", "right", "panorama"], [cuts, cuts, self.panorama_thresholds]
            joint = probs.mean(1) if self.exclusive else probs.max(1)
            probs = np.concatenate([probs, joint[:, None]], axis=1)
        rows = probs.reshape(-1, len(self.labels))
        present = _most_probable(rows) if self.exclusive else (probs >= cuts).reshape(rows.shape)
        table = pd.DataFrame(present.astype(int), columns=self.labels)
        table.insert(0, "image", [name for name in names for _ in parts])
        if panorama:
            table.insert(1, "part", parts * len(names))
        return table.join(pd.DataFrame(rows, columns=[f"{name}_prob" for name in self.labels]))

    def explain(self, image: Any, label: str, panorama: bool = False) -> np.ndarray:
        """Show where the model looks for a label, from 0 to 1, (H, W) in pixels of its input.

        The attention of the head (linear: the class activation map), in as many cells as the model
        has positions: see `count_cells`, `overlay_heat_map`. Of a panorama, the maps of a model of
        halves are put side by side, (H, 2W), each as strong as its probability.
        """
        _check_choice("label", label, self.labels)
        halves, index = panorama and self.view == "half", self.labels.index(label)
        views, _, problem = _Views([image], self.transform, panorama, halves)[0]
        if problem:
            raise OSError(problem)
        views = views.to(self.device)
        with torch.inference_mode():
            maps = _label_maps(self.model, views, index).cpu()
            probs = _to_probs(self.model(views), self.exclusive)[:, index]
        maps = F.interpolate(maps[:, None], views.shape[2:])[:, 0].numpy()
        maps = maps - maps.min((1, 2), keepdims=True)
        strength = probs / probs.max().clip(1e-12) / maps.max((1, 2)).clip(1e-12)
        return np.concatenate(list(maps * strength[:, None, None]), axis=1)


def _read_pickled(stored: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)


def _as_items(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple, pd.Series)):
        return [item for image in images for item in _as_items(image)]
    if isinstance(images, (str, os.PathLike)) and Path(images).is_dir():
        return list_images(images)
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim not in (2, 3)):
        raise TypeError(f"array {images.shape} {images.dtype}: expected (H, W, 3) of uint8.")
    if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
        return [images]
    raise TypeError(f"{type(images).__name__}: expected an image, an array, a path or a folder.")


def _check_labels(path: Path, found: list[str], wanted: list[str]) -> None:
    wrong = [(i, *pair) for i, pair in enumerate(zip(found, wanted), 1) if pair[0] != pair[1]]
    problem = "its label {} is {!r}, not {!r}".format(*wrong[0]) if wrong else ""
    if len(found) != len(wanted):
        problem = f"it knows {len(found)} labels, not the {len(wanted)} wanted"
    if problem:
        raise ValueError(f"{path}: {problem}; train on the same partitions to compare.")


def _check_description(content: dict) -> None:
    """Refuse a best_classifier.json that is broken or would reach outside its folder."""
    version, newest = content["format_version"], FORMAT_VERSION
    if version not in range(1, newest + 1):
        raise ValueError(f"format_version {version}, expected 1 to {newest}.")
    kinds = {str: "model_name head weights sha256 view activation interpolation", bool: "flip"}
    kinds |= {list: "labels img_size thresholds panorama_thresholds mean std", int: "num_labels"}
    kinds |= {dict: "model_kwargs head_kwargs"}
    for kind, key in ((kind, key) for kind, keys in kinds.items() for key in keys.split()):
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}.")
    name, weights, labels = (content[key] for key in ("model_name", "weights", "labels"))
    texts = {label for label in labels if isinstance(label, str)}
    numbers = [v for k in ("thresholds", "panorama_thresholds", "mean", "std") for v in content[k]]
    finite = all(type(v) in (int, float) and np.isfinite(v) for v in numbers)
    rgb = len(content["mean"]) == len(content["std"]) == 3
    sizes = [v for k, v in content["head_kwargs"].items() if k not in ("lam", "dropout")]
    reaching = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    reaching |= {"name", "pretrained", "num_labels", "head", "img_size", "features_only"}
    reaching &= content["model_kwargs"].keys() | content["head_kwargs"].keys()
    rules = {
        "weights must be a file name beside it": Path(weights).name == weights.replace("\\", "/"),
        f"timm has no model {name!r}": timm.is_model(name),
        f"{len(labels)} labels are not num_labels": len(labels) == content["num_labels"],
        "labels should be different texts": len(texts) == len(labels),
        "thresholds, mean and std should be numbers": finite,
        "mean and std should be three, std above 0": rgb and finite and min(content["std"]) > 0,
        "head_kwargs should be whole numbers from 1 to 16384": all(
            v is None or type(v) is int and 0 < v <= 16_384 for v in sizes
        ),
        f"model_kwargs may not hold {_some(sorted(reaching))}": not reaching,
    }
    problem = next((problem for problem, is_met in rules.items() if not is_met), None)
    if problem:
        raise ValueError(f"{problem}.")


# ---------------------------------------------------------------- plots


def show_images(
    images: Sequence[Any],
    titles: Sequence[str] | None = None,
    columns: int = 4,
    width: float = 2.6,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bar: str = "",
) -> plt.Figure:
    """Draw images (paths, PIL, arrays or tensors), each `width` inches wide, in a grid.

    Normalised tensors (3, H, W) are drawn as `x * std + mean`. `bar` names a colour bar of heat
    maps, see `overlay_heat_map`.
    """
    pictures = [_as_picture(image, mean, std) for image in images]
    lines = [str(title).splitlines() for title in titles or [""] * len(pictures)]
    texts = ["\n".join(textwrap.fill(line, int(14 * width)) for line in found) for found in lines]
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


def _as_picture(image: Any, mean: Any, std: Any) -> np.ndarray:
    if not isinstance(image, torch.Tensor):
        is_path = isinstance(image, (str, os.PathLike))
        return np.asarray(open_image(image, (384, 384)) if is_path else image)
    picture = image.cpu().numpy().transpose(1, 2, 0)
    if mean is None and (picture.min() < 0 or picture.max() > 1):
        raise ValueError("a tensor holds values outside 0 to 1; give its mean and std.")
    return picture if mean is None else (picture * std + mean).clip(0, 1)


def overlay_heat_map(image: Any, heat_map: np.ndarray, opacity: float = 0.7) -> np.ndarray:
    """Return a photo (H, W, 3) under a heat map from 0 to 1, whose cells stay cells.

    `opacity` is that of the hottest place; where nothing is, the photo shows through.
    """
    photo = open_image(image, (384, 384))
    cells = Image.fromarray(np.asarray(heat_map, np.float32))
    heat = np.asarray(cells.resize(photo.size, Image.Resampling.NEAREST))
    alpha = opacity * heat[..., None].astype(float)
    drawn = (1 - alpha) * np.asarray(photo, float) / 255 + alpha * plt.cm.plasma(heat)[..., :3]
    return np.rint(255 * drawn).astype(np.uint8)


def count_cells(heat_map: np.ndarray) -> str:
    """Say on how many cells a heat map of `Classifier.explain` was made, e.g. "4 × 4 cells"."""
    edges = [(np.diff(heat_map, axis=axis) != 0).any(1 - axis) for axis in (0, 1)]
    return "{} × {} cells".format(*(1 + edge.sum() for edge in edges))


def plot_comparison(table: pd.DataFrame) -> plt.Figure:
    """Draw the AP differences of `compare_scores` with their 95 % intervals, the mAP apart."""
    order = [*table.index.drop("mAP")[np.argsort(table["difference"].drop("mAP"))], "mAP"]
    rows = table.loc[order]
    figure, axis = plt.subplots(figsize=(6.5, 0.35 * len(rows) + 0.9), layout="constrained")
    error = np.stack([rows["difference"] - rows["low"], rows["high"] - rows["difference"]])
    axis.errorbar(rows["difference"], order, xerr=error.clip(0), fmt="o", color="tab:blue")
    axis.axvline(0, ls=":", color="grey")
    axis.axhline(len(rows) - 1.5, lw=0.5, color="grey")
    axis.set_xlabel("← baseline better   difference in AP, 95 % interval   this model better →")
    return figure


def plot_history(history: pd.DataFrame) -> plt.Figure:
    """Draw the losses and the validation score (top-1 accuracy or mAP), with the best epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for column, name in (("train_loss", "training"), ("val_loss", "validation")):
        left.plot(history["epoch"], history[column], label=name)
    score = "val_top1" if "val_top1" in history else "val_mAP"
    right.plot(history["epoch"], history[score], color="tab:green")
    best = history.loc[history[score].idxmax()]
    right.axvline(best["epoch"], ls=":", color="grey")
    right.set_title(f"best: {best[score]:.3f} in epoch {best['epoch']:.0f}")
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=score.replace("val_", "validation ").replace("top1", "top-1"))
    left.legend()
    return figure
