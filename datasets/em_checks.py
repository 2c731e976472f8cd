"""What an untrusted file must stand before it is taken for a volume."""

import math
import struct
import warnings
import zlib
from contextlib import contextmanager
from xml.etree.ElementTree import ParseError

import tifffile
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from PIL import Image

from datasets.io import one_line
from utils.config import BadFile

# What the libraries raise on damaged files, found by cutting files short and flipping their bits.
DAMAGED = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError,
           ArithmeticError, AssertionError, ImportError, SyntaxError, ParseError, struct.error, zlib.error,
           HeaderDataError, ImageFileError, WrapStructError, Image.DecompressionBombError)
LOGGERS = (tifffile.logger(), nibabel_logger)
LARGE = 2 ** 30                                      # bytes that a file may declare without holding them
MOST = 10_000                                        # times that a larger volume is compressed at most


@contextmanager
def readable(path):
    """BadFile, in one line, for what the libraries raise on a file that they cannot read."""
    before = [logger.disabled for logger in LOGGERS]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # what the libraries merely warn of, the checks refuse
            for logger in LOGGERS:
                logger.disabled = True
            yield
    except DAMAGED as error:
        raise BadFile(f"{path}: cannot be read ({one_line(error)})") from error
    finally:
        for logger, disabled in zip(LOGGERS, before, strict=True):
            logger.disabled = disabled


def check_array(path, shape, dtype, stored):
    """BadFile unless it is a volume of numbers for which ``stored`` bytes can do; nothing is allocated."""
    dims = " x ".join(map(str, shape))
    if len(shape) != 3:
        raise BadFile(f"{path}: a {len(shape)}D array ({dims}) where a 3D volume is due")
    if min(shape) < 1:
        raise BadFile(f"{path}: an empty volume ({dims})")
    if dtype.kind not in "biuf":
        raise BadFile(f"{path}: values of type {dtype} where numbers are due")
    declared = math.prod(map(int, shape)) * dtype.itemsize
    if declared > max(LARGE, MOST * stored):
        raise BadFile(f"{path}: declares {dims} {dtype}, {declared} bytes, but only {stored} are stored")
