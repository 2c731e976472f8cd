"""README.md and the pages of docs/ say what the code does; each check is shown a lie that it must find."""

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
from PIL import Image

import constants as C
from utils.config import UserError, apply_overrides, apply_preset, hyperparameters

ROOT = Path(C.__file__).parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
EXTEND = "docs/extend.md"                            # its code is run, see below
FOLDERS = "benchmarks|datasets|docs|losses|models|tests|utils"
WORDS = {"KIND", "LOSSES", "LR", "NAME", "PID"}      # in the text like constants, but none


# ------------------------------------------------------------------ reading pages

def visible(text):
    """A page without its HTML comments, where pictures that are still to be made have their places."""
    return re.sub("<!--.*?-->", "", text, flags=re.DOTALL)


def fences(text):
    """[(language, code, the text before it)] of the fenced blocks."""
    return [(found[1], found[2], text[:found.start()])
            for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", visible(text), flags=re.DOTALL | re.MULTILINE)


def rows_of(text, heading):
    """The rows, lists of cells, of all tables whose first heading is this word."""
    found = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n?)*)", visible(text), re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line)[1:-1]]
            for rows in found for line in rows.splitlines()]


def commands(text):
    """The commands of a page, lists of words, that begin with python, torchrun, sbatch or make."""
    blocks = [code.replace("\\\n", " ") for language, code, _ in fences(text) if language in ("", "bash")]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall("`([^`\n]*)`", prose(text))
    return [shlex.split(line, comments=True) for line in lines
            if re.match(r"(python|torchrun|sbatch) .*\.py|make ", line)]


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def copy_of_constants(preset=None, overrides=()):
    """constants.py as a module of its own, with a preset and overrides.  Raises UserError for mistakes."""
    copy = types.ModuleType("copy")
    vars(copy).update({name: value for name, value in vars(C).items() if name.isupper()})
    apply_preset(copy, preset)
    apply_overrides(copy, overrides)
    return copy


# ------------------------------------------------------------------ what may be wrong

def constant_faults(pages):
    """Constants that no table names, or several do, or with another default, or without a meaning."""
    rows = [row for text in pages.values() for row in rows_of(text, "constant")]
    known = hyperparameters(C)
    names = [row[0].strip("`") for row in rows]
    faults = [f"{name}: no such constant" for name in set(names) - set(known)]
    faults += [f"{name}: in {names.count(name)} tables" for name in known if names.count(name) != 1]
    for name, (_, default, meaning, *rest) in zip(names, rows, strict=True):
        value = ast.literal_eval(default.strip("`"))
        if name in known and (value != known[name] or type(value) is not type(known[name])):
            faults.append(f"{name}: {default}, not {known[name]!r}")
        faults += [f"{name}: no meaning, or a broken row"] * (rest != [] or len(meaning) < 4)
    return faults


def preset_faults(pages):
    """Presets that no table names, or several do, or with values that they do not have."""
    rows = [row for text in pages.values() for row in rows_of(text, "preset")]
    names = [row[0].strip("`") for row in rows]
    faults = [f"{name}: no such preset" for name in set(names) - set(C.PRESETS)]
    faults += [f"{name}: in {names.count(name)} tables" for name in C.PRESETS if names.count(name) != 1]
    for name, row in zip(names, rows, strict=True):
        for constant, value in re.findall(r"`([A-Z0-9_]+)=([^`]+)`", " ".join(row[1:])):
            if C.PRESETS.get(name, {}).get(constant) != ast.literal_eval(value):
                faults.append(f"{name}: {constant} is not {value}")
    return faults


def script_faults(readme):
    """Scripts of the tree that the table does not name, and the reverse."""
    named = {row[0].strip("`") for row in rows_of(readme, "script")}
    return sorted(named ^ {path.name for path in ROOT.glob("*.py")})


def link_faults(place, text):
    """Links, pictures and anchors of a page that lead nowhere."""
    faults = []
    for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / place).parent / path if path else ROOT / place
        if not file.exists():
            faults.append(target)
        elif anchor and anchor not in map(slug, re.findall("^#+ (.+)", file.read_text(), re.MULTILINE)):
            faults.append(f"{target}: no such heading")
    return faults


