"""The five scripts where what only POSIX has is missing: the nearest to Windows that a test on Linux comes.

Run as a program, this file is the interpreter without those names; those that it starts are without them, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOOK = """
import os
from tests import posix_only
posix_only.take_away()
open(os.path.join(os.environ["TAKEN_AWAY"], str(os.getpid())), "w").close()
"""


def run_the_scripts(work: Path) -> None:
    import evaluate
    import infer
    import prepare_annotations
    import preprocess_something_something_v2 as preprocess
    import train
    from sample import __main__ as sample

    data, out = work / "data", ["--checkpoint", str(work / "checkpoint.pt"), "--results", str(work / "results")]
    models = sample.MODELS
    sample.main(f"render --data {data} --train 12 --validation 4 --test 2 --workers 1".split())
    line = f"--data {data} --encoder {models / 'vjepa2'} --num-frames 8 --workers 1 --splits train validation test"
    assert not preprocess.main(line.split())
    assert not prepare_annotations.main(["--data", str(data)])
    line = f"--data {data} --llm {models / 'qwen2'} --num-queries 4 --epochs 1 --max-new-tokens 4 --workers 1"
    assert not train.main([*line.split(), *out])
    assert not evaluate.main(["--data", str(data), *out, "--max-new-tokens", "4", "--actions", "--grounding"])
    clips = sorted(str(path) for path in (data / "20bn-something-something-v2").iterdir())[:2]
    assert not infer.main([*out, "--workers", "1", "--window", "1", "--video", *clips])


def test_the_five_scripts_run_without_what_only_posix_has(tmp_path):
    hooks, taken = tmp_path / "hooks", tmp_path / "taken"
    hooks.mkdir(), taken.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK)
    environment = {**os.environ, "PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}", "TAKEN_AWAY": str(taken)}
    environment |= {"PATH": os.devnull, "MPLCONFIGDIR": str(tmp_path)}  # without Java
    command = [sys.executable, "-m", "tests.test_portable", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    captions = json.loads((tmp_path / "results" / "inference" / "results.json").read_text())
    assert (captions["clips"], captions["failed"]) == (2, 0)
    assert len(list(taken.iterdir())) >= 4  # this interpreter, and those that decode, read features and draw


if __name__ == "__main__":
    assert not hasattr(os, "fork")
    run_the_scripts(Path(sys.argv[1]))
