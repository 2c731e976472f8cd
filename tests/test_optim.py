"""Parameter groups, and optimizers against their formulas."""

import pytest
import torch
import torch.nn as nn

from utils.config import UserError
from utils.optim import build_optimizer, drop_frozen_, parameter_groups


class Net(nn.Module):
    """Weights, biases, normalisation, a token, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names_without_decay(model, groups):
    free = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in free]


def test_every_trainable_parameter_is_in_one_group():
    """A forgotten parameter would never be trained; a frozen one must not decay."""
    model = Net()
    for exclude in (True, False):
        groups = parameter_groups(model, 0.1, exclude)
        ids = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_norms_biases_and_named_parameters_do_not_decay():
    """As asked: nothing, the one-dimensional, or also those whose name holds a word."""
    model = Net()
    assert names_without_decay(model, parameter_groups(model, 0.1, False)) == []
    free = ["linear.bias", "norm.weight", "norm.bias"]
    assert names_without_decay(model, parameter_groups(model, 0.1, True)) == free
    named = parameter_groups(model, 0.1, True, no_decay_names=["mask_token"])
    assert names_without_decay(model, named) == ["mask_token", *free]


def adam_by_hand(weight, gradients, lr, decay, betas, decoupled):
    """Kingma & Ba 2015, algorithm 1; decay in the gradient, or beside it (Loshchilov & Hutter 2019)."""
    first = second = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient if decoupled else gradient + decay * weight
        weight = weight * (1 - lr * decay) if decoupled else weight
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        weight = weight - lr * (first / (1 - betas[0]**t)) / ((second / (1 - betas[1]**t)).sqrt() + 1e-8)
    return weight


def sgd_by_hand(weight, gradients, lr, decay, momentum):
    """Heavy ball with L2 decay, as torch defines it."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = momentum * velocity + gradient + decay * weight
        weight = weight - lr * velocity
    return weight


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_each_word_is_the_optimizer_it_names(name):
    """All settings reach torch: rate, decay, betas, momentum."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(7, generator=generator), torch.randn(5, 7, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer = build_optimizer(name, [{"params": [parameter]}], 0.1, 0.2, [0.8, 0.9], 0.7)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = sgd_by_hand(start, gradients, 0.1, 0.2, 0.7) if name == "sgd" else \
        adam_by_hand(start, gradients, 0.1, 0.2, [0.8, 0.9], decoupled=name == "adamw")
    torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_fused_kernel_is_used_on_the_cpu(name):
    """It is the fast one there; foreach is slower than the plain loop."""
    optimizer = build_optimizer(name, parameter_groups(Net(), 0.1, True), 0.1, 0.1)
    assert all(group["fused"] and not group["foreach"] for group in optimizer.param_groups)


def test_a_step_with_overflow_is_skipped():
    """Under fp16 the gradient scaler tells the fused kernel, which must leave weights and moments alone."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer("adamw", [{"params": [parameter]}], 0.1, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum() * float("inf")).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert scaler.get_scale() == 2.0


def test_an_unknown_word_is_named_with_the_allowed_ones():
    """The user edits OPTIMIZER in constants.py."""
    with pytest.raises(UserError, match="OPTIMIZER.*lion.*sgd, adam, adamw"):
        build_optimizer("lion", parameter_groups(Net(), 0.1, True), 0.1, 0.1)


def test_groups_of_named_parameters_hold_these_alone():
    """Each part of a network has its own rate; together the parts hold every trained parameter once."""
    model = Net()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [parameter_groups(model, 0.1, True, names=part) for part in (names[:2], names[2:])]
    held = [id(parameter) for part in parts for group in part for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for group in parts[0] for p in group["params"]} == {
        id(parameter) for name, parameter in model.named_parameters() if name in names[:2]}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_frozen_group_is_neither_stepped_nor_decayed_until_its_epoch(name):
    """Its moments stay empty, too: nothing of the frozen epochs is left."""
    frozen, free = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_optimizer(name, [{"params": [frozen], "from_epoch": 3}, {"params": [free]}], 0.1, 0.2)
    for epoch in (1, 2, 3):
        (frozen.sum() + free.sum()).backward()
        drop_frozen_(optimizer, epoch)
        assert (frozen.grad is None) == (epoch < 3) and free.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(frozen, torch.ones(3)) == (epoch < 3)
