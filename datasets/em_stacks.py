"""TIFF stacks and folders of 2D images as lazy volumes.

Each open_* returns (shape [D, H, W], dtype, (spacing_nm, note), opener).  ``opener()`` gives an array that is
read by three slices, in this or any other process; openers can be pickled, what they open cannot.
"""

import math
import os
import re
import struct
from functools import partial

import numpy as np
import tifffile
from PIL import Image

from datasets.em_checks import MOST, check_array, readable
from datasets.em_spacing import tiff_spacing
from datasets.picture_claims import check_claim
from utils.config import BadFile

IMAGE_SUFFIXES = (".tif", ".tiff", ".png")
VOLUME_SUFFIXES = (".h5", ".hdf", ".hdf5", ".nii", ".nii.gz", ".zarr")           # that hold a volume each
PNG_TYPES = {"1": np.uint8, "L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I": np.int32}
FIRST = 8                                            # bytes of a TIFF's header
FREE = 2 ** 24                                       # bytes that a page may unpack to, of whatever size
CHANNELS = 7                                         # that ImageJ shows; tifffile names sections so, too


class Sections:
    """An array [D, H, W] of which whole sections are read, one at a time.

    read: z -> [H, W].  Memory: what is asked for and one section.
    """

    def __init__(self, shape, dtype, read):
        self.shape, self.dtype, self.read = shape, dtype, read

    def __getitem__(self, box):
        sections, rows, columns = box
        block = np.empty([part.stop - part.start for part in box], self.dtype)
        for place, z in enumerate(range(sections.start, sections.stop)):
            section = self.read(z)
            if section.shape != self.shape[1:]:
                raise ValueError(f"section {z} is of shape {section.shape}, not {self.shape[1:]}")
            block[place] = section[rows, columns]
        return block


def map_file(path, dtype, offset, shape):
    """numpy.memmap of an array that lies in the file as it is."""
    return np.memmap(path, dtype, "r", offset, shape)


# ------------------------------------------------------------------------------------------------------ TIFF

def open_tiff(path):
    """One TIFF of many pages, BigTIFF, ImageJ hyperstack or OME-TIFF of one channel.

    Mapped where pixels lie in one piece without compression; else decoded page by page.
    """
    with tifffile.TiffFile(path) as tif:
        series = one_series(path, tif)
        shape, dtype, size = series.shape, series.dtype, path.stat().st_size
        check_array(path, shape, dtype, size)
        spacing = tiff_spacing(path, tif)
        if series.dataoffset is not None:
            check_piece(path, tif, series, size)
            stored = dtype.newbyteorder(tif.byteorder)
            return shape, dtype, spacing, partial(map_file, path, stored, series.dataoffset, shape)
        check_pages(path, tif, series, size)
        return shape, dtype, spacing, partial(open_pages, path, shape, dtype)


def one_series(path, tif):
    """The only image series of a TIFF, of axes Z, Y, X.  BadFile for colours, channels and odd pages."""
    if not len(tif.pages) or not tif.series:
        raise BadFile(f"{path}: a TIFF file without pages")
    if next_page(tif):
        raise BadFile(f"{path}: truncated TIFF file, of which {len(tif.pages)} pages are left")
    series = tif.series[0]
    if len(tif.series) > 1:
        raise BadFile(f"{path}: pages of different size or type, {series.shape} and {tif.series[1].shape}")
    if series.axes.endswith("S"):
        raise BadFile(f"{path}: a colour TIFF where grey sections are due")
    if series.axes == "CYX" and series.shape[0] <= CHANNELS:
        raise BadFile(f"{path}: {series.shape[0]} channels where sections are due")
    if series.ndim == 3 and not series.axes.endswith("YX"):
        raise BadFile(f"{path}: axes {series.axes} where Z, Y, X are due")
    return series


def check_piece(path, tif, series, size):
    """BadFile unless the pixels of a series lie in one piece behind the header, as its last page says too."""
    end = series.dataoffset + series.nbytes
    if not FIRST <= series.dataoffset or end > size:
        raise BadFile(f"{path}: truncated TIFF file")
    if len(tif.pages) > 1 and tif.pages[-1].dataoffsets[0] + tif.pages[-1].nbytes != end:
        raise BadFile(f"{path}: damaged TIFF file: its first and last page do not lie in one piece")


