"""Demo data: X-rays of invented patients in the file formats of a clinic, and pairs made from them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.uid import DigitalXRayImageStorageForPresentation, generate_uid

from datasets.demo_files import dicom_image, is_complete, make_missing, whole_folder, write_marker
from datasets.drr import AIR, draw_angles, rotate
from datasets.io import min_max
from datasets.pair_files import find_sources
from datasets.pairs import write_pairs
from datasets.phantom import thorax_ct

IMAGES_PER_PATIENT = 2
FIELD = (360.0, 216.0, 384.0)                        # mm of the phantom that is imaged, D, H, W
FORMATS = ("png16", "dicom", "monochrome1", "png", "png", "png", "png", "png")     # of the patients in turn


def write_longitudinal_demo(output, size, patients, pairs_per_patient, seed, workers, settings):
    """Write ``output``/images/<patient>/ and ``output``/pairs/<case>/; returns the folder of the pairs.

    images: frontal X-rays of ``patients`` phantoms as PNG (8 and 16 bit) and DICOM (MONOCHROME1 too), about
    ``size`` pixels wide.  pairs: pairs_per_patient cases (an odd number is rounded up) of size x size pixels;
    settings: those of pairs.make_pair.  workers: processes; 0 makes all here.  What a stopped run made is
    kept; a finished set is not made again.  Raises UserError when the folder holds a set with other settings,
    or other files.
    """
    output = Path(output)
    wanted = {"size": size, "patients": patients, "pairs_per_patient": pairs_per_patient, "seed": seed,
              "settings": settings}
    wanted = json.loads(json.dumps(wanted))          # tuples become lists, as in the file
    if is_complete(output, wanted):
        return output / "pairs"
    write_marker(output, wanted, complete=False)
    names = [f"demo{number:03d}" for number in range(patients)]
    jobs = [(output / "images" / name, number, size, seed) for number, name in enumerate(names)]
    make_missing(write_patient, jobs, workers, unit="patient")
    # The pairs of a patient are shared out among that patient's images.
    per_image = -(-pairs_per_patient // IMAGES_PER_PATIENT)
    write_pairs(find_sources(output / "images"), output / "pairs", per_image, size, seed, workers, settings)
    write_marker(output, wanted, complete=True)
    return output / "pairs"


def write_patient(job):
    """One patient's X-rays, in a folder that is renamed when whole.  job: (folder, number, size, seed)."""
    folder, number, size, seed = job
    rng = np.random.default_rng([seed, number])
    spacing = FIELD[2] / max(size, 128)              # coarser voxels would lose the ribs
    hu, _ = thorax_ct(rng, [round(length / spacing) for length in FIELD], (spacing,) * 3)
    with whole_folder(folder) as unfinished:
        for visit in range(IMAGES_PER_PATIENT):
            image = expose(hu, spacing, rng)
            write_image(unfinished / f"{folder.name}-visit{visit + 1}", image, FORMATS[number % len(FORMATS)])


def expose(hu, spacing, rng):
    """One frontal X-ray of a CT, float32 [h, w] in [0, 1], with its own pose, field and exposure."""
    angles = draw_angles(rng, max_angle=6.0, max_sum=12.0, power=1.0)
    rays = (rotate(np.maximum(hu, AIR).astype(np.float32), angles) - AIR).sum(1) * spacing / 1000
    top, bottom, left, right = (int(rng.uniform(0, 0.06) * side) for side in np.repeat(rays.shape, 2))
    rays = rays[top:rays.shape[0] - bottom, left:rays.shape[1] - right]
    # Exposure follows the patient: the detector's curve spreads what lies between lung and belly.
    lung, belly = np.percentile(rays[rays > 30], (12, 90))
    middle, width = lung + rng.uniform(0.32, 0.48) * (belly - lung), rng.uniform(0.2, 0.28) * (belly - lung)
    image = 1 / (1 + np.exp(-(rays - middle) / width))
    image += rng.normal(0, 0.006, image.shape)       # quanta
    return min_max(image)


def write_image(path, image, kind):
    """Write an image in [0, 1] as ``path`` plus the suffix of its format, one of FORMATS."""
    if kind == "png":
        Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(f"{path}.png")
    elif kind == "png16":
        Image.fromarray(np.rint(image * 65535).astype(np.uint16)).save(f"{path}.png")
    else:
        write_dicom(f"{path}.dcm", path.name, image, inverted=kind == "monochrome1")


def write_dicom(path, name, image, inverted):
    """A 12-bit digital X-ray; inverted: MONOCHROME1, where the largest stored value is black."""
    stored = np.rint(image * 4095).astype(np.uint16)
    item = dicom_image(4095 - stored if inverted else stored, DigitalXRayImageStorageForPresentation,
                       generate_uid(entropy_srcs=[name]), BitsStored=12, HighBit=11,
                       PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2",
                       PatientID=name.split("-")[0], PatientName="Demo^Phantom",
                       Modality="DX", BodyPartExamined="CHEST", ViewPosition="PA",
                       WindowCenter=2048, WindowWidth=4096)
    item.save_as(path, enforce_file_format=True)
