"""Volumes are written in blocks, come back as they were, and are never taken for finished too early."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from datasets.em_files import open_volume
from datasets.em_outputs import Tiff
from datasets.em_writers import DTYPES, check_output, create_volume
from utils.config import UserError

ROOT = Path(__file__).parents[1]
SUFFIXES = (".h5", ".hdf5", ".hdf", ".tif", ".tiff", ".ome.tif", ".nii", ".nii.gz", ".zarr")
KINDS = (".h5", ".tif", ".nii", ".nii.gz", ".zarr")
SHAPE = (7, 30, 41)


def values(dtype, shape=SHAPE):
    """Random numbers over the whole range of a type."""
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write(path, voxels, spacing=(40, 4, 4), steps=(1, 3, 2, 1), **options):
    """Write an array in slabs of so many sections."""
    with create_volume(path, voxels.shape[-3:], voxels.dtype, spacing, **options) as writer:
        z = 0
        for step in steps:
            writer.append(voxels[..., z:z + step, :, :])
            z += step


def names(folder):
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_back(tmp_path, suffix, dtype):
    """Ids, probabilities and voxel sizes survive every kind of file, whatever the slabs."""
    voxels = values(dtype)
    for spacing in ((4.0, 4.0, 4.0), (40, 4.6, 3.25), (12.5, 0.7, 1500), None):
        path = tmp_path / f"new/folder/out{suffix}"
        write(path, voxels, spacing)
        volume = open_volume(path)
        assert volume.dtype == ("float32" if (dtype, suffix[:4]) == ("float16", ".nii") else dtype)
        assert volume.spacing_nm == spacing and names(path.parent) == [path.name]
        np.testing.assert_array_equal(volume[:], voxels)


def read_channels(path):
    """[C, D, H, W] by the library of the kind itself."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return file["probabilities"][:]
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as tif:
            assert tif.is_ome and "ZCYX" in tif.series[0].get_axes(squeeze=False)
            return tif.asarray(squeeze=False).reshape(SHAPE[0], -1, *SHAPE[1:]).swapaxes(0, 1)
    if path.suffix == ".nii":
        return np.asarray(nibabel.load(path).dataobj).transpose(3, 2, 1, 0)
    return zarr.open_array(path / "0", mode="r")[:]


