"""Exponential moving averages: of a model's weights for evaluation, and as a teacher to learn from."""

import copy
from collections import OrderedDict
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from utils.config import UserError
from utils.distributed import reshard, unwrap
from utils.states import load_model_state, model_state


def ema_decay(decay, updates, warmup=True):
    """Decay of the update that follows ``updates`` earlier ones: min(decay, (1 + n) / (10 + n)).

    The convention of TensorFlow's ExponentialMovingAverage(num_updates): the first weights, far from
    trained, are forgotten within a few steps.
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


class EMA:
    """shadow <- decay * shadow + (1 - decay) * parameters after each optimizer step; buffers are copied.

    Polyak & Juditsky 1992.  The script calls ``update`` after each optimizer step and evaluates within
    ``applied()``.  Create it after ``shard``: under "zero2" and "fsdp" each rank averages its own shards.

    decay in [0, 1]: 0 follows the model, 1 never moves.  Raises UserError outside.
    """

    def __init__(self, model, decay, warmup=True):
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"EMA_DECAY = {decay}: must lie between 0 and 1, such as 0.999")
        self.model, self.decay, self.warmup = unwrap(model), decay, warmup
        self.updates = 0
        reshard(self.model)
        # Kept as objects: under "zero2" the module shows other, whole parameters after an evaluation.
        self.parameters, self.buffers = list(self.model.parameters()), list(self.model.buffers())
        self.shadow = self._copy()
        self.backup = None

    @torch.no_grad()
    def update(self):
        """Move the average towards the model's present weights."""
        if self.backup is not None:
            raise RuntimeError("update() while the average is applied would average it with itself")
        weight = 1.0 - ema_decay(self.decay, self.updates, self.warmup)
        shadow_parameters, shadow_buffers = self.shadow
        torch._foreach_lerp_(shadow_parameters, _local(self.parameters), weight)
        if shadow_buffers:
            torch._foreach_copy_(shadow_buffers, self.buffers)
        self.updates += 1

    def apply_shadow(self):
        """Put the average into the model; ``restore`` brings the trained weights back."""
        if self.backup is not None:
            raise RuntimeError("apply_shadow() twice without restore() would lose the trained weights")
        self.backup = self._copy()
        self._write(self.shadow)

    def restore(self):
        """Put the trained weights back, bitwise as they were."""
        if self.backup is None:
            raise RuntimeError("restore() without apply_shadow()")
        self._write(self.backup)
        self.backup = None

    @contextmanager
    def applied(self):
        """Within: the model holds the average."""
        self.apply_shadow()
        try:
            yield
        finally:
            self.restore()

    def state_dict(self):
        """Collective: the averaged weights as model_state gives them, fit for ``load_model_state``.

        The number of updates travels in ``_metadata``, torch's own place for what belongs to a state dict
        but is no tensor of the model, so that the dict loads into the bare model for inference.
        """
        if self.backup is not None:
            raise RuntimeError("state_dict() while the average is applied; call it after restore()")
        with self.applied():
            state = OrderedDict(model_state(self.model))
        state._metadata = {"ema": {"updates": self.updates}}
        return state

    def load_state_dict(self, state):
        """Continue from ``state_dict``'s result, written under any strategy; the model keeps its weights."""
        metadata = getattr(state, "_metadata", {}).get("ema")
        if metadata is None:
            raise UserError("ema_state_dict: holds no count of updates, so the average cannot be continued; "
                            "resume from a checkpoint of this script")
        trained = self._copy()
        load_model_state(self.model, state)
        self.shadow = self._copy()
        self._write(trained)
        self.updates = metadata["updates"]

    @torch.no_grad()
    def _copy(self):
        """(parameters, buffers) as two lists of tensors; of sharded parameters this rank's part."""
        return [value.clone() for value in _local(self.parameters)], [value.clone() for value in self.buffers]

    @torch.no_grad()
    def _write(self, values):
        reshard(self.model)
        for targets, sources in zip((_local(self.parameters), self.buffers), values, strict=True):
            if targets:
                torch._foreach_copy_(targets, sources)


def make_teacher(student):
    """A copy of ``student`` in evaluation mode, without gradients, to be moved by ``update_teacher_``.

    Make it before ``shard``, since a sharded module cannot be copied, and shard both the same way.
    """
    return copy.deepcopy(unwrap(student)).eval().requires_grad_(False)


@torch.no_grad()
def update_teacher_(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, in place; buffers are copied.

    Two modules of the same structure, plain, wrapped or sharded the same way; called after each optimizer
    step.  momentum in [0, 1]: 1 leaves the parameters as they are, 0 copies the student's.  A mean teacher,
    Tarvainen & Valpola 2017, arXiv:1703.01780, eq. 3.
    """
    reshard(teacher)
    reshard(student)
    teacher, student = unwrap(teacher), unwrap(student)
    torch._foreach_lerp_(_local(teacher.parameters()), _local(student.parameters()), 1.0 - momentum)
    if buffers := list(teacher.buffers()):
        torch._foreach_copy_(buffers, list(student.buffers()))


def _local(parameters):
    """This rank's part of each parameter, sharing its memory."""
    return [(value.to_local() if isinstance(value, DTensor) else value).detach() for value in parameters]
