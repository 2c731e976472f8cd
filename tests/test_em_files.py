"""Volumes of electron microscopy are read lazily, exactly, and without trust in the files."""

import gzip
import logging
import multiprocessing
import pickle
import tracemalloc
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from datasets import em_nifti
from datasets.em_files import find_arrays, intensity_range, open_volume, scale
from datasets.em_writers import create_volume
from utils.config import BadFile, UserError

REAL = Path(__file__).parents[2] / "shared/data/em"
SHAPE = (13, 37, 41)
VOXELS = np.random.default_rng(0).integers(0, 60000, SHAPE).astype(np.uint16)


def write_h5(path, **arrays):
    """An HDF5 file; array names use __ for /."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array


def write_images(folder, voxels, suffix=".png"):
    """A folder of sections img1, img2, ... img10."""
    folder.mkdir()
    for number, section in enumerate(voxels, 1):
        if suffix == ".png":
            Image.fromarray(section).save(folder / f"img{number}.png")
        else:
            tifffile.imwrite(folder / f"img{number}{suffix}", section, compression="zlib")


def write_nifti(path, voxels, slope=None, inter=None, units="mm", pixdim=(1, 1, 1), endian="<"):
    """[D, H, W] as X, Y, Z, with the header as told."""
    header = nibabel.Nifti1Header(endianness=endian)
    header.set_data_shape(voxels.shape[::-1])
    header.set_data_dtype(voxels.dtype)
    header.set_xyzt_units(units)
    header["pixdim"][1:1 + len(pixdim)] = pixdim
    header.set_slope_inter(slope, inter)
    header.set_data_offset(352)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        header.write_to(file)
        file.write(voxels.astype(voxels.dtype.newbyteorder(endian)).tobytes())


def write_zarr(path, voxels, version=2, spacing=(40, 4, 4), unit="nanometer", axes="zyx", levels=2):
    """An OME-Zarr of some levels, version 0.4 or 0.5."""
    image = {"name": "x", "axes": [{"name": axis, "type": "space", "unit": unit} if axis in "zyx" and unit
                                   else {"name": axis} for axis in axes], "datasets": []}
    group = zarr.create_group(path, zarr_format=version)
    for level in range(levels):
        step = 2 ** level
        data = voxels[..., ::step, ::step, ::step]
        group.create_array(f"s{level}", data=data, chunks=(1,) * (data.ndim - 3) + (4, 16, 16))
        factors = [1] * (data.ndim - 3) + [size * step for size in spacing]
        image["datasets"].append({"path": f"s{level}", "coordinateTransformations": [
            {"type": "scale", "scale": factors}]})
    group.attrs.update({"multiscales": [image]} if version == 2 else {"ome": {"multiscales": [image]}})


def write_pages(path, voxels, **options):
    """A TIFF whose pages were written one by one."""
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for section in voxels:
            file.write(section, contiguous=False, metadata=None, photometric="minisblack", **options)


def write_one_page(path):
    """A TIFF whose sections lie behind one page in one piece, as in ImageJ files above 4 GB."""
    with tifffile.TiffWriter(path) as file:
        file.write(VOXELS, truncate=True)


MAKERS = {
    "chunked.h5": lambda path: h5py.File(path, "w").create_dataset(
        "a/b", data=VOXELS, chunks=(4, 16, 16), compression="gzip").file.close(),
    "plain.hdf": lambda path: write_h5(path, main=VOXELS),
    "plain.tif": lambda path: tifffile.imwrite(path, VOXELS),
    "one_page.tif": write_one_page,
    "big_endian.tif": lambda path: tifffile.imwrite(path, VOXELS, byteorder=">"),
    "bigtiff.tiff": lambda path: tifffile.imwrite(path, VOXELS, bigtiff=True),
    "imagej.tif": lambda path: tifffile.imwrite(path, VOXELS, imagej=True, metadata={"axes": "ZYX"}),
    "imagej_zip.tif": lambda path: tifffile.imwrite(path, VOXELS, imagej=True, compression="zlib"),
    "ome.ome.tif": lambda path: tifffile.imwrite(path, VOXELS[:, None], metadata={"axes": "ZCYX"}),
    "pages.tif": lambda path: write_pages(path, VOXELS),
    "pages_zip.tif": lambda path: write_pages(path, VOXELS, compression="zlib", predictor=True, bigtiff=True),
    "tiles.tif": lambda path: write_pages(path, VOXELS, tile=(16, 16)),
    "png": lambda path: write_images(path, VOXELS),
    "tifs": lambda path: write_images(path, VOXELS, ".TIF"),
    "plain.nii": lambda path: write_nifti(path, VOXELS),
    "big_endian.nii.gz": lambda path: write_nifti(path, VOXELS, endian=">"),
    "v2.zarr": lambda path: write_zarr(path, VOXELS),
    "v3.zarr": lambda path: write_zarr(path, VOXELS[None, None], 3, axes="tczyx"),
    "array.zarr": lambda path: zarr.create_array(path, data=VOXELS, chunks=(4, 16, 16)),
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """{name: path} of the same voxels in every kind of file."""
    folder = tmp_path_factory.mktemp("volumes")
    for name, make in MAKERS.items():
        make(folder / name)
    return {name: folder / name for name in MAKERS}


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_is_indexed_as_numpy_does(volumes, name):
    """Blocks at the border, clipped and negative ends, and single sections: all scripts cut crops so."""
    volume = open_volume(volumes[name])
    assert volume.shape == SHAPE and volume.dtype == np.uint16 and volume.dtype.isnative
    assert volume.path == volumes[name]
    shape, dtype = next(iter(find_arrays(volumes[name]).values()))
    assert shape[-3:] == SHAPE and dtype.kind == "u" and dtype.itemsize == 2
    for index in (np.s_[:], np.s_[2:5, 3:30, 7:9], np.s_[10:99, -5:, :-40], np.s_[3], np.s_[-1, 2],
                  np.s_[2, 3, 4], np.s_[:, 5], np.s_[5:2, 1:3], np.s_[99:120],
                  np.s_[np.int64(4), None:None, 1:2]):
        block = volume[index]
        np.testing.assert_array_equal(block, VOXELS[index], err_msg=str(index))
        assert np.shape(block) == VOXELS[index].shape and not isinstance(block, np.memmap)
    block = volume[1:3]
    block += 1                                       # the caller's own: the next read is the same
    np.testing.assert_array_equal(volume[1:3], VOXELS[1:3])
    for index, error in ((13, IndexError), (np.s_[0, 0, 0, 0], IndexError), (np.s_[::2], ValueError),
                         ("a", TypeError)):
        with pytest.raises(error):
            volume[index]


def read_block(volumes):
    """One block of each, for another process."""
    return [volume[2:5, 3:30, 7:9] for volume in volumes]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_volumes_work_in_other_processes(volumes, method):
    """Data-loading workers are forked or spawned, from a process that has read already or not."""
    opened = [open_volume(path) for path in volumes.values()]
    read_block(opened[::2])
    with multiprocessing.get_context(method).Pool(1) as pool:
        for block in pool.apply_async(read_block, (opened,)).get(60):
            np.testing.assert_array_equal(block, VOXELS[2:5, 3:30, 7:9])
    read_block(pickle.loads(pickle.dumps(opened)))
    read_block(opened)


def test_a_file_is_opened_once(volumes):
    """Opening costs more than a patch: headers, pages and what is known of gzip streams are kept."""
    volume = open_volume(volumes["big_endian.nii.gz"])
    volume[0]
    first = volume.array
    volume[1:5]
    assert volume.array is first


def test_a_slab_is_read_without_the_volume(tmp_path):
    """Inference over volumes larger than memory: a slab of 1 MB of a volume of 33 MB costs some chunks."""
    voxels = np.zeros((128, 512, 512), np.uint8) + np.arange(128, dtype=np.uint8)[:, None, None]
    for name in ("a.h5", "a.tif", "a.nii", "a.nii.gz", "a.zarr"):
        with create_volume(tmp_path / name, voxels.shape, "uint8", (40, 4, 4)) as writer:
            writer.append(voxels)
        volume = open_volume(tmp_path / name)
        volume[0:1]
        tracemalloc.start()
        block = volume[96:100]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(block, voxels[96:100])
        assert peak < 2 ** 23, (name, peak)


def test_gzip_is_read_from_any_place(tmp_path, monkeypatch):
    """A patch from the middle must not cost the whole file each time; several streams in one file count."""
    monkeypatch.setattr(em_nifti, "PLACE_EVERY", 5000)
    monkeypatch.setattr(em_nifti, "READ", 700)
    data = np.random.default_rng(0).integers(0, 9, 200_000).astype(np.uint8).tobytes()
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(data[:70_000]) + gzip.compress(b"") + gzip.compress(data[70_000:]))
    reader = em_nifti.GzipReader(path)
    draw = np.random.default_rng(2)
    for start in (199_000, 0, 69_990, *draw.integers(0, 199_000, 200)):
        assert reader.read(int(start), 1000) == data[start:start + 1000]
    assert len(reader.places) < 45 and len(reader.places) > 30
    inflated = []
    monkeypatch.setattr(reader, "state", None)       # at a place that is known, reading starts from there
    reader.position = 200_000
    inflate = reader.inflate
    monkeypatch.setattr(reader, "inflate", lambda most: inflated.append(inflate(most)) or inflated[-1])
    reader.read(150_000, 100)
    assert 100 <= sum(map(len, inflated)) < 100 + 5000 + 16 * 700
    inflated.clear()
    reader.read(150_100, 100)                        # and from where the last read ended
    assert sum(map(len, inflated)) == 100
    with pytest.raises(EOFError):
        reader.read(199_999, 2)


def test_a_folder_of_volumes_names_them(tmp_path):
    """Who gives the folder that holds sampleA.hdf means one of its files."""
    for name in ("b.hdf", "a.h5", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(BadFile, match="a folder without images .*; name one of them: a.h5, b.hdf$"):
        open_volume(tmp_path)


def test_a_folder_is_read_in_natural_order_and_of_one_form(tmp_path):
    """img10 comes behind img9; a section of another size or type is named, not padded or cast."""
    write_images(tmp_path / "a", VOXELS)
    (tmp_path / "a/._img3.png").write_bytes(b"x")
    (tmp_path / "a/notes.txt").write_text("x")
    np.testing.assert_array_equal(open_volume(tmp_path / "a")[:], VOXELS)
    Image.fromarray(VOXELS[0, :5]).save(tmp_path / "a/img11.png")
    Image.fromarray(VOXELS[0].astype(np.uint8)).save(tmp_path / "a/img12.png")
    with pytest.raises(BadFile, match=r"img11\.png: 5 x 41 uint16, but img1\.png is 37 x 41 uint16"):
        open_volume(tmp_path / "a")
    (tmp_path / "a/img11.png").unlink()
    with pytest.raises(BadFile, match=r"img12\.png: 37 x 41 uint8"):
        open_volume(tmp_path / "a")
    Image.fromarray(VOXELS[0].astype(np.uint8)).convert("RGB").save(tmp_path / "a/img12.png")
    with pytest.raises(BadFile, match=r"img12\.png: a colour image"):
        open_volume(tmp_path / "a")
    (tmp_path / "a/img12.png").write_bytes((tmp_path / "a/img13.png").read_bytes()[:900])
    volume = open_volume(tmp_path / "a")
    np.testing.assert_array_equal(volume[:10], VOXELS[:10])
    with pytest.raises(BadFile, match=r"img12\.png: cannot be read"):
        volume[10]


def test_png_palettes_of_greys_are_grey(tmp_path):
    """ImageJ writes 8-bit PNG as a palette."""
    (tmp_path / "a").mkdir()
    grey = (VOXELS[0] % 256).astype(np.uint8)
    image = Image.fromarray(grey)
    image.putpalette([level for level in range(256) for _ in range(3)])
    image.save(tmp_path / "a/1.png")
    np.testing.assert_array_equal(open_volume(tmp_path / "a")[0], grey)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype, slope, inter, expected", [
    ("uint16", 1, 0, "uint16"), ("int16", 1, -1024, "int32"), ("uint8", 2, 10, "uint16"),
    ("uint32", 1, 0, "uint32"), ("uint32", 1, 1, "uint64"), ("int16", 0.5, 3, "float32"),
    ("float64", 1, 0, "float64"), ("uint8", 1, 0, "uint8"), ("int64", 1, 0, "int64"),
    ("float32", 2, 1, "float32")])
def test_nifti_is_turned_and_scaled(tmp_path, suffix, dtype, slope, inter, expected):
    """nibabel's X, Y, Z is our W, H, D; ids of labels must stay whole numbers, whatever the slope."""
    voxels = (VOXELS % 250).astype(dtype) if np.dtype(dtype).kind != "u" else VOXELS.astype(dtype)
    if dtype in ("uint32", "int64"):
        voxels += np.array(2 ** 24 + 1, dtype)       # the first whole numbers that float32 has not
    write_nifti(tmp_path / f"a{suffix}", voxels, slope, inter)
    volume = open_volume(tmp_path / f"a{suffix}")
    peer = np.asarray(nibabel.load(tmp_path / f"a{suffix}").dataobj).T
    assert volume.dtype == expected and volume.shape == SHAPE
    tolerance = 1e-6 if expected == "float32" else 0
    np.testing.assert_allclose(volume[2:9, :, 5:], peer[2:9, :, 5:], rtol=tolerance)


