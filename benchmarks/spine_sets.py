"""The three learning tasks of the spine results, cut from real data of the Spinal Cord Toolbox.

    python benchmarks/spine_sets.py --data spine --output data/spine

--data holds errsm30, fake_lesion and pam50_small: a subject in several contrasts, a subject with a lesion
painted into its T2w image, and the PAM50 template with its vertebral levels.  Writes CSV files for --data of
train_finetune.py, and below pieces/ parts of the template as long as they are wide (70 mm), tilted to the
front or the back and shifted, as no patient lies straight:

    cord_<subject>.csv   axial slices with masks of the cord; <subject>, errsm30 or fake_lesion, is the test,
                         the rest trains, but for the template's C4 to C6, which choose the checkpoint
    view.csv             slices along the three axes; the template trains, the two subjects are the test
    level.csv            axial slices of the template: cervical, thoracic, lumbar; C4, C5, T5 to T7 and L1 are
                         the test, C6, T9 and the lowest 10 mm choose the checkpoint
    lesion.csv           sagittal slices with masks of the cord, to paint lesions into; errsm30 and the
                         template down to T9 train, what lies below chooses the checkpoint
    lesion_<axis>.csv    all slices of fake_lesion along an axis, with masks of the lesion: the test
"""

import argparse
import csv
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.config import UserError, run_script

COLUMNS = ("path", "index", "axis", "label", "mask", "patient", "split")
TEMPLATE = "pam50_small/PAM50_small_t2.nii.gz", "pam50_small/PAM50_small_cord.nii.gz"
FAKE = "fake_lesion/t2_fake_lesion.nii.gz", "fake_lesion/t2_fake_lesion_sc_seg.nii.gz"
ERRSM = {"t2": "errsm30/t2/t2_seg-manual.nii.gz", "t2s": "errsm30/t2s/t2s_seg.nii.gz",
         "mt0": "errsm30/mt/mt0_seg.nii.gz", "mt1": "errsm30/mt/mt1_seg.nii.gz",
         "t1w": "errsm30/mt/mt1_seg.nii.gz"}         # t1w lies on the voxels of mt1
LEVELS = {"cervical": range(1, 8), "thoracic": range(8, 20), "lumbar": range(20, 21)}
TEST_LEVELS, VAL_LEVELS, VAL_CORD = (4, 5, 12, 13, 14, 20), (6, 16), (4, 5, 6)
LOWEST = 15                                          # slices of the template below L1
PIECE, STEP = 35, 5                                  # slices of 2 mm in a piece, and between two starts
TILT, SHIFT = 35, 12                             # most degrees and mm of a piece
VAL_BELOW = 73                                       # slice of the template where T10 begins


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="errsm30, fake_lesion, ...")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for the CSV files")
    return parser.parse_args()


def level_of_slices(data):
    """[level of the template's axial slice]: 1 to 7 cervical, 8 to 19 thoracic, 20 L1; 0: none."""
    levels = np.asarray(nib.load(data / "pam50_small/PAM50_small_levels.nii.gz").dataobj)
    return np.moveaxis(levels, 2, 0).max((1, 2)).tolist()


