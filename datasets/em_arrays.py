"""Arrays with names, in HDF5 files and Zarr stores, as lazy volumes.

open_hdf5 and open_zarr return (key, shape [D, H, W], dtype, (spacing_nm, note), opener), as the functions of
em_stacks do, after the key.
"""

import math
import os
from functools import partial

import h5py
import zarr

from datasets.em_checks import LARGE, MOST, check_array
from datasets.em_spacing import attribute_spacing, multiscale_spacing
from utils.config import BadFile, UserError

# Names of the image among several volumes of a file, the likeliest first.
IMAGE_KEYS = ("main", "volumes/raw", "raw", "image", "images", "data", "volume", "stack")


def choose_key(path, key, forms):
    """The key to open; forms: {key: (shape, dtype)}, shapes without leading axes of length 1."""
    listing = ", ".join(f"{name or '(root)'} {tuple(shape)} {dtype}" for name, (shape, dtype)
                        in list(forms.items())[:20]) or "none"
    if key is not None:
        if key.strip("/") in forms:
            return key.strip("/")
        raise UserError(f"{path}: holds no array {key}; there are: {listing}")
    volumes = [name for name, (shape, dtype) in forms.items()
               if len(shape) == 3 and 0 not in shape and dtype.kind in "biuf"]
    if len(volumes) == 1 or (not volumes and len(forms) == 1):
        return (volumes or list(forms))[0]
    for name in IMAGE_KEYS:
        if name in volumes:
            return name
    if volumes:
        raise UserError(f"{path}: holds several volumes; name one of: {listing}")
    raise BadFile(f"{path}: holds no 3D volume of numbers; there are: {listing}")


def hdf5_arrays(path):
    """{key: (shape, dtype)} of the arrays in the file itself: links to other files are not followed."""
    forms = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            forms[name] = item.shape or (), item.dtype

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return forms


def open_hdf5(path, key):
    """An array of HDF5; its spacing stands in attributes of the array, or of a group around it."""
    forms = hdf5_arrays(path)
    key = choose_key(path, key, forms)
    shape, dtype = forms[key]
    check_array(path, shape, dtype, path.stat().st_size)
    with h5py.File(path, "r") as file:
        around = [file[key]]
        while around[-1].name != "/":
            around.append(around[-1].parent)
        spacing = attribute_spacing([item.attrs for item in around])
    return key, shape, dtype, spacing, partial(hdf5_array, path, key)


def hdf5_array(path, key):
    """An open HDF5 array; it keeps the file open."""
    return h5py.File(path, "r")[key]


def open_zarr(path, key):
    """An array of Zarr, version 2 or 3; axes of length 1 before the last three (time, channel) are dropped.

    Without a key an OME-Zarr image gives its finest level, and so does the key of a group that is one.
    """
    root, arrays = zarr_arrays(path)
    word = (key or "").strip("/")
    if word not in arrays and isinstance(root, zarr.Group) and (not word or word in root):
        levels = levels_of(root[word] if word else root)
        key = next(iter(levels), key)
    forms = {}
    for name, array in arrays.items():
        extra = max(array.ndim - 3, 0)
        forms[name] = array.shape[extra if set(array.shape[:extra]) <= {1} else 0:], array.dtype
    key = choose_key(path, key, forms)
    shape, dtype = forms[key]
    check_array(path, shape, dtype, stored_bytes(path / key, math.prod(shape) * dtype.itemsize))
    groups = [root[parent] if parent else root for parent in parents(key)]
    spacing = attribute_spacing([item.attrs for item in (arrays[key], *groups)])
    for group in groups:
        if key in levels_of(group):
            multiscale, level = levels_of(group)[key]
            axes = [str(axis["name"] if isinstance(axis, dict) else axis)
                    for axis in multiscale.get("axes", "zyx")]
            if [axis.lower() for axis in axes[-3:]] != ["z", "y", "x"]:
                raise BadFile(f"{path}: axes {', '.join(axes)} where z, y, x are due")
            spacing = multiscale_spacing(multiscale, level)
    return key, shape, dtype, spacing, partial(zarr_array, path, key)


def parents(key):
    """The groups above an array, the nearest first, the root "" last; none above the root."""
    words = key.split("/")
    return ["/".join(words[:n]) for n in range(len(words) - 1, -1, -1)] if key else []


def levels_of(group):
    """{key: (multiscale, level)} of the first OME-Zarr image of a group, the finest level first."""
    multiscales = group.attrs.get("ome", group.attrs).get("multiscales", [])
    return {"/".join(word for word in (group.path, level["path"]) if word): (multiscale, level)
            for multiscale in multiscales[:1] for level in multiscale["datasets"]}


def stored_bytes(folder, declared):
    """Bytes of the files below a folder, counted only as far as check_array needs to know."""
    stored = 0
    if declared <= LARGE:
        return declared
    for parent, _, files in os.walk(folder):
        for name in files:
            stored += os.path.getsize(os.path.join(parent, name))
            if stored * MOST >= declared:
                return stored
    return stored


def zarr_arrays(path):
    """(root, {key: array}) of a Zarr store; the root is an array, key "", or a group."""
    root = zarr.open(str(path), mode="r")
    if isinstance(root, zarr.Array):
        return root, {"": root}
    members = sorted(root.members(max_depth=None))   # they come in any order
    return root, {name: item for name, item in members if isinstance(item, zarr.Array)}


def zarr_array(path, key):
    """An open Zarr array, read by three slices whatever leading axes it has."""
    array = zarr.open_array(str(path), path=key, mode="r")
    return Leading(array) if array.ndim > 3 else array


class Leading:
    """The only [D, H, W] of an array [1, ..., 1, D, H, W]."""

    def __init__(self, array):
        self.array, self.leading = array, (0,) * (array.ndim - 3)

    def __getitem__(self, box):
        return self.array[(*self.leading, *box)]
