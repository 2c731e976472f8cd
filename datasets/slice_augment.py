"""Random changes of grey slices and their masks, a batch at a time where it lies.

What moves an image moves its mask, in one resampling: the image bilinear, the mask of the nearest pixel.
"""

import difflib

import numpy as np
import torch
import torch.nn.functional as F

from datasets.em_augment import bending
from datasets.photo_augment import CELLS, stretched
from datasets.simclr_views import between, check_settings, draw_uniform, gaussian_blur
from utils.config import UserError

SIDE = 320                       # of the slice whose pixels the settings below are meant in
DEGREE = 3                       # of the bias field's polynomial
MOVES = ("crop", "flip", "rotate", "affine", "elastic", "grid", "optical")
# Heavy elastic: the original's sigma of 100 moves a pixel by half a pixel, that of 20 by two and a half.
OFF = {"crop": 0.0, "crop_side": 300 / 320, "flip": 0.0, "rotate": 0.0, "rotate_angle": 90.0,
       "affine": 0.0, "shift": 0.0625, "scale": 0.1, "angle": 15.0,
       "elastic": 0.0, "elastic_alpha": 300.0, "elastic_sigma": 20.0,
       "grid": 0.0, "stretch": 0.3, "optical": 0.0, "optical_amount": 0.05,
       "bias": 0.0, "bias_coefficients": (0.3, 0.7), "bias_range": (0.8, 1.2),
       "gamma": 0.0, "gamma_range": (0.7, 1.5), "multiply": 0.0, "multiply_range": (0.85, 1.15),
       "jitter": 0.0, "brightness": 0.2, "contrast": 0.2, "blur": 0.0, "sigma": (0.8, 2.0),
       "noise": 0.0, "noise_variance": (10.0, 50.0),
       "holes": 0.0, "hole_count": (1, 4), "hole_side": (8.0, 32.0)}
SEVERITIES = {
    "none": {},
    "light": {"blur": 0.2, "crop": 0.2, "flip": 0.3, "jitter": 0.2, "noise": 0.2, "rotate": 0.1},
    "heavy": {"blur": 0.1, "crop": 0.1, "flip": 0.3, "jitter": 0.2, "noise": 0.2, "gamma": 0.3,
              "multiply": 0.15, "elastic": 0.2, "grid": 0.1, "optical": 0.1, "affine": 0.2, "holes": 0.1,
              "bias": 0.2},
}
AMOUNTS = ("angle", "rotate_angle", "shift", "scale", "elastic_alpha", "stretch", "optical_amount",
           "brightness", "contrast")
BELOW_1 = ("scale", "stretch", "optical_amount")
RANGES = tuple(name for name, value in OFF.items() if isinstance(value, tuple))
# The draws of an image, one of each, before those of cells, bias field and holes.
PARTS = (*MOVES, "crop_y", "crop_x", "turn", "shift_y", "shift_x", "zoom", "tilt", "bend",
         "bias", "gamma", "exponent", "multiply", "times", "jitter", "brightness", "contrast",
         "blur", "sigma", "noise", "variance", "holes", "count")


