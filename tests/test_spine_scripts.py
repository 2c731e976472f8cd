"""Slices of spine MRI from files to figures, with the scripts as a user runs them."""

import csv
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import SMALL_SPINE
from forks import two_ranks
from test_scripts import states_differ

import builders
import constants as C
import train_finetune
from datasets.demo_spine import STAGES
from datasets.slice_tables import read_csv

KINDS = ("classify", "segment", "multitask")
PAINTED = ["SPINE_LESIONS=0.8", "SPINE_LESIONS_IN_VALIDATION=True"]


def history(run, kind):
    """The epochs of a run."""
    return torch.load(run / f"{kind}_last.pt", weights_only=True)["history"]


def rows_of(path):
    """The rows of a CSV file."""
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_curves(monkeypatch):
    """Training without its two pictures of curves, which take most of the time of such a small run."""
    monkeypatch.setattr(train_finetune, "write_history", lambda *values: None)


def test_slices_become_classes_and_masks(no_curves, train_spine, script, spine, tmp_path, capsys):
    """The guide's chain: the classifier starts the U-Net; all that evaluate.py promises is written."""
    classes = train_spine("classify", "classes")
    masks = train_spine("segment", "masks", words=["--init", classes / "classify_best.pt"])
    printed = capsys.readouterr().out
    assert " weights of the backbone matched" in printed and "48 slices of 8 series of 8 patients" in printed
    for kind, run in (("classify", classes), ("segment", masks)):
        script("evaluate", "--checkpoint", run / f"{kind}_best.pt", "--data", spine / "cord_masks.csv",
               "--output", tmp_path / kind, "--bootstrap", 50)
    printed = capsys.readouterr().out
    assert printed.count("12 slices (test)") == 2 and "95 % intervals of 50 resamples of the 2 pat" in printed
    rows = rows_of(tmp_path / "classify" / "predictions.csv")
    assert len(rows) == 12 and len({row["patient"] for row in rows}) == 2
    figures = {row["figure"]: row for row in rows_of(tmp_path / "classify" / "metrics.csv")}
    right = sum(row["predicted class"] == row["true class"] for row in rows) / len(rows)
    low, value, high = (float(figures["accuracy"][key]) for key in ("low", "value", "high"))
    assert low <= value <= high and value == pytest.approx(right)
    assert {"f1_macro", "recall/bare"} <= figures.keys()
    for name in ("confusion", "calibration", *(["mistakes"] if right < 1 else [])):
        assert (tmp_path / "classify" / f"{name}.png").stat().st_size > 2000
    cases = rows_of(tmp_path / "segment" / "masks.csv")
    assert [row["case"] for row in cases] == [row["slice"] for row in rows]
    dices = [float(row["dice"]) for row in cases if row["true_voxels"] != "0"]
    figures = {row["figure"]: row for row in rows_of(tmp_path / "segment" / "metrics.csv")}
    assert float(figures["dice"]["value"]) == pytest.approx(sum(dices) / len(dices))
    assert {"iou", "hd95", "lesion_sensitivity", "lesion_false_positives", "f1"} <= figures.keys()
    assert (tmp_path / "segment" / "worst.png").stat().st_size > 5000
    assert not (tmp_path / "segment" / "predictions.csv").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_everything_that_is_promised(kind, train_spine):
    """Checkpoints, the record, the table, both curves, sample pictures, names for whoever builds it again."""
    run = train_spine(kind, "whole", "SAVE_EVERY_EPOCHS=1", "TRACKERS=['tensorboard']", "SAMPLES_PER_EPOCH=3")
    names = {path.name for path in run.iterdir()}
    assert names >= {f"{kind}_last.pt", f"{kind}_best.pt", f"{kind}_epoch_1.pt", f"{kind}_epoch_2.pt", "tb",
                     "training_params.json", "metrics.csv", "loss_curves.png", "detailed_loss_curves.png"}
    assert {path.name for path in (run / "samples").iterdir()} == {"epoch_1.png", "epoch_2.png"}
    checkpoint = torch.load(run / f"{kind}_last.pt", weights_only=True)
    assert checkpoint["kind"] == kind and checkpoint["epoch"] == 2
    assert checkpoint["names"] == ([] if kind == "segment" else ["bare", "barred"])
    assert checkpoint["mask_names"] == ([] if kind == "classify" else ["cord"])
    network = builders.build_slice_network(kind, checkpoint["names"], checkpoint["mask_names"], start=False)
    network.load_state_dict(checkpoint["ema_state_dict"])
    params = json.loads((run / "training_params.json").read_text())
    assert params["total_steps"] == checkpoint["step"] and params["effective_batch"] == 8
    assert params["train_items"] == 24 and params["val_items"] == 12
    columns = {"train/loss", "val/loss"} | {f"val/{name}" for name in {
        "classify": ("accuracy", "f1_macro"), "segment": ("dice", "iou", "hd95", "accuracy"),
        "multitask": ("dice", "f1_macro", "accuracy", "pixel_accuracy", "lesion_sensitivity",
                      "lesion_false_positives")}[kind]}
    assert columns <= set(checkpoint["history"][0])
    best = torch.load(run / f"{kind}_best.pt", weights_only=True)
    monitor = "val/f1_macro" if kind == "classify" else "val/dice"
    assert best["best"] == max(row[monitor] for row in checkpoint["history"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(kind, no_curves, train_spine, monkeypatch):
    """Stopped by a real SIGTERM after the second step, then resumed: every tensor and number is equal."""
    options = [] if kind == "classify" else PAINTED
    whole, steps = train_spine(kind, "whole", *options), []

    def stop_at_second_step(*values):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_finetune, "check_finite", stop_at_second_step)
        with pytest.raises(SystemExit):
            train_spine(kind, "stopped", *options)
    run = whole.parent / "stopped"
    stopped = torch.load(run / f"{kind}_last.pt", weights_only=True)
    assert stopped["epoch"] == 1 and 0 < stopped["batch_in_epoch"] < stopped["num_batches"]
    train_spine(kind, "stopped", *options, words=["-c", "auto"])
    assert states_differ(whole / f"{kind}_last.pt", run / f"{kind}_last.pt") == []


def test_patients_are_never_in_two_splits_and_a_lists_own_split_wins(no_curves, train_spine, spine, tmp_path):
    """Slices of one series are nearly copies: a test on them would be a test of memory."""
    _, found, _, _ = builders.find_spine("segment", spine / "cord_masks.csv")
    parts = [{slice.patient for slice in part} for part in builders.split_spine(found).values()]
    assert sum(map(len, parts)) == 8 == len(set.union(*parts))
    lines = (spine / "cord_masks.csv").read_text().splitlines()
    for path in spine.glob("*.nii.gz"):
        shutil.copy(path, tmp_path)
    splits = {f"c{number}": ("train", "val", "test")[min(number // 3, 2)] for number in range(8)}
    text = [f"{lines[0]},split", *(f"{line},{splits[line.rsplit(',', 1)[1]]}" for line in lines[1:])]
    (tmp_path / "own.csv").write_text("\n".join(text))
    run = train_spine("segment", "own", words=["--data", tmp_path / "own.csv", "--fast-dev-run"])
    _, own, _, _ = builders.find_spine("segment", tmp_path / "own.csv")
    assert {name: {slice.patient for slice in part} for name, part in builders.split_spine(own).items()} == {
        "train": {"c0", "c1", "c2"}, "val": {"c3", "c4", "c5"}, "test": {"c6", "c7"}}
    assert (run / "segment_best.pt").exists()
    assert {row.split for row in read_csv(tmp_path / "own.csv")[0]} == {"train", "val", "test"}


def test_a_folder_of_patients_is_cut_along_the_axis_asked_for(no_curves, train_spine, spine, tmp_path):
    """SPINE_MASK_WORD finds the masks beside the series, SPINE_SPLIT_CSV decides who is trained on."""
    rows = ["patient,split", *(f"c{n},{'test' if n > 3 else 'val' if n > 1 else 'train'}" for n in range(8))]
    (tmp_path / "split.csv").write_text("\n".join(rows))
    run = train_spine("segment", "folder", "SPINE_MASK_WORD=cord", "SPINE_AXIS=coronal", "SPINE_FIT=squash",
                      f"SPINE_SPLIT_CSV={tmp_path / 'split.csv'}", "SPINE_EPOCHS=1", words=["--data", spine])
    params = json.loads((run / "training_params.json").read_text())
    assert params["train_items"] == params["val_items"] == 2 * 36


def test_bars_are_told_and_discs_are_found(no_curves, train_spine):
    """Images, masks, labels and logits stay together on their way, also through the augmentation."""
    run = train_spine("multitask", "learnt", "SPINE_EPOCHS=15", "SAMPLES_PER_EPOCH=0", "SPINE_LR=1e-2",
                      "SPINE_UPDATE_EVERY_BATCHES=1", "USE_EMA=False", "SPINE_LOSS=combined")
    assert max(row["val/accuracy"] for row in history(run, "multitask")) >= 0.9
    assert max(row["val/dice"] for row in history(run, "multitask")) >= 0.7


def test_any_run_starts_any_other(no_curves, train_spine, capsys):
    """Classifier -> U-Net -> U-Net of lesions -> both tasks: what fits is the other run's, and is counted."""
    still = ["SPINE_LR=1e-12", "USE_EMA=False"]
    first = train_spine("classify", "first")
    runs = {"segment": train_spine("segment", "cord", *still, words=["--init", first / "classify_last.pt"])}
    runs["painted"] = train_spine("segment", "painted", *still, *PAINTED,
                                  words=["--init", runs["segment"] / "segment_last.pt"])
    runs["multitask"] = train_spine("multitask", "both", *still,
                                    words=["--init", runs["painted"] / "segment_last.pt"])
    states = [torch.load(path, weights_only=True)["model_state_dict"] for path in (
        first / "classify_last.pt", runs["segment"] / "segment_last.pt", runs["painted"] / "segment_last.pt",
        runs["multitask"] / "multitask_last.pt")]
    averages = torch.load(first / "classify_last.pt", weights_only=True)["ema_state_dict"]
    for name, value in averages.items():
        if name.endswith("conv1.weight"):
            for state in states[1:]:
                assert torch.allclose(state[f"encoder.{name}"], value, atol=1e-8), name
    for state in states[2:]:
        for name in ("decoder.blocks.0.up.weight", "head.weight"):
            assert torch.allclose(state[name], states[1][name], atol=1e-8)
    printed = capsys.readouterr().out
    assert "No --init: the network starts from random weights" in printed
    assert "0 not\n" in printed and "not: classifier." in printed
    back = train_spine("classify", "back", *still, words=["--init", runs["multitask"] / "multitask_last.pt"])
    assert torch.allclose(torch.load(back / "classify_last.pt", weights_only=True)["model_state_dict"][
        "conv1.weight"], averages["conv1.weight"], atol=1e-8)


def test_painted_lesions_are_tested_on_real_ones(no_curves, train_spine, script, spine, tmp_path, refused):
    """Training knows masks of the cord alone; --set leads evaluate.py to masks of lesions."""
    run = train_spine("segment", "painted", *PAINTED)
    words = ["--checkpoint", run / "segment_best.pt", "--bootstrap", 10]
    script("evaluate", *words, "--data", spine / "cord_masks.csv", "--output", tmp_path / "painted")
    script("evaluate", *words, "--data", spine / "lesion_masks.csv", "--output", tmp_path / "real",
           "--set", "SPINE_LESIONS=0.0")
    painted, real = (rows_of(tmp_path / name / "masks.csv") for name in ("painted", "real"))
    assert {row["class"] for row in painted + real} == {"lesion"}
    assert [row["case"] for row in painted] == [row["case"] for row in real]
    assert sum(row["true_voxels"] != "0" for row in real) == 6             # slices 3 to 5 of two patients
    assert 6 <= sum(row["true_voxels"] != "0" for row in painted) <= 10
    line = refused("train_finetune", "--task", "segment", "-n", "b", "--data", spine / "cord_masks.csv",
                   "--set", *SMALL_SPINE, f"RUNS_DIR={tmp_path}", "SPINE_LESIONS=1.0")
    assert "SPINE_LESIONS_IN_VALIDATION = False" in line


def test_the_axis_of_a_table_is_that_of_the_cascade(no_curves, train_spine, script, spine, tmp_path):
    """All rows say sagittal: infer_cascade.py cuts so without --axis, and not as the series is stored."""
    rows = [f"{spine}/c{number}.nii.gz,sagittal,{('other', 'spine')[number % 2]},p{number}\n"
            for number in range(8)]
    (tmp_path / "sagittal.csv").write_text("path,axis,label,patient\n" + "".join(rows))
    run = train_spine("classify", "axis", table=tmp_path / "sagittal", words=["--fast-dev-run"])
    for folder in ("weights", "in"):
        (tmp_path / folder).mkdir()
    shutil.copy(run / "classify_best.pt", tmp_path / "weights" / "anatomy.pt")
    shutil.copy(spine / "c0.nii.gz", tmp_path / "in")                    # 40 sagittal slices, 6 axial ones
    for words, count, view in (([], "40", "sagittal"), (["--axis", "stored"], "6", "axial")):
        script("infer_cascade", "--input", tmp_path / "in", "--weights", tmp_path / "weights",
               "--output", tmp_path / "out", *words)
        (row,) = rows_of(tmp_path / "out" / "cascade.csv")
        assert (row["slices"], row["view"]) == (count, view)


OPTIONS = {
    "classify": ["SEED=1", "PRECISION=bf16", "SPINE_LR=1e-4", "SPINE_WEIGHT_DECAY=0.9", "SPINE_SCHEDULE=step",
                 "SPINE_WARMUP_STEPS=0.6", "SPINE_FINAL_LR=5e-4", "SPINE_BALANCE=True", "SPINE_SEVERITY=none",
                 "SPINE_SEVERITY=heavy", "SPINE_SIZE=48", "SPINE_FIT=squash", "SPINE_FIELD_MM=500.0",
                 "SPINE_INTENSITY=series",
                 "SPINE_PERCENTILES=[5.0, 95.0]", "SPINE_VAL_FRACTION=0.4", "USE_EMA=False",
                 "CHANNELS_LAST=False", "SPINE_BATCH_SIZE=6"],
    "segment": ["SPINE_ENCODER=plain", "SPINE_FEATURES=6", "SPINE_ATTENTION=True", "SPINE_XAVIER=True",
                "SPINE_MASK_PRIOR=0.0",
                "SPINE_LOSS=bce", "SPINE_LOSS=combined", "SPINE_LESIONS=0.5", "SPINE_LESION_COUNT=[4, 4]",
                "SPINE_LESION_AXIS=[30.0, 40.0]", "SPINE_LESION_FLATNESS=[0.2, 0.3]",
                "SPINE_LESION_FACTOR=[3.0, 4.0]", "SPINE_LESION_CEILING=0.99"],
    "multitask": ["SPINE_TASK_WEIGHTING=uncertainty", "SPINE_TASK_WEIGHTS=[0.5, 2.0]", "SPINE_LOSS=ce",
                  "SPINE_CLASS_WEIGHTS=[1.0, 5.0]", "SPINE_DICE_WEIGHT=0.9"]}


@pytest.mark.parametrize("kind", KINDS)
def test_each_option_changes_the_run_and_the_run_ends(kind, train_spine, no_curves):
    """None crashes, and none leaves the numbers of the default run as they were."""
    common = ["SPINE_EPOCHS=1", "SPINE_UPDATE_EVERY_BATCHES=1", "SAMPLES_PER_EPOCH=0"]
    common += {"classify": [], "segment": PAINTED, "multitask": ["SPINE_LOSS=combined"]}[kind]
    plain, without_effect = history(train_spine(kind, "plain", *common), kind)[0], []
    for number, option in enumerate(OPTIONS[kind]):
        row = history(train_spine(kind, f"run{number}", *common, option), kind)[0]
        if (row["val/loss"], row["train/loss"]) == (plain["val/loss"], plain["train/loss"]):
            without_effect.append(option)
    assert without_effect in ([], ["CHANNELS_LAST=False"])         # on the CPU the sums may be the same


def test_depth_threshold_and_found_share_are_used(no_curves, train_spine):
    """SPINE_DEPTH is the plain encoder's; the other two change the figures alone."""
    common = ["SPINE_EPOCHS=5", "SPINE_UPDATE_EVERY_BATCHES=1", "SPINE_LR=1e-2", "USE_EMA=False",
              "SPINE_ENCODER=plain", "SPINE_MASK_PRIOR=0.0", "SAMPLES_PER_EPOCH=0"]
    runs = {name: history(train_spine("segment", name, *common, *options), "segment")[-1]
            for name, options in {"plain": [], "flat": ["SPINE_DEPTH=2"], "sure": ["SPINE_THRESHOLD=0.8"],
                                  "share": ["SPINE_THRESHOLD=0.8", "SPINE_FOUND_SHARE=0.99"]}.items()}
    assert runs["plain"]["val/loss"] != runs["flat"]["val/loss"]
    assert runs["plain"]["val/loss"] == runs["sure"]["val/loss"] == runs["share"]["val/loss"]
    assert runs["plain"]["val/dice"] != runs["sure"]["val/dice"]
    assert runs["sure"]["val/lesion_sensitivity"] > runs["share"]["val/lesion_sensitivity"]


def test_what_saves_time_or_memory_changes_nothing(no_curves, train_spine):
    """SPINE_CACHE_MB, the workers and recomputed activations leave the numbers as they are."""
    plain = history(train_spine("segment", "plain"), "segment")
    for option in ("SPINE_CACHE_MB=0", "NUM_WORKERS=1", "ACTIVATION_CHECKPOINTING=True"):
        other = history(train_spine("segment", option.split("=")[0], option), "segment")
        assert other[-1]["val/loss"] == pytest.approx(plain[-1]["val/loss"], rel=1e-5), option


def test_a_run_that_gets_no_better_ends_early(no_curves, train_spine, capsys):
    """SPINE_PATIENCE counts epochs since the best one; SPINE_MONITOR may be named."""
    run = train_spine("segment", "stale", "SPINE_EPOCHS=9", "SPINE_PATIENCE=2", "SPINE_LR=1e-12",
                      "USE_EMA=False", "SPINE_MONITOR=val/specificity")
    assert len(history(run, "segment")) == 3
    assert "No better val/specificity in 2 validations: the run ends" in capsys.readouterr().out


def test_weights_of_other_projects_start_the_encoder(no_curves, train_spine, tmp_path, capsys):
    """SPINE_WEIGHTS in torchvision's names, of a colour network."""
    from conftest import narrow_resnet
    torch.manual_seed(0)
    source = narrow_resnet().state_dict()
    torch.save(source, tmp_path / "resnet.pth")
    run = train_spine("segment", "filled", "SPINE_LR=1e-12", "USE_EMA=False",
                      f"SPINE_WEIGHTS={tmp_path / 'resnet.pth'}", words=["--fast-dev-run"])
    state = torch.load(run / "segment_last.pt", weights_only=True)["model_state_dict"]
    grey = source["conv1.weight"].sum(1, keepdim=True)
    assert torch.allclose(state["encoder.conv1.weight"], grey, atol=1e-6)
    printed = capsys.readouterr().out
    assert f"SPINE_WEIGHTS {tmp_path / 'resnet.pth'}: " in printed and "No --init" not in printed


def test_each_preset_runs_on_the_demo_table_that_it_names(no_curves, script, spine, tmp_path, monkeypatch):
    """Without --data the demo is made on first use; each preset's task and table fit together."""
    import torchvision.models
    from conftest import narrow_resnet
    monkeypatch.setattr(torchvision.models, "resnet18", narrow_resnet)
    made = []

    def make():
        if not made:
            shutil.copytree(spine, tmp_path / "demo" / "spine")
            for stage in STAGES[:4]:
                shutil.copy(spine / "cord_masks.csv", tmp_path / "demo" / "spine" / f"{stage}.csv")
        made.append(1)

    monkeypatch.setattr(builders, "make_spine_demo", make)
    presets = [name for name, values in C.PRESETS.items() if "SPINE_DEMO_TABLE" in values]
    assert len(presets) >= 9
    for name in presets:
        values = C.PRESETS[name]
        assert values["SPINE_DEMO_TABLE"] in STAGES
        kind = "segment" if values["SPINE_DEMO_TABLE"].endswith("_masks") else "classify"
        script("train_finetune", "--task", kind, "-p", name, "-n", name, "--fast-dev-run", "--set",
               *SMALL_SPINE, f"DEMO_DIR={tmp_path / 'demo'}", f"RUNS_DIR={tmp_path / 'runs'}",
               "SPINE_LAYOUT=auto")
        checkpoint = torch.load(tmp_path / "runs" / name / f"{kind}_best.pt", weights_only=True)
        assert checkpoint["constants"]["SPINE_DEMO_TABLE"] == values["SPINE_DEMO_TABLE"]
        assert checkpoint["mask_names"] == ([] if kind == "classify" else
                                            ["lesion"] if "lesion" in name else ["cord"])
    assert len(made) == len(presets)


@pytest.mark.parametrize("kind, setting, words", [
    ("classify", "SPINE_ENCODER=plain", "SPINE_ENCODER"), ("segment", "SPINE_ENCODER=vit", "SPINE_ENCODER"),
    ("segment", "SPINE_LOSS=focal", "SPINE_LOSS"), ("segment", "SPINE_SEVERITY=strong", "SPINE_SEVERITY"),
    ("segment", "SPINE_CLASS_WEIGHTS=[1.0, 2.0]", "SPINE_CLASS_WEIGHTS"),
    ("segment", "SPINE_MASK_CLASSES=[]", "SPINE_MASK_CLASSES"), ("segment", "SPINE_FIT=pad", "pad"),
    ("segment", "SPINE_LESIONS=1.5", "SPINE_LESIONS"), ("segment", "SPINE_THRESHOLD=1.0", "threshold"),
    ("segment", "SPINE_MONITOR=val/auroc", "SPINE_MONITOR = val/auroc: not measured with --task segment"),
    ("classify", "SPINE_MONITOR=val/dice", "SPINE_MONITOR = val/dice: not measured"),
    ("classify", "SPINE_LAYOUT=folder", "layout"), ("classify", "SPINE_AXIS=oblique", "axis"),
    ("classify", "SPINE_VAL_FRACTION=0.9", "SPINE_VAL_FRACTION"), ("classify", "SPINE_WEIGHTS=a.pt", "a.pt"),
    ("classify", "SPINE_EPOCHS=0", "SPINE_EPOCHS = 0"), ("classify", "SPINE_SCHEDULE=none", "SCHEDULE"),
    ("multitask", "SPINE_TASK_WEIGHTING=learned", "SPINE_TASK_WEIGHTING"),
    ("multitask", "SPINE_TASK_WEIGHTS=[0.0, 0.0]", "SPINE_TASK_WEIGHTS")])
def test_settings_that_make_no_sense_end_in_one_line(kind, setting, words, refused, spine, tmp_path):
    """What is wrong is named."""
    assert words in refused("train_finetune", "--task", kind, "-n", "a", "--data", spine / "cord_masks.csv",
                            "--set", *SMALL_SPINE, f"RUNS_DIR={tmp_path}", setting)


def test_data_that_do_not_fit_the_task_are_refused(refused, train_spine, spine, tmp_path):
    """No masks, no classes, slices without one where classes are balanced, other classes than the run's."""
    def line(kind, table, *settings, words=()):
        (tmp_path / "a.csv").write_text(table)
        for path in spine.glob("*.nii.gz"):
            if not (tmp_path / path.name).exists():
                shutil.copy(path, tmp_path)
        return refused("train_finetune", "--task", kind, "-n", "a", "--data", tmp_path / "a.csv", *words,
                       "--set", *SMALL_SPINE, f"RUNS_DIR={tmp_path / 'runs'}", *settings)

    paths = [f"c{number}.nii.gz" for number in range(8)]
    bare = "\n".join(["path", *paths])
    assert "no slice has a mask of cord" in line("segment", bare)
    assert "has no class" in line("classify", bare)
    masked = "\n".join(["path,mask", *(f"{path},{path.replace('.nii', '_cord.nii')}" for path in paths)])
    assert "0 class(es) of slices" in line("multitask", masked)
    assert "SPINE_BALANCE = True" in line("segment", masked, "SPINE_BALANCE=True")
    run = train_spine("classify", "a", words=["--fast-dev-run"])
    other = "\n".join(["path,label", *(f"{path},{'ab'[number % 2]}" for number, path in enumerate(paths))])
    assert "the checkpoint is for bare, barred, the labels for a, b" in line(
        "classify", other, words=["-c", run / "classify_last.pt", "--fast-dev-run"])


def test_a_bad_file_stops_training_or_is_skipped_and_evaluation_leaves_it_out(
        no_curves, refused, train_spine, script, spine, tmp_path, capsys):
    """A mask of another size is named; with ON_BAD_FILE=skip the next readable slice stands in."""
    import nibabel
    import numpy as np
    shutil.copytree(spine, tmp_path / "data")
    for number in range(8):
        if number in (1, 2, 3, 4):
            nibabel.save(nibabel.Nifti1Image(np.zeros((40, 36, 5), np.int16), np.diag([1, 1, 4, 1])),
                         tmp_path / "data" / f"c{number}_cord.nii.gz")
    words = ["--data", tmp_path / "data" / "cord_masks.csv"]
    assert "_cord.nii.gz" in refused("train_finetune", "--task", "segment", "-n", "a", *words, "--set",
                                     *SMALL_SPINE, f"RUNS_DIR={tmp_path}")
    run = train_spine("segment", "skip", "ON_BAD_FILE=skip", words=words)
    assert "Skipped " in capsys.readouterr().out
    script("evaluate", "--checkpoint", run / "segment_best.pt", *words, "--split", "all", "--output",
           tmp_path / "out", "--bootstrap", 10)
    assert len(rows_of(tmp_path / "out" / "masks.csv")) == 24
    assert "Left out: " in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind, strategy", [("multitask", "ddp"), ("segment", "fsdp")])
def test_two_ranks_train_and_one_process_goes_on(kind, strategy, train_spine):
    """The script as under torchrun; the checkpoint is nobody's in particular, and evaluation is shared."""
    settings = ["SPINE_ENCODER=plain", "SPINE_DEPTH=2", f"STRATEGY={strategy}"]
    printed = two_ranks(lambda: train_spine(kind, "shared", *settings, "SPINE_EPOCHS=1"))
    assert printed.count("Epoch 1 Complete") == 1
    run = train_spine(kind, "shared", *settings, words=["-c", "auto"])
    assert torch.load(run / f"{kind}_last.pt", weights_only=True)["epoch"] == 2
