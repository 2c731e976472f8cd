"""Losses of study-level predictions, computed in float32; labels that are missing (NaN) do not count.

Each is a mean over the labels that are there.  Where none is, the loss is zero with a zero gradient, so that
every rank has the same graph.
"""

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
