"""Pairs of chest X-rays of one patient at two times, with the map of what changed between them."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.io import image_files, letterbox, min_max, read_image
from datasets.pair_files import bare_name
from datasets.samplers import check_on_bad_file, first_readable, item_generator
from datasets.splits import SPLITS, read_table, split_groups
from utils.config import BadFile, UserError

DIFF_NAMES = ("diff_map.nii.gz", "difference_map.nii.gz")
MEMBERS = ("prior.nii.gz", "current.nii.gz", *DIFF_NAMES)
PARTS = {"prior": "prior", "current": "current", "diff_map": "truth", "difference_map": "truth"}
LABELS = ("case", "patient", "subject")
LONGEST_NAME = 200                                   # bytes; file systems take 255, the endings included
PERCENTILES = (0.3, 99.7)                            # of a raw X-ray: what lies outside is clipped


def find_cases(root, on_bad_file="stop"):
    """Sorted case folders one or two levels below ``root``: those with any of prior, current and diff_map.

    A case needs prior.nii.gz, current.nii.gz and diff_map.nii.gz (or difference_map.nii.gz).  Hidden folders
    are left out.  Raises UserError when there is no case, and BadFile when a case is incomplete; with
    on_bad_file "skip" an incomplete case is returned, for the dataset to skip and count.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: {'a file, not a' if root.is_file() else 'no such'} folder of cases")
    folders = [path for path in sorted([*root.glob("*/"), *root.glob("*/*/")])
               if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    cases = [path for path in folders if any((path / name).is_file() for name in MEMBERS)]
    if not cases:
        raise UserError(f"{root}: no folder below it holds prior.nii.gz, current.nii.gz and diff_map.nii.gz")
    if check_on_bad_file(on_bad_file) == "stop":
        for path in (path for case in cases for path in member_paths(case)):
            if not path.is_file():
                raise BadFile(f"{path}: missing; a case holds prior, current and diff_map")
    return cases


def member_paths(case):
    """(prior, current, difference map) of a case, under whichever of its two names the map has."""
    diff = next((case / name for name in DIFF_NAMES if (case / name).is_file()), case / DIFF_NAMES[0])
    return case / "prior.nii.gz", case / "current.nii.gz", diff


def patient_of(case, root):
    """The patient: the first-level folder's name up to its first "_".

    Where that is a mere label, as in case_001 or patient_12_followup, the number belongs to it: "case_001",
    "patient_12".
    """
    parts = Path(case).relative_to(root).parts[0].split("_")
    return "_".join(parts[:2]) if parts[0].lower() in LABELS else parts[0]


def split_cases(cases, root, val_fraction, test_fraction, csv=None):
    """Divide cases by patient -> dict of lists "train", "val", "test"; no patient is ever in two.

    Each patient has a fixed number in [0, 1), a hash of the name: below test_fraction it is in test, below
    test_fraction + val_fraction in val, else in train.  So a patient stays where it is when others are added.
    Only where that leaves a wanted split empty (few patients) does the patient with the nearest number move.
    csv: path of a file that decides instead; columns "split" and "patient" or "case" (folder below root).
    Raises UserError when fractions or the file make no sense, or patients are fewer than splits wanted.
    """
    by_patient = {}
    for case in cases:
        by_patient.setdefault(patient_of(case, root), []).append(case)
    names = {"patient": {patient: [patient] for patient in by_patient},
             "case": {patient: [Path(case).relative_to(root).as_posix() for case in members]
                      for patient, members in by_patient.items()}}
    split_of = split_groups(names, val_fraction, test_fraction, csv, f"{root}: {len(by_patient)} patient(s)")
    splits = {split: [] for split in SPLITS}
    for patient, members in by_patient.items():
        splits[split_of[patient]] += members
    return splits


def find_pairs(data, split, val_fraction, test_fraction, csv=None):
    """[(case, {"prior" | "current" | "truth": [paths]})] of the case folders below ``data``, to be judged.

    A case folder holds prior.*, current.* and, if it is known, diff_map.*, images of any kind; one that lacks
    a part is there too.  split: "train", "val", "test" as split_cases divides them, or "all".
    Raises UserError when there is none.
    """
    folders = {}
    for path in image_files(data):
        if (part := PARTS.get(path.name.split(".")[0])) and path.parent != Path(data):
            folders.setdefault(path.parent, {}).setdefault(part, []).append(path)
    if not folders:
        raise UserError(f"{data}: no case folder below it; such a folder holds prior.* and current.* (NIfTI, "
                        "PNG, JPEG, TIFF or DICOM); for files of other names give --pairs CSV")
    if split != "all":
        kept = split_cases(list(folders), data, val_fraction, test_fraction, csv)[split]
        folders = {folder: folders[folder] for folder in kept}
    if not folders:
        raise UserError(f"{data}: no case is in the split {split}")
    return [("__".join(path.relative_to(data).parts), folders[path]) for path in sorted(folders)]


def read_pairs(csv_path):
    """[(case, {"prior": [path], "current": [path]})] of a CSV with these columns; paths are relative to it.

    The column case names the case; where it is missing or empty, pair_name does.  Whether the files are there
    is not looked at.  Raises UserError: no rows, a missing column, an empty cell, two rows of one name.
    """
    rows, cases = read_table(csv_path, "--pairs"), {}
    if not rows or not {"prior", "current"} <= rows[0][1].keys():
        found = f"columns {', '.join(rows[0][1])}" if rows else "no row below its first line"
        raise UserError(f"--pairs {csv_path}: has {found}; needs rows with the columns prior and current")
    for line, row in rows:
        where = f"--pairs {csv_path}, line {line}"
        if not (row["prior"] and row["current"]):
            raise UserError(f"{where}: prior and current must both name a file")
        prior, current = (Path(csv_path).parent / row[part] for part in ("prior", "current"))
        name = safe_name(row["case"]) if row.get("case") else pair_name(prior, current)
        if name in cases:
            raise UserError(f"{where}: a second case {name}; give them different names in a column case")
        cases[name] = {"prior": [prior], "current": [current]}
    return list(cases.items())


def pair_name(prior, current):
    """<folder>_<prior>_to_<current>: the folder that holds both, and where below it each image lies."""
    paths = [Path(os.path.abspath(path)) for path in (prior, current)]
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    before, after = ("-".join([*path.relative_to(folder).parts[:-1], bare_name(path)]) for path in paths)
    return safe_name(f"{folder.name}_{before}_to_{after}")


def safe_name(name):
    """A name that every file system takes: letters, digits and _.+- only, and not too long."""
    name = re.sub(r"[^\w.+-]", "-", name).lstrip("._") or "unknown"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]     # names that begin alike stay apart
    return f"{name.encode()[:LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def normalise(image, path):
    """What the network sees of an image [H, W] that was read from ``path``: float32 [H, W] in [0, 1].

    A NIfTI file, by its name, is taken as prepared: its least value becomes 0, its greatest 1.  Any other
    kind is a raw X-ray, see normalise_raw.  A constant image becomes zeros.
    """
    prepared = Path(path).name.lower().endswith((".nii", ".nii.gz"))
    return min_max(image) if prepared else normalise_raw(image)


