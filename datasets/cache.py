"""The cache of brain studies: each series of a folder preprocessed once, then read in under a millisecond.

    <cache>/metadata.json, mode_mapping.csv, bad_files.csv, notes.csv
    <cache>/processed/<study>/<name>.pt                an MRI; or <name>_brain.pt, _blood.pt, _bone.pt: a CT
                             /<name>_mask.pt           its background in packed bits, 1 = background
                             /<name>_metadata.json     its record, written last: the series is whole
"""

import json
import math
import os
import pickle
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.cache_report import write_modes, write_notes
from datasets.cache_series import (
    RECORD,
    image_path,
    inspect,
    make_series,
    mask_path,
    paths_of,
    record_path,
    save_json,
)
from datasets.pair_files import CRASHED, list_bad_files, run_jobs
from datasets.study_modes import decide, read_modes
from datasets.volumes import find_sources
from utils.config import BadFile, UserError
from utils.files import claim, is_taken

VERSION = 1                                          # of the cache's files
INDEX = "metadata.json"
AGAIN = "run prepare_data.py cache again"
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError,
           pickle.UnpicklingError)


@dataclass(frozen=True)
class Series:
    """A cached volume.

    study, name; mode: "mri" | "ct"; folder: where its files are; shape: voxels D, H, W; spacing: mm D, H, W;
    view: "axial" | "coronal" | "sagittal"; affine: 4 x 4 lists, index (d, h, w, 1) -> mm, RAS+;
    source_shape (x, y, z), source_affine: those of the scan; source: its path below the raw folder;
    images: the modes that it can be loaded in: ("mri",), ("brain", "blood", "bone") or one window alone.
    """

    study: str
    name: str
    mode: str
    folder: Path
    shape: tuple
    spacing: tuple
    view: str
    affine: list
    source_shape: tuple
    source_affine: list
    source: str
    images: tuple


@dataclass(frozen=True)
class Study:
    """A study: its name, its mode "mri" | "ct", and its Series, sorted by name."""

    name: str
    mode: str
    series: tuple


def write_cache(raw, output, modes_csv, workers, settings):
    """Preprocess every series of the folder ``raw`` -> counts: dict(made, kept, removed, bad, studies).

    raw: a folder per study.  modes_csv: columns study, mode (mri | ct), or None; the modes of other studies
    are guessed, and all are written to mode_mapping.csv.  workers: processes; 0 makes all here, where a
    decoder that crashes ends the program; else that is one of the sources that cannot be used.
    settings: dict(spacing [mm across slices, mm within], percentiles [low, high], mri_background percentile,
    ct_background HU).
    A series is kept when its source and mode did not change, and removed with its source.  An interrupted run
    leaves whole series only; read_cache refuses the cache until a run has ended.  Sources that cannot be used
    are in bad_files.csv, series that were repaired in notes.csv.  Raises UserError when no source can be
    used, the CSV is wrong (see read_modes), settings make no sense, or are not those of the cache there.
    """
    check_settings(settings)
    raw, output = Path(raw), Path(output)
    sources, bad = find_sources(raw)
    known = {path.name for path in raw.iterdir()} | {source.study for source in sources}
    given = read_modes(modes_csv, known)
    sources, bad = without_clashes(sources, [(below(raw, path), reason) for path, reason in bad], raw)
    created = claim_cache(raw, output, settings)
    folder_of = {source: output / "processed" / source.study for source in sources}
    found = run(inspect, [(source, raw, folder_of[source], source.study not in given) for source in sources],
                workers, lambda job: (job[0], None, (None, "")), f"{output.name}: modes")
    modes = modes_of(found, given)
    records, jobs = {}, []
    for source, record, (word, why) in found:
        mode, path = modes[source.study][0], below(raw, source.paths[0])
        if word not in (None, mode):
            bad.append((path, f"{why} says {word}, but the study's mode is {mode}"))
        elif record and record["mode"] == mode:
            records[source] = record
        else:
            vote = None if source.study in given else (word, why)
            jobs.append((source, raw, folder_of[source], mode, vote, settings))
    kept = len(records)
    for source, record, reason in run(make_series, jobs, workers, lambda job: (job[0], None, CRASHED),
                                      f"{output.name}: series"):
        if record:
            records[source] = record
        else:
            bad.append((below(raw, source.paths[0]), reason))
    list_bad_files(output, sorted(bad))
    write_modes(output, modes)
    write_notes(output, records)
    if not records:
        raise UserError(f"{output}: none of {len(bad)} sources could be cached; see bad_files.csv there")
    removed = remove_rest(output, {path for source, record in records.items()
                                   for path in paths_of(folder_of[source], source.name, record)})
    return {"made": len(records) - kept, "kept": kept, "removed": removed, "bad": len(bad),
            "studies": write_index(output, created, settings, records)}


