"""Instances out of a boundary map and embeddings: watershed fragments, merged where neither sees a membrane.

A boundary map alone leaks through every gap in a membrane and stops at every dark organelle; embeddings alone
tell instances apart that are far from each other, but blend where they touch.  The watershed of the boundary
map therefore cuts too much, and the mean of both over a whole face decides what belongs together.
"""

from functools import partial

import cc3d
import edt
import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

from datasets.em_labels import BOUNDARY
from utils.instances import cluster_classes, cluster_embeddings, grow
from utils.regions import Regions, face_sums

THICK = 2.0                  # pixels between sections from which fragments are of one section each
LEAST_DEPTH = 0.5            # pixels by which a seed's distance to the boundary rises above its surroundings
REACH = 3                    # pixels on either side of a face between which the embedding is compared
EDGE, STEP = 0.8, 0.4        # weights of the mean boundary probability, and of the mean step in bandwidths
WALL = 0.65                  # mean boundary probability from which no embedding makes two fragments one


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
    landscape = probabilities[BOUNDARY].float().cpu().numpy() if use_boundary else None
    return grow(ids, classes == BOUNDARY, grow_nm, tuple(spacing_nm), landscape), class_of


def agglomerate(embedding, mask, boundary, bandwidth=0.5, min_size=50, spacing_nm=None):
    """Instances of the voxels of one mask, by the boundary between them and by their embeddings.

    embedding: float tensor or array [E, D, H, W]; mask: bool [D, H, W]; boundary: probability [D, H, W],
    array or tensor, that a voxel is membrane; bandwidth: delta_v of the loss; min_size: voxels; spacing_nm:
    voxel size (D, H, W), cubes if None.  Returns int32 [D, H, W]: 0 outside the mask, ids 1..K in the order
    of their first voxels, each of min_size voxels at least.

    1. Fragments: the watershed of the boundary map over the mask and what separates it, from the places
       deepest inside (Beucher & Meyer 1993).
    2. Fragments that touch are merged, least cost first, while it is below 1 (mean linkage).  The cost is
       EDGE times the mean boundary probability over their faces, plus STEP times the length of the mean step
       of the embedding across them, in bandwidths; a mean boundary of WALL is a membrane, whatever the
       embedding says.  The three were chosen on validation sections.
    3. What stays smaller than min_size goes to its cheapest neighbour, or without one to 0.
    """
    embedding, mask = torch.as_tensor(embedding), np.asarray(mask, dtype=bool)
    boundary = torch.as_tensor(boundary).float().cpu().numpy()
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    spacing = np.ones(3) if spacing_nm is None else np.asarray(spacing_nm) / min(spacing_nm)
    found = fragments(boundary, mask, spacing)
    reach = np.maximum(1, np.round(REACH / spacing)).astype(int)
    regions = Regions(face_sums(found, embedding, reach, boundary, mask), int(found.max()), len(embedding),
                      partial(cost_of, bandwidth=bandwidth))
    regions.merge()
    regions.absorb(np.bincount(found[mask], minlength=len(regions.owner)), min_size)
    found = np.where(mask, regions.owner[found], 0)
    kept = np.bincount(found.ravel()) >= min_size
    kept[0] = False
    ids, first = np.unique(found[kept[found]], return_index=True)
    number = np.zeros(len(kept), np.int32)
    number[ids[np.argsort(first)]] = np.arange(1, len(ids) + 1)
    return number[found]


def fragments(boundary, mask, spacing):
    """Watershed basins of ``boundary`` over the mask and the boundary: int32 [D, H, W], 1..K, 0 elsewhere.

    spacing: voxel size D, H, W, the smallest being 1.  Every 6-connected part of the mask has a seed.  Where
    sections are THICK pixels apart, each has basins of its own, over the mask alone: there a membrane that
    runs aslant is missing from section to section, and one such place would make two cells one.
    """
    if len(mask) == 1 or spacing[0] < THICK:
        return basins(boundary, mask, spacing)
    found, count = np.zeros(mask.shape, np.int32), 0
    for z in range(len(mask)):
        part = basins(boundary[z:z + 1], mask[z:z + 1], spacing)[0]
        found[z] = np.where(mask[z], part + count, 0)         # faces of membranes say nothing
        count = max(count, int(found[z].max()))
    return found


def basins(boundary, mask, spacing):
    """Those of one block; arguments as those of fragments."""
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


def cost_of(sums, bandwidth):
    """Cost of a merge over faces of these sums; a step that could not be measured counts as one bandwidth."""
    *step, measured, edge, faces = sums
    length = np.linalg.norm(step) / measured / bandwidth if measured else 1.0
    return max(EDGE * edge / faces + STEP * length, edge / faces / WALL)
