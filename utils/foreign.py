"""Weights of other libraries, and of other networks of this one, in the names and shapes of a module here.

Read as they are: torchvision's, timm's ResNets, MONAI's SegResNet and VISTA3D.  Renamed as torchvision's:
Hugging Face's ResNet and EfficientNet, timm's EfficientNet, and RadImageNet's ResNets.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn as nn

# Layers of torchvision's ResNets in their order; RadImageNet's files give numbers for names.
RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
RADIMAGENET = re.compile(r"(?:^|.*\.)backbone\.([0-7])\.(.+)")
HF_RESNET = re.compile(r"(?:^|.*\.)encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\."
                       r"(convolution|normalization)\.(\w+)")
HF_BLOCK = re.compile(r"(?:^|.*\.)encoder\.blocks\.(\d+)\.(.+)\.(\w+)")
TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)\.(\w+)")
# Parts of an EfficientNet's block in torchvision's order; the first stage has no expansion before them.
PARTS = ("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1")
HF_PARTS = ("expansion.expand_conv", "expansion.expand_bn", "depthwise_conv.depthwise_conv",
            "depthwise_conv.depthwise_norm", "squeeze_excite.reduce", "squeeze_excite.expand",
            "projection.project_conv", "projection.project_bn")
TIMM_PARTS = ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3")
TIMM_FIRST = ("", "", "conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2")
HF_ENDS = {"embeddings.convolution": "features.0.0", "embeddings.batchnorm": "features.0.1",
           "encoder.top_conv": "features.8.0", "encoder.top_bn": "features.8.1"}
TIMM_ENDS = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.8.0",
             "bn2": "features.8.1"}
HF_EPS, EPS = 1e-3, 1e-5         # of the norms of Hugging Face's EfficientNets; of torchvision's b0 to b4
B5_BLOCKS = 39                   # from b5 on torchvision's norms have the former, too


def weights_file(path):
    """The file of weights in a Hugging Face folder, or ``path`` itself; the file need not exist."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    return found[0] if found else path / "model.safetensors"


def familiar_names(state):
    """{name: tensor} under torchvision's names, where ``state`` is of a layout that this module knows.

    Hugging Face's EfficientNets pad the stride-2 convolutions of even images on the far side alone, as
    TensorFlow does: here they see their input one pixel earlier.  timm's have torchvision's epsilon in b0 to
    b4.  Other states come back as they are.
    """
    if any(name.endswith("projection.project_conv.weight") for name in state):
        return _hf_efficientnet(state)
    if {"conv_stem.weight", "blocks.0.0.conv_dw.weight"} <= state.keys():
        return _timm_efficientnet(state)
    if any(name.endswith("embedder.embedder.convolution.weight") for name in state):
        return {_hf_resnet(name): value for name, value in state.items()}
    if any(re.search(r"(^|\.)backbone\.4\.0\.conv1\.weight$", name) for name in state):
        # They were trained on images in [-1, 1]; models.resnet keeps this beside the weights.
        half = torch.tensor(0.5)
        return {**{_radimagenet(name): value for name, value in state.items()}, "mean": half, "std": half}
    return state


def _radimagenet(name):
    """RadImageNet's (Mei et al. 2022, doi 10.1148/ryai.210315) name of a layer in torchvision's."""
    match = RADIMAGENET.fullmatch(name)
    return f"{RESNET_LAYERS[int(match[1])]}.{match[2]}" if match else name


def _hf_resnet(name):
    """Hugging Face's name of a ResNet's layer in torchvision's."""
    if match := re.fullmatch(r"(?:.*\.)?embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"{'conv1' if match[1] == 'convolution' else 'bn1'}.{match[2]}"
    match = HF_RESNET.fullmatch(name)
    if not match:
        return name
    stage, block, layer, kind, end = match.groups()
    norm = kind == "normalization"
    part = f"downsample.{int(norm)}" if layer is None else f"{'bn' if norm else 'conv'}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{block}.{part}.{end}"


def _hf_efficientnet(state):
    """Hugging Face's EfficientNet in torchvision's names; a stage begins where the width changes."""
    widths = {int(match[1]): len(value) for name, value in state.items()
              if (match := HF_BLOCK.fullmatch(name)) and match[2] == "projection.project_conv"
              and match[3] == "weight"}
    places, stage, first = {}, 0, 0
    for number in sorted(widths):
        if widths[number] != widths.get(number - 1):
            stage, first = stage + 1, number
        places[number] = stage, number - first
    names = {}
    for name, value in state.items():
        match = HF_BLOCK.fullmatch(name)
        if match and match[2] in HF_PARTS and int(match[1]) in places:
            name = _block_name(*places[int(match[1])], HF_PARTS.index(match[2]), match[3])
        else:
            name = _end_name(name, HF_ENDS)
        # The norm divides by sqrt(variance + epsilon): the variance takes up another epsilon exactly.
        if name.endswith("running_var") and len(widths) < B5_BLOCKS:
            value = value + (HF_EPS - EPS)
        names[name] = value
    return names


def _timm_efficientnet(state):
    """timm's EfficientNet in torchvision's names."""
    names = {}
    for name, value in state.items():
        match = TIMM_BLOCK.fullmatch(name)
        parts = TIMM_PARTS if match and match[1] != "0" else TIMM_FIRST
        if match and match[3] in parts:
            name = _block_name(int(match[1]) + 1, match[2], parts.index(match[3]), match[4])
        else:
            name = _end_name(name, TIMM_ENDS)
        names[name] = value
    return names


def _block_name(stage, block, part, end):
    """torchvision's name of a part of an EfficientNet's block."""
    number, layer = PARTS[part].split(".")
    return f"features.{stage}.{block}.block.{int(number) - (stage == 1)}.{layer}.{end}"


def _end_name(name, ends):
    """torchvision's name of a layer before or after the blocks."""
    for theirs, ours in ends.items():
        if match := re.fullmatch(rf"(?:\w+\.)?{re.escape(theirs)}\.(\w+)", name):
            return f"{ours}.{match[1]}"
    return name


def fit(value, shape):
    """``value`` in that shape, or None where it cannot have it.

    Weights of a convolution that reads colour are summed to one plane where the network reads grey: three
    equal planes give what one plane of the sum gives.
    """
    if value.shape == shape:
        return value
    if value.dim() == len(shape) == 4 and value.shape[1] == 3 and shape == (len(value), 1, *value.shape[2:]):
        return value.sum(1, keepdim=True)
    return None


def deeper(model, names):
    """The first of ``names`` that goes on with a list of ``model``'s blocks beyond its end, or None.

    Part of a deeper network would load in silence, since its first blocks have the shapes of a shorter one.
    Names that begin with one of ``model.left_out`` may go on.
    """
    lengths = {name.removeprefix("network."): len(module) for name, module in model.named_modules()
               if isinstance(module, (nn.Sequential, nn.ModuleList))}
    for name in names:
        if name.startswith(getattr(model, "left_out", ())):
            continue
        for match in re.finditer(r"(?:^|\.)(\d+)(?=\.)", name):
            if int(match[1]) >= lengths.get(name[:match.start()], math.inf):
                return name
    return None
