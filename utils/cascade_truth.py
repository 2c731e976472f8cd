"""What a table says of series, and how often a cascade's stages, and the whole of it, agree with it.

The table is series.csv of the demonstration data or one like it: a row for each series with the columns path
(below the table's folder) and, as there are, uid (SeriesInstanceUID), patient, split, anatomy, location_view
(or location and view), sequence, lesion (1 or 0), cord_mask and lesion_mask (paths; without these columns
masks lie beside the series as <name>_cord.nii.gz and <name>_lesion.nii.gz).  An empty cell is not known.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.slice_lists import stem_of
from datasets.slice_masks import read_mask
from datasets.slice_series import read_series, slices_along, spacing_of
from datasets.splits import read_table
from utils.cascade import MASKS, VOTES
from utils.config import BadFile, UserError
from utils.mask_metrics import DESCRIPTIONS, MaskMetrics
from utils.tables import text_table

FIGURES = ("dice", "iou", "hd95", "lesion_sensitivity", "lesion_false_positives")


class Truth(NamedTuple):
    """What is known of a series: classes {stage: name}, masks {"cord" | "lesion": path}, lesion: bool or None
    where it is not known."""

    classes: dict
    masks: dict
    lesion: bool | None
    patient: str
    split: str


def read_truth(path):
    """{(absolute path of a series, uid or ""): Truth} of a table.  Raises UserError naming the line."""
    rows, truths = read_table(path, "--truth"), {}
    if not rows or "path" not in rows[0][1]:
        raise UserError(f"--truth {path}: needs rows and a column path")
    for line, row in rows:
        place = Path(path).parent / row["path"]
        if "location_view" not in row and row.get("location") and row.get("view"):
            row["location_view"] = f"{row['location']}_{row['view']}"
        masks = {}
        for part in MASKS.values():
            named = row.get(f"{part}_mask")
            mask = Path(path).parent / named if named else Path(stem_of(str(place)) + f"_{part}.nii.gz")
            if named and not os.path.exists(mask):
                raise UserError(f"--truth {path}, line {line}: {mask}: no such file")
            if os.path.exists(mask) and (named or f"{part}_mask" not in row):
                masks[part] = mask
        if row.get("lesion", "") not in ("", "0", "1"):
            raise UserError(f'--truth {path}, line {line}: lesion "{row["lesion"]}": must be 0, 1 or empty')
        truths[place.resolve(), row.get("uid", "")] = Truth(
            {stage: row[stage] for stage in VOTES if row.get(stage)}, masks,
            row["lesion"] == "1" if row.get("lesion") else None, row.get("patient", ""), row.get("split", ""))
    return truths


def truths_of(entries, truths):
    """{name of a series: its Truth} for the {name: Entry} that a table knows."""
    places = {name: (entry.path.resolve(), entry.uid) for name, entry in entries.items()}
    found = {name: truths.get(place) or truths.get((place[0], "")) for name, place in places.items()}
    return {name: truth for name, truth in found.items() if truth}


def stage_accuracy(stage, names, results, truths):
    """(right series, series, right slices, slices) that a stage of VOTES judged and whose class it knows.

    names: its classes; results: dicts of row, and slices with a probability for each class; truths: by the
    name of the series.
    """
    counts = np.zeros(4, int)
    for result in results:
        truth = truths.get(result["row"]["series"])
        true = truth.classes.get(stage) if truth else None
        if stage in result["row"] and true in names:
            votes = [max(names, key=lambda name: line[f"{stage}/{name}"]) for line in result["slices"]]
            counts += result["row"][stage] == true, 1, votes.count(true), len(votes)
    return tuple(counts.tolist())


def in_scope(truth, kept):
    """Whether a series is one that the cascade looks for: no class that is known is outside of ``kept``."""
    return all(truth.classes.get(stage, classes[0]) in classes for stage, classes in kept.items()
               if stage in VOTES)


def f1_of(called, true):
    """(F1, precision, recall) of bool lists; nan where there is nothing to find and nothing called."""
    hits = sum(a and b for a, b in zip(called, true, strict=True))
    return tuple(hits / whole if whole else float("nan") for whole in
                 ((sum(called) + sum(true)) / 2, sum(called), sum(true)))


def compare_masks(results, entries, truths, kept, folder, axis, classes):
    """({"cord" | "lesion": MaskMetrics}, (right slices, slices) of the stage cord, notes, lesions seen).

    Masks count of the series in scope, by their volume; where the cascade stopped before it is empty.
    entries, truths: by the name of the series; folder: of the masks; axis: of the slices; classes:
    {part: names in its mask}, for the stages that are used.  lesions seen: {name: whether the true mask has
    one}.
    """
    metrics = {part: MaskMetrics([part]) for part in classes}
    slices, notes, seen = np.zeros(2, int), [], {}
    for result in results:
        name = result["row"]["series"]
        truth = truths.get(name)
        if truth is None or not truth.masks:
            continue
        try:
            series = read_series(entries[name].path, entries[name].uid, pixels=False)
            true = {part: read_mask(path, series, [part]) for part, path in truth.masks.items()}
            pred = {part: read_mask(folder / f"{name}_{part}.nii.gz", series, names).data > 0
                    for part, names in classes.items() if f"{part}_mm3" in result["row"]}
        except BadFile as error:
            notes.append(f"not compared with its masks: {error}")
            continue
        if "lesion" in true:
            seen[name] = bool(true["lesion"].data.any())
        on = [line["goes_on"] for line in result["slices"] if "goes_on" in line]
        if on and "cord" in true:
            shown = slices_along(true["cord"], axis if series.placed else "stored").any((1, 2))
            slices += (shown == on).sum(), len(on)
        for part in metrics if in_scope(truth, kept) else []:
            if part in true:
                found = pred.get(part, np.zeros(series.data.shape, bool))
                metrics[part].add(found[None].astype(np.uint8), true[part].data[None],
                                  spacing_of(series)[None], [name], [truth.patient])
    return metrics, tuple(slices.tolist()), notes, seen


def lesions_called(results, truths, kept, seen):
    """Two bool lists over the series whose lesions are known: one was found; it is looked for and has one."""
    called, true = [], []
    for row in (result["row"] for result in results):
        truth = truths.get(row["series"])
        if truth is None or (truth.lesion is None and row["series"] not in seen):
            continue
        called.append(bool(row.get("lesions", 0)))
        true.append((seen[row["series"]] if truth.lesion is None else truth.lesion) and in_scope(truth, kept))
    return called, true


def report_truth(results, entries, truths, kept, names, folder, axis):
    """(lines to print, rows (figure, value, of how many) of a table) of all that the table knows.

    names: {stage: classes} of the stages used.  F1: of all series whose lesions are known, those in
    scope that have one against those in which the cascade found one; a series that it stopped has none.
    """
    lines, figures = [], []
    classes = {MASKS[stage]: names[stage] for stage in names if stage in MASKS}
    metrics, cord, notes, seen = compare_masks(results, entries, truths, kept, folder, axis, classes)
    for stage in (stage for stage in VOTES if stage in names):
        right, series, right_slices, slices = stage_accuracy(stage, names[stage], results, truths)
        if series:
            lines.append(f"{stage}: accuracy of series {right / series:.4f} ({right} of {series}), of slices "
                         f"{right_slices / slices:.4f} ({right_slices} of {slices})")
            figures += [(f"{stage}/accuracy", right / series, series),
                        (f"{stage}/slice_accuracy", right_slices / slices, slices)]
    if cord[1]:
        lines.append(f"cord: accuracy of slices {cord[0] / cord[1]:.4f} ({cord[0]} of {cord[1]})")
        figures.append(("cord/slice_accuracy", cord[0] / cord[1], cord[1]))
    parts = {part: metric.compute() for part, metric in metrics.items() if metric.cases}
    figures += [(f"{part}/{name}", values[name], len(metrics[part].cases))
                for part, values in parts.items() for name in FIGURES]
    if parts:
        counts = ", ".join(f"{part} {len(metrics[part].cases)}" for part in parts)
        lines += [f"masks of the series looked for, stopped ones as empty ({counts} series):",
                  text_table({part: {name: values[name] for name in FIGURES}
                              for part, values in parts.items()}, DESCRIPTIONS)]
    called, true = lesions_called(results, truths, kept, seen) if "lesion_mask" in names else ([], [])
    if called:
        values = dict(zip(("F1", "precision", "recall"), f1_of(called, true), strict=True))
        figures += [(f"end_to_end/{name.lower()}", value, len(true)) for name, value in values.items()]
        if "lesion" in parts:
            values["lesion Dice"] = parts["lesion"]["dice"]
        lines.append("end to end: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                     + f" ({sum(true)} of {len(true)} series are looked for and have a lesion; the cascade "
                     f"finds one in {sum(called)})")
    return notes + lines, figures
