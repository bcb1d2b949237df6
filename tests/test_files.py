import ctypes
import errno
import hashlib
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import processes
from thesislib.errors import BadInput
from thesislib.files import (
    ROOT,
    _temporary,
    cache_dir,
    check_checkout,
    damaged,
    data_file,
    explain_errors,
    inside,
    read_json,
    replaceable_folder,
    sha256_of,
    shipped,
    whole_file,
    whole_folder,
    writable_file,
    writable_folder,
    write_whole,
)
from thesislib.formats.load import save_checkpoint


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folder_appears_only_when_whole(tmp_path):
    final = tmp_path / "sub" / "final"
    with whole_folder(final) as temporary:
        (temporary / "a").write_text("1")
        assert not final.exists()
        assert temporary.parent == final.parent  # the same disk, so that the rename is atomic
    assert [p.name for p in final.parent.iterdir()] == ["final"]
    assert (final / "a").read_text() == "1"
    assert stat.S_IMODE(final.stat().st_mode) == 0o755


def test_a_kill_while_one_folder_replaces_another_leaves_no_half_of_either(tmp_path, monkeypatch):
    """At every step that changes the disk, what stands under the name is the old folder, the new one, or nothing."""
    seen, change = [], {"replace": os.replace, "rmtree": shutil.rmtree}

    def looked_at(name):
        def step(*args, **kwargs):
            change[name](*args, **kwargs)
            seen.append(sorted(p.name for p in (tmp_path / "final").glob("*")))

        return step

    for text in ("old", "new"):
        monkeypatch.setattr(os, "replace", looked_at("replace"))
        monkeypatch.setattr(shutil, "rmtree", looked_at("rmtree"))
        with whole_folder(tmp_path / "final") as temporary:
            for name in "ab":
                (temporary / f"{text}_{name}").write_text(text)
    assert {tuple(names) for names in seen} == {(), ("old_a", "old_b"), ("new_a", "new_b")}
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_file_appears_only_when_whole(tmp_path):
    final = tmp_path / "deep" / "final.bin"
    with whole_file(final) as temporary:
        temporary.write_bytes(b"whole")
        assert not final.exists() and temporary.suffix == ".bin"
    assert final.read_bytes() == b"whole" and [p.name for p in final.parent.iterdir()] == ["final.bin"]
    for error, expected in ((OSError(errno.ENOSPC, "full"), BadInput), (RuntimeError("x"), RuntimeError)):
        with pytest.raises(expected), whole_file(final.with_name("other.bin")) as temporary:
            temporary.write_bytes(b"half")
            raise error
    with (
        pytest.raises(BadInput, match="cannot be a folder or a file: a file stands above it"),
        whole_file(final / "below.bin"),
    ):
        pass
    assert [p.name for p in final.parent.iterdir()] == ["final.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_leaves_nothing_when_interrupted(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "final") as temporary:
        (temporary / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_folder_replaces_and_an_interrupted_one_keeps_the_old(tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(final) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError
    assert [p.name for p in final.iterdir()] == ["old"]
    with whole_folder(final) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in final.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_folder_on_a_full_disk_names_the_way_out(tmp_path, code):
    with pytest.raises(BadInput, match="disk is full") as raised, whole_folder(tmp_path / "final") as temporary:
        (temporary / "half").write_text("x")
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(raised.value) and "THESISLIB_CACHE" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_on_a_disk_that_fills_in_safetensors(tmp_path):
    # its writer is Rust and raises its own class, no OSError
    from safetensors import SafetensorError

    with pytest.raises(BadInput, match="disk is full"), whole_folder(tmp_path / "final"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_folder_without_room_for_itself(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(Path, "mkdir", no_space)
    with pytest.raises(BadInput, match="disk is full"), whole_folder(tmp_path / "made" / "final"):
        pass
    assert list((tmp_path / "made").iterdir()) == []


def test_folder_leaves_other_errors_as_they_are(tmp_path):
    with pytest.raises(OSError, match="odd"), whole_folder(tmp_path / "final"):
        raise OSError(errno.ECONNREFUSED, "odd")
    assert list(tmp_path.iterdir()) == []


def test_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "final").write_text("precious")
    with pytest.raises(BadInput, match="final"), whole_folder(tmp_path / "final"):
        pass
    assert (tmp_path / "final").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BadInput, match="file"), whole_folder(tmp_path / "file" / "final"):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_write_whole(tmp_path):
    path = tmp_path / "sub" / "file"
    write_whole(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_write_whole_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr("thesislib.files.os.replace", no_space)
    with pytest.raises((OSError, BadInput)):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_cache_dir_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert cache_dir().is_dir()


def test_cache_dir_falls_back_to_the_users(tmp_path, monkeypatch):
    monkeypatch.delenv("THESISLIB_CACHE", raising=False)
    monkeypatch.setattr("thesislib.files.user_cache_dir", lambda name: str(tmp_path / name))
    assert cache_dir() == tmp_path / "thesislib"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_cache_dir_that_cannot_be(tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(BadInput, match="THESISLIB_CACHE") as raised:
        cache_dir()
    assert str(tmp_path / "file") in str(raised.value)


def test_what_is_no_checkout_is_named(tmp_path):
    check_checkout("a chapter", ROOT)
    with pytest.raises(BadInput, match=f"a chapter needs a checkout.*{re.escape(str(tmp_path))} is none"):
        check_checkout("a chapter", tmp_path)


def test_data_file():
    assert data_file("manifest.json").is_file() and shipped("hw/devices").is_dir()
    with pytest.raises(BadInput, match=r"nothing\.json"):
        data_file("nothing.json")


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe{}"])
def test_read_json_names_the_file(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.json"):
        read_json(path)


def test_cache_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", "/proc")
    monkeypatch.setattr("thesislib.files.os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(BadInput, match="/proc cannot be written: set THESISLIB_CACHE"):
        cache_dir()


# ---------------------------------------------------------------- what the dead left


def killed(kind, final):
    """In a process of its own."""
    with (whole_folder if kind == "folder" else whole_file)(final) as temporary:
        (temporary / "half" if kind == "folder" else temporary).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(
    "name", ["final", "x" * 255, "é" * 127, "a-[b]*", "-x"], ids=["plain", "long", "long and no ASCII", "odd", "dash"]
)
def test_what_a_killed_process_left_is_cleared_by_the_next_and_nothing_else(tmp_path, kind, name):
    final = tmp_path / "sub" / name
    for n in (1, 2):
        process = processes().Process(target=killed, args=(kind, final))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not final.exists()
        assert len(list(final.parent.iterdir())) == 1, n  # the second one cleared what the first one left
    others = [f".{name[:9]}-2-notes", f".{name[:9]}.swp", f".{name[:9]}-0123456z"]
    for other in others:
        (final.parent / other).write_text("somebody's")
    with (whole_folder if kind == "folder" else whole_file)(final) as temporary:
        (temporary / "a" if kind == "folder" else temporary).write_text("1")
        if len(os.fsencode(name)) < 200:
            with whole_folder(final.with_name(f"{name}-2")):  # another name's does not count as this one's
                assert temporary.exists() or temporary.parent.exists()
    assert sorted(p.name for p in final.parent.iterdir()) == sorted(
        [*others, name, *([f"{name}-2"] if len(os.fsencode(name)) < 200 else [])]
    )


def test_what_the_living_write_stays_and_inside_a_lock_nothing_does(tmp_path):
    final = tmp_path / "final"
    with whole_folder(final) as mine:
        (mine / "a").write_text("1")
        with whole_folder(final) as other:
            (other / "a").write_text("2")
        assert (mine / "a").read_text() == "1"
    for left in (".final-01234567-1-89abcdef", ".final-abc_1234"):  # of another machine, and of an earlier version
        (tmp_path / left).mkdir()
    with whole_folder(final):
        pass
    assert len(list(tmp_path.iterdir())) == 3
    with whole_folder(final, alone=True):
        pass
    assert list(tmp_path.iterdir()) == [final]


# ---------------------------------------------------------------- what a system says


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("75776 requested and 12288 written"),
            "the disk is full at PLACE",
        ),  # numpy's tofile, which has no number
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "the disk is full at PLACE"),
        (Exception("No space left on device (os error 28)"), "the disk is full at PLACE"),  # tokenizers' own
        (
            PermissionError(errno.EACCES, "Permission denied", "PLACE/x"),
            r"PLACE/x cannot be used \(Permission denied\)",
        ),
        (Exception("Permission denied (os error 13)"), r"PLACE cannot be used \(Permission denied\)"),
        (OSError(errno.EROFS, "Read-only file system", "PLACE/x"), r"PLACE/x cannot be used \(Read-only file system\)"),
        (FileNotFoundError(errno.ENOENT, "No such file", "PLACE/x"), r"PLACE/x is not there \(any more\)"),
    ],
)
def test_what_a_system_says_is_one_line(error, message):
    with pytest.raises(BadInput, match=message) as raised, explain_errors("PLACE"):
        raise error
    assert "\n" not in str(raised.value)


def test_numpy_on_a_full_disk_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(BadInput, match="disk is full"),
            whole_file(tmp_path / "x") as temporary,
            temporary.open("wb") as file,
        ):
            np.zeros(100_000).tofile(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


ORDINARY = """
import sys
from typer.testing import CliRunner
from thesislib.cli import app
for args in eval(sys.argv[1]):
    result = CliRunner().invoke(app, args)
    print(result.exit_code, result.stderr.count(chr(10)), repr(result.stderr[:90]), type(result.exception).__name__)
"""


def rights_dropped():
    """In a child: root reads and writes what modes allow, as any user does."""
    if os.getuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="drops root's rights by a call that Linux has")
def test_what_an_ordinary_user_may_not_is_one_line(tiny, tmp_path):
    subject = save_checkpoint(tiny(layers=2), tmp_path / "subject")
    weights = Path(shutil.copytree(subject, tmp_path / "weights")) / "model.safetensors"
    config = Path(shutil.copytree(subject, tmp_path / "config")) / "config.json"
    for file in (
        weights,
        config,
        tmp_path / "x.gguf",
        tmp_path / "r.jsonl",
        tmp_path / "recipe.yaml",
        tmp_path / "closed",
    ):
        file.touch() if file.suffix else file.mkdir()
        file.chmod(0)
    (tmp_path / "cache").mkdir()
    (tmp_path / "fixed").mkdir(mode=0o555)
    at = str(tmp_path)
    commands = [
        *(["evaluate", f"{at}/{name}", "--on", "wikitext"] for name in ("weights", "config", "x.gguf", "closed/below")),
        *(
            ["compress", "D1", "--subject", f"{at}/{name}", "--out", f"{at}/cache/out"]
            for name in ("config", "closed/below")
        ),
        ["compress", f"{at}/recipe.yaml", "--subject", str(subject), "--out", f"{at}/cache/out"],
        ["compress", "D1", "--subject", str(subject), "--out", f"{at}/fixed/out"],
        ["compress", "D1", "--subject", str(subject), "--out", f"{at}/closed/out"],
        ["export", str(subject), "--gguf", "F16", "--out", f"{at}/fixed/out.gguf"],
        *(["records", "--store", f"{at}/{name}"] for name in ("r.jsonl", "closed", "closed/r.jsonl")),
        ["records", "--csv", f"{at}/fixed/r.csv"],
        ["sweep", f"{at}/recipe.yaml"],
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "THESISLIB_CACHE": f"{at}/cache",
        "HOME": f"{at}/cache",
    }
    done = subprocess.run(
        [sys.executable, "-c", ORDINARY, repr(commands)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=rights_dropped,
    )
    (tmp_path / "closed").chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == len(commands), done.stderr
    bad = [
        (command, line)
        for command, line in zip(commands, lines, strict=True)
        if not re.match("2 (1 .error: |. .Usage: )", line)
    ]  # typer has its own words
    assert bad == []


# ---------------------------------------------------------------- where something is to be written


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name, target in {"empty": "elsewhere", "nowhere": "new", "chain": "empty", "deep": "a/b/c"}.items():
        (tmp_path / name).symlink_to(target)
    for name, real_name in {"nowhere": "new", "chain": "elsewhere", "deep": "a/b/c"}.items():
        assert replaceable_folder(tmp_path / name) == tmp_path / real_name
        for n in (1, 2):  # what it wrote is replaced through the link as well
            with whole_folder(replaceable_folder(tmp_path / name, replaces="artifact.json")) as temporary:
                (temporary / "artifact.json").write_text(f"{n}")
        assert (tmp_path / name).is_symlink() and (tmp_path / real_name / "artifact.json").read_text() == "2"
    (tmp_path / "f").symlink_to("new.gguf")
    assert writable_file(tmp_path / "f", new=True) == tmp_path / "new.gguf"
    write_whole(tmp_path / "f", "x")
    assert (tmp_path / "f").is_symlink() and (tmp_path / "new.gguf").read_text() == "x"
    with pytest.raises(BadInput, match="f cannot be written: it is there already"):
        writable_file(tmp_path / "f", new=True)


def test_where_nothing_can_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "mount").mkdir()
    mounted = os.path.ismount
    monkeypatch.setattr(
        "thesislib.files.os.path.ismount", lambda path: Path(path) == tmp_path / "mount" or mounted(path)
    )
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path, message in {
        ".": "is the current folder or above it",
        "..": "is the current folder or above it",
        "": "is the current folder or above it",
        "/": "is the current folder or above it",
        tmp_path / "here": "is the current folder or above it",
        tmp_path / "mount": "is a mount point",
        tmp_path / "full": "holds something",
        tmp_path / "full" / "notes": "a file stands there",
        tmp_path / "full" / "notes" / "x": "a file stands above",
        tmp_path / "loop": "cannot be a folder or a file",
        "x" * 256: "File name too long",
        "a\0b": "null",
        "~nouser/x": "home",
        "/proc/x": "cannot be written",
    }.items():
        with pytest.raises(BadInput, match=message) as raised:
            replaceable_folder(path)
        assert "\n" not in str(raised.value)
    for path, message in {
        ".": "is a folder",
        tmp_path / "full": "is a folder: expected a file's name",
        "/dev/null": "is no ordinary file",
        "/proc/x": "cannot be written",
        tmp_path / "loop": "cannot be",
        tmp_path / "full" / "notes" / "x": "a file stands above",
        "x" * 256: "File name too long",
    }.items():
        with pytest.raises(BadInput, match=message):
            writable_file(path)
    assert (
        writable_folder(".") == tmp_path / "here" / "below"
        and writable_folder(tmp_path / "mount") == tmp_path / "mount"
    )
    with pytest.raises(BadInput, match="a file stands there"):
        writable_folder(tmp_path / "full" / "notes")
    assert replaceable_folder("x" * 255).name == "x" * 255 and sorted(p.name for p in tmp_path.iterdir()) == [
        "full",
        "here",
        "loop",
        "mount",
    ]


# ---------------------------------------------------------------- known to be whole


def test_a_changed_byte_is_noticed_also_where_size_and_time_stay(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    sums = {"x": hashlib.sha256(b"abc").hexdigest()}
    assert sha256_of(file) == sums["x"] and damaged(tmp_path, sums) is None
    before = file.stat()
    time.sleep(0.02)  # a file system's clock has steps
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns and damaged(tmp_path, sums) == "x"
    assert damaged(tmp_path, {"gone": ""}) == "gone" and damaged(tmp_path, {"../x": sums["x"]}) == "../x"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", None, 3, "link", "folder/x"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x").write_text("")
    (folder / "link").symlink_to("../x")
    (folder / "folder").symlink_to("..")
    with pytest.raises(BadInput, match="is no file of that folder|leads out of its folder"):
        inside(folder, name)
    (folder / "own").symlink_to("y")
    assert inside(folder, "own") == folder / "own" and inside(folder, "deep/er.json") == folder / "deep" / "er.json"


def test_a_probe_that_a_kill_left_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("thesislib.files.alive", lambda pid: False)
    left = _temporary(tmp_path / "probe")
    left.mkdir()
    replaceable_folder(tmp_path / "new")
    assert not left.exists()
