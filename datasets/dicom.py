"""DICOM files: the frames in them, where each lies in the patient, and what its pixels measure.

A frame is one grey slice [H, W]: a whole file, or one of many in an enhanced multi-frame file.  Positions and
directions are in mm in DICOM's own axes, to the patient's left, back and head (LPS).
"""

import contextlib
import io
import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.filereader import data_element_generator
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from datasets.dicom_files import LUT, has_lut, look_up, number_of, padding_of, read_dataset
from datasets.dicom_pixels import stored_pixels
from datasets.io import DAMAGED_DICOM, one_line
from utils.config import BadFile

PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)     # pixels lie in the file as they are
HEAD, DEFER = 65_536, 1024                           # bytes: of the first read, above which a value is left
LOWEST_HU, HIGHEST_HU = -1024, 32767                 # air, and what int16 holds
NAMES = ("SeriesNumber", "SeriesDescription", "StudyInstanceUID", "SOPClassUID")
DIFFER = ("EchoTime", "EffectiveEchoTime", "InversionTime", "DiffusionBValue", "TriggerTime", "ImageType",
          "FrameType", "TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionNumber",
          "AcquisitionTime", "ContentTime")          # what may tell volumes at one place apart
REQUIRED = ("SeriesInstanceUID", "Rows", "Columns", "ImageOrientationPatient", "PixelSpacing")
FORM = (*REQUIRED, "Modality", "ImageType", "FrameType", "SamplesPerPixel", "PhotometricInterpretation",
        "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "RescaleSlope",
        "PixelPaddingRangeLimit", "RescaleIntercept", "SliceThickness", "SpacingBetweenSlices")
