"""Instances out of synthetic embeddings: ours against scikit-learn's HDBSCAN.

    python benchmarks/instances.py --seeds 5

clean   the loss has converged: means 3 apart, little noise, a gap of membrane in the mask
noisy   noise from voxel to voxel of three times the size, means that drift a little along an instance
hard    no gap, values blended over 1.5 voxels, drifting means, correlated noise, means 2 apart
drift   the same, means 2.5 apart, but they drift twice as far

peer    HDBSCAN over as many points, chosen in the same way; then every voxel to the nearest mean, by the same
        code as ours.  "same tail" gives it our whole treatment of pieces too, for the clustering alone.

The seeds are others than those on which the shares in utils/instances.py were chosen (100 and 101).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import cc3d
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.metrics import adapted_rand_error
from sklearn.cluster import HDBSCAN

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import instances
from utils.instance_metrics import Contingency

# least distance of two means, noise per channel, correlated noise, drift, blend (sigma in voxels), dimensions
KINDS = {"clean": (3.0, 0.1, 0.0, 0.0, 0.0, 8), "noisy": (3.0, 0.3, 0.0, 0.2, 0.0, 8),
         "hard": (2.0, 0.1, 0.15, 0.5, 1.5, 6), "drift": (2.5, 0.1, 0.15, 1.0, 1.0, 6)}
WIDTH = 16
MIN_SIZE = 50               # of a true piece in voxels, the default of cluster_embeddings too
MARGIN = 0.005              # by which the adapted Rand error may be above the peer's


def waves(shape, sigma, rng):
    """A smooth random field of mean 0 and standard deviation 1."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigma)
    return field / field.std()


def tissue(shape, count, rng):
    """Instances 1..count that fill the volume, long in depth and bent, and a tenth of them small balls."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)
    for axis in range(3):
        grid[axis] += 6 * waves(shape, 8, rng)
    places = grid.reshape(3, -1).T * np.float32([0.5, 1, 1])
    small = count // 10
    seeds = rng.uniform(0, 1, (count - small, 3)) * shape * [0.5, 1, 1]
    labels = 1 + cKDTree(seeds).query(places)[1].reshape(shape)
    for k in range(count - small, count):
        centre, radius = rng.uniform(8, np.array(shape) - 8), rng.uniform(4, 6)
        far = sum((axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, shape))], centre, strict=True))
        labels[far < radius ** 2] = k + 1
    return labels.astype(np.int32)


def means(count, gap, dimensions, rng):
    """Means [count, WIDTH] at least ``gap`` apart, in a subspace, as densely as they fit."""
    basis = np.linalg.qr(rng.standard_normal((WIDTH, dimensions)))[0]
    chosen, side = [], gap * max(1.2, 0.75 * count ** (1 / dimensions))
    while len(chosen) < count:
        point = basis @ (rng.uniform(-0.5, 0.5, dimensions) * side)
        if all(np.linalg.norm(point - other) >= gap for other in chosen):
            chosen.append(point)
        else:
            side *= 1.001
    return np.float32(chosen)


def synthetic(kind, seed, shape, count):
    """(embedding float32 [WIDTH, D, H, W], mask bool, true int32 ids, 0 where not counted)."""
    rng = np.random.default_rng(seed)
    gap, noise, correlated, drift, blend, dimensions = KINDS[kind]
    true = tissue(shape, count, rng)
    centres = means(count, gap, dimensions, rng)
    heading = rng.standard_normal((count, WIDTH)).astype(np.float32)
    heading *= drift / np.linalg.norm(heading, axis=1, keepdims=True)
    wave = waves(shape, 12, rng)
    embedding = np.empty((WIDTH, *shape), np.float32)
    for channel, centre, slope in zip(embedding, centres.T, heading.T, strict=True):
        channel[...] = centre[true - 1] + slope[true - 1] * wave
        if blend:
            ndimage.gaussian_filter(channel, (blend / 2, blend, blend), output=channel)
        if correlated:
            channel += correlated * waves(shape, 1.5, rng)
        channel += noise * rng.standard_normal(shape, dtype=np.float32)
    mask = np.ones(shape, bool)
    if not blend:
        mask = ndimage.maximum_filter(true, 3) == ndimage.minimum_filter(true, 3)
    pieces = cc3d.connected_components((true * mask).astype(np.uint32), connectivity=6)
    pieces = cc3d.dust(pieces, threshold=MIN_SIZE, connectivity=6).astype(np.int32)
    return embedding, mask if blend else pieces > 0, pieces


def hdbscan_modes(embedding, mask):
    """Means of the clusters that HDBSCAN finds in the points in which ours looks for modes."""
    points = instances.draw_points(embedding, mask, torch.Generator().manual_seed(0))
    labels = torch.from_numpy(HDBSCAN(min_cluster_size=15, copy=True).fit_predict(points.numpy()))
    return torch.stack([points[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


def same_tail(embedding, mask, modes):
    """All that ours does, from other modes."""
    with mock.patch.object(instances, "find_modes", lambda *_: modes):
        return instances.cluster_embeddings(embedding, mask)


def timed(function, *arguments):
    start = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - start


def one_volume(kind, seed, shape, count):
    """(error, seconds, F1) of ours, the peer, and the peer with our tail; and the number of instances."""
    embedding, mask, true = synthetic(kind, seed, shape, count)
    embedding = torch.from_numpy(embedding)
    if seed % 2:
        ours = timed(instances.cluster_embeddings, embedding, mask)
    modes, first = timed(hdbscan_modes, embedding, mask)
    nearest, second = timed(instances.nearest_mode, embedding, mask, modes)
    tail, third = timed(same_tail, embedding, mask, modes)
    if not seed % 2:
        ours = timed(instances.cluster_embeddings, embedding, mask)
    rows = []
    for labels, seconds in (ours, (nearest, first + second), (tail, first + third)):
        error = adapted_rand_error(true, labels.astype(np.int64))[0]
        table = Contingency()
        table.add(labels, true)
        rows.append((error, seconds, table.scores()["instance_f1"]))
    return rows, int(table.scores()["true_objects"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="volumes of each kind (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the volumes (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="(default: all)")
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 160, 160], help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=80, help="instances (default: %(default)s)")
    args = parser.parse_args()

    seconds = []
    print(f"adapted Rand error, seconds, F1 {'ours':>16} {'HDBSCAN, nearest':>26} {'HDBSCAN, same tail':>24}")
    for kind in args.kinds:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            rows, objects = one_volume(kind, seed, tuple(args.shape), args.count)
            cells = "   ".join(f"{error:.4f} {elapsed:6.2f} s {f1:.3f}" for error, elapsed, f1 in rows)
            print(f"{kind}, seed {seed:3}, {objects} instances:  {cells}", flush=True)
            ours, *peers = rows
            for peer in peers:
                assert ours[0] <= peer[0] + MARGIN, f"adapted Rand error {ours[0]:.4f} against {peer[0]:.4f}"
                assert ours[1] < peer[1], f"{ours[1]:.2f} s against {peer[1]:.2f} s"
            seconds.append([row[1] for row in rows])

    mine, theirs, tail = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"ours {mine:.2f} s, HDBSCAN {theirs:.2f} s, same tail {tail:.2f} s ({tail / mine:.2f} of ours)")
    print(f"ratio: {theirs / mine:.2f} (peer / ours, median of {len(seconds)})")


if __name__ == "__main__":
    main()
