"""Photographs from folders to figures, with the scripts as a user runs them."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from forks import two_ranks
from test_scripts import states_differ

import train_finetune
import train_pretrain
from models.photo import build_photo_model

SCRIPTS = {"simclr": train_pretrain, "hvit": train_finetune}


def history(run, kind):
    """The epochs of a run."""
    return torch.load(run / f"{kind}_last.pt", weights_only=True)["history"]


def rows_of(path):
    """The rows of a CSV file."""
    with open(path) as file:
        return list(csv.DictReader(file))


def test_photographs_become_figures(script, photos, train_photo, tmp_path, capsys):
    """The commands of README one after the other; all that evaluate.py promises is written."""
    backbone = train_photo("simclr", "backbone")
    run = train_photo("hvit", "classes", words=["--init", backbone / "simclr_best.pt"])
    printed = capsys.readouterr().out
    assert " weights of the backbone matched, 2 not: head.weight, head.bias" in printed
    assert "33 photographs in 30 groups" in printed
    script("evaluate", "--checkpoint", run / "hvit_best.pt", "--data", photos, "--split", "test",
           "--output", tmp_path / "out", "--bootstrap", 50, "--tta")
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    tested = {row["path"]: row["label"] for row in rows_of(run / "splits.csv") if row["split"] == "test"}
    assert {row["photograph"]: row["true class"] for row in rows} == tested
    assert f"{len(tested)} photographs (test), {len(tested)} with labels" in printed
    for row in rows:
        shares = [float(row[f"predicted {name}"]) for name in ("blue", "green", "red")]
        assert sum(shares) == pytest.approx(1, abs=2e-4)
        assert row["predicted class"] == ("blue", "green", "red")[int(np.argmax(shares))]
    figures = {row["figure"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    right = sum(row["predicted class"] == row["true class"] for row in rows) / len(rows)
    low, value, high = (float(figures["accuracy"][key]) for key in ("low", "value", "high"))
    assert low <= value <= high and value == pytest.approx(right)
    assert {"f1", "f1/blue", "recall/green", "ece"} <= figures.keys()
    assert "support" in (tmp_path / "out" / "classes.txt").read_text()
    for name in ("confusion", "calibration", "roc", *(["mistakes"] if right < 1 else [])):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


@pytest.fixture
def no_curves(monkeypatch):
    """Training without its two pictures of curves, which take most of the time of such a small run."""
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "write_history", lambda *values: None)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_leaves_everything_that_is_promised(kind, train_photo):
    """Checkpoints, the splits, the record, the table, both curves, sample pictures, the guide's names."""
    run = train_photo(kind, "whole", "SAVE_EVERY_EPOCHS=1", "TRACKERS=['tensorboard']")
    names = {path.name for path in run.iterdir()}
    assert names >= {f"{kind}_last.pt", f"{kind}_best.pt", f"{kind}_epoch_1.pt", f"{kind}_epoch_2.pt", "tb",
                     "splits.csv", "training_params.json", "metrics.csv", "loss_curves.png",
                     "detailed_loss_curves.png"}
    assert {path.name for path in (run / "samples").iterdir()} == {"epoch_1.png", "epoch_2.png"}
    checkpoint = torch.load(run / f"{kind}_last.pt", weights_only=True)
    assert checkpoint["kind"] == kind and checkpoint["epoch"] == 2
    params = json.loads((run / "training_params.json").read_text())
    assert params["total_steps"] == checkpoint["step"] and params["effective_batch"] == 8
    assert set(checkpoint["history"][0]) >= {
        "simclr": {"train/loss", "train/agreement", "val/loss", "val/probe_accuracy", "val/probe_knn",
                   "val/feature_effective_rank"},
        "hvit": {"train/loss", "val/loss", "val/accuracy", "val/f1_macro"}}[kind]
    if kind == "hvit":
        events = next((run / "tb").iterdir()).read_bytes()
        assert all(name in events for name in (b"train/loss", b"train/lr", b"val/accuracy", b"val/f1_macro"))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(kind, no_curves, train_photo, monkeypatch):
    """Stopped by a real SIGTERM after the second step, then resumed: every tensor and number is equal."""
    whole, steps = train_photo(kind, "whole"), []

    def stop_at_second_step(*values):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SCRIPTS[kind], "check_finite", stop_at_second_step)
        with pytest.raises(SystemExit):
            train_photo(kind, "stopped")
    run = whole.parent / "stopped"
    stopped = torch.load(run / f"{kind}_last.pt", weights_only=True)
    assert stopped["epoch"] == 1 and 0 < stopped["batch_in_epoch"] < stopped["num_batches"] + 1
    train_photo(kind, "stopped", words=["-c", "auto"])
    assert states_differ(whole / f"{kind}_last.pt", run / f"{kind}_last.pt") == []


