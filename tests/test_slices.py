"""Slices found in folders and tables, their masks, their splits by patient, and the squares made of them."""

import csv
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_dicom_series import STORED, write_series
from test_slice_series import ORIENTATIONS, VOXELS, oriented, picture, write_nifti
from torch.utils.data import DataLoader

import datasets.slices
from datasets.io import read_image, undo_letterbox
from datasets.photos import sample_weights
from datasets.slice_lists import Entry, find_series, patient_of
from datasets.slice_masks import read_mask
from datasets.slice_series import read_series, slices_along
from datasets.slice_squares import fit_box
from datasets.slices import Slice, SliceDataset, find_slices, split_slices
from utils.config import BadFile, UserError

SPINE = Path(__file__).parents[2] / "shared" / "data" / "spine"
NOISE = np.random.default_rng(1).integers(0, 2000, (24, 20, 6)).astype(np.int16)      # x, y, z


def grey(path, values):
    """Save an array [H, W] of small whole numbers as it is; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def table(path, *rows):
    """Write a CSV; the first row is the header."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def names(slices):
    """"series:index" of each slice."""
    return [f"{slice.series}:{slice.index}" for slice in slices]


def patients(root, count=3):
    """A folder per patient, with a NIfTI of six axial slices and the mask of its bright voxels each."""
    for number in range(count):
        voxels = np.roll(NOISE, number, 0)
        write_nifti(root / f"p{number}" / "t2.nii.gz", voxels)
        write_nifti(root / f"p{number}" / "t2_seg.nii.gz", (voxels > 1500).astype(np.uint8))
    return root


# ---------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("folders", [("images", "masks"), ("data", "label")])
def test_pairs_of_folders_belong_together_by_name(tmp_path, folders):
    """The suffix may differ, folders inside are kept, and the patient is the name before its number."""
    for name in ("p1_1", "p1_2", "deep/p2_10"):
        picture(tmp_path / folders[0] / f"{name}.jpg")
        grey(tmp_path / folders[1] / f"{name}.png", np.zeros((8, 9)))
    write_nifti(tmp_path / folders[0] / "sub-07_T2w.nii.gz", NOISE)
    write_nifti(tmp_path / folders[1] / "sub-07_T2w.nii", np.zeros_like(NOISE))
    grey(tmp_path / folders[1] / "alone.png", np.zeros((8, 9)))
    slices, classes, notes = find_slices(tmp_path)
    assert classes == [] and "1 mask(s) without an image left out: alone" in notes[0]
    assert {slice.series: slice.mask.relative_to(tmp_path / folders[1]).as_posix() for slice in slices} == {
        "deep/p2_10.jpg": "deep/p2_10.png", "p1_1.jpg": "p1_1.png", "p1_2.jpg": "p1_2.png",
        "sub-07_T2w.nii.gz": "sub-07_T2w.nii"}
    assert [slice.patient for slice in slices] == ["deep", "p1", "p1"] + ["sub-07"] * 6
    assert names(slices)[3:] == [f"sub-07_T2w.nii.gz:{index}" for index in range(6)]
    picture(tmp_path / folders[0] / "bare.jpg")
    with pytest.raises(UserError, match="bare.jpg: has no mask in .*; its name must be bare"):
        find_slices(tmp_path)


def test_pairs_may_lie_below_splits_and_carry_a_word(tmp_path):
    """train/images, train/masks and so on; p1_mask.png is the mask of p1.png where the word is given."""
    for split, name in (("train", "a"), ("Validation", "b"), ("test", "c")):
        picture(tmp_path / split / "images" / f"{name}.png")
        grey(tmp_path / split / "masks" / f"{name}_mask.png", np.zeros((8, 9)))
    slices, *_ = find_slices(tmp_path, mask="_mask")
    assert {slice.series: slice.split for slice in slices} == {
        "a.png": "train", "b.png": "val", "c.png": "test"}
    with pytest.raises(UserError, match="has no mask"):
        find_slices(tmp_path)
    picture(tmp_path / "train" / "images" / "a.jpg")
    with pytest.raises(UserError, match="a.png and .*a.jpg have one name"):
        find_slices(tmp_path, mask="mask")


