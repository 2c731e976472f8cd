"""A procedural spine from the skull's base to the sacrum, with the cord, its lesions and the organs in front.

An invented patient is painted as one tissue per voxel on a lattice, from which demo_spine.py cuts the series.
Coordinates are DICOM's in mm: z (to the head; 0 at the base of the dens), y (to the back; 0 near the canal),
x (to the patient's left).  Most shapes follow the canal's curve.
"""

import numpy as np
from scipy.interpolate import CubicSpline, PchipInterpolator

from datasets.waves import draw_waves, waves

TISSUES = ("air", "skin", "fat", "muscle", "ligament", "cortex", "marrow", "nucleus", "dry", "annulus",
           "csf", "white", "grey", "lesion", "root", "vessel", "vein", "gland", "mucosa", "lung", "kidney",
           "pyramid", "liver", "bowel", "brain", "gristle")
CORD = ("white", "grey", "lesion")                   # below the foramen magnum
# Heights in mm of the bodies of C2 to C7, T1 to T12, L1 to L5, S1 to S5, and of the discs below them.
BODIES = np.array([20, 14, 13, 13, 13, 14, *np.linspace(16, 24, 12), 26, 27, 28, 28, 28, 27, 24, 20, 17, 15])
DISCS = np.array([5, 5.3, 5.3, 5.5, 5.5, 4.5, *np.linspace(4, 6.5, 12), 8, 9, 10.5, 11, 10, 2, 1.5, 1, 1, 0])
MIDDLES = -(np.cumsum(BODIES + DISCS) - DISCS - BODIES / 2)              # z
# Of each field of view its middle, z and y, and the heights between which the cord may have lesions.
REGIONS = {"cervical": (-48, -14, -112, -8), "thoracic": (-270, -16, -360, -180),
           "lumbar": (-500, -26, -434, -408)}
# The canal's curve: z, and y of a spine of usual bends.
CURVE = ((60, -11), (20, 0), (-55, -5), (-120, 3), (-190, 17), (-265, 23), (-360, 14), (-440, 0), (-520, -9),
         (-575, -2), (-605, 8), (-650, 32), (-690, 46), (-740, 44))
# z, and in mm there: depth and width of the body, half the canal (back, side), the part of it that the sac
# fills, half the cord (back, side), length and slant of the spinous process, reach of the transverse one.
SHAPE = np.array("""
    -710 12 40 3.5 8.0 .40 4.2 4.9  5 .3  5     -620 26 60 7.0 14.0 .62 4.2 4.9  8 .3  8
    -595 33 52 8.4 13.5 .7 4.2 4.9 24 .3 46     -540 34 49 8.4 12.5 .84 4.2 4.9 30 .2 44
    -440 31 42 8.6 11.5 .8 4.2 4.9 30 .2 40     -400 29 38 8.6 10.5 .84 4.2 4.9 26 .7 28
    -265 24 28 7.8 8.8 .84 3.4 4.4 28 1.5 32    -120 17 26 7.5 11.5 .86 3.9 6.0 32 .6 34
    -75 16 20 7.5 12.5 .88 4.1 6.9 20 .5 29     -15 16 18 8.2 12.5 .90 4.0 6.0 16 .3 27
    25 17 19 9.0 13.0 .94 4.9 5.8 14 0 24""".split(), np.float32).reshape(-1, 11)
