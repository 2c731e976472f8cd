"""Running metrics of photographs against scikit-learn and torchmetrics, over batches and ranks."""

import math

import pytest
import sklearn.metrics as sk
import torch
from PIL import Image
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from utils import distributed
from utils.classification import StudyMetrics, bootstrap, draw_confusion
from utils.config import UserError
from utils.photo_metrics import PhotoMetrics, calibration_figure, class_table

NAMES = ["blight", "healthy", "mould", "rust"]


def data(count=200, classes=4, seed=0):
    """logits [count, 4] with some knowledge of labels [count], unevenly many of the first ``classes``."""
    generator = torch.Generator().manual_seed(seed)
    labels = (classes * torch.rand(count, generator=generator) ** 1.5).long()
    logits = 1.5 * torch.nn.functional.one_hot(labels, 4) + torch.randn(count, 4, generator=generator)
    return logits, labels


def measured(logits, labels, batch=None, bins=15):
    metrics = PhotoMetrics(NAMES, bins=bins)
    for part in zip(logits.split(batch or len(logits)), labels.split(batch or len(logits)), strict=True):
        metrics.update(*part)
    return metrics


def test_every_figure_is_scikit_learns():
    """Accuracy, means over classes, the table by class, and the matrix with the true class in rows."""
    logits, labels = data()
    metrics, predicted = measured(logits, labels), logits.argmax(1)
    figures = metrics.compute()
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted), rel=1e-12)
    assert figures["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert figures["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert metrics.confusion.tolist() == sk.confusion_matrix(labels, predicted).tolist()
    expected = zip(*sk.precision_recall_fscore_support(labels, predicted), strict=True)
    for row, values in zip(metrics.per_class().values(), expected, strict=True):
        assert list(row.values()) == pytest.approx(values)


@pytest.mark.parametrize("bins", [5, 15])
def test_the_calibration_error_is_torchmetrics_and_its_curve_scikit_learns(bins):
    """The share of right answers at each confidence; the number of intervals is the caller's."""
    logits, labels = data()
    metrics, probabilities = measured(logits, labels, bins=bins), logits.double().softmax(1)
    assert metrics.compute()["ece"] == pytest.approx(
        multiclass_calibration_error(probabilities, labels, 4, n_bins=bins).item(), rel=1e-6)
    number, confidence, right = metrics.calibration
    accuracy, mean = calibration_curve((logits.argmax(1) == labels).numpy(), probabilities.amax(1).numpy(),
                                       n_bins=bins)
    filled = number > 0
    assert (right / number)[filled].tolist() == pytest.approx(accuracy)
    assert (confidence / number)[filled].tolist() == pytest.approx(mean)
    assert number.sum() == 200


def test_a_sure_network_is_calibrated_when_it_is_right():
    """Confidence 1 belongs to the last interval; wrong, it is the worst there is."""
    logits, labels = 1e4 * torch.eye(4), torch.arange(4)
    assert measured(logits, labels).compute()["ece"] == 0
    assert measured(logits, labels.roll(1)).compute()["ece"] == 1


def test_the_figures_of_training_are_those_of_evaluation():
    """The best epoch is chosen by the number that evaluate.py prints."""
    logits, labels = data(classes=3)
    figures = measured(logits, labels).compute()
    study = StudyMetrics("ce", NAMES)
    study.update(logits, labels[:, None])
    intervals = bootstrap("ce", NAMES, study.logits, study.labels, torch.Generator().manual_seed(0), 10)
    for values in (study.compute(), {name: interval.value for name, interval in intervals.items()}):
        for name, value in figures.items():
            assert values["f1" if name == "f1_macro" else name] == pytest.approx(value)
        for name, row in measured(logits, labels).per_class().items():
            for figure in ("precision", "recall", "f1"):
                assert values[f"{figure}/{name}"] == pytest.approx(row[figure], nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_do_not_matter(dtype):
    """A mean of the batches' F1 scores would be wrong."""
    logits, labels = data()
    whole, parts = measured(logits.to(dtype), labels), measured(logits.to(dtype), labels, batch=7)
    assert torch.equal(whole.confusion, parts.confusion)
    torch.testing.assert_close(whole.calibration, parts.calibration)


def test_logarithms_of_averaged_probabilities_stand_for_logits():
    """So the views of an image can be averaged first; probabilities as logits would look unsure."""
    logits, labels = data()
    expected = measured(logits, labels).compute()
    assert measured(logits.softmax(1).log(), labels).compute() == pytest.approx(expected)
    assert measured(logits.softmax(1), labels).compute()["ece"] > expected["ece"] + 0.1


def test_a_class_that_never_occurs_is_no_part_of_the_means():
    """It has no recall; predicted for others it costs them theirs."""
    logits, labels = data(classes=3)
    metrics, predicted = measured(logits, labels), logits.argmax(1)
    assert (predicted == 3).any()
    figures, rust = metrics.compute(), metrics.per_class()["rust"]
    assert figures["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, labels=[0, 1, 2],
                                                            average="macro"))
    assert rust["support"] == 0 and all(math.isnan(rust[name]) for name in ("precision", "recall", "f1"))
    one = measured(logits[labels == 1], labels[labels == 1]).compute()
    assert math.isnan(one["f1_macro"]) and 0 < one["accuracy"] < 1


def test_a_class_never_predicted_has_no_precision_to_speak_of():
    """Zero, as scikit-learn says: nan would leave the worst class out of a mean."""
    logits, labels = data()
    logits[:, 2] = -9
    row = measured(logits, labels).per_class()["mould"]
    assert (row["precision"], row["recall"], row["f1"]) == (0, 0, 0) and row["support"] > 0


def test_ranks_with_unevenly_many_images_agree_with_one_process(monkeypatch):
    """Counts add exactly; every rank must come to the same decision on the best epoch."""
    logits, labels = data()
    whole = measured(logits, labels)
    ranks = [measured(logits[part], labels[part]) for part in (slice(0, 30), slice(30, None))]
    sums = {name: sum(getattr(metrics, name) for metrics in ranks) for name in ("confusion", "calibration")}

    def all_reduce(tensor):
        """What two processes would make of it."""
        tensor.copy_(sums["calibration" if tensor.is_floating_point() else "confusion"])

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    for metrics in ranks:
        metrics.reduce()
        assert torch.equal(metrics.confusion, whole.confusion)
        assert metrics.compute() == pytest.approx(whole.compute())


def test_no_image_at_all_and_shapes_that_do_not_fit_are_refused():
    """A table of nothing must not look like a result, nor broadcasting like a count."""
    with pytest.raises(UserError, match="no images"):
        PhotoMetrics(NAMES).compute()
    for logits, labels in ((torch.zeros(4, 3), torch.zeros(4)), (torch.zeros(4, 4), torch.zeros(4, 1))):
        with pytest.raises(ValueError, match="labels"):
            PhotoMetrics(NAMES).update(logits, labels.long())


def test_the_table_has_a_line_per_class():
    """Aligned, with "-" for a class that does not occur."""
    metrics = measured(*data(classes=3))
    lines = class_table(metrics.per_class()).splitlines()
    assert [line.split()[0] for line in lines] == ["precision", *NAMES] and len(set(map(len, lines))) == 1
    assert lines[-1].split() == ["rust", "-", "-", "-", "0"]
    assert [int(line.split()[-1]) for line in lines[1:]] == metrics.confusion.sum(1).tolist()


def test_calibration_and_confusion_are_drawn(tmp_path):
    """Also with intervals that are empty, and a class that does not occur."""
    metrics = measured(*data(classes=3))
    calibration_figure(tmp_path / "calibration.png", metrics.calibration)
    draw_confusion(tmp_path / "confusion.png", NAMES, metrics.confusion)
    for name in ("calibration.png", "confusion.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
