"""Which command and which commit made a result: a number without them cannot be made again."""

import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def made_by(argv: list[str] | None = None) -> dict[str, str | None]:
    """{"command", "commit"}: this process's command line, and the commit of the code ("+" where it was changed)."""
    words = sys.argv[1:] if argv is None else argv
    script = Path(sys.argv[0]).name if argv is None else "(called from Python)"
    return {"command": shlex.join(["python", script, *words]), "commit": _commit()}


def _commit() -> str | None:
    try:
        ask = {"cwd": HERE, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()
        # Results and data are made by the code; whether they changed says nothing of it.
        code = ("*.py", "*.j2", "evaluation/*")
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "--", *code], **ask).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or a copy without its history
    return commit + ("+" if changed else "")
