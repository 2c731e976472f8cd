"""Hierarchical vision transformer: four stages of global attention, each on half as fine a grid."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import PatchMerging
from torchvision.ops import StochasticDepth

from models.token_vit import linear
from models.vista import pad_to_multiple
from utils.config import UserError

WIDTHS = {"tiny": 48, "small": 96, "base": 144}              # of the first stage; each later one doubles it
DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)
FEW_TOKENS = 512


class HViT(nn.Module):
    """Patch embedding, learned position, four stages of pre-norm blocks, norm, mean over the tokens, head.

    size: "tiny" 6.9 M parameters | "small" 27.6 M | "base" 62 M; they differ in width alone.  The head is
    one linear layer to ``num_classes`` logits; 0: no head, logits are the features.
    patch: pixels per token side.  image_size: pixels per side to which the stored position map belongs; for
    other grids it is resized (bicubic).  Weights are passed on between runs of any image size as long as this
    number stays.
    drop_path: rate at the last block; it grows linearly from 0 at the first.
    checkpoint_activations: recompute each block, and each fusion, in the backward pass.

    spectral_channels: of a second image of the same place, 0 for none.  Its tokens are added to those of the
    colour image before the first stage, or, with ``dfca``, pass through stages of their own, and DFCA lets
    the colour tokens attend to them after each stage; that is 2.3 times the parameters.  dfca_heads,
    dfca_dropout: of that attention.

    Images may have any size.  One that is no multiple of the patch is mirrored at its far ends, so that each
    patch holds pixels of the image.  Where a grid is odd, patch merging fills the missing neighbours with
    zeros, as Swin does.  Each merged token has a real one in it, so that none is padding alone: there is
    nothing for attention to be masked from.  In the mean a token counts by the number of patches that it was
    merged from, so that the rest at an edge has no more weight than its area.

    Raises UserError for unknown words, rates outside [0, 1), and a fusion without what it fuses.
    Dosovitskiy et al. 2021, arXiv:2010.11929; merging: Liu et al. 2021, arXiv:2103.14030, section 3.1.
    """

    # Beginnings of the parameters' names, input side first.
    parts = (("embed", "spectral_embed", "position"),
             *((f"stages.{i}", f"spectral_stages.{i}", f"dfca.{i}") for i in range(3)),
             ("stages.3", "spectral_stages.3", "dfca.3", "norm"), ("head",))
    second_stream = ("spectral_", "dfca.")               # of this no pretraining on colour images knows

    def __init__(self, size="small", num_classes=7, image_size=256, patch=16, drop_path=0.2,
                 spectral_channels=0, dfca=False, dfca_heads=12, dfca_dropout=0.1,
                 checkpoint_activations=False):
        super().__init__()
        if size not in WIDTHS:
            raise UserError(f'HVIT_MODEL is "hvit_{size}"; set it to hvit_{", hvit_".join(WIDTHS)}')
        check_rate("HVIT_DROP_PATH", drop_path)
        widths = [WIDTHS[size] * 2 ** i for i in range(4)]
        self.dim, self.spectral_channels = widths[-1], spectral_channels
        self.checkpoint_activations = checkpoint_activations
        grid = -(-image_size // patch)
        self.embed = Embedding(3, widths[0], patch)
        self.position = nn.Parameter(torch.empty(1, widths[0], grid, grid))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.stages = make_stages(widths, drop_path, checkpoint_activations)
        if spectral_channels:
            self.spectral_embed = Embedding(spectral_channels, widths[0], patch)
        self.dfca = None
        if dfca:
            check_dfca(spectral_channels, dfca_heads, widths[0], dfca_dropout)
            self.spectral_stages = make_stages(widths, drop_path, checkpoint_activations)
            self.dfca = nn.ModuleList(DFCA(width, dfca_heads, dfca_dropout) for width in widths)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.head = linear(self.dim, num_classes) if num_classes else nn.Identity()

    def features(self, images, spectral=None):
        """images [B, 3, H, W], spectral [B, K, H, W] where the model has it -> float32 [B, E].

        Raises UserError when the channels or sizes are not those that the model reads.
        """
        check_images(images, spectral, self.spectral_channels)
        x = self.embed(images)                                                            # [B, h, w, E]
        grid = x.shape[1:3]
        x = x + self.position_of(grid)
        if self.spectral_channels:
            other = self.spectral_embed(spectral)
            x, other = (x, other + self.position_of(grid)) if self.dfca else (x + other, None)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.dfca:
                other = self.spectral_stages[i](other)
                x = run(self.dfca[i], self.checkpoint_activations and self.training, x, other)
        rows, columns = (shares(side, 8, x.device) for side in grid)
        return (self.norm(x) * (rows[:, None] * columns)[..., None]).sum((1, 2))

    def forward(self, images, spectral=None):
        """As ``features`` -> logits [B, C]."""
        return self.head(self.features(images, spectral))

    def position_of(self, grid):
        """The position map for a grid of (h, w) tokens, [1, h, w, E]."""
        position = self.position
        if position.shape[2:] != grid:
            position = F.interpolate(position, size=tuple(grid), mode="bicubic", align_corners=False)
        return position.permute(0, 2, 3, 1)


class Embedding(nn.Module):
    """Non-overlapping patches of an image, each one linear layer and a norm: [B, C, H, W] -> [B, h, w, E]."""

    def __init__(self, channels, dim, patch):
        super().__init__()
        self.patch = patch
        self.project = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):
        """h = ceil(H / patch), w likewise."""
        return self.norm(self.project(pad_to_multiple(images, self.patch)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Patch merging, where ``merge`` says so, then one block for each of ``drop_paths``."""

    def __init__(self, dim, heads, drop_paths, merge, checkpoint_activations):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.merge = nn.Identity()
        if merge:
            self.merge = PatchMerging(dim // 2, lambda width: nn.LayerNorm(width, eps=1e-6))
            nn.init.trunc_normal_(self.merge.reduction.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in drop_paths)

    def forward(self, x):
        """[B, h, w, C] -> [B, ceil(h / 2), ceil(w / 2), 2 C], or of the same shape without merging."""
        x = self.merge(x).to(x.dtype)                    # autocast or not, the residual stream keeps its type
        shape = x.shape
        x = x.flatten(1, 2)                                                               # [B, N, E]
        for block in self.blocks:
            x = run(block, self.checkpoint_activations and self.training, x)
        return x.view(shape)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)), with GELU and drop path."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = linear(dim, 3 * dim)
        self.project = linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = linear(dim, 4 * dim)
        self.fc2 = linear(4 * dim, dim)
        self.drop_path = StochasticDepth(drop_path, "row")                      # each image draws for itself

    def forward(self, x):
        """[B, N, E] -> [B, N, E]."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def attend(self, x):
        """Self-attention of all tokens of an image: [B, N, E] -> [B, N, E]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # [B, heads, N, Dh]
        return self.project(attention(q, k, v).transpose(1, 2).flatten(2))


