"""Bootstrap intervals of figures, over units that are drawn with replacement."""

from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """A figure, its bootstrap interval, and the number of resamples in which it is undefined."""

    value: float
    low: float
    high: float
    left_out: int


def draw_units(units, resamples, generator):
    """How often each unit is drawn, with replacement, in each resample.

    units: N names, such as each case's patient; generator: torch.Generator.  Returns (number of each case's
    unit int64 [N], weights float64 [resamples, units]).  A single unit, which drawing cannot change, has the
    weight 0, so that no resample has a figure.
    Cases of a patient are alike, so drawing cases would give too narrow an interval (Davison & Hinkley 1997,
    Bootstrap Methods and their Application, section 3.8).
    """
    number = {unit: i for i, unit in enumerate(sorted(set(units)))}
    weights = torch.zeros(resamples, len(number), dtype=torch.float64)
    if len(number) > 1:
        drawn = torch.randint(len(number), weights.shape, generator=generator)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
    return torch.tensor([number[unit] for unit in units]), weights


def intervals(values, drawn, level=0.95):
    """{name: Interval} of figures {name: float} by the percentiles of their resamples {name: float64 [R]}.

    NaN = undefined; the bounds are nan where no resample has the figure.  Efron & Tibshirani 1993, An
    Introduction to the Bootstrap, ch. 13.
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return {name: Interval(value, *torch.nanquantile(drawn[name], tails).tolist(),
                           drawn[name].isnan().sum().item()) for name, value in values.items()}
