"""Checkpoints: one flat dict per file, written whole or not at all, and read without running code."""

import hashlib
import pickle
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.config import BadFile, UserError
from utils.distributed import unwrap
from utils.files import replacing
from utils.foreign import deeper, familiar_names, fit, weights_file
from utils.states import load_model_state, model_state

FORMAT_VERSION = 1
REQUIRED = ("kind", "model_state_dict", "format_version")
WEIGHTS = ("ema_state_dict", "teacher_state_dict", "model_state_dict", "state_dict", "model")
# What wraps a network and is no part of its layers' names; the last is models.photo's.
WRAPPERS = ("module.", "_orig_mod.", "network.")
# Where a backbone stands in the runs of these scripts, and in VISTA3D's file.
PREFIXES = ("", "encoder.", "backbone.", "encoder.vit.", "image_encoder.")
# What torch, zipfile and safetensors raise on bytes that are no tensor file, or no longer one.
UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error, SafetensorError)


def save_checkpoint(path, **entries):
    """Write ``entries`` and the format's version to ``path`` in one atomic step.

    Entries are tensors, numbers, strings, None, and lists, tuples and dicts of these.  Raises UserError when
    the file cannot be written, and TypeError for entries that load_checkpoint would refuse.
    """
    with replacing(path) as file:
        torch.save({**entries, "format_version": FORMAT_VERSION}, file)
        file.flush()
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
        if foreign:
            raise TypeError(f"{path}: a checkpoint holds plain values and tensors, not {', '.join(foreign)}")


def copy_checkpoint(source, target):
    """Copy a file in one atomic step.  Raises UserError when ``target`` cannot be written."""
    with open(source, "rb") as reader, replacing(target) as file:
        shutil.copyfileobj(reader, file, 1 << 20)


def load_checkpoint(path, *kinds):
    """The dict that save_checkpoint wrote, on the CPU; nothing in the file is executed.

    kinds: words, of which the checkpoint's own must be one; none: it may be any.  Raises BadFile for a
    missing, damaged or foreign file, UserError for another kind or a newer format.
    """
    entries = _read(path)
    missing = [key for key in REQUIRED if not isinstance(entries, dict) or key not in entries]
    if missing:
        raise BadFile(f"{path}: not a checkpoint of these scripts: it has no {', '.join(missing)}; "
                      "bare weights are loaded with --init")
    if entries["format_version"] > FORMAT_VERSION:
        raise UserError(f"{path}: written in format {entries['format_version']}, this version reads up to "
                        f"{FORMAT_VERSION}; update the repository")
    if kinds and entries["kind"] not in kinds:
        raise UserError(f"{path}: a checkpoint of kind {entries['kind']}, not {' or '.join(kinds)}; "
                        "name another file or use the script that wrote it")
    return entries


