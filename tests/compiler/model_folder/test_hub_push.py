"""Uploads, to a server of our own that speaks as much of the hub's protocol as they need."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qcompile.compiler.model_folder import hub
from qcompile.errors import OutputError

TOKEN = "hf_averysecrettoken"
COMMIT = "https://huggingface.co/me/small/commit/1"


@dataclass
class Server:
    """A stand-in for the hub. refuses: the status of each answer to a commit, 0 for success."""

    url: str = ""
    refuses: int = 0
    created: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON for a POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(f"{asked.get('organization')}/{asked['name']}")
            return 200, {"url": "https://huggingface.co/me/small"}
        if path.startswith("/api/models/me/small/preupload/"):
            names = [f["path"] for f in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": n, **plain} for n in names]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if self.refuses:
            return self.refuses, {"error": f"not allowed for {TOKEN}"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                self.summaries.append(line["value"]["summary"])
        return 200, {"commitUrl": COMMIT, "commitOid": "1"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    library = pytest.importorskip("huggingface_hub")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.tokens.add(self.headers["Authorization"])
            status, answer = state.answer(self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if "error" in answer:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing to print."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(hub, "_client", lambda: library.HfApi(endpoint=state.url, token=TOKEN))
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_q4.onnx").write_bytes(b"q4")
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "secret.txt").write_text("not ours")
    return tmp_path


def test_the_named_files_go_up_in_one_commit(server: Server, folder: Path) -> None:
    names = ["README.md", "onnx/model_q4.onnx"]
    assert hub.push("me/small", folder, names, "two files") == COMMIT
    assert server.files == {"README.md": b"card", "onnx/model_q4.onnx": b"q4"}
    assert server.created == ["me/small"] and server.summaries == ["two files"]
    assert server.tokens == {f"Bearer {TOKEN}"}


def test_a_failure_does_not_show_the_token(
    server: Server, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.refuses = 403
    with pytest.raises(OutputError, match="is written, but cannot be uploaded to 'me/small'") as e:
        hub.push("me/small", folder, ["README.md"], "a file")
    assert e.value.__cause__ is e.value.__context__ is None  # else -v would print them
    assert TOKEN not in str(e.value) + "".join(capfd.readouterr())


def test_a_message_with_the_token_in_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Client:
        token = TOKEN

        def create_repo(self, *_: object, **__: object) -> None:
            raise RuntimeError(f"{TOKEN} has no right to write")

    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "_client", Client)
    with pytest.raises(OutputError, match=r": \*\*\* has no right to write"):
        hub.push("me/small", folder, [], "")


def test_what_is_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("huggingface_hub")
    for name in ("small", "a/b/c", "../b", ""):
        with pytest.raises(OutputError, match="expected a repository, ORG/NAME"):
            hub.check_push(name)
    monkeypatch.setattr(hub, "_client", library.HfApi)
    monkeypatch.setattr(hub, "_saved_token", lambda: None)
    with pytest.raises(OutputError, match="needs a token"):
        hub.check_push("me/small")
    monkeypatch.setattr(hub, "_saved_token", lambda: TOKEN)
    hub.check_push("me/small")
