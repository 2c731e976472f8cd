"""NIfTI as lazy volumes; compressed files are followed without unpacking them to disk or memory."""

import bisect
import gzip
import io
import math
import struct
import zlib
from contextlib import suppress
from functools import partial

import nibabel as nib
import numpy as np

from datasets.em_checks import check_array
from datasets.em_spacing import nifti_spacing
from datasets.em_stacks import Sections, map_file
from utils.config import BadFile

READ = 2 ** 16                                       # bytes of a gzip file read at once
PLACE_EVERY = 2 ** 23                                # bytes of content between two places to go on from
DEFLATE = 1032                                       # times that deflate shrinks at most


def open_nifti(path):
    """NIfTI-1 or -2: X, Y, Z with X fastest is D, H, W = Z, Y, X in numpy's order; orientation is not used.

    Axes of length 1 behind the third are dropped.  scl_slope and scl_inter are honoured: whole numbers stay
    whole numbers, of a type that holds them; else the values are float32.
    """
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if gzipped else open)(path, "rb") as file:
        start = file.read(540)
    second = start[:4] in (struct.pack("<i", 540), struct.pack(">i", 540))
    kind, start = (nib.Nifti2Header, start) if second else (nib.Nifti1Header, start[:348])
    start += bytes(4)                                # extensions, of any claimed size, are left out
    raw = kind.from_fileobj(io.BytesIO(start), check=False)            # before nibabel mends sizes of 0 to 1
    header = kind.from_fileobj(io.BytesIO(start))
    shape = tuple(map(int, header.get_data_shape()))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape, stored, offset = shape[::-1], header.get_data_dtype(), int(header.get_data_offset())
    size = path.stat().st_size
    check_array(path, shape, stored, size)
    needed = offset + math.prod(shape) * stored.itemsize
    if needed > (DEFLATE * size if gzipped else size):
        raise BadFile(f"{path}: declares {needed} bytes, but only {size} are stored")
    slope, inter = header.get_slope_inter()          # None where nothing is scaled
    slope, inter = slope or 1.0, inter or 0.0
    dtype = scaled_type(stored, slope, inter)
    opener = partial(open_gzip if gzipped else map_file, path, stored, offset, shape)
    if (slope, inter) != (1, 0):
        opener = partial(Scaled, opener, dtype, slope, inter)
    return shape, dtype, nifti_spacing(raw["pixdim"][1:4], raw["xyzt_units"]), opener


def scaled_type(stored, slope, inter):
    """dtype of slope * value + inter: integers where it is whole for every stored integer, else float32."""
    if slope == 1 and inter == 0:
        return stored.newbyteorder("=")
    if stored.kind in "iu" and slope == int(slope) and inter == int(inter):
        limits = np.iinfo(stored)
        ends = [np.min_scalar_type(int(slope) * int(end) + int(inter)) for end in (limits.min, limits.max)]
        whole = np.result_type(*ends)
        if whole.kind in "iu":                       # and not beyond 64 bits
            return whole
    return np.dtype(np.float32)


class Scaled:
    """slope * array + inter, in the type that scaled_type gives."""

    def __init__(self, opener, dtype, slope, inter):
        self.array, self.dtype = opener(), dtype
        self.slope, self.inter = (np.array(value).astype(np.int64 if dtype.kind in "iu" else np.float32)
                                  for value in (slope, inter))

    def __getitem__(self, box):
        work = np.int64 if self.dtype.kind in "iu" else np.float32     # int64 wraps, and uint64 wraps back
        return (self.array[box].astype(work) * self.slope + self.inter).astype(self.dtype)


def open_gzip(path, dtype, offset, shape):
    """Sections of an array inside a gzip file."""
    content, size = GzipReader(path), shape[1] * shape[2] * dtype.itemsize
    return Sections(shape, dtype,
                    lambda z: np.frombuffer(content.read(offset + z * size, size), dtype).reshape(shape[1:]))


class GzipReader:
    """Reads a gzip file from any place, without its content on disk or in memory.

    A gzip stream can only be followed from its beginning.  So the state of the decompressor (about 45 kB: a
    window of 32 kB and its tables) is kept every PLACE_EVERY bytes of content, or every 256th part of what
    has been read, as Adler's zran does; the next read goes on from the last such place before it, or from
    where the last read ended.  The checksum of all content stands at its end, so the whole file is followed
    once when it is opened, in each process for itself: zlib.error or EOFError where it is damaged.
    """

    def __init__(self, path):
        self.file = open(path, "rb")
        self.position, self.rest, self.state, self.ended = 0, b"", zlib.decompressobj(31), False
        self.places = [(0, 0, self.state.copy())]    # (bytes of content, bytes of the file, state there)
        with suppress(EOFError):
            while True:
                self.inflate(16 * READ)
        if not self.ended:
            raise EOFError("the compressed data end early")

    def read(self, start, size):
        """``size`` bytes of content from ``start``.  EOFError where they end, zlib.error where damaged."""
        found = bisect.bisect_right(self.places, start, key=lambda place: place[0]) - 1
        if not self.places[found][0] <= self.position <= start:
            self.position, at, state = self.places[found]
            self.state, self.rest, self.ended = state.copy(), b"", False
            self.file.seek(at)
        while self.position < start:
            self.inflate(start - self.position)
        content = bytearray()
        while len(content) < size:
            content += self.inflate(size - len(content))
        return content

    def inflate(self, most):
        """The next bytes of content: one at least, ``most`` at most, and not more than 16 * READ."""
        content = b""
        while not content:
            data = self.rest or self.file.read(READ)
            if not data:
                raise EOFError("the compressed data end early")
            if self.ended:                           # several streams, one behind the other, or zeros to fill
                data = data.lstrip(b"\0")            # the blocks of a tape
            if data:
                content = self.state.decompress(data, min(most, 16 * READ))
                self.ended = self.state.eof
            self.rest = self.state.unconsumed_tail
            if self.ended:
                self.rest, self.state = self.state.unused_data, zlib.decompressobj(31)
        self.position += len(content)
        if self.position - self.places[-1][0] >= max(PLACE_EVERY, self.position // 256):
            self.places.append((self.position, self.file.tell() - len(self.rest), self.state.copy()))
        return content