def check_pages(path, tif, series, size):
    """BadFile unless every page of a series is there whole, and its compression is known."""
    pages = series.pages
    compression = pages[0].compression
    try:
        tifffile.TIFF.DECOMPRESSORS[compression]
    except (KeyError, ImportError) as error:
        raise BadFile(f"{path}: {compression.name} compression needs the package imagecodecs; install it, or "
                      "save the stack uncompressed or as deflate (zip)") from error
    whole = len(pages) == series.shape[0] and not series.is_multifile
    if not whole or not all(page is not None and is_whole(page, size) for page in pages):
        raise BadFile(f"{path}: truncated TIFF file, or pages that lie in other files")


def is_whole(page, size):
    """Whether all strips or tiles of a page lie within the ``size`` bytes of its file, and can hold it."""
    places, counts = page.dataoffsets, page.databytecounts
    return (len(places) == len(counts) == math.prod(page.chunked)
            and all(0 < count and place + count <= size for place, count in zip(places, counts, strict=True))
            and page.nbytes <= max(FREE, MOST * sum(counts)))


def next_page(tif):
    """Where the last page that tifffile found says that the next one is: 0 unless the rest was cut off."""
    form, file = tif.tiff, tif.filehandle
    file.seek(tif.pages[-1].offset)
    (tags,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    file.seek(tags * form.tagsize, os.SEEK_CUR)
    return struct.unpack(form.offsetformat, file.read(form.offsetsize))[0]


def open_pages(path, shape, dtype):
    """Sections of a TIFF that must be decoded."""
    pages = tifffile.TiffFile(path).series[0].pages
    return Sections(shape, dtype, lambda z: pages[z].asarray(maxworkers=1))


# -------------------------------------------------------------------------------------- folder of 2D images

def open_folder(path):
    """TIFF or PNG images in natural order (2 before 10), all of one size and type."""
    files = [file for file in path.iterdir()
             if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
    if not files:
        volumes = sorted(file.name for file in path.iterdir() if file.name.lower().endswith(VOLUME_SUFFIXES))
        listing = f"; name one of them: {', '.join(volumes[:8])}" if volumes else ""
        raise BadFile(f"{path}: a folder without images ({', '.join(IMAGE_SUFFIXES)}){listing}")
    files.sort(key=lambda file: natural(file.name))
    first = image_form(files[0])
    for file in files:
        form = image_form(file)
        if form != first:
            raise BadFile(f"{file}: {describe(form)}, but {files[0].name} is {describe(first)}")
    shape, dtype = (len(files), *first[0]), first[1]
    check_array(path, shape, dtype, sum(file.stat().st_size for file in files))
    note = "a folder of images does not say how large voxels are"
    return shape, dtype, (None, note), partial(open_images, files, shape, dtype)


def natural(name):
    """Sort key of a file's name: numbers in it by value."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def describe(form):
    """((H, W), dtype) in words."""
    return f"{form[0][0]} x {form[0][1]} {form[1]}"


def image_form(file):
    """((H, W), dtype) of a grey image, from its header.  BadFile for colour, several pages, damage."""
    with readable(file):
        if file.suffix.lower() != ".png":
            with tifffile.TiffFile(file) as tif:
                page = tif.pages[0]
                if len(tif.pages) != 1 or page.ndim != 2:
                    raise BadFile(f"{file}: {len(tif.pages)} pages of shape {page.shape} where one grey "
                                  "image is due")
                if not is_whole(page, file.stat().st_size):
                    raise BadFile(f"{file}: truncated TIFF file")
                return page.shape, page.dtype
        with Image.open(file, formats=("PNG",)) as image:
            check_claim(file, image, file.stat().st_size)
            grey = image.mode in PNG_TYPES
            if image.mode == "P":                    # ImageJ writes grey as a palette of greys
                palette = image.getpalette("RGB")
                grey = palette == [level for level in range(len(palette) // 3) for _ in range(3)]
            if not grey:
                raise BadFile(f"{file}: a colour image (mode {image.mode}) where grey is due")
            return image.size[::-1], np.dtype(PNG_TYPES[image.mode])


def open_images(files, shape, dtype):
    """Sections that are files."""
    def read(z):
        with readable(files[z]):
            if files[z].suffix.lower() == ".png":
                Image.open(files[z], formats=("PNG",)).verify()        # checksums, not checked on reading
                with Image.open(files[z], formats=("PNG",)) as image:
                    return np.asarray(image)
            with tifffile.TiffFile(files[z]) as tif:
                return tif.pages[0].asarray(maxworkers=1)

    return Sections(shape, dtype, read)
