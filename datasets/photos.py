"""Photographs with their classes, from folders or a CSV file, as squares of one size."""

import os
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from datasets.photo_augment import CROP
from datasets.photo_files import PHOTO_SUFFIXES, SPECTRAL_SUFFIXES, read_photo, read_spectral
from datasets.samplers import check_on_bad_file, first_readable, item_generator
from datasets.splits import read_table
from utils.config import BadFile, UserError, closest

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}
SPECTRAL = "_spectral"                               # leaf.jpg has its cube in leaf_spectral.tif or .npy
FITS = ("crop", "squash")


@dataclass(frozen=True)
class Photo:
    """One photograph.

    path; name: the path below the data, with "/"; label: place in the list of classes, -1: none; group: what
    must stay in one split, "": not known yet; split: "train" | "val" | "test", "": not given; spectral: path
    of its cube, or None.
    """

    path: Path
    name: str
    label: int = -1
    group: str = ""
    split: str = ""
    spectral: Path | None = None


def find_photos(data, labelled, classes=None):
    """Photographs of a folder or CSV file -> (list of Photo sorted by name, class names, lines to print).

    Folder: the class is the folder that a photograph lies in, and a folder train, val (valid, validation) or
    test above it is the split; so <class>/*, train/<class>/*, and original/<class>/* beside
    augmented/<class>/* are all read.  Photographs directly in ``data`` or in train, val, test have no class.
    Hidden files are passed over; others that are no photographs are left out, and counted in the lines.
    <name>_spectral.npy or .tif beside a photograph is its cube.
    CSV: columns path (absolute, or below the CSV's folder), and label, group, split, spectral as there are.
    labelled: every photograph must have a class, and every folder a photograph.  classes: the names to use
    (a checkpoint's); None: those found, sorted.
    Raises UserError: nothing found, no or a single class, an empty class folder, an unknown class, a split
    for some only, a missing file; it names which.
    """
    data = Path(data)
    if data.suffix.lower() == ".csv":
        found, notes = read_photo_table(data), []
    else:
        found, notes = search_folder(data, labelled)
    if not found:
        raise UserError(f"{data}: holds no photograph ({', '.join(PHOTO_SUFFIXES)})")
    bare = next((photo for photo, word in found if not word), None)
    if labelled and bare is not None:
        raise UserError(f"{data}: {bare.name} has no class; put photographs into a folder per class, or give "
                        "a CSV with the columns path, label")
    if len({bool(photo.split) for photo, _ in found}) > 1:
        bare = next(photo for photo, _ in found if not photo.split)
        raise UserError(f"{data}: {bare.name} has no split (train, val, test), but others have one")
    words = sorted({word for _, word in found} - {""})
    if labelled and classes is None and len(words) < 2:
        raise UserError(f"{data}: {words[0]} is the only class; a classifier needs two at least")
    classes = words if classes is None else list(classes)
    unknown = [word for word in words if word not in classes]
    if unknown:
        raise UserError(f"{data}: {unknown[0]} is none of the {len(classes)} classes of the network"
                        f"{closest(unknown[0], classes)}")
    label = {word: number for number, word in enumerate(classes)} | {"": -1}
    photos = [Photo(photo.path, photo.name, label[word], photo.group, photo.split, photo.spectral)
              for photo, word in sorted(found, key=lambda pair: pair[0].name)]
    return photos, classes, notes


