"""Instances out of embeddings: clusters over the volume, then a local look at where their pieces touch.

The discriminative loss (De Brabandere et al. 2017, arXiv:1708.02551) pulls the voxels of an instance within
delta_v of their mean and pushes the means 2 delta_d apart.  A real network does so in part: its values blend
across membranes, drift along large instances, and some neighbours stay near.  So clusters are only a start;
what the embedding does across the faces between their connected pieces decides which are instances.
"""

import itertools

import cc3d
import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import watershed

from utils.regions import Regions, face_sums, vectors_at

POINTS = 20_000              # voxels in which clusters are looked for
CANDIDATES = 3 * POINTS      # drawn for them: those are taken whose neighbours differ the least
BALL = 3.0                   # radius of a cluster, in bandwidths: half the distance of two means in training
LEAST_POINTS = 5             # fewer in a ball are no cluster
SHIFTS = 5                   # mean-shift steps of all modes
SAME_MODE = 0.5              # modes nearer than this many bandwidths are one
THIN = 0.2                   # a piece with a smaller share of inner voxels is a blend of its neighbours
REACH = 3                    # voxels on either side of a face between which the embedding is compared
SAME_INSTANCE = 2.0          # pieces whose mean step across their face is less, in bandwidths, are one
LEAST_FACES = 10             # a mean over fewer faces says nothing
CHUNK = 2 ** 18              # voxels handled at once
SCORES = 2 ** 22             # ... and scores, one for each voxel and mode


def cluster_embeddings(embedding, mask, bandwidth=0.5, min_size=50, seed=0, spacing_nm=None):
    """Instances of the voxels of one mask.

    embedding: float array or tensor [E, D, H, W] of any strides, E and D may be 1; mask: bool [D, H, W];
    bandwidth: delta_v of the loss; min_size: voxels; spacing_nm: voxel size (D, H, W), cubes if None.
    Returns int32 [D, H, W], 0 outside the mask, each id of 1..K one 6-connected piece of at least min_size
    voxels.  Smaller pieces go to the neighbours that are most alike; without neighbours (in an island of the
    mask that is smaller altogether) to 0.  The same input and seed give the same ids.

    1. Modes: greedy balls over POINTS voxels whose neighbours are alike, then mean-shift (Comaniciu & Meer
       2002, IEEE TPAMI 24) with a Gaussian of the bandwidth.
    2. Every voxel goes to the nearest mode; the clusters fall into 6-connected pieces.
    3. Small pieces, then thin ones (where the blend of two instances passes by the mode of a third), are
       handed voxel by voxel to the pieces around them.
    4. Pieces are merged, least mean step across their shared face first, while it is under SAME_INSTANCE.

    Raises ValueError for other shapes or values that are not finite.
    """
    embedding, mask = torch.as_tensor(embedding), np.asarray(mask, dtype=bool)
    if embedding.ndim != 4 or embedding.shape[1:] != mask.shape:
        raise ValueError(f"embedding {tuple(embedding.shape)} is not [E, D, H, W] of the mask {mask.shape}")
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    spacing = np.ones(3) if spacing_nm is None else np.asarray(spacing_nm) / min(spacing_nm)
    modes = find_modes(embedding, mask, bandwidth, torch.Generator().manual_seed(seed))
    clusters = nearest_mode(embedding, mask, modes)
    pieces, count = cc3d.connected_components(clusters, connectivity=6, return_N=True, out_dtype=np.uint32)
    pieces, centre = pieces.view(np.int32), np.zeros(count + 1, np.int64)
    centre[pieces] = clusters                                    # one value in all voxels of a piece
    centres = modes[centre - 1]
    del clusters
    pieces = hand_over(pieces, large_pieces(pieces, mask, min_size), embedding, centres)
    pieces = hand_over(pieces, inner_share(pieces, spacing) >= THIN, embedding, centres)
    reach = np.maximum(1, np.round(REACH / spacing)).astype(int)
    pieces = merge_alike(pieces, embedding, reach, SAME_INSTANCE * bandwidth)
    kept = np.bincount(pieces.ravel()) >= min_size
    kept[0] = False
    return np.where(kept, kept.cumsum(), 0).astype(np.int32)[pieces]


