"""Series through the networks of a cascade: what each sees, what it decides, masks, and pictures of them."""

from functools import cache
from typing import NamedTuple

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.slice_series import slices_along, spacing_along, view_of
from datasets.slice_squares import fit_box, into_box, to_unit
from models.slice_nets import named_outputs
from utils.cascade import MASKS, choose_slices, decide
from utils.config import UserError
from utils.device import autocast
from utils.mask_metrics import predict_masks
from utils.overlay import grey, row, stack, tint

PICTURE = 320                                        # pixels per side of an overlay's panels


class View(NamedTuple):
    """How a network sees a slice: see datasets.slices.SliceDataset."""

    size: int
    fit: str
    intensity: str
    percentiles: tuple
    field: float = 0.0


class Stage(NamedTuple):
    """One network.  name: of cascade.STAGES; kind: of the checkpoint; names: of its classes, or in its masks.

    kept: classes that go on, [] for masks; view: a View; axis: of the slices it was trained on; threshold: of
    the masks' probabilities; precision: a word of constants.py; digest: of the checkpoint.
    """

    name: str
    kind: str
    network: torch.nn.Module
    names: list
    kept: list
    view: View
    axis: str
    threshold: float
    precision: str
    digest: str


class Rules(NamedTuple):
    """axis: of the slices; min_slices: fewer are not judged; margin: below which a vote is doubtful; stop:
    whether doubtful series end there; clip: whether lesions are cut to the cord."""

    axis: str
    min_slices: int
    margin: float
    stop: bool
    clip: bool


@torch.inference_mode()
def predict(stage, squares, batch_size, device):
    """Outputs of a Stage on squares, a list of [1, S, S]: float32 [N, K], or for masks [N, C, S, S], CPU.

    Raises UserError for values that are not finite.
    """
    outputs = []
    for start in range(0, len(squares), batch_size):
        with autocast(device, stage.precision):
            output = stage.network(torch.stack(squares[start:start + batch_size]).to(device))
        output = named_outputs(stage.kind, output)["masks" if stage.name in MASKS else "labels"]
        outputs.append(output.float().cpu())
    outputs = torch.cat(outputs)
    if not outputs.isfinite().all():
        raise UserError(f"{stage.name}.pt: gives values that are not finite; use another checkpoint")
    return outputs


def judge(series, stages, rules, batch_size, device):
    """One series through the stages -> (fields of its row, a dict for each slice, {part: mask}).

    Masks are uint8 [N, H, W] in the order of slices_along, 0 in slices that no network saw; "lesions" counts
    those that hang together in the volume, by corners too.
    """
    axis = axis_of(series, rules)
    slices, square = slices_along(series, axis), square_maker(series, axis)
    row = {"slices": len(slices), "view": view_of(series, axis) or "", "doubtful": "", "stopped": "",
           "notes": "; ".join(series.notes + ["without spacing: mm3 are voxels"] * (not series.placed))}
    lines, going, masks = [{"slice": i} for i in range(len(slices))], np.arange(len(slices)), {}
    if len(slices) < rules.min_slices:
        return {**row, "stopped": "too few slices"}, lines, masks
    for stage in stages:
        squares, boxes = zip(*(square(i, stage.view) for i in going.tolist()), strict=True)
        outputs = predict(stage, squares, batch_size, device)
        if stage.name in MASKS:
            part = MASKS[stage.name]
            masks[part] = np.zeros(slices.shape, np.uint8)
            masks[part][going] = to_masks(stage, outputs, boxes[0], slices.shape[1:])
            if part == "lesion" and rules.clip:
                masks[part] *= masks["cord"] > 0
            row |= measure(part, masks[part], abs(np.linalg.det(series.affine[:3, :3])), lines)
            continue
        shares = outputs.double().softmax(1).numpy()
        for i, values in zip(going, shares.tolist(), strict=True):
            lines[i] |= {f"{stage.name}/{name}": round(value, 4)
                         for name, value in zip(stage.names, values, strict=True)}
        if stage.name == "cord":
            fields, on, row["stopped"] = choose_slices(stage.name, shares, stage.names, stage.kept)
            lines, going = [{**line, "goes_on": int(i)} for line, i in zip(lines, on, strict=True)], going[on]
        else:
            fields, doubtful, row["stopped"] = decide(stage.name, shares, stage.names, stage.kept,
                                                      rules.margin, rules.stop)
            row["doubtful"] = ", ".join(filter(None, [row["doubtful"], stage.name * doubtful]))
        row |= fields
        if row["stopped"]:
            break
    return row, lines, masks


