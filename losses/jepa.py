"""Distance of predicted features from the teacher's."""

import torch.nn.functional as F


def jepa_loss(pred, target):
    """Smooth L1 with beta 1: d^2 / 2 where |d| < 1, else |d| - 1/2; the mean over all values.

    Girshick 2015, arXiv:1504.08083, eq. 3, as Assran et al. 2023, arXiv:2301.08243, use it.  pred, target
    [N, E], any float type; computed in float32.  Without a token it is zero and has a zero gradient, so
    that every rank has the same graph.
    """
    total = F.smooth_l1_loss(pred.float(), target.float(), reduction="sum", beta=1.0)
    return total / max(pred.numel(), 1)
