"""What evaluate.py writes: intervals over patients, tables, pictures of the worst."""

import csv
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, recall_score

from utils.case_report import (
    class_intervals,
    report_cases,
    report_classes,
    report_masks,
    report_slices,
    write_figures,
    write_predictions,
)
from utils.mask_metrics import MaskMetrics

NAMES = ["a", "b", "c"]


def answers(count=60, patients=6):
    """(outputs [N, 3], labels [N, 1], patients) of a classifier that is right two times in three."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    outputs = torch.randn(count, 3, generator=generator)
    outputs[torch.arange(count), labels] += 1.2
    return outputs, labels[:, None].float(), [f"p{i % patients}" for i in range(count)]


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_figures_of_classes_are_scikit_learns():
    """Accuracy, macro F1, and each class against the rest."""
    outputs, labels, patients = answers()
    figures = class_intervals(NAMES, outputs, labels, patients, torch.Generator().manual_seed(0), 20)
    true, predicted = labels[:, 0].numpy(), outputs.argmax(1).numpy()
    assert figures["accuracy"].value == pytest.approx((true == predicted).mean())
    assert figures["f1_macro"].value == pytest.approx(f1_score(true, predicted, average="macro"))
    recalls = recall_score(true, predicted, average=None)
    assert [figures[f"recall/{name}"].value for name in NAMES] == pytest.approx(recalls.tolist())
    assert figures["balanced_accuracy"].value == pytest.approx(recalls.mean())


def test_intervals_are_those_of_drawn_patients():
    """As a loop that draws patients, with all their cases, and counts again."""
    outputs, labels, patients = answers()
    figures = class_intervals(NAMES, outputs, labels, patients, torch.Generator().manual_seed(3), 200)
    drawn = torch.randint(6, (200, 6), generator=torch.Generator().manual_seed(3)).numpy()
    right, who = (outputs.argmax(1) == labels[:, 0]).numpy(), np.array(patients)
    values = [np.mean(np.concatenate([right[who == f"p{i}"] for i in row])) for row in drawn]
    assert figures["accuracy"][1:3] == pytest.approx(np.quantile(values, (0.025, 0.975)).tolist())


def test_cases_that_are_copies_do_not_narrow_the_interval():
    """Ten times the slices of the same patients tell nothing new; of one patient nothing is known at all."""
    outputs, labels, patients = answers()
    few, many = (class_intervals(NAMES, outputs.repeat(n, 1), labels.repeat(n, 1), patients * n,
                                 torch.Generator().manual_seed(0), 100)["accuracy"] for n in (1, 10))
    assert few[:3] == pytest.approx(many[:3])
    one = class_intervals(NAMES, outputs, labels, ["p"] * 60, torch.Generator(), 10)["accuracy"]
    assert math.isnan(one.low) and math.isnan(one.high) and one.value == few.value


def test_tables_hold_what_they_are_given(tmp_path):
    """Unknown and undefined is empty; the patient has a column where it is known."""
    results = {"s1": (torch.tensor([0.0, 0.0]), torch.tensor([1.0])),
               "s0": (torch.tensor([5.0, 0.0]), torch.tensor([math.nan]))}
    write_predictions(tmp_path / "predictions.csv", "slice", "ce", NAMES[:2], results, {"s0": "p", "s1": "q"})
    first, second = rows_of(tmp_path / "predictions.csv")
    columns = "slice", "patient", "predicted class", "true class"
    assert [first[key] for key in columns] == ["s0", "p", "a", ""]
    assert second["true class"] == "b" and second["predicted a"] == "0.5000"
    write_figures(tmp_path / "metrics.csv", {})
    assert not (tmp_path / "metrics.csv").exists()


def test_the_least_likely_mistakes_are_drawn_first(tmp_path, capsys):
    """Right answers never are; without a label nothing is written."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.45, 0.55]]).log()
    results = {f"c{i}": (scores[i], torch.tensor([0.0])) for i in range(4)}
    drawn = []

    def picture(case):
        drawn.append(case)
        return torch.zeros(3, 8, 8)

    report_classes(tmp_path, ["a", "b"], results, picture, 2)
    assert drawn == ["c1", "c2"] and "support" in capsys.readouterr().out
    assert (tmp_path / "mistakes.png").exists() and (tmp_path / "calibration.png").exists()
    unknown = {"c": (scores[0], torch.tensor([math.nan]))}
    report_classes(tmp_path / "none", ["a", "b"], unknown, picture, 2)


@pytest.mark.parametrize("kinds, line", [
    ((1, 1), "figures of mass need cases with and without it; the split test has none without it"),
    ((0, 0), "figures of mass need cases with and without it; the split test has none with it"),
    ((0, 1), "")])
