"""What comes before torch: threads that wait asleep (OpenMP reads the environment as it is loaded), and a first line.

A loop that torch shares among its threads ends when the last of them is done, and those that wait for it spin: for
milliseconds by default, which costs nothing on a quiet machine. On a busy one, the thread that is waited for has lost
its core to one that spins, and all of them stand still. What is set here ends the spinning after microseconds.
"""

import os
import sys
from pathlib import Path

# Of GNU's OpenMP (torch on Linux; in turns of a loop) and of LLVM's and Intel's (macOS, Windows; in milliseconds).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")

# A script of this project says at once that it runs: torch takes seconds to load, and many from a slow disk.
PROGRAM, ROOT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve(), Path(__file__).parents[1]
if PROGRAM.parent in (ROOT, ROOT / "sample") and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
    print("loading torch ...", file=sys.stderr, flush=True)
