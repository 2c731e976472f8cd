"""Series of grey slices from NIfTI, DICOM or pictures, cut along an axis, and masks on their own voxels.

    series = read_series("t2.nii.gz")                          # data [D, H, W]
    slices = slices_along(series, "sagittal")                  # [N, rows, columns], the head above
    mask = to_source(series, "sagittal", masks)                # [D, H, W] of masks [N, rows, columns]
    write_mask("t2_mask.nii.gz", mask, like=series)
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from PIL import Image
from pydicom.misc import is_dicom

from datasets.dicom_files import read_dataset
from datasets.em_checks import readable
from datasets.io import DAMAGED_DICOM, DICOM_SUFFIXES, FORMATS, PICTURE_SUFFIXES, read_image
from datasets.picture_claims import check_claim
from datasets.volumes import NIFTI_SUFFIXES, check_affine, check_image, read_dicom_series, read_nifti
from utils.config import BadFile, UserError

MIN_SLICES = 4                                       # fewer are no series
AXES = ("sagittal", "coronal", "axial", "stored")    # the first three by the patient's axis across them
IN_PLANE = ((2, 1), (2, 0), (1, 0))                  # of these: the patient's axes of rows and columns
COLOUR = 16                                          # of 255, between channels: more than JPEG makes of grey
PICTURE_AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
HEADER = ["SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Rows", "PhotometricInterpretation"]


@dataclass
class Series:
    """One series in the order of its source's voxels.

    data: float32 [D, H, W]: [z, y, x] of NIfTI, and of DICOM, where x runs along the rows.  affine: float64
    [4, 4], voxel (d, h, w) -> mm to the right, front and head (RAS).  notes: what was repaired or left out.
    placed: whether the source says where it lies; of pictures a voxel counts as 1 mm.
    """

    data: np.ndarray
    affine: np.ndarray
    path: Path
    notes: list = field(default_factory=list)
    placed: bool = True


def read_series(path, uid="", pixels=True):
    """The Series of a NIfTI file, a folder (or file) of DICOM, a folder of PNG, JPEG or TIFF, or one picture.

    uid: SeriesInstanceUID, for a folder of several DICOM series.  Pictures of a folder are taken in natural
    order (2 before 10); coloured ones among them and a single one of another size are left out, with a note.
    One picture is a series of one slice, its colour made luminance.  DICOM: see dicom_series.read_series.
    pixels False: of NIfTI and pictures headers alone are read where they do (DICOM is read whole), and data
    are zeros, [D, H, W] all the same, that take no memory.
    Raises BadFile: missing, damaged, a label map, slices of different sizes or directions, fewer than
    MIN_SLICES slices, several series and no uid.
    """
    path = Path(path)
    files = files_of(path)
    if files["dicom"]:
        return read_dicom(path, files["dicom"], uid)
    if path.is_dir():
        kept, size, notes = picture_files(path, files["picture"])
        data = np.stack([read_image(file) for file in kept]) if pixels else hollow((len(kept), *size))
        return enough(Series(data, PICTURE_AFFINE, path, notes, placed=False))
    if files["picture"]:
        size, colour = look_at(path)
        data = read_image(path)[None] if pixels else hollow((1, *size))
        return Series(data, PICTURE_AFFINE, path, ["colour, taken as luminance"] * colour, placed=False)
    if not files["nifti"]:
        raise BadFile(f"{path}: neither NIfTI, DICOM nor a picture")
    return enough((None if pixels else nifti_header(path)) or whole_nifti(path))


def whole_nifti(path):
    """The Series of a NIfTI file.  Raises BadFile."""
    volume = read_nifti(path)
    check_image(path, volume.data)
    data = np.ascontiguousarray(volume.data.T, np.float32)
    return Series(data, volume.affine[:, [2, 1, 0, 3]], path, volume.notes)


def nifti_header(path):
    """The same with zeros for data, or None where the whole file must be read to know what to say of it."""
    try:
        with readable(path):
            image = nib.load(path)
            shape, affine, header = image.shape, image.affine.astype(float), image.header
    except BadFile:
        return None
    if len(shape) != 3 or not (header["sform_code"] or header["qform_code"]):
        return None
    check_affine(path, affine)
    return Series(hollow(shape[::-1]), affine[:, [2, 1, 0, 3]], path)


def hollow(shape):
    """Zeros of a shape, float32, all in one place of memory."""
    return np.broadcast_to(np.float32(0), shape)


def enough(series):
    """``series`` itself.  BadFile when it has fewer than MIN_SLICES slices."""
    count = series.data.shape[stored_axis(series)]
    if count < MIN_SLICES:
        raise BadFile(f"{series.path}: {count} slice(s), at least {MIN_SLICES} make a series")
    return series


def files_of(path):
    """{"nifti", "dicom", "picture", "": paths in natural order} of one file, or of a folder's visible ones.

    Raises BadFile when there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise BadFile(f"{path}: no such file or folder")
    files = {"nifti": [], "dicom": [], "picture": [], "": []}
    inside = sorted(path.iterdir(), key=lambda file: natural(file.name)) if path.is_dir() else [path]
    for file in inside:
        if file.is_file() and not file.name.startswith("."):
            files[kind_of(file)].append(file)
    return files


