"""One file from the web, whole and checked or not at all; a part of it is kept and continued."""

import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

import h5py
from tqdm import tqdm

from datasets.io import one_line
from utils.config import UserError

WAITS = (1, 2, 4, 8)                                # s before trying again, while nothing more is received
CHUNK = 1 << 18                                     # bytes
PASSING = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
PASSING_CODES = (408, 416, 425, 429, 500, 502, 503, 504)       # HTTP answers that may be others next time
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    url       http or https
    targets   what it becomes in the data set's folder: a file; of an archive HDF5 volumes, or a folder
    digest    "sha256:..." or "md5:...", "" when not known
    size      bytes, None when not known
    """

    url: str
    targets: tuple
    digest: str = ""
    size: int = None

    @property
    def name(self):
        """The file's name, the last part of the URL."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name

    @property
    def packed(self):
        """Whether it is an archive."""
        return self.name.lower().endswith(ARCHIVES)


def fetch(remote, path, timeout, progress):
    """Write the file of ``remote`` to ``path``, which appears when it is whole; goes on from path.part."""
    part, note = Path(f"{path}.part"), Path(f"{path}.part.json")
    most, failures = part.stat().st_size if part.exists() else 0, 0
    by_hand = f"or put the file by hand where it goes: {path}"
    with tqdm(desc=remote.name, unit="B", unit_scale=True, disable=not progress) as bar:
        while True:
            try:
                receive(remote, part, note, timeout, bar)
                break
            except PASSING as error:
                failures += 1
                if part.exists() and part.stat().st_size > most:
                    most, failures = part.stat().st_size, 1
                reason = final(error)
                if reason or failures > len(WAITS):
                    advice = f"{reason}; give another --url" if reason else f"{one_line(error)}; try later"
                    raise UserError(f"{remote.url}: {advice}, {by_hand}") from error
                if isinstance(error, HTTPError) and error.code == 416:             # not a part of that file
                    part.unlink(missing_ok=True)
            time.sleep(WAITS[failures - 1])
    if found := fault(part, remote):
        part.unlink()
        note.unlink(missing_ok=True)
        raise UserError(f"{remote.url}: {found}; not kept; give the right --url and --sha256, {by_hand}")
    os.replace(part, path)
    note.unlink(missing_ok=True)


def final(error):
    """Why trying again would meet the same error; "" when it might not."""
    if isinstance(error, HTTPError):
        error.close()
        return "" if error.code in PASSING_CODES else one_line(error)
    reason = getattr(error, "reason", None)
    if "unknown url type" in str(reason):
        return "leads on from https to an address that is not https; refused"
    return one_line(reason) if isinstance(reason, ssl.SSLCertVerificationError) else ""


def receive(remote, part, note, timeout, bar):
    """Receive what ``part`` lacks of the file.

    A part is continued only when the file is known to be the same: by the ETag or date in ``note``, or
    because its hash tells in the end.  Raises ConnectionError when the connection ends too soon.
    """
    known = json.loads(note.read_text()) if note.exists() else {}
    start = part.stat().st_size if part.exists() and (known.get("version") or remote.digest) else 0
    if start and start == known.get("total"):
        return
    headers = {"User-Agent": "plainvox", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        headers |= {"If-Range": known["version"]} if known.get("version") else {}
    with opener(remote.url).open(request.Request(remote.url, headers=headers), timeout=timeout) as response:
        length = response.headers.get("Content-Length")
        total, version = int(length) if length else None, version_of(response)
        if response.status == 206:
            version = version or known.get("version", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            first, total = map(int, found.groups()) if found else (None, None)
            known = {"version": version, "total": total} | known
            if (first, version, total) != (start, known["version"], known["total"]):
                part.unlink(missing_ok=True)
                raise ConnectionError("the file has changed, or another part came than was asked for")
        else:
            start = 0
        check_length(remote, total, start, part.parent)
        with open(part, "ab" if start else "wb") as file:
            note.write_text(json.dumps({"version": version, "total": total}))
            bar.reset(total)
            bar.update(start)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def opener(url):
    """What opens ``url``; https never leads on to http."""
    director = request.OpenerDirector()
    handlers = [request.ProxyHandler, request.UnknownHandler, request.HTTPSHandler,
                request.HTTPRedirectHandler, request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor]
    for handler in handlers + ([request.HTTPHandler] if urlsplit(url).scheme == "http" else []):
        director.add_handler(handler())
    return director


def version_of(response):
    """What tells versions of a file apart in If-Range (RFC 9110, 13.1.5): a strong ETag, else its date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def check_length(remote, total, start, folder):
    """Raise UserError when the file has another length than expected, none that is known, or no room."""
    if remote.size is not None and total not in (None, remote.size):
        raise UserError(f"{remote.url}: {total} bytes, not {remote.size}; give the right --url and --sha256")
    if total is None and remote.size is None and not remote.digest:
        raise UserError(f"{remote.url}: the server does not say how long the file is; give its --sha256")
    free = shutil.disk_usage(folder).free
    if total is not None and total - start > free:
        raise UserError(f"{folder}: {total - start} bytes are to come, but {free} are free")


def fault(path, remote):
    """Why the file at ``path`` is not that of ``remote``, or None."""
    size = path.stat().st_size
    if remote.size not in (None, size):
        return f"{size} bytes, not {remote.size}"
    algorithm, _, digest = remote.digest.partition(":")
    if digest:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != digest:
            return f"{algorithm} {found}, not {digest}"
    name = remote.name.lower()
    is_kind, kind = ((zipfile.is_zipfile, "zip archive") if name.endswith(".zip") else
                     (tarfile.is_tarfile, "tar archive") if remote.packed else (h5py.is_hdf5, "HDF5 file"))
    return None if is_kind(path) else f"no {kind}"
