"""Reading labels, turning answers into targets, and joining them with images."""

import csv
import itertools
import json
import string
from pathlib import Path

from data_utils import (
    combine_halves,
    list_images,
    read_labelbox,
    read_partition,
    to_targets,
    write_partition,
)

import numpy as np
import pandas as pd
import pytest
from conftest import checklist, data_row, labelled, load_notebook_functions, radio, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

partitioning = load_notebook_functions("partitioning")
attach_images = partitioning.attach_images
read_csv_labels = partitioning.read_csv_labels
NAN = float("nan")
SURE, LIKELY, MAYBE = "1 - Definitely", "2 - Likely", "3 - Maybe"
QUIET = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_class_folders(*paths):
    """Return the classes as one 0/1 column each, easy to compare."""
    table = partitioning.read_class_folders(*paths)
    assert list(table) == ["image", "class"]
    for name in table.attrs["classes"]:
        table[name] = (table["class"] == name).astype(float)
    return table.drop(columns="class")


def values(targets: pd.DataFrame, label: str) -> list[float]:
    return targets.set_index("image")[label].tolist()


def same(a: list[float], b: list[float]) -> bool:
    return np.array_equal(np.array(a, float), np.array(b, float), equal_nan=True)


# ---------------------------------------------------------------- read_labelbox


def test_radio_checklist_and_text_answers_become_one_line_each(write_ndjson):
    row = data_row(
        "a_left.jpg",
        labelled(
            checklist("Grass", SURE, "Foreground"),
            radio("Lily", LIKELY),
            text("Extra Notes", "windy"),
        ),
    )
    answers = read_labelbox(write_ndjson(row))
    assert answers[["question", "kind", "answer"]].values.tolist() == [
        ["Grass", "checklist", SURE],
        ["Grass", "checklist", "Foreground"],
        ["Lily", "radio", LIKELY],
        ["Extra Notes", "text", "windy"],
    ]
    assert same(answers["grade"].tolist(), [1, NAN, 2, NAN])
    assert set(answers["image"]) == {"a_left.jpg"}
    assert set(answers["data_row_id"]) == {"row of a_left.jpg"}
    assert set(answers["annotator"]) == {"ann@example.invalid"}
    assert set(answers["project"]) == {"wetland"}
    assert answers["judged"].all()


def test_graded_question_is_one_label_and_its_other_options_and_texts_are_none(write_ndjson):
    row = data_row("a.jpg", labelled(checklist("Grass", SURE, "Foreground"), text("Notes", "n")))
    answers = read_labelbox(write_ndjson(row))
    assert list(answers["label"].cat.categories) == ["Grass"]
    assert answers["label"].isna().tolist() == [False, False, True]


def test_ungraded_checklist_and_radio_give_one_label_an_option(write_ndjson):
    rows = [
        data_row("a.jpg", labelled(checklist("Birds", "Heron", "Duck"), radio("Light", "Sun"))),
        data_row("b.jpg", labelled(checklist("Birds", "Duck"), radio("Light", "Rain"))),
    ]
    answers = read_labelbox(write_ndjson(*rows))
    labels = ["Birds / Heron", "Birds / Duck", "Light / Sun", "Light / Rain"]
    assert list(answers["label"].cat.categories) == labels
    assert to_targets(answers)[labels].values.tolist() == [[1, 1, 1, 0], [0, 1, 0, 1]]


def test_nested_answers_are_named_parent_child(write_ndjson):
    nested = {"name": "Tree", "classifications": [radio("Kind", "Willow")]}
    below_grade = {"name": SURE, "classifications": [checklist("Cover", "Dense")]}
    row = data_row("a.jpg", labelled(checklist("Plants", nested), checklist("Grass", below_grade)))
    answers = read_labelbox(write_ndjson(row))
    assert list(answers["label"].cat.categories) == [
        "Plants / Tree",
        "Plants / Tree / Kind / Willow",
        "Grass",
        "Grass / Cover / Dense",
    ]


def test_nested_answers_reach_three_levels_and_nested_grades_are_labels(write_ndjson):
    grandchild = radio("Health", LIKELY)
    child = radio("Kind", "Willow", grandchild)
    row = data_row("a.jpg", labelled(radio("Tree", "Yes", child)))
    labels = read_labelbox(write_ndjson(row))["label"].cat.categories
    assert list(labels) == [
        "Tree / Yes",
        "Tree / Yes / Kind / Willow",
        "Tree / Yes / Kind / Willow / Health",
    ]


def test_several_annotators_and_projects_are_kept_apart(write_ndjson):
    row = data_row(
        "a.jpg",
        labelled(radio("Lily", SURE), by="ann"),
        labelled(radio("Lily", MAYBE), by="ben"),
        birds=[labelled(checklist("Birds", "Heron"), by="cat")],
    )
    answers = read_labelbox(write_ndjson(row))
    assert answers[["project", "annotator", "question", "answer"]].values.tolist() == [
        ["wetland", "ann", "Lily", SURE],
        ["wetland", "ben", "Lily", MAYBE],
        ["birds", "cat", "Birds", "Heron"],
    ]


def test_duplicated_rows_are_merged_and_reported(write_ndjson):
    first = data_row("a.jpg", labelled(checklist("Grass", SURE, "Foreground")))
    other = data_row("b.jpg", labelled(checklist("Grass", MAYBE)))
    answers = read_labelbox(write_ndjson(first, other, first))
    once = read_labelbox(write_ndjson(first, other, name="once.ndjson"))
    pd.testing.assert_frame_equal(answers, once)
    assert answers.attrs["report"]["duplicated"] == ["a.jpg"]
    assert answers.attrs["report"]["images"] == 2
    assert once.attrs["report"]["duplicated"] == []


def test_duplicated_row_with_another_annotators_answer_adds_it(write_ndjson):
    answers = read_labelbox(
        write_ndjson(
            data_row("a.jpg", labelled(radio("Lily", SURE), by="ann")),
            data_row("a.jpg", labelled(radio("Lily", LIKELY), by="ben")),
        )
    )
    assert answers["annotator"].tolist() == ["ann", "ben"]
    assert to_targets(answers, soft={1: 1.0, 2: 0.5})["Lily"].tolist() == [0.75]