@pytest.mark.parametrize("suffix", [".h5", ".tif", ".nii", ".zarr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_read_back_by_other_programs(tmp_path, suffix, channels):
    """Probabilities are for others to open; nothing but the libraries themselves is used to read them."""
    for dtype in ("float16", "float32", "uint8"):
        voxels = values(dtype, (channels, *SHAPE))
        write(tmp_path / f"a{suffix}", voxels, channels=channels, key="probabilities")
        np.testing.assert_array_equal(read_channels(tmp_path / f"a{suffix}"), voxels)


@pytest.mark.parametrize("suffix", KINDS)
def test_the_slabs_leave_no_trace(tmp_path, suffix, monkeypatch):
    """One slab, single sections, or slabs that end within chunks: the same voxels, chunk by chunk."""
    monkeypatch.setattr("datasets.em_outputs.CHUNK", (4, 16, 16))
    voxels = values("uint16", (23, 30, 41))
    for steps in ((23,), (1,) * 23, (5, 5, 5, 5, 3), (3, 9, 11), (4, 4, 8, 7), (0, 23, 0)):
        write(tmp_path / f"a{suffix}", voxels, steps=steps)
        np.testing.assert_array_equal(open_volume(tmp_path / f"a{suffix}")[:], voxels)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_file_takes_its_name_when_it_is_complete(tmp_path, suffix):
    """A run that is stopped, or forgets a section, leaves the older result as it was, and nothing else."""
    path, old, new = tmp_path / f"a{suffix}", values("uint16"), values("uint16")[::-1].copy()
    for stop in (KeyboardInterrupt, RuntimeError, ValueError):
        for older in (False, True):
            if older:
                write(path, old)
            with pytest.raises(stop), create_volume(path, SHAPE, "uint16", None) as writer:
                writer.append(new[:5])
                assert path.exists() == older
                if stop is not ValueError:                             # which finish() raises: 5 of 7
                    raise stop
            assert names(tmp_path) == [path.name] * older
            if older:
                np.testing.assert_array_equal(open_volume(path)[:], old)
                (remove_all(path) if path.is_dir() else path.unlink())
    write(path, old)
    left = tmp_path / f".a{suffix}.tmp"                                # by a run that was killed
    left.mkdir() if suffix == ".zarr" else left.write_bytes(b"half")
    write(path, new)
    np.testing.assert_array_equal(open_volume(path)[:], new)
    assert names(tmp_path) == [path.name]


def remove_all(folder):
    """A folder and its content."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


FULL_DISK = """
import resource, sys
import numpy as np
from datasets.em_writers import create_volume
from utils.config import UserError

voxels = np.random.default_rng(0).integers(0, 255, (16, 64, 64)).astype(np.uint8)
for suffix in (".h5", ".tif", ".nii", ".nii.gz", ".zarr"):
    for limit in (0, 100, 3000, 40_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with create_volume(sys.argv[1] + "/a" + suffix, voxels.shape, "uint8", (40, 4, 4)) as writer:
                for z in range(16):
                    writer.append(voxels[z:z + 1])
        except UserError as error:
            line = str(error)
            assert line.startswith(sys.argv[1] + "/a" + suffix + ": cannot be written: "), line
            assert "File too large" in line and "\\n" not in line, line
        else:
            raise SystemExit(f"{suffix} {limit}: nothing was raised")
"""


def test_a_full_disk_ends_in_one_line(tmp_path):
    """Wherever it strikes: at the header, in the middle, or when HDF5 writes at last what it held back.

    The size of files is limited in a process of its own, which HDF5 would end if it saw the error.
    """
    command = [sys.executable, "-c", FULL_DISK, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == []


def test_what_cannot_be_written_is_refused_early(tmp_path):
    """Before hours of work, and without touching what is there."""
    for name in ("a.raw", "a", "a.h5.gz", "a.npy"):
        with pytest.raises(UserError, match="cannot be written as"):
            check_output(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.nii\.gz: .*use \.nii"):
        check_output(tmp_path / "a.nii.gz", 5)
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "folder.tif")
    (tmp_path / "photos.zarr").mkdir()
    check_output(tmp_path / "photos.zarr")
    (tmp_path / "photos.zarr/dear.txt").write_text("x")
    (tmp_path / "file.zarr").write_text("x")
    for name in ("photos.zarr", "file.zarr"):
        with pytest.raises(UserError, match="not a Zarr store; it is not replaced"):
            check_output(tmp_path / name)
        with pytest.raises(UserError), create_volume(tmp_path / name, SHAPE, "uint8", None):
            pass
    with pytest.raises(UserError, match="is not a folder"):
        check_output(tmp_path / "file.zarr/out.h5")
    assert [check_output(tmp_path / f"new/A{suffix.upper()}", 3 if suffix != ".nii.gz" else None)
            for suffix in KINDS] == list(KINDS)
    assert names(tmp_path) == ["file.zarr", "folder.tif", "photos.zarr"]


def test_a_folder_without_write_permission_is_a_users_mistake(tmp_path, monkeypatch):
    """Tests may run as root, who may write anywhere: the system is asked, so its answer is faked."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="not a folder that you may write to"):
        check_output(tmp_path / "a.h5")
    monkeypatch.undo()

    def read_only(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", read_only)
    with pytest.raises(UserError, match=r"a\.tif: cannot be written: Read-only file system$"):
        write(tmp_path / "a.tif", values("uint8"))
    assert names(tmp_path) == []


def test_the_old_store_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    """A folder cannot be exchanged in one step; between the two an error may strike."""
    write(tmp_path / "a.zarr", values("uint8"))
    rename = __import__("os").rename

    def failing(source, target):
        if str(source).endswith("a.zarr.tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        write(tmp_path / "a.zarr", values("uint16"))
    assert names(tmp_path) == ["a.zarr"] and open_volume(tmp_path / "a.zarr").dtype == np.uint8


@pytest.mark.parametrize("arguments, words", [
    ((SHAPE, "uint64", None), "uint64"), ((SHAPE, "int32", None), "int32"),
    (((7, 30), "uint8", None), "shape"),
    (((7, 0, 4), "uint8", None), "shape"), ((SHAPE, "uint8", (4, 4)), "spacing_nm"),
    ((SHAPE, "uint8", (0, 4, 4)), "spacing_nm"), ((SHAPE, "uint8", (np.nan, 4, 4)), "spacing_nm"),
    ((SHAPE, "uint8", None, "/"), "key"), ((SHAPE, "uint8", None, "a", 0), "channels")])
def test_arguments_that_make_no_sense_are_errors(tmp_path, arguments, words):
    """They are mistakes of a script, and leave no file."""
    with pytest.raises(ValueError, match=words), create_volume(tmp_path / "a.h5", *arguments):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("block", [
    np.zeros((2, 30, 40), np.uint8), np.zeros((2, 30, 41), np.int64), np.zeros((30, 41), np.uint8),
    np.zeros((8, 30, 41), np.uint8), np.zeros((1, 2, 30, 41), np.uint8)])
def test_a_block_that_does_not_fit_is_an_error(tmp_path, block):
    """Neither cast nor broadcast: ids would be lost silently."""
    with pytest.raises(ValueError, match="is due|more than the 7"), \
            create_volume(tmp_path / "a.h5", SHAPE, "uint8", None) as writer:
        writer.append(block)
    assert names(tmp_path) == []


def test_files_are_chunked_and_compressed(tmp_path, monkeypatch):
    """Other programs look at parts of them; segmentations shrink many times."""
    monkeypatch.setattr("datasets.em_outputs.CHUNK", (4, 16, 16))
    voxels = np.repeat(values("uint32", (12, 6, 8)), 16, 1).repeat(16, 2)
    for suffix in KINDS:
        write(tmp_path / f"a{suffix}", voxels, steps=(12,))
    with h5py.File(tmp_path / "a.h5") as file:
        array = file["segmentation"]
        assert array.chunks == (4, 16, 16) and array.compression == "gzip"
        assert list(array.attrs["resolution"]) == [40, 4, 4]
    assert (tmp_path / "a.h5").stat().st_size < voxels.nbytes / 5
    for suffix in (".tif", ".nii.gz"):
        assert (tmp_path / f"a{suffix}").stat().st_size < voxels.nbytes / 5
    stored = sum(path.stat().st_size for path in (tmp_path / "a.zarr").rglob("*") if path.is_file())
    assert zarr.open_array(tmp_path / "a.zarr/0").chunks == (4, 16, 16) and stored < voxels.nbytes / 2


def test_ome_zarr_is_valid_0_4(tmp_path):
    """The fields that the specification demands: axes of known type, channels first, a scale per axis."""
    write(tmp_path / "a.zarr", values("uint8", (2, *SHAPE)), channels=2)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    (image,) = group.attrs["multiscales"]
    assert group.metadata.zarr_format == 2 and image["version"] == "0.4"
    assert [axis["name"] for axis in image["axes"]] == list("czyx")
    assert [axis["type"] for axis in image["axes"]] == ["channel", "space", "space", "space"]
    assert {axis.get("unit") for axis in image["axes"][1:]} == {"nanometer"}
    (level,) = image["datasets"]
    assert level["coordinateTransformations"] == [{"type": "scale", "scale": [1, 40, 4, 4]}]
    assert group[level["path"]].shape == (2, *SHAPE) and (tmp_path / "a.zarr/0/0/0/0/0").is_file()


def test_nifti_says_its_size_to_other_programs(tmp_path):
    """Microns along X, Y, Z; NIfTI-1 as long as its axes can be counted in 16 bits."""
    write(tmp_path / "a.nii.gz", values("uint16"), (40, 5, 4))
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert isinstance(image, nibabel.Nifti1Image) and image.shape == SHAPE[::-1]
    np.testing.assert_allclose(image.header.get_zooms(), (0.004, 0.005, 0.04), rtol=1e-6)
    np.testing.assert_allclose(np.diag(image.affine), (0.004, 0.005, 0.04, 1), rtol=1e-6)
    assert image.header.get_xyzt_units()[0] == "micron"
    write(tmp_path / "b.nii", values("uint8", (2, 1, 40_000)), steps=(2,))
    assert isinstance(nibabel.load(tmp_path / "b.nii"), nibabel.Nifti2Image)
    np.testing.assert_array_equal(open_volume(tmp_path / "b.nii")[:], values("uint8", (2, 1, 40_000)))


def test_tiff_grows_to_bigtiff(tmp_path):
    """Offsets of 32 bits end at 4 GB; smaller files stay readable everywhere."""
    for depth, version in ((4000, 42), (4096, 43)):
        file = Tiff(tmp_path / "b.tif", (depth, 1024, 1024), np.dtype("uint8"), None, None, None)
        file.write(0, np.zeros((1, 1, 1024, 1024), np.uint8))
        file.abandon()
        assert (tmp_path / "b.tif").read_bytes()[2] == version
    write(tmp_path / "a.tif", values("uint16"), (40, 5, 4))
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.is_ome and tif.series[0].axes == "ZYX" and not tif.is_bigtiff


@pytest.mark.parametrize("suffix", KINDS)
def test_writing_holds_a_slab_not_the_volume(tmp_path, suffix, monkeypatch):
    """Volumes larger than memory: 33 MB in slabs of half a MB cost a layer of 1 MB and some chunks."""
    monkeypatch.setattr("datasets.em_outputs.LAYER", 2 ** 20)
    section = np.zeros((2, 512, 512), np.uint8)
    write(tmp_path / f"a{suffix}", section, steps=(2,))                # imports are no memory of ours
    tracemalloc.start()
    with create_volume(tmp_path / f"a{suffix}", (128, 512, 512), "uint8", None) as writer:
        for z in range(0, 128, 2):
            section[:] = z
            writer.append(section)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2 ** 20, peak
