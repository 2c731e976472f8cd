"""Where images lie in a folder, with their classes, masks and patients.

    entries, notes = find_series("scans")            # every NIfTI, DICOM series and folder of pictures
    rows, notes = read_classes(Path("scans"))        # and the other layouts: read_pairs, read_patients
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from datasets.io import PICTURE_SUFFIXES
from datasets.photos import SPLIT_WORDS
from datasets.slice_series import dicom_groups, files_of, left_out, natural
from datasets.volumes import safe_name
from utils.config import UserError

PAIRS = (("images", "masks"), ("data", "label"))     # folders of images and of their masks
MASK_WORDS = re.compile("mask|seg|lesion|label|annot", re.IGNORECASE)
SINGLE = 1000                                        # deeper than folders are: each picture by itself


class Entry(NamedTuple):
    """A series or picture on disk: what slice_series.read_series takes, and its path below the data."""

    path: Path
    name: str
    uid: str = ""


class Row(NamedTuple):
    """An Entry and what is known of it; empty words: nothing.  index: of one slice, None: all of them."""

    entry: Entry
    label: str = ""
    mask: Path | None = None
    patient: str = ""
    split: str = ""
    index: int | None = None
    axis: str = ""


def find_series(root, series_depth=0):
    """(list of Entry sorted by name, notes): the NIfTI files, DICOM series and pictures below a folder.

    The DICOM files of a folder are told apart by SeriesInstanceUID.  The pictures of a folder are one series;
    in folders less than ``series_depth`` below root each is by itself.  Hidden files are passed over; what is
    no image, and pictures beside DICOM files, are left out, with a note.  Pixels are not read.
    Raises UserError when there is no such folder, and BadFile for a damaged DICOM file.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    entries, others, notes = [], [], []
    for place, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(place)
        parts = folder.relative_to(root).parts
        files, below = files_of(folder), "/".join(parts) or root.resolve().name
        groups, told = dicom_groups(files["dicom"])
        notes += [f"{folder}: {note}" for note in told]
        taken = set()
        for uid, (words, _) in sorted(groups.items()):
            name = safe_name(words or uid)
            name = name if name not in taken else f"{name}_{uid}"
            taken.add(name)
            entries.append(Entry(folder, below if len(groups) == 1 else "/".join((*parts, name)), uid))
        single = len(parts) < series_depth and not groups
        entries += [Entry(file, "/".join((*parts, file.name)))
                    for file in files["nifti"] + (files["picture"] if single else [])]
        others += [file.name for file in files[""] + (files["picture"] if groups else [])]
        if files["picture"] and not (single or groups):
            entries.append(Entry(folder, below))
    return (sorted(entries, key=lambda entry: natural(entry.name)),
            [f"{root}: {note}" for note in left_out(others, "file(s) that are no images")] + notes)


def stem_of(name):
    """A file's name, or its path as text, without the suffix of an image."""
    return re.sub(r"\.(nii|nii\.gz|png|jpe?g|tiff?)$", "", name, flags=re.IGNORECASE)


def by_stem(entries):
    """{name without suffix: Entry}.  Raises UserError where two images share a name."""
    stems = {}
    for entry in entries:
        other = stems.setdefault(stem_of(entry.name), entry)
        if other is not entry:
            raise UserError(f"{entry.path} and {other.path} have one name, so their masks cannot be told "
                            "apart; rename or remove one")
    return stems


def patient_of(entry, parts):
    """The patient of an Entry whose folders, below that of its class or its images, are ``parts``.

    The first of these folders; else "sub-<label>" where the name begins so (BIDS); else of a picture the name
    before the last separator and number (p01_003.png is of p01), and of a NIfTI file or a folder its name.
    """
    if parts:
        return parts[0]
    stem = stem_of(entry.name.rsplit("/", 1)[-1])
    bids = re.match(r"sub-[A-Za-z0-9]+", stem)
    if bids:
        return bids[0]
    picture = entry.path.name.lower().endswith(PICTURE_SUFFIXES)
    return re.sub(r"(?<=.)[ _.-]+\d+$", "", stem) if picture else stem


