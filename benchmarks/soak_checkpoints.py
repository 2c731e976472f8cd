"""Checkpoints that are cut short or carry code: refused by name; a run goes on from the newest sound one."""

import contextlib
import io
import os
import pickle
import random
import shutil
import time
import zipfile

import torch
from soak_kills import ENTRIES, command, finish

from utils.checkpoint import load_backbone, load_checkpoint, newest_sound, save_checkpoint
from utils.config import UserError
from utils.runs import open_run

FILES = ("last", "best", "epoch_1")                   # of a run, the newest first


class Attack:
    """Unpickled by plain pickle, it makes a folder."""

    def __init__(self, call, *words):
        self.call, self.words = call, words

    def __reduce__(self):
        return self.call, self.words


def attacks(folder, mark):
    """Paths of files that would make the folder ``mark`` if something in them were run."""
    calls = [Attack(os.mkdir, str(mark)), Attack(os.system, f"mkdir {mark}"),
             Attack(eval, f"__import__('os').mkdir({str(mark)!r})")]
    for i, call in enumerate(calls):
        content = {"kind": "demo", "format_version": 1, "step": 1, "model_state_dict": {"w": call}}
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path = folder / f"pickle_{i}_{protocol}.pt"
            path.write_bytes(pickle.dumps(content, protocol))
            yield path
        for new in (True, False):
            path = folder / f"torch_{i}_{new}.pt"
            torch.save(content, path, _use_new_zipfile_serialization=new)
            yield path
        path = folder / f"swapped_{i}.pt"             # a sound archive in which another pickle was put
        torch.save({"w": torch.zeros(9)}, folder / "sound.pt")
        with zipfile.ZipFile(folder / "sound.pt") as sound, zipfile.ZipFile(path, "w") as archive:
            for name in sound.namelist():
                data = pickle.dumps(content, 2) if name.endswith("data.pkl") else sound.read(name)
                archive.writestr(name, data)
        yield path


def refuses(call, *words):
    """Whether ``call`` ends with one line that has every word."""
    try:
        call()
    except UserError as error:
        return "\n" not in str(error) and all(str(word) in str(error) for word in words)
    return False


def survive_attacks(output):
    """(tried, what went wrong): every attack by every way that a file is read."""
    mark, wrong, tried = output / "executed", [], 0
    for path in attacks(output, mark):
        run = output / "attacked"
        run.mkdir(exist_ok=True)
        shutil.copyfile(path, run / "demo_last.pt")
        weights = shutil.copyfile(path, path.with_suffix(".bin"))
        for name, call, named in (
                ("checkpoint", lambda path=path: load_checkpoint(path), path),
                ("weights", lambda path=path: load_backbone(torch.nn.Linear(2, 2), path), path),
                ("bare weights", lambda path=weights: load_backbone(torch.nn.Linear(2, 2), path), weights),
                ("auto", lambda run=run: newest_sound(run, "demo"), "demo_last.pt")):
            tried += 1
            if not refuses(call, named) or mark.exists():
                wrong.append(f"{path.name} as {name}")
    return tried, wrong


def survive_cut(kind, run, lengths, whole):
    """Whether a run's newest files, cut to ``lengths``, are refused and its newest whole one is resumed."""
    paths = [run / f"{kind}_{name}.pt" for name in FILES]
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    for path, length, content in zip(paths, lengths, whole, strict=False):
        path.write_bytes(content[:length])
    damaged, names = paths[:len(lengths)], set(os.listdir(run))
    if not all(refuses(lambda path=path: load_checkpoint(path, kind), path) for path in damaged):
        return False
    if len(lengths) == len(paths):
        return refuses(lambda: open_run(run.parent, run.name, "auto", kind, trial=True),
                       *(path.name for path in paths)) and set(os.listdir(run)) == names
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _, state = open_run(run.parent, run.name, "auto", kind, trial=True)
    told = all(f"Damaged, passed over: {path}\n" in printed.getvalue() for path in damaged)
    sound = whole[len(lengths)]
    return told and state["step"] == len(FILES) - len(lengths) and paths[0].read_bytes() == sound


def make_run(kind, output):
    """(folder, contents of its FILES) of a run with a checkpoint each of steps 3, 2 and 1."""
    log = output / "log.txt"
    code, *_ = finish(command(kind, "run", output, "--fast-dev-run"), log)
    if code:
        raise UserError(f"{kind}: exit code {code}; see {log}")
    run, whole = output / "runs" / "run", []
    state = load_checkpoint(run / f"{kind}_last.pt", kind)
    for name, step in zip(FILES, (3, 2, 1), strict=True):
        save_checkpoint(run / f"{kind}_{name}.pt", **{**state, "step": step})
        whole.append((run / f"{kind}_{name}.pt").read_bytes())
    return run, whole


def cut_entry(kind, count, seed, first, output):
    """What went wrong with ``count`` cuts of an entry's checkpoints, and with its script on damaged ones."""
    run, whole = make_run(kind, output)
    wrong = []
    for number in range(first, first + count):
        draw = random.Random(f"{seed} {number}")
        lengths = [draw.randrange(len(content)) for content in whole[:draw.choice((1, 1, 1, 2, 3))]]
        if not survive_cut(kind, run, lengths, whole):
            wrong.append(f"cut {number}, to {lengths} bytes")
    survive_cut(kind, run, [len(content) // 2 for content in whole], whole)
    run, log = shutil.copytree(run, run.with_name("cut")), output / "log.txt"     # that one is this process's
    before = {path: path.read_bytes() for path in run.glob("*.pt")}
    code, *_ = finish(command(kind, run.name, output, "--fast-dev-run"), log)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    if code != 2 or len(errors) != 1 or before != {path: path.read_bytes() for path in run.glob("*.pt")}:
        wrong.append("the script with damaged files alone")
    return wrong


def checkpoints(count, seed, first, output):
    """Cut each entry's checkpoints ``count`` times, and try files with code -> (tried, failed)."""
    print(f"{'entry':16}  tried  survived  all, s", flush=True)
    output, total, failed = output.resolve() / "checkpoints", 0, 0
    for row in (*ENTRIES, "code in files"):
        began, folder = time.monotonic(), output / row.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tried, wrong = survive_attacks(folder) if row not in ENTRIES else (
            count + 1, cut_entry(row, count, seed, first, folder))
        print(f"{row:16}  {tried:5}  {tried - len(wrong):8}  {time.monotonic() - began:6.0f}", flush=True)
        total, failed = total + tried, failed + len(wrong)
        if wrong:
            print(f"{row}: {'; '.join(wrong)}; see {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return total, failed
