"""Instances out of a boundary map and embeddings: watershed fragments, merged where neither sees a membrane.

A boundary map alone leaks through every gap in a membrane and stops at every dark organelle; embeddings alone
tell instances apart that are far from each other, but blend where they touch.  The watershed of the boundary
map therefore cuts too much, and the mean of both over a whole face decides what belongs together.
"""

import heapq
from functools import partial

import cc3d
import edt
import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

from datasets.em_labels import BOUNDARY
from utils.instances import (
    cluster_classes,
    cluster_embeddings,
    find_modes,
    grow,
    nearest_mode,
    vectors_at,
)

LEAST_DEPTH = 0.5            # pixels by which a seed's distance to the boundary rises above its surroundings
REACH = 3                    # pixels on either side of a face between which the embedding is compared
EDGE, STEP = 0.7, 0.6        # weights of the mean boundary probability, and of the mean step in bandwidths
CHUNK = 2 ** 16              # faces handled at once


def segment(probabilities, embedding, instance_classes, use_boundary, bandwidth, min_size, grow_nm,
            spacing_nm):
    """(ids int32 [D, H, W], class of each id uint8 [K + 1]): all instances of one crop or window.

    probabilities: tensor [C, D, H, W] of the classes; embedding: tensor [E, D, H, W]; instance_classes: those
    of which instances are looked for; use_boundary: whether the network knows the class boundary, else the
    embeddings decide alone (cluster_embeddings); grow_nm: how far instances grow into that class.
    """
    classes = probabilities.argmax(0).cpu().numpy()
    find = partial(agglomerate, boundary=probabilities[BOUNDARY]) if use_boundary else cluster_embeddings
    ids, class_of = cluster_classes(embedding.float().cpu(), classes, instance_classes, find,
                                    bandwidth=bandwidth, min_size=min_size, spacing_nm=tuple(spacing_nm))
    return grow(ids, classes == BOUNDARY, grow_nm, tuple(spacing_nm)), class_of


def agglomerate(embedding, mask, boundary, bandwidth=0.5, min_size=50, spacing_nm=None):
    """Instances of the voxels of one mask, by the boundary between them and by their embeddings.

    embedding: float tensor or array [E, D, H, W]; mask: bool [D, H, W]; boundary: probability [D, H, W],
    array or tensor, that a voxel is membrane; bandwidth: delta_v of the loss; min_size: voxels; spacing_nm:
    voxel size (D, H, W), cubes if None.  Returns int32 [D, H, W]: 0 outside the mask, ids 1..K in the order
    of their first voxels, each of min_size voxels at least.

    1. Fragments: the watershed of the boundary map over the mask and what separates it, from the places
       deepest inside (Beucher & Meyer 1993), divided where clusters of the embedding meet.
    2. Fragments that touch are merged, least cost first, while it is below 1 (mean linkage).  The cost is
       0.7 times the mean boundary probability over their faces, plus 0.6 times the length of the mean step
       of the embedding across them, in bandwidths; weights fitted on validation sections.
    3. What stays smaller than min_size goes to its cheapest neighbour, or without one to 0.
    """
    embedding, mask = torch.as_tensor(embedding), np.asarray(mask, dtype=bool)
    boundary = torch.as_tensor(boundary).float().cpu().numpy()
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    spacing = np.ones(3) if spacing_nm is None else np.asarray(spacing_nm) / min(spacing_nm)
    found = fragments(boundary, mask, spacing)
    modes = find_modes(embedding, mask, bandwidth, torch.Generator().manual_seed(0))
    found = divide(found, nearest_mode(embedding, mask, modes), boundary)
    reach = np.maximum(1, np.round(REACH / spacing)).astype(int)
    sizes = np.bincount(found[mask], minlength=int(found.max()) + 1)
    owner = merge(face_sums(found, mask, boundary, embedding, reach), sizes, bandwidth, min_size)
    found = np.where(mask, owner[found], 0)
    kept = np.bincount(found.ravel()) >= min_size
    kept[0] = False
    ids, first = np.unique(found[kept[found]], return_index=True)
    number = np.zeros(len(kept), np.int32)
    number[ids[np.argsort(first)]] = np.arange(1, len(ids) + 1)
    return number[found]


def fragments(boundary, mask, spacing):
    """Watershed basins of ``boundary`` over the mask and the boundary: int32 [D, H, W], 1..K, 0 elsewhere.

    spacing: voxel size D, H, W, the smallest being 1.  Every 6-connected part of the mask has a seed.
    """
    inside = mask & (boundary < 0.5)
    distance = edt.edt(inside, anisotropy=tuple(map(float, spacing)), black_border=False)
    distance[~np.isfinite(distance)] = float(max(mask.shape))                    # nothing but the mask
    distance = ndimage.gaussian_filter(distance, 1 / spacing)
    seeds = h_maxima(np.where(mask, distance, 0), LEAST_DEPTH).astype(bool) & mask
    parts = cc3d.connected_components(mask, connectivity=6, out_dtype=np.uint32)
    seeded = np.zeros(int(parts.max()) + 1, bool)
    seeded[parts[seeds]] = True
    seeds |= mask & ~seeded[parts]
    markers = cc3d.connected_components(seeds, connectivity=26, out_dtype=np.uint32).astype(np.int32)
    return watershed(boundary, markers, mask=mask | (boundary >= 0.5)).astype(np.int32)


