"""Damaged inputs through every reader: each is refused in one line or read right, in bounded time and memory.

A mutant depends on (seed, its number) alone.  It is read in a process of its own, forked from one that has
imported everything, so that a decoder that crashes, hangs or asks for all memory ends nothing else.
"""

import collections
import io
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import input_files
import input_readers as r
import input_tables as t
import numpy as np
from mutations import FAULTS, mutant

from utils.config import BadFile, UserError

SECONDS = 20                                         # that a reader may take
FREE, TIMES = 64 * 2 ** 20, 50                       # bytes a reader may ask for: FREE + TIMES the files' own
CEILING = 4 * 2 ** 30                                # bytes above what is there, to protect the machine
RIGHT, REFUSED = "read right", "refused in one line"
SEALED = [fault.__name__ for fault in FAULTS]        # but not those behind which checksums are made right


class Sample(NamedTuple):
    """A file to damage, of a kind in mutations.OWN: its name in input_files, our reader, and the peer's."""

    kind: str
    name: str
    read: Callable
    peer: Callable


def samples(kind, read, peer, *names):
    """Samples of one kind and reader."""
    return [Sample(kind, name, read, peer) for name in names]


SAMPLES = [
    *samples("nifti", r.image, r.image_nifti_peer, "image.nii", "image.nii.gz"),
    *samples("nifti", r.volume, r.volume_peer, "volume.nii", "volume.nii.gz", "volume2.nii"),
    *samples("nifti", r.blocks, r.em_nifti_peer, "em.nii", "em.nii.gz"),
    *samples("nifti", r.series, r.series_peer, "series.nii.gz"),
    *samples("nifti", r.mask, r.mask_peer, "mask.nii.gz"),
    *samples("dicom", r.image, r.dicom_peer, "image.dcm", "implicit.dcm", "rle.dcm", "deflated.dcm",
             "jpeg.dcm", "jpeg2000.dcm", "lossless.dcm", "jpegls.dcm"),
    *samples("dicom", r.dicom_series, r.dicom_series_peer, "slices/2.dcm", "rle_slices/2.dcm",
             "enhanced.dcm"),
    *samples("dicom", r.dicom_folder, r.dicom_series_peer, "mri/2.dcm"),
    *samples("hdf5", r.blocks, r.em_hdf5_peer, "plain.h5", "gzip.h5", "checked.h5"),
    *samples("tiff", r.blocks, r.em_tiff_peer, *(f"{name}.tif" for name in input_files.STACKS)),
    *samples("tiff", r.em_folder, r.em_folder_peer, "sections/3.tif"),
    *samples("tiff", r.cube, r.cube_peer, "cube.tif", "cube_zip.tif"),
    *samples("tiff", r.image, r.picture_peer, "image.tif", "lzw.tif"),
    *samples("tiff", r.photo, r.photo_peer, "photo.tif"),
    *samples("picture", r.image, r.picture_peer, "grey.png", "deep.png", "colour.jpg"),
    *samples("picture", r.photo, r.photo_peer, "colour.png", "clear.png", "palette.png", "grey.jpg",
             "progressive.jpg"),
    *samples("picture", r.picture_mask, r.picture_mask_peer, "mask.png"),
    *samples("picture", r.em_folder, r.em_folder_peer, "png_sections/3.png"),
    *samples("picture", r.picture_folder, r.picture_folder_peer, "png_slices/2.png"),
    *samples("csv", t.splits, t.splits_peer, "splits.csv"),
    *samples("csv", t.modes, t.modes_peer, "modes.csv"),
    *samples("csv", t.labels, t.labels_peer, "bce.csv", "ce.csv", "mse.csv"),
    *samples("csv", t.photos, t.photos_peer, "photos.csv"),
    *samples("csv", t.slices, t.slices_peer, "slices.csv"),
    *samples("csv", t.patients, t.patients_peer, "patients.csv"),
    *samples("csv", t.volumes, t.volumes_peer, "volumes.csv")]
KINDS = list(dict.fromkeys(sample.kind for sample in SAMPLES))


