"""Metrics of signed change maps, summed over pairs and over ranks."""

import math

import cc3d
import numpy as np
import torch
from skimage.metrics import structural_similarity

from utils.distributed import all_reduce_sum

MIN_AREA_SHARE = 0.001      # least area of a component where none is given, of the map's (262 px at 512 px)
FOUND_SHARE = 0.1           # a true component is found where more than this share of it is predicted

# What each figure means, in the order of the table. "+" = higher is better, "-" = lower is better.
DESCRIPTIONS = {
    "dice": "+ Dice, both signs together, mean over changed pairs",
    "iou": "+ IoU, both signs together, mean over changed pairs",
    "dice_pooled": "+ Dice, both signs together, all pixels of all pairs",
    "dice_new": "+ Dice of new findings, mean over pairs that have one",
    "iou_new": "+ IoU of new findings",
    "dice_resolved": "+ Dice of resolved findings, mean over pairs that have one",
    "iou_resolved": "+ IoU of resolved findings",
    "sensitivity": "+ share of true components found",
    "false_components": "- predicted components that touch no truth, per pair",
    "false_area_unchanged": "- share of pixels called changed, pairs without change",
    "mae_inside": "- mean absolute error where the truth is changed",
    "mae_outside": "- mean absolute error elsewhere",
    "ssim": "+ SSIM of the maps, shifted to [0, 1]",
}


class ChangeMetrics:
    """Running metrics of predicted difference maps, exact for any split of the pairs over batches and ranks.

    A pixel is new where the map > threshold and resolved where it < -threshold; a pixel of the wrong sign is
    both missed and false. A pair is changed where its truth has a changed pixel. Dice and IoU are means over
    the pairs whose truth has pixels of the kind in question; what is predicted on the other pairs counts in
    ``dice_pooled``, ``false_components`` and ``false_area_unchanged`` alone.

    Components are 8-connected, of one sign, and of at least ``min_area`` pixels (default: 0.1 % of the map).
    A true one is found where more than 10 % of its pixels are predicted with its sign; a predicted one is
    false where none of its pixels is true with its sign.
    """

    def __init__(self, threshold=0.05, min_area=None):
        self.threshold, self.min_area = threshold, min_area
        # A sum and a count for each metric, so that ranks with unevenly many pairs add exactly.
        self.sums = torch.zeros(len(DESCRIPTIONS), 2, dtype=torch.float64)

    def update(self, pred, target):
        """Add pairs: pred, target [B, 1, H, W] in [-1, 1], H, W >= 11; float tensors or arrays.

        Returns the metrics of each of these pairs by itself, as ``compute`` does of all.
        """
        pred, target = (torch.as_tensor(x).detach().float().cpu() for x in (pred, target))
        if pred.shape != target.shape or pred.ndim != 4 or pred.shape[1] != 1:
            raise ValueError(f"pred {tuple(pred.shape)}, target {tuple(target.shape)}: not both [B, 1, H, W]")
        rows = []
        for p, t in zip(pred[:, 0].numpy(), target[:, 0].numpy(), strict=True):
            figures = self.one_pair(p, t)
            rows.append(torch.tensor([figures[name] for name in DESCRIPTIONS], dtype=torch.float64))
            self.sums += rows[-1]
        return [means_of(row) for row in rows]

    def one_pair(self, pred, target):
        """pred, target [H, W] -> dict of (sum, count) of each figure of this pair."""
        signs = [(pred > self.threshold, target > self.threshold),
                 (pred < -self.threshold, target < -self.threshold)]
        overlaps = np.array([[(p & t).sum(), p.sum(), t.sum()] for p, t in signs])            # [sign, 3]
        both = overlaps.sum(axis=0)
        figures = {"dice_pooled": (2 * both[0], both[1] + both[2]),
                   "false_area_unchanged": (both[1] / pred.size, 1) if both[2] == 0 else (0, 0)}
        for suffix, (hit, predicted, true) in zip(("", "_new", "_resolved"), (both, *overlaps), strict=True):
            figures["dice" + suffix] = (2 * hit / (predicted + true), 1) if true else (0, 0)
            figures["iou" + suffix] = (hit / (predicted + true - hit), 1) if true else (0, 0)

        error, inside = np.abs(pred - target), signs[0][1] | signs[1][1]
        figures["mae_inside"] = (error[inside].sum(dtype=np.float64), inside.sum())
        figures["mae_outside"] = (error[~inside].sum(dtype=np.float64), (~inside).sum())

        floor = least_area(pred.shape, self.min_area)
        shares = [component_overlap(t, p, floor) for p, t in signs]
        figures["sensitivity"] = (sum((x > FOUND_SHARE).sum() for x in shares), sum(map(len, shares)))
        figures["false_components"] = (sum((component_overlap(p, t, floor) == 0).sum() for p, t in signs), 1)

        # Wang et al. 2004, with their window: a Gaussian of sigma 1.5, 11 pixels wide.
        figures["ssim"] = (structural_similarity((pred + 1) / 2, (target + 1) / 2, data_range=1.0, sigma=1.5,
                                                 gaussian_weights=True, use_sample_covariance=False), 1)
        return figures

    def reduce(self):
        """Collective: take the sums of all ranks together, once."""
        self.sums = all_reduce_sum(self.sums)

    def compute(self):
        """Flat dict of floats, one for each name in DESCRIPTIONS; nan where no pair could be counted."""
        return means_of(self.sums)


def means_of(sums):
    """sums [F, 2] (sum, count) -> dict of floats by name; nan where the count is zero."""
    return {name: total / count if count else math.nan
            for name, (total, count) in zip(DESCRIPTIONS, sums.tolist(), strict=True)}


def least_area(shape, min_area=None):
    """Least area of a component in pixels: min_area itself, or 0.1 % of an image of this shape."""
    return max(1, round(MIN_AREA_SHARE * math.prod(shape))) if min_area is None else min_area


def component_overlap(mask, other, min_area=1):
    """Share of each component of ``mask`` that ``other`` covers.

    mask, other: bool [H, W] or [D, H, W] -> float [K], the K components of at least min_area voxels, in no
    set order.  They hang together by corners too: 8 neighbours in a plane, 26 in a volume.
    """
    labels = cc3d.connected_components(mask.astype(np.uint8), connectivity=26)
    area = np.bincount(labels.ravel())
    covered = np.bincount(labels[other], minlength=len(area))
    large = area >= min_area
    large[0] = False                                        # label 0 is the background
    return covered[large] / area[large]


def list_changes(diff, threshold, min_area):
    """Every 8-connected component of one sign of at least min_area pixels in a map [H, W], largest first.

    Returns a list of dicts: component (1, 2, ...), sign ("new" | "resolved"), area_px, area_fraction (of the
    map), centroid_row, centroid_column (pixels from the top left one), mean (of the map inside).
    """
    rows = []
    for sign, changed in (("new", diff > threshold), ("resolved", diff < -threshold)):
        labels = cc3d.connected_components(changed.astype(np.uint8), connectivity=8)
        statistics = cc3d.statistics(labels)
        sums = np.bincount(labels.ravel(), weights=diff.ravel())
        for label, area in enumerate(statistics["voxel_counts"].tolist()):
            if label > 0 and area >= min_area:
                row, column = statistics["centroids"][label].tolist()
                rows.append({"sign": sign, "area_px": area, "area_fraction": area / diff.size,
                             "centroid_row": row, "centroid_column": column,
                             "mean": float(sums[label]) / area})
    rows.sort(key=lambda row: -row["area_px"])
    return [{"component": i, **row} for i, row in enumerate(rows, 1)]
