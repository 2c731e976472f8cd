"""Loss curves of a run as PNGs, redrawn after each epoch."""

import math

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.files import replacing

COLOURS = {"train": "#3b6fb6", "val": "#d1602f"}


def plot_loss_curves(path, history):
    """Training and validation loss over epochs.

    history: list of dicts with "epoch", "train/loss", "val/loss".
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw_metric(axes, history, "loss")
    axes.set_title("Loss")
    axes.legend()
    save_figure(figure, path)


def plot_detailed_curves(path, history):
    """One panel for each metric of ``history``, training and validation together where both exist.

    A metric without a finite value in any epoch, as an AUROC of one class alone, has no panel.
    """
    finite = [key for row in history for key, value in row.items()
              if value is not None and math.isfinite(value)]
    names = list(dict.fromkeys(key.split("/", 1)[-1] for key in finite if key not in ("epoch", "step")))
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, position)
        draw_metric(axes, history, name)
        axes.set_title(name, fontsize=10)
    handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles))
    save_figure(figure, path)


def draw_metric(axes, history, name):
    """Curves of ``train/name``, ``val/name`` and plain ``name``; a single epoch shows as a point."""
    for phase, key in [("train", f"train/{name}"), ("val", f"val/{name}"), ("train", name)]:
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4,
                      color=COLOURS[phase], label={"train": "training", "val": "validation"}[phase])
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def save_figure(figure, path):
    """Write a PNG, of which a viewer never reads half."""
    FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
