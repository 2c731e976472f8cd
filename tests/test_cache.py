"""The cache: what is in it, that reruns do only what is due, and that damage is noticed."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid
from scipy import ndimage

from datasets import cache_series
from datasets.cache import load_image, load_mask, read_cache, write_cache
from datasets.cache_report import told_of, write_modes
from datasets.intensity import ct_to_uint8
from datasets.pair_files import CRASHED
from datasets.volumes import find_sources, read_volume
from utils.config import BadFile, UserError

SETTINGS = {"spacing": [4.0, 1.0], "percentiles": [0.5, 99.5], "mri_background": 10.0,
            "ct_background": -500.0}
BRAIN = Path(__file__).parents[2] / "shared" / "data" / "brain"
AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1.0, 0, 18], [0, 0, 4.0, -10], [0, 0, 0, 1]])        # LPS, as DICOM


SHAPE = (68, 72, 6)


def head(seed, hu=False, shape=SHAPE):
    """A smooth array; hu: brain and skull in air."""
    rng = np.random.default_rng(seed)
    x, y, _ = ((np.indices(shape).T + 0.5) / shape - 0.5).T
    radius = np.hypot(x, y)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 1)
    if hu:
        return np.select([radius < 0.33, radius < 0.38], [40 + 60 * noise, 900], -1000).astype(np.int16)
    return np.where(radius < 0.4, 500 + 400 * noise, 20 * np.abs(noise)).astype(np.int16)


def write_nifti(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def write_dicom(folder, data, modality="CT"):
    """One file per slice of data [x, y, z] on the grid of AFFINE, in HU by slope and intercept."""
    folder.mkdir(parents=True)
    series, frame = generate_uid(), generate_uid()
    for number in range(data.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = pydicom.Dataset()
        dataset.file_meta, dataset.Modality = meta, modality
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID = dataset.StudyInstanceUID = series
        dataset.FrameOfReferenceUID = frame
        dataset.InstanceNumber, dataset.SeriesDescription = number + 1, "head"
        dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        dataset.ImagePositionPatient = [-20, -18, -10 + 4 * number]
        dataset.SliceThickness, dataset.RescaleSlope, dataset.RescaleIntercept = 4, 1, -1024
        dataset.Columns, dataset.Rows = data.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = 0
        dataset.PixelData = (data[:, :, number].T + 1024).astype(np.uint16).tobytes()
        dataset.save_as(folder / f"{number:02d}.dcm", enforce_file_format=True)


@pytest.fixture
def raw(tmp_path):
    """Two studies, MRI of two series and CT, a label map and a broken file."""
    raw = tmp_path / "raw"
    write_nifti(raw / "m1" / "t1.nii.gz", head(0))
    write_nifti(raw / "m1" / "deep" / "t2.nii", head(1))
    write_nifti(raw / "m1" / "seg.nii.gz", (head(0) > 300).astype(np.uint8))
    write_nifti(raw / "c1" / "scan.nii.gz", head(2, hu=True))
    (raw / "c1" / "broken.nii.gz").write_bytes(b"broken")
    return raw


def write(raw, output, modes=None, workers=0, **settings):
    return write_cache(raw, output, modes, workers, {**SETTINGS, **settings})


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(path):
    return list(csv.DictReader(path.open()))


def test_every_series_is_cached_or_listed_with_its_reason(raw, tmp_path):
    """Files, names and keys as promised; the guesses are written down."""
    cache = tmp_path / "cache"
    assert write(raw, cache) == {"made": 3, "kept": 0, "removed": 0, "bad": 2, "studies": 2}
    names = sorted(str(path.relative_to(cache)) for path in cache.rglob("[!.]*") if path.is_file())
    scan = [f"processed/c1/scan_{end}"
            for end in ("blood.pt", "bone.pt", "brain.pt", "mask.pt", "metadata.json")]
    bad = {row["path"]: row["reason"] for row in table(cache / "bad_files.csv")}
    assert set(bad) == {"m1/seg.nii.gz", "c1/broken.nii.gz"}
    assert bad["m1/seg.nii.gz"] == "a label map (2 values), not an image"
    assert "broken.nii.gz" not in bad["c1/broken.nii.gz"]
    modes = {row["study"]: row for row in table(cache / "mode_mapping.csv")}
    assert modes["m1"]["mode"] == "mri" and modes["c1"]["mode"] == "ct"
    assert modes["c1"]["source"].startswith("guess: values -1000..")
    index = json.loads((cache / "metadata.json").read_text())
    assert index["num_studies"] == 2 and index["settings"] == SETTINGS and index["dataset_name"] == "cache"
    (image,) = index["studies"]["c1"]["images"].values()
    assert image["filenames"] == ["scan_brain.pt", "scan_blood.pt", "scan_bone.pt"] and image["processed"]
    assert names[:3] == ["bad_files.csv", "metadata.json", "mode_mapping.csv"] and set(scan) <= set(names)
    assert len(names) == 3 + 5 + 2 * 3
    saved = torch.load(cache / "processed/c1/scan_bone.pt", weights_only=True)
    assert set(saved) == {"data", "view", "shape", "spacing", "mode", "window"} and saved["window"] == "bone"
    saved = torch.load(cache / "processed/m1/t1.pt", weights_only=True)
    assert saved["window"] is None and saved["view"] == "axial" and saved["mode"] == "mri"


def test_what_is_read_is_what_the_scan_shows(raw, tmp_path):
    """Images, mask and affine of a CT whose grid needs no resampling: exact."""
    cache = tmp_path / "cache"
    write(raw, cache)
    ct, mri = read_cache(cache)
    assert (ct.name, ct.mode, mri.name, mri.mode) == ("c1", "ct", "m1", "mri")
    assert [series.name for series in mri.series] == sorted(series.name for series in mri.series)
    (series,) = ct.series
    assert series.images == ("brain", "blood", "bone") and mri.series[0].images == ("mri",)
    assert series.shape == (4, 64, 64) and series.view == "axial" and series.spacing == (4.0, 1.0, 1.0)
    assert series.source == "c1/scan.nii.gz" and series.source_shape == SHAPE
    hu = head(2, hu=True)[::-1, :, ::-1].transpose(2, 1, 0)[1:5, 4:68, 2:66]
    for window in series.images:
        image = load_image(series, window)
        assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), ct_to_uint8(hu, window))
    mask = load_mask(series)
    assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), hu <= -500)
    source_affine, affine = np.array(series.source_affine), np.array(series.affine)
    np.testing.assert_allclose(source_affine, AFFINE)
    np.testing.assert_allclose(affine @ [0, 0, 0, 1], AFFINE @ [67 - 2, 4, 5 - 1, 1])
    np.testing.assert_allclose(affine @ [3, 5, 7, 1], AFFINE @ [67 - 2 - 7, 4 + 5, 5 - 1 - 3, 1])
    with pytest.raises(ValueError, match="no image mri"):
        load_image(series, "mri")


def test_processes_make_the_same_cache(raw, tmp_path):
    """Byte for byte, whatever the order in which they end."""
    for workers in (0, 2):
        write(raw, tmp_path / f"w{workers}", workers=workers)
    assert contents(tmp_path / "w0/processed") == contents(tmp_path / "w2/processed")


def make_or_crash(job):
    """cache_series.make_series, but the source t1 ends its process."""
    if job[0].name == "t1":
        os.kill(os.getpid(), signal.SIGSEGV)
    return cache_series.make_series(job)


def test_a_source_that_crashes_its_process_is_listed_and_all_others_are_cached(raw, tmp_path, monkeypatch):
    """Decoders in C++ can end a process; the next run tries that source again."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.cache.make_series", make_or_crash)
    assert write(raw, cache, workers=2) == {"made": 2, "kept": 0, "removed": 0, "bad": 3, "studies": 2}
    assert {"path": "m1/t1.nii.gz", "reason": CRASHED} in table(cache / "bad_files.csv")
    monkeypatch.undo()
    assert write(raw, cache, workers=1) == {"made": 1, "kept": 2, "removed": 0, "bad": 2, "studies": 2}
    write(raw, tmp_path / "whole")
    assert contents(cache / "processed") == contents(tmp_path / "whole/processed")


