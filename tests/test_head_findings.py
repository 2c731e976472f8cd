"""Findings in heads: where they lie, how large they are, and what they do to the picture."""

import numpy as np
import pytest

from datasets.head_findings import FINDINGS, draw_findings
from datasets.head_images import TISSUES, compose
from datasets.head_phantom import LABELS, draw_head, make_head

SHAPE, SPACING = (36, 48, 40), (4.0, 4.0, 4.0)
POINTS = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * step for n, step in zip(SHAPE, SPACING, strict=True)),
                     indexing="ij", sparse=True)


def images(patient, findings):
    """(head, {"CT" | "T1" | "T2" | "FLAIR": noise-free picture}) of a patient with these findings."""
    head = make_head({**patient, "findings": findings}, POINTS, 4.0)
    return head, {name: compose(head, {tissue: values[column] for tissue, values in TISSUES.items()})
                  for column, name in enumerate(("CT", "T1", "T2", "FLAIR"))}


@pytest.fixture(scope="module")
def cases():
    """name -> list of (healthy pictures, head, pictures) of three patients with that one finding."""
    found = {name: [] for name in FINDINGS}
    for seed in range(3):
        patient = draw_head(np.random.default_rng(seed), FINDINGS)
        _, healthy = images(patient, {})
        for name in FINDINGS:
            found[name].append((healthy, *images(patient, {name: patient["findings"][name]})))
    return found


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_changes_the_picture_inside_its_mask_and_hardly_outside(cases, name):
    """A mask that is not where the change is could not check an attention map."""
    for healthy, head, pictures in cases[name]:
        mask = head.masks[name]
        assert set(head.masks) == {name} and mask.dtype == bool
        for kind, picture in pictures.items():
            change = np.abs(picture - healthy[kind])
            assert change[mask].mean() > (3 if kind == "CT" else 0.05)
            assert change[~mask].sum() < 0.3 * change[mask].sum()


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_is_seen_in_tokens_and_lies_in_the_brain(cases, name):
    """4 to 120 ml: several tokens of 1 ml, and never the whole hemisphere."""
    brain = [LABELS[organ] for organ in ("grey", "white", "deep_grey", "ventricles", "csf")]
    for _, head, _ in cases[name]:
        mask = head.masks[name]
        assert 4 < mask.sum() * np.prod(SPACING) / 1e3 < 120
        assert np.isin(head.labels[mask], brain).mean() > 0.95              # a mass may press on the tent


def contrast(case, name, kind):
    """Mean change of the most changed half of the mask."""
    healthy, head, pictures = case
    change = (pictures[kind] - healthy[kind])[head.masks[name]]
    return change[np.abs(change) >= np.median(np.abs(change))].mean()


def test_findings_have_the_signal_that_they_have_in_patients(cases):
    """Blood: dense on CT, bright on T1, dark on T2.  Tumour and infarct: dark on CT, bright on T2."""
    for case in cases["hemorrhage"]:
        assert contrast(case, "hemorrhage", "CT") > 20
        assert contrast(case, "hemorrhage", "T1") > 0.05
        healthy, head, pictures = case
        core = pictures["CT"] > 60
        core &= head.masks["hemorrhage"]
        assert core.sum() > 20 and pictures["CT"][core].max() < 80
        assert pictures["T2"][core].mean() < healthy["T2"][core].mean()
    for name in ("tumour", "infarct"):
        for case in cases[name]:
            healthy, head, pictures = case
            white = head.masks[name] & (head.labels == LABELS["white"])
            assert (pictures["CT"] - healthy["CT"])[white].mean() < -2
            assert contrast(case, name, "T2") > 0.2 and contrast(case, name, "FLAIR") > 0.2


def test_an_infarct_reaches_the_cortex_and_a_tumour_spreads_in_white_matter(cases):
    """The wedge holds both tissues; oedema around a mass spares the cortex."""
    for _, head, _ in cases["infarct"]:
        labels = head.labels[head.masks["infarct"]]
        assert (labels == LABELS["grey"]).mean() > 0.2 and (labels == LABELS["white"]).mean() > 0.1
        assert np.isin(labels, [LABELS["grey"], LABELS["white"]]).all()


def test_findings_keep_clear_of_one_another_and_differ_between_patients():
    """Overlapping ones could not be told apart; equal ones would be learnt by heart."""
    drawn = [draw_findings(np.random.default_rng(seed), FINDINGS) for seed in range(50)]
    for findings in drawn:
        placed = list(findings.values())
        for i, one in enumerate(placed):
            for other in placed[:i]:
                assert np.linalg.norm(one["center"] - other["center"]) > one["radius"] + other["radius"] + 9
    for name in FINDINGS:
        centers = np.array([findings[name]["center"] for findings in drawn])
        assert (centers.std(0) > 5).all() and 0.2 < (centers[:, 2] > 0).mean() < 0.8


def test_no_finding_leaves_no_mask():
    """Negatives must be healthy."""
    head = make_head(draw_head(np.random.default_rng(0)), POINTS, 4.0)
    assert head.masks == {} and draw_findings(np.random.default_rng(0), ()) == {}
    assert not {"blood", "oedema", "tumour", "infarct"} & {tissue for tissue, _ in head.layers}
