"""Crops of volumes of electron microscopy with classes and instances: the dataset of Vista2D and Vista3D."""

from dataclasses import replace
from itertools import chain, product

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.em_crops import Kept, components, merge_labels, pad
from datasets.em_files import intensity_range, scale
from datasets.em_labels import IGNORE, instance_weights
from datasets.samplers import check_on_bad_file, first_readable, item_generator
from utils.config import BadFile, UserError
from utils.sliding_window import window_starts

DRAWS = 50                                           # of a crop, to find one with an annotated voxel


class ConnectomicsDataset(Dataset):
    """Crops of EM volumes; the same item for the same (seed, epoch, index), wherever it is made.

    Item: dict of tensors, where a slice [H, W] has no D
        image           float32 [1, D, H, W] in [0, 1]: the volume's range, see em_files.intensity_range
        classes         int64 [D, H, W], em_labels.CLASSES; IGNORE = -100 where not annotated, and in padding
        instances       int32 [D, H, W], ids 1..K of em_crops.components of the crop; 0: none, or ignored
        instance_class  int64 [D, H, W], the class of each voxel's instance, 0: none.  It differs from classes
                        in membranes, which belong to an instance and are of the class boundary
        weight          float32 [D, H, W], em_labels.instance_weights
        meaning         bool [5, 5], Source.meaning; spacing_nm: float32 [3], in slices too
        case            str, the volume and the sections, rows and columns of the crop
        bad_files       str, messages of crops skipped to make this item, joined by ";" (normally empty)
    Sections that the augmentation takes from the image keep their labels: neighbours tell what was there.

    sources: of em_sources.find_sources, those of one split.
    patch_size: (D, H, W); with ``slices`` the last two count.  Smaller volumes are padded by reflection.
    train True: ``crops`` random crops.  First a data set is drawn by ``weights`` {word: number or 1},
    then a volume of it by voxels, then a place, uniform.  A crop without annotated voxels is drawn again, at
    most DRAWS times.  augment: em_augment.EMAugment with fill {"classes": IGNORE}, or None.
    train False: windows side by side, the last one shifted back, that cover all sections; of these at most
    ``crops``, spread evenly, as many from each volume as it has, or equally many.  Not augmented.
    boundary: voxels where neurons meet are of the class boundary, unless this is annotated.
    edge, bone: see em_labels.instance_weights.
    cache_rate: share of the volumes' bytes kept in memory, the first ones; forked workers share it.
    on_bad_file: "stop" raises BadFile; with "skip" the crop of the next index stands in.
    Raises UserError for arguments that make no sense, and when no crop can be read.
    """

    def __init__(self, sources, patch_size, train, crops, weights, augment=None, seed=0, boundary=True,
                 edge=10.0, bone=10.0, slices=False, cache_rate=0.0, on_bad_file="stop"):
        check_arguments(sources, patch_size, crops, weights, augment, slices, cache_rate)
        self.sources, self.train, self.crops, self.seed, self.epoch = list(sources), train, crops, seed, 0
        self.patch = (1, *patch_size[-2:]) if slices else tuple(patch_size)
        self.slices, self.augment = slices, augment if train else None
        self.boundary, self.edge, self.bone = boundary, edge, bone
        self.on_bad_file = check_on_bad_file(on_bad_file)
        self.ranges = [self.attempt(intensity_range, source.raw) for source in self.sources]
        self.keep(cache_rate)
        self.chances = chances(self.sources, weights)
        self.windows = None if train else self.grid()

    def set_epoch(self, epoch):
        """Draw this epoch's crops from now on; before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self):
        return self.crops if self.train else len(self.windows)

    def __getitem__(self, index):
        index = range(len(self))[index]                                    # IndexError at the end
        candidates = chain(range(index, len(self)), range(index))
        item, bad_files = first_readable(self.make, candidates, self.on_bad_file, "crops")
        return {**item, "bad_files": ";".join(bad_files)}

    def describe(self):
        """{data set: {"volumes", "sections", "voxels"}: numbers} of what the crops are taken from."""
        found = {}
        for source in self.sources:
            numbers = found.setdefault(source.dataset, {"volumes": 0, "sections": 0, "voxels": 0})
            numbers["volumes"] += 1
            numbers["sections"] += source.sections[1] - source.sections[0]
            numbers["voxels"] += voxels(source)
        return found

    def make(self, number):
        """The item of one number, without bad_files.  Raises BadFile."""
        generator = item_generator(self.seed, self.epoch, number)
        place, box = self.draw(generator) if self.train else self.windows[number]
        classes, instances, kinds = merge_labels(self.sources[place], box, self.boundary)
        for _ in range(DRAWS if self.train else 0):
            if (classes != IGNORE).any():
                break
            place, box = self.draw(generator)
            classes, instances, kinds = merge_labels(self.sources[place], box, self.boundary)
        source = self.sources[place]
        if isinstance(self.ranges[place], BadFile):
            raise self.ranges[place]
        image = scale(source.raw[box], *self.ranges[place])
        if self.augment is not None:
            labels = {"classes": classes, "instances": instances}
            image, labels, _ = self.augment(image, labels, source.spacing_nm, generator)
            classes, instances = labels["classes"], labels["instances"]
        instances[classes == IGNORE] = 0
        instance_class, instances = kinds[instances], components(instances)
        instance_class[instances == 0] = 0
        weight = instance_weights(instances, source.spacing_nm, self.edge, self.bone)
        maps = {"classes": (classes.astype(np.int64), IGNORE), "instances": (instances, 0),
                "instance_class": (instance_class, 0), "weight": (weight, 1)}
        maps["image"] = (image, "reflect")
        item = {name: torch.from_numpy(pad(values, self.patch, outside))
                for name, (values, outside) in maps.items()}
        if self.slices:
            item = {name: values[0] for name, values in item.items()}
        extent = " ".join(f"{axis} {part.start}:{part.stop}" for axis, part in zip("zyx", box, strict=True))
        return {**item, "image": item["image"][None], "meaning": torch.from_numpy(source.meaning),
                "spacing_nm": torch.tensor(source.spacing_nm), "case": f"{source.name} {extent}"}

    def draw(self, generator):
        """(place in sources, box) of a random crop."""
        place = int(torch.multinomial(self.chances, 1, generator=generator))
        box = []
        for (low, high), size in zip(extents(self.sources[place]), self.patch, strict=True):
            last = max(low, high - size)
            first = int(torch.randint(low, last + 1, (), generator=generator))
            box.append(slice(first, min(first + size, high)))
        return place, tuple(box)

    def grid(self):
        """[(place in sources, box)] of the validation windows."""
        boxes = [list(product(*map(windows, extents(source), self.patch))) for source in self.sources]
        counts = shares([len(each) for each in boxes], self.crops)
        return [(place, boxes[place][number]) for place, count in enumerate(counts)
                for number in spread(len(boxes[place]), count, [self.seed, place])]

    def keep(self, cache_rate):
        """Read that share of the volumes' bytes into memory, in order, whole sections."""
        parts = {(id(volume), *source.sections): volume for source in self.sources        # each volume once
                 for volume in (source.raw, *source.labels.values())}
        left = cache_rate * sum((end - first) * section_bytes(volume)
                                for (_, first, end), volume in parts.items())
        kept = {}
        for (number, first, end), volume in parts.items():
            count = min(end - first, int(left / section_bytes(volume)))
            left -= count * section_bytes(volume)
            found = self.attempt(Kept, volume, first, count) if count else volume
            kept[number, first, end] = volume if isinstance(found, BadFile) else found  # crops name the fault
        self.sources = [replace(source, raw=kept[id(source.raw), *source.sections],
                                labels={word: kept[id(volume), *source.sections]
                                        for word, volume in source.labels.items()})
                        for source in self.sources]

    def attempt(self, read, *arguments):
        """What ``read`` returns, or with on_bad_file "skip" the BadFile that it raises."""
        try:
            return read(*arguments)
        except BadFile as error:
            if self.on_bad_file == "stop":
                raise
            return error


