"""The numbers of a run: on the screen, in metrics.csv, TensorBoard and Weights & Biases."""

import importlib

from tqdm import tqdm

from utils.config import UserError
from utils.distributed import gather, is_main, say
from utils.plotting import plot_detailed_curves, plot_loss_curves
from utils.tables import write_csv


def progress_bar(loader, name, first=0):
    """tqdm over the batches of a loader from batch ``first`` on, on the main rank, where somebody watches."""
    return tqdm(loader, desc=name, initial=first, total=len(loader), leave=False,
                disable=None if is_main() else True)


def batch_line(batch, num_batches, means):
    """``[100/500] Train Loss: 0.0234 | L1: 0.012 | L2: 0.008``: means over the epoch so far."""
    terms = "".join(f" | {name}: {value:.3f}" for name, value in means.items() if name != "loss")
    return f"[{batch}/{num_batches}] Train Loss: {means['loss']:.4f}{terms}"


def epoch_line(row):
    """``Epoch 1 Complete: Train Loss: 0.0198 | Val Loss: 0.0187``, then the lower-case ``val/`` metrics.

    Those of a single label, as in ``val/auroc/mass``, are left to metrics.csv; an epoch without validation
    has the first part alone.
    """
    metrics = {name.removeprefix("val/"): value for name, value in row.items()
               if name.startswith("val/") and name.islower() and name.count("/") == 1 and name != "val/loss"}
    shown = "".join(f" | {name}: {value:.3f}" for name, value in metrics.items())
    validation = f" | Val Loss: {row['val/loss']:.4f}{shown}" if "val/loss" in row else ""
    return f"Epoch {row['epoch']} Complete: Train Loss: {row['train/loss']:.4f}{validation}"


def say_end(run_dir, bad_files, trained):
    """Collective: print which files any rank has skipped since the start, and where the run lies.

    bad_files: set of this rank's messages.  trained: whether there was an epoch left to train.
    """
    skipped = sorted(set().union(*gather(bad_files)))
    if skipped:
        say(f"Skipped {len(skipped)} bad files: {', '.join(skipped)}")
    say(f"{'Done' if trained else 'All epochs were done before'}: {run_dir}")


def write_history(run_dir, history):
    """Write metrics.csv, loss_curves.png and detailed_loss_curves.png of the epochs of ``history``.

    history: flat dicts, each a row of the table.  All is written again, so a resumed run never doubles a row.
    A metric that an epoch lacks is empty.
    """
    write_csv(run_dir / "metrics.csv", list(dict.fromkeys(name for row in history for name in row)), history)
    plot_loss_curves(run_dir / "loss_curves.png", history)
    plot_detailed_curves(run_dir / "detailed_loss_curves.png", history)


class Trackers:
    """Sends scalars to the trackers named in ``words``: "tensorboard" (run_dir/tb) and "wandb".

    ``step`` is the optimizer step from which the run goes on; what TensorBoard has of later steps is hidden.
    UserError: an unknown word, or a tracker that is not installed.
    """

    def __init__(self, words, run_dir, settings, step=0):
        unknown = set(words) - {"tensorboard", "wandb"}
        if unknown:
            raise UserError(f"TRACKERS: unknown {', '.join(sorted(unknown))}; allowed: tensorboard, wandb")
        self.tensorboard = self.wandb = None
        if "tensorboard" in words:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(run_dir / "tb", purge_step=step and step + 1)
        if "wandb" in words:
            if importlib.util.find_spec("wandb") is None:
                raise UserError("TRACKERS: wandb is not installed; run pip install wandb, or remove the word")
            import wandb
            self.wandb = wandb.init(project="plainvox", name=run_dir.name, id=run_dir.name, resume="allow",
                                    dir=str(run_dir), config=settings)

    def log(self, values, step):
        """values: flat dict of floats; step: optimizer steps done."""
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()                                   # a killed run has no close()
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self):
        """Write out what is still buffered."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
