"""One manner: nothing dead, the scripts built alike, help that fits a screen, commands of the Makefile."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess

import pytest
from test_constants import MODULES, ROOT, SCRIPTS
from test_docs import command_faults

TRAINING = ("longitudinal_MIM_training", "train_pretrain", "train_finetune", "train_vista3d")
MAIN = {path.stem for path in SCRIPTS} - {"builders"}                        # builders.py is read, not run


def public(tree):
    """Names of the public functions, classes, methods and constants that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)
                        and not inner.name.startswith("_") and inner.name != "forward")


def read(tree):
    """Names that a module reads, as a variable or behind a dot."""
    return {node.attr if isinstance(node, ast.Attribute) else node.id for node in ast.walk(tree)
            if isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load)}


def dead(sources):
    """"path: name" of what no source reads, that of itself included; sources: {path: text}."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    used = set().union(*map(read, trees.values()))
    return {f"{path}: {name}" for path, tree in trees.items() for name in public(tree) if name not in used}


def test_nothing_public_is_dead():
    """What is read by no script and no module, but by its test alone, is kept for nobody."""
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*MODULES, *SCRIPTS]}
    assert dead(sources) == set()


@pytest.mark.parametrize("source", ["def f():\n    return 1\n", "N = 1\n", "class A:\n    '''a'''\n",
                                    "class A:\n    def f(self):\n        return A\n"])
def test_the_dead_are_found(source):
    """The check itself is checked."""
    assert len(dead({"a.py": source, "b.py": "x = 1\nprint(x)\n"})) == 1


@pytest.mark.parametrize("script, most", {
    "train_pretrain": 400, "train_finetune": 450, "longitudinal_MIM_training": 400, "train_vista3d": 400,
    "infer_vista3d": 250, "infer_longitudinal": 200, "infer_cascade": 250, "evaluate": 250,
    "prepare_data": 250, "builders": 320}.items())
def test_scripts_stay_within_their_ceilings(script, most):
    """A script is read from top to bottom in one sitting."""
    assert (ROOT / f"{script}.py").read_text().count("\n") <= most


def sections(script):
    """The comments that head the sections of a script's main, with their indentation."""
    text = (ROOT / f"{script}.py").read_text()
    return re.findall(r"^( {4}| {8})# ([A-Z][a-z ]*)$", text[text.index("def main():"):], re.MULTILINE)


@pytest.mark.parametrize("script", TRAINING)
def test_training_scripts_have_the_same_sections(script):
    """Who has read one finds the way in the others."""
    assert [name for _, name in sections(script)] == [
        "Data and model", "Optimizer", "Resume", "Record", "Train", "Validate", "Log and save"]


def skeleton(script):
    """The words that a training script's loop prints, and the entries of its checkpoint and record."""
    text = (ROOT / f"{script}.py").read_text()
    text = text[text.index("def main():"):]
    return {"printed": [line for line in re.findall(r'(?:say|print)\(f"(\w+)', text) if line != "No"],
            "saved": set(re.findall(r'"(epoch|step|best|history|running|constants|val_loss|kind)":', text)),
            "recorded": set(re.findall(r"(\w+)=", text[text.index("write_training_params("):
                                                       text.index("def save_last")]))
            - {"train_data", "val_data"}}


@pytest.mark.parametrize("script", TRAINING[1:])
def test_training_scripts_print_and_write_the_same(script):
    """One habit of reading, and one of parsing, for all."""
    assert skeleton(script) == skeleton(TRAINING[0])


def parsers(script, monkeypatch):
    """The argument parsers of a script, those of its commands included, before it reads any words."""
    found = []
    with monkeypatch.context() as patch:
        def caught(parser, *args):
            found.append(parser)
            raise KeyboardInterrupt
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(script).main()
    commands = next((action.choices for action in found[0]._actions if action.dest == "command"), {})
    return [*found, *commands.values()]


@pytest.mark.parametrize("script", sorted(MAIN))
def test_help_fits_a_screen_and_says_the_defaults(script, monkeypatch):
    """40 lines of 110 columns; an option that takes a value and may be left out says what holds then."""
    monkeypatch.setenv("COLUMNS", "110")
    for parser in parsers(script, monkeypatch):
        assert parser.format_help().count("\n") <= 40
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and not action.required:
                alternatives = script == "infer_longitudinal" and action.dest in ("data", "prior", "current")
                assert "default" in action.help or alternatives, action.option_strings


def test_every_command_of_the_makefile_is_accepted(monkeypatch, capsys):
    """The demos are what a newcomer runs first; make -n shows what they would do."""
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert re.findall("^== demo-(\\w+)", shown.stdout, re.MULTILINE) == [
        "longitudinal", "brain", "em", "leaf", "spine"]
    lines = re.sub(r"\\\n", " ", shown.stdout).splitlines()
    commands = [shlex.split(part) for line in lines for part in line.split(";") if ".py " in part]
    assert len(commands) > 15
    monkeypatch.chdir(ROOT)
    for words in commands:
        assert command_faults(words[words.index(".venv/bin/python") + 1:], monkeypatch, capsys) == [], words
