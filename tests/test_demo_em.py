"""Demo volumes of electron microscopy: the published layouts, repeatability, runs that were cut short."""

import functools
import json
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from datasets import demo_em
from datasets.demo_em import LAYOUTS, mitochondrion_classes, write_em_demo
from datasets.em_phantom import tissue
from utils.config import UserError

SIZE = (8, 40)


@functools.cache
def block(shape, spacing, *seed):
    """The tissue of a volume, made once."""
    return tissue(shape, spacing, list(seed))


def cached_tissue(shape, spacing, seed):
    return block(shape, spacing, *seed)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_em, "tissue", cached_tissue)
        return write_em_demo(folder, SIZE, seed=0, workers=0)


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_the_published_sets(demo):
    """Names that guides and readers expect, and nothing else but the marker and the lock."""
    assert set(contents(demo)) == {
        "demo.json", ".lock", *(f"snemi3d/AC{n}_{kind}.h5" for n in (3, 4) for kind in ("inputs", "labels")),
        "cremi3d/sampleA.h5", "cremi3d/sampleB.h5", "mitoem2/Dataset001_demo/dataset.json",
        *(f"mitoem2/Dataset001_demo/{part}.nii.gz" for name in ("demo_a", "demo_b")
          for part in (f"imagesTr/{name}_0000", f"labelsTr/{name}"))}


def test_snemi3d_has_one_array_per_file(demo):
    """Key main; uint8 and ids."""
    for name in ("AC4", "AC3"):
        with h5py.File(demo / f"snemi3d/{name}_inputs.h5") as raw, \
                h5py.File(demo / f"snemi3d/{name}_labels.h5") as labels:
            assert list(raw) == list(labels) == ["main"]
            assert raw["main"].shape == labels["main"].shape == (8, 40, 40)
            assert raw["main"].dtype == np.uint8 and labels["main"].dtype == np.uint32
            assert labels["main"][()].max() > 3


def test_cremi_has_neurons_and_clefts_with_a_resolution(demo):
    """uint64 ids, all ones where there is no cleft, resolution z, y, x in nm on every array."""
    clefts = 0
    for name in ("sampleA", "sampleB"):
        with h5py.File(demo / f"cremi3d/{name}.h5") as file:
            raw, neurons = file["volumes/raw"], file["volumes/labels/neuron_ids"]
            cleft = file["volumes/labels/clefts"]
            assert raw.dtype == np.uint8 and neurons.dtype == cleft.dtype == np.uint64
            assert raw.shape == neurons.shape == cleft.shape == (8, 40, 40)
            assert all(tuple(item.attrs["resolution"]) == (40.0, 8.0, 8.0) for item in (raw, neurons, cleft))
            values = np.unique(cleft[()])
            assert values[-1] == 2 ** 64 - 1 and 0 not in values
            clefts += len(values) - 1
    assert clefts > 0


def test_mitoem_is_an_nnunet_folder(demo):
    """Classes 0, 1, 2 as dataset.json says; voxels measure 30 x 8 x 8 nm, written as x, y, z in microns."""
    folder = demo / "mitoem2" / "Dataset001_demo"
    about = json.loads((folder / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "mitochondrion": 1, "boundary": 2}
    assert about["channel_names"] == {"0": "EM"} and about["file_ending"] == ".nii.gz"
    images, labels = sorted((folder / "imagesTr").iterdir()), sorted((folder / "labelsTr").iterdir())
    assert about["numTraining"] == len(images) == len(labels) == 2
    for image, label in zip(map(nib.load, images), map(nib.load, labels), strict=True):
        assert image.shape == label.shape == (40, 40, 8)
        assert image.get_data_dtype() == label.get_data_dtype() == np.uint8
        assert np.allclose(image.header.get_zooms(), (0.008, 0.008, 0.03))
        assert image.header.get_xyzt_units()[0] == "micron" and np.allclose(image.affine, label.affine)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}
    assert any(2 in np.asanyarray(nib.load(label).dataobj) for label in labels)


