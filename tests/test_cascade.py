"""Votes, what goes on, what networks see, masks back on slices, tables, and agreement with a truth."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

from datasets.slice_lists import Entry, find_series
from datasets.slice_series import read_series, slices_along, spacing_along
from datasets.slices import Slice, SliceDataset
from utils import cascade_judge
from utils.cascade import (
    KEEP,
    STAGES,
    choose_slices,
    decide,
    kept_classes,
    output_names,
    parse_keep,
    read_record,
    series_columns,
    summary,
    vote,
    without_masks,
    write_record,
)
from utils.cascade_judge import (
    PICTURE,
    Stage,
    View,
    busiest,
    measure,
    predict,
    save_overlay,
    square_maker,
    to_masks,
    to_slices,
)
from utils.cascade_truth import Truth, f1_of, in_scope, read_truth, stage_accuracy, truths_of
from utils.config import UserError

NAMES = ["T1w", "T2*w", "T2w"]


def shares(*votes, classes=3, sure=0.9):
    """Probabilities [N, classes] of slices that vote for these classes."""
    values = np.full((len(votes), classes), (1 - sure) / (classes - 1))
    values[np.arange(len(votes)), votes] = sure
    return values


def counted(probabilities):
    """A vote by loops: (winner, its votes, margin, mean probability)."""
    ballots = [max(range(len(row)), key=lambda k: row[k]) for row in probabilities]
    classes = range(probabilities.shape[1])
    means = [sum(row[k] for row in probabilities) / len(probabilities) for k in classes]
    winner = max(classes, key=lambda k: (ballots.count(k), means[k], -k))
    others = [ballots.count(k) for k in classes if k != winner]
    return winner, ballots.count(winner), (ballots.count(winner) - max(others)) / len(ballots), means[winner]


@pytest.mark.parametrize("slices, classes", [(1, 2), (4, 2), (9, 3), (20, 10), (17, 165)])
def test_a_vote_is_what_counting_by_hand_gives(slices, classes):
    """Winner, votes, margin and mean probability, for few and for RadImageNet's many classes."""
    rng = np.random.default_rng(slices)
    for _ in range(50):
        probabilities = rng.dirichlet(np.full(classes, 0.3), slices)
        winner, votes, margin, probability = counted(probabilities)
        found = vote(probabilities)
        assert (found.winner, found.votes) == (winner, votes)
        assert found.margin == pytest.approx(margin) and found.probability == pytest.approx(probability)


def test_ties_go_to_the_more_probable_class_and_have_no_margin():
    """Two for each: the surer voters win; with equal ones the first class, so that a tie is no accident."""
    even = shares(0, 0, 2, 2)
    assert vote(even).winner == 0 and vote(even).margin == 0
    even[2:] = shares(2, 2, sure=0.95)
    assert vote(even).winner == 2 and vote(even).margin == 0
    assert vote(shares(1, 1, 1, 1)).margin == 1


def test_a_vote_does_not_depend_on_the_order_of_slices():
    """A series may be read from either end."""
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 12)
    first, second = vote(probabilities), vote(probabilities[::-1])
    assert first[:3] == second[:3] and first.probability == pytest.approx(second.probability)


def test_a_doubtful_vote_is_told_and_stops_only_if_asked():
    """A margin below the least is doubtful, the least itself is not; another class stops in any case."""
    probabilities = shares(2, 2, 2, 0, 0)                                      # margin 0.2
    fields, doubtful, end = decide("sequence", probabilities, NAMES, ["T2w"], 0.2, True)
    assert not doubtful and end == "" and fields["sequence"] == "T2w"
    assert fields["sequence_votes"] == "3 of 5" and fields["sequence_margin"] == 0.2
    assert fields["sequence_probability"] == pytest.approx((3 * 0.9 + 2 * 0.05) / 5)
    assert decide("sequence", probabilities, NAMES, ["T2w"], 0.21, False)[1:] == (True, "")
    stopped = decide("sequence", probabilities, NAMES, ["T2w"], 0.21, True)
    assert stopped == (fields, True, "sequence: doubtful (T2w)")
    assert decide("sequence", probabilities, NAMES, ["T1w"], 0.21, True)[1:] == (True, "sequence: T2w")


