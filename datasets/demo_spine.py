"""Demo data: MRI series of invented spines as DICOM and NIfTI, with masks of the cord and its lesions."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from pydicom.uid import generate_uid
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from datasets.demo_files import is_complete, make_missing, whole_folder, write_marker
from datasets.demo_studies import Grid, write_csv, write_dicom, write_nifti
from datasets.head_images import coil, mri
from datasets.head_phantom import draw_head, make_head
from datasets.spine_phantom import CORD, REGIONS, TISSUES, Body, draw_spine, make_spine
from utils.config import UserError

LEAST = (4, 32)                                      # patients, pixels per side
REGION_OF = ("cervical", "lumbar", "cervical", "thoracic")                # of the patients in turn
SPLIT_OF = ("train", "test", "train", "val")         # of the patients in turn, sorted by region
ILL_OF = (1, 1, 0, 1, 0, 0, 1, 0)                    # who of them has lesions
OTHER_OF = ("brain", "brain", "knee", "knee", "knee", "knee", "brain", "brain")       # what else they had
# View and sequence of the spine series of one patient, in turn.
SERIES = (
    (("sagittal", "T2w"), ("sagittal", "T1w"), ("axial", "T2*w"), ("axial", "T2w"), ("coronal", "T1w")),
    (("sagittal", "T2w"), ("sagittal", "T2*w"), ("axial", "T1w"), ("axial", "T2*w"), ("coronal", "T2w")),
    (("sagittal", "T2w"), ("sagittal", "T1w"), ("axial", "T2w"), ("axial", "T1w"), ("coronal", "T2*w")))
FORMS = ("dicom", "RAS", "LPI", "dicom", "PSR", "LAS", "dicom", "RSA", "ASL")         # of the series in turn
# Directions of a row and a column, x, y, z; which way the voxels run that readers get of DICOM; mm a slice is
# thick; how many slices (from, below).
VIEWS = {"sagittal": ((0, 1, 0), (0, 0, -1), "PIR", 3.5, (12, 15)),
         "coronal": ((1, 0, 0), (0, 0, -1), "LIP", 3.5, (12, 15)),
         "axial": ((1, 0, 0), (0, 1, 0), "LPS", 4.5, (16, 20))}
FIELDS = {"cervical": (176, 132), "thoracic": (200, 156), "lumbar": (196, 164), "brain": (232, 224),
          "knee": (168, 148)}                        # mm across a slice, across an axial one
TIMES = {"T1w": (560, 11), "T2w": (3400, 96), "T2*w": (620, 15)}          # ms: repetition, echo
STAGES = ("anatomy", "location_view", "sequence", "cord", "cord_masks", "lesion_masks")
# Signal of TISSUES on T1w, T2w and T2*w in percent of fat on T1w, and how much of it is grain, in percent.
SIGNALS = {
    "air": (2, 2, 2, 0), "skin": (55, 30, 35, 5), "fat": (100, 72, 42, 5), "muscle": (36, 17, 36, 12),
    "ligament": (14, 7, 14, 5), "cortex": (10, 6, 5, 5), "marrow": (60, 40, 13, 12), "dry": (36, 24, 42, 6),
    "nucleus": (36, 78, 66, 5), "annulus": (30, 13, 38, 6), "csf": (17, 115, 98, 3), "white": (56, 36, 45, 3),
    "grey": (50, 43, 66, 3), "lesion": (47, 74, 80, 5), "root": (50, 38, 52, 3), "vessel": (12, 5, 85, 5),
    "vein": (32, 62, 75, 5), "gland": (52, 50, 55, 10), "mucosa": (42, 60, 55, 8), "lung": (4, 4, 3, 20),
    "kidney": (50, 58, 58, 4), "pyramid": (38, 72, 68, 4), "liver": (58, 26, 34, 5), "brain": (58, 42, 50, 8),
    "bowel": (40, 42, 45, 20), "gristle": (42, 50, 72, 4)}
KNEE = """
skin . 95,4,0,62,60 0,0,0,54,54 -95,12,0,52,48
fat . 95,4,0,60,58 0,0,0,52,52 -95,12,0,50,46
belly . 95,4,0,54,50 45,14,0,38,42 32,24,0,12,36
belly | -8,30,18,10,14 -50,28,16,20,22 -95,26,14,28,24
csf . 4,0,0,8,30,38
gristle | 18,4,20,24,30,20
ligament | 3,4,27,24,14 -3,4,27,24,14
bone | 19,4,20,22,27,18
bone . 95,-4,0,14,14 45,-3,0,15,19 22,-2,0,20,32
bone . -2,2,0,25,37 -22,2,0,22,30 -50,0,0,15,17 -95,0,0,13,13
bone . 26,-39,0,20,9,21
"""


def write_demo_spine(output, subjects=24, seed=0, workers=0, size=160):
    """Write ``output``/series/<patient>/ and the tables of write_tables -> ``output``.

    series/<patient>/<series>/ is a folder of DICOM, <series>.nii.gz a NIfTI; beside them lie masks of each
    spine on the same voxels, <series>_cord.nii.gz and <series>_lesion.nii.gz, uint8 0 and 1.  A
    patient has five of these, of one region in several views and sequences, and one of the brain or a knee;
    about half of the patients have one to three lesions in the cord.  size: pixels per side, T2*w three
    quarters of it.  A patient depends on (seed, its number, size, its row of plan_patients) alone.
    workers: processes; 0 makes all here.  What a stopped run made is kept; a finished set is not made again.
    Raises UserError when subjects or size are below LEAST, or the folder holds a set with other settings, or
    other files.
    """
    output = Path(output)
    if subjects < LEAST[0] or size < LEAST[1]:
        raise UserError(f"subjects = {subjects}, size = {size}: the spine demo needs {LEAST[0]} patients and "
                        f"{LEAST[1]} pixels at least")
    wanted = {"subjects": subjects, "seed": seed, "size": size}
    if is_complete(output, wanted):
        return output
    write_marker(output, wanted, complete=False)
    patients = plan_patients(subjects, seed)
    jobs = [(output / "series" / patient["name"], patient, size, seed) for patient in patients]
    make_missing(write_patient, jobs, workers, unit="patient")
    write_tables(output, patients)
    write_marker(output, wanted, complete=True)
    return output


def plan_patients(subjects, seed):
    """A dict for each patient: number, name, region, lesions (how many), split and series (see plan_series).

    Every split has each region and patients with and without lesions where they are enough.
    """
    regions = [REGION_OF[number % 4] for number in range(subjects)]
    rng = np.random.default_rng(seed)
    order = sorted(rng.permutation(subjects).tolist(), key=lambda number: [*REGIONS].index(regions[number]))
    patients = []
    for number, region in enumerate(regions):
        place, own = order.index(number), np.random.default_rng([seed, number, 1])
        patients.append({"number": number, "name": f"spine_{number:03d}", "region": region,
                         "lesions": int(own.integers(1, 4)) * ILL_OF[place % 8],
                         "split": SPLIT_OF[place % 4],
                         "series": plan_series(number, region, OTHER_OF[place % 8], own)})
    return patients


def plan_series(number, region, other, rng):
    """A dict for each series of a patient: name, anatomy, location, view, sequence, form, slices (count)."""
    kinds = [("spine", region, *kind) for kind in SERIES[number % 3]]
    kinds.append(("other", other, str(rng.choice(list(VIEWS))), str(rng.choice(("T1w", "T2w")))))
    series = []
    for turn, (anatomy, location, view, sequence) in enumerate(kinds):
        name = f"{location}_{view}_{sequence.lower().replace('*', 'star')}"
        series.append({"name": name, "anatomy": anatomy, "location": location, "view": view,
                       "sequence": sequence, "form": FORMS[(5 * number + turn) % len(FORMS)],
                       "slices": int(rng.integers(*VIEWS[view][4]))})
    return series


def write_patient(job):
    """All series of one patient, with masks.  job: (folder, patient of plan_patients, size, seed)."""
    folder, patient, size, seed = job
    rng = np.random.default_rng([seed, patient["number"]])
    spine = draw_spine(rng, patient["region"], patient["lesions"])
    body = make_spine(spine, step=1.0)
    texture = grain(body, rng)
    uid = generate_uid(entropy_srcs=[folder.name, f"seed {seed}"])
    study = {"PatientID": folder.name, "PatientName": "Demo^Spine", "PatientPosition": "HFS", "StudyID": "1",
             "StudyDate": "20240101", "StudyInstanceUID": uid, "Modality": "MR", "MRAcquisitionType": "2D",
             "FrameOfReferenceUID": generate_uid(entropy_srcs=[uid, "frame"]), "MagneticFieldStrength": 1.5,
             "ImageType": ["ORIGINAL", "PRIMARY", "M"], "SequenceVariant": "NONE"}
    with whole_folder(folder) as unfinished:
        for turn, series in enumerate(patient["series"], start=1):
            sequence, pixels = series["sequence"], size * 3 // 4 if series["sequence"] == "T2*w" else size
            grid = draw_grid(rng, series, body, spine["scale"], pixels)
            if series["location"] == "brain":
                head = make_head(draw_head(rng), grid.points(), grid.voxel())
                image = mri(head, sequence[:2].lower(), rng)
            elif series["location"] == "knee":
                knee = Body((0, 0, 0), (190, 150, 150), step=1.0)
                knee.paint(KNEE)
                image = picture(knee, grain(knee, rng), places(knee, grid, 1.0), sequence, rng)
            else:
                points = places(body, grid, spine["scale"])
                image = picture(body, texture, points, sequence, rng)
                write_masks(unfinished, body, points, grid, series)
            write_image(unfinished, np.rint(image).astype(np.int16), grid, series, turn, study, rng)


def draw_grid(rng, series, body, scale, size):
    """A Grid over the patient, its slices nearly square to an axis, from the right, the front or the feet.

    scale: mm in the patient for one of the body's.
    """
    view, location = series["view"], series["location"]
    row, column, _, thick, _ = VIEWS[view]
    field = FIELDS[location][view == "axial"] * rng.uniform(0.96, 1.0)
    turn, shift = rng.normal(0, 2.5, 3), rng.normal(0, 2, 3)
    if series["anatomy"] == "spine":
        middle = body.corner + body.step * (np.array(body.labels.shape) - 1) / 2             # z, y, x
        if view == "axial":
            middle[0] += rng.uniform(-40, 50)
            turn[0] -= np.rad2deg(np.arctan(body.curve(middle[0], 1)))       # square to the canal
        if view != "sagittal":
            middle[1] = body.curve(middle[0]) - (16 if view == "axial" else 7)
        middle, field = scale * middle[::-1] + shift, scale * field
    else:
        middle, thick = shift + (0, -8 * (location == "brain"), 0), 0.5 * field / series["slices"]
    rotation = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    row, column = rotation @ row, rotation @ column
    normal = np.cross(row, column) * (-1 if view == "sagittal" else 1)
    along = (np.arange(series["slices"]) - (series["slices"] - 1) / 2) * thick
    corner = middle - (row + column) * field / 2 * (1 - 1 / size)
    positions, thickness = corner + along[:, None] * normal, np.full(len(along), thick)
    return Grid(row, column, positions, field / size, thickness, size)


def places(body, grid, scale, through=3):
    """Where the voxels of a Grid lie on a Body's lattice, ``through`` times across each slice, for ``cut``.

    scale: mm in the patient for one of the body's.
    """
    step = grid.positions[1] - grid.positions[0]
    axes = np.column_stack([grid.row * grid.spacing, grid.column * grid.spacing, step / through])[::-1]
    origin = (grid.positions[0] - step * (through - 1) / (2 * through))[::-1]              # z, y, x
    shape, ends = (len(grid.positions) * through, grid.size, grid.size), np.array(body.labels.shape) - 1
    # affine_grid counts from -1 to 1 on either side, and x first.
    linear = axes / (scale * body.step) * (np.array(shape[::-1]) - 1) / 2
    middle = ((origin / scale - body.corner) / body.step + linear.sum(1)) / ends * 2 - 1
    matrix = np.column_stack([linear / ends[:, None] * 2, middle])[::-1].astype(np.float32)
    return F.affine_grid(torch.from_numpy(matrix)[None], (1, 1, *shape), align_corners=True)


def cut(volume, points, through=3):
    """A volume on a Body's lattice, float32 [Z, Y, X], at ``places``: float32 [D, H, W].

    Trilinear, the mean across each slice; beyond the lattice its border goes on.
    """
    volume = torch.from_numpy(volume)[None, None]
    found = F.grid_sample(volume, points, "bilinear", "border", align_corners=True)
    return found[0, 0].unflatten(0, (-1, through)).mean(1).numpy()


def grain(body, rng):
    """Fine texture of a Body's tissues: float32 of its lattice, mean 0, standard deviation 1."""
    noise = gaussian_filter(rng.standard_normal(body.labels.shape, np.float32), 0.9)
    return noise / noise.std()


