"""Figures of masks against loops, MONAI, scikit-learn and torchmetrics; empty masks, ranks, resamples."""

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage
from torchmetrics.functional.segmentation import dice_score, mean_iou

from utils import distributed, mask_metrics
from utils.config import UserError
from utils.mask_metrics import COLUMNS, DESCRIPTIONS, MaskMetrics, hausdorff, predict_masks

NAMES = ["cord", "lesion"]


def blobs(shape, classes, seed, share=0.6):
    """Integer masks [B, ...] of round patches of classes 0 to ``classes``, about ``share`` of them 0."""
    rng = np.random.default_rng(seed)
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape[1:]), 1.2) for _ in range(shape[0])])
    edges = np.quantile(field, np.linspace(share, 1, classes + 1)[:-1])
    return torch.from_numpy(np.digitize(field, edges))


def pair(shape=(6, 20, 24), classes=2, seed=0):
    """(pred, masks) that overlap in part; every third true and every fourth predicted one is empty."""
    masks, pred = blobs(shape, classes, seed), blobs(shape, classes, seed + 1)
    agree = torch.rand(len(masks), generator=torch.Generator().manual_seed(seed)) < 0.7
    pred = torch.where(agree.view(-1, *[1] * (len(shape) - 1)), masks.roll(2, -1), pred)
    masks[::3], pred[::4] = 0, 0
    return pred, masks


def measured(pred, masks, names=NAMES, spacing=None, patients=None, **settings):
    metrics = MaskMetrics(names, **settings)
    spacing = torch.ones(len(masks), masks.ndim - 1) if spacing is None else torch.as_tensor(spacing)
    words = [f"case{i}" for i in range(len(masks))]
    metrics.add(pred, masks, spacing, words, words if patients is None else patients)
    return metrics


def lesion(*masks):
    """Masks [B, H, W] of one class from strings, a row of "#" and "." for each line."""
    return torch.tensor([[[mark == "#" for mark in line] for line in mask.split()] for mask in masks]).long()


def by_loops(pred, masks, k):
    """Dice, IoU, and numbers of components found, true and false, of one class, case by case."""
    rows, around = [], ndimage.generate_binary_structure(masks.ndim - 1, masks.ndim - 1)
    for p, t in zip((pred == k).numpy(), (masks == k).numpy(), strict=True):
        true, lesions = ndimage.label(t, around)
        called, components = ndimage.label(p, around)
        both, total = (p & t).sum(), p.sum() + t.sum()
        rows.append({"dice": 2 * both / total if total else math.nan,
                     "iou": both / (p | t).sum() if total else math.nan, "has": t.any(), "called": p.any(),
                     "lesions": lesions, "found": sum(p[true == i + 1].any() for i in range(lesions)),
                     "false": sum(not t[called == i + 1].any() for i in range(components)),
                     "both": both, "total": total, "right": (p == t).mean()})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("shape", [(12, 20, 24), (7, 5, 12, 14)])
def test_every_figure_is_that_of_a_loop(shape):
    """Slices and volumes, two classes; presence by scikit-learn, what is undefined left out."""
    pred, masks = pair(shape)
    figures = measured(pred, masks).compute()
    for k, name in enumerate(NAMES, 1):
        loops = by_loops(pred, masks, k)
        has, called = loops["has"], loops["called"]
        precision, recall, f1, _ = sk.precision_recall_fscore_support(has, called, average="binary")
        expected = {
            "dice": loops["dice"][has].mean(), "iou": loops["iou"][has].mean(),
            "dice_all": np.nan_to_num(loops["dice"], nan=1).mean(),
            "dice_pooled": 2 * loops["both"].sum() / loops["total"].sum(),
            "lesion_sensitivity": loops["found"].sum() / loops["lesions"].sum(),
            "lesion_false_positives": loops["false"].mean(), "precision": precision, "recall": recall,
            "f1": f1, "specificity": (~called[~has]).mean(), "accuracy": loops["right"].mean()}
        assert 0 < expected["dice"] < 1 and 0 < expected["lesion_sensitivity"] < 1 and not has.all()
        for figure, value in expected.items():
            assert figures[f"{figure}/{name}"] == pytest.approx(value, rel=1e-12), figure
    for figure in DESCRIPTIONS:
        mean = np.mean([figures[f"{figure}/{name}"] for name in NAMES])
        assert figures[figure] == pytest.approx(mean, rel=1e-12)


