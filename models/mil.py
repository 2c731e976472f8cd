"""One prediction per study from the features of all its tokens: attention pooling over ragged studies.

A batch packs the tokens of its studies one after the other; ``study_cu_seqlens`` says where each begins.
No step loops over studies or outputs, and none reads a value back from the device when the lengths are
on the CPU.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn

from utils.config import UserError


class GatedAttention(nn.Module):
    """Attention scores of tokens: W (tanh(V x) * sigmoid(U x)).  [T, E] -> float32 [T, heads].

    Ilse et al. 2018, arXiv:1802.04712, eq. 9, before its softmax.
    """

    def __init__(self, dim, hidden, heads):
        super().__init__()
        self.content = nn.Linear(dim, hidden)                   # V
        self.gate = nn.Linear(dim, hidden)                      # U
        self.score = nn.Linear(hidden, heads)                   # W

    def forward(self, x):
        return self.score(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x))).float()


class AggregateThenClassify(nn.Module):
    """Pool the tokens of a study by attention, then classify the pooled feature: z_c = sum a_c x.

    attention_heads: 1, one pooled feature that one MLP turns into all outputs; 0, a pooled feature and an
    MLP of its own for each output; raises UserError for another number.  hidden_dim: of the attention,
    0 = dim.  mlp_hidden_dims: widths between the pooled feature and its logits; none is one linear layer.
    use_norm: LayerNorm of the tokens first.  Ilse et al. 2018, arXiv:1802.04712.
    """

    def __init__(self, dim, num_outputs, mlp_hidden_dims, hidden_dim=0, attention_heads=1, use_norm=True):
        super().__init__()
        if attention_heads not in (0, 1):
            raise UserError(f"MIL_ATTENTION_HEADS = {attention_heads}: use 1, or 0 for one head per output")
        heads = attention_heads or num_outputs
        self.norm = nn.LayerNorm(dim) if use_norm else nn.Identity()
        self.attention = GatedAttention(dim, hidden_dim or dim, heads)
        self.mlp = mlp([dim, *mlp_hidden_dims, num_outputs // heads], partial(HeadLinear, heads))

    def forward(self, x, study_cu_seqlens):
        """[T, E], int32 [B + 1] -> logits float32 [B, C], attention float32 [T, 1 or C]."""
        x = self.norm(x)
        attention = segment_softmax(self.attention(x), *segments_of(study_cu_seqlens, x))
        with torch.autocast(x.device.type, enabled=False):
            pooled = weighted_sums(attention, x.float(), study_cu_seqlens)                # [B, heads, E]
            return self.mlp(pooled).flatten(1), attention


class ClassifyThenAggregate(nn.Module):
    """Classify each token, then add the logits up by attention: y_c = scale_c * sum a_c h_c + bias_c.

    Each output has its own attention, so a_c h_c is what a token contributes to y_c.  hidden_dim: of the
    attention, 0 = dim.  mlp_hidden_dims: widths between a token and its logits; none is one linear layer.
    use_norm: LayerNorm of the tokens first.  Javed et al. 2022, arXiv:2206.01794, with a scale and a bias.
    """

    def __init__(self, dim, num_outputs, mlp_hidden_dims, hidden_dim=0, use_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if use_norm else nn.Identity()
        self.attention = GatedAttention(dim, hidden_dim or dim, num_outputs)
        self.mlp = mlp([dim, *mlp_hidden_dims, num_outputs])
        self.scale = nn.Parameter(torch.ones(num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x, study_cu_seqlens):
        """[T, E], int32 [B + 1] -> logits float32 [B, C], attention float32 [T, C]."""
        x = self.norm(x)
        segments, count = segments_of(study_cu_seqlens, x)
        attention = segment_softmax(self.attention(x), segments, count)
        pooled = segment_sum(attention * self.mlp(x).float(), segments, count)
        return self.scale * pooled + self.bias, attention


class AveragePooling(nn.Module):
    """Classify the mean of a study's tokens: the baseline without attention.

    mlp_hidden_dims: widths between the mean and the logits; none is one linear layer.
    """

    def __init__(self, dim, num_outputs, mlp_hidden_dims):
        super().__init__()
        self.mlp = mlp([dim, *mlp_hidden_dims, num_outputs])

    def forward(self, x, study_cu_seqlens):
        """[T, E], int32 [B + 1] -> logits float32 [B, C], attention float32 [T, 1], 1 / length each."""
        segments, count = segments_of(study_cu_seqlens, x)
        attention = segment_softmax(x.new_zeros(len(x), 1), segments, count)
        with torch.autocast(x.device.type, enabled=False):
            return self.mlp(segment_sum(attention * x.float(), segments, count)), attention


POOLERS = {"aggregate_then_classify": AggregateThenClassify,
           "classify_then_aggregate": ClassifyThenAggregate,
           "average": AveragePooling}


def build_pooler(word, dim, num_outputs, mlp_hidden_dims, hidden_dim, attention_heads, use_norm):
    """The pooler of that name in POOLERS, with those of the options that it has.

    "average" has no attention, "classify_then_aggregate" always a head per output.  Raises UserError for
    another word.
    """
    if word not in POOLERS:
        raise UserError(f'MIL_POOLER is "{word}"; set it to one of {", ".join(POOLERS)} in constants.py')
    options = {}
    if word != "average":
        options |= {"hidden_dim": hidden_dim, "use_norm": use_norm}
    if word == "aggregate_then_classify":
        options["attention_heads"] = attention_heads
    return POOLERS[word](dim, num_outputs, mlp_hidden_dims, **options)


class StudyClassifier(nn.Module):
    """An encoder of series and a pooler of studies.

    encoder: module(tokens [T, V], coords [T, 3], cu_seqlens [S + 1]) -> features [T, E].
    pooler: module(features, study_cu_seqlens [B + 1]) -> (logits [B, C], attention [T, C or 1]).
    freeze: the encoder is not trained: its parameters require no gradient, it keeps no activations, and it
    stays in evaluation mode, without dropout, whatever the mode of the whole.
    """

    def __init__(self, encoder, pooler, freeze):
        super().__init__()
        self.encoder, self.pooler, self.freeze = encoder, pooler, freeze
        if freeze:
            encoder.requires_grad_(False).eval()

    def train(self, mode=True):
        """Set the mode of the parts that are trained; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, tokens, coords, cu_seqlens, study_cu_seqlens):
        """Tokens packed by series, and series by study -> logits float32 [B, C], attention [T, C or 1].

        cu_seqlens int32 [S + 1] (series) and study_cu_seqlens int32 [B + 1] both count tokens.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            features = self.encoder(tokens, coords, cu_seqlens)
        return self.pooler(features, study_cu_seqlens)


class HeadLinear(nn.Module):
    """A linear layer for each head.  [B, heads, inputs] -> [B, heads, outputs]; begins as nn.Linear does."""

    def __init__(self, heads, inputs, outputs):
        super().__init__()
        bound = inputs ** -0.5
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, outputs).uniform_(-bound, bound))

    def forward(self, x):
        return torch.einsum("bhi,hio->bho", x, self.weight) + self.bias


def mlp(widths, linear=nn.Linear):
    """Layers ``linear(inputs, outputs)`` through the widths, GELU between them."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.GELU(), linear(*sizes))]
    return nn.Sequential(*layers[1:])


