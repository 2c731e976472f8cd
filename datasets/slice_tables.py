"""Tables that list slices with their classes, masks and patients, and the lists of RadImageNet.

    rows, notes = read_csv(Path("scans/table.csv"))
"""

import os
import re
from functools import lru_cache
from pathlib import Path

from datasets.photos import SPLIT_WORDS
from datasets.slice_lists import SINGLE, Entry, Row, find_series, patient_of, stem_of
from datasets.splits import read_table
from utils.config import UserError

COLUMNS = "path, label, mask, patient, split, index, axis, series"


def read_csv(data):
    """(rows, notes) of a CSV file; see slices.find_slices.  Raises UserError naming the line."""
    table = read_table(data, "--data")
    names = table[0][1] if table else {}
    if not {"path", "filename"} & set(names):
        raise UserError(f"--data {data}: needs rows and a column path (or filename); columns are {COLUMNS}")
    published, rows = "path" not in names, []
    base = data.parent
    if published and not os.path.exists(base / table[0][1]["filename"]):
        base = base.parent                           # the lists may lie in the folder that they name
    names_in.cache_clear()
    for line, row in table:
        where = f"--data {data}, line {line}"
        word, split = row["filename" if published else "path"], row.get("split", "").lower()
        split = split or (split_in(data.stem) if published else "")
        if not word or (split and split not in SPLIT_WORDS):
            raise UserError(f'{where}: split "{split}" is not one of train, val, test' if word
                            else f"{where}: no path; columns are {COLUMNS}")
        files = [base / text if text else None for text in (word, row.get("mask"))]
        missing = next((path for path in files if path and path.name not in names_in(path.parent)), None)
        if missing:
            raise UserError(f"{where}: {missing}: no such file")
        index = row.get("index", "")
        if index and not (index.isdecimal() and len(index) < 10):
            raise UserError(f'{where}: index "{index}" is not the number of a slice, from 0')
        entry, uid = Entry(files[0], Path(word).as_posix()), row.get("series", "")
        patient = row.get("patient") or (stem_of(entry.name) if published else "")
        entry = Entry(entry.path, f"{entry.name}/{uid}".rstrip("/"), uid)
        rows.append(Row(entry, row.get("label", ""), files[1], patient, SPLIT_WORDS.get(split, ""),
                        int(index) if index else None, row.get("axis", "")))
    return name_patients(rows, base), []


def name_patients(rows, base):
    """``rows`` with the patients that they leave open, as slice_lists.patient_of tells them.

    Of the folders below ``base`` those that all share do not count, nor those called like the row's class or
    a split.
    """
    def folders(row):
        path = row.entry.path
        parts = (path.relative_to(base) if path.is_relative_to(base) else path).parts[:-1]
        return [part for part in parts if part.lower() not in {row.label.lower(), *SPLIT_WORDS}]

    def guess(row):
        return patient_of(Entry(row.entry.path, row.entry.path.name), folders(row)[shared:])

    shared = len(os.path.commonprefix([folders(row) for row in rows if not row.patient]))
    return [row if row.patient else row._replace(patient=guess(row)) for row in rows]


def read_radimagenet(data, word=""):
    """(rows, notes) of RadImageNet as published (Mei et al. 2022, doi 10.1148/ryai.210315).

    Its lists RadiologyAI_{train,val,test}.csv, columns filename and label, in ``data`` or beside it; without
    them the folders radiology_ai/<modality>/<anatomy>/<pathology>, of ultrasound without the last, whose
    path is the class.  The names tell no patient, so each image counts as one.
    """
    lists = radimagenet_lists(data)
    if lists:
        return [row for path in lists for row in read_csv(path)[0]], []
    root = data / "radiology_ai" if (data / "radiology_ai").is_dir() else data
    entries, notes = find_series(root, SINGLE)
    rows = [Row(entry, entry.name.rpartition("/")[0], patient=stem_of(entry.name)) for entry in entries]
    return rows, [*notes, f"{root}: names tell no patient; without the published lists splits are by image"]


def radimagenet_lists(data):
    """The CSV files of a folder that are named after a split and have the columns filename and label."""
    named = [path for path in sorted(data.glob("*.csv")) if split_in(path.stem)]
    return [path for path in named if {"filename", "label"} <= set(header_of(path))]


def header_of(path):
    """The first line of a CSV file, as words."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return [word.strip() for word in file.readline().split(",")]


def split_in(stem):
    """The split that a file's name speaks of, or ""."""
    found = re.search("(?<![a-z])(train|val|test)", stem.lower())
    return found[0] if found else ""


@lru_cache(maxsize=4096)
def names_in(folder):
    """The names in a folder: asking for a million files one by one takes minutes."""
    return frozenset(path.name for path in folder.iterdir()) if os.path.isdir(folder) else frozenset()