def test_skipped_and_unlabelled_rows_stay_as_unjudged_images(write_ndjson):
    answers = read_labelbox(
        write_ndjson(
            data_row("a.jpg", labelled(radio("Lily", SURE))),
            data_row("b.jpg", labelled(radio("Lily", SURE), skipped=True)),
            data_row("c.jpg"),
        )
    )
    assert answers["image"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert answers["judged"].tolist() == [True, False, False]
    assert answers["question"].isna().tolist() == [False, True, True]
    assert answers.attrs["report"]["unlabelled"] == ["b.jpg", "c.jpg"]
    assert same(values(to_targets(answers), "Lily"), [1, NAN, NAN])


def test_row_without_any_project_is_an_unlabelled_image(write_ndjson):
    bare = {"data_row": {"external_id": "b.jpg"}, "projects": {}}
    answers = read_labelbox(write_ndjson(GOOD, bare))
    assert answers["image"].tolist() == ["a.jpg", "b.jpg"]
    assert answers.attrs["report"]["unlabelled"] == ["b.jpg"]
    assert same(values(to_targets(answers), "Lily"), [1, NAN])


def test_image_that_one_annotator_skipped_is_judged_by_the_other(write_ndjson):
    row = data_row(
        "a.jpg", labelled(skipped=True, by="ann"), labelled(radio("Lily", SURE), by="ben")
    )
    answers = read_labelbox(write_ndjson(row))
    assert answers.attrs["report"]["unlabelled"] == []
    assert values(to_targets(answers), "Lily") == [1]


@pytest.mark.parametrize(("problematic", "images"), [("drop", ["a.jpg"]), ("keep", None)])
def test_problematic_images_are_dropped_or_kept_and_always_counted(
    write_ndjson, problematic, images
):
    flag = radio("Problematic", "Flag image as not useful")
    path = write_ndjson(
        data_row("a.jpg", labelled(radio("Lily", SURE))),
        data_row("b.jpg", labelled(radio("Lily", SURE), flag)),
    )
    answers = read_labelbox(path, problematic=problematic)
    assert answers["image"].unique().tolist() == (images or ["a.jpg", "b.jpg"])
    assert answers.attrs["report"]["problematic"] == ["b.jpg"]
    assert list(answers["label"].cat.categories) == ["Lily"]
    with pytest.raises(ValueError, match="problematic='maybe'.*'drop' or 'keep'"):
        read_labelbox(path, problematic="maybe")


def test_flags_are_no_labels_and_can_be_named(write_ndjson):
    path = write_ndjson(
        data_row("a.jpg", labelled(radio("Revisit", "Image needs further study"))),
        data_row("b.jpg", labelled(radio("Blurred", "Yes"), radio("Lily", SURE))),
    )
    assert list(read_labelbox(path)["label"].cat.categories) == ["Blurred / Yes", "Lily"]
    renamed = read_labelbox(path, flags=["Blurred"])
    assert renamed["image"].tolist() == ["a.jpg"]
    assert renamed.attrs["report"]["problematic"] == ["b.jpg"]
    assert "Lily" in renamed["label"].cat.categories


def test_vocabulary_is_the_union_of_all_rows_in_order_of_first_appearance(write_ndjson):
    rows = [
        data_row("a.jpg", labelled(radio("Water", SURE))),
        data_row("b.jpg", labelled(radio("Grass", SURE), radio("Water", SURE))),
        data_row("c.jpg", labelled(radio("Acorn", SURE))),
    ]
    answers = read_labelbox(write_ndjson(*rows))
    assert list(answers["label"].cat.categories) == ["Water", "Grass", "Acorn"]
    assert to_targets(answers).columns.tolist() == ["image", "Water", "Grass", "Acorn"]
    backwards = read_labelbox(write_ndjson(*rows[::-1]))
    assert list(backwards["label"].cat.categories) == ["Acorn", "Grass", "Water"]


def test_answer_without_its_grade_is_reported(write_ndjson):
    answers = read_labelbox(
        write_ndjson(
            data_row("a.jpg", labelled(checklist("Grass", SURE))),
            data_row("b.jpg", labelled(checklist("Grass", "Foreground"))),
        )
    )
    assert answers.attrs["report"]["without a grade"] == ["b.jpg"]


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "bom.ndjson"
    row = json.dumps(data_row("a.jpg", labelled(radio("Lily", SURE))))
    path.write_text(f"\n{row}\n\n", encoding="utf-8-sig")
    assert read_labelbox(path)["image"].tolist() == ["a.jpg"]


GOOD = data_row("a.jpg", labelled(radio("Lily", SURE)))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", "not JSON.*expected a Labelbox v2 export"),
        ("hello, world", "not JSON.*expected a Labelbox v2 export"),
        ('{"ID": "1", "Labeled Data": "http://x", "Label": {}}', "v1.*expected a Labelbox v2"),
        ('[{"ID": "1", "Label": {}}]', "v1.*expected a Labelbox v2 export"),
        ('{"data_row": {"external_id": "a.jpg"}}', "'projects'.*expected a Labelbox v2"),
        ("42", "expected a Labelbox v2 export"),
        ('{"data_row": {"id": "c1"}, "projects": {}}', "'external_id'.*expected the image's"),
        ('{"data_row": {"external_id": ""}, "projects": {}}', "'external_id'.*expected"),
        ('{"data_row": {"external_id": 5}, "projects": {}}', "'external_id'.*expected"),
        ('{"data_row": {"external_id": ["a.jpg"]}, "projects": {}}', "'external_id'.*expected"),
        ('{"data_row": {"external_id": "b.jpg"}, "projects": {"p": {"labels": [7]}}}', "expected"),
    ],
)
def test_wrong_line_fails_with_file_line_and_what_was_expected(write_ndjson, line, expected):
    path = write_ndjson(GOOD, line, name="survey.ndjson")
    with pytest.raises(ValueError, match=rf"survey\.ndjson, line 2: .*{expected}"):
        read_labelbox(path)