class SliceAugment:
    """Augment slices by one of three severities, or by settings that differ from it.

    severity: "none" | "light" | "heavy"; size: side of the slices, pixels; settings: any names in OFF.

    Each of these comes to an image with the probability of its name; the geometry first, as one map:
        crop      a square of crop_side of the side, anywhere, enlarged; 196 of 224 would be 0.875
        flip      left and right mirrored
        rotate    by up to +- rotate_angle degrees
        affine    moved by up to +- shift of the side, enlarged by a factor within 1 +- scale, turned by up
                  to +- angle degrees
        elastic   smooth random displacements; elastic_alpha, elastic_sigma: see ``em_augment.bending``
        grid      CELLS x CELLS cells with sides stretched by factors within 1 +- stretch
        optical   barrel or cushion: what is r half sides from the centre comes from r (1 + k r^2), k within
                  +- optical_amount
    then the image alone, limited to [0, 1] each time:
        bias      multiplied by a polynomial of degree 3 in x and y of [-1, 1] that spans bias_range; its
                  coefficients have an absolute value in bias_coefficients and any sign (all positive, the
                  same corner would always be the bright one)
        gamma     an exponent in gamma_range
        multiply  a factor in multiply_range
        jitter    contrast about the mean by a factor within 1 +- contrast, +- brightness added
        blur      Gaussian, of a standard deviation in the range sigma, pixels
        noise     Gaussian, of a variance in the range noise_variance, in grey levels of 255
        holes     black rectangles: their number in hole_count, each side in hole_side, pixels.  The mask
                  stays: what is hidden must be inferred from what surrounds it
    Lengths in pixels are those of a slice of SIDE and scale with ``size``.  What comes from outside the slice
    is black in the image and -1, unknown, in the mask, like the padding of a slice that is no square.
    Raises UserError for an unknown severity or setting and for values that make no sense.
    """

    def __init__(self, severity, size, **settings):
        if severity not in SEVERITIES:
            raise UserError(f'SPINE_SEVERITY = "{severity}": must be one of {", ".join(SEVERITIES)}')
        for name in settings.keys() - OFF.keys():
            near = difflib.get_close_matches(name, OFF, 1, 0)[0]
            raise UserError(f'slice augmentation: no setting named "{name}"; the closest is "{near}"')
        self.size, self.settings = size, OFF | SEVERITIES[severity] | settings
        of = self.settings
        check_settings("slice augmentation", {name: of[name] for name in SEVERITIES["heavy"] | {"rotate": 0}},
                       {name: of[name] for name in AMOUNTS},
                       {name: of[name] for name in RANGES} |
                       {name: (of[name], of[name]) for name in ("elastic_sigma", "crop_side")})
        for name in BELOW_1:
            if of[name] >= 1:
                raise UserError(f"slice augmentation: {name} = {of[name]}; give less than 1")
        if of["crop_side"] > 1:
            raise UserError(f"slice augmentation: crop_side = {of['crop_side']}; give at most 1")

    @torch.no_grad()
    def __call__(self, images, masks, seeds):
        """-> (images, masks), new tensors of the same types, on the same device.

        images float32 [B, 1, S, S] in [0, 1]; masks int64 [B, S, S] (-1 = unknown), or None; seeds: B
        integers >= 0, each the only source of its image's draws.  Raises ValueError for other shapes.
        """
        shape = (len(seeds), 1, self.size, self.size)
        if images.shape != shape or masks is not None and masks.shape != (shape[0], *shape[2:]):
            raise ValueError(f"images {tuple(images.shape)}, masks {masks if masks is None else masks.shape}:"
                             f" not {shape} and the same without channel")
        seeds = [int(seed) for seed in seeds]
        sizes = np.cumsum([len(PARTS), 2 * CELLS, 2 * (DEGREE + 1) ** 2])
        uniform = draw_uniform(seeds, sizes[-1] + 4 * int(self.settings["hole_count"][1]))
        parts, cells, bias, holes = np.split(uniform, sizes, axis=1)
        draws = dict(zip(PARTS, parts.T, strict=True)) | {
            "cells": cells, "coefficients": bias, "rectangles": holes, "seed": np.array(seeds, object)}
        images, masks = images.clone(), None if masks is None else masks.clone()
        with torch.autocast(images.device.type, enabled=False):
            self.move(images, masks, draws)
            for part, change in CHANGES.items():
                chosen = np.flatnonzero(draws[part] < self.settings[part])
                if len(chosen):
                    index = torch.from_numpy(chosen).to(images.device)
                    own = {name: values[chosen] for name, values in draws.items()}
                    images[index] = change(images[index], own, self.settings).clamp_(0, 1)
        return images, masks

    def move(self, images, masks, draws):
        """All that moves masks, in place and in one resampling; images that stay are not resampled."""
        happens = {part: draws[part] < self.settings[part] for part in MOVES}
        chosen = np.flatnonzero(np.any(list(happens.values()), axis=0))
        if not len(chosen):
            return
        grid = self.grid({name: values[chosen] for name, values in draws.items()},
                         {part: values[chosen] for part, values in happens.items()}, images.device)
        index = torch.from_numpy(chosen).to(images.device)
        images[index] = F.grid_sample(images[index], grid, align_corners=False)
        if masks is not None:                               # one more, for the zero from outside means -1
            known = masks[index][:, None].float() + 1
            masks[index] = F.grid_sample(known, grid, "nearest", align_corners=False)[:, 0].long() - 1

    def grid(self, draws, happens, device):
        """Where each pixel of n images comes from, for grid_sample: float32 [n, S, S, 2] (x, y)."""
        of = self.settings
        x, y = (torch.from_numpy(stretched(cells, of["stretch"] * happens["grid"], self.size)).to(device)
                for cells in np.split(draws["cells"], 2, axis=1))                       # [n, S]
        x, y = x.float()[:, None, :], y.float()[:, :, None]
        if happens["optical"].any():
            bend = between(draws["bend"], -of["optical_amount"], of["optical_amount"]) * happens["optical"]
            longer = 1 + column(bend, device)[:, 0] * (x.square() + y.square())         # [n, S, S]
            x, y = x * longer, y * longer
        a = torch.from_numpy(affine_maps(draws, happens, of)).float().to(device)[..., None, None]
        moved = [a[:, row, 0] * x + a[:, row, 1] * y + a[:, row, 2] for row in (0, 1)]
        grid = torch.stack(moved, -1)                                                   # [n, S, S, 2]
        scale = self.size / SIDE
        for i in np.flatnonzero(happens["elastic"]):
            offsets = bending((1, self.size, self.size), (1, 1, 1), of["elastic_alpha"] * scale ** 2,
                              of["elastic_sigma"] * scale, generator(draws["seed"][i], 0))[:, 0]
            grid[i] += 2 / self.size * torch.from_numpy(offsets[::-1].copy()).to(device).permute(1, 2, 0)
        return grid


