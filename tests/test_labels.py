"""Labels of studies from a CSV file."""

import math

import pytest
import torch

from datasets.cache import Study
from datasets.labels import read_labels
from utils.config import UserError


@pytest.fixture
def read(tmp_path):
    """Read labels from the text of a file."""
    def call(text, loss="bce"):
        (tmp_path / "labels.csv").write_text(text)
        return read_labels(tmp_path / "labels.csv", loss)

    return call


def studies(names):
    return [Study(name, "mri", ()) for name in names.split()]


def equal(labels, expected):
    assert labels.values.keys() == expected.keys()
    for study, row in expected.items():
        assert labels.values[study].dtype == torch.float32
        torch.testing.assert_close(labels.values[study], torch.tensor(row), equal_nan=True, check_dtype=False)


def test_findings_are_columns_of_0_and_1(read):
    """The file of the guide; either name of the study's column, a byte-order mark and blanks do no harm."""
    for column in ("study_id", "study"):
        labels = read(f"\ufeff{column},bleed,mass\np1,1,0\n p2 , 0.0,1\n")
        assert labels.names == ["bleed", "mass"] and labels.kind == "bce"
        equal(labels, {"p1": [1.0, 0.0], "p2": [0.0, 1.0]})


def test_missing_labels_are_nan(read):
    """A study not looked at for a finding is neither positive nor negative."""
    nan = math.nan
    equal(read("study_id,a,b,c\np1,1,,nan\np2,NA,0,\n"), {"p1": [1, nan, nan], "p2": [nan, 0, nan]})
    equal(read("study_id,a\np1,x\np2,\np3,y\n", "ce"), {"p1": [0], "p2": [nan], "p3": [1]})
    equal(read("study_id,a\np1,2.5\np2,na\n", "mse"), {"p1": [2.5], "p2": [nan]})


@pytest.mark.parametrize("words, names", [
    (["tumour", "stroke", "tumour", "normal"], ["normal", "stroke", "tumour"]),
    (["10", "9", "-1", "9"], ["-1", "9", "10"]), (["10", "9", "none"], ["10", "9", "none"])])
def test_classes_are_sorted_and_keep_their_names(read, words, names):
    """The index of a class must not depend on the order of the rows; whole numbers are in their own order."""
    labels = read("study_id,finding\n" + "".join(f"p{i},{word}\n" for i, word in enumerate(words)), "ce")
    assert labels.names == names
    assert [names[int(labels.values[f"p{i}"])] for i in range(len(words))] == words


@pytest.mark.parametrize("loss", ["mse", "mae", "rmse"])
def test_numbers_are_read_as_they_are(read, loss):
    """Ages, volumes, scores; several columns are several targets."""
    labels = read("study_id,age,volume\np1,63.5,-1e3\np2,7,0\n", loss)
    assert labels.names == ["age", "volume"]
    equal(labels, {"p1": [63.5, -1000], "p2": [7, 0]})


@pytest.mark.parametrize("text, loss, message", [
    ("study_id,a\np1,0.7\n", "bce", 'line 2, a: "0.7" is neither 0 nor 1'),
    ("study_id,a\np1,1\np2,yes\n", "bce", 'line 3, a: "yes" is no number'),
    ("study_id,a\np1,inf\n", "mse", 'line 2, a: "inf" is no number'),
    ("study_id,a\np1,1e60\n", "mse", 'line 2, a: "1e60" is no number'),
    ("study_id,a\np1,old\n", "mae", 'line 2, a: "old" is no number'),
    ("study_id,a\np1,0.5\n", "ce", 'line 2, a: "0.5" is no class'),
    ("study_id,a\np1,x\np2,x\np3,\n", "ce", "holds 1 class"),
    ("study_id,a,b\np1,x,y\n", "ce", "one label column beside study_id, has a, b"),
    ("study_id\np1\n", "bce", "a label column beside study_id, has none"),
    ("patient,a\np1,1\n", "bce", "column study_id"), ("study_id,a\n", "bce", "needs rows"),
    ("study_id;a\np1;1\n", "bce", r"its first line is: study_id;a \(commas stand between columns\)"),
    ("", "bce", "needs rows"),
    ("study_id,a\np1,1\np2,0\np1,1\n", "bce", "line 4: the study p1 comes a second time"),
    ("study_id,a\n,1\n", "bce", "line 2: the study has no name"),
    ("study_id,a\np1,1,1\n", "bce", "line 2: 3 cells under 2 columns"),
    ("study_id,a,a\np1,1,1\n", "bce", "two columns have the same name"),
    ("study_id,a\np1,0\np2," + "9" * 5000 + "\n", "ce", "classes are words or whole numbers")])