def normalise_raw(image):
    """A raw X-ray [H, W] -> float32 [H, W] in [0, 1], clipped to its PERCENTILES.

    A burnt-in letter is far brighter than any bone: unclipped it would leave the rest dark.
    """
    low, high = np.percentile(image, PERCENTILES)
    return min_max(np.clip(image, low, high))


def read_case(case, size):
    """(prior, current, diff) of a case folder, float32 [1, size, size].

    prior and current are normalised to [0, 1], see ``normalise``, then resized.  diff, in [-1, 1], is in
    units of the normalised images and never rescaled: for images stored from exactly 0 to 1 nothing changes,
    and stored units are kept.  Pictures that are not square are padded with zeros.
    Raises BadFile when a file cannot be used, sizes differ, or diff leaves [-1, 1].
    """
    paths = member_paths(Path(case))
    prior, current, diff = read_image(paths[0]), read_image(paths[1]), read_map(paths[2])
    for path, image in zip(paths, (prior, current, diff), strict=True):
        if image.shape != current.shape:
            raise BadFile(f"{path}: {image.shape[0]}x{image.shape[1]} pixels, but the current image has "
                          f"{current.shape[0]}x{current.shape[1]}")
    images = normalise(prior, paths[0]), normalise(current, paths[1]), diff
    return tuple(torch.from_numpy(letterbox(image, size)[0])[None] for image in images)


def read_map(path):
    """The known difference of a case, float32 [H, W] within [-1, 1].  Raises BadFile where it is not."""
    diff = read_image(path)
    if np.abs(diff).max() > 1 + 1e-4:
        raise BadFile(f"{path}: values from {diff.min():g} to {diff.max():g}, not within [-1, 1]")
    return diff.clip(-1, 1)


class LongitudinalMIMDataset(Dataset):
    """Pairs with their difference map; the same item for the same (seed, epoch, index), wherever it is made.

    Item: dict of
        prior, current  float32 [1, size, size] in [0, 1]
        diff            float32 [1, size, size] in [-1, 1], in the frame of current
        mask            bool [2, size, size], True = hidden, of prior and current; only with ``mask``
        case            str, the case folder
        bad_files       str, messages of files skipped to make this item, joined by ";" (normally empty)
    cases: folders as find_cases gives them.  augment: (prior, current, diff, generator) -> the same three;
    None for validation.  mask: a masking.PatchMask, or None.
    on_bad_file: "stop" raises BadFile; with "skip" the next readable case stands in.
    Raises UserError when every case is unreadable.
    """

    def __init__(self, cases, size, augment=None, mask=None, seed=0, on_bad_file="stop"):
        if not cases:
            raise UserError("a dataset of no cases: check --data and the splits")
        self.cases = [Path(case) for case in cases]
        self.size, self.augment, self.mask, self.seed = size, augment, mask, seed
        self.on_bad_file = check_on_bad_file(on_bad_file)
        self.epoch, self.mask_probability = 0, 0.0

    def set_epoch(self, epoch, mask_probability=0.0):
        """Draw this epoch's augmentations and masks from now on; before the loader starts its workers."""
        self.epoch, self.mask_probability = epoch, mask_probability

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, index):
        index = range(len(self))[index]                                    # IndexError at the end
        (case, images), bad_files = first_readable(
            lambda case: (case, read_case(case, self.size)), self.cases[index:] + self.cases[:index],
            self.on_bad_file, "cases")
        generator = item_generator(self.seed, self.epoch, index)
        if self.augment is not None:
            images = self.augment(*images, generator)
        item = dict(zip(("prior", "current", "diff"), images, strict=True))
        if self.mask is not None:
            item["mask"] = self.mask(self.size, self.size, self.mask_probability, generator)
        return {**item, "case": str(case), "bad_files": ";".join(bad_files)}