def test_slices_with_cord_go_on_one_by_one():
    """Each slice is judged for itself, one is enough, and any of several kept classes counts."""
    probabilities = shares(0, 1, 1, 0, classes=2, sure=0.8)
    fields, on, end = choose_slices("cord", probabilities, ["absent", "present"], ["present"])
    assert on.tolist() == [False, True, True, False] and end == ""
    assert fields == {"cord": "present", "cord_votes": "2 of 4", "cord_probability": 0.8}
    fields, on, end = choose_slices("cord", shares(0, 0, classes=2), ["absent", "present"], ["present"])
    assert not on.any() and end == "cord: absent in every slice" and fields["cord_votes"] == "0 of 2"
    _, on, _ = choose_slices("cord", shares(0, 1, 2), NAMES, ["T1w", "T2w"])
    assert on.tolist() == [True, False, True]


def test_classes_to_keep_are_words_or_patterns():
    """A name wins over a pattern: T2*w is a sequence, and must not take T2w along."""
    assert parse_keep([], STAGES) == KEEP
    keep = parse_keep(["sequence=T1w,T2*w"], STAGES)
    assert keep["sequence"] == ["T1w", "T2*w"] and keep["anatomy"] == KEEP["anatomy"]
    assert kept_classes("sequence", ["T2*w"], NAMES) == ["T2*w"]
    assert kept_classes("sequence", ["T2*"], NAMES) == ["T2*w", "T2w"]
    assert kept_classes("sequence", ["T1w", "*"], NAMES) == NAMES
    assert kept_classes("anatomy", ["MR/spine/*"], ["MR/knee/acl", "MR/spine/cord"]) == ["MR/spine/cord"]
    with pytest.raises(UserError, match="sequence=t2w: .*no such class, but T1w.*did you mean"):
        kept_classes("sequence", ["t2w"], NAMES)
    for word, message in (("T2w", "expected STAGE=CLASS"), ("cord_mask=cord", "one of anatomy"),
                          ("sequence=", "expected"), ("anatomy=spine", "anatomy is left out")):
        with pytest.raises(UserError, match=message):
            parse_keep([word], ["sequence", "cord"])


def test_masks_beside_series_are_no_series(tmp_path):
    """The demonstration's masks, and others by the usual words; a series called after a cord stays."""
    names = ["a/t2", "a/t2_cord", "a/t2_lesion", "a/t2_seg", "a/t1_cord", "b/mask", "t2"]
    entries = [Entry(tmp_path / f"{name}.nii.gz", f"{name}.nii.gz") for name in names]
    left, notes = without_masks(entries)
    assert [entry.name for entry in left] == ["a/t2.nii.gz", "a/t1_cord.nii.gz", "t2.nii.gz"]
    assert notes == ["4 mask(s) of other series left out: a/t2_cord.nii.gz, a/t2_lesion.nii.gz, "
                     "a/t2_seg.nii.gz, ..."]
    assert without_masks(left) == (left, [])


def test_no_two_series_write_to_one_file(tmp_path):
    """A folder and a file may have one name."""
    names = output_names([Entry(tmp_path, name) for name in ("a", "a.nii", "a.nii.gz", "b/a", "c.d")])
    assert names == ["a", "a~2", "a~3", "b/a", "c.d"]


