"""Predictions written as Labelbox pre-labels by labelbox.ipynb, and read back here."""

import json
import re
import uuid
from pathlib import Path

from data_utils import read_labelbox

import numpy as np
import pandas as pd
import pytest
from conftest import checklist, data_row, labelled, load_notebook_functions, radio, text

write_labelbox = load_notebook_functions("labelbox").write_labelbox
NAN = float("nan")
SURE, LIKELY, MAYBE, NO = "1 - Definitely", "2 - Likely", "3 - Maybe", "0 - Absent"


@pytest.fixture
def export(write_ndjson):
    """Two images; Grass is graded with an option for absent, Plants and Kind nest."""
    plants = {"name": "Tree", "classifications": [radio("Kind", "Willow")]}
    below = {"name": SURE, "classifications": [checklist("Cover", "Dense", "Sparse")]}
    first = labelled(
        checklist("Grass", below, "Foreground"),
        radio("[Lvl2] Night", SURE),
        checklist("Plants", plants, "Shrub"),
        radio("Sky", "Clear"),
        text("Notes", "windy"),
    )
    second = labelled(
        checklist("Grass", NO),
        radio("[Lvl2] Night", LIKELY),
        checklist("Grass", MAYBE),
        radio("Sky", "Cloudy"),
    )
    return write_ndjson(data_row("a.jpg", first), data_row("b.jpg", second))


def written(tmp_path, export, cells: dict, image: str = "a.jpg", **options) -> list[dict]:
    """Write one image's cells and return the lines without dataRow and uuid."""
    path = tmp_path / "import.ndjson"
    write_labelbox(pd.DataFrame([{"image": image} | cells]), export, path, **options)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("dataRow", "uuid")} for line in lines]


def answer(name: str, confidence: float, *nested: dict) -> dict:
    found = {"name": name, "confidence": confidence}
    return found | {"classifications": list(nested)} if nested else found


def test_whole_line_of_a_graded_radio_question(tmp_path, export):
    path = tmp_path / "import.ndjson"
    write_labelbox(pd.DataFrame({"image": ["b.jpg"], "[Lvl2] Night": [0.95]}), export, path)
    name = uuid.uuid5(uuid.NAMESPACE_URL, '["id", "row of b.jpg", "[Lvl2] Night"]')
    assert path.read_text("utf-8") == (
        '{"name": "[Lvl2] Night", "answer": {"name": "1 - Definitely", "confidence": 0.95},'
        f' "dataRow": {{"id": "row of b.jpg"}}, "uuid": "{name}"}}\n'
    )


@pytest.mark.parametrize(
    ("prob", "expected"),
    [
        (1, answer(SURE, 1)),
        (0.9, answer(SURE, 0.9)),
        (0.89, answer(MAYBE, 0.89)),  # the export has no "2 - ..." here: the less certain of two
        (0.5, answer(MAYBE, 0.5)),
        (0.2, answer(NO, 0.8)),
        (0, answer(NO, 1)),
    ],
)
def test_graded_question_gets_the_grade_that_fits_and_an_explicit_absence(
    tmp_path, export, prob, expected
):
    assert written(tmp_path, export, {"Grass": prob}) == [{"name": "Grass", "answer": [expected]}]


def test_absent_is_no_answer_without_an_option_for_it(tmp_path, export):
    assert written(tmp_path, export, {"[Lvl2] Night": 0.1}) == []


def test_unknown_writes_nothing(tmp_path, export):
    assert written(tmp_path, export, {"Grass": NAN, "Plants / Tree": NAN}) == []


def test_grade_floors_and_threshold_are_parameters(tmp_path, export):
    cells = {"[Lvl2] Night": 0.3}
    (line,) = written(tmp_path, export, cells, threshold=0.25, grade_floors={1: 0.6, 2: 0.2})
    assert line["answer"] == answer(LIKELY, 0.3)
    (line,) = written(tmp_path, export, cells, threshold=0.25, grade_floors={1: 0})
    assert line["answer"] == answer(SURE, 0.3)


