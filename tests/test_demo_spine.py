"""The procedural spine and its demo series: anatomy, contrasts, geometry, tables, interrupted runs."""

import csv
import functools
import json
import pickle
import shutil
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from datasets import demo_spine
from datasets.demo_spine import (
    FORMS,
    LEAST,
    SIGNALS,
    STAGES,
    cut,
    draw_grid,
    picture,
    places,
    plan_patients,
    write_demo_spine,
)
from datasets.dicom_series import read_series as read_dicom
from datasets.slice_series import Series, read_series, slices_along, spacing_along
from datasets.slices import find_slices
from datasets.spine_phantom import (
    BODIES,
    CORD,
    DISCS,
    MIDDLES,
    REGIONS,
    TISSUES,
    Body,
    draw_spine,
    levels,
    make_spine,
)
from utils.config import UserError

STRAIGHT = {"scale": 1.0, "bends": 0.0, "lean": 0.0}
COARSE = functools.partial(make_spine, step=2.0)     # what the files' tests take instead of 1 mm


@functools.cache
def body(region, step=1.5, lesions=0, **changes):
    """A patient's measures and their Body, made once."""
    patient = {**draw_spine(np.random.default_rng(3), region, lesions), **changes}
    return patient, make_spine(patient, step)


def inside(found, *names):
    """bool [Z, Y, X] of some tissues."""
    return np.isin(found.labels, [TISSUES.index(name) for name in names])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small set, made in this process on a coarse lattice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_spine, "make_spine", lambda patient, step: COARSE(patient))
        return write_demo_spine(tmp_path_factory.mktemp("data") / "demo", subjects=4, seed=0, size=48)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mask_of(path):
    """A mask as a Series, so that it is cut as its image is."""
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    return Series(np.asarray(image.dataobj).T, image.affine[:, [2, 1, 0, 3]], path)


def spines(demo):
    """(row of series.csv, Series, cord, lesion) of every series of a spine."""
    for row in rows(demo / "series.csv"):
        if row["anatomy"] == "spine":
            stem = str(demo / row["path"]).removesuffix(".nii.gz")
            yield row, read_series(demo / row["path"]), *(mask_of(f"{stem}_{name}.nii.gz")
                                                          for name in ("cord", "lesion"))


