"""Hard knocks for brain studies: damaged and mistaken files, tables, checkpoints and settings."""

import csv
import shutil

import numpy as np
import pydicom
import pytest
import torch
from conftest import SMALL_STUDY
from test_cache import head, write_dicom, write_nifti

from datasets.cache import read_cache

# Each writes one fault into a study; the series beside it must be cached all the same.

def truncated_dicom(study):
    write_dicom(study / "dicom", head(1, hu=True))
    path = study / "dicom" / "03.dcm"
    path.write_bytes(path.read_bytes()[:900])


def dicom_without_image(study):
    write_dicom(study / "dicom", head(1, hu=True))
    dataset = pydicom.dcmread(study / "dicom" / "00.dcm")
    del dataset.PixelData
    dataset.SeriesInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(study / "report.dcm")
    shutil.rmtree(study / "dicom")


def missing_slice(study):
    write_dicom(study / "dicom", head(1, hu=True, shape=(68, 72, 9)))
    (study / "dicom" / "04.dcm").unlink()


def four_dimensions(study):
    write_nifti(study / "bold.nii.gz", np.ones((48, 48, 8, 5), np.int16))


def axis_of_no_size(study):
    write_nifti(study / "none.nii.gz", np.zeros((48, 0, 8), np.int16))


def not_a_number(study):
    write_nifti(study / "nan.nii.gz", np.full((48, 48, 8), np.nan, np.float32))


def too_small(study):
    write_nifti(study / "small.nii.gz", head(1, shape=(8, 8, 8)))


def other_units(study):
    write_nifti(study / "head_ct.nii.gz", head(1))


FAULTS = {truncated_dicom: "dicom", dicom_without_image: "report.dcm", missing_slice: "dicom",
          four_dimensions: "bold.nii.gz", axis_of_no_size: "none.nii.gz", not_a_number: "nan.nii.gz",
          too_small: "small.nii.gz", other_units: "head_ct.nii.gz"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_bad_series_is_listed_with_one_reason_and_the_others_are_cached(fault, script, tmp_path, capsys):
    """Whatever lies in a clinic's folder, the cache is made of what is sound, and nothing is lost unsaid."""
    ct = fault in (truncated_dicom, dicom_without_image, missing_slice, other_units)
    good = "scan.nii.gz" if ct else "t1.nii.gz"
    write_nifti(tmp_path / "raw" / "s1" / good, head(0, hu=ct))
    fault(tmp_path / "raw" / "s1")
    (tmp_path / "raw" / "nothing").mkdir()
    script("prepare_data", "cache", "--data", tmp_path / "raw", "--output", tmp_path / "cache",
           "--workers", 0)
    with open(tmp_path / "cache" / "bad_files.csv") as file:
        bad = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert "nothing" in bad and len(bad) >= 2
    for path, reason in bad.items():
        assert path == "nothing" or path.startswith(f"s1/{FAULTS[fault]}")
        assert 5 < len(reason) < 250 and "\n" not in reason
    series = [series.source for study in read_cache(tmp_path / "cache") for series in study.series]
    assert series == [f"s1/{good}"]
    assert f"{len(bad)} files or series could not be used" in capsys.readouterr().out


def test_two_series_in_one_folder_are_two_series(script, tmp_path):
    """Folders are not trusted; each series keeps its own slices."""
    for seed, name in enumerate("ab"):
        write_dicom(tmp_path / name, head(seed, hu=True))
        for path in (tmp_path / name).iterdir():
            (tmp_path / "raw" / "s1").mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "raw" / "s1" / f"{name}{path.name}")
    script("prepare_data", "cache", "--data", tmp_path / "raw", "--output", tmp_path / "cache",
           "--workers", 0)
    study, = read_cache(tmp_path / "cache")
    assert [series.shape for series in study.series] == [(4, 64, 64)] * 2


def test_mistakes_in_preparing_end_in_one_line(refused, tmp_path):
    """Each names the file, and the line of a table."""
    write_nifti(tmp_path / "raw" / "s1" / "t1.nii.gz", head(0))
    words = ["prepare_data", "cache", "--data", tmp_path / "raw", "--output", tmp_path / "cache",
             "--workers", 0]
    modes = tmp_path / "modes.csv"
    modes.write_text("study,mode\ns1,pet\n")
    assert f"{modes}, line 2" in refused(*words, "--modes", modes)
    modes.write_text("study,mode\ns7,mri\n")
    assert "s7" in refused(*words, "--modes", modes)
    assert "nowhere" in refused(*words[:3], tmp_path / "nowhere", *words[4:])
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(*words[:3], tmp_path / "empty", *words[4:])