FORM_TAGS = tuple(map(Tag, FORM))
POSITION, PIXELS = Tag("ImagePositionPatient"), Tag("PixelData")
GROUPS = tuple(map(Tag, ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")))
TAGS = [*map(Tag, (*NAMES, *DIFFER, "NumberOfFrames")), *FORM_TAGS, POSITION, PIXELS, LUT, *GROUPS]


@dataclass(frozen=True)
class Form:
    """What the slices of a sound series have in common.

    geometry: (rows, columns, orientation of the rows [3] and columns [3], row and column spacing in mm).
    thickness: mm, of a slice or between two if that is more, 0 where unknown.  padding: None, or lowest and
    highest stored number without a measurement.  A real value is stored * slope + intercept, or looked up.
    """

    series: str
    modality: str
    localizer: bool
    geometry: tuple
    thickness: float
    slope: float
    intercept: float
    lut: bool
    dtype: np.dtype                                  # of the stored numbers
    bits: int                                        # that count, up to high_bit
    high_bit: int
    dark_is_high: bool                               # MONOCHROME1
    padding: tuple | None


@dataclass(frozen=True)
class Frame:
    """One slice: frame ``number`` of the file at ``path``, its corner's position [3] in mm, and its tags.

    offset: where its pixels begin in the file (bytes) when they lie there plainly, else None.
    """

    path: Path
    number: int
    offset: int | None
    position: np.ndarray
    form: Form
    tags: pydicom.Dataset


def read_frames(path, forms):
    """The Frames of a DICOM file; pixels are not read.

    forms: dict, empty for the first file of a series, in which equal tags are looked up instead of parsed.
    Raises BadFile when the file is damaged or cut short, holds no image, or one that is colour, a
    segmentation, or without its place in the patient.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # what pydicom merely warns of, the checks refuse
            header, syntax, size = read_header(path)
            if PIXELS not in header:
                kind = UID(header.get("SOPClassUID") or "").name
                raise BadFile(f"{path}: DICOM file without complete pixel data{kind and f' ({kind})'}")
            tags = frame_tags(path, header)
            forms_of_frames = [find_form(path, frame, forms) for frame in tags]
            offsets = pixel_offsets(path, header, syntax, size, forms_of_frames[0], len(tags))
            positions = [position_of(path, frame) for frame in tags]
    except DAMAGED_DICOM as error:
        raise BadFile(f"{path}: damaged DICOM file ({one_line(error)})") from error
    return [Frame(path, *row) for row in zip(range(len(tags)), offsets, positions, forms_of_frames, tags,
                                             strict=True)]


def read_header(path):
    """(dataset of TAGS, transfer syntax, size of the file in bytes); pixels are left in the file.

    pydicom's parser on a plain file's beginning takes a third of the time of dcmread, which reads the rest.
    """
    with open(path, "rb") as file:
        head, size = io.BytesIO(file.read(HEAD)), file.seek(0, io.SEEK_END)
    head.seek(128)
    if head.read(4) == b"DICM":
        meta = {element.tag: element for element in data_element_generator(
            head, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)}
        syntax = pydicom.Dataset(meta).get("TransferSyntaxUID")
        if syntax in PLAIN:
            with contextlib.suppress(*DAMAGED_DICOM):                # a sequence may reach beyond HEAD
                header = pydicom.Dataset({element.tag: element for element in data_element_generator(
                    head, syntax == ImplicitVRLittleEndian, True, specific_tags=TAGS, defer_size=DEFER)})
                if PIXELS in header and GROUPS[1] not in header:
                    return header, syntax, size
    header = read_dataset(path, specific_tags=TAGS, defer_size=DEFER)
    guessed = ExplicitVRLittleEndian if header.original_encoding[1] else ExplicitVRBigEndian
    return header, header.file_meta.get("TransferSyntaxUID") or guessed, size


def frame_tags(path, header):
    """One dataset per frame, with the tags as in a file of one slice, gathered from the functional groups."""
    count = int(header.get("NumberOfFrames") or 1)
    if GROUPS[1] not in header:
        if count > 1:
            raise BadFile(f"{path}: DICOM file of {count} frames that does not tell where each of them lies")
        return [header]
    shared, each = (header.get(tag).value if tag in header else [] for tag in GROUPS)
    if len(each) != count:
        raise BadFile(f"{path}: damaged DICOM file ({count} frames, but {len(each)} descriptions of frames)")
    frames = []
    for own in each:
        tags = pydicom.Dataset()
        tags.update({tag: header.get_item(tag) for tag in TAGS
                     if tag in header and tag not in (PIXELS, *GROUPS)})
        for element in itertools.chain(*shared[:1], own):
            if element.VR == "SQ" and element.value and not element.tag.is_private:
                tags.update(element.value[0])
        frames.append(tags)
    return frames


def find_form(path, tags, forms):
    """The Form of a frame; ``forms`` remembers those parsed before by the tags' undecoded values."""
    key = tuple(str(getattr(tags.get_item(tag), "value", None)) for tag in FORM_TAGS) + (has_lut(tags),)
    if key not in forms:
        forms[key] = parse_form(path, tags)
    return forms[key]


def parse_form(path, tags):
    """The Form that a frame's tags describe.  Raises BadFile when it is no slice of a volume."""
    photometric = tags.get("PhotometricInterpretation") or "MONOCHROME2"
    if (tags.get("SamplesPerPixel") or 1) != 1 or not photometric.startswith("MONOCHROME"):
        raise BadFile(f"{path}: DICOM file with colour pixels ({photometric}) where grey ones are due")
    if tags.get("Modality") == "SEG":
        raise BadFile(f"{path}: a DICOM segmentation where an image is due")
    missing = [name for name in REQUIRED if not tags.get(name)]
    if missing:
        raise BadFile(f"{path}: DICOM image without {', '.join(missing)}: not a slice of a volume")
    axes = np.array(tags.ImageOrientationPatient, float).reshape(2, 3)
    spacing = np.array(tags.PixelSpacing, float)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        raise BadFile(f"{path}: ImageOrientationPatient is not two perpendicular directions")
    if spacing.shape != (2,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise BadFile(f"{path}: PixelSpacing {spacing.tolist()} is not two lengths")
    slope = number_of(tags, "RescaleSlope", 1)
    if slope == 0:
        raise BadFile(f"{path}: RescaleSlope 0")
    allocated, bits = int(tags.BitsAllocated), int(tags.get("BitsStored", tags.BitsAllocated))
    high_bit, signed = int(tags.get("HighBit", bits - 1)), tags.get("PixelRepresentation") or 0
    if allocated not in (8, 16, 32) or not 0 < bits <= high_bit + 1 <= allocated or signed not in (0, 1):
        raise BadFile(f"{path}: DICOM pixels of {bits} bits up to bit {high_bit} of {allocated}, "
                      f"PixelRepresentation {signed}")
    dtype = np.dtype(f"{'ui'[signed]}{allocated // 8}")
    return Form(
        series=str(tags.SeriesInstanceUID), modality=str(tags.get("Modality") or ""),
        localizer="LOCALIZER" in f"{tags.get('ImageType')} {tags.get('FrameType')}",
        geometry=(int(tags.Rows), int(tags.Columns), *axes.ravel().tolist(), *spacing.tolist()),
        thickness=max(abs(number_of(tags, name, 0)) for name in ("SliceThickness", "SpacingBetweenSlices")),
        slope=slope, intercept=number_of(tags, "RescaleIntercept", 0), lut=has_lut(tags),
        dtype=dtype, bits=bits, high_bit=high_bit, dark_is_high=photometric == "MONOCHROME1",
        padding=padding_of(tags, dtype))


def position_of(path, tags):
    """ImagePositionPatient, float64 [3], mm: the centre of the first pixel."""
    value = tags.get_item(POSITION).value if POSITION in tags else ()
    position = np.array(value.split(b"\\") if isinstance(value, bytes) else value, float)     # raw as yet
    if position.shape != (3,) or not np.isfinite(position).all():
        raise BadFile(f"{path}: DICOM image without ImagePositionPatient: not a slice of a volume")
    return position


def pixel_offsets(path, header, syntax, size, form, count):
    """For each of ``count`` frames where its pixels begin in the file, or None where a decoder is needed.

    Raises BadFile when uncompressed pixels are fewer than the header claims, or more by a frame.
    """
    if syntax.is_private or syntax.is_compressed or syntax.is_deflated:
        return [None] * count
    pixels = header.get_item(PIXELS, keep_deferred=True)
    frame = math.prod(form.geometry[:2]) * form.dtype.itemsize
    there, due = min(pixels.length, size - pixels.value_tell), count * frame
    if not due <= there < due + frame:
        raise BadFile(f"{path}: {'cut short: ' * (there < due)}{there} bytes of pixels where {due} are due")
    if syntax not in PLAIN or form.dtype.itemsize != 2:
        return [None] * count
    return [pixels.value_tell + number * frame for number in range(count)]


def read_stored(frames):
    """The stored numbers [H, W] of each of ``frames``, which are all of one file.  Raises BadFile."""
    path, shape = frames[0].path, frames[0].form.geometry[:2]
    try:
        if frames[0].offset is not None:
            return [read_plain(frame).reshape(shape) for frame in frames]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = read_dataset(path)
            return [stored_pixels(dataset, frame.number).reshape(shape) for frame in frames]
    except DAMAGED_DICOM as error:
        raise BadFile(f"{path}: DICOM file that cannot be decoded ({one_line(error)})") from error


def read_plain(frame):
    """The stored numbers [H * W] of a frame that lies in its file as it is."""
    form = frame.form
    count = math.prod(form.geometry[:2])
    stored = np.fromfile(frame.path, form.dtype.newbyteorder("<"), count, offset=frame.offset)
    if form.bits < 16:                               # the other bits may hold anything
        stored <<= 15 - form.high_bit
        stored >>= 16 - form.bits
    return stored


def real_dtype(forms):
    """int16 where the real values of all ``forms`` are whole numbers that fit into it, else float32."""
    def whole(form):
        low = -2 ** (form.bits - 1) if form.dtype.kind == "i" else 0
        fits = -32768 <= low + form.intercept and low + 2 ** form.bits - 1 + form.intercept <= 32767
        return (form.slope == 1 and form.intercept % 1 == 0 and abs(form.intercept) < 32768 and not form.lut
                and form.dtype.itemsize <= 2 and (fits or form.modality == "CT"))
    return np.int16 if all(map(whole, forms)) else np.float32


def write_real(frame, stored, out):
    """Write a frame's stored numbers [H, W], which are overwritten, into ``out`` [H, W] of real_dtype.

    CT: HU, held within LOWEST_HU..HIGHEST_HU; padding, and what scanners write below air, becomes LOWEST_HU.
    Rescaled numbers are HU whichever end a display shows dark, so MONOCHROME1 is no concern here.
    """
    form, hole = frame.form, None
    if form.lut:
        out[:] = look_up(frame.path, stored)
        return
    if form.modality == "CT":
        low, high = stored_limits(form)
        if form.padding is not None and form.padding[1] > low:
            hole = padding_in(form, stored)
        np.clip(stored, low, high, out=stored)
    np.copyto(out, stored, casting="unsafe")         # what wraps round in int16 here wraps back below
    if form.slope != 1:
        out *= form.slope
    if form.intercept != 0:
        out += out.dtype.type(form.intercept)
    if hole is not None:
        out[hole] = LOWEST_HU


def padding_in(form, stored):
    """Where the stored numbers [H, W] are padding: bool [H, W].  ``form`` has padding."""
    return (stored >= form.padding[0]) & (stored <= form.padding[1])


def stored_limits(form):
    """The stored numbers of LOWEST_HU and HIGHEST_HU, the lower first, in the dtype of the stored."""
    low, high = sorted((hu - form.intercept) / form.slope for hu in (LOWEST_HU, HIGHEST_HU))
    limits = np.iinfo(form.dtype)
    return [form.dtype.type(np.clip(end, limits.min, limits.max)) for end in (np.ceil(low), np.floor(high))]