@pytest.mark.parametrize("region", REGIONS)
def test_every_voxel_column_of_the_canal_lies_between_bodies_and_spinous_processes(region):
    """In front of the cord's fluid lies the spine, behind it muscle and fat, then skin, then air."""
    _, found = body(region, **STRAIGHT)
    middle = found.labels[:, :, found.labels.shape[2] // 2]
    names = np.array(TISSUES)[middle]
    for line in names[(names == "csf").any(1) & (found.z[:, 0, 0] < -25)]:
        first, last = np.flatnonzero(line == "csf")[[0, -1]]
        assert np.isin(line[first - 12:first], ("cortex", "marrow", "annulus", "nucleus", "dry", "ligament",
                                                "vein", "fat")).all()
        assert "muscle" in line[last:] or "cortex" in line[last:] or "fat" in line[last:]
        assert list(dict.fromkeys(line[last:]))[-1] == "air" or region == "lumbar"


@pytest.mark.parametrize("region", REGIONS)
def test_bodies_and_discs_take_turns(region):
    """Down the middle of the bodies, marrow where the table puts a body and disc where it puts a disc."""
    patient, found = body(region, **STRAIGHT)
    level, along, half, _ = levels(found.z[:, 0, 0])
    ahead = {"cervical": 16, "thoracic": 21, "lumbar": 25}[region]
    line = found.labels[:, np.argmin(np.abs(found.y.ravel() + ahead)), found.labels.shape[2] // 2]
    below = found.z[:, 0, 0] < -5
    deep = np.abs(along) < half - 3
    assert set(np.array(TISSUES)[line[below & deep]]) <= {"marrow", "vein"}
    between = np.abs(along) > half + 0.6
    assert set(np.array(TISSUES)[line[below & between]]) <= {"nucleus", "dry", "annulus"}
    assert len(set(level[below])) >= 5


def test_dry_discs_have_no_nucleus():
    """The option of a patient's disc shows in that disc alone."""
    dry = np.zeros(len(BODIES), bool)
    dry[20] = True                                   # L3
    patient = {**draw_spine(np.random.default_rng(3), "lumbar"), **STRAIGHT, "dry": dry}
    found = make_spine(patient, 1.5)
    place = np.abs(found.z - (MIDDLES[20] - BODIES[20] / 2 - DISCS[20] / 2)) < 6
    assert inside(found, "dry").any() and not (inside(found, "dry") & ~place).any()
    assert not (inside(found, "nucleus") & place).any()


@pytest.mark.parametrize("region", REGIONS)
def test_the_cord_lies_in_fluid_in_a_canal(region):
    """One piece, which touches nothing but fluid and roots below the foramen magnum."""
    _, found = body(region)
    cord = inside(found, *CORD)
    assert ndimage.label(cord)[1] == 1
    rim = ndimage.binary_dilation(cord) & ~cord
    around = Counter(np.array(TISSUES)[found.labels[rim]])
    assert set(around) <= {"csf", "root", "brain", "ligament"}
    assert around["csf"] + around["root"] > 0.9 * rim.sum()


def test_the_cord_has_an_adults_size_and_tapers_to_the_conus():
    """50 to 100 mm2 across in the neck, 30 to 60 in the chest; nothing below the conus but roots."""
    area = {}
    for region in REGIONS:
        patient, found = body(region, 1.0, **STRAIGHT)
        area[region] = inside(found, *CORD).sum((1, 2)), found.z[:, 0, 0]
    neck, z = area["cervical"]
    assert 50 < neck[(z < -60) & (z > -90)].mean() < 100
    chest, z = area["thoracic"]
    assert 30 < chest[(z < -240) & (z > -290)].mean() < 60
    loins, z = area["lumbar"]
    patient, found = body("lumbar", 1.0, **STRAIGHT)
    assert loins[z < patient["conus"] - 1].sum() == 0
    tip = loins[(z > patient["conus"]) & (z < patient["conus"] + 20)]
    assert tip[0] < 0.5 * tip[-1] and (np.diff(ndimage.uniform_filter1d(tip.astype(float), 5)) > -2).all()
    assert inside(found, "root")[(z < patient["conus"] - 10)].any()


def test_grey_matter_is_a_core_of_a_sixth_to_a_third_of_the_cord():
    """It shows on T2*w, so it must be there, inside, and on both sides."""
    _, found = body("cervical", 1.0, **STRAIGHT)
    grey, cord = inside(found, "grey"), inside(found, *CORD)
    level = np.abs(found.z[:, 0, 0] + 75) < 10
    assert 0.1 < grey[level].sum() / cord[level].sum() < 0.35
    beside = ndimage.binary_dilation(grey[level], [[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])
    assert (beside & ~cord[level]).sum() < 0.02 * grey[level].sum()
    halves = [grey[level][..., side].sum() for side in (found.u[0, 0] > 0, found.u[0, 0] < 0)]
    assert 0.8 < halves[0] / halves[1] < 1.25


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_lesions_are_as_many_as_asked_inside_the_cord(region, count):
    """Each is a piece of its own, and the healthy cord of the same patient is the cord with them."""
    patient = draw_spine(np.random.default_rng(5), region, count)
    found, healthy = (make_spine({**patient, "lesions": some}, 1.5) for some in (patient["lesions"], []))
    assert len(patient["lesions"]) == count and inside(found, "lesion").any() == (count > 0)
    if region != "lumbar":                           # there they may touch
        assert ndimage.label(inside(found, "lesion"), np.ones((3, 3, 3)))[1] == count
    assert np.array_equal(inside(found, *CORD), inside(healthy, *CORD))
    assert np.array_equal(inside(found, "lesion"), found.labels != healthy.labels)


def test_lattice_changes_the_grid_and_not_the_anatomy():
    """Volumes in mm3 agree between steps."""
    volumes = []
    for step in (1.0, 1.5):
        _, found = body("cervical", step)
        volumes.append([inside(found, *names).sum() * step ** 3 for names in (CORD, ("csf",), ("marrow",))])
    np.testing.assert_allclose(*volumes, rtol=0.1)


def test_each_region_shows_its_organs():
    """What a radiologist knows a region by."""
    shown = {region: {name for name in TISSUES if inside(body(region)[1], name).sum() > 100}
             for region in REGIONS}
    assert {"brain", "gristle", "gland"} <= shown["cervical"]
    assert "lung" in shown["thoracic"] and {"kidney", "liver", "bowel"} <= shown["lumbar"]
    assert "kidney" not in shown["cervical"] and "brain" not in shown["thoracic"] | shown["lumbar"]


def test_patients_differ_and_one_seed_makes_one_patient():
    """Neither copies nor surprises."""
    first, again, other = (make_spine(draw_spine(np.random.default_rng(seed), "cervical"), 2.0).labels
                           for seed in (0, 0, 1))
    assert np.array_equal(first, again) and (first != other).mean() > 0.03


def test_a_column_is_what_its_formula_says():
    """Against a loop over voxels: inside where the two ratios' powers sum below 1; mirrored by side -1."""
    found = Body((0, 0, 0), (12, 16, 20), 1.0)
    points = [(-5, 1, 3, 4, 3), (0, 0, 4, 3, 2), (4, -1, 3, 2, 2)]
    found.column("muscle", points, (-1, 1), power=2.0)
    expected = np.zeros(found.labels.shape, bool)
    for i, j, k in np.ndindex(expected.shape):
        z, y, x = found.z[i, 0, 0], found.y[j, 0], found.u[0, 0, k]
        for row in points:
            if z == row[0]:                          # between them it is interpolated
                expected[i, j, k] |= ((y - row[1]) / row[3]) ** 2 + ((abs(x) - row[2]) / row[4]) ** 2 < 1
    at = np.isin(found.z[:, 0, 0], [row[0] for row in points[:-1]])
    assert expected[at].any() and np.array_equal(inside(found, "muscle")[at], expected[at])
    assert not found.labels[np.abs(found.z[:, 0, 0]) > 5.1].any()


@pytest.mark.parametrize("view", ["sagittal", "coronal", "axial"])
def test_series_are_cut_where_their_affine_says(view):
    """Against scipy's interpolation at the points of the affine, the mean of three across the slice."""
    rng = np.random.default_rng(1)
    patient, found = body("cervical", 3.0)
    series = {"view": view, "location": "cervical", "anatomy": "spine", "slices": 5}
    grid = draw_grid(rng, series, found, patient["scale"], 24)
    volume = ndimage.gaussian_filter(rng.random(found.labels.shape, np.float32), 1.5)
    expected = 0
    for part in (-1, 0, 1):
        index = np.indices((24, 24, 5)).reshape(3, -1) + np.array([[0], [0], [part / 3]])
        x, y, z = (grid.affine() @ np.vstack([index, np.ones(index.shape[1])]))[:3] * [[-1], [-1], [1]]
        at = (np.stack([z, y, x]) / patient["scale"] - found.corner[:, None]) / found.step
        expected = expected + ndimage.map_coordinates(volume, at, order=1, mode="nearest") / 3
    ours = cut(volume, places(found, grid, patient["scale"]))
    np.testing.assert_allclose(ours, expected.reshape(24, 24, 5).T, atol=1e-4)


def tissue_means(region, sequence, view="axial"):
    """{tissue: mean signal of a picture where it fills the voxel}."""
    rng = np.random.default_rng(7)
    patient, found = body(region, 1.0, 2)
    series = {"view": view, "location": region, "anatomy": "spine", "slices": 12}
    grid = draw_grid(rng, series, found, patient["scale"], 160)
    points = places(found, grid, patient["scale"])
    image = picture(found, np.zeros(found.labels.shape, np.float32), points, sequence, rng)
    parts = {name: cut(inside(found, name).astype(np.float32), points)
             for name in (*CORD, "csf", "fat", "muscle", "marrow", "air")}
    return {name: image[part > 0.9].mean() for name, part in parts.items() if (part > 0.9).sum() > 5}


def test_sequences_have_their_contrasts():
    """T2w: fluid brightest; T1w: fat bright, fluid dark; T2*w: bone dark, grey matter above white."""
    t1, t2, t2s = (tissue_means("cervical", sequence) for sequence in ("T1w", "T2w", "T2*w"))
    assert t2["csf"] > 2 * t2["white"] and t2["csf"] > 1.2 * t2["fat"]
    assert t1["fat"] > 1.3 * t1["muscle"] and t1["csf"] < 0.6 * t1["white"] and t1["marrow"] > t1["csf"]
    assert t2s["marrow"] < 0.6 * t2s["muscle"] and t2s["csf"] > t2s["grey"] > 1.2 * t2s["white"]
    assert all(found["air"] < 0.3 * found["muscle"] for found in (t1, t2, t2s))


def test_lesions_are_bright_on_t2w_and_t2star_and_faint_on_t1w():
    """Relative to the white matter around them, in the table that pictures are made of."""
    lesion, white = np.array(SIGNALS["lesion"][:3]), np.array(SIGNALS["white"][:3])
    assert (lesion / white)[1] > 1.5 and (lesion / white)[2] > 1.5 and 0.75 < (lesion / white)[0] < 1
    assert set(SIGNALS) == set(TISSUES)


def test_noise_grain_bias_and_gain_differ_from_picture_to_picture():
    """Each series is from another scanner; its texture is the patient's."""
    patient, found = body("cervical", 3.0)
    grid = draw_grid(np.random.default_rng(0), {"view": "axial", "location": "cervical", "anatomy": "spine",
                                                "slices": 4}, found, patient["scale"], 32)
    points, flat = places(found, grid, patient["scale"]), np.zeros(found.labels.shape, np.float32)
    texture = np.random.default_rng(1).standard_normal(flat.shape, np.float32)
    first, again, other, plain = (picture(found, grain, points, "T2w", np.random.default_rng(seed))
                                  for seed, grain in ((0, texture), (0, texture), (1, texture), (0, flat)))
    assert np.array_equal(first, again) and (first >= 0).all()
    assert not np.allclose(first / first.mean(), other / other.mean(), rtol=0.05)
    assert not np.allclose(first, plain)


def test_every_series_reads_back_with_masks_on_its_voxels(demo):
    """Both readers of the project give the voxels of the masks: same shape, same affine."""
    seen = []
    for row, series, cord, lesion in spines(demo):
        for mask in (cord, lesion):
            assert mask.data.shape == series.data.shape and set(np.unique(mask.data)) <= {0, 1}
            np.testing.assert_allclose(mask.affine, series.affine, atol=2e-3)
        assert not (lesion.data & ~cord.data & 1).any()
        assert series.notes == [] and series.data.min() >= 0 and series.data.std() > 0
        seen.append((row["path"].endswith(".nii.gz"), row["view"]))
        if not seen[-1][0]:
            data, affine, modality, notes = read_dicom(sorted((demo / row["path"]).iterdir()))
            assert modality == "MR" and notes == [] and np.array_equal(data.T, series.data)
            np.testing.assert_allclose(affine[:, [2, 1, 0, 3]], series.affine)
    assert {kind for kind, _ in seen} == {True, False} and len({view for _, view in seen}) == 3


def test_files_are_dicom_and_nifti_of_several_orientations(demo):
    """As clinics deliver them."""
    paths = [demo / row["path"] for row in rows(demo / "series.csv") if row["path"].endswith(".nii.gz")]
    codes = {"".join(nib.aff2axcodes(nib.load(path).affine)) for path in paths}
    assert len(codes) >= 4 and codes <= set(FORMS)


def test_views_are_what_the_table_says(demo):
    """Slices lie farthest apart across the view; sagittal pixels are near-isotropic and T2*w has fewer."""
    for row in rows(demo / "series.csv"):
        series = read_series(demo / row["path"])
        apart, *pixels = spacing_along(series, row["view"])
        stack = slices_along(series, row["view"])
        assert apart > 1.05 * max(pixels) or row["sequence"] != "T1w" or apart > 3     # 48 pixels are coarse
        assert stack.shape[1:] == ((36, 36) if row["sequence"] == "T2*w" else (48, 48)) and len(stack) >= 12
        assert pixels[0] == pytest.approx(pixels[1], rel=1e-4)


def test_series_of_one_patient_show_one_cord(demo):
    """A voxel of the cord of one series lies in or beside the cord of another, wherever that reaches."""
    found = {}
    for row, _, cord, _ in spines(demo):
        found.setdefault(row["patient"], []).append(cord)
    compared = 0
    for masks in found.values():
        first = masks[0]
        world = first.affine @ np.vstack([np.argwhere(first.data).T, np.ones(first.data.sum())])
        for other in masks[1:]:
            at = np.rint(np.linalg.solve(other.affine, world)[:3]).astype(int).T
            at = at[((at >= 1) & (at < np.array(other.data.shape) - 1)).all(1)]
            if len(at) > 30 and other.data.sum() > 30:
                near = ndimage.binary_dilation(other.data, np.ones((3, 3, 3)))
                assert near[tuple(at.T)].mean() > 0.85
                compared += 1
    assert compared >= 6


def test_tables_tell_what_the_masks_show(demo):
    """Per slice, in the order in which the project's reader cuts a series."""
    tables = {stage: rows(demo / f"{stage}.csv") for stage in STAGES}
    for row, _, cord, lesion in spines(demo):
        shown = [slices_along(mask, row["view"]).any((1, 2)).astype(int) for mask in (cord, lesion)]
        own = {stage: [line for line in table if line["path"] == row["path"]]
               for stage, table in tables.items()}
        assert [row["cord"], row["lesion"]] == [str(int(found.any())) for found in shown]
        assert [line["label"] for line in own["cord"]] == np.array(["absent", "present"])[shown[0]].tolist()
        assert [int(line["index"]) for line in own["cord"]] == list(range(len(shown[0])))
        for stage, labels in (("anatomy", {"spine"}), ("sequence", {row["sequence"]}),
                              ("location_view", {f"{row['location']}_{row['view']}"})):
            assert len(own[stage]) == len(shown[0]) and {line["label"] for line in own[stage]} == labels
        shown = np.array(shown) * (row["sequence"] == "T2w")       # the cascade has no masks of the others
        for stage, name in (("cord_masks", "cord"), ("lesion_masks", "lesion")):
            assert [int(line["index"]) for line in own[stage]] == np.flatnonzero(shown[0]).tolist()
            assert {line["mask"] for line in own[stage]} <= {
                row["path"].removesuffix(".nii.gz") + f"_{name}.nii.gz"}
        assert [line["label"] for line in own["lesion_masks"]] == np.array(["healthy", "lesion"])[
            shown[1][shown[0] > 0]].tolist()
    splits = {row["patient"]: row["split"] for row in rows(demo / "series.csv")}
    for table in tables.values():
        assert all(line["split"] == splits[line["patient"]] and line["axis"] in line["path"]
                   for line in table)


def test_what_is_no_spine_is_in_the_anatomy_table_alone(demo):
    """Brains and knees have something to be refused by, and no masks."""
    others = [row for row in rows(demo / "series.csv") if row["anatomy"] == "other"]
    assert len(others) == 4 and {row["location"] for row in others} == {"brain", "knee"}
    for row in others:
        count = slices_along(read_series(demo / row["path"]), row["view"]).shape[0]
        lines = {stage: [line for line in rows(demo / f"{stage}.csv") if line["path"] == row["path"]]
                 for stage in STAGES}
        assert {line["label"] for line in lines.pop("anatomy")} == {"other"} and not any(lines.values())
        assert row["cord"] == row["lesion"] == "0" and count >= 12
    assert len(list(demo.rglob("*_cord.nii.gz"))) == len(list(demo.rglob("*_lesion.nii.gz"))) == 4 * 5


@pytest.mark.parametrize("stage", STAGES)
def test_the_slices_reader_takes_every_table(demo, stage):
    """Each stage of the cascade trains on one of them as it is."""
    slices, classes, _ = find_slices(demo / f"{stage}.csv")
    assert len(slices) == len(rows(demo / f"{stage}.csv")) and len(classes) >= 2
    if stage == "location_view":
        views = ("sagittal", "coronal", "axial")
        assert set(classes) <= {f"{region}_{view}" for region in REGIONS for view in views}
    assert all((slice.mask is not None) == stage.endswith("masks") for slice in slices)


@pytest.mark.parametrize("seed", range(4))
def test_splits_hold_every_class_and_patients_with_and_without_lesions(seed):
    """Otherwise a stage of the demo has nothing to learn from, or to be tested on."""
    patients = plan_patients(24, seed)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        own = [patient for patient in patients if patient["split"] == split]
        assert len(own) == count and {patient["region"] for patient in own} == set(REGIONS)
        assert {patient["lesions"] > 0 for patient in own} == {True, False}
        series = [series for patient in own for series in patient["series"]]
        assert {series["location"] for series in series if series["anatomy"] == "other"} == {"brain", "knee"}
        assert len({(one["location"], one["view"]) for one in series if one["anatomy"] == "spine"}) == 9
        assert {one["sequence"] for one in series} == {"T1w", "T2w", "T2*w"}
    assert max(patient["lesions"] for patient in patients) == 3
    assert {one["form"] for patient in patients for one in patient["series"]} == set(FORMS)
    assert patients == plan_patients(24, seed) and patients != plan_patients(24, seed + 1)


def test_a_patient_depends_on_number_and_seed_alone(demo, tmp_path, monkeypatch):
    """Made backwards from pickled jobs, as processes get them: byte for byte the same."""
    def backwards(work, jobs, workers, unit):
        for job in jobs[::-2]:
            work(pickle.loads(pickle.dumps(job)))
    monkeypatch.setattr(demo_spine, "make_spine", lambda patient, step: COARSE(patient))
    monkeypatch.setattr(demo_spine, "make_missing", backwards)
    monkeypatch.setattr(demo_spine, "write_tables", lambda *arguments: None)
    write_demo_spine(tmp_path / "demo", subjects=4, seed=0, size=48)
    made, before = contents(tmp_path / "demo/series"), contents(demo / "series")
    assert len({name.split("/")[0] for name in made}) == 2
    assert made == {name: before[name] for name in made}


def test_an_interrupted_set_is_completed_to_the_same_bytes(demo, tmp_path, monkeypatch):
    """Half-written patients are made anew; whatever was whole stays."""
    monkeypatch.setattr(demo_spine, "make_spine", lambda patient, step: COARSE(patient))
    output = tmp_path / "demo"
    shutil.copytree(demo, output)
    marker = json.loads((output / "demo.json").read_text())
    (output / "demo.json").write_text(json.dumps({**marker, "complete": False}))
    half, kept = output / "series/spine_002", output / "series/spine_001"
    half.rename(half.with_name(f".{half.name}"))
    (output / "cord.csv").unlink()
    stamp = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    write_demo_spine(output, subjects=4, seed=0, size=48)
    assert contents(output) == contents(demo)
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == stamp


def test_a_finished_set_is_not_made_again_and_other_settings_are_refused(demo, tmp_path, monkeypatch):
    """Nothing is mixed, nothing of the user's is overwritten."""
    monkeypatch.setattr(demo_spine, "write_patient", None)
    before = contents(demo)
    assert write_demo_spine(demo, subjects=4, seed=0, size=48) == demo
    with pytest.raises(UserError, match="another subjects, seed"):
        write_demo_spine(demo, subjects=6, seed=1, size=48)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other things"):
        write_demo_spine(tmp_path)
    assert contents(demo) == before and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("subjects, size", [(LEAST[0] - 1, 160), (8, LEAST[1] - 1)])
def test_a_set_too_small_to_show_anything_is_refused(tmp_path, subjects, size):
    """Before anything is written."""
    with pytest.raises(UserError, match="patients and"):
        write_demo_spine(tmp_path / "demo", subjects, size=size)
    assert not (tmp_path / "demo").exists()
