"""Hard knocks: disks that are full, folders that may not be written to, and a cache that is made again."""

import os
import shutil

import nibabel
import numpy as np
import pytest
from conftest import write_case, write_study
from forks import Fork, full_disk, lose_rights
from test_infer_cascade import cascade, volume, write_nifti  # noqa: F401
from test_infer_longitudinal import checkpoint  # noqa: F401

from datasets.cache import load_image, load_mask, read_cache, write_cache
from prepare_data import cache_settings
from utils.config import UserError


@pytest.fixture
def command(request, script, tmp_path):
    """A function: one of the scripts that write into ``tmp_path/out``, on small data."""
    out, data = tmp_path / "out", tmp_path / "in"
    if request.param == "cascade":
        write_nifti(data / "a.nii.gz", volume())
        run = request.getfixturevalue("cascade")
        return lambda: run("--device", "cpu")
    if request.param == "cache":
        write_study(data / "s1", 1)
        return lambda: script("prepare_data", "cache", "--data", data, "--output", out, "--workers", 0)
    case = write_case(data / "p1_a", 1)
    if request.param == "pairs":
        (case / "diff_map.nii.gz").unlink()
        return lambda: script("prepare_data", "pairs", "--data", data, "--output", out, "--workers", 0,
                              "--per-image", 1, "--size", 64)
    words = ["--checkpoint", request.getfixturevalue("checkpoint"), "--data", data]
    return lambda: script("infer_longitudinal", *words, "--output", out)


@pytest.mark.parametrize("command", ["cache", "pairs", "longitudinal", "cascade"], indirect=True)
def test_output_on_a_disk_that_takes_no_more_ends_in_one_line_and_is_completed_later(command, tmp_path):
    """Full at the first file or a later one, or closed: no traceback, and nothing half passes for whole."""
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    run = Fork(command, lose_rights)
    assert run.end() == 2
    line, = run.errors
    assert str(out) in line and "Permission denied" in line
    out.chmod(0o755)
    for size in (2, 100, 1_500, 6_000):
        run = Fork(command, lambda size=size: full_disk(size))
        assert (run.end(), len(run.errors)) in ((2, 1), (0, 0)), (size, run.text)
    run = Fork(command)
    assert run.end() == 0, run.text
    found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.nii.gz")}
    shutil.rmtree(out)
    assert Fork(command).end() == 0
    assert found == {path.relative_to(out): path.read_bytes() for path in out.rglob("*.nii.gz")}
    assert not list(out.rglob("*.tmp"))


def test_a_cache_that_is_made_again_is_read_as_it_was_or_refused(tmp_path, monkeypatch):
    """Whoever opens it meanwhile is told; whoever has it open sees whole images, the old or the new."""
    raw, folder = tmp_path / "raw", tmp_path / "cache"
    write_study(raw / "s1", 1)
    settings = cache_settings()
    write_cache(raw, folder, None, 0, settings)
    series = read_cache(folder)[0].series[0]
    held, old = load_image(series, "mri"), load_image(series, "mri").clone()
    scan = nibabel.load(raw / "s1" / series.source.split("/")[-1])
    flipped = nibabel.Nifti1Image(np.asarray(scan.dataobj)[::-1].copy(), scan.affine)
    seen, opened, real = [], [], os.replace

    def replace(source, target):
        real(source, target)
        seen.append(load_image(series, "mri").clone())
        load_mask(series)
        try:
            opened.append(bool(read_cache(folder)))
        except UserError:
            opened.append(False)

    nibabel.save(flipped, raw / series.source)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        write_cache(raw, folder, None, 0, settings)
    new = load_image(read_cache(folder)[0].series[0], "mri")
    assert opened == [False] * (len(opened) - 1) + [True] and len(opened) >= 5
    assert not (old == new).all() and (held == old).all()
    assert all((image == old).all() or (image == new).all() for image in seen)
