"""Constants on the command line, the record of a run's settings, and errors that a user can act on."""

import argparse
import ast
import difflib
import errno
import json
import os
import platform
import subprocess
import sys
import traceback
from functools import partial
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "numpy", "transformers", "kornia")       # versions kept with each run

# Constants by the ends of their names: the least value that makes sense, and rates that cannot be 0.
LEAST = {"SAVE_EVERY_EPOCHS": 0, "FREEZE_EPOCHS": 0, "_EPOCHS": 1, "BATCH_SIZE": 1, "EVERY_BATCHES": 1,
         "NUM_WORKERS": 0, "SEED": 0, "KEEP_TOP_K": 0, "SAMPLES_PER_EPOCH": 0, "PROBE_EVERY": 0, "_DEPTH": 1,
         "PROJECTION_DIM": 1, "_PATIENCE": 0, "SPECTRAL_CHANNELS": 0, "HASH_DISTANCE": -1,
         "VAL_EVERY": 1, "VAL_CROPS": 1, "CROPS_PER_EPOCH": 1}
PEAK_RATES = ("MAX_LR", "JEPA_LR", "MIL_LR", "GAN_LR", "VISTA_LR", "SIMCLR_LR", "HVIT_LR", "SPINE_LR",
              "LAYER_DECAY")

# Of a disk that is full, or that may not be written to.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what to do."""


class BadFile(UserError):
    """An input file that cannot be used; the message begins with its path."""


def run_script(main):
    """Call ``main`` and end the process with its exit code."""
    sys.exit(exit_code(main))


def exit_code(main):
    """Call ``main``; 0, or after one line on stderr 2 for a UserError or a full disk and 130 for Ctrl-C.

    An error raised in a data-loading process arrives with that process's traceback in front, whose last line
    is the message.
    """
    try:
        main()
    except BaseException as error:
        # Its frames hold on to data-loading processes, which Python would wait for at its end.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, SystemExit):
            return error.code
        code, line = ending(error)
        if code is None:
            raise
        print(line, file=sys.stderr, flush=True)
        return code
    return 0


def ending(error):
    """(exit code, line) of an error that a user is told in one line; (None, None) for others."""
    if isinstance(error, UserError):
        line = str(error).strip().splitlines()[-1]
        for kind in (UserError, BadFile):
            line = line.removeprefix(f"{kind.__module__}.{kind.__name__}: ")
        return 2, f"error: {line}"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:         # of tables and pictures
        path = error.filename or "a file"
        return 2, f"error: {path}: cannot be written ({error.strerror}); free space or use another folder"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return None, None


def training_parser(doc):
    """The command line that every training script shares; ``doc`` is the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=42))
    add = parser.add_argument
    add("-c", "--checkpoint", metavar="PATH|auto",
        help="resume; auto: run -n's newest sound one, if any (default: start)")
    add("-n", "--save_name", metavar="NAME",
        help="folder of the run (default: the checkpoint's, or kind and time)")
    add("-p", "--preset", metavar="NAME", help="of PRESETS in constants.py (default: none)")
    add("--data", metavar="PATH", help="training data (default: demo data, made when missing)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="override constants.py and the preset (default: nothing)")
    add("--init", metavar="PATH", help="start from other weights (default: random ones)")
    add("--remove_prefix", default="", metavar="PREFIX",
        help="of names in --init's file (default: the one that fits most)")
    add("--fast-dev-run", action="store_true", help="one training and one validation batch")
    return parser


def hyperparameters(module):
    """Every UPPER_CASE name of ``module`` with its current value, PRESETS left out."""
    return {name: value for name, value in vars(module).items() if name.isupper() and name != "PRESETS"}


def apply_preset(module, name):
    """Set the constants that ``module.PRESETS[name]`` lists; None changes nothing.

    UserError: an unknown name.
    """
    if name is None:
        return
    if name not in module.PRESETS:
        raise UserError(f"-p {name}: no such preset in constants.py{closest(name, module.PRESETS)}; "
                        f"there are {', '.join(module.PRESETS)}")
    for constant, value in module.PRESETS[name].items():
        set_constant(module, constant, value, f"PRESETS[{name!r}]")


def apply_overrides(module, pairs):
    """Set ``NAME=VALUE`` strings on ``module``, and check all numbers of which only some make sense.

    UserError: an unknown name (the closest is offered), a value of another type, or one below LEAST.
    """
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UserError(f"--set {pair}: expected NAME=VALUE")
        set_constant(module, name, read_value(text), f"--set {pair}")
    for name, value in hyperparameters(module).items():
        least = next((least for end, least in LEAST.items() if name.endswith(end)), None)
        if least is not None and value < least:
            raise UserError(f"{name} = {value}: must be {least} at least")
        if name.endswith(PEAK_RATES) and value <= 0:
            raise UserError(f"{name} = {value}: must be above 0")


def read_value(text):
    """The Python literal of a string, else the string; shells take the quotes from [a,b], a list of words."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        inside = text[1:-1] if text[:1] + text[-1:] == "[]" else None
        return text if inside is None else [read_value(word.strip()) for word in inside.split(",")]


def restore_constants(module, values):
    """Set the constants of a checkpoint on ``module``, so that its network can be built again.

    A name that the checkpoint does not have keeps its value; one that constants.py no longer has is left out.
    """
    known = hyperparameters(module)
    for name, value in values.items():
        if name in known:
            setattr(module, name, value)


def changed_constants(module, values):
    """``NAME: old -> new`` for each constant whose value differs from that of a checkpoint."""
    known = hyperparameters(module)
    return [f"{name}: {value!r} -> {known[name]!r}" for name, value in values.items()
            if name in known and known[name] != value]


def set_constant(module, name, value, where):
    """Set one constant to a value of its own type; an int is taken for a float.  UserError otherwise."""
    known = hyperparameters(module)
    if name not in known:
        raise UserError(f"{where}: constants.py has no {name}{closest(name, known)}")
    kind = type(known[name])
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {name} is of type {kind.__name__}, not {type(value).__name__}")
    setattr(module, name, value)


def closest(name, known):
    """``; did you mean X?`` when a known name is near, or nothing."""
    near = difflib.get_close_matches(name.upper(), known, n=1) or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def write_training_params(run_dir, module, **facts):
    """Write ``run_dir/training_params.json``: settings, command, versions, and the ``facts`` of the run."""
    params = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in PACKAGES}},
        **facts,
        "constants": hyperparameters(module),
    }
    temporary = run_dir / "training_params.json.tmp"
    temporary.write_text(json.dumps(params, indent=2))
    os.replace(temporary, run_dir / "training_params.json")


def git_commit():
    """Commit of the code, with "+changes" when the tree differs from it; None outside a repository."""
    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True)

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:                        # git is not installed
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+changes" if git("status", "--porcelain").stdout.strip() else "")