def damage_jpeg_ls(path):
    """Turn a slice into JPEG-LS whose header claims 80 bits per pixel, which ends a process of GDCM 3.2."""
    dataset = pydicom.dcmread(path)
    size = dataset.Rows.to_bytes(2, "big") + dataset.Columns.to_bytes(2, "big")
    frame = (bytes.fromhex("FFD8 FFF7 000B 50") + size + bytes.fromhex("01 011100 FFDA 0008 01 0100 000000")
             + bytes(200) + bytes.fromhex("FFD9"))
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(path)


def test_compressed_slices_that_crash_the_decoder_are_listed(raw, tmp_path):
    """With a modality they are first decoded when the series is made, without when modes are guessed."""
    write(raw, tmp_path / "sound")
    for modality in ("CT", "OT"):
        write_dicom(raw / "c1" / modality, head(3, hu=True), modality)
        damage_jpeg_ls(raw / "c1" / modality / "03.dcm")
    assert write(raw, tmp_path / "cache", workers=2)["bad"] == 4
    reasons = {row["path"]: row["reason"] for row in table(tmp_path / "cache/bad_files.csv")}
    for modality in ("CT", "OT"):
        reason = reasons[f"c1/{modality}/00.dcm"]
        assert reason == CRASHED or "cannot be decoded" in reason              # of a GDCM that is mended
    assert contents(tmp_path / "cache/processed") == contents(tmp_path / "sound/processed")


