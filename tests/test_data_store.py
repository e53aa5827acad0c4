"""A range reads the same wherever the file lies, and a store that fails says so, or is asked again."""

import io
import pickle
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data import shards, store, tar

OPEN = Path("/proc/self/fd")
CONTENT = bytes(range(256)) * 4000
RANGES = [(0, 5), (1_000_000, 24_000), (77, 0), (255, 512), (len(CONTENT) - 1, 1), (0, len(CONTENT))]


class Flaky(MemoryFileSystem):
    """Memory that fails as often as it is told to."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    failures: Sequence[Exception] = ()
    asked = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _maybe(self) -> None:
        Flaky.asked += 1
        if Flaky.failures:
            error, *Flaky.failures = Flaky.failures
            raise error

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._maybe()
        return super().cat_file(path, start, end, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._maybe()
        return super().info(path, **kwargs)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(store, "FIRST_WAIT_S", 0.001)
    Flaky.failures, Flaky.asked = (), 0
    fsspec.filesystem("flaky").pipe_file("/bucket/x.bin", CONTENT)
    return "flaky://bucket/x.bin"


class Server(BaseHTTPRequestHandler):
    """Answers ranges, or with `whole` sends everything; the first `busy` requests get 503."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    whole, busy, wait_s = False, 0, 0.0

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        time.sleep(Server.wait_s)
        content, status = Server.files.get(self.path), 200
        if Server.busy:
            Server.busy, content, status = Server.busy - 1, b"", 503
        elif content is None:
            content, status = b"", 404
        elif (wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))) and not Server.whole:
            content, status = content[int(wanted[1]):int(wanted[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(store, "FIRST_WAIT_S", 0.001)
    Server.files, Server.whole, Server.busy, Server.wait_s = {"/x.bin": CONTENT}, False, 0, 0.0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def same_as_the_file(place: store.Place) -> None:
    reader = store.open(place)
    assert reader.size == len(CONTENT)
    assert [bytes(reader.read(*each)) for each in RANGES] == [CONTENT[at:at + size] for at, size in RANGES]
    assert reader.read_many(RANGES) == [CONTENT[at:at + size] for at, size in RANGES]
    assert store.read_bytes(place) == b"".join(reader.chunks()) == CONTENT
    assert pickle.loads(pickle.dumps(reader)).read(3, 4) == CONTENT[3:7]
    for at, size in ((-1, 2), (0, len(CONTENT) + 1), (len(CONTENT), 1), (0, -1)):
        with pytest.raises(OSError, match=r"x\.bin has 1,024,000 bytes, and bytes .* were asked for: the index is not that"):
            reader.read(at, size)


def test_a_file_on_a_disk_reads_by_ranges(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(CONTENT)
    for place in (tmp_path / "x.bin", str(tmp_path / "x.bin"), f"file://{tmp_path}/x.bin"):
        same_as_the_file(place)
    assert isinstance(store.open(tmp_path / "x.bin").read(3, 4), memoryview)  # no copy
    (tmp_path / "empty").touch()
    assert bytes(store.open(tmp_path / "empty").read(0, 0)) == store.read_bytes(tmp_path / "empty") == b""


def test_a_file_in_memory_reads_by_ranges(flaky: str) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/x.bin", CONTENT)
    for place in ("memory://bucket/x.bin", Path("memory://bucket/x.bin"), flaky):
        same_as_the_file(place)


def test_a_file_behind_http_reads_by_ranges(http: str) -> None:
    same_as_the_file(f"{http}/x.bin")
    same_as_the_file(Path(f"{http}/x.bin"))
    Server.busy = 2
    assert store.open(f"{http}/x.bin").read(3, 4) == CONTENT[3:7]
    reader = store.open(f"{http}/x.bin")
    Server.busy = 3
    assert reader.read_many(RANGES) == [CONTENT[at:at + size] for at, size in RANGES]
    Server.busy = 10**9
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:\d+/x.bin could not be read in 5 attempts, the last: .*503"):
        reader.read(3, 4)
    with pytest.raises(ConnectionError, match="could not be read in 5 attempts"):
        store.open(f"{http}/x.bin")
    Server.busy, Server.whole = 0, True
    with pytest.raises(OSError, match=r"x.bin cannot be read: .* sends the whole file where 4 bytes were asked for: copy it to a disk"):
        reader.read(3, 4)
    with pytest.raises(FileNotFoundError, match=r"http://127.0.0.1:\d+/y.bin cannot be read"):
        store.open(f"{http}/y.bin")


def test_a_server_that_does_not_answer_is_not_waited_for(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    reader = store.open(f"{http}/x.bin")
    Server.wait_s = 0.5
    with pytest.raises(ConnectionError, match=r"/x.bin could not be read in 2 attempts, the last: .*Timeout"):
        reader.read(3, 4)
    with pytest.raises(ConnectionError, match=r"/x.bin could not be read in 2 attempts, the last: .*Timeout"):
        store.open(f"{http}/x.bin")


def test_ranges_of_many_files_come_in_their_order(tmp_path: Path, http: str, flaky: str) -> None:
    readers: list[store.Reader] = []
    for number in range(3):
        content = bytes([number]) * 100
        (tmp_path / f"{number}").write_bytes(content)
        Server.files[f"/{number}"] = content
        fsspec.filesystem("flaky").pipe_file(f"/bucket/{number}", content)
        readers += [store.open(folder + f"/{number}") for folder in (str(tmp_path), http, "flaky://bucket")]
    Flaky.failures = [ConnectionResetError()]
    got = store.gather([(reader, 90, 10) for reader in readers])
    assert [bytes(each) for each in got] == [bytes([number]) * 10 for number in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


def test_what_fails_twice_is_asked_again_and_only_that(flaky: str) -> None:
    reader = store.open(flaky)
    Flaky.asked, Flaky.failures = 0, [TimeoutError("slow"), ConnectionResetError("gone")]
    assert reader.read_many([(0, 3), (3, 3), (6, 3)]) == [CONTENT[0:3], CONTENT[3:6], CONTENT[6:9]]
    assert Flaky.asked == 5
    Flaky.failures = [OSError("throttled")] * 2
    assert store.open(flaky).size == len(CONTENT)


def test_what_always_fails_names_the_file_and_why(flaky: str) -> None:
    reader = store.open(flaky)
    Flaky.failures = [OSError(f"throttled {i}") for i in range(99)]
    with pytest.raises(ConnectionError, match=r"flaky://bucket/x.bin could not be read in 5 attempts, the last: OSError: throttled 4\."):
        reader.read(0, 9)
    for error, kind in ((PermissionError("denied"), PermissionError), (FileNotFoundError("away"), FileNotFoundError)):
        Flaky.asked, Flaky.failures = 0, [error]
        with pytest.raises(kind, match=r"flaky://bucket/x.bin cannot be read: .*(denied|away)"):
            reader.read(0, 9)
        assert Flaky.asked == 1


def test_a_filesystem_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = sys.modules["fsspec.registry"].known_implementations  # fsspec.registry itself is a dict of the same name
    monkeypatch.setitem(known, "gs", {"class": "nowhere.Files", "err": "no gcsfs"})
    with pytest.raises(ValueError, match=r"gs://bucket/x: there is no filesystem for gs:// \(no gcsfs\): pip install gcsfs"):
        store.open("gs://bucket/x")
    with pytest.raises(ValueError, match=r"there is no filesystem for what:// .*: give a path, or a URL that fsspec knows"):
        store.open("what://bucket/x")


def test_a_file_that_was_written_again_is_not_read_for_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(CONTENT)
    before = store.open(path)
    (tmp_path / "new").write_bytes(CONTENT[::-1])
    (tmp_path / "new").rename(path)
    with pytest.raises(OSError, match="changed since it was opened"):
        before.read(0, 4)
    assert store.open(path).read(0, 4) == CONTENT[::-1][:4]


def test_files_on_a_disk_hold_no_descriptor_each(tmp_path: Path) -> None:
    held = len(list(OPEN.iterdir()))
    readers: list[store.Reader] = []
    for number in range(store.MAPS_HELD + 200):
        (tmp_path / f"{number}").write_bytes(number.to_bytes(4, "little"))
        readers.append(store.open(tmp_path / f"{number}"))
    assert [int.from_bytes(reader.read(0, 4), "little") for reader in readers] == list(range(len(readers)))
    assert len(list(OPEN.iterdir())) <= held + store.MAPS_HELD


def test_folders_are_listed(tmp_path: Path, flaky: str) -> None:
    for name in ("b.tar", "a.tar", "in/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        fsspec.filesystem("flaky").pipe_file(f"/listed/{name}", b"x")
    assert store.names(tmp_path) == store.names("flaky://listed") == store.names("flaky://listed/") == ["a.tar", "b.tar", "in"]
    assert store.join("flaky://listed", "a.tar") == store.join(Path("flaky://listed/"), "a.tar") == "flaky://listed/a.tar"
    assert store.join(str(tmp_path), "a.tar") == tmp_path / "a.tar"
    for nowhere in (tmp_path / "no", "flaky://no"):
        with pytest.raises(FileNotFoundError, match="no"):
            store.names(nowhere)
    for folder in (tmp_path, "flaky://listed/in"):
        with pytest.raises(FileNotFoundError, match="is no file"):
            store.open(folder)


def test_a_shard_in_a_store_is_read_as_on_a_disk(tmp_path: Path, flaky: str) -> None:
    shards.write_tar(tmp_path / "x.tar", [{"__key__": f"{i}", "txt": bytes(i)} for i in range(9)])
    content = (tmp_path / "x.tar").read_bytes()
    fsspec.filesystem("flaky").pipe_file("/bucket/x.tar", content)
    Flaky.failures = [OSError("throttled")]
    for place in (tmp_path / "x.tar", str(tmp_path / "x.tar"), "flaky://bucket/x.tar"):
        with tar.opened(place) as opened:
            assert opened[:] == content
            assert tar.members(opened) == tar.members(content)
    with io.BytesIO() as file:
        store.copy("flaky://bucket/x.tar", file)
        assert file.getvalue() == content
