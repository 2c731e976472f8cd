"""Pictures of electron microscopy: labels over images, three sections of a volume, samples of training."""

import math

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets.em_labels import CLASSES, IGNORE
from utils.overlay import CAPTION_HEIGHT, GAP, grey, panel_factor, row, stack

CLASS_COLOURS = ((0, 0, 0), (86, 180, 233), (240, 110, 20), (0, 190, 130), (240, 228, 66))   # RGB, as CLASSES
TINT = 0.4                                      # opacity of a label's colour; its outline is opaque
SIDE = 640                                      # pixels of the longer side of three sections
# Per id the hue turns by the golden ratio, saturation and brightness by the plastic number's powers (the
# sequences that stay apart best, Roberts 2018, R1 and R2), counted exactly, in 2^-64ths of a turn.
TURNS = np.array([0x9E3779B97F4A7C15, 0xC13FA9A902A6328F, 0x91E10DA5C79E7B1D], np.uint64)
DARKEST = np.array([0.0, 0.45, 0.65])           # hue, saturation and brightness start here and end at 1
COLUMNS = {"image": "image", "classes": "true classes", "instances": "true instances",
           "predicted_classes": "predicted classes", "predicted_instances": "predicted instances"}


def colours(ids):
    """The colour of each id: integers [...] -> uint8 [..., 3] RGB; 0 is black.

    An id has the same colour in every picture; ids that follow each other, as neighbours mostly do, have hues
    137 degrees apart.
    """
    values, positions = np.unique(ids, return_inverse=True)
    turns = (values.astype(np.uint64)[:, None] * TURNS >> np.uint64(40)) / 2 ** 24         # wraps at 2^64
    table = matplotlib.colors.hsv_to_rgb(DARKEST + turns * (1 - DARKEST))
    table[values == 0] = 0
    return np.rint(255 * table).astype(np.uint8)[positions].reshape(*np.shape(ids), 3)


def class_colours(classes):
    """As ``colours``, for the values of CLASSES; any other, such as that of ignored voxels, is black."""
    known = np.where((classes >= 0) & (classes < len(CLASSES)), classes, 0)
    return np.array(CLASS_COLOURS, np.uint8)[known]


def overlay_labels(image, labels, palette=colours):
    """The image tinted where a label is not 0, each label outlined: uint8 [H, W, 3].

    image [H, W] in [0, 1]; labels integers [H, W]; tensors or arrays.  palette: ``colours`` for instances,
    ``class_colours`` for classes.
    """
    labels = array(labels)
    rim = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    rim[:, 1:] |= across
    rim[:, :-1] |= across
    rim[1:] |= down
    rim[:-1] |= down
    alpha = np.where(labels == 0, 0, np.where(rim, 1, TINT))[..., None]
    return np.rint((1 - alpha) * grey(image) + alpha * palette(labels)).astype(np.uint8)