def test_copies_of_a_photograph_are_never_in_two_splits(no_curves, train_photo):
    """A copy in the test set is known by heart; the name and the look join it with its original."""
    run = train_photo("hvit", "run", words=["--fast-dev-run"])
    split = {row["path"]: row["split"] for row in rows_of(run / "splits.csv")}
    assert set(split.values()) == {"train", "val", "test"}
    assert all(split[f"{word}/{word}_(0).jpg"] == split[f"{word}/{word}_(0)_aug1.jpg"]
               for word in ("blue", "green", "red"))


def test_a_resumed_run_and_its_branch_keep_their_splits(no_curves, train_photo):
    """Whatever SEED and fractions say by then: else it would be validated on what it was trained on."""
    run = train_photo("hvit", "run", "HVIT_EPOCHS=1")
    before = (run / "splits.csv").read_text()
    others = ["SEED=5", "HVIT_VAL_FRACTION=0.4"]
    train_photo("hvit", "run", *others, words=["-c", "auto"])
    branch = train_photo("hvit", "branch", *others, words=["-c", run / "hvit_last.pt"])
    assert (run / "splits.csv").read_text() == before
    assert sorted((row["path"], row["split"]) for row in rows_of(branch / "splits.csv")) == sorted(
        (row["path"], row["split"]) for row in rows_of(run / "splits.csv"))
    fresh = train_photo("hvit", "fresh", *others, words=["--fast-dev-run"])
    assert (fresh / "splits.csv").read_text() != before
    given = train_photo("hvit", "given", *others, f"HVIT_SPLIT_CSV={run / 'splits.csv'}",
                        words=["--fast-dev-run"])
    assert [row["split"] for row in rows_of(given / "splits.csv")] == [
        row["split"] for row in rows_of(run / "splits.csv")]


def test_classes_that_can_be_seen_are_learnt(no_curves, train_photo):
    """Images, labels and logits stay together on their way."""
    run = train_photo("hvit", "learnt", "HVIT_EPOCHS=12", "SAMPLES_PER_EPOCH=0", "HVIT_LR=3e-3",
                      "HVIT_UPDATE_EVERY_BATCHES=1", "HVIT_SEVERITY=light", "HVIT_MIXUP_PROB=0.0",
                      "HVIT_CUTMIX_PROB=0.0", "HVIT_PATIENCE=0", "USE_EMA=False",
                      "HVIT_LABEL_SMOOTHING=0.0", "HVIT_DROP_PATH=0.0")
    assert max(row["val/accuracy"] for row in history(run, "hvit")) >= 0.85


