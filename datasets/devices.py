"""Tubes, lines, leads and electrodes on a chest X-ray: things that a difference map must not report."""

import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from datasets.findings import extent


def draw_devices(lungs, rng):
    """1 to 3 devices placed by the lungs.

    Returns (brightness float32 [H, W] in [0, 1], names).  brightness: how far each pixel moves towards white.
    """
    box = extent(lungs.any(0))
    kinds = rng.choice(list(DEVICES), size=rng.integers(1, 4), replace=False, p=(0.2, 0.2, 0.25, 0.25, 0.1))
    brightness = np.zeros(lungs.shape[1:], np.float32)
    for kind in kinds:
        brightness = np.maximum(brightness, DEVICES[kind](lungs.shape[1:], box, rng))
    return brightness, [str(kind) for kind in kinds]


def tracheal_tube(shape, box, rng):
    """Two walls along the trachea, ending above the carina."""
    middle = rng.uniform(0.46, 0.52)
    tip = rng.uniform(0.1, 0.22)
    path = place(box, [(middle + rng.normal(0, 0.015), -0.35), (middle, -0.1), (middle, tip)])
    return draw_tube(shape, path, width=rng.uniform(2.0, 3.0), wall=True) * rng.uniform(0.25, 0.5)


def gastric_tube(shape, box, rng):
    """A thin tube down the midline that turns left below the diaphragm."""
    middle = rng.uniform(0.47, 0.53)
    wander = rng.normal(0, 0.01, 4)
    path = place(box, [(middle + wander[0], -0.35), (middle + wander[1], 0.2), (middle + wander[2], 0.6),
                       (middle + 0.02 + wander[3], 0.9), (rng.uniform(0.56, 0.72), rng.uniform(1.0, 1.2))])
    return draw_tube(shape, path, width=rng.uniform(0.8, 1.3)) * rng.uniform(0.3, 0.7)


def central_line(shape, box, rng):
    """A thin line from the neck or the armpit into the superior vena cava."""
    start = ((0.33, -0.2), (0.38, -0.25), (0.05, 0.12), (0.95, 0.1))[rng.integers(4)]
    bend = (0.40, -0.02) if start[0] < 0.5 else (0.60, 0.0)
    path = place(box, np.array([start, bend, (0.43, 0.15), (rng.uniform(0.41, 0.46), rng.uniform(0.3, 0.45))])
                 + rng.normal(0, 0.015, (4, 2)))
    return draw_tube(shape, path, width=rng.uniform(0.6, 1.0)) * rng.uniform(0.25, 0.6)


def monitor_leads(shape, box, rng):
    """1 to 4 electrodes on the skin, each with a wire that leaves the picture."""
    drawn = np.zeros(shape, np.float32)
    for _ in range(rng.integers(1, 5)):
        x = rng.choice((rng.uniform(-0.05, 0.3), rng.uniform(0.7, 1.05)))
        end = np.array([x, rng.uniform(-0.1, 1.0)])
        away = np.array([rng.choice((-0.5, 1.5)), rng.uniform(-0.3, 1.3)])
        path = place(box, [end, end + 0.35 * (away - end) + rng.normal(0, 0.12, 2),
                           end + 0.7 * (away - end) + rng.normal(0, 0.12, 2), away])
        wire = draw_tube(shape, path, width=rng.uniform(0.5, 1.1)) * rng.uniform(0.25, 0.6)
        row, column = path[0]
        radius = rng.uniform(2.5, 5.0) * max(shape) / 256
        rows, columns = np.ogrid[:shape[0], :shape[1]]
        away_from = np.hypot(rows - row, columns - column)
        disc = np.clip(radius - away_from, 0, 1) * rng.uniform(0.15, 0.5)
        snap = np.clip(0.4 * radius - away_from, 0, 1) * rng.uniform(0.4, 0.9)
        drawn = np.maximum.reduce([drawn, wire, disc, snap])
    return drawn


def pacemaker(shape, box, rng):
    """A box below the left or right clavicle with a lead into the heart."""
    x = rng.choice((rng.uniform(0.80, 0.95), rng.uniform(0.05, 0.2)), p=(0.75, 0.25))
    path = place(box, [(x, rng.uniform(0.0, 0.12)), (0.5 + 0.4 * (x - 0.5), 0.0), (0.46, 0.2), (0.44, 0.6),
                       (rng.uniform(0.5, 0.62), rng.uniform(0.75, 0.85))])
    lead = draw_tube(shape, path, width=rng.uniform(0.8, 1.2)) * rng.uniform(0.5, 0.9)
    (row, column), radius = path[0], rng.uniform(9, 13) * max(shape) / 256
    rows, columns = np.ogrid[:shape[0], :shape[1]]
    body = ((rows - row) / radius) ** 4 + ((columns - column) / (0.85 * radius)) ** 4
    return np.maximum(lead, np.clip((1 - body) * 0.3 * radius, 0, 1) * rng.uniform(0.7, 1.0))


DEVICES = {
    "tracheal_tube": tracheal_tube,
    "gastric_tube": gastric_tube,
    "central_line": central_line,
    "monitor_leads": monitor_leads,
    "pacemaker": pacemaker,
}


def place(box, points):
    """Points (x, y) over the box of the lungs -> (row, column) in pixels, [K, 2]."""
    top, bottom, left, right = box
    x, y = np.asarray(points, float).T
    return np.stack([top + y * (bottom - top), left + x * (right - left)], 1)


def draw_tube(shape, path, width, wall=False):
    """A smooth curve through ``path`` [K, 2], as brightness [H, W] with peak 1.

    width: standard deviation of its profile in pixels of a 256-pixel image; wall: bright borders, hollow
    inside.
    """
    scale = max(shape) / 256
    curve = make_interp_spline(np.linspace(0, 1, len(path)), path, k=min(3, len(path) - 1))
    length = int(4 * np.linalg.norm(np.diff(path, axis=0), axis=1).sum()) + 2
    points = curve(np.linspace(0, 1, length))
    whole = np.floor(points).astype(int)
    part = points - whole
    line = np.zeros(shape, np.float32)
    for down in (0, 1):                              # each point is shared by the four pixels around it
        for right in (0, 1):
            row, column = whole[:, 0] + down, whole[:, 1] + right
            inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
            share = np.abs(1 - down - part[:, 0]) * np.abs(1 - right - part[:, 1])
            np.add.at(line, (row[inside], column[inside]), share[inside])
    profile = ndimage.gaussian_filter(line, width * scale)
    if wall:
        profile = np.maximum(profile - 0.5 * ndimage.gaussian_filter(line, 0.5 * width * scale), 0)
    return profile / max(float(profile.max()), 1e-6)
