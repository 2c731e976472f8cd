"""Electron microscopy from volumes to segmentations, with the scripts as a user runs them."""

import csv
import json
import os
import signal
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import SMALL_VISTA, bricks
from forks import Fork, two_ranks
from monai.networks.nets import SegResNet
from skimage.metrics import adapted_rand_error
from test_scripts import states_differ

import infer_vista3d
import train_vista3d
from datasets.connectomics import ConnectomicsDataset
from datasets.em_labels import IGNORE
from datasets.em_sources import find_sources
from utils.config import UserError
from utils.em_pictures import COLUMNS
from utils.instance_metrics import SemanticMetrics

KIND = "vista3d"


def history(run):
    """The epochs of a run."""
    return torch.load(run / f"{KIND}_last.pt", weights_only=True)["history"]


def read(path, key="segmentation"):
    """An array of an HDF5 file."""
    with h5py.File(path) as file:
        return file[key][()]


@pytest.fixture
def infer(script, volumes, tmp_path):
    """Segment the small volume with a checkpoint; returns the path of the output."""
    def call(checkpoint, *words, name="out.h5", source=None):
        script("infer_vista3d", "--checkpoint", checkpoint, "--output", tmp_path / name,
               "--input", source or volumes / "snemi3d" / "toy_inputs.h5", "--spacing-nm", 10, 10, 10, *words)
        return tmp_path / name

    return call


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, volumes):
    """The folder of a run that has seen the bricks some dozen times."""
    root = tmp_path_factory.mktemp("learnt")
    words = ["train_vista3d.py", "-n", "learnt", "--data", volumes, "--set", *SMALL_VISTA,
             f"RUNS_DIR={root}", "VISTA_EPOCHS=6", "VISTA_LR=1e-2", "VISTA_UPDATE_EVERY_BATCHES=1",
             "VISTA_CROPS_PER_EPOCH=16", "EMA_DECAY=0.9", "VISTA_VAL_EVERY=6", "VISTA_AUG_ELASTIC=0.0",
             "VISTA_AUG_DEFECTS=0.0"]
    process = Fork(train_vista3d.main, prepare=lambda: setattr(sys, "argv", [*map(str, words)]))
    assert process.end(seconds=300) == 0, process.text
    return root / "learnt"


def test_a_run_leaves_everything_that_is_promised(train_vista):
    """Checkpoints, the record, the table, both curves, sample pictures, and the metrics of the guide."""
    run = train_vista("whole", "SAVE_EVERY_EPOCHS=1", "TRACKERS=['tensorboard']")
    names = {path.name for path in run.iterdir()}
    assert names >= {f"{KIND}_last.pt", f"{KIND}_best.pt", f"{KIND}_epoch_1.pt", f"{KIND}_epoch_2.pt", "tb",
                     "training_params.json", "metrics.csv", "loss_curves.png", "detailed_loss_curves.png"}
    assert {path.name for path in (run / "samples").iterdir()} == {"epoch_1.png", "epoch_2.png"}
    checkpoint = torch.load(run / f"{KIND}_last.pt", weights_only=True)
    assert set(checkpoint) >= {
        "model_state_dict", "ema_state_dict", "optimizer_state_dict", "scheduler_state_dict",
        "scaler_state_dict", "epoch", "step", "batch_in_epoch", "train_loss", "val_loss", "best", "history",
        "rng_state", "constants", "format_version"}
    assert json.loads((run / "training_params.json").read_text())["total_steps"] == checkpoint["step"] == 4
    assert set(checkpoint["history"][0]) >= {
        "train/loss", "train/loss_sem", "train/loss_ce", "train/loss_dice", "train/loss_ins", "val/loss",
        "val/loss_sem", "val/loss_ins", "val/accuracy", "val/dice", "val/iou", "val/adapted_rand_error",
        "val/voi", "val/voi_split", "val/voi_merge"}


