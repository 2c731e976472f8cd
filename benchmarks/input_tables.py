"""Every reader of CSV tables, and beside it what Python's csv says that stands in the table, to compare.

Each function takes a path and returns {name: value}.  Where ours returns at all, both must agree.
"""

import csv
import io
from pathlib import Path

import numpy as np

from datasets.em_sources import read_volumes
from datasets.labels import read_labels
from datasets.pair_files import read_patients
from datasets.photos import find_photos
from datasets.slices import find_slices
from datasets.splits import splits_from_csv
from datasets.study_modes import read_modes

NAMES = [f"p{number:02d}" for number in range(10)]


def rows(path):
    """[{column: cell}] as Python's csv reads them, blanks cut off, empty rows left out.

    Control characters are written as in a program.
    """
    def clean(cell):
        return "".join(repr(letter)[1:-1] if letter < " " or letter == "\x7f" else letter
                       for letter in cell.strip())

    text = path.read_bytes().decode("utf-8-sig")
    header, *table = ([clean(cell) for cell in row]
                      for row in csv.reader(io.StringIO(text, newline="")) if any(row))
    return [dict(zip(header, row, strict=True)) for row in table]


def splits(path):
    return splits_from_csv(path, {"patient": {name: [name] for name in NAMES}})


def splits_peer(path):
    said = {row["patient"]: row["split"] for row in rows(path)}
    return {name: said[name] for name in NAMES}


def labels(path):
    """The values, as the text of the cells that they come from."""
    loss = path.stem
    found = read_labels(path, loss)
    return {study: [None if np.isnan(x) else found.names[int(x)] if loss == "ce" else float(np.float32(x))
                    for x in value.tolist()] for study, value in found.values.items()}


def labels_peer(path):
    number = {"ce": str}.get(path.stem, lambda cell: float(np.float32(cell)))
    return {study: [None if cell.lower() in ("", "nan", "na") else number(cell) for cell in cells]
            for study, *cells in ([row.pop("study_id", None) or row.pop("study"), *row.values()]
                                  for row in rows(path))}


def modes(path):
    return read_modes(path, set(NAMES))


def modes_peer(path):
    return {row["study"]: row["mode"] for row in rows(path)}


def photos(path):
    found, classes, _ = find_photos(path, labelled=False)
    return {each.name: (classes[each.label] if each.label >= 0 else "", each.group, each.split)
            for each in found}


def photos_peer(path):
    def split(word):
        return {"training": "train", "valid": "val", "validation": "val", "testing": "test"}.get(word, word)

    return {Path(row["path"]).as_posix(): (row.get("label", ""), row.get("group", ""),
                                           split(row.get("split", "").lower())) for row in rows(path)}


def slices(path):
    found, classes, _ = find_slices(path)
    return {"slices": sorted((each.path.name, each.index, classes[each.label] if each.label >= 0 else "",
                              each.patient) for each in found)}


def slices_peer(path):
    """A row without an index stands for all six slices, cut as they are stored."""
    def patient(row):
        return row.get("patient") or Path(row["path"]).stem.rpartition("_")[0] or Path(row["path"]).stem

    def indices(row):
        if row.get("index"):
            return [int(row["index"])]
        return range(6) if row["path"].endswith(".nii") else [0]

    return {"slices": sorted((Path(row["path"]).name, index, row.get("label", ""), patient(row))
                             for row in rows(path) for index in indices(row))}


def patients(path):
    return {str(file): patient for file, patient in read_patients(path, path.parent).items()}


def patients_peer(path):
    return {str((path.parent / row["path"]).resolve()): row["patient"] for row in rows(path)}


def volumes(path):
    return {f"{n} {each.name}": (each.split, each.sections, tuple(each.labels)) for n, each in
            enumerate(read_volumes(path))}


def volumes_peer(path):
    def sections(row):
        return tuple(map(int, (row.get("sections") or "0:6").split(":")))

    return {f"{n} {row['volume']}": (row.get("split", ""), sections(row), ("neuron",))
            for n, row in enumerate(rows(path))}
