"""Agreement of several annotators (labelbox.ipynb), and what becomes of their disagreement."""

from data_utils import read_labelbox, to_targets

import numpy as np
import pandas as pd
import pytest
from conftest import data_row, labelled, radio

NAN = float("nan")
SURE, LIKELY, MAYBE = "1 - Definitely", "2 - Likely", "3 - Maybe"


@pytest.fixture
def nb(notebook_functions):
    return notebook_functions("labelbox")


def said(write_ndjson, *images: dict[str, str | None]):
    """Read an export in which each image is {annotator: option of Lily, None for unticked}."""
    rows = []
    for number, image in enumerate(images):
        answers = {who: [radio("Lily", option)] if option else [] for who, option in image.items()}
        labels = [labelled(*found, by=who) for who, found in answers.items()]
        rows.append(data_row(f"{number}.jpg", *labels))
    return read_labelbox(write_ndjson(*rows))


def test_alpha_of_two_people_by_hand(nb, write_ndjson):
    # both 4, only ann 1, only ben 2, none 3: 3 of 10 pairs differ. Of the 20 judgements 11 say
    # present and 9 absent: two of them, drawn at random, differ in 2 · 11 · 9 / (20 · 19)
    images = [{"ann": SURE, "ben": MAYBE}] * 4 + [{"ann": LIKELY, "ben": None}]
    images += [{"ann": None, "ben": SURE}] * 2 + [{"ann": None, "ben": None}] * 3
    answers = said(write_ndjson, *images, {"ann": SURE}, {"cat": SURE})
    table = nb.annotator_agreement(answers)
    assert table.index.tolist() == ["Lily"]
    assert table.loc["Lily"].to_dict() == {
        "photos": 10,
        "agreement": pytest.approx(0.7),
        "alpha": pytest.approx(1 - 0.3 / (198 / 380)),
    }


def test_alpha_of_three_people_with_gaps_by_hand(nb):
    # Pairs that differ: none, 2 of 3, 1 of 1, none; the last photo has one judgement only.
    # Krippendorff weighs each photo by its people: (2 · 0 + 3 · 2/3 + 2 · 1 + 2 · 0) / 9 differ.
    # Of the 9 judgements 6 say present and 3 absent: by chance 2 · 6 · 3 / (9 · 8) differ.
    judged = [[1, 1, NAN], [1, 0, 0], [NAN, 1, 0], [1, 1, NAN], [1, NAN, NAN]]
    found = nb.agreement_of(pd.DataFrame(judged))
    assert (found["photos"], found["agreement"]) == (4, pytest.approx((1 + 1 / 3 + 0 + 1) / 4))
    assert found["alpha"] == pytest.approx(1 - (4 / 9) / (36 / 72))


def test_perfect_agreement_is_1_and_one_answer_throughout_is_nan(nb):
    assert nb.agreement_of(pd.DataFrame([[1, 1], [0, 0]]))["alpha"] == 1
    same = nb.agreement_of(pd.DataFrame([[0, 0, 0], [0, 0, NAN]]))
    assert same["agreement"] == 1 and np.isnan(same["alpha"])


def test_presence_follows_the_parameters_of_to_targets(nb, write_ndjson):
    answers = said(write_ndjson, {"ann": SURE, "ben": MAYBE}, {"ann": SURE, "ben": None})
    assert nb.annotator_agreement(answers)["agreement"].tolist() == [0.5]
    assert nb.annotator_agreement(answers, positive_max=2)["agreement"].tolist() == [0]
    (line,) = nb.annotator_agreement(answers, unanswered="unknown").to_dict("records")
    assert (line["photos"], line["agreement"]) == (1, 1)
    assert np.isnan(line["alpha"])  # one category only


def test_images_judged_once_or_not_at_all_give_no_agreement(nb, write_ndjson):
    skipped = data_row("s.jpg", labelled(skipped=True, by="ann"), labelled(skipped=True, by="ben"))
    row = data_row("a.jpg", labelled(radio("Lily", SURE), by="ann"))
    (line,) = nb.annotator_agreement(read_labelbox(write_ndjson(row, skipped))).to_dict("records")
    assert line["photos"] == 0
    assert np.isnan([line["agreement"], line["alpha"]]).all()


def test_answers_without_an_annotator_are_one_annotator_a_record(nb, write_ndjson):
    labels = [labelled(radio("Lily", SURE), by=who) for who in ("ann", "ben")]
    for label in labels:
        del label["label_details"]
    agreed = nb.annotator_agreement(read_labelbox(write_ndjson(data_row("a.jpg", *labels))))
    assert agreed[["photos", "agreement"]].values.tolist() == [[1, 1]]


def test_export_without_any_answer_gives_no_lines(nb, write_ndjson):
    assert nb.annotator_agreement(read_labelbox(write_ndjson(data_row("a.jpg")))).empty


# ---------------------------------------------------------------- to_targets

CERTAINTY = {1: 1.0, 2: 0.7, 3: 0.1}


def test_disagreement_is_kept_as_soft_targets(write_ndjson):
    votes = {1: 1, 2: 1, 3: 1}
    images = [{"ann": SURE, "ben": None, "cat": None}, {"ann": SURE, "ben": LIKELY}]
    answers = said(write_ndjson, *images, {"ann": None, "ben": None})
    assert to_targets(answers, soft=votes)["Lily"].tolist() == pytest.approx([1 / 3, 1, 0])
    soft = to_targets(answers, soft=CERTAINTY)["Lily"].tolist()
    assert soft == pytest.approx([1 / 3, 0.85, 0])
    assert to_targets(answers)["Lily"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("options", "mean", "by_votes", "by_certainty"),
    [
        ([MAYBE, MAYBE, None], 0.2 / 3, 1, 0),  # two that hardly believe it lose to one
        ([SURE, LIKELY, None, None], 1.7 / 4, 1, 0),
        ([SURE, None], 0.5, 1, 1),  # a tie is present
        ([LIKELY, LIKELY, MAYBE], 0.5, 1, 1),
        ([SURE, None, None], 1 / 3, 0, 0),
        ([LIKELY], 0.7, 1, 1),
        ([None, None], 0, 0, 0),
    ],
)
def test_majority_of_graded_certainty_decides(write_ndjson, options, mean, by_votes, by_certainty):
    image = {f"ann {number}": option for number, option in enumerate(options)}
    answers = said(write_ndjson, image, {"ann": SURE})
    assert to_targets(answers)["Lily"][0] == by_votes
    assert to_targets(answers, soft=CERTAINTY)["Lily"][0] == pytest.approx(mean)
    assert to_targets(answers, soft=CERTAINTY, hard=True)["Lily"].tolist() == [by_certainty, 1]
    assert to_targets(answers, hard=True)["Lily"][0] == by_votes


def test_tie_of_certainties_is_present_whatever_the_last_digit(write_ndjson):
    answers = said(write_ndjson, {"ann": MAYBE, "ben": LIKELY, "cat": SURE})
    certainty = {3: 0.2, 2: 0.6, 1: 0.7}
    assert to_targets(answers, soft=certainty)["Lily"][0] == pytest.approx(0.5)  # or just below
    assert to_targets(answers, soft=certainty, hard=True)["Lily"][0] == 1


def test_unknown_stays_unknown_when_certainty_decides(write_ndjson):
    rows = [data_row("a.jpg", labelled(radio("Lily", SURE))), data_row("b.jpg")]
    targets = to_targets(read_labelbox(write_ndjson(*rows)), soft=CERTAINTY, hard=True)
    assert np.array_equal(targets["Lily"], [1, NAN], equal_nan=True)