def write_series(path, voxels, affine=None):
    """A NIfTI of voxels [x, y, z]; 1 x 1 x 4 mm where no affine is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, 4, 1]) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("axis", ["stored", "sagittal", "coronal"])
@pytest.mark.parametrize("fit, intensity", [("letterbox", "slice"), ("squash", "series")])
def test_networks_see_what_they_saw_in_training(tmp_path, axis, fit, intensity):
    """The squares are those of SliceDataset, to the last bit, of slices that are square in no sense."""
    voxels = np.random.default_rng(0).integers(0, 900, (14, 20, 6)).astype(np.int16)
    path = write_series(tmp_path / "t2.nii.gz", voxels, np.diag([-1.0, 1.5, 3, 1]))
    series, view = read_series(path), View(24, fit, intensity, (1.0, 98.0), 40.0)
    square, count = square_maker(series, axis), len(slices_along(series, axis))
    slices = [Slice(path, index, axis, -1, None, "p", "s") for index in range(count)]
    dataset = SliceDataset(slices, 24, False, fit=fit, intensity=intensity, percentiles=(1.0, 98.0),
                           field=40.0)
    for index in range(count):
        assert torch.equal(square(index, view)[0], dataset[index]["image"])


def test_a_map_of_a_square_goes_back_to_the_slices_pixels():
    """The box is cut out and resized; of equal size no value is touched."""
    logits = torch.randn(2, 1, 24, 24)
    assert torch.equal(to_slices(logits, (2, 0, 20, 24), (20, 24)), logits[:, :, 2:22])
    ramp = torch.linspace(-1, 1, 24).expand(1, 1, 24, 24)
    wide = to_slices(ramp, (0, 0, 24, 24), (48, 96))
    assert wide.shape == (1, 1, 48, 96) and (wide[0, 0, 5].diff() >= 0).all()
    stage = Stage("cord_mask", "segment", None, ["cord"], [], None, "stored", 0.5, "fp32", "")
    masks = to_masks(stage, ramp, (0, 0, 24, 24), (48, 96))
    assert masks.dtype == np.uint8 and masks.sum() == 48 * 48 and masks[:, :, 48:].all()
    assert to_masks(stage._replace(threshold=0.7), ramp, (0, 0, 24, 24), (48, 96)).sum() < 48 * 40
    two = to_masks(stage._replace(names=["a", "b"]), torch.cat([ramp, -ramp], 1), (0, 0, 24, 24), (24, 24))
    assert (two[0, :, 12:] == 1).all() and (two[0, :, :12] == 2).all()


class Toy(torch.nn.Module):
    """Logits of two classes, or of a mask and of classes, by the brightness."""

    def __init__(self, multitask=False):
        super().__init__()
        self.multitask, self.batches = multitask, []

    def forward(self, images):
        self.batches.append(len(images))
        labels = torch.stack([1 - images.mean((1, 2, 3)), images.mean((1, 2, 3))], 1)
        return (images - 0.5, labels, torch.zeros(2, 2)) if self.multitask else labels


def test_outputs_do_not_depend_on_batches_and_multitask_gives_either():
    """Batches are a matter of memory; a network of both kinds has a mask and a class."""
    squares = list(torch.rand(7, 1, 8, 8))
    stage = Stage("cord", "classify", Toy(), ["absent", "present"], [], None, "stored", 0.5, "fp32", "")
    outputs = predict(stage, squares, 3, torch.device("cpu"))
    assert stage.network.batches == [3, 3, 1]
    assert torch.equal(outputs, predict(stage, squares, 7, torch.device("cpu")))
    both = stage._replace(kind="multitask", network=Toy(True))
    assert torch.equal(predict(both, squares, 3, torch.device("cpu")), outputs)
    masks = predict(both._replace(name="cord_mask"), squares, 3, torch.device("cpu"))
    assert torch.equal(masks, torch.stack(squares) - 0.5)
    with pytest.raises(UserError, match="cord.pt: gives values that are not finite"):
        predict(stage, [squares[0] * math.nan], 3, torch.device("cpu"))


def test_volumes_and_lesions_are_counted():
    """mm3 of all voxels and of each slice; lesions that touch by a corner are one."""
    mask, lines = np.zeros((4, 6, 6), np.uint8), [{"slice": i} for i in range(4)]
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 5, 5] = mask[3, 5, 4] = 1
    assert measure("lesion", mask, 2.5, lines) == {"lesion_mm3": 10.0, "lesions": 2}
    assert [line["lesion_mm3"] for line in lines] == [2.5, 2.5, 0.0, 5.0]
    assert measure("cord", mask, 1.0, lines) == {"cord_mm3": 4.0}


def test_pictures_show_the_slices_with_most_lesion_then_cord(tmp_path, monkeypatch):
    """As many as asked for, in their order; cord in green, lesions in red, and captions say what is there."""
    cord, lesion = np.zeros((5, 8, 16), np.uint8), np.zeros((5, 8, 16), np.uint8)
    for i, width in enumerate((0, 3, 9, 5, 7)):
        cord[i, 2:6, :width] = 1
    lesion[3, 3:5, 1:3] = lesion[1, 3, 1] = 1
    masks = {"cord": cord, "lesion": lesion}
    assert busiest(masks, 1) == [3] and busiest(masks, 3) == [1, 2, 3] and busiest(masks, 9) == [1, 2, 3, 4]
    assert busiest({"cord": cord}, 2) == [2, 4] and busiest({"lesion": lesion}, 9) == [1, 3]
    assert busiest({"cord": cord}, 0) == busiest({}, 3) == []
    slices = np.random.default_rng(0).normal(100, 5, (5, 8, 16)).astype(np.float32)
    captions, drawn = [], cascade_judge.row
    monkeypatch.setattr(cascade_judge, "row", lambda panels, words: (
        captions.append(words) or drawn(panels, words)))
    save_overlay(tmp_path / "b.png", slices, (2.0, 1.0), {"cord": cord}, [2])
    save_overlay(tmp_path / "a.png", slices, (2.0, 1.0), masks, [2, 3])
    assert [words[1] for words in captions] == ["cord green", *["cord green, lesion red"] * 2]
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    height = pixels.shape[0] // 2
    assert height >= PICTURE
    red = (pixels[..., 0] > pixels[..., 1] + 60).sum((1,))
    green = pixels[..., 1] > pixels[..., 0] + 40
    assert not red[:height].any() and red[height:].any()
    assert green[:height, pixels.shape[1] // 2:].any() and not green[:, :PICTURE].any()


def test_a_record_counts_only_whole_and_for_the_same_making(tmp_path):
    """Cut short, of other weights, or without its mask it is not taken for finished."""
    path, made = tmp_path / "a.json", {"stages": {"cord": ("digest", ["present"], 0.5)}, "rules": (1, None)}
    (tmp_path / "a_cord.nii.gz").touch()
    assert read_record(path, made) is None
    row, slices = {"series": "a", "share": 0.1}, [{"slice": 0}]
    result = write_record(path, made, ["a_cord.nii.gz"], row, slices)
    assert read_record(path, made) == result == {"row": row, "slices": slices}
    assert read_record(path, {**made, "rules": (2, None)}) is None
    text = path.read_text()
    path.write_text(text[:-9])
    assert read_record(path, made) is None
    path.write_text(text)
    (tmp_path / "a_cord.nii.gz").unlink()
    assert read_record(path, made) is None


def test_tables_have_the_columns_of_the_stages_used():
    """A stage that is left out has none."""
    columns = series_columns(["sequence", "cord", "cord_mask"])
    assert not {"anatomy", "lesions", "lesion_mm3", "cord_margin"} & set(columns)
    assert {"sequence_margin", "cord_votes", "cord_mm3", "doubtful", "stopped"} <= set(columns)
    assert "lesions" in series_columns(STAGES)


def test_the_summary_counts_ends_and_names_doubtful_votes():
    """Reasons that differ only in the class are counted together, as they are told."""
    rows = [{"series": "a", "stopped": "", "doubtful": ""}, {"series": "b", "stopped": "bad file"},
            {"series": "c", "stopped": "sequence: doubtful (T2w)", "doubtful": "anatomy, sequence",
             "anatomy": "spine", "anatomy_margin": 0.1, "sequence": "T2w", "sequence_margin": 0.0}]
    ends, doubtful = summary(rows)
    assert ends == "3 series: 1 through all stages; 1 bad file; 1 sequence: doubtful"
    assert doubtful == ("Doubtful votes in 1 series: c (anatomy spine, margin 0.10); c (sequence T2w, margin "
                        "0.00)")
    assert len(summary(rows[:2])) == 1


def truth_table(folder, text):
    """A table with two series on disk; its path."""
    write_series(folder / "a.nii.gz", np.zeros((4, 4, 4), np.uint8))
    write_series(folder / "a_cord.nii.gz", np.zeros((4, 4, 4), np.uint8))
    (folder / "b").mkdir(exist_ok=True)
    (folder / "series.csv").write_text(text)
    return folder / "series.csv"


def test_a_truth_is_read_with_the_masks_beside_its_series(tmp_path):
    """As the demonstration writes it, and with masks by name; empty cells are unknown."""
    path = truth_table(tmp_path, "patient,path,anatomy,location,view,sequence,lesion,split\n"
                                 "p,a.nii.gz,spine,cervical,sagittal,T2w,1,test\nq,b,other,,,,,train\n")
    truths = read_truth(path)
    first, second = truths[(tmp_path / "a.nii.gz").resolve(), ""], truths[(tmp_path / "b").resolve(), ""]
    assert first.classes == {"anatomy": "spine", "location_view": "cervical_sagittal", "sequence": "T2w"}
    assert first.masks == {"cord": tmp_path / "a_cord.nii.gz"} and first.lesion is True
    assert (first.patient, first.split) == ("p", "test")
    assert second == Truth({"anatomy": "other"}, {}, None, "q", "train")
    named = truth_table(tmp_path, "path,uid,lesion_mask,cord_mask\na.nii.gz,,a_cord.nii.gz,\nb,1.2,,\n")
    truths = read_truth(named)
    assert truths[(tmp_path / "a.nii.gz").resolve(), ""].masks == {"lesion": tmp_path / "a_cord.nii.gz"}
    entries = {"a": Entry(tmp_path / "a.nii.gz", "a"), "b1": Entry(tmp_path / "b", "b", "1.2"),
               "b2": Entry(tmp_path / "b", "b", "1.3")}
    assert set(truths_of(entries, truths)) == {"a", "b1"}
    for text, message in (("anatomy\nspine\n", "needs rows and a column path"),
                          ("path,lesion\na.nii.gz,yes\n", 'line 2: lesion "yes"'),
                          ("path,cord_mask\na.nii.gz,no.nii.gz\n", "line 2: .*no.nii.gz: no such file")):
        with pytest.raises(UserError, match=message):
            read_truth(truth_table(tmp_path, text))


def test_scope_is_what_the_truth_does_not_exclude():
    """An unknown class excludes nothing; slices with cord are no matter of series."""
    kept = {"anatomy": ["spine"], "sequence": ["T2w", "T1w"], "cord": ["present"], "cord_mask": []}
    truths = [Truth(classes, {}, None, "", "") for classes in (
        {"anatomy": "spine", "sequence": "T1w"}, {"anatomy": "spine"}, {"anatomy": "other"},
        {"anatomy": "spine", "sequence": "T2*w"}, {"location_view": "brain_axial"})]
    assert [in_scope(truth, kept) for truth in truths] == [True, True, False, False, True]


def test_f1_is_sklearns_and_undefined_without_cases():
    """Presence by series; nothing to find and nothing called has no F1."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        called, true = (rng.integers(0, 2, 9).astype(bool).tolist() for _ in range(2))
        if any(called) or any(true):
            assert f1_of(called, true)[0] == pytest.approx(f1_score(true, called, zero_division=0))
    assert f1_of([True, False], [False, False])[:2] == (0, 0) and math.isnan(f1_of([False], [False])[0])


