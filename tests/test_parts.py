"""Parts of a long computation on disk: whole, kept, and never mixed with those of another run."""

import numpy as np
import pytest

from utils.config import BadFile, UserError
from utils.object_table import ObjectTable
from utils.parts import Parts


def test_parts_are_found_again_by_the_next_run_of_the_same_settings(tmp_path):
    """That is how an interrupted run goes on; tuples and lists are one to JSON."""
    parts = Parts(tmp_path / "out.parts", {"patch": (8, 32, 32)})
    parts.save("window_0_0_1", ids=np.arange(5))
    again = Parts(tmp_path / "out.parts", {"patch": [8, 32, 32]})
    assert "window_0_0_1" in again and "window_0_0_2" not in again
    assert again.load("window_0_0_1")["ids"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="another patch"):
        Parts(tmp_path / "out.parts", {"patch": (8, 32, 31)})
    again.remove()
    assert not (tmp_path / "out.parts").exists()


def test_sections_are_put_together_from_slabs_of_any_size(tmp_path):
    """Any cut of the depth gives what the whole would give."""
    parts, values = Parts(tmp_path / "parts", {}), np.random.default_rng(0).random((2, 11, 3, 4))
    for z0, z1 in ((7, 11), (0, 4), (4, 7)):
        parts.save_slab(z0, z1, values[:, z0:z1])
    assert parts.slabs() == [(0, 4), (4, 7), (7, 11)]
    for z0 in range(11):
        for z1 in range(z0 + 1, 12):
            assert np.array_equal(parts.sections(z0, z1), values[:, z0:z1])


def test_a_damaged_part_is_named_and_a_failed_write_leaves_none(tmp_path, monkeypatch):
    """A part is whole or not there."""
    parts = Parts(tmp_path / "parts", {})
    parts.save("slab_0_1", values=np.zeros(3))
    parts.path("slab_0_1").write_bytes(b"PK not a zip")
    with pytest.raises(BadFile, match="slab_0_1.npz: damaged"):
        parts.load("slab_0_1")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match="No space left on device"):
        parts.save("slab_1_2", values=np.zeros(3))
    assert "slab_1_2" not in parts and sorted(path.name for path in parts.folder.iterdir()) == [
        "settings.json", "slab_0_1.npz"]


def test_the_table_of_objects_equals_a_count_of_their_voxels(tmp_path):
    """Slab by slab or at once: sizes and centres of each id that has a voxel."""
    labels = np.random.default_rng(0).integers(0, 4, (6, 5, 7))
    labels[labels == 2] = 0
    table = ObjectTable(np.array([0, 1, 1, 3]), ("background", "neuron", "cleft", "mitochondrion"))
    table.add(labels[:4], 0)
    table.add(labels[4:], 4)
    assert table.write(tmp_path / "table.csv") == 2
    header, *rows = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines()]
    assert header == ["id", "class", "voxels", "z", "y", "x"]
    for (number, word, voxels, *centre), expected in zip(rows, (1, 3), strict=True):
        assert int(number) == expected and word == {1: "neuron", 3: "mitochondrion"}[expected]
        assert int(voxels) == (labels == expected).sum()
        assert np.allclose([float(c) for c in centre], np.argwhere(labels == expected).mean(0), atol=0.006)
