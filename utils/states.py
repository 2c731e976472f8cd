"""States of a run that fit every strategy: what one process or sharding wrote, any other can load."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.config import UserError
from utils.distributed import gather, rank, reshard, unwrap, world_size


def gather_rng_state():
    """Collective: torch's generator states, a list over ranks of {"cpu": tensor, "cuda": tensor or None}."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return gather({"cpu": torch.get_rng_state(), "cuda": cuda})


def restore_rng_state(states):
    """Set this rank's generators from gather_rng_state's list.

    Returns False, having done nothing, when the list is of another number of processes.
    """
    if len(states) != world_size():
        return False
    torch.set_rng_state(states[rank()]["cpu"])
    if states[rank()]["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank()]["cuda"])
    return True


def _to_cpu(value):
    """A whole copy on the CPU that shares no memory with the run; values other than tensors as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().to("cpu", copy=True)


def _shard_like(value, like):
    """Give a whole tensor the device and, where the shapes agree, the sharding of ``like``; a copy."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0 or value.shape != like.shape:               # such as an optimizer's step count
        return value.clone()
    if isinstance(like, DTensor):
        # Each rank cuts its part out of its own whole copy; copying the part lets the whole one go.
        value = distribute_tensor(value.to(like.device, copy=True), like.device_mesh, like.placements,
                                  src_data_rank=None)
    # In the memory format of ``like``: fused optimizers take for granted that moments lie as parameters do.
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def _named(pairs):
    """dict of (name, value) pairs without the prefix that a compiled block puts into names."""
    return {name.replace("_orig_mod.", ""): value for name, value in pairs}


def _parameter_names(model):
    reshard(model)
    return {parameter: name for name, parameter in _named(unwrap(model).named_parameters()).items()}


def model_state(model):
    """Collective: the unwrapped model's whole state dict on the CPU, on every rank.

    The same names and tensors under every strategy; they share no memory with the model.
    """
    reshard(model)
    return {name: _to_cpu(value) for name, value in _named(unwrap(model).state_dict().items()).items()}


def load_model_state(model, state):
    """Load what model_state returned, on each rank.  Raises UserError where names or shapes differ."""
    reshard(model)
    own = _named((name, (name, value)) for name, value in unwrap(model).state_dict().items())
    different = sorted(own.keys() ^ state.keys()) or [
        name for name, (_, value) in own.items()
        if isinstance(value, torch.Tensor) and value.shape != state[name].shape]
    if different:
        raise UserError(f"the weights are of another model: {len(different)} names or shapes differ, "
                        f"such as {', '.join(different[:3])}; use the settings that it was trained with")
    unwrap(model).load_state_dict({
        inner: _shard_like(state[name], value) for name, (inner, value) in own.items()})


def load_trained(model, checkpoint, device):
    """A network filled from a checkpoint, averaged weights first, in evaluation mode on ``device``."""
    load_model_state(model, checkpoint.get("ema_state_dict") or checkpoint["model_state_dict"])
    return model.to(device).eval()


def optimizer_state(model, optimizer):
    """Collective: the optimizer's whole state on the CPU, keyed by parameter names, on every rank.

    {"state": {name: {entry: tensor}}, "param_groups": [{option: value, "params": [names]}]}.  A parameter
    that was never stepped has no entry.  torch's get_optimizer_state_dict is not used: it takes a step to
    fill an empty optimizer, which leaves a step count of 1 behind and so changes the bias correction.
    """
    names = _parameter_names(model)
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {names[parameter]: {key: _to_cpu(value) for key, value in optimizer.state[parameter].items()}
             for parameter in parameters if parameter in optimizer.state}
    return {"state": state, "param_groups": groups}


def load_optimizer_state(model, optimizer, state):
    """Load what optimizer_state returned under any strategy, on each rank.

    Returns for each parameter group the options (all but "params") that it had before: loading puts the
    checkpoint's in their place.  Raises UserError when the groups hold other parameters than this
    optimizer's.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    names = _parameter_names(model)
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if groups != [group["params"] for group in state["param_groups"]]:
        raise UserError("the optimizer state is of other parameters or parameter groups; "
                        "use the model and the weight decay settings that it was saved with")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {index: {key: _shard_like(value, parameter)
                       for key, value in state["state"][names[parameter]].items()}
               for index, parameter in enumerate(parameters) if names[parameter] in state["state"]}
    indices = iter(range(len(parameters)))            # torch keys states by the position over all groups
    optimizer.load_state_dict({"state": entries, "param_groups": [
        {**group, "params": [next(indices) for _ in group["params"]]} for group in state["param_groups"]]})
    return options


def training_state(model, optimizer, scheduler, scaler):
    """Collective: what a checkpoint keeps of a training, as entries that load_training_state takes."""
    return {"model_state_dict": model_state(model), "optimizer_state_dict": optimizer_state(model, optimizer),
            "scheduler_state_dict": scheduler.state_dict(), "scaler_state_dict": scaler.state_dict(),
            "rng_state": gather_rng_state()}


def load_training_state(checkpoint, model, optimizer, scaler):
    """Load training_state's entries, all but the scheduler's, which may be of another length.

    Returns load_optimizer_state's options, for ``utils.schedules.go_to_step``.
    """
    load_model_state(model, checkpoint["model_state_dict"])
    options = load_optimizer_state(model, optimizer, checkpoint["optimizer_state_dict"])
    if checkpoint["scaler_state_dict"]:                             # empty, of a run without fp16
        scaler.load_state_dict(checkpoint["scaler_state_dict"])
    restore_rng_state(checkpoint["rng_state"])
    return options
