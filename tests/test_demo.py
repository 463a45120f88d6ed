"""The demo: seamless pictures, and an export that agrees with the truth."""

import dataclasses
import json
import re
import sys
from datetime import datetime

import demo_360
from data_utils import panorama_name, read_labelbox, to_targets
from demo_360 import LABELS, draw_panorama, make_demo, plan_survey

import numpy as np
import pandas as pd
import pytest
from conftest import load_notebook_functions
from PIL import ExifTags, Image

N_PANORAMAS = 24  # 48 halves are enough for every odd case of the export


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of 24 tiny panoramas: its folder and its truth table."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, make_demo(folder, N_PANORAMAS, width=128, seed=3, n_jobs=1)


@pytest.fixture(scope="module")
def rows(demo):
    lines = (demo[0] / "demo_360.ndjson").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Export and truth of the demo as the README makes it, but for its size in pixels."""
    folder = tmp_path_factory.mktemp("whole")
    make_demo(folder, width=128, n_jobs=1)
    return folder


def panoramas(folder):
    return sorted((folder / "panoramas").rglob("*.jpg"))


def labels_of(row: dict) -> list[dict]:
    return [label for project in row["projects"].values() for label in project["labels"]]


def answers_of(row: dict) -> dict[str, dict]:
    found = [a for label in labels_of(row) for a in label["annotations"]["classifications"]]
    return {answer["name"]: answer for answer in found}


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(("site", "day"), [(0, 0), (4, 2), (7, 5)])
def test_left_and_right_edge_meet_without_a_seam(site, day):
    survey = plan_survey(site, day, n_photos=2, seed=1)
    pixels = draw_panorama(survey, 1, width=256)[0].astype(float)
    steps = np.abs(np.diff(pixels, axis=1)).mean((0, 2))  # one value a pair of columns
    seam = np.abs(pixels[:, 0] - pixels[:, -1]).mean()
    assert seam <= np.quantile(steps, 0.95)


def test_camera_that_looks_the_other_way_sees_the_same_picture_turned():
    survey = plan_survey(4, 2, n_photos=2, seed=1)
    turned = dataclasses.replace(survey, mount=survey.mount + np.pi)
    pixels, ids = draw_panorama(survey, 1, width=256)
    other, other_ids = draw_panorama(turned, 1, width=256)
    middle = slice(126, 130)  # in one of both pictures these columns are the outer edge
    rolled = np.roll(pixels, 128, axis=1)
    assert (np.roll(ids, 128, axis=1) == other_ids).mean() > 0.99
    assert np.abs(rolled[:, middle].astype(float) - other[:, middle]).mean() < 1
    assert np.abs(rolled.astype(float) - other).mean() < 1


def test_picture_has_the_asked_size_and_every_pixel_a_known_label():
    pixels, ids = draw_panorama(plan_survey(0, 0, 1), 0, width=256)
    assert pixels.shape == (128, 256, 3) and pixels.dtype == np.uint8
    assert ids.shape == (128, 256)
    assert set(np.unique(ids)) <= set(range(len(LABELS) + 1))


def test_neighbouring_photos_look_alike_and_photos_of_other_places_do_not():
    def small(site, day, photo):
        pixels = draw_panorama(plan_survey(site, day, 2, seed=1), photo, width=256)[0]
        return np.asarray(Image.fromarray(pixels).resize((16, 8)), float)

    first, second = small(0, 0, 0), small(0, 0, 1)
    others = [small(0, 3, 0), small(2, 0, 0), small(4, 2, 0)]
    assert all(
        np.abs(first - second).mean() < np.abs(first - other).mean() / 1.5 for other in others
    )


# ---------------------------------------------------------------- files


def test_files_lie_in_site_day_and_export_folders(demo):
    found = [p.relative_to(demo[0] / "panoramas") for p in panoramas(demo[0])]
    assert len(found) == N_PANORAMAS
    for path in found:
        assert re.fullmatch(
            r"[^/]+/Day \d+/jpg_export/IMG_\d{8}_\d{6}_\d{4}\.jpg", path.as_posix()
        ), path
    assert len({path.parts[0] for path in found}) >= 3  # sites
    assert len({path.parts[1] for path in found}) >= 3  # survey days
    assert len({path.name for path in found}) == N_PANORAMAS
    everything = {p.name for p in demo[0].rglob("*") if p.is_file()}
    assert everything == {"demo_360.ndjson", "truth.csv", *(path.name for path in found)}


def test_files_carry_time_place_and_heading(demo):
    places = {}
    for path in panoramas(demo[0]):
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (128, 64)
            exif, xmp = image.getexif(), image.info["xmp"].decode()
        taken = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
        named = datetime.strptime(path.stem[4:19], "%Y%m%d_%H%M%S")
        assert datetime.strptime(taken, "%Y:%m:%d %H:%M:%S") == named
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        d, m, s = map(float, gps[ExifTags.GPS.GPSLatitude])
        assert gps[ExifTags.GPS.GPSLatitudeRef] == "N"
        assert gps[ExifTags.GPS.GPSLongitudeRef] in ("E", "W")
        places.setdefault(path.parts[-4], []).append(d + m / 60 + s / 3600)
        heading = float(re.search(r"<GPano:PoseHeadingDegrees>([\d.]+)<", xmp)[1])
        assert 0 <= heading < 360
        assert float(gps[ExifTags.GPS.GPSImgDirection]) == pytest.approx(heading, abs=0.011)
        assert "<GPano:ProjectionType>equirectangular<" in xmp
        assert "<GPano:FullPanoWidthPixels>128<" in xmp
    sites = {site.name: site for site in demo_360.SITES}
    for name, latitudes in places.items():
        assert latitudes == pytest.approx([sites[name].latitude] * len(latitudes), abs=0.05)


@pytest.mark.parametrize(
    "degrees", [0, 123.4567, 359.9949, 359.9951, 359.99999, 360, 725.5, -0.001]
)
def test_heading_of_picture_and_sphere_are_one_below_360(degrees, monkeypatch):
    """In a whole panorama the middle of the picture is the middle of the sphere."""
    survey = plan_survey(0, 0, 1)
    monkeypatch.setattr(demo_360, "_camera", lambda *_: (0.0, 0.0, np.radians(degrees)))
    exif = Image.Exif()
    exif.load(demo_360._exif(survey, 0))
    picture = float(exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSImgDirection])
    xmp = demo_360._xmp(np.radians(degrees), 128).decode()
    sphere = float(re.search(r"<GPano:PoseHeadingDegrees>([\d.]+)<", xmp)[1])
    assert picture == pytest.approx(sphere) and 0 <= sphere < 360
    assert (sphere - degrees + 180) % 360 - 180 == pytest.approx(0, abs=0.006)


def contents(folder) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_same_seed_gives_the_same_files_whatever_n_jobs_is(tmp_path):
    one = make_demo(tmp_path / "one", 4, width=256, seed=5, n_jobs=1)
    two = make_demo(tmp_path / "two", 4, width=256, seed=5, n_jobs=2)
    pd.testing.assert_frame_equal(one, two)
    files = contents(tmp_path / "one")
    assert len(files) == 4 + 2
    assert files == contents(tmp_path / "two")


def test_another_seed_gives_other_pictures(tmp_path):
    make_demo(tmp_path / "a", 1, width=128, seed=1, n_jobs=1)
    make_demo(tmp_path / "b", 1, width=128, seed=2, n_jobs=1)
    first, second = (np.asarray(Image.open(panoramas(tmp_path / n)[0]), float) for n in "ab")
    assert np.abs(first - second).mean() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_panoramas": 0}, "n_panoramas must be at least 1, not 0"),
        ({"n_panoramas": 1, "width": 250}, "width must be a multiple of 16.*not 250"),
        ({"n_panoramas": 1, "width": 112}, "at least 128, not 112"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_demo(tmp_path / "demo", **arguments)
    assert not (tmp_path / "demo").exists()


def test_command_line_passes_its_arguments_on(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(demo_360, "make_demo", lambda *given: calls.append(given))
    options = ["--n-panoramas", "7", "--width", "256", "--seed", "9"]
    monkeypatch.setattr(sys, "argv", ["demo_360.py", str(tmp_path), *options])
    demo_360.main()
    assert calls == [(tmp_path, 7, 256, 9)]
    monkeypatch.setattr(demo_360, "make_demo", make_demo)
    monkeypatch.setattr(sys, "argv", ["demo_360.py", str(tmp_path), "--n-panoramas", "0"])
    with pytest.raises(SystemExit):
        demo_360.main()
    assert "n_panoramas must be at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------- export and truth


def test_truth_file_is_the_table_that_is_returned(demo):
    folder, truth = demo
    pd.testing.assert_frame_equal(pd.read_csv(folder / "truth.csv"), truth, check_dtype=False)
    assert len(truth) == 2 * N_PANORAMAS
    halves = {f"{p.stem}_{side}.jpg" for p in panoramas(folder) for side in ("left", "right")}
    assert set(truth["image"]) == halves
    fractions = truth[[f"{name}_fraction" for name in LABELS]]
    assert fractions.min(axis=None) >= 0 and fractions.sum(axis=1).max() <= 1.001
    assert (truth[LABELS].sum() > 0).all() and (truth[LABELS].mean() < 1).all()


def read_targets(folder) -> pd.DataFrame:
    return to_targets(read_labelbox(folder / "demo_360.ndjson", problematic="keep")).set_index(
        "image"
    )


def judged_twice(rows) -> list[str]:
    return sorted({r["data_row"]["external_id"] for r in rows if len(labels_of(r)) == 2})


def test_known_targets_of_the_export_equal_the_truth_where_one_annotator_judged(demo, rows):
    folder, truth = demo
    targets = read_targets(folder)
    assert set(targets.columns) == set(LABELS)
    unlabelled = read_labelbox(folder / "demo_360.ndjson").attrs["report"]["unlabelled"]
    assert targets.loc[unlabelled].isna().all(axis=None)
    judged = targets.drop(index=[*unlabelled, *judged_twice(rows)])
    assert len(judged) == 2 * N_PANORAMAS - 4 - 7
    expected = truth.set_index("image").loc[judged.index, judged.columns].to_numpy(float)
    np.testing.assert_array_equal(judged, np.where(judged.isna(), np.nan, expected))


def test_pilot_project_left_three_questions_unasked_of_whole_panoramas(demo, rows):
    pilot = [r for r in rows if {p["name"] for p in r["projects"].values()} != {"demo_360"}]
    assert {p["name"] for r in pilot for p in r["projects"].values()} == {"demo_360 pilot"}
    images = {r["data_row"]["external_id"] for r in pilot}
    assert len(images) == 2 * round(demo_360.PILOT_SHARE * N_PANORAMAS) == 8
    assert len({panorama_name(image) for image in images}) == 4
    unknown = read_targets(demo[0]).isna()
    unlabelled = read_labelbox(demo[0] / "demo_360.ndjson").attrs["report"]["unlabelled"]
    unknown = unknown.drop(index=unlabelled)
    later = unknown[list(demo_360.ASKED_LATER)]
    assert later.loc[later.index.isin(images)].all(axis=None)
    assert not any(set(answers_of(row)) & set(demo_360.ASKED_LATER) for row in pilot)


def test_checklist_with_a_distance_alone_is_an_unknown_cell(demo, rows):
    lacking = {
        (row["data_row"]["external_id"], answer["name"])
        for row in rows
        for label in labels_of(row)[:1]
        for answer in label["annotations"]["classifications"]
        if [o["name"] for o in answer.get("checklist_answers", [])][:1]
        in (["Foreground"], ["Background"])
    }
    assert len(lacking) == 4
    report = read_labelbox(demo[0] / "demo_360.ndjson").attrs["report"]
    targets = read_targets(demo[0])
    alone = [cell for cell in lacking if cell[0] not in judged_twice(rows)]
    assert {image for image, _ in alone} <= set(report["without a grade"])
    assert all(np.isnan(targets.loc[image, label]) for image, label in alone)


def test_one_cell_in_sixteen_of_the_whole_demo_is_unknown(whole):
    """Drawn small: who answers what depends on the seed and the number of photos alone."""
    targets = read_targets(whole)
    unknown = targets[~targets.isna().all(axis=1)].isna()
    assert unknown.to_numpy().sum() == 240
    assert 0.05 < unknown.mean(axis=None) < 0.08
    later = unknown[list(demo_360.ASKED_LATER)].mean()
    assert later.between(0.14, 0.17).all() and unknown.mean().drop(later.index).max() < 0.03


def test_two_annotators_agree_mostly(whole):
    """Krippendorff's alpha of two raters: 1 - (2 N - 1) disagreements / (present × absent)."""
    answers = read_labelbox(whole / "demo_360.ndjson", problematic="keep")
    judged = answers[answers["judged"]]
    twice = judged.groupby("image")["label_id"].nunique()
    assert twice.value_counts().to_dict() == {1: 480 - 4 - 72, 2: 72}
    both = judged[judged["image"].isin(twice.index[twice == 2])]
    first, second = (
        to_targets(both[both["annotator"] == name].astype({"label": answers["label"].dtype}))
        .set_index("image")
        .sort_index()
        for name in sorted(both["annotator"].unique())
    )
    alphas = {}
    for label in LABELS:
        pairs = np.stack([first[label], second[label]], axis=1)
        pairs = pairs[~np.isnan(pairs).any(axis=1)]
        present, n = pairs.sum(), pairs.size
        differ = (pairs[:, 0] != pairs[:, 1]).sum()
        alphas[label] = 1 - (n - 1) * differ / (present * (n - present))
    assert min(alphas.values()) > 0.6
    assert 0.8 < np.mean(list(alphas.values())) < 0.97


