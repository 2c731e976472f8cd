"""Cases on disk, their splits, and the dataset of pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets.augment import XrayAugment
from datasets.io import min_max, write_nifti
from datasets.longitudinal import (
    LongitudinalMIMDataset,
    find_cases,
    find_pairs,
    normalise,
    pair_name,
    patient_of,
    read_case,
    read_pairs,
    split_cases,
)
from datasets.masking import PatchMask
from utils.config import BadFile, UserError

AUGMENT = XrayAugment(flip=0.5, rotation=5, shift=0.05, scale=0.05,
                      clahe=0.5, sharpness=0.5, exposure=0.2, noise=0.02)


def write_case(folder, shape=(16, 16), diff_name="diff_map", seed=0):
    """A case with random images that span 0 to 1, and the difference between them."""
    folder.mkdir(parents=True)
    images = np.random.default_rng(seed).random((2, *shape), np.float32)
    images[:, 0, 0], images[:, -1, -1] = 0, 1
    for name, array in (("prior", images[0]), ("current", images[1]), (diff_name, images[1] - images[0])):
        write_nifti(folder / f"{name}.nii.gz", array)
    return folder


@pytest.fixture
def root(tmp_path):
    """Six cases of four patients, one of them with a level of pairs below."""
    for seed, name in enumerate(("p1_a", "p1_b", "p2_a", "p3_a", "p4_x/pair1", "p4_x/pair2")):
        write_case(tmp_path / name, seed=seed)
    return tmp_path


def equal_items(first, second):
    return all(torch.equal(first[key], second[key]) for key in ("prior", "current", "diff"))


def test_cases_are_sorted_and_found_on_both_levels(root):
    """The order of cases must not depend on the file system; hidden folders are unfinished work."""
    write_case(root / ".p9_a")
    write_case(root / "p4_x" / ".half")
    names = [case.relative_to(root).as_posix() for case in find_cases(root)]
    assert names == ["p1_a", "p1_b", "p2_a", "p3_a", "p4_x/pair1", "p4_x/pair2"]


def test_difference_map_is_another_name_for_diff_map(tmp_path):
    """Both names are in use."""
    write_case(tmp_path / "p1_a", seed=1)
    write_case(tmp_path / "p1_b", diff_name="difference_map", seed=1)
    first, second = (read_case(case, 16) for case in find_cases(tmp_path))
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("member", ["prior", "current", "diff_map"])
def test_an_incomplete_case_is_named(root, member):
    """It must not be left out silently; with "skip" the dataset passes it over and says so."""
    path = root / "p2_a" / f"{member}.nii.gz"
    path.unlink()
    with pytest.raises(BadFile, match=f"^{path}: "):
        find_cases(root)
    assert len(find_cases(root, on_bad_file="skip")) == 6


def test_no_cases_and_no_folder_are_errors(tmp_path):
    """Training on nothing must not look like training."""
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=str(folder)):
            find_cases(folder)
    (tmp_path / "file").write_text("a")
    with pytest.raises(UserError, match="file: a file, not a folder"):
        find_cases(tmp_path / "file")
    with pytest.raises(UserError, match="no cases"):
        LongitudinalMIMDataset([], size=16)


@pytest.mark.parametrize("name, patient", [
    ("p12_a", "p12"), ("p12_a/pair_2", "p12"), ("p12", "p12"), ("case_001", "case_001"),
    ("patient_12_followup", "patient_12"), ("MRN7_case_1", "MRN7")])
def test_the_patient_is_the_first_part_of_the_first_folder(tmp_path, name, patient):
    """Pairs of one folder belong together; "case" in case_001 is a label, not a patient."""
    assert patient_of(tmp_path / name, tmp_path) == patient


@pytest.mark.parametrize("num_patients", [3, 4, 7, 200])
def test_splits_are_whole_patients_and_none_is_empty(tmp_path, num_patients):
    """A patient on both sides makes validation a test of memory."""
    cases = [tmp_path / f"p{i}_{j}" for i in range(num_patients) for j in range(3)]
    splits = split_cases(cases, tmp_path, val_fraction=0.2, test_fraction=0.1)
    patients = {name: {patient_of(case, tmp_path) for case in members} for name, members in splits.items()}
    assert sorted(case for members in splits.values() for case in members) == sorted(cases)
    assert sum(map(len, patients.values())) == num_patients and all(patients.values())
    if num_patients == 200:
        assert 25 <= len(patients["val"]) <= 55 and 8 <= len(patients["test"]) <= 35


def test_a_patient_stays_in_its_split_when_others_are_added(tmp_path):
    """Or yesterday's test patients would be trained on tomorrow."""
    cases = [tmp_path / f"p{i}_a" for i in range(200)]
    few, many = (split_cases(part, tmp_path, 0.2, 0.1) for part in (cases[:100], cases))
    assert all(set(few[name]) <= set(many[name]) for name in few)