def search_folder(data, labelled):
    """([(Photo, its class or "")], notes) of a folder; see find_photos."""
    if not data.is_dir():
        raise UserError(f"{data}: no such folder, nor a CSV file")
    inside = [path for path in sorted(data.rglob("*"))
              if not any(part.startswith(".") for part in path.relative_to(data).parts)]
    files = {path for path in inside if path.is_file()}
    pictures = [path for path in sorted(files) if path.suffix.lower() in PHOTO_SUFFIXES
                and not path.stem.endswith(SPECTRAL)]
    if labelled:
        check_folders(inside, pictures)
    found, used = [], set(pictures)
    for path in pictures:
        cubes = [path.with_name(f"{path.stem}{SPECTRAL}{suffix}") for suffix in SPECTRAL_SUFFIXES]
        cube = next((cube for cube in cubes if cube in files), None)
        used.add(cube)
        *above, folder = ("", *path.relative_to(data).parts[:-1])
        words = [SPLIT_WORDS[part.lower()] for part in above if part.lower() in SPLIT_WORDS]
        if not words and folder.lower() in SPLIT_WORDS:      # train/leaf.jpg: a split, not a class
            words, folder = [SPLIT_WORDS[folder.lower()]], ""
        split = words[0] if words else ""
        found.append((Photo(path, path.relative_to(data).as_posix(), split=split, spectral=cube), folder))
    others = sorted(path.name for path in files - used)
    notes = [f"{data}: {len(others)} files are no photographs and were left out: {', '.join(others[:3])}"
             f"{', ...' if len(others) > 3 else ''}"] if others else []
    return found, notes


def check_folders(inside, pictures):
    """UserError when a folder holds neither photographs nor folders: a class without examples."""
    full = {folder for path in pictures for folder in path.parents}
    for path in inside:
        if path.is_dir() and path not in full:
            raise UserError(f"{path}: a class folder without photographs; fill it or remove it")


def read_photo_table(path):
    """[(Photo, its class or "")] of a CSV file; see find_photos.  Raises UserError naming the line."""
    found, lines = [], {}
    for line, row in read_table(path, "--data"):
        if not row.get("path"):
            raise UserError(f"--data {path}, line {line}: no path; columns are path, label, group, split, "
                            "spectral")
        split = row.get("split", "").lower()
        if split and split not in SPLIT_WORDS:
            raise UserError(f'--data {path}, line {line}: split "{split}" is not one of train, val, test')
        files = {key: path.parent / row[key] for key in ("path", "spectral") if row.get(key)}
        missing = [file for file in files.values() if not os.path.isfile(file)]    # or too long a name
        if missing:
            raise UserError(f"--data {path}, line {line}: {missing[0]}: no such file")
        name = Path(row["path"]).as_posix()
        if lines.setdefault(name, line) != line:
            raise UserError(f"--data {path}, line {line}: {name} stands in line {lines[name]} already")
        found.append((Photo(files["path"], name, group=row.get("group", ""), split=SPLIT_WORDS.get(split, ""),
                            spectral=files.get("spectral")), row.get("label", "")))
    return found


def class_counts(photos, num_classes):
    """int64 [num_classes]: photographs of each class; those without a class are not counted."""
    labels = torch.tensor([photo.label for photo in photos if photo.label >= 0], dtype=torch.int64)
    return torch.bincount(labels, minlength=num_classes)


def sample_weights(photos):
    """float64 [len(photos)] for WeightedRandomSampler: n / (C x count of its class), C classes that occur.

    Their mean is 1, and drawn by them every class comes equally often.  ValueError for one without a class.
    """
    counts = Counter(photo.label for photo in photos)
    if -1 in counts:
        raise ValueError("a photograph without a class has no weight")
    return torch.tensor([len(photos) / (len(counts) * counts[photo.label]) for photo in photos],
                        dtype=torch.float64)


def store_size(size):
    """Pixels per side that are read for crops of ``size``: photo_augment.CROP of them is ``size`` again."""
    return round(size / CROP)