def test_files_hold_the_tissue_with_its_axes_in_order(demo):
    """Image and labels of one file belong to one block; x, y, z of a NIfTI are its axes turned round."""
    truth = block((8, 40, 40), (30.0, 8.0, 8.0), 0, 4)
    folder = demo / "mitoem2" / "Dataset001_demo"
    raw = np.asanyarray(nib.load(folder / "imagesTr/demo_a_0000.nii.gz").dataobj)
    label = np.asanyarray(nib.load(folder / "labelsTr/demo_a.nii.gz").dataobj)
    assert np.array_equal(raw.T, truth["raw"])
    assert np.array_equal(label.T > 0, truth["mitochondria"] > 0)
    with h5py.File(demo / "cremi3d/sampleA.h5") as file:
        truth = block((8, 40, 40), (40.0, 8.0, 8.0), 0, 2)
        assert np.array_equal(file["volumes/labels/neuron_ids"], truth["neurons"])
        assert np.array_equal(file["volumes/labels/clefts"][()] != 2 ** 64 - 1, truth["clefts"] > 0)


def test_no_two_volumes_are_alike(demo):
    """A network must not be tested on what it was trained on."""
    images = []
    for path in (demo / "snemi3d").glob("*_inputs.h5"):
        with h5py.File(path) as file:
            images.append(file["main"][()])
    for path in (demo / "cremi3d").glob("*.h5"):
        with h5py.File(path) as file:
            images.append(file["volumes/raw"][()])
    images += [np.asanyarray(nib.load(path).dataobj).T for path in (demo / "mitoem2").rglob("imagesTr/*.gz")]
    flat = np.corrcoef([image.ravel() for image in images])
    assert len(images) == 6 and np.abs(flat - np.eye(6)).max() < 0.3


def test_boundaries_part_mitochondria_that_touch():
    """Against a loop over voxels: 2 where one of the eight neighbours in the section is another."""
    ids = np.zeros((2, 9, 12), np.uint32)
    ids[:, 1:8, 1:6], ids[:, 1:8, 6:11], ids[1, 0, 0] = 1, 2, 3
    expected = np.zeros(ids.shape, np.uint8)
    for z, y, x in np.argwhere(ids):
        window = ids[z, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2]
        expected[z, y, x] = 1 if (window == ids[z, y, x]).all() else 2
    assert np.array_equal(mitochondrion_classes(ids), expected)
    assert ndimage.label(expected == 1)[1] == 2


def test_a_finished_set_is_not_made_again(demo, monkeypatch):
    """The second call returns at once and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    monkeypatch.setattr(demo_em, "tissue", None)
    assert write_em_demo(demo, SIZE, seed=0, workers=0) == demo
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_an_interrupted_call_goes_on(demo, tmp_path, monkeypatch):
    """Whole folders are kept, half of one is made again; in the end all is as if nothing had happened."""
    made = []

    def interrupted(shape, spacing, seed):
        made.append(seed[1])
        if len(made) == 4:
            raise KeyboardInterrupt
        return cached_tissue(shape, spacing, seed)

    monkeypatch.setattr(demo_em, "tissue", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_em_demo(tmp_path / "demo", SIZE, seed=0, workers=0)
    assert not (tmp_path / "demo/cremi3d").exists()
    assert not json.loads((tmp_path / "demo/demo.json").read_text())["complete"]
    write_em_demo(tmp_path / "demo", SIZE, seed=0, workers=0)
    assert made == [0, 1, 2, 3, 2, 3, 4, 5]
    assert contents(tmp_path / "demo") == contents(demo)


def test_workers_change_nothing(demo, tmp_path):
    """Byte for byte the same from a process of its own."""
    shutil.copytree(demo, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo/mitoem2")
    marker = json.loads((demo / "demo.json").read_text())
    (tmp_path / "demo/demo.json").write_text(json.dumps({**marker, "complete": False}))
    write_em_demo(tmp_path / "demo", SIZE, seed=0, workers=1)
    assert contents(tmp_path / "demo") == contents(demo)


def test_other_settings_and_other_files_are_refused(demo, tmp_path):
    """Nothing is mixed, nothing of the user's is overwritten."""
    before = contents(demo)
    with pytest.raises(UserError, match="another size, seed"):
        write_em_demo(demo, (9, 40), seed=1)
    assert contents(demo) == before
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other things"):
        write_em_demo(tmp_path, SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", [(8,), (8, 31), (0, 64), (8, 40, 40)])
def test_a_size_that_shows_nothing_is_refused(tmp_path, size):
    """Before anything is written."""
    with pytest.raises(UserError, match="sections, pixels"):
        write_em_demo(tmp_path / "demo", size)
    assert not (tmp_path / "demo").exists()


def test_every_layout_writes_two_volumes():
    """The numbers of the volumes, which seed them, rely on it."""
    assert all(len(names) == 2 for _, _, names in LAYOUTS.values())
