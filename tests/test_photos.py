"""Photographs from folders and tables, and the squares that networks get of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from datasets.photo_augment import evaluation_view, normalise
from datasets.photo_files import read_photo
from datasets.photos import PhotoDataset, class_counts, find_photos, sample_weights, store_size
from utils.config import BadFile, UserError


def picture(path, seed=0, size=(40, 60)):
    """A smooth random colour image of (height, width) at a path, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(grid).resize(size[::-1], Image.Resampling.BILINEAR).save(path)
    return path


@pytest.fixture
def leaves(tmp_path):
    """Three photographs of each of two classes."""
    for number in range(6):
        picture(tmp_path / "leaves" / ("rust", "healthy")[number % 2] / f"l{number}.png", number,
                (40 + number, 60))
    return tmp_path / "leaves"


def labels(photos, classes):
    """{name: class name or None}."""
    return {photo.name: classes[photo.label] if photo.label >= 0 else None for photo in photos}


def test_the_class_is_the_folder(leaves):
    """Names in order, numbers by the sorted class names, nothing to report."""
    photos, classes, notes = find_photos(leaves, labelled=True)
    assert classes == ["healthy", "rust"] and notes == []
    assert [photo.name for photo in photos] == sorted(
        f"{('rust', 'healthy')[n % 2]}/l{n}.png" for n in range(6))
    assert all(name.startswith(word) for name, word in labels(photos, classes).items())
    assert all(photo.path == leaves / photo.name and photo.split == "" for photo in photos)


def test_splits_and_outer_folders_are_no_classes(tmp_path):
    """train, valid and test give the split; Original and Augmented beside each other give nothing."""
    for split in ("Train", "valid", "test"):
        picture(tmp_path / "a" / split / "rust" / "1.jpg")
        picture(tmp_path / "a" / split / "test" / "1.jpg")               # a class may be called test
    photos, classes, _ = find_photos(tmp_path / "a", labelled=True)
    assert classes == ["rust", "test"]
    assert {photo.name: photo.split for photo in photos}["Train/rust/1.jpg"] == "train"
    assert {photo.split for photo in photos if photo.name.startswith("valid")} == {"val"}


def test_an_original_and_an_augmented_folder_share_their_classes(tmp_path):
    """The layout of SAR-CLD-2024: the innermost folder is the class."""
    for outer in ("Original Dataset", "Augmented Dataset"):
        for word in ("rust", "healthy"):
            picture(tmp_path / outer / word / "1.jpg")
    photos, classes, _ = find_photos(tmp_path, labelled=True)
    assert classes == ["healthy", "rust"] and len(photos) == 4


def test_photographs_without_folders_have_no_class(tmp_path):
    """Enough for pretraining; a classifier is told what to do."""
    for name in ("a.jpg", "train/b.jpg", "train/rust/c.jpg"):
        picture(tmp_path / name)
    with pytest.raises(UserError, match="a.jpg has no split"):
        find_photos(tmp_path, labelled=False)
    (tmp_path / "a.jpg").unlink()
    photos, classes, _ = find_photos(tmp_path, labelled=False)
    assert labels(photos, classes) == {"train/b.jpg": None, "train/rust/c.jpg": "rust"}
    assert {photo.split for photo in photos} == {"train"}
    with pytest.raises(UserError, match=r"train/b.jpg has no class; put photographs into a folder per class"):
        find_photos(tmp_path, labelled=True)


def test_other_files_are_counted_and_hidden_ones_are_not(leaves):
    """A text file among the images is left out, and said to be."""
    for name in ("readme.txt", "rust/notes.TXT", ".DS_Store", ".cache/x.png"):
        (leaves / name).parent.mkdir(exist_ok=True)
        (leaves / name).write_text("text")
    photos, _, notes = find_photos(leaves, labelled=True)
    assert len(photos) == 6 and len(notes) == 1
    assert "2 files are no photographs and were left out: notes.TXT, readme.txt" in notes[0]


def test_folders_that_cannot_be_learned_from_are_refused(leaves, tmp_path):
    """Each in one line that names the folder or class."""
    (leaves / "empty").mkdir()
    with pytest.raises(UserError, match=r"leaves/empty: a class folder without photographs"):
        find_photos(leaves, labelled=True)
    assert len(find_photos(leaves, labelled=False)[0]) == 6
    (leaves / "empty" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"leaves/empty: a class folder without photographs"):
        find_photos(leaves, labelled=True)
    with pytest.raises(UserError, match="empty: holds no photograph"):
        find_photos(leaves / "empty", labelled=False)
    with pytest.raises(UserError, match="rust is the only class"):
        picture(tmp_path / "one" / "rust" / "a.jpg")
        find_photos(tmp_path / "one", labelled=True)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_photos(tmp_path / "nowhere", labelled=True)


