"""Losses of masks against MONAI, torch and loops; unknown pixels, empty masks and half precision."""

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss

from losses.slices import MASK_LOSSES, WEIGHTED_LOSSES, check_mask_loss, mask_loss
from utils.config import UserError


def data(channels, seed=0, unknown=0.0):
    """logits [3, C, 6, 7] and masks [3, 6, 7]; ``unknown``: share of the pixels that are -1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, channels, 6, 7, generator=generator)
    masks = torch.randint(max(channels, 2), (3, 6, 7), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < unknown] = -1
    return logits.requires_grad_(), masks


def options(channels):
    """MONAI's words for what the losses do with so many channels."""
    several = channels > 1
    return {"sigmoid": not several, "softmax": several, "to_onehot_y": several, "smooth_nr": 1,
            "smooth_dr": 1}


def assert_same(ours, theirs, logits):
    """Equal losses with equal gradients."""
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0]
                                 for loss in (ours, theirs)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_dice_is_monais(channels):
    """Per sample and channel, smooth 1, mean; the background of several classes is a channel."""
    logits, masks = data(channels)
    peer = DiceLoss(**options(channels))
    assert_same(mask_loss("dice", logits, masks), peer(logits, masks[:, None]), logits)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_combined_is_monais_sum_with_these_shares(channels, share):
    """The weight of one term is what the other lacks to 1."""
    logits, masks = data(channels)
    peer = DiceCELoss(**options(channels), lambda_dice=share, lambda_ce=1 - share)
    assert_same(mask_loss("combined", logits, masks, dice_weight=share), peer(logits, masks[:, None].float()),
                logits)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0])])
@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_the_cross_entropies_are_torchs(weight, unknown):
    """Of pixels that are known; "ce", "nll" and without weights "kl" name the same number."""
    logits, masks = data(3, unknown=unknown)
    assert_same(mask_loss("ce", logits, masks, weight),
                F.cross_entropy(logits, masks, weight, ignore_index=-1), logits)
    log_p = logits.log_softmax(1)
    assert_same(mask_loss("nll", logits, masks, weight), F.nll_loss(log_p, masks, weight, ignore_index=-1),
                logits)
    known = masks >= 0
    one_hot = F.one_hot(masks[known], 3).float()
    peer = F.kl_div(log_p.movedim(1, 3)[known], one_hot, reduction="batchmean")
    assert_same(mask_loss("kl", logits, masks), peer, logits)


def test_one_channel_is_two_classes():
    """The softmax of 0 and x is the sigmoid of x: each cross-entropy of one channel is torch's binary one."""
    logits, masks = data(1, unknown=0.3)
    known = masks >= 0
    x, y = logits[:, 0][known], masks[known].float()
    for word in ("bce", "bce_logits", "ce", "nll", "kl"):
        assert_same(mask_loss(word, logits, masks), F.binary_cross_entropy_with_logits(x, y), logits)
    weights = torch.where(y > 0, 3.0, 0.5)
    peer = F.binary_cross_entropy_with_logits(x, y, weights, reduction="sum") / weights.sum()
    assert_same(mask_loss("ce", logits, masks, torch.tensor([0.5, 3.0])), peer, logits)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_other_losses_are_torchs_of_probabilities(channels):
    """bce takes each channel's own sigmoid, the others the probabilities; means over pixels and channels."""
    logits, masks = data(channels, unknown=0.3)
    known = masks >= 0
    y = F.one_hot(masks[known], max(channels, 2)).float()[:, -channels:]
    x = logits.movedim(1, 3)[known]                                                       # [N, C]
    p = x.sigmoid() if channels == 1 else x.softmax(1)
    for word, peer in {"bce": F.binary_cross_entropy_with_logits(x, y), "l1": F.l1_loss(p, y),
                       "mse": F.mse_loss(p, y), "smooth_l1": F.smooth_l1_loss(p, y)}.items():
        assert_same(mask_loss(word, logits, masks), peer, logits)


