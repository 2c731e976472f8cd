"""Poolers over ragged studies against loops over studies and outputs."""

import pytest
import torch
import torch.nn as nn

from models.mil import POOLERS, GatedAttention, StudyClassifier, build_pooler, segment_softmax, segments_of
from utils.config import UserError

LENGTHS = (5, 1, 0, 9)                                     # tokens of each study; one has none
CU = torch.tensor([0, 5, 6, 6, 15], dtype=torch.int32)
CASES = [("aggregate_then_classify", 1), ("aggregate_then_classify", 0), ("classify_then_aggregate", 1),
         ("average", 1)]


def pooler_of(word, heads=1, dim=8, outputs=3, hidden_dims=(6,), use_norm=True):
    torch.manual_seed(0)
    return build_pooler(word, dim, outputs, hidden_dims, 5, heads, use_norm)


def features(dim=8, seed=1):
    return torch.randn(sum(LENGTHS), dim, generator=torch.Generator().manual_seed(seed))


def linear_of_head(layers, head, x):
    """The MLP of one head, layer by layer: x [E] -> [outputs of the head]."""
    for layer in layers:
        x = layer.bias[head] + x @ layer.weight[head] if hasattr(layer, "weight") else layer(x)
    return x


def one_study(word, heads, pooler, x):
    """Logits [C] of one study, tokens [n, E], output by output."""
    if word == "average":
        return pooler.mlp(x.sum(0) / max(len(x), 1))
    x = pooler.norm(x)
    attention = pooler.attention
    outputs = []
    for c in range(1 if heads == 1 and word == "aggregate_then_classify" else 3):
        gates = torch.tanh(attention.content(x)) * torch.sigmoid(attention.gate(x))
        a = torch.softmax(gates @ attention.score.weight[c] + attention.score.bias[c], 0)
        if word == "classify_then_aggregate":
            outputs.append(pooler.scale[c] * (a * pooler.mlp(x)[:, c]).sum() + pooler.bias[c])
        else:
            outputs += linear_of_head(pooler.mlp, c, (a[:, None] * x).sum(0))
    return torch.stack(outputs)


@pytest.mark.parametrize("hidden_dims", [(), (6,), (7, 4)])
@pytest.mark.parametrize("word, heads", CASES)
def test_a_batch_of_ragged_studies_equals_a_loop_over_studies_and_outputs(word, heads, hidden_dims):
    """Packing is for speed alone; an empty study and one of a single token are no exception."""
    pooler, x = pooler_of(word, heads, hidden_dims=hidden_dims), features()
    logits, _ = pooler(x, CU)
    expected = [one_study(word, heads, pooler, part) for part in x.split(LENGTHS)]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word, heads", CASES)
def test_attention_sums_to_one_in_each_study(word, heads):
    """It is the share of the study's prediction that a token has."""
    _, attention = pooler_of(word, heads)(features(), CU)
    columns = 1 if word == "average" or (heads == 1 and word.startswith("aggregate")) else 3
    assert attention.shape == (15, columns) and (attention > 0).all()
    sums = torch.stack([part.sum(0) for part in attention.split(LENGTHS)])
    torch.testing.assert_close(sums, torch.tensor([[1.0], [1], [0], [1]]).expand(4, columns))


@pytest.mark.parametrize("word, heads", CASES)
def test_a_study_knows_nothing_of_the_others_nor_of_its_order(word, heads):
    """Attention across studies would leak labels; tokens are a bag."""
    pooler, x = pooler_of(word, heads), features()
    logits, attention = pooler(x, CU)
    order = torch.cat([torch.randperm(5), torch.arange(5, 15)])
    other = x[order].clone()
    other[5:] += 1
    shuffled, moved = pooler(other, CU)
    torch.testing.assert_close(shuffled[0], logits[0])
    torch.testing.assert_close(moved[:5], attention[order[:5]])


@pytest.mark.parametrize("word, heads", CASES)
@pytest.mark.parametrize("dim, outputs", [(8, 3), (12, 1)])
def test_gradient_reaches_every_parameter_and_stays_finite(word, heads, dim, outputs):
    """A study without tokens, and scores far beyond what exp can take, must not spoil the batch."""
    pooler, x = pooler_of(word, heads, dim, outputs), features(dim).requires_grad_()
    logits, attention = pooler(x, CU)
    logits.square().sum().backward()
    # A constant added to all scores of a study changes nothing, so the score's bias has a gradient of zero.
    weights = dict(pooler.named_parameters())
    for name, parameter in weights.items():
        assert parameter.grad.isfinite().all(), name
        assert name == "attention.score.bias" or parameter.grad.abs().max() > 0, name
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_softmax_of_segments_is_torchs_also_for_huge_scores(scale):
    """Without the maximum taken off, 1e4 overflows; segments need not even be in order."""
    scores = scale * torch.randn(12, 3, dtype=torch.float64).float().requires_grad_()
    segments = torch.tensor([2, 0, 2, 5, 0, 2, 5, 5, 0, 2, 2, 5])
    result = segment_softmax(scores, segments, 7)
    direction = torch.randn(12, 3)
    grad, = torch.autograd.grad((result * direction).sum(), scores)
    for segment in (0, 2, 5):
        part = scores.detach()[segments == segment].requires_grad_()
        expected = part.softmax(0)
        torch.testing.assert_close(result[segments == segment], expected)
        expected_grad, = torch.autograd.grad((expected * direction[segments == segment]).sum(), part)
        torch.testing.assert_close(grad[segments == segment], expected_grad)


