"""What every rank does in test_distributed.py."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import distributed, states
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.ema import EMA, make_teacher, update_teacher_
from utils.optim import build_optimizer, parameter_groups
from utils.schedules import accumulation_group

STEPS, EVERY, BATCH = 3, 2, 4


class Block(nn.Module):
    """A residual linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Convolution, BatchNorm and linear blocks called twice, as an encoder shared by two images is."""

    def __init__(self):
        super().__init__()
        # Two channels, since the weight of one lies alike in all memory formats.  No bias: before BatchNorm
        # its gradient is rounding noise, which Adam blows up to full steps.
        self.features = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.token = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 1)
        self.unused = nn.Linear(6, 1).requires_grad_(False)
        self.register_buffer("table", torch.linspace(0.1, 0.7, 6))

    def encode(self, x):
        x = self.features(x).mean((2, 3)) + self.token + self.table                     # [B, 6]
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.encode(x) - self.encode(x.flip(3) ** 2))                  # [B, 1]


def build(strategy, optimizer_name="adamw", seed=0):
    """(model, optimizer, EMA) of one strategy; the seed tells the ranks apart before they are made equal."""
    torch.manual_seed(seed)
    model = distributed.shard(Net().to(memory_format=torch.channels_last), strategy)
    groups = parameter_groups(model, 0.1, exclude_norm_bias=True, no_decay_names=["token"])
    optimizer = build_optimizer(optimizer_name, groups, lr=1e-2, weight_decay=0.1)
    return model, optimizer, EMA(model, 0.9)


def batch_of(step, micro, rank):
    """(images [BATCH, 2, 8, 8], target [BATCH, 1]) that depend on the arguments alone."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    images = torch.randn(BATCH, 2, 8, 8, generator=generator)
    return images, images.mean((1, 2, 3))[:, None]


def train_step(model, optimizer, ema, step, ranks):
    """One optimizer step over EVERY micro-batches of each of ``ranks``; one process may play two ranks."""
    model.train()
    for micro in range(EVERY):
        size, is_last = accumulation_group(micro, EVERY, EVERY)
        with distributed.gradient_sync(model, is_last):
            for rank in ranks:
                images, target = batch_of(step, micro, rank)
                (F.mse_loss(model(images), target) / size / len(ranks)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    distributed.sync_buffers_(model)
    ema.update()


def evaluate(model):
    """Output on a fixed batch, without gradients."""
    model.eval()
    with torch.no_grad():
        return model(batch_of(99, 0, 0)[0]).clone()


def whole_state(model, optimizer, ema):
    """Everything that a checkpoint holds of the three."""
    return {"model_state_dict": states.model_state(model), "ema_state_dict": ema.state_dict(),
            "optimizer_state_dict": states.optimizer_state(model, optimizer)}


def load(model, optimizer, ema, checkpoint):
    states.load_model_state(model, checkpoint["model_state_dict"])
    states.load_optimizer_state(model, optimizer, checkpoint["optimizer_state_dict"])
    ema.load_state_dict(checkpoint["ema_state_dict"])


def train_and_save(folder, strategy, optimizer_name):
    """Train under one strategy; every rank writes what it holds, and what its evaluations gave."""
    model, optimizer, ema = build(strategy, optimizer_name, seed=distributed.rank())
    for step in range(STEPS):
        train_step(model, optimizer, ema, step, [distributed.rank()])
    trained = evaluate(model)
    with ema.applied():
        averaged = evaluate(model)
    restored = evaluate(model)
    save_checkpoint(folder / f"{optimizer_name}_{strategy}_rank{distributed.rank()}.pt", kind="test",
                    outputs={"trained": trained, "averaged": averaged, "restored": restored},
                    **whole_state(model, optimizer, ema))


def gradients_before_sync(strategy):
    """Gradients after a micro-batch that is not the last of its group, and after the one that is."""
    model, _, _ = build(strategy)
    result = []
    for micro, is_last in enumerate([False, True]):
        with distributed.gradient_sync(model, is_last):
            images, target = batch_of(0, micro, distributed.rank())
            F.mse_loss(model(images), target).backward()
        gradient = distributed.unwrap(model).head.weight.grad
        result.append(None if gradient is None else getattr(gradient, "full_tensor", gradient.clone)())
    return result


def load_and_go_on(folder, source, strategy):
    """Load the checkpoint of ``source`` under ``strategy``, write it back, take one step and write again."""
    model, optimizer, ema = build(strategy, seed=7)
    evaluate(model)                             # leaves whole parameters in memory under zero2
    load(model, optimizer, ema, load_checkpoint(folder / f"adamw_{source}_rank0.pt", "test"))
    loaded = whole_state(model, optimizer, ema)
    train_step(model, optimizer, ema, STEPS, [distributed.rank()])
    next_states = whole_state(model, optimizer, ema)
    if distributed.is_main():
        save_checkpoint(folder / f"{source}_to_{strategy}.pt", kind="test", model_state_dict={},
                        loaded=loaded, next=next_states)


def teacher_of(strategy):
    """The whole teacher of a student that took two steps, with an evaluation after each."""
    torch.manual_seed(0)
    teacher = distributed.shard(make_teacher(Net()), strategy)
    student, optimizer, ema = build(strategy, seed=0)
    for step in range(2):
        train_step(student, optimizer, ema, step, [distributed.rank()])
        update_teacher_(teacher, student, momentum=0.5)
        evaluate(teacher)                       # leaves whole parameters in memory under zero2
    return states.model_state(teacher)


def run(folder):
    """All of it, into a folder that holds the checkpoint of one process."""
    distributed.setup_distributed()
    rank = distributed.rank()
    for strategy in distributed.STRATEGIES:
        train_and_save(folder, strategy, "adamw")
        train_and_save(folder, strategy, "sgd")
    distributed.barrier()
    for source in ("one", *distributed.STRATEGIES):
        for strategy in distributed.STRATEGIES:
            load_and_go_on(folder, source, strategy)

    teachers = {strategy: teacher_of(strategy) for strategy in distributed.STRATEGIES}
    gradients = {strategy: gradients_before_sync(strategy) for strategy in distributed.STRATEGIES}
    torch.manual_seed(rank)
    generators = states.gather_rng_state()
    drawn = torch.rand(3)
    assert states.restore_rng_state(generators) and torch.equal(torch.rand(3), drawn)
    assert not states.restore_rng_state(generators[:1])
    save_checkpoint(folder / f"collectives_rank{rank}.pt", kind="test", model_state_dict={},
                    rng=generators, gradients=gradients, teachers=teachers,
                    flags=distributed.any_rank([rank == 1, False]),
                    word=distributed.broadcast_word(f"w{rank}"),
                    rows=distributed.gather_rows(torch.arange(2.0 + rank)[:, None]),
                    total=distributed.all_reduce_sum(torch.tensor(1.0 + rank)),
                    mean=distributed.all_reduce_mean(torch.tensor(1.0 + rank)))
    distributed.cleanup()