def test_a_folder_per_class_of_pictures_and_series(tmp_path):
    """Loose pictures are each by themselves; NIfTI, DICOM and folders of pictures are cut into slices."""
    picture(tmp_path / "t2" / "p1_003.png")
    picture(tmp_path / "t2" / "p1_010.png")
    write_nifti(tmp_path / "t2" / "p2_01.nii.gz", NOISE)
    write_series(tmp_path / "t1" / "p3" / "scan")
    for number in range(5):
        picture(tmp_path / "t1" / "p4" / f"{number}.png", number)
    slices, classes, notes = find_slices(tmp_path, labelled=True)
    assert classes == ["t1", "t2"] and len(notes) == 1
    assert "21 slices of 5 series of 4 patients (p3, p4, p1, ...)" in notes[0]
    found = {slice.series: (slice.path.relative_to(tmp_path).as_posix(), slice.patient, classes[slice.label])
             for slice in slices}
    assert found == {"t1/p3/scan": ("t1/p3/scan", "p3", "t1"), "t1/p4": ("t1/p4", "p4", "t1"),
                     "t2/p1_003.png": ("t2/p1_003.png", "p1", "t2"),
                     "t2/p1_010.png": ("t2/p1_010.png", "p1", "t2"),
                     "t2/p2_01.nii.gz": ("t2/p2_01.nii.gz", "p2_01", "t2")}
    assert [slice.index for slice in slices if slice.patient == "p3"] == list(range(8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: a class folder without images"):
        find_slices(tmp_path)


def test_classes_are_numbered_by_name_and_checked(tmp_path):
    """A network's class numbers are kept; one that it does not know, or a single one, is refused."""
    for word in ("t2", "T1", "pd"):
        picture(tmp_path / "train" / word / "a_1.png")
        picture(tmp_path / "test" / word / "b_1.png")
    slices, classes, _ = find_slices(tmp_path, labelled=True)
    assert classes == ["T1", "pd", "t2"]
    assert sorted((slice.split, slice.path.parts[-2], slice.label) for slice in slices) == [
        (split, word, label) for split in ("test", "train") for label, word in enumerate(classes)]
    _, classes, _ = find_slices(tmp_path, classes=["t2", "pd", "T1", "flair"])
    assert classes == ["t2", "pd", "T1", "flair"]
    with pytest.raises(UserError, match="pd is none of the 2 classes of the network; did you mean pdw"):
        find_slices(tmp_path, classes=["pdw", "T1"])
    with pytest.raises(UserError, match="t2 is the only class"):
        find_slices(table(tmp_path / "a.csv", ["path", "label"], ["train/t2/a_1.png", "t2"]), labelled=True)
    picture(tmp_path / "one" / "loose.png")
    picture(tmp_path / "one" / "t1" / "a.png")
    with pytest.raises(UserError, match="loose.png has no class"):
        find_slices(tmp_path / "one", labelled=True)


def test_a_folder_per_patient_with_masks_beside_the_series(tmp_path):
    """Which masks is said by a word; other masks are no images, and series without one are reported."""
    patients(tmp_path, 2)
    write_nifti(tmp_path / "p0" / "t2_lesion.nii.gz", (NOISE > 1900).astype(np.uint8))
    write_nifti(tmp_path / "p1" / "labels.nii.gz", (NOISE > 1900).astype(np.uint8))
    write_series(tmp_path / "p2" / "scan")
    dicom = read_series(tmp_path / "p2" / "scan")
    write_nifti(tmp_path / "p2" / "scan_seg.nii.gz", (STORED.T > 500).astype(np.uint8),
                dicom.affine[:, [2, 1, 0, 3]])
    (tmp_path / "p1" / "t2.json").write_text("{}")
    slices, _, notes = find_slices(tmp_path, mask="seg")
    assert {(slice.series, slice.mask.name, slice.patient) for slice in slices} == {
        ("p0/t2.nii.gz", "t2_seg.nii.gz", "p0"), ("p1/t2.nii.gz", "t2_seg.nii.gz", "p1"),
        ("p2/scan", "scan_seg.nii.gz", "p2")}
    assert "1 file(s) that are no images left out: t2.json" in notes[0]
    slices, _, notes = find_slices(tmp_path, mask="_lesion")
    assert {slice.mask.name for slice in slices} == {"t2_lesion.nii.gz"}
    assert any(note.startswith("2 series without a mask _lesion left out: p1/t2.nii.gz, p2/scan; the word "
                               "behind the _ is SPINE_MASK_WORD; or name masks in a CSV") for note in notes)
    with pytest.raises(UserError, match="which masks"):
        find_slices(tmp_path, layout="patients")
    with pytest.raises(UserError, match="no series has a mask, .* and _cord beside it; .*SPINE_MASK_WORD"):
        find_slices(tmp_path, mask="cord")


def test_a_folder_of_pictures_has_a_folder_of_masks(tmp_path):
    """p1/t2 and p1/t2_mask, both in natural order; another number of masks is refused."""
    for number in range(11):
        picture(tmp_path / "p1" / "t2" / f"{number}.png", number)
        grey(tmp_path / "p1" / "t2_mask" / f"m{number}.png", np.full((8, 9), number % 2))
    slices, *_ = find_slices(tmp_path, mask="mask")
    assert names(slices) == [f"p1/t2:{index}" for index in range(11)]
    items = SliceDataset(slices, 16, False, mask_classes=["cord"], fit="squash")
    assert [item["mask"].unique().tolist() for item in items] == [[index % 2] for index in range(11)]
    (tmp_path / "p1" / "t2_mask" / "m3.png").unlink()
    with pytest.raises(BadFile, match="t2_mask: a mask of 10 x 8 x 9 voxels, but .*t2 has 11 x 8 x 9"):
        SliceDataset(slices, 16, False, mask_classes=["cord"])[0]


def test_the_masks_of_dicom_series_lie_on_their_slices(tmp_path):
    """Of a mask stored as converters do, each slice must show what its image shows."""
    write_series(tmp_path / "p2" / "scan")
    dicom = read_series(tmp_path / "p2" / "scan")
    mask = nib.Nifti1Image((STORED.T > 500).astype(np.uint8), dicom.affine[:, [2, 1, 0, 3]])
    nib.save(nib.as_closest_canonical(mask), tmp_path / "p2" / "scan_seg.nii.gz")
    slices, *_ = find_slices(tmp_path, mask="seg")
    items = SliceDataset(slices, 35, False, mask_classes=["bright"], fit="squash", percentiles=(0, 100))
    for slice, item in zip(slices, items, strict=True):
        image = F.interpolate(torch.from_numpy(STORED[slice.index].astype(np.float32))[None, None], 35,
                              mode="nearest-exact")[0, 0]
        np.testing.assert_array_equal(item["mask"], image > 500)


def test_radimagenet_is_read_as_published(tmp_path):
    """Folders modality/anatomy/pathology (of ultrasound without the last), and lists with their splits."""
    files = ["CT/lung/normal/s-001.png", "MR/spine/cord/s001.png", "MR/spine/normal/s-002.png",
             "US/kidney/k001.png"]
    for file in files:
        picture(tmp_path / "radiology_ai" / file)
    for data in (tmp_path, tmp_path / "radiology_ai"):
        slices, classes, notes = find_slices(data, labelled=True)
        assert classes == ["CT/lung/normal", "MR/spine/cord", "MR/spine/normal", "US/kidney"]
        assert "names tell no patient; without the published lists splits are by image" in notes[0]
        assert [slice.label for slice in slices] == [0, 1, 2, 3]
    rows = {"train": files[:2], "val": files[2:3], "test": files[3:]}
    for place in (tmp_path, tmp_path / "radiology_ai"):                # the lists may lie in either folder
        for split, members in rows.items():
            table(place / f"RadiologyAI_{split}.csv", ["filename", "label"],
                  *([f"radiology_ai/{file}", file.split("/")[1]] for file in members))
        slices, classes, _ = find_slices(place, labelled=True)
        assert classes == ["kidney", "lung", "spine"]
        assert {(slice.path.relative_to(tmp_path / "radiology_ai").as_posix(), slice.split)
                for slice in slices} == {(file, split) for split in rows for file in rows[split]}
        one, *_ = find_slices(place / "RadiologyAI_train.csv", labelled=True)
        assert {slice.split for slice in one} == {"train"} and len(one) == 2
        assert len({slice.patient for slice in slices}) == 4
        for path in place.glob("*.csv"):
            path.unlink()


def test_a_table_says_what_folders_do(tmp_path):
    """Each column counts; without index all slices of a series are meant, without patient the name tells."""
    write_nifti(tmp_path / "scan.nii.gz", NOISE)
    write_nifti(tmp_path / "m.nii.gz", (NOISE > 1500).astype(np.uint8))
    for name in ("a_1.png", "a_2.png"):
        picture(tmp_path / name)
    header = ["path", "label", "mask", "patient", "split", "index", "axis"]
    slices, classes, _ = find_slices(table(
        tmp_path / "a.csv", header, ["scan.nii.gz", "C2", "m.nii.gz", "x", "train", "3", "sagittal"],
        ["scan.nii.gz", "C1", "", "x", "training", "", ""], ["a_1.png", "", "", "", "val", "", ""],
        [str(tmp_path / "a_2.png"), "C1", "", "", "valid", "0", "sagittal"]))
    assert classes == ["C1", "C2"] and len(slices) == 9
    assert slices[0] == Slice(tmp_path / "scan.nii.gz", 3, "sagittal", 1, tmp_path / "m.nii.gz", "x",
                              "scan.nii.gz", "", "train")
    assert [(slice.index, slice.axis, slice.label) for slice in slices[1:7]] == [
        (index, "stored", 0) for index in range(6)]
    assert [slice[2:6] + slice[8:] for slice in slices[7:]] == [
        ("stored", -1, None, "a", "val"), ("stored", 0, None, "a", "val")]
    assert {slice.axis for slice in find_slices(tmp_path / "a.csv", axis="coronal")[0]} == {
        "sagittal", "coronal", "stored"}


@pytest.mark.parametrize("paths, patients", [
    (["p1/t1.png", "p1/t2.png", "p2/t1.png"], ["p1", "p1", "p2"]),
    (["scans/p1/a/3.png", "scans/p1/b/3.png", "scans/p2/3.png"], ["p1", "p1", "p2"]),
    (["train/p1/3.png", "train/p2/3.png", "val/p3/3.png"], ["p1", "p2", "p3"]),
    (["C1/p1_1.png", "C2/p1_2.png", "C2/p2_3.png"], ["p1", "p1", "p2"]),        # folders of classes
    (["scans/p1_1.png", "scans/p1_2.png", "scans/sub-3_T2.png"], ["p1", "p1", "sub-3"])])
def test_the_folders_of_a_table_tell_its_patients(paths, patients, tmp_path):
    """Two series of one patient in two splits would be known before the test; equal names are not one."""
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        picture(tmp_path / path)
    rows = [[path, path.split("/")[0] if path.startswith("C") else "C1"] for path in paths]
    slices, *_ = find_slices(table(tmp_path / "a.csv", ["path", "label"], *rows))
    assert [slice.patient for slice in slices] == patients


def test_a_series_cut_along_two_axes_has_no_case_twice(tmp_path):
    """Whoever gathers results by case would otherwise lose the slices of one axis."""
    write_nifti(tmp_path / "a.nii.gz", NOISE)
    slices, *_ = find_slices(table(tmp_path / "a.csv", ["path", "axis"], ["a.nii.gz", "axial"],
                                   ["a.nii.gz", "sagittal"], ["a.nii.gz", ""]))
    dataset = SliceDataset(slices, 16, False)
    cases = [dataset[i]["case"] for i in range(len(dataset))]
    assert len(set(cases)) == len(cases) == 6 + 24 + 6
    assert {"a.nii.gz:axial 0", "a.nii.gz:sagittal 23", "a.nii.gz:5"} <= set(cases)


def test_dicom_series_of_a_folder_are_named_by_their_uid(tmp_path):
    """Found one by one in folders; in a table the column series tells which is meant."""
    for folder, uid, factor in (("a", "1.2.3.4", 1), ("b", "1.2.3.5", 2)):
        for path in write_series(tmp_path / folder, STORED * factor, SeriesInstanceUID=uid,
                                 SeriesDescription=f"T2 {folder}"):
            (tmp_path / "t2").mkdir(exist_ok=True)
            path.rename(tmp_path / "t2" / f"{folder}{path.name}")
        (tmp_path / folder).rmdir()
    slices, *_ = find_slices(tmp_path)
    assert {(slice.series, slice.uid) for slice in slices} == {("t2/7_T2_a", "1.2.3.4"),
                                                              ("t2/7_T2_b", "1.2.3.5")}
    items = SliceDataset(slices, 16, False, intensity="series")
    assert len(items) == 16 and items[0]["image"].equal(items[8]["image"])       # twice as bright, scaled
    rows = ["path", "series"], ["t2", "1.2.3.5"]
    slices, *_ = find_slices(table(tmp_path / "a.csv", *rows))
    assert {slice.uid for slice in slices} == {"1.2.3.5"}
    assert {(slice.series, slice.patient) for slice in slices} == {("t2/1.2.3.5", "t2")}
    with pytest.raises(BadFile, match="2 DICOM series in one folder"):
        find_slices(table(tmp_path / "a.csv", ["path"], ["t2"]))


@pytest.mark.parametrize("row, reason", [
    ({"path": "", "axis": "axial"}, "line 2: no path; columns are path, label, mask"),
    ({"path": "b.png"}, "line 2: .*b.png: no such file"),
    ({"mask": "b.png"}, "line 2: .*b.png: no such file"),
    ({"split": "holdout"}, 'line 2: split "holdout" is not one of train, val, test'),
    ({"index": "-1"}, 'line 2: index "-1" is not the number of a slice, from 0'),
    ({"index": "1"}, "a.png: no slice 1, there are 0 to 0"),
    ({"path": "t2.nii.gz", "index": "6"}, "t2.nii.gz: no slice 6, there are 0 to 5"),
    ({"path": "t2.nii.gz", "axis": "axail"}, 'axis "axail": must be one of sagittal')])
def test_tables_with_mistakes_are_refused(tmp_path, row, reason):
    """In one line, with the line of the table where that helps."""
    picture(tmp_path / "a.png")
    write_nifti(tmp_path / "t2.nii.gz", NOISE)
    row = {"path": "a.png", "mask": "", "split": "", "index": "", "axis": ""} | row
    with pytest.raises(UserError, match=reason) as error:
        find_slices(table(tmp_path / "a.csv", list(row), list(row.values())))
    assert "\n" not in str(error.value)


def test_folders_and_words_that_make_no_sense_are_refused(tmp_path):
    """Each in one line that names the folder, or the words there are."""
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("text")
    for data, words, reason in (
            ("nowhere", {}, "nowhere: no such folder or CSV file"),
            ("empty", {}, "deep: a class folder without images"),
            ("empty", {"layout": "radimagenet"}, "empty: holds no NIfTI, no DICOM series and no picture"),
            ("empty", {"layout": "pairs"}, "holds no folders images and masks, nor data and label"),
            ("empty", {"layout": "heap"}, 'layout "heap": must be one of auto, pairs, classes')):
        with pytest.raises(UserError, match=reason):
            find_slices(tmp_path / data, **words)
    (tmp_path / "a.csv").write_text("name,label\nx,y\n")
    with pytest.raises(UserError, match="needs rows and a column path"):
        find_slices(tmp_path / "a.csv")
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png has no split .* but others have one"):
        find_slices(table(tmp_path / "b.csv", ["path", "label", "split"], ["a.png", "a", "train"],
                          ["a.png", "b", ""]))


def test_the_patient_is_the_folder_or_told_by_the_name():
    """Documented rule; slices of one patient in two splits would be known before the test."""
    for name, parts, patient in (
            ("p7/scan.nii.gz", ["p7"], "p7"), ("sub-012_ses-1_T2w.nii.gz", [], "sub-012"),
            ("p01_003.png", [], "p01"), ("IM-0001-0023.png", [], "IM-0001"), ("a b.7.jpg", [], "a b"),
            ("003.png", [], "003"), ("ankle053.png", [], "ankle053"), ("case_07.nii.gz", [], "case_07")):
        assert patient_of(Entry(Path(name), name), parts) == patient
    assert patient_of(Entry(Path("case_07"), "t2/case_07"), []) == "case_07"


def test_find_series_lists_what_a_folder_holds(tmp_path):
    """For inference: a folder of pictures is a series; text is reported, hidden files are not."""
    write_series(tmp_path / "p1" / "dicom")
    write_nifti(tmp_path / "p1" / "t2.nii.gz", NOISE)
    for number in range(4):
        picture(tmp_path / "p10" / f"{number}.png")
    picture(tmp_path / "p2" / "a.png")
    for name in ("notes.txt", ".DS_Store", ".cache/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    entries, notes = find_series(tmp_path)
    assert [entry.name for entry in entries] == ["p1/dicom", "p1/t2.nii.gz", "p2", "p10"]
    assert notes == [f"{tmp_path}: 1 file(s) that are no images left out: notes.txt"]
    entries, _ = find_series(tmp_path, series_depth=2)
    assert [entry.name for entry in entries][2:] == [
        "p2/a.png", "p10/0.png", "p10/1.png", "p10/2.png", "p10/3.png"]
    assert find_series(tmp_path / "p10")[0] == [Entry(tmp_path / "p10", "p10")]
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_series(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------- bad input

def test_unusable_series_stop_or_are_reported(tmp_path):
    """A series of three slices, a damaged file: named, and left out only where the user asked for it."""
    patients(tmp_path, 2)
    write_nifti(tmp_path / "p8" / "t2.nii.gz", NOISE[..., :3])
    write_nifti(tmp_path / "p8" / "t2_seg.nii.gz", NOISE[..., :3])
    for name in ("t2.nii.gz", "t2_seg.nii.gz"):
        (tmp_path / "p9").mkdir(exist_ok=True)
        (tmp_path / "p9" / name).write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(BadFile, match="p8/t2.nii.gz: 3 slice.s., at least 4 make a series"):
        find_slices(tmp_path, mask="seg")
    slices, _, notes = find_slices(tmp_path, mask="seg", on_bad_file="skip")
    assert {slice.patient for slice in slices} == {"p0", "p1"}
    assert any("p8/t2.nii.gz: 3 slice(s), at least 4" in note for note in notes)
    assert any("p9/t2.nii.gz: damaged NIfTI" in note for note in notes)
    for name in ("p0", "p1"):
        for path in (tmp_path / name).iterdir():
            path.unlink()
    with pytest.raises(UserError, match="none of the 2 series can be used: left out: .*p8/t2.nii.gz"):
        find_slices(tmp_path, mask="seg", on_bad_file="skip")


def test_repairs_and_mixed_orientations_are_reported(tmp_path):
    """Colour screenshots of a series are left out; slices of several planes in one folder are said to be."""
    for number in range(6):
        picture(tmp_path / "t2" / "p1" / f"{number}.png", number, colour=number == 3)
    write_nifti(tmp_path / "t2" / "a.nii.gz", NOISE)
    write_nifti(tmp_path / "t2" / "b.nii.gz", NOISE, np.diag([9, 1, 1, 1]))
    slices, _, notes = find_slices(tmp_path)
    assert sum(slice.patient == "p1" for slice in slices) == 5
    assert "t2/p1: 1 colour picture(s) among the slices left out: 3.png" in notes
    assert "series of several orientations: 1 axial, 1 sagittal; axis cuts all along one" in notes
    for path in (tmp_path / "t2" / "p1").iterdir():
        path.unlink()
    (tmp_path / "t2" / "p1").rmdir()
    slices, _, notes = find_slices(tmp_path, axis="sagittal")
    assert len(notes) == 1 and [slice.axis for slice in slices] == ["sagittal"] * 48


@pytest.mark.parametrize("values, classes, reason", [
    ([0, 1], ["cord"], None), ([0, 255], ["cord"], None), ([0], ["cord"], None), ([0, 2], ["a", "b"], None),
    ([0, 2], ["cord"], r"values 2, of which none is named \(0 background, 1 cord\)"),
    ([0, 1, 255], ["cord"], "values 255"), ([0, 255], ["a", "b"], "values 255"),
    ([0, 3, 7, 128], ["a", "b"], "values 3, 7, 128")])
def test_masks_hold_the_named_classes_alone(tmp_path, values, classes, reason):
    """0 and 255 mean 0 and 1 for one class, and an empty mask is fine; edges smoothed by a resize are not."""
    image = read_series(picture(tmp_path / "a.png"))
    numbers = np.resize(values, (8, 9))
    path = grey(tmp_path / "m.png", numbers)
    if reason is None:
        found = read_mask(path, image, classes).data
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[0], np.where(numbers == 255, 1, numbers))
    else:
        with pytest.raises(BadFile, match=f"m.png: a mask with {reason}"):
            read_mask(path, image, classes)


def test_a_damaged_png_mask_is_noticed(tmp_path):
    """Its checksums tell; decoding does not look at all of them."""
    image, path = read_series(picture(tmp_path / "a.png")), tmp_path / "m.png"
    Image.fromarray(np.resize([0, 1], (8, 9)).astype(np.uint8)).save(path, compress_level=0)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 15] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFile, match="m.png: cannot be read"):
        read_mask(path, image, ["cord"])


def test_masks_of_palettes_bits_and_grey_colour(tmp_path):
    """Of a palette the numbers count; one bit and RGB of equal channels are 0 and 1; colours are refused."""
    image, numbers = read_series(picture(tmp_path / "a.png")), np.resize([0, 1], (8, 9))
    palette = Image.fromarray(numbers.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 200, 30, 40])
    for number, saved in enumerate((palette, Image.fromarray(numbers > 0),
                                    Image.fromarray(numbers.astype(np.uint8) * 255).convert("RGB"))):
        saved.save(tmp_path / f"m{number}.png")
        found = read_mask(tmp_path / f"m{number}.png", image, ["cord"])
        np.testing.assert_array_equal(found.data[0], numbers)
    palette.convert("RGB").save(tmp_path / "colour.png")
    with pytest.raises(BadFile, match="a coloured mask"):
        read_mask(tmp_path / "colour.png", image, ["cord"])


