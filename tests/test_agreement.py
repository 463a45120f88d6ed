"""Agreement of several annotators, and what becomes of their disagreement."""

import numpy as np
import pytest
from conftest import data_row, labelled, radio

from data_utils import _fleiss_kappa, annotator_agreement, read_labelbox, to_targets

NAN = float("nan")
SURE, LIKELY, MAYBE = "1 - Definitely", "2 - Likely", "3 - Maybe"
# Fleiss 1971, table 1: the diagnoses of 30 patients by 6 psychiatrists each.
DIAGNOSES = """
444444 222555 233335 555555 222444 113333 333355 113334 114444 555555 144444 124444
222333 144444 224445 333335 111455 111112 224444 133555 555555 244444 224555 114444 144445 222224
111155 224444 133333 555555"""
# The worked example of Wikipedia's article on Fleiss' kappa: 10 subjects, 14 raters, 5 categories.
WORKED = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""


def test_fleiss_kappa_of_fleiss_own_table():
    counts = [[rated.count(category) for category in "12345"] for rated in DIAGNOSES.split()]
    assert np.sum(counts, axis=0).tolist() == [26, 26, 30, 55, 43]
    assert _fleiss_kappa(counts) == pytest.approx(0.4302445, abs=5e-8)  # he gives 0.430


def test_fleiss_kappa_of_the_worked_example():
    counts = np.array(WORKED.split(), int).reshape(10, 5)
    assert _fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_with_different_numbers_of_raters_by_hand():
    # P = (1 + 1/3 + 0) / 3 = 4/9; p = 4/7 and 3/7, Pe = 25/49
    kappa = _fleiss_kappa([[2, 0], [1, 2], [1, 1]])
    assert kappa == pytest.approx((4 / 9 - 25 / 49) / (24 / 49))


def test_fleiss_kappa_of_one_category_is_nan_and_of_perfect_agreement_is_1():
    assert np.isnan(_fleiss_kappa([[0, 3], [0, 2]]))
    assert _fleiss_kappa([[3, 0], [0, 3]]) == 1


def said(write_ndjson, *images: dict[str, str | None]):
    """Read an export in which each image is {annotator: option of Lily, None for unticked}."""
    rows = []
    for number, image in enumerate(images):
        answers = {who: [radio("Lily", option)] if option else [] for who, option in image.items()}
        labels = [labelled(*found, by=who) for who, found in answers.items()]
        rows.append(data_row(f"{number}.jpg", *labels))
    return read_labelbox(write_ndjson(*rows))


def test_two_annotators_give_cohens_kappa_by_hand(write_ndjson):
    # both 4, only ann 1, only ben 2, none 3: Po = 7/10; Pe = (5 * 6 + 5 * 4) / 100 = 1/2
    images = [{"ann": SURE, "ben": MAYBE}] * 4 + [{"ann": LIKELY, "ben": None}]
    images += [{"ann": None, "ben": SURE}] * 2 + [{"ann": None, "ben": None}] * 3
    answers = said(write_ndjson, *images, {"ann": SURE}, {"cat": SURE})
    (line,) = annotator_agreement(answers).to_dict("records")
    assert line == {
        "label": "Lily",
        "images": 10,
        "annotators": 2,
        "agreement": pytest.approx(0.7),
        "statistic": "Cohen",
        "kappa": pytest.approx(0.4),
    }


def test_three_annotators_give_fleiss_kappa_by_hand(write_ndjson):
    # present of judged: 2/2, 1/3, 1/2, as above with the categories swapped
    images = [{"ann": SURE, "ben": SURE}, {"ann": SURE, "ben": None, "cat": None}]
    answers = said(write_ndjson, *images, {"ben": MAYBE, "cat": None}, {"cat": SURE})
    (line,) = annotator_agreement(answers).to_dict("records")
    assert (line["images"], line["annotators"], line["statistic"]) == (3, 3, "Fleiss")
    assert line["agreement"] == pytest.approx(4 / 9)
    assert line["kappa"] == pytest.approx((4 / 9 - 25 / 49) / (24 / 49))


def test_presence_follows_the_parameters_of_to_targets(write_ndjson):
    answers = said(write_ndjson, {"ann": SURE, "ben": MAYBE}, {"ann": SURE, "ben": None})
    assert annotator_agreement(answers)["agreement"].tolist() == [0.5]
    assert annotator_agreement(answers, positive_max=2)["agreement"].tolist() == [0]
    (line,) = annotator_agreement(answers, unanswered="unknown").to_dict("records")
    assert (line["images"], line["agreement"]) == (1, 1)
    assert np.isnan(line["kappa"])  # one category only


def test_images_judged_once_or_not_at_all_give_no_agreement(write_ndjson):
    skipped = data_row("s.jpg", labelled(skipped=True, by="ann"), labelled(skipped=True, by="ben"))
    row = data_row("a.jpg", labelled(radio("Lily", SURE), by="ann"))
    (line,) = annotator_agreement(read_labelbox(write_ndjson(row, skipped))).to_dict("records")
    assert (line["images"], line["annotators"], line["statistic"]) == (0, 0, None)
    assert np.isnan([line["agreement"], line["kappa"]]).all()


def test_answers_without_an_annotator_are_one_annotator_a_record(write_ndjson):
    labels = [labelled(radio("Lily", SURE), by=who) for who in ("ann", "ben")]
    for label in labels:
        del label["label_details"]
    agreed = annotator_agreement(read_labelbox(write_ndjson(data_row("a.jpg", *labels))))
    assert agreed[["images", "annotators", "agreement"]].values.tolist() == [[1, 2, 1]]


def test_export_without_any_answer_gives_no_lines(write_ndjson):
    assert annotator_agreement(read_labelbox(write_ndjson(data_row("a.jpg")))).empty


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
    assert to_targets(answers, soft=certainty)["Lily"][0] < 0.5
    assert to_targets(answers, soft=certainty, hard=True)["Lily"][0] == 1


def test_unknown_stays_unknown_when_certainty_decides(write_ndjson):
    rows = [data_row("a.jpg", labelled(radio("Lily", SURE))), data_row("b.jpg")]
    targets = to_targets(read_labelbox(write_ndjson(*rows)), soft=CERTAINTY, hard=True)
    assert np.array_equal(targets["Lily"], [1, NAN], equal_nan=True)
