"""The table that a benchmark gets: its own ids in its own order, from one run or several."""

from pathlib import Path

import pandas as pd
import pytest

LABELS = ["cat", "dog"]


@pytest.fixture
def write(notebook_functions, tmp_path):
    """Write a submission for a sample of the given text, see `write_submission`."""

    def call(text, tables, exclusive=False):
        sample, path = tmp_path / "sample.csv", tmp_path / "submission.csv"
        sample.write_text(text, encoding="utf-8")
        function = notebook_functions("classifier").write_submission
        function(tables, LABELS, exclusive, str(sample), path)
        return path.read_text(encoding="utf-8")

    return call


def predictions(probs):
    """Return a table as `Classifier.predict` makes it, of photos in folders."""
    images = {f"test/a/{name}.jpg": p for name, p in probs.items()}
    table = pd.DataFrame({"image": list(images), "cat_prob": list(images.values())})
    return table.assign(cat=0, dog=1, dog_prob=1 - table["cat_prob"])


def test_order_and_ids_are_those_of_the_sample_and_runs_are_averaged(write):
    one, two = predictions({"001": 0.25, "002": 1.0, "extra": 0.5}), predictions({"002": 0.5})
    two = pd.concat([two, predictions({"extra": 0.5, "001": 0.75})])  # another order
    assert write("id,dog,cat\n002,0,0\n001,0,0\n", [one, two]) == (
        "id,dog,cat\n002,0.25,0.75\n001,0.5,0.5\n"
    )
    alone = write("id;cat;dog\ntest/a/001.jpg;0;0\n002.jpg;0;0\n".replace("test/a/", ""), [one])
    assert alone == "id,cat,dog\n001.jpg,0.25,0.75\n002.jpg,1.0,0.0\n"
    whole = write("id,cat,dog\ntest/a/001.jpg,0,0\n", [one])
    assert whole == "id,cat,dog\ntest/a/001.jpg,0.25,0.75\n"


def test_one_column_gets_the_most_probable_class(write):
    probs = predictions({"001": 0.25, "002": 1.0})
    sample = "ImageId,PredictionString\n002,\n001,\n"
    assert write(sample, [probs], exclusive=True) == "ImageId,PredictionString\n002,cat\n001,dog\n"
    with pytest.raises(ValueError, match=r"columns PredictionString; expected the labels cat, dog"):
        write(sample, [probs])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["001", "002", "001"], r"sample.csv: 1 ids stand twice \(001\); expected each photo"),
        (["001", "9", "8"], r"sample.csv: 2 ids have no prediction \(9, 8\); expected each photo"),
        (["001", "003"], r"1 ids have no prediction \(003\)"),  # which one run could not read
    ],
)
def test_sample_with_other_ids_is_one_sentence_and_nothing_is_written(
    write, tmp_path, ids, message
):
    tables = [predictions({"001": 0.25, "002": 1.0, "003": 0.1}), predictions({"001": 0, "002": 1})]
    with pytest.raises(ValueError, match=message):
        write("id,cat,dog\n" + "".join(f"{name},0,0\n" for name in ids), tables)
    assert not Path(tmp_path / "submission.csv").exists()


def test_id_that_names_two_photos_is_refused(write):
    table = predictions({"001": 0.25})
    twice = pd.concat([table, table.assign(image="test/b/001.jpg")])
    with pytest.raises(ValueError, match=r"1 ids name several photos \(001\)"):
        write("id,cat,dog\n001,0,0\n", [twice])
    answered = write("id,cat,dog\ntest/b/001.jpg,0,0\n", [twice])
    assert answered == "id,cat,dog\ntest/b/001.jpg,0.25,0.75\n"