# Tissue, "." once or "|" on both sides, and its shape: points z,v,u,deep,wide of a column (see Body.column),
# or an ellipsoid z,v,u,high,deep,wide.  "bone" has marrow in it, "belly" is muscle in a sheath of fat.
MUSCLES = """
belly | 18,34,10,18,10 -110,27,11,18,11 -200,27,13,13,12 -420,28,14,14,13 -600,26,15,15,14 -660,22,13,6,8
belly | 15,38,26,13,13 -60,30,28,14,15 -130,34,30,12,18 -250,30,34,12,22 -420,29,39,18,22 -650,20,26,6,12
belly | 0,6,40,16,10 -60,6,37,17,14 -120,6,42,18,20
belly | 20,20,58,16,8 -50,-8,50,12,8 -110,-45,22,7,13
belly | -70,48,30,5,24 -120,47,48,7,50 -200,46,60,7,60 -330,46,40,4,34
belly | -425,-16,27,9,6 -500,-20,37,18,14 -580,-24,46,22,20 -720,-60,56,20,20
belly | -590,5,105,30,30 -740,5,85,40,55
"""
LUNGS = "-122,-20,38,9,9 -145,-9,56,34,32 -200,-42,68,66,48 -300,-52,76,80,58 -385,-35,80,64,56 -425,8,84,9,9"
CAVITY = f"""
fat . -118,-8,0,8,9 -160,-28,0,68,140 -265,-60,0,98,135 -520,-43,0,82,115 -740,-75,0,90,99
ribs | {LUNGS}
"""
ORGANS = f"""
cortex . 62,14,0,50,70,66
csf . 62,14,0,45,65,61
brain . 62,17,0,42,60,57
csf . 15,2,0,9,12 42,-3,0,16,20 75,-8,0,16,18
bone . 75,-36,0,12,14 45,-30,0,7,15 24,-13,0,5,10
brain . 52,-7,0,18,13,17
mucosa . 60,-52,0,14,24 18,-44,0,14,18 -40,-32,0,8,16 -75,-36,0,9,14
air . 58,-62,0,26,14 20,-44,0,10,11 -6,-36,0,5,8 -58,-40,0,6,8
muscle . -15,-68,0,24,25,22
bone | 20,-40,46,13,5 -30,-50,44,17,6 -42,-75,26,12,8
bone . -36,-90,0,13,7,18
gristle . -60,-48,0,11,15 -92,-44,0,10,12 -240,-32,0,9,10
air . -58,-42,0,7,6 -74,-47,0,6,4 -92,-44,0,8,8 -245,-32,0,7,8
gland | -98,-42,16,22,10,8
mucosa . -84,-31,3,3,7 -240,-22,4,4,7 -400,-50,8,5,8
vessel | 20,-22,30,3,3 -60,-32,27,3.5,3.5 -140,-46,16,4,4
vein | 20,-18,38,4,5 -60,-28,36,4,6 -140,-46,28,6,7
lung | {LUNGS}
vessel . -205,-60,8,18,13 -228,-36,12,24,12 -245,-24,18,12,12 -400,-40,12,11,11 -565,-46,2,8,9
muscle . -310,-88,14,55,44,46
vessel . -300,-80,8,34,26,30
vein . -430,-48,-14,8,11 -575,-38,-13,7,11
liver . -410,-75,-75,75,75,72
bowel . -470,-92,12,29,24,26
bowel | -482,-98,46,27,24,28
bowel . -525,-102,18,32,26,30
fat | -460,-20,66,72,40,38
kidney | -462,-22,62,54,27,27
pyramid | -462,-25,58,42,19,18
bone | -585,-15,92,24,7 -640,2,66,32,11 -700,-10,70,34,14
marrow | -604,-14,28,14,22 -640,0,34,14,24 -680,6,24,8,14
"""
LAYERS = {"bone": (("cortex", 0), ("marrow", -2)), "belly": (("fat", 1), ("muscle", 0)),
          "ribs": (("cortex", 7),)}                  # and by how many mm each is larger than the shape
# Outline of the body: z, v, half its depth and width, and mm of fat under the skin.
TRUNK = np.array([
    (60, -6, 93, 74, 7), (12, -12, 86, 70, 6), (-25, -17, 82, 64, 5), (-50, -6, 66, 59, 5),
    (-90, -1, 62, 61, 5), (-118, -8, 70, 112, 6), (-160, -28, 92, 165, 8), (-265, -60, 122, 160, 9),
    (-420, -52, 118, 150, 12), (-520, -43, 112, 145, 14), (-740, -75, 120, 165, 14)], np.float32)


def draw_spine(rng, region, lesions=0):
    """The measures that differ between patients: dict; mm unless the name says otherwise.

    region: a name in REGIONS.  lesions: how many the cord has, within the field of view of that region.
    """
    *_, low, high = REGIONS[region]
    places = rng.permutation(np.linspace(low, high, 2 * max(lesions, 1) + 1)[1::2])[:lesions]
    return {
        "region": region, "scale": rng.uniform(0.92, 1.07), "bends": rng.uniform(0.7, 1.3),
        "lean": rng.normal(0, 3), "fat": rng.uniform(0.7, 1.5), "canal": rng.uniform(0.92, 1.08),
        "cord": rng.uniform(0.94, 1.06), "conus": rng.uniform(-470, -448),
        "dry": rng.random(len(BODIES)) < rng.uniform(0.05, 0.5),              # discs that have lost water
        "bulge": np.where(rng.random(len(BODIES)) < 0.15, rng.uniform(0.1, 0.22, len(BODIES)), 0.02),
        "strands": rng.uniform((-0.75, 0.0), (0.75, 0.8), (16, 2)),           # the cauda's roots, x and y
        "septa": draw_waves(rng, 9, 17.0),                                    # of fat in the muscles
        "lesions": [(z, *rng.uniform((-0.6, -0.5), (0.6, 0.6)), rng.uniform(5, 14), rng.uniform(0.35, 0.6))
                    for z in places],                # z, x and y in the cord, half length, radius in the cord
    }


