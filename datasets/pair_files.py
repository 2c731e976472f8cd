"""Where pairs come from and go to: patients of a folder, and case folders written by several processes."""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from pydicom.misc import is_dicom
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from datasets.dicom_files import read_dataset
from datasets.io import DICOM_SUFFIXES, image_files, one_line, write_nifti
from datasets.splits import read_table
from utils.config import BadFile, UserError
from utils.files import claim, is_taken, replacing

SETTINGS_FILE = "pairs.json"                         # in the output folder: what all its cases were made with
UNFINISHED = ".making-"                              # prefix of a folder that is being written
CRASHED = "the decoder crashed on it, or memory ran out"


def find_sources(data, patients=None):
    """Sorted (patient, path) of every image below the folder ``data``.

    The patient is the first folder below ``data``, or for an image directly in it the file name up to the
    first "_" or "-".  patients: a CSV with the columns path (relative to ``data``, or absolute) and patient
    decides instead.  Raises UserError when there is no image, or one that the CSV does not name.
    """
    return name_patients(image_files(data), Path(data), patients)


def find_volumes(data, patients=None):
    """find_sources for CT volumes: NIfTI files, and folders that directly hold DICOM files."""
    volumes = {path if path.name.endswith((".nii", ".nii.gz")) else path.parent for path in image_files(data)}
    return name_patients(sorted(volumes), Path(data), patients)


def name_patients(paths, data, patients):
    """[(patient, path)] for paths below ``data``; see find_sources."""
    if patients is None:
        return [(patient_of(path, data), path) for path in paths]
    listed = read_patients(patients, data)
    unnamed = [path for path in paths if path.resolve() not in listed]
    if unnamed:
        raise UserError(f"{patients}: has no row for {unnamed[0].relative_to(data)} ({len(unnamed)} in all)")
    return [(listed[path.resolve()], path) for path in paths]


def patient_of(path, data):
    """The patient of a file or folder below ``data``: the first folder, or the beginning of the name."""
    parts = path.relative_to(data).parts
    if len(parts) > 1 or path.is_dir():
        return parts[0]
    return re.split(r"[_-]", bare_name(path))[0] or bare_name(path)


def read_patients(csv_path, data):
    """{absolute path: patient} of a CSV with the columns path and patient.  Raises UserError without them."""
    rows = read_table(csv_path, "--patients")
    if not rows or not {"path", "patient"} <= rows[0][1].keys():
        raise UserError(f"--patients {csv_path}: needs rows, and the columns path and patient")
    return {(data / row["path"]).resolve(): row["patient"] for _, row in rows}


def describe_sources(sources, data, patients=None):
    """Lines for the user: who was found by find_sources or find_volumes, and what may be wrong with it."""
    data, first = Path(data), {}
    for patient, path in sources:
        first.setdefault(patient, path.relative_to(data))
    shown = ", ".join(f"{patient}: {path}" for patient, path in list(first.items())[:3])
    lines = [f"{len(sources)} images of {len(first)} patients, such as {one_line(shown)}"]
    if patients is not None:
        unused = read_patients(patients, data).keys() - {path.resolve() for _, path in sources}
        if unused:
            lines.append(f"--patients {patients}: {len(unused)} rows name no image below {data}")
        return lines
    flat = [patient for patient, path in sources if path.parent == data and not path.is_dir()]
    if len(flat) > 1 and len(set(flat)) > len(flat) / 2:       # rarely does a patient have one image alone
        lines.append(f"warning: by their names the {len(flat)} images directly in {data} are of "
                     f"{len(set(flat))} patients; if that is wrong, --patients CSV tells who is who")
    return lines + header_warnings(sources)


