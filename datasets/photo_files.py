"""Photographs and spectral cubes as tensors; a file that cannot be used raises BadFile, in one line.

    image = read_photo("leaf.jpg")                   # uint8 [3, H, W]
    image = read_photo("leaf.jpg", size=256)         # a large JPEG comes smaller, and many times faster
    cube = read_spectral("leaf_spectral.tif", 5)     # float32 [5, H, W]
"""

from pathlib import Path
from tokenize import TokenError

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps

from datasets.em_checks import check_array, readable
from datasets.em_stacks import is_whole, next_page
from datasets.io import one_line
from datasets.picture_claims import check_claim
from utils.config import BadFile

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
SPECTRAL_SUFFIXES = (".npy", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
LEAST_SIDE = 8                                       # pixels; a smaller picture shows nothing
MOST_ASPECT = 20                                     # long side / short side of the widest panoramas


def read_photo(path, size=None):
    """The picture in a file, uint8 RGB [3, H, W], upright.

    The content decides about the format, not the suffix.  EXIF orientation is applied.  Grey values are
    repeated; of 16 bits the upper 8 are kept, so 65535 is white whatever values the file holds; palettes,
    CMYK, YCbCr and Lab become RGB as Pillow converts them, without their colour profiles; transparent parts
    show white.  Of an animation, and of the several pictures in a phone's JPEG, the first counts.
    size: what the short side must have at least.  A JPEG is then decoded at 1/2, 1/4 or 1/8 where that
    suffices; other files come whole.
    Raises BadFile: damaged, cut short, not a picture; a TIFF of many pages or of 32 bits; a side below
    LEAST_SIDE or a shape beyond MOST_ASPECT; more pixels than Pillow takes for honest (179 million).
    """
    with readable(path):
        with Image.open(path, formats=FORMATS) as image:
            check_picture(path, image)
            if size is not None:
                image.draft(None, (size, size))
            ImageOps.exif_transpose(image, in_place=True)
            return torch.from_numpy(np.array(to_rgb(path, image))).permute(2, 0, 1)


def check_picture(path, image):
    """BadFile for an opened picture that cannot be used.  Nothing is decoded."""
    width, height = image.size
    if min(width, height) < LEAST_SIDE or max(width, height) > MOST_ASPECT * min(width, height):
        raise BadFile(f"{path}: {width} x {height} pixels are no photograph; sides of {LEAST_SIDE} at least, "
                      f"one at most {MOST_ASPECT} times the other")
    check_claim(path, image, Path(path).stat().st_size)
    if image.format == "TIFF" and image.n_frames > 1:
        raise BadFile(f"{path}: {image.n_frames} pages where one photograph is due; an image of many "
                      "channels is taken as the spectral file of a photograph")
    if image.format == "PNG":
        with Image.open(path, formats=FORMATS) as again:
            again.verify()                           # its checksums, which decoding does not look at


def to_rgb(path, image):
    """A picture of any mode in RGB; see read_photo."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadFile(f"{path}: values of 32 bits, of which none is known to be white; save 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_spectral(path, channels):
    """A cube of ``channels`` bands from .npy or TIFF, float32 [channels, H, W].

    The bands are the first axis, or else the last one; a single band needs no axis of its own.
    Whole numbers are divided by the largest of their type (255, 65535, 32767, ...), so reflectance in 16 bits
    is in [0, 1] when it fills them; floating-point values stay as they are.
    Raises BadFile when the file is damaged, holds NaN or infinite values, or has other than ``channels``
    bands.
    """
    path = Path(path)
    with readable(path):
        cube = stored_cube(path, channels)
        cube = cube.reshape(cube.shape if cube.ndim == 3 else (1, *cube.shape))
        cube = cube if cube.shape[0] == channels else cube.transpose(2, 0, 1)
        largest = np.iinfo(cube.dtype).max if cube.dtype.kind in "iu" else 1
        values = np.divide(cube, largest, dtype=np.float64).astype(np.float32)
    if not np.isfinite(values).all():
        raise BadFile(f"{path}: {np.count_nonzero(~np.isfinite(values))} values are NaN or infinite")
    return torch.from_numpy(np.ascontiguousarray(values))


def stored_cube(path, channels):
    """The array of a cube's file as it lies there, its shape checked before anything is read."""
    stored = path.stat().st_size
    try:
        if path.suffix.lower() == ".npy":
            cube = np.load(path, mmap_mode="r", allow_pickle=False)
            check_bands(path, cube, channels, stored)
            return cube
        with tifffile.TiffFile(path) as file:
            if len(file.series) != 1 or next_page(file):
                raise BadFile(f"{path}: truncated TIFF file, or bands of different size or type")
            check_bands(path, file.series[0], channels, stored)
            if not all(page is not None and is_whole(page, stored) for page in file.pages):
                raise BadFile(f"{path}: truncated TIFF file")
            return file.series[0].asarray()
    except TokenError as error:                      # of numpy, where a header is damaged
        raise BadFile(f"{path}: cannot be read ({one_line(error)})") from error


def check_bands(path, array, channels, stored):
    """BadFile unless the array, of which only shape and dtype are looked at, is a cube of so many bands."""
    shape = (1, *array.shape) if len(array.shape) == 2 else array.shape
    check_array(path, shape, array.dtype, stored)
    if channels not in (shape[0], shape[2] if len(array.shape) == 3 else 1):
        raise BadFile(f"{path}: {' x '.join(map(str, array.shape))} values, neither the first nor the last "
                      f"axis of HVIT_SPECTRAL_CHANNELS = {channels} bands")
