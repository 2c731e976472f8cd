"""Metrics of masks by case: overlap, distance, lesions found, presence; intervals by patient, rows for a CSV.

A case is a slice [H, W] or a volume [D, H, W].  What each figure is, empty masks included:

dice, iou       mean over the cases whose truth has the class; nothing predicted there is 0
dice_all        mean over all cases: 1 where both masks are empty, 0 where one is
dice_pooled     of all voxels of all cases together
hd95            mm, mean over the cases where both masks have voxels: elsewhere there is no distance.  The
                95th percentile of the distances from each border to the other, the larger of the two
lesion_sensitivity      share of the true components, of all cases, that are found
lesion_false_positives  predicted components that touch no true voxel, per case
precision, recall, f1   of cases, by presence: the class is present in a mask that has a voxel of it
specificity     share of the cases without the class in truth where none is predicted: both masks are empty
accuracy        share of the voxels on the right side of the class

Components hang together by corners too: 8 neighbours in a slice, 26 in a volume.  A figure without a case to
take it from is nan; precision without a prediction is 0 where there was something to find.
"""

import math

import edt
import numpy as np
import torch
from scipy import ndimage

from utils.config import UserError
from utils.distributed import gather, gather_rows
from utils.intervals import draw_units, intervals
from utils.metrics import component_overlap

UNKNOWN = -1                     # of a mask: the voxel never counts
# What is kept of each case and class, of the voxels that are known.
COLUMNS = ("voxels", "true_voxels", "pred_voxels", "both", "lesions", "lesions_found", "components",
           "false_positives", "hd95_mm")

# What each figure means, in the order of the table. "+" = higher is better, "-" = lower is better.
DESCRIPTIONS = {
    "dice": "+ Dice, mean over the cases that have the class",
    "iou": "+ IoU, mean over the cases that have the class",
    "dice_all": "+ Dice, mean over all cases; 1 where both masks are empty",
    "dice_pooled": "+ Dice of all voxels together",
    "hd95": "- mm, 95th percentile of the distances of borders, mean where both masks have voxels",
    "lesion_sensitivity": "+ share of true components found",
    "lesion_false_positives": "- predicted components that touch no truth, per case",
    "precision": "+ share of the cases called present that are",
    "recall": "+ share of the cases with the class where it is predicted",
    "f1": "+ F1 of present against absent, by case",
    "specificity": "+ share of the cases without the class where none is predicted",
    "accuracy": "+ share of voxels on the right side of the class",
}


class MaskMetrics:
    """Figures of all cases so far, on the CPU: exact for any batches and ranks.

    names: of the classes 1, 2, ...; 0 is the background.  threshold: of probabilities, where the network has
    one logit for each class and none for the background.  found_share: a true component is found where more
    than this share of its voxels is predicted; 0: where one voxel is.

    rows float64 [N, classes, COLUMNS]; cases, patients: N words.  A case without a known voxel is left out.
    """

    def __init__(self, names, threshold=0.5, found_share=0.0):
        if not 0 < threshold < 1 or not 0 <= found_share < 1:
            raise UserError(f"mask metrics: threshold = {threshold}, found_share = {found_share}; give "
                            "numbers between 0 and 1")
        self.names, self.threshold, self.found_share = list(names), threshold, found_share
        self.rows = torch.zeros(0, len(self.names), len(COLUMNS), dtype=torch.float64)
        self.cases, self.patients = [], []

    def update(self, logits, masks, spacing, cases, patients):
        """Add cases by their logits [B, C, ...], see ``predict_masks``; the rest as for ``add``."""
        self.add(predict_masks(logits, len(self.names), self.threshold), masks, spacing, cases, patients)

    def add(self, pred, masks, spacing, cases, patients):
        """Add cases by their predicted masks.

        pred, masks: integer tensors or arrays [B, H, W] or [B, D, H, W] of classes, on any device; a voxel of
        which masks says UNKNOWN never counts.  spacing [B, 2 or 3]: mm, in the order of the axes; cases,
        patients: B words.  Raises ValueError for other shapes or classes; no case is then counted.
        """
        pred, masks = (torch.as_tensor(x).detach().cpu().numpy() for x in (pred, masks))
        spacing = torch.as_tensor(spacing).double().cpu().numpy()
        if pred.shape != masks.shape or spacing.shape != (len(masks), masks.ndim - 1) \
                or not len(masks) == len(cases) == len(patients):
            raise ValueError(f"pred {pred.shape}, masks {masks.shape}, spacing {spacing.shape}, {len(cases)} "
                             f"cases, {len(patients)} patients: do not belong together")
        for name, values, least in (("pred", pred, 0), ("masks", masks, UNKNOWN)):
            if values.size and not least <= values.min() <= values.max() <= len(self.names):
                raise ValueError(f"{name} holds classes {values.min()} to {values.max()}, of "
                                 f"{len(self.names)} named ones")
        known = [i for i in range(len(masks)) if (masks[i] != UNKNOWN).any()]
        rows = [[measure(pred[i] == k, masks[i] == k, masks[i] != UNKNOWN, spacing[i], self.found_share)
                 for k in range(1, len(self.names) + 1)] for i in known]
        if rows:
            self.rows = torch.cat([self.rows, torch.tensor(rows, dtype=torch.float64)])
        self.cases += [str(cases[i]) for i in known]
        self.patients += [str(patients[i]) for i in known]

    def reduce(self):
        """Collective: take the cases of all ranks together, once."""
        self.rows = gather_rows(self.rows)
        self.cases, self.patients = (sum(gather(words), []) for words in (self.cases, self.patients))

    def compute(self):
        """Dict of floats as DESCRIPTIONS names them; raises UserError without a case.

        Of several classes the plain name is the mean over those where the figure is defined, and each has
        its own as "dice/<name>".
        """
        figures = self.weigh(torch.zeros(len(self.rows), dtype=torch.int64),
                             torch.ones(1, 1, dtype=torch.float64))
        return {name: values.item() for name, values in figures.items()}

    def bootstrap(self, generator, resamples=1000, units=None, level=0.95):
        """Percentile interval of every figure, over units drawn with replacement, with all their cases.

        generator: torch.Generator; units: a name for each of ``cases``; None: its patient.  Returns dict
        name -> utils.intervals.Interval.
        """
        groups, weights = draw_units(self.patients if units is None else units, resamples, generator)
        return intervals(self.compute(), self.weigh(groups, weights), level)

    def weigh(self, groups, weights):
        """Every figure with each group's cases taken ``weights`` [R, groups] times -> dict of float64 [R].

        groups: int64 [N], the number of each case's group.
        """
        if not len(self.rows):
            raise UserError("no masks to measure; check the masks and the split")
        figures = {}
        for name, parts in fractions(self.rows).items():
            above, below = (weights @ torch.zeros(weights.shape[1], len(self.names), dtype=torch.float64)
                            .index_add_(0, groups, part) for part in parts)             # [R, classes]
            figures[name] = above / below
        figures["precision"] = torch.where(figures["recall"] == 0, 0.0, figures["precision"])
        for name, values in list(figures.items()):
            figures[name] = values.nanmean(1)
            if len(self.names) > 1:
                figures |= {f"{name}/{label}": values[:, k] for k, label in enumerate(self.names)}
        return figures

    def per_case(self):
        """List of dicts, a row for each case and class: case, patient, class, COLUMNS, dice and iou.

        Numbers of voxels and components are int; "both" is left out.  dice and iou are nan where both masks
        are empty and 0 where one is; hd95_mm is nan in both cases.
        """
        rows = []
        for case, patient, by_class in zip(self.cases, self.patients, self.rows.tolist(), strict=True):
            for name, values in zip(self.names, by_class, strict=True):
                row = dict(zip(COLUMNS, map(int, values[:-1]), strict=False))
                both = row.pop("both")
                either = row["true_voxels"] + row["pred_voxels"] - both
                rows.append({"case": case, "patient": patient, "class": name, **row,
                             "dice": 2 * both / (either + both) if either else math.nan,
                             "iou": both / either if either else math.nan, "hd95_mm": values[-1]})
        return rows