def generator(seed, number):
    """One of an image's further sources of draws: a numpy Generator of its own for each number."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))


def column(values, device):
    """numpy [n] -> float32 [n, 1, 1, 1] on the device, to work on [n, 1, S, S]."""
    return torch.from_numpy(np.asarray(values, np.float32)).to(device)[:, None, None, None]


def affine_maps(draws, happens, of):
    """crop, flip, rotate and affine as one map from places of the result to the slice's: float64 [n, 2, 3].

    Places are (x, y) in [-1, 1], y downwards.  A positive angle turns the slice counterclockwise.
    """
    affine, crop = happens["affine"], happens["crop"]
    angle = np.where(happens["rotate"], between(draws["turn"], -of["rotate_angle"], of["rotate_angle"]), 0)
    angle = np.deg2rad(angle + np.where(affine, between(draws["tilt"], -of["angle"], of["angle"]), 0))
    larger = np.where(affine, between(draws["zoom"], 1 - of["scale"], 1 + of["scale"]), 1)
    side = np.where(crop, of["crop_side"], 1)
    mirror = np.where(happens["flip"], -1, 1)
    cos, sin = side / larger * np.cos(angle), side / larger * np.sin(angle)
    offsets = [(1 - side) * between(draws[f"crop_{axis}"], -1, 1)
               + 2 * np.where(affine, between(draws[f"shift_{axis}"], -of["shift"], of["shift"]), 0)
               for axis in "xy"]
    rows = [(mirror * cos, -mirror * sin, offsets[0]), (sin, cos, offsets[1])]
    return np.stack([np.stack(row, -1) for row in rows], 1)


def add_bias(images, draws, of):
    """Multiply by a polynomial of degree DEGREE that spans bias_range."""
    size, (low, high), powers = images.shape[-1], of["bias_range"], np.arange(DEGREE + 1)
    values, signs = np.split(draws["coefficients"].reshape(-1, 2 * (DEGREE + 1), DEGREE + 1), 2, axis=1)
    values = between(values, *of["bias_coefficients"]) * np.where(signs < 0.5, -1, 1)
    values *= powers[:, None] + powers <= DEGREE                                        # [n, y's, x's power]
    basis = ((2 * np.arange(size) + 1) / size - 1)[:, None] ** powers                   # [S, powers]
    basis, values = (torch.from_numpy(array).float().to(images.device) for array in (basis, values))
    field = (basis @ values @ basis.T)[:, None]
    least, most = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return images * (low + (high - low) * (field - least) / (most - least).clamp(min=1e-12))


def change_gamma(images, draws, of):
    """An exponent for each image."""
    return images ** column(between(draws["exponent"], *of["gamma_range"]), images.device)


def multiply(images, draws, of):
    """A factor for each image."""
    return images * column(between(draws["times"], *of["multiply_range"]), images.device)


def change_contrast(images, draws, of):
    """Contrast about the image's mean, and brightness."""
    contrast, brightness = (column(between(draws[name], base - of[name], base + of[name]), images.device)
                            for name, base in (("contrast", 1), ("brightness", 0)))
    return images * contrast + (images.mean((2, 3), keepdim=True) * (1 - contrast) + brightness)


def blur(images, draws, of):
    """A Gaussian filter for each image."""
    scale = images.shape[-1] / SIDE
    return gaussian_blur(images, scale * between(draws["sigma"], *of["sigma"]), scale * of["sigma"][1])


def add_noise(images, draws, of):
    """Independent Gaussian noise; drawn on the CPU, hence the same on every device."""
    deviations = np.sqrt(between(draws["variance"], *of["noise_variance"])) / 255
    noise = np.stack([generator(seed, 1).standard_normal(images.shape[1:], dtype=np.float32)
                      for seed in draws["seed"]])
    return images + column(deviations, images.device) * torch.from_numpy(noise).to(images.device)


def punch_holes(images, draws, of):
    """Black rectangles, wholly within the slice."""
    size, (low, high) = images.shape[-1], of["hole_count"]
    number = between(draws["count"], low, high + 1).astype(int)[:, None]
    rectangles = np.split(draws["rectangles"][..., None], 4, axis=1)                    # 4 of [n, holes, 1]
    inside = []
    for side, place in zip(rectangles[:2], rectangles[2:], strict=True):
        side = np.clip(between(side, *of["hole_side"]) * size / SIDE, 1, size)
        start, middles = place * (size - side), np.arange(size) + 0.5
        inside.append((start <= middles) & (middles < start + side))                    # [n, holes, S]
    inside[0] &= (np.arange(inside[0].shape[1]) < number)[..., None]
    hole = torch.from_numpy(np.einsum("nhi,nhj->nij", *inside))
    return images.masked_fill(hole[:, None].to(images.device), 0)


CHANGES = {"bias": add_bias, "gamma": change_gamma, "multiply": multiply, "jitter": change_contrast,
           "blur": blur, "noise": add_noise, "holes": punch_holes}
