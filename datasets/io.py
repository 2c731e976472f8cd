"""Read one grey image of any usual medical or photographic format, and write NIfTI.

Arrays are numpy float32 [H, W]; rows go down the picture, columns to the patient's left.
A file that cannot be used raises BadFile: one line that begins with its path.
"""

import io
import logging
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from isal import igzip, igzip_lib, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from PIL import Image
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.misc import is_dicom

from datasets.dicom_pixels import stored_pixels
from datasets.picture_claims import check_claim
from utils.config import BadFile, UserError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
DICOM_SUFFIXES = (".dcm", ".dicom")
FORMATS = ("PNG", "JPEG", "TIFF")
# What each library raises on damaged files, found by cutting files short and flipping their bits.
DAMAGED_NIFTI = (OSError, EOFError, ValueError, OverflowError, zlib.error, igzip_lib.IsalError,
                 HeaderDataError, ImageFileError, WrapStructError)
DAMAGED_PICTURE = (OSError, EOFError, ValueError, TypeError, SyntaxError, struct.error,
                   Image.DecompressionBombError)
DAMAGED_DICOM = (OSError, EOFError, ValueError, TypeError, AttributeError, RuntimeError, LookupError,
                 OverflowError, struct.error, zlib.error, BytesLengthException, InvalidDicomError)
SUFFIXES = (".nii", ".nii.gz", *PICTURE_SUFFIXES, *DICOM_SUFFIXES)
SILENT = logging.Logger("what nibabel mends", logging.CRITICAL + 1)


def read_image(path):
    """One 2D image, float32 [H, W], in the file's own units (for DICOM: after its first window).

    NIfTI: stored [x, y], so transposed here; singleton axes are dropped, the affine is not consulted.
    PNG, JPEG, TIFF: colour becomes luminance, transparency is dropped.
    DICOM: rescaled, windowed, and MONOCHROME1 inverted, so that larger is always brighter.
    Raises BadFile when the file is missing, empty, damaged, not 2D, or holds NaN or infinite pixels.
    """
    path = Path(path)
    data = read_bytes(path)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")        # what the libraries merely warn of, the checks refuse
        image = np.ascontiguousarray(decoder_of(path, data)(path, data), dtype=np.float32)
    if image.ndim != 2 or 0 in image.shape:
        raise BadFile(f"{path}: not a 2D image (shape {image.shape})")
    if not np.isfinite(image).all():
        raise BadFile(f"{path}: {np.count_nonzero(~np.isfinite(image))} pixels are NaN or infinite")
    return image


def read_bytes(path):
    """All bytes of a file.  Raises BadFile when there are none."""
    if path.is_dir():
        raise BadFile(f"{path}: a folder where an image file is due")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from error
    if not data:
        raise BadFile(f"{path}: the file is empty")
    return data


def decoder_of(path, data):
    """The function (path, data) -> [H, W] that reads this content; a wrong suffix does not matter."""
    name = path.name.lower()
    if data[128:132] == b"DICM":
        return decode_dicom
    if data[:8] == b"\x89PNG\r\n\x1a\n" or data[:2] == b"\xff\xd8" or data[:4] in (b"II*\0", b"MM\0*"):
        return decode_picture
    if data[:2] == b"\x1f\x8b" or name.endswith((".nii", ".nii.gz")):
        return decode_nifti
    if name.endswith(DICOM_SUFFIXES):          # old files lack the preamble
        return decode_dicom
    raise BadFile(f"{path}: not a NIfTI, PNG, JPEG, TIFF or DICOM file")


def decode_nifti(path, data):
    """A 2D NIfTI-1 or NIfTI-2, gzipped or not."""
    header, _, voxels = open_nifti(path, data)
    if sum(n > 1 for n in voxels.shape) > 2:
        shape = "x".join(map(str, voxels.shape))
        raise BadFile(f"{path}: 3D volume of shape {shape} where a 2D image is due")
    return scale_nifti(header, voxels).squeeze().T