def test_answer_without_a_name_fails_with_file_and_line(write_ndjson):
    broken = data_row("b.jpg", labelled({"radio_answer": {"name": SURE}}))
    with pytest.raises(ValueError, match=r"export\.ndjson, line 2: .*'name'.*expected"):
        read_labelbox(write_ndjson(GOOD, broken))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xd8\xff\xe0 a JPEG", b"[" * 60_000])
def test_file_that_is_no_export_at_all_is_named(tmp_path, content):
    path = tmp_path / "wrong.ndjson"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong\.ndjson.*expected"):
        read_labelbox(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: dict | list | str | bool | None, path: tuple = ()) -> list[tuple]:
    """Return the path of every value inside a JSON document."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    return [p for k in keys for p in [(*path, k), *places(value[k], (*path, k))]]


@QUIET
@given(st.data())
def test_garbage_lines_raise_nothing_but_value_error(write_ndjson, data):
    garbage = data.draw(st.text(max_size=30) | st.builds(json.dumps, JSON_VALUES))
    line = garbage.replace("\n", " ").replace("\r", " ")
    try:
        answers = read_labelbox(write_ndjson(GOOD, line))
    except ValueError as error:
        assert "line 2" in str(error)
    else:
        assert not line.strip() and len(answers) == 1


@settings(QUIET, max_examples=150)
@given(st.data())
def test_row_with_a_broken_value_raises_nothing_but_value_error(write_ndjson, data):
    row = data_row(
        "b.jpg", labelled(checklist("Grass", SURE), radio("Light", "Sun"), text("Notes", "n"))
    )
    *parents, last = data.draw(st.sampled_from(places(row)))
    target = row
    for key in parents:
        target = target[key]
    target[last] = data.draw(JSON_VALUES)
    try:
        to_targets(read_labelbox(write_ndjson(GOOD, row)))
    except ValueError as error:
        assert "line 2" in str(error)


GRADES = {1: SURE, 2: LIKELY, 3: MAYBE, 4: "4 - Hardly"}


@QUIET
@given(
    st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 3, 4])] * 3), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_random_grades_give_exactly_the_expected_target_matrix(write_ndjson, grades, positive_max):
    labels = ["Water", "Grass", "Sun"]
    rows = [
        data_row(
            f"{i}.jpg",
            labelled(
                *(
                    checklist(name, "Background", GRADES[grade])
                    for name, grade in zip(labels, given)
                    if grade
                )
            ),
        )
        for i, given in enumerate(grades)
    ]
    targets = to_targets(read_labelbox(write_ndjson(*rows)), positive_max=positive_max)
    seen = [name for k, name in enumerate(labels) if any(given[k] for given in grades)]
    assert set(targets.columns) == {"image", *seen}
    assert targets["image"].tolist() == [f"{i}.jpg" for i in range(len(grades))]
    for k, name in enumerate(labels):
        if name in seen:
            expected = [int(1 <= given[k] <= positive_max) for given in grades]
            assert targets[name].tolist() == expected


# ---------------------------------------------------------------- to_targets


def graded_rows():
    """Four images: sure, likely, maybe, and one that does not show the lily."""
    rows = [
        data_row(f"{name}.jpg", labelled(radio("Lily", option), radio("Sun", SURE)))
        for name, option in zip("abc", (SURE, LIKELY, MAYBE))
    ]
    return [*rows, data_row("d.jpg", labelled(radio("Sun", SURE)))]


@pytest.mark.parametrize(
    ("positive_max", "expected"), [(1, [1, 0, 0, 0]), (2, [1, 1, 0, 0]), (3, [1, 1, 1, 0])]
)
def test_positive_max_is_the_last_grade_that_counts_as_present(
    write_ndjson, positive_max, expected
):
    answers = read_labelbox(write_ndjson(*graded_rows()))
    assert values(to_targets(answers, positive_max), "Lily") == expected


def test_unanswered_question_is_absent_or_unknown(write_ndjson):
    answers = read_labelbox(write_ndjson(*graded_rows()))
    assert values(to_targets(answers, unanswered="absent"), "Lily") == [1, 1, 1, 0]
    assert same(values(to_targets(answers, unanswered="unknown"), "Lily"), [1, 1, 1, NAN])
    low = to_targets(answers, positive_max=1, unanswered="unknown")
    assert same(values(low, "Lily"), [1, 0, 0, NAN])
    with pytest.raises(ValueError, match="unanswered='zero'.*'absent' or 'unknown'"):
        to_targets(answers, unanswered="zero")


def test_soft_targets_follow_the_grade(write_ndjson):
    answers = read_labelbox(write_ndjson(*graded_rows()))
    soft = {1: 1.0, 2: 0.9, 3: 0.6}
    assert values(to_targets(answers, soft=soft), "Lily") == [1, 0.9, 0.6, 0]
    assert values(to_targets(answers, 2, soft=soft), "Lily") == [1, 0.9, 0, 0]
    unknown = to_targets(answers, unanswered="unknown", soft=soft)
    assert same(values(unknown, "Lily"), [1, 0.9, 0.6, NAN])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((SURE, None), 1),  # a tie counts as present
        ((SURE, None, None), 0),
        ((SURE, MAYBE, None), 1),
        ((None, None), 0),
    ],
)
def test_majority_of_annotators_decides(write_ndjson, options, expected):
    said = [
        labelled(radio("Sun", SURE), *([radio("Lily", option)] if option else []), by=f"ann {i}")
        for i, option in enumerate(options)
    ]
    elsewhere = data_row("z.jpg", labelled(radio("Lily", SURE)))
    answers = read_labelbox(write_ndjson(data_row("a.jpg", *said), elsewhere))
    assert values(to_targets(answers), "Lily") == [expected, 1]


def test_soft_targets_of_annotators_are_averaged(write_ndjson):
    row = data_row(
        "a.jpg",
        labelled(radio("Lily", SURE), by="ann"),
        labelled(radio("Lily", MAYBE), by="ben"),
        labelled(radio("Sun", SURE), by="cat"),
    )
    targets = to_targets(read_labelbox(write_ndjson(row)), soft={1: 1.0, 2: 0.9, 3: 0.5})
    assert targets["Lily"].tolist() == [0.5]
    assert targets["Sun"].tolist() == pytest.approx([1 / 3])


def test_project_that_does_not_ask_a_question_leaves_it_unknown(write_ndjson):
    rows = [
        data_row("a.jpg", plants=[labelled(radio("Lily", SURE))]),
        data_row("b.jpg", plants=[labelled(text("Notes", "nothing here"))]),
        data_row("c.jpg", birds=[labelled(checklist("Birds", "Heron"))]),
        data_row("d.jpg", birds=[labelled()], plants=[labelled()]),
    ]
    targets = to_targets(read_labelbox(write_ndjson(*rows)))
    assert same(values(targets, "Lily"), [1, 0, NAN, 0])
    assert same(values(targets, "Birds / Heron"), [NAN, NAN, 1, 0])


def test_answer_without_its_grade_is_unknown_unless_another_annotator_graded_it(write_ndjson):
    rows = [
        data_row("a.jpg", labelled(checklist("Grass", SURE))),
        data_row("b.jpg", labelled(checklist("Grass", "Foreground"))),
        data_row(
            "c.jpg",
            labelled(checklist("Grass", "Foreground"), by="ann"),
            labelled(checklist("Grass", MAYBE), by="ben"),
        ),
    ]
    answers = read_labelbox(write_ndjson(*rows))
    assert same(values(to_targets(answers), "Grass"), [1, NAN, 1])
    assert same(values(to_targets(answers, positive_max=1), "Grass"), [1, NAN, 0])
    soft = to_targets(answers, soft={1: 1.0, 2: 0.9, 3: 0.6})
    assert same(values(soft, "Grass"), [1, NAN, 0.6])


@QUIET
@given(
    st.lists(st.sampled_from(["unlabelled", "skipped", "no grade", "bird project"]), min_size=1),
    st.sampled_from(["absent", "unknown"]),
    st.sampled_from([None, {1: 1.0, 2: 0.9, 3: 0.6}]),
    st.integers(1, 3),
)
def test_unknown_never_becomes_zero(write_ndjson, kinds, unanswered, soft, positive_max):
    said = {
        "unlabelled": {"wetland": []},
        "skipped": {"wetland": [labelled(radio("Grass", SURE), skipped=True)]},
        "no grade": {"wetland": [labelled(checklist("Grass", "Foreground"))]},
        "bird project": {"birds": [labelled(checklist("Birds", "Heron"))]},
    }
    rows = [data_row(f"{i}.jpg", **said[kind]) for i, kind in enumerate(kinds)]
    rows.append(data_row("known.jpg", labelled(radio("Grass", SURE))))
    targets = to_targets(
        read_labelbox(write_ndjson(*rows)), positive_max, unanswered=unanswered, soft=soft
    )
    assert same(values(targets, "Grass"), [NAN] * len(kinds) + [1])


def test_export_in_which_nobody_answered_anything_gives_images_without_labels(write_ndjson):
    answers = read_labelbox(write_ndjson(data_row("a.jpg"), data_row("b.jpg", labelled())))
    targets = to_targets(answers)
    assert targets.columns.tolist() == ["image"]
    assert targets["image"].tolist() == ["a.jpg", "b.jpg"]


# ---------------------------------------------------------------- read_csv_labels


@pytest.fixture
def write_csv(tmp_path):
    def write(content: str, encoding: str = "utf-8"):
        path = tmp_path / "labels.csv"
        path.write_text(content, encoding=encoding)
        return path

    return write


@pytest.mark.parametrize("first", ["Filenames", "filename", "image", "Any thing"])
def test_csv_with_one_column_a_label(write_csv, first):
    table = read_csv_labels(write_csv(f"{first},desert, sea\na.jpg,1,0\nb.jpg,, 1.0\n"))
    assert table.columns.tolist() == ["image", "desert", "sea"]
    assert table["image"].tolist() == ["a.jpg", "b.jpg"]
    assert same(table["desert"].tolist(), [1, NAN])
    assert table["sea"].tolist() == [0, 1]


def test_csv_may_start_with_a_byte_order_mark_and_hold_names_like_na(write_csv):
    table = read_csv_labels(write_csv("image,sea\nNA,1\nnull,0\n", encoding="utf-8-sig"))
    assert table["image"].tolist() == ["NA", "null"]
    assert table["sea"].tolist() == [1, 0]


def test_csv_with_one_label_column_and_with_no_row_judged(write_csv):
    assert same(read_csv_labels(write_csv("f,sea\na,1\nb,0\nc,\n"))["sea"], [1, 0, NAN])
    assert same(read_csv_labels(write_csv("f,sea\na,\nb,\n"))["sea"], [NAN, NAN])


@pytest.mark.parametrize(("unlisted", "empty"), [("unknown", NAN), ("absent", 0.0)])
def test_csv_with_lists_of_labels(write_csv, unlisted, empty):
    content = 'filename,labels\na.jpg,"desert,mountains"\nb.jpg,sea\nc.jpg,\nd.jpg,sea; desert\n'
    table = read_csv_labels(write_csv(content), unlisted=unlisted)
    assert table.columns.tolist() == ["image", "desert", "mountains", "sea"]
    assert same(table["desert"].tolist(), [1, 0, empty, 1])
    assert same(table["mountains"].tolist(), [1, 0, empty, 0])
    assert same(table["sea"].tolist(), [0, 1, empty, 1])


def test_misspelt_choice_for_empty_lists_is_refused(write_csv):
    with pytest.raises(ValueError, match="unlisted='abesnt'"):
        read_csv_labels(write_csv("filename,labels\na.jpg,sea\nb.jpg,\n"), unlisted="abesnt")


@pytest.mark.parametrize("cell", ["2", "-1", "0.5", "yes", "nan", "inf", "1 0"])
def test_label_value_outside_0_1_empty_is_named_with_line_and_column(write_csv, cell):
    content = f"image,desert,sea\na.jpg,1,0\nb.jpg,0,{cell}\nc.jpg,1,\n"
    with pytest.raises(ValueError, match=rf"labels\.csv: .*0, 1 or an empty.*line 3, sea: '{cell}"):
        read_csv_labels(write_csv(content))


def test_duplicate_and_missing_file_names_are_named_with_their_line(write_csv):
    with pytest.raises(ValueError, match=r"labels\.csv: file name twice.*line 4: 'a\.jpg'"):
        read_csv_labels(write_csv("image,sea\na.jpg,1\nb.jpg,0\na.jpg,1\n"))
    with pytest.raises(ValueError, match=r"labels\.csv: no file name.*line 3"):
        read_csv_labels(write_csv("image,sea\na.jpg,1\n,0\n"))


def test_line_numbers_count_blank_lines(write_csv):
    with pytest.raises(ValueError, match="line 4, sea: '7'"):
        read_csv_labels(write_csv("image,sea\na.jpg,1\n\nb.jpg,7\n"))


def test_blank_lines_are_no_rows(write_csv):
    assert read_csv_labels(write_csv("image,sea\na.jpg,1\n\nb.jpg,0\n\n"))["sea"].tolist() == [1, 0]


def test_rows_with_more_cells_than_the_header_are_refused_and_never_shifted(write_csv):
    with pytest.raises(ValueError, match=r"labels\.csv"):
        read_csv_labels(write_csv("image,sea\na.jpg,1,0\nb.jpg,0,1\n"))


def test_columns_to_keep_are_no_labels_and_can_be_grouped_by(write_csv, tmp_path):
    path = write_csv("photo,site,sea\na.jpg,North,1\nb.jpg,South,\n")
    targets = read_csv_labels(path, keep=["site"])
    assert targets["site"].tolist() == ["North", "South"]
    assert targets["sea"].tolist()[0] == 1 and np.isnan(targets["sea"].tolist()[1])
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    df = attach_images(targets, tmp_path / "images", "site")
    assert df.columns.tolist() == ["image_path", "group_id", "sea"]
    assert df["group_id"].tolist() == ["North", "South"]
    with pytest.raises(ValueError, match=r"labels\.csv: no column region"):
        read_csv_labels(path, keep=["region"])


def test_label_column_that_stands_twice_is_refused(write_csv):
    with pytest.raises(ValueError, match=r"labels\.csv.*sea"):
        read_csv_labels(write_csv("image,sea, sea\na.jpg,1,0\n"))


@pytest.mark.parametrize("content", ["", "image\na.jpg\n", "image;sea\na.jpg\n"])
def test_csv_without_a_label_column_is_named(write_csv, content):
    with pytest.raises(ValueError, match=r"labels\.csv.*label column"):
        read_csv_labels(write_csv(content))


NAMES = st.text(string.ascii_letters + string.digits + " _-,/|;\"'ö°", min_size=1, max_size=9)
NAMES = NAMES.map(str.strip).filter(bool)


@QUIET
@given(st.data())
def test_random_targets_written_as_csv_come_back_identical(tmp_path, data):
    labels = data.draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    images = data.draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    cells = st.lists(st.sampled_from(["", "0", "1"]), min_size=len(labels), max_size=len(labels))
    matrix = [data.draw(cells) for _ in images]
    path = tmp_path / "random.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["the file", *labels])
        writer.writerows([image, *row] for image, row in zip(images, matrix))
    table = read_csv_labels(path)
    assert table.columns.tolist() == ["image", *labels]
    assert table["image"].tolist() == images
    expected = [[NAN if cell == "" else float(cell) for cell in row] for row in matrix]
    np.testing.assert_array_equal(table[labels].to_numpy(), expected)


@QUIET
@given(st.text(string.printable, max_size=60))
def test_garbage_csv_raises_nothing_but_value_error(tmp_path, content):
    path = tmp_path / "garbage.csv"
    path.write_text(content, encoding="utf-8", newline="")
    try:
        table = read_csv_labels(path)
    except ValueError as error:
        assert "garbage.csv" in str(error)
    else:
        cells = table.iloc[:, 1:].to_numpy(float)
        assert np.isin(cells[~np.isnan(cells)], [0, 1]).all()


# ---------------------------------------------------------------- read_class_folders


def put_images(folder, *names, color="grey"):
    """Write tiny images; JPEG, or what the ending says."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(path)


def test_class_folders_become_one_column_a_class(tmp_path):
    put_images(tmp_path, "desert/1.jpg", "sea/deep/1.JPG", "sea/2.jpeg", "loose.jpg", "sea/.3.jpg")
    (tmp_path / "sea" / "notes.txt").write_text("no image")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    table = read_class_folders(tmp_path).set_index("image")
    assert table.to_dict("index") == {
        "desert/1.jpg": {"desert": 1, "sea": 0},
        "sea/2.jpeg": {"desert": 0, "sea": 1},
        "sea/deep/1.JPG": {"desert": 0, "sea": 1},
    }


def test_class_folders_join_with_their_images(tmp_path):
    put_images(tmp_path, "desert/1.jpg", "sea/1.jpg")
    found = attach_images(read_class_folders(tmp_path), tmp_path)
    expected = [f"{tmp_path.as_posix()}/desert/1.jpg", f"{tmp_path.as_posix()}/sea/1.jpg"]
    assert found["image_path"].tolist() == expected
    assert found["sea"].tolist() == [0, 1]


def test_halves_in_two_class_folders_stay_one_panorama(tmp_path):
    names = ["sea/a_left.jpg", "bog/a_right.jpg", "sea/b_left.jpg", "sea/b_right.jpg"]
    names += ["sea/c_left.jpg", "bog/1.jpg", "sea/1.jpg"]  # 1: numbered anew in each class
    names += ["sea/d_left.jpg", "bog/d_left.jpg"]  # of two panoramas
    put_images(tmp_path, *names)
    found = attach_images(read_class_folders(tmp_path), tmp_path)
    groups = dict(
        zip(
            found["image_path"].map(lambda p: Path(p).relative_to(tmp_path).as_posix()),
            found["group_id"],
        )
    )
    assert groups["sea/a_left.jpg"] == groups["bog/a_right.jpg"] == "a"
    assert groups["sea/b_left.jpg"] == groups["sea/b_right.jpg"] == "sea/b"
    assert [groups[n] for n in names[4:]] == ["sea/c", "bog/1", "sea/1", "sea/d", "bog/d"]


def test_folder_without_class_folders_or_a_missing_folder_is_named(tmp_path):
    put_images(tmp_path, "loose.jpg")
    with pytest.raises(ValueError, match="no images in class folders; expected .*<class>"):
        read_class_folders(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_class_folders(tmp_path / "nowhere")


def test_imagenet_layout_is_read_as_one_table_whose_paths_tell_the_part(tmp_path):
    put_images(tmp_path, "train/n01/1.jpg", "train/n02/a/2.jpg", "val/n02/3.jpg", "test/4.jpg")
    (tmp_path / "names.txt").write_text('n02 "sea, ocean"\n\nn03 bog\nn01\tdesert, dry place\n')
    table = read_class_folders(tmp_path, tmp_path / "names.txt").set_index("image")
    assert table.to_dict("index") == {
        "train/n01/1.jpg": {"desert": 1, "sea": 0},
        "train/n02/a/2.jpg": {"desert": 0, "sea": 1},
        "val/n02/3.jpg": {"desert": 0, "sea": 1},
    }
    assert list(read_class_folders(tmp_path)) == ["image", "n01", "n02"]


def test_two_classes_of_one_name_are_told_apart(tmp_path):
    """ImageNet has two classes "crane": a bird and a machine."""
    put_images(tmp_path, "n01/1.jpg", "n02/1.jpg", "n03/1.jpg")
    (tmp_path / "names.txt").write_text("n01 crane\nn02 crane\nn03 tench\n")
    table = read_class_folders(tmp_path, tmp_path / "names.txt")
    assert list(table) == ["image", "crane (n01)", "crane (n02)", "tench"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"n01 desert\n", r"names\.txt: no line with words for n02; add one"),
        (b"n01 desert\nn02\n", "no line with words for n02"),
        (b'n01 desert\nn02 ""\n', "no line with words for n02"),
        (b"n01 desert\nn02 sea\nn02 bog\n", "contradict each other for n02; keep one"),
        (b"n01 desert\nn02 image\n", "'image' is the name of a column; rename that class"),
        (b"n01 d\xe9sert\nn02 sea\n", r"names\.txt: expected a text file \(UTF-8\)"),
        (b"n01 sea (n02)\nn02 sea\n", None),
    ],
)
def test_names_that_leave_a_class_out_or_contradict_are_refused(tmp_path, text, message):
    put_images(tmp_path, "n01/1.jpg", "n02/1.jpg")
    (tmp_path / "names.txt").write_bytes(text)
    if message is None:
        assert list(read_class_folders(tmp_path, tmp_path / "names.txt"))[1:] == [
            "sea (n02)",
            "sea",
        ]
        return
    with pytest.raises(ValueError, match=message):
        read_class_folders(tmp_path, tmp_path / "names.txt")


