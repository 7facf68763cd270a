import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import files
from runtime.files import UserError
from tests import processes


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        files.write_atomic(path, fail)
    assert files.read_json(path, "it") == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_new_files_are_as_readable_as_others(tmp_path):
    files.write_text(tmp_path / "new", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_strict_and_keeps_any_text(tmp_path):
    text = "<b>\u202e\x00\n\"'</script> \U0001f600"
    files.write_json(tmp_path / "a.json", [text])
    assert files.read_json(tmp_path / "a.json", "it") == [text]
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100000])
def test_what_is_not_json_is_a_plain_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="the labels: .*a.json is not valid JSON") as error:
        files.read_json(tmp_path / "a.json", "the labels")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_damaged_tensors_are_plain_errors(tmp_path, zipped, mmap):
    path, value = tmp_path / "a.pt", {"a": torch.arange(300.0), "config": {"llm": "x", "n": [1, 2.5, None]}}
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    if zipped or not mmap:
        assert torch.equal(files.load_tensors(path, "it", mmap)["a"], value["a"])
    spoilt = [whole[:length] for length in (0, 1, 10, *range(40, len(whole), 97))]
    for place in range(0, len(whole), 11):
        spoilt.append(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        spoilt.append(whole[:place] + random.bytes(5) + whole[place + 5 :])
    refused = 0
    for content in spoilt:
        path.write_bytes(content)
        try:
            files.load_tensors(path, "it", mmap)
        except UserError as error:
            refused += str(error).startswith(f"it: {path} ") and "\n" not in str(error)
    assert refused > len(spoilt) / 5  # the others differ in padding or in a value


def test_only_what_damage_raises_is_called_damage(tmp_path, monkeypatch):
    files.save_tensors(tmp_path / "a.pt", torch.zeros(2))
    for raised in (MemoryError(), OSError(errno.EIO, "Input/output error"), ImportError("a bug")):
        monkeypatch.setattr(torch, "load", lambda *_, raised=raised, **__: (_ for _ in ()).throw(raised))
        with pytest.raises(type(raised)):
            files.load_tensors(tmp_path / "a.pt", "it")


def test_a_caption_cannot_drive_the_terminal_or_hide_itself():
    text = "\x1b[2Jred\u202e \x07\r\x9bball\ud800 \u06af\u200c\u0647 \U0001f468\u200d\U0001f469"
    mark = "\N{REPLACEMENT CHARACTER}"
    expected = f"{mark}[2Jred{mark} {mark} {mark}ball{mark} \u06af\u200c\u0647 \U0001f468\u200d\U0001f469"
    assert files.printable(text) == expected  # joiners stay: Persian and emoji need them


def test_paths_in_results_are_relative_to_the_working_directory_where_they_lie_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "models" / "lm"
    for path, expected in (
        (here, os.path.join("models", "lm")),
        (str(here), os.path.join("models", "lm")),
        ("Qwen/Qwen2-1.5B", "Qwen/Qwen2-1.5B"),
        (Path("..", "x"), os.path.join("..", "x")),
        (tmp_path.parent / "x", str(tmp_path.parent / "x")),
        (os.fsdecode(b"caf\xe9.webm"), "caf\N{REPLACEMENT CHARACTER}.webm"),
    ):
        assert files.display_path(path) == expected


def write_often(path, text):
    for _ in range(200):
        files.write_text(path, text)


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    texts = ["a" * 5000, "b" * 5000]
    writers = [processes.forks.Process(target=write_often, args=(tmp_path / "f", text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "f").read_text() in texts and os.listdir(tmp_path) == ["f"]


def test_what_a_killed_process_did_not_finish_is_removed_but_not_what_grew_in_the_last_minute(tmp_path):
    for name in (".a.pt.x.tmp", ".a.pt.y.tmp", ".b.pt.z.tmp", "a.pt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".a.pt.young.tmp").touch()
    files.remove_unfinished(tmp_path / "a.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.pt.young.tmp", ".b.pt.z.tmp", "a.pt"]
    files.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.pt.young.tmp", "a.pt"]


def test_a_copy_that_fails_names_what_is_missing(tmp_path):
    (tmp_path / "source").write_text("whole")
    files.copy(tmp_path / "source", tmp_path / "b")
    files.copy(tmp_path / "b", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "whole"
    with pytest.raises(FileNotFoundError) as error:
        files.copy(tmp_path / "gone", tmp_path / "b")
    assert error.value.filename == str(tmp_path / "gone")  # what is missing, not what was to be written


@pytest.mark.parametrize("place", ["a-file/x/y.json", "n" * 250 + ".json"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "a-file").touch()
    with pytest.raises(OSError) as error:
        files.write_json(tmp_path / place, {})
    assert error.value.filename == str(tmp_path / place)


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path):
    files.write_json(tmp_path / "a.json", ["half a pair \ud800"])
    assert files.read_json(tmp_path / "a.json", "it") == ["half a pair \ud800"]
