"""Volumes of electron microscopy on disk, of any usual kind, read lazily: HDF5, TIFF, PNG, NIfTI, OME-Zarr.

    volume = open_volume("data/cremi3d/sampleA.h5", "volumes/raw")
    block = volume[10:42, :128, :128]                # reads these voxels and no others
    low, high = intensity_range(volume)
    image = scale(block, low, high)                  # float32 in [0, 1]

Files are not trusted: one that is damaged or is not a volume raises BadFile, when it is opened or when the
damaged part is read.  create_volume and check_output, from em_writers, write what is read here.
"""

import math
import operator
import os
from pathlib import Path

import numpy as np

from datasets.em_arrays import hdf5_arrays, open_hdf5, open_zarr, zarr_arrays
from datasets.em_checks import readable
from datasets.em_nifti import open_nifti
from datasets.em_stacks import open_folder, open_tiff
from utils.config import BadFile, UserError

KINDS = {".h5": "hdf5", ".hdf5": "hdf5", ".hdf": "hdf5", ".tif": "tiff", ".tiff": "tiff", ".nii": "nifti",
         ".nii.gz": "nifti", ".zarr": "zarr"}
ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
SAMPLES = 2 ** 25                                    # voxels that intensity_range looks at


class Volume:
    """A volume on disk.

    shape (D, H, W); dtype, in the byte order of the machine, bool as uint8; spacing_nm (3 floats along D, H,
    W) or None, and spacing_note, why it is None; path; key, "" where the file holds one array only.
    volume[z, y, x] takes integers and slices of step 1, and clips as numpy does; later axes may be left out.
    The result is a new array that holds nothing but what was asked for.  BadFile when that part is damaged,
    or holds NaN or infinite values.  A volume may be pickled, and used after a fork: every process opens
    the file for itself.  Within a process, one thread at a time.
    """

    def __init__(self, path, key, shape, dtype, spacing, opener):
        self.path, self.key, self.shape = path, key, tuple(map(int, shape))
        self.dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")
        self.spacing_nm, self.spacing_note = spacing
        self.opener, self.array, self.process = opener, None, None

    def __repr__(self):
        return f"Volume({self.path}, {self.key!r}, {self.shape}, {self.dtype}, {self.spacing_nm} nm)"

    def __getstate__(self):
        return self.__dict__ | {"array": None, "process": None}

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 3:
            raise IndexError(f"{len(index)} indices of a volume of 3 axes")
        box = [sides(part, n) for part, n in zip((*index, *[slice(None)] * 3)[:3], self.shape, strict=True)]
        if any(part.start == part.stop for part in box):
            block = np.empty([part.stop - part.start for part in box], self.dtype)
        else:
            block = self.read(tuple(box))
        return block[tuple(slice(None) if isinstance(part, slice) else 0 for part in index)]

    def read(self, box):
        """The block of three slices with 0 <= start < stop <= n."""
        with readable(self.path):
            if self.process != os.getpid():
                self.array = None                    # of the process that this one was forked from
                self.array, self.process = self.opener(), os.getpid()
            block = self.array[box]
            block = np.array(block, self.dtype, copy=True if isinstance(block, np.memmap) else None)
        if self.dtype.kind == "f" and not np.isfinite(block).all():
            raise BadFile(f"{self.path}: {np.count_nonzero(~np.isfinite(block))} voxels of sections "
                          f"{box[0].start} to {box[0].stop - 1} are NaN or infinite; replace them")
        return block


def sides(part, n):
    """slice(start, stop) with 0 <= start <= stop <= n of an index along an axis of length n."""
    if isinstance(part, slice):
        start, stop, step = part.indices(n)
        if step != 1:
            raise ValueError(f"slices of a volume have step 1, not {step}")
        return slice(start, max(start, stop))
    place = range(n)[operator.index(part)]           # IndexError where there is none
    return slice(place, place + 1)


