"""Pairs of X-rays with a known difference map, made from single chest X-rays.

Findings are drawn into the prior, the current image or both.  Each image then gets its own pose, breath,
devices, exposure, local contrast, blur and noise.  The target is the clean current minus the clean prior,
both in the pose of the current image: findings are in it; pose, devices and appearance are not.
"""

import numpy as np
from scipy import ndimage

from datasets.devices import draw_devices
from datasets.findings import FINDINGS
from datasets.io import letterbox, min_max, read_image, resize
from datasets.longitudinal import normalise_raw
from datasets.lungs import lung_mask
from datasets.nuisance import change_appearance, draw_pose, pose_grid, warp
from datasets.pair_files import write_cases
from utils.config import BadFile

FINDING_PROBABILITIES = {"nodules": 0.3, "consolidation": 0.35, "effusion": 0.25, "pneumothorax": 0.15,
                         "cardiomegaly": 0.15}
TIMES = {"prior": 0.30, "current": 0.35, "changed": 0.20, "same": 0.15}     # of a finding in a changed pair
SMALLEST_CHANGE = 0.015                             # of the [0, 1] image; anything less is zero in the target
SMALLEST_AREA = 50 / 512 ** 2                       # of the image; smaller components are zero in the target


def make_pair(image, rng, size, *, prepared=None, findings=None, unchanged=0.2, rotation=5.0, shift=0.03,
              scale=0.05, breath=0.035, bend=0.004, exposure=0.25, local_contrast=0.4, noise=0.015, blur=0.7,
              devices=0.5):
    """One pair with its difference map from one frontal X-ray.

    image: float [H, W], any range.  rng: np.random.Generator.  prepared: what prepare_image gives.
    findings: {word of FINDINGS: probability}.  unchanged: probability of a pair in which no finding differs.
    rotation (degrees), shift, breath, bend (parts of the longer side), scale (of the logarithm): limits of
    each image's pose, see nuisance.draw_pose.  exposure, local_contrast, noise, blur: limits of its looks,
    see nuisance.change_appearance.  devices: probability that an image shows any.
    Returns dict(prior, current: float32 [size, size] in [0, 1]; diff: float32 [size, size] in [-1, 1],
    current minus prior in the frame of current; params: dict for JSON).
    """
    base, lungs, method = prepared or prepare_image(image, size)
    is_changed = bool(rng.random() >= unchanged)
    plan = draw_plan(rng, FINDING_PROBABILITIES if findings is None else findings, is_changed)
    clean = {time: draw_findings(base, lungs, plan, time) for time in ("prior", "current")}
    posed, params = {}, {"changed": is_changed, "lungs": method, "pose": {}, "devices": {}, "appearance": {}}
    device_seed = rng.integers(2 ** 31)              # often the same tube lies in both images
    for time in ("prior", "current"):
        pose = draw_pose(rng, rotation, shift, scale, breath)
        grid = pose_grid(base.shape, lungs, pose, bend)
        picture, names = clean[time][0], []
        seed = device_seed if rng.random() < 0.5 else rng.integers(2 ** 31)
        if rng.random() < devices:
            brightness, names = draw_devices(lungs, np.random.default_rng(seed))
            picture = picture + (1 - picture) * brightness
        picture = warp(picture, grid)
        picture, appearance = change_appearance(picture, rng, exposure, local_contrast, noise, blur)
        posed[time] = letterbox(min_max(picture), size)[0]
        params["pose"][time], params["devices"][time], params["appearance"][time] = pose, names, appearance
    diff = clean_map(warp(clean["current"][0] - clean["prior"][0], grid))       # the last grid is current's
    params["findings"] = [describe(finding, after - before, grid) for finding, before, after
                          in zip(plan, clean["prior"][1], clean["current"][1], strict=True)]
    return {**posed, "diff": letterbox(diff, size)[0], "params": params}


def prepare_image(image, size):
    """(base float32 [h, w] in [0, 1], lungs bool [2, h, w], how found); the longer of h, w is ``size``."""
    factor = size / max(image.shape)
    base = normalise_raw(resize(image, [max(1, round(side * factor)) for side in image.shape]))
    lungs, method = lung_mask(base)
    return base, lungs, method