def check_settings(settings):
    """Raise UserError for settings that make no sense."""
    spacing, percentiles, background = (settings[key] for key in ("spacing", "percentiles", "mri_background"))
    if len(spacing) != 2 or min(spacing) <= 0:
        raise UserError(f"STUDY_SPACING_MM = {spacing}: must be two lengths above 0 (across slices, within)")
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UserError(f"STUDY_MRI_PERCENTILES = {percentiles}: must be two rising numbers from 0 to 100")
    if not 0 <= background <= 100:
        raise UserError(f"STUDY_MRI_BACKGROUND = {background}: must be from 0 to 100")


def below(raw, path):
    """A path as it is written down: relative to the raw folder."""
    return os.path.relpath(path, raw)


def without_clashes(sources, bad, raw):
    """(sources, bad) less those whose image would have the name of another's mask."""
    masks = {(source.study, mask_path("", source.name).stem) for source in sources}
    clash = [source for source in sources if (source.study, source.name) in masks]
    bad = bad + [(below(raw, source.paths[0]), "named like the mask of another series; rename it")
                 for source in clash]
    return [source for source in sources if source not in clash], bad


def run(work, jobs, workers, crashed, title):
    """All results of run_jobs(work, jobs, workers, crashed), under a progress bar."""
    return list(tqdm(run_jobs(work, jobs, workers, crashed), total=len(jobs), unit="series", desc=title))


def claim_cache(raw, output, settings):
    """Create the folder, or check that its cache has the same settings -> the time of its making.

    Until the end of the run its index names no study, so that nobody reads what is half done.
    """
    if output.resolve().is_relative_to(raw.resolve()):
        raise UserError(f"{output}: lies in the raw folder; choose another --output")
    file, created = output / INDEX, datetime.now().isoformat(timespec="seconds")
    if file.is_file():
        try:
            old = json.loads(file.read_text())
            made_with, created = {"version": old["version"], **old["settings"]}, old["created"]
        except DAMAGED as error:
            raise UserError(f"{file}: no index of a cache of studies; choose another --output") from error
        wanted = json.loads(json.dumps({"version": VERSION, **settings}))
        other = [key for key in {**wanted, **made_with} if wanted.get(key) != made_with.get(key)]
        if other:
            raise UserError(f"{output}: this cache was made with another {', '.join(other)}; "
                            "choose another --output or delete that folder")
    elif is_taken(output):
        raise UserError(f"{output}: holds other things (no {INDEX} in it); choose another --output")
    claim(output, "wait for its end")
    write_index(output, created, settings, {})
    return created


def modes_of(found, given):
    """{study: (mode, where it is from)}, sorted, from what inspect found and the modes of the CSV."""
    votes = {}
    for source, _, vote in sorted(found, key=lambda item: (item[0].study, item[0].name)):
        votes.setdefault(source.study, []).append(vote)
    return {study: (given[study], "csv") if study in given else decide(votes[study]) for study in votes}


