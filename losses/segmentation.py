"""Semantic losses of volumes whose labels may leave classes open: cross-entropy and soft Dice, in float32."""

import math

import torch
import torch.nn.functional as F

from utils.config import UserError


def check_class_weights(weights, num_classes):
    """The weights of the classes as float32 [num_classes], or None where ``weights`` is empty or None.

    weights: one number per class, none below zero and one above.  Raises UserError otherwise.
    """
    if weights is None or len(weights) == 0:
        return None
    check_length(weights, num_classes)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"VISTA_CLASS_WEIGHTS = {list(weights)}: give numbers of 0 or more, not only 0")
    return torch.as_tensor(weights, dtype=torch.float32)


def check_length(weights, num_classes):
    """UserError where there is not one weight per class."""
    if len(weights) != num_classes:
        raise UserError(f"VISTA_CLASS_WEIGHTS has {len(weights)} entries, the network has {num_classes} "
                        "classes; give one per class, 0 for those without labels, or [] for equal weights")


def semantic_loss(logits, target, meaning=None, class_weights=None, ignore_index=-100,
                  ce_weight=0.5, dice_weight=0.5):
    """Cross-entropy and soft Dice of voxels: dict(ce, dice) of float32 scalars, for the caller to weight.

    logits [B, C, ...], any float type; target int64 [B, ...] in [0, C) or ``ignore_index``.
    meaning: bool [B, K, K], K <= C; meaning[b, t, c] = a voxel of sample b labelled t may in truth be class
    c, at least one c for each t.  The probabilities of all that a label may mean are summed (marginal loss,
    Shi et al. 2021, arXiv:2007.03868); labels and meanings end at K.  None: each label means itself alone.
    class_weights: float [C], on the device of the logits, as ``check_class_weights`` gives them.
    A term whose weight is 0 is not computed but a zero.  Where no voxel is labelled both are zero, with a
    zero gradient.  Raises UserError when class weights or meanings do not fit the number of classes.
    """
    classes = logits.shape[1]
    if class_weights is not None:
        check_length(class_weights, classes)
    if meaning is not None and meaning.shape[1] > classes:
        raise UserError(f"VISTA_NUM_CLASSES = {classes}: the labels have {meaning.shape[1]} classes; "
                        "set it to that at least")
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = F.log_softmax(logits.float().flatten(2), 1)                         # [B, C, N]
        if meaning is not None:
            log_probs = log_probs[:, :meaning.shape[1]]                                 # [B, K, N]
        target = target.flatten(1)                                                      # [B, N]
        labelled = target != ignore_index
        target = torch.where(labelled, target, 0)
        ce = dice = log_probs[:0].sum()                         # a zero that is part of the graph
        if ce_weight:
            ce = cross_entropy(log_probs, target, labelled, meaning, class_weights)
        if dice_weight:
            dice = soft_dice_loss(log_probs, target, labelled, meaning)
    return {"ce": ce, "dice": dice}


def cross_entropy(log_probs, target, labelled, meaning=None, class_weights=None):
    """-log of the probability of what the label may mean, averaged over voxels by the weight of the label.

    log_probs float32 [B, K, N]; target int64 [B, N] in [0, K); labelled bool [B, N], True = counts; meaning
    and class_weights as in ``semantic_loss``.  The sum of weights stands below the line, as in torch.
    """
    if meaning is None:
        scores = log_probs.gather(1, target[:, None])[:, 0]                             # [B, N]
    else:
        rows = target[:, None].expand(-1, meaning.shape[2], -1)                         # [B, K, N]
        meant = meaning.transpose(1, 2).gather(2, rows)
        scores = torch.where(meant, log_probs, -torch.inf).logsumexp(1)
    weights = labelled.float() if class_weights is None else class_weights.float()[target] * labelled
    total = weights.sum()
    return -(scores * weights).sum() / torch.where(total > 0, total, 1.0)


def soft_dice_loss(log_probs, target, labelled, meaning=None, eps=1e-5):
    """1 - soft Dice, averaged over the labels that a sample has, then over the samples that have one.

    Arguments as in ``cross_entropy``.  For label t, with q the probability of what t may mean and y =
    [label is t], summed over a sample's labelled voxels (Milletari et al. 2016, arXiv:1606.04797, sec. 3,
    without the squares):

        (2 sum q y + eps) / (sum q + sum y + eps)

    Where another label s stands, q leaves out what s may mean too: there it is no mistake.  Labels that a
    sample does not have are left out: their score, near 0 or 1, would hide the others'.
    """
    labels = torch.arange(log_probs.shape[1], device=target.device)
    member = ((target[:, None] == labels[:, None]) & labelled[:, None]).float()         # [B, K, N]
    mass = member @ log_probs.exp().transpose(1, 2)             # [B, K, K] of class, by label
    if meaning is None:
        meaning = torch.eye(len(labels), dtype=torch.bool, device=target.device)
    right = (mass * meaning).sum(2)                                                     # [B, K]
    astray = (mass * ~meaning).sum(1)                           # [B, K] of each class, where it cannot be
    wrong = (meaning * astray[:, None]).sum(2)                                          # [B, K]
    size = member.sum(2)
    loss = 1 - (2 * right + eps) / (right + wrong + size + eps)
    present = size > 0
    of_sample = torch.where(present, loss, 0.0).sum(1) / present.sum(1).clamp(min=1)    # [B]
    return of_sample.sum() / present.any(1).sum().clamp(min=1)
