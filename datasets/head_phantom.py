"""A procedural head: an invented patient with or without findings, so that demo data need no real one.

Structures are soft-edged implicit shapes in millimetres, painted one over another as layers of a tissue.
Coordinates are DICOM's patient coordinates in the order z (to the crown), y (to the back), x (to the
patient's left), with the origin in the middle of the brain.  head_images.py makes CT and MRI of a head.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from datasets.head_findings import PAINT, draw_findings
from datasets.phantom import ellipsoid, soft, tube
from datasets.waves import draw_waves, waves

LABELS = {"outside": 0, "soft_tissue": 1, "skull": 2, "air": 3, "eyes": 4, "csf": 5, "grey": 6, "white": 7,
          "deep_grey": 8, "ventricles": 9, "cerebellum": 10, "brainstem": 11}
SULCUS = 22.0                                        # mm, wavelength of the folds: gyri are half as wide
CORTEX = 3.2                                         # mm, thickness


def draw_head(rng, findings=()):
    """The measures that differ between patients, and their findings: dict; mm unless the name says otherwise.

    findings: names of head_findings.FINDINGS, each at its own place, size and strength (entry "findings").
    """
    atrophy = rng.uniform(0, 1)
    return {
        "scale": rng.uniform(0.94, 1.05) * rng.uniform(0.97, 1.03, 3),        # of z, y, x
        "turn": rng.normal(0, 3, 3),                 # degrees about z, y, x
        "shift": rng.normal(0, 3, 3),
        "skull": rng.uniform(5, 8.5),                # thickness
        "scalp": rng.uniform(5, 9),
        "gap": 1.5 + 2.5 * atrophy,                  # between the skull and the brain
        "sulci": 0.5 + 1.2 * atrophy,                # half their width
        "depth": rng.uniform(16, 22),                # of sulci
        "ventricles": 0.75 + 0.65 * atrophy + rng.uniform(-0.15, 0.25, 2),    # scale; right, left
        "sinuses": rng.uniform(0.75, 1.15),          # scale
        "nose": rng.uniform(20, 30),                 # how far it stands out
        "table": rng.choice((112.0, 1e4)),           # its height behind the head; 1e4: none to be seen
        "folds": draw_waves(rng, 14, SULCUS),
        "marrow": draw_waves(rng, 6, 18.0),
        "findings": draw_findings(rng, findings),
    }


class Head:
    """A head on a grid.

    layers: list of (tissue, occupancy float32 [D, H, W] in [0, 1]), each painted over those before it.
    labels: uint8 [D, H, W], values of LABELS, of the healthy head.  masks: {finding: bool [D, H, W]}, True
    inside, its oedema included.
    """

    def __init__(self, shape):
        self.layers, self.labels, self.masks = [], np.zeros(shape, np.uint8), {}

    def paint(self, tissue, occupancy, label=None):
        """Put ``tissue`` over what is there; label: a name in LABELS that its voxels get."""
        occupancy = np.broadcast_to(occupancy, self.labels.shape)
        self.layers.append((tissue, occupancy))
        if label is not None:
            self.labels[occupancy > 0.5] = LABELS[label]

    def where(self, *names):
        """float32 [D, H, W]: 1 where the label is one of ``names``, else 0."""
        return np.isin(self.labels, [LABELS[name] for name in names]).astype(np.float32)


def make_head(patient, points, voxel):
    """The Head of ``patient`` (see draw_head) at ``points``.

    points: three arrays z, y, x that broadcast to [D, H, W], mm.  voxel: mm, width of soft edges.
    """
    z, y, x = (np.asarray(axis, np.float32) for axis in points)
    head = Head(np.broadcast_shapes(z.shape, y.shape, x.shape))
    head.paint("table", soft(np.abs(y - patient["table"] + 0.002 * x * x) - 2, voxel))
    turn = Rotation.from_euler("xyz", patient["turn"], degrees=True).as_matrix() / patient["scale"][:, None]
    z, y, x = (sum(float(weight) * (axis - float(shift)) for weight, axis, shift
                   in zip(row, (z, y, x), patient["shift"], strict=True)) for row in turn)
    grid, cavity = (z, y, x), cavity_distance(z, y, x)
    paint_soft_tissue(head, patient, voxel, *grid)
    paint_face(head, patient, voxel, *grid)
    paint_skull(head, patient, cavity, voxel, *grid)
    paint_eyes(head, voxel, *grid)
    paint_air(head, patient, voxel, *grid)
    brain = cavity + patient["gap"]
    paint_cerebrum(head, patient, brain, voxel, *grid)
    paint_deep(head, patient, voxel, *grid)
    paint_hindbrain(head, patient, brain, voxel, *grid)
    for name, finding in patient["findings"].items():
        PAINT[name](head, finding, brain, voxel, *grid)
    return head


def step(value, width):
    """Smooth step from 0 to 1 around value = 0."""
    return 1 / (1 + np.exp(np.clip(-value / width, -30, 30)))


def vault_distance(z, y, x):
    """Signed distance to the inside of the skull's vault, closed below: an egg, wider behind."""
    width = 68 + 5 * np.clip((y + 20) / 60, -1, 1)
    height = np.where(z > 0, 76, 84)
    scaled = (np.abs(x / width) ** 2.3 + np.abs(y / 86) ** 2.3 + np.abs(z / height) ** 2.3) ** (1 / 2.3)
    radius = np.sqrt(x * x + y * y + z * z)
    return radius - radius / np.maximum(scaled, 1e-3)


