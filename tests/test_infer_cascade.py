"""The cascade as a user runs it: from series to decisions, masks on the source's voxels, figures."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import two_ranks
from PIL import Image
from test_dicom import SAGITTAL
from test_dicom_series import places
from test_dicom_series import write_series as write_dicom_series
from test_slice_series import ORIENTATIONS

import builders
import constants as C
import infer_cascade
from datasets.slice_series import read_series
from utils.cascade import STAGES
from utils.checkpoint import save_checkpoint
from utils.config import hyperparameters

SIZE = 24                                        # pixels per side of the slices, and of the networks' squares
OTHER, LUMBAR, T1W, T2W, ABSENT = 1, 4, 7, 10, 15            # bright columns, by which these networks tell
CLASSES = {"anatomy": (["other", "spine"], 2.5),
           "location_view": (["lumbar_sagittal", "cervical_sagittal"], 5.5),
           "sequence": (["T1w", "T2w"], 8.5), "cord": (["present", "absent"], 12)}
BANDS = {"cord_mask": (0.7, 0.2), "lesion_mask": (0.8, 0.05)}
CORD, LESION = 600, 800                          # of 1000


class Columns(torch.nn.Module):
    """The second of two classes where more than so many columns are bright."""

    def __init__(self, columns=0.0):
        super().__init__()
        self.register_buffer("columns", torch.tensor(float(columns)))

    def forward(self, images):
        excess = (images > 0.95).float().mean((1, 2, 3)) * SIZE - self.columns
        return torch.stack([-excess, excess], 1)


class Band(torch.nn.Module):
    """A mask of the pixels whose brightness lies in a band."""

    def __init__(self, middle=0.0, width=0.0):
        super().__init__()
        self.register_buffer("band", torch.tensor([middle, width]))

    def forward(self, images):
        return 60 * (self.band[1] - (images - self.band[0]).abs())


def save_stage(folder, stage, network=None, kind=None, **constants):
    """<stage>.pt with the networks above, as training writes it."""
    mask, (names, columns) = stage in BANDS, CLASSES.get(stage, ([], 0))
    network = network or (Band(*BANDS[stage]) if mask else Columns(columns))
    constants = {**hyperparameters(C), "SPINE_SIZE": SIZE, "PRECISION": "fp32", **constants}
    save_checkpoint(folder / f"{stage}.pt", kind=kind or ("segment" if mask else "classify"), names=names,
                    mask_names=[stage.removesuffix("_mask")] if mask else [], constants=constants,
                    model_state_dict=network.state_dict(), ema_state_dict=None)


def volume(columns=T2W, cord=(1, 2, 3, 4), lesion=(2, 3), absent=(4, 5), slices=6, others=()):
    """int16 [x, y, z], sagittal slices of which each has so many bright columns, a cord and a lesion in it.

    absent: slices without cord, to the networks; others: {slice: bright columns}.
    """
    voxels = np.random.default_rng(0).integers(0, 40, (slices, SIZE, SIZE)).astype(np.int16)
    for x in range(slices):
        voxels[x, :dict(others).get(x, ABSENT if x in absent else columns)] = 1000
        if x in cord:
            voxels[x, 16:19, 2:20] = CORD
        if x in lesion:
            voxels[x, 17:19, 8:11] = LESION
    return voxels


def write_nifti(path, voxels, affine=None):
    """A NIfTI, 4 x 1 x 1 mm, RAS where no affine is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 1, 1, 1]) if affine is None else affine), path)
    return path


@pytest.fixture
def cascade(script, tmp_path, monkeypatch):
    """Run the cascade of the networks above on ``tmp_path/in``; returns (rows by series, output folder)."""
    monkeypatch.setattr(builders, "build_slice_network", lambda kind, names, mask_names, start: (
        Band() if kind == "segment" else Columns()))
    weights = tmp_path / "weights"
    weights.mkdir()
    for stage in STAGES:
        save_stage(weights, stage)

    def call(*words, output="out"):
        script("infer_cascade", "--input", tmp_path / "in", "--weights", weights,
               "--output", tmp_path / output, *words)
        return table(tmp_path / output / "cascade.csv"), tmp_path / output

    return call