def cluster_classes(embedding, classes, instance_classes=(1, 2, 3), find=cluster_embeddings, **options):
    """Instances of each class by itself: neurons cluster with neurons only.

    embedding [E, D, H, W] and options as ``find`` takes them; classes: int [D, H, W].
    Returns (ids int32 [D, H, W], 1..K over all classes; class of each id uint8 [K + 1], 0 for id 0).
    """
    classes = np.asarray(classes)
    ids, class_of = np.zeros(classes.shape, np.int32), [0]
    for word in instance_classes:
        found = find(embedding, classes == word, **options)
        np.add(found, len(class_of) - 1, out=ids, where=found > 0)
        class_of += [word] * int(found.max(initial=0))
    return ids, np.array(class_of, np.uint8)


def grow(ids, allowed, distance_nm, spacing_nm=(1.0, 1.0, 1.0), landscape=None):
    """Let instances grow into voxels of no instance, such as the boundary between them.

    ids: int [D, H, W], 0 = none; allowed: bool [D, H, W]; distance_nm: how far by the straight line, in the
    unit of spacing_nm (voxels with the default).  A voxel takes the nearest id; with ``landscape``, such as
    the probability [D, H, W] of a boundary, the one whose watershed reaches it.  Returns a copy.
    """
    ids = np.asarray(ids)
    empty = ids == 0
    if empty.all():
        return ids.copy()
    distance, nearest = ndimage.distance_transform_edt(empty, sampling=spacing_nm, return_indices=True)
    taken = empty & allowed & (distance <= distance_nm)
    if landscape is not None:
        return watershed(landscape, ids, mask=~empty | taken).astype(ids.dtype)
    grown = ids.copy()
    grown[taken] = ids[tuple(axis[taken] for axis in nearest)]
    return grown


def find_modes(embedding, mask, bandwidth, generator):
    """Centres float32 [K, E], K >= 1, of the clusters of the masked voxels."""
    points = draw_points(embedding, mask, generator)
    modes = greedy_balls(points, BALL * bandwidth)
    for _ in range(SHIFTS):
        weight = kernel(modes, points, bandwidth)                                             # [K, N]
        modes = weight @ points / weight.sum(1, keepdim=True).clamp(min=1e-30)
    # Densest first, so that of two modes of one cluster the better one stays.
    modes = modes[kernel(modes, points, bandwidth).sum(1).argsort(descending=True, stable=True)]
    near = torch.cdist(modes, modes) < SAME_MODE * bandwidth
    kept = []
    for i in range(len(modes)):
        kept += [] if near[i, kept].any() else [i]
    return modes[kept]


def draw_points(embedding, mask, generator):
    """Vectors float32 [P, E] of at most POINTS masked voxels, those that differ least from their neighbours.

    In random order; each is the mean of itself and its masked neighbours, against noise.
    """
    flat = np.flatnonzero(mask)
    if len(flat) > CANDIDATES:
        flat = flat[torch.randint(len(flat), (CANDIDATES,), generator=generator).unique().numpy()]
    places = np.stack(np.unravel_index(flat, mask.shape))
    own = vectors_at(embedding, places)
    if not own.isfinite().all():
        raise ValueError("the embedding holds values that are not finite")
    total, step = own.clone(), torch.zeros(len(own))
    for axis, side in itertools.product(range(3), (-1, 1)):
        beside = places.copy()
        beside[axis] = np.clip(beside[axis] + side, 0, mask.shape[axis] - 1)
        inside = torch.from_numpy(mask[tuple(beside)])
        other = torch.where(inside[:, None], vectors_at(embedding, beside), own)
        step = torch.maximum(step, (other - own).norm(dim=1))
        total += other                                           # without a neighbour the voxel itself again
    points = total[step.argsort(stable=True)[:POINTS]] / 7
    return points[torch.randperm(len(points), generator=generator)]


def greedy_balls(points, radius):
    """Means float32 [K, E] of balls around the points [N, E], one by one, each of the points still left."""
    modes, left = [], points
    while len(left):
        centre = left[0]
        for _ in range(3):
            inside = (left - centre).norm(dim=1) <= radius
            centre = left[inside].mean(0) if inside.any() else centre
        inside = (left - centre).norm(dim=1) <= radius
        inside[0] = True
        modes += [centre] if inside.sum() >= LEAST_POINTS else []
        left = left[~inside]
    return torch.stack(modes) if modes else points.mean(0, keepdim=True)


def kernel(modes, points, bandwidth):
    """Gaussian weights [K, N] of points [N, E] around modes [K, E]."""
    return torch.exp(-torch.cdist(modes, points).square() / (2 * bandwidth ** 2))


