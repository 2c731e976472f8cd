"""Losses between a predicted and a true signed map.

Every function takes pred, target: [B, 1, H, W] in [-1, 1], any float type, and returns a scalar
computed in float32.  Positive values are new findings, negative values resolved ones.
"""

import math

import torch
from kornia.metrics import ssim


def change_weight(target, factor, threshold=0.05):
    """Weights of pixels: `factor` where |target| > threshold, 1 elsewhere; float32, shape of target."""
    return torch.where(target.abs() > threshold, float(factor), 1.0)


def weighted_mean(values, weight):
    """Sum of weight * values over the sum of weights, both over the batch; the plain mean without weights."""
    return values.mean() if weight is None else (weight * values).sum() / weight.sum()


def l1_loss(pred, target, weight=None):
    """Mean absolute error; weight [B, 1, H, W] makes it a weighted mean, so equal weights change nothing."""
    return weighted_mean((pred.float() - target.float()).abs(), weight)


def l2_loss(pred, target, weight=None):
    """Mean squared error; weight [B, 1, H, W] makes it a weighted mean, so equal weights change nothing."""
    return weighted_mean((pred.float() - target.float()) ** 2, weight)


def masked_l1(pred, target, mask):
    """Mean absolute error over hidden pixels; mask: bool [B, 1, H, W], True = hidden.

    Without a hidden pixel it is zero and has a zero gradient, so that every rank has the same graph.
    """
    error = (pred.float() - target.float()).abs()
    return (error * mask).sum() / mask.sum().clamp(min=1)


def ssim_loss(pred, target, window=11):
    """1 - mean structural similarity (Wang et al. 2004, IEEE TIP 13(4), eq. 13), Gaussian of sigma 1.5.

    SSIM wants values in [0, 1], so maps are shifted: (map + 1) / 2.  Its luminance term weighs a step
    down from 0.5 more than a step up, so the negated maps are scored too and both means averaged: a
    new and a resolved finding count alike.  H and W must be greater than window // 2.
    """
    pred, target = pred.float(), target.float()
    pred = (torch.cat([pred, -pred]) + 1) / 2                                      # [2B, 1, H, W]
    target = (torch.cat([target, -target]) + 1) / 2
    return 1 - ssim(pred, target, window).mean()


def log_amplitude(maps, eps):
    """[B, 1, H, W] -> log(sqrt(|rfft2|^2 + eps^2)) [B, 1, H, W // 2 + 1], of the orthonormal transform."""
    spectrum = torch.view_as_real(torch.fft.rfft2(maps.float(), norm="ortho"))     # [B, 1, H, W // 2 + 1, 2]
    return 0.5 * torch.log(spectrum.square().sum(-1) + eps ** 2)


def fourier_loss(pred, target, eps=0.01):
    """Mean absolute difference of the log amplitudes of the two spectra; blind to where things are.

    The transform is orthonormal, so an amplitude is of the size of a pixel's root mean square whatever
    the image size, and eps is a noise floor in the map's own units: two frequencies below it count as
    equal.  It stands inside the root, log(sqrt(|F|^2 + eps^2)), so the slope is smooth, at most
    1 / (2 eps), and zero at a zero spectrum.  The usual log(|F| + 1e-6) takes the rounding errors of
    empty frequencies for content: near zero its gradient is thousands of times that of L1.
    """
    return (log_amplitude(pred, eps) - log_amplitude(target, eps)).abs().mean()


def membership(maps, sign, threshold, temperature):
    """How far each pixel belongs to the changes of one sign: 0 at no change, near 1 well above the threshold.

    sigmoid((sign * map - threshold) / temperature), less its value at 0 and stretched to end at 1.  The
    value at 0 is no detail: summed over the unchanged area, it outweighs the few changed pixels.
    """
    empty = 1 / (1 + math.exp(threshold / temperature))
    return (torch.sigmoid((sign * maps - threshold) / temperature) - empty) / (1 - empty)


def soft_dice_loss(pred, target, threshold=0.05, temperature=0.05, smooth=1e-3):
    """1 - soft Dice of the changed pixels, averaged over new and resolved ones.

    With p and q the memberships of pred and target, summed over the N pixels of the whole batch
    (Milletari et al. 2016, arXiv:1606.04797, section 3, with a smooth term):

        1 - (2 sum pq + smooth N) / (sum p^2 + sum q^2 + smooth N)
            = sum (p - q)^2 / (sum p^2 + sum q^2 + smooth N)

    which is how it is computed.  Only equal maps score 0, so a pair without change asks for zeros, and an
    unchanged pixel answered by zero has no gradient.  Pooled over the batch, not per pair: alone, a pair
    without change has a slope so steep on each false pixel that zero everywhere is learnt first.
    """
    pred, target = pred.float(), target.float()
    losses = []
    for sign in (1, -1):
        p = membership(pred, sign, threshold, temperature)                         # [B, 1, H, W]
        q = membership(target, sign, threshold, temperature)
        losses.append((p - q).square().mean() / (p.square().mean() + q.square().mean() + smooth))
    return torch.stack(losses).mean()