def picture(body, texture, points, sequence, rng):
    """MRI of a Body at ``places``, float32 [D, H, W] >= 0; each call is another scanner.

    Contrast, sensitivity of the coil, which lies behind, gain and noise are drawn; the magnitude is Rician.
    """
    *signals, coarse = np.array([SIGNALS[tissue] for tissue in TISSUES], np.float32).T / 100
    signal = signals[list(TIMES).index(sequence)] * rng.normal(1, 0.04, len(TISSUES)).astype(np.float32)
    volume = (signal * coarse)[body.labels]
    volume *= texture
    volume += signal[body.labels]
    volume *= np.exp((body.y - body.y.mean()) * np.float32(rng.uniform(0.003, 0.01)))
    image = cut(volume, points)
    image *= coil(image.shape, rng)
    noise = np.float32(rng.uniform(0.015, 0.035))
    real, imaginary = rng.standard_normal((2, *image.shape), np.float32) * noise
    return np.hypot(image + real, imaginary) * np.float32(rng.uniform(300, 1200))


def write_masks(folder, body, points, grid, series):
    """<series>_cord.nii.gz and <series>_lesion.nii.gz, on the voxels that readers get of the series."""
    code = VIEWS[series["view"]][2] if series["form"] == "dicom" else series["form"]
    for name, tissues in (("cord", CORD), ("lesion", CORD[2:])):
        inside = np.isin(TISSUES, tissues).astype(np.float32)[body.labels]
        mask = (cut(inside, points) > 0.5).astype(np.uint8)
        write_nifti(folder / f"{series['name']}_{name}.nii.gz", mask, grid, code)


