"""Demo data: formats, patients, repeatability, and runs that were cut short."""

import json
import shutil

import numpy as np
import pydicom
import pytest
from PIL import Image

from datasets.demo import write_dicom, write_longitudinal_demo
from datasets.io import image_files, read_image
from datasets.lungs import lung_mask
from utils.config import UserError


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(output, pairs) of a set of four patients, made in this process."""
    output = tmp_path_factory.mktemp("data") / "demo"
    return output, make(output)


def make(output, **changes):
    arguments = {"size": 64, "patients": 4, "pairs_per_patient": 2, "seed": 0, "workers": 0, "settings": {}}
    return write_longitudinal_demo(output, **{**arguments, **changes})


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_format_is_there_and_reads_as_an_xray(demo):
    """8-bit and 16-bit PNG, DICOM and inverted DICOM exercise the readers; bright is dense in all of them."""
    output, _ = demo
    files = image_files(output / "images")
    headers = [pydicom.dcmread(path) for path in files if path.suffix == ".dcm"]
    assert {header.PhotometricInterpretation for header in headers} == {"MONOCHROME1", "MONOCHROME2"}
    assert {Image.open(path).mode for path in files if path.suffix == ".png"} == {"L", "I;16"}
    for path in files:
        image = read_image(path)
        image = (image - image.min()) / np.ptp(image)
        rows, columns = image.shape
        belly = image[-rows // 8:, columns // 3:-columns // 3].mean()
        lung = image[rows // 3:rows // 2, columns // 5:columns // 3].mean()
        assert belly > lung + 0.2


def test_automatic_lung_fields_lie_on_the_dark_lungs(demo):
    """Pairs are made through them, so they must be found by contrast and be darker than the rest."""
    output, _ = demo
    for path in image_files(output / "images"):
        image = read_image(path)
        image = (image - image.min()) / np.ptp(image)
        lungs, method = lung_mask(image)
        assert method["right"] == method["left"] == "contrast"
        assert image[lungs.any(0)].mean() < image[~lungs.any(0) & (image > 0.1)].mean() - 0.15
        assert 0.12 < lungs.mean() * 2 < 0.5


def test_each_patient_has_the_pairs_that_were_asked_for(demo):
    """Cases begin with the patient's name, so that a split by patient is possible."""
    output, pairs = demo
    cases = [path.parent.name for path in pairs.glob("*/params.json")]
    patients = sorted(path.name for path in (output / "images").iterdir())
    assert len(patients) == 4
    assert sorted(case.split("_")[0] for case in cases) == sorted(patients * 2)
    for case in cases:
        assert read_image(pairs / case / "diff_map.nii.gz").shape == (64, 64)


def test_patients_differ(demo):
    """Held-out patients that look like the training ones would flatter every result."""
    output, _ = demo
    first = [sorted(folder.iterdir())[0] for folder in sorted((output / "images").iterdir())]
    images = [np.asarray(lung_mask(read_image(path) / read_image(path).max())[0].any(0)) for path in first]
    areas = [mask.mean() for mask in images]
    assert len({round(area, 4) for area in areas}) == 4


def test_a_finished_set_is_not_made_again(demo):
    """Training asks for it at every start."""
    output, pairs = demo
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert make(output) == pairs
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_an_interrupted_set_is_completed_to_the_same_bytes(demo, tmp_path):
    """Half-written patients and cases are made anew; whatever was whole stays; the result is the same."""
    output = tmp_path / "demo"
    shutil.copytree(demo[0], output)
    before = contents(output)
    marker = json.loads((output / "demo.json").read_text())
    (output / "demo.json").write_text(json.dumps({**marker, "complete": False}))
    patient, kept = sorted((output / "images").iterdir())[:2]
    patient.rename(patient.with_name(f".{patient.name}"))
    shutil.rmtree(next((output / "pairs").glob(f"{patient.name}_*")))
    stamp = next(kept.iterdir()).stat().st_mtime_ns
    make(output)
    after = contents(output)
    assert after.keys() == before.keys()
    different = [name for name in after if after[name] != before[name] and "params" not in name]
    assert not different and next(kept.iterdir()).stat().st_mtime_ns == stamp


def test_another_set_or_strange_files_in_the_folder_are_left_alone(demo, tmp_path):
    """Neither mixed with the new data nor deleted: the message says what to do."""
    with pytest.raises(UserError, match="another seed"):
        make(demo[0], seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        make(tmp_path)


def test_inverted_dicom_reads_like_the_upright_one(tmp_path):
    """MONOCHROME1 is a way of storing, not another image."""
    image = np.random.default_rng(0).random((8, 9)).astype(np.float32)
    for name, inverted in (("a", False), ("b", True)):
        write_dicom(tmp_path / f"{name}.dcm", name, image, inverted)
    np.testing.assert_allclose(read_image(tmp_path / "a.dcm"), read_image(tmp_path / "b.dcm"), atol=1.5)