def split_folders(data):
    """[(split, folder)]: the folders train, val, test where ``data`` has no others, else [("", data)]."""
    inside = [path for path in sorted(data.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    splits = [(SPLIT_WORDS.get(path.name.lower()), path) for path in inside]
    return splits if splits and all(split for split, _ in splits) else [("", data)]


def pair_folders(data):
    """The (folder of images, folder of masks) in ``data``, or None."""
    found = [(data / images, data / masks) for images, masks in PAIRS]
    return next((pair for pair in found if all(folder.is_dir() for folder in pair)), None)


def read_pairs(data, word):
    """(rows, notes) of folders images/ and masks/, or data/ and label/, perhaps below train/, val/, test/.

    The mask of an image has its name and place, without the suffix, or that name and _<word>.
    Raises UserError for an image without a mask.
    """
    rows, notes = [], []
    for split, folder in split_folders(data):
        pair = pair_folders(folder)
        if pair is None:
            raise UserError(f"{folder}: holds no folders images and masks, nor data and label")
        entries, told = find_series(pair[0], SINGLE)
        masks, told_too = find_series(pair[1], SINGLE)
        masks = by_stem(masks)
        for stem, entry in by_stem(entries).items():
            mask = masks.pop(stem, None) or masks.pop(f"{stem}_{word.strip('_')}", None)
            if mask is None:
                raise UserError(f"{entry.path}: has no mask in {pair[1]}; its name must be {stem}, whatever "
                                "the suffix")
            parts = entry.name.split("/")[:-1]
            rows.append(Row(entry, "", mask.path, patient_of(entry, parts), split))
        notes += told + told_too + left_out(list(masks), "mask(s) without an image")
    return rows, notes


def read_classes(data, word=""):
    """(rows, notes) of a folder per class, perhaps below train/, val/, test/.

    Pictures in the folder of a class are each by themselves, those of a folder below are one series; NIfTI
    files and DICOM series lie anywhere.  Raises UserError for a class without images.
    """
    rows, notes = [], []
    for split, folder in split_folders(data):
        entries, told = find_series(folder, 2)
        notes += told
        full = set()
        for entry in entries:
            place = entry.path if entry.path.is_dir() else entry.path.parent
            label, *inner = place.relative_to(folder).parts or ("",)
            full.add(label)
            rows.append(Row(entry, label, None, patient_of(entry, inner), split))
        empty = [path for path in sorted(folder.iterdir())
                 if path.is_dir() and not path.name.startswith(".") and path.name not in full]
        if empty:
            raise UserError(f"{empty[0]}: a class folder without images; fill it or remove it")
    return rows, notes


def read_patients(data, word):
    """(rows, notes) of a folder per patient with series and their masks, <name of the series>_<word>.

    The name is that of the NIfTI file without suffix, or of the folder of DICOM or pictures, beside which the
    mask lies.  Other masks (a series' name, "_" and a word of MASK_WORDS) are passed over.  A series without
    a mask is left out, with a note.  Raises UserError when no series has one.
    """
    if not word:
        raise UserError(f'{data}: which masks? Say what follows the "_" in their names: mask, seg, lesion')
    word = word.strip("_")
    entries, notes = find_series(data, 1)
    stems, rows, bare = by_stem(entries), [], []
    for stem, entry in stems.items():
        mask = stems.get(f"{stem}_{word}")
        if is_mask(stem, stems, word):
            continue
        if mask is None:
            bare.append(entry.name)
        else:
            rows.append(Row(entry, "", mask.path, patient_of(entry, entry.name.split("/")[:-1])))
    told = "the word behind the _ is SPINE_MASK_WORD; or name masks in a CSV, in its column mask"
    if not rows:
        raise UserError(f"{data}: no series has a mask, a file of its name and _{word} beside it; {told}")
    without = left_out(bare, f"series without a mask _{word}")
    return rows, notes + [f"{note}; {told}" for note in without]


def is_mask(stem, stems, word):
    """Whether a name is that of another series with "_" and a word for masks behind, or nothing but these."""
    *above, own = stem.split("/")
    for place in (found.start() for found in re.finditer("_", own)):
        rest = own[place + 1:]
        if "/".join([*above, own[:place]]) in stems and (rest == word or MASK_WORDS.search(rest)):
            return True
    return re.fullmatch(rf"({MASK_WORDS.pattern}|s|ed|[_.-])+", own, re.IGNORECASE) is not None
