"""Losses of classification, computed in float32.

``classification_loss`` is for studies: labels that are missing (NaN) do not count.  Each loss is a mean over
the labels that are there.  Where none is, it is zero with a zero gradient, so that every rank has the same
graph.

``photo_loss`` is for photographs: soft targets [B, C], each row a distribution over the classes, as MixUp and
CutMix make them (a plain label is one-hot).  Each loss is a mean over the B images, weighted or not: as a sum
of weights below the line would change from batch to batch, a rare class would lose its weight where it is
alone in its batch.
"""

import math

import torch
import torch.nn.functional as F

from utils.config import UserError


def bce(logits, labels, weight=None):
    """Binary cross-entropy of each label: logits [B, L], labels 0, 1 or between -> mean.

    weight [L]: factor of the positive term of each label.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), pos_weight=weight,
                                                reduction="none")
    return mean_of(losses, ~labels.isnan())


def ce(logits, labels, weight=None):
    """Cross-entropy of one class of C: logits [B, C], labels [B, 1] the class's index -> mean.

    weight [C]: of each class; the mean is then weighted, the sum of weights below the line, as in torch.
    """
    present = ~labels[:, 0].isnan()
    classes = labels[:, 0].nan_to_num(0.0).long()
    weights = present.float() if weight is None else weight[classes] * present
    losses = torch.where(present, F.cross_entropy(logits, classes, reduction="none"), 0.0)
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, 1.0)


def mse(predictions, labels):
    """Mean squared error: predictions, labels [B, L]."""
    return mean_of((predictions - labels.nan_to_num(0.0)).square(), ~labels.isnan())


def mae(predictions, labels):
    """Mean absolute error: predictions, labels [B, L]."""
    return mean_of((predictions - labels.nan_to_num(0.0)).abs(), ~labels.isnan())


def rmse(predictions, labels):
    """Root of the mean squared error of each output over the batch, then the mean over outputs with labels.

    predictions, labels [B, L].  The slope of the root is bounded, and zero at a zero error.
    """
    present = ~labels.isnan()
    error = torch.where(present, predictions - labels.nan_to_num(0.0), 0.0)
    counts = present.sum(0)                                                               # [L]
    roots = torch.linalg.vector_norm(error, dim=0) / counts.clamp(min=1).sqrt()
    return mean_of(roots, counts > 0)


LOSSES = {"bce": bce, "ce": ce, "mse": mse, "mae": mae, "rmse": rmse}


def classification_loss(word, logits, labels, weight=None):
    """The loss of that name in LOSSES: a float32 scalar.

    logits [B, L], or [B, C] for "ce", any float type; for "mse", "mae" and "rmse" they are the predictions
    themselves.  labels float32 [B, L], or [B, 1] for "ce"; NaN = missing.  weight: as
    ``Labels.balanced_weights`` gives it.  Raises UserError for another word, and for a weight to a loss other
    than "bce" and "ce".
    """
    check(word, weighted=weight is not None)
    weights = () if weight is None else (weight.float(),)
    return LOSSES[word](logits.float(), labels.float(), *weights)


def check(word, weighted):
    """UserError where there is no loss of that name, or none that takes weights."""
    if word not in LOSSES:
        raise UserError(f'the loss is "{word}"; set it to one of {", ".join(LOSSES)} in constants.py')
    if weighted and word not in ("bce", "ce"):
        raise UserError(f'the loss "{word}" takes no class weights; switch them off in constants.py, '
                        f'or use "bce" or "ce"')


def mean_of(values, present):
    """Mean of the values where ``present`` (bool, same shape, True = counts); zero where there is none."""
    return torch.where(present, values, 0.0).sum() / present.sum().clamp(min=1)


# ---------------------------------------------------------------- photographs

def soft_cross_entropy(logits, targets, weight=None, label_smoothing=0.0):
    """-sum_c w_c t_c log p_c, mean over images: logits, targets [B, C], weight [C] or None -> scalar.

    label_smoothing in [0, 1): this share of each target is spread evenly over all classes, then weighted.
    Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    weight = None if weight is None else weight.float()
    return F.cross_entropy(logits.float(), targets.float(), weight, label_smoothing=label_smoothing)


def focal(logits, targets, weight=None, gamma=2.0):
    """-sum_c w_c t_c (1 - p_c)^gamma log p_c, mean over images; at gamma 0 it is soft_cross_entropy.

    Lin et al. 2017, arXiv:1708.02002, eq. 5, for a softmax of C classes: each class of a soft target is
    attenuated by its own p, so that the loss of a mixture of targets is the mixture of their losses.  p is
    the network's probability whatever the weights, which take the place of alpha: the same alpha for every
    class would only scale the loss.
    """
    log_p = logits.float().log_softmax(1)
    # At p = 1 the root's slope (gamma < 1) is infinite; the least positive number cuts it off.
    rest = (-log_p.expm1()).clamp(min=torch.finfo(torch.float32).tiny)                    # 1 - p
    terms = targets.float() * rest ** gamma * -log_p                                      # [B, C]
    if weight is not None:
        terms = terms * weight.float()
    return terms.sum(1).mean()


def combined(logits, targets, weight=None, gamma=2.0, label_smoothing=0.0):
    """Half the focal loss of the targets and half the cross-entropy of the smoothed targets."""
    return (focal(logits, targets, weight, gamma)
            + soft_cross_entropy(logits, targets, weight, label_smoothing)) / 2


PHOTO_LOSSES = ("ce", "focal", "combined")


def photo_loss(word, logits, targets, weight=None, gamma=2.0, label_smoothing=0.0):
    """The loss of that name in PHOTO_LOSSES: a float32 scalar.

    logits [B, C], any float type; targets [B, C], rows that sum to 1; weight [C] of the classes or None.
    "ce" is soft_cross_entropy, without gamma; "focal" is without smoothing; "combined" takes both.
    Raises UserError for another word, a gamma below 0 and a smoothing outside [0, 1); ValueError for other
    shapes.
    """
    check_photo_loss(word, gamma, label_smoothing)
    if logits.shape != targets.shape or logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: not both [B, C]")
    if word == "ce":
        return soft_cross_entropy(logits, targets, weight, label_smoothing)
    if word == "focal":
        return focal(logits, targets, weight, gamma)
    return combined(logits, targets, weight, gamma, label_smoothing)


def check_photo_loss(word, gamma, label_smoothing):
    """UserError where ``photo_loss`` would raise one; for scripts, before the data are read."""
    if word not in PHOTO_LOSSES:
        raise UserError(f'HVIT_LOSS is "{word}"; set it to one of {", ".join(PHOTO_LOSSES)} in constants.py')
    if not 0 <= gamma < math.inf:
        raise UserError(f"HVIT_FOCAL_GAMMA is {gamma}; set it to 0 or more")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"HVIT_LABEL_SMOOTHING is {label_smoothing}; set it to 0 or more, and less than 1")


def class_weights(labels, names):
    """float32 [C] by which all classes count alike: n / (C * images of the class), 1 for the average image.

    labels: int64 [n] of the training images; names: of the C classes.
    Raises UserError naming the classes of which training has no image.
    """
    counts = torch.as_tensor(labels, dtype=torch.int64).bincount(minlength=len(names))
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if empty:
        raise UserError(f"no training image is of class {', '.join(empty)}, so it can have no class weight; "
                        "remove the class, split the images otherwise, or switch class weights off")
    return counts.sum() / (len(names) * counts)
