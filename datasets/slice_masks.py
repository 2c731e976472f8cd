"""Masks of series from NIfTI or pictures, brought onto the voxels of their images."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from PIL import Image

from datasets.em_checks import readable
from datasets.io import FORMATS
from datasets.picture_claims import check_claim
from datasets.slice_series import COLOUR, files_of
from datasets.volumes import read_nifti
from utils.config import BadFile

DRIFT = 0.1                                          # of a voxel, that a mask's may lie beside the image's


def read_mask(path, like, classes):
    """The mask of a Series ``like`` as a Series of its own: data uint8 [D, H, W], 0 or 1 + place in classes.

    A NIfTI, a picture (of a palette its numbers count, not its colours), or a folder of pictures in natural
    order.  A NIfTI may store its axes in another order or direction than the image, if its voxels are the
    image's; one that does not say where it lies is taken in the order of the image.  classes: names of the
    values 1..; for a single one 255 means 1.  Raises BadFile: damaged, of another size or place than the
    image, values other than 0 and those of the classes.
    """
    path = Path(path)
    files = files_of(path)
    if files["nifti"] and not path.is_dir():
        volume = read_nifti(path)
        values = volume.data.T
        if like.placed and not volume.notes:
            values = onto(path, values, volume.affine[:, [2, 1, 0, 3]], like)
    elif files["picture"]:
        pictures = [mask_picture(file) for file in files["picture"]]
        if len({picture.shape for picture in pictures}) > 1:
            raise BadFile(f"{path}: masks of different sizes in one folder")
        values = np.stack(pictures)
    else:
        raise BadFile(f"{path}: neither NIfTI nor a picture, as masks must be")
    check_size(path, values.shape, like)
    return replace(like, data=named(path, values, classes))


def check_size(path, shape, like):
    """BadFile unless a mask has the shape of its image."""
    if shape != like.data.shape:
        found, due = (" x ".join(map(str, sides)) for sides in (shape, like.data.shape))
        raise BadFile(f"{path}: a mask of {found} voxels, but its image {like.path} has {due}")


def onto(path, values, affine, like):
    """A mask [d, h, w] in the order of the axes of ``like``.  Raises BadFile where the voxels differ."""
    order = io_orientation(np.linalg.inv(like.affine) @ affine)
    affine = affine @ inv_ornt_aff(order, values.shape)
    values = apply_orientation(values, order)
    check_size(path, values.shape, like)
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in values.shape))])
    moved = np.linalg.inv(like.affine) @ affine @ corners.T - corners.T
    if np.abs(moved).max() > DRIFT:
        raise BadFile(f"{path}: a mask that lies up to {np.abs(moved).max():.1f} voxels beside its image "
                      f"{like.path}")
    return values


def mask_picture(path):
    """The numbers [H, W] in a picture.  Raises BadFile for a damaged or coloured one."""
    with readable(path), Image.open(path, formats=FORMATS) as image:
        check_claim(path, image, path.stat().st_size)
        Image.open(path, formats=FORMATS).verify()             # checksums of PNG, not checked on reading
        if image.mode in ("P", "L", "1") or image.mode.startswith("I"):
            return np.asarray(image)
        pixels = np.asarray(image.convert("RGB"), np.int16)
        if (pixels.max(2) - pixels.min(2) > COLOUR).any():
            raise BadFile(f"{path}: a coloured mask; save the numbers of the classes as grey values")
        return pixels[..., 0]


def named(path, values, classes):
    """Values as uint8, of which 0 and 1 to the number of classes are due, or 0 and 255 for one class."""
    wrong = values[(values != np.rint(values)) | (values < 0) | (values > len(classes))]
    if len(classes) == 1 and (wrong == 255).all() and (not wrong.size or not (values == 1).any()):
        return (values != 0).astype(np.uint8)
    if wrong.size:
        found = ", ".join(f"{value:g}" for value in np.unique(wrong)[:3])
        names = ", ".join(f"{number} {name}" for number, name in enumerate(classes, 1))
        raise BadFile(f"{path}: a mask with values {found}, of which none is named (0 background, {names})")
    return values.astype(np.uint8)
