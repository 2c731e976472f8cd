"""The training script as a user runs it: files, options, resume."""

import csv
import json
import os
import signal

import pytest
import torch
from forks import two_ranks

import constants as C
import longitudinal_MIM_training as script_module
from datasets.longitudinal import find_cases
from utils.config import UserError

LAST = "longitudinal_mim_last.pt"


pytestmark = pytest.mark.usefixtures("narrow_xray")


def states_differ(first, second):
    """Keys of two checkpoints whose values are not bitwise equal."""
    def equal(a, b):
        if torch.is_tensor(a):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b or a != a and b != b                                      # equal, or both nan
    first, second = (torch.load(path, weights_only=True) for path in (first, second))
    return [key for key in first if key != "constants" and not equal(first[key], second[key])]


def test_a_run_leaves_everything_that_is_promised(train, capsys):
    """Checkpoints, the record, the table, both curves, sample pictures, and lines in the guide's format."""
    run = train("whole", "SAVE_EVERY_EPOCHS=1", "SAMPLES_PER_EPOCH=2", "TRACKERS=['tensorboard']")
    names = {path.name for path in run.iterdir()}
    assert names >= {LAST, "longitudinal_mim_best.pt", "longitudinal_mim_epoch_1.pt",
                     "longitudinal_mim_epoch_2.pt", "training_params.json", "metrics.csv", "loss_curves.png",
                     "detailed_loss_curves.png", "tb"}
    assert {path.name for path in (run / "samples").iterdir()} == {"epoch_1.png", "epoch_2.png"}
    checkpoint = torch.load(run / LAST, weights_only=True)
    assert set(checkpoint) >= {
        "model_state_dict", "ema_state_dict", "optimizer_state_dict", "scheduler_state_dict",
        "scaler_state_dict", "epoch", "step", "batch_in_epoch", "train_loss", "val_loss", "best", "history",
        "rng_state", "constants", "kind", "format_version"}
    assert checkpoint["kind"] == "longitudinal_mim" and checkpoint["epoch"] == 2
    params = json.loads((run / "training_params.json").read_text())
    assert params["effective_batch"] == 4 and params["train_items"] > 0 and len(params["constants"]) >= 40
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert {"train/L1", "train/L2", "train/Dice", "val/loss", "val/dice", "train/lr"} <= set(rows[0])
    printed = capsys.readouterr().out
    for line in ["Epoch 1/2", "] Train Loss: 0.", " | L1: ", "Epoch 1 Complete: Train Loss: ",
                 " | Val Loss: ", "Saved checkpoint: longitudinal_mim_epoch_2.pt"]:
        assert line in printed


