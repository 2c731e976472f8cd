"""The invented leaves: whole folders, the same every time, with diseases that can be told apart."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from datasets import demo_leaves
from datasets.demo_leaves import CLASSES, leaf, make_leaves
from datasets.photos import find_photos
from utils.config import UserError

SIZE = (5, 64)                                       # photographs per class, pixels


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished set."""
    folder = tmp_path_factory.mktemp("leaves")
    assert make_leaves(folder, *SIZE) == folder / "images"
    return folder


def contents(folder):
    """{path below the folder: bytes}."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_classes_are_folders_of_photographs_with_copies(demo):
    """What find_photos reads, with nothing left over; every fourth photograph has a copy named after it."""
    photos, classes, notes = find_photos(demo / "images", labelled=True)
    assert classes == list(CLASSES) and notes == []
    assert [photo.name for photo in photos if photo.label == 3] == sorted(
        ["rust/rust_(4)_aug1.jpg", *(f"rust/rust_({n}).jpg" for n in range(1, 6))])
    sizes = [Image.open(photo.path).size for photo in photos if "_aug" not in photo.name]
    assert all(min(size) == 64 and max(size) <= 1.4 * 64 for size in sizes)
    assert len(set(sizes)) > 5 and json.loads((demo / "demo.json").read_text())["complete"]


def test_a_photograph_depends_on_seed_class_number_and_size_alone(demo, tmp_path):
    """Byte for byte the same in another folder, in a larger set and from another process."""
    make_leaves(tmp_path / "same", 6, 64, workers=1)
    same, first = contents(tmp_path / "same"), contents(demo)
    shared = [name for name in first if name.endswith(".jpg")]
    assert len(shared) == 30 and all(first[name] == same[name] for name in shared)
    make_leaves(tmp_path / "other", *SIZE, seed=1)
    other = contents(tmp_path / "other")
    assert all(first[name] != other[name] for name in shared)


def test_no_two_photographs_are_alike(demo):
    """A network must not be tested on what it was trained on; copies apart."""
    images = [np.asarray(Image.open(path).convert("L").resize((24, 24)), float).ravel()
              for path in sorted((demo / "images").rglob("*).jpg"))]
    flat = np.corrcoef(images) - np.eye(len(images))
    assert len(images) == 25 and flat.max() < 0.95


def colours(image):
    """Quantiles of green, and of red and blue beside it."""
    red, green, blue = image.reshape(-1, 3).astype(float).T
    return np.quantile([red - green, green, blue - green], np.linspace(0, 1, 9), axis=1).ravel()


def test_colours_tell_something_of_the_disease_but_not_all():
    """A set that colours alone solve would say nothing about networks, nor would one that nothing solves."""
    draws = [(label, number) for number in range(40) for label in range(5)]
    images = [leaf(np.random.default_rng([7, *draw]), CLASSES[draw[0]], 64) for draw in draws]
    truth = np.array([label for label, _ in draws])
    values = StandardScaler().fit_transform([colours(image) for image in images])
    model = LogisticRegression(max_iter=300).fit(values[:120], truth[:120])
    assert 0.3 < model.score(values[120:], truth[120:]) < 0.8


def test_a_finished_set_is_not_made_again(demo, monkeypatch):
    """The second call returns at once and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    monkeypatch.setattr(demo_leaves, "leaf", None)
    assert make_leaves(demo, *SIZE) == demo / "images"
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_an_interrupted_call_goes_on(demo, tmp_path, monkeypatch):
    """Whole classes are kept, half of one is made again; in the end all is as if nothing had happened."""
    made = []

    def interrupted(rng, word, size):
        made.append(word)
        if len(made) == 8:
            raise KeyboardInterrupt
        return leaf(rng, word, size)

    monkeypatch.setattr(demo_leaves, "leaf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_leaves(tmp_path / "demo", *SIZE)
    assert [path.name for path in (tmp_path / "demo/images").iterdir() if path.name[0] != "."] == ["healthy"]
    make_leaves(tmp_path / "demo", *SIZE)
    assert made == ["healthy"] * 5 + ["mosaic"] * 3 + [word for word in CLASSES[1:] for _ in range(5)]
    assert contents(tmp_path / "demo") == contents(demo)


def test_other_settings_other_files_and_too_small_sets_are_refused(demo, tmp_path):
    """Nothing is mixed, nothing of the user's is overwritten."""
    with pytest.raises(UserError, match="another per_class, seed"):
        make_leaves(demo, 6, 64, seed=1)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other things"):
        make_leaves(tmp_path, *SIZE)
    for settings in ((4, 64), (5, 63)):
        with pytest.raises(UserError, match="must be 5 and 64 at least"):
            make_leaves(tmp_path / "new", *settings)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