def cavity_distance(z, y, x):
    """Signed distance to the cranial cavity: the vault above the three fossae of the base."""
    side = np.abs(x)
    lateral = step(side - 15, 2.5)
    ridge = 2 + 0.5 * (side - 20)                    # y of the petrous bone: forward in the middle
    floor = -26 + 6 * np.exp(-((side - 32) / 14) ** 2) - 24 * lateral * step(y + 32, 3)
    back = step(y - ridge - 6, 3)
    floor = floor * (1 - back) - 68 * back + 14 * lateral * np.exp(-((y - ridge) / 7) ** 2)
    canal = np.maximum(np.sqrt(x * x + (y - 22 - 0.1 * (z + 70)) ** 2) - 11, z + 55)
    return np.minimum(np.maximum(vault_distance(z, y, x), 0.85 * (floor - z)), canal)


def tentorium(y, x):
    """z of the tent between cerebrum and cerebellum: high in the middle, falling backwards."""
    return -24 + 24 * np.exp(-(x / 26) ** 2) - 0.25 * (y - 22)


def paint_soft_tissue(head, patient, voxel, z, y, x):
    """Skin, fat and muscle of the scalp, face, nose, ears and neck."""
    side = np.abs(x)
    thickness = patient["skull"] + patient["scalp"]
    temple = 5 * np.exp(-((y + 25) / 28) ** 2 - ((z + 20) / 28) ** 2)
    scalp = vault_distance(z, y, x) - thickness - temple
    face = ellipsoid(z, y, x, (-62, -38, 0), (66, 62, 66))
    chin = ellipsoid(z, y, x, (-108, -48, 0), (26, 48, 48))
    neck = tube(z, y, x, [(-60, 28, 0), (-190, 34, 0)], [62, 58])
    nose = tube(z, y, x, [(-26, -90, 0), (-62, -97 - patient["nose"] + 8, 0), (-66, -92, 0)], [8, 9, 12])
    ear = ellipsoid(z, y, side, (-38, 16 + 0.3 * (side - 78), 81), (31, 17, 5))
    skin = np.minimum(np.minimum(np.minimum(scalp, face), np.minimum(chin, neck)), nose)
    head.paint("muscle", soft(np.minimum(skin, ear), voxel), "soft_tissue")
    head.paint("fat", soft(skin + 2, voxel))
    head.paint("muscle", soft(np.maximum(scalp + patient["scalp"] - 1, -30 - z), voxel) * 0.9)
    deep = np.minimum(np.minimum(face, chin), neck) + 9
    planes = np.abs(waves(patient["marrow"], z, y, x))                 # of fat between the muscles
    head.paint("muscle", soft(np.maximum(deep, z + 30), voxel) * np.clip(planes / 0.3, 0.5, 1))
    head.paint("muscle", soft(scalp + patient["scalp"] * 0.5 + 2, voxel) * np.clip(temple / 3, 0, 1))


def paint_face(head, patient, voxel, z, y, x):
    """Cheek bones, jaws with teeth, and the upper vertebrae."""
    side = np.abs(x)
    cheek = tube(z, y, side, [(-52, -72, 36), (-48, -48, 60), (-46, -16, 64)], [7, 5, 3])
    maxilla = np.maximum(ellipsoid(z, y, x, (-58, -58, 0), (30, 30, 44)), -88 - z)
    jaw = tube(z, y, side, [(-50, -8, 52), (-92, -10, 48), (-112, -68, 12), (-112, -74, 0)], [5, 6, 7, 7])
    arch = (np.sqrt((x / 24) ** 2 + ((y + 46) / 42) ** 2) - 1) * 24
    teeth = np.maximum(np.maximum(np.abs(arch) - 4, np.abs(z + 92) - 9), y + 42)
    for bone in (cheek, maxilla, jaw):
        head.paint("bone", soft(bone, voxel), "skull")
        head.paint("marrow", soft(bone + 2.5, voxel))
    head.paint("tooth", soft(teeth, voxel), "skull")
    gap = np.abs(np.mod((z + 82) / 19, 1) - 0.5) > 0.42
    spine = np.maximum(ellipsoid(0 * z, y, x, (0, 6 + 0.06 * (z + 80), 0), (1e3, 9, 12)) , z + 72)
    arches = np.maximum(np.abs(np.hypot(x, y - 24) - 17) - 4.5, z + 74)
    head.paint("bone", soft(np.minimum(spine, arches), voxel) * np.where(gap, 0.1, 0.75), "skull")


