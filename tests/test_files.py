import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from thesislib.errors import BadInput
from thesislib.files import cache_dir, data_file, read_json, whole_file, whole_folder, write_whole


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
    with pytest.raises(BadInput, match="cannot be a folder or a file: a file stands above it"), whole_file(final / "below.bin"):
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


def test_data_file():
    assert data_file("manifest.json").is_file()
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