def test_soft_nifti_masks_are_refused(tmp_path):
    """A probability is no class."""
    series = read_series(write_nifti(tmp_path / "a.nii", NOISE))
    path = write_nifti(tmp_path / "m.nii", (NOISE / 2000).astype(np.float32))
    with pytest.raises(BadFile, match="m.nii: a mask with values 0.001, 0.002, 0.0025"):
        read_mask(path, series, ["cord"])


@pytest.mark.parametrize("turn", [0.0, 0.2])
def test_masks_in_any_of_48_orientations_are_brought_onto_the_image(tmp_path, turn):
    """Images and masks pass through different programs; the place in the patient counts, exactly."""
    series = read_series(write_nifti(tmp_path / "a.nii", *oriented(ORIENTATIONS[17], turn)))
    for order in ORIENTATIONS:
        voxels, affine = oriented(order, turn)
        path = write_nifti(tmp_path / "m.nii", (voxels > 1000).astype(np.uint8), affine)
        np.testing.assert_array_equal(read_mask(path, series, ["cord"]).data, series.data > 1000)


def test_masks_of_another_size_or_place_are_refused(tmp_path):
    """By name, with both sizes; a mask of the same shape that lies elsewhere was drawn on another image."""
    series = read_series(write_nifti(tmp_path / "a.nii", VOXELS))
    mask = (VOXELS > 1000).astype(np.uint8)
    for name, values, affine, reason in (
            ("m1", mask[:-1], None, "a mask of 7 x 6 x 4 voxels, but its image .*a.nii has 7 x 6 x 5"),
            ("m2", mask, np.diag([1, 1, 3.3, 1]), "a mask that lies up to 0.6 voxels beside its image"),
            ("m3", mask, nib.affines.from_matvec(np.diag([1, 1, 3]), [2, 0, 0]), "a mask .* up to 2.0 vox")):
        path = write_nifti(tmp_path / f"{name}.nii", values, affine)
        with pytest.raises(BadFile, match=f"{name}.nii: {reason}"):
            read_mask(path, series, ["cord"])
    image = nib.Nifti1Image(mask, None)
    nib.save(image, tmp_path / "nowhere.nii")                          # says nothing: in the image's order
    np.testing.assert_array_equal(read_mask(tmp_path / "nowhere.nii", series, ["cord"]).data.T, mask)
    flat = read_series(picture(tmp_path / "a.png"))
    with pytest.raises(BadFile, match="a mask of 1 x 9 x 8 voxels, but its image .*a.png has 1 x 8 x 9"):
        read_mask(grey(tmp_path / "m.png", np.zeros((9, 8))), flat, ["cord"])
    (tmp_path / "m.txt").write_text("text")
    with pytest.raises(BadFile, match="m.txt: neither NIfTI nor a picture, as masks must be"):
        read_mask(tmp_path / "m.txt", flat, ["cord"])


