"""Checkpoints: the Q-Former with all that is needed to use it or to go on training, never the frozen models.

A checkpoint file is a dict with the published code's keys ("epoch", "model_state_dict", "optimizer_state_dict",
"train_loss") and this project's ("config", "progress"). Files are opened as tensors and plain values only.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from runtime import files
from runtime.files import UserError

PREFIX = "qformer."
PUBLISHED = {  # what the published code trained with, and does not say in its checkpoints
    "published": True,  # so that features of another encoder are not refused by name
    "llm": "Qwen/Qwen2-1.5B",
    "prompt": "a video showing:",
    "features": {
        "encoder": "facebook/vjepa2-vitl-fpc64-256",
        "frames": 32,
        "size": 256,
        "crop": False,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "dtype": "float16",
        "pool": 1,
        "tokens": 4096,
        "dim": 1024,
    },
}
PUBLISHED_HEADS = 4
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Checkpoint:
    """What a checkpoint holds; `weights` by the Q-Former's own parameter names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    epoch: int = 0  # epochs completed
    optimizer: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)  # place within the epoch, losses so far, scores


def write(path: Path, saved: Checkpoint) -> None:
    """Write a checkpoint file, whole or not at all."""
    losses = [line["train_loss"] for line in saved.progress.get("history", [])]
    files.save_tensors(
        path,
        {
            "epoch": saved.epoch,
            "model_state_dict": {PREFIX + name: tensor for name, tensor in saved.weights.items()},
            "optimizer_state_dict": saved.optimizer,
            "train_loss": losses[-1] if losses else None,
            "config": saved.config,
            "progress": saved.progress,
        },
    )


def read(path: Path | str) -> Checkpoint:
    """Read a checkpoint file (this project's or the published code's) or a folder of `write_folder`.

    Raises: UserError where it is missing, damaged, would run code, or is no checkpoint of a captioner.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"the checkpoint: there is no file {path}; train.py makes one, or give --checkpoint another")
    saved = files.load_tensors(path, "the checkpoint")
    if not isinstance(saved, dict) or not isinstance(saved.get("model_state_dict"), dict):
        raise UserError(
            f"the checkpoint: {path} holds no model_state_dict; give --checkpoint a file that train.py wrote"
        )
    state = saved["model_state_dict"].items()
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in state if str(name).startswith(PREFIX)}
    config, progress = saved.get("config"), saved.get("progress") or {}
    epoch = saved.get("epoch", 0)
    if type(epoch) is not int or epoch < 0 or not _is_progress(progress):
        raise UserError(f"the checkpoint: {path} is damaged (its epoch or its progress); make it again")
    shape = shape_of(weights, path)
    config = _checked({**PUBLISHED, "qformer": shape} if config is None else config, path, shape)
    return Checkpoint(config, weights, epoch, saved.get("optimizer_state_dict"), progress)


def shape_of(weights: dict[str, Tensor], path: Path) -> dict[str, int]:
    """The Q-Former's shape, read off its weights; the number of heads leaves no trace and is the published one.

    Raises: UserError where they are no Q-Former's, or not whole tensors (one with strides of 0 can claim any size).
    """
    for name, tensor in weights.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
        if not plain or tensor.dtype not in FLOATS or tensor.device.type != "cpu":
            raise UserError(f"the checkpoint: {path} is damaged: {name!r:.80} is not a tensor of numbers")
    try:
        _, queries, dim = weights["query_tokens"].shape
        visual_dim = weights["visual_proj.weight"].shape[1]
        hidden = weights["blocks.0.mlp.0.weight"].shape[0]
        ratio = hidden // dim
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise UserError(
            f"the checkpoint: {path} holds no Q-Former; give --checkpoint a file that train.py wrote"
        ) from None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    shape = {"num_queries": queries, "dim": dim, "visual_dim": visual_dim, "num_heads": PUBLISHED_HEADS}
    return {**shape, "depth": depth, "mlp_ratio": ratio}


def _is_progress(progress: Any) -> bool:
    """Whether it is a place within an epoch and the scores of those before, as `train.py` keeps them."""

    def numbers(values: Any, names: tuple[str, ...], kind: type) -> bool:
        found = [values.get(name) for name in names] if isinstance(values, dict) else [None]
        return all(type(value) in (int, kind) and 0 <= value < math.inf for value in found)

    if not isinstance(progress, dict) or not isinstance(history := progress.get("history", []), list):
        return False
    scores = ("train_loss", "val_loss", "CIDEr")
    if not all(numbers(line, ("epoch",), int) and numbers(line, scores, float) for line in history):
        return False
    if not progress.get("step"):
        return True
    run = progress.get("run")
    counted = numbers(progress, ("step", "captions"), int) and numbers(progress, ("total",), float)
    return counted and progress["captions"] > 0 and isinstance(run, dict)


def load_weights(qformer: nn.Module, weights: dict[str, Tensor], path: Path | str) -> None:
    """Copy a checkpoint's weights into a Q-Former. Raises: UserError where they are of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in qformer.state_dict().items()}
    found = {name: tuple(tensor.shape) if isinstance(tensor, Tensor) else None for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"the checkpoint: {path} is of another shape: {name} is {found.get(name)}, wanted {wanted.get(name)}; "
                "use the settings it was trained with, or another --checkpoint"
            )
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise UserError(f"the checkpoint: {path} holds numbers that are not finite ({bad[0]}); use an earlier one")
    qformer.load_state_dict(weights)


