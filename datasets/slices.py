"""Slices of spine MRI with their classes and masks, as squares of one size, and their splits by patient.

    slices, classes, notes = find_slices("scans", mask="seg", axis="sagittal")
    splits = split_slices(slices, 0.15, 0.15)
    dataset = SliceDataset(splits["train"], 320, train=True, mask_classes=["cord"])
"""

from collections import Counter, OrderedDict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from datasets.io import PICTURE_SUFFIXES
from datasets.photos import class_counts
from datasets.samplers import check_on_bad_file, first_readable, item_generator
from datasets.slice_lists import pair_folders, read_classes, read_pairs, read_patients, split_folders
from datasets.slice_masks import read_mask
from datasets.slice_series import read_series, slices_along, spacing_along, view_of
from datasets.slice_squares import FITS, fit_box, into_box, to_unit
from datasets.slice_tables import radimagenet_lists, read_csv, read_radimagenet
from datasets.splits import SPLITS, split_groups
from utils.config import BadFile, UserError, closest

INTENSITIES = ("slice", "series")
MODALITIES = {"CT", "MR", "US"}                      # the folders of RadImageNet
FOLDERS = {"pairs": read_pairs, "classes": read_classes, "patients": read_patients,
           "radimagenet": read_radimagenet}
UNKNOWN = -1                                         # of masks and labels: never counts


class Slice(NamedTuple):
    """One slice of a series, or one picture.

    path: file, or folder of a DICOM series or of pictures; index: of the slice along ``axis``, as
    slice_series.slices_along counts; label: number of the class, -1: none; mask: path or None.  patient and
    series: names.  uid: SeriesInstanceUID; split: "train" | "val" | "test"; both "" where there is none.
    """

    path: Path
    index: int
    axis: str
    label: int
    mask: Path | None
    patient: str
    series: str
    uid: str = ""
    split: str = ""

    @property
    def case(self):
        """Its name in tables: "<series>:<index>", with the axis before the index where one was asked for."""
        return f"{self.series}:{'' if self.axis == 'stored' else self.axis + ' '}{self.index}"


def find_slices(data, layout="auto", axis="stored", mask="", classes=None, labelled=False,
                on_bad_file="stop"):
    """Slices of a folder or CSV file -> (list of Slice, class names sorted, lines to print).

    layout: "pairs", "classes", "patients" or "radimagenet", see read_<layout>; "auto" knows
    pairs and radimagenet by the names of folders, and takes others for patients where ``mask`` is given,
    else for classes.  A CSV has the columns path, and label, mask, patient, split, index, axis, series (the
    SeriesInstanceUID) as there are: files absolute or below the CSV's folder; a row without index stands for
    all slices of its series; a CSV with the columns filename and label is one of RadImageNet's lists.
    axis: one of slice_series.AXES.  mask: what follows the "_" in the names of masks.  labelled: every slice
    must have a class.  classes: the names to use (a checkpoint's); None: those found.
    patient: the column, else the folder or the name: see slice_lists.patient_of, slice_tables.name_patients.
    on_bad_file: "skip" leaves series that cannot be used out, with a note; "stop" raises BadFile.
    Raises UserError: nothing found, no or a single class, an unknown class, a split for some only.
    """
    data = Path(data)
    if not data.exists():
        raise UserError(f"{data}: no such folder or CSV file")
    if layout not in ("auto", *FOLDERS):
        raise UserError(f'layout "{layout}": must be one of auto, {", ".join(FOLDERS)}')
    if data.is_dir():
        rows, notes = FOLDERS[layout_of(data, mask) if layout == "auto" else layout](data, mask)
    else:
        rows, notes = read_csv(data)
    if not rows:
        raise UserError(f"{data}: holds no NIfTI, no DICOM series and no picture")
    bare = next((row.entry.name for row in rows if not row.split), None)
    if bare is not None and any(row.split for row in rows):
        raise UserError(f"{data}: {bare} has no split (train, val, test), but others have one")
    classes = check_classes(data, rows, classes, labelled)
    slices, told = cut(rows, classes, axis, check_on_bad_file(on_bad_file))
    if not slices:
        raise UserError(f"{data}: none of the {len(rows)} series can be used: {told[0]}")
    patients = list(dict.fromkeys(slice.patient for slice in slices))
    series = len({slice.series for slice in slices})
    return slices, classes, [*notes, *told, f"{len(slices)} slices of {series} series of {len(patients)} "
                             f"patients ({', '.join(patients[:3])}{', ...' if len(patients) > 3 else ''})"]


