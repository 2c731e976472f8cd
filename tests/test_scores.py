"""What validation measures does not depend on how items came: batches, repeats, unknown labels."""

import pytest
import torch

from losses.classification import classification_loss
from losses.slice_tasks import slice_loss
from utils.config import UserError
from utils.mask_metrics import MaskMetrics
from utils.photo_metrics import PhotoMetrics
from utils.scores import LogitScores, SliceScores, beside, check_monitor, one_slice


def slices(count=7):
    """(batch, outputs) of slices with masks and classes, some of them unknown."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(count, 8, 8, generator=generator) > 0.7).long()
    masks[:, 0] = -1
    labels = torch.randint(0, 3, (count,), generator=generator)
    labels[2] = -1
    batch = {"mask": masks, "label": labels, "spacing": torch.ones(count, 2),
             "case": [f"c{i}" for i in range(count)], "patient": ["p"] * count}
    return batch, {"masks": torch.randn(count, 1, 8, 8, generator=generator),
                   "labels": torch.randn(count, 3, generator=generator), "terms": torch.ones(2, 2)}


def part(batch, outputs, rows):
    """Some rows of a batch and of its outputs."""
    rows = list(rows)
    keep = {key: value[rows] if torch.is_tensor(value) else [value[i] for i in rows]
            for key, value in batch.items()}
    return keep, {key: value if key == "terms" else value[rows] for key, value in outputs.items()}


def loss(outputs, masks, labels):
    return slice_loss(outputs, masks, labels, "dice")


def test_slices_score_the_same_in_any_batches_and_repeats_do_not_count():
    """A last batch is filled up with repeats; of these ``count`` says how many are new."""
    batch, outputs = slices()
    whole, parts = (SliceScores(loss, ["a", "b", "c"], ["cord"]) for _ in range(2))
    whole.add(batch, outputs, 7)
    for rows, count in ((slice(0, 3), 3), (slice(3, 6), 3), (slice(4, 7), 0), (slice(6, 2, -1), 1)):
        parts.add(*part(batch, outputs, range(7)[rows]), count)
    first, second = whole.compute(), parts.compute()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, nan_ok=True), name


def test_slices_score_as_the_metrics_do_alone():
    """The mean of each slice's loss, and the figures of both kinds; unknown classes are left out."""
    batch, outputs = slices()
    scores = SliceScores(loss, ["a", "b", "c"], ["cord"])
    scores.add(batch, outputs, 7)
    found = scores.compute()
    losses = []
    for i in range(7):
        one, own = part(batch, outputs, [i])
        losses.append(loss(own, one["mask"], one["label"]))
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item())
    masks, classes = MaskMetrics(["cord"]), PhotoMetrics(["a", "b", "c"])
    masks.update(outputs["masks"], batch["mask"], batch["spacing"], batch["case"], batch["patient"])
    known = batch["label"] >= 0
    classes.update(outputs["labels"][known], batch["label"][known])
    figures = masks.compute()
    assert found["dice"] == figures["dice"] and found["pixel_accuracy"] == figures["accuracy"]
    assert found["accuracy"] == classes.compute()["accuracy"]


def test_logits_score_as_one_batch():
    """A loss weighted by classes is no mean of batches' losses."""
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    weight = torch.tensor([1.0, 5.0, 2.0])

    def weighted(logits, labels):
        return classification_loss("ce", logits, labels[:, None].float(), weight)

    scores = LogitScores(weighted, PhotoMetrics("abc"))
    for start in (0, 4, 8):
        rows = torch.arange(start, start + 4) % 9
        scores.add({"label": labels[rows]}, [logits[rows]], min(4, 9 - start))
    found = scores.compute()
    assert found["loss"] == pytest.approx(weighted(logits, labels).item())
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("names, mask_names", [("", ["cord"]), ("ab", []), ("ab", ["cord", "csf"])])
def test_a_monitor_that_is_not_measured_is_named_with_those_that_are(names, mask_names):
    """Before an epoch is spent; of several mask classes each has figures of its own."""
    def scores():
        return SliceScores(loss, names, mask_names)

    one = one_slice(len(names), len(mask_names) + (len(mask_names) > 1))
    measured = {"epoch", "train/loss", "val/loss"} | ({"val/f1_macro"} if names else set())
    measured |= {"val/dice", "val/hd95"} if mask_names else set()
    measured |= {"val/dice/csf"} if len(mask_names) > 1 else set()
    for monitor in measured:
        mode = "min" if monitor.endswith(("loss", "hd95")) else "max"
        check_monitor("SPINE_MONITOR", monitor, mode, "", scores(), *one)
    with pytest.raises(UserError, match="SPINE_MONITOR = val/auroc: not measured with this; there are epoch"):
        check_monitor("SPINE_MONITOR", "val/auroc", "max", "this", scores(), *one)


def test_only_where_both_have_an_accuracy_is_that_of_masks_renamed():
    """A segmenter's accuracy keeps its name."""
    masks = {"dice": 1, "accuracy": 2, "accuracy/cord": 3}
    assert beside({}, masks) == masks
    assert beside({"accuracy": 0}, masks) == {"accuracy": 0, "dice": 1, "pixel_accuracy": 2,
                                              "pixel_accuracy/cord": 3}