def path_faults(text):
    """Files of the tree that a page names in its text, and that are not there; but for those it shows."""
    words = re.findall(r"`([^`\s]+)`", prose(text))
    named = {word for word in words if re.fullmatch(rf"(({FOLDERS})/[\w/.-]+\.\w+|\w+\.py)", word)}
    return sorted(word for word in named - set(files_of(text)) if not (ROOT / word).exists())


def name_faults(text):
    """Constants that a page names in its text, alone or with a value, and that do not exist or refuse it."""
    faults = []
    for name, value in re.findall(r"`([A-Z][A-Z0-9_]*[A-Z0-9])(=[^`]*)?`", prose(text)):
        try:
            copy_of_constants(overrides=[f"{name}{value}"] if value else [])
        except UserError as error:
            faults.append(str(error))
        faults += [f"{name}: no such constant"] * (not value and name not in WORDS and not hasattr(C, name))
    return faults


class Parsed(Exception):
    """Carries what a script's command line was read as, before the script does anything with it."""


def command_faults(words, monkeypatch, capsys):
    """Why the script that a command calls would refuse its words: options, choices, preset, --set."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [f"make {word}: no such target" for word in words[1:2] if word not in targets]
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[place]
    faults = [f"{word}: no such file" for word in words[:place] if "/" in word and not (ROOT / word).exists()]
    if not script.exists():
        return [*faults, f"{words[place]}: no such script"]
    if script.parent.name == "benchmarks":
        source = script.read_text()
        source += (ROOT / "infer_vista3d.py").read_text() * ("parse_known_args" in source)
        return faults + [f"{script.name}: no option {word}" for word in words if word.startswith("--")
                         and f'"{word}"' not in source]
    parse = argparse.ArgumentParser.parse_args

    def caught(parser):
        raise Parsed(parse(parser))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        patch.setattr(sys, "argv", words[place:])
        try:
            importlib.import_module(script.stem).main()
        except Parsed as parsed:
            args = parsed.args[0]
        except SystemExit:
            return [*faults, capsys.readouterr().err.strip().splitlines()[-1]]
    try:
        copy_of_constants(getattr(args, "preset", None), getattr(args, "set", []))
    except UserError as error:
        faults.append(str(error))
    return faults


# ------------------------------------------------------------------ the pages tell the truth

def test_every_constant_stands_in_one_table_with_its_default():
    """A newcomer reads the pages, not constants.py; a default that has moved on would mislead."""
    assert constant_faults(PAGES) == []


def test_every_preset_stands_in_one_table():
    """-p is of use to those who know the words."""
    assert preset_faults(PAGES) == []


def test_readme_tells_what_each_script_does():
    """The table of scripts is the map of the tree."""
    assert script_faults(PAGES["README.md"]) == []


@pytest.mark.parametrize("place", PAGES)
def test_links_pictures_and_files_exist(place):
    """A link that leads nowhere is worse than none."""
    assert link_faults(place, PAGES[place]) == [] and path_faults(PAGES[place]) == []


@pytest.mark.parametrize("place", PAGES)
def test_constants_in_the_text_exist_and_take_the_values_given(place):
    """What a page advises against trouble must be a switch that there is."""
    assert name_faults(PAGES[place]) == []


@pytest.mark.parametrize("place", [place for place in PAGES if place != EXTEND])
def test_the_scripts_accept_every_command_shown(place, monkeypatch, capsys):
    """Commands are copied from the page into a terminal."""
    found = commands(PAGES[place])
    assert found
    faults = [(" ".join(words), command_faults(words, monkeypatch, capsys)) for words in found]
    assert [fault for fault in faults if fault[1]] == []


def test_pages_lead_to_each_other():
    """README names every page, and every page leads back."""
    for place, text in PAGES.items():
        if place != "README.md":
            assert f"]({place})" in PAGES["README.md"] and "](../README.md)" in text, place


@pytest.mark.parametrize("text", [
    "| constant | default | meaning |\n|---|---|---|\n| `KEEP_TOP_K` | `3` | kept checkpoints |\n",
    "| constant | default | meaning |\n|---|---|---|\n| `KEEP_TOP` | `3` | kept checkpoints |\n"])
def test_a_doubled_and_an_unknown_constant_are_found(text):
    """The check itself is checked: one table too many, one name that is none."""
    assert len(constant_faults({**PAGES, "lie": text})) == 1


@pytest.mark.parametrize("truth, lie", [
    ("| `KEEP_TOP_K` | `3` |", "| `KEEP_TOP_K` | `4` |"), ("| `MOMENTUM` | `0.9` |", "| `MOMENTUM` | `1` |"),
    ("| `EMA_DECAY` | `0.999` | share of the average that stays, per optimizer step |",
     "| `EMA_DECAY` | `0.999` |  |")])
def test_a_wrong_default_and_a_missing_meaning_are_found(truth, lie):
    """The check itself is checked, on the page that states the truth."""
    place = "docs/settings.md"
    assert truth in PAGES[place]
    assert len(constant_faults({**PAGES, place: PAGES[place].replace(truth, lie)})) == 1


@pytest.mark.parametrize("check, lie", [
    (name_faults, "Set `KEEP_TOP_X`."), (name_faults, "Set `KEEP_TOP_K=many`."), (name_faults, "`SEED=-1`"),
    (path_faults, "See `utils/nothing.py`."), (path_faults, "Run `train_nothing.py`."),
    (lambda text: link_faults("docs/em.md", text), "[here](nothing.md)"),
    (lambda text: link_faults("docs/em.md", text), "![a picture](nothing.png)"),
    (lambda text: link_faults("docs/em.md", text), "[here](em.md#nothing)"),
    (lambda text: preset_faults({**PAGES, "lie": text}), "| preset | for |\n|---|---|\n| `none` | a |\n"),
    (lambda text: preset_faults({**PAGES, "docs/em.md": PAGES["docs/em.md"].replace(*text.split(" to "))}),
     "VISTA_EPOCHS=200 to VISTA_EPOCHS=201"),
    (lambda text: script_faults(PAGES["README.md"].replace("| `evaluate.py` |", text)), "| `judge.py` |")])
def test_lies_in_the_text_are_found(check, lie):
    """The checks themselves are checked."""
    assert check(lie)


@pytest.mark.parametrize("line", [
    "python evaluate.py --checkpoint a --output b --speed 3", "python nothing.py -n a", "make nothing",
    "python train_finetune.py --task sleep -n a", "python train_vista3d.py -p em_huge -n a",
    "python train_vista3d.py -n a --set VISTA_LRR=1", "python train_vista3d.py -n a --set VISTA_LR=fast",
    "sbatch docs/nothing.sbatch train_vista3d.py -n a", "python benchmarks/ema_step.py --m 3",
    "python prepare_data.py pairs --data a"])
def test_lies_in_commands_are_found(line, monkeypatch, capsys):
    """The checks themselves are checked."""
    words, = commands(f"```bash\n{line}\n```\n")
    assert command_faults(words, monkeypatch, capsys)


# ------------------------------------------------------------------ docs/extend.md is run

def files_of(text):
    """{path: code} of the Python files that a page shows, each named last in the text before it."""
    return {re.findall(r"`([\w/]+\.py)`", before)[-1]: code
            for language, code, before in fences(text) if language == "python"}


def apply_changes(code, root):
    """Do to the files below ``root`` what a block of changes says; each place must be there once."""
    name, *hunks = re.split(r"^@@.*\n", code, flags=re.MULTILINE)
    path = root / name.split()[-1]
    for hunk in hunks:
        lines = hunk.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != other) for other in "+-")
        text = path.read_text()
        assert text.count(old) == 1, f"{path.name}: {old}"
        path.write_text(text.replace(old, new))


RUN = """
import runpy, sys
import constants as C
before = dict(vars(C))
for words in {commands}:
    vars(C).update(before)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (words, end.code)
