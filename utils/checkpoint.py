"""Checkpoints: one flat dict per file, written whole or not at all, and read without running code."""

import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.config import BadFile, UserError
from utils.distributed import unwrap
from utils.states import load_model_state, model_state

FORMAT_VERSION = 1
REQUIRED = ("kind", "model_state_dict", "format_version")
WEIGHTS = ("ema_state_dict", "teacher_state_dict", "model_state_dict", "state_dict", "model")
# What torch, zipfile and safetensors raise on bytes that are no tensor file, or no longer one.
UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error, SafetensorError)


@contextmanager
def _replacing(path):
    """Open a temporary file beside ``path``, which takes its place at the end, and only then.

    A run killed at any moment leaves the earlier file whole.  Raises UserError when it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a failed write into a RuntimeError that names its source file.
        if not isinstance(error, OSError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"{path}: cannot be written ({reason}); free space or use another folder") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def save_checkpoint(path, **entries):
    """Write ``entries`` and the format's version to ``path`` in one atomic step.

    Entries are tensors, numbers, strings, None, and lists, tuples and dicts of these.  Raises UserError when
    the file cannot be written, and TypeError for entries that load_checkpoint would refuse.
    """
    with _replacing(path) as file:
        torch.save({**entries, "format_version": FORMAT_VERSION}, file)
        file.flush()
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
        if foreign:
            raise TypeError(f"{path}: a checkpoint holds plain values and tensors, not {', '.join(foreign)}")


def copy_checkpoint(source, target):
    """Copy a file in one atomic step.  Raises UserError when ``target`` cannot be written."""
    with open(source, "rb") as reader, _replacing(target) as file:
        shutil.copyfileobj(reader, file, 1 << 20)


def load_checkpoint(path, kind=None):
    """The dict that save_checkpoint wrote, on the CPU; nothing in the file is executed.

    kind: word that the checkpoint's own must equal; None takes any.  Raises BadFile for a missing, damaged or
    foreign file, UserError for another kind or a newer format.
    """
    entries = _read(path)
    missing = [key for key in REQUIRED if not isinstance(entries, dict) or key not in entries]
    if missing:
        raise BadFile(f"{path}: not a checkpoint of these scripts: it has no {', '.join(missing)}; "
                      "bare weights are loaded with --init")
    if entries["format_version"] > FORMAT_VERSION:
        raise UserError(f"{path}: written in format {entries['format_version']}, this version reads up to "
                        f"{FORMAT_VERSION}; update the repository")
    if kind is not None and entries["kind"] != kind:
        raise UserError(f"{path}: a checkpoint of kind {entries['kind']}, not {kind}; "
                        "name another file or use the script that wrote it")
    return entries


def _read(path, bare=False):
    """What a .pt file holds, or with ``bare`` also a .safetensors or an old .pth without a zip archive.

    Raises BadFile.  torch alone does not notice flipped bits in tensors; the archive's checksums do.
    """
    path = Path(path)
    if not path.is_file():
        raise BadFile(f"{path}: {'a folder, not a checkpoint' if path.is_dir() else 'no such file'}; "
                      "name an existing .pt file")
    try:
        if bare and path.suffix == ".safetensors":
            return load_file(path)
        if not (bare and not zipfile.is_zipfile(path)):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
    except UNREADABLE as error:
        raise BadFile(f"{path}: damaged, cut short or no checkpoint; use another file") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")       # the refusal below says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise BadFile(f"{path}: damaged, or holds more than tensors and plain values and was not opened, "
                      "since it could run code; use another file") from error


def newest_sound(folder, kind):
    """The newest loadable checkpoint of a run: (path, its dict, list of damaged paths passed over).

    Looks at <kind>_last.pt, _best.pt and _epoch_N.pt; the newest is that of most optimizer steps.  None when
    the folder has no such file.  Raises UserError when it has some and none is sound.
    """
    folder = Path(folder)
    paths = [path for path in (folder / f"{kind}_last.pt", folder / f"{kind}_best.pt") if path.is_file()]
    paths += [path for _, path in sorted(_epoch_files(folder, kind), reverse=True)]
    steps, damaged = {}, []
    for path in paths:
        try:
            steps[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
        except UNREADABLE:
            damaged.append(path)
    # A stable sort: of equal steps the earlier in ``paths`` is taken, _last before its copies.
    for path in sorted(steps, key=steps.get, reverse=True):
        try:
            return path, load_checkpoint(path, kind), damaged
        except UserError:
            damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise UserError(f"{folder}: none of its checkpoints can be used ({names}); "
                        "restore one, or start a run of another name with -n")
    return None


def _epoch_files(folder, kind):
    """(epoch, path) of every <kind>_epoch_N.pt."""
    pattern = re.compile(rf"{re.escape(kind)}_epoch_(\d+)\.pt")
    matches = ((pattern.fullmatch(path.name), path) for path in Path(folder).glob(f"{kind}_epoch_*.pt"))
    return [(int(match[1]), path) for match, path in matches if match]


def prune_epochs(folder, kind, history, keep_top, every, metric="val/loss", higher_is_better=False):
    """Delete each <kind>_epoch_N.pt that is neither among the best nor of every n-th epoch; return the rest.

    history: dicts with "epoch" and ``metric``; a row without it, or with NaN, is never among ``keep_top``.
    every: 0 keeps the best alone.
    """
    rows = [row for row in history if row.get(metric) == row.get(metric) and row.get(metric) is not None]
    rows.sort(key=lambda row: -row[metric] if higher_is_better else row[metric])
    best = {row["epoch"] for row in rows[:keep_top]}
    kept = []
    for epoch, path in sorted(_epoch_files(folder, kind)):
        if epoch in best or every and epoch % every == 0:
            kept.append(path)
        else:
            path.unlink(missing_ok=True)
    return kept


def load_backbone(model, path, remove_prefix="", minimum=0.9, prefer=WEIGHTS, optional=()):
    """Start ``model`` from the weights in ``path``, as far as names and shapes agree.

    path: .pt, .pth or .safetensors with a state dict or a checkpoint, of which the first entry named in
    ``prefer`` counts; averaged weights come first by default.
    Leading ``module.``, ``_orig_mod.`` and ``remove_prefix`` are taken off the file's names; where two names
    become one, that which had the prefix counts.  Returns (matched, unmatched), names in the model's state.
    Raises BadFile for an unreadable file, and UserError when the matched parameters hold less than
    ``minimum`` of the model's weights; those whose names begin with one of ``optional`` do not count.
    """
    weights = _clean_names(_find_weights(_read(path, bare=True), path, prefer), remove_prefix)
    state = model_state(model)
    matched = [name for name, value in state.items()
               if name in weights and isinstance(value, torch.Tensor) and weights[name].shape == value.shape]
    unmatched = [name for name in state if name not in set(matched)]
    sizes = {name.replace("_orig_mod.", ""): parameter.numel()
             for name, parameter in unwrap(model).named_parameters()}
    counted = {name: size for name, size in sizes.items() if not name.startswith(tuple(optional))}
    share = sum(counted.get(name, 0) for name in matched) / sum(counted.values())
    if share < minimum:
        raise UserError(
            f"{path}: only {share:.0%} of the model's weights are found, {minimum:.0%} are needed; "
            f"missing: {', '.join(unmatched[:3])}; the file has: {', '.join(list(weights)[:3])}; "
            "use the same model settings, or --remove_prefix")
    load_model_state(model, {**state, **{name: weights[name] for name in matched}})
    return matched, unmatched


def _find_weights(entries, path, prefer):
    """The state dict in what a file holds: under one of the usual names, or the whole."""
    if not isinstance(entries, dict):
        raise BadFile(f"{path}: holds no state dict; use a file of named tensors")
    nested = [entries[key] for key in prefer if isinstance(entries.get(key), dict)]
    return nested[0] if nested else entries


def _clean_names(state, remove_prefix):
    """Tensors of ``state`` under their names without wrappers' prefixes and ``remove_prefix``."""
    plain, prefixed = {}, {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if remove_prefix and name.startswith(remove_prefix):
            prefixed[name.removeprefix(remove_prefix).removeprefix(".")] = value
        else:
            plain[name] = value
    return {**plain, **prefixed}