def kind_of(path):
    """"nifti" | "dicom" | "picture" | "" of a file, by its suffix, or by the DICOM mark."""
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    if name.endswith(PICTURE_SUFFIXES):
        return "picture"
    return "dicom" if name.endswith(DICOM_SUFFIXES) or (name != "dicomdir" and is_dicom(path)) else ""


def dicom_groups(files):
    """({SeriesInstanceUID: (its number and description, files)}, notes) of DICOM files.

    What is no grey picture (colour screenshots, reports, a file without a sound header) is left out, with a
    note: where a slice is missing then, read_series says so.
    """
    groups, others = {}, []
    for file in files:
        try:
            with readable(file):
                tags = read_dataset(file, stop_before_pixels=True, specific_tags=HEADER)
                uid, *words, rows, kind = (str(tags.get(name) or "") for name in HEADER)
                grey = uid and rows and (kind or "MONOCHROME").startswith("MONOCHROME")
        except (BadFile, *DAMAGED_DICOM):
            grey = False
        if grey:
            groups.setdefault(uid, ("_".join(filter(None, words)), []))[1].append(file)
        else:
            others.append(file.name)
    return groups, left_out(others, "DICOM file(s) without a grey slice")


def left_out(names, what):
    """[] or one note that so many files were left out, with the first three names."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} {what} left out: {shown}"] if names else []


def read_dicom(path, files, uid):
    """The Series of DICOM files, of which those of another series than ``uid`` are passed over."""
    groups, notes = dicom_groups(files)
    if not uid and len(groups) > 1:
        raise BadFile(f"{path}: {len(groups)} DICOM series in one folder; name one of them by its "
                      f"SeriesInstanceUID: {', '.join(sorted(groups)[:3])}")
    uid = uid or next(iter(groups), "")
    if uid not in groups:
        raise BadFile(f"{path}: holds no DICOM slice" + (f" of the series {uid}" if uid else ""))
    volume = read_dicom_series(groups[uid][1])
    return Series(np.ascontiguousarray(volume.data.T, np.float32), volume.affine[:, [2, 1, 0, 3]], path,
                  notes + volume.notes)


def natural(name):
    """Sort key of a name: its numbers by their value."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part.lower())
            for part in re.split(r"(\d+)", name)]


def look_at(path):
    """((rows, columns), whether it has coloured pixels) of a picture; pixels are read only where they may."""
    with readable(path), Image.open(path, formats=FORMATS) as image:
        check_claim(path, image, path.stat().st_size)
        if image.mode in ("L", "LA", "1", "F") or image.mode.startswith("I"):
            return image.size[::-1], False
        pixels = np.asarray(image.convert("RGB"), np.int16)
        return image.size[::-1], bool((pixels.max(2) - pixels.min(2) > COLOUR).any())