def test_half_precision_is_pooled_in_float32():
    """Ten thousand weights of 1e-4 do not add up to 1 in bfloat16."""
    x, cu = torch.ones(10_000, 8, dtype=torch.bfloat16), torch.tensor([0, 10_000], dtype=torch.int32)
    for word, heads in CASES:
        with torch.autocast("cpu", torch.bfloat16):
            logits, attention = pooler_of(word, heads, use_norm=False)(x, cu)
        exact, _ = pooler_of(word, heads, use_norm=False)(x[:1].float(), torch.tensor([0, 1]))
        assert logits.dtype == attention.dtype == torch.float32
        torch.testing.assert_close(logits, exact, rtol=0.02, atol=0.005)
        torch.testing.assert_close(attention.sum(0), torch.ones(attention.shape[1]), rtol=1e-3, atol=0)


def test_segments_follow_the_cumulative_lengths():
    """Empty studies take no token."""
    segments, count = segments_of(CU, features())
    assert segments.tolist() == [0] * 5 + [1] + [3] * 9 and count == 4


def test_the_score_is_gated():
    """Eq. 9 of Ilse et al.: a closed gate silences the content."""
    attention = GatedAttention(4, 3, 2)
    attention.gate.weight.data.zero_()
    attention.gate.bias.data.fill_(-100)
    torch.testing.assert_close(attention(torch.randn(5, 4)), attention.score.bias.expand(5, 2))


@pytest.mark.parametrize("word", ["aggregate_then_classify", "classify_then_aggregate"])
def test_every_option_of_a_pooler_does_something(word):
    """An option without effect is a mistake in waiting."""
    torch.manual_seed(0)
    shapes = {name: [tuple(p.shape) for p in POOLERS[word](8, 3, (6,), **options).parameters()]
              for name, options in {"plain": {}, "hidden": {"hidden_dim": 5}, "norm": {"use_norm": True},
                                    "no norm": {"use_norm": False}}.items()}
    assert shapes["hidden"] != shapes["plain"] and shapes["norm"] != shapes["no norm"]
    own = POOLERS[word](8, 3, (6,))
    assert own.attention.content.out_features == 8                      # 0 = the width of the features
    if word == "classify_then_aggregate":
        assert own.scale.tolist() == [1, 1, 1] and own.bias.tolist() == [0, 0, 0]


def test_unknown_words_and_numbers_of_heads_are_refused():
    """The message names the constant."""
    with pytest.raises(UserError, match="MIL_POOLER"):
        pooler_of("maximum")
    with pytest.raises(UserError, match="MIL_ATTENTION_HEADS"):
        pooler_of("aggregate_then_classify", heads=2)


class Encoder(nn.Module):
    """A stand-in: tokens and coordinates to features, with dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4 + 3, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens, coords, cu_seqlens):
        assert cu_seqlens[-1] == len(tokens)
        self.graph = torch.is_grad_enabled()
        return self.dropout(self.embed(torch.cat([tokens, coords.float()], 1)))


def classify(model):
    series = torch.tensor([0, 3, 5, 6, 10, 15], dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    tokens, coords = torch.randn(15, 4, generator=generator), torch.randint(9, (15, 3), generator=generator)
    return model(tokens, coords, series, CU)


def test_a_frozen_encoder_is_left_alone():
    """No dropout, no gradient and no activations kept, in training too; the pooler learns."""
    model = StudyClassifier(Encoder(), pooler_of("classify_then_aggregate"), freeze=True)
    for _ in range(2):
        assert not model.encoder.training and model.pooler.training
        first, second = classify(model)[0], classify(model)[0]
        assert torch.equal(first, second)
        first.sum().backward()
        assert all(not p.requires_grad and p.grad is None for p in model.encoder.parameters())
        assert all(p.grad is not None for p in model.pooler.parameters())
        model.eval()
        model.train()
    assert not model.encoder.graph and torch.is_grad_enabled()


def test_a_trained_encoder_gets_its_gradient_and_its_dropout():
    """Fine-tuning reaches down to the tokens; evaluation is exact, and builds no graph when told so."""
    model = StudyClassifier(Encoder(), pooler_of("aggregate_then_classify"), freeze=False)
    assert not torch.equal(classify(model)[0], classify(model)[0])
    classify(model)[0].sum().backward()
    assert model.encoder.graph
    assert all(p.grad.abs().max() > 0 for p in model.encoder.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.equal(classify(model)[0], classify(model)[0]) and classify(model)[0].grad_fn is None
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "pooler"}