def test_dice_and_iou_are_torchmetrics():
    """Where no mask is empty there is one definition."""
    pred, masks = blobs((5, 20, 24), 2, 0), blobs((5, 20, 24), 2, 1)
    figures = measured(pred, masks).compute()
    dice = dice_score(pred, masks, 3, include_background=False, average="none", input_format="index")
    iou = mean_iou(pred, masks, 3, include_background=False, per_class=True, input_format="index")
    assert [figures[f"dice/{name}"] for name in NAMES] == pytest.approx(dice.mean(0).tolist())
    assert [figures[f"iou/{name}"] for name in NAMES] == pytest.approx(iou.mean(0).tolist())
    assert figures["dice"] == figures["dice_all"]


@pytest.mark.parametrize("shape", [(8, 20, 24), (8, 1, 30), (3, 6, 12, 14), (16, 3, 3)])
def test_the_distance_is_monais_in_mm(shape):
    """Anisotropic spacing of each case, masks that touch the border of the image, single voxels."""
    pred, masks = blobs(shape, 1, 0, 0.7), blobs(shape, 1, 1, 0.7)
    spacing = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 3, (shape[0], len(shape) - 1)))
    both = pred.flatten(1).any(1) & masks.flatten(1).any(1)
    assert both.sum() > 1
    metrics = measured(pred, masks, ["cord"], spacing)
    theirs = compute_hausdorff_distance(pred[both][:, None], masks[both][:, None], True, percentile=95,
                                        spacing=spacing[both].tolist())[:, 0]
    torch.testing.assert_close(metrics.rows[both, 0, -1], theirs.double(), rtol=1e-5, atol=1e-6)
    assert metrics.rows[~both, 0, -1].isnan().all()
    assert metrics.compute()["hd95"] == pytest.approx(theirs.double().mean().item(), rel=1e-5)


def test_a_shift_is_as_far_as_the_spacing_says():
    """Of a row by three pixels along either axis; the spacing is in the order of the axes."""
    one, other, down = np.zeros((3, 9, 9), bool)
    one[2, 2], other[2, 5], down[5, 2] = True, True, True
    assert hausdorff(one, other, (2.0, 0.5)) == pytest.approx(1.5)
    assert hausdorff(one, down, (2.0, 0.5)) == pytest.approx(6.0)


def test_empty_masks():
    """Both empty, only the true one, only the predicted one, and neither: each counts where it is said."""
    full, empty = "##. ##. ...", "... ... ..."
    pred, masks = lesion(empty, full, empty, full), lesion(empty, empty, full, full)
    metrics = measured(pred, masks, ["lesion"])
    figures = metrics.compute()
    assert figures["dice"] == figures["iou"] == 0.5                    # of the two that have one
    assert figures["dice_all"] == 0.5                                  # 1, 0, 0, 1
    assert figures["dice_pooled"] == 0.5 and figures["hd95"] == 0
    assert figures["precision"] == figures["recall"] == figures["specificity"] == figures["f1"] == 0.5
    assert figures["lesion_sensitivity"] == 0.5 and figures["lesion_false_positives"] == 0.25
    rows = metrics.per_case()
    assert [row["dice"] for row in rows] == pytest.approx([math.nan, 0, 0, 1], nan_ok=True)
    assert [row["iou"] for row in rows] == pytest.approx([math.nan, 0, 0, 1], nan_ok=True)
    assert [row["hd95_mm"] for row in rows] == pytest.approx([math.nan, math.nan, math.nan, 0], nan_ok=True)