def test_ome_zarr_images_give_their_finest_level(tmp_path):
    """A pyramid is one image; its labels are found by the name of their group."""
    write_zarr(tmp_path / "a.zarr", VOXELS, 3)
    write_zarr(tmp_path / "a.zarr/labels/cells", VOXELS + 1, 3, (0.04, 0.004, 0.004), "micrometer")
    zarr.open_group(tmp_path / "a.zarr").require_group("labels")
    assert set(find_arrays(tmp_path / "a.zarr")) == {"s0", "s1", "labels/cells/s0", "labels/cells/s1"}
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.key == "s0" and volume.spacing_nm == (40, 4, 4)
    volume = open_volume(tmp_path / "a.zarr", "labels/cells")
    assert volume.key == "labels/cells/s0" and volume.spacing_nm == (40, 4, 4)
    np.testing.assert_array_equal(volume[:], VOXELS + 1)
    assert open_volume(tmp_path / "a.zarr", "s1").spacing_nm == (80, 8, 8)
    write_zarr(tmp_path / "b.zarr", VOXELS, axes="xyz")
    with pytest.raises(BadFile, match="axes x, y, z"):
        open_volume(tmp_path / "b.zarr")
    write_zarr(tmp_path / "c.zarr", VOXELS[None].repeat(2, 0), axes="czyx")
    with pytest.raises(BadFile, match="4D array"):
        open_volume(tmp_path / "c.zarr")


