"""prepare_data.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_lungs import draw_chest

import constants as C
import prepare_data
from datasets.cache import read_cache
from datasets.io import write_nifti
from datasets.phantom import thorax_ct
from utils.config import UserError, hyperparameters

ROOT = Path(prepare_data.__file__).parent


@pytest.fixture
def xrays(tmp_path):
    """A folder with one X-ray of each of two patients."""
    (tmp_path / "xrays").mkdir()
    for seed in range(2):
        write_nifti(tmp_path / "xrays" / f"p{seed}_visit.nii.gz", draw_chest((120, 140), seed)[0])
    return tmp_path / "xrays"


@pytest.fixture
def run(monkeypatch):
    """Call the script with words of a command line; constants are restored afterwards."""
    for name, value in hyperparameters(C).items():
        monkeypatch.setattr(C, name, value)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
        prepare_data.main()
    return call


def cases(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_pairs_makes_cases_and_says_how_many(run, xrays, tmp_path, capsys):
    """The first line says who was found, the last one names the folder; the second run keeps everything."""
    words = ("pairs", "--data", xrays, "--output", tmp_path / "out", "--per-image", 2, "--size", 96,
             "--workers", 0)
    run(*words)
    first, warning, *last = capsys.readouterr().out.splitlines()
    assert first == "2 images of 2 patients, such as p0: p0_visit.nii.gz, p1: p1_visit.nii.gz"
    assert warning.startswith("warning: ")
    assert last == ["4 pairs made and 0 kept", f"Pairs: {tmp_path / 'out'}"]
    run(*words)
    assert "0 pairs made and 4 kept" in capsys.readouterr().out
    assert [case.name for case in cases(tmp_path / "out")] == [
        f"p{seed}_p{seed}-visit_{number:03d}" for seed in range(2) for number in range(2)]


@pytest.mark.parametrize("change, is_so", [
    ((), lambda p: any(f["kind"] != "nodules" for f in p["findings"])),
    (("--findings", "nodules"), lambda p: all(f["kind"] == "nodules" for f in p["findings"])),
    (("--findings", "effusion=1", "nodules=0"), lambda p: [f["kind"] for f in p["findings"]] == ["effusion"]),
    (("--set", "PAIR_UNCHANGED=1.0"), lambda p: not p["changed"]),
    (("--set", "PAIR_UNCHANGED=0.0"), lambda p: p["changed"]),
    (("--set", "PAIR_DEVICES=1.0"), lambda p: all(p["devices"].values())),
    (("--set", "PAIR_DEVICES=0.0"), lambda p: not any(p["devices"].values())),
    (("--set", "PAIR_ROTATION=0.0", "PAIR_SHIFT=0.0", "PAIR_SCALE=0.0", "PAIR_BREATH=0.0"),
     lambda p: list(p["pose"]["prior"].values())[:4] == [0, [0, 0], 1, 0]),
    (("--set", "PAIR_EXPOSURE=0.0", "PAIR_LOCAL_CONTRAST=0.0", "PAIR_NOISE=0.0", "PAIR_BLUR=0.0"),
     lambda p: p["appearance"]["current"] == {"gamma": 1, "detail": 0, "noise": 0, "blur": 0}),
])
def test_every_option_of_the_recipe_reaches_the_pairs(run, xrays, tmp_path, change, is_so):
    """An option that does nothing is worse than none."""
    run("pairs", "--data", xrays, "--output", tmp_path / "out", "--per-image", 3, "--size", 64,
        "--workers", 0, *change)
    params = [json.loads((case / "params.json").read_text()) for case in cases(tmp_path / "out")]
    assert len(params) == 6
    assert all(map(is_so, params)) if change else any(map(is_so, params))


def test_size_seed_and_bend_change_the_images(run, xrays, tmp_path):
    """The remaining options are seen in the pixels."""
    pictures = {}
    for name, change in {"plain": (), "seed": ("--seed", 7), "bend": ("--set", "PAIR_BEND=0.02"),
                         "size": ("--size", 96)}.items():
        run("pairs", "--data", xrays, "--output", tmp_path / name, "--per-image", 1, "--size", 64,
            "--workers", 0, *change)
        pictures[name] = nib.load(cases(tmp_path / name)[0] / "current.nii.gz").get_fdata()
    assert pictures["size"].shape == (96, 96)
    assert not np.array_equal(pictures["plain"], pictures["seed"])
    assert not np.array_equal(pictures["plain"], pictures["bend"])


def test_ct_volumes_become_pairs_too(run, tmp_path, capsys):
    """--ct hands the CT settings over; --findings and the constants of the X-ray pairs count there too."""
    hu, _ = thorax_ct(np.random.default_rng(0), (60, 36, 64), (6.0, 6.0, 6.0))
    (tmp_path / "ct").mkdir()
    volume = nib.Nifti1Image(hu.T[::-1, ::-1, ::-1], np.diag([6.0, 6.0, 6.0, 1.0]))
    nib.save(volume, tmp_path / "ct" / "p1_scan.nii.gz")
    run("pairs", "--ct", "--data", tmp_path / "ct", "--output", tmp_path / "out", "--per-image", 2,
        "--size", 64, "--workers", 0, "--findings", "nodules=1",
        "--set", "CT_SPACING_MM=6.0", "PAIR_DEVICES=1.0")
    printed = capsys.readouterr().out
    assert "2 pairs made and 0 kept" in printed and "1 images of 1 patients, such as p1: p1_scan" in printed
    for case in cases(tmp_path / "out"):
        params = json.loads((case / "params.json").read_text())
        assert len(params["findings"]) == 1 and all(params["devices"].values())


@pytest.mark.parametrize("words, message", [
    (("--findings", "nodule"), "did you mean nodules"),
    (("--findings", "nodules=often"), "WORD=PROBABILITY"),
    (("--findings", "nodules=2"), "between 0 and 1"),
    (("--findings", "nodules=0"), "all are 0"),
    (("--set", "PAIR_FINDINGS={'gallstone': 0.5}"), "gallstone is not one of"),
    (("--set", "PAIR_DEVICE=0.5"), "PAIR_DEVICES"),
    (("--set", "PAIR_UNCHANGED=1.5"), "between 0 and 1"),
    (("--size", 100), "multiple of 32"),
    (("--per-image", 0), "1 or more"),
    (("--workers", -1), "0 or more"),
    (("--data", prepare_data.__file__), "prepare_data.py: a file, not a folder"),
    (("--patients", "nowhere.csv"), "--patients nowhere.csv: cannot be read"),
])
def test_a_mistake_is_one_line_that_names_it(run, xrays, tmp_path, words, message):
    """Nothing is written either."""
    with pytest.raises(UserError, match=message) as error:
        run("pairs", "--data", xrays, "--output", tmp_path / "out", "--workers", 0, *words)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_ct_on_xrays_says_so(run, xrays, tmp_path):
    """What a newcomer does who takes --ct for a kind of output."""
    with pytest.raises(UserError, match="none of 2 files.*need no --ct.*p0_visit.nii.gz: .*2D"):
        run("pairs", "--ct", "--data", xrays, "--output", tmp_path / "out", "--workers", 0)


def test_an_empty_folder_ends_with_code_2_and_one_line(tmp_path):
    """As a process: stderr holds the line alone, without a traceback."""
    words = ["pairs", "--data", tmp_path, "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "prepare_data.py", *words], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


def test_a_cache_is_told_with_its_studies_and_guesses(run, studies, tmp_path, capsys):
    """What labels must name, and that MRI or CT was guessed."""
    run("cache", "--data", studies / "raw", "--output", tmp_path / "cache", "--workers", 0)
    first, names, guessed, last = capsys.readouterr().out.splitlines()
    assert first.startswith("10 studies: 16 series cached")
    assert names.endswith(": s0, s1, s2, s3, s4, ... and 5 more")
    assert guessed.startswith("10 of 10 modes (MRI or CT) were guessed: check ")


def test_demo_data_lie_where_training_looks_and_have_their_own_settings(run, tmp_path):
    """DEMO_SETTINGS replace PAIR_*; a second call makes nothing."""
    words = ["demo", "longitudinal", "--output", tmp_path, "--workers", 0, "--size", 64,
             "--set", "DEMO_PATIENTS=1", "DEMO_PAIRS_PER_PATIENT=2"]
    run(*words)
    pairs = tmp_path / "longitudinal" / "pairs"
    assert len(cases(pairs)) == 2
    written = {path: path.stat().st_mtime_ns for path in pairs.rglob("*.nii.gz")}
    run(*words)
    assert written == {path: path.stat().st_mtime_ns for path in pairs.rglob("*.nii.gz")}
    settings = json.loads((pairs / "pairs.json").read_text())["settings"]
    assert settings["exposure"] == C.DEMO_SETTINGS["exposure"] and settings["noise"] == C.PAIR_NOISE
    with pytest.raises(UserError, match="DEMO_SETTINGS"):
        run(*words, "DEMO_SETTINGS={'brightness': 1.0}")


def test_demo_studies_come_with_labels_and_their_cache(run, tmp_path, capsys):
    """What train_pretrain.py and train_finetune.py read without --data; the X-rays are left alone."""
    words = ["demo", "studies", "--output", tmp_path, "--workers", 0, "--set", "DEMO_STUDIES=3"]
    run(*words)
    folder = tmp_path / "studies"
    studies = read_cache(folder / "cache")
    assert [study.mode for study in studies] == ["mri", "mri", "ct"]
    assert len((folder / "labels.csv").read_text().splitlines()) == 4
    assert [line.split(",")[1] for line in (folder / "split.csv").read_text().splitlines()[1:]] == [
        "train", "val", "test"]
    assert not (tmp_path / "longitudinal").exists()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    run(*words)
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    with pytest.raises(UserError, match="leaves, spine; did you mean studies"):
        run("demo", "study", "--output", tmp_path)