def test_what_is_predicted_where_a_crop_is_mirrored_does_not_count(volumes):
    """A crop deeper than its volume: neither losses nor scores see what is beyond."""
    sources = [replace(source, sections=(0, 5)) for source in find_sources(volumes, ["snemi3d"], 0, 0, 0)]
    dataset = ConnectomicsDataset(sources, (8, 32, 32), False, 1, {})
    batch = {name: value[None] for name, value in dataset[0].items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(0)
    outputs = {"semantic": torch.randn(1, 16, 8, 32, 32), "embedding": torch.randn(1, 4, 8, 32, 32)}
    metrics = []
    for _ in range(2):
        seen = SemanticMetrics(16)
        seen.update(outputs["semantic"].argmax(1), batch["classes"], batch["meaning"])
        loss, terms = train_vista3d.loss_terms(outputs, {**batch, "count": None}, None)
        metrics.append([seen.confusion.tolist(), loss.item(), *(term.item() for term in terms.values())])
        for values in outputs.values():
            values[:, :, 5:] = 9 * torch.randn(values[:, :, 5:].shape)
    assert metrics[0] == metrics[1] and sum(map(sum, metrics[0][0])) == 5 * 32 * 32


def test_the_sheet_is_given_the_true_classes(train_vista, monkeypatch, capsys):
    """True and predicted, classes and instances: what the guide promises; crops too deep are said."""
    sheets = []
    monkeypatch.setattr(train_vista3d, "sheet", lambda path, rows: sheets.extend(rows))
    train_vista("short", "VISTA_EPOCHS=1", "VISTA_PATCH_SIZE=[16, 32, 32]", words=["--fast-dev-run"])
    assert set(sheets[0]) == set(COLUMNS) and (sheets[0]["classes"][11:] == IGNORE).all()
    out = capsys.readouterr().out
    assert "val: 11 sections, crops are 16 deep: " in out and "snemi3d: voxels of 30 x 6 x 6 nm" in out


def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(train_vista, monkeypatch):
    """Stopped by a real SIGTERM after the second step, then resumed: every tensor and number is equal."""
    whole, steps = train_vista("whole", "VISTA_UPDATE_EVERY_BATCHES=1"), []

    def stop_at_second_step(*values):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_vista3d, "check_finite", stop_at_second_step)
        with pytest.raises(SystemExit):
            train_vista("stopped", "VISTA_UPDATE_EVERY_BATCHES=1")
    run = whole.parent / "stopped"
    assert torch.load(run / f"{KIND}_last.pt", weights_only=True)["batch_in_epoch"] == 2
    train_vista("stopped", "VISTA_UPDATE_EVERY_BATCHES=1", words=["-c", "auto"])
    assert states_differ(whole / f"{KIND}_last.pt", run / f"{KIND}_last.pt") == []


OPTIONS = [
    "PRECISION=bf16", "OPTIMIZER=sgd", "VISTA_SCHEDULE=step", "VISTA_SCHEDULE=onecycle", "SEED=1",
    "VISTA_LR=1e-4", "VISTA_WEIGHT_DECAY=0.5", "VISTA_WARMUP_STEPS=0.5", "VISTA_FINAL_LR=1e-4",
    "USE_EMA=False", "VISTA_ENCODER=vista3d", "VISTA_FEATURES=16", "VISTA_HEAD_WIDTH=16",
    "VISTA_NUM_CLASSES=6", "VISTA_EMBEDDING=8", "VISTA_COORDINATES=0.0", "VISTA_PATCH_SIZE=[16, 32, 32]",
    "VISTA_SLICES=True", "VISTA_CROPS_PER_EPOCH=4", "VISTA_VAL_CROPS=1", "VISTA_VAL_FRACTION=0.5",
    "VISTA_TEST_FRACTION=0.2", "VISTA_GAP=9", "VISTA_BOUNDARY=False", "VISTA_AUG_FLIP=0.0",
    "VISTA_AUG_ROTATE=0.0", "VISTA_AUG_ELASTIC=0.0", "VISTA_AUG_ANGLE=0.0", "VISTA_AUG_CONTRAST=0.0",
    "VISTA_AUG_NOISE=0.0", "VISTA_AUG_NOISE_STD=0.5", "VISTA_AUG_GAMMA=0.0",
    "VISTA_AUG_GAMMA_RANGE=[3.0, 4.0]", "VISTA_AUG_MISSING=1.0", "VISTA_AUG_SHIFT=1.0",
    "VISTA_AUG_DEFECTS=0.0", "VISTA_CE_WEIGHT=2.0", "VISTA_DICE_WEIGHT=0.0",
    "VISTA_CLASS_WEIGHTS=[1, 5, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]", "VISTA_IGNORE_INDEX=4",
    "VISTA_WEIGHT_PULL=3.0", "VISTA_WEIGHT_PUSH=3.0", "VISTA_WEIGHT_NORM=1.0", "VISTA_DELTA_V=0.1",
    "VISTA_DELTA_D=3.0", "VISTA_WEIGHT_EDGE=1.0", "VISTA_WEIGHT_BONE=1.0"]


