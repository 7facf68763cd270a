"""What torchrun starts in test_ranks.py: the scripts one after another, in processes that import torch but once."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    for script, words in json.loads(Path(sys.argv[1]).read_text()):
        if code := importlib.import_module(script).main(words):
            sys.exit(code)
