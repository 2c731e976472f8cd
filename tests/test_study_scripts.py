"""Brain studies from raw files to figures, with the scripts as a user runs them."""

import csv
import json
import os
import signal

import nibabel
import numpy as np
import pytest
import torch
from forks import two_ranks
from test_scripts import states_differ

import builders
import train_finetune
import train_pretrain
from utils.config import UserError

SCRIPTS = {"jepa": train_pretrain, "mil": train_finetune}


def history(run, kind):
    """The epochs of a run."""
    return torch.load(run / f"{kind}_last.pt", weights_only=True)["history"]


def test_raw_studies_become_figures(script, studies, train_study, tmp_path, capsys):
    """The commands of README one after the other; maps lie in the space of the raw files."""
    script("prepare_data", "cache", "--data", studies / "raw", "--output", tmp_path / "cache", "--workers", 0)
    assert "10 studies: 16 series cached, 0 kept, 0 removed" in capsys.readouterr().out
    backbone = train_study("jepa", "backbone", words=["--data", tmp_path / "cache"])
    run = train_study("mil", "findings", words=["--init", backbone / "jepa_best.pt"])
    script("evaluate", "--checkpoint", run / "mil_best.pt", "--data", tmp_path / "cache", "--split", "all",
           "--output", tmp_path / "out", "--bootstrap", 50, "--attention", 10)
    printed = capsys.readouterr().out
    assert "10 studies (all), 10 with labels" in printed and "auroc/ball" in printed
    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["study"] for row in rows] == [f"s{number}" for number in range(10)]
    assert [row["true ball"] for row in rows] == ["0", "1"] * 5
    assert all(0 <= float(row["predicted ct"]) <= 1 for row in rows)
    with open(tmp_path / "out" / "metrics.csv") as file:
        figures = {row["figure"]: row for row in csv.DictReader(file)}
    low, value, high = (float(figures["auroc"][key]) for key in ("low", "value", "high"))
    assert low <= value <= high
    assert (tmp_path / "out" / "roc.png").stat().st_size > 5000
    for study, series in (("s0", "ct"), ("s1", "t1"), ("s1", "t2")):
        for label in ("ball", "ct"):
            image = nibabel.load(tmp_path / "out" / "attention" / study / f"{series}_{label}.nii.gz")
            source = nibabel.load(studies / "raw" / study / f"{series}.nii.gz")
            assert image.shape == source.shape and np.allclose(image.affine, source.affine)
            assert image.get_fdata().max() > 0
            assert (tmp_path / "out" / "attention" / study / f"{series}_{label}.png").exists()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_leaves_everything_that_is_promised(kind, train_study):
    """Checkpoints, the record, the table, both curves, sample pictures."""
    run = train_study(kind, "whole", "SAVE_EVERY_EPOCHS=1", "TRACKERS=['tensorboard']", "JEPA_PROBE_EVERY=1")
    names = {path.name for path in run.iterdir()}
    assert names >= {f"{kind}_last.pt", f"{kind}_best.pt", f"{kind}_epoch_1.pt", f"{kind}_epoch_2.pt", "tb",
                     "training_params.json", "metrics.csv", "loss_curves.png", "detailed_loss_curves.png"}
    assert {path.name for path in (run / "samples").iterdir()} == {"epoch_1.png", "epoch_2.png"}
    checkpoint = torch.load(run / f"{kind}_last.pt", weights_only=True)
    assert checkpoint["kind"] == kind and checkpoint["epoch"] == 2
    averaged = "teacher_state_dict" if kind == "jepa" else "ema_state_dict"
    assert set(checkpoint) >= {
        "model_state_dict", averaged, "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict",
        "epoch", "step", "batch_in_epoch", "train_loss", "val_loss", "best", "history", "rng_state",
        "constants", "format_version"}
    params = json.loads((run / "training_params.json").read_text())
    assert params["total_steps"] == checkpoint["step"] and params["parameters"] > 0
    columns = set(checkpoint["history"][0])
    assert columns >= {"train/loss", "val/loss", "train/lr"}
    assert columns >= {"jepa": {"train/target_share", "train/context_share", "val/teacher_std",
                                "val/teacher_effective_rank", "val/probe_auroc", "val/probe_knn"},
                       "mil": {"val/auroc", "val/auroc/ball", "val/f1", "val/balanced_accuracy"}}[kind]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(kind, train_study, monkeypatch):
    """Stopped by a real SIGTERM after the second step, then resumed: every tensor and number is equal."""
    whole, steps = train_study(kind, "whole", f"{kind.upper()}_UPDATE_EVERY_BATCHES=1"), []

    def stop_at_second_step(*values):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SCRIPTS[kind], "check_finite", stop_at_second_step)
        with pytest.raises(SystemExit):
            train_study(kind, "stopped", f"{kind.upper()}_UPDATE_EVERY_BATCHES=1")
    run = whole.parent / "stopped"
    assert torch.load(run / f"{kind}_last.pt", weights_only=True)["batch_in_epoch"] == 2
    train_study(kind, "stopped", f"{kind.upper()}_UPDATE_EVERY_BATCHES=1", words=["-c", "auto"])
    assert states_differ(whole / f"{kind}_last.pt", run / f"{kind}_last.pt") == []


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_that_has_begun_more_epochs_than_are_asked_for_is_done(kind, train_study, tmp_path, monkeypatch,
                                                                     capsys):
    """Stopped inside the second, resumed for one: a schedule of one cycle takes no step beyond its end."""
    settings = [f"{kind.upper()}_UPDATE_EVERY_BATCHES=1", f"{kind.upper()}_SCHEDULE=onecycle"]

    def stop_in_the_second(*values):
        if (tmp_path / "runs" / "run" / "metrics.csv").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SCRIPTS[kind], "check_finite", stop_in_the_second)
        with pytest.raises(SystemExit):
            train_study(kind, "run", *settings)
    train_study(kind, "run", *settings, f"{kind.upper()}_EPOCHS=1", words=["-c", "auto"])
    assert "All epochs were done before" in capsys.readouterr().out


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_table_of_patients_decides_who_stays_together(kind, train_study, tmp_path):
    """Ten studies of one patient cannot be divided."""
    table = tmp_path / "patients.csv"
    table.write_text("study_id,patient\n" + "".join(f"s{number},p\n" for number in range(10)))
    with pytest.raises(UserError, match="10 studies of 1 patients cannot fill"):
        train_study(kind, "run", f"STUDY_PATIENTS={table}")


