"""Which checkpoint of a run counts as the best, and which files stay."""

import math

import pytest

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import UserError
from utils.runs import is_better, keep_checkpoint


@pytest.mark.parametrize("mode, value, best, better", [
    ("min", 1.0, 2.0, True), ("min", 2.0, 2.0, False), ("max", 1.0, 2.0, False), ("max", 3.0, 2.0, True),
    ("min", 5.0, None, True), ("max", math.nan, None, False), ("min", math.nan, 2.0, False)])
def test_better_is_lower_or_higher_and_never_nan(mode, value, best, better):
    """A metric that could not be measured, as an AUROC of one class, beats nothing."""
    assert is_better({"val/x": value}, best, "val/x", mode) is better


def test_a_metric_that_is_not_measured_is_refused_by_name():
    """A mistyped constant would keep the first epoch for ever; one left out later is no mistake."""
    with pytest.raises(UserError, match="val/auc is not measured; there are epoch, val/auroc"):
        is_better({"epoch": 1, "val/auroc": 0.5}, None, "val/auc", "max")
    with pytest.raises(UserError, match='"up": use "min" or "max"'):
        is_better({"val/auroc": 0.5}, None, "val/auroc", "up")
    assert not is_better({"epoch": 2}, 0.5, "val/auroc", "max")


def test_the_best_epoch_and_the_wanted_ones_stay(tmp_path):
    """By a metric that rises: epoch 2 is best, 3 and 4 are pruned, the last file is named instead."""
    history, best, names = [], None, []
    for epoch, value in enumerate([0.5, 0.9, 0.7, 0.6], start=1):
        history.append({"epoch": epoch, "val/auroc": value})
        save_checkpoint(tmp_path / "mil_last.pt", kind="mil", model_state_dict={}, epoch=epoch)
        better = is_better(history[-1], best, "val/auroc", "max")
        best = value if better else best
        names.append(keep_checkpoint(tmp_path, "mil", history, better, 1, 0, "val/auroc", "max"))
    assert names == ["mil_epoch_1.pt", "mil_epoch_2.pt", "mil_last.pt", "mil_last.pt"]
    assert load_checkpoint(tmp_path / "mil_best.pt")["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mil_best.pt", "mil_epoch_2.pt", "mil_last.pt"}
