"""Pretrained parts from local files that constants name: EfficientNets, and Hugging Face's ViT and DINOv2."""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from utils.checkpoint import UNREADABLE
from utils.config import BadFile, UserError
from utils.foreign import deeper, familiar_names, fit, weights_file

# Names of a layer's parts in files of Hugging Face's ViT (old), DINOv2 and DeiT -> those of models.vit
PART_NAMES = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
              "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
              "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
              "norm1": "layernorm_before", "norm2": "layernorm_after"}
LAYER_KEY = re.compile(r"^(?:\w+\.)*?layers?\.(\d+)\.(.+)\.(\w+)$")
SCALES = {"layer_scale1": "attention.o_proj", "layer_scale2": "mlp.fc2"}


def load_efficientnet_weights(model, path):
    """Fill model.encoder from an EfficientNet of torchvision, Hugging Face or timm, colours summed to one.

    path: a file or a Hugging Face folder.  Returns (matched, unmatched): names of the encoder that were
    filled, and names of the file that have no use here.  Raises UserError for a missing file or another
    member of the family, BadFile for one that is not a state dict.
    """
    return fill(model.encoder, read_tensors(path, "EFFICIENTNET_WEIGHTS"), path, "EFFICIENTNET_WEIGHTS",
                "EFFICIENTNET")


def load_vit_weights(model, path):
    """Fill the layers, final norm and position map of model.vit from a Hugging Face ViT, DeiT or DINOv2.

    path: a folder (config.json with model.safetensors or pytorch_model.bin) or one such file.  DINOv2's
    layer scales are multiplied into the output projections, which is exact; position embeddings are
    resized (bicubic).  The patch embedding stays as it is: ours reads features.  Returns and raises as
    load_efficientnet_weights does; UserError also for SwiGLU layers and activations other than GELU.
    """
    if Path(path).is_dir():
        check_config(Path(path) / "config.json")
    state = read_tensors(path, "VIT_WEIGHTS")
    if any("swiglu" in key.lower() or ".mlp.weights_in." in key or ".mlp.gate_proj." in key for key in state):
        raise UserError(f"{path}: SwiGLU layers do not fit; set VIT_WEIGHTS to a model with GELU layers")
    names, scales = {}, []
    for key, value in state.items():
        layer = LAYER_KEY.match(key)
        if layer and layer[2] in SCALES:
            scales.append((f"layers.{layer[1]}.{SCALES[layer[2]]}", value))
        elif layer:
            names[f"layers.{layer[1]}.{PART_NAMES.get(layer[2], layer[2])}.{layer[3]}"] = value
        elif key.endswith("position_embeddings") and value.ndim == 3:
            names["position"] = resize_position(value, model.vit.position.shape[-1])
        else:
            names[re.sub(r"^(?:\w+\.)?layernorm\.", "norm.", key)] = value
    for target, scale in scales:
        names[f"{target}.weight"] = names[f"{target}.weight"] * scale[:, None]
        names[f"{target}.bias"] = names[f"{target}.bias"] * scale
    return fill(model.vit, names, path, "VIT_WEIGHTS", "VIT", keep=("embed.weight", "embed.bias"))


def check_config(path):
    """Refuse a Hugging Face config.json whose layers compute something else than ours."""
    if not path.exists():
        raise UserError(f"{path}: no such file; VIT_WEIGHTS needs a Hugging Face folder with config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise BadFile(f"{path}: not JSON; VIT_WEIGHTS needs a Hugging Face folder") from error
    if config.get("use_swiglu_ffn"):
        raise UserError(f"{path}: SwiGLU layers do not fit; set VIT_WEIGHTS to a model with GELU layers")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{path}: {activation} layers do not fit; set VIT_WEIGHTS to one with GELU layers")
    heads = config.get("num_attention_heads", 0)
    if config.get("hidden_size", 0) != 64 * heads:
        raise UserError(f"{path}: attention heads are not 64 wide, as those of VIT_WEIGHTS must be")


def resize_position(position, side):
    """[1, extra + n * n, E], class and other extra tokens first -> [1, E, side, side]."""
    n = math.isqrt(position.shape[1])
    grid = position[:, position.shape[1] - n * n:].float().transpose(1, 2).unflatten(2, (n, n))
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)


def read_tensors(path, constant):
    """The state dict in a .safetensors file, a torch file (weights only) or a Hugging Face folder.

    Layouts of other libraries have torchvision's names (utils.foreign).
    """
    path = weights_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; put the weights there or change {constant} in constants.py")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise BadFile(f"{path}: not a file of tensors; change {constant} in constants.py") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadFile(f"{path}: not a dict of tensors; change {constant} in constants.py, or start from a "
                      "run's checkpoint with --init")
    return familiar_names(state)


def fill(module, state, path, constant, size_constant, keep=()):
    """Copy into ``module`` what it has in ``state``: all of it but ``keep`` must be there, in its shape."""
    own = module.state_dict()
    wanted = [name for name in own if name not in keep and not name.endswith("num_batches_tracked")]
    found = {}
    for name in wanted:
        if name not in state:
            raise UserError(f"{path}: has no {name}; {constant} must be the model that {size_constant} names")
        found[name] = fit(state[name], own[name].shape)
        if found[name] is None:
            shapes = f"{list(state[name].shape)}, the model's is {list(own[name].shape)}"
            raise UserError(f"{path}: {name} is {shapes}; "
                            f"make {size_constant} and {constant} agree in constants.py")
    if name := deeper(module, state):
        raise UserError(f"{path}: has {name}, which the network has not; {constant} must be the model that "
                        f"{size_constant} names")
    module.load_state_dict(found, strict=False)
    return wanted, [name for name in state if name not in wanted]
