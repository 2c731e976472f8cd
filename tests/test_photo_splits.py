"""Copies of a photograph share a group, and no group is divided between training, validation and test."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.fft import dctn

from datasets.demo_leaves import CLASSES, leaf, make_leaves
from datasets.photo_files import read_photo
from datasets.photo_splits import (
    close_pairs,
    deal,
    divided_groups,
    group_photos,
    name_group,
    perceptual_hashes,
    split_photos,
    write_splits,
)
from datasets.photos import Photo, find_photos
from utils.config import BadFile, UserError

REAL = Path(__file__).parents[2] / "shared" / "data" / "leaf"


def jpeg(image, quality):
    """The image after compression."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def crop(image, share, rng):
    """A window of that share of both sides, anywhere."""
    box = [int(side * share) for side in image.size]
    left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.size, box, strict=True))
    return image.crop((left, top, left + box[0], top + box[1]))


COPIES = {
    "mirrored": lambda image, rng: ImageOps.mirror(image),
    "upside down": lambda image, rng: ImageOps.flip(image),
    "turned": lambda image, rng: image.transpose(Image.Transpose.ROTATE_90),
    "transposed": lambda image, rng: image.transpose(Image.Transpose.TRANSPOSE),
    "cropped": lambda image, rng: crop(image, 0.95, rng),
    "cropped more": lambda image, rng: crop(image, 0.9, rng),
    "lighter": lambda image, rng: ImageEnhance.Brightness(image).enhance(1.25),
    "darker": lambda image, rng: ImageEnhance.Brightness(image).enhance(0.7),
    "compressed": lambda image, rng: jpeg(image, 30),
    "smaller": lambda image, rng: image.resize((image.width // 2, image.height // 2)),
    "all": lambda image, rng: jpeg(ImageEnhance.Brightness(
        crop(ImageOps.mirror(image), 0.93, rng)).enhance(1.2), 50),
}


def hashes(images):
    """(crops [N, 10], turned [N, 8]) of PIL images."""
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    return [np.stack(part) for part in zip(*map(perceptual_hashes, tensors), strict=True)]


def recall(images, known, word, distance=8):
    """The share of images, whose hashes are known, that close_pairs joins with their copies."""
    rng = np.random.default_rng(0)
    copies = hashes([COPIES[word](image, rng) for image in images])
    crops, turned = (np.concatenate(both) for both in zip(known, copies, strict=True))
    found = {tuple(sorted(pair)) for pair in close_pairs(crops, turned, distance).tolist()}
    return np.mean([(number, number + len(images)) in found for number in range(len(images))])


@pytest.fixture(scope="module")
def made():
    """(sixty invented leaves, their hashes)."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(leaf(rng, CLASSES[number % 5], 96)) for number in range(60)]
    return images, hashes(images)


@pytest.fixture(scope="module")
def real():
    """(every eighth real leaf, 70 in all, their hashes)."""
    if not REAL.is_dir():
        pytest.skip("no ../shared/data/leaf")
    images = [Image.open(path).convert("RGB") for path in sorted(REAL.rglob("*.jpg"))[::8]]
    return images, hashes(images)


@pytest.mark.parametrize("word", COPIES)
def test_copies_of_invented_leaves_are_known(made, word):
    """What augmentation before the split does must not carry a photograph into another part."""
    assert recall(*made, word) >= 0.9


@pytest.mark.parametrize("word", COPIES)
def test_copies_of_real_leaves_are_known(real, word):
    """The same for real ones, which look more alike than most photographs do."""
    assert recall(*real, word) >= (0.9 if word == "cropped more" else 0.95)


def test_different_leaves_stay_apart(made, real):
    """Of 2,415 real and 1,770 invented pairs hardly one is joined; else all photographs become one group."""
    for _, known in (made, real):
        pairs = {tuple(sorted(pair)) for pair in close_pairs(*known, 8).tolist()}
        assert len(pairs) <= 1


def test_a_hash_is_the_signs_of_the_cosine_transform(made):
    """Against scipy's, of the picture and of its crops; and of the picture turned as numpy turns it."""
    square = np.array(made[0][0].convert("L").resize((100, 100)))
    crops, turned = perceptual_hashes(torch.from_numpy(square).expand(3, -1, -1))

    def signs(array):
        bits = (dctn(array.astype(float))[:8, :8] > 0).ravel()[1:]
        return sum(int(bit) << place for place, bit in enumerate(bits, start=1))

    starts = [(y, x) for y in (0, 4, 8) for x in (0, 4, 8)]
    assert crops.tolist() == [signs(square), *(signs(square[y:y + 92, x:x + 92]) for y, x in starts)]
    assert set(turned.tolist()) == {signs(np.rot90(side, n)) for side in (square, square.T) for n in range(4)}
    assert len(set(turned.tolist())) == 8


def test_close_pairs_equal_a_loop():
    """Python's integers, one pair at a time; across the blocks that are compared at once."""
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 2 ** 64, (130, 3), np.uint64)
    turned = rng.integers(0, 2 ** 64, (130, 2), np.uint64)
    expected = [[i, j] for i in range(130) for j in range(130) if i != j and min(
        (int(a) ^ int(b)).bit_count() for a in crops[i] for b in turned[j]) <= 20]
    assert len(expected) > 20
    assert close_pairs(crops, turned, 20).tolist() == expected


@pytest.mark.parametrize(("stem", "original"), [
    ("redrot_(1)_v", "redrot_(1)"), ("Leaf_12_aug3", "leaf_12"), ("leaf_12_flip_rot90", "leaf_12"),
    ("leaf 12 - copy", "leaf 12"), ("a1b2_new30degFlipLR", "a1b2"), ("a1b2_180deg", "a1b2"),
    ("img-7.hflip.brightness_2", "img-7"), ("IMG_3_rotated_90", "img_3"), ("leaf_mirror", "leaf"),
    ("rust_(12)", "rust_(12)"), ("rust (12)", "rust (12)"), ("leaf_crop_12", "leaf_crop_12"),
    ("red_rot_3", "red_rot_3"), ("leaf_12_3", "leaf_12_3"), ("aug_7", "aug_7"), ("crop", "crop"),
    ("healthy_flip_3", "healthy_flip_3"), ("carrot_5", "carrot_5")])
def test_names_of_copies_lead_to_their_original(stem, original):
    """A number alone tells originals apart, so it is cut only from beside a word for a change."""
    assert name_group(stem) == original


def photos(names, label=0, **fields):
    """Photographs that are not on disk."""
    return [Photo(Path(name), name, label, **fields) for name in names]


def test_names_count_within_a_class_and_a_given_split():
    """Every folder may count from 1; a CSV's groups come before names."""
    found = [*photos(["a/1.jpg", "a/1_aug.jpg", "a/2.jpg"], 0), *photos(["b/1.jpg"], 1),
             *photos(["c/1_flip.jpg"], 0), *photos(["d/1.jpg"], 0, split="val"),
             *photos(["e/8.jpg", "e/9.jpg"], 0, group="plant"), *photos(["e/2_aug.jpg"], 0, group="other")]
    grouped, notes = group_photos(found, distance=-1)
    assert [photo.group for photo in grouped] == ["a/1.jpg", "a/1.jpg", "a/2.jpg", "b/1.jpg", "a/1.jpg",
                                                  "d/1.jpg", "e/8.jpg", "e/8.jpg", "e/2_aug.jpg"]
    assert notes == ["9 photographs in 6 groups; the largest has 3 (a/1.jpg)"]
    assert [photo.name for photo in grouped] == [photo.name for photo in found]


def test_looks_join_what_names_do_not(made, tmp_path):
    """Renamed copies, in other folders and classes; the distance decides, and workers do not matter."""
    images, _ = made
    for word, image in zip("abc", images, strict=False):
        (tmp_path / word).mkdir()
        image.save(tmp_path / word / "x.png")
    jpeg(ImageOps.mirror(images[0]), 40).save(tmp_path / "b" / "other.png")
    images[1].save(tmp_path / "c" / "again.png")
    found = find_photos(tmp_path, labelled=True)[0]
    for workers in (0, 1):
        groups = {photo.name: photo.group for photo in group_photos(found, workers=workers)[0]}
        assert groups == {"a/x.png": "a/x.png", "b/other.png": "a/x.png", "b/x.png": "b/x.png",
                          "c/again.png": "b/x.png", "c/x.png": "c/x.png"}
    groups = [photo.group for photo in group_photos(found, distance=-1)[0]]
    assert len(set(groups)) == 5
    assert len({photo.group for photo in group_photos(found, distance=63)[0]}) == 1


def test_a_bad_file_stops_grouping_or_is_grouped_by_name(made, tmp_path):
    """As ON_BAD_FILE says."""
    made[0][0].save(tmp_path / "1.png")
    (tmp_path / "1_aug.png").write_text("no picture")
    (tmp_path / "2.png").write_text("no picture")
    found = find_photos(tmp_path, labelled=False)[0]
    with pytest.raises(BadFile, match="png: cannot be read"):
        group_photos(found)
    grouped, _ = group_photos(found, on_bad_file="skip")
    assert [photo.group for photo in grouped] == ["1.png", "1.png", "2.png"]
    with pytest.raises(UserError, match="none of the 1 photographs"):
        group_photos(found[1:2], on_bad_file="skip")


def grouped(per_class, size=3):
    """Photographs of classes with so many groups each, of 1 to ``size`` members."""
    found = []
    for label, count in enumerate(per_class):
        for group in range(count):
            found += photos([f"{label}/{group}_{n}" for n in range(1 + group % size)], label,
                            group=f"{label}/{group}")
    return found


def test_groups_are_never_divided_and_classes_are_balanced():
    """Each class comes within one group of its fractions; everything is somewhere once."""
    found = grouped([40, 100, 13])
    splits = split_photos(found, ["a", "b", "c"], 0.2, 0.1)
    assert divided_groups(splits) == []
    assert Counter(photo.name for part in splits.values() for photo in part) == Counter(p.name for p in found)
    for label in range(3):
        total = sum(photo.label == label for photo in found)
        for split, fraction in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
            assert abs(sum(p.label == label for p in splits[split]) - fraction * total) <= 3, (label, split)


def test_the_seed_alone_decides():
    """Not the order of the photographs; another seed divides otherwise."""
    found, classes = grouped([30, 30]), ["a", "b"]
    first = split_photos(found, classes, 0.2, 0.2, seed=1)
    again = split_photos(found[::-1], classes, 0.2, 0.2, seed=1)
    other = split_photos(found, classes, 0.2, 0.2, seed=2)
    assert all(set(first[split]) == set(again[split]) for split in first)
    assert set(first["val"]) != set(other["val"])
    assert set(deal(found, {"train": 0.5, "val": 0.5, "test": 0.0}, 0).values()) == {"train", "val"}


def test_a_written_split_is_read_again(tmp_path):
    """The file decides over fractions and seed; a photograph it does not name is an error."""
    found = [*grouped([9, 9]), *photos(["none"], -1, group="none")]
    splits = split_photos(found, ["a", "b"], 0.3, 0.2)
    write_splits(tmp_path / "splits.csv", splits, ["a", "b"])
    assert split_photos(found, ["a", "b"], 0.1, 0.1, seed=9, path=tmp_path / "splits.csv") == splits
    assert [path.name for path in tmp_path.iterdir()] == ["splits.csv"]
    with pytest.raises(UserError, match=r"HVIT_SPLIT_CSV .*splits.csv: path new.jpg is missing"):
        split_photos([*found, *photos(["new.jpg"])], ["a", "b"], 0.3, 0.2, path=tmp_path / "splits.csv")


def test_given_splits_are_kept_and_what_they_divide_is_told():
    """Folders train, val, test count; without val a part of train becomes it, by groups."""
    given = [*photos(["t/1", "t/2", "t/3"], group="g", split="train"),
             *photos(["t/4", "t/5", "t/6"], group="h", split="train"),
             *photos(["e/1"], group="h", split="test")]
    splits = split_photos(given, ["a"], 0.0, 0.5)
    assert {split: [photo.name for photo in part] for split, part in splits.items()} == {
        "train": ["t/1", "t/2", "t/3", "t/4", "t/5", "t/6"], "val": [], "test": ["e/1"]}
    assert divided_groups(splits) == ["h"]
    splits = split_photos(given, ["a"], 0.4, 0.0)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [3, 3, 1]


def test_a_class_outside_training_is_named():
    """Nothing can be learned of it; and too few groups, or fractions without sense, are an error too."""
    given = [*photos(["a"], 0, split="train"), *photos(["b"], 1, split="val"),
             *photos(["c"], 1, split="test")]
    with pytest.raises(UserError, match="class rust is in val and test only"):
        split_photos(given, ["healthy", "rust"], 0.5, 0.0)
    with pytest.raises(UserError, match="no photograph is left for val: 1 groups"):
        split_photos(photos(["a", "b"], group="g"), ["healthy"], 0.2, 0.2)
    for fractions in ((0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(UserError, match="HVIT_VAL_FRACTION"):
            split_photos(given, ["healthy", "rust"], *fractions)


def test_the_demo_leaves_come_with_copies_that_stay_with_their_originals(tmp_path):
    """By name, and by looks when the names are taken away."""
    folder = make_leaves(tmp_path, 8, 64)
    found, classes, _ = find_photos(folder, labelled=True)
    by_name = [photo.group for photo in group_photos(found, distance=-1)[0]]
    assert len(found) == 50 and len(set(by_name)) == 40
    renamed = [Photo(photo.path, photo.name, photo.label, group=photo.name) for photo in found]
    by_looks = {photo.name: photo.group for photo in group_photos(renamed)[0]}
    copies = [name for name in by_looks if "_aug1" in name]
    joined = [by_looks[name] == by_looks[name.replace("_aug1", "")] for name in copies]
    assert len(copies) == 10 and np.mean(joined) >= 0.9
    splits = split_photos(group_photos(found)[0], classes, 0.2, 0.2)
    assert divided_groups(splits) == [] and all(splits.values())
    assert read_photo(found[0].path).shape[0] == 3
