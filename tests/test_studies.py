"""Cached series as items of tokens, their batches, and the splits by study."""

from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import grid_coords
from torch.utils.data import DataLoader

from datasets.block_mask import VolumeBlockMask
from datasets.cache import Series, Study, read_cache, write_cache
from datasets.intensity import MODES, normalise
from datasets.labels import read_labels
from datasets.samplers import StudyAwareBatchSampler
from datasets.studies import StudyDataset, ragged_collate, split_studies
from datasets.tokens import TOKEN, tokenize, untokenize
from utils.config import BadFile, UserError

SIZE = (3, 2, 4)                                     # tokens of most series here
CT = ("brain", "blood", "bone")
AMOUNTS = {"gamma": 0.2, "brightness": 0.1, "contrast": 0.2, "noise": 0.05}
SETTINGS = {"spacing": [4.0, 1.0], "percentiles": [0.5, 99.5], "mri_background": 10.0,
            "ct_background": -500.0}


def write_series(root, study, name, images=("mri",), size=SIZE, background=()):
    """A series in the cache's layout: voxels hold 8 * the number of their token, plus the mode's index."""
    folder = root / study
    folder.mkdir(parents=True, exist_ok=True)
    count = int(np.prod(size))
    image = untokenize(8 * torch.arange(count, dtype=torch.uint8)[:, None].repeat(1, 1024), size)
    hidden = torch.zeros(count, 1024, dtype=torch.bool)
    hidden[list(background), 7] = True
    for mode in images:
        file = folder / (f"{name}.pt" if mode == "mri" else f"{name}_{mode}.pt")
        torch.save({"data": image + MODES.index(mode)}, file)
    bits = np.packbits(untokenize(hidden, size).numpy())
    torch.save({"data": torch.from_numpy(bits)}, folder / f"{name}_mask.pt")
    shape = tuple(n * t for n, t in zip(size, TOKEN, strict=True))
    return Series(study, name, "mri" if images == ("mri",) else "ct", folder, shape, (4.0, 1.0, 1.0), "axial",
                  np.eye(4).tolist(), shape, np.eye(4).tolist(), name, tuple(images))


@pytest.fixture
def studies(tmp_path):
    """An MRI of two series, a CT with its windows, an MRI of one series."""
    return [Study("a", "mri", (write_series(tmp_path, "a", "t1", background=[0, 1, 5]),
                               write_series(tmp_path, "a", "t2", size=(2, 2, 2)))),
            Study("b", "ct", (write_series(tmp_path, "b", "head", CT, background=[3]),)),
            Study("c", "mri", (write_series(tmp_path, "c", "t1", size=(1, 3, 2)),))]


def numbers(item):
    """The number that each token had in its volume, read back from its normalised values."""
    mode = MODES[item["mode"]]
    codes = normalise(torch.arange(256, dtype=torch.uint8), mode)
    found = (item["tokens"][:, :, None] - codes).abs().argmin(2)
    assert (found == found[:, :1]).all() and (found[:, 0] % 8 == item["mode"]).all()
    return found[:, 0] // 8


def equal_items(first, second):
    same = [torch.equal(first[key], second[key]) for key in first if torch.is_tensor(first[key])]
    return all(same) and all(first[key] == second[key] for key in ("mode", "series", "study"))


def labels_of(tmp_path, rows="a,1,0\nb,,1\nc,0,nan\n"):
    (tmp_path / "labels.csv").write_text("study_id,bleeding,mass\n" + rows)
    return read_labels(tmp_path / "labels.csv", "bce")


def test_validation_items_are_the_normalised_foreground_of_the_whole_series(studies):
    """As documented, key by key."""
    dataset = StudyDataset(studies, train=False, **AMOUNTS, patch_drop_rate=0.5)
    assert len(dataset) == 4
    item = dataset[0]
    image = torch.load(studies[0].series[0].folder / "t1.pt")["data"]
    kept = [i for i in range(24) if i not in (0, 1, 5)]
    assert torch.equal(item["tokens"], normalise(tokenize(image), "mri")[kept])
    assert torch.equal(item["coords"], grid_coords(SIZE)[kept])
    assert item["tokens"].dtype == torch.float32 and item["coords"].dtype == torch.int64
    assert item["foreground"].dtype == torch.bool and item["foreground"].all()
    assert item["size"].tolist() == list(SIZE) and item["mode"] == 0 and item["bad_files"] == ""
    assert item["series"] == "a/t1" and item["study"] == "a"


