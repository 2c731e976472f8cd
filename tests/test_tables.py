"""Tables of figures on the screen and in files."""

import csv
import math

import pytest

from utils.config import UserError
from utils.intervals import Interval
from utils.tables import text_table, write_csv

MEANINGS = {"auroc": "+ area under the curve", "f1": "+ F1 score"}


def test_the_table_is_aligned_and_shows_intervals_absent_figures_and_meanings():
    """Figures of a bootstrap stand beside those of a baseline that has fewer."""
    rows = {"model": {"auroc": Interval(0.9, 0.85, 0.95, 0), "auroc/mass": math.nan, "f1": 0.5},
            "baseline": {"auroc": 0.75}}
    lines = text_table(rows, MEANINGS).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["auroc", "auroc/mass", "f1"]
    end = lines[0].index("model") + len("model")
    assert [line[:end].split(maxsplit=1)[1] for line in lines[1:]] == ["0.900 (0.850 to 0.950)", "-", "0.500"]
    assert [line[end:len(lines[0])].strip() for line in lines[1:]] == ["0.750", "-", "-"]
    assert [line[len(lines[0]):].strip() for line in lines[1:]] == [
        MEANINGS["auroc"], "", MEANINGS["f1"]]


def test_figures_have_as_many_digits_as_asked_for():
    """Change maps differ in the fourth."""
    assert " 0.5000" in text_table({"model": {"dice": 0.5}}, {}, digits=4)


def test_a_csv_holds_dicts_and_sequences_and_any_name(tmp_path):
    """What a dict lacks is empty; a name of a file that is no Unicode does not end the run."""
    lines = [{"case": "a", "dice": 0.5}, {"case": "b\udcff"}, ("c", 1)]
    write_csv(tmp_path / "a.csv", ("case", "dice"), lines)
    with open(tmp_path / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["dice"] for row in rows] == ["0.5", "", "1"] and rows[1]["case"] == "b\\udcff"


def test_a_csv_is_written_whole_or_not_at_all(tmp_path):
    """An error half way leaves the earlier file and nothing beside it; a folder that is missing is named."""
    def rows():
        yield "a", 1
        raise KeyError("half way")

    write_csv(tmp_path / "a.csv", ("case", "dice"), [("old", 0)])
    with pytest.raises(KeyError):
        write_csv(tmp_path / "a.csv", ("case", "dice"), rows())
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert "old" in (tmp_path / "a.csv").read_text()
    with pytest.raises(UserError, match="none/a.csv: cannot be written"):
        write_csv(tmp_path / "none" / "a.csv", ("case",), [])