def test_decisions_of_a_classifier_decide_and_its_probabilities_are_the_confidence(
    tmp_path, export
):
    cells = {"Grass": 0, "Plants / Shrub": 1, "Grass_prob": np.float32(0.6)}
    cells["Plants / Shrub_prob"] = np.float32(0.3)
    assert written(tmp_path, export, cells) == [
        {"name": "Grass", "answer": [answer(NO, 0.4)]},
        {"name": "Plants", "answer": [answer("Shrub", 0.3)]},
    ]


def test_checklist_takes_every_present_option_and_radio_the_most_probable(tmp_path, export):
    cells = {"Plants / Tree": 0.7, "Plants / Shrub": 0.6, "Sky / Clear": 0.8, "Sky / Cloudy": 0.9}
    assert written(tmp_path, export, cells) == [
        {"name": "Plants", "answer": [answer("Tree", 0.7), answer("Shrub", 0.6)]},
        {"name": "Sky", "answer": answer("Cloudy", 0.9)},
    ]


def test_nested_answers_stand_below_their_present_parent_only(tmp_path, export):
    willow = {"name": "Kind", "answer": answer("Willow", 0.8)}
    dense = {"name": "Cover", "answer": [answer("Dense", 0.9)]}
    cells = {"Grass": 0.6, "Grass / Cover / Dense": 0.9, "Grass / Cover / Sparse": 0.1}
    cells |= {"Plants / Tree": 1, "Plants / Tree / Kind / Willow": 0.8}
    assert written(tmp_path, export, cells) == [
        {"name": "Grass", "answer": [answer(MAYBE, 0.6, dense)]},
        {"name": "Plants", "answer": [answer("Tree", 1, willow)]},
    ]
    cells |= {"Grass": 0, "Plants / Tree": NAN}
    assert written(tmp_path, export, cells) == [{"name": "Grass", "answer": [answer(NO, 1)]}]


def test_global_key_is_preferred_and_names_the_image_too(tmp_path, write_ndjson):
    row = data_row("a.jpg", labelled(radio("Lily", SURE)))
    row["data_row"]["global_key"] = "survey/a"
    export, path = write_ndjson(row), tmp_path / "import.ndjson"
    for image in ("a.jpg", "survey/a", "split_jpg/day 1/a.jpg"):
        write_labelbox(pd.DataFrame({"image": [image], "Lily": [1]}), export, path)
        assert json.loads(path.read_text())["dataRow"] == {"globalKey": "survey/a"}


def test_writing_twice_gives_the_same_file_and_a_uuid_a_line(tmp_path, export):
    predictions = pd.DataFrame({"image": ["b.jpg", "a.jpg"], "Grass": [1, 0], "Sky / Clear": 1})
    paths = tmp_path / "1.ndjson", tmp_path / "2.ndjson"
    assert [len(write_labelbox(predictions, export, path)) for path in paths] == [4, 4]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    lines = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert len({line["uuid"] for line in lines}) == 4


# ---------------------------------------------------------------- the way back


def shown(objects: list[dict], prefix: str = "") -> dict[str, float]:
    """Return {label: confidence} of import objects; a grade 0 shows that its label is absent."""
    labels = {}
    for item in objects:
        for answer in item["answer"] if isinstance(item["answer"], list) else [item["answer"]]:
            grade = re.match(r"(\d+) - ", answer["name"])
            label = prefix + item["name"] + ("" if grade else f" / {answer['name']}")
            if not grade or int(grade[1]):
                labels[label] = answer["confidence"]
            labels |= shown(answer.get("classifications", []), f"{label} / ")
    return labels


