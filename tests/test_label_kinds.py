"""Label files as people really have them: each kind is read rightly, or refused by name."""

import json

from data_utils import read_labelbox, to_targets

import numpy as np
import pandas as pd
import pytest
from conftest import checklist, data_row, labelled, load_notebook_functions, radio

partitioning = load_notebook_functions("partitioning")
read_csv_labels = partitioning.read_csv_labels
attach_images = partitioning.attach_images
SURE, LIKELY, MAYBE = "1 - Definitely", "2 - Likely", "3 - Maybe"


def named(image: str, *answers: dict, **keys) -> dict:
    """Return a data row with other keys than `external_id`."""
    row = data_row(image, labelled(*answers))
    row["data_row"] |= keys
    return row


def cells(targets: pd.DataFrame) -> dict:
    return targets.set_index("image").to_dict("index")


# ---------------------------------------------------------------- Labelbox


@pytest.mark.parametrize("external_id", [None, "", "absent"])
def test_photo_without_an_external_id_is_called_by_its_global_key(write_ndjson, external_id):
    row = named("x", radio("Reed", SURE), external_id=external_id, global_key="mere/7.jpg ")
    if external_id == "absent":
        del row["data_row"]["external_id"]
    assert cells(to_targets(read_labelbox(write_ndjson(row)))) == {"mere/7.jpg": {"Reed": 1}}


def test_photos_of_one_name_are_kept_apart_by_their_paths_or_refused(write_ndjson):
    rows = [
        named("7.jpg", radio(label, SURE), id=site, global_key=f"{site}\\7.jpg")
        for site, label in (("fen", "Reed"), ("mere", "Lily"))
    ]
    found = cells(to_targets(read_labelbox(write_ndjson(*rows, rows[0]))))
    assert found == {"fen/7.jpg": {"Reed": 1, "Lily": 0}, "mere/7.jpg": {"Reed": 0, "Lily": 1}}
    for key in (None, "0f3a", "fen\\7.jpg", "mere/8.jpg"):
        rows[1]["data_row"]["global_key"] = key
        with pytest.raises(ValueError, match=r"several data rows of one name.*: 7\.jpg"):
            read_labelbox(write_ndjson(*rows))


@pytest.mark.parametrize(
    "options",
    [
        ("1 - 10", "11 - 50"),
        ("1 - 10 ducks", "2 - 10 ducks"),
        ("1 - storey", "2 - storey"),
        ("1 - few", "2 - some", "21 - many"),
        ("1 - few", "2 - 20"),
        ("2 - leaved squill", "2 - stemmed palm"),
    ],
)
def test_numbers_that_are_no_scale_of_certainty_are_plain_options(write_ndjson, options):
    rows = [data_row(f"{o}.jpg", labelled(radio("Seen", o))) for o in options]
    answers = read_labelbox(write_ndjson(*rows))
    assert list(answers["label"].cat.categories) == [f"Seen / {o}" for o in options]
    assert answers["grade"].isna().all()
    assert (to_targets(answers).iloc[:, 1:].to_numpy().diagonal() == 1).all()


def test_one_option_that_begins_with_a_number_makes_no_scale_of_a_checklist(write_ndjson):
    rows = [
        data_row("a.jpg", labelled(checklist("Cover", "Sedge", "Mud"), radio("Reed", SURE))),
        data_row("b.jpg", labelled(checklist("Cover", "3 - spined stickleback"))),
    ]
    found = cells(to_targets(read_labelbox(write_ndjson(*rows))))
    assert found["a.jpg"] == {
        "Cover / Sedge": 1,
        "Cover / Mud": 1,
        "Cover / 3 - spined stickleback": 0,
        "Reed": 1,
    }
    assert found["b.jpg"]["Cover / 3 - spined stickleback"] == 1


def test_scale_is_known_from_other_questions(write_ndjson):
    rows = [
        data_row("a.jpg", labelled(radio("Reed", SURE), checklist("Lily", "Foreground"))),
        data_row("b.jpg", labelled(radio("Reed", MAYBE), checklist("Lily", MAYBE))),
    ]
    answers = read_labelbox(write_ndjson(*rows))
    assert list(answers["label"].cat.categories) == ["Reed", "Lily"]
    assert answers.attrs["report"]["without a grade"] == ["a.jpg"]


@pytest.mark.parametrize("no", ["No", "no ", "None", "0 - No", "Not problematic", "No problem."])
def test_flag_that_is_answered_no_is_no_flag(write_ndjson, no):
    answers = {"a.jpg": no, "b.jpg": "Yes", "c.jpg": "Not useful", "d.jpg": "No sky visible"}
    rows = [
        data_row(name, labelled(radio("Problematic", answer), radio("Reed", SURE)))
        for name, answer in answers.items()
    ]
    found = read_labelbox(write_ndjson(*rows))
    assert found.attrs["report"]["problematic"] == ["b.jpg", "c.jpg", "d.jpg"]
    assert cells(to_targets(found)) == {"a.jpg": {"Reed": 1}}