def test_a_rerun_does_what_is_due_and_nothing_else(raw, tmp_path):
    """New bytes are read again, new times are not; what is missing is made, and what is gone removed."""
    cache = tmp_path / "cache"
    write(raw, cache)
    before = {path: path.stat().st_mtime_ns for path in (cache / "processed").rglob("*.pt")}
    assert write(raw, cache) == {"made": 0, "kept": 3, "removed": 0, "bad": 2, "studies": 2}
    os.utime(raw / "m1/t1.nii.gz", (1, 1))
    assert write(raw, cache)["made"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in (cache / "processed").rglob("*.pt")}
    (record,) = (cache / "processed/m1").glob("t1_metadata.json")
    assert json.loads(record.read_text())["files"]["m1/t1.nii.gz"][1] == 10 ** 9
    write_nifti(raw / "m1/t1.nii.gz", head(7))
    (cache / "processed/c1/scan_blood.pt").unlink()
    assert write(raw, cache) == {"made": 2, "kept": 1, "removed": 0, "bad": 2, "studies": 2}
    write(raw, tmp_path / "fresh")
    assert contents(cache / "processed") == contents(tmp_path / "fresh/processed")
    shutil.rmtree(raw / "c1")
    assert write(raw, cache) == {"made": 0, "kept": 2, "removed": 1, "bad": 1, "studies": 1}
    assert not (cache / "processed/c1").exists() and [study.name for study in read_cache(cache)] == ["m1"]
    write_nifti(raw / "m1/t1.nii.gz", np.ones(SHAPE, np.int16))
    assert write(raw, cache)["removed"] == 1
    assert not list((cache / "processed/m1").glob("t1*"))


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_an_interrupted_run_leaves_whole_series_and_is_completed(raw, tmp_path, monkeypatch, stop_at):
    """Ctrl-C between or within files; nobody trains on the part that was done."""
    write(raw, tmp_path / "whole")
    real, calls = cache_series.save_tensor, []

    def interrupted(path, **content):
        calls.append(path)
        if len(calls) == stop_at:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, **content)

    cache = tmp_path / "cache"
    monkeypatch.setattr(cache_series, "save_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(raw, cache)
    monkeypatch.undo()
    records = list(cache.rglob("*_metadata.json"))
    with pytest.raises(UserError, match="has not ended"):
        read_cache(cache)
    assert write(raw, cache)["kept"] == len(records)
    assert contents(cache / "processed") == contents(tmp_path / "whole/processed")


def test_a_table_of_modes_decides_and_a_change_makes_the_study_again(raw, tmp_path):
    """A CT in other units that was taken for MRI is put right, and back."""
    cache, modes = tmp_path / "cache", tmp_path / "modes.csv"
    write(raw, cache)
    modes.write_text("study,mode\nc1,mri\n")
    assert write(raw, cache, modes) == {"made": 1, "kept": 2, "removed": 0, "bad": 2, "studies": 2}
    assert {row["study"]: row["source"] for row in table(cache / "mode_mapping.csv")}["c1"] == "csv"
    assert read_cache(cache)[0].series[0].images == ("mri",)
    assert not (cache / "processed/c1/scan_bone.pt").exists()
    shutil.copy(cache / "mode_mapping.csv", modes)
    modes.write_text(modes.read_text().replace("c1,mri", "c1,ct"))
    assert write(raw, cache, modes)["made"] == 1
    assert write(raw, cache)["made"] == 0                                     # the guess says the same
    assert len(read_cache(cache)[0].series[0].images) == 3


def test_repairs_guesses_and_names_are_told(raw, tmp_path):
    """notes.csv has every repaired series, kept ones too; the screen the first, and how many more."""
    cache, series = tmp_path / "cache", raw / "c1" / "ct"
    write(raw, cache)
    assert not (cache / "notes.csv").exists() and told_of(cache) == [
        "Studies, as labels and splits must name them: c1, m1",
        f"2 of 2 modes (MRI or CT) were guessed: check {cache / 'mode_mapping.csv'} and give it with --modes"]
    write_dicom(series, head(3, hu=True))
    odd = pydicom.dcmread(series / "05.dcm")
    odd.Rows, odd.PixelData = odd.Rows // 2, odd.PixelData[:len(odd.PixelData) // 2]
    odd.save_as(series / "05.dcm")
    modes = tmp_path / "modes.csv"
    modes.write_text("study_id,mode\nc1,ct\n")
    for _ in range(2):
        write(raw, cache, modes)
        (row,) = table(cache / "notes.csv")
        assert row == {"study": "c1", "series": "head", "path": "c1/ct/00.dcm",
                       "note": "one slice of another size or direction dropped"}
        assert told_of(cache)[1].startswith("1 of 2 modes")
        assert told_of(cache)[2].endswith(f"notes.csv:\nc1/head: {row['note']}")
    shutil.rmtree(series)
    write(raw, cache)
    assert not (cache / "notes.csv").exists()
    write_modes(cache, {f"s{number}": ("ct", "csv") for number in range(9)})
    assert [line.partition(": ")[2] for line in told_of(cache)] == ["s0, s1, s2, s3, s4, ... and 4 more"]


def test_a_file_is_no_folder_of_studies(raw, tmp_path):
    """The message says what is due."""
    with pytest.raises(UserError, match="scan.nii.gz: a file, where the folder is due that holds"):
        write(raw / "c1" / "scan.nii.gz", tmp_path / "cache")


def test_a_series_of_the_other_modality_is_listed(raw, tmp_path):
    """A study has one mode; what DICOM calls MR is not windowed."""
    write_dicom(raw / "c1" / "mr", head(3, hu=True), "MR")
    write_dicom(raw / "c1" / "ct", head(3, hu=True), "CT")
    write_dicom(raw / "c1" / "pet", head(3, hu=True), "PT")
    modes = tmp_path / "modes.csv"
    modes.write_text("study,mode\nc1,ct\n")
    for table_of_modes in (None, modes):
        counts = write(raw, tmp_path / f"cache{table_of_modes is None}", table_of_modes)
        assert counts["bad"] == 4 and counts["made"] == 4
        rows = table(tmp_path / f"cache{table_of_modes is None}" / "bad_files.csv")
        for word, folder in (("mri", "mr"), ("PT", "pet")):
            (row,) = (row for row in rows if row["path"].startswith(f"c1/{folder}/"))
            assert row["reason"] == f"DICOM Modality says {word}, but the study's mode is ct"


def test_dicom_and_the_same_volume_as_nifti_give_the_same_cache(tmp_path):
    """The format of a scan is no property of the patient."""
    data = head(4, hu=True, shape=(70, 66, 7))
    write_dicom(tmp_path / "raw/ct_a/series", data)
    write_nifti(tmp_path / "raw/ct_b/scan.nii.gz", data)
    check_same(tmp_path)


@pytest.mark.skipif(not BRAIN.is_dir(), reason="shared/data/brain is absent")
def test_a_tilted_uneven_series_gives_the_same_cache_as_nifti(tmp_path):
    """A gantry tilt is in the NIfTI's affine too; within the rounding of a header's numbers."""
    shutil.copytree(BRAIN / "ct_ge_head_dcm", tmp_path / "raw/ct_a")
    (source,), _ = find_sources(tmp_path / "raw")
    volume = read_volume(source)
    write_nifti(tmp_path / "raw/ct_b/scan.nii", volume.data, volume.affine)
    check_same(tmp_path)


@pytest.mark.skipif(not BRAIN.is_dir(), reason="shared/data/brain is absent")
def test_every_real_series_is_cached_or_listed(tmp_path):
    """Label maps and a CT that is not in HU are no images; all else stands upright, with tissue in it."""
    write(BRAIN, tmp_path)
    reasons = {row["path"]: row["reason"] for row in table(tmp_path / "bad_files.csv")}
    series = [series for study in read_cache(tmp_path) for series in study.series]
    assert len(series) + len(reasons) == len(find_sources(BRAIN)[0])
    for path, reason in reasons.items():
        assert ("seg" in path and "label map" in reason) or ("scct" in path and "Hounsfield" in reason)
    for one in series:
        letters = {"axial": "IPR", "coronal": "PIR", "sagittal": "RIP"}[one.view]
        assert "".join(nib.aff2axcodes(np.array(one.affine))) == letters
        assert 0.1 < 1 - load_mask(one).float().mean() < 1


def check_same(folder):
    """The two studies below folder/raw have the same image on the same grid."""
    write(folder / "raw", folder / "cache")
    (one,), (two,) = (study.series for study in read_cache(folder / "cache"))
    assert one.shape == two.shape and one.view == two.view
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-3)
    for window in ("brain", "blood", "bone"):
        difference = load_image(one, window).int() - load_image(two, window).int()
        assert difference.abs().max() <= 1, window
    assert (load_mask(one) != load_mask(two)).float().mean() < 1e-4