class Body:
    """A patient on a lattice.

    labels: uint8 [Z, Y, X], numbers in TISSUES, at first air.  z [Z, 1, 1], y [1, Y, 1]: mm.  u [Z, 1, X]: mm
    to the left of the spine.  v [Z, Y, 1]: mm behind the canal's curve, at the same height.
    """

    def __init__(self, middle, extent, step, bends=0.0, lean=0.0):
        """middle, extent: z, y, x of the lattice in mm; step: mm.  bends, lean: see draw_spine."""
        z, y, x = (at + np.arange(-(n := int(length / step / 2)), n + 1, dtype=np.float32) * np.float32(step)
                   for at, length in zip(middle, extent, strict=True))
        self.corner, self.step = np.array([z[0], y[0], x[0]]), step
        self.z, self.y = z[:, None, None], y[:, None]
        self.curve = CubicSpline(*(np.array(CURVE, float)[::-1] * (1, bends)).T)
        self.u = x - np.float32(lean) * np.sin(self.z / 60)
        self.v = self.y - self.curve(self.z).astype(np.float32)
        self.labels = np.zeros((len(z), len(y), len(x)), np.uint8)

    def put(self, tissue, where, box=...):
        """Make ``tissue`` of the voxels of a box (slices) where ``where``, bool that broadcasts, is True."""
        np.copyto(self.labels[box], TISSUES.index(tissue), where=where)

    def column(self, tissue, points, sides=(1,), power=2.3):
        """A shape of round slices, of which points [N, 5] tells some: z, v and u of the middle, half axes.

        sides: 1 as it stands, -1 mirrored.  power: 2 for ellipses; above, they approach rectangles.
        """
        points = np.array(sorted(map(tuple, points)), np.float32)
        rows = slice(*np.searchsorted(self.z.ravel(), points[[0, -1], 0]))
        if rows.start == rows.stop:
            return
        values = PchipInterpolator(points[:, 0], points[:, 1:])(self.z[rows])                 # [Z, 1, 1, 4]
        v, u, *radii = np.moveaxis(values, -1, 0)
        deep, wide = np.maximum(radii, 0.1)
        along_v = np.abs((self.v[rows] - v) / deep).astype(np.float32) ** power                 # [Z, Y, 1]
        columns = span((along_v < 1).any((0, 2)))
        for side in sides:
            along_u = np.abs((self.u[rows] - side * u) / wide).astype(np.float32) ** power      # [Z, 1, X]
            box = rows, columns, span((along_u < 1).any((0, 1)))
            self.put(tissue, along_v[:, columns] + along_u[..., box[2]] < 1, box)

    def paint(self, table):
        """The shapes of a table such as MUSCLES, later over earlier."""
        for line in filter(None, table.splitlines()):
            name, sides, *shape = line.split()
            shape = np.array([token.split(",") for token in shape], float)
            if shape.shape[1] == 6:                  # an ellipsoid
                bow = np.linspace(0, np.pi, 13)[:, None]
                shape = shape[:, :5] * (1, 1, 1, 0, 0) + np.hstack(
                    [shape[:, 3:4] * np.cos(bow), 0 * bow, 0 * bow, np.sin(bow) * shape[:, 4:]])
            for tissue, grow in LAYERS.get(name, ((name, 0),)):
                self.column(tissue, shape + (0, 0, 0, grow, grow), (1,) if sides == "." else (-1, 1))


