"""Vision transformer over packed sequences of volume tokens."""

import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.ragged_attention import Sequences, check_path, ragged_attention
from utils.config import UserError

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
         "huge": (1280, 32, 16)}                                             # width, blocks, heads
CODE = 30                                                                    # dimensions of a code to append


def position_code(coords, dim):
    """Fixed sinusoidal code of 3D positions: integers [N, 3], any size -> float32 [N, dim], dim even.

    The dim / 2 frequencies are shared out over D, H and W, the first axes taking what is left over.  An
    axis with n of them gives sin and then cos of p / 10000^(i / n), i = 0 ... n - 1 (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.5, for each axis).
    """
    parts = []
    for axis in range(3):
        count = (dim // 2 + 2 - axis) // 3
        angle = coords[:, axis, None] * 1e4 ** (-torch.arange(count, device=coords.device) / count)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, 1)


def linear(inputs, outputs, bias=True, std=0.02):
    """nn.Linear with weights from a truncated normal and bias zero."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.trunc_normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


@torch.compiler.disable
def drop_path(branch, rate, sequences):
    """Zero a residual branch [T, E] for whole sequences, each with probability ``rate``; scale the others.

    The draw is torch's global one, like nn.Dropout's.  Huang et al. 2016, arXiv:1603.09382.
    """
    keep = torch.rand(len(sequences.lengths), device=branch.device) >= rate                  # [S]
    return branch * (keep / (1 - rate))[sequences.index, None]


class Attention(nn.Module):
    """Multi-head self-attention within each sequence; the output projection has no bias."""

    def __init__(self, dim, heads, layer, dropout=0.0, path="auto"):
        super().__init__()
        self.heads, self.path, self.dropout = heads, check_path(path), dropout
        self.qkv = linear(dim, 3 * dim)
        self.project = linear(dim, dim, bias=False, std=0.02 / math.sqrt(2 * layer))

    def forward(self, x, sequences):
        """[T, E] -> [T, E]."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)                    # [T, heads, Dh]
        x = ragged_attention(q, k, v, sequences, self.path, self.dropout if self.training else 0.0)
        return self.project(x.flatten(1))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)), with GELU.

    layer: its number from 1; what it adds to the residual stream starts smaller by sqrt(2 layer).
    dropout: of attention probabilities and of both branches' outputs and hidden units; drop_path: of
    whole branches.
    """

    def __init__(self, dim, heads, layer, mlp_ratio=4.0, dropout=0.0, drop_path=0.0, path="auto"):
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.drop_path = drop_path
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, layer, dropout, path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim, std=0.02 / math.sqrt(2 * layer))

    def forward(self, x, sequences):
        """x [T, E], sequences: Sequences of the T tokens -> [T, E]."""
        x = self.add(x, self.attention(self.norm1(x), sequences), sequences)
        hidden = self.dropout(F.gelu(self.fc1(self.norm2(x))))
        return self.add(x, self.fc2(hidden), sequences)

    def add(self, x, branch, sequences):
        """The residual stream with one more branch, after dropout and drop path in training."""
        branch = self.dropout(branch)
        if self.training and self.drop_path:
            branch = drop_path(branch, self.drop_path, sequences)
        return x + branch


def check_width(name, dim, heads):
    """UserError unless ``dim``, the constant ``name``, is a multiple of ``heads``."""
    if heads < 1 or dim % heads:
        raise UserError(f"{name} = {dim}: must be a multiple of the {heads} attention heads; change one")


def make_blocks(dim, depth, heads, mlp_ratio, dropout, drop_path, path):
    """nn.ModuleList of ``depth`` blocks; drop path grows linearly and reaches ``drop_path`` at the last."""
    for name, rate in (("STUDY_DROPOUT", dropout), ("STUDY_DROP_PATH", drop_path)):
        if not 0 <= rate < 1:
            raise UserError(f"{name} = {rate}: must lie in [0, 1)")
    return nn.ModuleList(Block(dim, heads, layer, mlp_ratio, dropout, drop_path * layer / depth, path)
                         for layer in range(1, depth + 1))


def run_blocks(blocks, x, sequences, recompute):
    """x [T, E] through all blocks; recompute: keep only each block's input for the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, sequences, use_reentrant=False) if recompute else block(x, sequences)
    return x


class TokenViT(nn.Module):
    """Features of the tokens of several series, each series for itself; no class token.

    size: "tiny" 5.5 M parameters | "small" 22 M | "base" 86 M | "large" 303 M | "huge" 631 M | "custom", with
    dim, depth, heads and mlp_ratio as given (the others take 4 and their own).  token_size: values of a
    token.  position: "concat", the last 30 dimensions of the embedding are the code of the token's place,
    or "add", the code has all dimensions and is added.  dropout, drop_path: rates; drop path takes whole
    series, linearly more towards the last block.  attention: a path of models/ragged_attention.py.
    checkpoint_activations: recompute each block in the backward pass.  Raises UserError for an unknown word
    and for dimensions that do not go together.  Dosovitskiy et al. 2021, arXiv:2010.11929.
    """

    def __init__(self, size="base", dim=None, depth=None, heads=None, mlp_ratio=4.0, token_size=1024,
                 position="concat", dropout=0.0, drop_path=0.0, attention="auto",
                 checkpoint_activations=False):
        super().__init__()
        if size != "custom":
            if size not in SIZES:
                raise UserError(f'STUDY_VIT is "{size}"; set it to one of {", ".join(SIZES)}, custom')
            (dim, depth, heads), mlp_ratio = SIZES[size], 4.0
        check_width("STUDY_VIT_DIM", dim, heads)
        if position not in ("concat", "add"):
            raise UserError(f'STUDY_POSITION is "{position}"; set it to concat or add')
        if position == "concat" and dim <= CODE:
            raise UserError(f"STUDY_VIT_DIM = {dim}: STUDY_POSITION=concat takes {CODE} of the dimensions; "
                            "make it larger")
        if position == "add" and dim % 2:
            raise UserError(f"STUDY_VIT_DIM = {dim}: must be even with STUDY_POSITION=add")
        self.dim, self.position, self.checkpoint_activations = dim, position, checkpoint_activations
        self.embed = linear(token_size, dim - CODE if position == "concat" else dim)
        self.blocks = make_blocks(dim, depth, heads, mlp_ratio, dropout, drop_path, attention)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens, coords, cu_seqlens, after=()):
        """tokens [T, token_size], coords int [T, 3], cu_seqlens int32 [S + 1] -> float32 [T, E].

        cu_seqlens: cumulative lengths of the series; a GPU waits for none of it if it lies on the CPU.
        after: ascending numbers of blocks; where there are any, a list: what left each of these, [T, E], and
        the features last.
        """
        sequences = Sequences(cu_seqlens, tokens.device)
        x = self.embed(tokens)
        if self.position == "concat":
            x = torch.cat([x, position_code(coords, CODE)], 1)                               # [T, E]
        else:
            x = x + position_code(coords, self.dim)
        recompute, blocks, left = self.checkpoint_activations and self.training, list(self.blocks), []
        for first, last in pairwise((0, *after)):
            x = run_blocks(blocks[first:last], x, sequences, recompute)
            left.append(x)
        x = self.norm(run_blocks(blocks[after[-1] if after else 0:], x, sequences, recompute))
        return [*left, x] if after else x
