"""The inference script as a user runs it: files of every kind in, maps, pictures and tables out."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, write_case
from forks import two_ranks
from PIL import Image
from scipy import ndimage

import constants as C
from datasets.io import read_image, write_nifti
from datasets.longitudinal import find_cases, split_cases
from infer_longitudinal import load_case
from longitudinal_MIM_training import build_model
from utils.checkpoint import save_checkpoint
from utils.config import BadFile, UserError, apply_overrides, hyperparameters
from utils.metrics import ChangeMetrics


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small untrained network with loud answers, whose last weights are zero."""
    before = hyperparameters(C)
    apply_overrides(C, SMALL)
    torch.manual_seed(0)
    model = build_model()
    torch.nn.init.normal_(model.head[-1].weight)
    last = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "longitudinal_mim_best.pt"
    save_checkpoint(path, kind="longitudinal_mim", model_state_dict=last, ema_state_dict=model.state_dict(),
                    constants=hyperparameters(C))
    vars(C).update(before)
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder with the pairs of four patients."""
    root = tmp_path_factory.mktemp("few")
    for patient in range(4):
        write_case(root / f"p{patient}_a", seed=patient)
    return root


@pytest.fixture
def infer(script, checkpoint, tmp_path):
    """Run the script into a fresh folder, which is returned."""
    def call(*words, output="out"):
        script("infer_longitudinal", "--checkpoint", checkpoint, "--output", tmp_path / output, *words)
        return tmp_path / output

    return call


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_photo(path, shape=(70, 90), seed=0):
    """A smooth grey PNG or JPEG."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 4)
    Image.fromarray((255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)).save(path)
    return path


def test_a_folder_gives_maps_pictures_and_tables(infer, few, capsys):
    """Every case leaves its map and picture; the tables say what the maps say, by the averaged weights."""
    out = infer("--data", few, "--baseline", "--batch-size", 3, "--min-area", 4)
    cases = sorted(path.name for path in few.iterdir())
    files = {f"{case}_{end}" for case in cases for end in ("diff.nii.gz", "overlay.png")}
    assert {path.name for path in out.iterdir()} == {"changes.csv", "metrics.csv", *files}
    maps = {case: read_image(out / f"{case}_diff.nii.gz") for case in cases}
    assert all(image.shape == (64, 64) and np.abs(image).max() > 0 for image in maps.values())

    metrics = ChangeMetrics(min_area=4)
    for case in cases:
        metrics.update(maps[case][None, None], read_image(few / case / "diff_map.nii.gz")[None, None])
    figures = metrics.compute()
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()}
    for name in ("dice", "mae_inside", "ssim"):
        assert f" {figures[name]:.4f} " in lines[name]
    assert "subtraction" in printed
    single = rows_of(out / "metrics.csv")
    assert [row["case"] for row in single] == cases
    assert np.mean([float(row["dice"]) for row in single]) == pytest.approx(figures["dice"], abs=1e-6)

    for row in rows_of(out / "changes.csv"):
        changed = maps[row["case"]] * (1 if row["sign"] == "new" else -1) > 0.05
        assert 4 <= int(row["area_px"]) <= changed.sum()
        assert float(row["area_fraction"]) == pytest.approx(int(row["area_px"]) / 64 ** 2)
        assert abs(float(row["mean"])) > 0.05 and (float(row["mean"]) > 0) == (row["sign"] == "new")
    infer("--prior", few / "p0_a" / "prior.nii.gz", "--current", few / "p0_a" / "current.nii.gz")
    assert not (out / "metrics.csv").exists()                # of other cases than those of now


def test_changes_are_the_components_of_the_written_map(infer, few):
    """Area, centroid and mean agree with scipy's, at the size of the current image."""
    case = few / "p1_a"
    out = infer("--prior", case / "prior.nii.gz", "--current", case / "current.nii.gz", "--threshold", 0.1,
                "--min-area", 1)
    diff = read_image(out / "p1_a_prior_to_current_diff.nii.gz")
    expected = []
    for sign, changed in (("new", diff > 0.1), ("resolved", diff < -0.1)):
        labels, count = ndimage.label(changed, np.ones((3, 3)))
        for label in range(1, count + 1):
            row, column = ndimage.center_of_mass(labels == label)
            expected.append((sign, (labels == label).sum(), row, column, diff[labels == label].mean()))
    found = [(row["sign"], int(row["area_px"]), float(row["centroid_row"]), float(row["centroid_column"]),
              float(row["mean"])) for row in rows_of(out / "changes.csv")]
    assert len(found) == len(expected) > 0
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        assert one[0] == other[0] and one[1:] == pytest.approx(other[1:], rel=1e-4)