def picture_files(folder, files):
    """(paths, (rows, columns), notes) of the slices among the pictures of one folder."""
    looks = {file: look_at(file) for file in files}
    notes = left_out([file.name for file in looks if looks[file][1]], "colour picture(s) among the slices")
    sizes = Counter(size for size, colour in looks.values() if not colour)
    if not sizes:
        raise BadFile(f"{folder}: neither DICOM nor grey pictures in this folder"
                      + (f" ({notes[0]})" if notes else ""))
    size, count = sizes.most_common(1)[0]
    if sizes.total() > count + 1:
        raise BadFile(f"{folder}: slices of different sizes in one series ({count} of "
                      f"{size[0]} x {size[1]}, {sizes.total() - count} of others)")
    odd = [file.name for file in looks if not looks[file][1] and looks[file][0] != size]
    return ([file for file in looks if looks[file] == (size, False)], size,
            notes + left_out(odd, "picture(s) of another size"))


def spacing_of(series):
    """float64 [3]: mm between voxels along D, H, W."""
    return np.linalg.norm(series.affine[:3, :3], axis=0)


def stored_axis(series):
    """The axis of data across the slices as taken: that of the widest spacing, the first of equal ones."""
    spacing = spacing_of(series)
    return int(np.argmax(spacing > 0.99 * spacing.max()))        # headers round


def order_of(series, axis):
    """(axes of data that become slices, rows, columns; their steps: -1 where turned over, else 1)."""
    if axis not in AXES:
        raise UserError(f'axis "{axis}": must be one of {", ".join(AXES)}')
    if not series.placed:
        if axis != "stored":
            raise UserError(f'{series.path}: pictures do not tell what is {axis}; cut them along "stored"')
        return (0, 1, 2), (1, 1, 1)
    patient, signs = nib.io_orientation(series.affine).astype(int).T.tolist()
    if axis == "stored":
        first, step = stored_axis(series), 1
    else:
        first = patient.index(AXES.index(axis))
        step = signs[first] if axis == "axial" else -signs[first]
    rows, columns = (patient.index(number) for number in IN_PLANE[patient[first]])
    return (first, rows, columns), (step, -signs[rows], -signs[columns])


def view_of(series, axis="stored"):
    """"sagittal" | "coronal" | "axial": what slices along ``axis`` show, nearest; None for pictures."""
    axes, _ = order_of(series, axis)
    return AXES[int(nib.io_orientation(series.affine)[axes[0], 0])] if series.placed else None


def turned(array, order):
    """An array in another order of axes, as order_of gives it; a view."""
    axes, steps = order
    return array.transpose(axes)[tuple(slice(None, None, step) for step in steps)]


def slices_along(series, axis):
    """[N, rows, columns]: the slices along ``axis``, a view of the data.

    "sagittal" from the patient's right to the left, "coronal" from front to back, "axial" from foot to head;
    of oblique series the nearest axis.  "stored": across the widest spacing, in the order of the source.
    All are turned as films are hung: rows go to the feet, of axial slices to the back; columns to the
    patient's left, of sagittal slices to the back.  So a series looks the same from NIfTI and from DICOM.
    Pictures stay as they are, and have "stored" only (UserError).
    """
    return turned(series.data, order_of(series, axis))


def spacing_along(series, axis):
    """(between slices, between rows, between columns) in mm of slices_along."""
    return tuple(spacing_of(series)[list(order_of(series, axis)[0])].tolist())


def to_source(series, axis, slices):
    """[D, H, W] in the series' own order of an array [N, rows, columns] in that of slices_along."""
    array = np.empty(series.data.shape, slices.dtype)
    turned(array, order_of(series, axis))[:] = slices
    return array


def write_mask(path, mask, like):
    """Write a mask, uint8 [D, H, W], as NIfTI on the voxels of the Series ``like``: its axes, its affine.

    Compressed where the name ends so; written beside and renamed, so that a killed run leaves no half file.
    ValueError for another shape or type.
    """
    path = Path(path)
    if mask.shape != like.data.shape or mask.dtype != np.uint8:
        raise ValueError(f"a mask {mask.dtype} {mask.shape} where uint8 {like.data.shape} is due")
    affine = like.affine[:, [2, 1, 0, 3]]
    image = nib.Nifti1Image(mask.T, affine)
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.allclose(unit.T @ unit, np.eye(3), atol=1e-4):         # some programs read the qform alone,
        image.set_qform(affine, 1)                               # which cannot hold a tilted gantry
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(igzip.compress(data, 2, mtime=0) if path.suffix == ".gz" else data)
    os.replace(temporary, path)
