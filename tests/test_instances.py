"""Instances out of embeddings: promises of every result, and what a real network's embeddings ask for."""

import tracemalloc

import cc3d
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import adapted_rand_error
from sklearn.cluster import HDBSCAN

from utils import instances
from utils.instances import cluster_classes, cluster_embeddings, grow

SHAPE = (12, 48, 48)


def tissue(shape=SHAPE, side=16):
    """Bent cells of about side x side pixels, as deep as the volume; int32 ids from 1."""
    z, y, x = np.indices(shape)
    y, x = y + 3 * np.sin(z / 5 + x / 9), x + 3 * np.sin(y / 8)
    row, column = (np.clip(place // side, 0, length // side - 1).astype(int)
                   for place, length in ((y, shape[1]), (x, shape[2])))
    return (1 + row * (shape[2] // side) + column).astype(np.int32)


def embed(true, seed=0, apart=3.0, noise=0.1, drift=0.0, blend=0.0, width=16):
    """Embedding float32 [width, D, H, W]: random means ``apart`` from each other, drifting, blended."""
    rng = np.random.default_rng(seed)
    means = [np.zeros(width)]
    while len(means) < true.max() + 1:
        means.append(rng.uniform(-apart, apart, width))
        if min(np.linalg.norm(means[-1] - other) for other in means[:-1]) < apart:
            means.pop()
    heading = rng.standard_normal((true.max() + 1, width))
    heading *= drift / np.linalg.norm(heading, axis=1, keepdims=True)
    ramp = np.linspace(-1, 1, true.shape[0])[:, None, None]
    rows = np.stack(means)[true] + heading[true] * ramp[..., None]
    sigma = (blend / 2, blend, blend, 0)
    rows = ndimage.gaussian_filter(rows, sigma) if blend else rows
    return np.float32(np.moveaxis(rows + noise * rng.standard_normal(rows.shape), -1, 0)).copy()


def error(found, true):
    return adapted_rand_error(true, found.astype(np.int64))[0]


def check_result(found, mask, min_size=50):
    """The promises of every result: ids 1..K, inside the mask, 6-connected, large enough."""
    assert found.dtype == np.int32 and found.shape == mask.shape and not found[~mask].any()
    size = np.bincount(found.ravel())[1:]
    assert (size >= min_size).all()
    _, pieces = cc3d.connected_components(found.astype(np.uint32), connectivity=6, return_N=True)
    assert pieces == len(size)
    lost = cc3d.statistics(cc3d.connected_components(mask, connectivity=6))["voxel_counts"][1:]
    assert (mask & (found == 0)).sum() == lost[lost < min_size].sum()


@pytest.mark.parametrize("width, dtype", [(16, torch.float32), (16, torch.float16),
                                          (16, torch.bfloat16), (2, torch.float32), (1, torch.float32)])
def test_separate_clusters_are_found_exactly(width, dtype):
    """Where the loss is zero, the instances are the truth, for any width and float type."""
    true = tissue()
    data = embed(true)
    if width < 16:                                       # few means lie 3 apart in few dimensions
        data = data[:width] * 0.1 + 4 * true
    found = cluster_embeddings(torch.from_numpy(data).to(dtype), np.ones(SHAPE, bool))
    check_result(found, np.ones(SHAPE, bool))
    assert error(found, true) == 0


def test_hard_embeddings_are_no_worse_than_with_hdbscan():
    """Blended borders and neighbours 2 apart: against HDBSCAN on as many points, then the nearest mean."""
    true = tissue()
    data, mask = embed(true, apart=2.0, noise=0.2, drift=0.4, blend=1.5), np.ones(SHAPE, bool)
    found = cluster_embeddings(data, mask)
    check_result(found, mask)
    points = torch.from_numpy(data).flatten(1).T[::8]
    labels = torch.from_numpy(HDBSCAN(min_cluster_size=15, copy=True).fit_predict(points.numpy()))
    means = torch.stack([points[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    peer = instances.nearest_mode(torch.from_numpy(data), mask, means)
    assert error(found, true) <= error(peer, true) + 0.005
    assert error(found, true) < 0.1


def test_a_drifting_mean_does_not_cut_an_instance():
    """Along a long neurite the mean drifts by more than a ball's width; no membrane lies where it is cut."""
    true = tissue((40, 32, 32))
    data, mask = embed(true, drift=2.5), np.ones(true.shape, bool)
    assert error(cluster_embeddings(data, mask), true) < 0.01
    with pytest.MonkeyPatch.context() as patch:          # the cut is there before the faces are looked at
        patch.setattr(instances, "SAME_INSTANCE", 0.0)
        assert error(cluster_embeddings(data, mask), true) > 0.1


def test_a_weak_spot_does_not_merge_two_instances():
    """One leak through the membrane made one object of everything, where edges alone decided."""
    true = np.ones((12, 40, 40), np.int32)
    true[:, 20:] = 2
    data = embed(true)
    middle = (data[:, :, 5:6] + data[:, :, -5:-4]) / 2
    data[:, 4:8, 14:26, 10:16] = np.broadcast_to(middle[:, :1, :, :1], (16, 4, 12, 6))
    found = cluster_embeddings(data, np.ones(true.shape, bool))
    assert found[6, 2, 30] != found[6, 38, 30]


def test_a_blend_of_two_is_not_a_third():
    """Halfway between two instances the embedding passes by the mean of another."""
    true = np.ones((12, 40, 60), np.int32)
    true[:, :, 20:40], true[:, :20, 40:], true[:, 20:, 40:] = 2, 3, 3
    means = np.zeros((4, 16), np.float32)
    means[2, 0], means[3, 0] = 6, 3                      # 3 lies between 1 and 2, yet touches 2 alone
    rows = ndimage.gaussian_filter(means[true], (0, 0, 2, 0))
    data = np.moveaxis(rows, -1, 0) + np.float32(0.05) * np.random.default_rng(0).standard_normal(
        (16, *true.shape), dtype=np.float32)
    found = cluster_embeddings(data, np.ones(true.shape, bool))
    assert found.max() == 3 and error(found, true) < 0.05


def test_equal_embeddings_far_apart_are_two_instances():
    """The loss pushes instances of one crop apart; elsewhere, or across a corner, the same values return."""
    apart, corner = np.zeros((2, 8, 20, 40), bool)
    apart[:, :, :15] = apart[:, :, 25:] = corner[:, :10, :15] = corner[:, 10:, 15:] = True
    for mask in (apart, corner):
        found = cluster_embeddings(np.ones((4, *mask.shape), np.float32), mask)
        check_result(found, mask)
        assert found.max() == 2


def test_small_pieces_join_a_neighbour_and_small_islands_vanish():
    """Every voxel of an island that is large enough has an id, whatever noise does to it."""
    rng = np.random.default_rng(0)
    mask = np.zeros((9, 30, 30), bool)
    mask[1:8, 2:20, 2:20], mask[2:4, 24:27, 24:27], mask[1:6, 25:28, 2:7] = True, True, True
    for noise in (0.1, 1.0, 10.0):
        data = np.float32(noise * rng.standard_normal((5, *mask.shape)))
        check_result(cluster_embeddings(data, mask), mask)
        check_result(cluster_embeddings(data, mask, min_size=1), mask, 1)
        check_result(cluster_embeddings(data, mask, min_size=10 ** 6), mask, 10 ** 6)


def test_an_island_of_speckles_is_one_instance():
    """No piece of it is large enough, but the island is."""
    mask = np.ones((6, 24, 40), bool)
    mask[:, :, 30:34] = mask[:, 6:, 30:] = False
    which = np.indices(mask.shape)[2] // 15 % 2
    which[:, :, 34:] = np.indices(mask.shape).sum(0)[:, :, 34:] % 2
    found = cluster_embeddings(4 * np.float32(which)[None].repeat(3, axis=0), mask)
    check_result(found, mask)
    assert found.max() == 3


def test_only_neighbours_compete_for_a_voxel_and_the_likest_takes_it():
    """Ids 1 and 2 are kept; 3 between them goes over voxel by voxel, though 4 would be its nearest centre."""
    pieces = np.array([1, 1, 3, 3, 3, 2, 2, 0, 4, 0, 5, 5], np.int32).reshape(1, 1, -1)
    centres = torch.tensor([[0.0], [1.0], [2.0], [9.0], [1.6], [0.0]])
    keep = np.array([True, True, True, False, True, False])
    for value, expected in ((1.4, 1), (1.6, 2)):
        found = instances.hand_over(pieces, keep, torch.full((1, *pieces.shape), value), centres)
        assert found.ravel().tolist() == [1, 1, 1, expected, 2, 2, 2, 0, 4, 0, 5, 5]


@pytest.mark.parametrize("shape", [(1, 40, 40), (40, 1, 40), (1, 1, 1), (2, 3, 60)])
def test_flat_volumes_and_single_voxels(shape):
    """Slice mode has D = 1; blocks at the end of a volume have any size."""
    true = np.where(np.arange(shape[2]) < 20, 1, 2) * np.ones(shape, np.int32)
    data, mask = embed(true), np.ones(shape, bool)
    found = cluster_embeddings(data, mask, min_size=1)
    check_result(found, mask, 1)
    assert found.max() == (1 if shape == (1, 1, 1) else 2) and ((found == 1) == (true == 1)).all()


def test_an_empty_mask_gives_no_instance():
    """A block without foreground is common."""
    found = cluster_embeddings(np.zeros((3, *SHAPE), np.float32), np.zeros(SHAPE, bool))
    assert found.dtype == np.int32 and not found.any() and found.shape == SHAPE


def test_the_same_seed_gives_the_same_ids_from_any_memory_layout():
    """Ranks and resumed runs must agree; a network's output is channels last, a block is cut out."""
    true = tissue()
    data, mask = embed(true, apart=2.0, blend=1.0), ndimage.binary_erosion(true > 0)
    expected = cluster_embeddings(data, mask, seed=3)
    last = torch.from_numpy(data)[None].to(memory_format=torch.channels_last_3d)[0]
    cut = np.zeros((20, *(side + 4 for side in SHAPE)), np.float32)[2:18, 1:-3, 2:-2, 3:-1]
    cut[...] = data
    for same in (data, last, cut):
        np.testing.assert_array_equal(cluster_embeddings(same, mask, seed=3), expected)


def test_sections_far_apart_do_not_make_instances_thin():
    """An instance on one section has no neighbour above or below; with thick sections that is no sign."""
    true = np.ones((5, 40, 40), np.int32)
    true[2, 10:30, 10:30] = 2
    data, mask = embed(true), np.ones(true.shape, bool)
    assert error(cluster_embeddings(data, mask, spacing_nm=(50, 5, 5)), true) == 0
    assert cluster_embeddings(data, mask).max() == 1


def test_memory_is_a_few_channels():
    """Blocks are as large as memory allows for the embedding itself."""
    true = tissue((24, 96, 96), side=24)
    data, mask = embed(true, noise=0.3), np.ones(true.shape, bool)
    cluster_embeddings(data, mask)
    tracemalloc.start()                                  # of numpy; torch holds CHUNK and POINTS rows at most
    cluster_embeddings(data, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * data[0].nbytes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 10 ** 9])
def test_values_that_are_not_finite_are_refused(bad, count):
    """They would all fall into one cluster."""
    data = embed(tissue())
    data.reshape(16, -1)[0, :count] = bad
    with pytest.raises(ValueError, match="not finite"):
        cluster_embeddings(data, np.ones(SHAPE, bool))


def test_other_shapes_are_refused():
    """A batch axis left in, or the mask of another block."""
    for shape, mask in (((1, 3, 4, 5, 6), (4, 5, 6)), ((3, 4, 5, 6), (4, 5, 7)), ((4, 5, 6), (4, 5, 6))):
        with pytest.raises(ValueError, match="is not"):
            cluster_embeddings(np.zeros(shape, np.float32), np.ones(mask, bool))


def test_classes_do_not_share_instances():
    """A mitochondrion lies inside a neuron and may have its embedding; ids are unique over the classes."""
    classes = np.ones((10, 30, 30), np.int64)
    classes[:, :, 15:] = 0
    classes[3:8, 5:12, 3:12] = 3
    ids, class_of = cluster_classes(np.zeros((4, *classes.shape), np.float32), classes)
    assert ids.dtype == np.int32 and class_of.dtype == np.uint8 and class_of.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(class_of[ids], classes)
    ids, class_of = cluster_classes(np.zeros((4, *classes.shape)), classes, instance_classes=(2,), min_size=9)
    assert not ids.any() and class_of.tolist() == [0]


def grow_by_loops(ids, allowed, distance, spacing):
    """Every voxel against every voxel of an instance."""
    grown, sources = ids.copy(), np.argwhere(ids)
    for place in np.argwhere((ids == 0) & allowed):
        lengths = np.linalg.norm((sources - place) * spacing, axis=1)
        if lengths.min() <= distance:
            grown[tuple(place)] = ids[tuple(sources[lengths.argmin()])]
    return grown


@pytest.mark.parametrize("spacing, distance", [((1, 1, 1), 2), ((40, 4.1, 4.3), 13), ((8, 9, 30.5), 31)])
def test_growing_equals_loops_over_voxels(spacing, distance):
    """The nearest instance by the true distance, only where allowed, and never over another instance."""
    rng = np.random.default_rng(0)
    ids = np.zeros((5, 9, 11), np.int32)
    ids[1, 2:4, 2:4], ids[3, 6:8, 7:9] = 7, 2
    allowed = rng.random(ids.shape) < 0.7
    before = ids.copy()
    found, expected = grow(ids, allowed, distance, spacing), grow_by_loops(ids, allowed, distance, spacing)
    assert ((found > 0) == (expected > 0)).all() and (found != ids).any()
    ties = found != expected
    assert ties.mean() < 0.02 and (ids == before).all()
    np.testing.assert_array_equal(found[before > 0], before[before > 0])


def test_growing_without_instances_or_distance_changes_nothing():
    """Nothing to grow from, nowhere to grow to."""
    ids = np.zeros((2, 3, 4), np.int32)
    assert not grow(ids, np.ones(ids.shape, bool), 5).any()
    ids[0, 0, 0] = 4
    np.testing.assert_array_equal(grow(ids, np.zeros(ids.shape, bool), 5), ids)
    np.testing.assert_array_equal(grow(ids, np.ones(ids.shape, bool), 0), ids)


def test_growing_along_a_landscape_meets_on_its_ridge():
    """The ridge of a boundary, not the middle between two instances, and no farther than allowed."""
    ids, ridge = np.zeros((1, 3, 13), np.int32), np.zeros((1, 3, 13), np.float32)
    ids[..., 1], ids[..., 11], ridge[..., 8] = 1, 2, 1.0
    found = grow(ids, np.ones(ids.shape, bool), 20, landscape=ridge)
    assert (found[..., :8] == 1).all() and (found[..., 9:] == 2).all() and found.dtype == ids.dtype
    assert not grow(ids, np.ones(ids.shape, bool), 3, landscape=ridge)[..., 5:8].any()