def test_a_finding_that_can_be_seen_is_learnt(train_study):
    """Labels, studies and logits stay together on their way: the scanner is told from the images alone."""
    run = train_study("mil", "learnt", "MIL_EPOCHS=20", "MIL_LR=1e-2", "MIL_FREEZE_BACKBONE=False",
                      "MIL_UPDATE_EVERY_BATCHES=1", "USE_EMA=False", "STUDY_TEST_FRACTION=0.0")
    last = history(run, "mil")[-1]
    assert last["val/auroc"] == 1.0 and last["train/loss"] < 0.7 * history(run, "mil")[0]["train/loss"]


def test_the_schedule_ends_with_the_training_when_batches_are_whole_studies(train_study):
    """The original counted images: its schedule and its teacher's momentum ended elsewhere."""
    run = train_study("jepa", "whole", "JEPA_STUDY_SAMPLER=True", "JEPA_EPOCHS=3", "JEPA_IPE_SCALE=1.0",
                      "JEPA_FINAL_LR=1e-6")
    assert history(run, "jepa")[-1]["train/lr"] == pytest.approx(1e-6, rel=1e-3)


def test_the_backbone_is_the_pretrained_one_and_stays_it_while_frozen(train_study, capsys):
    """Teacher weights reach the classifier whole, and training moves the pooler alone."""
    backbone = train_study("jepa", "backbone", labels=False)
    run = train_study("mil", "frozen", words=["--init", backbone / "jepa_best.pt", "-c", "auto"])
    assert " weights of the backbone matched, 0 not" in capsys.readouterr().out
    teacher = torch.load(backbone / "jepa_best.pt", weights_only=True)["teacher_state_dict"]
    trained = torch.load(run / "mil_last.pt", weights_only=True)["model_state_dict"]
    assert all(torch.equal(trained[f"encoder.{name}"], value) for name, value in teacher.items())
    assert "the network starts from random weights" not in capsys.readouterr().out
    moved = []
    for scale in (0.1, 0.5):
        run = train_study("mil", f"free{scale}", "MIL_FREEZE_BACKBONE=False",
                          f"MIL_BACKBONE_LR_SCALE={scale}", words=["--init", backbone / "jepa_best.pt"])
        trained = torch.load(run / "mil_last.pt", weights_only=True)["model_state_dict"]
        moved.append(sum((trained[f"encoder.{name}"] - value).abs().sum()
                         for name, value in teacher.items()))
    assert 0 < moved[0] < moved[1]


def test_a_run_without_pretrained_weights_says_so(train_study, capsys):
    """A frozen random backbone is a baseline, never an accident."""
    train_study("mil", "random", words=["--fast-dev-run"])
    assert "No --init: the network starts from random weights" in capsys.readouterr().out


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_resumed_with_larger_batches_ends_with_its_schedule(kind, train_study):
    """Its steps are others, so the schedule goes on at the same share of the training."""
    settings = ["JEPA_IPE_SCALE=1.0", "JEPA_FINAL_LR=1e-6", "FINAL_LR=1e-6", f"{kind.upper()}_EPOCHS=3",
                "SAVE_EVERY_EPOCHS=1"]
    first = train_study(kind, "first", *settings, f"{kind.upper()}_UPDATE_EVERY_BATCHES=1")
    second = train_study(kind, "second", *settings, f"{kind.upper()}_UPDATE_EVERY_BATCHES=3",
                         words=["-c", first / f"{kind}_epoch_1.pt"])
    rates = [history(run, kind)[-1]["train/lr"] for run in (first, second)]
    assert rates == pytest.approx([1e-6] * 2, rel=1e-3)