def nearest_mode(embedding, mask, modes):
    """1 + the number of the nearest mode of each masked voxel, 0 elsewhere: uint32 [D, H, W]."""
    clusters = np.zeros(mask.shape, np.uint32)
    modes = modes.to(embedding.device)
    half_square = -modes.square().sum(1) / 2
    rows = max(1, SCORES // (len(modes) * mask.shape[2]))
    for z in range(mask.shape[0]):
        for y in range(0, mask.shape[1], rows):
            part = mask[z, y:y + rows]
            inside = torch.from_numpy(part).to(embedding.device)
            vectors = embedding[:, z, y:y + rows][:, inside].T.float()                        # [N, E]
            # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2): the nearest centre has the largest bracket.
            best, mode = torch.addmm(half_square, vectors, modes.T).max(1)
            if not best.isfinite().all():
                raise ValueError("the embedding holds values that are not finite")
            clusters[z, y:y + rows][part] = 1 + mode.cpu().numpy()
    return clusters


def large_pieces(pieces, mask, min_size):
    """Which ids have min_size voxels at least, or are the largest of their island of the mask: bool [ids]."""
    size = np.bincount(pieces.ravel())
    islands = cc3d.connected_components(mask, connectivity=6, out_dtype=np.uint32)
    island = np.zeros(len(size), np.int64)
    island[pieces] = islands
    by_size = np.argsort(size, kind="stable")
    largest = np.zeros(len(size), np.int64)
    largest[island[by_size]] = by_size                           # the last one written is the largest
    return (size >= min_size) | np.isin(np.arange(len(size)), largest)


def inner_share(pieces, spacing):
    """Share of the voxels of each id whose neighbours are all of that id: float [K + 1].

    Neighbours on other sections count only where sections lie within twice the pixel.
    """
    inner = pieces > 0
    for axis in range(3):
        if spacing[axis] <= 2:
            part, inside = np.moveaxis(pieces, axis, 0), np.moveaxis(inner, axis, 0)
            same = part[1:] == part[:-1]
            inside[1:] &= same
            inside[:-1] &= same
    size = np.bincount(pieces.ravel())
    return np.bincount(pieces[inner], minlength=len(size)) / np.maximum(size, 1)


def hand_over(pieces, keep, embedding, centres):
    """Give the voxels of all ids but those to ``keep`` to the kept pieces around them, front by front.

    pieces: int32 [D, H, W]; keep: bool [ids]; centres: float32 [ids, E].  Of the kept pieces beside a voxel
    that of the nearest centre takes it.  A piece that no front reaches stays as it is.
    """
    grown = np.pad(np.where(keep[pieces], pieces, 0), 1)
    places = np.stack(np.nonzero((pieces > 0) & ~keep[pieces]))                               # [3, N]
    strides = np.array([grown.shape[1] * grown.shape[2], grown.shape[2], 1])
    index, flat = strides @ (places + 1), grown.reshape(-1)
    while len(index):
        front, taken = np.zeros(len(index), bool), np.zeros(len(index), np.int32)
        for start in range(0, len(index), CHUNK):
            part = index[start:start + CHUNK]
            beside = np.stack([flat[part + side * stride] for stride in strides for side in (-1, 1)])
            near = np.flatnonzero(beside.any(axis=0))
            vectors, beside = vectors_at(embedding, places[:, start + near]), beside[:, near]
            far = np.stack([(vectors - centres[one]).square().sum(1).numpy() for one in beside])
            choice = np.where(beside > 0, far, np.inf).argmin(axis=0)
            front[start + near], taken[start + near] = True, beside[choice, np.arange(len(near))]
        if not front.any():
            break
        flat[index[front]] = taken[front]
        index, places = index[~front], places[:, ~front]
    flat[index] = pieces[tuple(places)]
    return grown[1:-1, 1:-1, 1:-1]


def merge_alike(pieces, embedding, reach, threshold):
    """Merge touching pieces, least mean step first, while a step is under the threshold.

    The step of a face is the difference of the embeddings ``reach`` voxels (per axis) to either side of it,
    a vector from one piece to the other: in its mean over their faces noise cancels, a membrane does not.
    Pieces that merge add their faces up, so one weak spot between two instances is outvoted by the rest.
    """
    def cost(sums):
        *step, measured, _, _ = sums
        length = np.linalg.norm(step) / measured if measured >= LEAST_FACES else np.inf
        return length / threshold if length < threshold else np.inf

    regions = Regions(face_sums(pieces, embedding, reach), int(pieces.max()), len(embedding), cost)
    regions.merge()
    return regions.owner.astype(np.int32)[pieces]
