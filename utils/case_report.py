"""What evaluate.py writes of a model's answers: tables, a row for each case, pictures.

results: dict case -> (outputs [C], labels [L]): float32 on the CPU, as ``utils.classification`` describes
them for the word of a loss; NaN = unknown.
"""

import torch

from utils import mask_metrics
from utils.classification import (
    DESCRIPTIONS,
    bootstrap,
    confusion_figure,
    confusion_rates,
    roc_figure,
    undefined_labels,
)
from utils.intervals import draw_units, intervals
from utils.photo_metrics import PhotoMetrics, calibration_figure, class_table
from utils.photo_sheet import photo_sheet
from utils.scores import beside
from utils.slice_sheet import numbered, slice_sheet
from utils.tables import text_table, write_csv

UNITS = {"patient": "patients", "series": "series", "slice": "slices"}        # what may be resampled


def write_figures(path, figures):
    """Write a dict name -> Interval as metrics.csv; nothing where it is empty."""
    if figures:
        write_csv(path, ("figure", "value", "low", "high", "undefined_resamples"),
                  [(name, *figure) for name, figure in figures.items()])


def write_predictions(path, case, word, names, results, patients=None):
    """predictions.csv: for each case its probabilities (numbers, for a regression) and its true labels.

    For classes, also the predicted one.  case: what it is; patients: dict case -> patient, for a column.
    """
    columns = ["predicted class", "true class"] if word == "ce" else [f"true {name}" for name in names]
    rows = []
    for name, (outputs, truth) in sorted(results.items()):
        predicted = {"bce": outputs.sigmoid(), "ce": outputs.softmax(0)}.get(word, outputs).tolist()
        answers = [names[outputs.argmax()]] if word == "ce" else []
        answers += ["" if value != value else names[int(value)] if word == "ce" else f"{value:g}"
                    for value in truth.tolist()]
        rows.append([name, *([patients[name]] if patients else []),
                     *(f"{value:.4f}" for value in predicted), *answers])
    write_csv(path, [case, *(["patient"] if patients else []), *(f"predicted {name}" for name in names),
                     *columns], rows)


def labelled(results):
    """(cases with a label, sorted; their outputs [N, C] and labels [N, L], or None without a case)."""
    cases = [case for case, (_, labels) in sorted(results.items()) if not labels.isnan().all()]
    outputs, labels = (torch.stack([results[case][i] for case in cases]) if cases else None for i in (0, 1))
    return cases, outputs, labels


def report_figures(output, title, word, names, results, intervals):
    """Print the figures of all cases with a label, and draw them -> dict of Intervals, {} without a label.

    intervals: (cases, outputs, labels) -> dict of Intervals; title: (heading of the column, what was drawn).
    Says of which labels figures are undefined.  Writes roc.png where there is an AUROC, and confusion.png for
    classes.
    """
    cases, outputs, labels = labelled(results)
    if not cases:
        return {}
    figures = intervals(cases, outputs, labels)
    print(f"95 % intervals of {title[1]}\n{text_table({title[0]: figures}, DESCRIPTIONS)}")
    if word in ("bce", "ce"):
        for missing, kind in zip(undefined_labels(word, names, labels), ("with", "without"), strict=True):
            if missing:
                shown = ", ".join(missing[:8]) + ", ..." * (len(missing) > 8)
                print(f"Undefined (-): figures of {shown} need cases with and without it; the split "
                      f"{title[0]} has none {kind} it")
    if "auroc" in figures:
        roc_figure(output / "roc.png", word, names, outputs, labels, figures)
    if word == "ce":
        confusion_figure(output / "confusion.png", names, outputs, labels)
    return figures


def report_classes(output, names, results, picture, mistakes):
    """classes.txt, calibration.png, and mistakes.png: those whose own class seemed least likely, first.

    outputs: logarithms of probabilities.  picture: case -> image [3, H, W]; mistakes: how many are drawn.
    """
    cases, scores, labels = labelled(results)
    if not cases:
        return
    labels, metrics = labels[:, 0].long(), PhotoMetrics(names)
    metrics.update(scores, labels)
    (output / "classes.txt").write_text(class_table(metrics.per_class()) + "\n")
    print(class_table(metrics.per_class()))
    calibration_figure(output / "calibration.png", metrics.calibration)
    wrong = [k for k in scores.gather(1, labels[:, None])[:, 0].argsort(stable=True).tolist()
             if scores[k].argmax() != labels[k]][:mistakes]
    pictures = [(picture(cases[k]), f"{cases[k]}: {names[scores[k].argmax()]} {scores[k].max().exp():.2f}")
                for k in wrong]
    if pictures:
        photo_sheet(output / "mistakes.png", pictures)