def test_the_network_starts_from_the_pretrained_one(no_curves, train_photo, capsys):
    """All weights but the head's; and with frozen epochs they stay while the head moves."""
    backbone = train_photo("simclr", "backbone")
    run = train_photo("hvit", "frozen", "HVIT_FREEZE_EPOCHS=2", words=["--init", backbone / "simclr_last.pt"])
    state = torch.load(backbone / "simclr_last.pt", weights_only=True)["model_state_dict"]
    checkpoint = torch.load(run / "hvit_last.pt", weights_only=True)
    trained = checkpoint["model_state_dict"]
    for name, value in trained.items():
        if not name.startswith("head."):
            assert torch.equal(value, state[f"backbone.{name}"]), name
    freed = train_photo("hvit", "freed", "HVIT_FREEZE_EPOCHS=1",
                        words=["--init", backbone / "simclr_last.pt"])
    after = torch.load(freed / "hvit_last.pt", weights_only=True)["model_state_dict"]
    assert not torch.equal(after["stages.0.blocks.0.qkv.weight"], trained["stages.0.blocks.0.qkv.weight"])
    capsys.readouterr()
    train_photo("hvit", "random", words=["--fast-dev-run"])
    assert "No --init: the network starts from random weights" in capsys.readouterr().out
    train_photo("simclr", "second", words=["--fast-dev-run", "--init", backbone / "simclr_last.pt"])
    assert " weights of the backbone matched, 0 not\n" in capsys.readouterr().out


def test_parts_nearer_to_the_input_learn_more_slowly(no_curves, train_photo):
    """HVIT_LAYER_DECAY: the rate falls by it with each of six parts from the head down."""
    run = train_photo("hvit", "decay", "HVIT_LAYER_DECAY=0.5", words=["--fast-dev-run"])
    groups = torch.load(run / "hvit_last.pt", weights_only=True)["optimizer_state_dict"]["param_groups"]
    rate = {name: group["initial_lr"] for group in groups for name in group["params"]}
    assert rate["head.weight"] == 1e-4 and rate["norm.weight"] == 5e-5
    assert rate["stages.0.blocks.0.qkv.weight"] == pytest.approx(1e-4 / 16)
    assert rate["position"] == pytest.approx(1e-4 / 32)
    free = {name for group in groups if group["weight_decay"] == 0 for name in group["params"]}
    assert {"position", "head.bias", "norm.weight"} <= free and "head.weight" not in free


def test_a_run_that_gets_no_better_ends_early(no_curves, train_photo, capsys):
    """HVIT_PATIENCE counts epochs since the best one."""
    run = train_photo("hvit", "stale", "HVIT_EPOCHS=9", "HVIT_PATIENCE=2", "HVIT_LR=1e-12", "USE_EMA=False",
                      "HVIT_MONITOR=val/accuracy")
    assert len(history(run, "hvit")) == 3
    assert "No better val/accuracy in 2 validations: the run ends" in capsys.readouterr().out


def test_torchvisions_networks_take_the_same_way(no_curves, train_photo, script, photos, tmp_path, capsys):
    """From their weights' file to figures; in frozen epochs they stay, and --init counts, too."""
    torch.manual_seed(0)
    source = build_photo_model("efficientnet_b0", 5).network
    torch.save({**source.state_dict(), "classifier.1.weight": torch.zeros(5, 1280)}, tmp_path / "b0.pth")
    run = train_photo("hvit", "b0", "HVIT_MODEL=efficientnet_b0", "HVIT_FREEZE_EPOCHS=1", "USE_EMA=False",
                      f"HVIT_WEIGHTS={tmp_path / 'b0.pth'}", words=["--fast-dev-run"])
    state = torch.load(run / "hvit_best.pt", weights_only=True)["model_state_dict"]
    assert torch.equal(state["network.features.0.0.weight"], source.features[0][0].weight)
    script("evaluate", "--checkpoint", run / "hvit_best.pt", "--data", photos, "--output", tmp_path / "out",
           "--bootstrap", 10)
    assert (tmp_path / "out" / "predictions.csv").exists()
    assert "--init" not in capsys.readouterr().out
    train_photo("hvit", "on", "HVIT_MODEL=efficientnet_b0", f"HVIT_WEIGHTS={tmp_path / 'b0.pth'}",
                words=["--fast-dev-run", "--init", run / "hvit_best.pt"])
    assert "weights of the backbone matched" in capsys.readouterr().out