def cut_pieces(data, folder):
    """Cut the template into pieces below ``folder`` -> [(image, mask of the cord, split)].

    Those that lie below T10 validate; what reaches over its upper end is left out.  Tilts and shifts depend
    on where a piece starts alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = (nib.load(data / path) for path in TEMPLATE)
    pieces = []
    for start in range(0, image.shape[2] - PIECE + 1, STEP):
        if start < VAL_BELOW < start + PIECE:
            continue
        paths = [folder / f"{start:03d}.nii.gz", folder / f"{start:03d}_cord.nii.gz"]
        part, rng = image.slicer[:, :, start:start + PIECE], np.random.default_rng(start)
        turn = Rotation.from_euler("x", rng.uniform(-TILT, TILT), degrees=True).as_matrix()
        middle = apply_affine(part.affine, np.array(part.shape) / 2)
        moved = from_matvec(turn, middle - turn @ middle + (0, rng.uniform(-SHIFT, SHIFT), 0)) @ part.affine
        for whole, path, order in zip((image, mask), paths, (1, 0), strict=True):
            nib.save(resample_from_to(whole, (part.shape, moved), order), path)
        pieces.append((*paths, "train" if start >= VAL_BELOW else "val"))
    return pieces


def cord_rows(data, levels, test):
    """Rows of axial slices with masks of the cord; ``test``: the subject that is left out of training."""
    image, mask = (data / path for path in TEMPLATE)
    for index, level in enumerate(levels):
        split = "val" if level in VAL_CORD else "train"
        yield image, index, "axial", "", mask, f"template_{split}", split
    split = "test" if test == "fake_lesion" else "train"
    yield data / FAKE[0], "", "axial", "", data / FAKE[1], "fake_lesion", split
    split = "test" if test == "errsm30" else "train"
    for image, mask in ERRSM.items():
        yield data / Path(mask).parent / f"{image}.nii.gz", "", "axial", "", data / mask, "errsm30", split


def view_rows(data, pieces):
    """Rows of slices of every third piece and of the T2w images of both subjects, along each axis."""
    template = [(path, f"template_{split}", split) for path, _, split in pieces[::3]]
    subjects = [(data / FAKE[0], "fake_lesion", "test"), (data / "errsm30/t2/t2.nii.gz", "errsm30", "test")]
    for path, patient, split in template + subjects:
        for axis in ("axial", "coronal", "sagittal"):
            yield path, "", axis, axis, "", patient, split


def level_rows(data, levels):
    """Rows of the template's axial slices, by the part of the spine."""
    for index, level in enumerate(levels):
        if level or index < LOWEST:
            part = next((name for name, of in LEVELS.items() if level in of), "lumbar")
            split = ("test" if level in TEST_LEVELS else
                     "val" if level in VAL_LEVELS or index < LOWEST // 3 else "train")
            yield data / TEMPLATE[0], index, "axial", part, "", f"template_{split}", split


def lesion_rows(data, pieces):
    """Rows of the sagittal slices that have cord, with masks of it, to paint lesions into."""
    subject = data / "errsm30/t2/t2.nii.gz", data / ERRSM["t2"], "train"
    for number, (path, mask, split) in enumerate([subject, *pieces]):
        right_to_left = nib.as_closest_canonical(nib.load(mask)).dataobj[::-1]
        for index in np.flatnonzero(np.any(right_to_left, (1, 2))):
            yield path, index, "sagittal", "", mask, f"template_{split}" if number else "errsm30", split


def fake_rows(data, axis):
    """Row of all slices of fake_lesion along an axis, with masks of its lesion."""
    mask = data / "fake_lesion/t2_fake_lesion_lesion_seg.nii.gz"
    yield data / FAKE[0], "", axis, "", mask, "fake_lesion", "test"


def main():
    args = parse_args()
    data, output = args.data.resolve(), args.output.resolve()
    missing = [path for path in (*TEMPLATE, *FAKE, *ERRSM.values()) if not (data / path).is_file()]
    if missing:
        raise UserError(f"{data / missing[0]}: no such file of sct_testing_data (Spinal Cord Toolbox)")
    levels, pieces = level_of_slices(data), cut_pieces(data, output / "pieces")
    tables = {"cord_errsm30": cord_rows(data, levels, "errsm30"), "view": view_rows(data, pieces),
              "cord_fake_lesion": cord_rows(data, levels, "fake_lesion"), "level": level_rows(data, levels),
              "lesion": lesion_rows(data, pieces),
              **{f"lesion_{axis}": fake_rows(data, axis) for axis in ("sagittal", "axial")}}
    for name, rows in tables.items():
        with open(output / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    print(f"{len(tables)} tables: {output}")


if __name__ == "__main__":
    run_script(main)