def test_a_fraction_of_zero_leaves_its_split_empty(tmp_path):
    """One patient can be trained on; but not split in two."""
    cases = [tmp_path / "p1_a", tmp_path / "p1_b"]
    assert split_cases(cases, tmp_path, 0, 0) == {"train": cases, "val": [], "test": []}
    with pytest.raises(UserError, match="1 patient.*SPLIT_CSV"):
        split_cases(cases, tmp_path, 0.1, 0)
    for fractions in ((0.5, 0.5), (-0.1, 0.1)):
        with pytest.raises(UserError, match="VAL_FRACTION"):
            split_cases(cases, tmp_path, *fractions)


@pytest.mark.parametrize("rows", [
    "patient,split\np1,val\np2,train\np3,test\np4,train\n",
    "split,case\nval,p1_a\nval,p1_b\ntrain,p2_a\ntest,p3_a\ntrain,p4_x/pair1\ntrain,p4_x/pair2\n"])
def test_a_csv_decides_instead_of_the_hash(root, rows):
    """By patient or by case."""
    (root / "split.csv").write_text(rows)
    splits = split_cases(find_cases(root), root, 0.2, 0.1, csv=root / "split.csv")
    names = {split: [case.relative_to(root).as_posix() for case in cases] for split, cases in splits.items()}
    assert names == {"train": ["p2_a", "p4_x/pair1", "p4_x/pair2"], "val": ["p1_a", "p1_b"], "test": ["p3_a"]}


@pytest.mark.parametrize("rows, message", [
    ("patient,split\np1,validate\n", 'line 2: "validate"'),
    ("patient,split\np1,train\np2,val\np3,val\n", "patient p4 is missing"),
    ("patient,split\np1,train\np1,val\n", "line 3: p1 is already in train"),
    ("case,split\np1_a,train\np1_b,val\n", "patient p1 is in train and val"),
    ("patient,split\np1,train\np2,train\np3,train\np4,train\n", "no case has the split val"),
    ("name,split\np1,train\n", "column"), ("", "column"), (None, "cannot be read")])
def test_a_csv_that_makes_no_sense_is_an_error(root, rows, message):
    """Each names the file and what is wrong with it."""
    path = root / "split.csv"
    if rows is not None:
        path.write_text(rows)
    with pytest.raises(UserError, match=message) as error:
        split_cases(find_cases(root), root, 0.2, 0.1, csv=path)
    assert str(path) in str(error.value)


def test_items_have_the_documented_shapes_and_ranges(root):
    """Whatever size is asked for."""
    for size in (16, 9, 32):
        item = LongitudinalMIMDataset(find_cases(root), size, AUGMENT)[4]
        assert item["case"] == str(root / "p4_x" / "pair1") and item["bad_files"] == ""
        for key, low in (("prior", 0), ("current", 0), ("diff", -1)):
            assert item[key].shape == (1, size, size) and item[key].dtype == torch.float32
            assert low <= item[key].min() and item[key].max() <= 1


def test_without_augmentation_the_pair_is_as_stored(root):
    """Images stored from 0 to 1 pass unchanged, so the difference map keeps their units."""
    item = LongitudinalMIMDataset(find_cases(root), 16)[0]
    torch.testing.assert_close(item["current"] - item["prior"], item["diff"], atol=1e-6, rtol=0)
    assert equal_items(item, LongitudinalMIMDataset(find_cases(root), 16, seed=5)[0])


def test_images_in_any_unit_are_normalised(root):
    """Ray sums or Hounsfield units give the same item as the same image from 0 to 1."""
    expected = read_case(root / "p1_a", 16)
    for name, image in zip(("prior", "current"), expected, strict=False):
        write_nifti(root / "p1_a" / f"{name}.nii.gz", image[0].numpy() * 3000 - 1000)
    for image, other in zip(read_case(root / "p1_a", 16), expected, strict=True):
        torch.testing.assert_close(image, other, atol=1e-5, rtol=0)


def test_nifti_files_are_taken_as_prepared_and_other_kinds_are_clipped():
    """Pairs keep their values to the last bit; of a raw X-ray 0.3 % at each end do not count."""
    image = np.random.default_rng(0).random((100, 100), np.float32)
    image[:2, :10] = 40
    for name in ("a.nii.gz", "A.NII"):
        np.testing.assert_array_equal(normalise(image, name), min_max(image))
    raw = normalise(image, "a.png")
    assert (raw[:2, :10] == 1).all() and 0.4 < np.median(raw) < 0.6
    np.testing.assert_array_equal(raw, normalise(image, "a.dcm"))
    assert not normalise(np.ones((5, 5)), "a.jpg").any()


