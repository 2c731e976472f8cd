"""Photographs with captions in one picture."""

import numpy as np
import torch
from PIL import Image

from utils.overlay import row, shortened, stack


def photo_sheet(path, pictures, columns=4):
    """Write a PNG of ``pictures``, pairs of an image and its caption, in rows of ``columns``.

    Images: tensors float [3, H, W] in [0, 1], or uint8, of one shape.  Of a long caption the end is shown.
    """
    panels = [panel(image) for image, _ in pictures]
    captions = [shortened(text) for _, text in pictures]
    strips = [row(panels[start:start + columns], captions[start:start + columns])
              for start in range(0, len(panels), columns)]
    Image.fromarray(stack(strips)).save(path)


def panel(image):
    """Tensor float [3, H, W] in [0, 1] or uint8 -> uint8 [H, W, 3]."""
    if image.is_floating_point():
        image = (255 * image.detach().float()).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())


def view_rows(batch, outputs):
    """Pictures of two views beside each other: "case" names of B images, views [2B, 3, H, W] in [0, 1]."""
    first, second = outputs[0].chunk(2)
    return [picture for pair in zip(first, second, batch["case"], strict=True)
            for picture in ((pair[0], pair[2]), (pair[1], "second view"))]


def prediction_rows(batch, logits, images, names):
    """Pictures of B photographs: "label" int64 [B], logits [B, C], images [B, 3, H, W] in [0, 1]."""
    shares, predicted = logits.float().softmax(1).max(1)
    return [(image, f"{names[label]}: {names[choice]} {share:.2f}") for image, label, choice, share in
            zip(images, batch["label"].tolist(), predicted.tolist(), shares.tolist(), strict=True)]
