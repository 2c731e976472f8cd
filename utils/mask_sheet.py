"""Pictures of masked prediction: what the student saw of a series, and how well it predicted the rest."""

import matplotlib
import numpy as np
from PIL import Image

from datasets.tokens import TOKEN
from utils.overlay import row, stack

CAPTIONS = ("series", "seen by the student", "predicted: dark well, bright badly")


def mask_sheet(path, rows):
    """Write one picture with a row of panels for each series of ``rows``: its slice with most tokens.

    Each row is a dict of one series: tokens float [N, 1024], coords int [N, 3], context and target bool [N]
    (True = seen, predicted), error float [number of targets], in the targets' order; tensors on the CPU.
    The first panel shows all tokens, the second the context alone, the third each target's error.
    """
    strips = [row(panels(**{key: np.asarray(value) for key, value in each.items()}),
                  CAPTIONS if not number else None) for number, each in enumerate(rows)]
    Image.fromarray(stack(strips)).save(path)


def mask_rows(batch, error):
    """The rows of ``mask_sheet`` in a ragged batch; error [number of targets in the batch]."""
    ends = batch["cu_seqlens"][1:-1].cpu().long()
    keys = ("tokens", "coords", "context", "target")
    series = zip(*(batch[key].cpu().tensor_split(ends) for key in keys), strict=True)
    rows = [dict(zip(keys, parts, strict=True)) for parts in series]
    errors = error.cpu().split([int(each["target"].sum()) for each in rows])
    return [{**each, "error": part} for each, part in zip(rows, errors, strict=True)]


def panels(tokens, coords, context, target, error):
    """The three panels of one series, uint8 [H, W, 3]."""
    depth = np.bincount(coords[:, 0]).argmax()
    origin, height, width = coords[:, 1:].min(0), *(np.ptp(coords[:, 1:], axis=0) + 1)
    errors = np.zeros(len(tokens))
    errors[target] = error
    low, high = np.percentile(tokens, (1, 99))
    image, heat = (np.zeros((height * TOKEN[1], width * TOKEN[2], 3), np.float32) for _ in range(2))
    seen = image.copy()
    colours = matplotlib.colormaps["magma"](errors / max(errors.max(), 1e-12))[:, :3]
    for i in np.flatnonzero(coords[:, 0] == depth):
        top, left = (coords[i, 1:] - origin) * TOKEN[1:]
        box = slice(top, top + TOKEN[1]), slice(left, left + TOKEN[2])
        grey = tokens[i].reshape(TOKEN)[TOKEN[0] // 2, ..., None]                      # the middle slice
        image[box] = np.clip((grey - low) / max(high - low, 1e-12), 0.05, 1)
        if context[i]:
            seen[box] = image[box]
        elif target[i]:
            heat[box] = colours[i]
    return [np.rint(255 * panel).astype(np.uint8) for panel in (image, seen, heat)]
