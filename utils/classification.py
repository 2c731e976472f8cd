"""Metrics of predictions, exact over batches and ranks: figures, intervals, table, pictures.

``word`` is that of the loss and names the kind: "bce" (labels [N, L] in [0, 1], positive above 0.5), "ce"
(labels [N, 1], the index of a class); every other is regression (labels [N, L]).  NaN = missing, and is left
out label by label.  ``names``: of the labels, for "ce" of the classes.
"""

from itertools import product

import torch
from matplotlib.figure import Figure
from torchmetrics.functional.classification import (
    binary_roc,
    multiclass_confusion_matrix,
    multilabel_auroc,
    multilabel_stat_scores,
)

from utils.config import UserError
from utils.distributed import gather_rows
from utils.intervals import intervals
from utils.plotting import save_figure
from utils.tables import cell

MISSING = -1                    # of a label as an integer

# What each figure means; "+" = higher is better, "-" = lower is better.
DESCRIPTIONS = {
    "auroc": "+ area under the ROC curve",
    "balanced_accuracy": "+ mean of sensitivity and specificity, or of the recalls of all classes",
    "f1": "+ F1 score",
    "f1_macro": "+ F1 score, mean over the classes that occur",
    "accuracy": "+ share of cases in the right class",
    "recall": "+ share of the class's cases that were found",
    "precision": "+ share of those called the class that are",
    "ece": "- expected calibration error: confidence against accuracy",
    "mae": "- mean absolute error",
    "rmse": "- root of the mean squared error",
    "r2": "+ share of the variance explained",
}


class StudyMetrics:
    """Logits and labels of all studies so far, float32 on the CPU: exact for any batches and ranks."""

    def __init__(self, word, names):
        self.word, self.names = word, list(names)
        columns = 1 if word == "ce" else len(self.names)
        self.logits, self.labels = torch.zeros(0, len(self.names)), torch.zeros(0, columns)

    def update(self, logits, labels):
        """Add studies: logits [B, C], labels [B, L], or [B, 1] for "ce"; any device and float type."""
        for name, rows in (("logits", logits), ("labels", labels)):
            own, rows = getattr(self, name), rows.detach().float().cpu()
            if rows.shape[1:] != own.shape[1:] or len(rows) != len(logits):
                raise ValueError(f"{name} {tuple(rows.shape)}: not [{len(logits)}, {own.shape[1]}]")
            setattr(self, name, torch.cat([own, rows]))

    def reduce(self):
        """Collective: take the studies of all ranks together, once."""
        self.logits, self.labels = gather_rows(self.logits), gather_rows(self.labels)

    def compute(self):
        """Dict of floats as ``study_figures`` names them."""
        every = torch.arange(len(self.logits))[None]
        figures = study_figures(self.word, self.names, self.logits, self.labels, every)
        return {name: values.item() for name, values in figures.items()}


def bootstrap(word, names, logits, labels, generator, resamples=1000, level=0.95, units=None):
    """Percentile interval of every figure, over units drawn with replacement, with all their studies.

    logits [N, C], labels [N, L] on the CPU, as ``StudyMetrics`` holds them; generator: torch.Generator.
    units: N names, such as the patients (studies of one are alike: see intervals.draw_units); None: each
    study is one.  Returns dict name -> utils.intervals.Interval.
    """
    def figures(rows):
        return study_figures(word, names, logits, labels, rows)

    members = {}
    for row, unit in enumerate(range(len(logits)) if units is None else units):
        members.setdefault(unit, []).append(row)
    members = [torch.tensor(rows) for rows in members.values()]
    whole = figures(torch.arange(len(logits))[None])
    index = torch.randint(len(members), (resamples, len(members)), generator=generator)
    if len(members) == len(logits):
        drawn = figures(torch.cat(members)[index])
    else:                                            # resamples differ in length
        each = [figures(torch.cat([members[unit] for unit in units])[None]) for units in index.tolist()]
        drawn = {name: torch.cat([resample[name] for resample in each]) for name in whole}
    return intervals({name: value.item() for name, value in whole.items()}, drawn, level)