def digest_of(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path, bare=False):
    """What a .pt file holds, or with ``bare`` also a .safetensors, a folder of it, or a .pth without archive.

    Raises BadFile.  torch alone does not notice flipped bits in tensors; the archive's checksums do.
    """
    path = weights_file(path) if bare else Path(path)
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

    That is <kind>_last.pt, else of _best.pt and _epoch_N.pt that of most optimizer steps: a run that went
    back to an earlier epoch has later ones that it left.  None when the folder has no such file.  Raises
    UserError when it has some and none is sound.
    """
    folder = Path(folder)
    paths = [path for path in (folder / f"{kind}_last.pt", folder / f"{kind}_best.pt") if path.is_file()]
    paths += [path for _, path in sorted(_epoch_files(folder, kind), reverse=True)]
    steps, damaged = {}, []
    for path in paths:
        try:
            steps[path] = int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
        except UNREADABLE:
            damaged.append(path)
    # A stable sort: of equal steps the earlier in ``paths`` is taken.
    for path in sorted(steps, key=lambda path: (path.name == f"{kind}_last.pt", steps[path]), reverse=True):
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

    path: .pt, .pth, .bin or .safetensors with a state dict or a checkpoint, of which the first entry named in
    ``prefer`` counts, averaged weights coming first by default; or a Hugging Face folder.  Names and shapes
    of other libraries are turned into ours (utils.foreign).
    WRAPPERS and ``remove_prefix`` are taken off the file's names; where two names become one, that which had
    the prefix counts.  Without ``remove_prefix`` that of PREFIXES is taken which finds most.  Returns
    (matched, unmatched), names in the model's state.
    Raises BadFile for an unreadable file, and UserError when the matched parameters hold less than
    ``minimum`` of the model's weights, or are a part of a deeper network; parameters whose names begin with
    one of ``optional`` do not count.  minimum 0: anything goes.
    """
    state = model_state(model)
    sizes = {name.replace("_orig_mod.", ""): parameter.numel()
             for name, parameter in unwrap(model).named_parameters()}
    counted = {name: size for name, size in sizes.items() if not name.startswith(tuple(optional))}

    def share(found):
        return sum(counted.get(name, 0) for name in found) / sum(counted.values())

    entries = familiar_names(_find_weights(_read(path, bare=True), path, prefer))
    files = [_clean_names(entries, prefix) for prefix in ([remove_prefix] if remove_prefix else PREFIXES)]
    weights, found = max(((file, _fitting(state, file)) for file in files), key=lambda pair: share(pair[1]))
    unmatched = [name for name in state if name not in found]
    if share(found) < minimum:
        raise UserError(
            f"{path}: only {share(found):.0%} of the model's weights are found, {minimum:.0%} are needed; "
            f"missing: {', '.join(unmatched[:3])}; the file has: {', '.join(list(weights)[:3])}; "
            "use the same model settings, or --remove_prefix")
    if minimum and (name := deeper(unwrap(model), weights)):
        raise UserError(f"{path}: has {name}, which the network has not, though it has what is before: "
                        "the file is of a deeper network; use the same model settings")
    load_model_state(model, {**state, **found})
    return list(found), unmatched


def load_part(model, part, path, remove_prefix="", optional=()):
    """Start ``model`` from a file that must have ``part`` of it, and may have the rest.

    Returns (matched, unmatched), names in the whole model's state.  Raises as ``load_backbone`` does for
    ``part``, a module of ``model`` or ``model`` itself; optional: beginnings of names in it.
    """
    matched, unmatched = load_backbone(part, path, remove_prefix, optional=optional)
    if part is model:
        return matched, unmatched
    prefix = next(name for name, module in model.named_modules() if module is part)
    rest, missing = load_backbone(model, path, remove_prefix, minimum=0.0)
    matched = {f"{prefix}.{name}" for name in matched} | set(rest)
    return sorted(matched), [name for name in missing if name not in matched]


def _find_weights(entries, path, prefer):
    """The state dict in what a file holds: under one of the usual names, or the whole."""
    if not isinstance(entries, dict):
        raise BadFile(f"{path}: holds no state dict; use a file of named tensors")
    nested = [entries[key] for key in prefer if isinstance(entries.get(key), dict)]
    return nested[0] if nested else entries


def _clean_names(state, remove_prefix):
    """Tensors of ``state`` under their names without wrappers' prefixes and ``remove_prefix``."""
    plain, prefixed, remove_prefix = {}, {}, _unwrapped(remove_prefix)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        name = _unwrapped(name)
        if remove_prefix and name.startswith(remove_prefix):
            prefixed[_unwrapped(name.removeprefix(remove_prefix).removeprefix("."))] = value
        else:
            plain[name] = value
    return {**plain, **prefixed}


def _unwrapped(name):
    """A name in a state without wrappers' prefixes."""
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _fitting(state, weights):
    """{name in ``state``: tensor of ``weights`` in its shape}, where there is one."""
    found = {name: fit(weights[_unwrapped(name)], value.shape) for name, value in state.items()
             if isinstance(value, torch.Tensor) and _unwrapped(name) in weights}
    return {name: value for name, value in found.items() if value is not None}