def layout_of(data, mask):
    """The key of FOLDERS that a folder looks like: "patients" where masks are asked for, else "classes"."""
    if any(pair_folders(folder) for _, folder in split_folders(data)):
        return "pairs"
    root = data / "radiology_ai" if (data / "radiology_ai").is_dir() else data
    inside = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if radimagenet_lists(data) or (inside and inside <= MODALITIES):
        return "radimagenet"
    return "patients" if mask else "classes"


def check_classes(data, rows, classes, labelled):
    """The class names to use: ``classes``, or those of the rows, sorted.  Raises UserError."""
    bare = next((row.entry.name for row in rows if not row.label), None)
    if labelled and bare is not None:
        raise UserError(f"{data}: {bare} has no class; put images into a folder per class, or give a CSV "
                        "with the columns path, label")
    words = sorted({row.label for row in rows} - {""})
    if labelled and classes is None and len(words) < 2:
        raise UserError(f"{data}: {words[0]} is the only class; a classifier needs two at least")
    classes = words if classes is None else list(classes)
    unknown = next((word for word in words if word not in classes), None)
    if unknown is not None:
        raise UserError(f"{data}: {unknown} is none of the {len(classes)} classes of the network"
                        f"{closest(unknown, classes)}")
    return classes


def cut(rows, classes, axis, on_bad_file):
    """(the Slices of ``rows``, notes on series that were repaired, left out, or lie differently)."""
    numbers = {word: number for number, word in enumerate(classes)} | {"": UNKNOWN}
    slices, notes, counts, views = [], [], {}, Counter()
    for row in rows:
        entry, along = row.entry, row.axis or axis
        picture = entry.path.name.lower().endswith(PICTURE_SUFFIXES)
        key = entry.path, entry.uid, along
        if picture:
            along, counts[key] = "stored", 1
        elif key not in counts:
            try:
                series = read_series(entry.path, entry.uid, pixels=False)
            except BadFile as error:
                if on_bad_file == "stop":
                    raise
                counts[key] = 0
                notes.append(f"left out: {error}")
            else:
                counts[key] = len(slices_along(series, along))
                views[view_of(series, along)] += series.placed
                notes += [f"{entry.name}: {note}" for note in series.notes]
        if counts[key] and row.index is not None and row.index >= counts[key]:
            raise UserError(f"{entry.path}: no slice {row.index}, there are 0 to {counts[key] - 1} ({along})")
        found = range(counts[key]) if row.index is None or not counts[key] else [row.index]
        slices += [Slice(entry.path, index, along, numbers[row.label], row.mask, row.patient, entry.name,
                         entry.uid, row.split) for index in found]
        if picture:
            del counts[key]                          # a million of them need not be remembered
    if len(+views) > 1:
        found = ", ".join(f"{count} {view}" for view, count in (+views).most_common())
        notes.append(f"series of several orientations: {found}; axis cuts all along one")
    return slices, notes


def split_slices(slices, val_fraction, test_fraction, csv=None):
    """Divide slices -> dict of lists "train", "val", "test"; no patient is ever in two.

    csv: a file with the columns patient and split that decides.  Else the splits that the slices come with;
    then without one for validation it is taken from training, if any.  Else by a hash of the patient, so that
    one stays where it is when others are added.
    Raises UserError: fractions or a file that make no sense, too few patients, one in two splits.
    """
    given = {}
    for slice in slices:
        if given.setdefault(slice.patient, slice.split) != slice.split and not csv:
            raise UserError(f"patient {slice.patient} is in {given[slice.patient]} and in {slice.split}; "
                            "splits must be by patient: correct the list, or its patients")
    if csv or not any(given.values()):
        split_of = by_patient(given, val_fraction, test_fraction, csv)
    elif "val" in given.values() or "train" not in given.values() or val_fraction == 0:
        split_of = given
    else:
        train = [patient for patient, split in given.items() if split == "train"]
        split_of = given | by_patient(train, val_fraction, 0.0, None)
    return {split: [slice for slice in slices if split_of[slice.patient] == split] for split in SPLITS}


def by_patient(patients, val_fraction, test_fraction, csv):
    """{patient: split}; see splits.split_groups."""
    return split_groups({"patient": {patient: [patient] for patient in patients}}, val_fraction,
                        test_fraction, csv, f"{len(patients)} patients", "SPINE_")


