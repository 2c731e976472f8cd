"""Networks of slices by the kind of task, and how one starts another."""

import pytest
import torch

from datasets.slice_tasks import slices_for
from losses.classification import classification_loss
from losses.slice_tasks import slice_loss
from losses.slices import mask_loss
from models.slice_nets import (
    KINDS,
    build_slice_model,
    encoder_of,
    mask_channels,
    named_outputs,
)
from utils.checkpoint import load_part
from utils.config import UserError

SMALL = {"encoder": "plain", "depth": 2, "features": 4}


def network(kind, seed=0, **options):
    """A small one for two classes and one mask class; a classifier is a ResNet."""
    torch.manual_seed(seed)
    options = {"encoder": "resnet18"} if kind == "classify" else {**SMALL, **options}
    return build_slice_model(kind, ["a", "b"], ["cord"], **options)


@pytest.mark.parametrize("mask_names, channels", [(["cord"], 1), (["cord", "csf"], 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_their_names_and_shapes(kind, mask_names, channels):
    """A single mask class has one logit, several a background, too."""
    model = build_slice_model(kind, ["a", "b"], mask_names, **{
        **SMALL, **({"encoder": "resnet18"} if kind == "classify" else {})}).eval()
    outputs = named_outputs(kind, model(torch.rand(2, 1, 33, 40)))
    wanted = {"masks": (2, channels, 33, 40), "labels": (2, 2), "terms": (2, 2)}
    names = {"classify": ["labels"], "segment": ["masks"], "multitask": ["masks", "labels", "terms"]}[kind]
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {name: wanted[name] for name in names}
    assert mask_channels(mask_names) == channels


def test_the_loss_is_that_of_the_outputs_that_are_there():
    """Of both it is weighted; a class that is unknown does not count."""
    generator = torch.Generator().manual_seed(0)
    masks, labels = torch.randint(-1, 2, (3, 8, 8), generator=generator), torch.tensor([1, -1, 0])
    outputs = {"masks": torch.randn(3, 1, 8, 8, generator=generator),
               "labels": torch.randn(3, 2, generator=generator)}
    weights = torch.tensor([1.0, 3.0])
    mask = mask_loss("combined", outputs["masks"], masks, weights, 0.3)
    label = classification_loss("ce", outputs["labels"][[0, 2]], labels[[0, 2], None].float())
    options = {"word": "combined", "class_weights": weights, "dice_weight": 0.3}
    assert slice_loss({"masks": outputs["masks"]}, masks, labels, **options) == mask
    alone = slice_loss({"labels": outputs["labels"]}, None, labels, **options)
    assert alone.item() == pytest.approx(label.item())
    terms = torch.tensor([[2.0, 0.5], [0.1, 0.2]])
    both = slice_loss({**outputs, "terms": terms}, masks, labels, **options)
    assert both.item() == pytest.approx((2 * mask + 0.1 + 0.5 * label + 0.2).item())
    without = slice_loss({**outputs, "terms": terms}, masks, torch.full((3,), -1), **options)
    assert without.item() == pytest.approx((2 * mask + 0.1).item())


@pytest.mark.parametrize("source, target", [
    ("segment", "segment"), ("segment", "multitask"), ("multitask", "segment"), ("classify", "segment"),
    ("segment", "classify"), ("multitask", "classify")])
def test_a_run_of_any_kind_fills_what_it_has(source, target, tmp_path):
    """The encoder wholly, decoder and heads where the other has them too; the rest is named as unmatched."""
    options = {"encoder": "resnet18"} if "classify" in (source, target) else {}
    first, second = network(source, 1, **options), network(target, 2, **options)
    torch.save({"model_state_dict": first.state_dict()}, tmp_path / "run.pt")
    matched, unmatched = load_part(second, encoder_of(second), tmp_path / "run.pt", optional=("head.",))
    own, other = (encoder_of(model).state_dict() for model in (second, first))
    assert all(torch.equal(value, other[name]) for name, value in own.items() if not name.startswith("head."))
    assert set(matched) | set(unmatched) == set(second.state_dict()) and not set(matched) & set(unmatched)
    for name in matched:
        pair = second.state_dict()[name], first.state_dict().get(name)
        assert pair[1] is None or pair[0].shape != pair[1].shape or torch.equal(*pair)
    if "classify" not in (source, target):
        assert torch.equal(second.decoder.blocks[0].up.weight, first.decoder.blocks[0].up.weight)
        new = {name.split(".")[0] for name in unmatched} - {"task_weights"}
        assert new == ({"classifier"} if (source, target) == ("segment", "multitask") else set())


def test_a_run_with_another_encoder_is_refused(tmp_path):
    """Never a silently random backbone."""
    torch.save({"model_state_dict": network("classify").state_dict()}, tmp_path / "run.pt")
    model = network("segment")
    with pytest.raises(UserError, match="90% are needed"):
        load_part(model, model.encoder, tmp_path / "run.pt")


def test_a_classifier_needs_a_resnet():
    """The plain encoder has no head of classes."""
    with pytest.raises(UserError, match='SPINE_ENCODER = "plain": classes need one of resnet18'):
        build_slice_model("classify", ["a", "b"], [], "plain")


def test_slices_are_those_that_the_task_can_use(spine, tmp_path):
    """Only slices with masks are segmented; class names are of no use there; a network's classes are kept."""
    def find(kind, table, names=None, mask_names=("cord",)):
        return slices_for(kind, table, mask_names, names, "auto", "stored", "seg", "stop")

    half, rows = tmp_path / "half.csv", ["path,index,label,mask,patient"]
    for line in (spine / "cord_masks.csv").read_text().splitlines()[1:]:
        path, index, label, mask, patient = line.split(",")
        mask = "" if patient == "c0" else spine / mask
        rows.append(f"{spine / path},{index},{label},{mask},{patient}")
    half.write_text("\n".join(rows))
    found, names, _ = find("segment", half)
    assert len(found) == 42 and names == [] and all(slice.mask for slice in found)
    found, names, _ = find("multitask", half)
    assert len(found) == 48 and names == ["bare", "barred"]
    found, names, _ = find("classify", half, ["bare", "barred", "curved"], [])
    assert len(names) == 3 and {slice.label for slice in found} == {0, 1}
    with pytest.raises(UserError, match="is none of the 2 classes"):
        find("classify", half, ["bare", "curved"], [])
    with pytest.raises(UserError, match="SPINE_MASK_CLASSES"):
        find("segment", half, None, [])
