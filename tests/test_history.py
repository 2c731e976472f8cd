"""metrics.csv, trackers and curves."""

import csv
import math

import pytest
from forks import two_ranks
from matplotlib.figure import Figure
from PIL import Image

from utils import distributed
from utils.config import UserError
from utils.history import Trackers, epoch_line, say_end, write_history
from utils.plotting import draw_metric, plot_detailed_curves, plot_loss_curves

HISTORY = [{"epoch": 1, "step": 4, "train/loss": 0.5, "val/loss": 0.6, "train/L1": 0.3, "train/lr": 1e-3},
           {"epoch": 2, "step": 8, "train/loss": 0.4, "val/loss": 0.5, "train/L1": 0.2, "train/lr": 5e-4,
           "val/dice": 0.1}]


def test_the_table_has_a_row_per_epoch_and_every_metric(tmp_path):
    """A metric that begins later gets its column too, and a rewrite doubles nothing."""
    for _ in range(2):
        write_history(tmp_path, HISTORY)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["val/dice"] for row in rows] == ["", "0.1"]
    assert [float(row["train/loss"]) for row in rows] == [0.5, 0.4]


def test_the_line_of_an_epoch_leaves_single_labels_to_the_table():
    """A hundred findings would make it unreadable."""
    row = {"epoch": 3, "train/loss": 0.5, "val/loss": 0.4, "val/auroc": 0.9, "val/auroc/mass": 0.8}
    assert epoch_line(row) == "Epoch 3 Complete: Train Loss: 0.5000 | Val Loss: 0.4000 | auroc: 0.900"


def test_an_epoch_without_validation_has_a_line_and_a_row(tmp_path):
    """Where validation is rare its columns are empty, and the curves go on."""
    rows = [*HISTORY, {"epoch": 3, "step": 12, "train/loss": 0.3, "train/L1": 0.1, "train/lr": 1e-4}]
    assert epoch_line(rows[-1]) == "Epoch 3 Complete: Train Loss: 0.3000"
    write_history(tmp_path, rows)
    with open(tmp_path / "metrics.csv") as file:
        assert [row["val/loss"] for row in csv.DictReader(file)] == ["0.6", "0.5", ""]


def test_files_that_any_rank_has_skipped_are_told_at_the_end():
    """Each rank reads files of its own; the first one alone prints."""
    def end():
        distributed.setup_distributed()
        say_end("runs/a", {f"bad {distributed.rank()}", "both"}, True)
        distributed.cleanup()

    assert two_ranks(end).splitlines() == ["Skipped 3 bad files: bad 0, bad 1, both", "Done: runs/a"]


def test_table_and_both_curves_are_written_together(tmp_path):
    """What each training script leaves after an epoch."""
    write_history(tmp_path, HISTORY)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.csv", "loss_curves.png", "detailed_loss_curves.png"}


def test_tensorboard_holds_the_logged_values(tmp_path):
    """What the script logs is what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    trackers = Trackers(["tensorboard"], tmp_path, settings={})
    for row in HISTORY:
        trackers.log({"val/loss": row["val/loss"]}, row["step"])
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("val/loss")
    assert [(event.step, round(event.value, 6)) for event in events] == [(4, 0.6), (8, 0.5)]


@pytest.mark.parametrize("step, hidden", [(0, 0), (8, 9)])
def test_what_a_resumed_run_does_again_is_hidden_and_nothing_else(step, hidden, tmp_path, monkeypatch):
    """TensorBoard hides from purge_step on; the epoch that ended at the checkpoint's step stays."""
    asked = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter",
                        lambda folder, purge_step: asked.append(purge_step))
    Trackers(["tensorboard"], tmp_path, {}, step)
    assert asked == [hidden]


def test_no_tracker_writes_nothing_and_an_unknown_one_is_refused(tmp_path):
    """TRACKERS does what it says."""
    trackers = Trackers([], tmp_path, settings={})
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="TRACKERS"):
        Trackers(["tensorbord"], tmp_path, settings={})


def test_wandb_gets_the_settings_and_the_values(tmp_path, monkeypatch):
    """A stand-in module records the calls: the real one needs an account."""
    import sys
    import types
    calls = []
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = types.SimpleNamespace()
    stand_in.init = lambda **settings: calls.append(settings) or types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    trackers = Trackers(["wandb"], tmp_path / "run_a", settings={"SEED": 0})
    trackers.log({"loss": 1.0}, 3)
    trackers.close()
    assert calls[0]["name"] == "run_a" and calls[0]["config"] == {"SEED": 0}
    assert calls[1:] == [({"loss": 1.0}, 3), "finish"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    """The message says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        Trackers(["wandb"], tmp_path, settings={})


@pytest.mark.parametrize("plot", [plot_loss_curves, plot_detailed_curves])
@pytest.mark.parametrize("epochs", [1, 2])
def test_curves_are_whole_pictures_from_the_first_epoch_on(plot, epochs, tmp_path):
    """One epoch gives a point; the picture is not blank."""
    plot(tmp_path / "curve.png", HISTORY[:epochs])
    picture = Image.open(tmp_path / "curve.png").convert("RGB")
    assert len(picture.getcolors(maxcolors=10 ** 6)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_each_metric_has_a_panel(monkeypatch, tmp_path):
    """Every loss term shows in the detailed curves, training and validation in one panel."""
    drawn = []
    monkeypatch.setattr("utils.plotting.draw_metric", lambda axes, history, name: drawn.append(name))
    plot_detailed_curves(tmp_path / "curve.png", [{**row, "val/auroc": math.nan} for row in HISTORY])
    assert drawn == ["loss", "L1", "lr", "dice"]                        # an undefined one has nothing to show


def test_the_axis_of_a_single_epoch_has_whole_numbers():
    """There is no epoch 0.98."""
    axes = Figure().add_subplot()
    draw_metric(axes, HISTORY[:1], "loss")
    assert all(tick == round(tick) for tick in axes.get_xticks())
