"""Pairs from single X-rays: what is in the target, what is not, and folders that survive an interruption."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from test_lungs import draw_chest
from threadpoolctl import threadpool_info

from datasets import pair_files, pairs
from datasets.demo_files import dicom_image
from datasets.io import read_image, write_nifti
from datasets.nuisance import draw_pose, pose_grid, warp
from datasets.pair_files import (
    CRASHED,
    case_prefixes,
    describe_sources,
    find_sources,
    find_volumes,
    run_jobs,
    write_cases,
)
from datasets.pairs import (
    FINDING_PROBABILITIES,
    clean_map,
    make_pair,
    prepare_file,
    prepare_image,
    write_pairs,
)
from utils.config import BadFile, UserError

SIZE = 96
STILL = {"rotation": 0.0, "shift": 0.0, "scale": 0.0, "breath": 0.0, "bend": 0.0}
PLAIN = {"exposure": 0.0, "local_contrast": 0.0, "noise": 0.0, "blur": 0.0, "devices": 0.0}


@pytest.fixture(scope="module")
def prepared():
    return prepare_image(draw_chest()[0], SIZE)


def pair_of(prepared, seed, **settings):
    return make_pair(None, np.random.default_rng(seed), SIZE, prepared=prepared, **settings)


def test_nuisance_alone_gives_a_target_of_exact_zeros(prepared):
    """Pose, breath, exposure, noise and devices are no change of health, however strong."""
    for seed in range(6):
        pair = pair_of(prepared, seed, unchanged=1.0, devices=1.0, rotation=15.0, exposure=0.6)
        assert not pair["diff"].any() and not pair["params"]["changed"]
        assert np.abs(pair["current"] - pair["prior"]).mean() > 0.02


def test_without_nuisance_the_target_is_the_difference_of_the_images(prepared):
    """Current minus prior in units of the image: sign and size of the target are those of the images."""
    for seed in range(8):
        pair = pair_of(prepared, seed, unchanged=0.0, **STILL, **PLAIN)
        seen = pair["current"] - pair["prior"]
        changed = np.abs(pair["diff"]) > 0.05
        if changed.sum() < 20:
            continue
        assert np.corrcoef(seen[changed], pair["diff"][changed])[0, 1] > 0.9
        assert np.abs(seen[pair["diff"] == 0]).mean() < 0.03


@pytest.mark.parametrize("kind", FINDING_PROBABILITIES)
def test_the_record_tells_direction_and_sign(prepared, kind):
    """New opacities are positive, resolved ones negative; a pneumothorax is the other way round."""
    seen = set()
    for seed in range(16):
        pair = pair_of(prepared, seed, unchanged=0.0, findings={kind: 1.0})
        (finding,) = pair["params"]["findings"]
        direction, total = finding["direction"], pair["diff"].sum()
        assert finding["kind"] == kind and direction != "unchanged"
        if not finding["area"]:
            continue
        more = direction in ("new", "grown")
        assert (total > 0) == (more != (kind == "pneumothorax"))
        seen.add(more)
    assert seen == {True, False}


def test_a_pose_moves_the_picture_as_its_numbers_say(prepared):
    """Shift is down and right, in parts of the longer side; every image is magnified by 3 % beside that."""
    base, lungs, _ = prepared
    rng = np.random.default_rng(0)
    spot = np.zeros_like(base)
    spot[40:50, 30:40] = 1
    pose = {**draw_pose(rng, 0, 0, 0, 0), "shift": [0.1, -0.05]}
    moved = warp(spot, pose_grid(base.shape, lungs, pose, 0.0))
    middle = (np.array(base.shape) - 1) / 2
    before, after = (np.array(ndimage.center_of_mass(image)) for image in (spot, moved))
    moved_by = [0.1 * SIZE, -0.05 * SIZE]
    np.testing.assert_allclose(after, middle + 1.03 * (before - middle) + moved_by, atol=0.5)


def test_breath_moves_the_diaphragm_and_spares_the_apex(prepared):
    """Inspiration lowers the base of the lungs; the ribs above hardly move."""
    base, lungs, _ = prepared
    pose = {"rotation": 0.0, "shift": [0.0, 0.0], "scale": 1.0, "breath": 0.06, "bend": 0}
    still = {**pose, "breath": 0.0}
    grids = [pose_grid(base.shape, lungs, p, 0.0)[0, :, base.shape[1] // 2, 1] for p in (still, pose)]
    down = (grids[0] - grids[1]).numpy() * base.shape[0] / 2          # pixels that content moves down
    rows = np.flatnonzero(lungs.any((0, 2)))
    assert abs(down[rows[0]]) < 0.5
    assert down[rows[-1]] == pytest.approx(0.06 * SIZE, rel=0.25)


def test_images_and_target_keep_their_ranges(prepared):
    """float32; images exactly in [0, 1] and using it; a changed pair has a target, JSON takes the record."""
    for seed in range(6):
        pair = pair_of(prepared, seed, unchanged=0.0)
        for name in ("prior", "current", "diff"):
            assert pair[name].shape == (SIZE, SIZE) and pair[name].dtype == np.float32
        for name in ("prior", "current"):
            assert pair[name].min() == 0 and pair[name].max() == 1
        assert np.abs(pair["diff"]).max() <= 1
        json.dumps(pair["params"])


def test_no_change_lies_far_from_the_lungs(prepared):
    """Where nothing is drawn, the target must be zero: the outer border and the neck."""
    for seed in range(8):
        diff = pair_of(prepared, seed, unchanged=0.0, **STILL)["diff"]
        assert not diff[:6].any() and not diff[:, :3].any() and not diff[:, -3:].any()


def test_faint_and_small_changes_are_zeroed():
    """Below 0.015, or no larger than 50 pixels of a 512-pixel image, a change is not a target."""
    diff = np.zeros((512, 512), np.float32)
    diff[10:20, 10:15] = 0.5                         # 50 pixels
    diff[50:60, 50:56] = -0.5                        # 60 pixels
    diff[100:200, 100:200] = 0.014
    cleaned = clean_map(diff)
    assert np.count_nonzero(cleaned) == 60 and cleaned.min() == -0.5


def test_the_same_generator_gives_the_same_pair(prepared):
    """No global random state takes part."""
    first, second, other = (pair_of(prepared, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], second[name]) for name in ("prior", "current", "diff"))
    assert first["params"] == second["params"]
    assert not np.array_equal(first["current"], other["current"])


@pytest.fixture
def xrays(tmp_path):
    """Three images of two patients, one of them broken, one constant."""
    data = tmp_path / "xrays"
    for number, name in enumerate(("a/one.nii.gz", "a/two.nii.gz", "b_1/one.nii.gz")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(data / name, draw_chest((120, 140), number)[0])
    (data / "b_1/broken.png").write_bytes(b"no picture")
    write_nifti(data / "b_1/flat.nii.gz", np.ones((80, 80), np.float32))
    return data


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_number_of_processes_does_not_matter(xrays, tmp_path):
    """A case depends on the seed and its name alone."""
    results = []
    for workers in (0, 2):
        counts = write_pairs(find_sources(xrays), tmp_path / f"w{workers}", 2, SIZE, 1, workers, {})
        assert counts == {"made": 6, "kept": 0, "bad": 2}
        results.append(contents(tmp_path / f"w{workers}"))
    assert results[0] == results[1]


def test_cases_are_what_the_data_set_expects(xrays, tmp_path):
    """<patient>_<image>_<number> with three small files that read back as made, and bad files listed."""
    output = tmp_path / "pairs"
    write_pairs(find_sources(xrays), output, 2, SIZE, 0, 0, {"unchanged": 0.0})
    cases = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert cases == [f"{image}_{n:03d}" for image in ("a_one", "a_two", "b-1_one") for n in range(2)]
    for case in cases:
        params = json.loads((output / case / "params.json").read_text())
        assert params["case"] == case and params["seed"] == 0
        assert params["lungs"]["right"] in ("contrast", "template")
        for name in ("prior", "current", "diff_map"):
            file = output / case / f"{name}.nii.gz"
            assert read_image(file).shape == (SIZE, SIZE)
            assert nib.load(file).get_data_dtype() == (np.int16 if name == "diff_map" else np.uint8)
    rows = list(csv.DictReader((output / "bad_files.csv").open()))
    assert [os.path.basename(row["path"]) for row in rows] == ["broken.png", "flat.nii.gz"]


def test_an_interrupted_run_leaves_whole_cases_and_is_completed(xrays, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a case: the next run ends with the very files of a run never stopped."""
    sources = find_sources(xrays)
    write_pairs(sources, tmp_path / "whole", 2, SIZE, 0, 0, {})
    real, calls = pair_files.write_nifti, []

    def interrupted(path, *args, **options):
        calls.append(path)
        if len(calls) == 8:                          # the second file of the third case
            raise KeyboardInterrupt
        real(path, *args, **options)

    monkeypatch.setattr(pair_files, "write_nifti", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(sources, tmp_path / "broken", 2, SIZE, 0, 0, {})
    monkeypatch.undo()
    finished = [path for path in (tmp_path / "broken").iterdir() if path.is_dir() and path.name[0] != "."]
    assert len(finished) == 2 and all(len(list(path.iterdir())) == 4 for path in finished)
    counts = write_pairs(sources, tmp_path / "broken", 2, SIZE, 0, 0, {})
    assert counts == {"made": 4, "kept": 2, "bad": 2}
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_killed_process_ends_the_run_in_one_line():
    """By the system when memory runs out: no traceback of the pool."""
    with pytest.raises(UserError, match="was killed: .* --workers"):
        list(run_jobs(os._exit, [1, 1], 1))


def square_or_crash(number):
    """A job; those of 3 and 17 end their process as a decoder in C++ does."""
    if number in (3, 17):
        os.kill(os.getpid(), signal.SIGSEGV)
    return number ** 2


def numpy_threads(job):
    return [pool["num_threads"] for pool in threadpool_info()]


def test_a_process_computes_on_one_thread():
    """As many threads as cores in each of as many processes wait for each other more than they compute."""
    (found,) = run_jobs(numpy_threads, [0], 1)
    assert found and set(found) == {1}


@pytest.mark.parametrize("jobs, workers", [(range(20), 2), (range(20), 5), ([17, 3], 1), ([3], 4), ([], 1)])
def test_a_crash_loses_its_own_job_alone(jobs, workers):
    """Every job has one result; in more processes than one, all that run beside the culprit end with it."""
    results = run_jobs(square_or_crash, list(jobs), workers, crashed=lambda number: f"no {number}")
    expected = [f"no {number}" if number in (3, 17) else number ** 2 for number in jobs]
    assert sorted(results, key=str) == sorted(expected, key=str)


def crash_when_the_other_is_at_its_second_case(path, size, settings):
    """Prepare a source: "b" ends its process, once ``make_one`` has been called twice for "a"."""
    while path.name == "b":
        if len(Path(settings["calls"]).read_bytes()) >= 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(0.01)
    return path


def make_one(prepared, rng, size, settings):
    """Make a case; the second one ever does not end before the crash."""
    with open(settings["calls"], "ab") as calls:
        calls.write(b".")
    if len(Path(settings["calls"]).read_bytes()) == 2:
        time.sleep(60)
    image = rng.random((size, size))
    return {"prior": image, "current": image, "diff": image, "params": {}}


def test_a_source_that_crashes_is_listed_and_those_beside_it_are_completed(tmp_path):
    """A source whose first case is made when another one's crash ends its process gets its second case."""
    output, calls = tmp_path / "pairs", tmp_path / "calls"
    calls.touch()
    counts = write_cases([(name, Path(name)) for name in "abc"], output, 2, 32, 0, 2, {"calls": str(calls)},
                         crash_when_the_other_is_at_its_second_case, make_one)
    assert counts == {"made": 4, "kept": 0, "bad": 1} and calls.read_bytes() == b"....."
    assert list(csv.DictReader((output / "bad_files.csv").open())) == [{"path": "b", "reason": CRASHED}]
    cases = {path.name: len(list(path.iterdir())) for path in output.iterdir() if path.is_dir()}
    assert cases == {"a_a_000": 4, "a_a_001": 4, "c_c_000": 4, "c_c_001": 4}


def test_more_pairs_extend_a_folder_and_other_settings_do_not_mix(xrays, tmp_path):
    """Old cases stay as they are; one folder never holds cases of two recipes, nor other people's files."""
    sources, output = find_sources(xrays), tmp_path / "pairs"
    write_pairs(sources, output, 1, SIZE, 0, 0, {})
    before = contents(output)
    assert write_pairs(sources, output, 2, SIZE, 0, 0, {})["kept"] == 3
    assert before.items() <= contents(output).items()
    with pytest.raises(UserError, match="another unchanged"):
        write_pairs(sources, output, 2, SIZE, 0, 0, {"unchanged": 0.5})
    with pytest.raises(UserError, match="another seed"):
        write_pairs(sources, output, 2, SIZE, 1, 0, {})
    with pytest.raises(UserError, match="holds other things"):
        write_pairs(sources, xrays, 2, SIZE, 0, 0, {})


def test_nothing_usable_is_an_error(xrays, tmp_path):
    """An empty folder, or one with broken images only, must not end as an empty data set."""
    with pytest.raises(UserError):
        find_sources(tmp_path / "nowhere")
    broken = [("b", xrays / "b_1/broken.png")]
    with pytest.raises(UserError, match="none of 1 files.*broken.png: "):
        write_pairs(broken, tmp_path / "none", 1, SIZE, 0, 0, {})
    with pytest.raises(UserError, match="no image"):
        write_pairs([], tmp_path / "empty", 1, SIZE, 0, 0, {})


def test_the_patient_comes_from_the_folder_the_name_or_a_table(xrays, tmp_path):
    """A split by patient is only as good as this name."""
    assert [patient for patient, _ in find_sources(xrays)] == ["a", "a", "b_1", "b_1", "b_1"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("p7_first.png", "p7-second.png", "p8.v2.png", "_x.png"):
        (flat / name).write_bytes(b"x")
    assert [patient for patient, _ in find_sources(flat)] == ["_x", "p7", "p7", "p8.v2"]
    table = tmp_path / "patients.csv"
    table.write_text("path,patient\np7_first.png,A\np7-second.png,B\np8.v2.png,A\n_x.png,C\n")
    assert dict(find_sources(flat, table)) == {"C": flat / "_x.png", "B": flat / "p7-second.png",
                                               "A": flat / "p8.v2.png"}
    table.write_text("path,patient\np7_first.png,A\n")
    with pytest.raises(UserError, match="no row for"):
        find_sources(flat, table)
    table.write_text("file;patient\n")
    with pytest.raises(UserError, match="columns path and patient"):
        find_sources(flat, table)
    for text, message in (("path,patient\np7_first.png\n", "line 2: 1 cells under 2 columns"),
                          ("path,patient\n\xff,A\n", "cannot be read"),
                          (f"path,patient\n{'x' * 300},A\n", "no row for")):
        table.write_text(text, encoding="latin1")
        with pytest.raises(UserError, match=message):
            find_sources(flat, table)


def test_the_user_is_told_who_was_found(tmp_path):
    """A wrong guess puts a patient on both sides of the split, and nothing else would tell."""
    names = [f"d+{day:03d}_PA_p{number}.png" for day, number in ((0, 1), (2, 1), (0, 2), (7, 2), (9, 3))]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    first, warning = describe_sources(find_sources(tmp_path), tmp_path)
    shown = f"d+000: {names[0]}, d+002: {names[1]}, d+007: {names[3]}"
    assert first == f"5 images of 4 patients, such as {shown}"
    assert warning.startswith(f"warning: by their names the 5 images directly in {tmp_path} are of 4 ")
    assert "--patients CSV" in warning
    table = tmp_path / "patients.csv"
    rows = [f"{name},{name[-5]}" for name in names]
    table.write_text("\n".join(["path,patient", *rows, "absent.png,1", "gone.png,2"]))
    first, unused = describe_sources(find_sources(tmp_path, table), tmp_path, table)
    assert first == f"5 images of 3 patients, such as 1: {names[0]}, 2: {names[2]}, 3: {names[4]}"
    assert unused == f"--patients {table}: 2 rows name no image below {tmp_path}"


def test_folders_of_patients_and_names_that_repeat_are_not_warned_of(tmp_path, xrays):
    """A warning that always comes is not read."""
    assert len(describe_sources(find_sources(xrays), xrays)) == 1
    flat = [(f"p{number // 2}", tmp_path / f"p{number // 2}_{number}.png") for number in range(6)]
    for _, path in flat:
        path.write_bytes(b"x")
    assert len(describe_sources(flat, tmp_path)) == 1 and len(describe_sources(flat[:1], tmp_path)) == 1


def test_headers_that_disagree_with_names_are_told(tmp_path):
    """A patient under two names is the leak that names cannot show; one ID for all is an anonymiser's."""
    def write(name, number):
        pixels = np.zeros((4, 4), np.uint16)
        image = dicom_image(pixels, "1.2.840.10008.5.1.4.1.1.1.1", "1.2", PatientID=number)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save_as(tmp_path / name, enforce_file_format=True)

    def told():
        return describe_sources(find_sources(tmp_path), tmp_path)[1:]

    ids = {"a/1.dcm": "7", "a/2": "7", "b/1.dcm": "7", "c_1/1.dcm": "8", "d/1.dcm": ""}
    for name, number in ids.items():
        write(name, number)
    (tmp_path / "d" / "2.dcm").write_bytes(b"damaged")
    (tmp_path / "d" / "3.png").write_bytes(b"x")
    line, = told()
    assert line.startswith("warning: ") and "several names (1 times), such as a, b;" in line
    write("c_1/2.dcm", "9")
    assert told()[0] == line and "several patients (1 times), such as c_1;" in told()[1]
    assert describe_sources(find_volumes(tmp_path), tmp_path)[1:] == [line]    # of a folder the first file
    for name in (*ids, "c_1/2.dcm"):
        write(name, "anonymous")
    assert told() == []


def test_volumes_are_files_and_folders_of_slices(tmp_path):
    """A DICOM series is one source, whatever its number of files."""
    for name in ("p1/ct.nii.gz", "p2/series/1.dcm", "p2/series/2.dcm", "p_3/1.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_volumes(tmp_path) == [("p1", tmp_path / "p1/ct.nii.gz"), ("p2", tmp_path / "p2/series"),
                                      ("p_3", tmp_path / "p_3")]


def test_case_names_are_safe_and_never_equal(tmp_path):
    """The text before the first "_" is the patient everywhere else."""
    prefixes = case_prefixes([("a_b c", tmp_path / "x/1_2.png"), ("a_b c", tmp_path / "y/1_2.jpg"),
                              ("../up", tmp_path / "é.png")])
    assert prefixes == ["a-b-c_1-2", "a-b-c_1-2~2", "-up_-"]
    assert all(prefix.count("_") == 1 and "/" not in prefix for prefix in prefixes)


def test_tiny_images_are_bad_files(tmp_path):
    """A thumbnail cannot be a chest X-ray, and the message says so."""
    write_nifti(tmp_path / "tiny.nii.gz", np.eye(20, dtype=np.float32))
    with pytest.raises(BadFile, match="too small"):
        prepare_file(tmp_path / "tiny.nii.gz", SIZE, {})


def test_the_pose_of_the_prior_is_not_in_the_target(prepared, monkeypatch):
    """Pairs that differ in the pose of the prior alone have the same target and the same current image."""
    poses = {}
    for name, rotation in (("upright", 0.0), ("tilted", 12.0)):
        calls = []

        def tilt_the_first(*args, rotation=rotation, calls=calls):
            calls.append(draw_pose(*args))
            return {**calls[-1], "rotation": rotation} if len(calls) == 1 else calls[-1]

        monkeypatch.setattr(pairs, "draw_pose", tilt_the_first)
        poses[name] = pair_of(prepared, 3, unchanged=0.0)
    assert np.array_equal(poses["upright"]["diff"], poses["tilted"]["diff"]) and poses["tilted"]["diff"].any()
    assert np.array_equal(poses["upright"]["current"], poses["tilted"]["current"])
    assert not np.array_equal(poses["upright"]["prior"], poses["tilted"]["prior"])
