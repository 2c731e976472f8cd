"""One series of the cache: whether it is there and up to date, its making, and the names of its files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from datasets.preprocess import preprocess
from datasets.study_modes import vote_of
from datasets.volumes import read_volume
from utils.config import BadFile
from utils.files import replacing

RECORD = "_metadata.json"                            # ending of the name of a series' record


def image_path(folder, name, mode):
    """The file of one image of a series; mode: a word of intensity.MODES."""
    return Path(folder) / (f"{name}.pt" if mode == "mri" else f"{name}_{mode}.pt")


def mask_path(folder, name):
    """The file of a series' background."""
    return Path(folder) / f"{name}_mask.pt"


def record_path(folder, name):
    """The file that says that a series is whole, and all about it."""
    return Path(folder) / f"{name}{RECORD}"


def paths_of(folder, name, record):
    """Every file of a series."""
    images = [image_path(folder, name, mode) for mode in record["windows"] or ("mri",)]
    return [*images, mask_path(folder, name), record_path(folder, name)]


def inspect(job):
    """(source, its record if up to date or None, its vote for the study's mode).

    job: (source, raw, folder, look).  look False: the mode is given, so the values are not looked at.
    """
    source, raw, folder, look = job
    record = current_record(source, raw, folder)
    if look and record and record["vote"]:
        return source, record, tuple(record["vote"])
    return source, record, vote_of(source, raw, look)


def current_record(source, raw, folder):
    """The record of a cached series whose files are there and whose source is as it was, or None.

    The same paths, sizes and times of change do, or the same bytes; then the record gets the new times.
    """
    path, files = record_path(folder, source.name), files_of(source, raw)
    try:
        record = json.loads(path.read_text())
        if record["files"].keys() != files.keys() or not all(
                p.is_file() for p in paths_of(folder, source.name, record)):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None                                  # none as yet, or damaged
    if record["files"] != files:
        if record["sha256"] != hash_of(source.paths):
            return None
        record["files"] = files
        save_json(path, record)
    return record


def make_series(job):
    """Preprocess and write one series of (source, raw, folder, mode, vote, settings).

    vote: what inspect returned, or None where the mode was given.
    Returns (source, record, None), or (source, None, reason) when the source cannot be used.
    """
    source, raw, folder, mode, vote, settings = job
    where, files = str(source.paths[0].relative_to(raw)), files_of(source, raw)
    try:
        volume = read_volume(source)
        grid, images, background = preprocess(where, volume, mode, settings)
    except BadFile as error:
        return source, None, str(error).partition(": ")[2]                 # the path stands beside it
    facts = {"view": grid.view, "shape": list(background.shape), "spacing": list(grid.spacing), "mode": mode}
    record = {
        "source": where, "sha256": hash_of(source.paths), "files": files, "vote": vote, **facts,
        "windows": [name for name in images if name != "mri"], "notes": grid.notes,
        "affine": grid.affine.tolist(), "source_shape": list(map(int, volume.data.shape)),
        "source_affine": np.asarray(volume.affine).tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    record_path(folder, source.name).unlink(missing_ok=True)
    for name, image in images.items():
        save_tensor(image_path(folder, source.name, name), data=torch.from_numpy(image), **facts,
                    window=None if name == "mri" else name)
    save_tensor(mask_path(folder, source.name), data=torch.from_numpy(np.packbits(background)),
                shape=facts["shape"])
    save_json(record_path(folder, source.name), record)
    return source, record, None


def files_of(source, raw):
    """{path below raw: [bytes, time of the last change in ns]} of a source."""
    stats = {str(path.relative_to(raw)): path.stat() for path in source.paths}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def hash_of(paths):
    """SHA-256 of the bytes of some files in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def save_tensor(path, **content):
    """Write a dict with torch.save, whole or not at all."""
    with replacing(path) as file:
        torch.save(content, file)


def save_json(path, content):
    """Write JSON, whole or not at all."""
    with replacing(path, "w") as file:
        json.dump(content, file)