def test_second_opinion_turns_few_targets_and_only_into_present(whole):
    truth = pd.read_csv(whole / "truth.csv").set_index("image")
    targets = read_targets(whole)
    wrong = (targets != truth.loc[targets.index, targets.columns]) & targets.notna()
    assert wrong.to_numpy().sum() == 6  # of 3 840; a tie counts as present
    assert (targets.to_numpy()[wrong] == 1).all()


def test_grade_follows_how_much_of_the_object_is_visible_to_the_first_annotator(demo, rows):
    folder, truth = demo
    answers = read_labelbox(folder / "demo_360.ndjson").dropna(subset=["grade"])
    first = {label["id"] for row in rows for label in labels_of(row)[:1]}
    fractions = truth.set_index("image")
    assert set(answers["grade"]) == {1, 2, 3}
    for label, given in answers[answers["label_id"].isin(first)].groupby("label", observed=True):
        given = given.assign(fraction=fractions.loc[given["image"], f"{label}_fraction"].to_numpy())
        by_grade = given.groupby("grade")["fraction"].agg(["min", "max"]).sort_index()
        assert (by_grade["min"].to_numpy()[:-1] >= by_grade["max"].to_numpy()[1:]).all(), label


def test_questions_are_graded_checklists_with_a_distance_and_one_radio(rows):
    kinds = {}
    for row in rows:
        for name, answer in answers_of(row).items():
            if "checklist_answers" in answer and name in LABELS:
                kinds.setdefault(name, set()).add("checklist")
                *grade, distance = [option["name"] for option in answer["checklist_answers"]]
                assert distance in ("Foreground", "Background")
                assert len(grade) <= 1 and all(re.match(r"[123] - ", name) for name in grade)
            elif name in LABELS:
                kinds.setdefault(name, set()).add("radio")
                assert re.match(r"[123] - ", answer["radio_answer"]["name"])
    lily = kinds.pop("[Lvl2] Lily")
    assert lily == {"radio"} and set(kinds) == {n for n in LABELS if n != "[Lvl2] Lily"}
    assert all(kind == {"checklist"} for kind in kinds.values())


