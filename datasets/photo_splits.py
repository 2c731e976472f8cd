"""Which photographs belong together, and training, validation and test parts that never divide them.

    photos, notes = group_photos(photos)             # copies, crops and mirror images share a group
    splits = split_photos(photos, classes, 0.15, 0.15, seed=0)
    write_splits("runs/a/splits.csv", splits, classes)
"""

import csv
import hashlib
import os
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from datasets.pair_files import CRASHED, run_jobs
from datasets.photo_files import read_photo
from datasets.photos import class_counts
from datasets.samplers import check_on_bad_file
from datasets.splits import SPLITS, read_table, splits_from_csv
from utils.config import BadFile, UserError

THUMB = 100                                          # pixels per side of what is hashed
WINDOW = 92                                          # of a crop that must still be known
WINDOWS = [(0, THUMB), *((first, first + WINDOW) for first in (0, (THUMB - WINDOW) // 2, THUMB - WINDOW))]
BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)
ROWS = 64                                            # compared at once, so that they stay in the cache
CHANGES = ("augmented|augment|aug|copy|hflip|vflip|flipped|flip|mirrored|mirror|rotation|rotated|rotate|rot|"
           "cropped|crop|zoomed|zoom|shifted|shift|sheared|shear|scaled|scale|brightness|bright|darker|dark|"
           "contrast|saturation|hue|gamma|colou?r|jitter|blurred|blur|noisy|noise|sharpened|sharp|elastic|"
           "cutout|pixel|new|deg|lr|ud|tb|h|v")
SUFFIX = re.compile(rf"(?<=.)[ _.-]+\d*(?:{CHANGES})(?:{CHANGES}|\d)*([ _.-]+\d+)?$")


def name_group(stem):
    """The name of the original of a file name without suffix: in lower case, without words for changes.

    Words of CHANGES and numbers beside them are cut from the end, after a blank, "_", "-" or ".", again and
    again: leaf_(12)_aug3, leaf_(12)_flip_rot90 and Leaf_(12) are leaf_(12).  A number is cut only if
    another one remains, since it may be what tells originals apart: leaf_crop_12 is itself.
    """
    stem = stem.lower()
    while (found := SUFFIX.search(stem)) is not None:
        rest = stem[:found.start()]
        if re.search(r"\d", found[0]) and not re.search(r"\d", rest):
            break
        stem = rest
    return stem


def perceptual_hashes(image):
    """What a picture looks like in 64 bits: (of itself and 9 crops, uint64 [10]; of 8 positions, uint64 [8]).

    image: uint8 [3, H, W].  A hash holds the signs of the first 8 x 8 coefficients of the cosine transform of
    the luminance, squeezed to a square (Zauner 2010, "Implementation and benchmarking of perceptual image
    hash functions", with signs instead of a median, so that mirroring only turns bits over).  The crops are
    windows of 92 % of both sides at the corners, edges and centre; the positions are the picture turned by
    quarters and mirrored.  Bits that differ between a hash of either kind: about 32 for unrelated pictures.
    """
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    thumb = F.resize(image, [THUMB, THUMB], antialias=True)
    thumb = (thumb.double() * luminance).sum(0).numpy()
    rows = [cosines(*window) for window in WINDOWS]
    pairs = [(0, 0), *((y, x) for y in (1, 2, 3) for x in (1, 2, 3))]
    crops = np.stack([rows[y] @ thumb @ rows[x].T for y, x in pairs])                        # [10, 8, 8]
    odd = (-1.0) ** np.arange(8)                     # a mirror turns the odd cosines over
    signs = [np.outer(y, x) for y in (odd ** 2, odd) for x in (odd ** 2, odd)]
    turned = np.stack([side * sign for side in (crops[0], crops[0].T) for sign in signs])    # [8, 8, 8]
    return pack(crops), pack(turned)


def cosines(first, end):
    """float64 [8, THUMB]: the first 8 cosines over the samples first .. end - 1, zero elsewhere."""
    waves = np.zeros((8, THUMB))
    place = (np.arange(end - first) + 0.5) / (end - first)
    waves[:, first:end] = np.cos(np.pi * np.arange(8)[:, None] * place)
    return waves


def pack(coefficients):
    """Signs of coefficients [n, 8, 8] -> uint64 [n]; the bit of the mean, which is always positive, is 0."""
    positive = (coefficients > 0).reshape(-1, 64)
    positive[:, 0] = False
    return (positive * BITS).sum(1, dtype=np.uint64)


def close_pairs(crops, turned, distance):
    """Pairs (i, j), int64 [n, 2]: a hash crops[i] and one of turned[j] differ in ``distance`` bits at most.

    crops: uint64 [N, A], turned: uint64 [N, B], as perceptual_hashes gives them.  i is not j; both (i, j) and
    (j, i) may be there.  10,000 photographs take less than a minute.
    """
    found = [np.empty((0, 2), np.int64)]
    for first in range(0, len(crops), ROWS):
        near = np.zeros((len(crops[first:first + ROWS]), len(turned)), bool)
        for crop in crops[first:first + ROWS].T:
            for turn in turned.T:
                near |= np.bitwise_count(crop[:, None] ^ turn) <= distance
        near[np.arange(len(near)), first + np.arange(len(near))] = False
        found.append(np.argwhere(near) + [first, 0])
    return np.concatenate(found)


def hash_photo(job):
    """(number, perceptual_hashes or None, why the file is bad or None) of a job (number, path)."""
    number, path = job
    try:
        return number, perceptual_hashes(read_photo(path, THUMB)), None
    except BadFile as error:
        return number, None, str(error)


def group_photos(photos, distance=8, workers=0, on_bad_file="stop"):
    """Give photographs that show the same their group -> (list of Photo, lines to print).

    In one group are photographs (1) of one group of a CSV, (2) without such, of one class, one given split
    and one name_group, (3) whose hashes differ in ``distance`` of 63 bits at most, and whatever these join.
    distance: of 560 sugarcane leaves 8 joins 97 % with copies cropped to 90 % of the sides, all with copies
    mirrored, turned, shrunk, made darker or lighter or compressed again, and 3 of 156,520 pairs of different
    leaves.  Among tens of thousands of photographs such pairs would form chains: take 6, which misses one
    crop in six.  -1: names alone; no file is opened.
    A group is called after its first photograph.  on_bad_file: "stop" raises BadFile for a file that cannot
    be read; "skip" groups it by its name.
    """
    number = {}
    keys = [("group", photo.group) if photo.group else (photo.label, photo.split, name_group(photo.path.stem))
            for photo in photos]
    named = np.array([number.setdefault(key, place) for place, key in enumerate(keys)])
    pairs = np.stack([np.arange(len(photos)), named], 1)
    if distance >= 0:
        pairs = np.concatenate([pairs, similar(photos, distance, workers, check_on_bad_file(on_bad_file))])
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(photos),) * 2)
    _, members = connected_components(graph, directed=False)
    names = {}
    photos = [replace(photo, group=names.setdefault(member, photo.name))
              for photo, member in zip(photos, members, strict=True)]
    sizes = Counter(photo.group for photo in photos)
    largest = max(sizes, key=sizes.get)
    return photos, [f"{len(photos)} photographs in {len(sizes)} groups; the largest has {sizes[largest]} "
                    f"({largest})"]