def test_a_known_map_that_is_none_is_left_out_by_name(infer, few, tmp_path):
    """A mask of 0 and 255 taken for a difference would spoil the figures of all cases."""
    shutil.copytree(few, tmp_path / "few")
    write_nifti(tmp_path / "few" / "p1_a" / "diff_map.nii.gz", np.full((64, 64), 255.0))
    out = infer("--data", tmp_path / "few")
    bad, = rows_of(out / "bad_files.csv")
    assert "p1_a/diff_map.nii.gz: values from 255 to 255, not within [-1, 1]" in str(bad.values())
    assert [row["case"] for row in rows_of(out / "metrics.csv")] == ["p0_a", "p2_a", "p3_a"]


def test_the_split_is_that_of_training(infer, pairs):
    """Held-out figures would be worth nothing if inference drew the patients anew."""
    expected = split_cases(find_cases(pairs), pairs, C.VAL_FRACTION, C.TEST_FRACTION)["test"]
    out = infer("--data", pairs, "--split", "test")
    assert [row["case"] for row in rows_of(out / "metrics.csv")] == [case.name for case in expected]


def test_pairs_of_other_formats_and_sizes_need_register(infer, tmp_path):
    """Real X-rays differ in size. The map is in the current image's own size, oblong as it is."""
    prior, current = write_photo(tmp_path / "a.jpg", (70, 90)), write_photo(tmp_path / "b.png", (100, 60))
    with pytest.raises(UserError, match="a.jpg.*--register"):
        infer("--prior", prior, "--current", current)
    out = infer("--prior", prior, "--current", current, "--register", "--tta", 3)
    maps = [out / f"{tmp_path.name}_a_to_b_{end}.nii.gz" for end in ("diff", "uncertainty")]
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in maps), f"{tmp_path.name}_a_to_b_overlay.png", "changes.csv"}
    diff, uncertainty = map(read_image, maps)
    assert diff.shape == uncertainty.shape == (100, 60)
    assert uncertainty.min() >= 0 and uncertainty.max() > 0
    infer("--prior", prior, "--current", current, "--register")
    assert [path.exists() for path in maps] == [True, False]               # it was of another map


def test_register_aligns_the_prior(infer, tmp_path):
    """The picture shows an image and the same one moved in one pose; what the prior missed is not new."""
    still = write_photo(tmp_path / "still.png", (96, 96))
    moved = ndimage.shift(read_image(still), (6, -15), mode="nearest")
    Image.fromarray(moved.round().astype(np.uint8)).save(tmp_path / "moved.png")
    likeness = []
    for output, words in (("plain", []), ("aligned", ["--register"])):
        out = infer("--prior", tmp_path / "moved.png", "--current", still, *words, output=output)
        (picture,) = out.glob("*_moved_to_still_overlay.png")
        picture = np.asarray(Image.open(picture))[22 + 40:-40, :, 0]
        prior, current = picture[:, 70:280], picture[:, 324 + 70:324 + 280]
        likeness.append(np.corrcoef(prior.ravel(), current.ravel())[0, 1])
    assert likeness[0] < 0.6 and likeness[1] > 0.95
    maps = [read_image(tmp_path / output / f"{tmp_path.name}_moved_to_still_diff.nii.gz")
            for output in ("plain", "aligned")]
    assert maps[0][:, :10].any() and not maps[1][:, :10].any() and maps[1][:, 20:].any()