def test_each_option_changes_the_run_and_the_run_ends(train_vista, monkeypatch):
    """None crashes, and none leaves the numbers of the default run as they were."""
    monkeypatch.setattr(train_vista3d, "write_history", lambda *values: None)      # pictures take their time
    common = ["VISTA_EPOCHS=1", "VISTA_UPDATE_EVERY_BATCHES=1", "SAMPLES_PER_EPOCH=0",
              "VISTA_AUG_MISSING=0.5", "VISTA_AUG_NOISE=1.0", "VISTA_AUG_GAMMA=1.0", "VISTA_AUG_DEFECTS=1.0"]
    plain, without_effect = history(train_vista("plain", *common))[0], []
    for number, option in enumerate(OPTIONS):
        row = history(train_vista(f"run{number}", *common, option))[0]
        if (row["val/loss"], row["train/loss"]) == (plain["val/loss"], plain["train/loss"]):
            without_effect.append(option)
    assert without_effect == []


@pytest.mark.parametrize("option", ["ACTIVATION_CHECKPOINTING=True", "CHANNELS_LAST=False",
                                    "VISTA_CACHE_RATE=1.0", "NUM_WORKERS=2", "VISTA_PER_CLASS=False"])
def test_switches_of_speed_and_memory_leave_the_numbers(option, train_vista, monkeypatch):
    """They are for the machine, not for the result; one class of instances is the same by itself."""
    monkeypatch.setattr(train_vista3d, "write_history", lambda *values: None)
    rows = [history(train_vista(name, "VISTA_EPOCHS=1", *options))[0]
            for name, options in (("plain", []), ("other", [option]))]
    assert rows[1]["val/loss"] == pytest.approx(rows[0]["val/loss"], rel=1e-4)


def test_validation_clusters_by_its_settings(train_vista, monkeypatch):
    """VISTA_BANDWIDTH, VISTA_MIN_INSTANCE and VISTA_GROW_NM decide what is an instance."""
    monkeypatch.setattr(train_vista3d, "write_history", lambda *values: None)
    common = ["VISTA_EPOCHS=1", "VISTA_LR=1e-2", "VISTA_UPDATE_EVERY_BATCHES=1"]
    scores = {option: history(train_vista(f"run{number}", *common, option))[0]["val/voi"]
              for number, option in enumerate(["SEED=0", "VISTA_BANDWIDTH=0.005", "VISTA_MIN_INSTANCE=9999"])}
    assert len(set(scores.values())) == 3


def test_validation_every_second_epoch_and_an_end_when_nothing_gets_better(train_vista, capsys):
    """VISTA_VAL_EVERY and VISTA_PATIENCE; the first and the last epoch are always validated."""
    rows = history(train_vista("sparse", "VISTA_EPOCHS=4", "VISTA_VAL_EVERY=3"))
    assert [("val/loss" in row) for row in rows] == [True, False, True, True]
    run = train_vista("stale", "VISTA_EPOCHS=6", "VISTA_PATIENCE=2", "VISTA_MONITOR=epoch")
    assert len(history(run)) == 3 and "No better epoch in 2 validations" in capsys.readouterr().out
    train_vista("stale", "VISTA_EPOCHS=6", "VISTA_PATIENCE=2", "VISTA_MONITOR=epoch", words=["-c", "auto"])
    assert len(history(run)) == 3


@pytest.mark.parametrize("preset", ["snemi2d", "snemi3d", "cremi3d", "combine", "foundation"])
def test_every_preset_of_the_guide_runs(preset, script, em_demo, tmp_path):
    """Its settings fit each other, and its data sets are found; the network is made small for the test."""
    small = ["VISTA_FEATURES=8", "VISTA_HEAD_WIDTH=8", "VISTA_BATCH_SIZE=1", "NUM_WORKERS=0", "TRACKERS=[]",
             "PRECISION=fp32", f"VISTA_PATCH_SIZE={[1, 32, 32] if preset == 'snemi2d' else [16, 32, 32]}"]
    script("train_vista3d", "-p", preset, "-n", preset, "--data", em_demo, "--fast-dev-run",
           "--set", *small, f"RUNS_DIR={tmp_path}")
    checkpoint = torch.load(tmp_path / preset / f"{KIND}_last.pt", weights_only=True)
    assert checkpoint["step"] == 1
    assert checkpoint["constants"]["VISTA_SLICES"] == (preset == "snemi2d")


def know_all(model, device, tta):
    """A network that is right about every voxel, in embeddings that no two windows share a frame of."""
    turn = torch.Generator().manual_seed(0)

    def predict(images):
        axes = torch.linalg.qr(torch.randn(4, 4, generator=turn))[0]
        embedding = torch.zeros(len(images), 4, *images.shape[2:])
        embedding[:, 0] = 200 * images[:, 0]                                # neighbouring levels lie 4 apart
        embedding = torch.einsum("ef,bfdhw->bedhw", axes, embedding)
        embedding += 50 * torch.randn(1, 4, 1, 1, 1, generator=turn)
        embedding += 0.1 * torch.randn(embedding.shape, generator=turn)
        probabilities = torch.zeros(len(images), 5, *images.shape[2:])
        probabilities[:, 1], probabilities[:, 4] = images[:, 0] > 0.1, images[:, 0] <= 0.1
        return probabilities, embedding

    return predict


