"""Public data sets of electron microscopy: fetched, resumed, checked, unpacked, under the names we train on.

Where DATASETS is from: SNEMI3D (Kasthuri et al. 2015) is Zenodo record 7142003, with the MD5 that the
documentation of pytorch_connectomics quotes; CREMI's training volumes lie at cremi.org, with the SHA-256 of
torch-em; MitoEM 2.0 is Zenodo record 17635006, as torch-em has it.  No size is known, and of MitoEM 2.0 no
hash: what is received is then checked by the length that the server gives, and by the checksums inside the
archives.  Later releases: --url and --sha256.  SNEMI3D holds labels of AC4 only; an AC3_labels.h5 from
elsewhere is kept.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import h5py

from datasets.archives import unpack
from datasets.em_files import open_volume
from datasets.fetch import Remote, fault, fetch
from utils.config import UserError, closest

SNEMI3D_NM = (30.0, 6.0, 6.0)
SNEMI3D_NAMES = {"train-input": "AC4_inputs", "train-labels": "AC4_labels", "test-input": "AC3_inputs",
                 "test-labels": "AC3_labels"}
SLAB = 16                                           # sections that are converted at a time

DATASETS = {
    "snemi3d": [Remote("https://zenodo.org/records/7142003/files/snemi.zip",
                       ("AC4_inputs.h5", "AC4_labels.h5", "AC3_inputs.h5"),
                       "md5:3d25a7025f66698f33c7850ace885939")],
    "cremi3d": [Remote(f"https://cremi.org/static/data/sample_{sample}_20160501.hdf", (f"sample{sample}.h5",),
                       f"sha256:{digest}") for sample, digest in (
        ("A", "4c563d1b78acb2bcfb3ea958b6fe1533422f7f4a19f3e05b600bfa11430b510d"),
        ("B", "887e85521e00deead18c94a21ad71f278d88a5214c7edeed943130a1f4bb48b8"),
        ("C", "2874496f224d222ebc29d0e4753e8c458093e1d37bc53acd1b69b19ed1ae7052"))],
    "mitoem2": [Remote(f"https://zenodo.org/records/17635006/files/{name}.zip", (name,)) for name in (
        "Dataset001_ME2-Beta", "Dataset002_ME2-Jurkat", "Dataset003_ME2-Macro", "Dataset004_ME2-Mossy",
        "Dataset005_ME2-Podo", "Dataset006_ME2-Pyra", "Dataset007_ME2-Sperm", "Dataset008_ME2-Stem")],
}


def download(dataset, folder, url=None, sha256=None, timeout=30, progress=True):
    """Fetch the data set ``dataset``, a word of DATASETS, into folder/dataset -> its files and folders there.

    url: this file instead of those of DATASETS: a mirror of one of them, recognised by its name, whose hash
    then holds too, or another release; sha256 is its hash.  timeout: s without a byte.
    What is there already is kept, and asks the server nothing.  Ctrl-C keeps <file>.part, where the next call
    goes on.  An archive put by hand where the error message says is unpacked as if it had been fetched.
    Raises UserError for an unknown word, a URL that gives no such file, wrong sizes and hashes, a full disk;
    BadFile for damaged or hostile archives.
    """
    remotes = choose(dataset, url, sha256)
    home = Path(folder) / dataset
    try:
        home.mkdir(parents=True, exist_ok=True)
        return [path for remote in remotes for path in obtain(remote, home, timeout, progress)]
    except OSError as error:
        raise UserError(f"{error.filename or home}: cannot be written ({error.strerror or error}); start "
                        "again when it can: what was received is kept") from error


def choose(dataset, url, sha256):
    """The Remotes to fetch; see download."""
    if dataset not in DATASETS:
        raise UserError(f'download {dataset}: not one of {", ".join(DATASETS)}{closest(dataset, DATASETS)}')
    remotes = DATASETS[dataset]
    if sha256 and (url is None or not re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise UserError(f"--sha256 {sha256}: give 64 hexadecimal digits, and --url, whose file they describe")
    if url is None:
        return remotes
    if urlsplit(url).scheme not in ("http", "https") or not Remote(url, ()).name:
        raise UserError(f"--url {url}: give the http or https address of a file")
    name = Remote(url, ()).name
    stem = re.sub(r"(\.tar)?\.\w+$", "", name)
    targets = {"snemi3d": remotes[0].targets, "cremi3d": (f"{stem}.h5",), "mitoem2": (stem,)}[dataset]
    chosen = next((replace(remote, url=url) for remote in remotes if remote.name == name),
                  Remote(url, targets))
    if chosen.packed != remotes[0].packed:
        raise UserError(f"--url {url}: {dataset} comes as {remotes[0].name} does, not as {name}")
    return [replace(chosen, digest=f"sha256:{sha256.lower()}", size=None) if sha256 else chosen]


def obtain(remote, home, timeout, progress):
    """The targets of one Remote in the folder ``home``, fetched and unpacked unless they are there."""
    targets = [home / name for name in remote.targets]
    if remote.packed and all(target.exists() for target in targets):
        return targets
    path = home / remote.name if remote.packed else targets[0]
    fetched = not path.exists()
    if fetched:
        fetch(remote, path, timeout, progress)
    elif found := fault(path, remote):
        raise UserError(f"{path}: {found}, so it is not the file of {remote.url}; move it away")
    if remote.packed:
        unpacked = home / f".unpacking-{remote.name}"
        shutil.rmtree(unpacked, ignore_errors=True)                                # of an interrupted call
        try:
            unpack(path, unpacked)
            (place_volumes if targets[0].suffix == ".h5" else place_folder)(path, unpacked, targets)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        if fetched:
            path.unlink()
    return targets


def place_volumes(path, unpacked, targets):
    """Write the volumes of SNEMI3D in the folder ``unpacked`` as HDF5, key "main", under our names."""
    home = targets[0].parent
    found = {}
    for file in sorted(unpacked.rglob("*.*")):
        name = SNEMI3D_NAMES.get(file.stem, file.stem)
        if name in SNEMI3D_NAMES.values() and file.suffix.lower() in (".tif", ".tiff", ".h5", ".hdf5"):
            found[home / f"{name}.h5"] = file
    missing = [target.name for target in targets if target not in found and not target.exists()]
    if missing:
        raise UserError(f"{path}: holds nothing that could be {', '.join(missing)}")
    for target, file in found.items():
        if target.exists():
            continue
        volume, part = open_volume(file), Path(f"{target}.part")
        depth, height, width = volume.shape
        with h5py.File(part, "w") as output:
            chunks = min(SLAB, depth), min(128, height), min(128, width)
            array = output.create_dataset("main", volume.shape, volume.dtype, chunks=chunks,
                                          compression="gzip", compression_opts=1)
            array.attrs["resolution"] = SNEMI3D_NM                                 # nm, as in CREMI's files
            for first in range(0, depth, SLAB):
                array[first:first + SLAB] = volume[first:min(first + SLAB, depth), 0:height, 0:width]
        os.replace(part, target)


def place_folder(path, unpacked, targets):
    """Move the nnU-Net data set in the folder ``unpacked``, the folder that holds imagesTr, to its target."""
    found = [folder.parent for folder in unpacked.rglob("imagesTr") if folder.is_dir()]
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} folders imagesTr, not one; unpack it by hand into "
                        f"{targets[0].parent}")
    os.replace(found[0], targets[0])
