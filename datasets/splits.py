"""Training, validation and test: groups of cases divided by a hash of their names, or by a CSV file."""

import csv
import hashlib
import re

import numpy as np

from utils.config import UserError

SPLITS = ("train", "val", "test")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def split_groups(names, val_fraction, test_fraction, csv, what, prefix=""):
    """{group: split} by the file ``csv``, or where that is None by hash; train, and val if wanted, not empty.

    names: {column of the file: {group: its names in that column}}; the first column holds the groups.
    what: the groups' number in words, and prefix: of the constants' names, for messages.
    """
    if csv:
        split_of = splits_from_csv(csv, names, prefix)
    else:
        split_of = splits_by_hash(list(next(iter(names.values()))), val_fraction, test_fraction, what, prefix)
    for split, wanted in (("train", True), ("val", val_fraction > 0)):
        if wanted and split not in split_of.values():
            raise UserError(f"{csv}: no {list(names)[-1]} has the split {split}")
    return split_of


def splits_by_hash(groups, val_fraction, test_fraction, what, prefix=""):
    """{group: split}: groups (patients, studies) in the order of their hashes, cut at the two fractions."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f"{prefix}VAL_FRACTION {val_fraction}, {prefix}TEST_FRACTION {test_fraction}: "
                        "neither may be negative, and their sum must be below 1")
    number = {group: int(hashlib.sha256(group.encode()).hexdigest()[:12], 16) / 16 ** 12 for group in groups}
    ordered = sorted(groups, key=number.get)
    fractions = {"test": test_fraction, "val": val_fraction, "train": 1 - test_fraction - val_fraction}
    wanted = [split for split, fraction in fractions.items() if fraction > 0]
    if len(groups) < len(wanted):
        raise UserError(f"{what} cannot fill {', '.join(wanted)}; add more, lower {prefix}TEST_FRACTION "
                        f"or {prefix}VAL_FRACTION to 0, or give {prefix}SPLIT_CSV")
    bounds = np.cumsum([fractions[split] for split in wanted])[:-1]
    cuts = np.searchsorted([number[group] for group in ordered], bounds)
    for i in range(len(cuts)):                              # each split keeps one group at least
        cuts[i] = np.clip(cuts[i], (cuts[i - 1] if i else 0) + 1, len(groups) - (len(cuts) - i))
    parts = np.split(np.array(ordered, dtype=object), cuts)
    return {group: split for split, part in zip(wanted, parts, strict=True) for group in part}


def splits_from_csv(path, names, prefix=""):
    """{group: split} as the file says.  Raises UserError naming the file and the line or missing name."""
    constant, kind = f"{prefix}SPLIT_CSV", next(iter(names))
    rows = read_table(path, constant)
    key = next((column for column in names if rows and column in rows[0][1]), None)
    if key is None or "split" not in rows[0][1]:
        columns = " or ".join(f'"{column}"' for column in names)
        raise UserError(f'{constant} {path}: needs rows, a column "split" and a column {columns}'
                        + first_line(path))
    split_of_name = {}
    for line, row in rows:
        name, split = row[key], row["split"]
        if split not in SPLITS:
            raise UserError(f'{constant} {path}, line {line}: "{split}" is not one of {", ".join(SPLITS)}')
        if split_of_name.setdefault(name, split) != split:
            raise UserError(f"{constant} {path}, line {line}: {name} is already in {split_of_name[name]}")
    split_of = {}
    for group, members in names[key].items():
        absent = [name for name in members if name not in split_of_name]
        if absent:
            raise UserError(f"{constant} {path}: {key} {absent[0]} is missing")
        found = {split_of_name[name] for name in members}
        if len(found) > 1:
            raise UserError(f"{constant} {path}: {kind} {group} is in {' and '.join(sorted(found))}")
        split_of[group] = found.pop()
    return split_of


def read_table(path, constant):
    """Rows of a CSV file with a header: list of (line number, {column: text without blanks around it}).

    Line breaks and other control characters within a cell come as \\n, \\x00 and so on: no name holds them,
    and what is said of the cell stays one line.
    Raises UserError, naming ``constant``, the file and the line: no such file, two columns of one
    name, a row of another width, or a quote that does not end.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            table = [(reader.line_num, [CONTROL.sub(escaped, cell.strip()) for cell in row])
                     for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{constant} {path}: cannot be read ({error})") from error
    header = table[0][1] if table else []
    if len(set(header)) < len(header):
        raise UserError(f"{constant} {path}: two columns have the same name")
    for line, row in table[1:]:
        if len(row) != len(header):
            raise UserError(f"{constant} {path}, line {line}: {len(row)} cells under {len(header)} columns")
    return [(line, dict(zip(header, row, strict=True))) for line, row in table[1:]]


def first_line(path):
    """``; its first line is: study;mode ...``, for the message that a table lacks a column."""
    with open(path, encoding="utf-8-sig") as file:
        line = CONTROL.sub(escaped, file.readline().strip())
    return f"; its first line is: {line[:200]} (commas stand between columns)"


def escaped(match):
    """A control character as one writes it in a program."""
    return repr(match[0])[1:-1]