def test_the_key_is_chosen_or_asked_for(tmp_path):
    """Never an array that the user did not mean; the message lists what there is."""
    path = tmp_path / "a.h5"
    write_h5(path, volumes__raw=VOXELS, volumes__labels__ids=VOXELS.astype(np.uint64), flat=VOXELS[0])
    assert open_volume(path).key == "volumes/raw"
    assert open_volume(path, "/volumes/labels/ids").dtype == np.uint64
    assert find_arrays(path)["flat"] == (SHAPE[1:], np.uint16)
    with pytest.raises(UserError, match=r"no array volumes/labels; .*labels/ids \(13, 37, 41\) uint64"):
        open_volume(path, "volumes/labels")
    with pytest.raises(BadFile, match="a 2D array"):
        open_volume(path, "flat")
    write_h5(tmp_path / "b.h5", one=VOXELS, two=VOXELS)
    with pytest.raises(UserError, match=r"several volumes; name one of: one .*two"):
        open_volume(tmp_path / "b.h5")
    tifffile.imwrite(tmp_path / "a.tif", VOXELS)
    with pytest.raises(UserError, match="leave out the key main"):
        open_volume(tmp_path / "a.tif", "main")


def huge_h5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("main", (10 ** 6,) * 3, "f4", chunks=(64, 64, 64))