def report_masks(output, title, metrics, figures, masks, worst):
    """Print the figures of masks; write masks.csv, a row for each case and class, and worst.png.

    metrics: a MaskMetrics; figures: its bootstrap; title: as for ``report_figures``.  masks: case -> (image,
    true, predicted) [H, W], for the ``worst`` cases by their lowest Dice; of equal ones the larger first.
    """
    print(f"95 % intervals of {title[1]}\n{text_table({title[0]: figures}, mask_metrics.DESCRIPTIONS)}")
    rows = metrics.per_case()
    write_csv(output / "masks.csv", list(rows[0]), [
        {key: "" if value != value else value for key, value in row.items()} for row in rows])
    lowest, rows = {}, [row for row in rows if row["dice"] == row["dice"]]   # nan: rightly nothing was found
    for row in sorted(rows, key=lambda row: (row["dice"], -row["true_voxels"] - row["pred_voxels"])):
        lowest.setdefault(row["case"], row["dice"])
    pictures = []
    for case, dice in list(lowest.items())[:worst]:
        image, *both = masks(case)
        both = [numbered(mask, metrics.names) for mask in both]
        pictures.append((f"{case}: Dice {dice:.2f}", image, *both))
    if pictures:
        slice_sheet(output / "worst.png", pictures)


def report_cases(output, split, case, cases, word, names, results, resamples, seed, units):
    """All tables and pictures of results, with intervals over their units; case, cases: what they are.

    units: (dict case -> unit, such as its patient; what the units are).
    """
    def intervals(members, outputs, labels):
        return bootstrap(word, names, outputs, labels, torch.Generator().manual_seed(seed), resamples,
                         units=[unit_of[case] for case in members])

    unit_of, kind = units
    print(f"{len(results)} {cases} ({split}), {len(labelled(results)[0])} with labels")
    write_predictions(output / "predictions.csv", case, word, names, results)
    title = split, f"{resamples} resamples of the {len({unit_of[case] for case in results})} {kind}"
    write_figures(output / "metrics.csv", report_figures(output, title, word, names, results, intervals))


def report_slices(output, split, names, metrics, results, look, resamples, unit, seed, mistakes):
    """All tables and pictures of slices: of their classes, masks, or both; intervals over a unit of UNITS.

    names: of the classes, may be empty; metrics: a MaskMetrics, of no class where there are no masks.
    results: dict case -> (scores [C] or None, label [1], dict of its "patient", "series" and "slice").
    look: case -> (item of SliceDataset, predicted mask [H, W] or None).
    """
    groups = {case: of[unit] for case, (*_, of) in results.items()}
    patients = {case: of["patient"] for case, (*_, of) in results.items()}
    title = split, f"{resamples} resamples of the {len(set(groups.values()))} {UNITS[unit]}"
    print(f"{len(results)} slices ({split})")
    generator, classes, masks = torch.Generator().manual_seed(seed), {}, {}
    if names:
        def intervals(cases, scores, labels):
            return class_intervals(names, scores, labels, [groups[case] for case in cases], generator,
                                   resamples)

        scored = {case: result[:2] for case, result in results.items()}
        write_predictions(output / "predictions.csv", "slice", "ce", names, scored, patients)
        classes = report_figures(output, title, "ce", names, scored, intervals)
        report_classes(output, names, scored, lambda case: look(case)[0]["image"].expand(3, -1, -1), mistakes)
    if metrics.names:
        def pictures(case):
            item, predicted = look(case)
            return item["image"][0], item["mask"], predicted

        masks = metrics.bootstrap(generator, resamples, [groups[case] for case in metrics.cases])
        report_masks(output, title, metrics, masks, pictures, mistakes)
    write_figures(output / "metrics.csv", beside(classes, masks))


def class_intervals(names, outputs, labels, units, generator, resamples=1000):
    """Percentile interval of figures of classes, over units drawn with replacement, with all their cases.

    outputs [N, C], labels [N, 1]; units: N names, such as the patients; generator: torch.Generator.  Returns
    a dict of Intervals as ``confusion_figures`` names them.
    """
    groups, weights = draw_units(units, resamples, generator)
    counts = torch.zeros(weights.shape[1], len(names), len(names), dtype=torch.float64)
    counts.index_put_((groups, labels[:, 0].long(), outputs.argmax(1)),
                      torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    whole = {name: value.item() for name, value in confusion_figures(names, counts.sum(0)).items()}
    return intervals(whole, confusion_figures(names, torch.einsum("rp,pij->rij", weights, counts)))


def confusion_figures(names, confusion):
    """Figures of confusion matrices float64 [..., C, C], rows the true class -> dict of float64 [...].

    accuracy, balanced_accuracy and f1_macro as PhotoMetrics has them; recall, precision and f1 of each class
    by its name, as "recall/cord".
    """
    each, right = confusion_rates(confusion), confusion.diagonal(dim1=-2, dim2=-1).sum(-1)
    figures = {"accuracy": right / confusion.sum((-2, -1)), "balanced_accuracy": each["recall"].nanmean(-1),
               "f1_macro": each["f1"].nanmean(-1)}
    return figures | {f"{key}/{name}": each[key][..., k] for k, name in enumerate(names)
                      for key in ("recall", "precision", "f1")}
