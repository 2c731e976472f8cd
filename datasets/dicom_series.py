"""One DICOM series as a volume: slices in their order along the patient, evenly spaced, in real units."""

import os
from itertools import groupby

import numpy as np

from datasets.dicom import DIFFER, padding_in, read_frames, read_stored, real_dtype, write_real
from utils.config import BadFile

MIN_SLICES = 4
SAME_PLACE = 0.01                                    # mm
MISSING = 1.5                                        # a slice is missing from a gap so many times too wide
NEAR = 2                                             # gaps on each side that tell how wide one should be
UNEVEN = 0.05                                        # of the spacing, off the even place


def read_series(paths):
    """(data [x, y, z], affine, modality, notes) of the files of one series; see datasets.volumes.Volume.

    x runs along the rows, y down the columns, z along the slices' normal.  Files may hold one slice each or
    several.  Localizers, one slice unlike the others and slices given twice are dropped; uneven gaps are
    filled linearly.  MONOCHROME1 that is not CT is turned over, so that larger is brighter; padding that is
    not in CT becomes as dark as the darkest pixel measured.
    Raises BadFile, of a file or of the folder, for fewer than MIN_SLICES slices, slices of several sizes or
    directions, several volumes at the same positions (echoes, diffusion, time), and a missing slice.
    """
    forms, notes = {}, []
    frames = [frame for path in sorted(paths) for frame in read_frames(path, forms)]
    where = os.path.commonpath([path.parent for path in paths])
    frames = without_odd_slice(where, without_localizers(where, frames, notes), notes)
    normal = np.cross(*np.reshape(frames[0].form.geometry[2:8], (2, 3)))
    frames.sort(key=lambda frame: normal @ frame.position)
    frames = without_repeats(where, frames, normal, notes)
    at = np.array([normal @ (frame.position - frames[0].position) for frame in frames])        # mm
    check_positions(where, frames, at)
    volume, step = even_slices(stack(where, frames), at, notes)
    modality = frames[0].form.modality
    if modality not in ("MR", "CT"):
        notes.append(f"DICOM modality {modality or 'unknown'}")
    across = (frames[-1].position - frames[0].position) / at[-1] * step      # off the normal when tilted
    return (volume.transpose(2, 1, 0), affine_of(frames[0], across),
            modality if modality in ("MR", "CT") else None, notes)


def without_localizers(where, frames, notes):
    """The frames of one series that are not marked as localizers.  Raises BadFile when too few are left."""
    series = len({frame.form.series for frame in frames})
    if series > 1:
        raise BadFile(f"{where}: {series} DICOM series where one is due")
    slices = [frame for frame in frames if not frame.form.localizer]
    if not slices:
        raise BadFile(f"{where}: a localizer, not a volume")
    if len(slices) < len(frames):
        notes.append(f"{len(frames) - len(slices)} localizer(s) dropped")
    check_count(where, slices)
    return slices


def check_count(where, slices):
    """Raise BadFile for fewer than MIN_SLICES slices."""
    if len(slices) < MIN_SLICES:
        raise BadFile(f"{where}: {len(slices)} slice(s), at least {MIN_SLICES} make a volume")


def without_odd_slice(where, frames, notes):
    """The frames without a single one of another size, direction or spacing.  Raises BadFile for several."""
    geometry = np.array([frame.form.geometry for frame in frames])
    unlike = np.abs(geometry - np.median(geometry, axis=0)) > 1e-3           # [N, 10]
    odd = unlike.any(1)
    if odd.sum() > 1:
        kinds = {"sizes": unlike[:, :2], "directions": unlike[:, 2:8], "pixel spacings": unlike[:, 8:]}
        found = " and ".join(kind for kind, part in kinds.items() if part.any())
        raise BadFile(f"{where}: slices of different {found} in one series")
    if odd.any():
        notes.append("one slice of another size or direction dropped")
    slices = [frame for frame, is_odd in zip(frames, odd, strict=True) if not is_odd]
    check_count(where, slices)
    return slices


def without_repeats(where, frames, normal, notes):
    """Sorted frames, each position once.  Raises BadFile where two at a position differ: several volumes."""
    slices = frames[:1]
    for frame in frames[1:]:
        last = slices[-1]
        if normal @ (frame.position - last.position) > SAME_PLACE:
            slices.append(frame)
        elif frame.form != last.form or not np.array_equal(*(read_stored([one])[0] for one in (last, frame))):
            differ = [name for name in DIFFER if frame.tags.get(name) != last.tags.get(name)]
            raise BadFile(f"{where}: several volumes at the same positions in one series"
                          + (f" ({differ[0]} differs)" if differ else "") + "; split it")
    if len(slices) < len(frames):
        notes.append(f"{len(frames) - len(slices)} repeated slice(s) dropped")
    check_count(where, slices)
    return slices