def test_accuracy_counts_what_a_stage_judged_and_knows():
    """Not series that never came there, of unknown truth, or of a class that the network has not."""
    def result(name, word, *votes):
        slices = [{f"sequence/{each}": float(each == one) for each in NAMES} for one in votes]
        return {"row": {"series": name, "sequence": word}, "slices": slices}

    results = [result("a", "T2w", "T2w", "T2w", "T1w", "T2w"), result("b", "T1w", "T1w", "T1w"),
               result("c", "T1w", "T1w"), result("d", "T1w", "T1w"), {"row": {"series": "e"}, "slices": [{}]}]
    truths = {name: Truth({"sequence": word} if word else {}, {}, None, "", "") for name, word in
              (("a", "T2w"), ("b", "T2w"), ("c", "PD"), ("d", ""), ("e", "T2w"))}
    assert stage_accuracy("sequence", NAMES, results, truths) == (1, 2, 3, 6)
    assert stage_accuracy("sequence", NAMES, results[:2], {}) == (0, 0, 0, 0)


def test_find_series_gives_entries_that_have_names_here(tmp_path):
    """What the list of series calls them is what the files of the output are called."""
    write_series(tmp_path / "p" / "t2.nii.gz", np.zeros((4, 4, 4), np.uint8))
    entries, _ = find_series(tmp_path)
    assert output_names(entries) == ["p/t2"]
    series = read_series(write_series(tmp_path / "q.nii.gz", np.arange(96, dtype=np.int16).reshape(4, 6, 4)))
    assert spacing_along(series, "stored") == (4, 1, 1)