def test_background_can_stay_and_is_told_apart(studies):
    """Without removal all tokens come, and ``foreground`` says which are which."""
    item = StudyDataset(studies, train=False, remove_background=False)[0]
    assert (~item["foreground"]).nonzero().flatten().tolist() == [0, 1, 5] and len(item["tokens"]) == 24


def test_in_training_tokens_stay_what_they_are_wherever_they_lie(studies):
    """Values, coordinates and foreground follow crop, flips and swap: one orientation explains them all."""
    dataset = StudyDataset(studies, train=True, max_crop_size=(2, 2, 3), remove_background=False)
    grid, sizes, crops = grid_coords(SIZE), set(), set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        item = dataset[0]
        found = numbers(item)
        before, after, size = grid[found], item["coords"], item["size"]
        swap = size.tolist() == [3, 4, 2]
        assert swap or size.tolist() == list(SIZE)
        before = before[:, [0, 2, 1]] if swap else before
        for axis in range(3):
            mirrored = size[axis] - 1 - before[:, axis]
            assert torch.equal(after[:, axis], before[:, axis]) or torch.equal(after[:, axis], mirrored)
        assert item["foreground"].tolist() == [number not in (0, 1, 5) for number in found.tolist()]
        sizes.add(tuple(size.tolist()))
        crops.add(len(found))
    assert len(sizes) == 2 and len(crops) > 4 and max(crops) <= 12


@pytest.mark.parametrize("option", [
    {"random_crop": True}, {"spatial_augment": True}, {"patch_drop_rate": 0.3}, {"gamma": 0.5},
    {"brightness": 0.3}, {"contrast": 0.3}, {"noise": 0.1}])
def test_each_augmentation_acts_in_training_alone(studies, option):
    """An option that does nothing is a promise broken; one that acts in validation spoils its figures."""
    off = {"random_crop": False, "spatial_augment": False}
    plain, changed = (StudyDataset(studies, True, **{**off, **words}) for words in ({}, option))
    still = StudyDataset(studies, False, **{**off, **option})
    reference = StudyDataset(studies, False)
    assert equal_items(plain[0], reference[0]) and equal_items(still[0], reference[0])
    differs = 0
    for epoch in range(8):
        changed.set_epoch(epoch)
        differs += not equal_items(changed[0], reference[0])
    assert differs >= 4


def test_the_crop_is_no_larger_than_asked_for(studies):
    """In tokens along each axis, before the swap of H and W."""
    dataset = StudyDataset(studies, True, max_crop_size=(2, 1, 1), spatial_augment=False)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        coords = dataset[1]["coords"]
        assert ((coords.amax(0) - coords.amin(0) + 1) <= torch.tensor([2, 1, 1])).all()


@pytest.mark.parametrize("remove_background", [True, False])
def test_patch_drop_takes_its_share_of_the_foreground(studies, remove_background):
    """Background tokens are not dropped in place of anatomy, and something always stays."""
    words = {"random_crop": False, "spatial_augment": False, "remove_background": remove_background}
    seen = set()
    for rate, left in ((0.25, 16), (0.99, 1)):                                 # of 21 foreground tokens
        dataset = StudyDataset(studies, True, patch_drop_rate=rate, **words)
        for epoch in range(5):
            dataset.set_epoch(epoch)
            item = dataset[0]
            assert int(item["foreground"].sum()) == left
            assert int((~item["foreground"]).sum()) == (0 if remove_background else 3)
            seen.add(tuple(numbers(item).tolist()))
    assert len(seen) > 5


def test_windows_are_drawn_by_their_probabilities_in_training(studies, tmp_path):
    """A CT counts as one series however many windows it has; probabilities are of the windows it has."""
    two = Study("d", "ct", (write_series(tmp_path, "d", "x", ("bone", "blood"), (1, 1, 1)),))
    dataset = StudyDataset([*studies, two], True, random_crop=False, window_probabilities=[0.6, 0.3, 0.1])
    drawn = Counter()
    for epoch in range(400):
        dataset.set_epoch(epoch)
        drawn.update((place, MODES[dataset[place]["mode"]]) for place in (2, 4))
    expected = {(2, "brain"): 0.6, (2, "blood"): 0.3, (2, "bone"): 0.1, (4, "blood"): 0.75, (4, "bone"): 0.25}
    assert drawn.keys() == expected.keys()
    assert all(drawn[key] / 400 == pytest.approx(share, abs=0.08) for key, share in expected.items())
    validation = StudyDataset([*studies, two], False)
    assert [MODES[validation[i]["mode"]] for i in range(5)] == ["mri", "mri", "brain", "mri", "blood"]


