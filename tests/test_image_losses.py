"""Losses between signed maps: against loops, formulas and torchmetrics, and where there is nothing to see."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from losses.image import change_weight, fourier_loss, l1_loss, l2_loss, masked_l1, soft_dice_loss, ssim_loss


def weighted_l1(pred, target):
    return l1_loss(pred, target, change_weight(target, 10))


def half_masked_l1(pred, target):
    mask = torch.zeros(pred.shape, dtype=torch.bool)
    mask[..., : pred.shape[-1] // 2] = True
    return masked_l1(pred, target, mask)


LOSSES = [l1_loss, l2_loss, weighted_l1, half_masked_l1, ssim_loss, fourier_loss, soft_dice_loss]


def maps(seed, size=(16, 20), batch=2):
    """Smooth signed maps [B, 1, H, W] with exact zeros over about half of the pixels."""
    coarse = torch.randn(batch, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(F.softshrink(F.interpolate(coarse, size=size, mode="bicubic"), 0.5))


def pixels(*tensors):
    """Tuples of the values of each pixel, as Python floats."""
    return zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)


def test_l1_and_l2_equal_the_loop_over_pixels():
    """Mean over every pixel of the batch; weighted, over the sum of the weights."""
    pred, target = maps(0), maps(1)
    weight = change_weight(target, 7.0)
    plain = list(pixels(pred, target))
    assert l1_loss(pred, target).item() == pytest.approx(sum(abs(p - t) for p, t in plain) / len(plain))
    assert l2_loss(pred, target).item() == pytest.approx(sum((p - t) ** 2 for p, t in plain) / len(plain))
    triples, total = list(pixels(pred, target, weight)), weight.sum().item()
    expected = sum(w * abs(p - t) for p, t, w in triples) / total
    assert l1_loss(pred, target, weight).item() == pytest.approx(expected)
    expected = sum(w * (p - t) ** 2 for p, t, w in triples) / total
    assert l2_loss(pred, target, weight).item() == pytest.approx(expected)


def test_changed_pixels_of_either_sign_carry_the_factor():
    """The weight is the factor where |target| > threshold and 1 elsewhere, at the threshold too."""
    target = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.06]).view(1, 1, 1, 5)
    assert change_weight(target, 10).flatten().tolist() == [10, 1, 1, 1, 10]
    assert change_weight(target.half(), 10).dtype == torch.float32


def test_a_factor_of_one_is_the_plain_mean():
    """The option switched off changes no number."""
    pred, target = maps(0), maps(1)
    weight = change_weight(target, 1)
    torch.testing.assert_close(l1_loss(pred, target, weight), l1_loss(pred, target))
    torch.testing.assert_close(l2_loss(pred, target, weight), l2_loss(pred, target))


def test_the_factor_raises_the_share_of_a_missed_change():
    """Missing a small finding costs more, the same false answer in the background less."""
    target = torch.zeros(1, 1, 16, 16)
    target[..., :4, :4] = 0.3
    false = torch.zeros_like(target)
    false[..., 12:, 12:] = 0.3
    missed = [l1_loss(torch.zeros_like(target), target, change_weight(target, f)).item() for f in (1, 10)]
    invented = [l1_loss(target + false, target, change_weight(target, f)).item() for f in (1, 10)]
    assert missed[1] > 5 * missed[0] and invented[1] < invented[0]


def test_masked_l1_sees_hidden_pixels_only():
    """The mean over hidden pixels; what is visible has no gradient."""
    pred, target = maps(0).requires_grad_(), maps(1)
    mask = torch.rand(pred.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    hidden = [abs(p - t) for p, t, m in pixels(pred, target, mask) if m]
    loss = masked_l1(pred, target, mask)
    assert loss.item() == pytest.approx(sum(hidden) / len(hidden))
    loss.backward()
    assert (pred.grad[~mask] == 0).all() and (pred.grad[mask & (pred != target)] != 0).all()


def test_masked_l1_without_a_hidden_pixel_is_zero_and_stays_in_the_graph():
    """An epoch that hides nothing trains on, and distributed training finds every parameter used."""
    pred = maps(0).requires_grad_()
    loss = masked_l1(pred, maps(1), torch.zeros(pred.shape, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and (pred.grad == 0).all()


def test_ssim_equals_torchmetrics_on_the_shifted_maps():
    """The mean over maps and negated maps, each brought from [-1, 1] to [0, 1]."""
    pred, target = maps(0, (24, 32)), maps(1, (24, 32))
    peer = [structural_similarity_index_measure(
        (sign * pred + 1) / 2, (sign * target + 1) / 2, sigma=1.5, data_range=1.0) for sign in (1, -1)]
    assert ssim_loss(pred, target).item() == pytest.approx(1 - sum(peer).item() / 2, rel=1e-4)


def test_fourier_equals_the_written_out_transform():
    """One frequency at a time: sum over pixels of value * exp(-2 pi i (u y / H + v x / W)) / sqrt(H W)."""
    pred, target = maps(0, (4, 6), 1), maps(1, (4, 6), 1)

    def log_amplitude(image, u, v):
        phases = [(-2 * math.pi * (u * y / 4 + v * x / 6), image[0, 0, y, x].item())
                  for y in range(4) for x in range(6)]
        real, imaginary = (sum(value * f(phase) for phase, value in phases) for f in (math.cos, math.sin))
        return math.log(math.sqrt((real ** 2 + imaginary ** 2) / 24 + 0.01 ** 2))

    terms = [abs(log_amplitude(pred, u, v) - log_amplitude(target, u, v)) for u in range(4) for v in range(4)]
    assert fourier_loss(pred, target).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_fourier_is_blind_to_place():
    """A translation changes phases alone, which is why this term never stands alone."""
    target = maps(0)
    assert fourier_loss(target.roll((3, 5), (2, 3)), target) < 1e-3 * fourier_loss(maps(1), target)


def test_soft_dice_equals_its_definition_as_one_minus_dice():
    """The quotient of sums over the batch, one pixel at a time, for each sign."""
    pred, target = maps(0), maps(1)

    def sigmoid(d):
        return 1 / (1 + math.exp(-(d - 0.05) / 0.04))

    losses = []
    for sign in (1, -1):
        members = [[(sigmoid(sign * d) - sigmoid(0)) / (1 - sigmoid(0)) for d in pair]
                   for pair in pixels(pred, target)]
        smooth = 1e-3 * len(members)
        common = 2 * sum(p * q for p, q in members) + smooth
        losses.append(1 - common / (sum(p * p + q * q for p, q in members) + smooth))
    assert soft_dice_loss(pred, target, 0.05, 0.04).item() == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_soft_dice_becomes_the_hard_dice_of_both_signs():
    """With a narrow temperature the memberships are the sets |d| > threshold that the metrics count."""
    pred, target = maps(0), maps(1)
    hard = []
    for sign in (1, -1):
        p, q = sign * pred > 0.05, sign * target > 0.05
        hard.append(1 - 2 * (p & q).sum() / (p.sum() + q.sum()))
    found = soft_dice_loss(pred, target, temperature=1e-4, smooth=1e-9)
    assert found.item() == pytest.approx(sum(hard).item() / 2, abs=0.01)


def test_soft_dice_asks_an_unchanged_pair_for_zeros():
    """Zero everywhere is the only best answer: nothing else scores 0, and nothing pulls away from it."""
    zeros = torch.zeros(2, 1, 16, 16, requires_grad=True)
    loss = soft_dice_loss(zeros, torch.zeros(2, 1, 16, 16))
    loss.backward()
    assert loss.item() == 0 and (zeros.grad == 0).all()                  # p = q, so nothing is left to gain
    false = torch.zeros(2, 1, 16, 16)
    values = []
    for width in (0, 1, 4, 16):
        false[..., :width] = 0.2
        values.append(soft_dice_loss(false, torch.zeros_like(false)).item())
    assert values == sorted(values) and len(set(values)) == 4


def test_soft_dice_pulls_an_empty_answer_towards_few_changed_pixels():
    """At the start the slope on a changed pixel is far above that of L1, and elsewhere there is none."""
    target = torch.zeros(4, 1, 32, 32)
    target[0, :, 5:11, 5:11], target[1, :, 20:24, 20:24] = 0.3, -0.3                # about 1 % of the pixels
    zeros = torch.zeros_like(target).requires_grad_()
    slope, = torch.autograd.grad(soft_dice_loss(zeros, target), zeros)
    plain, = torch.autograd.grad(l1_loss(zeros, target), zeros)
    changed = target != 0
    assert (slope[changed].sign() == -target[changed].sign()).all()
    assert (slope[changed].abs() > 5 * plain[changed].abs()).all()
    torch.testing.assert_close(slope[~changed], torch.zeros_like(slope[~changed]), rtol=0, atol=1e-8)


def test_fourier_does_not_drown_l1_near_zero():
    """Numerical noise of a map that is nearly zero must not steer the training."""
    noise = 1e-4 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(2, 1, 32, 32)
    target[..., 5:11, 5:11] = 0.3
    pred = noise.requires_grad_()
    spectral, = torch.autograd.grad(0.05 * fourier_loss(pred, target), pred)
    plain, = torch.autograd.grad(l1_loss(pred, target), pred)
    assert spectral.norm() < plain.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_maps_score_zero_and_order_changes_nothing(loss):
    """A distance between two batches, wherever a pair stands in them."""
    pred, target = maps(0), maps(1)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(loss(pred, target), loss(pred.flip(0), target.flip(0)))


@pytest.mark.parametrize("loss", LOSSES)
def test_new_and_resolved_findings_count_alike(loss):
    """Swapping the meaning of the signs in both maps changes nothing."""
    pred, target = maps(0), maps(1)
    torch.testing.assert_close(loss(pred, target), loss(-pred, -target))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_fall_on_the_way_from_zero_to_the_target(loss):
    """From the answer that a network begins with, every step is a gain."""
    target = maps(1)
    values = torch.stack([loss(step * target, target) for step in torch.linspace(0, 1, 9)])
    assert (values.diff() < 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss_and_finite_gradients(loss, dtype):
    """Also for maps that are zero, constant, saturated, equal, or of a spectrum that is nearly zero."""
    zeros, ones = torch.zeros(2, 1, 16, 20), torch.ones(2, 1, 16, 20)
    cases = [(maps(0), maps(1)), (zeros, zeros), (zeros, maps(1)), (ones, -ones), (0.3 * ones, zeros),
             (1e-6 * maps(0), maps(1)), (maps(1), maps(1))]
    for pred, target in cases:
        pred = pred.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(pred, target.to(dtype))
        value.backward()
        assert value.dtype == torch.float32 and value.shape == () and torch.isfinite(value)
        assert torch.isfinite(pred.grad).all()