def test_an_image_never_takes_the_name_of_a_mask(raw, tmp_path):
    """t1_mask.pt is the background of t1; a scan of that name would overwrite it."""
    write_nifti(raw / "m1/t1_mask.nii.gz", head(5))
    counts = write(raw, tmp_path / "cache")
    assert counts["made"] == 3 and counts["bad"] == 3
    assert {row["path"]: row["reason"] for row in table(tmp_path / "cache/bad_files.csv")}[
        "m1/t1_mask.nii.gz"] == "named like the mask of another series; rename it"


def test_other_settings_and_other_folders_are_refused(raw, tmp_path):
    """One cache never holds two recipes, nor other people's files."""
    cache = tmp_path / "cache"
    write(raw, cache)
    with pytest.raises(UserError, match="another percentiles"):
        write(raw, cache, percentiles=[1, 99])
    with pytest.raises(UserError, match="holds other things"):
        write(raw, tmp_path)
    with pytest.raises(UserError, match="lies in the raw folder"):
        write(raw, raw / "cache")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/metadata.json").write_text("[]")
    with pytest.raises(UserError, match="no index"):
        write(raw, tmp_path / "foreign")


@pytest.mark.parametrize("key, value", [
    ("spacing", [4.0]), ("spacing", [0, 1]), ("spacing", [-4, 1]), ("percentiles", [99.5, 0.5]),
    ("percentiles", [0.5, 101]), ("percentiles", [0.5]), ("mri_background", 200)])
