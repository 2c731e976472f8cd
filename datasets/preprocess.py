"""From a scan to the grid that all brain volumes share: 4 mm from slice to slice, 1 mm within a slice.

A grid is [D, H, W] with D across the slices.  Read as pictures the slices stand upright: the rows H of axial
slices run from front to back, those of coronal and sagittal ones from head to foot; the columns W run to the
patient's right, in sagittal slices from front to back.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from datasets.dicom import LOWEST_HU
from datasets.intensity import CT_WINDOWS, ct_background, ct_to_uint8, mri_background, mri_to_uint8, to_uint8
from datasets.study_modes import AIR, window_in
from datasets.tokens import TOKEN, token_background
from datasets.volumes import check_image, upright
from utils.config import BadFile

VIEWS = ("sagittal", "coronal", "axial")             # across the axes right, posterior, inferior


@dataclass
class Grid:
    """A volume on the common grid.

    data float32 [D, H, W] in the scan's units; view: a word of VIEWS; spacing: mm of D, H, W;
    affine float64 [4, 4]: index (d, h, w, 1) -> mm, RAS+; notes: what was repaired in the scan.
    """

    data: np.ndarray
    view: str
    spacing: tuple
    affine: np.ndarray
    notes: list


def preprocess(path, volume, mode, settings):
    """Bring a Volume onto the grid and to 8 bits -> (Grid, {image mode: uint8 [D, H, W]}, background).

    background: bool [D, H, W], True = background.  mode: "mri" | "ct".  path: below the raw folder; a CT that
    is not in Hounsfield units, but windowed by its sender, names its window there.
    settings: spacing (mm across slices, within), percentiles, mri_background, ct_background.
    Raises BadFile, beginning with the path, for what is no image, not in HU, without contrast or too small.
    """
    check_image(path, volume.data)
    low, high = volume.data.min(), volume.data.max()
    in_hu, window = low <= AIR, window_in(path)
    if mode == "ct" and not in_hu and window is None:
        raise BadFile(f"{path}: not in Hounsfield units ({low:g} to {high:g}), and no window is named there")
    grid = to_grid(path, upright(volume), settings["spacing"], LOWEST_HU if mode == "ct" else None)
    if mode == "mri":
        images = {"mri": mri_to_uint8(grid.data, *settings["percentiles"])}
        background = mri_background(grid.data, settings["mri_background"])
    elif in_hu:
        images = {name: ct_to_uint8(grid.data, name) for name in CT_WINDOWS}
        background = ct_background(grid.data, settings["ct_background"])
    else:
        images = {window: to_uint8(grid.data, low, high)}
        background = images[window] == images[window].min()
    if all(image.min() == image.max() for image in images.values()):
        raise BadFile(f"{path}: no contrast (values {low:g} to {high:g}, hardly any but one)")
    if token_background(torch.from_numpy(background)).all():
        raise BadFile(f"{path}: background in every token of {'x'.join(map(str, TOKEN))} voxels")
    return grid, images, background


def to_grid(path, volume, spacing, lowest=None):
    """An upright Volume on the common grid, as a Grid.

    Axes turned to right, posterior, inferior; resampled by a cubic spline, new voxel i at i * target / old
    spacing; cut about the centre to whole tokens.  spacing: target mm (across slices, within).
    lowest: values below it count as it, so that padding does not ring.  Values stay in the volume's range.
    Raises BadFile when less than a token is left.
    """
    data, affine = reorient(volume.data, volume.affine)
    old = np.linalg.norm(affine[:3, :3], axis=0)                                   # mm
    across = slice_axis(data.shape, old)
    order = (across, *(axis for axis in (2, 1, 0) if axis != across))              # of D, H, W
    target = (spacing[0], spacing[1], spacing[1])
    data = torch.from_numpy(np.array(data.transpose(order), np.float32, order="C"))
    if lowest is not None:
        data.clamp_(min=lowest)
    low, high = data.min(), data.max()
    # A hair more, for spacings that are stored with rounding errors.
    sizes = [int(n * old[axis] / mm + 1e-3) for n, axis, mm in zip(data.shape, order, target, strict=True)]
    kept = [n // token * token for n, token in zip(sizes, TOKEN, strict=True)]
    if 0 in kept:
        raise BadFile(f"{path}: too small ({'x'.join(map(str, sizes))} voxels of "
                      f"{'x'.join(f'{mm:g}' for mm in target)} mm; a token has {'x'.join(map(str, TOKEN))})")
    to_old = np.zeros((4, 4))                                     # index (d, h, w, 1) -> (x, y, z, 1)
    to_old[3, 3] = 1
    weights = []
    for k, axis in enumerate(order):
        step, first = target[k] / old[axis], (sizes[k] - kept[k]) // 2
        to_old[axis, k], to_old[axis, 3] = step, first * step
        weights.append(spline_weights(data.shape[k], step, first, kept[k]))
    data = weights[1] @ (data @ weights[2].T)                     # in plane first, where most voxels go
    data = (weights[0] @ data.flatten(1)).reshape(kept).clamp_(low, high)
    return Grid(data.numpy(), VIEWS[across], target, affine @ to_old, volume.notes)


def reorient(data, affine, codes="RPI"):
    """Flip and exchange axes until they run the way of ``codes`` (nibabel's letters) -> (view, affine)."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    back = nib.orientations.inv_ornt_aff(turn, data.shape)
    return nib.orientations.apply_orientation(data, turn), affine @ back


def slice_axis(shape, spacing):
    """The axis across the slices of a volume that runs right, posterior, inferior.

    The last when all spacings are equal (to 1 %); else the one with the largest spacing, or when two sizes
    are equal the one whose size is unique.
    """
    if max(spacing) <= 1.01 * min(spacing):
        return 2
    unique = [axis for axis in range(3) if list(shape).count(shape[axis]) == 1]
    return unique[0] if len(unique) == 1 else int(np.argmax(spacing))


def spline_weights(size, step, first, count):
    """Matrix float32 [count, size] that samples a line of ``size`` voxels at (first + i) * step.

    Cubic interpolating spline; beyond the ends the last voxel counts.  A spline is linear in the voxels and
    separable, so one matrix product per axis does what scipy.ndimage does voxel by voxel, faster.
    """
    weights = ndimage.affine_transform(np.eye(size), [step, 1.0], [first * step, 0.0], (count, size), order=3,
                                       mode="nearest")
    weights[np.abs(weights) < 1e-6] = 0              # beyond 10 voxels: an air of zeros remains one
    return torch.from_numpy(weights.astype(np.float32))