def remove_rest(output, wanted):
    """Delete what lies in processed/ beside the ``wanted`` files -> number of series that are gone."""
    gone = 0
    for path in sorted((output / "processed").rglob("*"), reverse=True):       # files before their folders
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path not in wanted:
            path.unlink()
            gone += path.name.endswith(RECORD)
    return gone


def write_index(output, created, settings, records):
    """Write metadata.json from {source: record} -> number of studies."""
    studies = {}
    for source, record in sorted(records.items(), key=lambda item: (item[0].study, item[0].name)):
        study = studies.setdefault(source.study, {"mode": record["mode"], "images": {}})
        *files, _, _ = paths_of("", source.name, record)
        study["images"][source.name] = {
            "filenames": [file.name for file in files], "processed": True, "source": record["source"],
            "hash": record["sha256"], "shape": record["shape"], "spacing": record["spacing"],
            "mode": record["mode"],
        }
    save_json(output / INDEX, {"dataset_name": output.resolve().name, "version": VERSION, "created": created,
                               "num_studies": len(studies), "settings": settings, "studies": studies})
    return len(studies)


def read_cache(cache):
    """The studies of a cache, sorted by name -> list[Study].

    Raises UserError when the folder is missing, is no cache or holds no study, BadFile for a damaged record.
    """
    cache = Path(cache)
    if not (cache / INDEX).is_file():
        raise UserError(f"{cache}: no cache of studies ({INDEX} is missing); use prepare_data.py cache")
    try:
        studies = {name: (entry["mode"], sorted(entry["images"]))
                   for name, entry in json.loads((cache / INDEX).read_text())["studies"].items()}
    except DAMAGED as error:
        raise BadFile(f"{cache / INDEX}: damaged; {AGAIN}") from error
    if not studies:
        raise UserError(f"{cache}: names no study, for its making has not ended; {AGAIN}")
    return [Study(name, mode, tuple(read_series(cache, name, series) for series in images))
            for name, (mode, images) in sorted(studies.items())]


def read_series(cache, study, name):
    """The Series of one record.  Raises BadFile when it is missing or damaged, or lies outside the cache."""
    path = record_path(cache / "processed" / study, name)
    if not path.resolve().is_relative_to(cache.resolve()):
        raise BadFile(f"{path}: lies outside the cache")
    try:
        record = json.loads(path.read_text())
        return Series(study, name, record["mode"], path.parent, tuple(record["shape"]),
                      tuple(record["spacing"]), record["view"], record["affine"],
                      tuple(record["source_shape"]), record["source_affine"], record["source"],
                      tuple(record["windows"]) or ("mri",))
    except DAMAGED as error:
        raise BadFile(f"{path}: missing or damaged; {AGAIN}") from error


def load_image(series, mode):
    """One image of a Series, mode a word of series.images -> uint8 tensor [D, H, W].

    The tensor is a map of the file: only what is looked at is read, and changing it leaves the file alone.
    Raises ValueError for a mode that the series does not have, BadFile for a missing or damaged file.
    """
    if mode not in series.images:
        raise ValueError(f"{series.study}/{series.name} has no image {mode}, only {', '.join(series.images)}")
    return load_tensor(image_path(series.folder, series.name, mode), series.shape)


def load_mask(series):
    """The background of a Series, bool tensor [D, H, W], True = background.  Raises BadFile."""
    count = math.prod(series.shape)
    bits = load_tensor(mask_path(series.folder, series.name), (-(-count // 8),))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool)).view(series.shape)


def load_tensor(path, shape):
    """The uint8 tensor "data" of a file of the cache, mapped into memory.  Raises BadFile without it."""
    try:
        data = torch.load(path, mmap=True, weights_only=True)["data"]
        found = data.dtype, tuple(data.shape)
    except DAMAGED as error:
        raise BadFile(f"{path}: missing or damaged; delete it and {AGAIN}") from error
    if found != (torch.uint8, tuple(shape)):
        raise BadFile(f"{path}: not of this series; delete it and {AGAIN}")
    return data