def test_undefined_figures_have_a_reason(tmp_path, capsys, kinds, line):
    """A table of dashes alone would look like a mistake; a curve that there is not is not drawn."""
    results = {f"c{i}": (torch.tensor([0.3]), torch.tensor([float(kind)])) for i, kind in enumerate(kinds)}
    (tmp_path / "roc.png").touch()
    report_cases(tmp_path, "test", "study", "studies", "bce", ["mass"], results, 10, 0,
                 ({case: case for case in results}, "studies"))
    printed = capsys.readouterr().out
    assert line in printed and ("Undefined (-): " in printed) == bool(line)
    assert (tmp_path / "roc.png").exists() != bool(line)


def masks():
    """(MaskMetrics, predicted) of four slices: good, empty and found empty, a third, and a false alarm."""
    true, predicted = torch.zeros(4, 16, 16, dtype=torch.int64), torch.zeros(4, 16, 16, dtype=torch.int64)
    true[0, 2:8, 2:8] = predicted[0, 2:8, 2:8] = predicted[3, 1:4, 1:4] = 1
    true[2, 2:8, 2:8] = predicted[2, 6:12, 2:8] = 1
    metrics = MaskMetrics(["cord"])
    metrics.add(predicted, true, torch.ones(4, 2), ["good", "empty", "third", "alarm"], ["p", "p", "q", "q"])
    return metrics, true, predicted


def test_the_worst_masks_are_those_of_lowest_dice(tmp_path, capsys):
    """False alarms count as 0; a slice in which there is nothing, and nothing found, is no mistake."""
    metrics, true, predicted = masks()
    seen = []

    def pictures(case):
        seen.append(case)
        return torch.zeros(16, 16), true[0], predicted[0]

    figures = metrics.bootstrap(torch.Generator().manual_seed(0), 10)
    report_masks(tmp_path, ("test", "10 resamples"), metrics, figures, pictures, 12)
    assert seen == ["alarm", "third", "good"]
    assert [row["dice"] for row in rows_of(tmp_path / "masks.csv")] == ["1.0", "", str(1 / 3), "0.0"]
    assert "lesion_sensitivity" in capsys.readouterr().out


@pytest.mark.parametrize("names, mask_names", [(["a", "b"], []), ([], ["cord"]), (["a", "b"], ["cord"])])
def test_slices_are_reported_by_what_the_network_tells(names, mask_names, tmp_path):
    """Classes, masks, or both in one metrics.csv."""
    metrics, true, predicted = masks()
    metrics = metrics if mask_names else MaskMetrics([])
    scores = torch.tensor([0.3, 0.7]).log() if names else None
    results = {case: (scores, torch.tensor([float(i % 2)]), {"patient": "pq"[i // 2], "slice": case})
               for i, case in enumerate(("good", "empty", "third", "alarm"))}

    def look(case):
        return {"image": torch.zeros(1, 16, 16), "mask": true[0]}, predicted[0] if mask_names else None

    report_slices(tmp_path, "test", names, metrics, results, look, 10, "patient", 0, 3)
    figures = {row["figure"]: float(row["value"]) for row in rows_of(tmp_path / "metrics.csv")}
    assert ("f1_macro" in figures) == bool(names) and ("dice" in figures) == bool(mask_names)
    assert ("pixel_accuracy" in figures) == (len(names) > 0 < len(mask_names))
    if names:
        assert figures["accuracy"] == 0.5
    found = {path.name for path in tmp_path.iterdir()}
    assert ({"predictions.csv", "classes.txt", "mistakes.png"} <= found) == bool(names)
    assert ({"masks.csv", "worst.png"} <= found) == bool(mask_names)


def test_intervals_are_over_the_unit_that_was_asked_for(tmp_path, capsys):
    """Of one patient alone only his slices can be drawn again; the figures themselves stay."""
    metrics, true, predicted = masks()
    metrics.patients = ["p"] * 4
    names = {case: {"patient": "p", "slice": case} for case in metrics.cases}
    results = {case: (None, torch.tensor([torch.nan]), names[case]) for case in metrics.cases}

    def look(case):
        return {"image": torch.zeros(1, 16, 16), "mask": true[0]}, predicted[0]

    figures = {}
    for unit in ("patient", "slice"):
        report_slices(tmp_path, "test", [], metrics, results, look, 50, unit, 0, 3)
        figures[unit] = {row["figure"]: row for row in rows_of(tmp_path / "metrics.csv")}["dice_all"]
    assert figures["patient"]["value"] == figures["slice"]["value"]
    assert figures["patient"]["low"] == figures["patient"]["high"] == "nan"
    assert float(figures["slice"]["low"]) < float(figures["slice"]["high"])
    assert "50 resamples of the 4 slices" in capsys.readouterr().out