def test_bad_cases_of_a_folder_are_skipped_listed_and_counted(infer, tmp_path, capsys):
    """One damaged file among many must not end the work, nor go unnoticed."""
    data = tmp_path / "data"
    for name in ("p1_a", "p2_a", "p3_a", "p4_a"):
        write_case(data / name, seed=1)
    whole = (data / "p1_a" / "prior.nii.gz").read_bytes()
    (data / "p1_a" / "prior.nii.gz").write_bytes(whole[:len(whole) // 2])
    (data / "p2_a" / "current.nii.gz").unlink()
    write_nifti(data / "p3_a" / "prior.nii.gz", np.eye(40))
    out = infer("--data", data)
    bad = {row["path"]: row["reason"] for row in rows_of(out / "bad_files.csv")}
    assert set(bad) == {"p1_a", "p2_a", "p3_a"}
    assert "--register" in bad["p3_a"] and "current" in bad["p2_a"]
    assert "3 bad cases skipped" in capsys.readouterr().out
    assert [row["case"] for row in rows_of(out / "metrics.csv")] == ["p4_a"]


def test_a_table_names_the_pairs(infer, tmp_path, capsys):
    """Real pairs lie in the folders of an archive; a row whose file is missing is a bad case."""
    for name, seed in (("a/1.png", 1), ("a/2.png", 2), ("b/1.jpg", 3)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_photo(tmp_path / "in" / name, seed=seed)
    table = tmp_path / "in" / "visits.csv"
    table.write_text("prior,current,case\na/1.png,a/2.png,\nb/1.jpg,b/2.jpg,\na/2.png,a/1.png,back\n")
    out = infer("--pairs", table)
    assert {path.name for path in out.iterdir()} == {
        "a_1_to_2_diff.nii.gz", "a_1_to_2_overlay.png", "back_diff.nii.gz", "back_overlay.png", "changes.csv",
        "bad_files.csv"}
    (bad,) = rows_of(out / "bad_files.csv")
    assert bad["path"] == "b_1_to_2" and "b/2.jpg: No such file" in bad["reason"]
    assert "2 cases" in capsys.readouterr().out
    same = infer("--prior", tmp_path / "in/a/1.png", "--current", tmp_path / "in/a/2.png", output="same")
    np.testing.assert_allclose(*(read_image(folder / "a_1_to_2_diff.nii.gz") for folder in (same, out)),
                               atol=1e-4)
    table.write_text("prior,current\na/3.png,a/4.png\n")
    with pytest.raises(UserError, match="none of the cases can be used.*a/3.png"):
        infer("--pairs", table)


def test_a_burnt_in_letter_hardly_changes_what_the_network_gets(tmp_path):
    """Training sees clipped X-rays: scaled by its brightest pixel an image would be dark."""
    grey = 80 * np.asarray(Image.open(write_photo(tmp_path / "a.png", (100, 100)))).astype(float) / 255
    letter = grey.copy()
    letter[2:7, 2:7] = 255                                                  # 0.25 % of the pixels
    seen = {}
    for name, image in (("plain", grey), ("letter", letter)):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"{name}.png")
        write_nifti(tmp_path / f"{name}.nii.gz", image.astype(np.uint8))
        for kind in ("png", "nii.gz"):
            files = {part: [str(tmp_path / f"{name}.{kind}")] for part in ("prior", "current")}
            seen[name, kind] = load_case("a", files, register=False)["current"]
    away = np.abs(seen["letter", "png"] - seen["plain", "png"])
    assert np.median(away) < 0.02
    assert np.median(np.abs(seen["letter", "nii.gz"] - seen["plain", "nii.gz"])) > 0.2     # as prepared


def test_cases_without_a_known_map_are_predicted_and_not_measured(infer, tmp_path):
    """Real pairs have no difference map; nested folders keep the patient in the name."""
    folder = tmp_path / "data" / "p1" / "visit"
    folder.mkdir(parents=True)
    write_photo(folder / "prior.png", seed=1)
    write_photo(folder / "current.png", seed=2)
    out = infer("--data", tmp_path / "data")
    assert {path.name for path in out.iterdir()} == {
        "p1__visit_diff.nii.gz", "p1__visit_overlay.png", "changes.csv"}
    with pytest.raises(UserError, match="--baseline"):
        infer("--data", tmp_path / "data", "--baseline")


def test_mistakes_end_in_one_message(infer, tmp_path, few):
    """Each names what is wrong: a missing file, an empty folder, words that do not go together."""
    one = write_photo(tmp_path / "one.png")
    with pytest.raises(UserError, match="absent.png"):
        infer("--prior", tmp_path / "absent.png", "--current", one)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        infer("--data", tmp_path / "empty")
    for words in (["--prior", one], [], ["--data", few, "--prior", one, "--current", one],
                  ["--data", few, "--pairs", one], ["--pairs", one, "--prior", one, "--current", one]):
        with pytest.raises(UserError, match="either --data"):
            infer(*words)
    for words, message in (
            (["--tta", 0], "^--tta 0: must be at least 1$"),
            (["--tta", 20, "--threshold", -1], "^--threshold -1: must lie between 0 and 1$"),
            (["--batch-size", 0, "--min-area", 0], "^--batch-size 0: .*; --min-area 0: must be at least 1$")):
        with pytest.raises(UserError, match=message):
            infer("--data", few, *words)
    with pytest.raises(UserError, match="--split val: only the cases of --data"):
        infer("--prior", one, "--current", one, "--split", "val")
    with pytest.raises(UserError, match="one.png: a file, not a folder"):
        infer("--data", one)
    with pytest.raises(BadFile, match="absent.pt"):
        infer("--data", few, "--checkpoint", tmp_path / "absent.pt")


def test_ranks_share_the_cases_and_merge_their_tables(infer, checkpoint, few, tmp_path):
    """Two processes as under torchrun write what one writes."""
    one = infer("--data", few, "--batch-size", 1)
    printed = two_ranks(lambda: infer("--data", few, "--batch-size", 1, output="two"))
    assert printed.count("4 cases with known map") == 1
    assert {path.name for path in one.iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    for name, key in (("metrics.csv", "dice"), ("changes.csv", "mean")):
        first, second = ([(row["case"], float(row[key])) for row in rows_of(folder / name)]
                         for folder in (one, tmp_path / "two"))
        assert len(first) >= 4 and [case for case, _ in first] == [case for case, _ in second]
        assert [value for _, value in first] == pytest.approx([value for _, value in second], abs=1e-4)
