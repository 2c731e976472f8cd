"""Accumulation groups, and learning rates against closed formulas and transformers."""

import math

import pytest
import torch

from utils.config import UserError
from utils.schedules import accumulation_group, build_scheduler, mask_probability, teacher_momentum


def sgd(*rates):
    """An optimizer with one parameter group per rate."""
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def rates(name, steps, peak=0.5, scheduled=None, **options):
    """The rate used in each of ``steps`` optimizer steps."""
    optimizer = sgd(peak)
    scheduler = build_scheduler(optimizer, name, scheduled or steps, **options)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("num_batches, every", [(7, 4), (12, 4), (3, 8), (13, 1)])
def test_accumulation_equals_one_large_batch_per_group(num_batches, every):
    """Each step's gradient is that of the mean loss over its own group, the short last one included."""
    batches = torch.randn(num_batches, 5, generator=torch.Generator().manual_seed(0))
    weights, gradients = torch.zeros(5, requires_grad=True), []
    for i, batch in enumerate(batches):
        size, is_last = accumulation_group(i, num_batches, every)
        ((batch @ weights - 1) ** 2 / size).backward()
        if is_last:
            gradients.append(weights.grad.clone())
            weights.grad = None
    expected = [torch.autograd.grad(((group @ weights - 1) ** 2).mean(), weights)[0]
                for group in batches.split(every)]
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("warmup, steps", [(10, 10), (0.1, 10), (0.11, 11), (0, 0)])
@pytest.mark.parametrize("num_cycles", [0.5, 1.5])
def test_cosine_equals_transformers(warmup, steps, num_cycles):
    """The same warm-up, in steps or as a fraction, and the same number of waves."""
    transformers = pytest.importorskip("transformers")
    optimizer = sgd(0.5)
    peer = transformers.get_cosine_schedule_with_warmup(optimizer, steps, 100, num_cycles)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    assert rates("cosine", 100, warmup=warmup, num_cycles=num_cycles) == pytest.approx(expected, abs=1e-12)


def test_cosine_starts_and_ends_at_the_rates_asked_for():
    """start_lr at the first step, the peak after the warm-up, final_lr at the end and beyond."""
    used = rates("cosine", 121, peak=0.5, scheduled=100, warmup=20, start_lr=0.1, final_lr=0.02)
    assert used[0] == pytest.approx(0.1)
    assert used[20] == pytest.approx(0.5)
    assert used[60] == pytest.approx((0.5 + 0.02) / 2)
    assert used[100:] == pytest.approx([0.02] * 21)


def test_ipe_scale_stretches_the_cosine_beyond_the_training():
    """With 1.25 a run of 100 steps is the first part of a schedule of 125; the warm-up keeps its length."""
    assert rates("cosine", 100, warmup=0.1, ipe_scale=1.25) == pytest.approx(
        rates("cosine", 100, scheduled=125, warmup=10))


def test_each_group_has_its_own_peak():
    """Backbone and head may have different rates; the ends of the cosine are the same for both."""
    for name in ("cosine", "onecycle", "step", "cosine_restarts"):
        optimizer = sgd(0.5, 0.05)
        scheduler = build_scheduler(optimizer, name, 40, warmup=4, step_size=10, step_unit="step",
                                    t0=10, t0_unit="step")
        seen = []
        for _ in range(40):
            seen.append(scheduler.get_last_lr())
            optimizer.step()
            scheduler.step()
        first, second = (max(rate) for rate in zip(*seen, strict=True))
        assert first == pytest.approx(10 * second, rel=1e-3)


def test_onecycle_peaks_where_it_says():
    """Up from peak / div_factor over pct_start of the steps, down to the first rate / final_div_factor."""
    used = rates("onecycle", 101, peak=0.5, pct_start=0.31, div_factor=10.0, final_div_factor=100.0)
    assert used[0] == pytest.approx(0.05)
    assert max(used) == pytest.approx(0.5, rel=1e-3)
    assert used.index(max(used)) == 30
    assert used[-1] == pytest.approx(0.05 / 100)


@pytest.mark.parametrize("steps, pct_start", [
    (1, 0.15), (1, 1.0), (2, 0.5), (3, 0.15), (10, 0.1), (10, 0.0), (10, 1.0)])
def test_onecycle_never_raises_within_its_run(steps, pct_start):
    """torch divides by zero where the rise is one step or the whole run, and refuses steps beyond the end."""
    used = rates("onecycle", steps, pct_start=pct_start)
    assert all(0 <= rate <= 0.5 * (1 + 1e-9) for rate in used)


