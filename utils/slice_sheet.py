"""Pictures of slices with true and predicted masks over them."""

import numpy as np
from PIL import Image

from utils.em_pictures import array, colours, panel
from utils.mask_metrics import predict_masks
from utils.overlay import NEW, RESOLVED, row, shortened, stack

PARTS = {"cord": RESOLVED, "lesion": NEW}       # their colours, as in the pictures of infer_cascade.py


def part_colours(ids):
    """As em_pictures.colours, but the numbers that ``numbered`` gives cord and lesion have their colours."""
    table = colours(ids)
    for number, colour in enumerate(PARTS.values(), 1):
        table[ids == number] = colour
    return table


def numbered(mask, names):
    """A mask [...], tensor or array, whose values 1, 2, ... are ``names`` -> array of numbers of colours.

    1 is a cord and 2 a lesion, whatever their values in the mask; others follow.  Background 0 and unknown
    pixels, below 0, become 0 and stay clear.
    """
    known = list(PARTS)
    known += [name for name in names if name not in known]
    return np.array([0, *(1 + known.index(name) for name in names)])[array(mask).clip(0)]


def slice_sheet(path, rows):
    """Write a PNG with a row for each of ``rows``: the slice, and its true and predicted mask over it.

    Each row is (caption, image [H, W] in [0, 1]), with masks also true and predicted, as ``numbered`` gives
    them; tensors or arrays.  Long captions lose their beginning.
    """
    strips = []
    for caption, image, *masks in rows:
        image = array(image)
        panels = [panel(image, labels, part_colours) for labels in (image, *masks)]
        strips.append(row(panels, [shortened(caption), "true", "predicted"]))
    Image.fromarray(stack(strips)).save(path)


def slice_rows(batch, outputs, names, mask_names, threshold=0.5):
    """Rows of ``slice_sheet`` of a batch of SliceDataset; outputs: see slice_nets.named_outputs.

    names: of the classes; mask_names, threshold: see mask_metrics.predict_masks.
    """
    captions, columns = batch["case"], [batch["image"][:, 0]]
    if "labels" in outputs:
        shares, chosen = outputs["labels"].float().softmax(1).max(1)
        words = [*names, "unknown"]                          # -1 is the last
        captions = [f"{words[label]}: {names[choice]} {share:.2f}" for label, choice, share in
                    zip(batch["label"].tolist(), chosen.tolist(), shares.tolist(), strict=True)]
    if "masks" in outputs:
        predicted = predict_masks(outputs["masks"].float(), len(mask_names), threshold)
        columns += [numbered(mask, mask_names) for mask in (batch["mask"], predicted)]
    return list(zip(captions, *columns, strict=True))
