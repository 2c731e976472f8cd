"""Hidden patches."""

import pytest
import torch

from datasets.masking import PatchMask
from utils.config import UserError


def draw(mode, probability, seeds, patch=16, size=(64, 48)):
    """Masks of many samples, bool [N, 2, H, W]."""
    mask = PatchMask(patch, mode)
    return torch.stack([mask(*size, probability, torch.Generator().manual_seed(seed))
                        for seed in range(seeds)])


def test_random_patches_are_hidden_at_the_probability_asked_for():
    """Each patch by itself, in both images."""
    shares = draw("random", 0.3, seeds=300).float().mean((0, 2, 3))                        # [2]
    torch.testing.assert_close(shares, torch.full((2,), 0.3), atol=0.03, rtol=0)


def test_single_hides_one_whole_patch_of_one_image_at_the_probability_asked_for():
    """Both images and all places take part."""
    masks = draw("single", 0.7, seeds=300)
    sizes = masks.flatten(1).sum(1)
    assert set(sizes.tolist()) == {0, 16 * 16}
    assert (sizes > 0).float().mean() == pytest.approx(0.7, abs=0.08)
    assert masks.any(0).all()


@pytest.mark.parametrize("mode", ["single", "random"])
def test_probability_0_hides_nothing(mode):
    """The validation of a schedule's start."""
    assert not draw(mode, 0.0, seeds=20).any()


def test_the_last_patches_are_cut_at_the_border():
    """Any image size goes."""
    assert draw("random", 1.0, seeds=1, patch=40).all()


def test_an_unknown_mode_is_refused():
    """The message names the constant."""
    with pytest.raises(UserError, match="MASK_MODE"):
        PatchMask(16, "block")