def test_heads_are_never_swapped_by_resuming_with_other_labels(train_study, studies, tmp_path):
    """The same columns in another order would go on with another meaning."""
    train_study("mil", "run", "MIL_EPOCHS=1")
    rows = [line.split(",") for line in (studies / "labels.csv").read_text().splitlines()]
    (tmp_path / "swapped.csv").write_text("\n".join(f"{a},{c},{b}" for a, b, c in rows))
    with pytest.raises(UserError, match="the checkpoint is for ball, ct, the labels for ct, ball"):
        train_study("mil", "run", f"STUDY_LABELS={tmp_path / 'swapped.csv'}", labels=False,
                    words=["-c", "auto"])


def test_weights_load_by_the_guides_prefix_and_never_in_part(train_study, tmp_path, capsys):
    """--remove_prefix student_encoder. as the guide has it; another size ends the run."""
    backbone = train_study("jepa", "backbone", labels=False)
    teacher = torch.load(backbone / "jepa_best.pt", weights_only=True)["teacher_state_dict"]
    torch.save({"state_dict": {f"student_encoder.{name}": value for name, value in teacher.items()}},
               tmp_path / "foreign.pt")
    words = ["--init", tmp_path / "foreign.pt", "--remove_prefix", "student_encoder."]
    train_study("mil", "prefix", words=words)
    assert " weights of the backbone matched, 0 not" in capsys.readouterr().out
    with pytest.raises(UserError, match="0% of the model's weights"):
        train_study("mil", "without", words=words[:2])
    with pytest.raises(UserError, match="of the model's weights"):
        train_study("mil", "wider", "STUDY_VIT_DIM=64", words=words)


def test_pretraining_goes_on_with_new_data_from_student_predictor_and_teacher(train_study, capsys):
    """The second stage of a multi-stage pretraining; the schedule is its own."""
    first = train_study("jepa", "first", labels=False)
    words = ["--init", first / "jepa_last.pt"]
    second = train_study("jepa", "second", "JEPA_EPOCHS=1", words=words, labels=False)
    assert "0 not; " in capsys.readouterr().out
    assert history(second, "jepa")[0]["train/loss"] < history(first, "jepa")[0]["train/loss"]


OPTIONS = {
    "jepa": ["PRECISION=bf16", "OPTIMIZER=sgd", "JEPA_SCHEDULE=step", "JEPA_SCHEDULE=onecycle", "SEED=1",
             "JEPA_LR=1e-4", "JEPA_SCALE_LR=True", "JEPA_START_LR=0.0", "JEPA_WARMUP_STEPS=0.5",
             "JEPA_TEACHER_MOMENTUM=[0.5, 1.0]", "JEPA_IPE_SCALE=3.0", "JEPA_WEIGHT_DECAY=0.0",
             "JEPA_NO_DECAY_NORM_BIAS=True", "JEPA_RANDOM_CROP=False", "JEPA_STUDY_SAMPLER=True",
             "STUDY_REMOVE_BACKGROUND=False", "STUDY_MAX_CROP=[2, 3, 3]", "STUDY_SPATIAL_AUGMENT=False",
             "STUDY_GAMMA=0.0", "STUDY_BRIGHTNESS=0.0", "STUDY_CONTRAST=0.0", "STUDY_NOISE=0.0",
             "STUDY_WINDOW_PROBABILITIES=[0.0, 0.0, 1.0]", "STUDY_POSITION=add", "STUDY_DROPOUT=0.3",
             "STUDY_DROP_PATH=0.3", "STUDY_VIT_MLP_RATIO=2.0", "JEPA_DROP_RATE=0.5", "JEPA_ASPECT=[1.0, 1.0]",
             "JEPA_TARGET_SHARE={'mri': 0.5, 'ct': 0.5}", "JEPA_CONTEXT_CEILING={'mri': 0.1, 'ct': 0.1}",
             "JEPA_CONTEXT_RANGE=[0.1, 0.15]", "GRAD_CLIP_NORM=0.01", "NUM_CYCLES=1.0", "JEPA_FINAL_LR=2e-4"],
    "mil": ["PRECISION=bf16", "MIL_SCHEDULE=step", "SEED=1", "MIL_LR=1e-4", "MIL_WEIGHT_DECAY=0.0",
            "MIL_FREEZE_BACKBONE=False", "MIL_RANDOM_CROP=True", "MIL_PATCH_DROP=0.5", "MIL_USE_NORM=True",
            "MIL_POOLER=aggregate_then_classify", "MIL_POOLER=average", "MIL_ATTENTION_DIM=8",
            "MIL_MLP_DIMS=[]", "MIL_BALANCE=False", "MIL_CLASS_WEIGHTS=[1.0, 5.0]", "MIL_LOSS=mse",
            "MIL_LOSS=rmse", "MIL_LOSS=mae", "USE_EMA=False", "WARMUP_STEPS=0.5", "START_LR=1e-4",
            "FINAL_LR=1e-4", "IPE_SCALE=3.0"]}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_option_changes_the_run_and_the_run_ends(kind, train_study, monkeypatch):
    """None crashes, and none leaves the numbers of the default run as they were."""
    monkeypatch.setattr(SCRIPTS[kind], "write_history", lambda *values: None)      # pictures take their time
    common = ["STUDY_TEST_FRACTION=0.0", f"{kind.upper()}_EPOCHS=1", f"{kind.upper()}_UPDATE_EVERY_BATCHES=1",
              "MIL_MONITOR=val/loss", "MIL_MONITOR_MODE=min", "SAMPLES_PER_EPOCH=0", "JEPA_PROBE_EVERY=0"]
    plain, without_effect = history(train_study(kind, "plain", *common), kind), []
    for number, option in enumerate(OPTIONS[kind]):
        row = history(train_study(kind, f"run{number}", *common, option), kind)[0]
        if (row["val/loss"], row["train/loss"]) == (plain[0]["val/loss"], plain[0]["train/loss"]):
            without_effect.append(option)
    assert without_effect == []