def test_words_that_collide_after_telling_apart_are_refused(tmp_path):
    put_images(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    (tmp_path / "names.txt").write_text("a crane\nb crane\nc crane (a)\n")
    with pytest.raises(ValueError, match=r"two classes would be called crane \(a\); name one"):
        read_class_folders(tmp_path, tmp_path / "names.txt")


def test_folders_with_spaces_are_named_and_missing_names_say_what_is_expected(tmp_path):
    put_images(tmp_path, "sand/1.jpg", "sand dry/1.jpg", "a,b/1.jpg")
    (tmp_path / "names.txt").write_text("sand dry\tDune\nsand Beach\na,b;Both\nother x\n")
    table = read_class_folders(tmp_path, tmp_path / "names.txt").set_index("image")
    assert table["Dune"].idxmax() == "sand dry/1.jpg"
    assert table["Beach"].idxmax() == "sand/1.jpg"
    assert table["Both"].idxmax() == "a,b/1.jpg"
    with pytest.raises(ValueError, match=r"gone\.txt: expected a text file .* FileNotFoundError"):
        read_class_folders(tmp_path, tmp_path / "gone.txt")


def test_part_without_class_folders_is_refused_and_loose_photos_are_counted(tmp_path):
    put_images(tmp_path, "train/sea/1.jpg", "train/bog/1.jpg", "val/1.jpg")  # val/ flat
    with pytest.raises(
        ValueError, match=r"val: no images in class folders; expected .*val/<class>"
    ):
        read_class_folders(tmp_path)
    put_images(tmp_path, "val/sea/1.jpg")
    with pytest.warns(UserWarning, match=r"1 images lie in no class folder .*val/1\.jpg"):
        assert len(read_class_folders(tmp_path)) == 3


def test_one_of_train_and_val_alone_is_refused_but_may_be_a_class(tmp_path):
    put_images(tmp_path, "train/sea/1.jpg", "train/bog/1.jpg")
    with pytest.raises(ValueError, match="expected train/ and val/ in it, found train/ alone; add"):
        read_class_folders(tmp_path)
    put_images(tmp_path / "vehicles", "train/day 1/1.jpg", "car/day 1/1.jpg")
    assert list(read_class_folders(tmp_path / "vehicles")) == ["image", "car", "train"]


def test_hidden_folders_are_no_classes(tmp_path):
    put_images(tmp_path, "sea/1.jpg", ".thumbnails/1.jpg", "sea/.cache/2.jpg")
    assert read_class_folders(tmp_path).to_dict("list") == {"image": ["sea/1.jpg"], "sea": [1.0]}


def test_class_that_only_validation_has_is_refused(tmp_path):
    put_images(tmp_path, "train/sea/1.jpg", "train/bog/1.jpg", "val/sea/1.jpg", "val/fen/1.jpg")
    with pytest.raises(ValueError, match=r"val: holds classes that .*train lacks: fen; a class"):
        read_class_folders(tmp_path)
    (tmp_path / "val/fen/1.jpg").unlink()
    (tmp_path / "val/fen").rmdir()
    assert list(read_class_folders(tmp_path)) == ["image", "bog", "sea"]  # bog has no test: legal


@pytest.mark.parametrize("name", ["image", "image_path", "group_id"])
def test_class_folder_with_the_name_of_a_column_is_refused(tmp_path, name):
    put_images(tmp_path, "sea/1.jpg", f"{name}/1.jpg")
    with pytest.raises(ValueError, match=f"'{name}' is the name of a column; rename"):
        read_class_folders(tmp_path)


@pytest.mark.parametrize("folder", ["fen", "train/fen", "val/fen"])
def test_class_folder_without_images_is_named(tmp_path, folder):
    put_images(tmp_path, *(f"{part}/sea/1.jpg" for part in (["train", "val"] * ("/" in folder))))
    put_images(tmp_path, *["sea/1.jpg"] * ("/" not in folder))
    (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=f"{folder}: a class folder without images; add photos"):
        read_class_folders(tmp_path)


# ---------------------------------------------------------------- combine_halves


COMBINED = {
    (1, 1): 1,
    (1, 0): 1,
    (0, 1): 1,
    (1, None): 1,
    (None, 1): 1,
    (0, 0): 0,
    (0, None): NAN,
    (None, 0): NAN,
    (None, None): NAN,
}


@pytest.mark.parametrize(("left", "right"), list(itertools.product([1, 0, None], repeat=2)))
def test_halves_combine_by_the_truth_table(left, right):
    targets = pd.DataFrame({"image": ["A_left.jpg", "A_right.jpg"], "Sun": [left, right]})
    combined = combine_halves(targets.astype({"Sun": float}))
    assert combined["image"].tolist() == ["A"]
    assert same(combined["Sun"].tolist(), [COMBINED[left, right]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("value", "expected"), [(1, 1), (0, NAN), (NAN, NAN), (0.4, NAN)])
def test_half_without_its_other_half_is_present_or_unknown(side, value, expected):
    combined = combine_halves(pd.DataFrame({"image": [f"A_{side}.jpg"], "Sun": [float(value)]}))
    assert same(combined["Sun"].tolist(), [expected])


def test_combined_panoramas_keep_order_folders_soft_values_and_other_columns():
    targets = pd.DataFrame(
        {
            "image": ["x/B_right.jpg", "A_left.jpg", "x/B_left.jpg", "A_right.jpg", "B_left.jpg"],
            "site": ["mere", "fen", "mere", "fen", "carr"],
            "Sun": [0.6, 0.0, 0.9, 0.3, 1.0],
        }
    )
    combined = combine_halves(targets)
    assert combined["image"].tolist() == ["x/B", "A", "B"]
    assert combined["site"].tolist() == ["mere", "fen", "carr"]
    assert combined["Sun"].tolist() == [0.9, 0.3, 1.0]


def test_whole_panoramas_keep_their_values():
    targets = pd.DataFrame({"image": ["A.jpg", "B.jpg", "C.jpg"], "Sun": [0.0, 1.0, NAN]})
    assert same(combine_halves(targets)["Sun"].tolist(), [0, 1, NAN])


def test_halves_named_without_a_suffix_may_hold_a_dot():
    targets = pd.DataFrame({"image": ["GS.01_left", "GS.01_right", "GS.02_left", "GS.02_right"]})
    combined = combine_halves(targets.assign(Sun=[1.0, 0.0, 0.0, 0.0]))
    assert combined["image"].tolist() == ["GS.01", "GS.02"]
    assert combined["Sun"].tolist() == [1, 0]


# ---------------------------------------------------------------- attach_images


@pytest.fixture
def photos(tmp_path):
    """Photos of two sites: halves of A in two places, and one B."""
    names = ["A_left.jpg", "A_right.jpg"]
    put_images(tmp_path, *(f"fen/Day 1/{n}" for n in names), *(f"mere/Day 2/{n}" for n in names))
    put_images(tmp_path, "mere/Day 1/B_left.JPG")
    return tmp_path


def labels_of(*images: str, **columns: list) -> pd.DataFrame:
    return pd.DataFrame({"image": images, "Sun": np.arange(len(images)) % 2 * 1.0, **columns})


def test_images_are_found_by_name_anywhere_below_the_folder(photos):
    found = attach_images(labels_of("B_left.JPG", "fen/Day 1/A_right.jpg"), photos)
    assert found.columns.tolist() == ["image_path", "group_id", "Sun"]
    assert found["image_path"].tolist() == [
        f"{photos.as_posix()}/mere/Day 1/B_left.JPG",
        f"{photos.as_posix()}/fen/Day 1/A_right.jpg",
    ]
    assert found["Sun"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["B_left", "Day 1/B_left", "mere/Day 1/B_left.JPG"])
def test_images_are_found_by_stem_and_by_part_of_their_path(photos, name):
    path = attach_images(labels_of(name), photos)["image_path"].item()
    assert path.endswith("mere/Day 1/B_left.JPG")


def test_path_must_fit_and_is_not_guessed(photos):
    for name in ("fen/B_left.JPG", "Day 2/B_left.JPG", "other/fen/Day 1/A_left.jpg", "B_lef"):
        with pytest.raises(FileNotFoundError, match="1 of 1 labelled images"):
            attach_images(labels_of(name), photos)


def test_ambiguous_names_are_named_with_their_candidates(photos):
    with pytest.raises(ValueError, match=r"A_left\.jpg .*fen.*mere"):
        attach_images(labels_of("A_left.jpg", "B_left.JPG"), photos)
    put_images(photos, "mere/Day 1/B_left.png")
    with pytest.raises(ValueError, match=r"B_left .*B_left\.JPG.*B_left\.png"):
        attach_images(labels_of("B_left"), photos)
    path = attach_images(labels_of("B_left.JPG"), photos)["image_path"].item()
    assert path.endswith("B_left.JPG")


def test_ambiguous_names_are_refused_even_when_missing_ones_are_skipped(photos):
    with pytest.raises(ValueError, match="fit several files"):
        attach_images(labels_of("A_left.jpg", "none.jpg"), photos, missing="skip")


def test_missing_images_are_named_or_skipped_and_listed(photos):
    targets = labels_of("B_left.JPG", "gone.jpg", "lost.jpg")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 .*gone\.jpg, lost\.jpg"):
        attach_images(targets, photos)
    found = attach_images(targets, photos, missing="skip")
    assert found.attrs["missing"] == ["gone.jpg", "lost.jpg"]
    assert len(found) == 1
    with pytest.raises(FileNotFoundError, match="2 of 2"):
        attach_images(labels_of("gone.jpg", "lost.jpg"), photos, missing="skip")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        attach_images(targets, photos / "nowhere")


def test_image_that_is_labelled_twice_is_named(photos):
    with pytest.raises(ValueError, match=r"labelled twice: .*B_left\.JPG"):
        attach_images(labels_of("B_left.JPG", "mere/Day 1/B_left.JPG"), photos)


ALL = ["fen/Day 1/A_left.jpg", "fen/Day 1/A_right.jpg", "mere/Day 2/A_left.jpg", "B_left.JPG"]


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("panorama", ["fen/Day 1/A", "fen/Day 1/A", "mere/Day 2/A", "mere/Day 1/B"]),
        (1, ["fen", "fen", "mere", "mere"]),
        (2, ["fen/Day 1", "fen/Day 1", "mere/Day 2", "mere/Day 1"]),
        ("team", ["7", "7", "8", "8"]),
    ],
)
def test_groups_by_panorama_by_folders_or_by_a_column(photos, group_by, expected):
    found = attach_images(labels_of(*ALL, team=[7, 7, 8, 8]), photos, group_by=group_by)
    assert found["group_id"].tolist() == expected
    assert ("team" in found.columns) == (group_by != "team")
    assert found["Sun"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("survey", "group_by='survey'.*'panorama'.*column"),
        (0, "group_by=0"),
        (3, "4 images lie less than 3 folders deep"),
        (1.5, "group_by=1.5"),
    ],
)
def test_grouping_that_does_not_apply_is_refused(photos, group_by, message):
    with pytest.raises(ValueError, match=message):
        attach_images(labels_of(*ALL), photos, group_by=group_by)