def test_figures_without_a_case_are_nan_and_without_a_call_the_precision_is_zero():
    """Nothing to find: no sensitivity.  All missed: nan would hide the worst class from the mean."""
    full, empty = "##. ##. ...", "... ... ..."
    nothing = measured(lesion(empty), lesion(empty), ["lesion"]).compute()
    assert nothing["dice_all"] == nothing["specificity"] == nothing["accuracy"] == 1
    undefined = ("dice", "iou", "dice_pooled", "hd95", "lesion_sensitivity", "precision", "recall", "f1")
    assert all(math.isnan(nothing[name]) for name in undefined)
    missed = measured(lesion(empty), lesion(full), ["lesion"]).compute()
    assert missed["precision"] == missed["recall"] == missed["f1"] == missed["dice"] == 0
    assert math.isnan(missed["specificity"]) and math.isnan(missed["hd95"])
    called = measured(lesion(full), lesion(empty), ["lesion"]).compute()
    assert called["precision"] == called["f1"] == called["specificity"] == called["dice_pooled"] == 0
    assert math.isnan(called["recall"]) and called["lesion_false_positives"] == 1


def test_a_class_that_is_nowhere_is_no_part_of_the_mean():
    """Averaged over absent classes a score has a floor or a ceiling."""
    masks = lesion("##. ##. ...")
    figures = measured(masks, masks).compute()
    assert figures["dice"] == figures["dice/cord"] == 1 and math.isnan(figures["dice/lesion"])


def test_lesions_are_counted_by_components():
    """One voxel is enough to find a lesion, corners hang together, and one that touches none is false."""
    true, pred = lesion("##...# ##...# ...... #....."), lesion("....## .#..#. ...... ....##")
    metrics = measured(pred, true, ["lesion"])
    row = metrics.per_case()[0]
    assert (row["lesions"], row["lesions_found"], row["components"], row["false_positives"]) == (3, 2, 3, 1)
    figures = metrics.compute()
    assert figures["lesion_sensitivity"] == pytest.approx(2 / 3) and figures["lesion_false_positives"] == 1


@pytest.mark.parametrize("share, found", [(0.0, 2), (0.2, 2), (0.25, 1), (0.49, 1), (0.5, 0)])
def test_found_share_asks_for_more_of_a_lesion(share, found):
    """A quarter of one is predicted and half of the other; more than the share is wanted."""
    true, pred = lesion("##...# ##...#"), lesion("#....# ......")
    metrics = measured(pred, true, ["lesion"], found_share=share)
    assert metrics.per_case()[0]["lesions_found"] == found


def test_unknown_voxels_never_count():
    """Whatever is predicted there, no figure changes; a case without a known voxel is no case."""
    pred, masks = pair((6, 20, 24))
    unknown = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    unknown[4] = True
    masks = masks.masked_fill(unknown, -1)
    metrics = measured(pred, masks)
    other = measured(torch.where(unknown, 1 + torch.randint(2, masks.shape), pred), masks)
    assert metrics.cases == metrics.patients == [f"case{i}" for i in (0, 1, 2, 3, 5)]
    assert torch.equal(metrics.rows.nan_to_num(-1), other.rows.nan_to_num(-1))
    assert metrics.rows[:, 0, 0].tolist() == (~unknown).sum((1, 2))[[0, 1, 2, 3, 5]].tolist()
    cut = measured(pred[:, :, 9:], torch.cat([masks[:, :, 9:]], 2))
    padded = masks.clone()
    padded[:, :, :9] = -1
    whole = measured(pred, padded)
    assert torch.equal(whole.rows.nan_to_num(-1), cut.rows.nan_to_num(-1))            # distances too