class PhotoDataset(Dataset):
    """Photographs as squares; the same item for the same (seed, epoch, index), wherever it is made.

    Item: dict of
        image      uint8 [3, S, S], S = store_size(size): room for the crop of PhotoAugment and its like
        label      int, -1: none
        seed       int, for the augmentation of this image in this epoch
        spectral   float32 [K, S, S], the same part of its cube; only with spectral_channels = K > 0
        case       str, Photo.name; bad_files: str, messages of files skipped to make this item, joined by ";"
    fit: "crop" resizes the short side to S and takes a square, in training at random along the long side, in
    validation in the middle: shapes stay true, and no crop holds padding.  "squash" resizes both sides to S,
    so that all of a long leaf is seen, narrower than it is.
    cache_rate: share of the photographs, the first ones, kept in memory resized; forked workers share them.
    on_bad_file: "stop" raises BadFile; with "skip" the next readable photograph stands in.
    A cube shows what its upright photograph shows, with as many pixels as it likes.
    Raises UserError for arguments that make no sense, and when no photograph can be read.
    """

    def __init__(self, photos, size, train, seed=0, on_bad_file="stop", spectral_channels=0, fit="crop",
                 cache_rate=0.0):
        check_arguments(photos, size, spectral_channels, fit, cache_rate)
        self.photos, self.train, self.seed, self.epoch = list(photos), train, seed, 0
        self.side, self.fit, self.channels = store_size(size), fit, spectral_channels
        self.on_bad_file = check_on_bad_file(on_bad_file)
        self.kept = {}
        count = round(cache_rate * len(self.photos))
        for number in tqdm(range(count), desc="photographs", unit="file", disable=not count):
            try:
                self.kept[number] = self.load(number)
            except BadFile:
                if on_bad_file == "stop":
                    raise                            # else its item names it

    def set_epoch(self, epoch):
        """Draw this epoch's squares and seeds from now on; before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        index = range(len(self))[index]                                    # IndexError at the end
        candidates = chain(range(index, len(self)), range(index))
        item, bad_files = first_readable(self.make, candidates, self.on_bad_file, "photographs")
        return {**item, "bad_files": ";".join(bad_files)}

    def describe(self, classes):
        """{"photographs", "groups": numbers, "classes": {name: number}} of what the items are taken from."""
        counts = class_counts(self.photos, len(classes)).tolist()
        return {"photographs": len(self.photos), "groups": len({photo.group for photo in self.photos} - {""}),
                "classes": dict(zip(classes, counts, strict=True))}

    def make(self, number):
        """The item of one number, without bad_files.  Raises BadFile."""
        generator = item_generator(self.seed, self.epoch, number)
        images = self.kept[number] if number in self.kept else self.load(number)
        place = float(torch.rand((), generator=generator)) if self.train else 0.5     # [0, 1)
        top, left = (int(place * (side - self.side + 1)) for side in images["image"].shape[1:])
        square = {key: image[:, top:top + self.side, left:left + self.side].contiguous()
                  for key, image in images.items()}
        return {**square, "label": self.photos[number].label, "case": self.photos[number].name,
                "seed": int(torch.randint(2 ** 63 - 1, (), generator=generator))}

    def load(self, number):
        """{"image", "spectral"} of one photograph, resized, the long side whole.  Raises BadFile."""
        photo = self.photos[number]
        image = read_photo(photo.path, self.side)
        short = min(image.shape[1:])
        size = [self.side if self.fit == "squash" else max(self.side, round(side * self.side / short))
                for side in image.shape[1:]]
        images = {"image": image}
        if self.channels:
            images["spectral"] = read_spectral(photo.spectral, self.channels)
        return {key: F.resize(image, size, antialias=True) for key, image in images.items()}


def check_arguments(photos, size, spectral_channels, fit, cache_rate):
    """Raise UserError for values that make no sense."""
    if not photos:
        raise UserError("a dataset of no photographs: check --data and the split fractions")
    if size < 8:
        raise UserError(f"photographs of {size} pixels: must be 8 at least")
    if fit not in FITS:
        raise UserError(f'HVIT_FIT = "{fit}": must be one of {", ".join(FITS)}')
    if not 0 <= cache_rate <= 1:
        raise UserError(f"HVIT_CACHE_RATE = {cache_rate}: must be between 0 and 1")
    bare = next((photo.name for photo in photos if photo.spectral is None), None)
    if spectral_channels and bare is not None:
        raise UserError(f"HVIT_SPECTRAL_CHANNELS = {spectral_channels}, but {bare} has no spectral file "
                        f"(<name>{SPECTRAL}.npy or .tif beside it, or the CSV's column spectral)")
