"""Adversarial losses against the formula of the paper."""

import math

import pytest
import torch

from losses.gan import discriminator_loss, generator_loss


def logits(seed, shape=(2, 1, 3, 4)):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_losses_equal_the_papers_logarithms():
    """D maximises log D(real) + log(1 - D(fake)); G maximises log D(fake); one patch at a time."""
    real, fake = logits(0), logits(1)
    real_terms = [-math.log(1 / (1 + math.exp(-x))) for x in real.flatten().tolist()]
    fake_terms = [-math.log(1 - 1 / (1 + math.exp(-x))) for x in fake.flatten().tolist()]
    expected = (sum(real_terms) / len(real_terms) + sum(fake_terms) / len(fake_terms)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)
    assert generator_loss(real).item() == pytest.approx(sum(real_terms) / len(real_terms), rel=1e-5)


def test_an_undecided_discriminator_scores_log_two_on_both_sides():
    """The two curves share the line at which neither side wins."""
    zeros = torch.zeros(2, 1, 3, 4)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(math.log(2))
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))


def test_order_of_the_batch_changes_nothing():
    """A mean over patches knows no order."""
    real, fake = logits(0), logits(1)
    torch.testing.assert_close(discriminator_loss(real, fake), discriminator_loss(real.flip(0), fake.flip(0)))
    torch.testing.assert_close(generator_loss(fake), generator_loss(fake.flip(0)))


def test_real_and_fake_may_have_different_numbers_of_patches():
    """Each kind has its own mean, so neither outweighs the other."""
    real, fake = logits(0, (1, 1, 2, 2)), logits(1, (3, 1, 4, 4))
    swapped = discriminator_loss(-fake, -real)
    torch.testing.assert_close(discriminator_loss(real, fake), swapped)


def test_losses_fall_as_their_side_wins():
    """The discriminator gains from distance, the generator from larger logits."""
    margins = [-4.0, -1.0, 0.0, 1.0, 4.0]
    judge = [discriminator_loss(torch.full((2, 1), m), torch.full((2, 1), -m)).item() for m in margins]
    maker = [generator_loss(torch.full((2, 1), m)).item() for m in margins]
    assert judge == sorted(judge, reverse=True) and len(set(judge)) == len(judge)
    assert maker == sorted(maker, reverse=True) and len(set(maker)) == len(maker)


def test_the_generator_learns_fastest_while_the_discriminator_is_sure():
    """The saturating form, log(1 - D), has no gradient there: the reason for this one."""
    sure = torch.tensor([-20.0], requires_grad=True)
    generator_loss(sure).backward()
    assert sure.grad.item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss_and_finite_gradients(dtype):
    """Logits far outside exp's range in half precision are still scored."""
    real = torch.tensor([-6e4, 0.0, 6e4], dtype=dtype, requires_grad=True)
    fake = torch.tensor([-6e4, 0.0, 6e4], dtype=dtype, requires_grad=True)
    loss = discriminator_loss(real, fake) + generator_loss(fake)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(real.grad).all() and torch.isfinite(fake.grad).all()
