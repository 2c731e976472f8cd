"""Several processes under torchrun: strategies and collectives.

Without torchrun there is one process and every function here is a no-op or the plain torch call.
Functions that talk to the other ranks say "collective": all ranks must call them, in the same order.
"""

import os
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from utils.config import UserError

STRATEGIES = ("ddp", "zero2", "fsdp")
PATIENCE = timedelta(hours=12)                       # of ranks for the slowest; a dead one torchrun notices


def setup_distributed(word=None):
    """Join torchrun's process group if there is one; return this process's device, or that of ``word``.

    word: such as "cpu", as the scripts' --device takes it.  Raises UserError for one that is not there.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if word:
        try:
            torch.empty(0, device=word)
            device = torch.device(word)
        except (RuntimeError, AssertionError) as error:         # the latter: torch was built without CUDA
            raise UserError(f"--device {word}: torch has no such device here; leave it out") from error
    if "RANK" in os.environ and not dist.is_initialized():
        # Gloo stands beside NCCL so that flags on the CPU are reduced without waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE, **meeting_point())
    return device


def meeting_point():
    """Arguments of init_process_group: on one node a store of this attempt's own, on several torch's choice.

    After --max-restarts torchrun's ranks would else find in its one store the addresses of those that are
    gone.  On several nodes the attempts have no number in common.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    store, number, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": number, "world_size": size}


def rank():
    """Number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process prints and writes."""
    return rank() == 0


def say(line):
    """Print from the main process."""
    if is_main():
        print(line)


def barrier():
    """Collective: return once every rank has come here."""
    any_rank([False])


def cleanup():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model, strategy):
    """Spread ``model`` over the ranks; collective.  One process gets the model back as it is.

    "ddp": a full copy per rank, gradients averaged (DistributedDataParallel); a model of which nothing is
    trained, such as a teacher, stays as it is.
    "zero2": gradients and optimizer state are sharded; parameters stay whole from forward to backward.
    "fsdp": parameters are sharded outside of each block's own forward and backward too.
    The last two use torch.distributed.fsdp.fully_shard and change ``model`` in place.  Rank 0's parameters
    and buffers go to all ranks first.  Create the optimizer and the EMA, and compile, after this call.  Under
    "zero2" and "fsdp" call the model itself, since only its forward gathers the parameters.
    Raises UserError for another word.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"STRATEGY = {strategy!r}: unknown; use one of {', '.join(STRATEGIES)}")
    if world_size() == 1:
        return model
    for tensor in [*model.parameters(), *model.buffers()]:
        if strategy != "ddp" and not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous()          # fully_shard refuses channels_last parameters
        dist.broadcast(tensor.detach(), src=0)
    if strategy == "ddp":
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        # Newer releases rename broadcast_buffers; a 1x1 convolution's one layout has strides of two kinds.
        warnings.filterwarnings("ignore", ".*broadcast_buffers|Grad strides do not match")
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    module = unwrap(model)
    mesh = init_device_mesh(next(module.parameters()).device.type, (world_size(),))
    # A hundredth of the model is large enough to fill a message and small enough to be gathered ahead.
    for block in [*_blocks(module, _size(module) / 100), module]:
        fully_shard(block, mesh=mesh, reshard_after_forward=strategy == "fsdp")
    return model


def _blocks(module, smallest):
    """The outermost elements of ModuleList and Sequential that hold at least ``smallest`` parameters.

    Such elements are called as modules, so their forward gathers all that they need; a bare container may
    be indexed or sliced by its parent, and is therefore never a block itself.
    """
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    for child in module.children():
        if isinstance(module, containers) and not isinstance(child, containers) and _size(child) >= smallest:
            yield child
        else:
            yield from _blocks(child, smallest)


def _size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def unwrap(model):
    """The module inside DistributedDataParallel and torch.compile, in whichever order they were put on."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


@contextmanager
def gradient_sync(model, enabled):
    """Within: backward adds to gradients that stay on this rank unless ``enabled``.

    For micro-batches before the last of an accumulation group.  Forward and backward both stand inside.
    """
    outer = getattr(model, "_orig_mod", model)
    module = unwrap(model)
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    local = isinstance(outer, DistributedDataParallel) and not enabled
    with outer.no_sync() if local else nullcontext():
        yield


@torch.no_grad()
def sync_buffers_(model):
    """Collective: floating-point buffers become their mean over the ranks, the others take rank 0's value.

    BatchNorm's running statistics see one rank's data alone; called after each optimizer step, this keeps
    the ranks' models equal.
    """
    if world_size() == 1:
        return
    # In float64 the mean of equal float32 values is that value, so constant tables never drift.
    for floating, dtype in ((True, torch.float64), (False, torch.int64)):
        buffers = [buffer for buffer in unwrap(model).buffers() if buffer.is_floating_point() == floating]
        if not buffers:
            continue
        flat = torch.cat([buffer.reshape(-1).to(dtype) for buffer in buffers])
        if floating:
            flat = all_reduce_mean(flat)
        else:
            dist.broadcast(flat, src=0)
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view(buffer.shape))


def reshard(model):
    """Free the whole parameters that a forward without backward leaves behind under "zero2" and "fsdp".

    They would hide what is written into the shards: the next forward would compute with the old values.
    """
    for module in unwrap(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_reduce_sum(tensor):
    """Collective: the sum of ``tensor`` over the ranks, as a new tensor on the same device."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_reduce_mean(tensor):
    """Collective: the mean of a floating-point ``tensor`` over the ranks, as a new tensor."""
    return all_reduce_sum(tensor) / world_size()


def gather(value):
    """Collective: every rank's ``value``, any object that can be pickled, as a list, rank 0's first."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(tensor):
    """Collective: the rows of every rank's ``tensor``, rank 0's first, on the CPU; lengths may differ."""
    return torch.cat(gather(tensor.detach().cpu()))


def any_rank(flags):
    """Collective: True where any rank's flag is, for what all ranks must do together, such as to stop."""
    merged = torch.tensor(flags, dtype=torch.int32)              # on the CPU, hence over gloo
    if world_size() > 1:
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
    return merged.bool().tolist()


def broadcast_word(word):
    """Collective: rank 0's ``word`` on every rank, for names that hold the time of day."""
    words = [word]
    if world_size() > 1:
        dist.broadcast_object_list(words, src=0)
    return words[0]