def check_positions(where, frames, at):
    """Raise BadFile when slices do not lie on a straight line, or one is missing.

    A gap is too wide when it exceeds MISSING times what is due there: the median gap, or where the NEAR gaps
    on both sides are all smaller, as in the thin part of a series of two spacings, the widest of these; but
    never less than what the slices beside it say of their thickness and spacing.
    """
    positions = np.array([frame.position for frame in frames])
    line = positions[0] + np.outer(at / at[-1], positions[-1] - positions[0])
    if np.linalg.norm(positions - line, axis=1).max() > 0.5 * min(frames[0].form.geometry[8:]):
        raise BadFile(f"{where}: slices that do not lie on a straight line")
    gaps, own = np.diff(at), np.array([frame.form.thickness for frame in frames])
    around = np.array([max([*gaps[max(i - NEAR, 0):i], *gaps[i + 1:i + 1 + NEAR]]) for i in range(len(gaps))])
    due = np.maximum(np.minimum(np.median(gaps), around), np.maximum(own[:-1], own[1:]))
    wide = np.argmax(gaps / due)
    if gaps[wide] > MISSING * due[wide]:
        raise BadFile(f"{where}: missing slice(s): a gap of {gaps[wide]:.2f} mm, not {due[wide]:.2f}")


def stack(where, frames):
    """The frames' real values: int16 or float32 [slices, rows, columns]."""
    forms, holes = {frame.form for frame in frames}, {}          # holes: {slice: bool [rows, columns]}
    volume = np.empty((len(frames), *frames[0].form.geometry[:2]), real_dtype(forms))
    numbered = enumerate(frames)
    for _, members in groupby(numbered, key=lambda member: member[1].path):
        places, of_one_file = zip(*members, strict=True)
        for place, frame, stored in zip(places, of_one_file, read_stored(of_one_file), strict=True):
            if frame.form.padding is not None and frame.form.modality != "CT":
                holes[place] = padding_in(frame.form, stored)
            write_real(frame, stored, volume[place])
    dark_is_high = {form.dark_is_high for form in forms}
    if len(dark_is_high) > 1:
        raise BadFile(f"{where}: slices of MONOCHROME1 and MONOCHROME2 in one series")
    turned = dark_is_high.pop()
    if holes:
        fill_holes(volume, holes, np.max if turned else np.min)
    if turned and frames[0].form.modality != "CT":
        wide = np.promote_types(volume.dtype, np.int32)          # smallest plus largest may not fit in int16
        both = volume.min().astype(wide) + volume.max().astype(wide)
        np.subtract(both, volume, out=volume, dtype=wide, casting="same_kind")
    return volume


def fill_holes(volume, holes, darkest):
    """Give pixels of ``volume`` [slices, rows, columns] without a measurement the darkest one there is.

    holes: {slice: bool [rows, columns]}.  darkest: np.min, or np.max where low numbers are bright.  Without
    any measurement the darkest number of all stands in.
    """
    measured = [darkest(image[~holes[place]] if place in holes else image)
                for place, image in enumerate(volume) if place not in holes or not holes[place].all()]
    value = darkest(measured or volume)
    for place, hole in holes.items():
        volume[place][hole] = value


def even_slices(volume, at, notes):
    """(volume [slices, rows, columns], spacing in mm) with slices at equal distances, from positions ``at``.

    Slices that lie unevenly are resampled linearly to the smallest gap of at least half the median one; the
    last slice is repeated where that does not come out even.
    """
    gaps = np.diff(at)
    if np.abs(at - np.linspace(0, at[-1], len(at))).max() <= UNEVEN * gaps.mean():
        return volume, gaps.mean()
    step = gaps[gaps >= np.median(gaps) / 2].min()
    notes.append(f"uneven slice spacing, {gaps.min():.2f} to {gaps.max():.2f} mm, resampled to {step:.2f} mm")
    places = np.minimum(np.arange(int(at[-1] / step + 0.5) + 1) * step, at[-1])
    below = np.clip(np.searchsorted(at, places, side="right") - 1, 0, len(gaps) - 1)
    weights = ((places - at[below]) / gaps[below]).astype(np.float32)
    even = np.empty((len(places), *volume.shape[1:]), np.float32)
    for out, i, weight in zip(even, below, weights, strict=True):
        np.add(volume[i] * (1 - weight), volume[i + 1] * weight, out=out)
    return even, step


def affine_of(frame, across):
    """Voxel [x, y, z] -> mm to the right, front, head: float64 [4, 4].  across: from slice to slice, LPS."""
    _, _, *axes, height, width = frame.form.geometry
    affine = np.eye(4)
    affine[:3] = np.stack([np.multiply(axes[:3], width), np.multiply(axes[3:], height), across,
                           frame.position], axis=1)
    affine[:2] *= -1                                 # DICOM counts to the left and back
    return affine
