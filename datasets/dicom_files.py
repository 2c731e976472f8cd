"""DICOM files through pydicom, whatever lengths they claim, and tags that call for care."""

import io
import math
import os
import warnings

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut
from pydicom.tag import Tag

from datasets.io import DAMAGED_DICOM, one_line
from utils.config import BadFile

LUT, SIGNED = Tag("ModalityLUTSequence"), Tag("PixelRepresentation")


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


def padding_of(tags, dtype):
    """(lowest, highest) stored number of padding (PS3.3 C.7.5.1.1.2), or None.

    Some files give a negative number as unsigned or the reverse: it is taken bit by bit.
    """
    value = tags.get("PixelPaddingValue")
    if value is None:
        return None
    limit = tags.get("PixelPaddingRangeLimit")
    ends = np.array([int(value), int(value if limit is None else limit)]).astype(dtype)
    return int(ends.min()), int(ends.max())


def has_lut(tags):
    """Whether a dataset has a modality LUT, which may have been left in the file; an empty one is none."""
    element = tags.get_item(LUT, keep_deferred=True) if LUT in tags else None
    return element is not None and bool(element.length if element.is_raw else element.value)


def look_up(path, stored):
    """What the modality LUT of the file at ``path`` gives for stored numbers [H, W] (PS3.3 C.11.1): unsigned.

    The table is read anew, with all that tells its numbers' type: a header may have left it in the file.
    Raises BadFile when it is damaged, or shorter than its descriptor says.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = read_dataset(path, specific_tags=[LUT, SIGNED])
            table = tags.ModalityLUTSequence[0]
            due, entries = table.LUTDescriptor[0] or 2 ** 16, table.LUTData
            there = len(entries) // (2 if isinstance(entries, bytes) else 1)
            if there < due:
                raise ValueError(f"{there} entries where {due} are due")
            return apply_modality_lut(stored.astype(np.int64), tags)     # narrower ones wrap round in it
    except (*DAMAGED_DICOM, LookupError, OverflowError) as error:
        raise BadFile(f"{path}: DICOM file whose modality LUT cannot be used ({one_line(error)})") from error