def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(train, monkeypatch):
    """Stopped by a real SIGTERM between two steps, resumed with -c auto: every tensor and number is equal."""
    whole = train("whole")
    steps = []

    def stop_at_second_step(*values):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(script_module, "check_finite", stop_at_second_step)
        with pytest.raises(SystemExit) as stopped:
            train("stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    run = whole.parent / "stopped"
    assert torch.load(run / LAST, weights_only=True)["batch_in_epoch"] == 4
    train("stopped", words=["-c", "auto"])
    assert states_differ(whole / LAST, run / LAST) == []
    assert (whole / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_a_run_stopped_in_validation_trains_no_batch_twice(train, monkeypatch):
    """The epoch's training is done; only its validation is made again."""
    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(script_module, "evaluate", lambda *values: None)
        with pytest.raises(SystemExit):
            train("stopped")
    train("stopped", words=["-c", "auto"])
    assert states_differ(whole / LAST, whole.parent / "stopped" / LAST) == []


def test_a_run_goes_on_from_an_epochs_file_in_a_new_folder(train):
    """-c PATH with -n NAME branches off; the old run stays as it is."""
    run = train("whole", "SAVE_EVERY_EPOCHS=1")
    before = (run / LAST).read_bytes()
    branch = train("branch", words=["-c", run / "longitudinal_mim_epoch_1.pt"])
    assert (run / LAST).read_bytes() == before
    assert states_differ(run / LAST, branch / LAST) == []


def test_a_finished_run_goes_on_for_more_epochs_and_by_new_rates(train, capsys):
    """What was changed is named, and the schedule is the longer run's from that step on."""
    train("longer", "LONGITUDINAL_MIM_EPOCHS=1")
    run = train("longer", "LONGITUDINAL_MIM_EPOCHS=3", "MAX_LR=1e-4", words=["-c", "auto"])
    assert "Changed since the checkpoint: MAX_LR: 0.0006 -> 0.0001" in capsys.readouterr().out
    whole = train("whole", "LONGITUDINAL_MIM_EPOCHS=3", "MAX_LR=1e-4")
    histories = [torch.load(path / LAST, weights_only=True)["history"] for path in (run, whole)]
    assert [row["train/lr"] for row in histories[0][1:]] == [row["train/lr"] for row in histories[1][1:]]


def test_a_run_resumed_with_larger_batches_ends_with_its_schedule(train):
    """Its steps are others, so the schedule goes on at the same share of the training."""
    settings = ["SCHEDULE=cosine", "FINAL_LR=1e-6"]
    run = train("run", *settings, "LONGITUDINAL_MIM_EPOCHS=1", "UPDATE_EVERY_BATCHES=1")
    train("run", *settings, "LONGITUDINAL_MIM_EPOCHS=2", "UPDATE_EVERY_BATCHES=3", words=["-c", "auto"])
    last = torch.load(run / LAST, weights_only=True)["history"][-1]
    assert last["train/lr"] == pytest.approx(1e-6, rel=1e-3)


def test_a_run_is_never_overwritten_and_a_finished_one_stays(train):
    """Starting again under the same name needs -c auto, which then has nothing left to do."""
    run = train("once", "LONGITUDINAL_MIM_EPOCHS=1")
    before = (run / LAST).read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train("once")
    train("once", "LONGITUDINAL_MIM_EPOCHS=1", words=["-c", "auto"])
    assert (run / LAST).read_bytes() == before


def test_init_starts_from_the_weights_of_another_run(train, capsys):
    """All weights match, and the first loss is another than from random weights."""
    run = train("first", "LONGITUDINAL_MIM_EPOCHS=1")
    other = train("second", "LONGITUDINAL_MIM_EPOCHS=1", words=["--init", run / LAST])
    assert " weights of the backbone matched, 0 not" in capsys.readouterr().out
    losses = [torch.load(path / LAST, weights_only=True)["history"][0]["train/loss"] for path in (run, other)]
    assert losses[0] != losses[1]


def test_fast_dev_run_is_one_batch_of_each(train, capsys):
    """A quick check of a setting touches every part once."""
    run = train("quick", words=["--fast-dev-run"])
    checkpoint = torch.load(run / LAST, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 1)


def test_top_epochs_and_every_nth_are_kept(train):
    """KEEP_TOP_K and SAVE_EVERY_EPOCHS decide which epoch files stay."""
    run = train("kept", "LONGITUDINAL_MIM_EPOCHS=4", "SAVE_EVERY_EPOCHS=3", "KEEP_TOP_K=1")
    history = torch.load(run / LAST, weights_only=True)["history"]
    best = min(history, key=lambda row: row["val/loss"])["epoch"]
    kept = {path.name for path in run.glob("longitudinal_mim_epoch_*.pt")}
    assert kept == {f"longitudinal_mim_epoch_{epoch}.pt" for epoch in {best, 3}}
    assert torch.load(run / "longitudinal_mim_best.pt", weights_only=True)["epoch"] == best


OPTIONS = [
    "PRECISION=bf16", "PRECISION=fp16", "USE_EMA=False", "OPTIMIZER=sgd", "OPTIMIZER=adam", "SCHEDULE=cosine",
    "SCHEDULE=step", "SCHEDULE=cosine_restarts", "GRAD_CLIP_NORM=0.01", "SEED=1", "MASK_PROB_LOW=1.0",
    "ANTISYMMETRIC=True", "DROPOUT=0.5", "NO_DECAY_NORM_BIAS=False", "EMA_WARMUP=False", "EMA_DECAY=0.05",
    "WEIGHT_DECAY=0.0", "MAX_LR=1e-4", "AUG_FLIP=0.0", "AUG_EXPOSURE=0.0", "ONECYCLE_PCT_START=0.5",
    "UPDATE_EVERY_BATCHES=2", "DECODER_CHANNELS=[64, 48, 32, 24, 16]"]


def test_each_option_changes_the_run_and_the_run_ends(train, monkeypatch):
    """None crashes, and none leaves the numbers of the default run as they were."""
    monkeypatch.setattr(script_module, "write_history", lambda *values: None)      # pictures take their time
    common = ["LONGITUDINAL_MIM_EPOCHS=1", "BATCH_SIZE=4", "UPDATE_EVERY_BATCHES=1", "WEIGHT_DECAY=0.5",
              "MAX_LR=1e-3", "MASK_PROB_LOW=0.5"]
    plain = torch.load(train("plain", *common) / LAST, weights_only=True)["history"]
    without_effect = []
    for number, option in enumerate(OPTIONS):
        history = torch.load(train(f"run{number}", *common, option) / LAST, weights_only=True)["history"]
        if history[0]["val/loss"] == plain[0]["val/loss"]:
            without_effect.append(option)
    assert without_effect == []


def test_compile_is_asked_for(train, monkeypatch):
    """COMPILE=True compiles the network in place (the compiler itself is too slow for a test)."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    train("compiled", "COMPILE=True", words=["--fast-dev-run"])
    assert len(compiled) == 1


def test_gan_state_is_saved_and_resumed(train):
    """The discriminator begins at its epoch, has its own optimizer, and comes back bitwise."""
    settings = ["USE_GAN=True", "GAN_START_EPOCH=2"]
    whole = train("whole", *settings, "SAVE_EVERY_EPOCHS=1")
    with open(whole / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["train/GAN"] == ""
    assert float(rows[1]["train/GAN"]) > 0 and float(rows[1]["train/Discriminator"]) > 0
    branch = train("branch", *settings, words=["-c", whole / "longitudinal_mim_epoch_1.pt"])
    assert states_differ(whole / LAST, branch / LAST) == []
    slower = train("slower", *settings, "GAN_LR=1e-5", words=["-c", whole / "longitudinal_mim_epoch_1.pt"])
    gan_state = torch.load(slower / LAST, weights_only=True)["gan_state_dict"]
    assert {group["lr"] for group in gan_state["optimizer"]["param_groups"]} == {1e-5}


def test_a_run_goes_on_with_a_discriminator_and_a_precision_that_it_began_without(train, capsys):
    """Both begin where nothing of theirs was saved; what has changed is told."""
    run = train("run", "LONGITUDINAL_MIM_EPOCHS=1")
    train("run", "USE_GAN=True", "GAN_START_EPOCH=2", "PRECISION=fp16", words=["-c", "auto"])
    checkpoint = torch.load(run / LAST, weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["gan_state_dict"] is not None
    assert checkpoint["history"][1]["train/Discriminator"] > 0
    assert "Changed since the checkpoint: USE_GAN: False -> True" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_and_one_process_goes_on(strategy, train):
    """Generator and discriminator, as under torchrun; their checkpoint is nobody's in particular."""
    gan = ["USE_GAN=True", "GAN_START_EPOCH=1"]
    printed = two_ranks(lambda: train("shared", *gan, f"STRATEGY={strategy}", "LONGITUDINAL_MIM_EPOCHS=1"))
    assert printed.count("Epoch 1 Complete") == 1
    run = train("shared", *gan, words=["-c", "auto"])
    checkpoint = torch.load(run / LAST, weights_only=True)
    params = json.loads((run / "training_params.json").read_text())
    assert checkpoint["epoch"] == 2 and params["world_size"] == 1
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in checkpoint["model_state_dict"])


@pytest.fixture
def constants():
    """constants.py, given back unchanged."""
    before = {name: value for name, value in vars(C).items() if name.isupper()}
    yield C
    vars(C).update(before)


@pytest.mark.parametrize("flag, weight, term", [
    ("USE_L1", "LAMBDA_L1_ALL", "L1"), ("USE_L1", "LAMBDA_L1_MASKED", "L1_masked"), ("USE_L2", "LAMBDA_L2",
    "L2"), ("USE_SSIM", "LAMBDA_SSIM", "SSIM"), ("USE_PERC_STYLE", "LAMBDA_P", "Perceptual"),
    ("USE_PERC_STYLE", "LAMBDA_S", "Style"), ("USE_FOURIER", "LAMBDA_FOURIER", "Fourier"),
    ("USE_DICE", "LAMBDA_DICE", "Dice")])
def test_each_loss_flag_adds_its_term_and_its_weight_scales_it(flag, weight, term, constants):
    """A flag that does nothing, or a weight that is not used, fails here."""
    generator = torch.Generator().manual_seed(0)
    pred, diff = (torch.rand(2, 1, 32, 32, generator=generator) - 0.5 for _ in range(2))
    batch = {"diff": diff, "mask": torch.rand(2, 2, 32, 32, generator=generator) > 0.8}

    def vgg(pred, target):
        return (pred - target).abs().mean(), ((pred - target) ** 2).mean()

    setattr(constants, flag, False)
    assert term not in script_module.loss_terms(pred, batch, vgg)
    setattr(constants, flag, True)
    first = script_module.loss_terms(pred, batch, vgg)[term]
    setattr(constants, weight, 2 * getattr(constants, weight))
    assert first > 0
    torch.testing.assert_close(script_module.loss_terms(pred, batch, vgg)[term], 2 * first)


def test_changed_pixels_weigh_more_when_asked(constants):
    """USE_CHANGE_WEIGHT and CHANGE_WEIGHT act on L1 and L2: an answer of zero costs more."""
    diff = torch.zeros(1, 1, 32, 32)
    diff[..., :4] = 0.5
    losses = []
    for constants.USE_CHANGE_WEIGHT, constants.CHANGE_WEIGHT in [(False, 10.0), (True, 5.0), (True, 20.0)]:
        terms = script_module.loss_terms(torch.zeros_like(diff), {"diff": diff}, None)
        losses.append((terms["L1"], terms["L2"]))
    assert losses[0] < losses[1] < losses[2]


def test_training_and_validation_share_no_patient(constants, pairs):
    """The promise that every held-out figure rests on."""
    constants.TEST_FRACTION = 0.2
    constants.NUM_WORKERS = 0
    loaders = script_module.build_data(pairs, fast_dev_run=False)[:2]
    train_set, val_set = (loader.dataset for loader in loaders)
    assert len(train_set) + len(val_set) < len(find_cases(pairs))
    assert not {case.name[:3] for case in train_set.cases} & {case.name[:3] for case in val_set.cases}