def test_every_path_of_attention_gives_the_same_run(train_study):
    """STUDY_ATTENTION and ACTIVATION_CHECKPOINTING change time and memory alone."""
    losses = []
    for option in ("STUDY_ATTENTION=sequences", "STUDY_ATTENTION=buckets", "STUDY_ATTENTION=block_mask",
                   "ACTIVATION_CHECKPOINTING=True"):
        run = train_study("jepa", option.split("=")[1], "JEPA_EPOCHS=1", option, labels=False)
        losses.append(history(run, "jepa")[0]["val/loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)


def test_classes_are_told_apart_with_cross_entropy(train_study, script, studies, tmp_path):
    """One column of words: class names reach the tables and the confusion matrix."""
    labels = tmp_path / "kinds.csv"
    rows = [f"s{i},{'scan' if i % 3 else 'tomogram'}\n" for i in range(10)]
    labels.write_text("study_id,kind\n" + "".join(rows))
    run = train_study("mil", "classes", "MIL_LOSS=ce", f"STUDY_LABELS={labels}", labels=False)
    script("evaluate", "--checkpoint", run / "mil_best.pt", "--data", studies / "cache", "--split", "all",
           "--output", tmp_path / "out", "--bootstrap", 20, "--attention", 0)
    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["true class"] for row in rows} == {"scan", "tomogram"}
    assert (tmp_path / "out" / "confusion.png").exists() and not (tmp_path / "out" / "attention").exists()


@pytest.mark.parametrize("kind, strategy", [("jepa", "zero2"), ("mil", "fsdp")])
def test_two_ranks_train_and_one_process_goes_on(kind, strategy, train_study):
    """The scripts as under torchrun; the checkpoint is nobody's in particular."""
    settings = [f"STRATEGY={strategy}", f"{kind.upper()}_EPOCHS=1"]
    printed = two_ranks(lambda: train_study(kind, "shared", *settings))
    assert printed.count("Epoch 1 Complete") == 1
    run = train_study(kind, "shared", words=["-c", "auto"])
    assert torch.load(run / f"{kind}_last.pt", weights_only=True)["epoch"] == 2


def test_fast_dev_run_is_one_small_batch_of_each(train_study):
    """A quick check of a setting touches every part once."""
    run = train_study("jepa", "quick", words=["--fast-dev-run"])
    assert torch.load(run / "jepa_last.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("kind", SCRIPTS)
def test_training_and_validation_share_no_study(kind, train_study, monkeypatch):
    """The promise that every held-out figure rests on; the original validated on what it trained on."""
    seen = {}

    def remember(dataset, *values, build_loader=builders.build_loader):
        seen.setdefault(dataset.train, set()).update(series.study for series, _ in dataset.entries)
        return build_loader(dataset, *values)

    monkeypatch.setattr(builders, "build_loader", remember)
    train_study(kind, "split", labels=kind == "mil", words=["--fast-dev-run"])
    assert seen[True] and seen[False] and not seen[True] & seen[False]