def kind_of(path):
    """"hdf5" | "tiff" | "nifti" | "zarr" | "folder".  BadFile: absent or empty; UserError: unknown suffix."""
    suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    if path.is_dir():
        return "zarr" if suffix == ".zarr" or any((path / name).exists() for name in ZARR_FILES) else "folder"
    if not path.exists():
        raise BadFile(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise BadFile(f"{path}: the file is empty")
    if suffix not in KINDS:
        raise UserError(f"{path}: not a volume; take {', '.join(KINDS)}, or a folder of TIFF or PNG images")
    if KINDS[suffix] == "zarr":
        raise BadFile(f"{path}: a file where the folder of an OME-Zarr is due")
    return KINDS[suffix]


def find_arrays(path):
    """{key: (shape, dtype)} of every array in an HDF5 file or Zarr store, whatever its form.

    Where a file or folder holds one volume without a name the key is "".  Raises as open_volume does.
    """
    path = Path(path)
    kind = kind_of(path)
    with readable(path):
        if kind == "hdf5":
            return hdf5_arrays(path)
        if kind == "zarr":
            return {name: (array.shape, array.dtype) for name, array in zarr_arrays(path)[1].items()}
    volume = open_volume(path)
    return {"": (volume.shape, volume.dtype)}


def open_volume(path, key=None):
    """The Volume of a file or folder.  Nothing but headers is read.

    path: .h5, .hdf, .hdf5; .tif, .tiff of many pages; .nii, .nii.gz; .zarr, an array or OME-Zarr of version 2
    or 3; a folder of 2D TIFF or PNG images.
    key: of the array in HDF5 and Zarr, or of an OME-Zarr image, whose finest level is taken.  None takes the
    only 3D array, else the first of em_arrays.IMAGE_KEYS.
    Raises UserError when the key is not there or must be given, with what there is; BadFile when the file is
    damaged, or the array not a volume of numbers.
    """
    path = Path(path)
    with readable(path):
        kind = kind_of(path)
        if kind in ("hdf5", "zarr"):
            return Volume(path, *{"hdf5": open_hdf5, "zarr": open_zarr}[kind](path, key))
        if key:
            raise UserError(f"{path}: holds one volume without a name; leave out the key {key}")
        return Volume(path, "", *{"tiff": open_tiff, "nifti": open_nifti, "folder": open_folder}[kind](path))


def intensity_range(volume, sections=32):
    """(low, high): percentiles 0.1 and 99.9 of ``sections`` evenly spaced sections, floats, low < high.

    volume: Volume, or an array [D, H, W].  Of sections that hold more than SAMPLES voxels together every nth
    row and column is taken.  Where both percentiles are the same, the ends of the values seen are taken, and
    of a constant volume its value and that value + 1 (or + a millionth of it): scaled, it is 0.
    """
    depth, height, width = volume.shape
    chosen = np.unique(np.linspace(0, depth - 1, min(sections, depth)).round().astype(int))
    step = math.ceil(math.sqrt(max(1, len(chosen) * height * width / SAMPLES)))
    values = np.concatenate([volume[z:z + 1, 0:height, 0:width][0, ::step, ::step].ravel()
                             for z in map(int, chosen)])
    low, high = map(float, np.percentile(values, (0.1, 99.9)))
    if not low < high:
        low, high = float(values.min()), float(values.max())
    if not low < high:
        high = low + max(1.0, abs(low) * 1e-6)
    return low, high


def scale(block, low, high):
    """Values of any type -> float32 of the same shape: low becomes 0, high 1, what lies beyond is clipped."""
    if not low < high:
        raise ValueError(f"low {low} must be below high {high}")
    block = np.asarray(block)
    scaled = np.subtract(block, low, dtype=np.result_type(block.dtype, np.float32))
    scaled /= high - low
    return np.clip(scaled, 0, 1, out=scaled).astype(np.float32, copy=False)
