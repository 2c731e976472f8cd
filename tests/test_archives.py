"""Unpacking: what an archive holds arrives, and nothing that a hostile one wants happens."""

import io
import os
import shutil
import tarfile
import zipfile

import pytest

from datasets.archives import unpack
from utils.config import BadFile, UserError

CONTENT = {"a/b/image.bin": os.urandom(5000), "a/empty": b"", "top.txt": b"text"}


def write_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_tar(path, members, mode="w:gz"):
    """members: [(TarInfo or name, bytes)]."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(path, match):
    """The archive is refused in one line, and nothing but the archive and the folder is there."""
    before = set(path.parent.rglob("*"))
    with pytest.raises(BadFile, match=match) as error:
        unpack(path, path.parent / "out")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    assert set(path.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_files_come_out_as_they_went_in(tmp_path, suffix):
    """Folders by name alone, empty files, several kinds of packing."""
    path = tmp_path / f"set{suffix}"
    if suffix == ".zip":
        write_zip(path, [("a/", b""), *CONTENT.items()], compression=zipfile.ZIP_DEFLATED)
    else:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        write_tar(path, [(folder, b""), *CONTENT.items()], "w:" + suffix[5:])
    unpack(path, tmp_path / "out")
    assert contents(tmp_path / "out") == CONTENT


@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "a/../../evil", "..\\evil", "C:\\evil", "C:evil",
                                  "\\\\server\\evil", "a/.."])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_member_leaves_the_folder(tmp_path, kind, name):
    """Refused by name before anything is written, the good members too."""
    members = [("good.txt", b"good"), (name, b"evil")]
    path = tmp_path / f"x.{kind}"
    write_zip(path, members) if kind == "zip" else write_tar(path, members, "w")
    refused(path, "evil|'a/..'")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                                  tarfile.FIFOTYPE])
def test_links_and_devices_in_tar_are_refused(tmp_path, kind):
    """A link to the outside, through which a later member would be written, above all."""
    member = tarfile.TarInfo("way/out")
    member.type, member.linkname = kind, "../../elsewhere"
    refused(write_tar(tmp_path / "x.tar", [(member, b""), ("way/out/evil", b"evil")], "w"), "way/out")


def test_links_in_zip_are_refused(tmp_path):
    """zip keeps the Unix mode; some programs make links of it."""
    member = zipfile.ZipInfo("link")
    member.create_system, member.external_attr = 3, 0o120777 << 16
    refused(write_zip(tmp_path / "x.zip", [(member, b"/etc/passwd")]), "'link'")


@pytest.mark.parametrize("names", [("a", "a"), ("a", "./a"), ("a/b", "a//b"), ("a", "a/b")])
def test_two_members_of_one_name_are_refused(tmp_path, names):
    """Which of them counts depends on the program."""
    refused(write_tar(tmp_path / "x.tar", [(name, b"x" * 100) for name in names], "w"), "name of another")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """By the declared sizes, against the packed size and the free disk."""
    path = write_zip(tmp_path / "x.zip", [("zeros", bytes(10 ** 7))], compression=zipfile.ZIP_DEFLATED)
    refused(path, "10000000 bytes or more, over 100")
    refused(write_tar(tmp_path / "x.tar.gz", [("zeros", bytes(10 ** 7))]), "10000000 bytes or more, over 100")
    path = write_zip(tmp_path / "y.zip", CONTENT.items())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 5003))
    with pytest.raises(UserError, match="unpacks to 5004 bytes, but 5003 are free"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_that_is_longer_than_it_says_is_cut_and_refused(tmp_path):
    """A declared size that lies would get round the check of the sum."""
    path = write_zip(tmp_path / "x.zip", [("zeros", bytes(10 ** 6))], compression=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    assert data.count((10 ** 6).to_bytes(4, "little")) == 2
    path.write_bytes(data.replace((10 ** 6).to_bytes(4, "little"), (10 ** 4).to_bytes(4, "little")))
    with pytest.raises(BadFile, match="damaged"):
        unpack(path, tmp_path / "out")
    assert (tmp_path / "out/zeros").stat().st_size <= 10 ** 4


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_damaged_archives_are_named(tmp_path, suffix):
    """Cut short, and with a byte turned: always BadFile, never half a file taken for a whole one."""
    members = [(f"{number}.bin", os.urandom(3000)) for number in range(4)]
    whole = tmp_path / f"x{suffix}"
    if suffix == ".zip":
        write_zip(whole, members, compression=zipfile.ZIP_DEFLATED)
    else:
        write_tar(whole, members, "w:" + suffix[5:])
    data = whole.read_bytes()
    for number, size in enumerate((20, len(data) // 3, len(data) // 2)):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(data[:size])
        with pytest.raises(BadFile, match="damaged"):
            unpack(path, tmp_path / f"cut{number}")
    place = 3072 + 512 if suffix == ".tar" else 5000           # a header: contents of a plain tar have no sum
    path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1:])
    with pytest.raises(BadFile, match="damaged"):
        unpack(path, tmp_path / "flipped")
    for part in tmp_path.glob("cut*/*.bin"):
        assert part.read_bytes() in [content[:part.stat().st_size] for _, content in members]


def test_an_encrypted_member_is_refused(tmp_path):
    """Nobody is there to ask for a password."""
    path = write_zip(tmp_path / "x.zip", [("secret", b"x")])
    data = bytearray(path.read_bytes())
    data[6] |= 1                                                                   # local header
    data[data.index(b"PK\x01\x02") + 8] |= 1                                       # central directory
    path.write_bytes(bytes(data))
    refused(path, "'secret'")


def test_rights_and_owners_are_not_taken_over(tmp_path):
    """No setuid programs, and no files that their owner cannot read."""
    member = tarfile.TarInfo("program")
    member.mode, member.uid = 0o6777, 12345
    unpack(write_tar(tmp_path / "x.tar", [(member, b"x")], "w"), tmp_path / "out")
    status = (tmp_path / "out/program").stat()
    assert status.st_mode & 0o7111 == 0 and status.st_uid == os.getuid()
