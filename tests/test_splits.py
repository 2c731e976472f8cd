"""Tables as people and spreadsheets leave them; the splits are tested with the data that they divide."""

import pytest

from datasets.splits import read_table, splits_from_csv
from utils.config import UserError


def test_cells_and_their_lines_are_those_of_the_file(tmp_path):
    """A mark of UTF-8, blanks, empty lines, quotes and any end of line are no concern of the reader's."""
    path = tmp_path / "a.csv"
    for end in ("\n", "\r\n"):
        path.write_bytes(end.join(["\ufeffname, split", 'a ,"tr""ain, x"', ",", "", "b,val"]).encode())
        assert read_table(path, "X") == [(2, {"name": "a", "split": 'tr"ain, x'}),
                                         (5, {"name": "b", "split": "val"})]


@pytest.mark.parametrize("text, message", [
    ('name,split\na,"train\nb,val\n', "unexpected end of data"),
    ('name,split\n"a"b,train\n', "expected after"),
    ("name,split\na,train\x00\n", r'"train\\x00" is not one of'),
    ('name,split\na,"tr\nain"\n', r'"tr\\nain" is not one of'),
    ("name,split\na,tr\u2028ain\n", r'"tr\\u2028ain" is not one of')])
def test_what_a_damaged_table_says_is_one_line(tmp_path, text, message):
    """A quote that does not end would swallow the rest of the file; a line break would end the message."""
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=message) as error:
        splits_from_csv(path, {"name": {"a": ["a"]}})
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)