def write_image(folder, image, grid, series, turn, study, rng):
    """A series, int16 [D, H, W], in its form, as number ``turn`` of a study (DICOM elements by keyword)."""
    if series["form"] != "dicom":
        return write_nifti(folder / f"{series['name']}.nii.gz", image, grid, series["form"])
    repetition, echo = TIMES[series["sequence"]]
    high = int(image.max())
    tags = {**study, "SeriesDescription": series["name"], "RepetitionTime": repetition, "EchoTime": echo,
            "ScanningSequence": "GR" if series["sequence"] == "T2*w" else "SE", "WindowCenter": high // 3,
            "WindowWidth": high // 2}
    write_dicom(folder / series["name"], image.astype(np.uint16), grid, rng, turn, tags)


def write_tables(output, patients):
    """series.csv, and for each of STAGES a CSV file with a row for every slice.  Paths are below ``output``.

    series.csv: patient, series, path, anatomy ("spine" | "other"), location, view, sequence, cord and lesion
    (1 where a slice shows it, else 0), split.  The others: path, index along axis (from the right, the front
    or the feet), axis, label, mask, patient, split.  anatomy.csv is of all series; of the spine's are
    location_view.csv ("cervical_axial"), sequence.csv and cord.csv ("absent" | "present"), and of T2w slices
    with cord, which the cascade keeps, cord_masks.csv (label: as location_view) and lesion_masks.csv (label:
    "healthy" | "lesion").
    """
    tables, rows = {stage: [] for stage in STAGES}, []
    for patient, series in ((one, series) for one in patients for series in one["series"]):
        view, spine = series["view"], series["anatomy"] == "spine"
        place = f"series/{patient['name']}/{series['name']}"
        path = place + ("" if series["form"] == "dicom" else ".nii.gz")
        masks = [f"{place}_{name}.nii.gz" if spine else "" for name in ("cord", "lesion")]
        shown = [slices_with(output / mask, view) if spine else [False] * series["slices"] for mask in masks]
        rows.append((patient["name"], series["name"], path, series["anatomy"], series["location"], view,
                     series["sequence"], *(int(any(found)) for found in shown), patient["split"]))
        where = f"{series['location']}_{view}"
        for index, (cord, lesion) in enumerate(zip(*shown, strict=True)):
            told = [(series["anatomy"], "")]
            if spine:
                told += [(where, ""), (series["sequence"], ""), ("present" if cord else "absent", "")]
            if cord and series["sequence"] == "T2w":
                told += [(where, masks[0]), ("lesion" if lesion else "healthy", masks[1])]
            for stage, labels in zip(STAGES, told, strict=False):
                tables[stage].append((path, index, view, *labels, patient["name"], patient["split"]))
    write_csv(output / "series.csv", ("patient", "series", "path", "anatomy", "location", "view", "sequence",
                                      "cord", "lesion", "split"), rows)
    for stage, lines in tables.items():
        columns = "path", "index", "axis", "label", "mask", "patient", "split"
        write_csv(output / f"{stage}.csv", columns, lines)


def slices_with(path, view):
    """[bool]: whether each slice of a mask holds anything; in the order of the tables' index."""
    voxels = np.flip(np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj), (0, 1))
    axis = ("sagittal", "coronal", "axial").index(view)
    return voxels.any(tuple({0, 1, 2} - {axis})).tolist()
