"""MRI or CT: what the table, DICOM, the values and the names say."""

import nibabel as nib
import numpy as np
import pydicom
import pytest

from datasets.study_modes import decide, looks_like_hu, read_modes, vote_of, window_in
from datasets.volumes import Source
from utils.config import UserError

RNG = np.random.default_rng(0)
STUDIES = {"s1", "s2", "s3"}


def head_in_hu(air=-1000):
    """A skull around brain in air, with noise."""
    radius = np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0)
    head = np.select([radius < 8, radius < 9], [35, 900], air)
    return (head + RNG.normal(0, 10, head.shape)).astype(np.int16)


@pytest.fixture
def source(tmp_path):
    """Write an array as NIfTI below tmp_path; returns its Source."""
    def write(path, data):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.eye(4)), path)
        return Source(path.relative_to(tmp_path).parts[0], "x", "nifti", (path,))

    return write


def test_a_table_gives_the_modes_it_names(tmp_path):
    """More columns do no harm, so mode_mapping.csv itself can be corrected and given back."""
    table = tmp_path / "modes.csv"
    table.write_text("study,mode,source\ns1,mri,guess\ns3,ct,csv\n")
    assert read_modes(table, STUDIES) == {"s1": "mri", "s3": "ct"}
    table.write_text("study_id,mode\ns2,ct\n")
    assert read_modes(table, STUDIES) == {"s2": "ct"} and read_modes(None, STUDIES) == {}


@pytest.mark.parametrize("rows, message", [
    ("study,mode\ns1,mri\ns2,pet\n", r'line 3: the mode "pet" is not one of mri, ct'),
    ("study,mode\ns1,mri\ns1,mri\n", "line 3: the study s1 comes a second time"),
    ("study,mode\ns4x,mri\n", "line 2: there is no study s4x"),
    ("study,mode\ns1\n", "line 2: 1 cells under 2 columns"),
    ("study;mode\ns1;mri\n", "needs rows, and the columns study and mode; its first line is: study;mode "),
    ("", "needs rows, and the columns study and mode"),
])
def test_a_wrong_table_is_refused_by_its_line(tmp_path, rows, message):
    """A study under the wrong mode would be windowed wrongly without a word."""
    table = tmp_path / "modes.csv"
    table.write_text(rows)
    with pytest.raises(UserError, match=message):
        read_modes(table, STUDIES)
    with pytest.raises(UserError, match="cannot be read"):
        read_modes(tmp_path / "none.csv", STUDIES)


def test_hu_are_known_by_their_air():
    """Padding below the air and metal do not matter; MR phase and difference images are no CT."""
    head = head_in_hu()
    padded = head.copy()
    padded[:4] = -2000
    padded.flat[:5] = 30000
    assert looks_like_hu(head) and looks_like_hu(padded) and looks_like_hu(head.astype(np.float32))
    assert not looks_like_hu(head + 1024)
    assert not looks_like_hu(RNG.integers(-4096, 4096, (24, 24, 24)))
    assert not looks_like_hu(RNG.normal(0, 600, (24, 24, 24)))


def test_the_vote_of_a_nifti_comes_from_its_name_or_its_values(source, tmp_path):
    """ct must be a word of the path below the raw folder: a project, a doctor or a T1 is none."""
    mri = RNG.integers(0, 4000, (8, 8, 8)).astype(np.int16)
    for path, mode in (("ct_template/x.nii", "ct"), ("head-CT/x.nii", "ct"), ("s/CT.2.nii", "ct"),
                       ("s/BoneWindow.nii", "ct"), ("scct/ctx.nii", None), ("doctor/project.nii", None),
                       ("s/t1_brain.nii", None)):
        assert vote_of(source(path, mri), tmp_path, True)[0] == mode, path
        assert vote_of(source(path, mri), tmp_path, False) == (None, "")
    mode, why = vote_of(source("s/x.nii", head_in_hu()), tmp_path, True)
    assert mode == "ct" and why.startswith("guess: values -10")
    assert vote_of(source("s/x.nii", mri), tmp_path, True)[1] == f"guess: values {mri.min()}..{mri.max()}"


def test_a_file_that_cannot_be_read_has_no_vote(source, tmp_path):
    """It is reported where it is read for good."""
    broken = source("s/x.nii", np.zeros((4, 4, 4), np.int16))
    broken.paths[0].write_bytes(b"broken")
    assert vote_of(broken, tmp_path, True) == (None, "")


def test_dicom_says_its_modality(tmp_path):
    """Whatever the values or the name, and also where the mode is given."""
    for modality, mode in (("CT", "ct"), ("MR", "mri"), ("PT", "PT")):
        path = tmp_path / "ct" / f"{modality}.dcm"
        path.parent.mkdir(exist_ok=True)
        dataset = pydicom.Dataset()
        dataset.Modality = modality
        dataset.save_as(path, implicit_vr=False, little_endian=True)
        for look in (True, False):
            assert vote_of(Source("ct", "x", "dicom", (path,)), tmp_path, look) == (mode, "DICOM Modality")


def test_segmentations_beside_a_ct_do_not_make_it_an_mri():
    """Label maps and files that cannot be read say nothing; a study of nothing else is not taken for CT."""
    silent = [(None, "")] * 3
    assert decide([*silent, ("ct", "guess: values -1000..2000")])[0] == "ct"
    assert decide([*silent, (None, "guess: values 0..255")])[0] == "mri"
    assert decide(silent)[0] == "mri"


def test_the_majority_decides_and_silence_is_for_mri():
    """The reason written down is one of the majority's."""
    mr, ct, none = ("mri", "DICOM Modality"), ("ct", "guess: name"), (None, "guess: values 0..255")
    assert decide([mr, mr, ct]) == mr and decide([mr, ct, ct]) == ct and decide([ct, mr]) == ct
    assert decide([none, none, ct]) == ("mri", "guess: values 0..255")
    assert decide([(None, ""), none]) == ("mri", "guess: values 0..255")
    assert decide([(None, "")]) == ("mri", "guess: no MRI or CT can be read")
    pet = ("PT", "DICOM Modality")
    assert decide([pet, pet, none]) == ("mri", "guess: values 0..255") and decide([pet, pet, ct]) == ct
    assert decide([pet])[1] == "guess: no MRI or CT can be read"


def test_the_window_is_the_last_that_the_path_names():
    """The file's own name says more than its folder's."""
    for path, window in (("brain/x_bone.nii", "bone"), ("a/BrainWindow/1.dcm", "brain"),
                         ("CTBlood_window.nii", "blood"), ("brain_1/x.nii", "brain"),
                         ("carbone/x.nii", None), ("brains.nii", None)):
        assert window_in(path) == window, path
