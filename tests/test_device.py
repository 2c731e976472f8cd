"""Precision and placement of batches."""

import pytest
import torch

from utils.config import UserError
from utils.device import autocast, to_device


@pytest.mark.parametrize("word, dtype", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_each_precision_word_gives_its_type(word, dtype):
    """Inside autocast a linear layer computes in the type that was asked for."""
    with autocast(torch.device("cpu"), word):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_an_unknown_precision_is_refused():
    """Falling back to float32 would hide the mistake."""
    with pytest.raises(UserError, match="PRECISION"):
        autocast(torch.device("cpu"), "float16")


def test_tensors_move_and_names_stay():
    """A batch holds the names of its cases beside the images."""
    batch = to_device({"prior": torch.zeros(2), "case": ["a", "b"]}, torch.device("meta"))
    assert batch["prior"].device.type == "meta" and batch["case"] == ["a", "b"]


def test_entries_that_shall_stay_are_not_moved():
    """What a network reads on the host spares the device a wait."""
    batch = {"a": torch.zeros(1), "b": torch.zeros(1), "c": "word"}
    batch = to_device(batch, torch.device("meta"), stay=("b",))
    assert batch["a"].device.type == "meta" and batch["b"].device.type == "cpu" and batch["c"] == "word"