def study_figures(word, names, logits, labels, rows):
    """Every figure of R choices of M studies, rows int64 [R, M] of the others -> dict of float64 [R].

    "bce": auroc, balanced_accuracy and f1 (at logit 0) of each label, as "auroc/<label>".  "ce": auroc,
    recall, precision and f1 of each class against the rest, accuracy, and ece, the expected calibration
    error.  Otherwise mae, rmse and r2 of each label.  The plain name is the mean over labels or classes,
    undefined ones left out; the mean recall is called balanced_accuracy.  One class alone makes figures
    undefined (nan), equal labels make r2.
    Raises UserError without a study.
    """
    if not len(logits):
        raise UserError("no studies to measure; check the labels and the split")
    logits, labels, rows = logits.double(), labels.double(), rows.T                       # [M, R]
    figures = {}
    if word in ("bce", "ce"):
        binary = against_rest(word, logits, labels)
        columns = [binary_figures(*(values[rows, k] for values in binary)) for k in range(len(names))]
        kept = ("auroc", *(["balanced_accuracy"] if word == "bce" else ["recall", "precision"]), "f1")
    else:
        columns = [regression_figures(logits[rows, k], labels[rows, k]) for k in range(len(names))]
        kept = ("mae", "rmse", "r2")
    if word == "ce":
        right = (logits.argmax(1) == labels[:, 0]).double().where(~labels[:, 0].isnan(), torch.nan)[rows]
        confidence = logits.softmax(1).amax(1)[rows]                                      # [M, R]
        figures["accuracy"] = right.nanmean(0)
        figures["ece"] = calibration_error(calibration_bins(confidence, right))
    for name in kept:
        mean = torch.stack([column[name] for column in columns]).nanmean(0)
        figures["balanced_accuracy" if name == "recall" else name] = mean
    for label, column in zip(names, columns, strict=True):
        figures |= {f"{name}/{label}": column[name] for name in kept}
    return figures


def against_rest(word, logits, labels):
    """Each label, or each class against the rest: logits [N, C], labels [N, L] or [N, 1] -> three of [N, C].

    truth int64 (0, 1, MISSING), predicted bool, scores in [0, 1].
    """
    if word == "bce":
        truth, predicted, scores = labels > 0.5, logits > 0, logits.sigmoid()
    else:
        classes = torch.arange(logits.shape[1])
        truth, predicted = labels == classes, logits.argmax(1, keepdim=True) == classes
        scores = logits.softmax(1)
    return torch.where(labels.isnan(), MISSING, truth.long()), predicted, scores


def binary_figures(truth, predicted, scores):
    """Figures of each column of [M, R], as ``against_rest`` gives them -> dict of float64 [R]."""
    counts = multilabel_stat_scores(predicted.long(), truth, num_labels=truth.shape[1], average=None,
                                    ignore_index=MISSING, validate_args=False)
    tp, fp, tn, fn, _ = counts.view(-1, 5).double().T
    figures = rates(tp, fp, tn, fn) | {"auroc": torch.full_like(tp, torch.nan)}
    defined = ~figures["recall"].isnan()
    if defined.any():
        figures["auroc"][defined] = multilabel_auroc(
            scores[:, defined], truth[:, defined], num_labels=int(defined.sum()), average=None,
            ignore_index=MISSING, validate_args=False).double()
    return figures


def rates(tp, fp, tn, fn):
    """Figures of a class against the rest from its counts, float64 of any shape -> dict of that shape.

    recall, precision (0 where the class was never predicted), f1 and balanced_accuracy; nan where the cases
    are all of the class or none is.
    """
    defined = (tp + fn > 0) & (tn + fp > 0)
    recall, specificity = tp / (tp + fn), tn / (tn + fp)
    figures = {"recall": recall, "precision": tp / (tp + fp).clamp(min=1), "f1": 2 * tp / (2 * tp + fp + fn),
               "balanced_accuracy": (recall + specificity) / 2}
    return {name: torch.where(defined, values, torch.nan) for name, values in figures.items()}