def open_nifti(path, data):
    """(header, spacing [3], voxels [x, y, ...]) of NIfTI-1 or NIfTI-2 bytes, gzipped or not.

    header: nibabel's, with what it mends; spacing: as written.  voxels: as stored, a read-only view of the
    (unzipped) bytes in their byte order.  Raises BadFile when the file is damaged, holds colour or complex
    voxels, or its header claims more than there is.
    """
    try:
        raw = gunzip(data) if data[:2] == b"\x1f\x8b" else data
        version_2 = raw[:4] in (struct.pack("<i", 540), struct.pack(">i", 540))
        version = nib.Nifti2Header if version_2 else nib.Nifti1Header
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = version.from_fileobj(io.BytesIO(raw), check=False)
            spacing = header["pixdim"][1:4].copy()             # before nibabel mends sizes of 0 to 1
            header.check_fix(SILENT)
        check_nifti_header(path, header, len(raw))
        shape, offset = tuple(map(int, header.get_data_shape())), int(header.get_data_offset())
        voxels = np.frombuffer(raw, header.get_data_dtype(), math.prod(shape), offset)
        return header, spacing, voxels.reshape(shape, order="F")
    except DAMAGED_NIFTI as error:
        raise BadFile(f"{path}: damaged NIfTI file ({one_line(error)})") from error


def gunzip(data):
    """The content of gzip bytes.

    They end with its size: room for it made at once halves the time.  Deflate shrinks 1032 times at most.
    """
    size = min(int.from_bytes(data[-4:], "little"), 1032 * len(data))
    member = isal_zlib.decompressobj(wbits=31)
    content = member.decompress(data, size + 1)
    return content if member.eof and not member.unused_data else igzip.decompress(data)


def check_nifti_header(path, header, size):
    """Raise BadFile before any memory is asked for what the header claims but the file cannot hold."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    header.get_slope_inter()                   # HeaderDataError where they make no sense
    if dtype.kind not in "iuf":
        raise BadFile(f"{path}: colour or complex voxels ({dtype}) where grey ones are due")
    needed = int(header.get_data_offset()) + math.prod(map(int, shape)) * dtype.itemsize
    if any(n < 1 for n in shape) or needed > size:
        raise BadFile(f"{path}: damaged NIfTI file (the header claims {needed} bytes for shape "
                      f"{'x'.join(map(str, shape))}, there are {size})")


def scale_nifti(header, voxels):
    """Voxels in the header's units: int16 where integers of at most that size are not scaled, else float32.

    Nothing is copied where the voxels already are what is due.
    """
    slope, inter = header.get_slope_inter()
    if slope in (None, 1) and not inter:
        whole = np.can_cast(voxels.dtype, np.int16)
        return voxels.astype(np.int16 if whole else np.float32, copy=False)
    values = voxels.astype(np.float32)
    values *= slope
    values += inter
    return values


def decode_picture(path, data):
    """PNG, JPEG or TIFF: 8 or 16 bit grey as it is, anything else as luminance (ITU-R 601-2)."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).verify()      # PNG checksums, not checked on reading
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_claim(path, image, len(data))
            if image.format == "TIFF" and image.n_frames > 1:
                raise BadFile(f"{path}: {image.n_frames} pages where one image is due")
            grey = image.mode in ("L", "F") or image.mode.startswith("I")
            return np.asarray(image if grey else image.convert("L"))
    except DAMAGED_PICTURE as error:
        raise BadFile(f"{path}: damaged image file ({one_line(error)})") from error


def decode_dicom(path, data):
    """One frame: modality LUT or rescale, then the first VOI LUT or window; MONOCHROME1 is inverted."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        if "PixelData" not in dataset:
            raise BadFile(f"{path}: DICOM file without pixel data")
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise BadFile(f"{path}: DICOM file of {dataset.NumberOfFrames} frames where one image is due")
        photometric = dataset.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            raise BadFile(f"{path}: DICOM file with a colour palette where grey pixels are due")
        pixels = stored_pixels(dataset)
        if pixels.ndim == 3:
            return pixels @ np.array([0.299, 0.587, 0.114], np.float32)        # [H, W, 3] -> [H, W]
        pixels = pydicom.pixels.apply_modality_lut(pixels.astype(np.int64), dataset)    # tables may be longer
        pixels = pydicom.pixels.apply_voi_lut(pixels, dataset, index=0).astype(np.float32)
        return pixels.max() + pixels.min() - pixels if photometric == "MONOCHROME1" else pixels
    except DAMAGED_DICOM as error:
        raise BadFile(f"{path}: DICOM file that cannot be decoded ({one_line(error)})") from error


def one_line(error):
    """A library's message on one line of at most 200 characters, or its type when there is none."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:200] or type(error).__name__