for path in {tests}:
    for name, function in runpy.run_path(path).items():
        if name.startswith("test_"):
            function()
"""
SMALL = ["HVIT_IMG_SIZE=32", "HVIT_BATCH_SIZE=4", "SPINE_SIZE=32", "SPINE_ENCODER=plain", "SPINE_FEATURES=4",
         "SPINE_BATCH_SIZE=4", "NUM_WORKERS=0", "TRACKERS=[]", "PRECISION=fp32", "SAVE_EVERY_EPOCHS=0"]


def test_what_the_page_adds_to_the_tree_works(tmp_path, photos, spine):
    """Data set, model and loss as shown, in a copy of the tree, with the commands as shown: they train.

    The settings and --fast-dev-run that follow them make the networks small.
    """
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("datasets", "losses", "models", "utils"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = files_of(PAGES[EXTEND])
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    for language, code, _ in fences(PAGES[EXTEND]):
        if language == "diff":
            apply_changes(code, tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    for path in spine.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "masks.csv").write_text((spine / "cord_masks.csv").read_text())
    rows = ["path,age,split\n"]
    for number in range(8):
        Image.linear_gradient("L").resize((16, 16)).rotate(40 * number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{10 * number},{('train', 'val')[number % 2]}\n")
    (tmp_path / "ages.csv").write_text("".join(rows))

    shown = [words[1:] for words in commands(PAGES[EXTEND]) if words[0] == "python"]
    assert [words[0] for words in shown] == ["train_ages.py", "train_finetune.py", "train_finetune.py"]
    called = [[*words, "--fast-dev-run", "--set", *SMALL] for words in shown]
    program = RUN.format(commands=called, tests=[name for name in files if name.startswith("tests/")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = {"ages": "ages", "regnet": "hvit", "tversky": "segment"}
    for name, kind in kinds.items():
        assert (tmp_path / "runs" / name / f"{kind}_best.pt").is_file(), name


def test_what_is_shown_is_short_and_in_the_manner_of_the_tree(tmp_path):
    """The page promises under 40 lines; and who copies it must pass the linter that it recommends."""
    for language, code, _ in fences(PAGES[EXTEND]):
        assert language not in ("python", "diff") or code.count("\n") < 40, code[:80]
    for number, code in enumerate(files_of(PAGES[EXTEND]).values()):
        (tmp_path / f"{number}.py").write_text(code)
    words = ["-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "--ignore", "I", tmp_path]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------ docs/train.sbatch is run

@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands and torchrun: ``start(how)`` begins the job, files tell what was called.

    The training ends at once with the exit code ``how``, or with how = "works" saves when it is told to end.
    """
    tools = {
        "bin/scontrol": 'echo "$@" >> called; [ "$1" = show ] && echo node1; exit 0',
        "bin/srun": 'exec "$@"',
        "bin/scancel": 'echo "$@" >> called; kill -TERM $(cat pid)',
        ".venv/bin/torchrun": """
            echo $$ > pid; echo "$@" > words
            [ "$HOW" = works ] || exit "$HOW"
            trap 'echo saved > saved; exit 1' TERM
            touch ready; while :; do sleep 0.05; done"""}
    for name, text in tools.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]",
           "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}

    def start(how):
        process = subprocess.Popen(["bash", ROOT / "docs/train.sbatch", "train_vista3d.py", "-n", "a b"],
                                   env={**os.environ, **job, "HOW": how}, text=True)
        while how == "works" and not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.02)
        return process

    return start