def test_all_windows_come_with_windows_all(studies):
    """Tasks on whole studies see each image once, grouped by study, in training too."""
    for train in (True, False):
        dataset = StudyDataset(studies, train, windows="all")
        assert [MODES[dataset[i]["mode"]] for i in range(6)] == ["mri", "mri", *CT, "mri"]
        assert dataset.groups() == [[0, 1], [2, 3, 4], [5]]
        assert [dataset[i]["study"] for i in range(6)] == ["a", "a", "b", "b", "b", "c"]
    assert StudyDataset(studies, True).groups() == [[0, 1], [2], [3]]


def test_a_mask_tells_context_from_targets(studies):
    """It sees the tokens that are left, in place, and the image's mode."""
    calls = []

    def mask(coords, foreground, mode, generator):
        calls.append((coords, foreground, mode))
        return foreground, ~foreground

    item = StudyDataset(studies, False, mask=mask, remove_background=False)[2]
    coords, foreground, mode = calls[0]
    assert mode == item["mode"] == 1 and torch.equal(coords, item["coords"])
    assert torch.equal(item["context"], foreground) and torch.equal(item["target"], ~foreground)
    block = VolumeBlockMask({"mri": 0.7, "ct": 0.75}, {"mri": 0.25, "ct": 0.2})
    items = [StudyDataset(studies, True, random_crop=False, mask=block)[i] for i in range(4)]
    for item in items:
        assert torch.equal(item["context"] ^ item["target"], item["foreground"]) and item["context"].any()
    plain = StudyDataset(studies, True, random_crop=False)
    assert all(equal_items({key: item[key] for key in plain[i]}, plain[i]) for i, item in enumerate(items))


def test_images_carry_the_labels_of_their_study(studies, tmp_path):
    """All images of a study have the same; a study without any is an error before training starts."""
    dataset = StudyDataset(studies, False, windows="all", labels=labels_of(tmp_path))
    rows = [[1, 0], [1, 0], *[[np.nan, 1]] * 3, [0, np.nan]]
    torch.testing.assert_close(torch.stack([dataset[i]["labels"] for i in range(6)]),
                               torch.tensor(rows, dtype=torch.float32), equal_nan=True)
    with pytest.raises(UserError, match="study b has no labels"):
        StudyDataset(studies, False, labels=labels_of(tmp_path, "a,1,0\nc,1,0\n"))


def test_items_depend_on_seed_epoch_and_index_alone(studies):
    """Not on the order of reading, or draws made elsewhere."""
    dataset = StudyDataset(studies, True, **AMOUNTS, patch_drop_rate=0.1, seed=3)
    dataset.set_epoch(2)
    torch.manual_seed(1)
    forward = [dataset[i] for i in range(4)]
    torch.manual_seed(2)
    assert all(equal_items(dataset[i], forward[i]) for i in reversed(range(4)))
    assert not equal_items(StudyDataset(studies, True, **AMOUNTS, seed=4)[0], forward[0])
    dataset.set_epoch(3)
    assert not equal_items(dataset[0], forward[0])


def test_workers_draw_the_same_as_no_workers_in_every_epoch(studies):
    """A run may be resumed on a machine with another number of workers; the epoch must reach them."""
    dataset = StudyDataset(studies, True, **AMOUNTS, windows="all")
    sampler = StudyAwareBatchSampler(dataset.groups(), 8, True, 0, 0, 1)
    epochs = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        none, two = (list(DataLoader(dataset, batch_sampler=sampler, collate_fn=ragged_collate,
                                     num_workers=workers)) for workers in (0, 2))
        assert len(none) == 1 and sorted(none[0]["study"]) == ["a", "b", "c"]
        for key in ("tokens", "coords", "cu_seqlens", "mode"):
            assert torch.equal(none[0][key], two[0][key])
        epochs.append(none[0]["cu_seqlens"])
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("windows", ["sample", "all"])
def test_a_bad_file_stops_or_is_replaced_from_its_own_study(studies, windows):
    """A stand-in of another study would bring its labels along; what was skipped is reported."""
    path = studies[0].series[1].folder / "t2.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadFile, match=f"^{path}: "):
        StudyDataset(studies, False, windows=windows)[1]
    dataset = StudyDataset(studies, False, windows=windows, on_bad_file="skip")
    assert equal_items(dataset[1], dataset[0]) and dataset[1]["bad_files"].startswith(f"{path}: ")
    assert dataset[0]["bad_files"] == ""