# ---------------------------------------------------------------------------------------------- splits

def test_no_patient_is_in_two_splits(tmp_path):
    """Neighbouring slices are all but copies: a test on patients of training would measure memory."""
    slices, *_ = find_slices(patients(tmp_path, 12), mask="seg")
    splits = split_slices(slices, 0.25, 0.25)
    assert sum(map(len, splits.values())) == len(slices) and all(splits.values())
    homes = {split: {slice.patient for slice in members} for split, members in splits.items()}
    for one, other in itertools.combinations(homes.values(), 2):
        assert not one & other
    fewer = split_slices([slice for slice in slices if slice.patient != "p3"], 0.25, 0.25)
    moved = [patient for split in homes for patient in homes[split] - {"p3"}
             if patient not in {slice.patient for slice in fewer[split]}]
    assert len(moved) <= 2                                             # a hash, with each split kept filled
    with pytest.raises(UserError, match="1 patients cannot fill test, val, train"):
        split_slices([slice for slice in slices if slice.patient == "p3"], 0.25, 0.25)


def test_given_splits_are_kept_and_checked(tmp_path):
    """Of a table; without a validation part it is taken from training, by patient."""
    patients(tmp_path, 6)
    rows = [["path", "patient", "split"],
            *([f"p{n}/t2.nii.gz", f"p{n}", "test" if n < 2 else "train"] for n in range(6))]
    slices, *_ = find_slices(table(tmp_path / "a.csv", *rows))
    splits = split_slices(slices, 0.25, 0.5)
    assert {slice.patient for slice in splits["test"]} == {"p0", "p1"}
    assert splits["val"] and splits["train"]
    assert not {slice.patient for slice in splits["val"]} & {slice.patient for slice in splits["train"]}
    assert split_slices(slices, 0.0, 0.5)["val"] == []
    decided = table(tmp_path / "s.csv", ["patient", "split"],
                    *([f"p{number}", ("train", "val", "test")[number % 3]] for number in range(6)))
    splits = split_slices(slices, 0.25, 0.25, decided)
    assert {slice.patient for slice in splits["val"]} == {"p1", "p4"}
    rows[1][1] = "p5"
    slices, *_ = find_slices(table(tmp_path / "a.csv", *rows))
    with pytest.raises(UserError, match="patient p5 is in test and in train; splits must be by patient"):
        split_slices(slices, 0.25, 0.25)