@pytest.mark.parametrize("rows, words", [
    ("study_id,ball\ns1,1\ns1,0\n", "line 3: the study s1 comes a second time"),
    ("study_id,ball\ns1,2\n", 'line 2, ball: "2" is neither 0 nor 1'),
    ("study_id,ball\nunknown,1\n", "has labels for none of the 10 studies"),
    ("patient,ball\ns1,1\n", "study_id"),
    ("study_id,ball\ns1,1\ns3,1\ns5,1\ns7,1\ns9,1\n", "no negative study")])
def test_mistakes_in_labels_end_in_one_line(rows, words, refused, studies, tmp_path):
    """A table that says too much or too little is named with its line."""
    (tmp_path / "labels.csv").write_text(rows)
    line = refused("train_finetune", "--task", "mil", "-n", "a", "--data", studies / "cache", "--set",
                   *SMALL_STUDY, f"RUNS_DIR={tmp_path}", f"STUDY_LABELS={tmp_path / 'labels.csv'}",
                   "STUDY_TEST_FRACTION=0.0")
    assert str(tmp_path / "labels.csv") in line and words in line


def test_studies_and_labels_without_a_counterpart_are_listed(train_study, tmp_path, capsys):
    """Left out, and said so by name."""
    rows = [f"s{number},{number % 2}\n" for number in range(9)]
    (tmp_path / "labels.csv").write_text("study_id,ball\n" + "".join(rows) + "s99,1\n")
    labels = f"STUDY_LABELS={tmp_path / 'labels.csv'}"
    train_study("mil", "part", labels, labels=False, words=["--fast-dev-run"])
    printed = capsys.readouterr().out
    assert "1 studies without labels, left out: s9" in printed
    assert "1 labels without a study, left out: s99" in printed


@pytest.mark.parametrize("setting, words", [
    ("STUDY_VIT=giant", "STUDY_VIT"), ("STUDY_VIT_DIM=49", "STUDY_VIT_DIM"),
    ("STUDY_POSITION=learned", "STUDY_POSITION"), ("STUDY_ATTENTION=fast", "STUDY_ATTENTION"),
    ("STUDY_ATTENTION=varlen", "varlen"),
    ("JEPA_PREDICTOR_HEADS=5", "JEPA_PREDICTOR_DIM"), ("JEPA_TARGET_SHARE={'mri': 0.7}", "JEPA_TARGET_SHARE"),
    ("JEPA_TEACHER_MOMENTUM=[1.0, 0.9]", "JEPA_TEACHER_MOMENTUM"),
    ("JEPA_MONITOR=val/nothing", "val/nothing"),
    ("STUDY_WINDOW_PROBABILITIES=[0.0, 0.0, 0.0]", "STUDY_WINDOW_PROBABILITIES"), ("STUDY_MAX_CROP=[0, 1, 1]",
    "STUDY_MAX_CROP"), ("JEPA_BATCH_SIZE=0", "JEPA_BATCH_SIZE = 0: must be 1 at least"),
    ("STUDY_VAL_FRACTION=0.9", "STUDY_VAL_FRACTION"),
    ("JEPA_SCHEDULE=linear", "SCHEDULE"), ("JEPA_EPOCHS=0", "JEPA_EPOCHS = 0: must be 1 at least"),
    ("NUM_WORKERS=-1", "NUM_WORKERS"), ("JEPA_LR=0.0", "JEPA_LR = 0.0: must be above 0"),
    ("LOG_EVERY_BATCHES=0", "LOG_EVERY_BATCHES"), ("STUDY_VIT_DEPTH=0", "STUDY_VIT_DEPTH")])
def test_settings_that_make_no_sense_end_in_one_line(setting, words, refused, studies, tmp_path):
    """The constant is named."""
    line = refused("train_pretrain", "--method", "jepa", "-n", "a", "--data", studies / "cache",
                   "--set", *SMALL_STUDY, f"RUNS_DIR={tmp_path}", setting)
    assert words in line


@pytest.mark.parametrize("setting, words", [
    ("MIL_POOLER=max", "MIL_POOLER"), ("MIL_ATTENTION_HEADS=7", "MIL_ATTENTION_HEADS"),
    ("MIL_LOSS=focal", "MIL_LOSS"), ("MIL_CLASS_WEIGHTS=[1.0]", "MIL_CLASS_WEIGHTS"),
    ("MIL_BATCH_SIZE=0", "MIL_BATCH_SIZE"),
    ("STUDY_LABELS=", "STUDY_LABELS"), ("MIL_MONITOR=val/auc", "MIL_MONITOR = val/auc: not measured"),
    ("MIL_LOSS=rmse", "MIL_MONITOR = val/auroc: not measured with MIL_LOSS = rmse")])