def test_settings_that_make_no_sense_name_the_constant(raw, tmp_path, key, value):
    """Before anything is made: inverted percentiles would give inverted images."""
    with pytest.raises(UserError, match=f"STUDY_.*{key.upper()}.* = .*must be"):
        write(raw, tmp_path / "cache", **{key: value})
    assert not (tmp_path / "cache").exists()


def test_names_that_are_no_unicode_are_cached_and_listed(raw, tmp_path):
    """Folders and files of old systems; the tables are still text."""
    odd = os.fsdecode(b"m\xfcnch")
    write_nifti(raw / odd / "t1.nii.gz", head(0))
    (raw / odd / f"{odd}.nii").write_bytes(b"broken")
    write(raw, tmp_path / "cache")
    assert odd in [study.name for study in read_cache(tmp_path / "cache")]
    listed = [row["path"] for row in table(tmp_path / "cache/bad_files.csv")]
    assert r"m\udcfcnch/m\udcfcnch.nii" in listed


def test_a_folder_with_nothing_usable_is_an_error_that_removes_nothing(raw, tmp_path):
    """A disk that is not mounted must not empty the cache."""
    cache = tmp_path / "cache"
    write(raw, cache)
    before = contents(cache / "processed")
    shutil.rmtree(raw)
    (raw / "m1").mkdir(parents=True)
    (raw / "m1/t1.nii.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match="could be cached"):
        write(raw, cache)
    assert contents(cache / "processed") == before


def test_what_is_no_cache_is_refused(tmp_path):
    """The message says how to make one."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no cache of studies"):
            read_cache(folder)
    (tmp_path / "metadata.json").write_text('{"studies": ')
    with pytest.raises(BadFile, match="damaged"):
        read_cache(tmp_path)


def test_damage_is_noticed_by_file_and_mended_by_a_rerun(raw, tmp_path):
    """Missing, cut short, foreign or of another series: the message names the file."""
    cache = tmp_path / "cache"
    write(raw, cache)
    series = read_cache(cache)[0].series[0]
    path, mask = series.folder / "scan_bone.pt", series.folder / "scan_mask.pt"
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"text", (cache / "metadata.json").read_bytes(),
                    (cache / "processed/m1" / "t1_mask.pt").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(BadFile, match="^.*scan_bone.pt: "):
            load_image(series, "bone")
    for foreign in ([1, 2], {"data": 3}, {"other": torch.zeros(2)}):
        torch.save(foreign, mask)
        with pytest.raises(BadFile, match="^.*scan_mask.pt: "):
            load_mask(series)
    path.unlink()
    with pytest.raises(BadFile, match="missing"):
        load_image(series, "bone")
    (series.folder / "scan_metadata.json").write_text("{}")
    with pytest.raises(BadFile, match="scan_metadata.json: missing or damaged"):
        read_cache(cache)
    write(raw, cache)                                          # as the messages say
    series = read_cache(cache)[0].series[0]
    assert path.read_bytes() == whole and load_mask(series).shape == load_image(series, "bone").shape


def test_nothing_outside_the_cache_is_read(raw, tmp_path):
    """An index from elsewhere may name anything."""
    cache = tmp_path / "cache"
    write(raw, cache)
    shutil.copytree(cache / "processed/m1", tmp_path / "outside")
    index = json.loads((cache / "metadata.json").read_text())
    index["studies"]["../../outside"] = index["studies"].pop("m1")
    (cache / "metadata.json").write_text(json.dumps(index))
    with pytest.raises(BadFile, match="outside the cache"):
        read_cache(cache)


def test_changing_an_image_leaves_its_file_alone(raw, tmp_path):
    """The tensor is a map of the file."""
    cache = tmp_path / "cache"
    write(raw, cache)
    series = read_cache(cache)[1].series[0]
    before = load_image(series, "mri").clone()
    load_image(series, "mri").zero_()
    assert torch.equal(load_image(series, "mri"), before)