def predict_masks(logits, classes, threshold=0.5):
    """Logits [B, C, ...], any float type -> masks int64 [B, ...], 0 = background, on the same device.

    C = classes: one logit for each, probabilities by a sigmoid; the largest above the threshold wins.
    C = classes + 1: a softmax with the background first; the largest wins.  Raises ValueError for another C.
    """
    if logits.ndim < 3 or logits.shape[1] not in (classes, classes + 1):
        raise ValueError(f"logits {tuple(logits.shape)}: not [B, {classes} or {classes + 1}, ...]")
    if logits.shape[1] == classes + 1:
        return logits.argmax(1)
    largest, which = logits.max(1)
    return torch.where(largest > math.log(threshold / (1 - threshold)), which + 1, 0)


def measure(pred, true, known, spacing, found_share):
    """COLUMNS of one class of one case: list of floats.

    pred, true, known: bool [H, W] or [D, H, W]; spacing: mm; found_share: see MaskMetrics.
    """
    pred = pred & known
    found = component_overlap(true, pred) > found_share
    false = component_overlap(pred, true) == 0
    counts = (known, true, pred, pred & true)
    return [*(float(np.count_nonzero(mask)) for mask in counts), float(len(found)), float(found.sum()),
            float(len(false)), float(false.sum()), hausdorff(pred, true, spacing)]


def hausdorff(pred, true, spacing, percentile=95):
    """Distance of two masks by a percentile of the distances of their borders, mm; nan where one is empty.

    pred, true: bool [H, W] or [D, H, W]; spacing: mm, in the order of the axes.  A border is the voxels that
    have a neighbour outside of the mask, by a face; the image's edge and unknown voxels are outside.
    """
    if not pred.any() or not true.any():
        return math.nan
    box = ndimage.find_objects((pred | true).astype(np.uint8))[0]
    borders = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (pred, true)]
    away = [edt.edt(np.ascontiguousarray(~border), anisotropy=tuple(spacing), parallel=1)
            for border in borders]
    return float(max(np.percentile(away[1][borders[0]], percentile),
                     np.percentile(away[0][borders[1]], percentile)))


def fractions(rows):
    """What each figure sums over cases, and the sum it divides by: rows [N, K, COLUMNS] -> two [N, K]."""
    voxels, true, pred, both, lesions, found, _, false, distance = rows.unbind(-1)
    one, has, called = torch.ones_like(true), (true > 0).double(), (pred > 0).double()
    either = true + pred - both
    dice = torch.where(either > 0, 2 * both / (true + pred), 1)
    measured = ~distance.isnan()
    return {"dice": (dice * has, has), "iou": (both / either.clamp(min=1) * has, has),
            "dice_all": (dice, one), "dice_pooled": (2 * both, true + pred),
            "hd95": (distance.nan_to_num(0), measured.double()),
            "lesion_sensitivity": (found, lesions), "lesion_false_positives": (false, one),
            "precision": (has * called, called), "recall": (has * called, has),
            "f1": (2 * has * called, has + called), "specificity": ((1 - has) * (1 - called), 1 - has),
            "accuracy": (voxels - true - pred + 2 * both, voxels)}
