"""The Hub's client against a server that answers as the Hub does, and against none."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from thesislib.errors import BadInput
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.sources.rows import TEXT, Source
from thesislib.sources.rows import rows as read_rows

REPOSITORY = Path(__file__).parents[2]
COMMIT = "c0ffee" * 6 + "c0de"


class Hub(BaseHTTPRequestHandler):
    """What `snapshot_download` asks for one model, org/tiny, whose files are in `self.server.folder`."""

    def do_GET(self):
        folder, path = self.server.folder, self.path.split("?")[0]
        self.server.asked.append(path)
        files = sorted(p for p in folder.iterdir())
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main", "/api/models/org/tiny/revision/v1"):
            siblings = [{"rfilename": p.name} for p in files]
            self.answer(
                json.dumps(
                    {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
                ).encode()
            )
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)} for p in files]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/org/tiny/resolve/") and (folder / path.split("/")[-1]).is_file():
            file = folder / path.split("/")[-1]
            self.answer(file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})
        elif path == "/":
            self.answer(b"a stand-in for the Hub")
        else:
            self.answer(b"", {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def answer(self, body, headers=(), status=200):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An address that refuses connections, empty caches, and the offline switch off."""
    import datasets
    from huggingface_hub import constants

    point_at(monkeypatch, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def point_at(monkeypatch, endpoint):
    import datasets
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for switch in (constants, datasets.config):
        monkeypatch.setattr(switch, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)


def check_fails_soon(ask, name):
    began = time.monotonic()
    with pytest.raises(BadInput) as raised:
        ask()
    # a bound against the clients' retry loops, no measure of speed
    assert time.monotonic() - began < 20
    message = str(raised.value)
    assert "\n" not in message and name in message
    assert "Hugging Face Hub" in message and "network" in message and "'embedded'" in message


@pytest.mark.parametrize("spec", ["hub:meta-llama/Llama-3.2-1B-Instruct", "hub:org/tiny@v1"])
def test_model_without_network(no_hub, spec):
    check_fails_soon(lambda: load_subject(spec), spec.removeprefix("hub:").split("@")[0])


@pytest.mark.parametrize(
    ("task", "name"),
    [("wikitext", "Salesforce/wikitext"), ("trivia", "mandarjoshi/trivia_qa"), ("calibration_c4", "allenai/c4")],
)
def test_data_without_network(no_hub, task, name):
    check_fails_soon(lambda: read_rows(task, "hub"), name)


def test_network_that_swallows_everything(no_hub, monkeypatch):
    # as a firewall does: the connection opens and no answer comes
    with socket.create_server(("127.0.0.1", 0)) as mute:
        point_at(monkeypatch, f"http://127.0.0.1:{mute.getsockname()[1]}")
        check_fails_soon(lambda: load_subject("hub:org/tiny"), "org/tiny")


@pytest.mark.parametrize("spec", ["hub:", "hub:a/b/c", "hub:no spaces/please"])
def test_name_that_cannot_be(no_hub, spec):
    check_fails_soon(lambda: load_subject(spec), spec.removeprefix("hub:"))


def test_offline_switch_is_obeyed(no_hub, monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("httpx.head", lambda *a, **k: asked.append(a))
    check_fails_soon(lambda: load_subject("hub:org/tiny"), "org/tiny")
    assert asked == []


@pytest.mark.processes
def test_model_from_the_hub_and_again_without_it(tiny, tmp_path):
    subject = tiny(layers=2)
    served = save_checkpoint(subject, tmp_path / "served")
    (served / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = served, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = textwrap.dedent("""
        import sys
        from thesislib.errors import BadInput
        from thesislib.formats.load import load_subject

        def load(spec):
            try:
                subject = load_subject(spec)
                print(subject.name, subject.fingerprint, flush=True)
            except BadInput as error:
                print(error, flush=True)

        load("hub:org/tiny")
        load("hub:org/tiny@v1")
        load("hub:org/other")
        sys.stdin.readline()  # until the server is gone
        load("hub:org/tiny")
        load("hub:org/tiny@v2")
    """)
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "TRANSFORMERS_")) and not k.upper().endswith("_PROXY")
    }
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        online = [process.stdout.readline().strip() for _ in range(3)]
        server.shutdown()
        server.server_close()
        gone, _ = process.communicate("\n", timeout=60)
    loaded = f"tiny {subject.fingerprint}"
    assert online[:2] == [loaded, loaded]
    assert "'org/other'" in online[2] and "check the name" in online[2]
    assert not any("pytorch_model" in path for path in server.asked)
    again, unknown = gone.strip().splitlines()
    assert again == loaded
    assert "'org/tiny'" in unknown and "Hugging Face Hub" in unknown


@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:port"])
def test_a_data_set_out_of_the_cache(no_hub, monkeypatch, tmp_path, proxy):
    """One that was loaded before, as datasets keeps it, when nothing answers, a proxy that cannot be used or not;
    switches and proxy stay as they were."""
    import datasets
    from huggingface_hub import constants

    rows = [{"text": "alpha"}, {"text": "beta"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.load_dataset(
        "json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(tmp_path / "datasets")
    )
    (made,) = (tmp_path / "datasets" / "json").iterdir()
    made.rename(made.with_name("default"))
    (tmp_path / "datasets" / "json").rename(tmp_path / "datasets" / "org___tiny")
    for info in (tmp_path / "datasets").rglob("dataset_info.json"):
        info.write_text(
            info.read_text().replace('"dataset_name": "json"', '"dataset_name": "tiny"').replace(made.name, "default")
        )
    for file in (tmp_path / "datasets").rglob("json-test.arrow"):
        file.rename(file.with_name("tiny-test.arrow"))
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    assert read_rows(Source("tiny", {"text": TEXT}, "", "", ("org/tiny", None, "test")), "hub") == rows
    assert os.environ.get("https_proxy") == proxy
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_model_out_of_the_cache_past_a_proxy_that_cannot_be_used(no_hub, monkeypatch, tiny, tmp_path):
    folder = tmp_path / "hub" / "models--org--tiny"
    subject = tiny(layers=2)
    save_checkpoint(subject, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert load_subject("hub:org/tiny").fingerprint == subject.fingerprint
