"""Demo data: MRI and CT studies of invented heads in the file formats of a clinic, with labels."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid

from datasets.demo_files import dicom_image, is_complete, make_missing, whole_folder, write_marker
from datasets.head_findings import FINDINGS
from datasets.head_images import ct, mri
from datasets.head_phantom import draw_head, make_head

SHARE = 0.4                                          # of the studies that have a finding
# File form ("dicom" or a NIfTI's orientation), view and folder of both series of the MRI studies in turn.
MRI_FORMS = ((("RAS", "axial", "."), ("RAS", "axial", ".")),
             (("dicom", "sagittal", "images"), ("dicom", "axial", "images")),          # two in one folder
             (("PSR", "sagittal", "."), ("LPS", "axial", ".")),
             (("dicom", "sagittal", "scans/1"), ("dicom", "axial", "scans/2")),
             (("LPS", "axial", "nifti"), ("dicom", "coronal", "dicom/1")))
CT_FORMS = ("tilted", "uneven", "localizer", "nifti")                     # of the CT studies in turn
VIEWS = {                                            # directions of a row and a column; middle: x, y, z in mm
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -8, 8)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (1, 0, 0), (0, -8, -18)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0), (0, -8, -18)),
}
TIMES = {"t1": (500, 10, 0), "t2": (4500, 95, 0), "flair": (9000, 110, 2500)}   # repetition, echo, inversion


def write_demo_studies(output, studies=12, seed=0, workers=0, size=None):
    """Write ``output``/raw/<study>/, labels.csv (study_id and FINDINGS), modes.csv, split.csv -> raw.

    Two thirds of the studies are MRI with two series, one third is CT; NIfTI and DICOM, see MRI_FORMS and
    CT_FORMS.  size: pixels per side of a slice; None: drawn from 96 to 128.  A study depends on (seed, its
    number, size, its labels) alone.  workers: processes; 0 makes all here.  What a stopped run made is kept;
    a finished set is not made again.  Raises UserError when the folder holds a set with other settings, or
    other files.
    """
    output = Path(output)
    wanted = {"studies": studies, "seed": seed, "size": size}
    if is_complete(output, wanted):
        return output / "raw"
    write_marker(output, wanted, complete=False)
    modes, labels = plan_studies(studies, seed)
    names = [f"study_{number:03d}" for number in range(studies)]
    write_csv(output / "labels.csv", ("study_id", *FINDINGS),
              [(name, *row) for name, row in zip(names, labels.tolist(), strict=True)])
    write_csv(output / "modes.csv", ("study", "mode"), zip(names, modes, strict=True))
    write_csv(output / "split.csv", ("study", "split"), zip(names, plan_splits(labels), strict=True))
    jobs = [(output / "raw" / name, number, modes[number], modes[:number].count(modes[number]),
             [finding for finding, has in zip(FINDINGS, labels[number], strict=True) if has], size, seed)
            for number, name in enumerate(names)]
    make_missing(write_study, jobs, workers, unit="study")
    write_marker(output, wanted, complete=True)
    return output / "raw"


def plan_studies(studies, seed):
    """(modes, labels): list of "mri" | "ct"; int array [studies, len(FINDINGS)] of 0 and 1.

    Findings are independent.  Each falls evenly on MRI and CT and on both halves of the studies, where they
    are enough: so each of these has studies with and without it.
    """
    rng = np.random.default_rng(seed)
    modes = ["ct" if number % 3 == 2 else "mri" for number in range(studies)]
    # Neighbours in this order share half and mode; every 1 / SHARE-th of it has the finding.
    blocks = [[n for n in range(studies) if (2 * n >= studies) == late and modes[n] == mode]
              for late, mode in ((False, "mri"), (False, "ct"), (True, "ct"), (True, "mri"))]
    labels = np.zeros((studies, len(FINDINGS)), int)
    for column in range(len(FINDINGS)):
        order = [n for block in blocks for n in rng.permutation(block)]
        has = np.diff(np.floor(SHARE * np.arange(studies + 1) + rng.random()))
        labels[np.array(order, int), column] = has
    return modes, labels


def plan_splits(labels):
    """"train" | "val" | "test" for each study: the first half, a sixth, a third.

    Of the places that validation may have in the second half, the first with which the test studies of the
    most labels have both classes.
    """
    count = len(labels)
    late, size = range(count // 2, count), max(1, count // 6)

    def told_apart(start):
        test = [n for n in late if not start <= n < start + size]
        return sum(0 < labels[test, column].sum() < len(test) for column in range(labels.shape[1]))

    start = max(late[:len(late) - size + 1], key=told_apart)
    val = range(start, start + size)
    return ["train" if n not in late else "val" if n in val else "test" for n in range(count)]


def write_csv(path, header, rows):
    """A small table, with its header."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_study(job):
    """One study.  job: (folder, number, mode, number among those of its mode, findings, size, seed)."""
    folder, number, mode, turn, findings, size, seed = job
    rng = np.random.default_rng([seed, number])
    patient = draw_head(rng, findings)
    uid = generate_uid(entropy_srcs=[folder.name, f"seed {seed}"])
    study = {"PatientID": folder.name, "PatientName": "Demo^Head", "PatientPosition": "HFS", "StudyID": "1",
             "StudyDate": "20240101", "StudyInstanceUID": uid,
             "FrameOfReferenceUID": generate_uid(entropy_srcs=[uid, "frame"])}
    with whole_folder(folder) as unfinished:
        if mode == "ct":
            write_ct(unfinished, patient, CT_FORMS[turn % len(CT_FORMS)], size, rng, study)
        else:
            write_mri(unfinished, patient, MRI_FORMS[turn % len(MRI_FORMS)], size, rng, study)