def called(folder):
    """The words that SLURM's commands were called with."""
    return (folder / "called").read_text().splitlines()


def test_the_job_of_the_queue_runs_torchrun_and_resumes(queue, tmp_path):
    """One torchrun on each node with the words given, and -c auto, or each start would begin anew."""
    assert queue("0").wait(20) == 0
    words = (tmp_path / "words").read_text().split()
    assert words[:2] == ["--nnodes=2", "--nproc_per_node=4"] and "--rdzv_endpoint=node1:29500" in words
    assert words[-6:] == ["train_vista3d.py", "-n", "a", "b", "-c", "auto"]
    assert called(tmp_path) == ["show hostnames node[1-2]"]


def test_a_mistake_ends_the_job_for_good(queue, tmp_path):
    """Queued again it would fail again, for ever."""
    assert queue("2").wait(20) == 2
    assert called(tmp_path) == ["show hostnames node[1-2]"]


@pytest.mark.parametrize("number, again", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_job_saves_when_its_time_is_over(number, again, queue, tmp_path):
    """SIGUSR1, before the limit: the training is told to save and end, then the job is queued again.

    SIGTERM comes from preemption, after which SLURM itself queues again, or from the user, who wants an end.
    """
    process = queue("works")
    process.send_signal(number)
    assert process.wait(20) == 1 and (tmp_path / "saved").exists()
    assert called(tmp_path)[1:] == ["--signal=TERM 7"] + ["requeue 7"] * again
