"""Crops of volumes of electron microscopy: what an item holds, and how crops are drawn."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from datasets.connectomics import ConnectomicsDataset
from datasets.em_augment import EMAugment
from datasets.em_crops import FRAGMENT, NO_CLEFT, NOT_ANNOTATED, merge_labels
from datasets.em_files import intensity_range, open_volume
from datasets.em_labels import BOUNDARY, CLASSES, IGNORE, boundaries, instance_weights
from datasets.em_layouts import Source
from datasets.em_sources import find_sources
from datasets.samplers import item_generator
from utils.config import BadFile, UserError

REAL = Path(__file__).parents[2] / "shared/data/em"
SHAPE, PATCH = (14, 24, 28), (6, 12, 10)
NM = (30.0, 6.0, 6.0)
FILL = {"classes": IGNORE}


def blobs(seed, shape=SHAPE, count=12, dtype=np.uint64, ids=None):
    """Ids of the nearest of some random points, so that cells touch; about a fifth is 0."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (count, 3)) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    nearest = np.linalg.norm((grid[..., None, :] - points) * (3, 1, 1), axis=-1).argmin(-1)
    ids = np.arange(count) if ids is None else np.asarray(ids)
    return np.where(rng.random(count)[nearest] < 0.2, 0, ids[nearest]).astype(dtype)


@pytest.fixture
def make(tmp_path):
    """Source of arrays {word: labels}, on disk; keywords as of Source."""
    def call(name="v", dataset="table", shape=SHAPE, complete=None, raw=None, **words):
        labels = {word: words.pop(word) for word in CLASSES if word in words}
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            noise = np.random.default_rng(len(name)).integers(0, 255, shape).astype(np.uint8)
            file["raw"] = noise if raw is None else raw
            for word, array in labels.items():
                file[word] = array
        path = tmp_path / f"{name}.h5"
        volumes = {word: open_volume(path, word) for word in labels}
        return Source(name, dataset, open_volume(path, "raw"), volumes, words.pop("spacing_nm", NM),
                      frozenset(complete or labels), "train", **words)
    return call


def crops(sources, train=True, patch=PATCH, count=8, weights=None, **settings):
    return ConnectomicsDataset(sources, patch, train, count, weights or {}, **settings)


def place(item):
    """The box that the item says it was cut from."""
    return tuple(slice(*map(int, part.split(":"))) for part in item["case"].split()[2::2])


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key]
        for key in one)


def partition(instances):
    """The set of voxel sets of the instances: what they are, whatever their numbers."""
    return {frozenset(np.flatnonzero(instances == number)) for number in np.unique(instances) if number}


def naive_components(ids):
    """The same of the face-connected components of equal ids, by scipy, one id after the other."""
    found = set()
    for number in np.unique(ids[ids > 0]):
        parts, count = ndimage.label(ids == number)
        found |= {frozenset(np.flatnonzero(parts == part)) for part in range(1, count + 1)}
    return {voxels for voxels in found if len(voxels) >= FRAGMENT}


# ------------------------------------------------------------------------------------------ what is in it

