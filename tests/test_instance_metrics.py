"""Metrics of instances and classes against scikit-image, scikit-learn and loops over voxels."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from forks import two_ranks

from utils import distributed
from utils.instance_metrics import Contingency, SemanticMetrics

SHAPE = (6, 40, 40)


def volumes(seed=0, shape=SHAPE, true_ids=9, extra=5):
    """(pred, true) int64 in boxes: true with background, pred with splits, merges, shifts and speckles."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(shape)
    true = (y // 11) * 3 + x // 14
    true = np.where((y % 11 == 0) | (x % 14 == 0), 0, true % true_ids + 1)
    pred = np.roll(np.where(true == 2, 1, true), 1, axis=2) + (true == 4) * (z > 2) * extra
    return np.where(rng.random(shape) < 0.05, rng.integers(0, true_ids, shape), pred), true


def scores(pred, true, **options):
    table = Contingency()
    table.add(pred, true)
    return table.scores(**options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ignore", [True, False])
def test_rand_and_voi_equal_scikit_image(seed, ignore):
    """The definitions of the field; scikit-image 0.26 names precision and recall the other way round."""
    from skimage.metrics import adapted_rand_error, variation_of_information
    pred, true = volumes(seed)
    ignored = (0,) if ignore else ()
    found = scores(pred, true, ignore_true_zero=ignore)
    error, *both = adapted_rand_error(true, pred, ignore_labels=ignored)
    assert found["adapted_rand_error"] == pytest.approx(error, rel=1e-12)
    assert sorted((found["rand_precision"], found["rand_recall"])) == pytest.approx(sorted(both), rel=1e-12)
    split, merge = variation_of_information(true, pred, ignore_labels=ignored)
    assert (found["voi_split"], found["voi_merge"]) == pytest.approx((split, merge), rel=1e-9)
    assert found["voi"] == pytest.approx(split + merge, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_adjusted_scores_equal_scikit_learn(seed):
    """With small objects, whose chance overlaps are summed exactly."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
    rng = np.random.default_rng(seed)
    for pred, true in (volumes(seed), rng.integers(0, 4, (2, 1, 5, 9)), rng.integers(0, 40, (2, 3, 5, 9))):
        found, kept = scores(pred, true), true > 0
        assert found["ari"] == pytest.approx(adjusted_rand_score(true[kept], pred[kept]), abs=1e-12)
        ami = adjusted_mutual_info_score(true[kept], pred[kept])
        assert found["ami"] == pytest.approx(ami, abs=1e-6)
        assert found["axi"] == pytest.approx(math.sqrt(max(found["ari"], 0) * max(found["ami"], 0)))


def test_the_series_of_large_overlaps_equals_the_exact_sum():
    """Objects of thousands of voxels, of which only a series can be summed in time."""
    from sklearn.metrics import adjusted_mutual_info_score
    rng = np.random.default_rng(0)
    true = rng.choice(5, 40_000, p=[0.05, 0.1, 0.15, 0.1, 0.6])
    pred = np.where(rng.random(40_000) < 0.01, true, rng.integers(0, 6, 40_000))
    found = scores(pred, true, ignore_true_zero=False)["ami"]
    assert found == pytest.approx(adjusted_mutual_info_score(true, pred), abs=1e-8)


def test_rand_equals_loops_over_pairs_of_voxels():
    """Precision: of the pairs together in the prediction, those together in truth; recall the reverse."""
    pred, true = np.random.default_rng(0).integers(0, 4, (2, 60))
    together = {"both": 0, "pred": 0, "true": 0}
    for i, j in itertools.combinations(np.flatnonzero(true), 2):
        together["both"] += pred[i] == pred[j] and true[i] == true[j]
        together["pred"] += pred[i] == pred[j]
        together["true"] += true[i] == true[j]
    found = scores(pred, true)
    precision, recall = together["both"] / together["pred"], together["both"] / together["true"]
    assert (found["rand_precision"], found["rand_recall"]) == pytest.approx((precision, recall))
    assert found["adapted_rand_error"] == pytest.approx(1 - 2 * precision * recall / (precision + recall))


def test_cutting_is_split_and_joining_is_merge():
    """The two names are easily swapped: an over-segmentation has no merge error, and the reverse."""
    coarse = np.repeat([1, 2, 3], 40).reshape(1, 10, 12)
    fine = coarse * 10 + np.indices(coarse.shape)[2] % 2
    cut, joined = scores(fine, coarse), scores(coarse, fine)
    assert cut["voi_split"] == pytest.approx(1) and cut["voi_merge"] == pytest.approx(0, abs=1e-12)
    assert joined["voi_merge"] == pytest.approx(1) and joined["voi_split"] == pytest.approx(0, abs=1e-12)
    assert cut["rand_precision"] == 1 > cut["rand_recall"]
    assert joined["rand_recall"] == 1 > joined["rand_precision"]
    assert cut["ted"] == joined["ted"] == 3


def test_what_is_missed_is_one_predicted_object_and_what_is_false_costs_f1_alone():
    """The convention about background: true 0 is left out, predicted 0 is an id like another."""
    true = np.repeat([0, 1, 2], 20).reshape(1, 6, 10)
    missed, false = np.where(true == 1, 0, true), np.where(true == 0, 9, true)
    assert scores(missed, true)["adapted_rand_error"] == scores(true, true)["adapted_rand_error"] == 0
    assert scores(np.zeros_like(true), true)["voi_merge"] == pytest.approx(1)
    assert scores(missed, true)["instance_recall"] == 0.5 and scores(missed, true)["ted"] == 0
    found = scores(false, true)
    assert found["adapted_rand_error"] == found["voi"] == found["ted"] == 0
    assert found["instance_precision"] == pytest.approx(2 / 3) and found["pred_objects"] == 3


def test_edit_distance_counts_splits_and_merges_by_loops():
    """For each true id the predicted ids in it beyond the first, and the reverse."""
    pred, true = volumes()
    expected = 0
    for a, b in ((pred, true), (true, pred)):
        for one in set(a[a > 0].tolist()):
            expected += max(len(set(b[(a == one) & (b > 0)].tolist())) - 1, 0)
    assert scores(pred, true)["ted"] == expected > 0


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_instance_f1_equals_loops_over_instances(threshold):
    """IoU over whole objects, the part on true background included."""
    pred, true = volumes(1)
    hits = 0
    for p, t in itertools.product(np.unique(pred[pred > 0]), np.unique(true[true > 0])):
        a, b = pred == p, true == t
        hits += (a & b).sum() / (a | b).sum() >= threshold
    found = scores(pred, true, thresholds=(threshold,))
    objects = len(np.unique(pred[pred > 0])), len(np.unique(true[true > 0]))
    assert (found["pred_objects"], found["true_objects"]) == objects
    assert 0 < found["instance_f1"] == pytest.approx(2 * hits / sum(objects))
    assert (found["instance_precision"], found["instance_recall"]) == (hits / objects[0], hits / objects[1])
    one, two = (scores(pred, true, thresholds=(x,))["instance_f1"] for x in (0.5, 0.9))
    assert scores(pred, true, thresholds=(0.5, 0.9))["instance_f1"] == pytest.approx((one + two) / 2)


def test_two_halves_are_one_match():
    """Both halves have an IoU of exactly 0.5 with the whole; matches are one to one."""
    pred, true = np.array([1, 1, 2, 2, 3, 3, 3, 3]), np.array([1, 1, 1, 1, 5, 5, 6, 6])
    found = scores(pred, true)
    assert (found["instance_precision"], found["instance_recall"]) == pytest.approx((2 / 3, 2 / 3))


@pytest.mark.parametrize("dtype, offset", [(np.uint8, 0), (np.int16, 5), (np.uint32, 2 ** 32 - 60),
                                           (np.int64, 2 ** 62), (np.uint64, 2 ** 64 - 60)])
def test_blocks_of_any_cut_and_ids_of_any_width_give_the_same(dtype, offset):
    """Sections, cut-out blocks, all at once: the same table; float64 would lose ids beyond 2^53."""
    pred, true = volumes()
    expected = scores(pred, true)
    wide_pred, wide_true = ((v.astype(dtype) + dtype(offset)) * (v > 0) for v in (pred, true))
    blocks = [np.s_[:], *np.ndindex(6), *(np.s_[:, y:y + 7, x:x + 19] for y in range(0, 40, 7)
                                          for x in range(0, 40, 19))]
    for cut in (blocks[:1], blocks[1:7], blocks[:6:-1]):
        table = Contingency()
        for block in cut:
            table.add(wide_pred[block], wide_true[block].astype(np.uint64))
        assert table.scores() == pytest.approx(expected, rel=1e-12)
        p, t, count = table.table()
        for k in range(len(count)):
            assert count[k] == ((wide_pred == p[k]) & (wide_true == t[k])).sum()
        assert count.sum() == pred.size


def test_scores_may_be_asked_for_in_between(monkeypatch):
    """A running figure; and the table is folded up whenever it has grown."""
    monkeypatch.setattr("utils.instance_metrics.CHUNK", 97)
    pred, true = volumes()
    table = Contingency()
    for z in range(len(pred)):
        table.add(pred[z], true[z])
        assert table.scores() == pytest.approx(scores(pred[:z + 1], true[:z + 1]), rel=1e-9)


def test_memory_does_not_grow_with_the_block():
    """A block of 64 MB, contiguous or cut out of a larger one, costs a few MB more."""
    true = np.zeros((16, 1024, 1100), np.uint32)
    true += (np.arange(1100) // 50).astype(np.uint32)
    for block in (true, true[:, :, :1024]):
        table = Contingency()
        tracemalloc.start()
        table.add(block, block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6


def test_equal_and_degenerate_volumes():
    """A perfect result scores perfectly, however few objects; nothing to count is nan, not a good figure."""
    for true in (np.ones((2, 3, 4), int), np.arange(1, 25).reshape(2, 3, 4), volumes()[1]):
        found = scores(true, true)
        assert found["voi"] == pytest.approx(0, abs=1e-12)
        assert found["ari"] == found["ami"] == found["axi"] == found["instance_f1"] == 1 and found["ted"] == 0
    for shape in ((2, 3, 4), (0,), (0, 3, 4)):
        found = scores(np.ones(shape, int), np.zeros(shape, int))
        for name in ("adapted_rand_error", "rand_recall", "voi", "voi_split", "ari", "ami", "axi"):
            assert math.isnan(found[name]), name
    assert math.isnan(Contingency().scores()["adapted_rand_error"])
    cells = np.arange(1, 25)
    assert scores(cells, np.ones(24, int))["ari"] == scores(np.ones(24, int), cells)["ami"] == 0


@pytest.mark.parametrize("pred, true, message", [
    (np.zeros((2, 3)), np.zeros((2, 3), int), "pred is float64"),
    (np.zeros(4, int), np.zeros(5, int), "shape"),
    (np.zeros(3, int), np.array([0, -100, 2]), "true holds negative")])
def test_what_are_no_ids_is_refused(pred, true, message):
    """Probabilities, another crop, or semantic labels with the ignored class."""
    table = Contingency()
    with pytest.raises(ValueError, match=message):
        table.add(pred, true)
    assert not len(table.table()[0])


def semantic(pred, true, classes=6, **options):
    metrics = SemanticMetrics(classes)
    metrics.update(pred, true, **options)
    return metrics.compute()


def test_classes_equal_scikit_learn():
    """Every class present: accuracy, macro F1 (= Dice) and macro Jaccard index."""
    from sklearn.metrics import accuracy_score, f1_score, jaccard_score
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, (2, 3, 8, 9))
    pred = np.where(rng.random(true.shape) < 0.5, true, true[::-1])
    true[0, 0, :2] = -100
    found, kept = semantic(pred, true), true != -100
    pair = true[kept], pred[kept]
    assert found["accuracy"] == pytest.approx(accuracy_score(*pair))
    assert found["dice"] == pytest.approx(f1_score(*pair, average="macro"))
    assert found["iou"] == pytest.approx(jaccard_score(*pair, average="macro"))
    assert [found[f"dice/{k}"] for k in range(6)] == pytest.approx(f1_score(*pair, average=None).tolist())


def test_absent_classes_are_no_floor():
    """Most of the 16 classes are unused; counted as 0 or 1 they would move every mean."""
    true = np.array([[0, 0, 1, 1]])
    found = semantic(np.array([[0, 0, 1, 4]]), true, classes=16)
    assert found["dice"] == pytest.approx((1 + 2 / 3) / 2) and found["iou"] == pytest.approx((1 + 1 / 2) / 2)
    assert math.isnan(found["dice/4"]) and found["accuracy"] == 0.75
    metrics = SemanticMetrics(16, ["background", "neuron", "cleft"])
    metrics.update(true, true)
    assert {"dice/background", "dice/neuron", "dice/cleft"} < set(metrics.compute())
    assert all(math.isnan(value) for value in SemanticMetrics(3).compute().values())


def test_what_the_label_may_mean_is_right():
    """Against a loop over voxels; a label may mean less than the network knows, and differs by data set."""
    rng = np.random.default_rng(0)
    true, pred = rng.integers(0, 5, (2, 2, 4, 6, 7))
    true[0, 0, 0] = -100
    meaning = np.stack([np.eye(5, dtype=bool)] * 2)
    meaning[0, 0, 2] = meaning[0, 4, 2] = meaning[1, 1, [1, 3]] = True
    expected = np.zeros((8, 8), int)
    for place in np.ndindex(true.shape):
        t, p = true[place], pred[place]
        if t != -100:
            expected[t, t if meaning[place[0], t, p] else p] += 1
    metrics = SemanticMetrics(8)
    metrics.update(pred, true, torch.from_numpy(meaning))
    np.testing.assert_array_equal(metrics.confusion, expected)
    one_by_one = SemanticMetrics(8)
    for i in range(2):
        one_by_one.update(torch.from_numpy(pred[i]), true[i], meaning[i])
    np.testing.assert_array_equal(one_by_one.confusion, expected)
    assert semantic(np.array([7]), np.array([4]), classes=8, meaning=meaning[0])["accuracy"] == 0


@pytest.mark.parametrize("pred, true, message", [
    ([0, 5], [0, 1], "pred holds classes 0 to 5"), ([0, 1], [0, 9], "true holds classes 0 to 9"),
    ([0, 1], [-1, 1], "true holds classes -1"), ([0, 1], [0, 1, 1], "shape")])
def test_classes_out_of_range_are_refused(pred, true, message):
    """They would be counted in the row of another class."""
    with pytest.raises(ValueError, match=message):
        semantic(np.array(pred), np.array(true), classes=5)


def reduce_on_a_rank(expected):
    distributed.setup_distributed()
    share = slice(2, 6) if distributed.rank() else slice(0, 2)
    pred, true = volumes()
    metrics = SemanticMetrics(20)
    metrics.update(pred[share], true[share])
    metrics.reduce()
    assert distributed.world_size() == 2 and metrics.confusion.tolist() == expected
    distributed.cleanup()


def test_ranks_with_uneven_shares_add_exactly():
    """A mean of the ranks' means would depend on who saw what."""
    metrics = SemanticMetrics(20)
    metrics.update(*volumes())
    two_ranks(lambda: reduce_on_a_rank(metrics.confusion.tolist()))
