"""A procedural thorax: a CT volume of an invented patient, so that demo data and tests need no real one.

Organs are soft-edged implicit shapes in millimetres, painted one over another.  Axes are z (head to foot),
y (front to back) and x (the patient's right to left), with the origin in the middle of the volume.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

LABELS = {"outside": 0, "body": 1, "right_lung": 2, "left_lung": 3, "heart": 4, "spine": 5, "ribs": 6,
          "clavicles": 7, "scapulae": 8, "airway": 9}


def thorax_ct(rng, shape=(120, 72, 128), spacing=(3.0, 3.0, 3.0)):
    """(hu, labels) of one patient; every call draws another build, heart, rib cage and vessel tree.

    rng: np.random.Generator.  hu: int16 [D, H, W], Hounsfield units.  labels: uint8 [D, H, W] with values of
    LABELS; a lung's vessels are part of that lung.  The anatomy takes about 360 x 210 x 380 mm, of which the
    middle shape * spacing (mm) is seen.
    """
    patient = draw_patient(rng)
    z, y, x = (((np.arange(n, dtype=np.float32) - (n - 1) / 2) * step / patient["size"])
               for n, step in zip(shape, spacing, strict=True))
    grid = z[:, None, None], y[None, :, None], x[None, None, :]
    voxel = float(np.mean(spacing)) / patient["size"]
    cage = rib_cage_distance(patient, *grid)                                # [D, H, W]
    lungs = lung_occupancy(patient, cage, voxel, *grid)
    heart = heart_occupancy(patient, voxel, *grid)
    airway = airway_occupancy(patient, voxel, *grid)

    hu = np.full(shape, -1000, np.float32)
    labels = np.zeros(shape, np.uint8)
    paint_body(hu, labels, patient, voxel, *grid)
    paint_abdomen(hu, patient, cage, voxel, *grid)
    paint_lungs(hu, labels, rng, patient, lungs, voxel, *grid)
    paint(hu, heart, 45, labels, LABELS["heart"])
    paint(hu, great_vessels(patient, voxel, *grid), 48)
    paint_spine(hu, labels, patient, voxel, *grid)
    paint_ribs(hu, labels, patient, cage, voxel, *grid)
    paint_shoulders(hu, labels, patient, cage, voxel, *grid)
    paint(hu, airway, -990, labels, LABELS["airway"])
    hu += rng.standard_normal(shape, dtype=np.float32) * 12                # scanner noise
    return np.clip(hu, -1000, 1800).round().astype(np.int16), labels


def draw_patient(rng):
    """The measures that differ between patients: dict of floats, mm unless the name says otherwise."""
    right_dome = rng.uniform(52, 88)
    return {
        "size": rng.uniform(0.93, 1.06),                 # scale of the whole body
        "fat": rng.uniform(6, 26),                       # below the skin
        "width": rng.uniform(132, 148),                  # rib cage, half
        "depth": rng.uniform(84, 98),                    # rib cage, half
        "breast": rng.uniform(0.5, 1.0) * rng.integers(0, 2),        # 0: none
        "right_dome": right_dome,
        "left_dome": right_dome + rng.uniform(4, 18),
        "dome_drop": rng.uniform(34, 46),                # from the top of a dome to its rim
        "heart": rng.uniform(0.84, 1.16),                # scale
        "heart_tilt": rng.uniform(0.45, 0.8),            # radians
        "aorta": rng.uniform(0.85, 1.25),                # scale
        "scoliosis": rng.uniform(-5, 5),
        "vertebra": rng.uniform(23, 26),                 # height of body and disc
        "rib_pitch": rng.uniform(21, 25.5),
        "rib_phase": rng.uniform(0, 1),
        "rib_droop": rng.uniform(70, 105),               # from the spine to the front end
        "clavicle_rise": rng.uniform(6, 26),             # of the shoulder end above the sternal end
        "scapula": rng.uniform(98, 122),                 # distance of the inner border from the midline
        "bubble": rng.uniform(0, 1.2),                   # gas in the stomach, scale
        "lung_hu": rng.uniform(-880, -810),
        "markings": rng.uniform(0.8, 1.35),              # radius of lung vessels, scale
    }


def soft(distance, voxel):
    """Occupancy in [0, 1] from a signed distance (negative inside): edges are one voxel wide."""
    return np.clip(0.5 - distance / voxel, 0, 1)


def ellipsoid(z, y, x, center, radii):
    """Approximate signed distance to an ellipsoid; center and radii in the order z, y, x."""
    offsets = [(c - m) / r for c, m, r in zip((z, y, x), center, radii, strict=True)]
    return (np.sqrt(sum(offset ** 2 for offset in offsets)) - 1) * min(radii)


def tube(z, y, x, points, radii):
    """Signed distance to a chain of round cones through points (z, y, x) with the given radii."""
    nearest = np.inf
    for a, b, first, last in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
        axis = np.subtract(b, a).astype(np.float32)
        offset = [c - p for c, p in zip((z, y, x), a, strict=True)]
        along = np.clip(sum(o * d for o, d in zip(offset, axis, strict=True)) / (axis @ axis), 0, 1)
        gap = np.sqrt(sum((o - along * d) ** 2 for o, d in zip(offset, axis, strict=True)))
        nearest = np.minimum(nearest, gap - (first + along * (last - first)))
    return nearest


def paint(hu, occupancy, value, labels=None, label=0):
    """Blend ``value`` (a number or a volume) into ``hu`` in place where ``occupancy`` says; set the label."""
    hu += occupancy * (value - hu)
    if labels is not None:
        labels[np.broadcast_to(occupancy > 0.5, labels.shape)] = label


def rib_cage_distance(patient, z, y, x):
    """Signed distance to the outer face of the rib cage: a dome above, a barrel below."""
    t = np.clip((z + 148) / 225, 1e-4, 1)
    profile = np.sqrt(1 - (1 - t) ** 2) ** 0.85 * (1 - 0.08 * np.clip((z - 80) / 100, 0, 1))
    width, depth = patient["width"] * profile, patient["depth"] * profile
    y = y - 14 * (1 - t)                                                   # the apex lies towards the back
    radius = np.sqrt(x ** 2 + y ** 2)
    scaled = (np.abs(x / width) ** 2.4 + np.abs(y / depth) ** 2.4) ** (1 / 2.4)
    slope = np.gradient(width.ravel(), z.ravel()).reshape(width.shape)
    return (radius - radius / np.maximum(scaled, 1e-6)) / np.sqrt(1 + slope ** 2)


def diaphragm_height(patient, y, x):
    """z of the diaphragm below each point of the lungs, [1, H, W]: one dome per side, deepest at the back."""
    side = np.where(x < 0, patient["right_dome"], patient["left_dome"])
    rim = ((np.abs(x) - 62) / 74) ** 2 + ((y + 12) / 88) ** 2
    return side + patient["dome_drop"] * rim ** 1.2 + 30 * np.clip(y / 80, 0, 1.2) ** 2


def mediastinum_width(y, z):
    """Half the gap between the lungs: wide at the spine and the great vessels, narrow behind the sternum."""
    front = np.clip((y + 75) / 55, 0, 1)
    hila, inlet = np.exp(-((z + 30) / 45) ** 2), np.exp(-((z + 150) / 25) ** 2)
    return 8 + 13 * front * front * (3 - 2 * front) + 9 * hila + 5 * inlet


def lung_occupancy(patient, cage, voxel, z, y, x):
    """Occupancy of both lungs; the sign of x tells which one."""
    distance = np.maximum(cage + 9, z - diaphragm_height(patient, y, x))
    return soft(np.maximum(distance, mediastinum_width(y, z) - np.abs(x)), voxel)


def heart_occupancy(patient, voxel, z, y, x):
    """Ventricles with the apex to the left and below, right atrium, and the left atrial appendage."""
    scale, tilt = patient["heart"], patient["heart_tilt"]
    base = patient["left_dome"] + 8                                         # the heart rests on the diaphragm
    along = np.cos(tilt) * (x - 26) + np.sin(tilt) * (z - base + 44 * scale)
    across = -np.sin(tilt) * (x - 26) + np.cos(tilt) * (z - base + 44 * scale)
    ventricles = ellipsoid(across, y, along, (0, -24, 0), (47 * scale, 58 * scale, 64 * scale))
    atrium = ellipsoid(z, y, x, (base - 46 * scale, -12, -14), (46 * scale, 50 * scale, 33 * scale))
    appendage = ellipsoid(z, y, x, (base - 88 * scale, -12, 24), (30 * scale, 32, 24 * scale))
    return soft(np.minimum(np.minimum(ventricles, atrium), appendage), voxel)


def great_vessels(patient, voxel, z, y, x):
    """Occupancy of the aorta with its knob, the superior vena cava and the pulmonary trunks."""
    scale = patient["aorta"]
    aorta = tube(z, y, x, [(10, -15, -12), (-48, -18, -14), (-66, 4, 8), (-62, 30, 22), (-30, 48, 26),
                           (180, 46, 14)], [17, 17 * scale, 16 * scale, 17 * scale, 13 * scale, 11])
    cava = tube(z, y, x, [(-115, -12, -22), (20, -8, -24)], [9, 11])
    trunks = tube(z, y, x, [(-8, 16, -46), (-14, 4, -18), (-18, -8, 16), (-20, 16, 46)], [9, 12, 14, 10])
    return soft(np.minimum(np.minimum(aorta, cava), trunks), voxel)


def airway_occupancy(patient, voxel, z, y, x):
    """Occupancy of the trachea, which runs backwards and down to its fork, and of the main bronchi."""
    shift = patient["scoliosis"] * 0.5
    trachea = tube(z, y, x, [(-200, -16, shift), (-48, 22, -3)], [9, 9])
    right = tube(z, y, x, [(-48, 22, -3), (-20, 20, -36), (10, 22, -50)], [7.5, 6.5, 4])
    left = tube(z, y, x, [(-48, 22, -3), (-16, 22, 42), (8, 24, 54)], [6.5, 5.5, 3.5])
    return soft(np.minimum(np.minimum(trachea, right), left), voxel)


def paint_body(hu, labels, patient, voxel, z, y, x):
    """Skin, fat and muscle: trunk, shoulders sloping to the neck, and breasts."""
    shoulder = 1 / (1 + np.exp((z + 88) / 14))       # 0 on the trunk, 1 at the shoulders
    neck = 1 / (1 + np.exp((z + 158) / 7))
    width = patient["width"] + 26 + patient["fat"] + 44 * shoulder
    depth = patient["depth"] + 14 + 0.7 * patient["fat"] - 16 * shoulder
    width, depth = width + neck * (62 - width), depth + neck * (66 - depth)
    radius = np.sqrt(x ** 2 + y ** 2)
    scaled = (np.abs(x / width) ** 2.6 + np.abs(y / depth) ** 2.6) ** (1 / 2.6)
    skin = radius - radius / np.maximum(scaled, 1e-6)
    if patient["breast"]:
        for side in (-1, 1):
            breast = ellipsoid(z, y, x, (52, -patient["depth"] - 2, side * 84),
                               (62 * patient["breast"], 52 * patient["breast"], 60 * patient["breast"]))
            skin = np.minimum(skin, breast)
    paint(hu, soft(skin, voxel), -95, labels, LABELS["body"])
    paint(hu, soft(skin + patient["fat"], voxel), 40)


def paint_abdomen(hu, patient, cage, voxel, z, y, x):
    """Organs below the diaphragm, with gas in the stomach."""
    below = np.maximum(cage + 9, diaphragm_height(patient, y, x) - z)
    paint(hu, soft(below, voxel), np.where(x < 30, 58, 25))
    if patient["bubble"] > 0.3:
        size = patient["bubble"]
        center = (patient["left_dome"] + 16 + 17 * size, -6, 64)
        paint(hu, soft(ellipsoid(z, y, x, center, (15 * size, 26 * size, 30 * size)), voxel), -960)


def paint_lungs(hu, labels, rng, patient, lungs, voxel, z, y, x):
    """Air, denser towards the back, and the vessels that branch from the hila."""
    texture = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), 1.2) * 160
    paint(hu, lungs, patient["lung_hu"] + 0.35 * y + texture)
    labels[(lungs > 0.5) & (x < 0)] = LABELS["right_lung"]
    labels[(lungs > 0.5) & (x >= 0)] = LABELS["left_lung"]
    vessels = np.zeros(hu.size, np.float32)
    start = np.array([z.ravel()[0], y.ravel()[0], x.ravel()[0]])
    for side in (-1, 1):
        points, mass = vessel_tree(rng, side, patient["markings"], voxel)
        splat(vessels, hu.shape, (points - start) / voxel, mass / voxel ** 3)
    paint(hu, lungs * np.clip(vessels.reshape(hu.shape), 0, 1), 45)


def vessel_tree(rng, side, markings, voxel, generations=7):
    """Points [P, 3] (z, y, x, mm) that fill the vessels of one lung, and the volume (mm^3) each stands for.

    Trunks leave the hilum in all directions of the lung.  Each vessel forks in two, shorter and thinner,
    whose cross-sections add up to a little less than their parent's.
    """
    trunks = np.array([[-1, 0.1, 0.35], [-0.8, -0.5, 0.6], [-0.3, 0.5, 0.9], [0.15, -0.3, 1], [0.6, 0.5, 0.8],
                       [1, 0.1, 0.55], [1, 0.7, 0.3], [0.9, -0.4, 0.6]]) * [1, 1, side]
    direction = trunks / np.linalg.norm(trunks, axis=1, keepdims=True)
    tip = np.tile([-6.0, 16.0, side * 38.0], (len(trunks), 1)) + rng.normal(0, 3, (len(trunks), 3))
    length = rng.uniform(26, 40, len(trunks))
    radius = rng.uniform(3.6, 5.0, len(trunks)) * markings * np.where(trunks[:, 0] > 0, 1.1, 0.9)
    points, mass = [], []
    for _ in range(generations):
        steps = 4 * int(np.ceil(length.max() / voxel)) + 8
        along = (np.arange(steps) + 0.5) / steps
        sag = rng.normal(0, 0.06, (len(tip), 3)) * length[:, None]
        bend = np.sin(np.pi * along)[None, :, None] * sag[:, None]
        jitter = rng.normal(0, 1, (len(tip), steps, 3)) * radius[:, None, None] * 0.5
        path = tip[:, None] + along[None, :, None] * (direction * length[:, None])[:, None] + bend + jitter
        points.append(path.reshape(-1, 3))
        mass.append(np.repeat(np.pi * radius ** 2 * length / steps, steps))
        tip = np.repeat(tip + direction * length[:, None], 2, axis=0)
        direction = np.repeat(direction, 2, axis=0) + rng.normal(0, 0.42, (len(tip), 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = np.repeat(length, 2) * rng.uniform(0.6, 0.95, len(tip))
        radius = np.repeat(radius, 2) * rng.uniform(0.6, 0.8, len(tip))
    return np.concatenate(points), np.concatenate(mass)


def splat(volume, shape, indices, mass):
    """Add ``mass`` [P] to the flat ``volume`` at fractional ``indices`` [P, 3], shared by 8 voxels each."""
    low = np.floor(indices).astype(np.int64)
    share = indices - low
    for corner in np.ndindex(2, 2, 2):
        at = low + corner
        inside = ((at >= 0) & (at < shape)).all(axis=1)
        weight = np.where(corner, share, 1 - share).prod(axis=1) * mass
        volume += np.bincount(np.ravel_multi_index(at[inside].T, shape), weight[inside], volume.size)


def paint_spine(hu, labels, patient, voxel, z, y, x):
    """Vertebral bodies with discs between them, the arch behind, and the sternum in front."""
    x = x - patient["scoliosis"] * np.sin(z / 70)
    back = 56 + 7 * np.cos(z / 110)
    column = (np.sqrt((x / 20) ** 2 + ((y - back) / 16) ** 2) - 1) * 16
    disc = np.abs(np.mod(z / patient["vertebra"], 1) - 0.5) > 0.4
    column = np.broadcast_to(column, hu.shape)
    bone = np.where(disc, 70, np.where(column > -4, 330, 160))
    paint(hu, soft(column, voxel), bone, labels, LABELS["spine"])
    height = np.abs(np.mod(z / patient["vertebra"] + 0.3, 1) - 0.5) * patient["vertebra"]
    process = np.maximum(np.maximum(np.abs(x) - 4, np.abs(y - back - 34) - 16), height - 8)
    arch = np.maximum(np.maximum(np.abs(x) - 34 + np.abs(height), np.abs(y - back - 18) - 5), height - 6)
    paint(hu, soft(np.minimum(process, arch), voxel), 230, labels, LABELS["spine"])
    sternum = np.maximum(np.maximum(np.abs(x) - 17, np.abs(y + patient["depth"] * 0.9 - 0.12 * z) - 5),
                         np.abs(z + 35) - 80)
    paint(hu, soft(sternum, voxel), 170)


def paint_ribs(hu, labels, patient, cage, voxel, z, y, x):
    """Bands on the rib cage that fall from the spine to the front, where cartilage takes over."""
    angle = np.arctan2(np.abs(x), y)                 # 0 at the spine, pi at the sternum
    fall = patient["rib_droop"] * ((1 - np.cos(angle)) / 2) ** 1.15 + 8 * np.sin(angle) ** 2
    turn = (z - fall + 150) / patient["rib_pitch"] + patient["rib_phase"]
    height = np.abs(np.mod(turn, 1) - 0.5) * patient["rib_pitch"]           # mm from the middle of a rib
    distance = (np.sqrt((height / 7) ** 2 + ((cage + 4.5) / 4.6) ** 2) - 1) * 5
    bony = np.clip((2.45 - angle) / 0.12, 0, 1) * (turn < 12) * (turn > 0.3) * (np.abs(x) > 18)
    occupancy = soft(distance, voxel) * bony
    paint(hu, occupancy, np.where(distance > -2, 1150, 520), labels, LABELS["ribs"])
    paint(hu, soft(distance, voxel) * (1 - bony) * (angle >= 2.3) * (turn < 11), 90)


def paint_shoulders(hu, labels, patient, cage, voxel, z, y, x):
    """Clavicles, the plates of the scapulae, and the heads of the humeri."""
    rise = patient["clavicle_rise"]
    side = np.abs(x)
    clavicle = tube(z, y, side, [(-98, -74, 20), (-106 - 0.3 * rise, -80, 60), (-114 - 0.9 * rise, -52, 112),
                                 (-114 - rise, -36, 156)], [9.5, 7.2, 6.5, 8])
    shell = np.broadcast_to(soft(clavicle, voxel), hu.shape)
    paint(hu, shell, np.where(clavicle > -2.5, 1250, 600), labels, LABELS["clavicles"])
    inner = patient["scapula"] + 0.18 * np.maximum(z + 90, 0)
    outer = 172 - 0.5 * np.maximum(z + 110, 0)
    edge = np.maximum(np.maximum(inner - side, side - outer), np.abs(z + 55) - 72)
    plate = np.maximum(np.maximum(np.abs(cage - 13) - 2.6, edge), 20 - y)
    paint(hu, soft(plate, voxel), 650, labels, LABELS["scapulae"])
    paint(hu, soft(ellipsoid(z, y, side, (-118, -2, 182), (26, 24, 24)), voxel), 320)