def test_pairs_to_judge_lie_in_folders_of_any_kind_of_image(root):
    """What training needs is more than what can be judged: the map may be missing, or a whole part."""
    (root / "p2_a" / "diff_map.nii.gz").unlink()
    (root / "p3_a" / "prior.nii.gz").unlink()
    (root / "p9").mkdir()
    for name in ("prior.png", "current.dcm", "notes.png"):
        (root / "p9" / name).write_bytes(b"x")
    found = dict(find_pairs(root, "all", 0.2, 0.1))
    assert list(found) == ["p1_a", "p1_b", "p2_a", "p3_a", "p4_x__pair1", "p4_x__pair2", "p9"]
    assert {name: sorted(files) for name, files in found.items() if len(files) < 3} == {
        "p2_a": ["current", "prior"], "p3_a": ["current", "truth"], "p9": ["current", "prior"]}
    with pytest.raises(UserError, match="p9: no case folder below it; .* prior.* and current.*PNG.*--pairs"):
        find_pairs(root / "p9", "all", 0.2, 0.1)
    with pytest.raises(UserError, match="no case is in the split test"):
        find_pairs(root, "test", 0.2, 0)


@pytest.mark.parametrize("prior, current, name", [
    ("p7/2021.dcm", "p7/2022.png", "p7_2021_to_2022"),
    ("p7/2021/img.nii.gz", "p7/2022/img.nii.gz", "p7_2021-img_to_2022-img"),
    ("p7/1.2.840.1", "p7/1.2.840.2", "p7_1.2.840.1_to_1.2.840.2"),
    ("p 7/a:b.png", "p 7/é?.png", "p-7_a-b_to_é-"), ("p7/../p8/1.png", "p8/2.png", "p8_1_to_2")])
def test_a_pair_is_named_after_both_images_and_their_folder(tmp_path, prior, current, name):
    """Two priors of one current image must not overwrite each other, nor two patients' images of one name."""
    assert pair_name(tmp_path / prior, tmp_path / current) == name


def test_names_of_pairs_fit_into_a_file_system(tmp_path):
    """Archives name folders by numbers of 64 digits; what is cut off still makes a difference."""
    names = {pair_name(tmp_path / f"{'é' * 80}/{i}" / ("1" * 64), tmp_path / "b.png") for i in (1, 2)}
    assert len(names) == 2 and all(len(name.encode()) <= 200 for name in names)


def test_a_table_of_pairs(tmp_path):
    """Paths are relative to the table, which may name its cases, or some of them."""
    table = tmp_path / "visits.csv"
    table.write_text("case,current,prior\nfirst/one,a/2.png,a/1.png\n,/x/2.png,/x/1.png\n")
    assert read_pairs(table) == [
        ("first-one", {"prior": [tmp_path / "a/1.png"], "current": [tmp_path / "a/2.png"]}),
        ("x_1_to_2", {"prior": [Path("/x/1.png")], "current": [Path("/x/2.png")]})]


@pytest.mark.parametrize("rows, message", [
    ("prior;current\na;b\n", "has columns prior;current; needs .* prior and current"),
    ("before,current,age\na,b,3\n", "has columns before, current, age; needs"),
    ("prior,current\n", "no row below"), ("", "no row below"), (None, "cannot be read"),
    ("prior,current\na,b\n,b\n", "line 3: prior and current must both"),
    ("prior,current,case\na,b,x\nc,d,x\n", "line 3: a second case x;.*column case"),
    ("prior,current\na.png,b.png\na.jpg,b.png\n", "line 3: a second case .*a_to_b;.*column case")])
def test_a_bad_table_of_pairs_is_one_line(tmp_path, rows, message):
    """Each names the table and what is wrong with it."""
    if rows is not None:
        (tmp_path / "visits.csv").write_text(rows)
    with pytest.raises(UserError, match=message) as error:
        read_pairs(tmp_path / "visits.csv")
    assert f"--pairs {tmp_path / 'visits.csv'}" in str(error.value) and "\n" not in str(error.value)


def test_constant_images_become_zeros(tmp_path):
    """No division by zero, augmented or not."""
    case = write_case(tmp_path / "p1_a")
    for name in ("prior", "current", "diff_map"):
        write_nifti(case / f"{name}.nii.gz", np.full((16, 16), 0.5, np.float32))
    prior, current, _ = read_case(case, 16)
    assert not prior.any() and not current.any()
    for index in range(5):
        item = LongitudinalMIMDataset([case] * 5, 16, AUGMENT)[index]
        assert all(torch.isfinite(item[key]).all() for key in ("prior", "current", "diff"))


