"""Scans from NIfTI files and DICOM series: which ones a folder holds, and each as a volume in the patient."""

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.misc import is_dicom
from scipy import ndimage

from datasets.dicom import read_frames
from datasets.dicom_series import read_series
from datasets.io import DAMAGED_NIFTI, DICOM_SUFFIXES, one_line, open_nifti, read_bytes, scale_nifti
from utils.config import BadFile, UserError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
WINDOW_WORDS = ("brain", "blood", "bone")
MAX_NAME = 120                                       # characters; file systems take 255 with what is added
SPACINGS = (0.01, 100.0)                             # mm, of any scanner
LABELS = 32                                          # so many whole numbers, or fewer, are a label map
EQUAL = 0.6                                          # or a larger share of voxels like their neighbour
MAX_SHEAR = 0.2                                      # degrees, below which axes count as perpendicular


@dataclass
class Volume:
    """A scan in the order of voxels of its source.

    data: int16 or float32 [x, y, z], finite, perhaps read-only; CT of DICOM in HU from -1024.
    affine: float64 [4, 4], voxel -> mm to the right, front and head (RAS).  modality: "MR" | "CT" | None, as
    DICOM tells.  notes: what was repaired, for example "gantry tilt 18.5 degrees".
    """

    data: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    notes: list = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A scan on disk, of one study.

    name: unique in its study, safe in a file's name.  kind: "nifti" (one path) | "dicom" (the files of one
    series, sorted).
    """

    study: str
    name: str
    kind: str
    paths: tuple


def find_sources(raw):
    """(sources, bad): the scans below ``raw``, sorted by study and name; (path, reason) of unusable files.

    A first-level folder is a study, with NIfTI files and DICOM series in any nesting; its DICOM files belong
    together by SeriesInstanceUID, wherever they lie.  Of what lies in ``raw`` itself a NIfTI is a study of
    its own, and DICOM files belong to the study of their StudyInstanceUID.  Hidden files, DICOMDIR and what
    is neither NIfTI nor DICOM are left out; a study of nothing else is bad.  Pixels are not read.
    Raises UserError when there is no such folder, or no source in it.
    """
    raw = Path(raw)
    if raw.is_file():
        raise UserError(f"{raw}: a file, where the folder is due that holds a folder per study")
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder")
    groups, forms, bad = {}, {}, []                  # groups: {(study, NIfTI or series): (kind, tags, paths)}
    for study, path in files_below(raw):
        try:
            if path.name.lower().endswith(NIFTI_SUFFIXES):
                path.stat()                          # OSError for a link to nowhere
                groups[study or safe_name(stem_of(path)), path] = "nifti", None, [path]
            elif path.suffix.lower() in DICOM_SUFFIXES or is_dicom(path):
                first = read_frames(path, forms)[0]
                study = study or safe_name(str(first.tags.get("StudyInstanceUID") or "study"))
                group = groups.setdefault((study, first.form.series), ("dicom", first.tags, []))
                group[2].append(path)
        except BadFile as error:
            bad.append((path, str(error).removeprefix(f"{path}: ")))
        except OSError as error:
            bad.append((path, error.strerror))
    if not groups:
        raise UserError(f"{raw}: holds no NIfTI file and no DICOM slice that can be used"
                        + (f" ({len(bad)} cannot, first {bad[0][0]}: {bad[0][1]})" if bad else ""))
    used = {study for study, _ in groups} | {path.relative_to(raw).parts[0] for path, _ in bad}
    bad += [(folder, "no NIfTI file and no DICOM image in this study") for folder in sorted(raw.glob("*/"))
            if folder.name not in used and not folder.name.startswith(".")]
    return name_sources(raw, groups), bad


def files_below(raw):
    """Yield (study, path) of files that may be scans, sorted; study is None for those in ``raw`` itself."""
    for entry in sorted(raw.iterdir()):
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            hidden = any(part.startswith(".") for part in path.relative_to(raw).parts)
            if not (hidden or path.is_dir() or path.name == "DICOMDIR"):
                yield entry.name if entry.is_dir() else None, path


def name_sources(raw, groups):
    """The Sources of find_sources' groups, sorted, with names that are unique in their study.

    A NIfTI is named by its path in the study; a DICOM series SeriesNumber_SeriesDescription, behind those of
    its folders that name a window (WINDOW_WORDS).  Equal names get _2, _3 ... in the order of their paths.
    """
    sources, taken = [], set()
    for (study, _), (kind, tags, paths) in sorted(groups.items(), key=lambda item: (item[0][0], item[1][2])):
        paths = sorted(paths)
        folders = Path(os.path.commonpath([path.parent for path in paths])).relative_to(raw).parts[1:]
        if kind == "nifti":
            name = "_".join([*folders, stem_of(paths[0])])
        else:
            told = [folder for folder in folders if any(word in folder.lower() for word in WINDOW_WORDS)]
            own = [str(tags.get(tag)) for tag in ("SeriesNumber", "SeriesDescription") if tags.get(tag)]
            name = "_".join(told + own)
        name = unique = safe_name(name)
        for count in itertools.count(2):
            if (study, unique.lower()) not in taken:
                break
            unique = f"{name}_{count}"
        taken.add((study, unique.lower()))
        sources.append(Source(study, unique, kind, tuple(paths)))
    return sorted(sources, key=lambda source: (source.study, source.name))


def stem_of(path):
    """The name of a NIfTI file without its suffix."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def safe_name(text):
    """``text`` in the letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[-MAX_NAME:].strip("._-") or "scan"


def read_volume(source):
    """The Volume of a Source, as it is stored: see read_nifti and read_dicom_series.  Raises BadFile."""
    return read_nifti(source.paths[0]) if source.kind == "nifti" else read_dicom_series(source.paths)


def read_nifti(path):
    """The Volume of a NIfTI-1 or NIfTI-2 file, gzipped or not; int16 for integers of at most that size.

    A fourth axis of one volume is dropped.  The affine is the sform, else the qform, else made of spacings
    alone, as nibabel chooses; then nothing tells left from right, and a note says so.  Raises BadFile when
    the file is damaged, 2D, truly 4D, colour or complex, has a voxel that is NaN or infinite, or spacings or
    an affine that make no sense.
    """
    path = Path(path)
    header, spacing, voxels = open_nifti(path, read_bytes(path))
    if voxels.ndim < 3:
        raise BadFile(f"{path}: 2D image where a volume is due")
    count = int(np.prod(voxels.shape[3:]))
    if count > 1:
        raise BadFile(f"{path}: 4D NIfTI of {count} volumes; split it")
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise BadFile(f"{path}: spacing {' x '.join(f'{mm:g}' for mm in spacing)} mm")
    try:
        affine = header.get_best_affine().astype(np.float64)
    except DAMAGED_NIFTI as error:
        raise BadFile(f"{path}: damaged NIfTI file ({one_line(error)})") from error
    check_affine(path, affine)
    with np.errstate(over="ignore"):                 # float64 beyond float32 becomes infinite: refused below
        data = scale_nifti(header, voxels).reshape(voxels.shape[:3], order="F")
    if data.dtype == np.float32 and not np.isfinite(data).all():
        raise BadFile(f"{path}: {np.count_nonzero(~np.isfinite(data))} voxels are NaN or infinite")
    told = header["sform_code"] or header["qform_code"]
    return Volume(data, affine, notes=[] if told else ["no orientation in the header, taken as LAS"])


def read_dicom_series(paths):
    """The Volume of the files of one DICOM series: see dicom_series.read_series.  Raises BadFile."""
    volume = Volume(*read_series([Path(path) for path in paths]))
    check_affine(Path(paths[0]).parent, volume.affine)
    return volume


def check_affine(path, affine):
    """Raise BadFile for an affine that is not finite, flat or nearly so, or of spacings no scanner has."""
    if not np.isfinite(affine).all():
        raise BadFile(f"{path}: the affine is not finite")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not ((SPACINGS[0] <= spacing) & (spacing <= SPACINGS[1])).all():
        raise BadFile(f"{path}: spacing {' x '.join(f'{mm:g}' for mm in spacing)} mm by its affine")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:
        raise BadFile(f"{path}: singular affine: the axes lie in one plane")


def upright(volume):
    """``volume`` on perpendicular axes; itself where they are within MAX_SHEAR degrees of that.

    A tilted gantry shifts each slice within its plane, against the one before.  With the axes A = Q R (Q
    perpendicular, R triangular), a voxel lies at R / diag(R) times its index on the grid Q diag(R), which
    keeps the first axis and the slices: they are shifted back, linearly and within their planes, onto a grid
    that holds the whole volume.  Outside is the smallest value.  float32 then, and a note of the angle.
    """
    axes = volume.affine[:3, :3]
    unit = axes / np.linalg.norm(axes, axis=0)
    shear = np.degrees(np.arcsin(np.abs(unit.T @ unit - np.eye(3)).max()))
    if shear <= MAX_SHEAR:
        return volume
    perpendicular, triangle = np.linalg.qr(axes)
    grid = perpendicular * np.diag(triangle)                                   # signs of Q and R cancel
    to_grid = triangle / np.diag(triangle)[:, None]
    to_grid[np.abs(to_grid) * max(volume.data.shape) < 1e-3] = 0               # rounding
    ends = [to_grid @ corner for corner in itertools.product(*((0, n - 1) for n in volume.data.shape))]
    low, high = np.floor(np.min(ends, axis=0)), np.ceil(np.max(ends, axis=0))
    matrix = np.linalg.inv(to_grid)
    data = ndimage.affine_transform(                                           # z first: as it lies in memory
        volume.data.T, matrix[::-1, ::-1], (matrix @ low)[::-1], tuple((high - low + 1).astype(int)[::-1]),
        output=np.float32, order=1, cval=float(volume.data.min())).T
    affine = np.eye(4)
    affine[:3] = np.column_stack([grid, volume.affine[:3, 3] + grid @ low])
    return Volume(data, affine, volume.modality, [*volume.notes, f"gantry tilt {shear:.1f} degrees"])


def check_image(path, data):
    """Raise BadFile when an array [x, y, z] is constant, or a label map instead of an image.

    Label maps hold whole numbers: LABELS of them at most, or more of which most voxels equal their neighbour
    (segmentations of the whole brain), which even smooth images do not.
    """
    flat = data.ravel(order="K")
    values = np.unique(flat[::1 + flat.size // 100_000])          # enough to know most images by
    if len(values) <= LABELS:
        values = np.unique(flat)
    if len(values) == 1:
        raise BadFile(f"{path}: constant (every voxel is {values[0]:g})")
    if (values != np.rint(values)).any():
        return
    inside = (data[1:] > values[0]) & (data[1:] < values[-1])     # not the background, nor what is clipped
    equal = np.mean((data[1:] == data[:-1])[inside]) if inside.any() else 0.0
    if len(values) <= LABELS or equal > EQUAL:
        raise BadFile(f"{path}: a label map ({len(values)} values), not an image")