def test_onecycle_leaves_momentum_alone():
    """MOMENTUM and ADAM_BETAS mean what they say."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum=0.7)
    scheduler = build_scheduler(optimizer, "onecycle", 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("unit, length", [("epoch", 6), ("step", 2)])
def test_stairs_and_restarts_count_epochs_or_steps(unit, length):
    """The closed formulas of torch's two schedulers, in optimizer steps."""
    used = rates("step", 30, steps_per_epoch=3, step_size=2, step_unit=unit, gamma=0.5)
    assert used == pytest.approx([0.5 * 0.5 ** (step // length) for step in range(30)])
    used = rates("cosine_restarts", 3 * length, steps_per_epoch=3, t0=2, t0_unit=unit, t_mult=2, eta_min=0.1)
    cycles = [step / length for step in range(length)] + [step / (2 * length) for step in range(2 * length)]
    assert used == pytest.approx([0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * part)) for part in cycles])


@pytest.mark.parametrize("name", ["onecycle", "cosine", "step", "cosine_restarts"])
def test_a_resumed_schedule_goes_on(name):
    """The state holds the position; a new scheduler of the same settings continues exactly."""
    expected, optimizer = rates(name, 20, warmup=5), sgd(0.5)
    scheduler = build_scheduler(optimizer, name, 20, warmup=5)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    state, options = scheduler.state_dict(), optimizer.state_dict()
    optimizer = sgd(0.5)
    scheduler = build_scheduler(optimizer, name, 20, warmup=5)
    optimizer.load_state_dict(options)
    scheduler.load_state_dict(state)
    used = []
    for _ in range(12):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == expected[8:]


@pytest.mark.parametrize("name, options, word", [
    ("linear", {}, "SCHEDULE.*linear.*onecycle, cosine"), ("step", {"step_unit": "week"}, "STEP_UNIT.*week"),
    ("cosine_restarts", {"t0_unit": "week"}, "RESTART_T0_UNIT.*week"),
    ("cosine_restarts", {"t0": 0}, "SCHEDULE"), ("onecycle", {"pct_start": 1.5}, "SCHEDULE")])
def test_mistakes_name_the_constant(name, options, word):
    """The user edits constants.py, not torch's arguments."""
    with pytest.raises(UserError, match=word):
        build_scheduler(sgd(0.5), name, 10, **options)


def test_the_mask_probability_has_five_parts():
    """5 % low, 20 % up, 40 % high, 10 % down, then low."""
    points = {0.0: 0.1, 0.05: 0.1, 0.15: 0.4, 0.25: 0.7, 0.5: 0.7, 0.65: 0.7, 0.7: 0.4, 0.75: 0.1, 1.0: 0.1}
    for progress, expected in points.items():
        assert mask_probability(progress, 0.1, 0.7) == pytest.approx(expected)


def test_the_teachers_momentum_is_a_line_between_its_ends():
    """I-JEPA's list of momenta: start + i * (end - start) / (total_steps * ipe_scale)."""
    momenta = [teacher_momentum(step, 80, 0.99, 1.0, 1.25) for step in range(80)]
    assert momenta == pytest.approx([0.99 + step * 0.01 / 100 for step in range(80)])
    assert teacher_momentum(0, 80) == 0.994
    assert teacher_momentum(100, 80) == 1.0


@pytest.mark.parametrize("total_steps, ipe_scale", [(1, 1.25), (7, 1.0), (30, 1.25), (30, 0.5), (0, 1.0)])
def test_the_teachers_momentum_never_falls_nor_leaves_its_ends(total_steps, ipe_scale):
    """Beyond the end, which a scale below 1 puts into the training, it stays."""
    momenta = [teacher_momentum(step, total_steps, 0.994, 0.9999, ipe_scale) for step in range(60)]
    assert all(first <= second for first, second in zip(momenta, momenta[1:], strict=False))
    assert momenta[0] == 0.994 and momenta[-1] == 0.9999


@pytest.mark.parametrize("start, end", [(1.0, 0.9), (-0.1, 1.0), (0.9, 1.1)])
def test_a_momentum_outside_zero_to_one_is_refused(start, end):
    """The teacher would run away."""
    with pytest.raises(UserError, match="JEPA_TEACHER_MOMENTUM"):
        teacher_momentum(0, 10, start, end)
