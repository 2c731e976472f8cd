"""Instances of blocks become instances of the volume: whole objects, no glue, ids that can be repeated."""

import weakref
from itertools import product

import numpy as np
import pytest
from scipy.spatial import cKDTree

from utils import stitching
from utils.config import UserError
from utils.sliding_window import windows
from utils.stitching import Block, Grid, cells, count_pairs, match, paint_row, stitch

SHAPE, PATCH, STRIDE, MARGIN = (30, 44, 37), (12, 16, 16), (8, 10, 10), (2, 3, 3)


def voronoi(shape=SHAPE, count=25, seed=0):
    """int32 ids 1..count of convex cells: an object is connected in every block that it enters."""
    seeds = np.random.default_rng(seed).random((count, 3)) * shape
    nearest = cKDTree(seeds).query(np.indices(shape).reshape(3, -1).T)[1]
    return (nearest + 1).astype(np.int32).reshape(shape)


def cut(grid, truth, change=None, class_of=None, seed=0):
    """{index: Block} of a labelled volume, ids drawn anew in each; change(index, ids) may spoil them."""
    blocks = {}
    for index in grid.indices():
        ids = truth[grid.block(index)].astype(np.int64)
        ids = ids if change is None else change(index, ids.copy())
        present = np.setdiff1d(ids, 0)
        order = np.random.default_rng([seed, *index]).permutation(len(present)) + 1
        local = np.zeros(ids.max() + 1, np.int32)
        local[present] = order
        classes = np.ones(len(present) + 1, np.int64)
        if class_of is not None:
            classes[order] = [class_of[each] for each in present]
        blocks[index] = Block(local[ids], classes)
    return blocks


def join(grid, blocks, **options):
    """The stitched volume, uint32 [D, H, W]."""
    tables = stitch(grid, blocks.__getitem__, **options)
    rows = [paint_row(grid, row, blocks.__getitem__, tables) for row in range(grid.size[0])]
    assert [z0 for z0, _, _ in rows] == [0, *(z1 for _, z1, _ in rows[:-1])] and rows[-1][1] == grid.shape[0]
    return np.concatenate([labels for _, _, labels in rows])


