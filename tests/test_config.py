"""Constants from the command line, and one-line errors."""

import json
import re
import subprocess
import sys
import types

import pytest

import constants
from utils.config import (
    BadFile,
    UserError,
    apply_overrides,
    apply_preset,
    changed_constants,
    exit_code,
    hyperparameters,
    restore_constants,
    write_training_params,
)


@pytest.fixture
def module():
    """A copy of constants.py that a test may change."""
    copy = types.ModuleType("copy")
    copy.__dict__.update(hyperparameters(constants), PRESETS={"small": {"IMG_SIZE": 64, "VIT": "tiny"}})
    return copy


def test_values_take_the_type_of_their_constant(module):
    """An int stands for a float, a bare word for a string, a list for a list."""
    apply_overrides(module, ["BATCH_SIZE=2", "MAX_LR=1", "VIT=small", "ADAM_BETAS=[0.5, 0.9]"])
    assert (module.BATCH_SIZE, module.VIT, module.ADAM_BETAS) == (2, "small", [0.5, 0.9])
    assert type(module.MAX_LR) is float


@pytest.mark.parametrize("text", ['["tensorboard","wandb"]', "[tensorboard,wandb]", "[tensorboard, wandb]"])
def test_a_list_of_words_needs_no_quotes(module, text):
    """A shell takes them away."""
    apply_overrides(module, [f"TRACKERS={text}"])
    assert module.TRACKERS == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    "pair", ["NO_SUCH_THING=1", "BATCH_SIZE=2.5", "BATCH_SIZE=two", "BATCH_SIZE", "COMPILE=1"])
def test_a_mistaken_override_is_refused(module, pair):
    """A mistyped option must not train another network than the one asked for."""
    with pytest.raises(UserError) as error:
        apply_overrides(module, [pair])
    assert "\n" not in str(error.value) and pair in str(error.value)


@pytest.mark.parametrize("name", [name for name in vars(constants) if re.fullmatch(
    r"(MAX|GAN|JEPA|MIL|VISTA|SIMCLR|HVIT|SPINE)_LR|.*_LAYER_DECAY|VISTA_VAL_EVERY|.*BATCH_SIZE", name)])
def test_numbers_that_would_be_divided_by_are_above_zero(module, name):
    """A peak rate, a batch, a number of epochs between two validations: 0 would end in a traceback."""
    with pytest.raises(UserError, match=f"{name} = 0"):
        apply_overrides(module, [f"{name}=0"])


@pytest.mark.parametrize("name", ["BATCHSIZE", "batch_size", "BATCH_SIZES"])
def test_the_closest_name_is_offered(module, name):
    """The remedy stands in the message."""
    with pytest.raises(UserError, match="did you mean BATCH_SIZE"):
        apply_overrides(module, [f"{name}=2"])


def test_set_wins_over_the_preset_and_the_preset_over_the_file(module):
    """constants.py < --preset < --set."""
    apply_preset(module, "small")
    apply_overrides(module, ["VIT=base"])
    assert (module.IMG_SIZE, module.VIT) == (64, "base")
    with pytest.raises(UserError, match="did you mean small"):
        apply_preset(module, "smal")


@pytest.mark.parametrize("name", constants.PRESETS)
def test_every_preset_names_constants_and_values_of_their_type(name):
    """A preset that no longer fits constants.py fails here rather than at a user's."""
    copy = types.ModuleType("copy")
    copy.__dict__.update(vars(constants))
    apply_preset(copy, name)


def test_constants_of_a_checkpoint_come_back_and_differences_are_named(module):
    """Inference builds the network that was trained; names of older versions do no harm."""
    values = {**hyperparameters(module), "IMG_SIZE": 96, "GONE": 1}
    assert changed_constants(module, values) == [f"IMG_SIZE: 96 -> {module.IMG_SIZE}"]
    restore_constants(module, values)
    assert module.IMG_SIZE == 96 and not hasattr(module, "GONE")


def test_training_params_hold_at_least_forty_settings(module, tmp_path, monkeypatch):
    """The record of a run is enough to repeat it."""
    monkeypatch.setattr(sys, "argv", ["train.py", "-n", "a"])
    write_training_params(tmp_path, module, total_steps=3)
    params = json.loads((tmp_path / "training_params.json").read_text())
    assert len(params["constants"]) >= 40 and params["constants"]["SEED"] == 0
    assert params["total_steps"] == 3 and params["command"] == ["train.py", "-n", "a"]
    assert params["versions"]["torch"]


@pytest.mark.parametrize("message", ["a.png: empty file", "Caught BadFile in DataLoader worker process 0.\n"
                                     "Traceback:\n  ...\nutils.config.BadFile: a.png: empty file\n"])
def test_a_users_mistake_ends_in_one_line_and_exit_code_2(message, capsys):
    """Also when it was raised in a data-loading process."""
    def main():
        raise BadFile(message)
    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error: a.png: empty file\n"


def test_an_unknown_name_ends_the_training_script(tmp_path):
    """The whole way from the command line: one line, exit code 2, no run folder."""
    done = subprocess.run([sys.executable, "longitudinal_MIM_training.py", "--set", "BACH_SIZE=2",
                           f"RUNS_DIR={tmp_path}/runs"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean BATCH_SIZE?" in done.stderr and not (tmp_path / "runs").exists()