def test_where_a_whole_study_is_bad_the_next_one_stands_in(studies):
    """Past the end of the list too; and the search ends where nothing can be read."""
    (studies[2].series[0].folder / "t1.pt").unlink()
    dataset = StudyDataset(studies, False, windows="all", on_bad_file="skip")
    assert equal_items(dataset[5], dataset[0])
    for path in Path(studies[0].series[0].folder).parent.glob("*/*_mask.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 6 images"):
        dataset[1]


def test_an_image_of_background_alone_is_a_bad_file(studies, tmp_path):
    """A sequence of no tokens would make averages and softmaxes NaN."""
    empty = Study("z", "mri", (write_series(tmp_path, "z", "t1", size=(1, 1, 2), background=[0, 1]),))
    with pytest.raises(BadFile, match=f"^{tmp_path / 'z' / 't1'}: no token without background"):
        StudyDataset([empty], False)[0]
    item = StudyDataset([empty, *studies], True, on_bad_file="skip")[0]
    assert item["study"] == "a" and "no token" in item["bad_files"]


@pytest.mark.parametrize("words, message", [
    ({"window_probabilities": [0.5, 0.5]}, "STUDY_WINDOW_PROBABILITIES"),
    ({"window_probabilities": [1, 0.5, -0.5]}, "STUDY_WINDOW_PROBABILITIES"),
    ({"window_probabilities": [0, 0, 0]}, "STUDY_WINDOW_PROBABILITIES"),
    ({"max_crop_size": [20, 20]}, "STUDY_MAX_CROP"), ({"max_crop_size": [20, 0, 20]}, "STUDY_MAX_CROP"),
    ({"patch_drop_rate": 1.0}, "patch drop rate"), ({"patch_drop_rate": -0.1}, "patch drop rate"),
    ({"on_bad_file": "skipp"}, "ON_BAD_FILE")])
def test_arguments_that_make_no_sense_are_refused(studies, words, message):
    """Before training starts, naming the constant."""
    with pytest.raises(UserError, match=message):
        StudyDataset(studies, True, **words)


def test_a_dataset_of_nothing_is_an_error(studies):
    """Training on nothing must not look like training; nor does a mistyped word choose a default."""
    with pytest.raises(UserError, match="no series"):
        StudyDataset([], True)
    with pytest.raises(ValueError, match="sample, all"):
        StudyDataset(studies, True, windows="every")


def test_a_batch_is_its_items_one_behind_the_other(studies, tmp_path):
    """Against a loop over the items: where series and studies begin, and what belongs to whom."""
    block = VolumeBlockMask({"mri": 0.7, "ct": 0.75}, {"mri": 0.25, "ct": 0.2})
    dataset = StudyDataset(studies, True, windows="all", mask=block, labels=labels_of(tmp_path))
    items = [dataset[i] for i in (5, 0, 1, 2, 3, 4)]
    batch = ragged_collate(items)
    starts = batch["cu_seqlens"].tolist()
    assert starts[-1] == len(batch["tokens"]) == sum(len(item["tokens"]) for item in items)
    for i, item in enumerate(items):
        for key in ("tokens", "coords", "foreground", "context", "target"):
            assert torch.equal(batch[key][starts[i]:starts[i + 1]], item[key])
        assert batch["mode"][i] == item["mode"] and torch.equal(batch["size"][i], item["size"])
        study = batch["series_study"][i]
        assert batch["study"][study] == item["study"] and batch["series"][i] == item["series"]
        torch.testing.assert_close(batch["labels"][study], item["labels"], equal_nan=True)
    assert batch["study"] == ["c", "a", "b"] and batch["labels"].shape == (3, 2)
    assert batch["study_cu_seqlens"].tolist() == [starts[i] for i in (0, 1, 3, 6)]
    assert batch["cu_seqlens"].dtype == batch["study_cu_seqlens"].dtype == torch.int32
    single = ragged_collate([StudyDataset(studies, False)[0]])
    assert single["study_cu_seqlens"].tolist() == single["cu_seqlens"].tolist() == [0, 21]
    assert not {"labels", "context", "target"} & single.keys()


def named(names):
    return [Study(name, "mri", ()) for name in names]


@pytest.mark.parametrize("count", [3, 5, 200])
def test_a_study_is_in_one_split_and_stays_there(count):
    """Or validation becomes a test of memory; also when studies are added."""
    studies = named(f"s{i}" for i in range(count))
    splits = split_studies(studies, 0.2, 0.1)
    assert sorted(study.name for part in splits.values() for study in part) == sorted(s.name for s in studies)
    assert all(splits.values())
    if count == 200:
        fewer = split_studies(studies[:100], 0.2, 0.1)
        assert all({s.name for s in fewer[key]} <= {s.name for s in splits[key]} for key in splits)


