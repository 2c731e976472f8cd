"""Metrics of studies against scikit-learn, over batches, ranks and resamples."""

import math

import pytest
import sklearn.metrics as sk
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

from utils import distributed
from utils.classification import (
    StudyMetrics,
    bootstrap,
    confusion_figure,
    roc_figure,
    study_figures,
    undefined_labels,
)
from utils.config import UserError

NAMES = ["bleed", "fracture", "mass"]
WORDS = ["bce", "ce", "rmse"]


def data(word, count=40, seed=0, missing=True):
    """logits [count, 3] with some knowledge of labels [count, 3], [count, 1] for "ce"; a fifth is missing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count, 3), generator=generator).float()
    truth = labels
    if word == "ce":
        labels = torch.randint(3, (count, 1), generator=generator).float()
        truth = torch.nn.functional.one_hot(labels[:, 0].long(), 3)
    logits = 1.5 * (truth - 0.5) + torch.randn(count, 3, generator=generator)
    logits = (4 * logits).round() / 4                           # ties, as bfloat16 makes them
    if word == "rmse":
        labels = logits + torch.randn(count, 3, generator=generator)
    if missing:
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, torch.nan)
    return logits, labels


def measure(word, logits, labels, batch=None):
    metrics = StudyMetrics(word, NAMES)
    for part in zip(logits.split(batch or len(logits)), labels.split(batch or len(logits)), strict=True):
        metrics.update(*part)
    return metrics.compute()


def by_sklearn(word, logits, labels):
    """The same dict from scikit-learn, one label at a time, the missing ones removed."""
    figures, kept = {}, ("mae", "rmse", "r2")
    for k, name in enumerate(NAMES):
        column = 0 if word == "ce" else k
        here = ~labels[:, column].isnan()
        y, x = labels[here, column].numpy(), logits[here].double()
        if word == "rmse":
            p = x[:, k].numpy()
            values = (sk.mean_absolute_error(y, p), sk.root_mean_squared_error(y, p), sk.r2_score(y, p))
        elif word == "bce":
            kept, p = ("auroc", "balanced_accuracy", "f1"), x[:, k].numpy()
            values = (sk.roc_auc_score(y, p), sk.balanced_accuracy_score(y, p > 0), sk.f1_score(y, p > 0))
        else:
            kept, p = ("auroc", "recall", "precision", "f1"), x.argmax(1).numpy()
            values = (sk.roc_auc_score(y == k, x.softmax(1)[:, k].numpy()), sk.recall_score(y == k, p == k),
                      sk.precision_score(y == k, p == k), sk.f1_score(y == k, p == k))
            error = multiclass_calibration_error(x.softmax(1), labels[here, 0].long(), 3)
            figures |= {"accuracy": sk.accuracy_score(y, p),
                        "balanced_accuracy": sk.balanced_accuracy_score(y, p),
                        "f1": sk.f1_score(y, p, average="macro"),
                        "precision": sk.precision_score(y, p, average="macro"), "ece": error.item(),
                        "auroc": sk.roc_auc_score(y, x.softmax(1).numpy(), multi_class="ovr")}
        figures |= {f"{figure}/{name}": value for figure, value in zip(kept, values, strict=True)}
    if word != "ce":
        figures |= {figure: sum(figures[f"{figure}/{name}"] for name in NAMES) / 3 for figure in kept}
    return figures


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_every_figure_is_scikit_learns(word, missing):
    """Per label with the missing ones left out, and their mean; ties included.  The ece is torchmetrics'."""
    logits, labels = data(word, missing=missing)
    figures = measure(word, logits, labels)
    expected = by_sklearn(word, logits, labels)
    assert figures.keys() == expected.keys()
    assert figures == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("word", WORDS)
def test_batches_do_not_matter(word):
    """A mean of the batches' AUROCs would be wrong."""
    logits, labels = data(word)
    assert measure(word, logits, labels, batch=3) == measure(word, logits, labels)