def test_logits_of_one_class_are_cut_at_the_threshold():
    """Of the probability; bfloat16 as it comes from autocast."""
    logits = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for threshold in (0.2, 0.5, 0.9):
        expected = (logits[:, 0].double().sigmoid() > threshold).long()
        assert torch.equal(predict_masks(logits, 1, threshold), expected)
        metrics = MaskMetrics(["lesion"], threshold)
        metrics.update(logits, expected, torch.ones(3, 2), "abc", "abc")
        assert metrics.compute()["dice"] == 1 and metrics.cases == ["a", "b", "c"]


def test_logits_of_several_classes():
    """With a background the largest wins; without, the largest of those above the threshold."""
    logits = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predict_masks(logits, 2), logits.argmax(1))
    chances = logits.sigmoid()
    expected = torch.where(chances.amax(1) > 0.7, chances.argmax(1) + 1, 0)
    assert torch.equal(predict_masks(logits, 3, 0.7), expected) and len(expected.unique()) == 4
    for shape in ((3, 5, 8, 8), (3, 8)):
        with pytest.raises(ValueError, match="logits"):
            predict_masks(torch.zeros(shape), 2)


def test_batches_do_not_matter():
    """A mean of the batches' means would be wrong."""
    pred, masks = pair((9, 16, 16))
    whole, parts = measured(pred, masks), MaskMetrics(NAMES)
    for start in range(0, 9, 2):
        words = [f"case{i}" for i in range(start, min(start + 2, 9))]
        part = slice(start, start + 2)
        parts.add(pred[part], masks[part].numpy(), np.ones((len(words), 2)), words, words)
    assert torch.equal(whole.rows.nan_to_num(-1), parts.rows.nan_to_num(-1)) and whole.cases == parts.cases
    assert whole.compute() == pytest.approx(parts.compute(), nan_ok=True)


def test_ranks_with_unevenly_many_cases_agree_with_one_process(monkeypatch):
    """One has none at all; every rank must come to the same decision on the best epoch."""
    pred, masks = pair((9, 16, 16))
    whole, parts = measured(pred, masks, patients=list("aabbbccdd")), (slice(0, 2), slice(2, 9), slice(9, 9))
    ranks = []
    for part in parts:
        ranks.append(MaskMetrics(NAMES))
        ranks[-1].add(pred[part], masks[part], torch.ones(9, 2)[part], whole.cases[part],
                      whole.patients[part])
    kept = [[getattr(metrics, name) for metrics in ranks] for name in ("rows", "cases", "patients")]

    def all_gather_object(values, value):
        """What three processes would make of it."""
        values[:] = next(group for group in kept if any(value is own or (
            isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor)) for own in group))

    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    for metrics in ranks:
        metrics.reduce()
        assert torch.equal(metrics.rows.nan_to_num(-1), whole.rows.nan_to_num(-1))
        assert metrics.cases == whole.cases and metrics.patients == whole.patients
        assert metrics.compute() == whole.compute()


def test_the_rows_hold_what_the_csv_says():
    """One for each case and class, whose names, numbers and scores are those of a loop."""
    pred, masks = pair((5, 20, 24))
    rows = measured(pred, masks, patients=list("ppqqr")).per_case()
    assert [(row["case"], row["patient"], row["class"]) for row in rows] == [
        (f"case{i}", patient, name) for i, patient in enumerate("ppqqr") for name in NAMES]
    assert set(rows[0]) == {"case", "patient", "class", "dice", "iou"} | set(COLUMNS) - {"both"}
    for k, name in enumerate(NAMES, 1):
        loops, own = by_loops(pred, masks, k), [row for row in rows if row["class"] == name]
        for figure, column in (("dice", "dice"), ("iou", "iou"), ("lesions", "lesions"),
                               ("found", "lesions_found"), ("false", "false_positives")):
            assert [row[column] for row in own] == pytest.approx(loops[figure].tolist(), nan_ok=True)
        assert [row["true_voxels"] for row in own] == (masks == k).sum((1, 2)).tolist()
        assert [row["pred_voxels"] for row in own] == (pred == k).sum((1, 2)).tolist()
        assert all(isinstance(row["voxels"], int) and row["voxels"] == 480 for row in own)


