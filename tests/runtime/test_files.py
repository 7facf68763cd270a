import os

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


def test_damaged_tensors_are_plain_errors(tmp_path):
    path = tmp_path / "a.pt"
    files.save_tensors(path, torch.arange(1000))
    whole = path.read_bytes()
    assert torch.equal(files.load_tensors(path, "it"), torch.arange(1000))
    generator = torch.Generator().manual_seed(0)
    for length in [0, 1, 10, 500, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="it: "):
            files.load_tensors(path, "it")
    for _ in range(50):
        place = torch.randint(len(whole), (), generator=generator).item()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            files.load_tensors(path, "it")
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (UserError("give\nthis"), 2, "error: give this"),
        (OSError(28, "No space left on device", "x.pt"), 1, "error: No space left on device: x.pt; everything"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_are_one_line_with_their_code(capsys, raised, code, said):
    def main():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        files.run(main)
    lines = capsys.readouterr().err
    assert stopped.value.code == code and lines.startswith(said) and lines.count("\n") == 1


def test_a_caption_cannot_drive_the_terminal():
    assert "\x1b" not in files.printable("\x1b[2Jred ball\x07") and "red ball" in files.printable("\x1b[2Jred ball")


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


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), 10**15])
def test_memory_that_is_not_enough_is_one_line_with_code_1(capsys, error):
    def fail():
        if isinstance(error, int):
            torch.empty(error)
        raise error

    with pytest.raises(SystemExit) as stopped:
        files.run(fail)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "memory is not enough; use smaller batches" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), NotImplementedError("another")])
def test_a_bug_keeps_its_traceback(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        files.run(fail)


def test_what_a_killed_process_did_not_finish_is_removed_once_it_is_old(tmp_path):
    old, new, other = (tmp_path / name for name in (".a.pt.x.tmp", ".a.pt.y.tmp", ".b.pt.z.tmp"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    files.remove_unfinished(tmp_path / "a.pt")
    assert sorted(tmp_path.iterdir()) == [new, other]


def test_a_writer_whose_unfinished_file_another_run_removes_writes_again(tmp_path):
    (tmp_path / "source").write_text("whole")
    removed = []

    def write(file):
        file.write(b"whole")
        if not removed:
            removed.append(next(tmp_path.glob(".a.*.tmp")))
            removed[0].unlink()

    files.write_atomic(tmp_path / "a", write)
    files.copy(tmp_path / "source", tmp_path / "b")
    assert removed and (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "source"]
    with pytest.raises(FileNotFoundError) as error:
        files.copy(tmp_path / "gone", tmp_path / "b")
    assert error.value.filename == str(tmp_path / "gone")  # what is missing, not what was to be written


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path):
    files.write_json(tmp_path / "a.json", ["half a pair \ud800"])
    assert files.read_json(tmp_path / "a.json", "it") == ["half a pair \ud800"]
