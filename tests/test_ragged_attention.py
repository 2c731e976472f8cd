"""Every path of ragged attention against a loop over tokens."""

import pytest
import torch

from models.ragged_attention import BUCKET_WASTE, PATHS, Sequences, fastest_path, ragged_attention
from utils.config import UserError

LENGTHS = (5, 0, 9, 1, 8, 3)                                      # an empty one and one of a single token
CPU_PATHS = [path for path in PATHS if path != "varlen"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(lengths=LENGTHS, heads=2, width=8, seed=0, device="cpu", dtype=torch.float32):
    """q, k, v [T, heads, width] as views of one tensor, as a linear layer gives them; and the Sequences."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=generator).to(device, dtype)
    return qkv.requires_grad_(), Sequences(cumulative(lengths), torch.device(device))


def naive(qkv, lengths):
    """Equation 1 of the paper, one query of one head at a time."""
    q, k, v = qkv.unbind(1)
    rows, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        for i in range(start, start + length):
            for head in range(q.shape[1]):
                weights = (k[own, head] @ q[i, head] / q.shape[2] ** 0.5).softmax(0)
                rows.append(weights @ v[own, head])
        start += length
    return torch.stack(rows).view_as(v)


def output_and_gradient(attend, qkv):
    output = attend(qkv)
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output.detach(), torch.autograd.grad(output, qkv, seed)[0]


@pytest.mark.parametrize("path", ["auto", *CPU_PATHS])
def test_all_paths_give_the_values_and_gradients_of_the_formula(path):
    """The choice of a path is a matter of speed alone."""
    qkv, sequences = draw()
    results = output_and_gradient(lambda x: ragged_attention(*x.unbind(1), sequences, path), qkv)
    torch.testing.assert_close(results, output_and_gradient(lambda x: naive(x, LENGTHS), qkv),
                               rtol=1e-5, atol=1e-6)


@cuda
@pytest.mark.parametrize("path", CPU_PATHS)
def test_paths_agree_on_cuda(path):
    """The kernels are others than the CPU's."""
    qkv, sequences = draw(lengths=(300, 0, 211, 1, 450), device="cuda")
    results, expected = (output_and_gradient(lambda x, p=p: ragged_attention(*x.unbind(1), sequences, p), qkv)
                         for p in (path, "sequences"))
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)


@cuda
@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_paths_agree_on_cuda_in_half_precision(path):
    """Flash kernels know half precisions alone, so the rounding of bfloat16 is allowed for."""
    qkv, sequences = draw(lengths=(300, 0, 211, 1, 450), width=64, device="cuda", dtype=torch.bfloat16)
    results = output_and_gradient(lambda x: ragged_attention(*x.unbind(1), sequences, path), qkv)
    exact = qkv.detach().float().requires_grad_()
    expected = output_and_gradient(lambda x: ragged_attention(*x.unbind(1), sequences, "sequences"), exact)
    for result, wanted in zip(results, expected, strict=True):
        assert (result.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("path", CPU_PATHS)
def test_a_sequence_does_not_see_the_others(path):
    """Attention that crossed series would mix studies."""
    qkv, sequences = draw()
    other = qkv.detach().clone()
    changed = sequences.index == 1                                                  # the nine tokens
    other[changed] += 1
    before, after = (ragged_attention(*x.unbind(1), sequences, path) for x in (qkv, other))
    torch.testing.assert_close(after[~changed], before[~changed], rtol=0, atol=1e-6)
    assert not torch.allclose(after[changed], before[changed], atol=1e-2)


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("lengths", [(0, 0), (), (0, 4, 0)])
def test_empty_sequences_give_no_output(path, lengths):
    """A series of which a mask left nothing is no reason to stop."""
    qkv, sequences = draw(lengths)
    output = ragged_attention(*qkv.unbind(1), sequences, path)
    assert output.shape == (sum(lengths), 2, 8) and output.isfinite().all() and output.requires_grad


@pytest.mark.parametrize("path", CPU_PATHS)
def test_dropout_drops_probabilities_and_keeps_their_mean(path):
    """With equal keys and values of one, an output is the sum of what is left, scaled."""
    torch.manual_seed(0)
    _, sequences = draw((20, 30))
    q, v = torch.zeros(50, 4, 8), torch.ones(50, 4, 8)
    output = ragged_attention(q, q, v, sequences, path, dropout=0.5)
    assert output[..., 0].std() > 0.05
    assert output.mean().item() == pytest.approx(1, abs=0.1)


def test_buckets_hold_every_token_once_and_little_else():
    """Padding is work without a result."""
    lengths = torch.randint(1, 100, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = Sequences(cumulative(lengths), "cpu")
    buckets, place = sequences.buckets
    tokens = torch.cat([token.flatten() for token, _ in buckets])
    real = torch.cat([real.flatten() for _, real in buckets])
    assert torch.equal(tokens[real].sort().values, torch.arange(sum(lengths)))
    assert torch.equal(tokens[place], torch.arange(sum(lengths)))
    assert len(tokens) <= BUCKET_WASTE * sum(lengths)
    assert 1 < len(buckets) < len(lengths) / 2


def test_the_cpu_takes_the_sequences_one_by_one():
    """Its masked kernel is slower by more than the loop costs."""
    assert fastest_path(torch.zeros(3, 2, 8), dropout=0.0) == "sequences"


def test_lengths_that_do_not_fit_the_tokens_are_an_error():
    """Else tokens would silently belong to no sequence."""
    qkv, _ = draw((5,))
    with pytest.raises(ValueError, match="ends at 4"):
        ragged_attention(*qkv.unbind(1), Sequences(cumulative((4,)), "cpu"))


@pytest.mark.parametrize("path", ["flash", "varlen"])
def test_paths_that_are_unknown_or_need_another_device_name_the_constant(path):
    """The user asked for a path; another in its place would be a silent fallback."""
    qkv, sequences = draw()
    with pytest.raises(UserError, match=f"STUDY_ATTENTION.*{path}"):
        ragged_attention(*qkv.unbind(1), sequences, path)