def orthogonal_slices(image, labels, spacing_nm):
    """Three sections through the middle of a volume, alone and with labels over them: uint8 [H', W', 3].

    image: any numbers [D, H, W]; labels: integers [D, H, W], instances or a mask; arrays, or readers of which
    these three sections are read and nothing else.  spacing_nm: D, H, W, > 0; a nm has the same length along
    all axes.  The section at one z stands upper left, that at one y below it, that at one x to its right,
    each under its caption, in which voxels count from 0.
    Grey values run from the 0.5th to the 99.5th percentile of the sections.
    """
    images, masks = sections(image), sections(labels)
    low, high = np.percentile(np.concatenate([cut.ravel() for cut in images]), (0.5, 99.5))
    images = [((cut - low) / max(high - low, 1e-12)).astype(np.float32) for cut in images]
    lengths = np.array(image.shape) * np.array(spacing_nm)                                 # nm
    scale = SIDE / max(lengths[0] + lengths[1], lengths[0] + lengths[2])
    depth, height, width = (max(1, round(scale * length)) for length in lengths)           # pixels
    sizes = (height, width), (depth, width), (height, depth)
    z, y, x = (n // 2 for n in image.shape)
    heads = [f"section {z} of {image.shape[0]}, {lengths[2] / 1000:.3g} um wide", "segmentation"]
    names, font = [f"y = {y}", f"x = {x}"], ImageFont.load_default(size=14)
    reach = {text: math.ceil(font.getlength(text)) + 8 for text in (*heads, *names)}       # no text is cut
    right = max(width, *(reach[text] for text in (*heads, names[0]))) + GAP
    half = right + max(depth, reach[names[1]]) + GAP
    corners = (0, 0), (CAPTION_HEIGHT + height, 0), (0, right)
    canvas = Image.new("RGB", (2 * half - GAP, 2 * CAPTION_HEIGHT + height + depth))
    for number, head in enumerate(heads):
        for cut, mask, (top, left), size, text in zip(images, masks, corners, sizes, (head, *names),
                                                      strict=True):
            left, mask = left + number * half, nearest(mask, size) if number else np.zeros(size, int)
            ImageDraw.Draw(canvas).text((left + 4, top + 3), text, fill="white", font=font)
            canvas.paste(Image.fromarray(overlay_labels(smooth(cut, size), mask)),
                         (left, top + CAPTION_HEIGHT))
    return np.asarray(canvas)


def sections(volume):
    """The middle sections of [D, H, W], each read as one block: [H, W], [D, W], and [H, D]."""
    cuts = []
    for axis, size in enumerate(volume.shape):
        block = [slice(0, length) for length in volume.shape]
        block[axis] = slice(size // 2, size // 2 + 1)
        cuts.append(np.asarray(volume[tuple(block)]).squeeze(axis))
    return [cuts[0], cuts[1], cuts[2].T]


def sheet(path, rows):
    """Write one picture with a row of panels for each sample of ``rows``, and the classes' colours below.

    Each row is a dict of tensors or arrays: image in [0, 1], and any of classes, instances,
    predicted_classes, predicted_instances, integers; the same keys in each row.  All are [..., H, W]; of
    volumes one section is shown, see shown.  A predicted instance has the colour of the true one that it
    covers.
    """
    names = [name for name in COLUMNS if name in rows[0]]
    strips = []
    for sample in rows:
        z = shown(sample.get("classes", sample["image"]))
        maps = {name: planes(sample[name])[z] for name in names}
        if "instances" in maps and "predicted_instances" in maps:
            maps["predicted_instances"] = renamed(maps["predicted_instances"], maps["instances"])
        panels = [panel(maps["image"], labels, class_colours if "classes" in name else colours)
                  for name, labels in maps.items()]
        strips.append(row(panels, [COLUMNS[name] for name in names] if not strips else None))
    Image.fromarray(stack([*strips, legend()])).save(path)


def panel(image, labels, palette):
    """The image [H, W] at a size to be looked at, with labels over it unless they are the image itself."""
    size = [round(panel_factor(image.shape) * n) for n in image.shape]
    if labels is image:
        return grey(smooth(image, size))
    return overlay_labels(smooth(image, size), nearest(labels, size), palette)


def renamed(predicted, true):
    """Predicted instances [H, W] under the ids of those true ones with which they share most pixels.

    Each true id is given once, the largest share first; the others get ids that no true one has.
    """
    predicted, true = predicted.astype(np.int64), true.astype(np.int64)
    both = (predicted > 0) & (true > 0)
    pairs, counts = np.unique(np.stack([predicted[both], true[both]]), axis=1, return_counts=True)
    output = np.where(predicted > 0, predicted + true.max(), 0)
    given = set(), set()
    for old, new in pairs[:, np.argsort(-counts, kind="stable")].T:
        if old not in given[0] and new not in given[1]:
            output[predicted == old] = new
            given[0].add(old)
            given[1].add(new)
    return output


def legend():
    """A line with the words of the classes in their colours, uint8 [height, width, 3]."""
    words = [("background: no colour", "white"), *zip(CLASSES[1:], CLASS_COLOURS[1:], strict=True),
             ("not annotated: dark", "grey")]
    font, left = ImageFont.load_default(size=14), 4
    canvas = Image.new("RGB", (640, CAPTION_HEIGHT))
    for word, colour in words:
        ImageDraw.Draw(canvas).text((left, 3), word, fill=colour, font=font)
        left += round(font.getlength(word)) + 16
    return np.asarray(canvas)


def shown(classes):
    """Which section of true classes [..., H, W] is drawn: the middle one of those with an annotated voxel.

    Where a crop is deeper than its volume the rest is mirrored and not annotated: there is no truth to see.
    """
    annotated = np.flatnonzero((planes(classes) != IGNORE).any((1, 2)))
    return annotated[len(annotated) // 2] if len(annotated) else len(planes(classes)) // 2


def planes(volume):
    """Tensor or array [..., H, W] -> array [D, H, W], D = 1 for a single section."""
    volume = array(volume)
    return volume.reshape(-1, *volume.shape[-2:])


def array(values):
    """Tensor on any device, or array -> array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def smooth(image, size):
    """Image [H, W] -> float32 [height, width], bicubic, averaged where it gets smaller."""
    image = Image.fromarray(np.asarray(image, np.float32))
    return np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))


def nearest(labels, size):
    """Labels [H, W] -> [height, width], each pixel the label at its centre."""
    rows, columns = ((np.arange(n) + 0.5) * old // n for n, old in zip(size, labels.shape, strict=True))
    return labels[rows.astype(int)[:, None], columns.astype(int)]