def axis_of(series, rules):
    """The axis of the slices; pictures have one alone."""
    return rules.axis if series.placed else "stored"


def to_masks(stage, logits, box, shape):
    """uint8 [N, *shape] of logits [N, C, S, S]: each is brought onto the slice's own pixels first."""
    return np.stack([predict_masks(to_slices(each[None], box, shape), len(stage.names), stage.threshold)[0]
                     for each in logits]).astype(np.uint8)


def measure(part, mask, volume, lines):
    """Fields of the series' row: mm3 of a mask [N, H, W] and the number of lesions; ``lines`` get theirs.

    volume: mm3 of a voxel.
    """
    counts = (mask > 0).sum((1, 2)).tolist()
    for line, count in zip(lines, counts, strict=True):
        line[f"{part}_mm3"] = round(count * volume, 2)
    fields = {f"{part}_mm3": round(sum(counts) * volume, 2)}
    if part == "lesion":
        fields["lesions"] = int(cc3d.connected_components(mask > 0, connectivity=26, return_N=True)[1])
    return fields


def square_maker(series, axis):
    """Function square(index, view) -> (float32 tensor [1, S, S], box), as SliceDataset shows that slice.

    index: in slices_along(series, axis); view: a View.  Stages with the same View share the work.
    """
    slices, spacing = slices_along(series, axis), spacing_along(series, axis)[1:]

    @cache
    def limits(index, percentiles):
        return tuple(np.percentile(series.data if index is None else slices[index], percentiles))

    @cache
    def square(index, view):
        box = fit_box(slices.shape[1:], spacing, view.size, view.fit, view.field)
        unit = to_unit(slices[index], limits(None if view.intensity == "series" else index, view.percentiles))
        return torch.from_numpy(into_box(unit, box, view.size))[None], box

    return square


def to_slices(logits, box, shape):
    """Logits [B, C, S, S] of squares -> [B, C, *shape] on the slices' own pixels, bilinear."""
    top, left, height, width = box
    inside = logits[:, :, top:top + height, left:left + width]
    return inside if inside.shape[2:] == shape else F.interpolate(inside, shape, mode="bilinear",
                                                                  antialias=True)


def busiest(masks, count):
    """Numbers, rising, of at most ``count`` slices with most lesion, then with most cord.

    masks: {"cord" | "lesion": [N, H, W]}, either or none; slices without a mark are left out.
    """
    areas = [masks[part].astype(bool).sum((1, 2)) for part in ("lesion", "cord") if part in masks]
    order = np.lexsort([-area for area in reversed(areas)]).tolist() if areas else []
    return sorted(i for i in order[:count] if any(area[i] for area in areas))


def save_overlay(path, slices, spacing, masks, shown):
    """Write a PNG with a row for each slice ``shown``: as it is, and with cord in green and lesions in red.

    slices [N, H, W]; spacing: mm between rows and columns; masks: as ``busiest`` takes them.
    """
    box = top, left, height, width = fit_box(slices.shape[1:], spacing, PICTURE, "letterbox")
    strips = []
    colours = ", ".join(f"{part} {colour}" for part, colour in (("cord", "green"), ("lesion", "red"))
                        if part in masks)
    for i in shown:
        image = into_box(to_unit(slices[i], np.percentile(slices[i], (0.5, 99.5))), box, PICTURE)
        signs = np.zeros(slices.shape[1:], np.float32)
        for part, sign in (("cord", -0.2), ("lesion", 0.2)):
            if part in masks:
                signs[masks[part][i] > 0] = sign
        marks = np.zeros((PICTURE, PICTURE), np.float32)
        marks[top:top + height, left:left + width] = F.interpolate(
            torch.from_numpy(signs)[None, None], (height, width), mode="nearest-exact")[0, 0]
        strips.append(row([grey(image), tint(image, marks, 0.1)], [f"slice {i}", colours]))
    Image.fromarray(stack(strips)).save(path)