def test_senseless_settings_of_a_classifier_end_in_one_line(setting, words, refused, studies, tmp_path):
    """The constant is named."""
    line = refused("train_finetune", "--task", "mil", "-n", "a", "--data", studies / "cache",
                   "--set", *SMALL_STUDY, f"STUDY_LABELS={studies / 'labels.csv'}",
                   "MIL_POOLER=aggregate_then_classify",
                   f"RUNS_DIR={tmp_path}", setting)
    assert words in line


@pytest.fixture
def damaged(studies, tmp_path):
    """A copy of the cache of which one image is cut short; it belongs to a study of two series."""
    shutil.copytree(studies / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "processed" / "s1" / "t1.pt"
    path.write_bytes(path.read_bytes()[:2000])
    return tmp_path / "cache", path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_of_the_cache_stops_the_run_by_name(workers, refused, damaged, tmp_path):
    """Read in the main process or in a data-loading one."""
    cache, path = damaged
    (tmp_path / "split.csv").write_text("study,split\n" + "".join(
        f"s{number},{'train' if number < 7 else 'val'}\n" for number in range(10)))
    line = refused("train_pretrain", "--method", "jepa", "-n", "a", "--data", cache, "--set", *SMALL_STUDY,
                   f"RUNS_DIR={tmp_path}", f"NUM_WORKERS={workers}",
                   f"STUDY_SPLIT_CSV={tmp_path / 'split.csv'}")
    assert str(path) in line


def test_a_damaged_file_is_skipped_and_counted_when_asked(script, damaged, tmp_path, capsys):
    """ON_BAD_FILE="skip": the study's other series stands in."""
    cache, path = damaged
    (tmp_path / "split.csv").write_text("study,split\n" + "".join(
        f"s{number},{'train' if number < 7 else 'val'}\n" for number in range(10)))
    script("train_pretrain", "--method", "jepa", "-n", "a", "--data", cache, "--set", *SMALL_STUDY,
           f"RUNS_DIR={tmp_path}", "ON_BAD_FILE=skip", f"STUDY_SPLIT_CSV={tmp_path / 'split.csv'}")
    printed = capsys.readouterr().out
    assert "Skipped 1 bad file" in printed and str(path) in printed


def test_a_study_that_cannot_be_read_is_left_out_of_the_figures_by_name(train_study, script, damaged, capsys,
                                                                       tmp_path):
    """With ON_BAD_FILE="skip" another series would stand in and be judged in its name."""
    cache, path = damaged
    run = train_study("mil", "findings", "ON_BAD_FILE=skip")
    script("evaluate", "--checkpoint", run / "mil_best.pt", "--data", cache, "--split", "all",
           "--output", tmp_path / "out", "--attention", 0, "--bootstrap", 10)
    assert f"Left out: {path}" in capsys.readouterr().out
    with open(tmp_path / "out" / "predictions.csv") as file:
        assert [row["study"] for row in csv.DictReader(file)] == [f"s{n}" for n in range(10) if n != 1]


def test_a_wrong_checkpoint_is_refused(refused, train_study, studies, tmp_path):
    """Of another kind, without labels that fit, or of another network."""
    backbone = train_study("jepa", "backbone", labels=False)
    common = ["--data", studies / "cache", "--output", tmp_path / "out"]
    line = refused("evaluate", "--checkpoint", backbone / "jepa_best.pt", *common)
    assert "kind jepa" in line
    run = train_study("mil", "findings")
    (tmp_path / "other.csv").write_text("study_id,mass\ns1,1\n")
    common += ["--labels", tmp_path / "other.csv"]
    line = refused("evaluate", "--checkpoint", run / "mil_best.pt", *common)
    assert "mass" in line and "ball, ct" in line
    line = refused("train_finetune", "--task", "mil", "-n", "b", "-c", backbone / "jepa_best.pt", "--data",
                   studies / "cache", "--set", *SMALL_STUDY, f"RUNS_DIR={tmp_path}",
                   f"STUDY_LABELS={studies / 'labels.csv'}")
    assert "jepa, not mil" in line


def test_a_loss_that_is_not_finite_stops_the_run(refused, studies, tmp_path, monkeypatch):
    """The step and the series are named."""
    monkeypatch.setattr("train_pretrain.jepa_loss", lambda pred, target: pred.float().sum() * torch.nan)
    line = refused("train_pretrain", "--method", "jepa", "-n", "a", "--data", studies / "cache",
                   "--set", *SMALL_STUDY, f"RUNS_DIR={tmp_path}")
    assert "step 1" in line and "/t1" in line
