"""Demo data: electron microscopy of invented tissue in the layouts of SNEMI3D, CREMI and MitoEM2."""

import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from scipy import ndimage

from datasets.demo_files import is_complete, make_missing, whole_folder, write_marker
from datasets.em_phantom import tissue
from utils.config import UserError

LEAST = (8, 32)                                      # sections, pixels of a volume that shows something
SNEMI3D_NM = (12.0, 8.0, 8.0)                       # D, H, W; the published 30 nm take hours of training
CREMI_NM = (40.0, 8.0, 8.0)                          # every other pixel of the published 4 nm
MITOEM_NM = (30.0, 8.0, 8.0)                         # as published
NO_CLEFT = np.uint64(0xFFFFFFFFFFFFFFFF)             # what CREMI writes where there is no cleft


def write_em_demo(folder, size=(40, 160), seed=0, workers=0):
    """Write ``folder``/snemi3d/, cremi3d/ and mitoem2/, two labelled volumes each -> folder.

    size: (sections, pixels per side) of every volume.  A volume depends on (seed, its number, size) alone.
    workers: processes; 0 makes all here.  What a stopped run made is kept; a finished set is not made again.
    Raises UserError when size is below LEAST, or the folder holds a set with other settings, or other files.
    """
    folder, size = Path(folder), [int(side) for side in size]
    if len(size) != 2 or size[0] < LEAST[0] or size[1] < LEAST[1]:
        raise UserError(f"size = {size}: demo volumes need (sections, pixels) of {LEAST} at least")
    wanted = {"size": size, "seed": seed}
    if is_complete(folder, wanted):
        return folder
    write_marker(folder, wanted, complete=False)
    jobs = [(folder / name, size, seed) for name in LAYOUTS]
    make_missing(write_layout, jobs, workers, unit="dataset")
    write_marker(folder, wanted, complete=True)
    return folder


def write_layout(job):
    """The two volumes of one data set, in a folder that is renamed when whole.  job: (folder, size, seed)."""
    folder, (sections, pixels), seed = job
    write, spacing, names = LAYOUTS[folder.name]
    first = 2 * list(LAYOUTS).index(folder.name)
    with whole_folder(folder) as unfinished:
        for number, name in enumerate(names, start=first):
            write(unfinished, name, tissue((sections, pixels, pixels), spacing, [seed, number]))


def write_snemi3d(folder, name, block):
    """<name>_inputs.h5 with the image and <name>_labels.h5 with the neurons, both under the key main.

    The published files do not say the size of their voxels; these do, since it is another.
    """
    for kind, array in (("inputs", block["raw"]), ("labels", block["neurons"])):
        with h5py.File(folder / f"{name}_{kind}.h5", "w") as file:
            item = file.create_dataset("main", data=array, compression="gzip", compression_opts=2)
            item.attrs["resolution"] = SNEMI3D_NM


def write_cremi3d(folder, name, block):
    """<name>.h5 with the image, the neurons and the synaptic clefts, each with its resolution in nm."""
    clefts = np.where(block["clefts"] > 0, block["clefts"], NO_CLEFT).astype(np.uint64)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        for key, array in (("volumes/raw", block["raw"]), ("volumes/labels/clefts", clefts),
                           ("volumes/labels/neuron_ids", block["neurons"].astype(np.uint64))):
            item = file.create_dataset(key, data=array, compression="gzip", compression_opts=2)
            item.attrs["resolution"] = CREMI_NM


def write_mitoem2(folder, name, block):
    """Image and labels 0, 1, 2 (background, mitochondrion, its boundary) as nnU-Net v2 names them."""
    folder = folder / "Dataset001_demo"
    affine = np.diag([*(step / 1000 for step in MITOEM_NM[::-1]), 1.0])              # x, y, z in microns
    for part, array in ((f"imagesTr/{name}_0000", block["raw"]),
                        (f"labelsTr/{name}", mitochondrion_classes(block["mitochondria"]))):
        image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("micron")
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, folder / f"{part}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "EM"}, "labels": {"background": 0, "mitochondrion": 1, "boundary": 2},
        "numTraining": len(LAYOUTS["mitoem2"][2]), "file_ending": ".nii.gz"}, indent=2))


def mitochondrion_classes(ids):
    """Ids [D, H, W] -> uint8: 2 where a mitochondrion touches something else in its section, else 1; or 0."""
    inner = ndimage.minimum_filter(ids, (1, 3, 3)) == ndimage.maximum_filter(ids, (1, 3, 3))
    return np.where(ids > 0, np.where(inner, 1, 2), 0).astype(np.uint8)


# What writes a volume, its voxel size, the names of the volumes.
LAYOUTS = {"snemi3d": (write_snemi3d, SNEMI3D_NM, ("AC4", "AC3")),
           "cremi3d": (write_cremi3d, CREMI_NM, ("sampleA", "sampleB")),
           "mitoem2": (write_mitoem2, MITOEM_NM, ("demo_a", "demo_b"))}