def test_pictures_that_are_not_square_are_padded(tmp_path):
    """Both images and the map stay aligned, and keep their aspect ratio."""
    prior, current, diff = read_case(write_case(tmp_path / "p1_a", shape=(20, 10)), 20)
    torch.testing.assert_close(current - prior, diff, atol=1e-6, rtol=0)
    assert not current[..., :5].any() and not current[..., 15:].any() and current[..., 5:15].any()


@pytest.mark.parametrize("name", ["prior", "diff_map"])
def test_sizes_that_differ_are_refused(root, name):
    """Resizing one onto the other would hide that they do not belong together."""
    path = root / "p1_a" / f"{name}.nii.gz"
    write_nifti(path, np.zeros((16, 15), np.float32))
    with pytest.raises(BadFile, match=f"^{path}: 16x15 pixels.*16x16"):
        read_case(root / "p1_a", 16)


def test_a_map_in_other_units_is_refused(root):
    """A map from -255 to 255 cannot be the output of a tanh."""
    path = root / "p1_a" / "diff_map.nii.gz"
    write_nifti(path, np.linspace(-255, 255, 256, dtype=np.float32).reshape(16, 16))
    with pytest.raises(BadFile, match=f"^{path}: values from -255 to 255"):
        read_case(root / "p1_a", 16)


def test_a_bad_file_stops_or_is_replaced_by_the_next_case(root):
    """The replacement is the same every time, and what was skipped is reported."""
    cases = find_cases(root)
    path = cases[1] / "current.nii.gz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadFile, match=f"^{path}: "):
        LongitudinalMIMDataset(cases, 16)[1]
    dataset = LongitudinalMIMDataset(cases, 16, on_bad_file="skip")
    item = dataset[1]
    assert item["case"] == str(cases[2]) and equal_items(item, dataset[2])
    assert item["bad_files"].startswith(f"{path}: ") and dataset[2]["bad_files"] == ""


def test_nothing_readable_is_an_error_even_when_skipping(root):
    """The search for a replacement ends, also past the end of the list."""
    cases = find_cases(root)
    for case in cases:
        (case / "prior.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 6 cases"):
        LongitudinalMIMDataset(cases, 16, on_bad_file="skip")[4]


def test_on_bad_file_takes_two_words_only(root):
    """A mistyped "skip" must not mean "stop"."""
    for call in (lambda: find_cases(root, "skipp"),
                 lambda: LongitudinalMIMDataset([root / "p1_a"], 16, on_bad_file="")):
        with pytest.raises(UserError, match="ON_BAD_FILE.*stop, skip"):
            call()


def test_items_depend_on_seed_epoch_and_index_alone(root):
    """Not on the order of reading, the number of workers, or draws made elsewhere."""
    cases = find_cases(root)
    dataset = LongitudinalMIMDataset(cases, 16, AUGMENT, seed=3)
    dataset.set_epoch(2)
    torch.manual_seed(1)
    forward = [dataset[i] for i in range(6)]
    torch.manual_seed(2)
    assert all(equal_items(dataset[i], forward[i]) for i in reversed(range(6)))
    assert not equal_items(LongitudinalMIMDataset(cases, 16, AUGMENT, seed=4)[0], forward[0])
    same_case = LongitudinalMIMDataset(cases[:1] * 2, 16, AUGMENT)
    assert not equal_items(same_case[0], same_case[1])


def test_workers_draw_the_same_as_no_workers_in_every_epoch(root):
    """A run may be resumed on a machine with another number of workers; the epoch must reach them."""
    dataset = LongitudinalMIMDataset(find_cases(root), 16, AUGMENT, PatchMask(4, "random"))
    epochs = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch, mask_probability=0.5)
        none, two = (list(DataLoader(dataset, batch_size=6, num_workers=workers)) for workers in (0, 2))
        for key in ("prior", "current", "diff", "mask"):
            assert torch.equal(none[0][key], two[0][key])
        epochs.append(none[0])
    for key in ("prior", "current", "diff", "mask"):
        assert not torch.equal(epochs[0][key], epochs[1][key])


def test_a_mask_changes_nothing_but_itself(root):
    """The images are the same with and without; the network hides what the mask says."""
    cases = find_cases(root)
    masked = LongitudinalMIMDataset(cases, 16, AUGMENT, PatchMask(4, "random"))
    masked.set_epoch(0, mask_probability=1.0)
    plain = LongitudinalMIMDataset(cases, 16, AUGMENT)
    assert equal_items(masked[2], plain[2]) and "mask" not in plain[2]
    assert masked[2]["mask"].shape == (2, 16, 16) and masked[2]["mask"].all()
