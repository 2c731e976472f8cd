"""Adapted Rand error and variation of information of a volume: ours against scikit-image.

    python benchmarks/instance_metrics.py --n 5

peer    skimage.metrics.adapted_rand_error and variation_of_information, one call each
Ours is all that Contingency.scores gives, section by section; memory is what each allocates beside the
volumes.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.metrics import adapted_rand_error, variation_of_information

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.instance_metrics import Contingency

OBJECTS, SPLIT = 400, 156       # true instances, and those that the prediction splits in two


def volumes(shape, seed=0):
    """(pred, true) uint32: bent cells with background between, and a prediction with faults of each kind."""
    rng = np.random.default_rng(seed)
    low = tuple(-(-side // 4) for side in shape)
    grid = np.stack(np.meshgrid(*map(np.arange, low), indexing="ij")).astype(np.float32)
    for axis in range(3):
        bend = ndimage.gaussian_filter(rng.standard_normal(low), 6)
        grid[axis] += 4 * bend / bend.std()
    seeds = rng.uniform(0, 1, (OBJECTS + SPLIT, 3)) * low
    cells = 1 + cKDTree(seeds).query(grid.reshape(3, -1).T)[1].reshape(low)
    true = np.where(cells > OBJECTS, cells - OBJECTS, cells)
    true[ndimage.maximum_filter(true, 3) != ndimage.minimum_filter(true, 3)] = 0
    pred = np.where(rng.random(low) < 0.002, 0, np.roll(cells, 1, axis=2))

    def enlarged(small):
        for axis in range(3):
            small = small.astype(np.uint32).repeat(4, axis=axis)
        return np.ascontiguousarray(small[tuple(map(slice, shape))])

    return enlarged(pred), enlarged(true)


def ours(pred, true):
    table = Contingency()
    for z in range(len(pred)):
        table.add(pred[z], true[z])
    return table.scores()


def peer(pred, true):
    error, recall, precision = adapted_rand_error(true, pred)          # 0.26 documents the other order
    split, merge = variation_of_information(true, pred, ignore_labels=(0,))
    return {"adapted_rand_error": error, "rand_precision": precision, "rand_recall": recall,
            "voi_split": split, "voi_merge": merge}


def peak_megabytes(function, *volumes):
    """What the call allocates at its peak, in MB."""
    tracemalloc.start()
    function(*volumes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=[100, 1024, 1024],
                        help="voxels (default: %(default)s)")
    args = parser.parse_args()

    pred, true = volumes(args.shape)
    seconds, scores = {ours: [], peer: []}, {}
    for i in range(args.n + 1):                                        # the first round warms up
        for function in (ours, peer) if i % 2 else (peer, ours):
            start = time.perf_counter()
            scores[function] = function(pred, true)
            seconds[function] += [time.perf_counter() - start] if i else []
    for name, value in scores[peer].items():
        assert np.isclose(scores[ours][name], value, rtol=1e-9, atol=1e-9), (name, scores[ours][name], value)
        print(f"{name:>20}  {scores[ours][name]:.9f}  peer {value:.9f}")

    mine, theirs = (statistics.median(seconds[function]) for function in (ours, peer))
    memory, peer_memory = (peak_megabytes(function, pred, true) for function in (ours, peer))
    print(f"{'x'.join(map(str, args.shape))} uint32, {scores[ours]['true_objects']:.0f} true objects, "
          f"{scores[ours]['pred_objects']:.0f} predicted: ours {mine:.2f} s, {memory:.0f} MB; "
          f"peer {theirs:.2f} s, {peer_memory:.0f} MB")
    assert memory < 50, "more than 50 MB beside the volumes"
    print(f"ratio: {theirs / mine:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