def table(path):
    """{series: row} of cascade.csv."""
    with open(path) as file:
        return {row["series"]: row for row in csv.DictReader(file)}


def slices_of(output, series):
    """The rows of slices.csv of one series."""
    with open(output / "slices.csv") as file:
        return [row for row in csv.DictReader(file) if row["series"] == series]


def mask_of(output, series, part):
    """The voxels of a mask as NIfTI stores them."""
    return np.asarray(nib.load(output / "series" / f"{series}_{part}.nii.gz").dataobj)


def test_a_series_goes_through_every_stage(cascade, tmp_path, capsys):
    """Its decisions with votes and margins, volumes in mm3, number of lesions, masks and picture."""
    write_nifti(tmp_path / "in" / "p1" / "t2.nii.gz", volume())
    rows, output = cascade()
    row = rows["p1/t2"]
    assert (row["anatomy"], row["location_view"], row["sequence"]) == ("spine", "cervical_sagittal", "T2w")
    assert row["sequence_votes"] == "6 of 6" and float(row["sequence_margin"]) == 1
    assert row["cord"] == "present" and row["cord_votes"] == "4 of 6"
    assert row["stopped"] == row["doubtful"] == row["notes"] == "" and row["view"] == "sagittal"
    assert float(row["cord_mm3"]) == 3 * 3 * 18 * 4 and float(row["lesion_mm3"]) == 2 * 2 * 3 * 4
    assert row["lesions"] == "1" and row["slices"] == "6"
    lines = slices_of(output, "p1/t2")
    assert [line["goes_on"] for line in lines] == ["1", "1", "1", "1", "0", "0"]
    assert all(float(line["sequence/T1w"]) + float(line["sequence/T2w"]) == pytest.approx(1, abs=2e-4)
               for line in lines)
    assert sum(float(line["cord_mm3"]) for line in lines) == float(row["cord_mm3"])
    names = {path.name for path in (output / "series" / "p1").iterdir()}
    assert names == {"t2_cord.nii.gz", "t2_lesion.nii.gz", "t2.png", "t2.json"}
    assert not (output / "bad_files.csv").exists() and not (output / "metrics.csv").exists()
    assert "1 series: 1 through all stages" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 5, 19, 30, 47])