def paint_skull(head, patient, cavity, voxel, z, y, x):
    """Outer and inner table with marrow between them, the dense petrous bones, and fluid inside."""
    side = np.abs(x)
    thickness = patient["skull"] * (1 + 0.2 * (y / 86) ** 2 - 0.3 * step(side - 55, 4) * step(10 - z, 8))
    above = np.maximum(cavity - thickness, -88 - z)
    bumps = 0.7 * waves(patient["marrow"], z, y, x)
    head.paint("bone", soft(above, voxel), "skull")
    head.paint("marrow", soft(np.maximum(above + 2.2, 1.8 - cavity) + bumps, voxel) * 0.9)
    petrous = tube(z, y, side, [(-38, 0, 18), (-42, 16, 46), (-58, 24, 58)], [7, 10, 11])
    head.paint("bone", soft(petrous, voxel), "skull")
    head.paint("csf", soft(cavity, voxel), "csf")


def paint_eyes(head, voxel, z, y, x):
    """Orbits of bone with fat, muscles and the optic nerve in them, and the eyes."""
    side = np.abs(x)
    orbit = tube(z, y, side, [(-40, -72, 33), (-37, -36, 16)], [20, 6])
    cone = tube(z, y, side, [(-40, -64, 33), (-37, -38, 16)], [13, 3])
    globe = ellipsoid(z, y, side, (-40, -74, 33), (12, 12, 12))
    head.paint("bone", soft(np.maximum(np.abs(orbit - 1) - 1.5, -80 - y), voxel), "skull")
    head.paint("fat", soft(np.maximum(orbit, -84 - y), voxel), "soft_tissue")
    head.paint("muscle", soft(np.maximum(np.abs(cone) - 1.2, y + 44), voxel) * 0.7)
    head.paint("muscle", soft(tube(z, y, side, [(-40, -64, 33), (-34, -36, 14)], [2.5, 2.5]), voxel))
    head.paint("muscle", soft(globe - 1.5, voxel), "eyes")
    head.paint("vitreous", soft(globe, voxel), "eyes")
    head.paint("lens", soft(ellipsoid(z, y, side, (-40, -82, 33), (4.5, 2.2, 4.5)), voxel))


def paint_air(head, patient, voxel, z, y, x):
    """Sinuses, the nasal cavity with its septum and conchae, cells of the mastoid, throat and ear canals."""
    side, size = np.abs(x), patient["sinuses"]
    cells = np.abs(waves(patient["marrow"], 2.6 * z, 2.6 * y, 2.6 * x)) - 0.35
    maxillary = ellipsoid(z, y, side, (-66, -58, 29), (17 * size, 16 * size, 13 * size))
    sphenoid = np.maximum(ellipsoid(z, y, x, (-36, -38, 2), (10 * size, 11, 12 * size)), 1 - np.abs(x - 2))
    ethmoid = np.maximum(ellipsoid(z, y, side, (-38, -62, 7), (11, 16, 6)), -2 * cells)
    frontal = np.maximum(ellipsoid(z, y, side, (-10, -90, 9), (13 * size, 5, 13 * size)), 1 - side)
    nasal = np.maximum(ellipsoid(z, y, side, (-62, -64, 6), (21, 34, 5)), 1.5 - side - 1.5 * cells)
    mastoid = np.maximum(ellipsoid(z, y, side, (-54, 27, 58), (15, 10, 8 * size)), -3 * cells)
    canal = tube(z, y, side, [(-44, 12, 50), (-44, 14, 84)], [2.5, 3])
    throat = tube(z, y, x, [(-58, -22, 0), (-92, -14, 0), (-190, -12, 0)], [9, 7, 9])
    mouth = ellipsoid(z, y, x, (-84, -50, 0), (3, 34, 20))
    for shape in (maxillary, sphenoid, ethmoid, frontal, nasal, mastoid, canal, throat, mouth):
        head.paint("air", soft(shape, voxel), "air")