def test_a_list_of_test_slices_alone_is_all_test(tmp_path):
    """evaluate.py may be given nothing else; training then says that it has no slices."""
    write_nifti(tmp_path / "a.nii.gz", NOISE)
    slices, *_ = find_slices(table(tmp_path / "a.csv", ["path", "split"], ["a.nii.gz", "test"]))
    splits = split_slices(slices, 0.15, 0.15)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [0, 0, 6]
    with pytest.raises(UserError, match="no slices"):
        SliceDataset(splits["train"], 16, True)


def test_weights_draw_every_class_equally_often():
    """The sampler of the cascade's classifiers; slices carry what it needs."""
    slices = [Slice(Path("a"), 0, "stored", label, None, "p", "s") for label in (0, 0, 0, 1)]
    weights = sample_weights(slices)
    assert weights[:3].sum() == pytest.approx(float(weights[3])) and weights.mean() == 1


# --------------------------------------------------------------------------------------------- items

@pytest.fixture
def slices(tmp_path):
    """The axial slices of three patients, 24 x 20 pixels, with masks."""
    return find_slices(patients(tmp_path), mask="seg")[0]


def test_items_hold_what_the_contract_says(slices):
    """Keys, types, shapes and ranges; a batch of them is a dict of tensors and lists."""
    items = SliceDataset(slices, 32, True, mask_classes=["bright"])
    item = items[7]
    assert set(item) == {"image", "mask", "label", "seed", "spacing", "case", "series", "patient",
                         "bad_files"}
    assert item["image"].shape == (1, 32, 32) and item["image"].dtype == torch.float32
    assert item["image"].min() == 0 and item["image"].max() <= 1
    assert item["mask"].shape == (32, 32) and item["mask"].dtype == torch.int64
    assert set(item["mask"].unique().tolist()) == {-1, 0, 1}
    assert (item["label"], item["case"], item["series"], item["patient"], item["bad_files"]) == (
        -1, "p1/t2.nii.gz:1", "p1/t2.nii.gz", "p1", "")
    batch = next(iter(DataLoader(items, 4)))
    assert batch["label"].dtype == batch["seed"].dtype == torch.int64
    assert batch["image"].shape == (4, 1, 32, 32)
    assert batch["spacing"].dtype == torch.float32 and batch["spacing"].shape == (4, 2)
    assert items.describe([]) == {"slices": 18, "series": 3, "patients": 3, "classes": {}}
    assert len(list(items)) == 18
    bare = SliceDataset(slices, 32, True)[7]["mask"]
    assert (bare == -1).all()                                          # no classes named: masks are not read


