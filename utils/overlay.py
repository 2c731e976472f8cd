"""Pictures of a change map: new findings in red and resolved ones in green over the current image."""

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

NEW, RESOLVED = (255, 45, 45), (40, 220, 90)    # RGB
FULL_STRENGTH = 0.4                             # |difference| from which a colour gets no stronger
WEAKEST, STRONGEST = 0.25, 0.65                 # opacity at the threshold and at full strength
PANEL_PIXELS = (320, 768)                       # shortest and longest height of a panel; others are resized
GAP, CAPTION_HEIGHT = 4, 22                     # pixels between panels, and of the line of text above them
LONGEST = 42                                    # characters that fit above a panel


def overlay(prior, current, diff, truth=None, uncertainty=None, threshold=0.05):
    """One row of captioned panels: prior, current, its changes, and truth and uncertainty if given.

    prior, current [H, W] in [0, 1]; diff, truth [H, W] in [-1, 1]; uncertainty [H, W] >= 0, a standard
    deviation; all in the current image's frame, tensors or arrays, a leading axis of one is dropped. Where a
    map stays below the threshold the image stays clear; the rest is tinted by its strength and outlined, and
    a map without any rest is captioned as such.  Returns uint8 [rows, columns, 3].
    """
    legend = f"denser: new (red), less: resolved (green), > {threshold:g}"
    if np.abs(plain(diff)).max() <= threshold:
        legend = f"no change above {threshold:g}"
    panels = {"prior": grey(prior), "current": grey(current), legend: tint(current, diff, threshold)}
    if truth is not None:
        panels["truth"] = tint(current, truth, threshold)
    if uncertainty is not None:
        uncertainty = plain(uncertainty)
        peak = uncertainty.max()
        heat = matplotlib.colormaps["magma"](uncertainty / peak if peak > 0 else uncertainty)[..., :3]
        panels[f"uncertainty, white = {peak:.3f}"] = np.rint(255 * heat).astype(np.uint8)
    return row(list(panels.values()), list(panels))


def save_overlay(path, *args, **kwargs):
    """Write the picture that ``overlay`` makes of the same arguments."""
    Image.fromarray(overlay(*args, **kwargs)).save(path)


def sample_sheet(path, rows, threshold):
    """Write one picture with a row of panels for each (prior, current, target, prediction) of ``rows``.

    Images and maps as ``overlay`` takes them.
    """
    captions = ["prior", "current", "target: new red, resolved green", "prediction"]
    strips = []
    for prior, current, target, pred in rows:
        maps = [tint(current, target, threshold), tint(current, pred, threshold)]
        strips.append(row([grey(prior), grey(current), *maps], captions if not strips else None))
    Image.fromarray(stack(strips)).save(path)


def shortened(caption):
    """A caption of at most LONGEST characters; of a longer one the end."""
    return caption if len(caption) <= LONGEST else f"...{caption[3 - LONGEST:]}"


def plain(image):
    """Tensor or array [H, W] or [1, H, W] -> float32 array [H, W]."""
    image = torch.as_tensor(image).detach().float().cpu().numpy()
    return image.reshape(image.shape[-2:])


def grey(image):
    """[H, W] in [0, 1] -> uint8 [H, W, 3]."""
    return np.repeat(np.rint(255 * plain(image).clip(0, 1)).astype(np.uint8)[..., None], 3, axis=2)


def tint(image, diff, threshold):
    """The image with what is new in red and resolved in green, uint8 [H, W, 3] of the panel's size."""
    factor = panel_factor(plain(image).shape)
    picture = zoom(grey(image), factor).astype(np.float32)
    diff = np.asarray(Image.fromarray(plain(diff)).resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
    strength = ((np.abs(diff) - threshold) / (FULL_STRENGTH - threshold)).clip(0, 1)
    for changed, colour in ((diff > threshold, NEW), (diff < -threshold, RESOLVED)):
        rim = changed & ~ndimage.binary_erosion(changed)
        alpha = np.where(changed, WEAKEST + (STRONGEST - WEAKEST) * strength, 0)
        alpha = np.where(rim, 1, alpha)[..., None]
        picture = (1 - alpha) * picture + alpha * np.array(colour, np.float32)
    return np.rint(picture).astype(np.uint8)


def panel_factor(shape):
    """By how much an image [H, W] is enlarged or reduced to be looked at."""
    return float(np.clip(shape[0], *PANEL_PIXELS)) / shape[0]


def zoom(picture, factor):
    """uint8 [H, W, 3] resized by a factor."""
    size = [max(1, round(factor * n)) for n in picture.shape[1::-1]]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def stack(strips):
    """Strips uint8 [H, W, 3] of any width one below the other, black beside and between them."""
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(strip, ((0, GAP), (0, width - strip.shape[1]), (0, 0))) for strip in strips]
    return np.concatenate(padded)


def row(panels, captions=None):
    """Panels uint8 [H, W, 3] side by side at one height, each under its caption."""
    height = round(np.clip(max(panel.shape[0] for panel in panels), *PANEL_PIXELS))
    panels = [panel if panel.shape[0] == height else zoom(panel, height / panel.shape[0]) for panel in panels]
    top = CAPTION_HEIGHT if captions else 0
    canvas = Image.new("RGB", (sum(panel.shape[1] + GAP for panel in panels) - GAP, height + top))
    draw, font, left = ImageDraw.Draw(canvas), ImageFont.load_default(size=14), 0
    for i, panel in enumerate(panels):
        canvas.paste(Image.fromarray(panel), (left, top))
        if captions:
            draw.text((left + 4, 3), captions[i], fill="white", font=font)
        left += panel.shape[1] + GAP
    return np.asarray(canvas)
