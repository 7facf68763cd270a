"""Which command and which commit made a result: a number without them cannot be made again."""

import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
CODE = ("*.py", "*.j2", "evaluation/*")  # results and data are made by it; whether they changed says nothing of it


def made_by(argv: list[str] | None = None) -> dict[str, str | None]:
    """{"command", "commit"}: this process's command line, and the commit of the code ("+" where it was changed)."""
    words = ["(called from Python)", *argv] if argv is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]
    ask = ["git", "status", "--porcelain=v2", "--branch", "-uno", "--", *CODE]
    try:
        told = subprocess.run(ask, cwd=HERE, capture_output=True, text=True, timeout=10, check=True).stdout
        head, *others = told.splitlines()  # "# branch.oid 1f2e...", more about the branch, and the files that changed
        commit = head.split()[-1][:12] + ("+" if any(line[0] != "#" for line in others) else "")
    except (OSError, subprocess.SubprocessError):
        commit = None  # no git, or a copy without its history
    return {"command": shlex.join(["python", *words]), "commit": commit}
