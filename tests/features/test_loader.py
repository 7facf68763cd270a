import threading
import time

import pytest
import torch

from features import cache
from features.cache import pack
from features.loader import FeatureLoader
from runtime.files import UserError
from tests.tiny import fill_cache, tokens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_batches_come_in_order_and_equal_to_the_files(tmp_path, dtype):
    clips = fill_cache(tmp_path, 23, dtype)
    wanted = [["3", "1"], ["22"], ["5", "5", "0"]] + [[str(i), str(22 - i)] for i in range(23)]
    given = list(FeatureLoader(tmp_path, wanted, workers=3))
    assert [ids for ids, _ in given] == wanted
    for ids, batch in given:
        assert torch.equal(batch.values, torch.stack([clips[i].values for i in ids]))
        if dtype == "int8":
            assert torch.equal(batch.scales, torch.stack([clips[i].scales for i in ids]))


def test_files_of_one_maker_are_read_in_place_and_others_by_torch(tmp_path):
    clips = fill_cache(tmp_path, 4)
    torch.save(torch.nn.Parameter(clips["1"].values), tmp_path / "1.pt")
    torch.save(clips["2"].values[None].clone(), tmp_path / "2.pt")  # published
    loader = FeatureLoader(tmp_path, [["0", "1", "2", "3"]])
    (_, batch), *_ = loader
    assert torch.equal(batch.values, torch.stack([clips[str(i)].values for i in range(4)]))
    row = torch.empty(16, 8, dtype=torch.float16).view(torch.uint8).view(-1).numpy()
    assert loader._layout.read(tmp_path / "3.pt", [row])
    assert not loader._layout.read(tmp_path / "1.pt", [row])
    assert not loader._layout.read(tmp_path / "2.pt", [row])


def test_a_file_with_a_changed_pickle_is_not_read_in_place(tmp_path):
    fill_cache(tmp_path, 2)
    whole = bytearray((tmp_path / "1.pt").read_bytes())
    whole[whole.index(b"HalfStorage")] = ord("h")
    (tmp_path / "1.pt").write_bytes(whole)
    with pytest.raises(UserError, match="1.pt"):
        list(FeatureLoader(tmp_path, [["0", "1"]]))


def test_two_sizes_of_features_are_refused_with_both_named(tmp_path):
    fill_cache(tmp_path, 2)
    cache.save(tmp_path / "odd.pt", pack(tokens(12, 8), "float16"))
    for batches in ([["0", "odd"]], [["0"], ["1"], ["odd"]]):
        with pytest.raises(UserError, match=r"0.pt is 16x8 float16, \S*odd.pt is 12x8 float16"):
            list(FeatureLoader(tmp_path, batches))


def test_a_float_and_an_int8_file_do_not_mix(tmp_path):
    fill_cache(tmp_path, 1)
    cache.save(tmp_path / "int8.pt", pack(tokens(16, 8), "int8"))
    with pytest.raises(UserError, match="two kinds"):
        list(FeatureLoader(tmp_path, [["0", "int8"]]))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_far_ahead_is_raised_when_its_batch_is_due(tmp_path, damage):
    fill_cache(tmp_path, 6)
    if damage == "missing":
        (tmp_path / "5.pt").unlink()
    else:
        (tmp_path / "5.pt").write_bytes((tmp_path / "5.pt").read_bytes()[:-30])
    got = []
    with pytest.raises(UserError, match="5.pt"):
        for ids, _ in FeatureLoader(tmp_path, [[str(i)] for i in range(6)]):
            got += ids
    assert got == ["0", "1", "2", "3", "4"]


def test_reading_ahead_is_bounded(tmp_path):
    fill_cache(tmp_path, 1)
    asked = []

    def batches():
        for number in range(1000):
            asked.append(number)
            yield ["0"]

    for number, _ in enumerate(FeatureLoader(tmp_path, batches(), ahead=3)):
        assert len(asked) <= number + 5
        if number == 50:
            break
    assert len(asked) <= 55


def test_leaving_early_stops_the_threads(tmp_path):
    fill_cache(tmp_path, 1)
    iterator = iter(FeatureLoader(tmp_path, [["0"]] * 100, workers=4))
    next(iterator)
    iterator.close()
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("features")]


def test_a_loader_can_be_used_again_and_knows_its_length(tmp_path):
    fill_cache(tmp_path, 3)
    loader = FeatureLoader(tmp_path, [["0"], ["1", "2"]])
    assert len(loader) == 2
    assert [ids for ids, _ in loader] == [ids for ids, _ in loader]
