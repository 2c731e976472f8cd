"""Files that are whole or refused by name, and weights taken over from other runs."""

import os
import pickle
import random
import resource

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

from utils.checkpoint import (
    copy_checkpoint,
    load_backbone,
    load_checkpoint,
    newest_sound,
    prune_epochs,
    save_checkpoint,
)
from utils.config import UserError


def write(path, step=1, **entries):
    """A small checkpoint of kind "demo"."""
    weights = torch.randn(2000, generator=torch.Generator().manual_seed(step))
    save_checkpoint(path, **{"kind": "demo", "step": step, "model_state_dict": {"w": weights}, **entries})


class Attack:
    """Unpickled by plain pickle, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def assert_refused(path, *words, kinds=()):
    """One line that names the file and says the words."""
    with pytest.raises(UserError) as error:
        load_checkpoint(path, *kinds)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (path.name, *words)), message


def test_what_was_saved_comes_back(tmp_path):
    """Nested values, empty ones and None, without a trace of the temporary file."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([torch.zeros(1)], 0.1), 0.1, 10)
    write(tmp_path / "demo_last.pt", history=[{"epoch": 1, "val/loss": 0.5}], ema_state_dict=None,
          scheduler_state_dict=scheduler.state_dict(), betas=(0.9, 0.95))
    entries = load_checkpoint(tmp_path / "demo_last.pt", "demo")
    assert entries["history"] == [{"epoch": 1, "val/loss": 0.5}]
    assert entries["ema_state_dict"] is None and entries["betas"] == (0.9, 0.95)
    assert entries["scheduler_state_dict"] == scheduler.state_dict()
    assert os.listdir(tmp_path) == ["demo_last.pt"]


