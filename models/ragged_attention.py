"""Attention within each sequence of a packed batch, by the fastest exact path of the device."""

from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nested import nested_tensor_from_jagged
from torch.nn.attention.varlen import varlen_attn

from utils.config import UserError

HALF = (torch.float16, torch.bfloat16)
BUCKET_WASTE = 1.1                           # a bucket's padded tokens over its real ones, at most


class Sequences:
    """Where the sequences of a packed batch lie; made once per batch and shared by all layers.

    cu_seqlens: int [S + 1], cumulative lengths from 0 to T; empty sequences may be among them.  Its lengths
    are read here and nowhere else: one that stayed on the CPU spares a GPU the wait.  device: of the tokens.
    """

    def __init__(self, cu_seqlens, device):
        self.lengths = [length for length in cu_seqlens.diff().tolist() if length]
        self.bounds = list(accumulate(self.lengths, initial=0))
        self.device = device

    @cached_property
    def cu_seqlens(self):
        """Cumulative lengths without the empty sequences, int32 on the tokens' device."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    @cached_property
    def index(self):
        """int64 [T]: the number of each token's sequence, the empty ones not counted."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.repeat_interleave(lengths).to(self.device)

    @cached_property
    def buckets(self):
        """(buckets, place) for padding sequences of similar length together.

        buckets: list of (token int64 [b, n], real bool [b, 1, 1, n]): where each padded position takes its
        token from, and whether it is one; padding takes token 0.  place int64 [T]: where each token lies in
        the buckets laid end to end.
        """
        groups = []
        for i in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            group = [*groups[-1], i] if groups else [i]
            waste = len(group) * self.lengths[group[0]] / sum(self.lengths[j] for j in group)
            groups[-1:] = [group] if waste <= BUCKET_WASTE else [*groups[-1:], [i]]
        buckets, place, offset = [], torch.empty(self.bounds[-1], dtype=torch.int64), 0
        for group in groups:
            start, length = (torch.tensor([values[i] for i in group])[:, None]
                             for values in (self.bounds, self.lengths))
            within = torch.arange(self.lengths[group[0]])
            real = within < length                                                       # [b, n]
            token = torch.where(real, start + within, 0)
            place[token[real]] = offset + real.flatten().nonzero()[:, 0]
            offset += real.numel()
            buckets.append((token.to(self.device), real[:, None, None].to(self.device)))
        return buckets, place.to(self.device)


def _attend(q, k, v, dropout, mask=None):
    """scaled_dot_product_attention of [B, N, heads, Dh] -> [B * N, heads, Dh]; mask: True = attend."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(0, 1)


def _sequences(q, k, v, sequences, dropout):
    """One sequence after the other."""
    parts = zip(*(x[None].split(sequences.lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([_attend(*part, dropout) for part in parts])


def _buckets(q, k, v, sequences, dropout):
    """Sequences of similar length padded to the longest of them."""
    buckets, place = sequences.buckets
    outputs = [_attend(q[token], k[token], v[token], dropout, real) for token, real in buckets]
    return torch.cat(outputs).index_select(0, place)


def _block_mask(q, k, v, sequences, dropout):
    """All tokens at once, those of other sequences masked out: memory and time grow with T squared."""
    return _attend(q[None], k[None], v[None], dropout, sequences.index[:, None] == sequences.index)


def _nested(q, k, v, sequences, dropout):
    """torch.nested's jagged layout."""
    ragged = [nested_tensor_from_jagged(x.contiguous(), sequences.cu_seqlens,
                                        min_seqlen=min(sequences.lengths), max_seqlen=max(sequences.lengths))
              .transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*ragged, dropout_p=dropout).transpose(1, 2).values()


def _varlen(q, k, v, sequences, dropout):
    """Dao 2023, arXiv:2307.08691 (FlashAttention-2) for variable lengths."""
    if q.device.type != "cuda" or q.dtype not in HALF or dropout:
        raise UserError("STUDY_ATTENTION=varlen needs a CUDA device, PRECISION=bf16 or fp16, and "
                        'STUDY_DROPOUT=0; "auto" picks a path that fits')
    longest = max(sequences.lengths)
    return varlen_attn(q, k, v, sequences.cu_seqlens, sequences.cu_seqlens, longest, longest)


PATHS = {"sequences": _sequences, "buckets": _buckets, "block_mask": _block_mask, "nested": _nested,
         "varlen": _varlen}


def check_path(path):
    """``path`` if it is "auto" or a key of PATHS, else UserError."""
    if path not in ("auto", *PATHS):
        raise UserError(f'STUDY_ATTENTION is "{path}"; set it to one of auto, {", ".join(PATHS)}')
    return path


def fastest_path(q, dropout):
    """The path for queries [T, heads, Dh] of this device and dtype.

    On CPUs masks and padding cost more than the loop saves.  Flash kernels want a half precision, Ampere or
    newer, heads of a multiple of 8, and know no dropout here.
    """
    if q.device.type != "cuda":
        return "sequences"
    flash = q.dtype in HALF and not dropout and q.shape[2] % 8 == 0
    return "varlen" if flash and torch.cuda.get_device_capability(q.device) >= (8, 0) else "nested"


@torch.compiler.disable
def ragged_attention(q, k, v, sequences, path="auto", dropout=0.0):
    """softmax(q k^T / sqrt(Dh)) v within each sequence of a packed batch, never across two.

    q, k, v: [T, heads, Dh]; sequences: Sequences of the T tokens; returns [T, heads, Dh].  dropout: of the
    attention probabilities.  Every path gives the same values and gradients:

        "sequences"   scaled_dot_product_attention in a loop over sequences
        "buckets"     sequences of similar length padded together, with a key mask
        "block_mask"  one call with a block-diagonal mask
        "nested"      torch.nested, jagged layout
        "varlen"      flash kernel for variable lengths: CUDA, half precision
        "auto"        the fastest of them for device and dtype

    Raises UserError for another word.  Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    if len(q) != sequences.bounds[-1]:
        raise ValueError(f"cu_seqlens ends at {sequences.bounds[-1]}, but there are {len(q)} tokens")
    if not sequences.lengths:
        return v
    attend = PATHS[fastest_path(q, dropout) if check_path(path) == "auto" else path]
    return attend(q, k, v, sequences, dropout)
