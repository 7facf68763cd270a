"""Downloads tell how far they are: from a hub on this machine, which is as slow as one far away."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
COMMIT = "1" * 40
LOAD = """
import sys, time
from runtime.progress import Progress
Progress.interval = 0.2
import torch
from models import language_model
for name in ("whole", "shards"):
    print(type(language_model.load(f"someone/{name}", torch.device("cpu"))[0]).__name__)
    print("done", file=sys.stderr, flush=True)
time.sleep(1)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as loading a model asks for; someone's models lie in the folder `someone`."""

    someone: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):  # noqa: N802
        self.answer(with_body=False)

    def do_GET(self):  # noqa: N802
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.split("?")[0]
        name = path.split("/someone/")[-1].split("/")[0]
        folder = self.someone / name
        file = folder / path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/"):
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            known = {"id": f"someone/{name}", "sha": COMMIT, "siblings": files}
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in folder.iterdir()
            ]
            body = json.dumps(tree if "/tree/" in path else known).encode()
        elif file.is_file():
            body = file.read_bytes()
        else:
            body = None
        self.send_response(404 if body is None else 200)
        body = b"" if body is None else body
        if not body:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            step = max(1, len(body) // 5)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                if file.suffix == ".safetensors":
                    time.sleep(0.25)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("TheHub", (Hub,), {"someone": tmp_path}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_tells_how_far_it_is_in_lines(tmp_path, hub):
    tiny.save_lm(tmp_path / "whole")
    tiny.save_lm(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    tiny.tiny_lm().save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    said = run.stderr.decode()
    assert run.returncode == 0 and run.stdout == b"Qwen2ForCausalLM\n" * 2 and "\r" not in said, said
    whole, shards, after = (part.strip().splitlines() for part in said.split("done\n"))
    for name, lines in (("whole", whole), ("shards", shards)):
        first = next(line for line in lines if line.startswith("loading"))
        assert first.startswith(f"loading someone/{name}: what ") and first.endswith(f"is downloaded from {hub}")
        assert len([line for line in lines if "B of " in line]) >= 4
    assert whole[-1].split(", ")[0].endswith("model.safetensors: 127kB of 127kB (100.0 %)")
    assert len(after) == len(set(after)) <= 3 and all("in all" in line for line in after)  # no bar goes on