def test_values_that_could_not_be_read_back_are_not_written(tmp_path):
    """Found at the save, not on the day of the resume."""
    write(tmp_path / "demo_last.pt")
    with pytest.raises(TypeError, match="Attack|system"):
        write(tmp_path / "demo_last.pt", extra=Attack(tmp_path / "hacked"))
    assert load_checkpoint(tmp_path / "demo_last.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["demo_last.pt"]


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path, limit):
    """The system refuses to write beyond ``limit`` bytes, in the open file's first or a later write."""
    path = tmp_path / "demo_last.pt"
    write(path, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="demo_last.pt: cannot be written"):
            write(path, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["demo_last.pt"]


def test_a_run_killed_before_the_rename_leaves_the_earlier_file_whole(tmp_path, monkeypatch):
    """SIGKILL cleans nothing up: the leftover is ignored, and the next save replaces it."""
    path = tmp_path / "demo_last.pt"
    write(path, step=1)

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(Killed):
            write(path, step=2)
    assert len(os.listdir(tmp_path)) == 2
    assert newest_sound(tmp_path, "demo")[1]["step"] == 1
    write(path, step=3)
    assert newest_sound(tmp_path, "demo")[1]["step"] == 3
    assert os.listdir(tmp_path) == ["demo_last.pt"]


def test_a_folder_that_is_missing_is_named(tmp_path):
    """Writing and copying tell the same way."""
    with pytest.raises(UserError, match="nowhere/demo_last.pt: cannot be written"):
        write(tmp_path / "nowhere" / "demo_last.pt")
    write(tmp_path / "demo_last.pt")
    with pytest.raises(UserError, match="nowhere/demo_best.pt: cannot be written"):
        copy_checkpoint(tmp_path / "demo_last.pt", tmp_path / "nowhere" / "demo_best.pt")
    copy_checkpoint(tmp_path / "demo_last.pt", tmp_path / "demo_best.pt")
    assert (tmp_path / "demo_best.pt").read_bytes() == (tmp_path / "demo_last.pt").read_bytes()


def test_a_file_cut_at_any_length_is_refused_by_name(tmp_path):
    """A copy that was interrupted must not pass for a checkpoint."""
    path, whole = tmp_path / "cut.pt", tmp_path / "whole.pt"
    write(whole)
    data = whole.read_bytes()
    generator = random.Random(0)
    for length in [0, 1, len(data) - 1, *(generator.randrange(len(data)) for _ in range(30))]:
        path.write_bytes(data[:length])
        assert_refused(path)


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    """torch.load alone takes flipped bits in a tensor for weights."""
    path, whole = tmp_path / "flipped.pt", tmp_path / "whole.pt"
    write(whole)
    data, expected = whole.read_bytes(), load_checkpoint(whole)["model_state_dict"]["w"]
    refused = 0
    for position in range(0, len(data), 61):
        flipped = bytearray(data)
        flipped[position] ^= 0x55
        path.write_bytes(flipped)
        try:
            assert torch.equal(load_checkpoint(path)["model_state_dict"]["w"], expected)
        except UserError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(data), 61))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_is_not_run(tmp_path, save):
    """A checkpoint from the internet may be an attack."""
    save({"kind": "demo", "model_state_dict": Attack(tmp_path / "hacked")}, tmp_path / "attack.pt")
    assert_refused(tmp_path / "attack.pt")
    with pytest.raises(UserError, match="attack.pt"):
        load_backbone(nn.Linear(2, 2), tmp_path / "attack.pt")
    assert not (tmp_path / "hacked").exists()


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path):
    """Each with its own reason."""
    assert_refused(tmp_path / "missing.pt", "no such file")
    assert_refused(tmp_path, "folder")
    (tmp_path / "text.pt").write_text("hello")
    assert_refused(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert_refused(tmp_path / "list.pt", "model_state_dict")
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.pt")
    assert_refused(tmp_path / "bare.pt", "model_state_dict", "--init")
    write(tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt", "demo", "simclr", kinds=["simclr"])
    torch.save({"kind": "demo", "model_state_dict": {}, "format_version": 99}, tmp_path / "newer.pt")
    assert_refused(tmp_path / "newer.pt", "99")


def test_the_newest_sound_checkpoint_is_found_by_its_steps(tmp_path):
    """Times of files do not survive copying; the damaged newest is passed over and told."""
    assert newest_sound(tmp_path, "demo") is None
    for name, step in (("epoch_2", 20), ("epoch_10", 100), ("best", 20), ("last", 105)):
        write(tmp_path / f"demo_{name}.pt", step=step)
    write(tmp_path / "demos_last.pt", step=999)
    os.utime(tmp_path / "demo_last.pt", (0, 0))
    path, entries, damaged = newest_sound(tmp_path, "demo")
    assert (path.name, entries["step"], damaged) == ("demo_last.pt", 105, [])
    write(tmp_path / "demo_last.pt", step=30)                             # went back to epoch 2, and on
    path, entries, _ = newest_sound(tmp_path, "demo")
    assert (path.name, entries["step"]) == ("demo_last.pt", 30)

    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55                                          # inside the tensor
    path.write_bytes(data)
    (tmp_path / "demo_epoch_2.pt").write_bytes(b"")
    found, _, damaged = newest_sound(tmp_path, "demo")
    assert found.name == "demo_epoch_10.pt"
    assert sorted(p.name for p in damaged) == ["demo_epoch_2.pt", "demo_last.pt"]


def test_a_run_with_damaged_files_alone_never_starts_afresh(tmp_path):
    """Days of training would be overwritten."""
    (tmp_path / "demo_last.pt").write_bytes(b"PK")
    save_checkpoint(tmp_path / "demo_best.pt", kind="demo", step="many", model_state_dict={})
    with pytest.raises(UserError, match="demo_last.pt, demo_best.pt"):
        newest_sound(tmp_path, "demo")


@pytest.mark.parametrize("higher, best", [(False, {2, 5}), (True, {1, 4})])
def test_pruning_keeps_the_best_and_every_nth(tmp_path, higher, best):
    """best and last are never touched; NaN is never among the best."""
    losses = [5.0, 1.0, 3.0, 4.0, 2.0, float("nan")]
    history = [{"epoch": i, "val/loss": loss} for i, loss in enumerate(losses, start=1)]
    for name in ("last", "best", *(f"epoch_{i}" for i in range(1, 7))):
        write(tmp_path / f"demo_{name}.pt")
    kept = prune_epochs(tmp_path, "demo", history, keep_top=2, every=3, higher_is_better=higher)
    assert {path.name for path in kept} == {f"demo_epoch_{i}.pt" for i in best | {3, 6}}
    assert set(tmp_path.iterdir()) == {*kept, tmp_path / "demo_last.pt", tmp_path / "demo_best.pt"}
    assert {p.name for p in prune_epochs(tmp_path, "demo", history, 2, 0, higher_is_better=higher)} \
        == {f"demo_epoch_{i}.pt" for i in best}


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.backbone.", "backbone."])
@pytest.mark.parametrize("suffix", ["plain.pt", "old.pth", "weights.safetensors", "checkpoint.pt"])
def test_weights_are_found_in_every_kind_of_file(tmp_path, prefix, suffix):
    """Wrappers' prefixes and a prefix that the user names come off; of a checkpoint the average counts."""
    source, model, path = network(), network(), tmp_path / suffix
    state = {prefix + name: value for name, value in source.state_dict().items()}
    if suffix == "weights.safetensors":
        save_file(state, path)
    elif suffix == "checkpoint.pt":
        write(path, ema_state_dict=state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "plain.pt")
    matched, unmatched = load_backbone(model, path, remove_prefix="backbone.")
    assert sorted(matched) == sorted(source.state_dict()) and unmatched == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_a_part_of_a_checkpoint_can_be_named(tmp_path):
    """The trained weights instead of their average, and of them one part of the network."""
    average, trained, model = network(), network(), network()
    state = {f"predictor.{name}": value for name, value in trained.state_dict().items()}
    write(tmp_path / "a.pt", model_state_dict=state, teacher_state_dict=average.state_dict())
    load_backbone(model, tmp_path / "a.pt", "predictor.", prefer=("model_state_dict",))
    assert torch.equal(model[0].weight, trained[0].weight)
    load_backbone(model, tmp_path / "a.pt", "predictor.")
    assert torch.equal(model[0].weight, average[0].weight)


def test_of_a_checkpoint_without_average_the_weights_count(tmp_path):
    """ema_state_dict is None where the average was off."""
    source, model = network(), network()
    write(tmp_path / "a.pt", model_state_dict=source.state_dict(), ema_state_dict=None)
    load_backbone(model, tmp_path / "a.pt")
    assert torch.equal(model[0].weight, source[0].weight)


def test_the_name_that_had_the_prefix_wins(tmp_path):
    """A teacher's or predictor's layer of the same name must not overwrite the backbone's."""
    source, model = network(), network()
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    torch.save({**state, "0.weight": torch.zeros(8, 4)}, tmp_path / "a.pt")
    load_backbone(model, tmp_path / "a.pt", remove_prefix="encoder")
    assert torch.equal(model[0].weight, source[0].weight)


def test_too_few_matches_leave_the_model_alone(tmp_path):
    """A silently random backbone trains, and trains badly; a new head is allowed where asked."""
    source = network()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("2.")}
    state["2.weight"] = torch.zeros(3, 8)
    torch.save(state, tmp_path / "a.pt")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="2.weight") as error:
        load_backbone(model, tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_backbone(network(), tmp_path / "a.pt", optional=("2.",))[1] == ["2.weight", "2.bias"]
    matched, unmatched = load_backbone(model, tmp_path / "a.pt", minimum=0.5)
    assert unmatched == ["2.weight", "2.bias"] and "0.weight" in matched
    assert torch.equal(model[0].weight, source[0].weight)
    assert torch.equal(model[2].weight, before["2.weight"])