def test_large_logits_keep_their_order():
    """A float32 sigmoid is 1 from 17 on, and every study beyond would be tied."""
    logits = torch.linspace(20, 30, 12)[:, None].expand(12, 3)
    labels = (torch.arange(12) >= 6).float()[:, None].expand(12, 3)
    assert measure("bce", logits, labels)["auroc"] == 1


def test_what_is_undefined_is_nan_and_not_part_of_the_mean():
    """One class alone has no AUROC; a nan in the mean would hide the other labels."""
    logits, labels = data("bce", missing=False)
    labels[:, 1], labels[:, 2] = 1, torch.nan
    figures = measure("bce", logits, labels)
    for figure in ("auroc", "balanced_accuracy", "f1"):
        assert math.isnan(figures[f"{figure}/fracture"]) and math.isnan(figures[f"{figure}/mass"])
        assert figures[figure] == figures[f"{figure}/bleed"] > 0.5
    assert all(math.isnan(value) for value in measure("bce", logits, labels * torch.nan).values())
    logits, labels = data("ce", missing=False)
    figures = measure("ce", logits, labels.clamp(max=1))
    assert math.isnan(figures["recall/mass"]) and math.isnan(figures["auroc/mass"])
    assert figures["balanced_accuracy"] == (figures["recall/bleed"] + figures["recall/fracture"]) / 2
    labels = torch.full((9, 3), 2.0)
    figures = measure("mae", labels + 1, labels)
    assert math.isnan(figures["r2"]) and figures["mae"] == figures["rmse"] == 1


def test_no_study_at_all_is_an_error():
    """A table of nothing must not look like a result."""
    with pytest.raises(UserError, match="no studies"):
        StudyMetrics("bce", NAMES).compute()


def test_shapes_that_do_not_fit_are_refused():
    """Broadcasting would give figures that mean nothing."""
    metrics = StudyMetrics("bce", NAMES)
    with pytest.raises(ValueError, match="labels"):
        metrics.update(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="labels"):
        metrics.update(torch.zeros(4, 3), torch.zeros(5, 3))


def test_ranks_with_unevenly_many_studies_agree_with_one_process(monkeypatch):
    """An AUROC is no mean over ranks; every rank must come to the same decision on the best epoch."""
    logits, labels = data("bce")
    ranks = [StudyMetrics("bce", NAMES) for _ in range(2)]
    for metrics, part in zip(ranks, (slice(0, 3), slice(3, None)), strict=True):
        metrics.update(logits[part].bfloat16(), labels[part])
    rows = [[metrics.logits for metrics in ranks], [metrics.labels for metrics in ranks]]

    def all_gather(parts, own):
        """What two processes would give each other."""
        parts[:] = next(both for both in rows if own.data_ptr() in [x.data_ptr() for x in both])

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather)
    for metrics in ranks:
        metrics.reduce()
        assert metrics.compute() == measure("bce", logits.bfloat16(), labels)


def test_one_process_reduces_to_itself():
    """Without torchrun nothing is gathered twice."""
    metrics = StudyMetrics("ce", NAMES)
    metrics.update(*data("ce"))
    before = metrics.compute()
    metrics.reduce()
    assert metrics.compute() == before and len(metrics.logits) == 40


@pytest.mark.parametrize("word", WORDS)
def test_resamples_at_once_equal_one_at_a_time(word):
    """The columns of one call do not touch one another."""
    logits, labels = data(word, count=15)
    rows = torch.randint(15, (6, 15), generator=torch.Generator().manual_seed(1))
    together = study_figures(word, NAMES, logits, labels, rows)
    for r, row in enumerate(rows):
        alone = measure(word, logits[row], labels[row])
        column = {name: values[r].item() for name, values in together.items()}
        assert column == pytest.approx(alone, nan_ok=True)