def divide(found, clusters, boundary):
    """Fragments int32 [D, H, W] cut where ``clusters`` (0: outside the mask) differ, in 6-connected pieces.

    Voxels of a fragment outside the mask go to a piece inside by the watershed of the boundary.
    """
    pairs = np.where(clusters > 0, found.astype(np.int64) * (int(clusters.max()) + 1) + clusters, 0)
    pieces = cc3d.connected_components(pairs, connectivity=6, out_dtype=np.uint32).astype(np.int32)
    return watershed(boundary, pieces, mask=found > 0).astype(np.int32)


def face_sums(found, mask, boundary, embedding, reach):
    """{(a, b): float64 [E + 3]} of touching ids a < b: sums over their faces of

    the step of the embedding from a to b, ``reach`` voxels (per axis) to either side of the face; the number
    of faces whose two ends lie in a and b, and not both in the membrane, where no instance is; the larger
    boundary probability of the two voxels; and 1.
    """
    total, count = {}, int(found.max()) + 1
    for axis in range(3):
        part = np.moveaxis(found, axis, 0)
        touch = np.moveaxis((part[1:] != part[:-1]) & (part[1:] > 0) & (part[:-1] > 0), 0, axis)
        at = np.flatnonzero(touch)
        for start in range(0, len(at), CHUNK):
            low = np.stack(np.unravel_index(at[start:start + CHUNK], touch.shape))
            high = low.copy()
            high[axis] += 1
            a, b = found[tuple(low)].astype(np.int64), found[tuple(high)].astype(np.int64)
            edge = np.maximum(boundary[tuple(low)], boundary[tuple(high)])
            low[axis] = np.maximum(low[axis] - reach[axis] + 1, 0)
            high[axis] = np.minimum(high[axis] + reach[axis] - 1, found.shape[axis] - 1)
            whole = (found[tuple(low)] == a) & (found[tuple(high)] == b)
            whole &= mask[tuple(low)] | mask[tuple(high)]
            step = (vectors_at(embedding, high) - vectors_at(embedding, low)).numpy().T        # [E, N]
            rows = np.vstack([step * np.where(a < b, whole, -1.0 * whole), whole, edge, np.ones(len(a))])
            keys, back = np.unique(np.minimum(a, b) * count + np.maximum(a, b), return_inverse=True)
            sums = np.stack([np.bincount(back, row, len(keys)) for row in rows], 1)
            for key, values in zip(keys.tolist(), sums, strict=True):
                pair = divmod(key, count)
                total[pair] = total[pair] + values if pair in total else values
    return total


def cost_of(sums, bandwidth):
    """Cost of a merge over faces of these sums; a step that could not be measured counts as one bandwidth."""
    *step, measured, edge, faces = sums
    length = np.linalg.norm(step) / measured / bandwidth if measured else 1.0
    return EDGE * edge / faces + STEP * length


def merge(pairs, sizes, bandwidth, min_size):
    """The id that each id becomes: int [ids].  pairs: of face_sums; sizes: voxels of each id."""
    around, sizes, owner, queue = [{} for _ in sizes], sizes.copy(), np.arange(len(sizes)), []

    def touch(a, b, sums):
        """Set the sums of a pair, the step from a to b, and queue it if it may merge."""
        turned = sums.copy()
        turned[:-3] *= -1
        around[a][b], around[b][a] = sums, turned
        cost = cost_of(sums, bandwidth)
        if cost < 1:
            heapq.heappush(queue, (cost, min(a, b), max(a, b), sums[-1]))

    def join(a, b):
        """b becomes a."""
        owner[owner == b] = a
        sizes[a] += sizes[b]
        del around[a][b], around[b][a]
        for c, sums in around[b].items():
            del around[c][b]
            touch(a, c, sums + around[a].get(c, 0))
        around[b] = {}

    for (a, b), sums in pairs.items():
        touch(a, b, sums)
    while queue:
        _, a, b, faces = heapq.heappop(queue)
        if b in around[a] and around[a][b][-1] == faces:              # else one of them has grown meanwhile
            join(a, b)
    for small in np.argsort(sizes, kind="stable").tolist():
        if 0 < sizes[small] < min_size and owner[small] == small and around[small]:
            nearest = min(around[small], key=lambda b: (cost_of(around[small][b], bandwidth), b))
            join(nearest, small)
    return owner
