"""Downloads from a server on loopback: whole and right, or an error; and what is made of the archives."""

import errno
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import threading
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from datasets import download as module
from datasets import fetch as fetching
from datasets.download import DATASETS, SNEMI3D_NM, download
from datasets.fetch import Remote
from utils.config import BadFile, UserError

CHUNK = fetching.CHUNK


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files`` {path: bytes}, and misbehaves as ``server.plan`` says, one word per request."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        word = server.plan.pop(0) if server.plan else ""
        if word.isdigit():
            return self.send_error(int(word))
        if word.startswith("to "):
            self.send_response(302)
            self.send_header("Location", word[3:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send(content, word, server)

    def send(self, content, word, server):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked and server.ranges else 0
        if self.headers.get("If-Range", server.etag) != server.etag and not server.careless:
            first = 0
        if first and first >= len(content):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            shown = first + 1 if word == "other part" else first
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if not server.silent:
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        stop = len(content) if word != "cut" else first + (len(content) - first) // 2
        self.wfile.write(content[first:stop])

    def log_message(self, *words):
        """Nothing on stderr."""


@pytest.fixture
def server(monkeypatch):
    """A server: files, plan, etag, ranges (knows them), careless (ignores If-Range), silent (no length)."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "WAITS", (0.01, 0.01, 0.01))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.plan, server.requests = {}, [], []
        server.etag, server.ranges, server.careless, server.silent = '"v1"', True, False, False
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def hdf5(size=3 * CHUNK + 17, seed=0):
    """Bytes of an HDF5 file with random content."""
    file = io.BytesIO()
    with h5py.File(file, "w") as output:
        output["volumes/raw"] = np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8)
    return file.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def get(server, folder, name="sampleX.hdf", **options):
    return download("cremi3d", folder, f"{server.url}/{name}", timeout=5, progress=False, **options)


def names(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def refused(kind, match, call, *words, **options):
    with pytest.raises(kind, match=match) as error:
        call(*words, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sample(server):
    """A file on the server."""
    server.files["/sampleX.hdf"] = hdf5()
    return server.files["/sampleX.hdf"]


def test_a_file_arrives_whole_under_its_name_and_once(server, sample, tmp_path):
    """The second call asks nothing, with a hash and without."""
    for hash_ in (None, sha256(sample), sha256(sample).upper()):
        (path,) = get(server, tmp_path, sha256=hash_)
        assert path == tmp_path / "cremi3d/sampleX.h5" and path.read_bytes() == sample
    assert len(server.requests) == 1 and names(tmp_path) == ["sampleX.h5"]


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("etag", ['"v1"', ""])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_continued_where_it_ended(server, sample, tmp_path, ranges, etag, hashed):
    """By a range where that is safe: the version is known to be the same, or a hash tells; else from 0."""
    server.plan, server.etag, server.ranges = ["cut", "cut"], etag, ranges
    (path,) = get(server, tmp_path, sha256=sha256(sample) if hashed else None)
    assert path.read_bytes() == sample and names(tmp_path) == ["sampleX.h5"]
    half = len(sample) // 2
    quarter = half + (len(sample) - half) // 2 if ranges and (etag or hashed) else half
    asked = [range_ for _, range_, _ in server.requests]
    expected = [None, f"bytes={half}-", f"bytes={quarter}-"] if etag or hashed else [None] * 3
    assert asked == expected
    assert server.requests[1][2] == (etag or None)


def test_a_part_of_an_ended_process_is_continued(server, sample, tmp_path, monkeypatch):
    """Ctrl-C in the middle keeps what was received; nothing stands under the final name."""
    real, calls = fetching.tqdm.update, []

    def interrupted(bar, n):
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(bar, n)

    monkeypatch.setattr(fetching.tqdm, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path)
    assert names(tmp_path) == ["sampleX.h5.part", "sampleX.h5.part.json"]
    monkeypatch.undo()
    monkeypatch.setattr(fetching, "WAITS", (0.01,))
    (path,) = get(server, tmp_path)
    assert server.requests[1][1:] == (f"bytes={2 * CHUNK}-", '"v1"')
    assert path.read_bytes() == sample and names(tmp_path) == ["sampleX.h5"]


@pytest.mark.parametrize("careless", [False, True])
def test_a_file_that_changed_is_not_glued_to_the_old_half(server, sample, tmp_path, careless):
    """If-Range asks for it; a server that ignores that is found out by the ETag of its answer."""
    server.plan = ["cut"] + ["503"] * 9
    refused(UserError, "503", get, server, tmp_path)
    new = server.files["/sampleX.hdf"] = hdf5(seed=1)
    assert len(new) == len(sample)
    server.plan, server.etag, server.careless = [], '"v2"', careless
    (path,) = get(server, tmp_path)
    assert path.read_bytes() == new
    assert server.requests[-1][1] == (None if careless else f"bytes={len(sample) // 2}-")


def test_a_changed_length_is_not_glued_either(server, sample, tmp_path):
    """Of a server without versions, where only a hash allows to continue."""
    server.etag, server.plan = "", ["cut"] + ["503"] * 9
    new = hdf5(len(sample) * 2, seed=1)
    refused(UserError, "503", get, server, tmp_path, sha256=sha256(new))
    server.files["/sampleX.hdf"], server.plan = new, []
    (path,) = get(server, tmp_path, sha256=sha256(new))
    assert path.read_bytes() == new and server.requests[-1][1] is None


def test_an_answer_with_another_part_is_not_taken(server, sample, tmp_path):
    """Its place is in Content-Range."""
    server.plan = ["cut", "other part"]
    (path,) = get(server, tmp_path)
    assert path.read_bytes() == sample and len(server.requests) == 3


def test_a_part_that_is_whole_asks_nothing_and_one_too_long_starts_afresh(server, sample, tmp_path):
    """Left by a process that ended between the last byte and the renaming; and by a larger old file."""
    home = tmp_path / "cremi3d"
    home.mkdir()
    (home / "sampleX.h5.part").write_bytes(sample)
    (home / "sampleX.h5.part.json").write_text(json.dumps({"version": '"v1"', "total": len(sample)}))
    (path,) = get(server, tmp_path)
    assert not server.requests and path.read_bytes() == sample
    path.unlink()
    (home / "sampleX.h5.part").write_bytes(sample + b"more")
    (path,) = get(server, tmp_path, sha256=sha256(sample))
    assert path.read_bytes() == sample and [request[1] for request in server.requests][1:] == [None]


@pytest.mark.parametrize("words", [["503"], ["500", "429", "502"],
                                   ["cut", "504", "cut", "504", "504", "cut"]])
def test_passing_errors_are_tried_again(server, sample, tmp_path, words):
    """A few times, and anew after each byte that came."""
    server.plan = list(words)
    (path,) = get(server, tmp_path)
    assert path.read_bytes() == sample and len(server.requests) == len(words) + 1


def test_an_error_that_stays_ends_in_one_line_with_advice(server, sample, tmp_path):
    """The URL, what the server said, and where the file goes when it is fetched by hand."""
    server.plan = ["503"] * 99
    line = refused(UserError, "503", get, server, tmp_path)
    assert f"{server.url}/sampleX.hdf" in line and str(tmp_path / "cremi3d/sampleX.h5") in line
    assert len(server.requests) == 4
    server.requests.clear()
    server.plan.clear()
    refused(UserError, "404.*another --url", get, server, tmp_path, "absent.hdf")
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_no_network_is_one_line(tmp_path, monkeypatch):
    """Nobody listens on this port."""
    monkeypatch.setattr(fetching, "WAITS", (0.01,))
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/x.hdf"
    refused(UserError, "refused", download, "cremi3d", tmp_path, url, progress=False)


def test_a_server_that_falls_silent_is_given_up(sample, server, tmp_path, monkeypatch):
    """After timeout seconds without a byte, not never."""
    release = threading.Event()
    monkeypatch.setattr(fetching, "WAITS", (0.01,))
    monkeypatch.setattr(Handler, "send", lambda *words: release.wait(5))
    try:
        refused(UserError, "timed out", download, "cremi3d", tmp_path, f"{server.url}/sampleX.hdf",
                timeout=0.1, progress=False)
    finally:
        release.set()


def test_a_wrong_hash_is_not_kept(server, sample, tmp_path):
    """Neither under the final name nor as a part that the next call would continue."""
    line = refused(UserError, "sha256", get, server, tmp_path, sha256="0" * 64)
    assert sha256(sample) in line and names(tmp_path) == []


def test_a_web_page_is_no_volume(server, tmp_path):
    """What a log-in or an error page with status 200 would leave."""
    server.files["/sampleX.hdf"] = b"<html>Please log in</html>"
    refused(UserError, "no HDF5 file", get, server, tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_it_is_received(server, sample, tmp_path, monkeypatch):
    """The table's size, where it has one."""
    remote = Remote(f"{server.url}/sampleX.hdf", ("sampleX.h5",), size=len(sample) + 1)
    monkeypatch.setitem(DATASETS, "cremi3d", [remote])
    refused(UserError, f"{len(sample)} bytes, not {len(sample) + 1}", download, "cremi3d", tmp_path,
            progress=False)
    assert names(tmp_path) == []


def test_without_a_length_a_hash_is_needed(server, sample, tmp_path):
    """Else nobody could tell a whole file from half of one."""
    server.silent = True
    refused(UserError, "does not say how long", get, server, tmp_path)
    server.plan = ["cut"]
    refused(UserError, "sha256", get, server, tmp_path, sha256=sha256(sample))
    (path,) = get(server, tmp_path, sha256=sha256(sample))
    assert path.read_bytes() == sample


def test_a_file_of_the_user_is_not_overwritten(server, sample, tmp_path):
    """A file of that name with other content is named, and stays."""
    home = tmp_path / "cremi3d"
    home.mkdir()
    mine = home / "sampleX.h5"
    mine.write_bytes(hdf5(100, seed=5))
    before = mine.read_bytes()
    refused(UserError, "move it away", get, server, tmp_path, sha256=sha256(sample))
    assert mine.read_bytes() == before and not server.requests


def test_a_full_disk_is_one_line_and_keeps_the_part(server, sample, tmp_path, monkeypatch):
    """Known beforehand where the length is, and else met while writing."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 10))
    refused(UserError, "10 are free", get, server, tmp_path)
    monkeypatch.undo()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(UserError, "No space left", get, server, tmp_path)
    assert "sampleX.h5.part" in names(tmp_path) and "sampleX.h5" not in names(tmp_path)


def test_https_does_not_lead_to_http(server, sample, tmp_path, monkeypatch):
    """On the way it could be changed by anybody; a redirect within https is followed."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                    "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
                   check=True, capture_output=True)
    plain = f"http://127.0.0.1:{server.server_port}"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as safe:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        safe.socket = context.wrap_socket(safe.socket, server_side=True)
        safe.__dict__.update({name: vars(server)[name] for name in ("files", "etag", "ranges", "careless")})
        safe.silent, safe.requests, safe.url = False, [], f"https://127.0.0.1:{safe.server_port}"
        safe.plan = [f"to {plain}/sampleX.hdf"]
        thread = threading.Thread(target=safe.serve_forever, args=(0.01,))
        thread.start()
        try:
            refused(UserError, "certificate", get, safe, tmp_path / "untrusted")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
            refused(UserError, "not https; refused", get, safe, tmp_path / "data")
            assert not server.requests and names(tmp_path / "data") == []
            safe.plan = [f"to {safe.url}/sampleX.hdf"]
            assert get(safe, tmp_path / "data", "other.hdf")[0].read_bytes() == sample
        finally:
            safe.shutdown()
            thread.join()


def test_redirects_are_followed_and_their_ranges_kept(server, sample, tmp_path):
    """Archives hand out addresses that last minutes."""
    server.plan = ["to /sampleX.hdf", "cut", "to /sampleX.hdf"]
    (path,) = get(server, tmp_path, "here.hdf")
    assert path.name == "here.h5" and path.read_bytes() == sample
    assert server.requests[-1][:2] == ("/sampleX.hdf", f"bytes={len(sample) // 2}-")


def archive(members):
    """Bytes of a zip of {name: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as output:
        for name, content in members.items():
            output.writestr(name, content)
    return file.getvalue()


def tiff(volume):
    file = io.BytesIO()
    tifffile.imwrite(file, volume, photometric="minisblack", compression="zlib")
    return file.getvalue()


@pytest.fixture
def snemi(server):
    """{our name: volume} of a snemi.zip on the server, in its published layout."""
    rng = np.random.default_rng(0)
    volumes = {"AC4_inputs": rng.integers(0, 255, (21, 40, 33)).astype(np.uint8),
               "AC4_labels": rng.integers(0, 400, (21, 40, 33)).astype(np.uint16),
               "AC3_inputs": rng.integers(0, 255, (5, 40, 33)).astype(np.uint8)}
    server.files["/snemi.zip"] = archive({
        "snemi/image/train-input.tif": tiff(volumes["AC4_inputs"]), "snemi/README": b"read me",
        "snemi/seg/train-labels.tif": tiff(volumes["AC4_labels"]), "__MACOSX/._train-input.tif": b"mac",
        "snemi/image/test-input.tif": tiff(volumes["AC3_inputs"])})
    return volumes


def get_snemi(server, folder, **options):
    content = server.files["/snemi.zip"]
    return download("snemi3d", folder, f"{server.url}/snemi.zip", sha256(content), progress=False, **options)


def test_snemi3d_becomes_hdf5_under_our_names(server, snemi, tmp_path):
    """TIFF stacks section by section into "main", with the voxel size; the archive and folders are gone."""
    paths = get_snemi(server, tmp_path)
    assert [path.name for path in paths] == ["AC4_inputs.h5", "AC4_labels.h5", "AC3_inputs.h5"]
    assert sorted(path.name for path in (tmp_path / "snemi3d").iterdir()) == sorted(f"{n}.h5" for n in snemi)
    for path in paths:
        with h5py.File(path) as file:
            expected = snemi[path.stem]
            assert file["main"].dtype == expected.dtype and np.array_equal(file["main"], expected)
            assert tuple(file["main"].attrs["resolution"]) == SNEMI3D_NM
    assert get_snemi(server, tmp_path) == paths and len(server.requests) == 1


def test_an_interrupted_conversion_is_completed(server, snemi, tmp_path, monkeypatch):
    """Ctrl-C within a volume leaves none under its name; the archive is still there and not fetched again."""
    real, calls = os.replace, []

    def interrupted(source, target):
        if str(target).endswith("labels.h5"):
            raise KeyboardInterrupt
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_snemi(server, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "snemi3d/AC4_labels.h5").exists()
    assert not list((tmp_path / "snemi3d").glob(".unpacking*"))
    for path in get_snemi(server, tmp_path):
        with h5py.File(path) as file:
            assert np.array_equal(file["main"], snemi[path.stem])
    assert len(server.requests) == 1


def test_an_archive_put_by_hand_is_taken(server, snemi, tmp_path):
    """As the error message advises; nothing is asked, and the user's file stays."""
    by_hand = tmp_path / "snemi3d/snemi.zip"
    by_hand.parent.mkdir()
    by_hand.write_bytes(server.files["/snemi.zip"])
    assert len(get_snemi(server, tmp_path)) == 3 and not server.requests and by_hand.exists()


def test_a_mirror_must_have_the_tables_bytes(server, snemi, tmp_path):
    """--url with the name of a file of the table: its hash holds, unless another is given."""
    server.files["/snemi.zip?download=1"] = server.files["/snemi.zip"]
    refused(UserError, f"md5 .* not {DATASETS['snemi3d'][0].digest[4:]}", download, "snemi3d", tmp_path,
            f"{server.url}/snemi.zip?download=1", progress=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("top", ["Dataset001_ME2-Beta/", "", "deep/er/"])
def test_mitoem2_becomes_its_nnunet_folder(server, tmp_path, top):
    """Whatever folders lie around it in the archive, and whole at once."""
    content = {"dataset.json": b"{}", "imagesTr/a_0000.nii.gz": b"image", "labelsTr/a.nii.gz": b"labels"}
    server.files["/Dataset001_ME2-Beta.zip"] = archive({top + name: data for name, data in content.items()})
    words = "mitoem2", tmp_path, f"{server.url}/Dataset001_ME2-Beta.zip"
    (folder,) = download(*words, progress=False)
    assert folder == tmp_path / "mitoem2/Dataset001_ME2-Beta"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == content and [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert download(*words, progress=False) == [folder] and len(server.requests) == 1


@pytest.mark.parametrize("members, kind, match", [
    ({"../imagesTr/evil": b"x"}, BadFile, "evil"),
    ({"imagesTr/zeros": bytes(10 ** 6)}, BadFile, "over 100 times"),
    ({"a/imagesTr/x": b"x", "b/imagesTr/x": b"x"}, UserError, "2 folders imagesTr"),
    ({"readme": b"x"}, UserError, "0 folders imagesTr")])
def test_an_archive_of_something_else_leaves_no_data_behind(server, tmp_path, members, kind, match):
    """Hostile or of another layout: one line, and nothing that looks like data."""
    server.files["/Dataset009_X.zip"] = archive(members)
    url = f"{server.url}/Dataset009_X.zip"
    refused(kind, match, download, "mitoem2", tmp_path / "data", url, progress=False)
    assert names(tmp_path) == ["Dataset009_X.zip"]


def test_snemi3d_without_a_volume_says_which(server, tmp_path):
    """Before anything is converted."""
    server.files["/mine.zip"] = archive({"AC4_inputs.tif": tiff(np.zeros((2, 4, 4), np.uint8))})
    url = f"{server.url}/mine.zip"
    refused(UserError, "AC4_labels.h5, AC3_inputs.h5", download, "snemi3d", tmp_path, url, progress=False)
    assert names(tmp_path) == ["mine.zip"]


@pytest.mark.parametrize("words, match", [
    (("cremi",), "did you mean cremi3d"),
    (("cremi3d", None, "0" * 64), "--sha256"),
    (("cremi3d", "http://x/a.hdf", "abc"), "64 hexadecimal"),
    (("cremi3d", "file:///etc/passwd"), "http or https"),
    (("cremi3d", "ftp://x/a.hdf"), "http or https"),
    (("cremi3d", "https://x/"), "address of a file"),
    (("cremi3d", "https://x/a.zip"), "not as a.zip"),
    (("snemi3d", "https://x/a.hdf"), "comes as snemi.zip")])
def test_words_that_make_no_sense_are_refused(tmp_path, words, match):
    """Before anything is asked or made."""
    refused(UserError, match, download, words[0], tmp_path / "data", *words[1:], progress=False)
    assert not (tmp_path / "data").exists()


def test_the_table_is_sound():
    """https only, hashes of the right length, a target each that no other has, archives known as such."""
    remotes = [remote for remotes in DATASETS.values() for remote in remotes]
    targets = [target for remote in remotes for target in remote.targets]
    assert set(DATASETS) == {"snemi3d", "cremi3d", "mitoem2"} and len(targets) == len(set(targets)) == 14
    for remote in remotes:
        assert remote.url.startswith("https://") and remote.name in remote.url
        algorithm, _, digest = remote.digest.partition(":")
        assert len(digest) == {"": 0, "md5": 32, "sha256": 64}[algorithm]
        assert remote.packed == remote.name.endswith(".zip")