def huge_nifti(path):
    header = nibabel.Nifti2Header()
    header.set_data_shape((10 ** 5,) * 3)
    header.set_data_dtype(np.uint8)
    header.set_data_offset(544)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        header.write_to(file)
        file.write(bytes(1000))


def cut(make, share=0.6):
    """A maker of the same file, of which only the first part is there."""
    def made(path):
        make(path)
        data = path.read_bytes()
        path.write_bytes(data[:int(len(data) * share)])

    return made


def text(path):
    path.write_text("no volume at all\n" * 100)


HOSTILE = {
    "absent.h5": (lambda path: None, "no such file"),
    "empty.h5": (Path.touch, "the file is empty"), "empty.tif": (Path.touch, "the file is empty"),
    "empty.nii.gz": (Path.touch, "the file is empty"), "empty.zarr": (Path.mkdir, "cannot be read"),
    "text.h5": (text, "cannot be read"), "text.tif": (text, "cannot be read"),
    "text.nii": (text, "cannot be read"), "text.nii.gz": (text, "cannot be read"),
    "text.zarr": (text, "a file where the folder"),
    "cut.h5": (cut(MAKERS["chunked.h5"]), "truncated"), "cut.tif": (cut(MAKERS["plain.tif"]), "truncated"),
    "cut_pages.tif": (cut(MAKERS["pages_zip.tif"]), "truncated"),
    "cut_one_page.tif": (cut(MAKERS["one_page.tif"]), "truncated"),
    "cut_imagej.tif": (cut(MAKERS["imagej.tif"]), "truncated"),
    "cut.nii": (cut(MAKERS["plain.nii"]), "only .* are stored"),
    "strings.h5": (lambda path: write_h5(path, main=np.full((2, 3, 4), "a", object)), "numbers"),
    "complex.h5": (lambda path: write_h5(path, main=np.ones((2, 3, 4), complex)), "numbers"),
    "flat.h5": (lambda path: write_h5(path, main=VOXELS[0]), "a 2D array"),
    "deep.h5": (lambda path: write_h5(path, main=VOXELS[None]), "a 4D array"),
    "zero.h5": (lambda path: write_h5(path, main=VOXELS[:, :0]), "an empty volume"),
    "none.h5": (lambda path: write_h5(path), "holds no 3D volume"),
    "none.zarr": (lambda path: zarr.create_group(path), "holds no 3D volume"),
    "null.h5": (lambda path: write_h5(path, main=h5py.Empty("f4")), "0D array"),
    "flat.tif": (lambda path: tifffile.imwrite(path, VOXELS[0]), "a 2D array"),
    "colour.tif": (lambda path: tifffile.imwrite(path, np.zeros((5, 9, 9, 3), "u1"), photometric="rgb"),
                   "colour"),
    "channels.tif": (lambda path: tifffile.imwrite(path, VOXELS[:2], imagej=True, metadata={"axes": "CYX"}),
                     "2 channels"),
    "deep.tif": (lambda path: tifffile.imwrite(path, np.stack([VOXELS] * 2), imagej=True),
                 "a 4D array"),
    "lzw.tif": (lambda path: Image.fromarray(VOXELS[0]).save(
        path, save_all=True, append_images=[Image.fromarray(VOXELS[1])], compression="tiff_lzw"),
        "imagecodecs"),
    "flat.nii": (lambda path: write_nifti(path, VOXELS[0]), "a 2D array"),
    "deep.nii.gz": (lambda path: write_nifti(path, np.stack([VOXELS] * 2)), "a 4D array"),
    "flat.zarr": (lambda path: zarr.create_array(path, data=VOXELS[0]), "a 2D array"),
    "folder": (Path.mkdir, "a folder without images"),
    "huge.h5": (huge_h5, "declares"), "huge.nii": (huge_nifti, "declares"),
    "huge.nii.gz": (huge_nifti, "declares"),
    "huge.zarr": (lambda path: zarr.create_array(path, shape=(10 ** 6,) * 3, chunks=(64,) * 3, dtype="u1"),
                  "declares"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_volume_is_refused_in_one_line(tmp_path, name, capfd, caplog):
    """A wrong, damaged or lying file must not end in a traceback, an allocation or another volume."""
    if name == "lzw.tif" and "imagecodecs" in str(tifffile.TIFF.DECOMPRESSORS.get(5, "")):
        pytest.skip("imagecodecs is installed")
    make, words = HOSTILE[name]
    make(tmp_path / name)
    tracemalloc.start()
    with pytest.raises(BadFile, match=words) as caught:
        open_volume(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message and len(message) < 500
    assert peak < 2 ** 23 and capfd.readouterr() == ("", "") and not caplog.records


def test_an_unknown_suffix_is_a_users_mistake(tmp_path):
    """The message says what can be read."""
    text(tmp_path / "a.raw")
    with pytest.raises(UserError, match=r"not a volume; take \.h5"):
        open_volume(tmp_path / "a.raw")


@pytest.mark.parametrize("kind, flip", [("chunked.h5", -3000), ("pages_zip.tif", 5000),
                                        ("big_endian.nii.gz", -3000)])
def test_damage_inside_is_found_when_it_is_read(tmp_path, kind, flip):
    """The sound part can be read, and the rest is not made up."""
    path = tmp_path / kind
    MAKERS[kind](path)
    data = bytearray(path.read_bytes())
    for place in range(flip, flip + 60):
        data[place] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(BadFile, match="cannot be read") as caught:
        open_volume(path)[:]
    assert "\n" not in str(caught.value)


def test_sections_before_the_checksum_of_a_gzip_file_are_never_wrong(tmp_path):
    """It stands at the end: a section in front of it may be damaged, and looks as sound as any."""
    path = tmp_path / "a.nii.gz"
    write_nifti(path, VOXELS)
    data = path.read_bytes()
    for place in range(100, len(data), len(data) // 12):
        path.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1:])
        with pytest.raises(BadFile, match="cannot be read"):
            open_volume(path)[0]
    for end in (b"", bytes(5), bytes(200_000)):      # tapes fill their last block with zeros
        path.write_bytes(data + end)
        np.testing.assert_array_equal(open_volume(path)[12], VOXELS[12])
    path.write_bytes(data + b"something else")
    with pytest.raises(BadFile, match="cannot be read"):
        open_volume(path)[0]


def test_a_section_whose_png_checksum_is_wrong_is_refused(tmp_path):
    """Decoding does not look at all of them."""
    (tmp_path / "a").mkdir()
    for number, section in enumerate(VOXELS[:3]):
        Image.fromarray(section).save(tmp_path / f"a/{number}.png", compress_level=0)
    data = bytearray((tmp_path / "a/1.png").read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "a/1.png").write_bytes(data)
    volume = open_volume(tmp_path / "a")
    np.testing.assert_array_equal(volume[0], VOXELS[0])
    with pytest.raises(BadFile, match="1.png"):
        volume[1]


@pytest.mark.parametrize("tag, value, options", [
    (273, 0, {}), (273, 400, {}), (279, 2 ** 31, {"compression": "zlib"}),
    (278, 5, {"compression": "zlib"}), (257, 60_000, {"compression": "zlib", "metadata": None})])
def test_tiff_pages_that_lie_elsewhere_or_claim_too_much_are_refused(tmp_path, tag, value, options):
    """Offset of the pixels, their bytes, rows per strip, height: the header as pixels is no volume."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VOXELS, **options)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for page in file.pages if tag in (257, 278) else file.pages[:1]:
            page.tags[tag].overwrite(value)
    with pytest.raises(BadFile):
        open_volume(path)[:]


def test_values_that_are_not_finite_are_refused_when_read(tmp_path):
    """One NaN in a patch makes every weight NaN; a part without any can still be used."""
    voxels = VOXELS.astype(np.float32)
    voxels[5, 3, 3], voxels[6] = np.nan, np.inf
    write_h5(tmp_path / "a.h5", main=voxels)
    volume = open_volume(tmp_path / "a.h5")
    np.testing.assert_array_equal(volume[:5], voxels[:5])
    with pytest.raises(BadFile, match=f"{1 + 37 * 41} voxels of sections 4 to 7 are NaN or infinite"):
        volume[4:8]


def test_bool_volumes_are_uint8(tmp_path):
    """Masks are often bool; arithmetic of the callers is not."""
    write_h5(tmp_path / "a.h5", main=VOXELS > 30000)
    volume = open_volume(tmp_path / "a.h5")
    assert volume.dtype == np.uint8 and volume[2].dtype == np.uint8
    np.testing.assert_array_equal(volume[:], VOXELS > 30000)


@pytest.mark.parametrize("where, attributes, expected", [
    ("main", {"resolution": [40.0, 4, 4]}, (40, 4, 4)), ("/", {"resolution": [40, 4, 4.6]}, (40, 4, 4.6)),
    ("main", {"resolution_nm_zyx": [50, 4.6, 4.6], "resolution": [1, 2, 3]}, (50, 4.6, 4.6)),
    ("main", {}, None), ("main", {"resolution": [40, -4, 4]}, None),
    ("main", {"resolution": [0, 4, 4]}, None),
    ("main", {"resolution": [np.nan, 4, 4]}, None), ("main", {"resolution": [1e30, 4, 4]}, None),
    ("main", {"resolution": "coarse"}, None), ("main", {"resolution": [4.0, 4]}, None),
    ("main", {"resolution": h5py.Empty("f4")}, None)])
def test_voxel_size_of_hdf5_attributes(tmp_path, where, attributes, expected):
    """CREMI's order is z, y, x in nm; nonsense is None with a reason, and the voxels can still be read."""
    write_h5(tmp_path / "a.h5", main=VOXELS)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file[where].attrs.update(attributes)
    volume = open_volume(tmp_path / "a.h5")
    assert volume.spacing_nm == expected and (expected is None) == bool(volume.spacing_note)
    assert volume[0, 0, 0] == VOXELS[0, 0, 0]


@pytest.mark.parametrize("units, pixdim, expected", [
    ("mm", (8, 8, 30), (30, 8, 8)), ("mm", (0.008, 0.008, 0.03), (30, 8, 8)),
    ("mm", (8e-6, 8e-6, 3e-5), (30, 8, 8)),
    ("micron", (0.0046, 0.0046, 0.05), (50, 4.6, 4.6)), ("micron", (8, 8, 30), (30000, 8000, 8000)),
    ("unknown", (4, 4, 40), (40, 4, 4)), ("mm", (1, 1, 1), None), ("unknown", (1, 1, 1), None),
    ("mm", (0, 4, 40), None), ("mm", (-4, 4, 40), None), ("mm", (np.nan, 4, 40), None),
    ("mm", (4, 4, 4000), None)])
def test_voxel_size_of_nifti(tmp_path, units, pixdim, expected):
    """nnU-Net's EM sets write nanometres or microns as mm; 1 x 1 x 1 is what is written by default."""
    write_nifti(tmp_path / "a.nii", VOXELS, units=units, pixdim=pixdim)
    volume = open_volume(tmp_path / "a.nii")
    assert volume.spacing_nm == expected and (expected is None) == bool(volume.spacing_note)


def test_voxel_size_of_tiff(tmp_path):
    """ImageJ's tags, OME's attributes, and nnU-Net's file beside the TIFF, which counts most."""
    def spacing(name, **options):
        tifffile.imwrite(tmp_path / name, VOXELS, **options)
        return open_volume(tmp_path / name).spacing_nm

    imagej = {"axes": "ZYX", "spacing": 0.04, "unit": "um"}
    assert spacing("a.tif", imagej=True, metadata=imagej, resolution=(250, 200)) == (40, 5, 4)
    assert spacing("b.tif", imagej=True, metadata=imagej | {"unit": "pixel"}, resolution=(250, 200)) is None
    assert spacing("c.tif", imagej=True, metadata=imagej) is None      # pixels of 1 um: nobody gave a size
    assert spacing("d.tif", resolution=(250, 250)) is None
    ome = {"axes": "ZYX", "PhysicalSizeZ": 40, "PhysicalSizeZUnit": "nm", "PhysicalSizeY": 0.005,
           "PhysicalSizeX": 0.004}
    assert spacing("e.ome.tif", metadata=ome) == (40, 5, 4)
    assert spacing("f.ome.tif", metadata=ome | {"PhysicalSizeZUnit": "pixel"}) is None
    sidecars = {"a": '{"spacing": [30, 8, 8]}', "case_1": '{"spacing": [0.03, 0.008, 0.008]}',
                "g": '{"spacing": [30, "x"]}', "h": "{", "e.ome": '{"other": 1}'}
    for name, content in sidecars.items():
        (tmp_path / f"{name}.json").write_text(content)
    assert spacing("a.tif", imagej=True, metadata=imagej, resolution=(250, 200)) == (30, 8, 8)
    assert spacing("case_1_0000.tif") == (30, 8, 8) and spacing("e.ome.tif", metadata=ome) == (40, 5, 4)
    assert spacing("g.tif") is None and spacing("h.tif") is None


@pytest.mark.parametrize("unit, size, expected", [
    ("micrometer", (0.04, 0.004, 0.004), (40, 4, 4)), ("nanometer", (40, 4, 4), (40, 4, 4)),
    ("angstrom", (400, 40, 40), (40, 4, 4)), (None, (40, 4, 4), (40, 4, 4)), (None, (1, 1, 1), None),
    ("parsec", (40, 4, 4), None), ("nanometer", (40, 0, 4), None)])
def test_voxel_size_of_ome_zarr(tmp_path, unit, size, expected):
    """The scale of the level, in the units of the axes."""
    write_zarr(tmp_path / "a.zarr", VOXELS, spacing=size, unit=unit)
    assert open_volume(tmp_path / "a.zarr").spacing_nm == expected


def test_intensity_range_is_that_of_the_percentiles(tmp_path):
    """The plain definition, over all voxels where there are few; the same whatever the file."""
    sections = np.unique(np.linspace(0, 12, 5).round().astype(int))
    assert intensity_range(VOXELS, 5) == tuple(np.percentile(VOXELS[sections], (0.1, 99.9)))
    write_h5(tmp_path / "a.h5", main=VOXELS)
    assert intensity_range(open_volume(tmp_path / "a.h5")) == tuple(np.percentile(VOXELS, (0.1, 99.9)))
    large = np.broadcast_to(np.arange(2000, dtype=np.uint16), (40, 1500, 2000))    # more than SAMPLES
    np.testing.assert_allclose(intensity_range(large), np.percentile(np.arange(2000), (0.1, 99.9)), atol=4)


def test_intensity_range_is_never_empty():
    """A constant or nearly constant volume must not divide by zero."""
    for value in (0, 7, -3.5, 3e30):
        low, high = intensity_range(np.full(SHAPE, value, np.float32))
        assert low == np.float32(value) and low < high
        assert not scale(np.full(SHAPE, value, np.float32), low, high).any()
    sparse = np.zeros(SHAPE, np.uint8)
    sparse[0, 0, 0] = 9
    assert intensity_range(sparse) == (0, 9)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float16", "float32", "float64"])
def test_scale_maps_the_range_to_0_and_1(dtype):
    """Outliers are clipped; the input stays as it is."""
    block = np.array([[-5 if dtype[0] != "u" else 0, 10, 60, 110, 120]], dtype)
    scaled = scale(block, 10.0, 110.0)
    assert scaled.dtype == np.float32 and block[0, 1] == 10
    np.testing.assert_allclose(scaled, [[0, 0, 0.5, 1, 1]])
    with pytest.raises(ValueError, match="must be below"):
        scale(block, 1.0, 1.0)


def test_libraries_stay_as_they_were(tmp_path):
    """Their warnings are hushed while a file is read, for nobody else."""
    MAKERS["plain.tif"](tmp_path / "a.tif")
    open_volume(tmp_path / "a.tif")[0]
    assert not tifffile.logger().disabled and not logging.getLogger("nibabel.global").disabled


@pytest.mark.parametrize("file, key, shape, dtype, spacing", [
    ("fib25_sample2/fib25_inputs.h5", "main", (150, 200, 200), "uint8", (10, 10, 10)),
    ("gala_crop/gala_train.h5", "volumes/raw", (50, 100, 200), "uint8", (10, 10, 10)),
    ("vnc_sstem/vnc_stack1.h5", "raw", (20, 640, 576), "uint8", (50, 4.6, 4.6)),
    ("isbi2012_png/image", "", (20, 512, 512), "uint8", None)])
def test_real_files(file, key, shape, dtype, spacing):
    """Published sets in their own layouts."""
    if not (REAL / file).exists():
        pytest.skip("no real data beside the repository")
    volume = open_volume(REAL / file)
    assert (volume.key, volume.shape, volume.dtype, volume.spacing_nm) == (key, shape, dtype, spacing)
    low, high = intensity_range(volume)
    block = scale(volume[3:7, 20:50], low, high)
    assert 0 <= low < high <= 255 and block.shape == (4, 30, shape[2]) and 0.1 < block.mean() < 0.9
