"""Weights from files and URLs, with a server of our own."""

from __future__ import annotations

import hashlib
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from regionspot_d2.files import WeightsNotFoundError, cache_dir, local_weights

KEY = "MODEL.LOCALIZER.WEIGHTS"
CONTENT = b"weights" * 100_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(HTTPServer):
    """Serves the same content at every address, whole or (below /cut/) only its beginning."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path.startswith("/missing/"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path.startswith("/cut/") else CONTENT)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("REGIONSPOT_CACHE", "~/elsewhere")
    assert cache_dir() == Path("/home/somebody/elsewhere")
    monkeypatch.delenv("REGIONSPOT_CACHE")
    assert cache_dir() == Path("/home/somebody/.cache/regionspot_d2")


def test_empty_means_random_weights(caplog):
    assert local_weights("", KEY) is None
    assert f"{KEY} is empty" in caplog.text


def test_file(tmp_path, monkeypatch):
    path = tmp_path / "sam.pth"
    path.write_bytes(CONTENT)
    assert local_weights(str(path), KEY) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_weights("~/sam.pth", KEY) == path


@pytest.mark.parametrize("value", ["no/such/sam.pth", "other-scheme://sam.pth", "."])
def test_missing_file(value):
    with pytest.raises(WeightsNotFoundError, match=f"{KEY} .* does not exist: {value}"):
        local_weights(value, KEY)


def test_path_manager_scheme(tmp_path, empty_cache):
    from detectron2.utils.file_io import PathManager
    from iopath.common.file_io import PathHandler

    class Shelf(PathHandler):
        def _get_supported_prefixes(self):
            return ["shelf://"]

        def _get_local_path(self, path, **kwargs):
            if path == "shelf://locked":
                raise PermissionError("the shelf is locked")
            return str(tmp_path / path.removeprefix("shelf://"))

    handler = Shelf()
    PathManager.register_handler(handler)
    try:
        (tmp_path / "sam.pth").write_bytes(CONTENT)
        assert local_weights("shelf://sam.pth", KEY) == tmp_path / "sam.pth"
        with pytest.raises(WeightsNotFoundError, match="does not exist: shelf://other.pth"):
            local_weights("shelf://other.pth", KEY)
        with pytest.raises(WeightsNotFoundError, match=f"{KEY} .* the shelf is locked"):
            local_weights("shelf://locked", KEY)
    finally:
        del PathManager._path_handlers["shelf://"]


def test_url_is_downloaded_once(server, empty_cache):
    path = local_weights(f"{server.url}/a/sam.pth", KEY)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(empty_cache / "weights")
    assert path.name == "sam.pth"
    assert local_weights(f"{server.url}/a/sam.pth", KEY) == path
    assert server.requests == ["/a/sam.pth"]
    assert files_below(empty_cache) == [path]


def test_same_name_from_other_places(server, empty_cache):
    names = ["/a/model.bin", "/b/model.bin", "/b/model.bin?version=2"]
    paths = {local_weights(server.url + name, KEY) for name in names}
    assert len(paths) == 3
    assert server.requests == names


def test_file_put_there_by_hand(server, empty_cache):
    with pytest.raises(WeightsNotFoundError) as error:
        local_weights(f"{server.url}/missing/sam.pth", KEY)
    line = next(line for line in str(error.value).splitlines() if line.startswith("  file:"))
    path = Path(line.removeprefix("  file:").strip())
    path.write_bytes(CONTENT)
    assert local_weights(f"{server.url}/missing/sam.pth", KEY) == path


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/missing/sam.pth", "404"),
        ("/cut/sam.pth", f"closed after 1000 of {len(CONTENT)} bytes"),
        (f"/{'0' * 64}/sam.pth", f"sha256 is {SHA256}, the URL promises {'0' * 64}"),
    ],
)
def test_failed_download(server, empty_cache, address, reason):
    with pytest.raises(WeightsNotFoundError) as error:
        local_weights(server.url + address, KEY)
    message = str(error.value)
    assert reason in message
    assert KEY in message
    assert server.url + address in message
    assert str(empty_cache / "weights") in message
    assert files_below(empty_cache) == []


def test_promised_sha256(server, empty_cache):
    path = local_weights(f"{server.url}/clip/{SHA256}/ViT-B-16.pt", KEY)
    assert path.read_bytes() == CONTENT


def test_unreachable_host(empty_cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/sam.pth"
        with pytest.raises(FileNotFoundError, match="reason: URLError"):
            local_weights(url, KEY)


def test_cache_that_is_a_file(server, empty_cache):
    empty_cache.write_text("")
    with pytest.raises(WeightsNotFoundError, match="reason: (FileExists|NotADirectory)Error"):
        local_weights(f"{server.url}/sam.pth", KEY)


def _process(rank: int, port: int, urls: list[str], answers: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    for url in urls:
        try:
            answers.put((url, local_weights(url, KEY).read_bytes() == CONTENT))
        except WeightsNotFoundError as error:
            answers.put((url, str(error)))


def test_processes_of_one_machine(server, empty_cache):
    """One downloads; if it fails, the others fail with it and do not wait forever."""
    addresses = ["/missing/sam.pth", "/a/sam.pth"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    urls = [server.url + address for address in addresses]
    processes = [
        context.Process(target=_process, args=(rank, port, urls, answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted((answers.get(timeout=60) for _ in range(4)), key=lambda answer: answer[0])
    for process in processes:
        process.join(timeout=60)
    assert server.requests == addresses
    assert found[:2] == [(urls[1], True)] * 2
    assert [url for url, _ in found[2:]] == [urls[0]] * 2
    assert all("404" in message and KEY in message for _, message in found[2:])
