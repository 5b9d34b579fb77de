"""Upload to the Hub and load by name, through huggingface_hub and a small hub on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from turbo import make_turbo

REVISION = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: make a repository, commit, download; files are small."""

    files, made = {}, []

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": len(content),
            "X-Repo-Commit": REVISION,
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "auth": {}})
        if path.startswith("/api/models/me/painter/tree"):
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(file), "oid": name}
                    for name, file in self.files.items()
                ]
            )
        if path.startswith("/api/models/me/painter"):
            return self.answer(
                {
                    "id": "me/painter",
                    "sha": REVISION,
                    "siblings": [{"rfilename": name} for name in self.files],
                }
            )
        name = path.removeprefix(f"/me/painter/resolve/{REVISION}/")
        if name not in self.files:
            return self.answer({"error": "no such thing"}, 404, **{"X-Error-Code": "RepoNotFound"})
        self.answer(self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"')

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.answer({"url": f"{self.address()}/me/painter", "id": "me/painter"})
        if self.path.endswith("/preupload/main"):
            return self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {
                    "success": True,
                    "commitOid": REVISION,
                    "commitUrl": f"{self.address()}/me/painter/commit/{REVISION}",
                }
            )
        self.answer({"errors": [], "warnings": []})  # the card's header is fine

    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment of a process that knows no other hub than this one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_token",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()


LOAD = """
import sys
import numpy as np
from genima.episodes import CAMERAS
from genima.painter import load_painter
random = np.random.default_rng(0)
views = {camera: random.integers(0, 255, (1, 16, 16, 3), np.uint8) for camera in CAMERAS}
here = load_painter(sys.argv[1]).paint(views, ["push the blue button"])
there = load_painter("me/painter").paint(views, ["push the blue button"])
assert all(np.array_equal(here[camera], there[camera]) for camera in CAMERAS)
load_painter("me/nothing")
"""


def test_what_is_pushed_can_be_loaded_by_name(recorded, tmp_path, hub):
    base, run = make_turbo(tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    for name in ("episodes", "spheres"):
        (run / name).symlink_to(recorded / name)
    command = ["train_controlnet.py", "--run", run, "--size", "sd-turbo", "--base", base]
    command += ["--resolution", "32", "--steps", "2", "--batch-size", "2"]
    command += ["--learning-rate", "0.01", "--push-to-hub", "me/painter"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=hub, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Uploaded (private): " in done.stdout, done.stderr
    assert Hub.made == [{"name": "painter", "organization": "me", "visibility": "private"}]
    assert set(Hub.files) >= {
        "README.md",
        "painter.json",
        "validation.png",
        "losses.csv",
        "controlnet/config.json",
    }
    assert not [name for name in Hub.files if name.endswith((".pt", ".hdf5"))]
    card = Hub.files["README.md"].decode()
    assert (
        "license_name: stability-ai-community" in card
        and "base_model: stabilityai/sd-turbo" in card
        and 'load_painter("me/painter")' in card
    )
    done = subprocess.run(
        [sys.executable, "-c", LOAD, run / "controlnet"],
        cwd=ROOT,
        env=hub,
        capture_output=True,
        text=True,
    )
    assert (
        "UserError: me/nothing is no folder here, and the Hugging Face Hub gives none of that name"
        in done.stderr
    ), done.stderr
