import subprocess

from runtime import provenance


def test_a_result_names_its_command_and_commit():
    made = provenance.made_by(["--data", "a folder"])
    assert made["command"] == "python '(called from Python)' --data 'a folder'"
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=provenance.HERE)
    if found.returncode == 0:
        assert found.stdout.startswith(made["commit"].rstrip("+"))


def test_a_copy_without_history_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance.made_by([])["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert provenance.made_by([])["commit"] is None