def header_warnings(sources):
    """A line where DICOM headers call one patient what goes by several names, and one for the reverse.

    Of (patient, path); a file or folder without a readable PatientID says nothing, nor does one ID for all,
    which is an anonymiser's.
    """
    names, ids = {}, {}
    for patient, path in sources:
        number = patient_id(path)
        if number:
            names.setdefault(number, set()).add(patient)
            ids.setdefault(patient, set()).add(number)
    split = [sorted(each) for each in names.values() if len(each) > 1] if len(names) > 1 else []
    mixed = sorted(patient for patient, numbers in ids.items() if len(numbers) > 1)
    lines = []
    if split:
        lines.append("warning: DICOM headers say that one patient goes by several names "
                     f"({len(split)} times), such as {one_line(', '.join(split[0]))}; "
                     "--patients CSV keeps each on one side of a split")
    if mixed:
        lines.append("warning: DICOM headers say that one name holds several patients "
                     f"({len(mixed)} times), such as {one_line(mixed[0])}; --patients CSV tells who is who")
    return lines


def patient_id(path):
    """PatientID in the header of a DICOM file, or of the first one of a folder; "" where there is none."""
    if path.is_dir():
        path = min(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if not (path.name.lower().endswith(DICOM_SUFFIXES) or is_dicom(path)):
        return ""
    try:
        header = read_dataset(path, specific_tags=["PatientID"], stop_before_pixels=True)
    except BadFile:                                  # write_cases will say so
        return ""
    return str(header.get("PatientID") or "")


def bare_name(path):
    """File name without .nii.gz or any other suffix; a folder's name as it is."""
    return path.name if path.is_dir() else re.sub(r"(\.nii)?\.[A-Za-z]+$", "", path.name)


def case_prefixes(sources):
    """<patient>_<image> for each (patient, path): safe characters, one "_", all different."""
    prefixes, taken = [], {}
    for patient, path in sources:
        patient = re.sub(r"[^A-Za-z0-9.+-]", "-", str(patient)).lstrip(".") or "unknown"
        prefix = f"{patient}_{re.sub(r'[^A-Za-z0-9.+-]', '-', bare_name(path))}"
        taken[prefix] = taken.get(prefix, 0) + 1
        prefixes.append(prefix if taken[prefix] == 1 else f"{prefix}~{taken[prefix]}")
    return prefixes


def write_cases(sources, output, per_source, size, seed, workers, settings, prepare, make):
    """Write ``per_source`` case folders for each (patient, path); returns dict(made, kept, bad: counts).

    prepare(path, size, settings) is called once per source, make(prepared, rng, size, settings) once per case
    and returns dict(prior, current, diff, params); both are functions of a module: other processes call them.
    A case depends on (seed, its name) alone.  workers: processes; 0 makes all here (see run_jobs).
    A case is written beside and renamed, so an interrupted run leaves whole cases only; the next run keeps
    them.  Sources that raise BadFile or crash their process are listed in bad_files.csv.  Raises UserError
    when there is no source, when none can be used, or when the folder's cases were made with other settings.
    """
    output = Path(output)
    if not sources:
        raise UserError(f"{output}: no image to make pairs from")
    claim_folder(output, {"maker": f"{make.__module__}.{make.__name__}", "size": size, "seed": seed,
                          "settings": settings})
    jobs, kept = [], 0
    for (_, path), prefix in zip(sources, case_prefixes(sources), strict=True):
        names = [f"{prefix}_{number:03d}" for number in range(per_source)]
        missing = [name for name in names if not (output / name).is_dir()]
        kept += len(names) - len(missing)
        if missing:
            jobs.append((path, missing, output, size, seed, settings, prepare, make))
    bad, made = [], 0
    with tqdm(total=per_source * len(sources), initial=kept, unit="pair", desc=output.name) as bar:
        for count, path, reason in run_jobs(
                make_cases, jobs, workers, lambda job: (0, job[0], CRASHED), [make.__module__]):
            made += count
            bar.update(count)
            if reason:
                bad.append((str(path), reason))
    list_bad_files(output, sorted(bad))
    if made + kept == 0 and bad:
        raise UserError(f"{output}: none of {len(bad)} files could be used; X-rays need no --ct, CT volumes "
                        f"do; the first: {min(bad)[1]}")
    return {"made": made, "kept": kept, "bad": len(bad)}


def claim_folder(output, settings):
    """Create the folder, or check that its cases have the same settings; remove what was left unfinished."""
    settings = json.loads(json.dumps(settings))
    file = output / SETTINGS_FILE
    if file.is_file():
        old, new = ({**s.pop("settings"), **s} for s in (json.loads(file.read_text()), settings.copy()))
        other = [key for key in {**new, **old} if new.get(key) != old.get(key)]
        if other:
            raise UserError(f"{output}: its pairs were made with another {', '.join(other)}; "
                            f"choose another --output or delete that folder")
    elif is_taken(output):
        raise UserError(f"{output}: holds other things (no {SETTINGS_FILE} in it); choose another --output")
    claim(output, "wait for its end")
    with replacing(file, "w") as out:
        json.dump(settings, out, indent=2)
    for folder in output.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder)


