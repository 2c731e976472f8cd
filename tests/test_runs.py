"""Which checkpoint of a run counts as the best, and which files stay."""

import json
import math

import pytest
import torch

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import UserError
from utils.runs import (
    best_row,
    is_better,
    keep_checkpoint,
    monitored,
    open_run,
    own_sums,
    resume_position,
    stale_for,
)


@pytest.mark.parametrize("mode, value, best, better", [
    ("min", 1.0, 2.0, True), ("min", 2.0, 2.0, False), ("max", 1.0, 2.0, False), ("max", 3.0, 2.0, True),
    ("min", 5.0, None, True), ("min", math.nan, 2.0, False), ("max", math.nan, None, True),
    ("max", math.nan, math.nan, True), ("max", 0.1, math.nan, True)])
def test_better_is_lower_or_higher_and_nan_only_better_than_nothing(mode, value, best, better):
    """An AUROC of one class is undefined: it beats no number, and the first epoch is not kept for ever."""
    assert is_better({"val/x": value}, best, "val/x", mode) is better


def test_a_metric_that_is_not_measured_is_refused_by_name():
    """A mistyped constant would keep the first epoch for ever; one left out later is no mistake."""
    with pytest.raises(UserError, match="val/auc is not measured; there are epoch, val/auroc"):
        is_better({"epoch": 1, "val/auroc": 0.5}, None, "val/auc", "max")
    assert not is_better({"epoch": 2}, 0.5, "val/auroc", "max")
    assert not is_better({"epoch": 2}, math.nan, "val/auroc", "max")


@pytest.mark.parametrize("metric, mode, words", [
    ("val/auroc", "up", 'use "min" or "max"'), ("val/auroc", "min", 'use "max"'),
    ("val/mae", "max", 'worst epoch: use "min"'), ("train/loss", "max", 'use "min"')])
def test_a_mode_that_would_keep_the_worst_epoch_is_refused(metric, mode, words):
    """Who changes the metric alone has the mode of the one before."""
    with pytest.raises(UserError, match=words):
        monitored(metric, mode)
    for fine in ((metric, "max" if "max" in words else "min"), ("val/rank", "max"), ("val/mine", "min")):
        assert monitored(*fine) == fine


def save_epoch(folder, history, **entries):
    """Write mil_last.pt as at the end of the last epoch of ``history``."""
    save_checkpoint(folder / "mil_last.pt", kind="mil", model_state_dict={}, history=history,
                    **{"epoch": history[-1]["epoch"], "step": history[-1]["epoch"], **entries})


def test_the_best_epoch_and_the_wanted_ones_stay(tmp_path):
    """By a metric that rises: epoch 2 is best, 3 and 4 are pruned, the last file is named instead."""
    history, names = [], []
    for epoch, value in enumerate([0.5, 0.9, 0.7, 0.6], start=1):
        history.append({"epoch": epoch, "val/auroc": value})
        save_epoch(tmp_path, history)
        names.append(keep_checkpoint(tmp_path, "mil", 1, 0, "val/auroc", "max"))
    assert names == ["mil_epoch_1.pt", "mil_epoch_2.pt", "mil_last.pt", "mil_last.pt"]
    assert load_checkpoint(tmp_path / "mil_best.pt")["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mil_best.pt", "mil_epoch_2.pt", "mil_last.pt"}


def test_a_branch_has_a_best_checkpoint_of_its_own(tmp_path):
    """The best epoch of the run that it left lies in another folder; here the best of these is kept."""
    history, best = [{"epoch": 1, "val/loss": 0.1}], []
    for epoch, value in enumerate([0.3, 0.25, 0.28, math.nan], start=2):
        history.append({"epoch": epoch, "val/loss": value})
        save_epoch(tmp_path, history)
        keep_checkpoint(tmp_path, "mil", 1, 0)
        best.append(load_checkpoint(tmp_path / "mil_best.pt")["epoch"])
    assert best == [2, 3, 3, 3]
    (tmp_path / "mil_best.pt").write_bytes(b"PK")
    keep_checkpoint(tmp_path, "mil", 1, 0)
    assert load_checkpoint(tmp_path / "mil_best.pt")["epoch"] == 5


def test_only_the_end_of_an_epoch_is_copied(tmp_path):
    """A run that goes on asks for the copies too: it may stand inside an epoch, or lack a last file."""
    assert keep_checkpoint(tmp_path, "mil", 1, 1) == "mil_last.pt"
    save_epoch(tmp_path, [{"epoch": 1, "val/loss": 0.5}], epoch=2)
    assert keep_checkpoint(tmp_path, "mil", 1, 1) == "mil_last.pt"
    (tmp_path / "mil_last.pt").write_bytes(b"PK")
    assert keep_checkpoint(tmp_path, "mil", 1, 1) == "mil_last.pt"
    assert [path.name for path in tmp_path.iterdir()] == ["mil_last.pt"]


@pytest.mark.parametrize("values, mode, epoch", [
    ([3.0, 2.0, 2.0], "min", 2), ([0.1, 0.3, 0.2], "max", 2), ([math.nan, 5.0], "min", 2),
    ([math.nan, math.nan], "max", 2), ([0.4, math.nan], "min", 1)])
def test_the_best_row_is_the_one_that_was_better_than_all_before(values, mode, epoch):
    """The same whether it was found epoch by epoch or, after a kill, from the history."""
    history = [{"epoch": n, "val/x": value} for n, value in enumerate(values, start=1)]
    assert best_row([*history, {"epoch": 99}], "val/x", mode)["epoch"] == epoch