@pytest.mark.parametrize("channels", [1, 3])
def test_unknown_pixels_do_not_count(channels):
    """Whatever the network says of padding, and with the same number as without it."""
    logits, masks = data(channels)
    padded = F.pad(masks, (2, 1, 0, 3), value=-1)
    for word in MASK_LOSSES:
        expected = mask_loss(word, logits, masks)
        for value in (0.0, -30.0, 30.0):
            wide = F.pad(logits, (2, 1, 0, 3), value=value)
            torch.testing.assert_close(mask_loss(word, wide, padded), expected, msg=word)
            assert mask_loss(word, wide[:1], padded[:1]).item() == pytest.approx(
                mask_loss(word, logits[:1], masks[:1]).item(), rel=1e-5), word


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("word", MASK_LOSSES)
def test_samples_without_a_known_pixel_change_nothing(word, channels):
    """A slice that has a class and no mask; a batch of such slices gives zero, with a zero gradient."""
    logits, masks = data(channels)
    more = torch.cat([masks, torch.full_like(masks[:2], -1)])
    torch.testing.assert_close(mask_loss(word, torch.cat([logits, logits[:2]]), more),
                               mask_loss(word, logits, masks))
    nothing = mask_loss(word, logits, torch.full_like(masks, -1))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, logits)[0].any()


def test_an_empty_mask_found_empty_costs_no_dice():
    """Most slices have no lesion: without the ones in the formula they would be 0 / 0, or cost 1 each."""
    masks = torch.zeros(2, 6, 7, dtype=torch.int64)
    assert mask_loss("dice", torch.full((2, 1, 6, 7), -50.0), masks).item() == pytest.approx(0, abs=1e-6)
    assert mask_loss("dice", torch.full((2, 1, 6, 7), 50.0), masks).item() > 0.9


def test_one_bad_sample_does_not_hide_among_large_ones():
    """Dice is per sample: a small lesion that is missed costs as much as a large one."""
    masks = torch.zeros(2, 40, 40, dtype=torch.int64)
    masks[0, :30], masks[1, :3, :3] = 1, 1
    found = torch.where(masks > 0, 30.0, -30.0)[:, None]
    missed = [found.clone(), found.clone()]
    missed[0][0], missed[1][1] = -30.0, -30.0
    large, small = (mask_loss("dice", logits, masks).item() for logits in missed)
    assert abs(large - small) < 0.06 and small > 0.4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("word", MASK_LOSSES)
def test_half_precision_logits_give_a_float32_loss_and_finite_gradients(word, dtype, channels):
    """Sums over 320 x 320 pixels overflow float16; also under autocast, and for a sure network."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(max(channels, 2), (1, 320, 320), generator=generator)
    logits = (30 * torch.randn(1, channels, 320, 320, generator=generator)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mask_loss(word, logits, masks)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mask_loss(word, logits.detach().float(), masks))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_settings_that_do_not_exist_are_refused():
    """One line that names the constant; before the data are read as in the loss itself."""
    logits, masks = data(1)
    for call in (lambda **o: check_mask_loss(**{"word": "dice", **o}),
                 lambda word="dice", num_classes=0, **o: mask_loss(word, logits, masks, **o)):
        with pytest.raises(UserError, match="SPINE_LOSS is .jaccard.; set it to one of dice, bce"):
            call(word="jaccard")
        with pytest.raises(UserError, match="SPINE_DICE_WEIGHT is 1.5"):
            call(word="combined", dice_weight=1.5)
        for word in set(MASK_LOSSES) - set(WEIGHTED_LOSSES):
            with pytest.raises(UserError, match=f'"{word}" takes no class weights'):
                call(word=word, class_weights=torch.ones(2))
        with pytest.raises(UserError, match="SPINE_CLASS_WEIGHTS has 3 entries, there are 2 classes"):
            call(word="ce", class_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"not \[B, C, H, W\]"):
        mask_loss("dice", logits, masks[:, None])
