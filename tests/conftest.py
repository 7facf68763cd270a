import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never look for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, child processes too
# Results are compared to the last bit, by more processes than there are GPUs: on the CPU. test_gpu.py has the rest.
os.environ.setdefault("GPUS_FOR_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def without_java(monkeypatch):
    """METEOR and the PTB tokenizer are left out, in child processes too: starting Java takes a second a call."""
    monkeypatch.setenv("PATH", os.devnull)


# They start processes and wait for them, for half a minute each.
LONGEST = (
    "test_distributed",
    "test_portable",
    "test_hub",
    "test_fuzz",
    "killed",
    "busy_machine",
    "test_the_recipe_on",
    "equal_pycoco",
)


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