def similar(photos, distance, workers, on_bad_file):
    """close_pairs of photographs, read by so many processes; see group_photos."""
    jobs = [(number, photo.path) for number, photo in enumerate(photos)]
    hashes = {}
    done = run_jobs(hash_photo, jobs, workers, lambda job: (job[0], None, f"{job[1]}: {CRASHED}"))
    for number, pair, reason in tqdm(done, total=len(jobs), desc="hashes", unit="file"):
        if reason and on_bad_file == "stop":
            raise BadFile(reason)
        if not reason:
            hashes[number] = pair
    if not hashes:
        raise UserError(f"none of the {len(photos)} photographs can be read")
    places = np.array(sorted(hashes))
    crops, turned = (np.stack(part) for part in zip(*(hashes[place] for place in places), strict=True))
    return places[close_pairs(crops, turned, distance)]


def split_photos(photos, classes, val_fraction, test_fraction, seed=0, path=None):
    """Divide grouped photographs -> {"train", "val", "test": lists of Photo}.

    path: a CSV with the columns path and split that decides (write_splits makes one).  Else the splits that
    the photographs come with; then without one for validation it is taken from training.  Else by groups,
    stratified, see ``deal``: the same for the same (seed, groups).
    Raises UserError: fractions or a file that make no sense, too few groups, a class that is not in training.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f"HVIT_VAL_FRACTION {val_fraction}, HVIT_TEST_FRACTION {test_fraction}: neither may "
                        "be negative, and their sum must be below 1")
    fractions = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    if path:
        split_of = splits_from_csv(path, {"path": {photo.name: [photo.name] for photo in photos}}, "HVIT_")
    elif any(photo.split for photo in photos):
        split_of = {photo.name: photo.split for photo in photos}
        if "val" not in split_of.values() and val_fraction > 0:
            inside = [photo for photo in photos if photo.split == "train"]
            fractions = {"train": 1 - val_fraction, "val": val_fraction, "test": 0.0}
            split_of |= deal(inside, fractions, seed)
    else:
        split_of = deal(photos, fractions, seed)
    splits = {split: [photo for photo in photos if split_of[photo.name] == split] for split in SPLITS}
    for split in ("train", *(("val",) if val_fraction > 0 else ())):
        if not splits[split]:
            raise UserError(f"no photograph is left for {split}: {len({photo.group for photo in photos})} "
                            "groups; add some, or change HVIT_VAL_FRACTION, HVIT_TEST_FRACTION")
    check_classes(splits, classes)
    return splits


def check_classes(splits, classes):
    """UserError naming a class that is validated or tested, but not trained."""
    counts = {split: class_counts(photos, len(classes)).tolist() for split, photos in splits.items()}
    for label, word in enumerate(classes):
        where = [split for split in SPLITS if counts[split][label]]
        if where and where[0] != "train":
            raise UserError(f"class {word} is in {' and '.join(where)} only, so it cannot be learned: move "
                            "photographs of it to train, add some, or leave the class out")


def settle_splits(path, photos, classes, earlier, hashing, val_fraction, test_fraction, seed):
    """Write the splits of a run to ``path`` -> lines to print.

    earlier: files whose splits the run keeps, of which the first that is there counts, and a CSV, "" or a
    name, that decides where none is; hashing: arguments of ``group_photos``; the others: of ``split_photos``.
    """
    *earlier, csv = earlier
    chosen, notes = next((each for each in earlier if each.is_file()), csv or None), []
    if chosen not in earlier:
        photos, notes = group_photos(photos, *hashing)
    splits = split_photos(photos, classes, val_fraction, test_fraction, seed, chosen)
    divided = divided_groups(splits)
    if divided:
        notes.append(f"{len(divided)} groups of copies are in more than one split, such as {divided[0]}: "
                     "figures will look better than they are")
    if chosen != path:
        write_splits(path, splits, classes)
    return notes


def deal(photos, fractions, seed):
    """{name: split} by whole groups, so that each class comes as near to the fractions as its groups allow.

    Groups are dealt from the largest to the smallest, equals in an order drawn by the seed; each goes where
    its classes lack most, in shares of the class (a greedy way, as Sechidis et al. 2011, "On the
    stratification of multi-label data"; unlike scikit-learn's StratifiedGroupKFold it takes any fractions).
    """
    members = {}
    for photo in photos:
        members.setdefault(photo.group, []).append(photo)
    total = Counter(photo.label for photo in photos)
    lacks = {split: {label: fraction * count for label, count in total.items()}
             for split, fraction in fractions.items() if fraction > 0}
    split_of = {}
    for group in sorted(members, key=lambda group: (-len(members[group]),
                                                    hashlib.sha256(f"{seed}/{group}".encode()).digest())):
        counts = Counter(photo.label for photo in members[group])
        best = max(lacks, key=lambda split: sum(count * lacks[split][label] / total[label]
                                                for label, count in counts.items()))
        for label, count in counts.items():
            lacks[best][label] -= count
        split_of |= {photo.name: best for photo in members[group]}
    return split_of


def divided_groups(splits):
    """Names of the groups with photographs in two splits, sorted: of splits that were given, not dealt."""
    homes = {}
    for split, photos in splits.items():
        for photo in photos:
            homes.setdefault(photo.group, set()).add(split)
    return sorted(group for group, found in homes.items() if group and len(found) > 1)


def write_splits(path, splits, classes):
    """Write the columns path, label, group, split; split_photos reads them again.  Whole or not at all."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "group", "split"])
        rows.writerows([photo.name, classes[photo.label] if photo.label >= 0 else "", photo.group, split]
                       for split, photos in splits.items() for photo in photos)
    os.replace(temporary, path)


def stored_groups(path, photos):
    """The group of each photograph, as write_splits wrote it; else its own, "" where nothing is known."""
    rows = read_table(path, "splits") if os.path.isfile(path) else []
    groups = {row["path"]: row.get("group", "") for _, row in rows}
    return [groups.get(photo.name) or photo.group for photo in photos]