@pytest.mark.parametrize("where", ["objects", "frames", "segments"])
def test_photos_with_boxes_that_are_not_read_are_listed(write_ndjson, where):
    label = labelled(radio("Reed", SURE))
    box = {"name": "Bird", "classifications": [radio("Species", "Heron")]}
    label["annotations"][where] = [box] if where == "objects" else {"1": box}
    answers = read_labelbox(write_ndjson(data_row("a.jpg", label), data_row("b.jpg", labelled())))
    assert answers.attrs["report"]["boxes not read"] == ["a.jpg"]


def test_question_and_option_that_give_one_label_are_refused(write_ndjson):
    rows = [
        data_row("a.jpg", labelled(radio("Reed / Sedge", SURE))),
        data_row("b.jpg", labelled(checklist("Reed", "Sedge"))),
    ]
    with pytest.raises(ValueError, match=r"export\.ndjson: .*same label.*: Reed / Sedge\.$"):
        read_labelbox(write_ndjson(*rows))
    assert len(read_labelbox(write_ndjson(rows[0]))) == 1


def test_spaces_and_decomposed_letters_make_no_second_label(write_ndjson):
    asked = ["Blüte", "Blu\u0308te", " Blüte ", "Blüte\u00a0"]
    rows = [data_row(f"{i}.jpg", labelled(radio(q, SURE + " " * i))) for i, q in enumerate(asked)]
    targets = to_targets(read_labelbox(write_ndjson(*rows)))
    assert targets.columns.tolist() == ["image", "Blüte"]
    assert targets["Blüte"].tolist() == [1, 1, 1, 1]


def test_labels_in_rework_are_counted(write_ndjson):
    rows = [data_row(name, labelled(radio("Reed", SURE))) for name in ("a.jpg", "b.jpg")]
    for row, status in zip(rows, ("DONE", "IN_REWORK")):
        row["projects"]["id-wetland"]["project_details"] = {"workflow_status": status}
    answers = read_labelbox(write_ndjson(*rows))
    assert answers.attrs["report"]["in rework"] == ["b.jpg"]
    assert to_targets(answers)["Reed"].tolist() == [1, 1]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1252"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "export.ndjson"
    row = json.dumps(data_row("a.jpg", labelled(radio("Blüte", SURE))), ensure_ascii=False)
    path.write_bytes(row.encode(encoding))
    with pytest.raises(ValueError, match=r"export\.ndjson, line 1: .*UTF-8"):
        read_labelbox(path)


@pytest.mark.parametrize("name", ["image", "part", "group_id", "image_path", "Reed_prob"])
def test_labels_called_like_another_column_are_refused(write_ndjson, name):
    path = write_ndjson(data_row("a.jpg", labelled(radio("Reed", SURE), radio(name, SURE))))
    with pytest.raises(
        ValueError, match=rf"export\.ndjson: '{name}' is the name of a column; rename"
    ):
        read_labelbox(path)


# ---------------------------------------------------------------- CSV


def read_text(tmp_path, text: str, **options) -> dict:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return cells(read_csv_labels(path, **options))


@pytest.mark.parametrize(
    "text",
    [
        "photo;Reed;Mud, wet\na;1;0\nb;;1\n",
        "photo\tReed\tMud, wet\na\t1\t0\nb\t\t1\n",
        'photo|Reed|"Mud, wet"\na|1|0\nb||1\n',
        "sep=;\nphoto;Reed;Mud, wet\na;1;0\nb;;1\n",
        '"SEP=\t"\r\nphoto\tReed\tMud, wet\r\na\t1\t0\r\nb\t\t1\r\n',
        'sep=,\nphoto,Reed,"Mud, wet"\na,1,0\nb,,1\n',
        "photo;Reed;Mud, wet\na;1,0;0,0\nb;;1,00\n",
        "\ufeffphoto;Reed;Mud, wet\n\na;True;no\nb;;Yes\n",
    ],
)
def test_other_separators_and_decimal_commas_are_read(tmp_path, text):
    found = read_text(tmp_path, text)
    assert found["a"] == {"Reed": 1, "Mud, wet": 0}
    assert found["b"]["Mud, wet"] == 1 and np.isnan(found["b"]["Reed"])


def test_lines_are_counted_from_the_line_with_the_separator(tmp_path):
    with pytest.raises(ValueError, match="line 4, Reed: '7'"):
        read_text(tmp_path, "sep=;\nphoto;Reed\na;1\nb;7\n")


@pytest.mark.parametrize(
    ("yes", "no"),
    [("True", "False"), ("yes", "no"), ("TRUE", "FALSE"), ("Y", "N"), ("present", "absent")],
)
@pytest.mark.parametrize("more", ["", ",1"])
def test_column_of_yes_and_no_is_one_label(tmp_path, yes, no, more):
    head = "photo,Reed" + (",Mud" if more else "")
    found = read_text(tmp_path, f"{head}\na,{yes}{more}\nb,{no}{more}\nc,{more}\n")
    assert [found[name]["Reed"] for name in "ab"] == [1, 0] and np.isnan(found["c"]["Reed"])
    assert set(found["a"]) == {"Reed", *(["Mud"] if more else [])}