def know_nothing(model, device, tta):
    """A network that takes everything for one neuron."""
    def predict(images):
        probabilities = torch.zeros(len(images), 5, *images.shape[2:])
        probabilities[:, 1] = 1
        return probabilities, torch.zeros(len(images), 4, *images.shape[2:])

    return predict


@pytest.fixture
def easy(tmp_path, monkeypatch):
    """(path of a volume in which every brick has a grey of its own, truth); the network knows all of it."""
    image, ids = bricks()
    truth = np.where(image > 120, ids, 0)
    levels = np.unique(truth, return_inverse=True)[1].reshape(truth.shape)
    with h5py.File(tmp_path / "levels.h5", "w") as file:
        file["main"] = np.where(levels > 0, 40 + 200 * levels // levels.max(), 0).astype(np.uint8)
    monkeypatch.setattr(infer_vista3d, "build_predict", know_all)
    return tmp_path / "levels.h5", truth


def test_instances_are_stitched_over_windows_that_share_no_frame(learnt, infer, easy):
    """Each brick becomes one instance, whichever windows saw a part of it, though embeddings disagree."""
    source, truth = easy
    found = read(infer(learnt / f"{KIND}_best.pt", "--patch-size", 16, 32, 32, "--grow", 0,
                       "--spacing-nm", 40, 10, 10, "--min-instance-size", 1, source=source))
    assert found.dtype == np.uint32 and np.array_equal(found > 0, truth > 0)
    error = adapted_rand_error(truth, found)[0]
    assert error < 0.06, error                         # the rule of stitching would rather cut than join
    assert np.unique(found[found > 0]).tolist() == list(range(1, found.max() + 1))


@pytest.mark.parametrize("mode", [[], ["--output-classes"], ["--output-probs"]])
def test_an_interrupted_inference_goes_on_and_two_ranks_agree(mode, learnt, infer, volumes, tmp_path,
                                                             monkeypatch):
    """Stopped after some parts, then run again; and shared by two processes: the same file each time."""
    checkpoint, patch = learnt / f"{KIND}_best.pt", ["--patch-size", 16, 32, 32]
    whole = read(infer(checkpoint, *patch, *mode, name="whole.h5"))
    save, saved = infer_vista3d.Parts.save, []

    def save_four(parts, name, **arrays):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(name)
        save(parts, name, **arrays)

    with monkeypatch.context() as patched:
        patched.setattr(infer_vista3d.Parts, "save", save_four)
        with pytest.raises(KeyboardInterrupt):
            infer(checkpoint, *patch, *mode, name="resumed.h5")
    assert not (tmp_path / "resumed.h5").exists() and (tmp_path / "resumed.h5.parts").is_dir()
    assert np.array_equal(read(infer(checkpoint, *patch, *mode, name="resumed.h5")), whole)
    assert not (tmp_path / "resumed.h5.parts").exists()
    two_ranks(lambda: infer(checkpoint, *patch, *mode, name="shared.h5"))
    assert np.array_equal(read(tmp_path / "shared.h5"), whole)


def test_a_log_file_tells_what_is_done_and_what_is_wrong(learnt, infer, easy, capsys, monkeypatch):
    """No bar is drawn there: a line for each slab; what is replaced, first; a network that knows nothing."""
    words = [learnt / f"{KIND}_best.pt", "--patch-size", 16, 64, 64]
    infer(*words, source=easy[0])
    lines = capsys.readouterr().out.splitlines()
    slabs = [line for line in lines if line.startswith("Sections ")]
    assert slabs[0] == "Sections 0 to 7 of 40 finished" and slabs[-1].endswith(" to 39 of 40 finished")
    assert not [line for line in lines if line.startswith(("Replaces", "One instance"))]

    monkeypatch.setattr(infer_vista3d, "build_predict", know_nothing)
    path = infer(*words, source=easy[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Replaces {path}" and "One instance fills 100% of the volume" in "".join(lines)


@pytest.mark.parametrize("suffix", [".h5", ".tif", ".nii.gz", ".zarr"])
def test_output_of_every_kind_holds_the_same_instances(suffix, learnt, infer, easy):
    """With the voxel size; beside it the table of instances and a picture."""
    checkpoint = learnt / f"{KIND}_best.pt"
    reference = read(infer(checkpoint, name="reference.h5", source=easy[0]))
    path = infer(checkpoint, name=f"other{suffix}", source=easy[0])
    volume = infer_vista3d.open_volume(path)
    assert np.array_equal(volume[:, :, :], reference) and volume.spacing_nm == pytest.approx((10, 10, 10))
    with open(f"{path}_instances.csv") as file:
        rows = list(csv.DictReader(file))
    counts = np.bincount(reference.ravel())
    assert [int(row["voxels"]) for row in rows] == counts[1:].tolist()
    assert {row["class"] for row in rows} == {"neuron"}
    assert os.path.getsize(f"{path}.png") > 5000


def test_each_option_of_inference_does_something(learnt, infer, easy):
    """The guide's options one by one: none leaves the instances as they were."""
    def find(*words, key="segmentation"):
        path = infer(learnt / f"{KIND}_best.pt", "--patch-size", 16, 32, 32, "--spacing-nm", 40, 10, 10,
                     *words, source=easy[0])
        return read(path, key)

    plain = find()
    for words in (["--bandwidth", 0.02], ["--grow", 0], ["--min-instance-size", 900],
                  ["--patch-size", 8, 16, 16], ["--stride", 15, 30, 31], ["--class-id", 3]):
        assert not np.array_equal(find(*words), plain), words
    assert np.array_equal(find("--class-id", 1), plain)
    assert np.array_equal(find("--output-key", "found", key="found"), plain)


def test_probabilities_and_classes_come_from_blended_windows(learnt, infer):
    """--output-probs, --output-classes, --aggregation and --tta with a real network."""
    checkpoint, small = learnt / f"{KIND}_best.pt", ["--patch-size", 8, 32, 32]
    blends = [read(infer(checkpoint, *small, "--output-probs", "--aggregation", word))
              for word in ("gaussian", "average", "max")]
    assert all(blend.shape == (5, 40, 48, 52) and np.allclose(blend.sum(0), 1, atol=0.01) for blend in blends)
    assert not np.array_equal(blends[0], blends[1]) and not np.array_equal(blends[1], blends[2])
    mirrored = read(infer(checkpoint, *small, "--output-probs", "--tta"))
    assert not np.array_equal(mirrored, blends[0]) and np.allclose(mirrored.sum(0), 1, atol=0.01)
    classes = read(infer(checkpoint, *small, "--output-classes"))
    assert classes.dtype == np.uint8 and (classes == blends[0].argmax(0)).mean() > 0.99


def test_slices_are_segmented_one_by_one(train_vista, infer):
    """A network of slices on a volume: each section has instances of its own."""
    run = train_vista("slices", "VISTA_SLICES=True", "VISTA_EPOCHS=1")
    found = read(infer(run / f"{KIND}_last.pt", "--patch-size", 1, 32, 32))
    sections = [set(np.unique(section[section > 0]).tolist()) for section in found]
    assert sum(map(len, sections)) == len(set().union(*sections))


def test_weights_of_monai_and_of_other_runs_start_the_network(train_vista, tmp_path, capsys):
    """By name, whole; another width ends the run, and other heads are left as they were made."""
    torch.manual_seed(0)
    peer = SegResNet(spatial_dims=3, in_channels=1, out_channels=8, init_filters=8)
    torch.save(peer.state_dict(), tmp_path / "monai.pt")
    train_vista("monai", "VISTA_EPOCHS=1", words=["--init", tmp_path / "monai.pt"])
    assert " weights of the backbone matched, 13 not: semantic.0.weight" in capsys.readouterr().out
    first = train_vista("first", "VISTA_EPOCHS=1")
    train_vista("second", "VISTA_EMBEDDING=8", words=["--init", first / f"{KIND}_last.pt", "--fast-dev-run"])
    assert " weights of the backbone matched, 2 not: instance.6.weight" in capsys.readouterr().out
    with pytest.raises(UserError, match="0% of the model's weights"):
        train_vista("wider", "VISTA_FEATURES=16", words=["--init", first / f"{KIND}_last.pt"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_and_one_process_goes_on(strategy, train_vista):
    """The script as under torchrun; the checkpoint is nobody's in particular."""
    printed = two_ranks(lambda: train_vista("shared", f"STRATEGY={strategy}", "VISTA_EPOCHS=1"))
    assert printed.count("Epoch 1 Complete") == 1
    run = train_vista("shared", words=["-c", "auto"])
    assert torch.load(run / f"{KIND}_last.pt", weights_only=True)["epoch"] == 2