def test_studies_of_a_patient_stay_together(tmp_path):
    """A test on the earlier scan of someone in training would measure memory."""
    studies, table = named(f"s{i}" for i in range(100)), tmp_path / "patients.csv"
    table.write_text("study_id,patient\n" + "".join(f"s{i},p{i // 3}\n" for i in range(100)))
    splits = split_studies(studies, 0.2, 0.2, None, table)
    homes = {key: {int(study.name[1:]) // 3 for study in part} for key, part in splits.items()}
    assert sum(map(len, homes.values())) == 34 and all(homes.values())
    for text, message in (("study_id\ns0\n", "columns study_id and patient"),
                          ("study_id,patient\ns0,p\ns1,\n", "no patient for study s1 .99 in all")):
        table.write_text(text)
        with pytest.raises(UserError, match=f"STUDY_PATIENTS .*{message}"):
            split_studies(studies, 0.2, 0.2, None, table)


def test_a_csv_decides_on_the_splits(tmp_path):
    """Its messages name the constant, the file and what is wrong."""
    path, studies = tmp_path / "split.csv", named("abc")
    for word in ("study", "study_id"):
        path.write_text(f"{word},split\nb,train\na,test\nc,val\nx,train\n")
        splits = split_studies(studies, 0.2, 0.1, path)
        assert {key: [s.name for s in part] for key, part in splits.items()} == \
            {"train": ["b"], "val": ["c"], "test": ["a"]}
    for rows, message in (("study,split\na,train\nb,val\n", "study c is missing"),
                          ("study,split\na,train\na,val\n", "line 3: a is already in train"),
                          ("study,split\na,training\n", 'line 2: "training"'),
                          ("study,split\na,train\nb,train\nc,train\n", "no study has the split val"),
                          ("study,split\na,train,x\n", "line 2: 3 cells under 2 columns"),
                          ("study,study,split\na,a,train\n", "same name"),
                          ("study;split\na;train\n", "its first line is: study;split .commas"),
                          ("patient,split\na,train\n", 'column "study_id" or "study"')):
        path.write_text(rows)
        with pytest.raises(UserError, match=message) as error:
            split_studies(studies, 0.2, 0.1, path)
        assert str(path) in str(error.value)
    path.write_text("study,patient\na,p\nb,p\nc,q\n")
    for rows in ("patient,split\np,train\nq,val\n", "study,split\na,train\nb,train\nc,val\n"):
        (tmp_path / "by.csv").write_text(rows)
        splits = split_studies(studies, 0.2, 0.1, tmp_path / "by.csv", path)
        assert [s.name for s in splits["train"]] == ["a", "b"] and [s.name for s in splits["val"]] == ["c"]
    (tmp_path / "by.csv").write_text("study,split\na,train\nb,val\nc,val\n")
    with pytest.raises(UserError, match="patient p is in train and val"):
        split_studies(studies, 0.2, 0.1, tmp_path / "by.csv", path)
    with pytest.raises(UserError, match="2 studies cannot fill.*STUDY_SPLIT_CSV"):
        split_studies(studies[:2], 0.2, 0.1)
    with pytest.raises(UserError, match="STUDY_VAL_FRACTION"):
        split_studies(studies, 0.9, 0.1)


def test_a_cache_of_real_files_becomes_batches(tmp_path):
    """From NIfTI files to tokens through the cache as it is written."""
    rng, grid = np.random.default_rng(0), np.linalg.norm(np.mgrid[-1:1:48j, -1:1:48j, -1:1:48j], axis=0)
    for study, offset in (("p1", 100), ("p2", 200)):
        (tmp_path / "raw" / study).mkdir(parents=True)
        head = np.where(grid < 0.9, offset + rng.normal(0, 9, grid.shape), 0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(head, np.eye(4)), tmp_path / "raw" / study / "t1.nii.gz")
    write_cache(tmp_path / "raw", tmp_path / "cache", None, 0, SETTINGS)
    dataset = StudyDataset(read_cache(tmp_path / "cache"), True, windows="all", **AMOUNTS)
    sampler = StudyAwareBatchSampler(dataset.groups(), 8, True, 0, 0, 1)
    (batch,) = DataLoader(dataset, batch_sampler=sampler, collate_fn=ragged_collate)
    assert sorted(batch["study"]) == ["p1", "p2"] and batch["foreground"].all()
    assert torch.isfinite(batch["tokens"]).all() and batch["tokens"].shape[1] == 1024