def test_the_bootstrap_draws_patients_with_all_their_cases():
    """Its resamples are the figures of the drawn patients' cases, put together one by one."""
    pred, masks = pair((9, 16, 16))
    patients = list("aabbbccdd")
    metrics = measured(pred, masks, patients=patients)
    intervals = metrics.bootstrap(torch.Generator().manual_seed(3), 40, level=0.8)
    drawn = torch.randint(4, (40, 4), generator=torch.Generator().manual_seed(3))
    resamples = []
    for draw in drawn.tolist():
        cases = [i for number in draw for i, patient in enumerate(patients) if patient == "abcd"[number]]
        resamples.append(measured(pred[cases], masks[cases]).compute())
    assert intervals.keys() == metrics.compute().keys()
    for name, interval in intervals.items():
        values = np.array([resample[name] for resample in resamples])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            low, high = np.nanquantile(values, [0.1, 0.9])
        expected = metrics.compute()[name], low, high, np.isnan(values).sum()
        assert interval == pytest.approx(expected, nan_ok=True)


def test_cases_of_one_patient_that_are_alike_widen_the_interval():
    """Twenty copies of each patient's case are no more knowledge than one."""
    pred, masks = blobs((8, 16, 16), 1, 0), blobs((8, 16, 16), 1, 1)
    many = [torch.cat([x] * 20) for x in (pred, masks)]

    def width(pred, masks, patients):
        metrics = measured(pred, masks, ["cord"], patients=patients)
        dice = metrics.bootstrap(torch.Generator().manual_seed(0))["dice"]
        return dice.high - dice.low

    once, copied = width(pred, masks, range(8)), width(*many, [i % 8 for i in range(160)])
    assert copied == pytest.approx(once) and width(*many, range(160)) < once / 3


def test_one_patient_has_no_interval():
    """Resampling him gives himself: an interval without width would look like certainty."""
    pred, masks = pair((3, 16, 16))
    intervals = measured(pred, masks, patients=["a"] * 3).bootstrap(torch.Generator().manual_seed(0), 10)
    dice = intervals["dice"]
    assert 0 < dice.value < 1 and math.isnan(dice.low) and math.isnan(dice.high) and dice.left_out == 10


def test_what_cannot_be_measured_is_refused():
    """A table of nothing must not look like a result, nor a class without a name like one that has one."""
    with pytest.raises(UserError, match="no masks"):
        MaskMetrics(NAMES).compute()
    with pytest.raises(UserError, match="no masks"):
        MaskMetrics(NAMES).bootstrap(torch.Generator(), 3)
    for settings in ({"threshold": 0.0}, {"threshold": 1.0}, {"found_share": 1.0}, {"found_share": -0.1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            MaskMetrics(NAMES, **settings)
    zeros, metrics = torch.zeros(2, 4, 4, dtype=torch.int64), MaskMetrics(NAMES)
    for pred, masks in ((zeros + 3, zeros), (zeros, zeros + 3), (zeros - 1, zeros), (zeros, zeros - 2)):
        with pytest.raises(ValueError, match="classes"):
            metrics.add(pred, masks, torch.ones(2, 2), "ab", "ab")
    for pred, spacing, cases in ((zeros[:1], torch.ones(2, 2), "ab"), (zeros, torch.ones(2, 3), "ab"),
                                 (zeros, torch.ones(2, 2), "a")):
        with pytest.raises(ValueError, match="belong"):
            metrics.add(pred, zeros, spacing, cases, "ab")
    assert len(metrics.rows) == 0


def test_every_figure_is_described():
    """The table and the module's text would otherwise leave one out."""
    figures = measured(*pair(classes=1), ["cord"]).compute()
    assert list(figures) == list(DESCRIPTIONS)
    assert all(name in mask_metrics.__doc__ for name in DESCRIPTIONS)
