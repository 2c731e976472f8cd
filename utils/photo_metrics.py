"""Running metrics of one class of several, their table by class, and the picture of calibration."""

import numpy as np
import torch
from matplotlib.figure import Figure

from utils.classification import calibration_bins, calibration_error, confusion_rates
from utils.config import UserError
from utils.distributed import all_reduce_sum
from utils.plotting import save_figure
from utils.tables import cell


class PhotoMetrics:
    """Counts of all images so far, on the CPU and of a fixed size: exact for any batches and ranks.

    names: of the C classes; bins: intervals of confidence for the calibration.
    confusion int64 [C, C]: rows the true class, columns the predicted one.  calibration float64 [3, bins]:
    as ``utils.classification.calibration_bins`` gives it.
    """

    def __init__(self, names, bins=15):
        self.names = list(names)
        self.confusion = torch.zeros(len(self.names), len(self.names), dtype=torch.int64)
        self.calibration = torch.zeros(3, bins, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits, labels):
        """Add images: logits [B, C], any float type; labels int64 [B]; both on the CPU.

        Instead of logits the logarithms of probabilities will do, such as averaged ones.
        """
        if logits.shape != (len(labels), len(self.names)) or labels.dim() != 1:
            raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}: "
                             f"not [B, {len(self.names)}] and [B]")
        predicted, confidence = logits.argmax(1), logits.double().softmax(1).amax(1)
        cells = torch.bincount(labels * len(self.names) + predicted, minlength=self.confusion.numel())
        self.confusion += cells.view_as(self.confusion)
        right = (predicted == labels).double()
        bins = self.calibration.shape[1]
        self.calibration += calibration_bins(confidence[:, None], right[:, None], bins)[..., 0]

    def reduce(self):
        """Collective: take the images of all ranks together, once."""
        self.confusion, self.calibration = all_reduce_sum(self.confusion), all_reduce_sum(self.calibration)

    def compute(self):
        """Dict of floats: accuracy, balanced_accuracy, f1_macro and ece, as ``DESCRIPTIONS`` tells them.

        balanced_accuracy and f1_macro are means over the classes that occur as a true one; scikit-learn's
        macro F1 also counts, as 0, a class that was predicted and never occurs.  Where one class alone
        occurs both are nan.  ``classification.bootstrap`` gives the same values, f1_macro by the name f1.
        Raises UserError without an image.
        """
        if not self.confusion.any():
            raise UserError("no images to measure; check the labels and the split")
        figures = confusion_rates(self.confusion.double())
        return {"accuracy": (self.confusion.trace().double() / self.confusion.sum()).item(),
                "balanced_accuracy": figures["recall"].nanmean().item(),
                "f1_macro": figures["f1"].nanmean().item(),
                "ece": calibration_error(self.calibration).item()}

    def per_class(self):
        """{class: dict of precision, recall, f1 (floats) and support (int: images that are of the class)}.

        precision is 0 for a class never predicted; all three are nan for a class that does not occur.
        """
        figures = confusion_rates(self.confusion.double())
        columns = [figures[name].tolist() for name in ("precision", "recall", "f1")]
        return {name: {"precision": precision, "recall": recall, "f1": f1, "support": support}
                for name, precision, recall, f1, support in
                zip(self.names, *columns, self.confusion.sum(1).tolist(), strict=True)}


def class_table(per_class):
    """Aligned text table: a line per class, as ``PhotoMetrics.per_class`` gives them; "-" where nan."""
    columns = ("precision", "recall", "f1", "support")
    width = max(map(len, per_class))
    lines = [" " * width + "".join(f"  {name:>9}" for name in columns)]
    for name, figures in per_class.items():
        cells = [cell(figures[column]) for column in columns[:3]] + [str(figures["support"])]
        lines.append(f"{name:<{width}}" + "".join(f"  {text:>9}" for text in cells))
    return "\n".join(lines)


def calibration_figure(path, sums):
    """Write a PNG of accuracy by confidence, with the number of images in each interval below.

    sums [3, bins]: ``PhotoMetrics.calibration``.  On the diagonal, confidence is as often right as it says.
    """
    number, confidence, right = sums.cpu().numpy()
    filled, bins = number > 0, len(number)
    number = number[filled]
    accuracy, mean = right[filled] / number, confidence[filled] / number
    middles = (np.flatnonzero(filled) + 0.5) / bins
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(middles, accuracy, width=0.94 / bins, color="#3b6fb6", label="accuracy")
    upper.plot(mean, accuracy, "o", color="#d1602f", label="at the mean confidence")
    upper.plot([0, 1], [0, 1], color="0.5", linewidth=1)
    upper.set(ylim=(0, 1), ylabel="accuracy",
              title=f"expected calibration error {cell(calibration_error(sums).item())}")
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(middles, number, width=0.94 / bins, color="0.6")
    lower.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    save_figure(figure, path)
