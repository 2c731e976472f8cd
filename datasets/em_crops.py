"""One box of a Source: its label files read and merged into classes and instances; volumes kept in memory."""

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from datasets.em_labels import BOUNDARY, CLASSES, IGNORE, boundaries, relabel
from utils.config import BadFile

NOT_ANNOTATED = 2 ** 63           # ids from here on, of uint64: CREMI writes -2, -3 where nobody has looked
NO_CLEFT = 2 ** 64 - 1            # CREMI's background of clefts
FRAGMENT = 8                      # voxels of the smallest instance of a crop
ZERO = {"background": 0, "boundary": BOUNDARY, "ignore": IGNORE}


def merge_labels(source, box, boundary):
    """Labels of a box of a Source -> (classes int16, instances int32, both [D, H, W], kinds int64 [K + 1]).

    Labels of different classes may cover one voxel.  Its class is the first there of mitochondrion, cleft,
    boundary, neuron, background; IGNORE where the first that speaks is not annotated.  Instances: ids 1..K of
    the components of equal ids, whatever their class; kinds[id] is that class, kinds[0] = 0.  The instance
    goes by the same order, but a boundary has none: its voxels stay with the neuron, or where the source has
    codes with the nearest mitochondrion that it touches.
    boundary: where neurons meet each other or 0 is boundary too, unless the boundary is annotated; that is
    unknown, IGNORE, beside voxels that are not annotated.
    Raises BadFile for labels that are no ids.
    """
    labels = read_labels(source, box)
    shape = tuple(part.stop - part.start for part in box)
    classes, instances, kinds = np.zeros(shape, np.int16), np.zeros(shape, np.int32), [0]
    for word in ("neuron", "boundary", "cleft", "mitochondrion"):
        if word not in labels:
            continue
        ids, unknown = labels[word]
        if word == "neuron":
            classes[ids == 0] = ZERO[source.zero]
        classes[unknown] = IGNORE
        classes[ids > 0] = CLASSES.index(word)
        if word == "neuron" and boundary and "boundary" not in source.complete:
            draw_boundaries(classes, ids, source.spacing_nm)
        if word == "boundary":
            continue
        parts = relabel(ids)
        count = parts.max(initial=0)
        if word == "mitochondrion" and source.codes and "boundary" in labels:
            mask = (parts > 0) | (labels["boundary"][0] > 0)
            parts = watershed(np.zeros(shape, np.uint8), parts, mask=mask)      # flat: by steps
        instances = np.where(parts > 0, parts + np.int32(len(kinds) - 1), instances)
        kinds += [CLASSES.index(word)] * int(count)
    return classes, instances.astype(np.int32), np.array(kinds)


def draw_boundaries(classes, neurons, spacing_nm):
    """Write BOUNDARY into ``classes`` where neurons meet, or IGNORE where one meets the unknown."""
    drawn, unknown = boundaries(neurons, spacing_nm), classes == IGNORE
    if unknown.any():
        near = ndimage.binary_dilation(unknown, np.ones((3, 3, 3), bool))
        classes[drawn & near] = IGNORE
        drawn &= ~near
    classes[drawn] = BOUNDARY


def read_labels(source, box):
    """{word: (ids, 0 = none; bool, where not annotated)} of a box; a file of two words is read once.

    Raises BadFile, see read_ids, and for values that are none of the source's codes.
    """
    blocks = {id(volume): read_ids(volume, box) for volume in source.labels.values()}
    labels = {}
    for word, volume in source.labels.items():
        ids = blocks[id(volume)]
        unknown = np.zeros(ids.shape, bool)
        if source.codes:
            strangers = ids[~np.isin(ids, [0, *source.codes.values()])]
            if strangers.size:
                raise BadFile(f"{volume.path}: label {strangers[0]}; its labels are 0 and "
                              f"{', '.join(f'{code} ({name})' for name, code in source.codes.items())}")
            if "ignore" in source.codes:
                unknown = ids == source.codes["ignore"]
            ids = (ids == source.codes[word]).astype(np.uint8)
        elif ids.dtype == np.uint64:
            unknown = ids >= NOT_ANNOTATED
            if word == "cleft":
                unknown &= ids != NO_CLEFT
            ids = np.where(ids >= NOT_ANNOTATED, np.uint64(0), ids)
        labels[word] = ids, unknown
    return labels


def read_ids(volume, box):
    """A box of a label volume as integers of its own type; float files hold whole numbers, or are BadFile.

    Raises BadFile for values below 0 too.
    """
    block = volume[box]
    if block.dtype.kind == "f":
        broken = block[~((block == np.rint(block)) & (np.abs(block) < 2 ** 53))]           # NaN too
        if broken.size:
            raise BadFile(f"{volume.path}: label {broken[0]:g} is no whole number; labels are ids or masks")
        block = block.astype(np.int64)
    if block.dtype.kind not in "biu":
        raise BadFile(f"{volume.path}: labels of type {block.dtype}; they must be whole numbers")
    if block.dtype.kind == "i" and block.size and block.min() < 0:
        raise BadFile(f"{volume.path}: label {block.min()} is below 0; labels are ids or masks")
    return block.astype(np.uint8) if block.dtype.kind == "b" else block


def components(instances):
    """int32 ids 1..K of the connected components of equal ids; those of fewer than FRAGMENT voxels become 0.

    The faces of a crop, and more so its deformation, cut slivers off the neurites.  They can be half of all
    components, and each would be pushed away from the neurite that it is a part of.
    """
    instances = relabel(instances)
    large = np.bincount(instances.ravel()) >= FRAGMENT
    large[0] = False
    return (np.cumsum(large, dtype=np.int32) * large)[instances]


class Kept:
    """A volume of which ``count`` sections from ``first`` on lie in memory; it is read like the volume."""

    def __init__(self, volume, first, count):
        self.volume, self.first, self.shape = volume, first, volume.shape
        self.path, self.key, self.dtype, self.spacing_nm = (volume.path, volume.key, volume.dtype,
                                                            volume.spacing_nm)
        self.sections = volume[first:first + count, 0:self.shape[1], 0:self.shape[2]]

    def __getitem__(self, box):
        depth, *plane = box
        if self.first <= depth.start and depth.stop <= self.first + len(self.sections):
            return self.sections[depth.start - self.first:depth.stop - self.first, plane[0], plane[1]]
        return self.volume[box]


def pad(array, size, outside):
    """[D, H, W] -> array of ``size``, larger at the ends; ``outside``: the value there, or "reflect"."""
    amounts = [(0, wanted - n) for wanted, n in zip(size, array.shape, strict=True)]
    if not np.any(amounts):
        return array
    if outside == "reflect":
        return np.pad(array, amounts, mode="reflect")
    return np.pad(array, amounts, constant_values=outside)
