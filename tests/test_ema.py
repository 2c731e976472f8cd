"""The average of weights against its formula, timm's, and an uninterrupted run."""

import copy

import pytest
import torch
import torch.nn as nn

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import UserError
from utils.ema import EMA, ema_decay


class Mixed(nn.Module):
    """Parameters of two precisions, one of them frozen, with floating, integer and boolean buffers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.precise = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("count", torch.tensor([1, 2]))
        self.register_buffer("seen", torch.tensor([True, False]))
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))


@torch.no_grad()
def disturb(model, seed):
    """Stand in for an optimizer step: all parameters and buffers change."""
    generator = torch.Generator().manual_seed(seed)
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point() and (value.requires_grad or not isinstance(value, nn.Parameter)):
            value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype))
        elif value.dtype == torch.int64:
            value.add_(1)
        elif value.dtype == torch.bool:
            value.logical_not_()


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("warmup", [True, False])
def test_updates_follow_the_formula_and_buffers_are_copied(warmup):
    """decay * average + (1 - decay) * weights, one parameter at a time."""
    model = Mixed()
    ema, naive = EMA(model, 0.9, warmup), {n: p.detach().clone() for n, p in model.named_parameters()}
    for n in range(30):
        disturb(model, n)
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        for name, parameter in model.named_parameters():
            naive[name] = decay * naive[name] + (1 - decay) * parameter.detach()
    state = ema.state_dict()
    for name, value in naive.items():
        torch.testing.assert_close(state[name], value)
    for name, value in model.named_buffers():
        assert torch.equal(state[name], value)


def test_equals_timms():
    """The same numbers as timm's ModelEmaV3, buffers aside, which it can also copy."""
    timm = pytest.importorskip("timm.utils")
    model = Mixed()
    ours, theirs = EMA(model, 0.99, warmup=False), timm.ModelEmaV3(model, 0.99, exclude_buffers=True)
    for n in range(5):
        disturb(model, n)
        ours.update()
        theirs.update(model)
    assert_same(ours.state_dict(), theirs.module.state_dict())


def test_the_decay_warms_up_to_its_value():
    """1/10, 2/11, 3/12, ... until the decay that was asked for."""
    assert [ema_decay(0.2, n) for n in range(4)] == [1 / 10, 2 / 11, 0.2, 0.2]
    assert ema_decay(0.999, 10**6) == 0.999
    assert ema_decay(0.999, 0, warmup=False) == 0.999


def test_restore_brings_the_trained_weights_back_bitwise():
    """Validation must leave no trace, also when it fails."""
    model = Mixed()
    ema = EMA(model, 0.9)
    disturb(model, 0)
    ema.update()
    disturb(model, 1)
    trained = copy.deepcopy(model.state_dict())
    average = ema.state_dict()
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert_same(model.state_dict(), average)
        raise ZeroDivisionError
    assert_same(model.state_dict(), trained)
    assert not torch.equal(average["precise"], trained["precise"])


def test_a_resumed_average_goes_on_bitwise(tmp_path):
    """The count of updates travels too: without it the warm-up of the decay would start again."""
    model = Mixed()
    ema = EMA(model, 0.9)
    for n in range(3):
        disturb(model, n)
        ema.update()
    save_checkpoint(tmp_path / "a.pt", kind="test", model_state_dict=model.state_dict(),
                    ema_state_dict=ema.state_dict())

    entries = load_checkpoint(tmp_path / "a.pt")
    other = Mixed()
    resumed = EMA(other, 0.9)
    other.load_state_dict(entries["model_state_dict"])
    resumed.load_state_dict(entries["ema_state_dict"])
    assert_same(other.state_dict(), model.state_dict())
    for n in range(3, 6):
        for each, average in ((model, ema), (other, resumed)):
            disturb(each, n)
            average.update()
    assert_same(resumed.state_dict(), ema.state_dict())


def test_the_state_loads_into_a_bare_model():
    """Inference needs no EMA object."""
    model, other = Mixed(), Mixed()
    ema = EMA(model, 0.5)
    disturb(model, 0)
    ema.update()
    other.load_state_dict(ema.state_dict())
    assert_same(other.state_dict(), ema.state_dict())


def test_a_state_without_a_count_is_refused():
    """Weights from elsewhere do not say how far the warm-up has come."""
    model = Mixed()
    with pytest.raises(UserError, match="ema_state_dict"):
        EMA(model, 0.9).load_state_dict(model.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_outside_zero_to_one_is_refused(decay):
    """It would diverge."""
    with pytest.raises(UserError, match="EMA_DECAY"):
        EMA(Mixed(), decay)


def test_misuse_that_would_lose_weights_is_an_error():
    """A second apply_shadow would overwrite the trained weights with the average."""
    ema = EMA(Mixed(), 0.9)
    with pytest.raises(RuntimeError, match="restore"):
        ema.restore()
    ema.apply_shadow()
    for call in (ema.apply_shadow, ema.update, ema.state_dict):
        with pytest.raises(RuntimeError):
            call()


def test_decays_of_zero_and_one_follow_and_stand_still():
    """The two ends of the range."""
    model = Mixed()
    start = copy.deepcopy(model.state_dict())
    follows, stands = EMA(model, 0.0), EMA(model, 1.0, warmup=False)
    disturb(model, 0)
    follows.update()
    stands.update()
    assert_same(follows.state_dict(), model.state_dict())
    assert torch.equal(stands.state_dict()["precise"], start["precise"])