def paint_cerebrum(head, patient, brain, voxel, z, y, x):
    """Cortex with sulci that run inwards from the surface, and white matter below it."""
    side = np.abs(x)
    scaled = np.sqrt((x / 70) ** 2 + (y / 86) ** 2 + (z / 76) ** 2)
    outward = np.maximum(scaled, 0.65) ** -0.8       # folds change little along the radius
    folds = np.abs(waves(patient["folds"], z * outward, y * outward, x * outward)) * SULCUS / (2 * np.pi)
    tent = np.where(y > 4 + 0.4 * side, tentorium(y, x), -1e3)
    cistern = ellipsoid(z, y, x, (-24, 2, 0), (20, 24, 19))
    convex = np.maximum(brain, tent - z)
    surface = np.maximum(convex, -cistern)
    inner = 1 - np.hypot((y - 2) / 50, (z - 12) / 32)                  # >= 0: the corpus callosum and below
    middle = np.maximum(side - patient["sulci"], 30 * inner)
    height = np.abs(z + 8 - 0.3 * (y + 10))
    sylvian = np.maximum(np.maximum(height - patient["sulci"] - 0.8, 36 - side), np.abs(y + 4) - 36)
    sulcus = np.hypot(np.maximum(folds - patient["sulci"] * (1 + convex / 30), 0),
                      np.maximum(-convex - patient["depth"], 0))
    depth = np.minimum(np.minimum(-surface, sulcus - 0.3), np.minimum(middle, sylvian))      # below the pia
    head.paint("grey", soft(-depth, voxel), "grey")
    head.paint("white", soft(CORTEX - depth, voxel), "white")
    falx = np.maximum(np.maximum(side - 1, 30 * inner + 6), convex)
    head.paint("dura", soft(falx, voxel) * 0.6)


def paint_deep(head, patient, voxel, z, y, x):
    """Nuclei, and the ventricles with the calcified plexus in them."""
    side = np.abs(x)
    size = np.where(x < 0, *patient["ventricles"].astype(np.float32))
    thalamus = ellipsoid(z, y, side, (6, 10, 12), (10, 15, 9))
    lentiform = ellipsoid(z, y - 0.25 * (side - 25), side, (4, -12, 25), (12, 19, 7))
    caudate = tube(z, y, side, [(4, -34, 13), (20, -24, 16), (24, 8, 21)], [7, 5.5, 3])
    nuclei = np.minimum(np.minimum(thalamus, lentiform), caudate)
    head.paint("deep_grey", soft(nuclei, voxel), "deep_grey")
    horns = tube(z, y, side, [(4, -38, 8), (18, -20, 9), (24, 12, 12), (14, 34, 23), (4, 56, 25)],
                 [4.5, 6, 6, 8, 3.5])
    temporal = tube(z, y, side, [(14, 34, 23), (-14, 16, 33), (-22, -10, 31)], [6, 3, 2.5])
    third = ellipsoid(z, y, x, (2, 2, 0), (13, 15, 2.5))
    lateral = np.maximum(np.minimum(horns, temporal) - 4.5 * (size - 1), 1.2 - side)
    head.paint("csf", soft(np.minimum(lateral, third - 1.2 * (size - 1)), voxel), "ventricles")
    head.paint("calcium", soft(ellipsoid(z, y, side, (12, 36, 22), (4, 3, 2)), voxel) * 0.5)
    head.paint("calcium", soft(ellipsoid(z, y, x, (-2, 24, 0), (2.5, 2.5, 2)), voxel) * 0.5)


def paint_hindbrain(head, patient, brain, voxel, z, y, x):
    """Cerebellum with folia, the brainstem down to the cord, and the fourth ventricle."""
    side = np.abs(x)
    lobes = np.minimum(ellipsoid(z, y, side, (-42, 46, 26), (27, 35, 33)),
                       ellipsoid(z, y, x, (-34, 44, 0), (27, 24, 16)))
    lobes = np.maximum(np.maximum(lobes, brain), z + 3 - tentorium(y, x))
    folia = np.cos(2 * np.pi * np.hypot(z + 40, 0.8 * (y - 26)) / 7)
    head.paint("grey", soft(lobes + 1.2 * np.maximum(folia, 0), voxel), "cerebellum")
    head.paint("white", soft(lobes + 9 + 4 * folia, voxel) * 0.85, "cerebellum")
    stem = tube(z, y, x, [(-6, 12, 0), (-18, 8, 0), (-34, 2, 0), (-46, 8, 0), (-66, 18, 0), (-190, 26, 0)],
                [13, 13, 14, 9, 6.5, 5.5])
    head.paint("brainstem", soft(stem, voxel), "brainstem")
    peduncle = tube(z, y, side, [(-36, 8, 8), (-40, 30, 20)], [7, 7])
    head.paint("brainstem", soft(peduncle, voxel), "brainstem")
    fourth = ellipsoid(z, y, x, (-38, 20, 0), (12, 5.5, 8))
    aqueduct = tube(z, y, x, [(-6, 16, 0), (-28, 18, 0)], [1.3, 1.3])
    head.paint("csf", soft(np.minimum(fourth, aqueduct), voxel), "ventricles")
