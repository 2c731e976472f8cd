"""Sums over the faces between regions, and their merging by cost."""

import itertools

import numpy as np
import pytest
import torch

from utils.regions import Regions, face_sums


@pytest.mark.parametrize("reach", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_sums_over_faces_equal_a_loop(reach, masked):
    """The step, the faces where it is measured, the boundary, the faces: voxel by voxel, id 0 left out."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 4, (4, 5, 6)).repeat(3, 1).repeat(3, 2).astype(np.int32)
    embedding = torch.from_numpy(rng.standard_normal((2, *ids.shape)).astype(np.float32))
    boundary = rng.random(ids.shape).astype(np.float32) if masked else np.zeros(ids.shape, np.float32)
    inside, expected = rng.random(ids.shape) < (0.8 if masked else 2), {}
    for place, axis in itertools.product(np.ndindex(ids.shape), range(3)):
        other = tuple(p + (a == axis) for a, p in enumerate(place))
        if other[axis] == ids.shape[axis] or ids[place] == ids[other] or not ids[place] * ids[other]:
            continue
        low = tuple(max(p - (reach[axis] - 1), 0) if a == axis else p for a, p in enumerate(place))
        high = tuple(min(p + reach[axis] - 1, ids.shape[axis] - 1) if a == axis else p
                     for a, p in enumerate(other))
        whole = ids[low] == ids[place] and ids[high] == ids[other] and (inside[low] or inside[high])
        sign = 1 if ids[place] < ids[other] else -1
        step = (embedding[(..., *high)] - embedding[(..., *low)]).numpy() * sign * whole
        key = tuple(sorted((int(ids[place]), int(ids[other]))))
        row = np.array([*step, whole, max(boundary[place], boundary[other]), 1.0])
        expected[key] = expected.get(key, 0) + row
    sums = face_sums(ids, embedding, np.array(reach), *([boundary, inside] if masked else []))
    assert sums.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_allclose(sums[key], row, rtol=1e-5, atol=1e-5)


def mean_cost(sums):
    """The length of the mean of the signed numbers."""
    return abs(sums[0]) / sums[-1]


def test_merging_equals_a_search_for_the_cheapest_pair():
    """Mean linkage: after each merge all sums are taken anew, and the cheapest pair below 1 is next."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        pairs = {(a, b): np.array([rng.normal(), float(rng.integers(1, 5))])
                 for a, b in itertools.combinations(range(1, 9), 2) if rng.random() < 0.5}
        regions = Regions(pairs, 8, 1, mean_cost)
        regions.merge()
        owner = np.arange(9)
        while True:
            sums = {}
            for (a, b), row in pairs.items():
                low, high = sorted((owner[a], owner[b]))
                if low != high:
                    turned = row * [1 if owner[a] == low else -1, 1]
                    sums[low, high] = sums.get((low, high), 0) + turned
            cheapest = min(sums, key=lambda pair: (mean_cost(sums[pair]), *pair), default=None)
            if cheapest is None or mean_cost(sums[cheapest]) >= 1:
                break
            owner[owner == cheapest[1]] = cheapest[0]
        assert np.array_equal(regions.owner, owner)


def test_what_is_small_goes_to_its_cheapest_neighbour():
    """Whatever the cost; together they may be large enough for the next; without a neighbour it stays."""
    pairs = {(1, 2): np.array([9.0, 1.0]), (2, 3): np.array([5.0, 1.0]), (3, 4): np.array([7.0, 1.0])}
    regions = Regions(pairs, 5, 1, mean_cost)
    regions.merge()
    regions.absorb(np.array([0, 100, 3, 4, 100, 2]), 6)
    assert regions.owner.tolist() == [0, 1, 3, 3, 4, 5]
