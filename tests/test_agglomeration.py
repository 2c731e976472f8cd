"""Fragments of the boundary map, merged by boundary and embedding together."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from utils.agglomeration import agglomerate, fragments, segment

SHAPE = (12, 40, 60)


def two_rooms(gap=0, wall=1.0):
    """(embedding [2, D, H, W], boundary, true ids): two rooms, a wall between them with a gap of some rows.

    The embedding of the second room lies 3 away; a dark bar of boundary crosses the first room.
    """
    ids = np.ones(SHAPE, np.int32)
    ids[:, :, 30:] = 2
    boundary = np.full(SHAPE, 0.02, np.float32)
    boundary[:, gap:, 29:31] = wall
    embedding = np.zeros((2, *SHAPE), np.float32)
    embedding[0] = ndimage.gaussian_filter(3.0 * (ids == 2), 1)
    embedding += 0.05 * np.random.default_rng(0).standard_normal(embedding.shape).astype(np.float32)
    return embedding, boundary, ids


def same_partition(found, true, mask):
    """Whether two labellings divide the mask alike."""
    pairs = set(zip(found[mask].tolist(), true[mask].tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_a_gap_in_the_membrane_does_not_join_what_embeddings_tell_apart():
    """The reason for embeddings: a boundary map alone leaks through every gap."""
    embedding, boundary, ids = two_rooms(gap=12)
    mask = boundary < 0.5
    assert same_partition(agglomerate(embedding, mask, boundary), ids, mask)
    blind = agglomerate(np.zeros_like(embedding), mask, np.minimum(boundary, 0.6))
    assert len(np.unique(blind[mask])) == 1


def test_a_dark_organelle_does_not_divide_what_has_one_embedding():
    """The reason for a mean over faces: mitochondria look like membranes to the boundary map."""
    embedding, boundary, ids = two_rooms()
    boundary[:, 10:30, 14:16] = 0.9
    boundary[:, :10, 14:16] = boundary[:, 30:, 14:16] = 0.3
    mask = (boundary < 0.5) | (ids == 1)
    mask[:, :, 29:31] = False
    assert same_partition(agglomerate(embedding, mask, boundary), ids, mask)


def test_fragments_cover_the_mask_and_never_cross_a_full_wall():
    """Every voxel of the mask has a fragment, each island at least one of its own."""
    _, boundary, ids = two_rooms()
    boundary[4:8, 15:25, 50:58] = 1.0                                  # a box of walls with an island in it
    boundary[5:7, 18:22, 52:56] = 0.1
    mask = boundary < 0.5
    found = fragments(boundary, mask, np.ones(3))
    assert (found[mask] > 0).all()
    assert not set(np.unique(found[mask & (ids == 1)])) & set(np.unique(found[mask & (ids == 2)]))
    assert not set(np.unique(found[5:7, 18:22, 52:56])) & set(np.unique(found[mask & (ids == 1)]))


def test_thick_sections_are_cut_one_by_one_and_joined_by_the_embedding():
    """Where sections lie far apart no membrane is seen between cells that lie over each other."""
    ids = np.ones((6, 30, 30), int)
    ids[3:] = 2
    embedding = (3.0 * (ids == 2) + 0.1 * np.random.default_rng(0).standard_normal((2, *ids.shape)))
    mask, boundary = np.ones(ids.shape, bool), np.zeros(ids.shape, np.float32)
    assert same_partition(agglomerate(embedding, mask, boundary, spacing_nm=(30, 6, 6)), ids, mask)
    assert len(np.unique(agglomerate(embedding, mask, boundary))) == 1


def test_small_pieces_join_the_nearest_or_vanish():
    """A piece below min_size has a neighbour to go to, or none."""
    embedding, boundary, _ = two_rooms()
    mask = boundary < 0.5
    mask[:, :, 40:] = False
    mask[2:4, 2:4, 50:53] = True                                        # 12 voxels by themselves
    assert not agglomerate(embedding, mask, boundary, min_size=50)[:, :, 40:].any()
    assert agglomerate(embedding, mask, boundary, min_size=5)[3, 3, 51] > 0


@pytest.mark.parametrize("shape", [(1, 40, 40), (3, 4, 5), (1, 1, 1)])
def test_any_shape_and_an_empty_mask(shape):
    """Slices and corners of a volume; ids are compact and the mask is filled."""
    mask, boundary = np.ones(shape, bool), np.zeros(shape, np.float32)
    found = agglomerate(np.zeros((3, *shape), np.float32), mask, boundary, min_size=1)
    assert found.dtype == np.int32 and np.unique(found).tolist() == [1]
    assert not agglomerate(np.zeros((3, *shape), np.float32), ~mask, boundary).any()


def test_the_same_input_gives_the_same_ids_in_the_order_of_their_voxels():
    """Ids 1..K by first voxel: what is stitched must not depend on chance."""
    embedding, boundary, _ = two_rooms()
    mask = boundary < 0.5
    first, second = (agglomerate(embedding, mask, boundary) for _ in range(2))
    assert np.array_equal(first, second)
    _, places = np.unique(first[first > 0], return_index=True)
    assert (np.diff(places) > 0).all()


@pytest.mark.parametrize("use_boundary", [True, False])
def test_a_window_is_segmented_class_by_class(use_boundary):
    """With and without a boundary class; instances grow into the wall by so many nm and no more."""
    embedding, wall, ids = two_rooms()
    probabilities = np.zeros((5, *SHAPE), np.float32)
    probabilities[1], probabilities[4] = 1 - wall, wall
    values = torch.from_numpy(probabilities), torch.from_numpy(embedding), (1, 2, 3), use_boundary, 0.5, 50
    found, class_of = segment(*values, 0.0, (10.0, 10.0, 10.0))
    assert same_partition(found, ids, wall < 0.5) and class_of.tolist() == [0, 1, 1]
    assert not found[wall >= 0.5].any()
    assert (segment(*values, 10.0, (10.0, 10.0, 10.0))[0] > 0).all()
