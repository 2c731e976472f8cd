"""constants.py and the scripts agree, and nothing else reads constants.py."""

import ast
import re
from pathlib import Path

import constants

ROOT = Path(constants.__file__).parent
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "constants.py")
FOLDERS = ("datasets", "models", "losses", "utils")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def assigned():
    """Names assigned at the top of constants.py, in order."""
    tree = ast.parse((ROOT / "constants.py").read_text())
    return [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]


def names_used(path):
    """Every NAME of a ``C.NAME`` in one script."""
    return {node.attr for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "C"}


def test_no_constant_is_dead_doubled_or_misspelt():
    """A constant that nobody reads is an option that does nothing."""
    names, used = assigned(), set().union(*map(names_used, SCRIPTS))
    assert len(names) == len(set(names)), "assigned twice"
    assert used - set(names) == set(), "read by a script, but not in constants.py"
    assert set(names) - used - {"PRESETS"} == set(), "read by no script"


def test_constants_are_literals_in_sections_of_at_most_18():
    """The file is read, not run; each section fits one screen."""
    text = (ROOT / "constants.py").read_text()
    for node in ast.parse(text).body[1:]:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
    for section in re.split(r"\n# -+ \d+ ", text)[1:]:
        names = re.findall(r"^[A-Z][A-Z0-9_]* =", section, re.MULTILINE)
        assert len(names) <= 18, section.splitlines()[0]


def test_every_constant_has_its_meaning_beside_it():
    """Unit, allowed words or source; the guide's flags and the seed speak for themselves."""
    plain = {"SEED", "IMG_SIZE", "PRESETS"}
    for line in (ROOT / "constants.py").read_text().splitlines():
        name = re.match(r"([A-Z][A-Z0-9_]*) =", line)
        if name and name[1] not in plain and not name[1].startswith(("USE_", "LAMBDA_")):
            assert "  # " in line or line.endswith(("[", "{")), line


def test_only_scripts_import_constants():
    """Modules take arguments, so that data workers and tests see the values that they were given."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert "constants" not in names, path


def test_gradients_and_steps_happen_in_scripts_alone():
    """The reader of a script sees the whole training loop."""
    for path in MODULES:
        assert not re.search(r"\.backward\(|optimizer\.step\(", path.read_text()), path


def test_files_stay_within_their_ceilings():
    """A newcomer reads a file in one sitting: modules of 300 lines, functions of 50 (``main`` apart)."""
    for path in MODULES + SCRIPTS:
        text = path.read_text()
        assert text.count("\n") <= (300 if path in MODULES else 450), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"


def test_every_public_function_and_module_has_a_docstring():
    """What it does, with shapes, ranges and units, stands where it is defined."""
    for path in MODULES + SCRIPTS:
        tree = ast.parse(path.read_text())
        assert path.name == "__init__.py" or ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") \
                    and node.name not in ("main", "parse_args"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