def write_folder(folder: Path, config: dict[str, Any], qformer: nn.Module) -> None:
    """Write config.json and model.safetensors (the Q-Former only), the form that hubs share."""
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in qformer.state_dict().items()}
    files.write_atomic(folder / "model.safetensors", lambda file: file.write(save(tensors)))
    files.write_json(folder / "config.json", config)


def fetch_folder(name: str, **download: Any) -> Path:
    """A local folder as it is, or a hub's repository downloaded."""
    if Path(name).is_dir():
        return Path(name)
    known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    wanted = {key: value for key, value in download.items() if key in known}
    return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"], **wanted))


def _read_folder(folder: Path) -> Checkpoint:
    config = files.read_json(folder / "config.json", "the checkpoint's config")
    try:
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise UserError(f"the checkpoint: there is no file {folder / 'model.safetensors'}") from None
    except SafetensorError as error:
        raise UserError(f"the checkpoint: {folder / 'model.safetensors'} is damaged ({error})") from None
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return Checkpoint(_checked(config, folder, shape_of(weights, folder)), weights)


def _checked(config: Any, path: Path, found: dict[str, int]) -> dict[str, Any]:
    """A config with all its parts. Sizes are checked, by those that the weights have, before they are allocated."""
    parts = {"llm": str, "prompt": str, "features": (dict, type(None)), "qformer": dict}
    if not isinstance(config, dict) or any(not isinstance(config.get(key), kind) for key, kind in parts.items()):
        raise UserError(f"the checkpoint: the config in {path} is damaged or of another program; make it again")
    limits = {"num_queries": 65536, "dim": 65536, "visual_dim": 65536, "num_heads": 1024, "depth": 256, "mlp_ratio": 64}
    shape = config["qformer"]
    for key, limit in limits.items():
        if type(shape.get(key)) is not int or not 0 < shape[key] <= limit:
            raise UserError(f"the checkpoint: {key} in {path} is {shape.get(key)!r:.80}, which no Q-Former has")
        if key != "num_heads" and shape[key] != found[key]:
            raise UserError(f"the checkpoint: {path} is damaged: its {key} is {shape[key]}, its weights' {found[key]}")
    rates = [shape.get("dropout", 0.0), shape.get("mlp_dropout", 0.0)]
    if set(shape) - set(limits) - {"dropout", "mlp_dropout"} or not all(
        isinstance(rate, float | int) and 0 <= rate < 1 for rate in rates
    ):
        raise UserError(f"the checkpoint: the Q-Former's config in {path} is damaged; make it again")
    return config


def cpu_copy(state: Any) -> Any:
    """A copy of a state dict that later steps do not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: cpu_copy(value) for key, value in state.items()}
    return [cpu_copy(value) for value in state] if isinstance(state, list) else state


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Copy AdamW's averages into `optimizer`; its settings stay its own. False where they are not of its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        saved = [index for group in state["param_groups"] for index in group["params"]]
        kept = {index: _averages(entry) for index, entry in state["state"].items()}
        fits = saved == list(range(len(parameters))) and (not kept or list(kept) == saved)
        shapes = [parameter.shape for parameter in parameters]
        fits = fits and all(tensor.shape == shapes[index] for index, (_, *both) in kept.items() for tensor in both)
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError):  # whatever as_tensor makes of other things
        fits = False
    if fits:
        names = ("step", "exp_avg", "exp_avg_sq")
        entries = {index: dict(zip(names, entry, strict=True)) for index, entry in kept.items()}
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return fits


def _averages(entry: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's state of one parameter. Raises: ValueError where it could not have come to be."""
    step, mean, square = (torch.as_tensor(entry[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    for tensor in (step, mean, square):
        if not (tensor.dtype in FLOATS and tensor.is_contiguous() and tensor.isfinite().all()):
            raise ValueError("not finite numbers")
    if step.numel() != 1 or step < 0 or (square < 0).any():
        raise ValueError("not an average of squares")
    return step.float().reshape(()), mean, square
