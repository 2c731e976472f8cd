"""The loss of a network of slices: of its masks, its classes, or both."""

import torch

from losses.classification import classification_loss
from losses.slices import mask_loss
from models.multitask import weighted_total


def slice_loss(outputs, masks, labels, word, class_weights=None, dice_weight=0.5):
    """Float32 scalar of those outputs that there are: ``mask_loss`` of masks, cross-entropy of classes.

    outputs: dict of "masks" logits [B, C, S, S] or "labels" logits [B, K], or both and "terms" [2, 2], their
    weights, see models.multitask.  masks int64 [B, S, S]; labels int64 [B]; -1 = unknown.
    word, class_weights, dice_weight: of ``mask_loss``.
    """
    losses, known = [], []
    if "masks" in outputs:
        class_weights = None if class_weights is None else class_weights.to(masks.device)
        losses.append(mask_loss(word, outputs["masks"], masks, class_weights, dice_weight))
        known.append((masks >= 0).any())
    if "labels" in outputs:
        truth = labels.float().where(labels >= 0, torch.nan)[:, None]
        losses.append(classification_loss("ce", outputs["labels"], truth))
        known.append((labels >= 0).any())
    return weighted_total(losses, outputs["terms"], torch.stack(known)) if "terms" in outputs else losses[0]