def test_masks_land_on_the_sources_voxels_in_odd_orientations(cascade, tmp_path, number):
    """Masks painted by brightness must cover just the voxels of that brightness, in slices with cord."""
    voxels = volume()[:, :, :20]                                        # not square: room beside the slices
    turn = nib.eulerangles.euler2mat(0.1, 0.05, -0.1)
    affine = nib.affines.from_matvec(turn @ np.diag([4, 1, 1]), [9, 8, 7])
    due = np.isin(voxels, (CORD, LESION)) & ~np.isin(np.arange(6), (4, 5))[:, None, None], voxels == LESION
    order = ORIENTATIONS[number]
    source, *due = (nib.orientations.apply_orientation(each, order) for each in (voxels, *due))
    path = write_nifti(tmp_path / "in" / "a.nii.gz", source,
                       affine @ nib.orientations.inv_ornt_aff(order, voxels.shape))
    _, output = cascade("--keep", "location_view=*", "sequence=*", "anatomy=*")
    for part, mask in zip(("cord", "lesion"), due, strict=True):
        written = nib.load(output / "series" / f"a_{part}.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), mask)
        np.testing.assert_array_equal(written.affine, nib.load(path).affine)


def test_masks_land_on_the_voxels_of_dicom_and_of_pictures(cascade, tmp_path):
    """DICOM in shuffled files, and a folder of PNG with a screenshot among them, which is left out."""
    slices = volume().transpose(0, 2, 1)                                                # [slice, row, column]
    write_dicom_series(tmp_path / "in" / "dicom", slices.astype(np.uint16), orientation=SAGITTAL,
                       positions=places(SAGITTAL, np.arange(6) * 4.0), Rows=SIZE, Columns=SIZE,
                       PixelSpacing=[1, 1])
    for number, pixels in enumerate(slices):
        path = tmp_path / "in" / "png" / f"s_{number + 8}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels // 4).astype(np.uint8)).save(path)
    Image.fromarray(np.full((SIZE, SIZE, 3), (250, 20, 20), np.uint8)).save(path.parent / "screenshot.png")
    rows, output = cascade()
    for name in ("dicom", "png"):
        source = read_series(tmp_path / "in" / name).data
        unit = source / source.max()
        on = (unit > 0.95).mean((1, 2), keepdims=True) * SIZE < 12
        mask = mask_of(output, name, "cord").T
        assert rows[name]["stopped"] == "" and rows[name]["cord_votes"] == "4 of 6"
        np.testing.assert_array_equal(mask, (unit > 0.55) & (unit < 0.9) & on)
        assert mask.any((1, 2)).sum() == 3 and mask_of(output, name, "lesion").sum() == 12
    assert "1 colour picture(s)" in rows["png"]["notes"]
    assert "mm3 are voxels" in rows["png"]["notes"] and rows["dicom"]["view"] == "sagittal"


def test_series_stop_where_they_are_not_kept(cascade, tmp_path, capsys):
    """Each with its reason, and without what comes after; a longer keep lets it go on."""
    for name, voxels in (("a", volume(OTHER)), ("b", volume(LUMBAR)), ("c", volume(T1W)),
                         ("d", volume(absent=range(6))), ("e", volume())):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", voxels)
    rows, output = cascade()
    ends = {name: row["stopped"] for name, row in rows.items()}
    assert ends == {"a": "anatomy: other", "b": "location_view: lumbar_sagittal", "c": "sequence: T1w",
                    "d": "cord: absent in every slice", "e": ""}
    assert rows["a"]["sequence"] == rows["c"]["cord"] == rows["d"]["cord_mm3"] == ""
    names = {path.name for path in (output / "series").glob("*.nii.gz")}
    assert names == {"e_cord.nii.gz", "e_lesion.nii.gz"}
    assert "5 series: 1 anatomy: other; 1 location_view: lumbar_sagittal" in capsys.readouterr().out
    rows, _ = cascade("--keep", "sequence=T1w,T2w", "cord=absent", output="more")
    assert rows["c"]["stopped"] == "" and rows["d"]["cord_votes"] == "6 of 6"


def test_doubtful_votes_are_reported_and_stop_if_asked(cascade, tmp_path, capsys):
    """--margin says what is doubtful; --doubtful whether it goes on."""
    write_nifti(tmp_path / "in" / "a.nii.gz", volume(others={0: T1W, 5: T1W}, absent=()))     # 4 : 2
    rows, _ = cascade()
    assert rows["a"]["doubtful"] == "" and rows["a"]["sequence_margin"] == "0.3333"
    capsys.readouterr()
    rows, output = cascade("--margin", 0.4)
    assert rows["a"]["doubtful"] == "sequence" and rows["a"]["stopped"] == ""
    assert "Doubtful votes in 1 series: a (sequence T2w, margin 0.33)" in capsys.readouterr().out
    assert mask_of(output, "a", "cord").any()
    rows, output = cascade("--margin", 0.4, "--doubtful", "stop")
    assert rows["a"]["stopped"] == "sequence: doubtful (T2w)"
    assert not list((output / "series").glob("*.nii.gz"))                  # those of the run before are gone


def test_one_bad_series_does_not_stop_the_rest(cascade, refused, tmp_path, capsys):
    """Damaged, a label map, too short: each is in both tables with its reason; all bad is an error."""
    write_nifti(tmp_path / "in" / "good.nii.gz", volume())
    path = write_nifti(tmp_path / "in" / "cut.nii.gz", volume())
    path.write_bytes(path.read_bytes()[:400])
    (tmp_path / "in" / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    write_nifti(tmp_path / "in" / "map.nii.gz", (volume() > 500).astype(np.uint8))
    write_nifti(tmp_path / "in" / "short.nii.gz", volume(slices=3))
    rows, output = cascade()
    assert {name: row["stopped"] for name, row in rows.items()} == {
        "good": "", "cut": "bad file", "map": "bad file", "short": "bad file"}
    assert "label map" in rows["map"]["notes"] and "3 slice(s), at least 4" in rows["short"]["notes"]
    with open(output / "bad_files.csv") as file:
        bad = list(csv.DictReader(file))
    assert [row["path"].rsplit("/")[-1] for row in bad] == ["cut.nii.gz", "map.nii.gz", "short.nii.gz"]
    assert "3 series could not be used" in capsys.readouterr().out
    (tmp_path / "in" / "good.nii.gz").unlink()
    words = ["--input", tmp_path / "in", "--weights", tmp_path / "weights", "--output", tmp_path / "none"]
    assert "none of the series can be used" in refused("infer_cascade", *words)


def test_short_series_are_reported_not_judged(cascade, tmp_path):
    """--min-slices is the least number that a vote is taken of."""
    write_nifti(tmp_path / "in" / "a.nii.gz", volume())
    write_nifti(tmp_path / "in" / "b.nii.gz", volume(slices=8))
    rows, output = cascade("--min-slices", 7)
    row = rows["a"]
    assert row["stopped"] == "too few slices" and row["anatomy"] == "" and row["slices"] == "6"
    assert rows["b"]["stopped"] == "" and not (output / "series" / "a_cord.nii.gz").exists()


def test_stages_may_be_left_out_and_it_is_told(cascade, refused, tmp_path, capsys):
    """By --stages or for want of a file: what that means is printed, the rest is as it was."""
    write_nifti(tmp_path / "in" / "a.nii.gz", volume(T1W))
    rows, output = cascade("--stages", "cord_mask", "lesion_mask")
    out = capsys.readouterr().out
    assert "sequence: left out; series of every sequence go on" in out
    assert "cord: left out; every slice of a series goes on to the masks" in out
    assert "anatomy" not in rows["a"] and rows["a"]["stopped"] == ""
    np.testing.assert_array_equal(mask_of(output, "a", "cord"), np.isin(volume(T1W), (CORD, LESION)))
    (tmp_path / "weights" / "sequence.pt").unlink()
    (tmp_path / "weights" / "lesion_mask.pt").unlink()
    rows, output = cascade()
    out = capsys.readouterr().out
    assert "sequence: left out" in out and "lesion_mask: left out; no lesions are looked for" in out
    assert rows["a"]["stopped"] == "" and "lesions" not in rows["a"] and "lesion_mm3" not in rows["a"]
    assert not (output / "series" / "a_lesion.nii.gz").exists()
    words = ["--input", tmp_path / "in", "--weights", tmp_path / "weights", "--output", tmp_path / "x"]
    line = refused("infer_cascade", *words, "--stages", "sequence", "cord")
    assert "has no sequence.pt, but anatomy.pt, cord.pt, cord_mask.pt, location_view.pt; name" in line
    assert "sequence is left out" in refused("infer_cascade", *words, "--keep", "sequence=T1w")
    assert "needs the stages cord_mask" in refused("infer_cascade", *words, "--clip-lesions")
    words[3] = tmp_path
    (tmp_path / "segment_best.pt").touch()
    line = refused("infer_cascade", *words)
    due = " or ".join(f"{stage}.pt" for stage in STAGES)
    assert f"{tmp_path}: has no {due}, but segment_best.pt; name checkpoints after their stages" in line


def test_a_finished_series_is_not_judged_again(cascade, tmp_path, monkeypatch, capsys):
    """But it is with other weights, another rule, another source, or a mask deleted; and that is told."""
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", volume())
    rows, output = cascade()
    judged, real = [], infer_cascade.judge
    monkeypatch.setattr(infer_cascade, "judge", lambda series, *rest: (
        judged.append(series.path.name) or real(series, *rest)))

    def again(*words):
        judged.clear()
        found = cascade(*words)
        return found[0], sorted(judged)

    assert again() == (rows, []) and "judged again" not in capsys.readouterr().out
    (output / "series" / "a_cord.nii.gz").unlink()
    assert again() == (rows, ["a.nii.gz"])
    write_nifti(tmp_path / "in" / "b.nii.gz", volume(lesion=()))
    found, names = again()
    assert names == ["b.nii.gz"] and found["b"]["lesions"] == "0" and found["a"] == rows["a"]
    record = output / "series" / "c.json"
    record.write_text(record.read_text()[:100])
    assert again()[1] == ["c.nii.gz"]
    save_stage(tmp_path / "weights", "lesion_mask", Band(0.8, 0.3))
    found, names = again()
    assert len(names) == 3 and found["c"]["lesion_mm3"] != rows["c"]["lesion_mm3"]
    capsys.readouterr()
    assert len(again("--margin", 0.1)[1]) == 3
    told = f"3 series judged again, over what {output} held: weights, rules or files differ from before"
    assert told in capsys.readouterr().out.splitlines()
    assert again("--margin", 0.1)[1] == [] and "judged again" not in capsys.readouterr().out


def test_an_interrupted_run_goes_on(cascade, tmp_path, monkeypatch):
    """Stopped between the masks and the picture of the second series: no table, and the first is kept."""
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", volume())
    whole, _ = cascade(output="whole")
    drawn, real = [], infer_cascade.save_overlay

    def stop_at_second(path, *rest):
        drawn.append(path.name)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(infer_cascade, "save_overlay", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            cascade()
    series = tmp_path / "out" / "series"
    assert {path.stem for path in series.glob("*.json")} == {"a"}
    assert not (tmp_path / "out" / "cascade.csv").exists() and (series / "b_cord.nii.gz").exists()
    monkeypatch.setattr(infer_cascade, "save_overlay", lambda path, *rest: (
        drawn.append(path.name) or real(path, *rest)))
    rows, output = cascade()
    assert drawn == ["a.png", "b.png", "b.png", "c.png"] and rows == whole
    for path in (tmp_path / "whole" / "series").iterdir():
        if path.suffix != ".json":
            assert path.read_bytes() == (output / "series" / path.name).read_bytes()


def test_each_option_of_the_masks_does_something(cascade, tmp_path):
    """--threshold, --clip-lesions, --axis, --overlays change what they say; --batch-size changes nothing."""
    voxels = volume(lesion=())
    voxels[2, 12:17, 8:11] = LESION                                    # two columns are in the cord's
    voxels[2, 14:16, 8:11] = 30                                        # and the rest apart from it
    write_nifti(tmp_path / "in" / "a.nii.gz", voxels)
    save_stage(tmp_path / "weights", "cord_mask", Band(0.6, 0.1))     # without the lesion
    plain, output = cascade()
    assert (output / "series" / "a.png").exists() and float(plain["a"]["lesion_mm3"]) == 9 * 4
    for name in ("cascade.csv", "slices.csv"):
        text = (output / name).read_text()
        cascade("--batch-size", 1, "--margin", 0.2)
        assert (output / name).read_text() == text
    clipped, output = cascade("--clip-lesions", output="clipped")
    assert float(clipped["a"]["lesion_mm3"]) == 0 and clipped["a"]["cord_mm3"] == plain["a"]["cord_mm3"]
    strict, _ = cascade("--threshold", 0.999, output="strict")
    assert float(strict["a"]["lesion_mm3"]) < 36
    _, output = cascade("--overlays", 0, output="bare")
    assert not (output / "series" / "a.png").exists()
    three = Image.open(tmp_path / "out" / "series" / "a.png").size
    one = Image.open(cascade("--overlays", 1, output="one")[1] / "series" / "a.png").size
    assert one[0] == three[0] and 2 * one[1] < three[1]
    rows, _ = cascade("--axis", "axial", "--stages", "cord_mask", output="axial")
    assert rows["a"]["slices"] == str(SIZE) and rows["a"]["view"] == "axial"
    save_stage(tmp_path / "weights", "cord_mask", SPINE_AXIS="axial")
    assert cascade("--stages", "cord_mask", output="trained")[0]["a"]["view"] == "axial"


def write_truth(folder, rows):
    """in/series.csv of (path, anatomy, location, sequence, lesion, split), and the true masks."""
    lines = ["patient,path,anatomy,location,view,sequence,lesion,split"]
    lines += [f"p_{path},{path}.nii.gz,{anatomy},{location},sagittal,{sequence},{lesion},{split}"
              for path, anatomy, location, sequence, lesion, split in rows]
    (folder / "series.csv").write_text("\n".join(lines) + "\n")


def test_with_a_truth_the_run_ends_with_figures(cascade, tmp_path, capsys):
    """Against counting by hand: accuracies of what each stage saw, F1 of lesions, Dice with missed as 0."""
    folder = tmp_path / "in"
    healthy, ill = volume(lesion=()), volume()
    for name, voxels in (("found", ill), ("healthy", healthy), ("missed", volume(T1W)), ("false", ill),
                         ("outside", volume(LUMBAR)), ("unknown", ill)):
        write_nifti(folder / f"{name}.nii.gz", voxels)
        if name != "unknown":
            cord = np.isin(voxels, (CORD, LESION)).astype(np.uint8)
            cord[4] = 0
            lesion = (voxels == LESION).astype(np.uint8) * (name != "false")
            if name == "found":
                lesion[3] = 0                                             # half of what will be called
            write_nifti(folder / f"{name}_cord.nii.gz", cord)
            write_nifti(folder / f"{name}_lesion.nii.gz", lesion)
    write_truth(folder, [("found", "spine", "cervical", "T2w", 1, "test"),
                         ("healthy", "spine", "cervical", "T2w", 0, "test"),
                         ("missed", "spine", "cervical", "T2w", 1, "test"),
                         ("false", "spine", "cervical", "T2w", "", "train"),
                         ("outside", "spine", "lumbar", "T2w", 1, "train")])
    _, output = cascade()
    out = capsys.readouterr().out
    assert "6 series in" in out and "5 of them in" in out and "10 mask(s) of other series left out" in out
    assert "anatomy: accuracy of series 1.0000 (5 of 5), of slices 1.0000 (30 of 30)" in out
    assert "sequence: accuracy of series 0.7500 (3 of 4), of slices 0.8333 (20 of 24)" in out
    assert "cord: accuracy of slices 0.8333 (15 of 18)" in out             # slice 0 has no cord, but goes on
    with open(output / "metrics.csv") as file:
        figures = {row["figure"]: (float(row["value"]), int(row["of"])) for row in csv.DictReader(file)}
    # Looked for with a lesion: found, missed.  Called: found, false.  The one outside is not looked for.
    assert figures["end_to_end/f1"] == (0.5, 5) and figures["end_to_end/precision"][0] == 0.5
    assert figures["lesion/dice"][0] == pytest.approx((2 * 6 / (6 + 12) + 0) / 2)
    assert figures["cord/dice"][0] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert figures["sequence/accuracy"] == (0.75, 4) and figures["location_view/accuracy"] == (1.0, 5)
    assert "end to end: F1 0.5000, precision 0.5000, recall 0.5000, lesion Dice 0.3333 (2 of 5 series" in out
    rows, output = cascade("--split", "test", output="test")
    assert set(rows) == {"found", "healthy", "missed"}
    assert "recall 0.5000, lesion Dice 0.3333 (2 of 3 series" in capsys.readouterr().out


def test_a_truth_may_lie_elsewhere(cascade, refused, tmp_path, capsys):
    """--truth names it; one above the series is found; one that speaks of others is an error."""
    write_nifti(tmp_path / "in" / "a.nii.gz", volume())
    (tmp_path / "series.csv").write_text("path,sequence\nin/a.nii.gz,T1w\n")
    cascade()
    assert "sequence: accuracy of series 0.0000 (0 of 1)" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("path,sequence\nin/a.nii.gz,T2w\n")
    cascade("--truth", tmp_path / "other.csv")
    assert "sequence: accuracy of series 1.0000 (1 of 1)" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("path,sequence\nin/b.nii.gz,T2w\n")
    words = ["--input", tmp_path / "in", "--weights", tmp_path / "weights", "--output", tmp_path / "out"]
    line = refused("infer_cascade", *words, "--truth", tmp_path / "other.csv")
    assert "none of its paths is a series of" in line
    assert "holds no series of a table's split test" in refused("infer_cascade", *words, "--split", "test")


def test_mistakes_end_in_one_line(cascade, refused, tmp_path):
    """Each says which option or file, and what to do."""
    write_nifti(tmp_path / "in" / "a.nii.gz", volume())
    weights = tmp_path / "weights"

    def line(*words, output=tmp_path / "x", source=tmp_path / "in"):
        return refused("infer_cascade", "--input", source, "--weights", weights, "--output", output, *words)

    assert "lies in --input" in line(output=tmp_path / "in" / "out")
    assert "no such folder" in line(source=tmp_path / "nowhere")
    assert "holds no series" in line(source=weights)
    assert "--margin must be from 0 to 1" in line("--margin", 2)
    assert "--threshold between 0 and 1" in line("--threshold", 0)
    assert "--min-slices: 4 or more" in line("--min-slices", 3)
    assert "no such class, but T1w, T2w" in line("--keep", "sequence=PD")
    save_stage(weights, "cord", SPINE_AXIS="axial")
    assert "different axes (" in line() and not (tmp_path / "x").exists()
    save_stage(weights, "cord", kind="segment")
    assert "cord.pt: a checkpoint of kind segment, not classify or multitask" in line()
    save_stage(weights, "cord", Band(1, 2))
    assert "weights are of another model" in line()


REAL = {"SPINE_SIZE": 32, "SPINE_ENCODER": "plain", "SPINE_DEPTH": 2, "SPINE_FEATURES": 2,
        "SPINE_LOSS": "dice", "SPINE_MASK_PRIOR": 0.0, "PRECISION": "fp32"}


def real_stages(folder, monkeypatch):
    """Checkpoints of networks that builders makes, random: a class and a mask stage in one multitask file."""
    for name, value in REAL.items():
        monkeypatch.setattr(C, name, value)
    folder.mkdir()
    torch.manual_seed(0)
    for stage, kind, names, mask_names in (
            ("cord", "multitask", ["absent", "present"], ["cord"]),
            ("cord_mask", "multitask", ["absent", "present"], ["cord"]),
            ("lesion_mask", "segment", [], ["lesion"])):
        network = builders.build_slice_network(kind, names, mask_names, start=False)
        save_checkpoint(folder / f"{stage}.pt", kind=kind, names=names, mask_names=mask_names,
                        constants=hyperparameters(C), ema_state_dict=None,
                        model_state_dict=network.state_dict())


def test_ranks_share_the_series_with_the_same_result(script, tmp_path, monkeypatch):
    """Two processes as under torchrun write what one does, with the networks of training."""
    real_stages(tmp_path / "weights", monkeypatch)
    for number in range(3):
        write_nifti(tmp_path / "in" / f"s{number}.nii.gz", np.random.default_rng(number).integers(
            0, 900, (5, 20 + number, 24)).astype(np.int16))
    (tmp_path / "in" / "bad.nii.gz").write_text("no image")
    words = ["--input", tmp_path / "in", "--weights", tmp_path / "weights", "--keep", "cord=*",
             "--threshold", 0.45]
    script("infer_cascade", *words, "--output", tmp_path / "one")
    printed = two_ranks(lambda: script("infer_cascade", *words, "--output", tmp_path / "two"))
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) >= 3 + 3 * 3
    for name in names:
        if name.suffix == ".json":
            one, two = (json.loads((tmp_path / each / name).read_text()) for each in ("one", "two"))
            assert one["row"] == two["row"]
        else:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert printed.count("4 series in") == 1
    rows = table(tmp_path / "one" / "cascade.csv")
    assert rows["bad"]["stopped"] == "bad file" and rows["s0"]["stopped"] == ""
    assert max(float(rows[name][f"{part}_mm3"]) for name in ("s0", "s1") for part in ("cord", "lesion")) > 0
