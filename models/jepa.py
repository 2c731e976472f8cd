"""Joint-embedding prediction on volumes: features of hidden tokens from those of visible ones.

Assran et al. 2023, arXiv:2301.08243, on packed series of volume tokens.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.ragged_attention import Sequences
from models.token_vit import CODE, check_width, linear, make_blocks, position_code, run_blocks


def sub_cu_seqlens(keep, cu_seqlens):
    """Cumulative lengths of the kept tokens alone: keep bool [T], cu_seqlens [S + 1] -> int32 [S + 1].

    Both on one device, which is not read back.  A series that keeps nothing has length 0.
    """
    kept = F.pad(keep.cumsum(0), (1, 0))                                                     # [T + 1]
    return kept[cu_seqlens.long()].int()


def join_order(first_cu, second_cu, first, second):
    """Order that packs two packed batches into one: for each series the first's tokens, then the second's.

    first_cu, second_cu: cumulative lengths [S + 1] of ``first`` and ``second`` tokens; returns int64
    [first + second], indices into the first's tokens followed by the second's.
    """
    series = [torch.bucketize(torch.arange(count, device=cu.device), cu[1:], right=True)
              for cu, count in ((first_cu, first), (second_cu, second))]
    return torch.cat(series).argsort(stable=True)


class Predictor(nn.Module):
    """Teacher features at target positions from the student's features of the context.

    features: width E of both; dim, depth, heads, mlp_ratio: of its own blocks.  A target enters as one
    learned mask token.  Context and targets of a series attend to each other; both enter with the 30
    dimensions of their position's code appended.  dropout, drop_path, attention, checkpoint_activations:
    as in TokenViT.  Raises UserError when heads do not divide dim.
    """

    def __init__(self, features, dim=512, depth=4, heads=8, mlp_ratio=4.0, dropout=0.0, drop_path=0.0,
                 attention="auto", checkpoint_activations=False):
        super().__init__()
        check_width("JEPA_PREDICTOR_DIM", dim, heads)
        self.checkpoint_activations = checkpoint_activations
        self.mask_token = nn.Parameter(torch.zeros(features))
        self.embed = linear(features + CODE, dim)
        self.blocks = make_blocks(dim, depth, heads, mlp_ratio, dropout, drop_path, attention)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = linear(dim, features)

    def forward(self, features, context_coords, target_coords, context_cu, target_cu):
        """features [Tc, E], coords int [Tc, 3] and [Tt, 3], cumulative lengths int32 [S + 1] -> [Tt, E]."""
        tokens = torch.cat([features, self.mask_token.expand(len(target_coords), -1)])       # [Tc + Tt, E]
        code = position_code(torch.cat([context_coords, target_coords]), CODE)
        x = self.embed(torch.cat([tokens, code], 1))                                         # [Tc + Tt, dim]
        order = join_order(context_cu, target_cu, len(features), len(target_coords)).to(x.device)
        sequences = Sequences(context_cu + target_cu, x.device)
        x = x.index_select(0, order)                                                 # series by series
        x = run_blocks(self.blocks, x, sequences, self.checkpoint_activations and self.training)
        x = x.index_select(0, order.argsort()[len(features):])                               # [Tt, dim]
        return self.head(self.norm(x))


class VolJEPA(nn.Module):
    """Student and predictor.  The teacher stands outside: a copy of ``encoder`` that follows it by EMA."""

    def __init__(self, encoder, predictor):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    def forward(self, tokens, coords, context, target, cu_seqlens):
        """Predicted features [Tt, E] of the target tokens, in their order.

        tokens [T, 1024], coords int [T, 3], context and target bool [T], True = the student sees it / it is
        predicted; cu_seqlens int32 [S + 1].  The last three may lie on the CPU, so that a GPU waits for
        none.  A series without context is predicted from its positions alone.
        """
        context_cu, target_cu = (sub_cu_seqlens(mask, cu_seqlens) for mask in (context, target))
        context, target = (mask.nonzero()[:, 0].to(tokens.device) for mask in (context, target))
        features = self.encoder(tokens[context], coords[context], context_cu)                # [Tc, E]
        return self.predictor(features, coords[context], coords[target], context_cu, target_cu)


@torch.no_grad()
def teacher_targets(teacher, tokens, coords, foreground, target, cu_seqlens):
    """What the predictor should say: the teacher's features of the target tokens, float32 [Tt, E].

    The teacher, a TokenViT in eval mode, sees all foreground tokens (bool [T], True = not background), and
    each token's features are normalised to mean 0 and variance 1.  target bool [T]: a part of foreground.
    """
    cu = sub_cu_seqlens(foreground, cu_seqlens)
    chosen = target[foreground].nonzero()[:, 0].to(tokens.device)
    seen = foreground.nonzero()[:, 0].to(tokens.device)
    features = teacher(tokens[seen], coords[seen], cu)[chosen].float()                       # [Tt, E]
    return F.layer_norm(features, features.shape[1:])