OPTIONS = {
    "simclr": ["SEED=1", "PRECISION=bf16", "SIMCLR_LR=1e-3", "SIMCLR_WEIGHT_DECAY=0.5",
               "SIMCLR_TEMPERATURE=0.5", "SIMCLR_SCHEDULE=step", "SIMCLR_WARMUP_STEPS=0.6",
               "SIMCLR_FINAL_LR=2e-4",
               "SIMCLR_PROJECTION_DIM=16", "SIMCLR_CROP_SCALE=[0.9, 1.0]", "SIMCLR_FLIP=0.0",
               "SIMCLR_JITTER=0.0", "SIMCLR_BRIGHTNESS=0.0", "SIMCLR_CONTRAST=0.0", "SIMCLR_SATURATION=0.0",
               "SIMCLR_HUE=0.0", "SIMCLR_GRAYSCALE=1.0", "SIMCLR_BLUR=0.0", "SIMCLR_BLUR_SIGMA=[2.0, 3.0]",
               "HVIT_DROP_PATH=0.4", "HVIT_FIT=squash", "HVIT_IMG_SIZE=48", "HVIT_MODEL=efficientnet_b0",
               "HVIT_VAL_FRACTION=0.3"],
    "hvit": ["SEED=1", "PRECISION=bf16", "HVIT_LR=1e-3", "HVIT_LAYER_DECAY=0.5", "HVIT_FREEZE_EPOCHS=1",
             "HVIT_WEIGHT_DECAY=0.9", "HVIT_SCHEDULE=step", "HVIT_WARMUP_STEPS=0.6", "HVIT_FINAL_LR=5e-5",
             "HVIT_LOSS=ce", "HVIT_LOSS=focal", "HVIT_FOCAL_GAMMA=0.5", "HVIT_LABEL_SMOOTHING=0.3",
             "HVIT_BALANCE=sampler", "HVIT_SEVERITY=light", "HVIT_SEVERITY=aggressive", "HVIT_MIXUP_PROB=0.6",
             "HVIT_MIXUP_ALPHA=3.0", "HVIT_CUTMIX_PROB=0.0", "HVIT_CUTMIX_ALPHA=9.0", "HVIT_DROP_PATH=0.4",
             "USE_EMA=False", "HVIT_FIT=squash", "HVIT_IMG_SIZE=48", "HVIT_VAL_FRACTION=0.3"]}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_option_changes_the_run_and_the_run_ends(kind, train_photo, no_curves):
    """None crashes, and none leaves the numbers of the default run as they were."""
    common = [f"{kind.upper()}_EPOCHS=1", f"{kind.upper()}_UPDATE_EVERY_BATCHES=1", "SAMPLES_PER_EPOCH=0",
              "SIMCLR_PROBE_EVERY=0", "HVIT_MIXUP_PROB=0.5", "HVIT_DROP_PATH=0.1"]
    plain, without_effect = history(train_photo(kind, "plain", *common), kind)[0], []
    for number, option in enumerate(OPTIONS[kind]):
        row = history(train_photo(kind, f"run{number}", *common, option), kind)[0]
        if (row["val/loss"], row["train/loss"]) == (plain["val/loss"], plain["train/loss"]):
            without_effect.append(option)
    assert without_effect == []


def test_what_saves_time_or_memory_changes_nothing(no_curves, train_photo):
    """HVIT_CACHE_RATE, the workers and recomputed activations leave the numbers as they are."""
    plain = history(train_photo("hvit", "plain"), "hvit")
    for option in ("HVIT_CACHE_RATE=1.0", "NUM_WORKERS=1", "ACTIVATION_CHECKPOINTING=True"):
        other = history(train_photo("hvit", option.split("=")[0], option), "hvit")
        assert other[-1]["val/loss"] == pytest.approx(plain[-1]["val/loss"], rel=1e-5), option


