"""Metrics of change maps against loops over pixels, and over batches and ranks."""

import math

import numpy as np
import pytest
import torch
from forks import two_ranks
from scipy import ndimage

from utils import distributed
from utils.metrics import ChangeMetrics, component_overlap, list_changes


def smooth_maps(count, size=48, seed=0):
    """Maps [count, 1, size, size] of smooth blobs of both signs, about half the pixels within +-0.05."""
    noise = np.random.default_rng(seed).standard_normal((count, 1, size, size))
    maps = ndimage.gaussian_filter(noise, (0, 0, 4, 4))
    return torch.from_numpy(0.07 * maps / maps.std()).float().clamp(-1, 1)


def measure(pred, target, **options):
    metrics = ChangeMetrics(**options)
    metrics.update(pred, target)
    return metrics.compute()


def overlap_by_loops(pred, target, signs, threshold=0.05):
    """(hits, predicted, true) of one pair, one pixel at a time."""
    hits = predicted = true = 0
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        for sign in signs:
            hits += sign * p > threshold and sign * t > threshold
            predicted += sign * p > threshold
            true += sign * t > threshold
    return hits, predicted, true


@pytest.mark.parametrize("suffix, signs", [("", (1, -1)), ("_new", (1,)), ("_resolved", (-1,))])
def test_dice_and_iou_equal_loops_over_pixels(suffix, signs):
    """Means over pairs, with a pixel of the wrong sign counted as missed and as false."""
    pred, target = smooth_maps(3, seed=0), smooth_maps(3, seed=1)
    pred = 0.5 * pred + target
    counts = [overlap_by_loops(p, t, signs) for p, t in zip(pred, target, strict=True)]
    figures = measure(pred, target)
    assert figures["dice" + suffix] == pytest.approx(np.mean([2 * h / (p + t) for h, p, t in counts]))
    assert figures["iou" + suffix] == pytest.approx(np.mean([h / (p + t - h) for h, p, t in counts]))


def test_one_pair_agrees_with_torchmetrics_and_kornia():
    """On one pair Dice is the F1 score of the binary map, IoU its Jaccard index, and SSIM kornia's."""
    # Imported here because the two processes of the test of ranks import this file.
    from kornia.metrics import ssim
    from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index
    pred, target = smooth_maps(1, seed=0), smooth_maps(1, seed=1) + smooth_maps(1, seed=0)
    new = (pred > 0.05).int(), (target > 0.05).int()
    figures = measure(pred, target)
    assert figures["dice_new"] == pytest.approx(binary_f1_score(*new).item())
    assert figures["iou_new"] == pytest.approx(binary_jaccard_index(*new).item())
    expected = ssim((pred + 1) / 2, (target + 1) / 2, window_size=11, padding="valid").mean().item()
    assert figures["ssim"] == pytest.approx(expected, abs=1e-4)


def test_pooled_dice_and_errors_are_over_all_pixels():
    """Pairs with much change weigh more in the pooled figures than in the means over pairs."""
    pred, target = smooth_maps(4, seed=2), smooth_maps(4, seed=3) + smooth_maps(4, seed=2)
    hits, predicted, true = overlap_by_loops(pred, target, (1, -1))
    inside = target.abs() > 0.05
    figures = measure(pred, target)
    assert figures["dice_pooled"] == pytest.approx(2 * hits / (predicted + true))
    assert figures["mae_inside"] == pytest.approx((pred - target).abs()[inside].mean().item(), rel=1e-5)
    assert figures["mae_outside"] == pytest.approx((pred - target).abs()[~inside].mean().item(), rel=1e-5)


def test_components_are_found_by_their_own_sign_and_a_tenth_of_their_area():
    """Of three true components one is hit, one is hit with the wrong sign, one only at its rim."""
    target, pred = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    target[..., 4:14, 4:14] = 0.5
    target[..., 4:14, 24:34] = -0.5
    target[..., 4:14, 44:54] = 0.5
    pred[..., 4:14, 4:8] = 0.5                          # 40 % of the first
    pred[..., 4:14, 24:34] = 0.5                        # the second, as new instead of resolved: also false
    pred[..., 4:14, 44:45] = 0.5                        # exactly 10 % of the third: not more than a tenth
    pred[..., 40:46, 40:46] = -0.5                      # in nothing: false
    pred[..., 60:62, 60:62] = -0.5                      # too small to count
    figures = measure(pred, target, min_area=5)
    assert figures["sensitivity"] == pytest.approx(1 / 3)
    assert figures["false_components"] == 2