def check_arguments(sources, patch_size, crops, weights, augment, slices, cache_rate):
    """Raise UserError for values that make no sense."""
    if not sources:
        raise UserError("a dataset of no volumes: check --data, VISTA_VAL_FRACTION and VISTA_TEST_FRACTION")
    if len(patch_size) not in ((2, 3) if slices else (3,)) or min(patch_size) < 1:
        raise UserError(f"VISTA_PATCH_SIZE = {list(patch_size)}: must be numbers of voxels along D, H, W")
    if crops < 1:
        raise UserError(f"{crops} crops: VISTA_CROPS_PER_EPOCH and VISTA_VAL_CROPS must be 1 at least")
    if not 0 <= cache_rate <= 1:
        raise UserError(f"VISTA_CACHE_RATE = {cache_rate}: must be between 0 and 1")
    present = {source.dataset for source in sources}
    if min(weights.values(), default=0) < 0 or not any(weights.get(word, 1) > 0 for word in present):
        raise UserError(f"VISTA_DATASET_WEIGHTS = {dict(weights)}: none may be negative, and one of "
                        f"{', '.join(sorted(present))} must be above 0")
    if augment is not None and augment.fill.get("classes") != IGNORE:
        raise ValueError('augment must have fill={"classes": IGNORE}: what it mirrors in is not annotated')


def extents(source):
    """[(first, end)] of the voxels of a source along D, H, W."""
    return [source.sections, (0, source.raw.shape[1]), (0, source.raw.shape[2])]


def section_bytes(volume):
    """Bytes of one section of a volume."""
    return volume.shape[1] * volume.shape[2] * np.dtype(volume.dtype).itemsize


def voxels(source):
    """How many voxels a source has."""
    return int(np.prod([end - first for first, end in extents(source)]))


def chances(sources, weights):
    """float64 [len(sources)]: by the weight of its data set, shared by voxels; the sum is 1."""
    sizes = {}
    for source in sources:
        sizes[source.dataset] = sizes.get(source.dataset, 0) + voxels(source)
    chance = torch.tensor([weights.get(source.dataset, 1) * voxels(source) / sizes[source.dataset]
                           for source in sources], dtype=torch.float64)
    return chance / chance.sum()


def windows(extent, size):
    """Slices of ``size`` that cover [first, end), side by side, the last one shifted back; or one shorter."""
    low, high = extent
    return [slice(low + first, min(low + first + size, high))
            for first in window_starts(high - low, size, size)]


def shares(counts, total):
    """How many of ``counts`` windows each volume gives: equally many, or all it has; at most ``total``."""
    taken = [0] * len(counts)
    order = sorted(range(len(counts)), key=counts.__getitem__)
    for rank, place in enumerate(order):
        taken[place] = min(counts[place], (total - sum(taken)) // (len(counts) - rank))
    return taken


def spread(length, count, seed):
    """``count`` of range(length), one of each of as many equal parts: steps would hit the same columns."""
    bounds = np.arange(count + 1) * length // max(count, 1)
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist() if count else []