def test_class_folders_too_shallow_for_their_groups_are_refused(tmp_path):
    put_images(tmp_path, "train/w01/a.jpg", "val/w01/Mere 4/b.jpg")
    message = r"group_by=1: 1 images lie less than 1 folders deep below their class: train/w01/a"
    with pytest.raises(ValueError, match=message):
        attach_images(read_class_folders(tmp_path), tmp_path, 1, class_depth=2)


@pytest.mark.parametrize(
    ("group_by", "image", "group"),
    [
        (1, "train/w01/Mere 4/a_left.jpg", "Mere 4"),
        (2, "val/w02/Mere/4/a.jpg", "Mere/4"),
        (1, "train/w02/Mere 4/a_right.jpg", "Mere 4"),  # of another class
        (1, "w02/Mere 4/a_right.jpg", "Mere 4"),
    ],
)
def test_class_folders_are_grouped_across_classes(tmp_path, group_by, image, group):
    start = image.split("/Mere")[0].replace("val", "train")
    put_images(
        tmp_path, image, f"{start}/Mere/4/b.jpg", f"{start.replace('train', 'val')}/a/b/c.jpg"
    )
    table = read_class_folders(tmp_path)
    assert table.attrs["class_depth"] == image.split("/Mere")[0].count("/") + 1
    found = attach_images(table, tmp_path, group_by, class_depth=table.attrs["class_depth"])
    groups = dict(zip(found["image_path"], found["group_id"]))
    assert groups[f"{tmp_path.as_posix()}/{image}"] == group


