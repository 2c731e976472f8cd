"""Longitudinal X-ray pairs projected from chest CT volumes, with findings inserted in three dimensions.

Volumes are [D, H, W]: head to foot, front to back, the patient's right to left, with one spacing (mm) for all
axes.  A projection is then a frontal X-ray as it is hung: head up, the patient's right on the image's left.
"""

from pathlib import Path

import cc3d
import nibabel as nib
import numpy as np
from nibabel.processing import resample_to_output
from pydicom.misc import is_dicom
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.morphology import isotropic_closing, isotropic_erosion
from skimage.segmentation import expand_labels

from datasets.devices import draw_devices
from datasets.io import min_max, resize
from datasets.nuisance import change_appearance
from datasets.pair_files import write_cases
from datasets.pairs import clean_map
from datasets.volumes import read_dicom_series, read_nifti
from utils.config import BadFile, UserError

AIR = -1000                                          # HU


def read_ct(path, spacing):
    """A CT as float32 HU [D, H, W] in this module's axis order, resampled to ``spacing`` mm.

    path: a NIfTI file or a folder with one DICOM series; a tilted volume is set upright.  Raises BadFile when
    it is neither, is damaged, is not CT, or is not in Hounsfield units (no air: minimum above -500).
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file() and is_dicom(file)]
        if not files:
            raise BadFile(f"{path}: a folder with the DICOM slices of one CT series is due")
        volume = read_dicom_series(files)
    else:
        volume = read_nifti(path)
    if volume.modality == "MR" or min(volume.data.shape) < 8:
        shape = "x".join(map(str, volume.data.shape))
        raise BadFile(f"{path}: a CT volume is due, not {volume.modality or 'one'} of {shape} voxels")
    if volume.data.min() > -500:
        raise BadFile(f"{path}: not in Hounsfield units ({volume.data.min():g} to {volume.data.max():g})")
    image = nib.Nifti1Image(np.maximum(volume.data, AIR, dtype=np.float32), volume.affine)
    image = resample_to_output(image, spacing, order=1, mode="nearest")    # x to right, y to front, z to head
    return np.ascontiguousarray(np.asarray(image.dataobj, np.float32)[::-1, ::-1, ::-1].T)


def lung_mask_ct(hu, spacing):
    """The two lungs of a CT: uint8 [D, H, W], 0 elsewhere, 1 the right lung, 2 the left.

    Air inside the body is cut at the bronchi by an erosion; the two largest pieces are the lungs.  Each voxel
    then goes to its nearest piece, also of trachea and bowel.  Raises UserError when there are no two.
    """
    air = cc3d.connected_components(hu < -400, connectivity=6)
    outside = np.union1d(air[:, [0, -1]], air[:, :, [0, -1]])    # not the head end: airways reach it
    inside = ~np.isin(air, outside) & (air > 0)
    for radius in (8, 12, 16):                       # mm; a main bronchus has a radius of 6 to 8
        pieces = cc3d.connected_components(isotropic_erosion(inside, radius / spacing), connectivity=6)
        volumes = np.bincount(pieces[pieces > 0], minlength=3)
        first, second = np.argsort(volumes)[:-3:-1]
        if volumes[second] > max(0.1 * volumes[first], 30_000 / spacing ** 3):
            break
    else:
        raise UserError("no two lungs found; give a chest CT that shows both")
    grown = expand_labels(pieces, 30 / spacing) * inside
    closed = [isotropic_closing(grown == piece, 6 / spacing) for piece in (first, second)]
    masks = [cc3d.largest_k(~mask, k=1, connectivity=6) == 0 for mask in closed]       # holes filled
    masks.sort(key=lambda mask: np.nonzero(mask)[2].mean())
    return np.where(masks[0], 1, np.where(masks[1], 2, 0)).astype(np.uint8)


def draw_findings(rng, hu, lungs, spacing, settings):
    """Findings for one pair: list of (record, weight, value).

    record: dict(type, time "prior" | "current" | "both", and its measures) for params.json.  weight: float32
    [D, H, W] in [0, 1]; value: HU, a number or [D, H, W].  The finding replaces that share of what is there.
    """
    depth = ndimage.distance_transform_edt(lungs).astype(np.float32) * spacing        # mm below the pleura
    makers = {"consolidation": consolidation, "nodule": nodules, "effusion": effusion,
              "pneumothorax": pneumothorax, "cardiomegaly": cardiomegaly}
    findings = []
    for kind in [kind for kind, chance in settings["probabilities"].items() if rng.random() < chance]:
        both = rng.random() < settings["both_probability"]
        time = "both" if both else ("prior", "current")[rng.integers(2)]
        measures, weight, value = makers[kind](rng, hu, lungs, depth, spacing, settings)
        findings.append(({"type": kind, "time": time} | measures, weight, value))
    return findings


def balls(rng, lungs, centers, radii):
    """Soft union of balls (voxels) with an uneven rim, inside the lungs: float32 [D, H, W] in [0, 1]."""
    distance = np.full(lungs.shape, 2.0, np.float32)
    for center, radius in zip(centers, radii, strict=True):
        low = np.maximum(np.floor(center - radius - 2).astype(int), 0)
        high = np.clip(np.ceil(center + radius + 3).astype(int), low, lungs.shape)
        box = tuple(map(slice, low, high))
        grid = np.ogrid[box]
        gap = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, center, strict=True))) - radius
        distance[box] = np.minimum(distance[box], gap)
    rim = ndimage.gaussian_filter(rng.standard_normal(lungs.shape, dtype=np.float32), 1.5)
    return np.clip(0.5 - distance / 2 - 4 * rim * (distance < 2), 0, 1) * (lungs > 0)


def consolidation(rng, hu, lungs, depth, spacing, settings):
    """A cluster of balls: many small ones spread far, or few large ones; filled with a smooth texture."""
    count, count_max, radius, radius_max = rng.choice(settings["consolidation_clusters"])
    scale, shift = rng.choice(settings["consolidation_hu"]).tolist()
    height = np.ptp(np.nonzero(lungs.any((1, 2)))[0]) + 1.0                # voxels
    side = int(rng.integers(1, 3))
    count = int(rng.integers(count, count_max + 1))
    spread = rng.uniform(0.03, 0.05 + 0.03 * np.log1p(count)) * height
    centers = rng.choice(np.argwhere(lungs == side)) + rng.normal(0, spread, (count, 3))
    weight = balls(rng, lungs * (lungs == side), centers, rng.uniform(radius, radius_max, count) * height)
    texture = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), 2)
    value = np.maximum(hu, min_max(texture) * scale + shift)               # vessels stay
    return {"side": side, "balls": count, "hu": [shift, shift + scale]}, weight, value


def nodules(rng, hu, lungs, depth, spacing, settings):
    """One to three solid balls."""
    radii = rng.uniform(*settings["nodule_radius_mm"], rng.integers(1, 4))
    centers = [rng.choice(np.argwhere(depth > 0.5 * min(radius, depth.max()))) for radius in radii]
    weight = balls(rng, lungs, centers, radii / spacing)
    return {"radii_mm": radii.round(1).tolist()}, weight, np.maximum(hu, 40)


def effusion(rng, hu, lungs, depth, spacing, settings):
    """Fluid at the base of one upright lung, climbing along the pleura and at the back."""
    side = int(rng.integers(1, 3))
    rows, backs, _ = np.nonzero(lungs == side)
    share = rng.uniform(*settings["effusion_height"])
    level = rows.max() - share * np.ptp(rows)
    z, y, _ = np.ogrid[tuple(map(slice, hu.shape))]
    climb = (45 * np.exp(-depth / 9)) / spacing + 0.3 * (y - backs.mean())
    weight = np.clip((z - level + climb) / 3, 0, 1).astype(np.float32) * (lungs == side)
    return {"side": side, "height": round(share, 3)}, weight, np.float32(12)


def pneumothorax(rng, hu, lungs, depth, spacing, settings):
    """Air without vessels between the chest wall and one lung, widest at the apex."""
    side = int(rng.integers(1, 3))
    rows, _, columns = np.nonzero(lungs == side)
    z, _, x = np.ogrid[tuple(map(slice, hu.shape))]
    rim = rng.uniform(*settings["pneumothorax_rim_mm"])
    fall = np.clip(1 - (z - rows.min()) / np.ptp(rows), 0, 1)              # 1 at the apex, 0 at the base
    outward = (x - columns.mean()) * (1 if side == 2 else -1) / np.ptp(columns)
    width = rim * fall ** 0.7 * np.clip(0.4 + 2.5 * outward + 1.5 * (fall > 0.85), 0, 1)
    weight = np.clip((width - depth) / spacing + 0.5, 0, 1).astype(np.float32) * (lungs == side) * (width > 0)
    return {"side": side, "rim_mm": round(rim, 1)}, weight, np.float32(AIR)


def cardiomegaly(rng, hu, lungs, depth, spacing, settings):
    """The lower front of what lies between the lungs, grown into them, mostly to the left."""
    past_right = np.maximum.accumulate(lungs == 1, 2)
    before_left = np.maximum.accumulate(lungs[..., ::-1] == 2, 2)[..., ::-1]
    rows, backs, _ = np.nonzero(lungs)
    heart = past_right & before_left & (lungs == 0)
    heart[:int(np.quantile(rows, 0.45))] = False
    heart[:, int(np.quantile(backs, 0.7)):] = False
    growth = rng.uniform(*settings["cardiomegaly_growth_mm"])
    away = ndimage.distance_transform_edt(~heart, sampling=(3 * spacing, spacing, spacing))    # not upwards
    reach = np.where(lungs == 2, growth, 0.4 * growth)
    weight = np.clip((reach - away) / spacing + 0.5, 0, 1).astype(np.float32) * (lungs > 0)
    return {"growth_mm": round(growth, 1)}, weight, np.float32(45)


def draw_angles(rng, max_angle, max_sum, power):
    """Degrees about each axis, [3]: u^power * sign * max_angle, redrawn until |angles| sum to <= max_sum."""
    while True:
        angles = rng.random(3) ** power * rng.choice([-1, 1], 3) * max_angle
        if np.abs(angles).sum() <= max_sum:
            return angles


def rotate(volume, angles, order=1):
    """Volume [D, H, W] turned about its middle by ``angles`` (degrees about D, H, W); edges are continued."""
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix().T
    middle = (np.array(volume.shape) - 1) / 2
    return ndimage.affine_transform(volume, matrix, middle - matrix @ middle, order=order, mode="nearest")


def project_lungs(lungs, size, margin):
    """(shadows bool [2, size, size], box with ``margin`` voxels around them) of labels; see project."""
    edges = [(at.min(), at.max() + 1) for at in np.nonzero(lungs.any(1))]
    side = int(max(high - low for low, high in edges) + 2 * margin)
    box = *(round((low + high - side) / 2) for low, high in edges), side
    rays = [project(np.where(lungs == label, 0, AIR), size, box) for label in (1, 2)]
    return np.stack(rays) > 500, box                 # half a voxel of lung


def project(hu, size, box):
    """Frontal X-ray of a volume: ray sums of HU above air, front to back.  float32 [size, size].

    box: square (top, left, side) of the [D, W] plane; where it reaches outside, the edge is continued.
    """
    rays = (np.maximum(hu, AIR) - AIR).sum(1, dtype=np.float32)            # [D, W]
    top, left, side = box
    rays = np.pad(rays, side, mode="edge")[top + side:top + 2 * side, left + side:left + 2 * side]
    return resize(rays, (size, size))


def difference_target(current, registered, lungs):
    """The target map: minmax(current) - minmax(registered prior) where it is a true change in the lungs.

    current, registered: raw projections [S, S] in one pose; lungs: bool [S, S].  Zero where the sign differs
    from the raw difference, and where it is faint or small (pairs.clean_map).  float32 in [-1, 1].
    """
    diff = min_max(current) - min_max(registered)
    return clean_map(np.where(lungs & (np.sign(diff) == np.sign(current - registered)), diff, 0))


def make_ct_pair(hu, spacing, rng, size, settings, lungs=None):
    """One pair projected from a CT: dict(prior, current, diff: float32 [size, size]; params: dict for JSON).

    hu: [D, H, W] in HU, spacing in mm for all axes; lungs: its lung_mask_ct, if known.  prior and current are
    in [0, 1], each in a pose and appearance of its own; diff is in [-1, 1] in the pose of current.  settings:
    probabilities {kind of finding: probability}, both_probability, consolidation_clusters, consolidation_hu,
    nodule_radius_mm, effusion_height, pneumothorax_rim_mm, cardiomegaly_growth_mm; max_angle, max_angle_sum
    (degrees), angle_power; margin_mm; devices (probability), exposure, local_contrast, noise, blur.
    """
    lungs = lung_mask_ct(hu, spacing) if lungs is None else lungs
    hu = np.maximum(hu, AIR).astype(np.float32)
    findings = draw_findings(rng, hu, lungs, spacing, settings)
    volumes = {"prior": hu.copy(), "current": hu.copy()}
    for record, weight, value in findings:
        for time in ("prior", "current") if record["time"] == "both" else (record["time"],):
            volumes[time] += weight * (value - volumes[time])
    pair, params = {}, {"findings": [record for record, _, _ in findings], "angles_deg": {}, "devices": {}}
    for time in ("prior", "current"):
        angles = draw_angles(rng, settings["max_angle"], settings["max_angle_sum"], settings["angle_power"])
        margin = round(settings["margin_mm"] / spacing)
        shadows, box = project_lungs(rotate(lungs, angles, order=0), size, margin)
        raw = project(rotate(volumes[time], angles), size, box)
        pair[time], params["devices"][time] = finish(min_max(raw), shadows, rng, settings)
        params["angles_deg"][time] = angles.round(2).tolist()
    registered = project(rotate(volumes["prior"], angles), size, box)     # the pose of current, drawn last
    pair["diff"] = difference_target(raw, registered, shadows.any(0))
    return {**pair, "params": params}


def finish(image, lungs, rng, settings):
    """(image, devices): tubes and leads drawn over a projection, then its exposure; lungs: bool [2, S, S]."""
    devices = []
    if rng.random() < settings["devices"]:
        brightness, devices = draw_devices(lungs, rng)
        image = image + (1 - image) * brightness
    names = ("exposure", "local_contrast", "noise", "blur")
    return change_appearance(image, rng, *(settings[name] for name in names))[0], devices


def prepare_volume(path, size, settings):
    """(hu, lungs) of a file at settings["spacing_mm"].  Raises BadFile when it is no chest CT."""
    hu = read_ct(path, settings["spacing_mm"])
    try:
        return hu, lung_mask_ct(hu, settings["spacing_mm"])
    except UserError as error:
        raise BadFile(f"{path}: {error}") from error


def make_from_volume(prepared, rng, size, settings):
    """make_ct_pair for a volume that prepare_volume has read."""
    return make_ct_pair(prepared[0], settings["spacing_mm"], rng, size, settings, lungs=prepared[1])


def write_ct_pairs(sources, output, per_volume, size, seed, workers, settings):
    """pair_files.write_cases for (patient, path of a CT); settings: make_ct_pair's and spacing_mm."""
    return write_cases(sources, output, per_volume, size, seed, workers, settings,
                       prepare_volume, make_from_volume)