def test_the_classes_of_a_checkpoint_are_kept(leaves):
    """Numbers must be those of the network that is evaluated; a class it does not know is named."""
    photos, classes, _ = find_photos(leaves, labelled=True, classes=["zebra", "rust", "healthy"])
    assert classes == ["zebra", "rust", "healthy"] and {photo.label for photo in photos} == {1, 2}
    with pytest.raises(UserError, match="rust is none of the 2 classes of the network; did you mean rusty"):
        find_photos(leaves, labelled=True, classes=["rusty", "healthy"])


def test_a_table_says_what_folders_do(leaves):
    """Columns path, label, group, split, spectral; paths below the CSV's folder."""
    np.save(leaves / "cube.npy", np.zeros((2, 4, 4), np.float32))
    (leaves / "all.csv").write_text(
        "path,label,group,split,spectral,note\nrust/l0.png,Rust,g1,train,cube.npy,x\n"
        "rust/l2.png,Rust,g1,validation,,\nhealthy/l1.png,fine,,Test,,\n")
    photos, classes, notes = find_photos(leaves / "all.csv", labelled=True)
    assert classes == ["Rust", "fine"] and notes == []
    assert [(p.name, p.label, p.group, p.split, p.spectral) for p in photos] == [
        ("healthy/l1.png", 1, "", "test", None), ("rust/l0.png", 0, "g1", "train", leaves / "cube.npy"),
        ("rust/l2.png", 0, "g1", "val", None)]


@pytest.mark.parametrize(("rows", "message"), [
    ("rust/l0.png,a,train\nrust/l9.png,a,train", "line 3: .*l9.png: no such file"),
    ("rust/l0.png,a,train\nrust/l0.png,b,train", "line 3: rust/l0.png stands in line 2 already"),
    ("rust/l0.png,a,exam", 'line 2: split "exam" is not one of'),
    ("rust/l0.png,a,train\nrust/l2.png,b,", "rust/l2.png has no split"),
    ("rust/l0.png,a,train\nrust/l2.png,,train", "rust/l2.png has no class"),
    (",a,train", "line 2: no path"), ("rust/l0.png,a", "line 2: 2 cells under 3 columns"),
    ("", "holds no photograph")])
def test_tables_with_mistakes_are_refused(leaves, rows, message):
    """The line stands in the message."""
    (leaves / "all.csv").write_text(f"path,label,split\n{rows}\n")
    with pytest.raises(UserError, match=message):
        find_photos(leaves / "all.csv", labelled=True)


def test_counts_and_weights_balance_the_classes(tmp_path):
    """n / (C x count): each class has the same sum, the mean is 1."""
    for number in range(5):
        picture(tmp_path / "common" / f"{number}.png")
    picture(tmp_path / "rare" / "0.png")
    photos, classes, _ = find_photos(tmp_path, labelled=True)
    weights = sample_weights(photos)
    assert class_counts(photos, 3).tolist() == [5, 1, 0]
    assert weights.tolist() == [6 / 10] * 5 + [6 / 2] and float(weights.mean()) == pytest.approx(1)
    assert PhotoDataset(photos, 32, train=True).describe(classes) == {
        "photographs": 6, "groups": 0, "classes": {"common": 5, "rare": 1}}


def test_items_are_the_documented_dicts(leaves):
    """Keys, types and sizes, also when collated."""
    photos, classes, _ = find_photos(leaves, labelled=True)
    batch = next(iter(DataLoader(PhotoDataset(photos, 32, train=True), batch_size=6)))
    assert set(batch) == {"image", "label", "seed", "case", "bad_files"}
    assert batch["image"].shape == (6, 3, 37, 37) and batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1] and batch["label"].dtype == torch.int64
    assert batch["seed"].dtype == torch.int64 and len(set(batch["seed"].tolist())) == 6
    assert batch["case"] == [photo.name for photo in photos] and batch["bad_files"] == [""] * 6


@pytest.mark.parametrize("size", [96, 128, 160, 224, 256, 257])
def test_the_evaluation_crop_of_a_stored_square_needs_no_resampling(size):
    """The crop of photo_augment and the room around it fit one another for every size."""
    images = torch.randint(0, 256, (1, 3, store_size(size), store_size(size)), dtype=torch.uint8)
    view, _ = evaluation_view(images, size)
    margin = (store_size(size) - size) // 2
    assert any(torch.allclose(view, normalise(images[:, :, a:a + size, b:b + size] / 255), atol=1e-5)
               for a in (margin, margin + 1) for b in (margin, margin + 1))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (20, 20), (300, 410)])
def test_validation_takes_the_middle_of_the_resized_photograph(tmp_path, shape):
    """Against the same steps by hand; the short side is whole, shapes are true."""
    path = picture(tmp_path / "a.png", size=shape)
    photos = find_photos(tmp_path, labelled=False)[0]
    side = store_size(32)
    height, width = (round(length * side / min(shape)) for length in shape)
    resized = F.resize(read_photo(path), [height, width], antialias=True)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    item = PhotoDataset(photos, 32, train=False)[0]["image"]
    assert torch.equal(item, resized[:, top:top + side, left:left + side])
    squashed = PhotoDataset(photos, 32, train=False, fit="squash")[0]["image"]
    assert torch.equal(squashed, F.resize(read_photo(path), [side, side], antialias=True))


