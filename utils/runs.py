"""The folder of a run, the checkpoints that it goes on from and keeps, and the loss that ends it."""

import json
import math
import time
from pathlib import Path

import torch

from utils.checkpoint import UNREADABLE, copy_checkpoint, load_checkpoint, newest_sound, prune_epochs
from utils.config import UserError
from utils.distributed import broadcast_word, is_main, rank, world_size
from utils.files import claim

# Metrics that a good network lowers, and that it raises.
FALLING = ("loss", "mae", "rmse", "ece", "hd95", "adapted_rand_error", "voi", "voi_split", "voi_merge")
RISING = ("auroc", "balanced_accuracy", "f1", "f1_macro", "accuracy", "recall", "precision", "r2", "dice",
          "iou", "probe_accuracy")


def open_run(runs_dir, name, checkpoint, kind, trial=False):
    """(folder of the run, checkpoint dict to resume from or None).

    name: word under ``runs_dir``; None takes the folder of the checkpoint, or ``<kind>_<time>``.
    checkpoint: None starts a run, a path resumes that file, "auto" resumes the newest sound file of the run,
    and starts when it has none; where _last.pt was damaged or missing, it is that file again.
    trial: of --fast-dev-run, which goes on with no other run, and no other run with it.
    The folder is this process's until it ends.
    UserError: a run of that name, of whatever kind, exists and is not the one resumed, or another process
    trains it; "auto" without a name; a checkpoint that holds weights but not the state of their training.
    """
    runs_dir, last = Path(runs_dir), None
    if name is not None and Path(name).name != name:
        raise UserError(f"-n {name}: the name of a run is a plain word, not a path")
    if checkpoint == "auto":
        if name is None:
            raise UserError("-c auto: name the run with -n")
        run_dir = runs_dir / name
        found = newest_sound(run_dir, kind)
        checkpoint, state, damaged = found or (None, None, [])
        last = found and run_dir / f"{kind}_last.pt"
        if found is None:
            refuse_other_run(run_dir)
        if is_main():
            print("".join(f"Damaged, passed over: {file}\n" for file in damaged), end="")
    elif checkpoint is not None:
        state = load_checkpoint(checkpoint, kind)
        run_dir = runs_dir / name if name is not None else Path(checkpoint).parent
        if run_dir.resolve() != Path(checkpoint).resolve().parent:
            refuse_other_run(run_dir)
    else:
        run_dir = runs_dir / broadcast_word(name or f"{kind}_{time.strftime('%Y%m%d_%H%M%S')}")
        refuse_other_run(run_dir)
        state = None
    if state is not None and "optimizer_state_dict" not in state:
        raise UserError(f"{checkpoint}: holds weights, but no training to go on with; start with --init")
    if state is not None and is_trial(Path(checkpoint).parent) != trial:
        raise UserError(f"{checkpoint}: {'no' if trial else 'a'} --fast-dev-run has written it, and this is "
                        f"{'one' if trial else 'none'}; choose another -n, or remove the folder")
    if is_main():
        claim(run_dir, "wait for its end, or choose another -n")
        (run_dir / "samples").mkdir(exist_ok=True)
        if state is not None:
            print(f"Resuming from {checkpoint}")
        if last is not None and checkpoint != last:
            copy_checkpoint(checkpoint, last)
    return run_dir, state


def refuse_other_run(run_dir):
    """UserError, from the main process, when the folder holds a run, whose files another would overwrite."""
    if is_main() and any(run_dir.glob("*.pt")):
        way = "remove it" if is_trial(run_dir) else "resume it with -c auto"
        raise UserError(f"{run_dir} already holds a run; {way}, or choose another -n")


def is_trial(run_dir):
    """Whether the run in a folder was started with --fast-dev-run."""
    try:
        return "--fast-dev-run" in json.loads((run_dir / "training_params.json").read_text())["command"]
    except FileNotFoundError:
        return False


def resume_position(checkpoint, num_batches, every):
    """(epoch, batch) to go on from; an epoch counts as done when its validation stands in the history.

    num_batches: micro-batches of that epoch now; with another batch or world size than the checkpoint's, the
    run goes on at the same share of the epoch, at the start of a group of ``every`` micro-batches.  Of an
    epoch whose batches are all done only the validation is left.
    """
    epoch, batch, history = checkpoint["epoch"], checkpoint["batch_in_epoch"], checkpoint["history"]
    if history and history[-1]["epoch"] == epoch:
        return epoch + 1, 0
    if batch == checkpoint["num_batches"]:
        return epoch, num_batches
    batch = batch * num_batches // checkpoint["num_batches"]
    return epoch, batch - batch % every


