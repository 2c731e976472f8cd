"""Two processes as under torchrun: equal ranks, and checkpoints that fit every strategy."""

import copy
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.nn as nn
from forks import two_ranks

from utils import distributed, states
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import UserError
from utils.ema import EMA

TESTS = Path(__file__).parent
STRATEGIES = distributed.STRATEGIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of one process and of two processes under every strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer, ema = worker.build("ddp")
    for step in range(worker.STEPS):
        worker.train_step(model, optimizer, ema, step, ranks=[0, 1])
    save_checkpoint(folder / "adamw_one_rank0.pt", kind="test", **worker.whole_state(model, optimizer, ema))
    two_ranks(lambda: worker.run(folder))
    return folder


def flatten(value, name=""):
    """Nested dicts and lists as one dict from a path to a leaf."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in pairs for key, leaf in flatten(v, f"{name}/{k}").items()}
    return {name: value}


def assert_bitwise_equal(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


def assert_close(first, second, skip=()):
    """Equal up to the order in which gradients are summed."""
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and not any(word in name for word in skip):
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6,
                                       msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ranks_end_with_the_same_weights_and_buffers(folder, strategy, optimizer):
    """They started from different random weights and saw different data; BatchNorm saw only its own."""
    first, second = (load_checkpoint(folder / f"{optimizer}_{strategy}_rank{rank}.pt") for rank in (0, 1))
    assert_bitwise_equal(first, second)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_sharding_changes_nothing_but_memory(folder, strategy, optimizer):
    """Weights, buffers, moments and average of a run are those of plain data parallelism."""
    assert_close(load_checkpoint(folder / f"{optimizer}_ddp_rank0.pt"),
                 load_checkpoint(folder / f"{optimizer}_{strategy}_rank0.pt"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_process_that_sees_both_shares(folder, strategy):
    """The gradient is the mean over ranks and micro-batches, whatever the strategy.

    Running statistics differ: one process updates them twice as often.
    """
    assert_close(load_checkpoint(folder / "adamw_one_rank0.pt")["model_state_dict"],
                 load_checkpoint(folder / f"adamw_{strategy}_rank0.pt")["model_state_dict"],
                 skip=["running", "num_batches"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_average_shows_in_the_outputs_and_goes_again(folder, strategy):
    """Whole parameters that an evaluation leaves in memory must not hide the average, nor outlive it."""
    entries = load_checkpoint(folder / f"adamw_{strategy}_rank0.pt")
    outputs = entries["outputs"]
    assert not torch.equal(outputs["averaged"], outputs["trained"])
    assert torch.equal(outputs["restored"], outputs["trained"])
    model = worker.Net()
    model.load_state_dict(entries["ema_state_dict"])
    torch.testing.assert_close(worker.evaluate(model), outputs["averaged"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("source", ["one", *STRATEGIES])
def test_a_checkpoint_of_any_strategy_loads_under_any_other(folder, source, strategy):
    """Loaded and written back, weights, moments, options and average are bitwise the same."""
    entries = load_checkpoint(folder / f"adamw_{source}_rank0.pt")
    loaded = load_checkpoint(folder / f"{source}_to_{strategy}.pt")["loaded"]
    assert_bitwise_equal({key: entries[key] for key in loaded}, loaded)


@pytest.mark.parametrize("source", ["one", *STRATEGIES])
def test_the_next_step_is_the_same_under_every_strategy(folder, source):
    """Optimizer moments, step counts and the average's warm-up go on where they were."""
    following = [load_checkpoint(folder / f"{source}_to_{strategy}.pt")["next"] for strategy in STRATEGIES]
    assert_close(following[0], following[1])
    assert_close(following[0], following[2])

    model, optimizer, ema = worker.build("ddp", seed=3)
    worker.load(model, optimizer, ema, load_checkpoint(folder / f"adamw_{source}_rank0.pt"))
    worker.train_step(model, optimizer, ema, worker.STEPS, ranks=[0, 1])
    assert_close(worker.whole_state(model, optimizer, ema), following[0], skip=["running", "num_batches"])