def run_jobs(work, jobs, workers, crashed=None, preload=()):
    """Yield work(job) for each of a list of jobs, in any order.

    work: a function of a module, which may be called again for a job that it has begun.  workers: processes;
    0: all here, where a decoder that crashes on a damaged file ends the program.  crashed(job): what is
    yielded for a job that ends its process; without it that raises UserError.  preload: names of modules that
    work needs.
    """
    if workers == 0:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("forkserver")      # a plain fork may hang in torch's threads
    context.set_forkserver_preload([__name__, work.__module__, *preload])
    while jobs:
        lost = yield from run_pool(work, jobs, workers, context)
        if lost and crashed is None:
            raise UserError("a process was killed: give fewer --workers if memory ran out")
        for job in lost[:workers]:                   # the processes were at these: now one by one
            if (yield from run_pool(work, [job], 1, context)):
                yield crashed(job)
        jobs = lost[workers:]


def run_pool(work, jobs, workers, context):
    """Yield work(job) in any order -> the jobs, in order, that have no result because a process crashed."""
    futures, done = [], set()
    with ProcessPoolExecutor(min(workers, len(jobs)), context, start_worker) as pool:
        try:
            with suppress(BrokenProcessPool):        # a crash so soon that some cannot be submitted
                for job in jobs:
                    futures.append(pool.submit(work, job))
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    done.add(future)
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)       # on Ctrl-C: end the running jobs, start no other
    return [job for job, future in zip_longest(jobs, futures) if future not in done]


def start_worker():
    """One thread per process; Ctrl-C is the parent's to answer, and a killed parent is not waited for."""
    torch.set_num_threads(1)
    threadpool_limits(1)                             # numpy's products: the threads of all would fight
    os.environ["OMP_NUM_THREADS"] = "1"              # and for libraries that a job loads
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this process as soon as its parent is gone: else it would stay, waiting for the next job."""
    multiprocessing.parent_process().join()
    os._exit(1)


def make_cases(job):
    """Make the missing cases of one source.  Returns (cases made, path, why the file is bad or None)."""
    path, names, output, size, seed, settings, prepare, make = job
    try:
        prepared = prepare(path, size, settings)
    except BadFile as error:
        return 0, path, str(error)
    for name in names:
        if (output / name).is_dir():                 # made before the crash of another job ended this one
            continue
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        pair = make(prepared, np.random.default_rng([seed, key]), size, settings)
        pair["params"].update(source=str(path), seed=seed, case=name, size=size)
        write_case(output, name, pair)
    return len(names), path, None


def write_case(output, name, pair):
    """Write prior, current (steps of 1/255), diff_map (steps of 1/32767), params.json; all or nothing."""
    temporary = output / f"{UNFINISHED}{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for time in ("prior", "current"):
        write_nifti(temporary / f"{time}.nii.gz", pair[time], dtype="uint8", scale=1 / 255)
    write_nifti(temporary / "diff_map.nii.gz", pair["diff"], dtype="int16", scale=1 / 32767)
    (temporary / "params.json").write_text(json.dumps(pair["params"], indent=1))
    os.replace(temporary, output / name)


def list_bad_files(output, bad):
    """Write bad_files.csv with (path, reason), or remove an old one when there is none."""
    file = output / "bad_files.csv"
    file.unlink(missing_ok=True)
    if bad:
        with open(file, "w", newline="", errors="backslashreplace") as out:     # a name may be no Unicode
            csv.writer(out).writerows([("path", "reason"), *bad])