class DFCA(nn.Module):
    """Disease-focused cross-attention: colour tokens ask, spectral tokens plus a learned vector answer.

    Post-norm: norm(x + attention), then norm(x + MLP), with GELU and dropout.
    """

    def __init__(self, dim, heads=12, dropout=0.1):
        super().__init__()
        self.disease = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = linear(dim, 4 * dim)
        self.fc2 = linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, colour, spectral):
        """colour, spectral [B, h, w, E] -> [B, h, w, E]."""
        x, context = colour.flatten(1, 2), spectral.flatten(1, 2) + self.disease          # [B, N, E]
        x = self.norm1(x + self.dropout(self.attention(x, context, context, need_weights=False)[0]))
        x = self.norm2(x + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x))))))
        return x.view(colour.shape)


def attention(q, k, v):
    """softmax(q k' / sqrt(Dh)) v of q, k, v [B, heads, N, Dh] -> [B, heads, N, Dh].

    The fused kernel of CPUs is slow in bfloat16 with few tokens (its backward pass 2 to 10 times): there the
    formula is computed as it stands, which stores the N x N weights.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW_TOKENS:
        return (q * q.shape[3] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def make_stages(widths, drop_path, checkpoint_activations):
    """nn.ModuleList of the four stages; drop path grows linearly over all their blocks."""
    rates = torch.linspace(0, drop_path, sum(DEPTHS), device="cpu").split(DEPTHS)
    return nn.ModuleList(Stage(widths[i], HEADS[i], rates[i].tolist(), i > 0, checkpoint_activations)
                         for i in range(4))


def run(module, recompute, *inputs):
    """module(*inputs); recompute: keep only the inputs for the backward pass."""
    return checkpoint(module, *inputs, use_reentrant=False) if recompute else module(*inputs)


def shares(patches, cell, device):
    """Share of an axis of ``patches`` in each of its cells of ``cell`` patches, the last one cut: float32."""
    starts = torch.arange(0, patches, cell, device=device)
    return (patches - starts).clamp(max=cell) / patches


def check_rate(name, rate):
    """UserError unless ``rate``, the constant ``name``, lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise UserError(f"{name} = {rate}: must lie in [0, 1)")


def check_dfca(spectral_channels, heads, dim, dropout):
    """UserError for settings with which DFCA would do nothing or cannot be built; dim: the least width."""
    if not spectral_channels:
        raise UserError("HVIT_DFCA = True needs spectral images: set HVIT_SPECTRAL_CHANNELS to the number of "
                        "their channels, or HVIT_DFCA to False")
    if heads < 1 or dim % heads:
        raise UserError(f"HVIT_DFCA_HEADS = {heads}: must divide the width of the first stage, {dim}")
    check_rate("HVIT_DFCA_DROPOUT", dropout)


def check_images(images, spectral, spectral_channels):
    """UserError unless ``images`` is [B, 3, H, W], with spectral images of that size where, and only where,
    there are ``spectral_channels``."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise UserError(f"images of shape {tuple(images.shape)}: HVIT_MODEL reads colour images [B, 3, H, W]")
    wanted = (images.shape[0], spectral_channels, *images.shape[2:]) if spectral_channels else None
    given = None if spectral is None else tuple(spectral.shape)
    if given != wanted:
        raise UserError(f"spectral images of shape {given}: HVIT_SPECTRAL_CHANNELS = {spectral_channels} "
                        f"takes {wanted}; change it, or the data")