@pytest.mark.parametrize("fit, spacing", [("letterbox", (1, 1)), ("letterbox", (1, 3)), ("squash", (1, 3))])
def test_slices_fill_their_box_and_masks_lie_where_images_do(tmp_path, fit, spacing):
    """Letterboxes keep the shape in mm; image bilinear, mask nearest, unknown beside it."""
    voxels = np.zeros((24, 20, 6), np.int16) + NOISE % 50
    voxels[8:16, 5:10] = 1000
    affine = np.diag([spacing[1], spacing[0], 9, 1])
    write_nifti(tmp_path / "p" / "a.nii", voxels, affine)
    write_nifti(tmp_path / "p" / "a_seg.nii", (voxels == 1000).astype(np.uint8), affine)
    found, *_ = find_slices(tmp_path, mask="seg")
    item = SliceDataset(found, 120, False, mask_classes=["box"], fit=fit, percentiles=(0, 100))[2]
    extent = np.array([20 * spacing[0], 24 * spacing[1]])
    box = fit_box((20, 24), spacing, 120, fit)
    top, left, height, width = box
    if fit == "letterbox":
        assert max(height, width) == 120 and abs(height / width - extent[0] / extent[1]) < 0.02
    else:
        assert box == (0, 0, 120, 120)
    np.testing.assert_allclose(item["spacing"], extent / (height, width), rtol=1e-6)
    inside = torch.zeros(120, 120, dtype=torch.bool)
    inside[top:top + height, left:left + width] = True
    assert (item["mask"][~inside] == -1).all() and (item["mask"][inside] >= 0).all()
    assert (item["image"][0][~inside] == 0).all()
    bright = item["image"][0] > 0.5
    assert (bright == (item["mask"] == 1)).float().mean() > 0.97
    back = undo_letterbox((item["mask"] == 1).float().numpy(), box, (20, 24)) > 0.5
    image = slices_along(read_series(tmp_path / "p" / "a.nii"), "axial")[2]
    np.testing.assert_array_equal(back, image == 1000)