def test_the_interval_of_a_mean_is_that_of_theory():
    """The mean absolute error is a mean, so its interval is 1.96 standard errors either way."""
    error = torch.randn(400, 1, generator=torch.Generator().manual_seed(3)).abs()
    wide, narrow = (bootstrap("mae", ["age"], error, torch.zeros(400, 1), torch.Generator().manual_seed(0),
                              2000, level)["mae"] for level in (0.95, 0.5))
    value, low, high, left_out = wide
    half = 1.96 * error.std().item() / 20
    assert value == pytest.approx(error.mean().item())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half) and left_out == 0
    assert low < narrow.low < narrow.high < high


def test_resamples_without_a_figure_are_left_out_and_counted():
    """With one positive of ten, (9/10)^10 = 35 % of the resamples have none, and no AUROC."""
    logits = torch.arange(10.0)[:, None]
    labels = (torch.arange(10) == 8).float()[:, None]
    figures = bootstrap("bce", ["mass"], logits, labels, torch.Generator().manual_seed(0), 300)
    assert figures["auroc/mass"].left_out == figures["auroc"].left_out == pytest.approx(105, abs=30)
    value, low, high, _ = figures["auroc"]
    assert value == pytest.approx(8 / 9) and 0 < low < value < high
    again = bootstrap("bce", ["mass"], logits, labels, torch.Generator().manual_seed(0), 300)
    assert again == figures
    labels[:] = 1
    figures = bootstrap("bce", ["mass"], logits, labels, torch.Generator().manual_seed(0), 10)
    assert math.isnan(figures["auroc"].low) and figures["auroc"].left_out == 10


def test_copies_of_a_case_do_not_narrow_an_interval():
    """Eight equal studies of each of 30 patients tell what one of each tells."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 1, generator=generator), torch.arange(30)[:, None] % 2 * 1.0
    copies = {"logits": logits.repeat_interleave(8, 0), "labels": labels.repeat_interleave(8, 0),
              "resamples": 200}
    units = [f"p{number // 8}" for number in range(240)]
    once = bootstrap("bce", ["mass"], logits, labels, torch.Generator().manual_seed(1), 200)["auroc"]
    same, narrow = (bootstrap("bce", ["mass"], generator=torch.Generator().manual_seed(1), units=of, **copies)
                    ["auroc"] for of in (units, None))
    assert same == pytest.approx(once) and narrow.high - narrow.low < 0.6 * (once.high - once.low)


@pytest.mark.parametrize("word", ["bce", "ce"])
def test_curves_are_drawn_for_labels_that_have_one(tmp_path, word):
    """Also where a label has one class only, and with plain figures as with intervals."""
    logits, labels = data(word)
    labels = labels.clamp(max=1)
    if word == "bce":
        labels[:, 2] = 0
    sizes = set()
    figures = bootstrap(word, NAMES, logits, labels, torch.Generator().manual_seed(0), 20)
    for path, values in (("a.png", figures), ("b.png", measure(word, logits, labels))):
        roc_figure(tmp_path / path, word, NAMES, logits, labels, values)
        with Image.open(tmp_path / path) as picture:
            sizes.add(picture.size)
    assert len(sizes) == 1
    roc_figure(tmp_path / "a.png", word, NAMES, logits, labels * torch.nan, figures)       # of an earlier run
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("word, labels, expected", [
    ("bce", [[1, 0, 1], [1, math.nan, 0]], (["b"], ["a"])), ("ce", [[0], [2], [math.nan]], (["b"], [])),
    ("ce", [[0], [0]], (["b", "c"], ["a"]))])
def test_labels_of_one_kind_of_case_are_named(word, labels, expected):
    """They are those whose figures are undefined; a missing label is of neither kind."""
    assert undefined_labels(word, ["a", "b", "c"], torch.tensor(labels)) == expected


def test_the_confusion_matrix_is_drawn(tmp_path):
    """Missing labels and a class that does not occur do not stop it."""
    logits, labels = data("ce")
    confusion_figure(tmp_path / "confusion.png", NAMES, logits, labels.clamp(max=1))
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 200
