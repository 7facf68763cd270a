import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never look for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, child processes too


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.path.stem != "test_ranks")
