"""Photographs and settings that cannot be used: handled, or refused in one line."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_PHOTO, write_photo


@pytest.mark.parametrize("kind, setting, words", [
    ("hvit", "HVIT_MODEL=vit_small", "HVIT_MODEL"), ("hvit", "HVIT_LOSS=bce", "HVIT_LOSS"),
    ("hvit", "HVIT_BALANCE=both", "HVIT_BALANCE"), ("hvit", "HVIT_SEVERITY=strong", "HVIT_SEVERITY"),
    ("hvit", "HVIT_MONITOR=val/auroc", "HVIT_MONITOR = val/auroc: not measured"),
    ("hvit", "HVIT_DFCA=True", "HVIT_DFCA = True needs spectral images"),
    ("hvit", "HVIT_SPECTRAL_CHANNELS=4", "has no spectral file"), ("hvit", "HVIT_FIT=pad", "HVIT_FIT"),
    ("hvit", "HVIT_MIXUP_PROB=0.9", "HVIT_MIXUP_PROB"),
    ("hvit", "HVIT_LR=0.0", "HVIT_LR = 0.0: must be above 0"),
    ("hvit", "HVIT_LAYER_DECAY=0.0", "HVIT_LAYER_DECAY"), ("hvit", "HVIT_WEIGHTS=none.pth", "HVIT_WEIGHTS"),
    ("hvit", "HVIT_VAL_FRACTION=0.9", "HVIT_VAL_FRACTION"), ("hvit", "HVIT_PATIENCE=-1", "HVIT_PATIENCE"),
    ("hvit", "HVIT_SCHEDULE=linear", "SCHEDULE"), ("hvit", "HVIT_EPOCHS=0", "HVIT_EPOCHS = 0"),
    ("simclr", "SIMCLR_TEMPERATURE=0.0", "SIMCLR_TEMPERATURE"), ("simclr", "HVIT_IMG_SIZE=2", "2 pixels"),
    ("simclr", "SIMCLR_HUE=0.7", "hue"), ("simclr", "SIMCLR_CROP_SCALE=[0.5, 0.1]", "scale"),
    ("simclr", "HVIT_SPECTRAL_CHANNELS=4", "SimCLR learns from colour images alone"),
    ("simclr", "SIMCLR_PROJECTION_DIM=0", "SIMCLR_PROJECTION_DIM"),
    ("simclr", "SIMCLR_BATCH_SIZE=0", "SIMCLR_BATCH_SIZE")])
def test_settings_that_make_no_sense_end_in_one_line(kind, setting, words, refused, photos, tmp_path):
    """The constant is named."""
    script, option = ("train_pretrain", "--method") if kind == "simclr" else ("train_finetune", "--task")
    line = refused(script, option, kind, "-n", "a", "--data", photos, "--set", *SMALL_PHOTO,
                   f"RUNS_DIR={tmp_path}", setting)
    assert words in line


def empty_class(root):
    (root / "yellow").mkdir()
    return "yellow"


def class_in_validation_only(root):
    for word in ("blue", "green", "red"):
        for number in range(10):
            split = "val" if word == "red" or number < 3 else "train"
            (root / split / word).mkdir(parents=True, exist_ok=True)
            (root / word / f"{word}_({number}).jpg").rename(root / split / word / f"{word}_({number}).jpg")
        shutil.rmtree(root / word)
    return "class red is in val only"


def text_file_as_photograph(root):
    (root / "blue" / "blue_(3).jpg").write_text("not a picture")
    return "blue_(3).jpg"


def cut_short(root):
    path = root / "blue" / "blue_(3).jpg"
    path.write_bytes(path.read_bytes()[:600])
    return "blue_(3).jpg"


def one_class(root):
    for word in ("green", "red"):
        shutil.rmtree(root / word)
    return "the only class"


def no_classes(root):
    for path in list(root.rglob("*.jpg")):
        path.rename(root / path.name)
    for word in ("blue", "green", "red"):
        (root / word).rmdir()
    return "has no class"


@pytest.mark.parametrize("fault", [empty_class, class_in_validation_only, text_file_as_photograph, cut_short,
                                   one_class, no_classes])
def test_bad_data_end_in_one_line(fault, refused, photos, tmp_path):
    """The file, folder or class is named."""
    shutil.copytree(photos, tmp_path / "data")
    words = fault(tmp_path / "data")
    line = refused("train_finetune", "--task", "hvit", "-n", "a", "--data", tmp_path / "data", "--set",
                   *SMALL_PHOTO, f"RUNS_DIR={tmp_path}")
    assert words in line


def test_other_files_are_left_out_and_bad_ones_skipped_when_asked(script, train_photo, photos, tmp_path,
                                                                  capsys):
    """A text file among images is counted; a damaged one is skipped with ON_BAD_FILE, and never judged."""
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "notes.txt").write_text("hello")
    cut_short(tmp_path / "data")
    run = train_photo("hvit", "run", "ON_BAD_FILE=skip", "HVIT_EPOCHS=1", words=["--data", tmp_path / "data"])
    printed = capsys.readouterr().out
    assert "1 files are no photographs and were left out: notes.txt" in printed
    script("evaluate", "--checkpoint", run / "hvit_best.pt", "--data", tmp_path / "data", "--split", "all",
           "--output", tmp_path / "out", "--bootstrap", 10)
    assert "Left out: " in capsys.readouterr().out
    with open(tmp_path / "out" / "predictions.csv") as file:
        judged = {row["photograph"] for row in csv.DictReader(file)}
    assert len(judged) == 32 and "blue/blue_(3).jpg" not in judged


def test_wrong_numbers_of_bands_end_in_one_line(refused, photos, tmp_path):
    """The file is named, and the constant."""
    shutil.copytree(photos, tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*.jpg")):
        np.save(path.with_name(f"{path.stem}_spectral.npy"), np.zeros((3, 40, 44), np.float32))
    line = refused("train_finetune", "--task", "hvit", "-n", "a", "--data", tmp_path / "data", "--set",
                   *SMALL_PHOTO, f"RUNS_DIR={tmp_path}", "HVIT_SPECTRAL_CHANNELS=5")
    assert "_spectral.npy" in line and "HVIT_SPECTRAL_CHANNELS = 5" in line


def test_a_checkpoint_that_does_not_fit_is_refused(refused, train_photo, photos, tmp_path, capsys):
    """Of another network, for other classes, of another kind, or without its splits."""
    backbone = train_photo("simclr", "backbone", words=["--fast-dev-run"])
    run = train_photo("hvit", "run", words=["--fast-dev-run"])
    common = ["train_finetune", "--task", "hvit", "--data", photos, "--set", *SMALL_PHOTO,
              f"RUNS_DIR={tmp_path / 'runs'}"]
    capsys.readouterr()
    line = refused(*common, "HVIT_MODEL=hvit_small", "-n", "b", "--init", backbone / "simclr_last.pt")
    assert "0% of the model's weights" in line
    line = refused(*common, "-n", "c", "-c", backbone / "simclr_last.pt")
    assert "simclr, not hvit" in line
    shutil.copytree(photos, tmp_path / "data")
    write_photo(tmp_path / "data" / "yellow" / "a.jpg", (200, 200, 0), 99)
    line = refused("evaluate", "--checkpoint", run / "hvit_best.pt", "--data", tmp_path / "data",
                   "--output", tmp_path / "out")
    assert "yellow is none of the 3 classes" in line
    (run / "splits.csv").unlink()
    line = refused("evaluate", "--checkpoint", run / "hvit_best.pt", "--data", photos,
                   "--output", tmp_path / "out")
    assert "splits.csv is missing" in line


def test_a_loss_that_is_not_finite_stops_the_run(refused, photos, tmp_path, monkeypatch):
    """The step and the photographs are named."""
    monkeypatch.setattr("train_pretrain.nt_xent_loss", lambda first, *others: first.float().sum() * torch.nan)
    line = refused("train_pretrain", "--method", "simclr", "-n", "a", "--data", photos,
                   "--set", *SMALL_PHOTO, f"RUNS_DIR={tmp_path}")
    assert "step 1" in line and ".jpg" in line
