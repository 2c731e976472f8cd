"""Demo studies: file forms, labels, geometry, repeatability, and runs that were cut short."""

import csv
import json
import pickle
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest

from datasets import demo_studies
from datasets.demo_studies import (
    CT_FORMS,
    draw_grid,
    plan_splits,
    plan_studies,
    write_demo_studies,
    write_nifti,
)
from datasets.head_findings import FINDINGS
from utils.config import UserError


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(output, raw) of a dozen small studies made in this process."""
    output = tmp_path_factory.mktemp("data") / "demo"
    return output, write_demo_studies(output, studies=12, seed=0, workers=0, size=24)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def series_of(folder):
    """{SeriesInstanceUID: images} of all DICOM files below a folder, in the order of their names."""
    found = {}
    for path in sorted(folder.rglob("*.dcm")):
        image = pydicom.dcmread(path)
        found.setdefault(image.SeriesInstanceUID, []).append(image)
    return found


def sorted_series(images):
    """(volume [D, H, W] in stored units times slope plus intercept, positions [D, 3]) along the normal."""
    row, column = np.reshape(images[0].ImageOrientationPatient, (2, 3))
    images = sorted(images, key=lambda image: np.dot(np.cross(row, column), image.ImagePositionPatient))
    volume = np.stack([image.pixel_array * float(image.get("RescaleSlope", 1))
                       + float(image.get("RescaleIntercept", 0)) for image in images])
    return volume, np.array([image.ImagePositionPatient for image in images], float)


def ct_studies(demo):
    """Folders of the CT studies in the order of CT_FORMS."""
    output, raw = demo
    studies = [row["study"] for row in rows(output / "modes.csv") if row["mode"] == "ct"]
    return {form: raw / study for form, study in zip(CT_FORMS, studies, strict=True)}


def test_two_thirds_are_mri_with_two_series_and_one_third_is_ct(demo):
    """As modes.csv says; the files agree."""
    output, raw = demo
    modes = {row["study"]: row["mode"] for row in rows(output / "modes.csv")}
    assert sorted(modes) == sorted(path.name for path in raw.iterdir())
    assert sorted(modes.values()) == ["ct"] * 4 + ["mri"] * 8
    for study, mode in modes.items():
        dicom = series_of(raw / study)
        nifti = list((raw / study).rglob("*.nii.gz"))
        volumes = [images for images in dicom.values() if len(images) > 1]
        assert len(volumes) + len(nifti) == (2 if mode == "mri" else 1)
        assert {image.Modality for images in dicom.values() for image in images} \
            <= {"CT" if mode == "ct" else "MR"}
        for image in (image for images in dicom.values() for image in images):
            assert image.PatientID == study


def test_every_form_of_file_is_there(demo):
    """Orientations, nesting and two series in one folder exercise the reader."""
    _, raw = demo
    codes = {"".join(nib.aff2axcodes(nib.load(path).affine)) for path in raw.rglob("*.nii.gz")}
    assert {"RAS", "LPS", "PSR"} <= codes
    folders = {}
    for path in raw.rglob("*.dcm"):
        folders.setdefault(path.parent, set()).add(pydicom.dcmread(path).SeriesInstanceUID)
    assert max(map(len, folders.values())) == 2
    assert {len(path.parent.relative_to(raw).parts) for path in raw.rglob("*.dcm")} == {2, 3}
    mixed = [study for study in raw.iterdir() if list(study.rglob("*.dcm")) and list(study.rglob("*.nii.gz"))]
    assert mixed


def test_uids_are_unique_and_shared_within_study_and_series(demo):
    """Grouping goes by them, whatever the folders."""
    _, raw = demo
    images = [pydicom.dcmread(path) for path in sorted(raw.rglob("*.dcm"))]
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    studies, owner = {}, {}
    for image in images:
        studies.setdefault(image.PatientID, set()).add((image.StudyInstanceUID, image.FrameOfReferenceUID))
        assert owner.setdefault(image.SeriesInstanceUID, image.PatientID) == image.PatientID
    assert all(len(uids) == 1 for uids in studies.values())
    assert len(set().union(*studies.values())) == len(studies)


def test_neither_names_nor_numbers_tell_the_order_of_slices_but_positions_do(demo):
    """After sorting along the normal, neighbours are alike: more than in the order of files and numbers."""
    _, raw = demo
    for images in (images for study in raw.iterdir() for images in series_of(study).values()):
        if len(images) == 1:
            continue
        volume, positions = sorted_series(images)
        steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        assert steps.min() > 3.9 and steps.max() < 7.1
        by_number = np.stack([image.pixel_array
                              for image in sorted(images, key=lambda image: image.InstanceNumber)])
        by_name = np.stack([image.pixel_array for image in images])
        smooth = np.abs(np.diff(volume, axis=0)).mean()
        assert smooth < 0.7 * min(np.abs(np.diff(order.astype(float), axis=0)).mean()
                                  for order in (by_number, by_name))


def test_positions_put_the_head_where_it_is(demo):
    """The centre of the bright voxels, through an MRI series' geometry, is a head's in any view."""
    _, raw = demo
    centers = []
    for images in (images for study in raw.iterdir() for images in series_of(study).values()):
        if images[0].Modality != "MR":
            continue
        volume, positions = sorted_series(images)
        row, column = np.reshape(images[0].ImageOrientationPatient, (2, 3)) * float(images[0].PixelSpacing[0])
        weight = np.where(volume > np.percentile(volume, 75), 1.0, 0)
        mean = [(weight * axis).sum() / weight.sum() for axis in np.indices(volume.shape)]
        step = positions[1] - positions[0]
        centers.append(positions[0] + mean[0] * step + mean[1] * column + mean[2] * row)
    assert len(centers) > 4
    assert (np.abs(np.array(centers) - (0, 0, -10)) < (12, 25, 45)).all()


def test_nifti_in_any_orientation_is_the_same_volume(tmp_path):
    """as_closest_canonical brings voxels and affine of every code to those of the RAS file."""
    rng = np.random.default_rng(0)
    for view in ("axial", "sagittal", "coronal"):
        grid = draw_grid(rng, view, 6)
        volume = rng.integers(0, 1000, (len(grid.positions), 6, 6)).astype(np.int16)
        reference = None
        for code in ("RAS", "LPS", "PSR"):
            write_nifti(tmp_path / view / f"{code}.nii.gz", volume, grid, code)
            image = nib.load(tmp_path / view / f"{code}.nii.gz")
            assert "".join(nib.aff2axcodes(image.affine)) == code and image.get_data_dtype() == np.int16
            canonical = nib.as_closest_canonical(image)
            reference = canonical if reference is None else reference
            assert np.array_equal(canonical.dataobj, reference.dataobj)
            np.testing.assert_allclose(canonical.affine, reference.affine, atol=1e-3)
        z, y, x = (axis[2, 3, 4] for axis in grid.points())               # and the affine is DICOM's, in RAS
        np.testing.assert_allclose(grid.affine() @ (4, 3, 2, 1), (-x, -y, z, 1), atol=1e-3)


def test_one_ct_is_tilted_one_uneven_one_has_a_localizer(demo):
    """What clinics deliver and a reader must repair or report."""
    found = ct_studies(demo)
    images = next(iter(series_of(found["tilted"]).values()))
    _, positions = sorted_series(images)
    normal = np.cross(*np.reshape(images[0].ImageOrientationPatient, (2, 3)))
    step = positions[1] - positions[0]
    angle = np.degrees(np.arccos(normal @ step / np.linalg.norm(step)))
    assert 10 < angle < 22 and angle == pytest.approx(float(images[0].GantryDetectorTilt), abs=0.1)
    _, positions = sorted_series(next(iter(series_of(found["uneven"]).values())))
    assert {round(gap, 1) for gap in np.diff(positions[:, 2])} == {4.0, 5.5, 7.0}
    counts = sorted((len(images), "LOCALIZER" in images[0].ImageType)
                    for images in series_of(found["localizer"]).values())
    assert counts[0] == (1, True) and counts[1][0] > 20 and not counts[1][1]


def test_ct_is_in_hounsfield_units(demo):
    """Air, brain and bone of the DICOM series after rescaling, and of the NIfTI file."""
    found = ct_studies(demo)
    volumes = [sorted_series(max(series_of(found[form]).values(), key=len))[0] for form in CT_FORMS[:3]]
    volumes.append(np.asarray(nib.load(next(found["nifti"].glob("*.nii.gz"))).dataobj))
    for volume in volumes:
        assert -1024 <= volume.min() < -950 and volume.max() > 600
        assert 20 < np.median(volume[(volume > -20) & (volume < 100)]) < 60


def test_labels_agree_with_the_findings_drawn(demo, tmp_path, monkeypatch):
    """Every study is drawn with exactly the findings of its row."""
    drawn = []
    monkeypatch.setattr(demo_studies, "draw_head", lambda rng, findings: drawn.append(list(findings)))
    monkeypatch.setattr(demo_studies, "write_ct", lambda *arguments: None)
    monkeypatch.setattr(demo_studies, "write_mri", lambda *arguments: None)
    write_demo_studies(tmp_path / "demo", studies=12, seed=0, workers=0)
    labels = rows(tmp_path / "demo" / "labels.csv")
    assert labels == rows(demo[0] / "labels.csv")
    assert [row["study_id"] for row in labels] == [f"study_{number:03d}" for number in range(12)]
    assert [[name for name in FINDINGS if row[name] == "1"] for row in labels] == drawn


@pytest.mark.parametrize("studies", [12, 24, 60])
def test_findings_are_balanced_over_halves_and_modes_and_independent(studies):
    """About 40 %; each half of the studies, and MRI and CT, have each finding and its absence."""
    together = []
    for seed in range(20):
        modes, labels = plan_studies(studies, seed)
        ct = np.array(modes) == "ct"
        assert ct.sum() == studies // 3 and (np.abs(labels.mean(0) - 0.4) < 1 / studies + 1e-9).all()
        for part in (ct, ~ct, np.arange(studies) < studies // 2, np.arange(studies) >= studies // 2):
            assert (labels[part].min(0) == 0).all() and (labels[part].max(0) == 1).all()
        together.append((labels[:, 0] & labels[:, 1]).mean())
    assert np.mean(together) == pytest.approx(0.16, abs=0.05)
    assert not np.array_equal(plan_studies(studies, 0)[1], plan_studies(studies, 1)[1])


def test_an_interrupted_set_is_completed_to_the_same_bytes(demo, tmp_path):
    """Half-written studies are made anew; whatever was whole stays; the result is the same."""
    output = tmp_path / "demo"
    shutil.copytree(demo[0], output)
    before = contents(output)
    marker = json.loads((output / "demo.json").read_text())
    (output / "demo.json").write_text(json.dumps({**marker, "complete": False}))
    half, gone, kept = (output / "raw" / f"study_{number:03d}" for number in (1, 2, 3))
    half.rename(half.with_name(f".{half.name}"))
    shutil.rmtree(gone)
    stamp = next(kept.iterdir()).stat().st_mtime_ns
    write_demo_studies(output, studies=12, seed=0, workers=0, size=24)
    assert contents(output) == before and next(kept.iterdir()).stat().st_mtime_ns == stamp


def test_a_finished_set_is_not_made_again_and_other_settings_are_refused(demo):
    """Training asks for it at every start; data with another seed are not mixed with these."""
    output, raw = demo
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert write_demo_studies(output, studies=12, seed=0, workers=0, size=24) == raw
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(UserError, match="another studies, seed"):
        write_demo_studies(output, studies=6, seed=1, workers=0, size=24)


def test_what_is_made_before_changes_nothing(demo, tmp_path, monkeypatch):
    """A study depends on its number and the seed alone, so the number of processes does not matter."""
    def backwards(work, jobs, workers, unit):
        for job in jobs[::-3]:
            work(pickle.loads(pickle.dumps(job)))                          # as a process gets it
    monkeypatch.setattr(demo_studies, "make_missing", backwards)
    raw = write_demo_studies(tmp_path / "demo", studies=12, seed=0, workers=0, size=24)
    made, before = contents(raw), contents(demo[1])
    assert len({name.split("/")[0] for name in made}) == 4
    assert made == {name: before[name] for name in made}


@pytest.mark.parametrize("seed", range(5))
def test_the_test_studies_of_a_dozen_tell_each_finding_apart(seed):
    """Otherwise the demo's figures would all be undefined."""
    _, labels = plan_studies(12, seed)
    splits = plan_splits(labels)
    assert [splits.count(name) for name in ("train", "val", "test")] == [6, 2, 4]
    test = labels[[split == "test" for split in splits]]
    assert (test.min(0) == 0).all() and (test.max(0) == 1).all()