def inputs(count, seed, first, output):
    """Read ``count`` mutants, print a table by kind, and keep those that failed.  Returns (count, failed).

    Numbers first to first + count - 1 of the seed; output: a folder, in which each failed mutant gets a
    folder of its own with reason.txt.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "samples"
        input_files.write_all(root)
        whole = {}
        for sample in SAMPLES:                       # imports what it needs, and is right when whole
            path = place_of(sample, root)
            whole[sample.name] = sample.peer(path)
            assert not difference(sample.read(path), whole[sample.name]), sample.name
        for number in range(first, first + count):
            result = run_mutant(number, seed, root, Path(folder) / "mutant", output, whole)
            results.append(result)
            if result["outcome"] not in (RIGHT, REFUSED):
                print("{number}  {sample}, {fault}: {outcome}: {reason}".format(number=number, **result),
                      flush=True)
    print_table(results)
    return count, sum(result["outcome"] not in (RIGHT, REFUSED) for result in results)


def place_of(sample, root):
    """Path of the file of a sample that is damaged."""
    return root / sample.name if "/" in sample.name else root / sample.name / sample.name


def run_mutant(number, seed, root, work, output, whole):
    """Make one mutant, read it, and keep it where it failed.  Returns what attempt does, and what it was."""
    rng = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    sample = rng.choice([sample for sample in SAMPLES if sample.kind == kind])
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(place_of(sample, root).parent, work / place_of(sample, root).parent.name)
    path = work / place_of(sample, root).relative_to(root)
    data, fault = mutant(path.read_bytes(), kind, rng)
    path.write_bytes(data)
    if fault in SEALED and path.suffix in (".png", ".gz"):       # their checksums tell: whole, or refused
        sample = sample._replace(peer=lambda path: whole[sample.name])
    result = {"kind": kind, "sample": sample.name, "fault": fault,
              **attempt(sample, path, whole[sample.name])}
    if result["outcome"] not in (RIGHT, REFUSED):
        kept = Path(output) / f"{seed}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(path.parent, kept)
        lines = [f"{number}: {sample.name}, {fault}", result["outcome"], result["reason"], result["trace"]]
        (kept / "reason.txt").write_text("\n".join(lines))
    return result


def attempt(sample, path, whole):
    """Read one file in a process of its own: dict(outcome, reason, seconds, megabytes, words, trace).

    words: what a library of C printed beside; trace: of what was raised.
    """
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    receive, send = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)        # whatever the parent does with it
            with os.fdopen(send, "wb", 0) as pipe:
                judge(sample, path, size, whole, pipe)
        finally:
            os._exit(0)                                          # never back into the parent's code
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        content = b""
        while select.select([pipe], [], [], 4 * SECONDS)[0]:
            part = os.read(pipe.fileno(), 2 ** 16)
            content += part
            if not part:
                break
        else:
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if content:
        stream = io.BytesIO(content)
        first = pickle.load(stream)
        second = {"outcome": "not compared", "reason": f"the peer ends with signal {-status}"}
        if first["outcome"] == RIGHT and stream.tell() < len(content):
            second = pickle.load(stream)
        excused = first["as whole"] and second["outcome"] == "not compared"    # and nothing of import was hit
        return first if first["outcome"] != RIGHT or excused else {**first, **second}
    bare = {"seconds": SECONDS, "megabytes": 0, "words": "", "trace": ""}
    if status in (-signal.SIGALRM, -signal.SIGKILL):
        return {**bare, "outcome": "hangs", "reason": f"more than {SECONDS} s"}
    return {**bare, "outcome": "ends the process", "reason": f"signal {-status}", "seconds": 0}


def judge(sample, path, size, whole, pipe):
    """In the child: read, and send one pickled dict.  SIGALRM ends it where it hangs."""
    with tempfile.TemporaryFile() as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
        before = address_space("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (before + CEILING,) * 2)
        signal.alarm(SECONDS)
        start, found, error, trace = time.perf_counter(), None, None, ""
        try:
            found = sample.read(path)
        except BaseException as problem:             # the verdict on which is what this is for
            error, trace = problem, traceback.format_exc()
        seconds, peak = time.perf_counter() - start, address_space("VmPeak") - before
        signal.alarm(0)
        sys.stderr.flush()
        printed.seek(0)
        words = printed.read().decode(errors="replace")
    outcome, reason = verdict(path, error, peak, FREE + TIMES * size)
    as_whole = outcome == RIGHT and not difference(found, whole)
    pipe.write(pickle.dumps({"outcome": outcome, "reason": reason[:300], "seconds": seconds, "trace": trace,
                             "megabytes": peak / 1e6, "words": words, "as whole": as_whole}))
    if outcome == RIGHT:
        outcome, reason = compare(sample, path, found)
        pipe.write(pickle.dumps({"outcome": outcome, "reason": reason[:300]}))


def address_space(word):
    """Bytes of this process's memory, asked for if not touched: VmSize now, VmPeak at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {word}")


def verdict(path, error, peak, allowed):
    """(outcome, reason) before anything is compared."""
    if error is not None and not isinstance(error, UserError):
        return "traceback", f"{type(error).__name__}: {error}"
    if peak > allowed:
        return "too much memory", f"{peak / 1e6:.0f} MB where {allowed / 1e6:.0f} will do"
    if error is None:
        return RIGHT, ""
    line = str(error)
    if len(line.splitlines()) != 1 or min(line) < " ":
        return "not one line", repr(line)[:300]
    if isinstance(error, BadFile) and str(path.parent) not in line:
        return "names no file", line
    return REFUSED, line


def compare(sample, path, found):
    """(outcome, reason) by the peer's answer to the same file."""
    signal.alarm(SECONDS)
    try:
        expected = sample.peer(path)
    except Exception as error:                       # of any library, for any reason
        return "not compared", f"the peer raises {type(error).__name__}: {' '.join(str(error).split())}"
    wrong = difference(found, expected)
    return ("wrong", wrong) if wrong else (RIGHT, "")


def difference(found, expected):
    """"" when all of an answer is finite and equal, float32 to its precision; else what is not."""
    for name, value in found.items():
        if name not in expected:
            return f"{name} is not in the peer's answer"
        due = expected[name]
        if not isinstance(value, np.ndarray):
            same = value == due
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            return f"{name} is not finite"
        else:
            same = value.shape == due.shape and np.allclose(value, due, 1e-5, 1e-5 * np.abs(due).max())
        if not same:
            value, due = (" ".join(str(each).split())[:100] for each in (value, due))
            return f"{name}: {value} where {due} is due"
    return ""


def print_table(results):
    """By kind: tried, refused, right, failed; the slowest and the largest."""
    print(f"{'kind':8}  tried  {REFUSED}  {RIGHT}  failed  slowest s  most MB")
    for kind in (*KINDS, "all"):
        those = [result for result in results if kind in (result["kind"], "all")]
        counts = collections.Counter(result["outcome"] for result in those)
        failed = len(those) - counts[REFUSED] - counts[RIGHT]
        if those:
            print(f"{kind:8}  {len(those):5}  {counts[REFUSED]:19}  {counts[RIGHT]:10}  {failed:6}  "
                  f"{max(result['seconds'] for result in those):9.2f}  "
                  f"{max(result['megabytes'] for result in those):7.0f}")
