"""The slices that a task can use."""

from datasets.slices import find_slices
from utils.config import UserError


def slices_for(kind, data, mask_names, names, layout, axis, word, on_bad_file):
    """(slices, class names, lines to print) for "classify" | "segment" | "multitask".

    mask_names: of the values 1, 2, ... in the masks; names: classes of a network that is there, None: those
    found; word: what follows "_" in the names of masks; the others as for ``find_slices``.
    "classify": all slices have a class, unless a network is there; "segment": only those with a mask, and no
    class names; "multitask": all, some with a class and some with a mask.  Raises UserError where these are
    missing, and as ``find_slices`` does.
    """
    if kind != "classify" and not mask_names:
        raise UserError("SPINE_MASK_CLASSES = []: name what the values 1, 2, ... in the masks are")
    slices, classes, notes = find_slices(
        data, layout, axis, word if mask_names else "", None if kind == "segment" else names,
        kind == "classify" and names is None, on_bad_file)
    masked = [slice for slice in slices if slice.mask]
    if mask_names and not masked:
        raise UserError(f"{data}: no slice has a mask of {', '.join(mask_names)}; a CSV names it in the "
                        "column mask")
    if kind == "segment":
        return masked, [], notes
    if len(classes) < 2:
        raise UserError(f"{data}: {len(classes)} class(es) of slices, two at least are due; a CSV names them "
                        "in the column label")
    return slices, classes, notes