def test_a_field_keeps_crops_at_the_scale_of_whole_slices(tmp_path):
    """What is 10 mm long is as many pixels in both; a slice wider than the field still fills its square."""
    whole = np.random.default_rng(0).integers(0, 50, (40, 40, 4)).astype(np.int16)
    whole[15:25, 15:25] = 900
    lengths = {}
    for name, voxels in (("whole", whole), ("crop", whole[10:30, 10:30])):
        write_nifti(tmp_path / name / "a.nii", voxels)
        found, *_ = find_slices(tmp_path / name)
        for field in (0.0, 30.0, 40.0, 60.0):
            item = SliceDataset(found, 120, False, percentiles=(0, 100), field=field)[0]
            lengths[name, field] = (item["image"][0, 60] > 0.5).sum().item()
            assert lengths[name, field] == pytest.approx(10 / item["spacing"][0].item(), abs=1)
    assert [lengths["whole", field] for field in (0.0, 30.0, 40.0, 60.0)] == [30, 30, 30, 20]
    assert [lengths["crop", field] for field in (0.0, 30.0, 40.0, 60.0)] == [60, 40, 30, 20]


def test_intensity_is_scaled_by_slice_or_by_series(slices):
    """Percentiles become 0 and 1; of the series, a dark slice stays darker than its neighbours."""
    series = read_series(slices[0].path)
    series.data[2] *= 0.1
    write_nifti(slices[0].path, series.data.T)
    each, whole = (SliceDataset(slices, 24, False, percentiles=(10, 90), fit="squash",
                                intensity=word)[2]["image"] for word in ("slice", "series"))
    assert each.max() == 1 and whole.max() < 0.2
    image = slices_along(read_series(slices[0].path), "stored")[2]
    for found, of in ((each, image), (whole, series.data)):
        low, high = np.percentile(of, (10, 90))
        due = torch.from_numpy(np.clip((image - low) / (high - low), 0, 1).astype(np.float32))
        due = F.interpolate(due[None, None], (24, 24), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(found, due, rtol=0, atol=1e-5)
    wide = SliceDataset(slices, 24, False, percentiles=(0, 100), fit="squash")[2]["image"]
    assert not torch.allclose(wide, each, atol=0.01)


def test_flat_slices_are_black(tmp_path):
    """Slices beside the body hold one value; they are no reason to stop, nor to divide by zero."""
    grey(tmp_path / "a.png", np.full((9, 9), 7))
    found, *_ = find_slices(table(tmp_path / "a.csv", ["path"], ["a.png"]))
    assert (SliceDataset(found, 8, False)[0]["image"] == 0).all()


def test_pictures_become_grey_and_keep_their_pixels(tmp_path):
    """A picture by itself is made luminance; at its own size nothing is resampled."""
    picture(tmp_path / "a.png", size=(16, 16), colour=True)
    found, *_ = find_slices(table(tmp_path / "a.csv", ["path", "label"], ["a.png", "x"]))
    item = SliceDataset(found, 16, False, percentiles=(0, 100))[0]
    image = read_image(tmp_path / "a.png")
    np.testing.assert_allclose(item["image"][0], (image - image.min()) / np.ptp(image), atol=1e-6)
    assert item["label"] == 0 and item["spacing"].tolist() == [1, 1]


def test_masks_are_sampled_at_the_centres_of_pixels(tmp_path):
    """As images are: else every mask would lie half a pixel up and to the left of what it marks."""
    rows, columns = np.mgrid[:24, :24]
    picture(tmp_path / "a.png", size=(24, 24))
    grey(tmp_path / "m.png", (rows % 3 == 1) & (columns % 3 == 1))
    found, *_ = find_slices(table(tmp_path / "a.csv", ["path", "mask"], ["a.png", "m.png"]))
    assert (SliceDataset(found, 8, False, mask_classes=["dot"])[0]["mask"] == 1).all()


def test_empty_masks_are_background(tmp_path):
    """A slice without a lesion teaches as well as one with it."""
    write_nifti(tmp_path / "p" / "a.nii", NOISE)
    write_nifti(tmp_path / "p" / "a_lesion.nii", np.zeros_like(NOISE))
    found, *_ = find_slices(tmp_path, mask="lesion")
    mask = SliceDataset(found, 20, False, mask_classes=["lesion"], fit="squash")[0]["mask"]
    assert (mask == 0).all()


def test_seeds_depend_on_seed_epoch_and_index_alone(slices):
    """Equal in any order and process; new in each epoch of training, the same in validation."""
    def seeds(train, epoch, seed=0, **loader):
        items = SliceDataset(slices, 16, train, seed)
        items.set_epoch(epoch)
        return torch.cat([batch["seed"] for batch in DataLoader(items, 3, **loader)])

    first = seeds(True, 0)
    assert len(set(first.tolist())) == len(slices)
    assert seeds(True, 0, num_workers=2).equal(first)
    assert not seeds(True, 1).equal(first) and not seeds(True, 0, seed=1).equal(first)
    assert seeds(False, 1).equal(seeds(False, 0))


def test_a_series_is_decoded_once_while_it_is_kept(slices, monkeypatch):
    """Slices of one series follow each other; without a cache each is decoded for, to the same effect."""
    decoded = []

    def counted(path, *words):
        decoded.append(path)
        return read_series(path, *words)

    monkeypatch.setattr(datasets.slices, "read_series", counted)
    kept = list(SliceDataset(slices, 16, False, mask_classes=["x"]))
    assert len(decoded) == 3
    again = list(SliceDataset(slices, 16, False, mask_classes=["x"], cache_mb=0))
    assert len(decoded) == 3 + 18
    assert all(a["image"].equal(b["image"]) and a["mask"].equal(b["mask"])
               for a, b in zip(kept, again, strict=True))
    items = SliceDataset(slices, 16, False, cache_mb=2.5 * NOISE.size * 4 / 2 ** 20)        # room for two
    decoded.clear()
    for index in (0, 6, 0, 12, 1, 7):
        items[index]
    assert [path.parent.name for path in decoded] == ["p0", "p1", "p2", "p1"]     # the last used are kept


def test_unreadable_slices_stop_or_are_replaced_and_named(slices):
    """The next readable slice stands in, the message goes with the item, and not one readable is an error."""
    slices[0].mask.write_bytes(b"damaged")
    with pytest.raises(BadFile, match="p0/t2_seg.nii.gz: damaged NIfTI"):
        SliceDataset(slices, 16, True, mask_classes=["x"])[0]
    item = SliceDataset(slices, 16, True, on_bad_file="skip", mask_classes=["x"])[0]
    assert item["patient"] == "p1" and item["bad_files"].count("p0/t2_seg.nii.gz: damaged NIfTI") == 6
    with pytest.raises(UserError, match="none of the 6 slices can be read"):
        SliceDataset(slices[:6], 16, True, on_bad_file="skip", mask_classes=["x"])[0]


@pytest.mark.parametrize("words, reason", [
    ({"size": 4}, "slices of 4 pixels: must be 8 at least"), ({"fit": "crop"}, 'fit "crop": must be one of'),
    ({"intensity": "image"}, 'intensity "image": must be one of slice, series'),
    ({"percentiles": (99, 1)}, "must be two, rising"), ({"on_bad_file": "x"}, 'ON_BAD_FILE = "x"'),
    ({"slices": []}, "a dataset of no slices")])
def test_arguments_that_make_no_sense_are_refused(slices, words, reason):
    """Before the first epoch, in one line."""
    with pytest.raises(UserError, match=reason):
        SliceDataset(**{"slices": slices, "size": 16, "train": True} | words)


@pytest.mark.skipif(not SPINE.is_dir(), reason="no real data beside the repository")
def test_real_masks_lie_in_their_images():
    """The cord on T2 is darker than the fluid around it: read in the wrong order it would not be."""
    found, _, notes = find_slices(SPINE, mask="seg-manual", axis="axial")
    assert {slice.series for slice in found} == {"errsm30/t2/t2.nii.gz"} and len(found) == 55
    assert any("series without a mask _seg-manual left out" in note for note in notes)
    items = SliceDataset(found, 120, False, mask_classes=["cord"], fit="squash")
    for index in (10, 27, 45):
        image, cord = items[index]["image"][0], items[index]["mask"] == 1
        ring = (F.max_pool2d(cord[None].float(), 11, 1, 5)[0] > 0) & ~cord
        assert cord.sum() > 100 and image[ring].mean() > 1.3 * image[cord].mean()
    lesion, *_ = find_slices(SPINE, mask="lesion_seg")
    items = SliceDataset(lesion, 99, False, mask_classes=["lesion"])
    assert len(items) == 29 and 0 < sum(bool((item["mask"] == 1).any()) for item in items) < 29
