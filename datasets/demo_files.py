"""What makers of demo data share: a folder that knows what it was made with, many processes, DICOM images."""

import json
import os
from contextlib import contextmanager

import pydicom
from pydicom.uid import ExplicitVRLittleEndian
from tqdm import tqdm

from datasets.pair_files import run_jobs
from utils.config import UserError
from utils.files import claim, is_taken, replacing

MARKER = "demo.json"                                 # what the folder was made with, and whether it is whole


def is_complete(output, wanted):
    """Whether the folder holds the finished set that is wanted; UserError when it holds anything else."""
    marker = output / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text())
        other = [key for key in wanted if found["made_with"].get(key) != wanted[key]]
        if other:
            raise UserError(f"{output}: its demo data were made with another {', '.join(other)}; "
                            f"delete that folder or choose another")
        return found["complete"]
    if is_taken(output):
        raise UserError(f"{output}: holds other things (no {MARKER} in it); choose another folder")
    return False


def write_marker(output, wanted, complete):
    """Record in the folder what it is made with, whole or not at all."""
    claim(output, "wait for its end")
    with replacing(output / MARKER, "w") as file:
        json.dump({"made_with": wanted, "complete": complete}, file, indent=2)


def make_missing(work, jobs, workers, unit):
    """work(job) for each job (folder, ...) whose folder is not there yet, with a progress bar.

    work: a function of a module.  workers: processes; 0: all here.
    """
    missing = [job for job in jobs if not job[0].is_dir()]
    done = run_jobs(work, missing, workers)
    for _ in tqdm(done, total=len(missing), unit=unit, desc="demo", disable=not missing):
        pass


@contextmanager
def whole_folder(folder):
    """A hidden folder to write to, which becomes ``folder`` when the block ends without an error."""
    unfinished = folder.with_name(f".{folder.name}")     # hidden: no reader of images looks there
    unfinished.mkdir(parents=True, exist_ok=True)
    yield unfinished
    os.replace(unfinished, folder)


def dicom_image(pixels, sop_class, instance, **tags):
    """An uncompressed single-frame pydicom.Dataset.

    pixels: uint16 or int16 [H, W].  sop_class, instance: UIDs.  tags: further elements by keyword.
    """
    item = pydicom.Dataset()
    item.file_meta = pydicom.dataset.FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.SOPClassUID, item.SOPInstanceUID = sop_class, instance
    item.Rows, item.Columns = pixels.shape
    item.SamplesPerPixel, item.PixelRepresentation = 1, int(pixels.dtype.kind == "i")
    item.PhotometricInterpretation = "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
    for name, value in tags.items():
        setattr(item, name, value)
    item.PixelData = pixels.tobytes()
    return item
