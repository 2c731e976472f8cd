"""The averages of weights against their formula, timm's, and an uninterrupted run."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import UserError
from utils.distributed import fully_shard, init_device_mesh
from utils.ema import EMA, ema_decay, make_teacher, update_teacher_


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


def test_a_teacher_is_a_copy_that_learns_nothing_itself():
    """In evaluation mode, without gradients, sharing no memory with the student."""
    student = Mixed()
    teacher = make_teacher(student)
    assert type(teacher) is Mixed and student.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert_same(teacher.state_dict(), student.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    disturb(student, 0)
    assert_same(teacher.state_dict(), before)


def test_the_teacher_follows_the_formula_and_buffers_are_copied():
    """momentum * teacher + (1 - momentum) * student, one parameter at a time, with a changing momentum."""
    student = Mixed()
    teacher = make_teacher(student)
    naive = {name: value.clone() for name, value in teacher.named_parameters()}
    for n in range(20):
        disturb(student, n)
        update_teacher_(teacher, student, 0.9 + n / 200)
        for name, value in student.named_parameters():
            naive[name] = (0.9 + n / 200) * naive[name] + (0.1 - n / 200) * value.detach()
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, naive[name])
        assert not value.requires_grad and value.grad is None
    for first, second in zip(teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_momentum_one_leaves_the_teacher_and_zero_copies_the_student():
    """Bitwise, at both ends of the range."""
    student = Mixed()
    teacher = make_teacher(student)
    start = {name: value.clone() for name, value in teacher.named_parameters()}
    disturb(student, 0)
    update_teacher_(teacher, student, 1.0)
    assert_same(dict(teacher.named_parameters()), start)
    update_teacher_(teacher, student, 0.0)
    assert_same(teacher.state_dict(), student.state_dict())


def test_a_thousand_updates_stay_near_the_average_in_float64():
    """Rounding in float32 must not add up, also where the momentum comes near 1."""
    student = nn.Linear(8, 8)
    teacher = make_teacher(student)
    reference = teacher.weight.double()
    generator = torch.Generator().manual_seed(0)
    for n in range(1000):
        momentum = 0.994 + 0.006 * n / 1250
        with torch.no_grad():
            student.weight.add_(0.01 * torch.randn(8, 8, generator=generator))
        update_teacher_(teacher, student, momentum)
        reference = momentum * reference + (1 - momentum) * student.weight.detach().double()
    torch.testing.assert_close(teacher.weight.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process_group():
    """A process group of this process alone, so that modules can be sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_students_are_followed_as_bare_ones(one_process_group):
    """The loop holds what ``shard`` returned; the teacher's names stay those of the bare model."""
    student = Mixed()
    wrapped = nn.parallel.DistributedDataParallel(student)
    teacher = make_teacher(wrapped)
    assert type(teacher) is Mixed
    disturb(student, 0)
    update_teacher_(teacher, wrapped, 0.0)
    assert_same(teacher.state_dict(), student.state_dict())


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_sharded_teachers_equal_plain_ones(one_process_group, reshard_after_forward):
    """Whole parameters that the last forward left in memory must not hide the update, in either module."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain_teacher = make_teacher(plain)
    student, teacher = copy.deepcopy(plain), make_teacher(plain)
    mesh = init_device_mesh("cpu", (1,))
    for module in (student, teacher):
        for part in (*module, module):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    x = torch.randn(5, 3)
    for _ in range(3):
        for model, follower in ((plain, plain_teacher), (student, teacher)):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            (model(x) - follower(x).detach() - 1).square().mean().backward()
            optimizer.step()
            model(x)
            update_teacher_(follower, model, 0.5)
        torch.testing.assert_close(teacher(x), plain_teacher(x))