def test_an_item_is_the_crop_that_it_says_it_is(make):
    """Built again voxel by voxel from the arrays: classes by their order, instances of every kind."""
    rng = np.random.default_rng(5)
    arrays = {"neuron": blobs(0), "mitochondrion": blobs(1, count=40) * (rng.random(SHAPE) < 0.9),
              "cleft": np.where(blobs(2, count=60) % 7 == 3, blobs(2, count=60), NO_CLEFT)}
    arrays["mitochondrion"] *= arrays["mitochondrion"] % 5 == 1
    source = make(**arrays)
    with h5py.File(source.raw.path) as file:
        raw = file["raw"][:]
    low, high = intensity_range(source.raw)
    dataset = crops([source])
    for item in (dataset[i] for i in range(8)):
        box = place(item)
        image = np.clip((raw[box] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(item["image"][0], image, atol=1e-6)
        neuron, cleft, mito = (arrays[word][box] for word in ("neuron", "cleft", "mitochondrion"))
        cleft = np.where(cleft == NO_CLEFT, 0, cleft)
        between = boundaries(neuron, NM)
        expected = np.zeros(PATCH, int)
        for voxel in np.ndindex(*PATCH):
            expected[voxel] = (3 if mito[voxel] else 2 if cleft[voxel] else 4 if between[voxel] else
                               1 if neuron[voxel] else 0)
        np.testing.assert_array_equal(item["classes"], expected)
        kind = np.where(mito > 0, 3, np.where(cleft > 0, 2, np.where(neuron > 0, 1, 0)))
        merged = np.where(mito > 0, mito + 1000, np.where(cleft > 0, cleft + 2000, neuron)).astype(int)
        instances = item["instances"].numpy()
        assert partition(instances) == naive_components(merged)
        assert sorted(np.unique(instances[instances > 0])) == list(range(1, instances.max() + 1))
        np.testing.assert_array_equal(item["instance_class"], np.where(instances > 0, kind, 0))
        np.testing.assert_array_equal(item["weight"], instance_weights(instances, NM))
    types = {key: (value.dtype, tuple(value.shape)) for key, value in item.items() if torch.is_tensor(value)}
    assert types == {"image": (torch.float32, (1, *PATCH)), "classes": (torch.int64, PATCH),
                     "instances": (torch.int32, PATCH), "instance_class": (torch.int64, PATCH),
                     "weight": (torch.float32, PATCH), "meaning": (torch.bool, (5, 5)),
                     "spacing_nm": (torch.float32, (3,))}
    assert item["spacing_nm"].tolist() == list(NM) and item["bad_files"] == ""
    assert torch.equal(item["meaning"], torch.from_numpy(source.meaning))


def test_a_neurite_that_a_crop_cuts_in_two_is_two_instances(make):
    """A U: nothing in the crop tells that its arms are one, so pulling them together teaches nonsense."""
    neuron = np.zeros((8, 8, 20), np.uint16)
    neuron[:, :, 2:6] = neuron[:, :, 14:18] = neuron[7, :, 2:18] = 9
    source = make(neuron=neuron, shape=neuron.shape)
    [whole] = crops([source], False, (8, 8, 20))
    assert whole["instances"].max() == 1
    [item] = crops([replace(source, sections=(0, 7))], False, (7, 8, 20))
    assert item["instances"].max() == 2 and (item["instances"] > 0).sum() == 7 * 8 * 8


def test_mitochondria_given_as_one_class_are_many_instances(make):
    """The original took all mitochondria of a volume for one object."""
    codes = np.zeros((6, 16, 30), np.uint8)
    codes[:, 3:9, 3:9] = codes[:, 3:9, 10:20] = 2               # two with a common wall, and one elsewhere
    codes[:, 4:8, 4:9] = codes[:, 4:8, 11:19] = codes[:, 12:15, 22:28] = 1
    codes[:, 3:9, 9] = 2
    source = make(mitochondrion=codes, boundary=codes, shape=codes.shape, complete=["mitochondrion"],
                  codes={"mitochondrion": 1, "boundary": 2})
    [item] = crops([source], False, codes.shape)
    classes, instances = item["classes"].numpy(), item["instances"].numpy()
    np.testing.assert_array_equal(classes, np.choose(codes, [0, 3, BOUNDARY]))
    assert instances.max() == 3
    np.testing.assert_array_equal(instances > 0, codes > 0)                    # walls belong to the nearest
    first, second = instances[0, 5, 5], instances[0, 5, 15]
    assert first != second
    assert (instances[:, 3:9, 3:9] == first).all() and (instances[:, 3:9, 11:20] == second).all()
    assert (item["instance_class"][item["instances"] > 0] == 3).all()


def test_a_code_without_a_name_is_a_bad_file(make):
    """Ids in a file that should hold 0, 1, 2 would be left out in silence."""
    codes = np.full((6, 8, 8), 3, np.uint8)
    source = make(mitochondrion=codes, shape=codes.shape, codes={"mitochondrion": 1, "ignore": 2})
    with pytest.raises(BadFile, match="^.*v.h5: label 3"):
        crops([source])[0]


@pytest.mark.parametrize("zero, value", [("background", 0), ("boundary", BOUNDARY), ("ignore", IGNORE)])
def test_zero_of_the_neurons_means_what_the_source_says(make, zero, value):
    """Membrane in one data set, not looked at in another."""
    neuron = blobs(3)
    source = make(neuron=neuron, zero=zero, complete=["neuron", "boundary"] if zero == "boundary" else None)
    classes, instances, _ = merge_labels(source, tuple(map(slice, (0, 0, 0), SHAPE)), False)
    assert (classes[neuron == 0] == value).all() and (classes[neuron > 0] == 1).all()
    assert (instances[neuron == 0] == 0).all()
    drawn = merge_labels(source, tuple(map(slice, (0, 0, 0), SHAPE)), True)[0]
    if zero == "boundary":                                       # drawn by hand: not made thicker
        np.testing.assert_array_equal(drawn, classes)
    if zero == "ignore":
        assert (drawn[neuron == 0] == IGNORE).all()
        near = ndimage.binary_dilation(neuron == 0, np.ones((3, 3, 3)))
        assert (drawn == BOUNDARY).any() and not (drawn[near] == BOUNDARY).any()


def test_what_nobody_has_looked_at_is_ignored(make):
    """CREMI writes huge ids there; as neurons they would be one giant cell."""
    neuron, mito = blobs(4, ids=[2 ** 63 - 1 - i for i in range(12)]), np.zeros(SHAPE, np.uint8)
    neuron[:4] = NOT_ANNOTATED + 7
    neuron[4:6] = 2 ** 64 - 3
    mito[2, 4:8, 4:8] = 1
    [item] = crops([make(neuron=neuron, mitochondrion=mito)], False, SHAPE)
    known = item["classes"] != IGNORE
    assert not known[:6][torch.from_numpy(mito[:6] == 0)].any() and (item["classes"][2, 4:8, 4:8] == 3).all()
    assert (item["instances"][~known] == 0).all() and known[7:].all()
    ids = np.where(mito > 0, 1, np.where(known, neuron, 0))
    assert partition(item["instances"].numpy()) == naive_components(ids)


def test_ids_of_64_bits_stay_apart(make):
    """2 ** 62 and 2 ** 62 + 1 are the same float, and 1 and 2 ** 32 + 1 the same int32."""
    neuron = np.zeros((4, 8, 16), np.uint64)
    for i, number in enumerate((2 ** 62, 2 ** 62 + 1, 1, 2 ** 32 + 1)):
        neuron[:, :, 4 * i:4 * i + 4] = number
    source = make(neuron=neuron, mitochondrion=(neuron == 1) * neuron, shape=neuron.shape)
    [item] = crops([source], False, neuron.shape)
    assert item["instances"][0, 0].unique().tolist() == [1, 2, 3, 4]
    assert item["instance_class"][0, 0, ::4].tolist() == [1, 1, 3, 1]


@pytest.mark.parametrize("labels, message", [(np.full(SHAPE, 1.5, np.float32), "no whole number"),
                                             (np.full(SHAPE, -1, np.int64), "below 0"),
                                             (np.full(SHAPE, 1e30), "no whole number")])
def test_labels_that_are_no_ids_are_bad_files(make, labels, message):
    """Rounding them would invent objects."""
    with pytest.raises(BadFile, match=f"^.*v.h5: label .*{message}"):
        crops([make(neuron=labels)])[0]
    crops([make(neuron=blobs(0, dtype=np.float32))])[0]          # whole numbers as floats are ids


# ------------------------------------------------------------------------------------------------ padding

@pytest.mark.parametrize("patch", [(20, 12, 40), (14, 60, 28), (30, 50, 60)])
def test_padding_is_never_learned_from(make, patch):
    """A volume smaller than the patch is mirrored, but mirrored neurites have no labels."""
    item = crops([make(neuron=blobs(0))], patch=patch)[0]
    box = place(item)
    inside = torch.zeros(patch, dtype=torch.bool)
    inside[tuple(slice(part.stop - part.start) for part in box)] = True
    assert item["image"].shape == (1, *patch) and (item["image"][0][~inside] > 0).any()
    assert (item["classes"][~inside] == IGNORE).all() and (item["instances"][~inside] == 0).all()
    assert (item["classes"][inside] != IGNORE).all() and (item["instance_class"][~inside] == 0).all()
    unpadded = item["image"][0][tuple(slice(part.stop - part.start) for part in box)]
    np.testing.assert_array_equal(item["image"][0], np.pad(unpadded, [
        (0, n - m) for n, m in zip(patch, unpadded.shape, strict=True)], mode="reflect"))


# ---------------------------------------------------------------------------------------------- the draws

def test_an_item_depends_on_seed_epoch_and_index_alone(make):
    """Else a resumed run, or one with more workers, reads something else."""
    source, augment = make(neuron=blobs(0)), EMAugment(fill=FILL)
    dataset = crops([source], augment=augment, seed=3)
    dataset.set_epoch(2)
    first = [dataset[i] for i in range(8)]
    again = crops([source], augment=augment, seed=3, count=5, cache_rate=0.4)
    again.set_epoch(2)
    assert all(same(again[i], first[i]) for i in (4, 0, 2))
    for workers in (0, 2):
        for item, expected in zip(DataLoader(dataset, None, num_workers=workers), first, strict=True):
            assert same(item, expected)
    assert len({item["case"] for item in first}) > 1
    dataset.set_epoch(3)
    assert not same(dataset[0], first[0])
    other = crops([source], augment=augment, seed=4)
    other.set_epoch(2)
    assert not same(other[0], first[0])


def test_data_sets_are_drawn_by_weight_and_their_volumes_by_size(make):
    """A data set of many volumes must not drown a small one."""
    half = (7, 24, 28)
    sources = [make("a", "one", neuron=blobs(0)), make("b", "one", half, neuron=blobs(0, half)),
               make("c", "two", neuron=blobs(1)), make("d", "three", neuron=blobs(1))]
    weights = {"one": 1.5, "two": 0.5, "three": 0, "x": 9}
    dataset = crops(sources, patch=(1, 2, 2), count=500, weights=weights)
    drawn = Counter(dataset[i]["case"][0] for i in range(500))
    expected = {"a": 0.5, "b": 0.25, "c": 0.25}
    assert drawn.keys() == expected.keys()
    for name, share in expected.items():
        assert abs(drawn[name] / 500 - share) < 4 * np.sqrt(share * (1 - share) / 500)


def test_places_are_uniform_and_reach_the_borders(make):
    """The last section and row are as likely to begin or end a crop as any other."""
    dataset = crops([make(neuron=blobs(0), sections=(2, 9))], patch=(6, 22, 27), count=300)
    boxes = [place(dataset[i]) for i in range(300)]
    for axis, starts in enumerate(([2, 3], [0, 1, 2], [0, 1])):
        counts = Counter(box[axis].start for box in boxes)
        assert sorted(counts) == starts
        assert all(abs(n - 300 / len(starts)) < 4 * np.sqrt(300 / len(starts)) for n in counts.values())


def test_training_never_leaves_its_sections(make):
    """The other sections are for validation."""
    source = make(neuron=blobs(0), sections=(3, 8))
    for train in (True, False):
        dataset = crops([source], train, (4, 12, 12), 30)
        assert all(3 <= place(item)[0].start < place(item)[0].stop <= 8 for item in dataset)


def test_a_crop_without_labels_is_drawn_again(make):
    """Of a volume annotated in one corner nearly all crops would teach nothing."""
    neuron = np.full(SHAPE, NOT_ANNOTATED, np.uint64)
    neuron[:5, :9, :10] = 4
    dataset = crops([make(neuron=neuron)], patch=(3, 6, 6), count=40)
    taken = [bool((item["classes"] != IGNORE).any()) for item in dataset]
    first = [bool((neuron[dataset.draw(item_generator(0, 0, i))[1]] == 4).any()) for i in range(40)]
    assert sum(first) < 20 and sum(taken) >= 39
    [empty] = crops([make("e", neuron=np.full(SHAPE, NOT_ANNOTATED, np.uint64))], count=1)   # and it ends
    assert (empty["classes"] == IGNORE).all()


# --------------------------------------------------------------------------------------------- validation

@pytest.mark.parametrize("patch", [(6, 12, 10), (14, 24, 28), (5, 7, 9), (20, 24, 5)])
def test_validation_windows_cover_every_section_once_enough(make, patch):
    """What no window covers is not validated."""
    source = make(neuron=blobs(0), sections=(2, 13))
    dataset = crops([source], False, patch, 1000, augment=EMAugment(missing=1, fill=FILL))
    seen = np.zeros(SHAPE, int)
    for item in dataset:
        seen[place(item)] += 1
    assert (seen[2:13] > 0).all() and seen[:2].sum() == seen[13:].sum() == 0
    assert len(dataset) == np.prod([-(-n // size) for n, size in zip((11, 24, 28), patch, strict=True)])
    before = [dataset[i] for i in range(len(dataset))]
    dataset.set_epoch(7)
    assert all(same(dataset[i], before[i]) for i in range(len(dataset)))                     # nor augmented
    assert (before[0]["weight"] > 1).any()


def test_too_many_windows_are_thinned_evenly(make):
    """Every volume has its say, and the windows come from all over it."""
    small = (6, 12, 20)
    sources = [make("a", neuron=blobs(0)), make("b", neuron=blobs(0, small), shape=small)]
    dataset = crops(sources, False, (2, 4, 4), 60)                                      # of 7*6*7 and 3*3*5
    boxes = {"a": [], "b": []}
    for item in dataset:
        boxes[item["case"][0]].append(place(item))
    assert [len(boxes[name]) for name in "ab"] == [30, 30]
    assert all(len(set(map(str, each))) == len(each) for each in boxes.values())
    assert len(crops(sources, False, (2, 4, 4), 200)) == 200
    assert len(crops(sources, False, (2, 4, 4), 100000)) == 7 * 6 * 7 + 3 * 3 * 5
    for axis in range(3):
        assert len({box[axis].start for box in boxes["a"]}) >= 5               # not one column of them


# ------------------------------------------------------------------------------------------------- slices

@pytest.mark.parametrize("patch", [(12, 10), (6, 12, 10)])
def test_slices_are_sections_of_the_volume(make, patch):
    """Vista2D: the same labels, one section thick, and components within the section."""
    neuron = blobs(0)
    source = make(neuron=neuron)
    dataset = crops([source], patch=patch, slices=True, augment=EMAugment(fill=FILL))
    assert {tuple(item["image"].shape) for item in dataset} == {(1, 12, 10)}
    plain = crops([source], patch=patch, slices=True, edge=1, bone=1)
    assert len({place(item)[0].start for item in plain}) > 3
    for item in plain:
        assert {tuple(item[key].shape) for key in ("classes", "instances", "instance_class", "weight")} == {
            (12, 10)}
        assert partition(item["instances"].numpy()) == naive_components(neuron[place(item)][0])
        assert item["spacing_nm"].tolist() == list(NM) and (item["weight"] == 1).all()
    assert len(crops([source], False, patch, 1000, slices=True)) == 14 * 2 * 3


# ------------------------------------------------------------------------------------------- augmentation

class Cut:
    """An augmentation that takes the middle section from image and labels, and calls the first one lost."""

    fill = FILL

    def __call__(self, image, labels, spacing_nm, generator):
        assert image.dtype == np.float32 and spacing_nm == NM and isinstance(generator, torch.Generator)
        labels["classes"][3], labels["instances"][3] = 0, 0
        image[0] = 0
        return image, labels, np.arange(len(image)) == 0


def test_instances_are_labelled_again_after_the_augmentation(make):
    """A deformation can cut a neurite.  A section without image keeps its labels: others show them."""
    neuron = np.ones((7, 8, 8), np.uint8)
    [item] = crops([make(neuron=neuron, shape=neuron.shape)], patch=neuron.shape, count=1, augment=Cut())
    assert item["instances"].max() == 2 and (item["instances"][0] == item["instances"][2]).all()
    assert (item["instances"][0] > 0).all() and (item["classes"][0] == 1).all()
    assert (item["image"][0, 0] == 0).all()


def test_what_the_augmentation_mirrors_in_is_ignored(make):
    """There is image beyond the crop only because it is mirrored; a turn brings it in."""
    source = make(neuron=np.ones(SHAPE, np.uint8))
    augment = EMAugment(flip=0, rotate=1, elastic=0, shift=0, missing=0, fill=FILL)
    items = list(crops([source], augment=augment))
    ignored = torch.stack([item["classes"] == IGNORE for item in items])
    assert 0 < ignored.float().mean() < 0.3
    assert not torch.stack([item["instances"] for item in items])[ignored].any()
    with pytest.raises(ValueError, match="fill"):
        crops([source], augment=EMAugment())


# ------------------------------------------------------------------------------------- memory and bad files

@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0])
def test_what_is_kept_in_memory_is_what_the_files_hold(make, rate):
    """cache_rate changes the time, never an item; at 1 the files are not read again."""
    arrays = {"neuron": blobs(0), "mitochondrion": (blobs(1) == 3).astype(np.uint8)}
    sources = [make("a", sections=(3, 12), **arrays), make("b", **arrays)]
    expected = list(crops(sources))
    dataset = crops(sources, cache_rate=rate)
    assert all(map(same, dataset, expected))
    volumes = [volume for source in dataset.sources for volume in (source.raw, *source.labels.values())]
    kept = sum(volume.sections.nbytes for volume in volumes if hasattr(volume, "sections"))
    whole = (9 + 14) * 24 * 28 * (1 + 8 + 1)
    assert whole * rate - 14 * 24 * 28 * 8 < kept <= whole * rate
    if rate == 1:
        for source in sources:
            Path(source.raw.path).unlink()
        assert all(map(same, dataset, expected))


def test_a_bad_volume_stops_or_is_skipped_and_named(make):
    """NaN in one section must not be trained on, nor end a run that says skip."""
    raw = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    raw[5, 3, 3] = np.nan
    sources = [make("good", neuron=blobs(0)), make("bad", raw=raw, neuron=blobs(0))]
    for rate in (0.0, 1.0):
        with pytest.raises(BadFile, match="^.*bad.h5"):
            list(crops(sources, patch=SHAPE, cache_rate=rate))
        items = list(crops(sources, patch=SHAPE, on_bad_file="skip", cache_rate=rate))
        assert {item["case"].split()[0] for item in items} == {"good"} and len(items) == 8
        assert any("bad.h5" in item["bad_files"] for item in items)
    with pytest.raises(UserError, match="none of the 8 crops.*bad.h5"):
        crops(sources[1:], patch=SHAPE, on_bad_file="skip")[0]
    labels = make("labels", neuron=blobs(0, dtype=np.float32) + np.float32(0.5))
    items = list(crops([sources[0], labels], on_bad_file="skip"))
    assert any("labels.h5: label" in item["bad_files"] for item in items)


@pytest.mark.parametrize("settings, name", [
    ({"patch": (4, 4)}, "VISTA_PATCH_SIZE"), ({"patch": (4, 0, 4)}, "VISTA_PATCH_SIZE"),
    ({"count": 0}, "VISTA_CROPS_PER_EPOCH"), ({"cache_rate": 1.5}, "VISTA_CACHE_RATE"),
    ({"weights": {"table": 0}}, "VISTA_DATASET_WEIGHTS"),
    ({"weights": {"table": 1, "x": -1}}, "VISTA_DATASET_WEIGHTS"),
    ({"on_bad_file": "ignore"}, "ON_BAD_FILE")])
def test_settings_that_make_no_sense_are_refused(make, settings, name):
    """Before the first epoch, by the constant's name."""
    with pytest.raises(UserError, match=name):
        crops([make(neuron=blobs(0))], **settings)
    with pytest.raises(UserError, match="no volumes"):
        crops([])


def test_it_says_what_it_takes_crops_from(make):
    """For the run's record."""
    sources = [make("a", "fly", neuron=blobs(0), sections=(2, 6)), make("b", "fly", neuron=blobs(0)),
               make("c", "rat", neuron=blobs(0))]
    assert crops(sources).describe() == {"fly": {"volumes": 2, "sections": 18, "voxels": 18 * 24 * 28},
                                         "rat": {"volumes": 1, "sections": 14, "voxels": 14 * 24 * 28}}


# --------------------------------------------------------------------------------------------- real files

@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_published_volumes_give_crops_that_make_sense(tmp_path):
    """Neurons in FIB-SEM, mitochondria and membranes in a serial-section stack, cells in 2D images."""
    fib, vnc = REAL / "fib25_sample2", REAL / "vnc_sstem/vnc_stack1.h5"
    (tmp_path / "volumes.csv").write_text(
        "volume,raw,neuron,mitochondrion,boundary,dataset,spacing_nm,zero\n"
        f"fib25,{fib}/fib25_inputs.h5,{fib}/fib25_labels.h5,,,a,,\n"
        f"vnc,{vnc}:raw,,{vnc}:mito_instances,{vnc}:membranes,b,,\n"
        f"isbi,{REAL}/isbi2012_png/image,{REAL}/isbi2012_png/label,,,c,50x4x4,boundary\n"
        f"gala,{REAL}/gala_crop/gala_train.h5:volumes/raw,"
        f"{REAL}/gala_crop/gala_train.h5:volumes/labels/neuron_ids,,,d,,\n")
    sources = find_sources(tmp_path, [], 0.2, 0, 2)
    seen = {}
    for train in (True, False):
        chosen = [source for source in sources if (source.split == "train") == train]
        stacks = [source for source in chosen if source.name != "isbi"]
        cells = [source for source in chosen if source.name == "isbi"]
        augment = EMAugment(fill=FILL)
        for item in (*crops(stacks, train, (16, 64, 64), augment=augment),
                     *crops(cells, train, (128, 128), 2, slices=True, augment=augment)):
            found = seen.setdefault(item["case"].split()[0], set())
            found |= set(item["classes"].unique().tolist())
            assert 0.2 < item["image"].mean() < 0.9 and item["instances"].max() > 0 or "vnc" in item["case"]
    assert seen["fib25"] >= {1, 4} and 0 not in seen["fib25"] and seen["gala"] >= {1, 4}
    assert seen["vnc"] >= {0, 4} and 1 not in seen["vnc"] and seen["isbi"] >= {1, 4} and 0 not in seen["isbi"]