class SliceDataset(Dataset):
    """Slices as squares; the same item for the same (seed, epoch, index), wherever it is made.

    Item: dict of
        image      float32 [1, S, S] in [0, 1], S = size; 0 beside a letterboxed slice
        mask       int64 [S, S]: 0 background, 1.. the mask_classes, -1 unknown: beside the slice, or all
        label      int, number of the class, -1: none
        seed       int, for the augmentation of this slice; in validation the same in every epoch
        spacing    float32 [2], mm between the rows and columns of the square (a picture's pixel counts as 1)
        case       str, see Slice; series, patient: str
        bad_files  str, messages of files skipped to make this item, joined by ";"
    mask_classes: names of the values 1.. in the masks; without any no mask is read.
    fit: "letterbox" keeps the slice's shape in mm, with room around it; "squash" fills the square.  field:
    least mm across a letterboxed square, so that a small crop is not enlarged to fill it; 0: all fill it.
    intensity: the ``percentiles`` that become 0 and 1 are those of each "slice", or of the whole "series".
    cache_mb: of decoded series, the last used, that each process keeps; 0 keeps none.
    on_bad_file: "stop" raises BadFile; with "skip" the next readable slice stands in.
    Raises UserError for arguments that make no sense, and when no slice can be read.
    """

    def __init__(self, slices, size, train, seed=0, on_bad_file="stop", mask_classes=(), fit="letterbox",
                 intensity="slice", percentiles=(0.5, 99.5), cache_mb=256, field=0.0):
        check_arguments(slices, size, fit, intensity, percentiles)
        self.slices, self.size, self.train, self.seed, self.epoch = list(slices), size, train, seed, 0
        self.mask_classes, self.fit, self.field, self.intensity = list(mask_classes), fit, field, intensity
        self.percentiles, self.on_bad_file = tuple(percentiles), check_on_bad_file(on_bad_file)
        self.cache, self.room = OrderedDict(), cache_mb * 2 ** 20

    def set_epoch(self, epoch):
        """Draw this epoch's seeds from now on; before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, index):
        index = range(len(self))[index]                                    # IndexError at the end
        candidates = chain(range(index, len(self)), range(index))
        item, bad_files = first_readable(self.make, candidates, self.on_bad_file, "slices")
        return {**item, "bad_files": ";".join(bad_files)}

    def describe(self, classes):
        """{"slices", "series", "patients": numbers, "classes": {name: number}} of what is read."""
        counts = class_counts(self.slices, len(classes)).tolist()
        return {"slices": len(self.slices), "series": len({slice.series for slice in self.slices}),
                "patients": len({slice.patient for slice in self.slices}),
                "classes": dict(zip(classes, counts, strict=True))}

    def make(self, number):
        """The item of one number, without bad_files.  Raises BadFile."""
        slice = self.slices[number]
        generator = item_generator(self.seed, self.epoch if self.train else 0, number)
        series, limits, masks = self.load(slice)
        image, spacing = slices_along(series, slice.axis)[slice.index], spacing_along(series, slice.axis)[1:]
        box = fit_box(image.shape, spacing, self.size, self.fit, self.field)
        square = into_box(to_unit(image, limits or np.percentile(image, self.percentiles)), box, self.size)
        mask = torch.full((self.size, self.size), UNKNOWN)
        if masks is not None:
            turned = slices_along(masks, slice.axis)[slice.index].copy()
            top, left, height, width = box
            mask[top:top + height, left:left + width] = F.interpolate(
                torch.from_numpy(turned)[None, None], (height, width), mode="nearest-exact")[0, 0]
        extent = np.multiply(image.shape, spacing)
        return {"image": torch.from_numpy(square)[None], "mask": mask, "label": slice.label,
                "seed": int(torch.randint(2 ** 63 - 1, (), generator=generator)),
                "spacing": torch.tensor(extent / box[2:], dtype=torch.float32),
                "case": slice.case, "series": slice.series, "patient": slice.patient}

    def load(self, slice):
        """(Series, (low, high) or None, Series of the mask or None), kept for the series' next slice."""
        key = slice.path, slice.uid, slice.mask
        if key not in self.cache:
            series, masks, limits = read_series(slice.path, slice.uid), None, None
            if slice.mask is not None and self.mask_classes:
                masks = read_mask(slice.mask, series, self.mask_classes)
            if self.intensity == "series":
                limits = tuple(np.percentile(series.data, self.percentiles))
            self.cache[key] = loaded = series, limits, masks
            while self.cache and sum(series.data.nbytes for series, *_ in self.cache.values()) > self.room:
                self.cache.popitem(last=False)
            return loaded
        self.cache.move_to_end(key)
        return self.cache[key]


def check_arguments(slices, size, fit, intensity, percentiles):
    """Raise UserError for values that make no sense."""
    if not slices:
        raise UserError("a dataset of no slices: check --data and the split fractions")
    if size < 8:
        raise UserError(f"slices of {size} pixels: must be 8 at least")
    for name, word, words in (("fit", fit, FITS), ("intensity", intensity, INTENSITIES)):
        if word not in words:
            raise UserError(f'{name} "{word}": must be one of {", ".join(words)}')
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UserError(f"percentiles {list(percentiles)}: must be two, rising, from 0 to 100")
