"""DICOM files through pydicom, whatever lengths they claim."""

import io
import math
import os

import pydicom

from datasets.io import DAMAGED_DICOM, one_line
from utils.config import BadFile


class Bounded(io.BufferedReader):
    """A file for reading, that makes room for what there is instead of for what is asked for."""

    def read(self, size=-1):
        """At most ``size`` bytes, or all that are left; of a damaged header ``size`` may be 4 GB."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def read_dataset(path, **options):
    """pydicom's Dataset of a file; options: those of dcmread.  Raises BadFile when it is damaged."""
    try:
        with Bounded(open(path, "rb", buffering=0)) as file:
            return pydicom.dcmread(file, force=True, **options)
    except DAMAGED_DICOM as error:
        raise BadFile(f"{path}: damaged DICOM file ({one_line(error)})") from error


def number_of(tags, name, default):
    """A tag's finite number, or the default where there is none or it is empty.  Raises ValueError."""
    value = float(default if tags.get(name) in (None, "") else tags.get(name))
    if not math.isfinite(value):
        raise ValueError(f"{name} {value}")
    return value
