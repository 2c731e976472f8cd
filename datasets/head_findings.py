"""What can be wrong in a head of head_phantom.py: a bleeding, a tumour, an infarct."""

from itertools import combinations

import numpy as np

from datasets.phantom import ellipsoid, soft
from datasets.waves import draw_waves, waves

FINDINGS = ("hemorrhage", "tumour", "infarct")
CLEARANCE = 10.0                                     # mm, least between two findings
APEX = (12.0, 4.0, 16.0)                             # z, y, |x| from where an infarct's territory spreads, mm


def draw_findings(rng, names):
    """{name: finding} for ``names`` of FINDINGS, clear of one another, each in one half of the cerebrum.

    A finding is a dict: center (z, y, x, mm), radius (mm), strength (0 to 1), bumps (waves of its outline);
    a tumour also has rim and oedema (mm), enhancement (0 to 1); an infarct apex, axis and angle (radians).
    """
    while True:
        findings = {name: draw_infarct(rng) if name == "infarct" else draw_mass(rng) for name in names}
        gaps = [np.linalg.norm(one["center"] - other["center"]) - one["radius"] - other["radius"]
                for one, other in combinations(findings.values(), 2)]
        if min(gaps, default=CLEARANCE) >= CLEARANCE:
            break
    return {name: {**finding, "strength": rng.uniform(0.75, 1), "bumps": draw_waves(rng, 6, 22.0)}
            for name, finding in findings.items()}


def draw_mass(rng):
    """Place and size of a bleeding or a tumour; the measures of a tumour."""
    side, azimuth, rise = rng.choice((-1, 1)), rng.uniform(0, np.pi), rng.uniform(0.0, 1.0)
    reach = rng.uniform(0.5, 0.75)                   # 0: middle of the head, 1: the brain's surface
    direction = np.array([np.sin(rise) * 72, -np.cos(rise) * np.cos(azimuth) * 80,
                          side * np.cos(rise) * np.sin(azimuth) * 66])
    center = reach * direction
    center[2] = side * max(abs(center[2]), 18)
    return {"center": center, "radius": rng.uniform(13, 23), "rim": rng.uniform(4, 7),
            "oedema": rng.uniform(5, 12), "enhancement": rng.uniform(0.2, 1)}


def draw_infarct(rng):
    """Territory of an artery: a cone from the middle of a hemisphere to the cortex."""
    side, azimuth, rise = rng.choice((-1, 1)), rng.uniform(-1.0, 1.2), rng.uniform(-0.1, 0.75)
    axis = np.array([np.sin(rise), np.cos(rise) * np.sin(azimuth), side * np.cos(rise) * np.cos(azimuth)])
    apex = np.array(APEX) * (1, 1, side)
    return {"apex": apex, "axis": axis, "center": apex + 38 * axis, "radius": 20.0,
            "angle": rng.uniform(0.42, 0.66)}


def mass_distance(finding, z, y, x):
    """Signed distance to a bumpy ball."""
    ball = ellipsoid(z, y, x, finding["center"], [finding["radius"]] * 3)
    return ball + 0.11 * finding["radius"] * waves(finding["bumps"], z, y, x)


def paint_hemorrhage(head, finding, brain, voxel, z, y, x):
    """Blood with a thin seam of oedema."""
    distance = np.maximum(mass_distance(finding, z, y, x), brain + 2)
    oedema = soft(distance - 4, voxel) * head.where("white", "grey")
    head.paint("oedema", oedema * 0.6)
    head.paint("blood", soft(distance, voxel) * finding["strength"])
    head.masks["hemorrhage"] = (oedema > 0.5) | (distance < 0)


def paint_tumour(head, finding, brain, voxel, z, y, x):
    """A mass with a rim that may enhance and a dead core, in white matter that is swollen around it."""
    distance = np.maximum(mass_distance(finding, z, y, x), brain + 2)
    reach = distance - finding["oedema"] * (1 + 0.5 * waves(finding["bumps"], 1.3 * y, 1.3 * x, 1.3 * z))
    oedema = soft(reach, voxel) * head.where("white")
    mass = soft(distance, voxel)
    head.paint("oedema", oedema * finding["strength"])
    head.paint("tumour", mass)
    head.paint("enhancing", mass * finding["enhancement"])
    head.paint("necrosis", soft(distance + finding["rim"], voxel) * finding["strength"])
    head.masks["tumour"] = (oedema > 0.5) | (distance < 0)


def paint_infarct(head, finding, brain, voxel, z, y, x):
    """A wedge of swollen cortex and white matter without contrast between them."""
    offset = [axis - c for axis, c in zip((z, y, x), finding["apex"].tolist(), strict=True)]
    along = sum(o * a for o, a in zip(offset, finding["axis"].tolist(), strict=True))
    across = np.sqrt(np.maximum(sum(o * o for o in offset) - along * along, 0))
    wedge = across * np.cos(finding["angle"]) - along * np.sin(finding["angle"])
    wedge = np.maximum(wedge + 1.5 * waves(finding["bumps"], z, y, x), 16 - along)
    territory = soft(wedge, voxel) * head.where("white", "grey")
    head.paint("infarct", territory * finding["strength"])
    head.masks["infarct"] = territory > 0.5


PAINT = {"hemorrhage": paint_hemorrhage, "tumour": paint_tumour, "infarct": paint_infarct}