def test_training_squares_lie_anywhere_along_the_long_side(tmp_path):
    """The ends of a leaf are seen too; each square is a part of the resized photograph."""
    path = picture(tmp_path / "a.png", size=(37, 60))
    data = PhotoDataset(find_photos(tmp_path, labelled=False)[0], 32, train=True)
    whole, places = read_photo(path), set()
    for epoch in range(300):
        data.set_epoch(epoch)
        item = data[0]["image"]
        places |= {left for left in range(24) if torch.equal(whole[:, :, left:left + 37], item)}
    assert places == set(range(24))


def test_an_item_depends_on_seed_epoch_and_index_alone(leaves):
    """Not on the cache, the order of reading or the number of workers."""
    photos = find_photos(leaves, labelled=True)[0]

    def read(order, **options):
        data = PhotoDataset(photos, 24, train=True, **{"seed": 1, **options})
        data.set_epoch(3)
        return {index: data[index] for index in order}

    first = read(range(6))
    for other in (read(reversed(range(6))), read(range(6), cache_rate=0.5), read(range(6), cache_rate=1)):
        assert all(torch.equal(first[n]["image"], other[n]["image"]) and first[n]["seed"] == other[n]["seed"]
                   for n in range(6))
    changed = read(range(6), seed=2)
    assert all(first[n]["seed"] != changed[n]["seed"] for n in range(6))
    with pytest.raises(IndexError):
        PhotoDataset(photos, 24, train=True)[6]


def test_the_cache_keeps_the_share_asked_for(leaves, monkeypatch):
    """Kept photographs are not read again; without a cache all are."""
    photos = find_photos(leaves, labelled=True)[0]
    read = []

    def counted(path, size):
        read.append(path)
        return read_photo(path, size)

    monkeypatch.setattr("datasets.photos.read_photo", counted)
    for rate, expected in ((0.0, 6), (0.5, 3), (1.0, 0)):
        data = PhotoDataset(photos, 24, train=True, cache_rate=rate)
        read.clear()
        assert len([data[index] for index in range(6)]) == 6
        assert len(read) == expected


def test_bad_files_stop_or_are_skipped_and_named(leaves):
    """With "skip" the next one stands in, with its own label."""
    photos, classes, _ = find_photos(leaves, labelled=True)
    photos[2].path.write_bytes(b"no picture")
    for rate in (0.0, 1.0):
        with pytest.raises(BadFile, match=photos[2].path.name):
            PhotoDataset(photos, 24, train=True, cache_rate=rate)[2]
        item = PhotoDataset(photos, 24, train=True, on_bad_file="skip", cache_rate=rate)[2]
        assert item["case"] == photos[3].name and item["label"] == 1
        assert item["bad_files"].startswith(str(photos[2].path))
    for photo in photos:
        photo.path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 6 photographs can be read"):
        PhotoDataset(photos, 24, train=True, on_bad_file="skip")[0]


def test_a_cube_is_cut_as_its_photograph(tmp_path):
    """Found by its name; three bands that hold the photograph's colours come out as the image does."""
    path = picture(tmp_path / "a.png", size=(48, 90))
    np.save(tmp_path / "a_spectral.npy", read_photo(path).numpy())
    photos = find_photos(tmp_path, labelled=False)[0]
    assert [photo.name for photo in photos] == ["a.png"] and photos[0].spectral is not None
    data = PhotoDataset(photos, 32, train=True, spectral_channels=3)
    for epoch in range(3):
        data.set_epoch(epoch)
        item = data[0]
        assert item["spectral"].dtype == torch.float32 and item["spectral"].shape == item["image"].shape
        assert (item["spectral"] * 255 - item["image"]).abs().max() <= 2
    assert "spectral" not in PhotoDataset(photos, 32, train=True)[0]
    with pytest.raises(BadFile, match="HVIT_SPECTRAL_CHANNELS = 5 bands"):
        PhotoDataset(photos, 32, train=True, spectral_channels=5)[0]
    picture(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"HVIT_SPECTRAL_CHANNELS = 3, but b.png has no spectral file"):
        PhotoDataset(find_photos(tmp_path, labelled=False)[0], 32, train=True, spectral_channels=3)


@pytest.mark.parametrize(("options", "message"), [
    ({"size": 4}, "4 pixels"), ({"fit": "pad"}, 'HVIT_FIT = "pad"'), ({"cache_rate": 2}, "HVIT_CACHE_RATE"),
    ({"on_bad_file": "x"}, "ON_BAD_FILE"), ({"photos": []}, "no photographs")])
def test_arguments_that_make_no_sense_are_refused(leaves, options, message):
    """In one line that names the constant."""
    photos = find_photos(leaves, labelled=True)[0]
    with pytest.raises(UserError, match=message):
        PhotoDataset(**{"photos": photos, "size": 24, "train": True, **options})