def test_gradients_stay_local_until_the_last_micro_batch(folder):
    """Accumulation would otherwise send every micro-batch's gradients: right results, wasted time."""
    first, second = (load_checkpoint(folder / f"collectives_rank{rank}.pt")["gradients"] for rank in (0, 1))
    assert not torch.equal(first["ddp"][0], second["ddp"][0])
    assert first["zero2"][0] is first["fsdp"][0] is None                # the whole gradients are kept aside
    for strategy in STRATEGIES:
        assert torch.equal(first[strategy][1], second[strategy][1])
        torch.testing.assert_close(first[strategy][1], first["ddp"][1])


def test_constant_buffers_stay_as_they_are(folder):
    """The mean over ranks of equal values must not drift with the number of steps."""
    for strategy in STRATEGIES:
        state = load_checkpoint(folder / f"adamw_{strategy}_rank0.pt")["model_state_dict"]
        assert torch.equal(state["table"], worker.Net().table)


def test_collectives_reach_every_rank(folder):
    """Sums, means, flags, words and generator states are those of both ranks."""
    for rank in (0, 1):
        entries = load_checkpoint(folder / f"collectives_rank{rank}.pt")
        assert (entries["total"], entries["mean"]) == (3.0, 1.5)
        assert entries["flags"] == [True, False]
        assert entries["word"] == "w0"
        assert entries["rows"].tolist() == [[0], [1], [0], [1], [2]]
        assert len(entries["rng"]) == 2


def test_a_teacher_follows_its_student_alike_under_every_strategy(folder):
    """Sharded, it averages its own shards; gathered, it is the one that every rank keeps under ddp."""
    first, second = (load_checkpoint(folder / f"collectives_rank{rank}.pt")["teachers"] for rank in (0, 1))
    assert_bitwise_equal(first, second)
    student = load_checkpoint(folder / "adamw_ddp_rank0.pt")["model_state_dict"]
    assert not torch.equal(first["ddp"]["head.weight"], student["head.weight"])
    for strategy in STRATEGIES:
        assert_close(first[strategy], first["ddp"])


