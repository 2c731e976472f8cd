"""Instances of overlapping blocks -> instances of the volume.

A window's embeddings mean nothing in the next window, so each block is clustered alone, and instances are
joined where two neighbours overlap.  A block is what one window contributes: the cell that it alone labels,
and a margin around it that its neighbours see too.

    grid = Grid(shape, patch, stride, margin)
    tables = stitch(grid, read_block)                       # read_block(index) -> Block, index (i, j, k)
    for row in range(grid.size[0]):
        z0, z1, labels = paint_row(grid, row, read_block, tables)      # uint32 [z1 - z0, H, W]
"""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from utils.config import UserError
from utils.sliding_window import windows

LARGEST_ID = np.iinfo(np.uint32).max
RIVAL = 0.2                              # share of an id in the overlap that makes another id its rival


def cells(starts, patch, length):
    """(first, last + 1) of the voxels that each window owns along one axis; together [0, length), none twice.

    Neighbours are cut in the middle of their overlap, as far from both borders as can be.
    """
    cuts = [(after + min(before + patch, length)) // 2 for before, after in pairwise(starts)]
    return list(zip([0, *cuts], [*cuts, length], strict=True))


@dataclass(frozen=True)
class Block:
    """Instances of one window: ``labels`` int32 [d, h, w], ids 1..K and 0 for none, over grid.block(index).

    classes: int [K + 1], the class of each id; classes[0] is not looked at.
    """

    labels: np.ndarray
    classes: np.ndarray


class Grid:
    """Where the windows of predict_slabs, their cells and their blocks lie: tuples of three slices.

    margin: voxels by which a cell grows to its block, (z, y, x), within its window; two blocks then share
    twice as many.  size: number of windows along D, H, W.
    UserError: a margin below 0, or blocks that do not overlap though their windows are larger than one voxel.
    """

    def __init__(self, shape, patch, stride, margin):
        self.shape, starts = tuple(shape), windows(shape, patch, stride)
        self.size, self.cells, self.blocks = tuple(map(len, starts)), [], []
        for places, window, step, whole, extra in zip(starts, patch, stride, shape, margin, strict=True):
            if extra < 0 or len(places) > 1 and window > 1 and (extra < 1 or step == window):
                raise UserError(f"windows of {window} at a stride of {step} with a margin of {extra} do not "
                                "overlap: choose a smaller stride, and a margin of 1 at least")
            owned = cells(places, window, whole)
            self.cells.append([slice(*cell) for cell in owned])
            self.blocks.append([slice(max(first - extra, place), min(last + extra, place + window, whole))
                                for place, (first, last) in zip(places, owned, strict=True)])

    def indices(self):
        """Every (i, j, k) in ascending order."""
        return product(*map(range, self.size))

    def cell(self, index):
        """The voxels that window ``index`` labels."""
        return tuple(places[i] for places, i in zip(self.cells, index, strict=True))

    def block(self, index):
        """The voxels that it contributes to the matching: its cell and the margin."""
        return tuple(places[i] for places, i in zip(self.blocks, index, strict=True))

    def part(self, index, labels, place):
        """The voxels ``place`` of the volume in labels over block(index)."""
        return labels[tuple(slice(part.start - block.start, part.stop - block.start)
                            for part, block in zip(place, self.block(index), strict=True))]

    def overlap(self, index, other):
        """The voxels in both blocks; None where they do not meet."""
        both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop))
                     for a, b in zip(self.block(index), self.block(other), strict=True))
        return both if all(part.start < part.stop for part in both) else None


def count_pairs(before, after):
    """How often ids meet: int64 arrays (a, b, shared, size of a, size of b), a row per pair above 0.

    before, after: ids of the same voxels in two blocks; the sizes are those within these voxels.
    """
    before, after = before.ravel(), after.ravel()
    table = sparse.coo_array((np.ones(len(before), np.int64), (before, after))).tocsr().tocoo()
    both = (table.row > 0) & (table.col > 0)
    a, b, shared = table.row[both], table.col[both], table.data[both]
    return a, b, shared, np.bincount(before)[a], np.bincount(after)[b]