def test_rare_classes_are_weighted_or_drawn_more_often(no_curves, train_photo, photos, tmp_path):
    """HVIT_BALANCE: by n / (C x count); with equal counts it would do nothing."""
    shutil.copytree(photos, tmp_path / "data")
    for number in range(4, 10):
        (tmp_path / "data" / "red" / f"red_({number}).jpg").unlink()
    words = ["--data", tmp_path / "data"]
    runs = [train_photo("hvit", word, f"HVIT_BALANCE={word}", "HVIT_EPOCHS=1", "SAMPLES_PER_EPOCH=0",
                        words=words) for word in ("none", "weights", "sampler")]
    losses = [history(run, "hvit")[0]["train/loss"] for run in runs]
    assert len(set(losses)) == 3


def test_spectral_bands_are_read_and_used(no_curves, train_photo, script, photos, tmp_path):
    """HVIT_SPECTRAL_CHANNELS and HVIT_DFCA from files to figures; other numbers of bands are refused."""
    shutil.copytree(photos, tmp_path / "data")
    for number, path in enumerate(sorted((tmp_path / "data").rglob("*.jpg"))):
        np.save(path.with_name(f"{path.stem}_spectral.npy"), np.full((5, 40, 44), number / 40, np.float32))
    words = ["--data", tmp_path / "data", "--fast-dev-run"]
    losses = []
    bands, dfca = "HVIT_SPECTRAL_CHANNELS=5", "HVIT_DFCA=True"
    for name, options in (("colour", []), ("added", [bands]), ("fused", [bands, dfca]),
                          ("heads", [bands, dfca, "HVIT_DFCA_HEADS=4"]),
                          ("dropout", [bands, dfca, "HVIT_DFCA_DROPOUT=0.5"])):
        losses.append(history(train_photo("hvit", name, *options, words=words), "hvit")[0]["train/loss"])
    assert len(set(losses)) == 5
    pretrained = train_photo("simclr", "pretrained", words=["--data", photos, "--fast-dev-run"])
    train_photo("hvit", "started", bands, dfca, words=[*words, "--init", pretrained / "simclr_last.pt"])
    script("evaluate", "--checkpoint", tmp_path / "runs" / "fused" / "hvit_best.pt", "--data",
           tmp_path / "data", "--output", tmp_path / "out", "--bootstrap", 10, "--tta", 8)
    assert (tmp_path / "out" / "predictions.csv").exists()


def test_pretraining_needs_no_classes(no_curves, train_photo, photos, tmp_path):
    """A flat folder: no probe, and the best checkpoint is that of the lowest loss."""
    (tmp_path / "flat").mkdir()
    for path in photos.rglob("*.jpg"):
        shutil.copy(path, tmp_path / "flat")
    run = train_photo("simclr", "flat", words=["--data", tmp_path / "flat"])
    rows = history(run, "simclr")
    assert "val/probe_accuracy" not in rows[0]
    best = torch.load(run / "simclr_best.pt", weights_only=True)["best"]
    assert best == min(row["val/loss"] for row in rows)


def test_the_best_pretrained_network_is_that_of_the_best_probe(no_curves, train_photo):
    """The guide's probe_accuracy decides where there are classes: the loss may fall while features rot."""
    run = train_photo("simclr", "run", "SIMCLR_EPOCHS=3")
    best = torch.load(run / "simclr_best.pt", weights_only=True)
    assert best["best"] == max(row["val/probe_accuracy"] for row in history(run, "simclr"))


@pytest.mark.parametrize("kind, strategy", [("simclr", "ddp"), ("hvit", "fsdp")])
def test_two_ranks_train_and_one_process_goes_on(kind, strategy, train_photo):
    """The scripts as under torchrun; the checkpoint is nobody's in particular."""
    settings = [f"STRATEGY={strategy}", f"{kind.upper()}_EPOCHS=1", "HVIT_FREEZE_EPOCHS=1"]
    printed = two_ranks(lambda: train_photo(kind, "shared", *settings))
    assert printed.count("Epoch 1 Complete") == 1
    run = train_photo(kind, "shared", words=["-c", "auto"])
    assert torch.load(run / f"{kind}_last.pt", weights_only=True)["epoch"] == 2