def same_objects(ours, truth):
    """Whether two labellings differ in the names of their ids alone."""
    pairs = np.unique(np.stack([ours.ravel(), truth.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs)


def test_cells_own_each_voxel_once_far_from_borders():
    """A voxel of two cells would be written twice, of none never."""
    for patch, length in product(range(1, 9), range(1, 30)):
        for stride in range(1, patch + 1):
            starts, = windows((length,), (patch,), (stride,))
            owned = cells(starts, patch, length)
            assert [voxel for cell in owned for voxel in range(*cell)] == list(range(length))
            for (first, last), start in zip(owned, starts, strict=True):
                assert start <= first < last <= start + patch
            for (_, edge), before, after in zip(owned, starts, starts[1:], strict=False):
                assert 0 <= (before + patch - edge) - (edge - after) <= 1


def test_blocks_are_cells_and_a_margin_within_the_window():
    """Neighbours share twice the margin, where their windows allow it."""
    grid = Grid(SHAPE, PATCH, STRIDE, MARGIN)
    starts = windows(SHAPE, PATCH, STRIDE)
    for index in grid.indices():
        for axis, (block, cell) in enumerate(zip(grid.block(index), grid.cell(index), strict=True)):
            start = starts[axis][index[axis]]
            window = range(start, min(start + PATCH[axis], SHAPE[axis]))
            wanted = range(cell.start - MARGIN[axis], cell.stop + MARGIN[axis])
            assert sorted(set(window) & set(wanted)) == list(range(block.start, block.stop))
    assert grid.overlap((0, 0, 0), (1, 0, 0))[0] == slice(8, 12)


@pytest.mark.parametrize("shape, patch, stride, margin", [
    (SHAPE, PATCH, STRIDE, MARGIN), (SHAPE, PATCH, (6, 8, 8), (9, 9, 9)),
    ((7, 16, 90), PATCH, STRIDE, (1, 1, 1)),
    ((3, 4, 5), PATCH, STRIDE, MARGIN), (SHAPE, (31, 20, 20), (9, 19, 19), (1, 1, 1))])
def test_objects_cut_into_blocks_become_whole(shape, patch, stride, margin):
    """Whatever the remainder, and with other local ids in every block."""
    truth = voronoi(shape)
    truth[truth % 5 == 0] = 0
    grid = Grid(shape, patch, stride, margin)
    joined = join(grid, cut(grid, truth), min_size=1)
    assert joined.dtype == np.uint32 and same_objects(joined, truth)
    assert ((joined == 0) == (truth == 0)).all()
    assert set(np.unique(joined)) | {0} == set(range(joined.max() + 1))


def test_ids_depend_on_the_blocks_alone():
    """Resumed and shared runs write the same file; other local ids give the same objects."""
    grid = Grid(SHAPE, PATCH, STRIDE, MARGIN)
    blocks = cut(grid, voronoi())
    first, again = join(grid, blocks), join(grid, dict(reversed(blocks.items())))
    assert (first == again).all()
    assert same_objects(join(grid, cut(grid, voronoi(), seed=7)), first)


def test_classes_never_mix():
    """A mitochondrion fills the overlap with its neuron, and is not the neuron."""
    grid = Grid((40, 16, 16), (24, 16, 16), (16, 16, 16), (4, 0, 0))
    truth = np.ones(grid.shape, np.int32)

    def change(index, ids):
        return ids + index[0]

    blocks = cut(grid, truth, change, class_of={1: 1, 2: 3})
    assert len(np.unique(join(grid, blocks))) == 2
    blocks = cut(grid, truth, change, class_of={1: 1, 2: 1})
    assert len(np.unique(join(grid, blocks))) == 1


def tubes(slope=0):
    """(grid of four blocks along z, two neurites side by side along it, their wall moving along x)."""
    truth = np.zeros((60, 6, 41), np.int32)
    for z, section in enumerate(truth):
        wall = round(20 + slope * (z - 30))
        section[:, :wall], section[:, wall + 1:] = 1, 2
    return Grid(truth.shape, (24, 6, 41), (12, 6, 41), (4, 0, 0)), truth


@pytest.mark.parametrize("slope", [0, 0.3, -0.3])
def test_one_merge_in_one_block_does_not_glue_two_neurites(slope):
    """The error of one window must not spread, even where another neurite is the larger one above."""
    grid, truth = tubes(slope)
    for spoilt in range(grid.size[0]):
        def change(index, ids, at=spoilt):
            return (ids > 0).astype(int) if index[0] == at else ids

        joined = join(grid, cut(grid, truth, change))
        sections = [cell.start for row, cell in enumerate(grid.cells[0]) if row != spoilt]
        sound = [joined[z, 0, [2, 38]] for z in sections]
        assert not {left for left, _ in sound} & {right for _, right in sound}


def test_a_split_in_one_block_glues_nothing_and_costs_one_object_at_most():
    """The other side of the rule: the pieces on both sides stay whole, and the neighbouring neurite too."""
    grid, truth = tubes()

    def change(index, ids):
        if index[0] == 1:
            ids[:, 3:][ids[:, 3:] == 1] = 9
        return ids

    joined = join(grid, cut(grid, truth, change))
    assert len(np.unique(joined[truth == 2])) == 1
    assert all(len(np.unique(truth[joined == each])) == 1 for each in np.unique(joined))
    assert len(np.unique(joined[truth == 1])) <= 4


def test_a_speck_in_one_block_glues_nothing():
    """A fragment across both neurites lies in the overlap; each neighbour sees two neurites there."""
    grid, truth = tubes()

    def change(index, ids):
        if index[0] == 1:
            ids[:8, 2:4, 15:25] = 9
        return ids

    joined = join(grid, cut(grid, truth, change), min_size=1)
    assert joined[0, 0, 2] == joined[59, 0, 2] != joined[0, 0, 38] == joined[59, 0, 38]


def test_pairs_are_counted_as_a_plain_loop_would():
    """Shared voxels and sizes within the overlap decide everything else."""
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 5, (2, 4, 5, 6)).astype(np.int32)
    expected = sorted((a, b, ((before == a) & (after == b)).sum(), (before == a).sum(), (after == b).sum())
                      for a, b in product(range(1, 5), repeat=2) if ((before == a) & (after == b)).any())
    assert sorted(zip(*count_pairs(before, after), strict=True)) == expected


def test_small_objects_vanish_by_their_size_in_the_whole_volume():
    """An object of many blocks is not small because each piece is; margins are not counted twice."""
    truth = np.zeros(SHAPE, np.int32)
    truth[:, 20, 20] = 1                                                           # 30 voxels in every row
    truth[4:6, 4:6, 4:6] = 2
    grid = Grid(SHAPE, PATCH, STRIDE, MARGIN)
    assert grid.size[0] > 2
    for min_size, left in ((0, {1, 2}), (8, {1, 2}), (9, {1}), (30, {1}), (31, set())):
        joined = join(grid, cut(grid, truth), min_size=min_size)
        assert set(np.unique(truth[joined > 0])) == left
        assert joined.max() == len(left)


def test_an_empty_volume_has_no_objects():
    """No labels in any block, in one block of all, and one block alone."""
    for shape in (SHAPE, (3, 3, 3)):
        grid = Grid(shape, PATCH, STRIDE, MARGIN)
        assert not join(grid, cut(grid, np.zeros(shape, np.int32))).any()


def test_each_block_is_read_once_and_let_go():
    """They are on disk because they do not fit into memory together."""
    grid = Grid((90, 16, 16), (12, 16, 16), (8, 8, 8), MARGIN)
    blocks = cut(grid, voronoi(grid.shape))
    reads, alive = [], []

    def read(index):
        reads.append(index)
        labels = blocks[index].labels.copy()
        alive.append(weakref.ref(labels))
        assert sum(each() is not None for each in alive) <= 2
        return Block(labels, blocks[index].classes)

    stitch(grid, read)
    assert reads == list(grid.indices())


def test_sections_of_a_2d_network_stay_apart():
    """Windows of one section have nothing in common with the next: no id may cross."""
    grid = Grid((3, 30, 30), (1, 16, 16), (1, 8, 8), (0, 4, 4))
    joined = join(grid, cut(grid, np.ones((3, 30, 30), np.int32)))
    assert [np.unique(section).tolist() for section in joined] == [[1], [2], [3]]


def test_more_objects_than_uint32_can_number_are_refused(monkeypatch):
    """They would start again at 0."""
    grid = Grid(SHAPE, PATCH, STRIDE, MARGIN)
    blocks = cut(grid, voronoi())
    monkeypatch.setattr(stitching, "LARGEST_ID", 24)
    with pytest.raises(UserError, match="25 objects"):
        stitch(grid, blocks.__getitem__, min_size=1)
    monkeypatch.setattr(stitching, "LARGEST_ID", 25)
    assert max(table.max() for table in stitch(grid, blocks.__getitem__, min_size=1).values()) == 25


def test_settings_and_blocks_that_make_no_sense_are_refused():
    """Windows that share nothing would be cut at every border without a word."""
    for stride, margin in (((12, 10, 10), MARGIN), (STRIDE, (0, 3, 3)), (STRIDE, (-1, 3, 3))):
        with pytest.raises(UserError, match="overlap"):
            Grid(SHAPE, PATCH, stride, margin)
    grid = Grid(SHAPE, PATCH, STRIDE, MARGIN)
    blocks = cut(grid, voronoi())
    for threshold in (0, 1.5):
        with pytest.raises(UserError, match="threshold"):
            stitch(grid, blocks.__getitem__, merge_threshold=threshold)
    good = blocks[0, 0, 0]
    for bad in (Block(good.labels[:-1], good.classes), Block(good.labels, good.classes[:-1]),
                Block(good.labels - 2, good.classes)):
        with pytest.raises(ValueError, match="block"):
            stitch(grid, {**blocks, (0, 0, 0): bad}.__getitem__)


def test_the_threshold_decides():
    """A documented option: the share of the union, half of it by default."""
    before, after = np.zeros((2, 1, 1, 10), np.int32)
    before[..., :8], after[..., 3:] = 1, 1                                             # 5 of 10
    classes = np.array([0, 1])
    assert match(before, after, classes, classes, 0.5).tolist() == [[1, 1]]
    assert match(before, after, classes, classes, 0.51).tolist() == []