def test_a_damaged_last_file_is_made_good(tmp_path):
    """A run that has nothing left to do would leave it damaged for good."""
    (tmp_path / "run").mkdir()
    save_epoch(tmp_path / "run", [{"epoch": 1, "val/loss": 0.5}], optimizer_state_dict={})
    keep_checkpoint(tmp_path / "run", "mil", 1, 0)
    whole = (tmp_path / "run" / "mil_last.pt").read_bytes()
    (tmp_path / "run" / "mil_last.pt").write_bytes(whole[:100])
    _, state = open_run(tmp_path, "run", "auto", "mil")
    assert state["epoch"] == 1 and (tmp_path / "run" / "mil_last.pt").read_bytes() == whole


def test_weights_alone_are_not_resumed(tmp_path):
    """A published file: it has no optimizer to go on with, and a run from it would be another one."""
    save_checkpoint(tmp_path / "mil_best.pt", kind="mil", model_state_dict={}, step=1)
    with pytest.raises(UserError, match="mil_best.pt.*--init"):
        open_run(tmp_path, "run", tmp_path / "mil_best.pt", "mil")


def test_going_on_under_another_name_never_overwrites_that_run(tmp_path):
    """-c PATH -n NAME branches off into a folder without a run; the run's own name goes on in its folder."""
    path = tmp_path / "first" / "mil_last.pt"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "mil_last.pt", kind="mil", model_state_dict={}, step=1,
                        optimizer_state_dict={})
    with pytest.raises(UserError, match="second already holds a run"):
        open_run(tmp_path, "second", path, "mil")
    for name, folder in (("third", "third"), ("first", "first"), (None, "first")):
        run_dir, state = open_run(tmp_path, name, path, "mil")
        assert run_dir == tmp_path / folder and state["step"] == 1


def test_a_trial_and_a_run_never_go_on_from_each_other(tmp_path):
    """The epoch of --fast-dev-run is of one batch; a run that took it for its first would miss an epoch."""
    folder = tmp_path / "run"
    folder.mkdir()
    for words, trial in ((["--fast-dev-run"], False), ([], True)):
        (folder / "training_params.json").write_text(json.dumps({"command": ["train.py", *words]}))
        save_epoch(folder, [{"epoch": 1, "val/loss": 0.5}], optimizer_state_dict={})
        path = folder / "mil_last.pt"
        for name, checkpoint in (("run", "auto"), ("other", path), (None, path)):
            with pytest.raises(UserError, match="run/mil_last.pt: .* --fast-dev-run .* choose another -n"):
                open_run(tmp_path, name, checkpoint, "mil", trial)
        assert open_run(tmp_path, "run", "auto", "mil", not trial)[1]["epoch"] == 1
        with pytest.raises(UserError, match="remove it" if words else "resume it with -c auto"):
            open_run(tmp_path, "run", None, "mil", trial)


@pytest.mark.parametrize("checkpoint", [None, "auto"])
def test_a_run_of_another_kind_keeps_its_folder(checkpoint, tmp_path):
    """Both would write metrics.csv, the curves and the samples."""
    (tmp_path / "run").mkdir()
    save_epoch(tmp_path / "run", [{"epoch": 1, "val/loss": 0.5}])
    with pytest.raises(UserError, match="run already holds a run; .*choose another -n"):
        open_run(tmp_path, "run", checkpoint, "hvit")


@pytest.mark.parametrize("batch, num_batches, every, position", [
    (4, 10, 2, (3, 4)),             # nothing changed
    (4, 20, 2, (3, 8)),             # half the ranks or the batch: the same share of the epoch
    (4, 5, 2, (3, 2)),              # twice as many
    (4, 10, 3, (3, 3)),             # other groups: back to the start of one
    (10, 10, 3, (3, 10)),           # only the validation is left
    (10, 5, 2, (3, 5))])
def test_an_epoch_goes_on_at_its_share_and_at_the_start_of_a_group(batch, num_batches, every, position):
    """A step of a part of a group would weigh its batches less; a finished epoch trains nothing twice."""
    checkpoint = {"epoch": 3, "batch_in_epoch": batch, "num_batches": 10, "history": [{"epoch": 2}]}
    assert resume_position(checkpoint, num_batches, every) == position
    assert resume_position({**checkpoint, "history": [{"epoch": 3}]}, num_batches, every) == (4, 0)


def test_every_rank_goes_on_with_its_own_sums_and_other_ranks_with_their_mean(monkeypatch):
    """A mean shared by all would differ from the sum that a run in peace has in its last bits."""
    saved = [{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(3.0)}]
    monkeypatch.setattr("utils.runs.world_size", lambda: 2)
    monkeypatch.setattr("utils.runs.rank", lambda: 1)
    assert own_sums(saved, 1.0, "cpu") == {"loss": 3.0}
    assert own_sums([{}, {}], 1.0, "cpu") == {}
    monkeypatch.setattr("utils.runs.world_size", lambda: 3)
    assert own_sums(saved, 0.5, "cpu") == {"loss": 1.0}
    assert own_sums(saved[0], 1.0, "cpu") == {"loss": 1.0}


@pytest.mark.parametrize("values, mode, expected", [
    ([3.0, 2.0, 2.5, 2.4], "min", 2), ([0.1, 0.3, 0.2], "max", 1), ([2.0, 2.0, 2.0], "min", 2),
    ([math.nan, 1.0], "min", 0), ([1.0, math.nan, 2.0], "min", 1), ([], "min", 0)])
def test_a_run_is_stale_for_the_validations_since_its_best(values, mode, expected):
    """Epochs without the metric, or without a number, are no validations; an equal one is no better one."""
    history = [{"epoch": n, "val/x": value} for n, value in enumerate(values)] + [{"epoch": 99}]
    assert stale_for(history, "val/x", mode) == expected