def draw_plan(rng, probabilities, is_changed):
    """Findings of one pair: dicts of kind, when, seed, and [size, strength] or None in prior and current."""
    kinds = [kind for kind, probability in probabilities.items() if rng.random() < probability]
    if is_changed and not kinds:
        share = np.array(list(probabilities.values()), float)
        kinds = [str(rng.choice(list(probabilities), p=share / share.sum()))]
    plan = []
    for kind in kinds:
        when = str(rng.choice(list(TIMES), p=list(TIMES.values()))) if is_changed else "same"
        plan.append(plan_finding(rng, kind, when))
    if is_changed and all(finding["when"] == "same" for finding in plan):
        plan[0] = plan_finding(rng, plan[0]["kind"], str(rng.choice(["prior", "current"])))
    return plan


def plan_finding(rng, kind, when):
    """One entry of a plan.  A finding that "changed" is 1.4 to 2.2 times denser, and larger, at one time."""
    first = [float(rng.uniform(0.8, 1.15)), float(rng.uniform(0.8, 1.2))]
    growth = float(rng.uniform(1.4, 2.2))
    other = [first[0] / growth ** 0.7, first[1] / growth]
    prior, current = (first, other) if rng.random() < 0.5 else (other, first)
    if when != "changed":
        prior, current = (first if when in (time, "same") else None for time in ("prior", "current"))
    seed = int(rng.integers(2 ** 31))
    return {"kind": kind, "when": when, "seed": seed, "prior": prior, "current": current}


def draw_findings(base, lungs, plan, time):
    """The base image with the findings of one time: (image float32 [h, w], the change by each finding)."""
    picture, changes = base, []
    for finding in plan:
        change = np.zeros_like(base)
        if finding[time] is not None:
            extent, strength = finding[time]
            change = FINDINGS[finding["kind"]](picture, lungs, np.random.default_rng(finding["seed"]),
                                               size=extent, strength=strength)
        drawn = np.clip(picture + change, 0, 1)
        changes.append(drawn - picture)
        picture = drawn
    return picture, changes


def clean_map(diff):
    """Zero what is too faint to see and components that are too small; float32 [H, W] in [-1, 1]."""
    diff = np.where(np.abs(diff) < SMALLEST_CHANGE, 0, diff).clip(-1, 1).astype(np.float32)
    labels, count = ndimage.label(diff)
    if count:
        small = np.bincount(labels.ravel()) <= SMALLEST_AREA * max(diff.shape) ** 2
        diff[small[labels]] = 0
    return diff


def describe(finding, change, grid):
    """What params.json says of one finding; its centre is in the current image, in pixels (row, column)."""
    change = clean_map(warp(change, grid))
    mean = float(change[change != 0].mean()) if change.any() else 0.0
    direction = {"prior": "resolved", "current": "new", "same": "unchanged"}.get(finding["when"])
    if direction is None:
        direction = "grown" if finding["current"][0] > finding["prior"][0] else "shrunk"
    centre = [round(float(at), 1) for at in ndimage.center_of_mass(np.abs(change))] if change.any() else None
    return {**finding, "direction": direction, "sign": int(np.sign(mean)), "mean": mean, "centre": centre,
            "area": int(np.count_nonzero(change))}


def write_pairs(sources, output, per_image, size, seed, workers, settings):
    """Write ``per_image`` case folders for each (patient, path); returns dict(made, kept, bad: counts).

    settings: keyword arguments of make_pair.  Interruption, bad files, errors: see pair_files.write_cases.
    """
    return write_cases(sources, output, per_image, size, seed, workers, settings, prepare_file,
                       make_from_prepared)


def prepare_file(path, size, settings):
    """prepare_image of a file.  Raises BadFile when it is unreadable, constant, or below 64 pixels a side."""
    image = read_image(path)
    if min(image.shape) < 64:
        raise BadFile(f"{path}: {image.shape[0]} x {image.shape[1]} pixels, too small for an X-ray")
    base, lungs, method = prepare_image(image, size)
    if not base.any():
        raise BadFile(f"{path}: the image is constant")
    return base, lungs, method


def make_from_prepared(prepared, rng, size, settings):
    """make_pair for an X-ray that prepare_file has read."""
    return make_pair(None, rng, size, prepared=prepared, **settings)