def own_sums(saved, share, device):
    """This rank's sums of the loss terms inside an epoch, out of the list of every rank's, times ``share``.

    With another number of ranks each gets the mean of all.  share: of the epoch's batches that counts now.
    """
    saved = saved if isinstance(saved, list) else [saved]                # of an earlier version: the mean
    own = saved[rank()] if len(saved) == world_size() else {
        name: sum(sums[name] for sums in saved) / len(saved) for name in saved[0]}
    return {name: share * value.to(device) for name, value in own.items()}


def monitored(metric, mode):
    """(metric, mode), what makes a checkpoint the best one: the lowest ("min") or the highest ("max").

    UserError: another word, or the one by which the worst epoch would be kept.
    """
    if mode not in ("min", "max"):
        raise UserError(f'the mode of the monitored {metric} is "{mode}": use "min" or "max"')
    name = metric.rpartition("/")[2]
    if name in (FALLING if mode == "max" else RISING):
        other = "min" if mode == "max" else "max"
        raise UserError(f'the mode of the monitored {metric} is "{mode}", which would keep the worst epoch: '
                        f'use "{other}"')
    return metric, mode


def is_better(row, best, metric, mode):
    """Whether ``row[metric]`` beats ``best`` (None at first); NaN beats None and NaN alone.

    So of epochs whose metric is undefined, as an AUROC of one class, the newest counts until one has a
    number.  mode: "min" | "max".  UserError: a metric that the run does not measure.
    """
    if metric not in row and best is None:
        raise UserError(f"the monitored {metric} is not measured; there are {', '.join(row)}")
    if metric not in row:                                              # a probe, which some epochs leave out
        return False
    if best is None or math.isnan(best):
        return True
    return row[metric] > best if mode == "max" else row[metric] < best


def stale_for(history, metric, mode):
    """How many epochs with ``metric`` have come since the one that is best by it; the rest do not count."""
    values = [row[metric] for row in history if metric in row and not math.isnan(row[metric])]
    if not values:
        return 0
    return len(values) - 1 - values.index(max(values) if mode == "max" else min(values))


def best_row(history, metric="val/loss", mode="min"):
    """The row of ``history`` that is_better than all before it.  UserError as there."""
    best = None
    for row in history:
        if is_better(row, best and best[metric], metric, mode):
            best = row
    return best


def keep_checkpoint(run_dir, kind, keep_top, every, metric="val/loss", mode="min"):
    """Copy <kind>_last.pt of a finished epoch to _epoch_N.pt, and to _best.pt when it is the best; prune.

    keep_top, every, metric, mode: as prune_epochs takes them.  Returns the name that stays.
    To be called when a run goes on, too: it may have been killed after it wrote that file, and before the
    copies.  Inside an epoch, or where the file cannot be read, nothing is done.
    """
    last, best = run_dir / f"{kind}_last.pt", run_dir / f"{kind}_best.pt"
    try:
        entries = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
        epoch, history = entries["epoch"], entries["history"]
    except UNREADABLE:
        return last.name
    if not history or history[-1]["epoch"] != epoch:
        return last.name
    path = run_dir / f"{kind}_epoch_{epoch}.pt"
    copy_checkpoint(last, path)
    if is_better(history[-1], best_value(best, metric), metric, mode):
        copy_checkpoint(last, best)
    kept = prune_epochs(run_dir, kind, history, keep_top, every, metric, mode == "max")
    return path.name if path in kept else last.name


def best_value(path, metric):
    """The metric of the epoch in a <kind>_best.pt, which an earlier run's history may not have; else None."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["history"][-1].get(metric)
    except (*UNREADABLE, IndexError):
        return None


def check_finite(loss, terms, step, cases):
    """UserError naming the step, its terms and the cases unless ``loss`` (a scalar tensor) is finite."""
    if not math.isfinite(loss.item()):
        values = ", ".join(f"{name}={term.item():.3g}" for name, term in terms.items())
        raise UserError(f"non-finite loss at step {step} ({values}) in cases {', '.join(cases)}; "
                        "lower the learning rate, or use PRECISION=fp32")
