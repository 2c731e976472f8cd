"""Files that are whole or not there, and folders that one process at a time writes to."""

import errno
import fcntl
import os
import time

import pytest
from forks import Fork, full_disk, lose_rights

from utils.config import UserError
from utils.files import LOCK, claim, is_taken, replacing


def test_a_claimed_folder_is_refused_to_others_until_its_process_is_gone(tmp_path):
    """Named with who has it; SIGKILL gives it free, though a process that it started lives on."""
    def hold():
        claim(tmp_path / "a", "wait")
        os.fork()
        (tmp_path / "ready").touch()
        time.sleep(5)

    holder = Fork(hold)
    holder.until((tmp_path / "ready").exists)
    with pytest.raises(UserError, match=f"a: process {holder.number} on .* writes there; wait$"):
        claim(tmp_path / "a", "wait")
    assert holder.kill()
    claim(tmp_path / "a", "wait")
    claim(tmp_path / "a", "wait")                                     # one's own stays one's own
    other = Fork(lambda: claim(tmp_path / "a", "wait"))
    assert other.end() == 2 and f"process {os.getpid()} on" in other.text


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    """Some clusters' have none; a run there is better than none."""
    def no_locks(*values):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    claim(tmp_path, "wait")
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_or_written_to_is_named(tmp_path):
    """A file in its place, or no right to write."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/a: cannot be written to"):
        claim(tmp_path / "file" / "a", "wait")
    (tmp_path / "closed").mkdir(mode=0o555)
    for folder in ("closed", "closed/a"):
        other = Fork(lambda folder=folder: claim(tmp_path / folder, "wait"), lose_rights)
        assert other.end() == 2 and f"{folder}: cannot be written to" in other.text


def test_what_a_killed_process_leaves_does_not_take_a_folder(tmp_path):
    """Else one that was killed at once would make the folder useless."""
    assert not is_taken(tmp_path / "a")
    claim(tmp_path / "a", "wait")
    (tmp_path / "a" / "b.tmp").touch()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {LOCK, "b.tmp"}
    assert not is_taken(tmp_path / "a")
    (tmp_path / "a" / "b").touch()
    assert is_taken(tmp_path / "a") and is_taken(tmp_path / "a" / "b")


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    """After an error, and on a full disk, the earlier one is there and nothing else."""
    path = tmp_path / "a.txt"
    with replacing(path, "w") as file:
        file.write("old")
    with pytest.raises(ZeroDivisionError), replacing(path, "w") as file:
        file.write(str(1 / 0))

    def write():
        with replacing(path, "w") as file:
            file.write("new" * 1000)

    other = Fork(write, lambda: full_disk(500))
    assert other.end() == 2 and "a.txt: cannot be written (File too large)" in other.text
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    write()
    assert path.read_text() == "new" * 1000
