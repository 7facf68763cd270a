import threading
import time

import pytest
import torch

from features import cache, encoding
from features.encoding import Saver, encode_ahead
from models.vjepa2 import Stopped, VideoEncoder
from tests import filming


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return VideoEncoder(filming.tiny_vjepa(tmp_path_factory.mktemp("vjepa")), "cpu", frames=4)


@pytest.fixture(autouse=True)
def three_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def batches(count, size=2):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        frames = torch.randint(0, 256, (size, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
        yield [f"{number}-{i}" for i in range(size)], frames


@pytest.mark.parametrize(("dtype", "pool"), [("float16", 1), ("int8", 2)])
def test_batches_come_in_order_and_as_encoded_one_by_one(encoder, dtype, pool):
    config = encoder.cache_config(dtype, pool)
    given = list(encode_ahead(encoder, config, batches(7)))
    assert [keys for keys, _ in given] == [keys for keys, _ in batches(7)]
    for (_, packed), (_, frames) in zip(given, batches(7), strict=True):
        expected = cache.unpack(cache.pack(encoder.encode(frames), dtype, pool, encoder.grid))
        assert torch.allclose(cache.unpack(packed), expected, atol=0.05)
    assert torch.get_num_threads() == 3


def test_batches_are_taken_only_as_threads_come_free(encoder):
    taken = []

    def counted():
        for batch in batches(50):
            taken.append(batch)
            yield batch

    for number, _ in enumerate(encode_ahead(encoder, encoder.cache_config(), counted()), 1):
        assert len(taken) <= number + 3
        if number == 10:
            break


def test_what_goes_wrong_in_a_thread_is_raised_and_the_threads_end(encoder):
    def broken():
        yield from batches(2)
        yield ["bad"], torch.zeros(1, 4, 3, 31, 7, dtype=torch.uint8)  # no whole patches
        yield from batches(1)

    with pytest.raises(RuntimeError):
        list(encode_ahead(encoder, encoder.cache_config(), broken()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoding")]
    assert torch.get_num_threads() == 3
    assert len(list(encode_ahead(encoder, encoder.cache_config(), batches(2)))) == 2  # and can be used again


def test_an_encoder_stops_between_two_layers(encoder):
    encoder.stop.set()
    try:
        with pytest.raises(Stopped):
            encoder.encode(next(iter(batches(1)))[1])
    finally:
        encoder.stop.clear()


def test_a_slow_disk_holds_the_encoder_back(tmp_path, monkeypatch):
    written, real = [], cache.save

    def slow(path, packed):
        time.sleep(0.02)
        real(path, packed)
        written.append(path)

    monkeypatch.setattr(cache, "save", slow)
    packed = cache.pack(torch.randn(2, 4, 4), "float16")
    with Saver({}) as saver:
        for number in range(10):
            saver.save([((number, i), tmp_path / f"{number}-{i}.pt") for i in range(2)], packed)
            assert 2 * (number + 1) - len(written) <= 2 * (encoding.BATCHES_TO_SAVE + 1)
        saver.finish()
        assert len(written) == 20


def test_an_error_of_the_disk_is_raised_by_the_next_batch_or_at_the_end(tmp_path):
    (tmp_path / "file").touch()
    packed = cache.pack(torch.randn(1, 4, 4), "float16")
    with Saver({}) as saver:
        saver.save([("a", tmp_path / "file" / "a.pt")], packed)
        with pytest.raises(OSError):
            saver.finish()


def test_leaving_early_writes_no_more_clips(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(cache, "save", lambda path, packed: (time.sleep(0.05), written.append(path)))
    packed = cache.pack(torch.randn(50, 4, 4), "float16")
    with pytest.raises(KeyboardInterrupt), Saver({}) as saver:
        saver.save([(i, tmp_path / f"{i}.pt") for i in range(50)], packed)
        time.sleep(0.06)
        raise KeyboardInterrupt
    assert 1 <= len(written) <= 3
