"""Accumulation groups, learning-rate schedules by a word, mask probability and teacher momentum."""

import math
import warnings

import numpy as np
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR, StepLR

from utils.config import UserError

SCHEDULES = ("onecycle", "cosine", "step", "cosine_restarts")


def accumulation_group(index, num_batches, every):
    """(size, is_last) of the group of micro-batches that batch ``index`` of an epoch belongs to.

    The last group of an epoch may be shorter than ``every``.  A loss divided by ``size`` makes each optimizer
    step the mean over its own group.
    """
    start = index // every * every
    size = min(every, num_batches - start)
    return size, index + 1 == start + size


def mask_probability(progress, low, high):
    """Probability of masking at ``progress`` in [0, 1] of the training.

    ``low`` for 5 %, up to ``high`` over 20 %, ``high`` for 40 %, down over 10 %, then ``low``.
    """
    return float(np.interp(progress, [0.05, 0.25, 0.65, 0.75], [low, high, high, low]))


def teacher_momentum(step, total_steps, start=0.994, end=1.0, ipe_scale=1.25):
    """Momentum of the teacher after optimizer step ``step``: a line from ``start`` to ``end``.

    It reaches ``end`` at round(ipe_scale * total_steps) and stays there; above 1, ipe_scale ends the training
    before the teacher stands still (I-JEPA, Assran et al. 2023, arXiv:2301.08243).  Raises UserError unless
    0 <= start <= end <= 1.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise UserError(f"JEPA_TEACHER_MOMENTUM = {[start, end]}: must be two rising numbers from 0 to 1")
    progress = min(1.0, step / max(1, round(ipe_scale * total_steps)))
    return (1.0 - progress) * start + progress * end


def build_scheduler(optimizer, name, total_steps, steps_per_epoch=1, *,
                    pct_start=0.3, div_factor=25.0, final_div_factor=1e4,
                    warmup=0.0, num_cycles=0.5, ipe_scale=1.0, start_lr=0.0, final_lr=0.0,
                    step_size=1, step_unit="epoch", gamma=0.1,
                    t0=1, t0_unit="epoch", t_mult=1, eta_min=0.0):
    """A torch scheduler; ``step()`` is called once per optimizer step, ``total_steps`` times in a run.

    The peak rate of each parameter group is the rate that the optimizer was made with.

    "onecycle": up over ``pct_start`` of the steps from peak / div_factor, then down by final_div_factor more;
        Smith & Topin 2018, arXiv:1708.07120.  Momentum and betas are left as they were set.
    "cosine": linear warm-up, then a cosine; see warmup_cosine.  ``warmup``: steps, or a fraction of
        total_steps below 1.  ``start_lr``, ``final_lr``: rates.
    "step": times ``gamma`` after every ``step_size`` epochs or steps.
    "cosine_restarts": down to ``eta_min`` over ``t0`` epochs or steps, again and again, each cycle ``t_mult``
        times longer; Loshchilov & Hutter 2017, arXiv:1608.03983.
    Raises UserError for another word, and for values that torch's scheduler refuses.
    """
    try:
        if name == "onecycle":
            if pct_start * total_steps in (1.0, total_steps):
                pct_start *= 1.0 - 1e-9         # torch divides by the length of a phase, which would be zero
            peaks = [group["lr"] for group in optimizer.param_groups]
            return OneCycleLR(optimizer, peaks, total_steps, pct_start=pct_start, div_factor=div_factor,
                              final_div_factor=final_div_factor, cycle_momentum=False)
        if name == "cosine":
            steps = int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
            return LambdaLR(optimizer, [
                warmup_cosine(steps, round(ipe_scale * total_steps), num_cycles, start_lr / group["lr"],
                              final_lr / group["lr"]) for group in optimizer.param_groups])
        if name == "step":
            return StepLR(optimizer, _in_steps(step_size, step_unit, steps_per_epoch, "STEP_UNIT"), gamma)
        if name == "cosine_restarts":
            return CosineAnnealingWarmRestarts(
                optimizer, _in_steps(t0, t0_unit, steps_per_epoch, "RESTART_T0_UNIT"), t_mult, eta_min)
    except ValueError as error:
        raise UserError(f"SCHEDULE = {name!r}: {error}") from error
    raise UserError(f"SCHEDULE = {name!r}: unknown; use one of {', '.join(SCHEDULES)}")


def go_to_step(scheduler, settings, steps):
    """Bring a scheduler, as it was made, to where it stands after ``steps`` steps.

    For a run that is resumed with another length or other rates, whose saved schedule no longer holds.
    settings: for each parameter group the options (all but "params") that it had when the scheduler was made;
    loading the optimizer's state has put the checkpoint's in their place.
    """
    for group, options in zip(scheduler.optimizer.param_groups, settings, strict=True):
        group.update(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def warmup_cosine(warmup, total, num_cycles=0.5, start=0.0, final=0.0):
    """Function from the optimizer step to a factor of the peak rate.

    ``start`` to 1 in a straight line over ``warmup`` steps, then ``num_cycles`` periods of a cosine between
    1 and ``final`` until step ``total``; 0.5 goes down once.  After ``total`` the factor stays.  A ``total``
    beyond the end of the training (I-JEPA's ipe_scale, Assran et al. 2023, arXiv:2301.08243) leaves the last
    rate above ``final``.
    """
    def factor(step):
        if step < warmup:
            return start + (1.0 - start) * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress))
    return factor


def _in_steps(length, unit, steps_per_epoch, constant):
    if unit not in ("epoch", "step"):
        raise UserError(f'{constant} = {unit!r}: unknown; use "epoch" or "step"')
    return length * steps_per_epoch if unit == "epoch" else length