@dataclass
class Grid:
    """Where the voxels of a series lie, as DICOM says it; mm, in the order x, y, z of patient coordinates.

    row, column: [3], unit vectors along a row and down a column.  positions: [D, 3], of each slice's first
    voxel.  spacing: of the square pixels.  thickness: of each slice, [D].  size: pixels per side.
    """
    row: np.ndarray
    column: np.ndarray
    positions: np.ndarray
    spacing: float
    thickness: np.ndarray
    size: int

    def points(self):
        """z, y, x of all voxels, float32 [D, H, W] each."""
        along = np.arange(self.size)[:, None] * self.spacing                            # [N, 1]
        points = (self.positions[:, None, None] + (along * self.column)[None, :, None]
                  + (along * self.row)[None, None])                                     # [D, H, W, 3]
        return [points[..., axis].astype(np.float32) for axis in (2, 1, 0)]

    def voxel(self):
        """Width of a soft edge, mm: the side of a cube as large as a voxel."""
        return float((self.spacing ** 2 * self.thickness.mean()) ** (1 / 3))

    def affine(self):
        """[4, 4] from voxel indices (column, row, slice) to mm, RAS+, of an evenly spaced grid."""
        step = self.positions[1] - self.positions[0]
        columns = [self.row * self.spacing, self.column * self.spacing, step, self.positions[0]]
        return np.diag([-1.0, -1, 1, 1]) @ np.vstack([np.column_stack(columns), [0, 0, 0, 1]])


def draw_grid(rng, view, size, tilt=0.0, thickness=None):
    """A Grid over the head.

    tilt: degrees, of the planes about the axis from right to left, while the slices still advance along z.
    thickness: mm of each slice, [D]; None: drawn, all alike.
    """
    row, column, normal, middle = (np.array(vector, float) for vector in VIEWS[view])
    drawn = rng.integers(12, 17) * 8, rng.uniform(216, 232), rng.choice((4.5, 5.0))
    size, field = size or int(drawn[0]), drawn[1]
    if thickness is None:
        thickness = np.full(round((155 if view == "axial" else 165) / drawn[2]), drawn[2])
    angle = np.deg2rad(tilt)
    column = np.cos(angle) * column + np.sin(angle) * normal
    along = np.cumsum(thickness) - thickness / 2 - thickness.sum() / 2                  # mm from the middle
    corner = middle - (row + column) * field / 2 * (1 - 1 / size)
    return Grid(row, column, corner + along[:, None] * normal, field / size, thickness, size)


