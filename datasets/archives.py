"""Archives from elsewhere, unpacked so that nothing in them can reach beyond its folder or fill the disk."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from errno import EINVAL
from lzma import LZMAError
from pathlib import PurePosixPath, PureWindowsPath

from utils.config import BadFile, UserError

LARGEST_RATIO = 100                                 # unpacked to packed bytes; EM images reach 2, labels 30
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, NotImplementedError,
           OSError)


def unpack(path, folder):
    """Write the files of a .zip or .tar (also packed by gzip, bzip2, xz) into the new ``folder``.

    Plain files only; owners, modes and times are not taken over.  Raises BadFile, and names the member, for
    absolute paths, "..", links, devices, encryption, two files of one name; for an archive that is damaged or
    unpacks to more than LARGEST_RATIO times its size.  UserError when the disk has no room.
    """
    try:
        with (zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path)) as archive:
            zipped = isinstance(archive, zipfile.ZipFile)
            files = plain_files(path, archive.infolist() if zipped else archive, zipped)
            if not zipped:
                check_end(archive.fileobj)
            total, free = sum(size for size, _ in files.values()), shutil.disk_usage(path.parent).free
            if total > free:
                raise UserError(f"{path}: unpacks to {total} bytes, but {free} are free")
            for name, (_, member) in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) if zipped else archive.extractfile(member) as source, \
                        open(folder / name, "xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)                      # ends at the declared size
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):       # of the disk
            raise
        raise BadFile(f"{path}: a damaged archive ({error}); remove it and fetch it again") from error


def plain_files(path, members, zipped):
    """{PurePosixPath: (bytes, member)} of the files among the members of an archive; see unpack."""
    files, total, most = {}, 0, LARGEST_RATIO * path.stat().st_size
    for member in members:
        name = member.filename if zipped else member.name
        parts = PureWindowsPath(name)                                              # knows / and \ and drives
        if zipped:
            plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            plain, is_folder, size = plain and not member.flag_bits & 1, member.is_dir(), member.file_size
        else:
            plain, is_folder, size = member.isreg() or member.isdir(), member.isdir(), member.size
        if parts.anchor or ".." in parts.parts or not plain:
            raise BadFile(f"{path}: its member {name!r} lies outside, is a link or device, or is encrypted")
        key = PurePosixPath(*parts.parts)
        if is_folder:
            continue
        if not key.parts or key in files or any(parent in files for parent in key.parents):
            raise BadFile(f"{path}: its member {name!r} has the name of another, or none")
        files[key], total = (size, member), total + size
        if total > most:                             # at once: the way to the next member is to unpack this
            raise BadFile(f"{path}: unpacks to {total} bytes or more, over {LARGEST_RATIO} times its size")
    return files


def check_end(file):
    """Raise tarfile.ReadError unless zeros follow the first empty block, as at the end of a tar.

    tarfile takes a damaged header, or none, for the end; and the checksum of a packed one comes last.
    """
    length = 0
    while rest := file.read(1 << 20):
        length += len(rest)
        if rest.strip(b"\0"):
            raise tarfile.ReadError("a damaged header")
    if not length:
        raise tarfile.ReadError("cut short")
