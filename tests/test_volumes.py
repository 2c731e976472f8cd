"""Scans in a folder, NIfTI volumes, and volumes set upright."""

import gzip
import itertools
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.uid import RLELossless
from test_dicom import SAGITTAL, make_slice, write_dicom
from test_dicom_series import STORED, TILT, TILTED, places, write_series

from datasets.volumes import Volume, find_sources, read_dicom_series, read_nifti, read_volume, upright
from utils.config import BadFile, UserError

BRAIN = Path(__file__).parents[2] / "shared" / "data" / "brain"
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-500, 3000, (7, 6, 5)).astype(np.int16)
AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-0.8, 0.9, 2.5]),
                                 [5, -6, 7])


def write_nifti(path, voxels=VOXELS, affine=AFFINE, version=nib.Nifti1Image, **header):
    """A NIfTI as nibabel writes it; header: fields changed afterwards, right or wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = version(voxels, affine).to_bytes()
    size = version.header_class.template_dtype.itemsize
    block = version.header_class(data[:size], check=False)
    for name, value in header.items():
        block[name] = value
    data = block.binaryblock + data[size:]
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def refusal(read, path):
    """The message of the BadFile that ``read`` raises for a path: one line that begins with it."""
    with pytest.raises(BadFile) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix, version", [(".nii", nib.Nifti1Image), (".nii.gz", nib.Nifti1Image),
                                             (".nii.gz", nib.Nifti2Image)])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_nifti_equals_nibabel(tmp_path, suffix, version, dtype):
    """The peer reads the same numbers and the same affine; small integers stay integers."""
    path = write_nifti(tmp_path / f"a{suffix}", np.abs(VOXELS // 20).astype(dtype), version=version)
    volume, peer = read_nifti(path), nib.load(path)
    np.testing.assert_array_equal(volume.data, peer.get_fdata())
    np.testing.assert_allclose(volume.affine, peer.affine)
    assert volume.data.dtype == (np.int16 if dtype in ("u1", "i2") else np.float32)
    assert volume.affine.dtype == np.float64 and volume.modality is None and volume.notes == []


def test_scaled_and_big_endian_nifti_equal_nibabel(tmp_path):
    """slope and intercept are honoured; so is the byte order, which is the machine's in the end."""
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.header.set_slope_inter(0.25, -100)
    nib.save(image, tmp_path / "a.nii.gz")
    swapped = nib.Nifti1Image(VOXELS, AFFINE, nib.Nifti1Header(endianness=">"))
    nib.save(swapped, tmp_path / "b.nii.gz")
    for path in (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"):
        data = read_nifti(path).data
        np.testing.assert_allclose(data, nib.load(path).get_fdata(), rtol=1e-6)
        assert data.dtype.isnative


def test_affine_is_the_sform_then_the_qform_then_the_spacing(tmp_path):
    """nibabel's rule, with nibabel as the peer."""
    for name, fields in (("a", {}), ("b", {"sform_code": 0, "qform_code": 1}),
                         ("c", {"sform_code": 0, "qform_code": 0})):
        path = write_nifti(tmp_path / f"{name}.nii", **fields)
        volume = read_nifti(path)
        np.testing.assert_allclose(volume.affine, nib.load(path).affine)
        assert volume.notes == (["no orientation in the header, taken as LAS"] if name == "c" else [])


def test_members_of_a_gzip_file_are_joined(tmp_path):
    """Block-wise compressed files are common; the size at the end is then that of the last block."""
    path = write_nifti(tmp_path / "a.nii")
    data = path.read_bytes()
    blocks = [data[at:at + 100] for at in range(0, len(data), 100)] + [b""]
    (tmp_path / "b.nii.gz").write_bytes(b"".join(map(gzip.compress, blocks)))
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz").data, VOXELS)


def test_a_fourth_axis_of_one_volume_is_dropped_and_a_longer_one_refused(tmp_path):
    """One of several volumes must not stand for all."""
    path = write_nifti(tmp_path / "a.nii.gz", VOXELS[..., None, None])
    np.testing.assert_array_equal(read_nifti(path).data, VOXELS)
    path = write_nifti(tmp_path / "b.nii.gz", np.stack([VOXELS] * 3, axis=-1))
    assert "4D NIfTI of 3 volumes; split it" in refusal(read_nifti, path)
    assert "2D image" in refusal(read_nifti, write_nifti(tmp_path / "c.nii.gz", VOXELS[..., 0]))


HOLED = np.where(np.arange(VOXELS.size).reshape(VOXELS.shape) == 9, np.nan, VOXELS).astype(np.float32)
FLAT = {"sform_code": 1, "srow_x": AFFINE[0], "srow_y": AFFINE[1], "srow_z": 2 * AFFINE[1]}


@pytest.mark.parametrize("reason, voxels, header", [
    ("1 voxels are NaN or infinite", HOLED, {}),
    ("1 voxels are NaN or infinite", np.where(np.isnan(HOLED), 1e300, VOXELS.astype(float)), {}),
    ("complex voxels (complex64)", VOXELS.astype(np.complex64), {}),
    ("colour", np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]), {}),
    ("spacing 0 x 1 x 1 mm", VOXELS, {"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}),
    ("spacing 1 x 1 x -2 mm", VOXELS, {"pixdim": [1, 1, 1, -2, 0, 0, 0, 0]}),
    ("spacing 1 x nan x 1 mm", VOXELS, {"pixdim": [1, 1, np.nan, 1, 0, 0, 0, 0]}),
    ("the affine is not finite", VOXELS, {"sform_code": 1, "srow_x": [1, 0, 0, np.nan]}),
    ("singular affine", VOXELS, FLAT),
    ("spacing 0 x", VOXELS, {"sform_code": 1, "srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}),
    (f"claims {2 * 32767 ** 3 + 352} bytes", VOXELS, {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}),
    ("shape 7x0x5", VOXELS, {"dim": [3, 7, 0, 5, 1, 1, 1, 1]}),
    ("data code 77 not recognized", VOXELS, {"datatype": 77})])
def test_bad_nifti_is_refused_with_its_reason(tmp_path, reason, voxels, header):
    """Before memory is asked for what the header claims, and never with numbers that no scanner gives."""
    path = write_nifti(tmp_path / "a.nii", voxels, **header)
    assert reason in refusal(read_nifti, path)


def test_cut_nifti_is_refused(tmp_path):
    """At any length, zipped or not; so are a file that is missing, empty or no NIfTI."""
    for name in ("a.nii", "a.nii.gz"):
        path = write_nifti(tmp_path / name)
        data = path.read_bytes()
        for length in (0, 1, 2, 20, 100, 347, 352, len(data) // 2, len(data) - 9, len(data) - 1):
            path.write_bytes(data[:length])
            refusal(read_nifti, path)
    (tmp_path / "text.nii").write_text("no image " * 100)
    refusal(read_nifti, tmp_path / "text.nii")
    refusal(read_nifti, tmp_path / "absent.nii.gz")


def ramp(affine, shape):
    """A volume whose values are a linear function of the place in mm, which linear interpolation keeps."""
    return (nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) @ [3.0, -2.0, 5.0]
            + 5000).astype(np.float32)


def sheared(x_of_y=0.0, x_of_z=0.0, y_of_z=0.0):
    """AFFINE with its axes leaning on each other, by these shares of a voxel."""
    return AFFINE @ np.array([[1, x_of_y, x_of_z, 0], [0, 1, y_of_z, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("shear", [{"y_of_z": 1.3}, {"y_of_z": -0.7}, {"x_of_z": 0.5}, {"x_of_y": -0.4},
                                   {"x_of_y": 0.3, "x_of_z": -0.6, "y_of_z": 0.9}])
@pytest.mark.parametrize("flip", [1, -1])
def test_upright_keeps_every_place_and_loses_nothing(shear, flip):
    """In the new grid each voxel still has the value of its place; all corners of the old one lie within."""
    affine = sheared(**shear) @ np.diag([flip, 1, 1, 1])
    volume = Volume(ramp(affine, (9, 8, 7)), affine, "CT", ["a note"])
    new = upright(volume)
    axes = new.affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.diag(axes.T @ axes)), atol=1e-6)
    outside = new.data == volume.data.min()
    np.testing.assert_allclose(new.data[~outside], ramp(new.affine, new.data.shape)[~outside], rtol=1e-4)
    index = nib.affines.apply_affine(np.linalg.inv(affine) @ new.affine,
                                     np.moveaxis(np.indices(new.data.shape), 0, -1))
    within = ((index > 1e-3) & (index < np.array(volume.data.shape) - 1.001)).all(-1)
    assert not outside[within].any()
    corners = list(itertools.product((0, 8), (0, 7), (0, 6)))
    places = nib.affines.apply_affine(np.linalg.inv(new.affine) @ affine, corners)
    assert (places > -1e-6).all() and (places < np.array(new.data.shape) - 1 + 1e-6).all()
    assert new.modality == "CT" and new.notes[0] == "a note" and new.notes[1].startswith("gantry tilt")


def test_a_volume_on_perpendicular_axes_is_returned_as_it_is():
    """Oblique is not sheared, and rounding is no tilt: nothing is interpolated."""
    for affine in (AFFINE, sheared(y_of_z=0.005), np.eye(4)):
        volume = Volume(VOXELS, affine)
        assert upright(volume) is volume


@pytest.mark.parametrize("direction, orientation", [((0, 0, 1), TILTED), (None, SAGITTAL)])
def test_a_dicom_series_and_its_nifti_come_out_the_same(tmp_path, direction, orientation):
    """A tilted gantry too, by the angle that it was given; a bright spot stays where it was."""
    stored = np.zeros((8, 40, 30), np.uint16)
    spot, positions = (3, 17, 21), places(orientation, np.arange(8) * 3.0, direction)
    stored[spot] = 1000
    series = read_dicom_series(write_series(tmp_path / "a", stored, positions, orientation))
    path = write_nifti(tmp_path / "a.nii.gz", np.asarray(series.data), series.affine)
    new, other = upright(series), upright(read_nifti(path))
    np.testing.assert_allclose(new.affine, other.affine, atol=1e-5)
    np.testing.assert_allclose(new.data, other.data, atol=1e-2)
    assert new.notes == (["gantry tilt 18.0 degrees"] if direction else [])
    left, back, head = (positions[3] + np.multiply(orientation[:3], 0.75 * 21)
                        + np.multiply(orientation[3:], 0.5 * 17))
    index = np.stack(np.indices(new.data.shape), -1).reshape(-1, 3)
    middle = (index * new.data.reshape(-1, 1)).sum(0) / new.data.sum()
    np.testing.assert_allclose(nib.affines.apply_affine(new.affine, middle), [-left, -back, head], atol=1e-3)
    assert new.data.sum() == pytest.approx(1000)
    if direction:
        assert np.linalg.norm(new.affine[:3, 2]) == pytest.approx(3 * np.cos(TILT))
        assert new.data.shape[::2] == (30, 8)                                 # only the sheared axis grew


def write_study(raw):
    """A folder with every kind of content; returns it."""
    write_nifti(raw / "p1" / "anat" / "T1 (3D).nii.gz")
    write_nifti(raw / "p1" / "anat" / "T1_3D.NII")
    write_series(raw / "p1" / "x", SeriesInstanceUID="1.1", SeriesDescription="Köpf: ax", SeriesNumber=3)
    write_series(raw / "p1" / "x" / "y", STORED[:4], places()[:4], SeriesInstanceUID="1.2",
                 each={1: {"SeriesInstanceUID": "1.3"}})
    for path in (raw / "p1" / "x" / "y").glob("*"):
        path.rename(path.with_name(f"y{path.stem}.IMA"))
    for path in (raw / "p1" / "x").glob("00[1-3].dcm"):
        path.rename(raw / "p1" / path.stem)                                   # no suffix, another folder
    write_series(raw / "p2" / "Brain_1", SeriesDescription="", SeriesNumber=None, syntax=RLELossless)
    write_nifti(raw / "p2" / "bone" / "ct.nii.gz")
    for name in ("LICENSE", "p2/notes.txt", "p2/a.json", "p2/.hidden.nii.gz", "p2/.git/a.nii.gz", "p3/a.csv"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text("no image")
    write_dicom(raw / "p2" / "DICOMDIR", make_slice(STORED[0], (0, 0, 0), PixelData=None))
    (raw / "p4").mkdir()
    write_nifti(raw / "loose.nii.gz")
    for path in write_series(raw, StudyInstanceUID="1.9"):
        path.rename(path.with_name(f"loose{path.name}"))
    return raw


def test_sources_are_found_whatever_the_folders_say(tmp_path):
    """Series by their UID, in any folder and under any name; what is no scan is passed over in silence."""
    raw = write_study(tmp_path)
    sources, bad = find_sources(raw)
    assert [(source.study, source.name, source.kind, len(source.paths)) for source in sources] == [
        ("1.9", "7", "dicom", 8), ("loose", "loose", "nifti", 1),
        ("p1", "3_K_pf_ax", "dicom", 8), ("p1", "7", "dicom", 3), ("p1", "7_2", "dicom", 1),
        ("p1", "anat_T1_3D", "nifti", 1), ("p1", "anat_T1_3D_2", "nifti", 1),
        ("p2", "Brain_1", "dicom", 8), ("p2", "bone_ct", "nifti", 1)]
    assert bad == [(raw / name, "no NIfTI file and no DICOM image in this study") for name in ("p3", "p4")]
    by_name = {(source.study, source.name): source for source in sources}
    np.testing.assert_array_equal(read_volume(by_name["p1", "3_K_pf_ax"]).data.T, STORED)
    np.testing.assert_array_equal(read_volume(by_name["p2", "bone_ct"]).data, VOXELS)
    with pytest.raises(BadFile, match="3 slice"):
        read_volume(by_name["p1", "7"])


def test_files_that_are_no_slices_are_listed(tmp_path):
    """A screenshot or a cut file among good ones costs itself alone, and is not lost from sight."""
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    write_series(tmp_path / "p")
    shot = make_slice(np.ones((5, 7, 3), "u1"), (0, 0, 0), Rows=5, Columns=7, **colour)
    write_dicom(tmp_path / "p" / "shot.dcm", shot)
    whole = write_dicom(tmp_path / "p" / "cut", make_slice(STORED[0], (0, 0, 0))).read_bytes()
    (tmp_path / "p" / "cut").write_bytes(whole[:-20])
    write_dicom(tmp_path / "p" / "report.dcm", make_slice(STORED[0], (0, 0, 0), PixelData=None))
    for name in ("gone.dcm", "gone.nii.gz"):
        (tmp_path / "p" / name).symlink_to(tmp_path / "nowhere")
    sources, bad = find_sources(tmp_path)
    assert [len(source.paths) for source in sources] == [8]
    reasons = {path.name: reason for path, reason in bad}
    assert reasons.keys() == {"shot.dcm", "cut", "report.dcm", "gone.dcm", "gone.nii.gz"}
    assert "colour" in reasons["shot.dcm"] and reasons["cut"].startswith("cut short: 50 bytes")
    assert "pixel data" in reasons["report.dcm"]
    assert "No such file" in reasons["gone.dcm"] and "No such file" in reasons["gone.nii.gz"]


def test_a_folder_without_scans_is_the_users_mistake(tmp_path):
    """One line that says so, instead of an empty cache."""
    with pytest.raises(UserError, match="no such folder"):
        find_sources(tmp_path / "absent")
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError, match="no NIfTI file and no DICOM slice"):
        find_sources(tmp_path)
    (tmp_path / "p" / "a.dcm").write_bytes(struct.pack("<I", 7) * 50)
    with pytest.raises(UserError, match="1 cannot, first .*a.dcm"):
        find_sources(tmp_path)


@pytest.mark.skipif(not BRAIN.is_dir(), reason="no shared data")
def test_real_heads_are_found_and_stand_upright():
    """Every scan of the shared set has perpendicular axes in the end; only the tilted CT had to change."""
    sources, bad = find_sources(BRAIN)
    assert len(sources) > 15 and bad == [] and {source.kind for source in sources} == {"nifti", "dicom"}
    for source in sources[::4] + [source for source in sources if source.kind == "dicom"]:
        volume = read_volume(source)
        new = upright(volume)
        axes = new.affine[:3, :3] / np.linalg.norm(new.affine[:3, :3], axis=0)
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=np.sin(np.radians(0.2)))
        assert (new is volume) == (source.study != "ct_ge_head_dcm")