def confusion_rates(confusion):
    """``rates`` of each class against the rest -> dict of [..., C].

    confusion: float64 [..., C, C], rows the true class, columns the predicted one.
    """
    tp, predicted, true = confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-2), confusion.sum(-1)
    return rates(tp, predicted - tp, confusion.sum((-2, -1))[..., None] - predicted - true + tp, true - tp)


def calibration_bins(confidence, right, bins=15):
    """Number, summed confidence and right ones of the cases in each interval of confidence.

    confidence [M, R] in [0, 1], the probability of the predicted class; right [M, R]: 1 where it is the true
    one, else 0, NaN = missing -> float64 [3, bins, R].  Intervals are equally wide, the upper end included.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    index, present = torch.bucketize(confidence.contiguous(), edges), ~right.isnan()
    values = torch.stack([present.double(), confidence * present, right.nan_to_num(0.0)]).double()
    sums = values.new_zeros(3, bins, confidence.shape[1])
    return sums.scatter_add_(1, index.expand_as(values), values)


def calibration_error(sums):
    """Expected calibration error of [3, bins, ...] as ``calibration_bins`` gives them; nan without a case.

    The mean over cases of |accuracy - mean confidence| of their bin; Guo et al. 2017, arXiv:1706.04599,
    eq. 3.
    """
    number, confidence, right = sums
    return (confidence - right).abs().sum(0) / number.sum(0)


def regression_figures(predictions, labels):
    """Figures of each column of [M, R] float64, NaN = missing -> dict of float64 [R]."""
    error = predictions - labels
    square = error.square().nanmean(0)
    spread = (labels - labels.nanmean(0)).square().nanmean(0)
    return {"mae": error.abs().nanmean(0), "rmse": square.sqrt(),
            "r2": torch.where(spread > 0, 1 - square / spread, torch.nan)}


def roc_figure(path, word, names, logits, labels, figures):
    """Write a PNG of the ROC curve of each label ("bce"), or of each class against the rest ("ce").

    logits, labels: as ``StudyMetrics`` holds them; figures: of ``compute`` or ``bootstrap``, for the legend.
    A label of which only one class is present has no curve; where none has one, no PNG is left.
    """
    figure = Figure(figsize=(8.4, 5.5), layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlabel="1 - specificity", ylabel="sensitivity")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    truth, _, scores = against_rest(word, logits.double(), labels.double())
    for k, name in enumerate(names):
        if {0, 1} <= set(truth[:, k].tolist()):
            false, true, _ = binary_roc(scores[:, k], truth[:, k], ignore_index=MISSING)
            axes.plot(false, true, linewidth=1.6, label=f"{name}  {cell(figures[f'auroc/{name}'])}")
    if len(axes.lines) == 1:                         # the diagonal alone
        path.unlink(missing_ok=True)
        return
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="AUROC")
    save_figure(figure, path)


def undefined_labels(word, names, labels):
    """(names without a positive case, names without a negative one), whose figures are undefined.

    word "bce" or "ce", names, labels: as for ``roc_figure``; a class of "ce" counts against the rest.
    """
    outputs = torch.zeros(len(labels), len(names))
    truth = against_rest(word, outputs, labels)[0]
    return tuple([name for name, column in zip(names, truth.T, strict=True) if not (column == kind).any()]
                 for kind in (1, 0))


def confusion_figure(path, names, logits, labels):
    """Write a PNG of the confusion matrix of classes: cases, coloured by their share of the true class.

    logits [N, C], labels [N, 1] class index: as ``StudyMetrics`` holds them.
    """
    present = ~labels[:, 0].isnan()
    draw_confusion(path, names, multiclass_confusion_matrix(
        logits[present].argmax(1), labels[present, 0].long(), len(names)))


def draw_confusion(path, names, counts):
    """Write a PNG of counts int64 [C, C], rows the true class, columns the predicted one."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(3 + 0.6 * len(names), 2.4 + 0.6 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for i, j in product(range(len(names)), repeat=2):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, counts[i, j].item(), ha="center", va="center", color=colour)
    figure.colorbar(image, label="share of the true class")
    save_figure(figure, path)