def test_ranks_started_again_never_meet_those_that_are_gone(monkeypatch):
    """torchrun keeps one store for all attempts; an address of the last one is refused when it is called."""
    kept = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(kept, 1, 2)]))
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("TORCHELASTIC_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    first = distributed.meeting_point()
    assert (first["rank"], first["world_size"]) == (1, 2)
    first["store"].set("address", "here")
    assert distributed.meeting_point()["store"].check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not distributed.meeting_point()["store"].check(["address"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")                     # nodes number their own attempts
    assert distributed.meeting_point() == {}


def test_one_process_needs_no_torchrun():
    """The same script runs under plain python."""
    model = worker.Net()
    assert distributed.shard(model, "fsdp") is model
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.any_rank([True, False]) == [True, False]
    assert distributed.all_reduce_mean(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
    generators = states.gather_rng_state()
    drawn = torch.rand(3)
    assert states.restore_rng_state(generators) and torch.equal(torch.rand(3), drawn)
    assert not states.restore_rng_state(generators * 2)


@pytest.mark.parametrize("word", ["gpu", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused(word):
    """--device is a user's word: one line, no traceback."""
    with pytest.raises(UserError, match=f"--device {word}"):
        distributed.setup_distributed(word)
    assert distributed.setup_distributed("cpu") == torch.device("cpu")


def test_inference_takes_the_averaged_weights_where_there_are_any():
    """They are what the validation measured and the best checkpoint was chosen by."""
    trained, averaged = nn.Linear(2, 1).state_dict(), nn.Linear(2, 1).state_dict()
    for checkpoint, expected in (({"model_state_dict": trained, "ema_state_dict": averaged}, averaged),
                                 ({"model_state_dict": trained, "ema_state_dict": None}, trained),
                                 ({"model_state_dict": trained}, trained)):
        model = states.load_trained(nn.Linear(2, 1), checkpoint, torch.device("cpu"))
        assert torch.equal(model.weight, expected["weight"]) and not model.training


def test_an_unknown_strategy_is_named_with_the_allowed_ones():
    """Also on one process, where the word would do nothing yet."""
    with pytest.raises(UserError, match="STRATEGY.*zero3.*ddp, zero2, fsdp"):
        distributed.shard(worker.Net(), "zero3")


def test_blocks_are_elements_of_containers_and_cover_no_parameter_twice():
    """A bare container may be sliced by its parent; a block inside a block would be gathered alone."""
    blocks = list(distributed._blocks(nn.Sequential(nn.Sequential(worker.Net()), nn.ReLU()), smallest=1))
    assert [type(block).__name__ for block in blocks] == ["Net"]
    net = worker.Net()
    assert list(distributed._blocks(net, smallest=40)) == [net.features[0], *net.blocks]


def test_a_compiled_model_has_the_names_of_the_plain_one():
    """COMPILE must not decide which checkpoints can be loaded."""
    model = worker.Net()
    compiled = torch.compile(model, backend="eager")
    assert_bitwise_equal(states.model_state(compiled), model.state_dict())
    other = worker.Net()
    states.load_model_state(compiled, other.state_dict())
    assert_bitwise_equal(states.model_state(model), other.state_dict())
    optimizer = torch.optim.AdamW(compiled.parameters())
    assert states.optimizer_state(compiled, optimizer)["param_groups"][0]["params"][0] == "token"
    assert EMA(compiled, 0.9).model is model


def test_states_share_no_memory_with_the_run():
    """A state that is kept, or loaded twice, must not move when training goes on."""
    model, optimizer, ema = worker.build("ddp")
    worker.train_step(model, optimizer, ema, 0, [0])
    state = worker.whole_state(model, optimizer, ema)
    before = copy.deepcopy(state)
    worker.load(model, optimizer, ema, state)
    worker.train_step(model, optimizer, ema, 1, [0])
    assert_bitwise_equal(state, before)


def make_optimizer(model):
    """Adam with AMSGrad, two groups, and a parameter that never gets a gradient."""
    return torch.optim.Adam([{"params": [model.token, *model.head.parameters()], "weight_decay": 0.1},
                             {"params": list(model.unused.parameters())}], lr=1e-2, amsgrad=True, fused=True)


def test_parameters_without_optimizer_state_stay_without(tmp_path):
    """torch's own get_optimizer_state_dict would count a step that was never taken."""
    model = worker.Net()
    optimizer = make_optimizer(model)
    assert states.optimizer_state(model, optimizer)["state"] == {}
    model(torch.randn(2, 2, 8, 8)).sum().backward()
    optimizer.step()
    state = states.optimizer_state(model, optimizer)
    assert sorted(state["state"]) == ["head.bias", "head.weight", "token"]
    save_checkpoint(tmp_path / "a.pt", kind="test", model_state_dict={}, optimizer_state_dict=state)

    other = make_optimizer(model)
    states.load_optimizer_state(model, other, load_checkpoint(tmp_path / "a.pt")["optimizer_state_dict"])
    assert_bitwise_equal(states.optimizer_state(model, other), state)
    assert {"max_exp_avg_sq", "step"} < set(state["state"]["token"])
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0]


def test_states_of_another_model_are_refused():
    """Loading what fits and leaving the rest random would look like a resumed run."""
    model = worker.Net()
    state = states.model_state(model)
    del state["head.bias"]
    with pytest.raises(UserError, match="head.bias"):
        states.load_model_state(model, state)
    state["head.bias"] = torch.zeros(2)
    with pytest.raises(UserError, match="head.bias"):
        states.load_model_state(model, state)
    saved = states.optimizer_state(model, make_optimizer(model))
    with pytest.raises(UserError, match="optimizer state"):
        states.load_optimizer_state(model, torch.optim.SGD(model.parameters(), 0.1), saved)