def read_back(path: Path) -> dict[str, dict[str, float]]:
    """Return {image: {present label: confidence}} of an import file."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    images = [line["dataRow"]["id"].removeprefix("row of ") for line in lines]
    found = {image: [x for x, i in zip(lines, images) if i == image] for image in set(images)}
    return {image: shown(objects) for image, objects in found.items()}


def test_what_is_written_comes_back_as_the_same_targets(tmp_path, export):
    labels = list(read_labelbox(export)["label"].cat.categories)
    rng = np.random.default_rng(0)
    for _ in range(20):
        predictions = pd.DataFrame(rng.random((2, len(labels))).round(3), columns=labels)
        predictions = predictions.mask(rng.random(predictions.shape) < 0.2)
        expected = (predictions >= 0.5).astype(float)
        expected["Plants / Tree / Kind / Willow"] *= expected["Plants / Tree"]
        for option in ("Dense", "Sparse"):
            expected[f"Grass / Cover / {option}"] *= expected["Grass"]
        sky = predictions[["Sky / Clear", "Sky / Cloudy"]].fillna(0)
        expected[sky.columns] *= sky.eq(sky.max(axis=1), axis=0)
        lost = ((predictions >= 0.5) & (expected == 0)).to_numpy().sum()
        predictions.insert(0, "image", ["b.jpg", "a.jpg"])
        table = write_labelbox(predictions, export, tmp_path / "import.ndjson")
        back = pd.DataFrame(read_back(tmp_path / "import.ndjson")).T
        back = back.reindex(index=predictions["image"], columns=labels)
        assert np.array_equal(back.notna(), expected)
        given = predictions.set_index("image")[labels]
        assert np.array_equal(back.where(expected.to_numpy() > 0), given.where(back.notna()), True)
        assert table["answer"].isna().sum() == lost


def test_present_labels_that_cannot_be_written_are_returned(tmp_path, export):
    cells = {"Sky / Clear": 0.8, "Sky / Cloudy": 0.9, "Plants / Tree / Kind / Willow": 0.7}
    predictions = pd.DataFrame([{"image": "a.jpg"} | cells | {"Grass": 0.1, "Plants / Shrub": 0.2}])
    table = write_labelbox(predictions, export, tmp_path / "import.ndjson")
    assert table.fillna("-").values.tolist() == [
        ["a.jpg", "Grass", NO, 0.9],
        ["a.jpg", "Sky / Cloudy", "Cloudy", 0.9],
        ["a.jpg", "Sky / Clear", "-", 0.8],
        ["a.jpg", "Plants / Tree / Kind / Willow", "-", 0.7],
    ]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"image": ["a.jpg", "z.jpg"], "Grass": 1}, r"not in the export, .* as well: z\.jpg\.$"),
        (
            {"image": ["a.jpg", "a.jpg"], "Grass": 1},
            r"twice, expected one row per image: a\.jpg\.$",
        ),
        ({"image": ["a.jpg", "x/a.jpg"], "Grass": 1}, r"twice, .* image: x/a\.jpg\.$"),
        ({"image": ["a.jpg"], "Gras": 1}, "no answer shows the labels Gras; drop or rename them"),
        ({"image": ["a.jpg"], "part": "left"}, "no answer shows the labels part"),
        ({"image": ["a.jpg"], "Grass": 1.5}, r"predictions of a\.jpg: Grass=1\.5, expected 0 to 1"),
        ({"image": ["a.jpg"], "Grass": "yes"}, "Grass='yes', expected 0 to 1, or NaN"),
        ({"image": ["a.jpg"], "Grass": 1, "Grass_prob": -1}, "Grass_prob=-1, expected 0 to 1"),
        ({"name": ["a.jpg"], "Grass": 1}, "no column 'image'"),
    ],
)
def test_bad_predictions_are_refused_and_leave_the_old_file(tmp_path, export, predictions, message):
    path = tmp_path / "import.ndjson"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_labelbox(pd.DataFrame(predictions), export, path)
    assert path.read_text() == "old"


def test_label_without_a_grade_to_answer_with_is_refused(tmp_path, write_ndjson):
    export = write_ndjson(data_row("a.jpg", labelled(radio("Lily", "5 - No"))))
    with pytest.raises(ValueError, match="no answer shows the labels Lily"):
        written(tmp_path, export, {"Lily": 1})


def test_name_of_several_data_rows_is_refused_and_a_repeated_row_is_not(tmp_path, write_ndjson):
    row = data_row("a.jpg", labelled(radio("Lily", SURE)))
    assert len(written(tmp_path, write_ndjson(row, row), {"Lily": 1})) == 1
    other = json.loads(json.dumps(row))
    other["data_row"]["id"] = "another"
    with pytest.raises(ValueError, match=r"several data rows of one name, .*: a\.jpg\.$"):
        written(tmp_path, write_ndjson(row, other), {"Lily": 1})


def test_question_of_two_kinds_and_row_without_an_id_are_refused(tmp_path, write_ndjson):
    kinds = data_row("a.jpg", one=[labelled(radio("Sun", SURE))], two=[labelled(checklist("Sun"))])
    kinds["projects"]["id-two"]["labels"] = [labelled(checklist("Sun", SURE))]
    with pytest.raises(ValueError, match="line 1: 'Sun' is asked as radio and as checklist"):
        written(tmp_path, write_ndjson(kinds), {"Sun": 1})
    row = data_row("a.jpg", labelled(radio("Sun", SURE)))
    del row["data_row"]["id"]
    with pytest.raises(ValueError, match="line 1: data_row has no 'id' or 'global_key'; export it"):
        written(tmp_path, write_ndjson(row), {"Sun": 1})


def test_names_are_written_as_the_project_spells_them(tmp_path, write_ndjson):
    spelled = radio(" Blu\u0308te  ganz ", f"{SURE} ")
    export = write_ndjson(data_row("a.jpg", labelled(spelled)))
    (line,) = written(tmp_path, export, {"Blüte ganz": 0.95})
    assert line["name"] == spelled["name"] and line["answer"]["name"] == f"{SURE} "


def test_numbers_that_are_no_grades_are_answered_as_options(tmp_path, write_ndjson):
    options = ("1 - 5", "6 - 20")
    export = write_ndjson(*(data_row(f"{o}.jpg", labelled(radio("Birds", o))) for o in options))
    table = pd.DataFrame({"image": ["1 - 5.jpg"], "Birds / 1 - 5": [0.2], "Birds / 6 - 20": [0.9]})
    found = write_labelbox(table, export, tmp_path / "pre.ndjson")
    assert found["answer"].tolist() == ["6 - 20"]


def test_photo_is_found_by_its_global_key_alone(tmp_path, write_ndjson):
    row = data_row("a.jpg", labelled(radio("Lily", SURE)))
    row["data_row"] |= {"external_id": None, "global_key": "fen\\a.jpg"}
    table = pd.DataFrame({"image": ["fen/a.jpg"], "Lily": [1.0]})
    found = write_labelbox(table, write_ndjson(row), tmp_path / "pre.ndjson")
    assert found["answer"].tolist() == [SURE]


# ---------------------------------------------------------------- against the SDK


def _without_empty(value):
    """Drop None, empty lists and uuids, which the SDK writes where we write nothing."""
    if isinstance(value, list):
        return [_without_empty(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: _without_empty(v) for k, v in value.items() if k != "uuid"}
    return {k: v for k, v in kept.items() if v not in (None, [], {})}


def test_lines_are_those_of_the_labelbox_sdk(tmp_path, export):
    reason = "needs `pip install labelbox[data]`"
    types = pytest.importorskip("labelbox.data.annotation_types", reason=reason)
    converter = pytest.importorskip("labelbox.data.serialization").NDJsonConverter

    def option(name, confidence, *nested):
        return types.ClassificationAnswer(
            name=name, confidence=confidence, classifications=list(nested) or None
        )

    def question(name, value):
        return types.ClassificationAnnotation(name=name, value=value)

    willow = question("Kind", types.Radio(answer=option("Willow", 0.8)))
    dense = question("Cover", types.Checklist(answer=[option("Dense", 0.9)]))
    plants = types.Checklist(answer=[option("Tree", 0.7, willow), option("Shrub", 0.6)])
    annotations = [
        question("Grass", types.Checklist(answer=[option(SURE, 0.95, dense)])),
        question("[Lvl2] Night", types.Radio(answer=option(LIKELY, 0.75))),
        question("Plants", plants),
    ]
    data = types.GenericDataRowData(uid="row of a.jpg")
    theirs = list(converter.serialize([types.Label(data=data, annotations=annotations)]))
    cells = {"Grass": 0.95, "Grass / Cover / Dense": 0.9, "[Lvl2] Night": 0.75}
    cells |= {"Plants / Tree": 0.7, "Plants / Shrub": 0.6, "Plants / Tree / Kind / Willow": 0.8}
    cells |= {"Sky / Clear": 0.4}
    written(tmp_path, export, cells)
    ours = (tmp_path / "import.ndjson").read_text("utf-8").splitlines()
    ours = [_without_empty(json.loads(line)) for line in ours]
    assert [line["name"] for line in ours] == ["Grass", "[Lvl2] Night", "Plants"]
    assert [_without_empty(line) for line in theirs] == ours