def segments_of(cu_seqlens, x):
    """The study of each token: cu_seqlens [B + 1], x [T, ...] -> int64 [T] on x's device, and B."""
    count = len(cu_seqlens) - 1
    numbers = torch.arange(count, device=x.device)
    return numbers.repeat_interleave(cu_seqlens.diff().to(x.device), output_size=len(x)), count


def segment_sum(values, segments, count):
    """Sum of the rows of each segment, in float32: [T, C], int64 [T] -> [count, C]; zero of no rows."""
    values = values.float()
    return values.new_zeros(count, values.shape[1]).index_add(0, segments, values)


def segment_softmax(scores, segments, count):
    """Softmax over the rows of each segment, column by column, in float32: [T, C], int64 [T] -> [T, C].

    The segment's largest score is taken off first, so no exponential overflows.  Segments may be empty.
    """
    scores = scores.float()
    largest = scores.new_full((count, scores.shape[1]), -torch.inf).scatter_reduce(
        0, segments[:, None].expand_as(scores), scores.detach(), "amax")
    weights = torch.exp(scores - largest[segments])
    return weights / segment_sum(weights, segments, count)[segments]


def weighted_sums(weights, values, cu_seqlens):
    """Sums of rows under several weights: [T, heads], [T, E], [B + 1] -> [B, heads, E]; zero where none.

    Studies are padded to the longest of the batch for one matrix product each; products of every weight with
    every row, T * heads * E numbers, would not fit.
    """
    segments, count = segments_of(cu_seqlens, values)
    starts = cu_seqlens[:-1].to(values.device)
    places = segments, torch.arange(len(values), device=values.device) - starts[segments]
    padded = [x.new_zeros(count, int(cu_seqlens.diff().max()), x.shape[1]).index_put(places, x)
              for x in (weights, values)]                                                 # [B, longest, ...]
    return padded[0].transpose(1, 2) @ padded[1]