@pytest.mark.parametrize(
    "cell",
    ["['Reed', 'Mud flat']", '["Reed","Mud flat"]', "['Reed' 'Mud flat']", "{'Reed', 'Mud flat'}"],
)
def test_lists_as_programs_write_them(tmp_path, cell):
    quoted = cell.replace('"', '""')
    found = read_text(tmp_path, f'photo,tags\na,"{quoted}"\nb,[]\nc,\nd,[Lvl2] Reed (x)\n')
    labels = ["Reed", "Mud flat", "[Lvl2] Reed (x)"]
    assert [found["a"][name] for name in labels] == [1, 1, 0]
    assert [found["b"][name] for name in labels] == [0, 0, 0]
    assert all(map(np.isnan, found["c"].values()))


@pytest.mark.parametrize("text", ["p,t\na,fog reed\nb,sun reed mud\n", "p,t\na,1 2\nb,2 3\n"])
def test_tags_between_spaces_need_the_separator(tmp_path, text):
    with pytest.raises(ValueError, match=r"labels\.csv: .*one label or several.*LIST_SEPARATOR"):
        read_text(tmp_path, text)
    found = read_text(tmp_path, text, separator=" ")
    assert sorted(found["a"].values()) == [0, 0, 1, 1] or sorted(found["a"].values()) == [0, 1, 1]
    assert len(read_text(tmp_path, text, separator=",")["a"]) == 2


def test_lists_of_class_numbers_need_the_separator(tmp_path):
    text = 'p,t\na,"1,2"\nb,3\n'
    with pytest.raises(ValueError, match="expected 0, 1 or an empty cell"):
        read_text(tmp_path, text)
    found = read_text(tmp_path, text, separator=",")
    assert found["a"] == {"1": 1, "2": 1, "3": 0}


def test_labels_of_several_words_without_a_common_one_stay(tmp_path):
    assert list(read_text(tmp_path, "p,t\na,Reed bed\nb,Wet mud\n")["a"]) == ["Reed bed", "Wet mud"]


@pytest.mark.parametrize("name", ["image", "part", "group_id", "image_path", "Reed_prob"])
def test_csv_labels_called_like_another_column_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"labels\.csv: '{name}' is the name of a column"):
        read_text(tmp_path, f"photo,Reed,{name}\na,1,0\n")


# ---------------------------------------------------------------- names of photos, groups


@pytest.fixture
def photos(tmp_path):
    """Two photos of one name in two folders, one decomposed name, one capital suffix."""
    root = tmp_path / "photos"
    for name in ("fen/1.jpg", "mere/1.jpg", "fen/Blu\u0308te_left.JPG", "DSC.v2.JPEG"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fen\\1.jpg", "fen/1.jpg"),
        (".\\mere\\1.JPG", "mere/1.jpg"),
        ("photos/mere/1.jpg", "mere/1.jpg"),
        ("{root}/mere/1.jpg", "mere/1.jpg"),
        ("C:\\Users\\me\\mere\\1.jpg", "mere/1.jpg"),
        ("/home/other/survey/fen/1.jpg", "fen/1.jpg"),
        ("s3://bucket/fen/1.jpg", "fen/1.jpg"),
        ("Blüte_left.jpg", "fen/Blu\u0308te_left.JPG"),
        ("fen/Blüte_left", "fen/Blu\u0308te_left.JPG"),
        ("DSC.v2.jpeg", "DSC.v2.JPEG"),
        ("DSC.v2", "DSC.v2.JPEG"),
    ],
)
def test_photo_is_found_however_its_name_is_written(photos, name, file):
    targets = pd.DataFrame({"image": [name.format(root=photos)], "Reed": [1.0]})
    assert attach_images(targets, photos)["image_path"].item() == (photos / file).as_posix()


@pytest.mark.parametrize("name", ["other/fen/1.jpg", "/home/fen/2.jpg", "C:\\mud\\1.jpg", "1.png"])
def test_photo_of_another_place_is_not_taken(photos, name):
    with pytest.raises(FileNotFoundError):
        attach_images(pd.DataFrame({"image": [name], "Reed": [1.0]}), photos)


def test_two_ways_to_write_one_photo_are_refused(photos):
    targets = pd.DataFrame({"image": ["fen/1.jpg", "fen\\1.JPG"], "Reed": [1.0, 0.0]})
    with pytest.raises(ValueError, match="labelled twice"):
        attach_images(targets, photos)


@pytest.mark.parametrize("blank", ["", " ", "nan", None, np.nan])
def test_photos_without_a_group_are_groups_of_their_own_and_named(tmp_path, blank):
    names = ["a_left.jpg", "a_right.jpg", "b.jpg", "c.jpg", "d.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    table = {"image": names, "site": [blank] * 3 + ["Fen", "NA"], "Reed": [1.0] * 5}
    with pytest.warns(UserWarning, match=r"3 images have no site.*a_left\.jpg"):
        found = attach_images(pd.DataFrame(table), tmp_path, "site")
    assert found["group_id"].tolist() == ["a", "a", "b", "Fen", "NA"]