def match(before, after, classes_before, classes_after, merge_threshold):
    """Ids that are one object: int64 [P, 2], from labels of the same voxels in two blocks.

    Two ids of one class are joined when their intersection is ``merge_threshold`` of their union or more, and
    neither shares a fifth of itself with a second id.  Such an object is split on one side or merged on the
    other, and the overlap does not tell which; a split costs one object, a merge glues two through the whole
    volume, so it stays apart here.  On neurons cut into blocks and spoilt by splits, merges, ragged borders
    and specks this had a lower adapted Rand error than intersection over the smaller one, with or without
    mutual best partners, and than intersection over union alone.
    """
    a, b, shared, size_a, size_b = count_pairs(before, after)
    same = classes_before[a] == classes_after[b]
    a, b, shared, size_a, size_b = (values[same] for values in (a, b, shared, size_a, size_b))
    joined = shared >= merge_threshold * (size_a + size_b - shared)
    for ids, sizes in ((a, size_a), (b, size_b)):
        joined &= np.bincount(ids, shared >= RIVAL * sizes)[ids] < 2
    return np.stack([a[joined], b[joined]], 1)


def stitch(grid, read_block, merge_threshold=0.5, min_size=50):
    """{index: uint32 [K + 1]}: the id in the volume of each id of a block, 0 if too small.

    read_block: index (i, j, k) -> Block; each is read once, and of those read only what a later neighbour
    overlaps is kept.  merge_threshold: see match.  min_size: voxels that an object needs over all the cells.
    Ids count from 1 without gaps, and depend on the blocks alone.
    UserError: a threshold outside (0, 1], or more objects than uint32 can number.
    """
    if not 0 < merge_threshold <= 1:
        raise UserError(f"a merge threshold of {merge_threshold}: must be above 0 and at most 1")
    first, classes, sizes, waiting, pairs, total = {}, {}, [], {}, [], 0
    for index in grid.indices():
        block = read_block(index)
        check_block(grid, index, block)
        first[index], classes[index] = total, np.asarray(block.classes)
        total += len(block.classes)
        owned = grid.part(index, block.labels, grid.cell(index))
        sizes.append(np.bincount(owned.ravel(), minlength=len(block.classes)))
        for axis in range(3):
            before, after = (tuple(i + step * (a == axis) for a, i in enumerate(index)) for step in (-1, 1))
            if (before, axis) in waiting:
                place, labels = waiting.pop((before, axis))
                found = match(labels, grid.part(index, block.labels, place), classes[before], classes[index],
                              merge_threshold)
                pairs.append(found + (first[before], first[index]))
            if after[axis] < grid.size[axis] and (place := grid.overlap(index, after)) is not None:
                waiting[index, axis] = place, grid.part(index, block.labels, place).copy()
    sizes = np.concatenate(sizes)
    sizes[list(first.values())] = 0                                                   # id 0 of every block
    ids = number(total, np.concatenate([np.empty((0, 2), np.int64), *pairs]), sizes, min_size)
    return {index: ids[start:start + len(classes[index])] for index, start in first.items()}


def number(total, pairs, sizes, min_size):
    """uint32 [total]: ids 1, 2, ... of the groups that ``pairs`` join, 0 for those below ``min_size`` voxels.

    pairs: int64 [P, 2], of ``total`` ids; sizes: int64 [total], voxels of each.
    """
    graph = sparse.coo_array((np.ones(len(pairs), bool), pairs.T), (total, total))
    group = connected_components(graph, directed=False)[1]
    voxels = np.bincount(group, sizes)                            # exact in float64 up to 2^53 voxels
    kept = voxels >= max(min_size, 1)
    if kept.sum() > LARGEST_ID:
        raise UserError(f"{kept.sum()} objects, more than the {LARGEST_ID} that uint32 can number: "
                        "raise the smallest size of an instance")
    return np.where(kept, np.cumsum(kept), 0).astype(np.uint32)[group]


def check_block(grid, index, block):
    """ValueError unless the labels fill grid.block(index), and every id has a class."""
    shape = tuple(part.stop - part.start for part in grid.block(index))
    if block.labels.shape != shape:
        raise ValueError(f"block {index} has labels {block.labels.shape} instead of {shape}")
    if block.labels.min() < 0 or block.labels.max() >= len(block.classes):
        raise ValueError(f"block {index} has ids from {block.labels.min()} to {block.labels.max()}, "
                         f"but classes of {len(block.classes) - 1}")


def paint_row(grid, row, read_block, tables):
    """(z0, z1, uint32 [z1 - z0, H, W]): the sections that the cells of one row of windows fill."""
    sections = grid.cells[0][row]
    labels = np.empty((sections.stop - sections.start, *grid.shape[1:]), np.uint32)
    for j, k in product(*map(range, grid.size[1:])):
        index = (row, j, k)
        cell = grid.cell(index)
        owned = grid.part(index, read_block(index).labels, cell)
        labels[:, cell[1], cell[2]] = tables[index][owned]
    return sections.start, sections.stop, labels
