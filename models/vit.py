"""Plain vision transformer over a feature map or an image of any size."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from utils.config import UserError

VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}      # width, layers, heads


class ViT(nn.Module):
    """Patch embedding, learned 2D position, pre-norm transformer layers, final norm; no class token.

    size: "tiny" | "small" | "base"; raises UserError for another word.  in_channels: of the map it reads.
    patch_size: pixels of that map per token side.  grid: side of the stored position map; it is resized
    (bicubic) to the grid of tokens at hand.  checkpoint_activations: recompute each layer in the backward
    pass.  Dosovitskiy et al. 2021, arXiv:2010.11929; layers of Hugging Face's ViT with
    scaled_dot_product_attention.
    """

    def __init__(self, size, in_channels, patch_size=1, grid=32, checkpoint_activations=False):
        super().__init__()
        if size not in VIT_SIZES:
            raise UserError(f'VIT is "{size}"; set it to one of {", ".join(VIT_SIZES)} in constants.py')
        self.width, depth, heads = VIT_SIZES[size]
        self.checkpoint_activations = checkpoint_activations
        config = ViTConfig(hidden_size=self.width, num_hidden_layers=depth, num_attention_heads=heads,
                           intermediate_size=4 * self.width, layer_norm_eps=1e-6,
                           hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config._attn_implementation = "sdpa"
        self.embed = nn.Conv2d(in_channels, self.width, patch_size, patch_size)
        self.position = nn.Parameter(torch.empty(1, self.width, grid, grid))
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(depth)])
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.layers.apply(init_linear)

    def encode(self, tokens):
        """Layers and final norm.  [B, N, E] -> [B, N, E]."""
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                tokens = checkpoint(layer, tokens, use_reentrant=False)
            else:
                tokens = layer(tokens)
        return self.norm(tokens)

    def forward(self, features):
        """features [B, C, H, W], H and W multiples of patch_size -> tokens [B, H/p * W/p, E], row by row."""
        x = self.embed(features)                                                      # [B, E, h, w]
        position = F.interpolate(self.position, size=x.shape[-2:], mode="bicubic", align_corners=False)
        return self.encode((x + position).flatten(2).transpose(1, 2))                 # [B, h*w, E], float32


def init_linear(module):
    """Truncated normal of 0.02 and zero bias for a linear layer, as in the paper's code; others unchanged."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