def test_one_row_stands_twice_and_is_merged(demo, rows):
    images = [row["data_row"]["external_id"] for row in rows]
    assert len(images) == 2 * N_PANORAMAS + 1
    assert len(set(images)) == 2 * N_PANORAMAS
    twice = max(images, key=images.count)
    report = read_labelbox(demo[0] / "demo_360.ndjson").attrs["report"]
    assert report["duplicated"] == [twice]
    assert report["images"] == 2 * N_PANORAMAS
    first, second = (row for row in rows if row["data_row"]["external_id"] == twice)
    assert first == second and labels_of(first)


def test_export_has_every_odd_case_of_a_real_one(demo, rows):
    rows = {row["data_row"]["external_id"]: row for row in rows}
    unlabelled = [image for image, row in rows.items() if not labels_of(row)]
    skipped = [
        image
        for image, row in rows.items()
        if any(label["performance_details"]["skipped"] for label in labels_of(row))
    ]
    flagged = {
        flag: [image for image, row in rows.items() if flag in answers_of(row)]
        for flag in ("Problematic", "Revisit", "Extra Notes")
    }
    assert {name: len(images) for name, images in flagged.items()} == {
        "Problematic": 1,
        "Revisit": 1,
        "Extra Notes": 2,
    }
    assert len(unlabelled) == 2 and len(skipped) == 2
    assert not set(unlabelled) & set(skipped)
    path = demo[0] / "demo_360.ndjson"
    report = read_labelbox(path).attrs["report"]
    assert set(report["unlabelled"]) == {*unlabelled, *skipped}
    assert report["problematic"] == flagged["Problematic"]
    kept = read_labelbox(path)
    assert not set(kept["image"]) & set(flagged["Problematic"])
    assert list(kept["label"].cat.categories).count("Revisit") == 0
    assert kept["annotator"].dropna().nunique() == 2