def span(where):
    """The slice from the first to the last True of a bool array."""
    found = np.flatnonzero(where)
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def make_spine(patient, step):
    """The Body of a patient (see draw_spine) about the middle of the region's field of view.  step: mm."""
    z, y, *_ = REGIONS[patient["region"]]
    body = Body((z, y, 0), (208, 208, 196), step, patient["bends"], patient["lean"])
    at, v, deep, wide, fat = TRUNK.T
    for tissue, inset in (("skin", 0), ("fat", 2), ("muscle", 2 + fat * np.float32(patient["fat"]))):
        body.column(tissue, np.stack([at, v, 0 * v, deep - inset, wide - inset], 1))
    body.paint(CAVITY)
    ribs, side = body.labels == TISSUES.index("cortex"), np.abs(body.u)
    body.put("muscle", ribs & (np.cos((body.z + 0.4 * side - 0.3 * body.v) / 4) < 0.4))
    body.put("fat", ribs & (side < 40) & (body.v < -8))
    body.paint(MUSCLES)
    septa = np.abs(waves(patient["septa"], 0, *np.mgrid[-160:121:1.0, -100:101:1.0])) < 0.05 * patient["fat"]
    rows, columns = (np.clip(np.rint(at), low, high).astype(int) - low
                     for at, low, high in ((body.v, -160, 120), (body.u, -100, 100)))
    body.put("fat", septa[rows, columns] & (body.labels == TISSUES.index("muscle")))
    body.paint(ORGANS)
    paint_arches(body, *along_spine(body, patient, 62))
    paint_bodies(body, patient, *along_spine(body, patient, 40))
    paint_canal(body, patient, *along_spine(body, patient, 18))
    return body


def along_spine(body, patient, reach):
    """(box, s, v, u, shape): the voxels within ``reach`` mm beside the spine and 75 before and behind it.

    s, v: mm along the curve and behind it, square to it.  shape: the columns of SHAPE at s.
    """
    box = slice(None), span((np.abs(body.v) < 75).any((0, 2))), span((np.abs(body.u) < reach).any((0, 1)))
    y = body.y[box[1]]
    s = body.z + 0 * y
    for _ in range(4):                               # the plane square to the curve at s holds the voxel
        s = body.z + body.curve(s, 1) * np.clip(y - body.curve(s), -55, 55)
    v = ((y - body.curve(s)) * np.sqrt(1 + body.curve(s, 1) ** 2)).astype(np.float32)
    shape = [np.interp(s, SHAPE[:, 0], values).astype(np.float32) for values in SHAPE[:, 1:].T]
    shape[2:4] = (radius * np.float32(patient["canal"]) for radius in shape[2:4])
    return box, s.astype(np.float32), v, body.u[..., box[2]], shape


def levels(s):
    """(number of the vertebra, mm above its middle, half its body's height, and with a disc) at s in mm."""
    level = np.clip(np.searchsorted(-MIDDLES - (BODIES + DISCS) / 2, -s) - 1, 0, len(BODIES) - 1)
    half, disc = (array[level].astype(np.float32) / 2 for array in (BODIES, DISCS))
    return level, s - MIDDLES[level].astype(np.float32), half, half + disc


def bone(body, box, where, core):
    """Bone where ``where``, with marrow where ``core``: bool of the voxels of the box."""
    body.put("cortex", where, box)
    body.put("marrow", where & core, box)


def paint_arches(body, box, s, v, u, shape):
    """Processes, joints, arches and roots of the nerves; what lies nearer to the canal over the rest."""
    depth, _, back, side, *_, length, slant, reach = shape
    _, along, half, pitch = levels(s)
    below, beside, tip, rise = s < 0, np.abs(u), v - back, along + 0.2 * pitch
    wing = np.abs(rise - 0.3 * pitch) + 0.04 * beside + np.maximum(np.abs(tip - 0.4 * (beside - side)) - 5, 0)
    bone(body, box, (wing < 4) & (beside < reach) & below, (wing < 2.6) & (beside < reach - 1.5))
    _, lower, _, high = levels(s + slant * tip)      # spinous processes reach below their vertebra
    thick = np.abs(lower + 0.4 * high) - 0.42 * high + 0.02 * tip
    bone(body, box, (thick < 0) & (beside < 3.4) & (tip > 0) & (tip < length) & below,
         (thick < -1.3) & (beside < 2.1) & (tip < length - 1.4))
    pillar = np.where(below, ((v - back * 0.45) / 8) ** 2, 9) + ((beside - side - 5.5) / 7.5) ** 2
    joint = np.abs(np.abs(along + 0.5 * v) - pitch) < 0.9
    body.put("gristle", (pillar < 1) & joint, box)
    bone(body, box, (pillar < 1) & ~joint, pillar < 0.66)
    ring = (np.maximum(v, 0) / (back + 5.5)) ** 2 + (beside / (side + 6)) ** 2
    lamina = (ring < 1) & (v > -back) & below
    body.put("fat", lamina, box)
    lamina &= v > 0
    body.put("ligament", lamina & (ring > 0.8), box)
    lamina &= np.abs(rise + 0.3 * pitch + 0.3 * tip) < 0.62 * pitch
    bone(body, box, lamina, (ring < 0.9) & (ring > 0.7))
    pedicle = (v > -back - depth / 2) & (v < 1) & (np.abs(beside - side - 3) < 3.5) & below
    bone(body, box, pedicle & (along > -1) & (along < half - 1), (along > 0.5) & (along < half - 2))
    exits = ((v + 0.35 * back) / 2.2) ** 2 + ((along + half + 1) / 2.2) ** 2
    body.put("root", (exits < 1) & (beside > side) & (beside < side + 12) & below, box)