def image_files(folder):
    """Sorted paths of the image files below a folder, by suffix, or by the DICOM mark where there is none.

    Hidden files are left out.  Raises UserError when the folder is missing, a file, or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a folder' if folder.is_file() else 'no such folder'}")
    files = [path for path in sorted(folder.rglob("*"))
             if path.is_file() and not path.name.startswith(".")
             and (path.name.lower().endswith(SUFFIXES) or is_dicom_without_suffix(path))]
    if not files:
        raise UserError(f"{folder}: holds no image file ({', '.join(SUFFIXES)} or DICOM)")
    return files


def is_dicom_without_suffix(path):
    """Whether a file named without a suffix, or like a UID, carries the DICOM mark; DICOMDIR is an index."""
    suffix = path.suffix[1:]
    if path.name == "DICOMDIR" or (suffix and not suffix.isdigit()):
        return False
    return is_dicom(path)


def write_nifti(path, array, spacing=(1.0, 1.0), dtype="float32", scale=1.0):
    """Write array [H, W] as a 2D NIfTI that read_image gives back; .nii.gz is compressed.

    spacing: (row, column) distances in mm.  Stored [x, y] with the affine diag(-column, -row, 1, 1).
    dtype: "float32" | "int16" | "uint8" | "uint16"; integers hold round(array / scale) and scl_slope.
    Written beside and renamed, so a killed run leaves no half file.  Equal arrays give equal bytes.
    Raises ValueError when the array is not 2D or a value does not fit into dtype.
    """
    path, stored = Path(path), np.asarray(array).T                             # [W, H]
    if stored.ndim != 2:
        raise ValueError(f"write_nifti takes [H, W], not shape {np.shape(array)}")
    if dtype != "float32":
        stored = np.rint(stored / scale)
        limits = np.iinfo(dtype)
        if stored.size and not (limits.min <= stored.min() and stored.max() <= limits.max):
            raise ValueError(f"{path}: values {stored.min()}..{stored.max()} do not fit into {dtype}")
    image = nib.Nifti1Image(stored.astype(dtype), np.diag([-spacing[1], -spacing[0], 1.0, 1.0]))
    image.header.set_xyzt_units("mm")
    if dtype != "float32":
        image.header.set_slope_inter(scale, 0.0)
    data = image.to_bytes()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(igzip.compress(data, 2, mtime=0) if path.suffix == ".gz" else data)
    os.replace(temporary, path)


def min_max(image):
    """Image [H, W] scaled to [0, 1], float32; a constant image becomes zeros."""
    low, high = float(image.min()), float(image.max())
    if low == high:
        return np.zeros(image.shape, np.float32)
    return np.divide(np.subtract(image, low, dtype=np.float64), high - low).astype(np.float32)


def resize(image, size):
    """Image [H, W] -> float32 [size[0], size[1]], bilinear and antialiased; the value range is kept."""
    if image.shape == tuple(size):
        return np.array(image, np.float32)
    tensor = torch.from_numpy(np.array(image, np.float32))[None, None]
    resized = F.interpolate(tensor, tuple(size), mode="bilinear", antialias=True)
    return resized.clamp_(float(image.min()), float(image.max()))[0, 0].numpy()


def letterbox(image, size):
    """Fit an image [H, W] into a square without changing its aspect ratio.

    Returns (square float32 [size, size], box): the picture lies centred at box = (top, left, height, width)
    with zeros around it.  A square image is just resized.
    """
    height, width = image.shape
    longest = max(height, width)
    fitted = max(1, round(height * size / longest)), max(1, round(width * size / longest))
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    square = np.zeros((size, size), np.float32)
    square[top:top + fitted[0], left:left + fitted[1]] = resize(image, fitted)
    return square, (top, left, *fitted)


def undo_letterbox(square, box, shape):
    """Cut a map [size, size] back to its box and resize it to the shape (H, W) that letterbox was given."""
    top, left, height, width = box
    return resize(square[top:top + height, left:left + width], shape)