def test_relative_image_folder_gives_relative_paths(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    path = attach_images(labels_of("B_left.JPG"), photos.name)["image_path"].item()
    assert path == f"{photos.name}/mere/Day 1/B_left.JPG"


def test_rows_are_joined_by_name_whatever_their_order(photos):
    targets = labels_of(*ALL).assign(number=range(4))
    expected = attach_images(targets, photos).set_index("image_path")["number"].to_dict()
    shuffled = attach_images(targets.sample(frac=1, random_state=3), photos)
    assert shuffled.set_index("image_path")["number"].to_dict() == expected


def test_list_images_is_sorted_and_leaves_out_hidden_files(photos):
    put_images(photos, ".A.jpg", "z.png")
    (photos / "table.csv").write_text("no image")
    names = [p.relative_to(photos).as_posix() for p in list_images(photos)]
    assert names == [
        *sorted(ALL[:3] + ["mere/Day 1/B_left.JPG", "mere/Day 2/A_right.jpg"]),
        "z.png",
    ]


@pytest.mark.parametrize(
    "folder",
    [
        "@eaDir",
        "@EADIR/A.jpg",
        "$RECYCLE.BIN",
        "#recycle",
        ".thumbnails",
        ".Trash-1000",
        "__MACOSX",
    ],
)
def test_thumbnails_and_recycled_files_are_no_photos(tmp_path, folder):
    for name in ("site/A.jpg", "site/._A.jpg", f"site/{folder}/B.jpg", f"{folder}/C.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == [tmp_path / "site/A.jpg"]


def test_linked_folders_are_followed_once_and_cycles_end(tmp_path):
    root, other = tmp_path / "photos", tmp_path / "disk"
    for path in (root / "b" / "B.jpg", other / "deep" / "D.jpg"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    try:
        (root / "a link to b").symlink_to(root / "b", target_is_directory=True)
        (root / "b" / "up").symlink_to(root, target_is_directory=True)
        (root / "above").symlink_to(tmp_path, target_is_directory=True)
        for name in ("disk 1", "disk 2"):
            (root / name).symlink_to(other, target_is_directory=True)
        (other / "back").symlink_to(other, target_is_directory=True)
        (root / "gone").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    except OSError:
        pytest.skip("links need a right that this user does not have")
    found = [path.relative_to(root).as_posix() for path in list_images(root)]
    assert found == ["b/B.jpg", "disk 1/deep/D.jpg"]
    assert list_images(root / "disk 2") == [root / "disk 2/deep/D.jpg"]


def test_link_to_a_hidden_folder_is_followed_as_data_stores_need_it(tmp_path):
    (tmp_path / ".store/x").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / ".store/x/A.jpg")
    (tmp_path / "2023").symlink_to(tmp_path / ".store/x")
    (tmp_path / "again").symlink_to(tmp_path / ".store/x")
    assert list_images(tmp_path) == [tmp_path / "2023/A.jpg"]


# ---------------------------------------------------------------- partition CSV


def partition_of(folder, **columns: list) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    paths = [f"{folder.as_posix()}/photos/{i}.jpg" for i in range(n)]
    return pd.DataFrame({"image_path": paths, "group_id": [f"g{i}" for i in range(n)], **columns})


def test_partition_comes_back_with_empty_cells_soft_values_and_label_order(tmp_path):
    df = partition_of(tmp_path, Water=[1, 0, NAN], Acorn=[0.9, 0.6, 0.0], Sun=[NAN] * 3)
    path = tmp_path / "parts" / "train_partition.csv"
    write_partition(df, path)
    back, labels = read_partition(path)
    assert labels == ["Water", "Acorn", "Sun"]
    pd.testing.assert_frame_equal(back, df, check_dtype=False)


def test_unknown_is_written_as_an_empty_cell(tmp_path):
    write_partition(partition_of(tmp_path, Water=[1.0, NAN], Sun=[NAN, 0.5]), tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "image_path,group_id,Water,Sun",
        "photos/0.jpg,g0,1.0,",
        "photos/1.jpg,g1,,0.5",
    ]


def test_partition_paths_are_relative_to_the_csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    df = pd.DataFrame({"image_path": ["photos/a b.jpg"], "group_id": ["g"], "Sun": [1.0]})
    write_partition(df, "deep/parts/val.csv")
    line = (tmp_path / "deep/parts/val.csv").read_text().splitlines()[1]
    assert line.startswith("../../photos/a b.jpg,")
    assert read_partition("deep/parts/val.csv")[0]["image_path"].tolist() == ["photos/a b.jpg"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = read_partition("../deep/parts/val.csv")[0]["image_path"].tolist()
    assert moved == ["../photos/a b.jpg"]


def test_folder_with_csv_and_photos_can_be_moved(tmp_path):
    put_images(tmp_path, "old/photos/0.jpg")
    write_partition(partition_of(tmp_path / "old", Sun=[1.0]), tmp_path / "old" / "p.csv")
    (tmp_path / "old").rename(tmp_path / "new")
    path = read_partition(tmp_path / "new" / "p.csv")[0]["image_path"].item()
    assert path == f"{tmp_path.as_posix()}/new/photos/0.jpg"


@pytest.mark.parametrize("group", ["007", "NA", "None", "1e3"])
def test_group_names_come_back_as_written(tmp_path, group):
    df = partition_of(tmp_path, Sun=[1.0, 0.0]).assign(group_id=[group, "other"])
    write_partition(df, tmp_path / "p.csv")
    assert read_partition(tmp_path / "p.csv")[0]["group_id"].tolist() == [group, "other"]


def test_missing_partition_names_the_notebook_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.csv.*partitioning\.ipynb"):
        read_partition(tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_path,Sun\na.jpg,1\n", "image_path, group_id"),
        ("group_id,Sun\ng,1\n", "image_path, group_id"),
        ("image_path,group_id\na.jpg,g\n", "at least one label"),
        ("image_path,group_id,Sun\na.jpg,g,1\nb.jpg,g,2\n", "line 3, Sun: '2'"),
        ("image_path,group_id,Sun\na.jpg,g,-0.1\n", "line 2, Sun: '-0.1'"),
        ("image_path,group_id,Sun\na.jpg,g,yes\n", "line 2, Sun: 'yes'"),
        ("image_path,group_id,Sun\na.jpg,g,1,0\nb.jpg,g,0,1\n", ""),
        ("", ""),
    ],
)
def test_broken_partition_is_refused_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "broken.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"broken\.csv.*{message}"):
        read_partition(path)


def test_failed_write_leaves_the_old_partition_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "p.csv"
    df = partition_of(tmp_path, Sun=[1.0])
    write_partition(df, path)
    before = path.read_bytes()

    def fail(self, target, **options):
        target.write_text("half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        write_partition(df, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]


@QUIET
@given(st.data())
def test_random_partitions_come_back_identical(tmp_path, data):
    labels = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    cell = st.none() | st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    n = data.draw(st.integers(1, 6))
    columns = {name: data.draw(st.lists(cell, min_size=n, max_size=n)) for name in labels}
    df = partition_of(tmp_path, **columns).astype(dict.fromkeys(labels, float))
    write_partition(df, tmp_path / "random.csv")
    back, found = read_partition(tmp_path / "random.csv")
    assert found == labels
    pd.testing.assert_frame_equal(back, df, rtol=0, atol=1e-15)
