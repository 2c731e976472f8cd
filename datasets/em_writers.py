"""Volumes of electron microscopy written in blocks: HDF5, TIFF, NIfTI, OME-Zarr, by the suffix of the name.

    with create_volume("segmentation.zarr", volume.shape, "uint32", volume.spacing_nm) as writer:
        for z in range(0, volume.shape[0], 16):
            writer.append(labels_of(z, z + 16))      # [dz, H, W], ascending

The file has another name until all is there.  datasets.em_files reads every kind, with its voxel size.
"""

import math
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from datasets.em_outputs import FILES
from utils.config import UserError

DTYPES = ("uint8", "uint16", "uint32", "float16", "float32")
ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")


def check_output(path, channels=None):
    """The suffix of ``path``, a key of em_outputs.FILES; to be called before any work.

    channels: number of channels, or None for a plain volume.  UserError: unknown suffix; a kind that cannot
    hold that; a folder or file that stands in the way and is not replaced; no right to write there.
    """
    path = Path(path)
    suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    if suffix not in FILES:
        raise UserError(f"{path}: cannot be written as {suffix or 'a file without suffix'}; "
                        f"use {', '.join(FILES)}")
    if channels is not None and suffix == ".nii.gz":
        raise UserError(f"{path}: a .nii.gz holds one channel behind the other and cannot be written in "
                        "slabs; use .nii, .h5, .tif or .zarr")
    if path.is_dir() and suffix != ".zarr":
        raise UserError(f"{path}: is a folder; give the name of a file")
    if suffix == ".zarr" and path.exists():
        store = any((path / name).exists() for name in ZARR_FILES)
        if not path.is_dir() or (any(path.iterdir()) and not store):
            raise UserError(f"{path}: exists and is not a Zarr store; it is not replaced")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: {parent} is not a folder that you may write to")
    return suffix


@contextmanager
def create_volume(path, shape, dtype, spacing_nm, key="segmentation", channels=None):
    """Context manager of a VolumeWriter for a volume [D, H, W], or [C, D, H, W] with ``channels`` = C.

    path: its suffix tells the kind; missing folders are made.  dtype: one of DTYPES.
    spacing_nm: 3 floats along D, H, W, or None when unknown.  key: name of the array in HDF5.
        HDF5      chunked, gzip; attribute resolution, z, y, x in nm
        TIFF      OME-TIFF, deflate, BigTIFF where needed; channels lie within sections: [D, C, H, W];
                  one section alone is a plain 2D image, which open_volume refuses
        NIfTI     X, Y, Z(, C), sizes in microns; float16 is written as float32; NIfTI-2 for long axes
        OME-Zarr  version 0.4 of one level, Blosc; channels are the axis c
    When the body ends the file takes its name, in place of an older one; if it raises, what was written is
    removed, and an older one stays as it was.
    UserError: as check_output; a full disk, or whatever else keeps the system from writing.
    ValueError: arguments that make no sense; a volume that is not complete at the end.
    """
    path, dtype = Path(path), np.dtype(dtype)
    suffix = check_output(path, channels)
    check_arguments(shape, dtype, spacing_nm, key, channels)
    temporary = path.with_name(f".{path.name}.tmp")
    file = None
    try:
        with user_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            file = FILES[suffix](temporary, tuple(map(int, shape)), dtype, spacing_nm, key, channels)
        writer = VolumeWriter(path, file, shape, dtype, channels)
        yield writer
        writer.finish()
        with user_errors(path):
            file.close()
            put_in_place(temporary, path)
    except BaseException:
        with suppress(OSError):
            if file is not None:
                file.abandon()
            remove(temporary)
        raise


def check_arguments(shape, dtype, spacing_nm, key, channels):
    """ValueError for what create_volume does not take."""
    if dtype.name not in DTYPES:
        raise ValueError(f"a volume of {dtype} cannot be written; use {', '.join(DTYPES)}")
    if len(shape) != 3 or min(shape) < 1 or (channels is not None and channels < 1):
        raise ValueError(f"shape {tuple(shape)}, channels {channels}: three sides and channels, 1 at least")
    if spacing_nm is not None and (len(spacing_nm) != 3
                                   or not all(math.isfinite(size) and size > 0 for size in spacing_nm)):
        raise ValueError(f"spacing_nm {spacing_nm}: three numbers above 0, or None")
    if not key.strip("/"):
        raise ValueError("the key of the array is empty")


@contextmanager
def user_errors(path):
    """UserError, in one line, where the system does not let us write."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def remove(path):
    """Remove a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(temporary, path):
    """Give a finished file or folder its name; a folder of that name is moved away first, then removed."""
    if temporary.is_file():
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())                  # some systems tell only now that the disk is full
        os.replace(temporary, path)
        return
    old = path.with_name(f".{path.name}.old.tmp")
    remove(old)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    remove(old)


class VolumeWriter:
    """Takes the slabs of a volume in ascending order and hands them on in layers of the file's chunks.

    Memory: one slab and one layer, of 2 ** 26 bytes or a section.
    """

    def __init__(self, path, file, shape, dtype, channels):
        self.path, self.file, self.dtype = path, file, dtype
        self.depth, self.sides, self.channels = int(shape[0]), tuple(shape[1:]), channels
        self.done = self.held = 0                    # sections handed on, and waiting in ``layer``
        self.layer = None

    def append(self, block):
        """The next sections: [dz, H, W], with channels [C, dz, H, W], of the volume's dtype.

        ValueError: another shape or dtype, or more than there is room for.  UserError: the disk is full.
        """
        block = np.asarray(block)
        form = block.shape if self.channels is None else block.shape[1:]
        leading = () if self.channels is None else (self.channels,)
        if block.shape != (*leading, *form[:1], *self.sides) or block.dtype != self.dtype:
            raise ValueError(f"a block {block.shape} {block.dtype} where ({', '.join(map(str, leading))} dz, "
                             f"{', '.join(map(str, self.sides))}) {self.dtype} is due")
        if self.done + self.held + form[0] > self.depth:
            raise ValueError(f"more than the {self.depth} sections of {self.path}")
        block = block[None] if self.channels is None else block              # [C, dz, H, W]
        while block.shape[1]:
            if self.held == 0:
                whole = block.shape[1] // self.file.chunk_depth * self.file.chunk_depth
                if whole:                            # straight from the slab, without a copy
                    self.write(block[:, :whole])
                    block = block[:, whole:]
                    continue
            room = self.file.chunk_depth - self.held
            if self.layer is None:
                self.layer = np.empty((block.shape[0], self.file.chunk_depth, *self.sides), self.dtype)
            taken = block[:, :room]
            self.layer[:, self.held:self.held + taken.shape[1]] = taken
            self.held += taken.shape[1]
            block = block[:, room:]
            if self.held == self.file.chunk_depth:
                self.flush()

    def flush(self):
        """Hand on what waits."""
        waiting, self.held = self.held, 0
        self.write(self.layer[:, :waiting])

    def write(self, block):
        """Hand on [C, dz, H, W]."""
        with user_errors(self.path):
            self.file.write(self.done, block)
        self.done += block.shape[1]

    def finish(self):
        """Hand on the rest.  ValueError when sections are missing."""
        if self.held:
            self.flush()
        if self.done != self.depth:
            raise ValueError(f"{self.path}: {self.done} of {self.depth} sections were written")