def write_ct(folder, patient, form, size, rng, study):
    """One CT of the patient in the form, one of CT_FORMS.  study: DICOM elements of the study, by keyword."""
    tilt = rng.uniform(12, 20) if form == "tilted" else 0.0
    thickness = np.repeat((4.0, 7.0), (20, 11)) if form == "uneven" else None
    grid = draw_grid(rng, "axial", size, tilt, thickness)
    volume = ct(make_head(patient, grid.points(), grid.voxel()), rng, noise=rng.uniform(3, 5))
    tags = {**study, "Modality": "CT", "StudyDescription": "Head CT", "SeriesDescription": "brain",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "KVP": 120,
            "GantryDetectorTilt": round(tilt, 2), "RescaleIntercept": -1024, "RescaleSlope": 1,
            "RescaleType": "HU", "WindowCenter": 40, "WindowWidth": 80}
    if form == "nifti":
        return write_nifti(folder / "head_ct.nii.gz", volume, grid, "LPS")
    write_dicom(folder / "dicom" / "axial", (volume + 1024).astype(np.uint16), grid, rng, 2, tags)
    if form == "localizer":
        tags.update(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesDescription="scout")
        grid = draw_grid(rng, "sagittal", grid.size)
        volume = ct(make_head(patient, grid.points(), grid.voxel()), rng)
        shadow = np.rint(volume.mean(0, keepdims=True) + 1024).astype(np.uint16)
        grid = replace(grid, positions=grid.positions.mean(0, keepdims=True),
                       thickness=grid.thickness.sum(keepdims=True))
        write_dicom(folder / "dicom" / "scout", shadow, grid, rng, 1, tags)


def write_mri(folder, patient, form, size, rng, study):
    """Two series of the patient, each of another sequence, in the form, one of MRI_FORMS; study: as there."""
    left = list(TIMES)
    for number, (kind, view, place) in enumerate(form, start=1):
        sequence = "t1" if view == "sagittal" else str(rng.choice(left))
        left.remove(sequence)
        grid = draw_grid(rng, view, size)
        image = mri(make_head(patient, grid.points(), grid.voxel()), sequence, rng, rng.uniform(0.015, 0.035))
        image = np.rint(image).astype(np.int16)
        if kind != "dicom":
            write_nifti(folder / place / f"{sequence}_{view}.nii.gz", image, grid, kind)
            continue
        repetition, echo, inversion = TIMES[sequence]
        tags = {**study, "Modality": "MR", "StudyDescription": "Head MRI",
                "SeriesDescription": f"{sequence} {view}", "ImageType": ["ORIGINAL", "PRIMARY", "M"],
                "ScanningSequence": "IR" if inversion else "SE", "SequenceVariant": "NONE",
                "MRAcquisitionType": "2D", "MagneticFieldStrength": 1.5, "RepetitionTime": repetition,
                "EchoTime": echo, "WindowCenter": int(image.max()) // 3, "WindowWidth": int(image.max()) // 2}
        if inversion:
            tags["InversionTime"] = inversion
        write_dicom(folder / place, image.astype(np.uint16), grid, rng, number, tags)


def write_nifti(path, volume, grid, orientation):
    """A volume [D, H, W] as int16 NIfTI whose axes run as ``orientation`` says, such as "LPS"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume.transpose(2, 1, 0), grid.affine())
    now, wanted = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(now, wanted))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def write_dicom(folder, volume, grid, rng, number, tags):
    """A series, one file per slice of a uint16 volume [D, H, W]; file names and instance numbers in no order.

    number: of the series.  tags: elements of every image of it, by keyword.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid(entropy_srcs=[tags["StudyInstanceUID"], f"series {number}"])
    tags = {**tags, "SeriesInstanceUID": series, "SeriesNumber": number,
            "ImageOrientationPatient": np.round([*grid.row, *grid.column], 6).tolist(),
            "PixelSpacing": [round(grid.spacing, 6)] * 2}
    files, instances = rng.permutation(len(volume)), rng.permutation(len(volume)) + 1
    sop_class = CTImageStorage if tags["Modality"] == "CT" else MRImageStorage
    for index, pixels in enumerate(volume):
        item = dicom_image(pixels, sop_class, generate_uid(entropy_srcs=[series, f"image {index}"]), **tags,
                           InstanceNumber=int(instances[index]), SliceThickness=float(grid.thickness[index]),
                           ImagePositionPatient=np.round(grid.positions[index], 4).tolist())
        item.save_as(folder / f"IM{number}{files[index]:04d}.dcm", enforce_file_format=True)
