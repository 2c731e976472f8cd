"""Predictor, student and teacher targets against the same computation for each series alone."""

from itertools import pairwise

import pytest
import torch

from losses.jepa import jepa_loss
from models.jepa import Predictor, VolJEPA, join_order, sub_cu_seqlens, teacher_targets
from models.token_vit import TokenViT, position_code
from utils.config import UserError

LENGTHS = (9, 6, 12)
SIZES = [{"dim": 48, "depth": 2, "heads": 3}, {"dim": 64, "depth": 1, "heads": 4}]


def build(dim=48, depth=2, heads=3, **options):
    """A small network with a mask token that is not zero, as after training."""
    torch.manual_seed(0)
    model = VolJEPA(TokenViT("custom", dim, depth, heads), Predictor(dim, 32, 2, 2, **options))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.12)
    torch.nn.init.normal_(model.predictor.mask_token)
    return model


def batch(without_context=None, without_target=None):
    """Arguments of VolJEPA's forward, and foreground: nine in ten tokens, a third of them context."""
    generator = torch.Generator().manual_seed(0)
    count = sum(LENGTHS)
    tokens = torch.randn(count, 1024, generator=generator)
    coords = torch.cartesian_prod(*[torch.arange(3)] * 3)[:count]
    draw = torch.rand(count, generator=generator)
    context, target = draw < 0.3, (0.3 <= draw) & (draw < 0.8)
    foreground = draw < 0.9
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for mask, series in ((context, without_context), (target, without_target)):
        if series is not None:
            mask[cu[series]:cu[series + 1]] = False
    return tokens, coords, context, target, foreground, cu


def naive_prediction(model, tokens, coords, context, target):
    """Predictions of one series."""
    if not target.any():
        return torch.zeros(0, model.encoder.dim)
    features = model.encoder(tokens[context], coords[context], torch.tensor([0, context.sum()]))
    predictor, x = model.predictor, []
    for values, coord in zip(features, coords[context], strict=True):
        x.append(predictor.embed(torch.cat([values, position_code(coord[None], 30)[0]])))
    for coord in coords[target]:
        x.append(predictor.embed(torch.cat([predictor.mask_token, position_code(coord[None], 30)[0]])))
    x = torch.stack(x)
    for block in predictor.blocks:
        q, k, v = block.attention.qkv(block.norm1(x)).view(len(x), 3, 2, 16).permute(1, 2, 0, 3)
        heads = (q @ k.transpose(1, 2) / 4).softmax(2) @ v                                 # [2, N, 16]
        x = x + block.attention.project(heads.transpose(0, 1).flatten(1))
        x = x + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(x))))
    return predictor.head(predictor.norm(x[context.sum():]))


@pytest.mark.parametrize("empty", [{}, {"without_context": 1}, {"without_target": 1},
                                   {"without_context": 0, "without_target": 0}])
def test_packed_predictions_are_those_of_each_series_alone(empty):
    """In the targets' order; a series that lacks context, targets or both harms neither itself nor others."""
    model = build()
    tokens, coords, context, target, _, cu = batch(**empty)
    with torch.no_grad():
        output = model(tokens, coords, context, target, cu)
        alone = [naive_prediction(model, *(x[a:b] for x in (tokens, coords, context, target)))
                 for a, b in pairwise(cu.tolist())]
    assert len(output) == target.sum()
    torch.testing.assert_close(output, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_gradient_reaches_every_parameter(size):
    """Also the mask token, which starts at zero."""
    torch.manual_seed(0)
    model = VolJEPA(TokenViT("custom", **size), Predictor(size["dim"], 32, 2, 2))
    assert not model.predictor.mask_token.any()
    tokens, coords, context, target, _, cu = batch()
    pred = model(tokens, coords, context, target, cu)
    assert pred.shape == (target.sum(), size["dim"])
    jepa_loss(pred, torch.randn(pred.shape)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("lacking", ["context", "target", "both"])
def test_a_batch_without_context_or_targets_gives_every_parameter_a_finite_gradient(lacking):
    """Under DDP the other ranks wait for each gradient, and a NaN would reach them all."""
    model = build()
    tokens, coords, context, target, _, cu = batch()
    context &= lacking == "target"
    target &= lacking == "context"
    pred = model(tokens, coords, context, target, cu)
    jepa_loss(pred, torch.ones_like(pred)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_predictions_do_not_see_what_they_predict():
    """Only context tokens reach the student; a leak would make the task trivial."""
    model = build()
    tokens, coords, context, target, _, cu = batch()
    other = torch.where(context[:, None], tokens, -tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens, coords, context, target, cu),
                           model(other, coords, context, target, cu))


def test_checkpointing_activations_changes_no_gradient():
    """Of the predictor; the student's has its own test."""
    results = []
    for recompute in (False, True):
        model = build(checkpoint_activations=recompute)
        tokens, coords, context, target, _, cu = batch()
        model(tokens, coords, context, target, cu).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)


def test_teacher_targets_are_normalised_features_of_each_series_alone():
    """The teacher sees the foreground alone; each target has mean 0 and variance 1 and no gradient."""
    teacher = build().encoder.eval()
    tokens, coords, _, target, foreground, cu = batch(without_target=1)
    output = teacher_targets(teacher, tokens, coords, foreground, target, cu)
    expected = []
    for a, b in pairwise(cu.tolist()):
        seen = foreground[a:b]
        features = teacher(tokens[a:b][seen], coords[a:b][seen], torch.tensor([0, seen.sum()]))
        for row, is_target in zip(features.detach(), target[a:b][seen], strict=True):
            if is_target:
                expected.append((row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not output.requires_grad and output.dtype == torch.float32
    tokens[~foreground] += 1
    assert torch.equal(output, teacher_targets(teacher, tokens, coords, foreground, target, cu))


def test_lengths_of_a_subset_are_counts_within_each_series():
    """Zero where a series keeps nothing."""
    keep = torch.rand(30, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[7:12] = False
    cu = torch.tensor([0, 7, 12, 12, 30], dtype=torch.int32)
    expected = [0]
    for a, b in pairwise(cu.tolist()):
        expected.append(expected[-1] + int(keep[a:b].sum()))
    output = sub_cu_seqlens(keep, cu)
    assert output.tolist() == expected and output.dtype == torch.int32
    assert sub_cu_seqlens(keep[:0], cu[:1]).tolist() == [0]


@pytest.mark.parametrize(("first", "second"), [((2, 3), (1, 2)), ((0, 2, 1), (3, 0, 0)), ((0, 0), (0, 2))])
def test_two_batches_join_series_by_series(first, second):
    """Context, then targets, of one series after the other."""
    expected = []
    for series in range(len(first)):
        start = sum(first[:series])
        expected += range(start, start + first[series])
        start = sum(first) + sum(second[:series])
        expected += range(start, start + second[series])
    cus = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (first, second))
    assert join_order(*cus, sum(first), sum(second)).tolist() == expected


def test_a_predictor_whose_heads_do_not_divide_it_names_its_constant():
    """The student's constants would mislead."""
    with pytest.raises(UserError, match="JEPA_PREDICTOR_DIM = 512"):
        Predictor(48, dim=512, heads=7)