def test_a_file_that_makes_no_sense_is_an_error(read, tmp_path, text, loss, message):
    """Each names the file, and the line where there is one."""
    with pytest.raises(UserError, match=message) as error:
        read(text, loss)
    assert str(tmp_path / "labels.csv") in str(error.value)


def test_no_file_and_an_unknown_loss_are_errors(read, tmp_path):
    """Naming the file and the constant."""
    with pytest.raises(UserError, match=f"{tmp_path / 'absent.csv'}: cannot be read"):
        read_labels(tmp_path / "absent.csv", "bce")
    with pytest.raises(UserError, match="MIL_LOSS.*bce, ce, mse, mae, rmse"):
        read("study_id,a\np1,1\n", "hinge")


def test_studies_and_labels_without_each_other_are_listed(read):
    """A misspelt study must not vanish from training unseen; labels that are all missing are none."""
    labels = read("study_id,a,b\np1,1,\np2,,nan\np9,1,0\np3,0,1\n")
    found, unlabelled, unknown = labels.match(studies("p1 p2 p3 p4"))
    assert found == studies("p1 p3") and unlabelled == ["p2", "p4"] and unknown == ["p9"]
    with pytest.raises(UserError, match=r"labels.csv: has labels for none of the 2 studies \(p2, p5 ...\), "
                                        r"but for p1, p2, p9 ..."):
        labels.match(studies("p2 p5"))


def test_balanced_weights_of_findings_are_negatives_over_positives(read):
    """Against counting by hand, among the training studies and without missing labels."""
    labels = read("study_id,a,b\np1,1,0\np2,0,\np3,0,1\np4,0,0\np5,1,1\np6,1,\n")
    training = studies("p1 p2 p3 p4 p5")
    assert labels.class_counts(training).tolist() == [[3, 2], [2, 2]]
    assert labels.balanced_weights(training).tolist() == [1.5, 1.0]
    assert labels.balanced_weights(training).dtype == torch.float32
    for part, message in (("p1 p5 p6", 'no negative study of "a"'), ("p1 p2 p4", 'no positive study of "b"')):
        with pytest.raises(UserError, match=message):
            labels.balanced_weights(studies(part))


def test_balanced_weights_of_classes_make_them_count_alike(read):
    """n / (C * count): weight times count is the same for all, and the mean weight of a study is 1."""
    labels = read("study_id,a\np1,x\np2,y\np3,x\np4,\np5,z\np6,x\n", "ce")
    training = studies("p1 p2 p3 p4 p5 p6")
    counts, weights = labels.class_counts(training), labels.balanced_weights(training)
    assert counts.tolist() == [3, 1, 1]
    torch.testing.assert_close(weights, torch.tensor([5 / 9, 5 / 3, 5 / 3]))
    assert float((weights * counts).sum()) == pytest.approx(5)
    with pytest.raises(UserError, match='no study of "y"'):
        labels.balanced_weights(studies("p1 p5"))


def test_numbers_have_no_class_weights(read):
    """Asking for them is a mistake in the constants."""
    with pytest.raises(UserError, match="bce and ce"):
        read("study_id,a\np1,1\n", "mse").balanced_weights(studies("p1"))