def paint_bodies(body, patient, box, s, v, u, shape):
    """Discs and vertebral bodies with the ligaments on them, the dens and the ring of C1."""
    depth, width, back, side, *_ = shape
    level, along, half, _ = levels(s)
    beside, middle = np.abs(u), -back - 0.5 - depth / 2
    edge = np.where(s < 0, np.abs((v - middle) / depth * 2), 9) ** 2.6 + beside ** 2.6 * (2 / width) ** 2.6
    body.put("ligament", edge < 1.25, box)
    disc, apart = np.clip(np.where(along < 0, level, level - 1), 0, None), np.abs(along) > half - 0.5
    bulge = np.where(v > middle, patient["bulge"][disc] * 4, 0.08).astype(np.float32)
    body.put("annulus", (edge < 1 + bulge) & apart, box)
    body.put("nucleus", (edge < 0.5) & apart, box)
    body.put("dry", (edge < 0.5) & apart & patient["dry"][disc], box)
    height = half - np.maximum(1 - edge, 0) * 0.09 * half - np.abs(along)      # endplates are hollow
    waist = 1 - 0.12 * (1 - (along / half) ** 2)
    bone(body, box, (edge < waist) & (height > 0), (edge < waist * 0.8) & (height > 1.1))
    body.put("vein", (np.abs(along) < 1.3) & (v > -back - 6) & (beside < 3) & (edge < 0.8), box)
    dens = ((v + back + 6) / 5.5) ** 2 + (u / 5.5) ** 2 + np.maximum(s - 9, 0) ** 2 / 49
    bone(body, box, (dens < 1) & (s > -1), dens < 0.6)
    hoop, flat = (v / (back + 19 - 12 * (v > 0))) ** 2 + (u / (side + 13)) ** 2, np.abs(s - 9)
    atlas = (flat < 6 - 2 * (v > 0)) & (hoop < 1) & ((hoop > 0.55) | (np.abs(beside - side - 4) < 6))
    atlas &= (v > back) | (v < -back - 13) | (beside > side - 3)
    bone(body, box, atlas, (hoop < 0.9) & (hoop > 0.63) & (flat < 3))


def paint_canal(body, patient, box, s, v, u, shape):
    """The dural sac with its fluid, the cord and the cauda equina in it, and the cord's lesions."""
    _, _, back, side, sac, deep, wide, *_ = shape
    conus, rim = patient["conus"], (v / back) ** 2 + (u / side) ** 2
    for tissue, inside in (("fat", rim < 1), ("ligament", (rim < (sac + 0.07) ** 2) & (s < 15)),
                           ("csf", (rim < sac ** 2) & (s > -690))):
        body.put(tissue, inside, box)
    for number, (left, behind) in enumerate(patient["strands"]):
        low = np.clip((conus + 30 - s) / 60, 0.25, 1) * min(1, 0.6 + number % 3 * 0.2)
        strand = (v - behind * sac * back * np.minimum(low, 0.9)) ** 2 + (u - left * sac * side * low) ** 2
        body.put("root", (strand < 1.1) & (s < conus + 22) & (s > -680 + 9 * number), box)
    # The cord tapers to the conus and grows into the medulla.
    grown = np.clip((s - conus) / 28, 1e-3, 1) ** 0.6 * patient["cord"] * (1 + 0.02 * np.clip(s - 18, 0, 25))
    behind, left = (v + 0.08 * back) / (deep * grown), u / (wide * grown)
    inside, beside = (behind ** 2 + left ** 2 < 1) & (s > conus), np.abs(left)
    body.put("brain", inside, box)
    inside &= s <= 20
    body.put("white", inside, box)
    horns = (np.abs(beside - 0.34 - 0.1 * np.abs(behind)) < 0.12) & (np.abs(behind) < 0.62)
    body.put("grey", inside & (horns | ((beside < 0.35) & (np.abs(behind) < 0.11))), box)
    for at, x, y, half, radius in patient["lesions"]:
        spot = ((s - at) / half) ** 2 + ((left - x) / radius) ** 2 + ((behind - y) / radius) ** 2
        body.put("lesion", inside & (spot < 1), box)
