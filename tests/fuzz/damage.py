"""Damage to files, at random and seeded: to their bytes, and to what they hold."""

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

Random = np.random.Generator
ODD = [  # what no field expects; each is tried in all of them
    None,
    True,
    -1,
    0,
    7,
    2**31,
    10**18,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "7",
    "../../x",
    "/etc/passwd",
    "a" * 100_000,
    "\x00\x1b[2J\x07</script><b>\u202e",
    "half a pair \ud800",
    "no-such/model",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
    ["x", "x"],
]
ODD_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.new_zeros(()),
    lambda t: t[:0],
    lambda t: t.flatten(),
    lambda t: t[None, None],
    lambda t: torch.cat([t, t]),
    lambda t: t.double(),
    lambda t: t.to(torch.int8),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    lambda t: _with_one(t, float("inf")),
    lambda t: t * 1e30 if t.is_floating_point() else t,
    lambda t: -t,
    lambda t: torch.zeros(1, dtype=t.dtype).expand(10**6, 10**6),  # a terabyte that takes one number in the file
    lambda t: torch.zeros(1, dtype=t.dtype).expand(t.shape) if t.dim() else t,
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: [t],
]


def _with_one(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    if tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[0] = value
    return tensor


class Marker:
    """Pickled, it makes a folder when it is opened by a reader that runs what pickles ask for."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a careless reader would call."""
        import os

        return os.mkdir, (self.path,)


def damage_bytes(content: bytes, random: Random) -> bytes:
    """One kind of damage at a random place."""
    data, size = bytearray(content), max(1, len(content))
    at, length = int(random.integers(size)), int(random.integers(1, max(2, size // 4)))
    match int(random.integers(10)):
        case 0:  # cut off
            return bytes(data[:at])
        case 1:  # the beginning missing
            return bytes(data[at:])
        case 2:  # a hole of zeros
            data[at : at + length] = bytes(len(data[at : at + length]))
        case 3:  # a stretch of noise
            data[at : at + length] = random.bytes(len(data[at : at + length]))
        case 4:  # bytes changed here and there
            for place in random.integers(size, size=int(random.integers(1, 40))):
                data[place : place + 1] = random.bytes(1)
        case 5:  # bytes changed among the headers, sizes and times among them
            for place in random.integers(min(size, 600), size=int(random.integers(1, 12))):
                data[place : place + 1] = bytes([int(random.choice([0, 1, 0x7F, 0x80, 0xFF]))])
        case 6:  # a part missing
            del data[at : at + length]
        case 7:  # a part twice
            data[at:at] = data[at : at + length]
        case 8:  # noise, or nothing
            return random.bytes(int(random.integers(0, 5000)))
        case 9:  # text
            return b"<html><body>404 Not Found</body></html>"
    return bytes(data)


def damage_json(content: bytes, random: Random) -> bytes:
    """Something odd in the place of a random part of what it holds, a part left out, or a part twice."""
    return json.dumps(_damaged(json.loads(content), random, ODD)).encode()


def damage_pt(content: bytes, random: Random, marker: Path) -> bytes:
    """The same for a .pt file, whose tensors may also have another shape, type or layout; or a pickle that acts."""
    value = torch.load(io.BytesIO(content), weights_only=True)
    changed = Marker(marker) if random.random() < 0.05 else _damaged(value, random, ODD)
    file = io.BytesIO()
    torch.save(changed, file)
    return file.getvalue()


def damage_safetensors(content: bytes, random: Random) -> bytes:
    """The same for a .safetensors file, as far as the format can say it."""
    tensors = load(content)
    name = sorted(tensors)[int(random.integers(len(tensors)))]
    changed = _odd_tensor(tensors[name], random)
    if not isinstance(changed, Tensor) or changed.device.type == "meta" or changed.layout != torch.strided:
        del tensors[name]
    elif changed.numel() < 10**6:
        tensors[name] = changed.contiguous()
    return save({key: tensor.clone() for key, tensor in tensors.items()})


def _damaged(value: Any, random: Random, odd: list[Any]) -> Any:
    places = list(_places(value))
    # Near the top a place means more, and there are fewer of them.
    depth = int(random.integers(1 + max(map(len, places))))
    chosen = [place for place in places if len(place) == depth]
    place = chosen[int(random.integers(len(chosen)))]
    value = copy.deepcopy(value)
    if not place:
        return _odd(value, random, odd)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    match int(random.integers(4)):
        case 0:
            del parent[place[-1]]
        case 1 if isinstance(parent, list):
            parent.append(parent[place[-1]])
        case 1:
            parent["something else"] = parent[place[-1]]
        case _:
            parent[place[-1]] = _odd(parent[place[-1]], random, odd)
    return value


def _odd(value: Any, random: Random, odd: list[Any]) -> Any:
    if isinstance(value, Tensor) and random.random() < 0.8:
        return _odd_tensor(value, random)
    return odd[int(random.integers(len(odd)))]


def _odd_tensor(tensor: Tensor, random: Random) -> Any:
    change = ODD_TENSORS[int(random.integers(len(ODD_TENSORS)))]
    try:
        return change(tensor)
    except (RuntimeError, IndexError, TypeError):  # this one has no such form
        return None


def _places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The paths of all parts, the whole among them."""
    yield place
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*place, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _places(part, (*place, index))
