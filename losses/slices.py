"""Losses of masks of slices, computed in float32; pixels of which nothing is known do not count.

Logits [B, C, H, W]; masks int64 [B, H, W].  C = 1: one structure, whose pixels are 1 in the mask, against the
rest, 0; its probability is the sigmoid.  C > 1: a pixel's class, 0 = background; probabilities are the
softmax.  In both, -1 = unknown.  Where no pixel is known a loss is zero with a zero gradient, so that every
rank has the same graph.
"""

import torch
import torch.nn.functional as F

from losses.classification import mean_of
from utils.config import UserError


def probabilities(logits):
    """The sigmoid of one channel, the softmax of several: [B, C, H, W]."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def targets(logits, masks):
    """float32 [B, C, H, W] of 0 and 1: what the probabilities should be; unknown pixels are 0 throughout."""
    if logits.shape[1] == 1:
        return (masks > 0)[:, None].float()
    classes = torch.arange(logits.shape[1], device=masks.device)
    return (masks[:, None] == classes[:, None, None]).float()


def dice(logits, masks):
    """1 - (2 sum p y + 1) / (sum p + sum y + 1) over the pixels of each sample and channel -> mean.

    p: probability; y: target.  The ones make an empty mask, found empty, a loss of 0.  The background of
    several classes is a channel like the others.  Samples without a known pixel are left out of the mean.
    Milletari et al. 2016, arXiv:1606.04797, without the squares.
    """
    known = masks >= 0
    p, y = torch.where(known[:, None], probabilities(logits), 0.0), targets(logits, masks)
    overlap, size = (p * y).sum((2, 3)), (p + y).sum((2, 3))                              # [B, C]
    loss = 1 - (2 * overlap + 1) / (size + 1)
    return mean_of(loss.mean(1), known.flatten(1).any(1))


def bce(logits, masks):
    """Binary cross-entropy of each channel's sigmoid, mean over pixels and channels."""
    losses = F.binary_cross_entropy_with_logits(logits, targets(logits, masks), reduction="none")
    return pixel_mean(losses, masks)


def ce(logits, masks, weight=None):
    """Cross-entropy of each pixel's class, mean over pixels; for C = 1 that of background and structure.

    weight [max(C, 2)]: of the classes, background first; the mean is then weighted, the sum of weights below
    the line, as in torch.
    """
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)       # the softmax of 0 and x: sigmoid(x)
    known, classes = masks >= 0, masks.clamp(min=0)
    weights = known.float() if weight is None else weight[classes] * known
    total = weights.sum()
    losses = F.cross_entropy(logits, classes, reduction="none")
    return (losses * weights).sum() / torch.where(total > 0, total, 1.0)


def of_probabilities(loss, logits, masks):
    """torch's l1_loss, mse_loss or smooth_l1_loss of the probabilities, mean over pixels and channels."""
    return pixel_mean(loss(probabilities(logits), targets(logits, masks), reduction="none"), masks)


def pixel_mean(values, masks):
    """Mean of [B, C, H, W] over the pixels that are known."""
    return mean_of(values, (masks >= 0)[:, None].expand_as(values))


PROBABILITY_LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
MASK_LOSSES = ("dice", "bce", "bce_logits", "ce", "nll", "kl", "combined", *PROBABILITY_LOSSES)
WEIGHTED_LOSSES = ("ce", "nll", "kl", "combined")


def mask_loss(word, logits, masks, class_weights=None, dice_weight=0.5):
    """The loss of that name in MASK_LOSSES: a float32 scalar.

    logits [B, C, H, W], any float type; masks int64 [B, H, W], see above.
    Several words are one loss, as all start from logits: "bce_logits" is "bce"; "nll", of the log of the
    softmax, is "ce", and so is "kl", of the mask from the probabilities, as a mask has no entropy.
    "combined": dice_weight * dice + (1 - dice_weight) * ce, whose ce is bce for C = 1.
    class_weights: float [max(C, 2)], background first, for WEIGHTED_LOSSES; dice has none.
    Raises UserError as ``check_mask_loss`` does; ValueError for other shapes.
    """
    check_mask_loss(word, class_weights, max(logits.shape[1], 2), dice_weight)
    if logits.dim() != 4 or (logits.shape[0], *logits.shape[2:]) != masks.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, masks {tuple(masks.shape)}: "
                         "not [B, C, H, W] and [B, H, W]")
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        if word in PROBABILITY_LOSSES:
            return of_probabilities(PROBABILITY_LOSSES[word], logits, masks)
        if word == "dice":
            return dice(logits, masks)
        if word in ("bce", "bce_logits"):
            return bce(logits, masks)
        cross_entropy = ce(logits, masks, None if class_weights is None else class_weights.float())
        if word == "combined":
            return dice_weight * dice(logits, masks) + (1 - dice_weight) * cross_entropy
        return cross_entropy


def check_mask_loss(word, class_weights=None, num_classes=2, dice_weight=0.5):
    """UserError where there is no such loss of masks, or none that takes such weights.

    class_weights: None, or as many numbers as there are classes, the background among them.
    """
    if word not in MASK_LOSSES:
        raise UserError(f'SPINE_LOSS is "{word}"; set it to one of {", ".join(MASK_LOSSES)} in constants.py')
    if not 0 <= dice_weight <= 1:
        raise UserError(f"SPINE_DICE_WEIGHT is {dice_weight}; set it to a share from 0 to 1")
    if class_weights is None:
        return
    if word not in WEIGHTED_LOSSES:
        raise UserError(f'SPINE_CLASS_WEIGHTS: the loss "{word}" takes no class weights; set them to [], or '
                        f"SPINE_LOSS to one of {', '.join(WEIGHTED_LOSSES)}")
    if len(class_weights) != num_classes:
        raise UserError(f"SPINE_CLASS_WEIGHTS has {len(class_weights)} entries, there are {num_classes} "
                        "classes, the background included; give one number for each")
