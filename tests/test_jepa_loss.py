"""The loss of Vol-JEPA against its formula."""

import pytest
import torch

from losses.jepa import jepa_loss


def features(seed, shape=(7, 5)):
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_loss_is_the_mean_of_the_papers_smooth_l1():
    """Quadratic within 1, linear beyond; the values of the test lie on both sides."""
    pred, target = features(0), features(1)
    distances = [abs(a - b) for a, b in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True)]
    assert min(distances) < 1 < max(distances)
    expected = [d * d / 2 if d < 1 else d - 0.5 for d in distances]
    assert jepa_loss(pred, target).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_order_of_the_tokens_changes_nothing():
    """A mean over tokens knows no order."""
    pred, target = features(0), features(1)
    torch.testing.assert_close(jepa_loss(pred, target), jepa_loss(pred.flip(0), target.flip(0)))


def test_equal_features_score_zero():
    """The aim."""
    assert jepa_loss(features(0), features(0)) == 0


def test_without_a_token_loss_and_gradient_are_zero():
    """A rank whose masks left no target must not stop the others with a NaN."""
    weight = torch.ones(5, requires_grad=True)
    loss = jepa_loss(features(0, (0, 5)) * weight, features(1, (0, 5)))
    assert loss == 0
    assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_float32_loss_and_a_finite_gradient(dtype):
    """Also of differences whose sum is beyond float16, and within autocast."""
    pred, target = (100 * features(0, (400, 64))).to(dtype).requires_grad_(), features(1, (400, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa_loss(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, jepa_loss(pred.float(), target))
    gradient = torch.autograd.grad(1e4 * loss, pred)[0]
    assert gradient.isfinite().all() and gradient.any()