def test_export_names_the_halves_that_the_split_will_write(demo, tmp_path):
    folder, _ = demo
    for path in panoramas(folder):
        for side in ("left", "right"):
            below = path.relative_to(folder / "panoramas").with_name(f"{path.stem}_{side}.jpg")
            (tmp_path / below).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / below)
    targets = to_targets(read_labelbox(folder / "demo_360.ndjson", problematic="keep"))
    found = load_notebook_functions("partitioning").attach_images(targets, tmp_path)
    assert len(found) == 2 * N_PANORAMAS
    assert (found.groupby("group_id").size() == 2).all()


def test_demo_class_folders_sort_by_what_is_seen_and_keep_two_days_for_validation(tmp_path):
    rows = []
    for number, site in enumerate(("Heron Marsh", "Willow Fen")):
        for day in range(1, 11):
            photo = tmp_path / "halves" / site / f"Day {day}" / f"{site}{day}_left.jpg"
            photo.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(photo)
            rows.append({"image": photo.name, "site": site, "day": day})
            rows[-1] |= {"Trees": number, "Water": day % 2}
    folder, truth = tmp_path / "classes", pd.DataFrame(rows)
    demo_360.sort_into_classes(folder, tmp_path / "halves", truth)
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    assert len(found) == 20
    days = [path.split("/")[2].split()[-1] for path in found if path.startswith("val/")]
    assert sorted(days) == ["4", "4", "9", "9"]
    names = dict(line.split(" ", 1) for line in (folder / "names.txt").read_text().splitlines())
    assert len(set(names.values())) == 8
    for path in found:
        _, wnid, place, _ = path.split("/")
        number, day = int(place.startswith("Willow")), int(place.split()[-1])
        sunny = demo_360.plan_survey(number, day - 1, 1).weather.sunny
        ground = (("open land", "open water"), ("wooded land", "wooded shore"))[number][day % 2]
        assert names[wnid] == f"{ground} {'sunny' if sunny else 'overcast'}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes", "halves"]
