"""A classifier outside of its notebook: maps, a viewer, ONNX, the hub, timm's own loader."""

import html
import json
import os
import re
import shutil
from pathlib import Path

import data_utils as du
import demo_360

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import ExifTags, Image

LABELS = ["tree", "<b>`grass`</b>: 1", "</script>"]
SWIN = {"window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
MODELS = {"swinv2_tiny_window8_256": SWIN, "test_efficientnet": {}}


@pytest.fixture(scope="module")
def nb(notebook_functions):
    return notebook_functions("classifier")


@pytest.fixture(scope="module")
def survey(notebook_functions):
    return notebook_functions("survey")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven photos of the demo: the views that a model of halves is made for."""
    plan, folder = demo_360.plan_survey(0, 0, 4), tmp_path_factory.mktemp("photos")
    pixels = [demo_360.draw_panorama(plan, i, 256)[0] for i in range(4)]
    halves = [half for one in pixels for half in np.hsplit(one, 2)][:7]
    for number, half in enumerate(halves):
        Image.fromarray(half).save(folder / f"{number}.jpg", quality=95)
    return sorted(folder.iterdir())


def make(name="swinv2_tiny_window8_256", head="linear"):
    torch.manual_seed(0)
    model = du.build_model(name, 3, head, pretrained=False, img_size=64, **MODELS[name])
    for weight in model.get_classifier().parameters():
        weight.data *= 20  # logits that differ between photos
    return du.Classifier(model, LABELS, [0.5, 0.25, 0.75], panorama_thresholds=[0.5, 0.5, 0.5])


@pytest.fixture
def saved(tmp_path):
    return make().save(tmp_path / "run", {"mAP": 0.75})


# ---------------------------------------------------------------- place and heading


def tags(**values):
    return "".join(f'GPano:{name}="{value}" ' for name, value in values.items()).encode()


HALF = {"CroppedAreaImageWidthPixels": 100, "FullPanoWidthPixels": 200}


@pytest.mark.parametrize(
    ("gps", "xmp", "expected"),
    [
        ({17: 350.25}, b"", 350.25),
        ({17: 370.0}, tags(PoseHeadingDegrees=5), 10),  # the picture's own comes first
        ({}, tags(PoseHeadingDegrees=30), 30),
        ({}, b"<GPano:PoseHeadingDegrees>30.5</GPano:PoseHeadingDegrees>", 30.5),
        ({}, tags(PoseHeadingDegrees=30, CroppedAreaLeftPixels=0, **HALF), 300),
        ({}, tags(PoseHeadingDegrees=30, CroppedAreaLeftPixels=100, **HALF), 120),
        ({}, b"", None),
    ],
)
def test_heading_is_that_of_the_middle_of_the_picture(survey, gps, xmp, expected):
    found = survey.read_heading(gps, xmp)
    assert np.isnan(found) if expected is None else found == pytest.approx(expected)


def write_photo(path, heading=90.0, place=True):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2024:05:21 10:44:50"}
    gps = {1: "N", 2: (45.0, 0.0, 0.0), 3: "W", 4: (90.0, 0.0, 0.0)} if place else {}
    exif[ExifTags.IFD.GPSInfo] = gps | {17: heading}
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 32)).save(path, exif=exif)
    return str(path)


def test_halves_of_a_panorama_look_90_degrees_to_both_sides(survey, tmp_path):
    path = write_photo(tmp_path / "Fen" / "day" / "A.jpg", heading=45.0)
    table = pd.DataFrame({"image": [path] * 3, "part": ["left", "right", "panorama"]})
    found = survey.with_places(table, tmp_path)
    assert found["heading"].tolist() == [315, 135, 45]
    assert found["site"].tolist() == ["Fen"] * 3
    assert found["taken"].tolist() == ["2024-05-21T10:44:50"] * 3
    assert found[["longitude", "latitude"]].to_numpy().tolist() == [[-90, 45]] * 3


def test_photo_without_metadata_keeps_its_line(survey, tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "A.png")
    table = pd.DataFrame({"image": [str(tmp_path / "A.png"), str(tmp_path / "lost.jpg")]})
    found = survey.with_places(table, tmp_path)
    assert len(found) == 2
    assert found[["longitude", "latitude", "heading"]].isna().all(axis=None)
    assert found[["taken", "site"]].to_numpy().tolist() == [["", "all"]] * 2


@pytest.mark.parametrize("xmp", [b'GPano:PoseHeadingDegrees="--1"', tags(CroppedAreaLeftPixels=1)])
def test_wrong_metadata_costs_the_heading_and_not_the_place(survey, tmp_path, xmp):
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (45.0, 0.0, 0.0), 3: "E", 4: (9.0, 0.0, 0.0)}
    Image.new("RGB", (64, 32)).save(tmp_path / "A.jpg", exif=exif, xmp=xmp)
    east, north, heading, taken = survey.read_place(str(tmp_path / "A.jpg"))
    assert (east, north, taken) == (9, 45, "")
    assert np.isnan(heading)


# ---------------------------------------------------------------- the page with a map


def answers(paths, parts=("panorama",)):
    rows = [{"image": path, "part": part} for path in paths for part in parts]
    table = pd.DataFrame(rows)
    for number, label in enumerate(LABELS):
        table[label] = [int(number != 1)] * len(table)
        table[f"{label}_prob"] = 0.25 * number
    return table


def test_page_tells_metres_angles_and_probabilities(survey, tmp_path):
    path = write_photo(tmp_path / "Fen" / "A.jpg", heading=0.0)
    table = survey.with_places(answers([path], ("left", "right", "panorama")), tmp_path)
    data = survey.map_data(table, LABELS)
    assert data["x"].tolist() == pytest.approx([-10018754.171] * 3)  # EPSG:3857
    assert data["y"].tolist() == pytest.approx([5621521.486] * 3)
    angles = np.degrees(data["angle"].to_numpy()) % 360
    assert angles == pytest.approx([180, 0, 90])  # west, east, north
    assert data["probs"][0].splitlines() == ["0.00 tree", f"0.25 {LABELS[1]}", "0.50 </script>"]
    assert data["is_1"].tolist() == [False] * 3
    assert data["photo"].str.startswith("data:image/jpeg;base64,").all()
    assert (survey.map_data(table, LABELS, most=0)["photo"] == "").all()


def test_page_needs_no_other_file_and_counts_photos_without_a_place(survey, tmp_path):
    pytest.importorskip("bokeh", reason="bokeh (extra) is not installed")
    paths = [write_photo(tmp_path / f"{n}.jpg", place=n > 0) for n in range(3)]
    table = survey.with_places(answers(paths, ("left", "right", "panorama")), tmp_path)
    survey.write_map_page(table, LABELS, tmp_path / "map.html", halves=True)
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img)[^>]*\ssrc=[\"']?http|<link", page)
    assert "2 photos; 1 more have no place" in page
    start = page.rindex('<script type="application/json"')
    text = html.unescape(page[page.index(">", start) + 1 : page.index("</script>", start)])
    assert all(json.dumps(label) in text for label in LABELS)  # a layer per label
    assert text.count('"CDSView"') == 7  # dots of all; dots and arrows of each label


# ---------------------------------------------------------------- the viewer


@pytest.fixture
def table(survey, monkeypatch, photos):
    classifier = make()
    monkeypatch.setattr(survey, "classifier", classifier, raising=False)
    monkeypatch.setattr(survey, "labels", LABELS, raising=False)
    return classifier.predict(photos).assign(site=["Fen", "Fen", "Mere"] + ["Fen"] * 4)


def test_lines_are_picked_by_decision_and_site_and_sorted_by_doubt(survey, table):
    table["tree"] = [1, 0, 1, np.nan, 1, 0, 1]
    table["tree_prob"] = [0.9, 0.1, 0.6, 0.5, 0.55, 0.4, 1.0]
    assert survey.select(table, "tree").index.tolist() == [3, 4, 2, 5, 0, 1, 6]
    assert survey.select(table, "tree", "1").index.tolist() == [4, 2, 0, 6]
    assert survey.select(table, "tree", "0", "Fen").index.tolist() == [5, 1]
    assert survey.select(table, "tree", "unsure").index.tolist() == [3]
    assert survey.select(table, "tree", "0", "Mere").empty


def test_clicks_in_the_viewer_reach_the_partition(survey, table, tmp_path, notebook_functions):
    pytest.importorskip("ipywidgets")
    relabeling = notebook_functions("relabeling")
    review, names = tmp_path / "out" / "review_me.csv", [f"p/{n}.jpg" for n in range(7)]
    known = {os.path.realpath(path): name for path, name in zip(table["image"], names)}
    first = os.path.realpath(survey.select(table, "tree", site="Mere")["image"].iloc[0])
    del known[os.path.realpath(survey.select(table, "tree", site="Fen")["image"].iloc[1])]
    viewer = survey.browse(table, review, known)
    (label, _, site), (number, *buttons) = (box.children for box in viewer.children[:2])
    noted, text, picture = viewer.children[2:]
    label.value, site.value = "tree", "Mere"
    assert text.value.startswith("1 photos")
    assert picture.value[:2] == b"\xff\xd8"
    buttons[1].click()
    assert noted.value == f"Noted: {known[first]}, tree: absent"
    site.value = "Fen"
    assert text.value.startswith("6 photos")
    buttons[0].click()
    assert number.value == 2  # the next one, which is not in the training part
    assert all(button.disabled for button in buttons)
    assert text.value.endswith("no training photo, so not to be corrected")
    decisions = relabeling.read_decisions(review)
    assert decisions["decision"].tolist() == ["absent", "present"]
    assert decisions["image_path"][0] == known[first]
    part = pd.DataFrame({"image_path": names, "tree": np.nan})
    assert relabeling.apply_decisions(review, part, ["tree"])["tree"].count() == 2


def test_line_that_a_crash_cut_off_costs_no_other(tmp_path, notebook_functions):
    path = tmp_path / "review.csv"
    path.write_text("a.jpg,tree,pres")
    du.append_line(path, ['b, "c".jpg', "tree", "absent"])
    with pytest.warns(UserWarning, match="line 1: cut off"):
        found = notebook_functions("relabeling").read_decisions(path)
    assert found[["image_path", "decision"]].to_numpy().tolist() == [['b, "c".jpg', "absent"]]


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize(  # all six pairs, on real photos: docs/results.md
    ("name", "head"), [*zip([*MODELS, "swinv2_tiny_window8_256"], ["linear", "csra", "mldecoder"])]
)
def test_onnx_answers_alike_for_any_batch_and_knows_its_labels(nb, tmp_path, photos, name, head):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} (extra) is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx (extra) is not installed")
    used = du.Classifier.load(make(name, head).save(tmp_path))
    nb.export_onnx(used, tmp_path / "out" / "model.onnx")
    for n in (1, 2, 7):
        assert nb.compare_onnx(used, tmp_path / "out" / "model.onnx", photos[:n]) < 1e-4
    found = {
        p.key: json.loads(p.value) for p in onnx.load(tmp_path / "out/model.onnx").metadata_props
    }
    expected = json.loads((tmp_path / "best_classifier.json").read_text())
    assert {key: found[key] for key in expected} == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]


# ---------------------------------------------------------------- hub and timm


@pytest.mark.parametrize("name", MODELS)
def test_timms_own_loader_reads_a_linear_classifier(nb, tmp_path, photos, name):
    used = make(name)
    nb.write_hub_folder(used.save(tmp_path / "run").parent, tmp_path / "hub", "wetlands")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.stack([used.transform(du.open_image(photo)) for photo in photos])
    with torch.inference_mode():
        expected = used.model.cpu()(images)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)
    assert tuple(model.pretrained_cfg["mean"]) == tuple(used.model.data_config["mean"])


@pytest.mark.parametrize("head", ["csra", "mldecoder"])
def test_timms_own_loader_reads_the_weights_of_every_head(nb, tmp_path, head):
    path = make(head=head).save(tmp_path / "run").parent
    nb.write_hub_folder(path, tmp_path / "hub", "wetlands")
    assert not (tmp_path / "hub" / "config.json").exists()  # timm does not know this head
    fresh = make(head=head).model
    for weight in fresh.parameters():
        weight.data.zero_()
    timm.models.load_checkpoint(fresh, str(tmp_path / "hub" / "model.safetensors"))
    expected = du.Classifier.load(path / "best_classifier.json").model.state_dict()
    assert all(torch.equal(fresh.state_dict()[key], expected[key]) for key in expected)


def test_model_card_is_read_by_the_hubs_own_class(nb, saved, tmp_path):
    nb.write_hub_folder(saved.parent, tmp_path / "hub", "wetlands")
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    (score,) = card.data.eval_results
    assert (score.metric_type, score.metric_value) == ("mAP", 0.75)
    assert "- &lt;b&gt;`grass`&lt;/b&gt;: 1\n" in card.text
    assert "<b>" not in card.text


def test_classifier_goes_to_the_hub_and_back(nb, saved, tmp_path, monkeypatch, photos):
    """The hub is a folder here, in the form in which huggingface_hub keeps what it fetched."""
    cache, revision = tmp_path / "cache" / "models--me--wetlands", "0" * 40
    sent = {}

    def upload_folder(repo_id, folder_path):
        assert repo_id == "me/wetlands" and sent["private"]
        shutil.copytree(folder_path, cache / "snapshots" / revision)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(revision)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **more: sent.update(more))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    nb.write_hub_folder(saved.parent, tmp_path / "hub", "wetlands")
    nb.to_hub(tmp_path / "hub", "me/wetlands")
    loaded = nb.from_hub("me/wetlands", cache_dir=tmp_path / "cache", local_files_only=True)
    expected = du.Classifier.load(saved)
    pd.testing.assert_frame_equal(loaded.predict(photos), expected.predict(photos))
    assert Path(tmp_path / "hub" / "README.md").exists()
