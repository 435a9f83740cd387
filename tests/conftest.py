"""What every test shares: one thread a process, a folder of its own, and ways to run a script."""

import http.server
import os
import threading

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; results then have the same bits in every process

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from scripts import ROWS, environment, run_main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test leaves anything in the folder that pytest was started from."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", params=ROWS, ids=lambda row: row.name)
def row(request):
    """A script, as the table in scripts.py describes it."""
    return request.param


@pytest.fixture
def call(capsys):
    """call(row, *flags): the script's main in this process; gives back its exit status and what it printed."""

    def call(row, *flags):
        capsys.readouterr()
        code = run_main(row, *flags)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Where children of a process run that has imported everything; see torture.py."""
    from torture import Lab  # which not every test needs

    with contextlib.closing(Lab(tmp_path_factory.mktemp("lab"), processes=False)) as lab:
        yield lab


@pytest.fixture
def start():
    """start(file, *flags): the script in a process of its own, which is ended with the test at the latest."""
    children = []

    def start(file, *flags, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | options
        children.append(subprocess.Popen([sys.executable, str(file), *map(str, flags)], **options))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers all requests alike, but those for a page."""

    def do_GET(self):  # noqa: N802
        self.server.asked.append(self.path)
        answer = 200, b"<html>This domain is for sale</html>", None
        if self.path != "/page":
            answer = self.server.answer(self.path) if callable(self.server.answer) else self.server.answer
        if answer is None:
            self.server.over.wait(60)
            return
        status, body, length = answer
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/page")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server: `answer` is (status, body, promised length), None for silence, or takes a path and gives these.

    `asked` are the paths; 302 leads to a page.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.over, server.answer = [], threading.Event(), None
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()
