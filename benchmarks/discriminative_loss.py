"""Discriminative loss, forward and backward, with and without weights: ours against a loop over instances.

    python benchmarks/discriminative_loss.py --n 3

ours    losses/discriminative.py, weights by datasets/em_labels.py
peer    the formulas as they are read: for each instance its mask, its centre, its pull, and for the weights
        one scipy distance transform; boundaries by a pair of max pools

2 samples of 32 x 128 x 128 voxels with 60 instances each, 16 channels, float32.  First the weights, the loss
and its gradient must agree.  With weights, their computation is timed too.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.em_labels import instance_weights
from losses.discriminative import discriminative_loss

SAMPLES, FEATURES, SHAPE, INSTANCES = 2, 16, (32, 128, 128), 60
SPACING_NM, EDGE, BONE = (8.0, 8.0, 8.0), 10.0, 10.0
DELTA_V, DELTA_D, NORM = 0.5, 1.5, 0.001


def draw_instances(rng):
    """int32 [D, H, W]: the cells around 60 random points, 0 where two are about equally near."""
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).reshape(-1, 3)
    distance, nearest = cKDTree(rng.uniform(0, SHAPE, (INSTANCES, 3))).query(voxels, k=2)
    cells = np.where(distance[:, 1] - distance[:, 0] > 1, nearest[:, 0] + 1, 0)
    return cells.reshape(SHAPE).astype(np.int32)


def our_weights(instances):
    return torch.from_numpy(np.stack([instance_weights(x, SPACING_NM, EDGE, BONE) for x in instances]))


def our_loss(embedding, instances, weight):
    terms = discriminative_loss(embedding, torch.from_numpy(instances), weight, None, DELTA_V, DELTA_D)
    return terms["pull"] + terms["push"] + NORM * terms["norm"]


def peer_weights(instances):
    ids = torch.from_numpy(instances)[:, None].float()
    border = F.max_pool3d(ids, 3, 1, 1) != -F.max_pool3d(-ids, 3, 1, 1)                # [B, 1, D, H, W]
    weight = np.ones(instances.shape, np.float32)
    for sample, own_weight, own_border in zip(instances, weight, border[:, 0].numpy(), strict=True):
        for i in np.unique(sample[sample > 0]):
            mask = sample == i
            distance = distance_transform_edt(mask, sampling=SPACING_NM)
            bone = 1 + (BONE - 1) * distance / distance.max()
            own_weight[mask] = (np.where(own_border, EDGE, 1) * bone)[mask]
    return torch.from_numpy(weight)


def peer_loss(embedding, instances, weight):
    losses = []
    for i, sample in enumerate(torch.from_numpy(instances)):
        centres, pulls = [], []
        for instance in sample[sample > 0].unique():
            mask = sample == instance
            e = embedding[i][:, mask]                                                  # [E, n]
            w = torch.ones(e.shape[1]) if weight is None else weight[i][mask]
            centre = (w * e).sum(1) / w.sum()
            excess = F.relu((e - centre[:, None]).norm(dim=0) - DELTA_V)
            pulls.append((w * excess ** 2).sum() / w.sum())
            centres.append(centre)
        centres = torch.stack(centres)
        push = F.relu(2 * DELTA_D - torch.pdist(centres)).square().mean()
        losses.append(torch.stack(pulls).mean() + push + NORM * centres.norm(dim=1).mean())
    return torch.stack(losses).mean()


def step(weights, loss, embedding, instances):
    """(seconds, loss, gradient); weights: a function of the instances, or None."""
    embedding.grad = None
    start = time.perf_counter()
    value = loss(embedding, instances, weights(instances) if weights else None)
    value.backward()
    return time.perf_counter() - start, value.item(), embedding.grad


def check_equal(ours, peer, name):
    """Loss and gradient (norm of the difference) of two steps agree to 1e-5 relative."""
    loss = abs(ours[1] - peer[1]) / abs(peer[1])
    gradient = ((ours[2] - peer[2]).norm() / peer[2].norm()).item()
    print(f"{name}: relative error of the loss {loss:.1e}, of the gradient {gradient:.1e}", flush=True)
    assert loss < 1e-5 and gradient < 1e-5, (loss, gradient)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3, help="timed rounds (default: %(default)s)")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    instances = np.stack([draw_instances(rng) for _ in range(SAMPLES)])
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(SAMPLES, FEATURES, *SHAPE, generator=generator).requires_grad_()
    torch.testing.assert_close(our_weights(instances), peer_weights(instances), rtol=1e-6, atol=0)

    calls = {"without weights": ((None, our_loss), (None, peer_loss)),
             "with weights": ((our_weights, our_loss), (peer_weights, peer_loss))}
    for name, (ours, peer) in calls.items():
        check_equal(step(*ours, embedding, instances), step(*peer, embedding, instances), name)

    for name, pair in calls.items():
        rounds = []
        for i in range(args.n):
            order = (0, 1) if i % 2 else (1, 0)
            seconds = {side: step(*pair[side], embedding, instances)[0] for side in order}
            rounds.append((seconds[0], seconds[1]))
        mine, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"{name}: ours {mine:.3f} s, peer {theirs:.2f} s, {ratio:.1f} times", flush=True)
    print(f"ratio: {ratio:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