def test_component_shares_equal_a_loop_over_scipy_labels():
    """The shares of one counting pass are those of each component taken alone, diagonal neighbours joined."""
    mask, other = smooth_maps(1, seed=4)[0, 0].numpy() > 0.05, smooth_maps(1, seed=5)[0, 0].numpy() > 0
    mask[0, 0] = mask[1, 1] = True                      # joined by a corner only
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    expected = [other[labels == k].mean() for k in range(1, count + 1) if (labels == k).sum() >= 2]
    assert sorted(component_overlap(mask, other, 2)) == pytest.approx(sorted(expected))


def test_changes_are_listed_largest_first_with_scipys_figures():
    """Area, centroid and mean of each component of one sign, those below the least area left out."""
    diff = smooth_maps(1, seed=4)[0, 0].numpy()
    expected = []
    for sign, changed in (("new", diff > 0.05), ("resolved", diff < -0.05)):
        labels, count = ndimage.label(changed, np.ones((3, 3)))
        for mask in (labels == k for k in range(1, count + 1)):
            if mask.sum() >= 9:
                expected.append((-mask.sum(), *ndimage.center_of_mass(mask), diff[mask].mean(), sign))
    rows = list_changes(diff, 0.05, 9)
    assert [row["component"] for row in rows] == list(range(1, len(expected) + 1))
    found = [(-row["area_px"], row["centroid_row"], row["centroid_column"], row["mean"]) for row in rows]
    assert [row[0] for row in found] == sorted(row[0] for row in found)
    assert np.array(sorted(found)) == pytest.approx(np.array([row[:4] for row in sorted(expected)]), rel=1e-4)
    assert sorted(row["sign"] for row in rows) == sorted(row[4] for row in expected)
    assert all(row["area_fraction"] == row["area_px"] / 48 ** 2 for row in rows)


def test_an_unchanged_pair_counts_in_the_false_figures_alone():
    """Without change there is no Dice; what is predicted there is false area; nothing divides by zero."""
    pred = torch.zeros(1, 1, 32, 32)
    pred[..., :8, :16] = 0.3
    figures = measure(pred, torch.zeros_like(pred))
    assert figures["false_area_unchanged"] == 8 * 16 / 32 ** 2
    assert figures["false_components"] == 1
    absent = ("dice", "iou", "dice_new", "iou_resolved", "sensitivity", "mae_inside")
    assert all(math.isnan(figures[name]) for name in absent)


def test_a_perfect_map_is_perfect():
    target = smooth_maps(2)
    figures = measure(target, target)
    for name in ("dice", "iou", "dice_pooled", "dice_new", "dice_resolved", "sensitivity", "ssim"):
        assert figures[name] == pytest.approx(1)
    for name in ("false_components", "mae_inside", "mae_outside"):
        assert figures[name] == 0


def test_batches_and_array_types_do_not_matter():
    """Sums over pairs: one batch, single pairs, bfloat16 of the same values and arrays all agree."""
    pred, target = smooth_maps(5, seed=6).bfloat16(), smooth_maps(5, seed=7).bfloat16()
    singly = ChangeMetrics()
    for p, t in zip(pred.split(1), target.split(1), strict=True):
        singly.update(p.float().numpy(), t.float().numpy())
    assert singly.compute() == pytest.approx(measure(pred, target), nan_ok=True)


def test_shapes_that_differ_are_refused():
    """Broadcasting a map over pairs would give numbers that mean nothing."""
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        ChangeMetrics().update(torch.zeros(2, 1, 16, 16), torch.zeros(1, 1, 16, 16))


def reduce_on_a_rank(expected):
    """Rank 0 holds one pair, rank 1 four."""
    distributed.setup_distributed()
    metrics = ChangeMetrics()
    part = slice(1, 5) if distributed.rank() else slice(0, 1)
    metrics.update(smooth_maps(5, seed=8)[part], smooth_maps(5, seed=9)[part])
    metrics.reduce()
    assert distributed.world_size() == 2 and metrics.compute() == pytest.approx(expected, nan_ok=True)
    distributed.cleanup()


def test_ranks_with_unevenly_many_pairs_agree_with_one_process():
    """A mean of the ranks' means would be wrong here."""
    expected = measure(smooth_maps(5, seed=8), smooth_maps(5, seed=9))
    two_ranks(lambda: reduce_on_a_rank(expected))
