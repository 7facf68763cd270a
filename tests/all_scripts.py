"""What torchrun starts in test_ranks.py: the scripts one after another, in processes that import torch but once."""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PATH"] = "/nowhere"  # without Java, which takes a second a call

if __name__ == "__main__":
    for script, words in json.loads(Path(sys.argv[1]).read_text()).items():
        code = importlib.import_module(script).main(words)
        assert not code, f"{script}.py ended with {code}"
