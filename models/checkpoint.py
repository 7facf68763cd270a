"""Checkpoints: the Q-Former with all that is needed to use it or to go on training, never the frozen models.

A checkpoint file is a dict with the published code's keys ("epoch", "model_state_dict", "optimizer_state_dict",
"train_loss") and this project's ("config", "progress"). Files are opened as tensors and plain values only.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from runtime import files
from runtime.files import UserError

PREFIX = "qformer."
HELP = (
    "a file of train.py, or a folder made of it; not given: checkpoint_best.pt (best CIDEr) if here, or checkpoint.pt"
)
PUBLISHED = Path(__file__).with_name("published.json")  # what the published code's checkpoints do not say
WIDTHS = {"dim": "the width of --llm", "visual_dim": "the width of the features"}
PARTS = {"llm": str, "prompt": str, "features": (dict, type(None)), "qformer": dict}  # of a config


@dataclass
class Checkpoint:
    """What a checkpoint holds; `weights` by the Q-Former's own parameter names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    epoch: int = 0  # epochs completed
    optimizer: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)  # place within the epoch, losses so far, scores


def _error(path: Path | str, reason: str) -> UserError:
    return UserError(f"the checkpoint: {path} {reason}")


def write(path: Path, saved: Checkpoint) -> None:
    """Write a checkpoint file, whole or not at all."""
    history = saved.progress.get("history")
    content = {
        "epoch": saved.epoch,
        "model_state_dict": {PREFIX + name: tensor for name, tensor in saved.weights.items()},
        "optimizer_state_dict": saved.optimizer,
        "train_loss": history[-1]["train_loss"] if history else None,
        "config": saved.config,
        "progress": saved.progress,
    }
    files.save_tensors(path, content)


def write_folder(folder: Path, config: dict[str, Any], qformer: nn.Module) -> None:
    """Write config.json and model.safetensors (the Q-Former only), the form that hubs share."""
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in qformer.state_dict().items()}
    files.write_atomic(folder / "model.safetensors", lambda file: file.write(save(tensors)))
    files.write_json(folder / "config.json", config)


def default() -> Path:
    """The checkpoint that is used where none is named: the best of the run in the working directory, else its last."""
    best = Path("checkpoint_best.pt")
    return best if best.is_file() else Path("checkpoint.pt")


def read(path: Path | str) -> Checkpoint:
    """Read a checkpoint file (this project's or the published code's) or a folder of `write_folder`.

    Raises: UserError where it is missing, damaged, would run code, or is no checkpoint of a captioner.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"the checkpoint: there is no file {path}; train.py makes one, or name another")
    saved = _read_folder(path) if path.is_dir() else files.load_tensors(path, "the checkpoint")
    try:
        state = saved["model_state_dict"].items()
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state if name.startswith(PREFIX)}
        config = _config(saved.get("config"), weights)
        training = config.pop("training", {})  # a folder's
        epoch, progress = int(saved.get("epoch", training.get("epoch", 0))), saved.get("progress") or training
        return Checkpoint(config, weights, epoch, saved.get("optimizer_state_dict"), dict(progress))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise _error(path, "holds no Q-Former, or is damaged; give --checkpoint a file that train.py wrote") from None


def _read_folder(folder: Path) -> dict[str, Any]:
    """A folder's content in the form that a file has."""
    path = folder / "model.safetensors"
    config = files.read_json(folder / "config.json", "the checkpoint")
    try:
        return {"config": config, "model_state_dict": load_file(path)}
    except (FileNotFoundError, SafetensorError) as error:
        raise _error(path, f"is not there, or damaged ({error})") from None


def _config(config: dict[str, Any] | None, weights: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint's config with the sizes of its weights; the published code's where there is none."""
    config = files.read_json(PUBLISHED, "the checkpoint") if config is None else {"caption_space": True, **config}
    if not all(isinstance(config[key], kind) for key, kind in PARTS.items()):
        raise TypeError
    _, queries, dim = weights["query_tokens"].shape
    visual_dim, hidden = weights["visual_proj.weight"].shape[1], len(weights["blocks.0.mlp.0.weight"])
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = {"num_queries": queries, "dim": dim, "visual_dim": visual_dim, "depth": depth, "mlp_ratio": hidden // dim}
    return {**config, "qformer": {**config["qformer"], **sizes}}


def check_sizes(config: dict[str, Any], given: dict[str, Any], path: Path | str) -> None:
    """Raises: UserError where the Q-Former of a checkpoint's config has other sizes than those `given`."""
    for key, was in config["qformer"].items():
        here, is_assumed = given.get(key, was), key == "num_heads" and "published" in config
        if here != was and not is_assumed and not key.endswith("dropout"):
            what = WIDTHS.get(key, f"--{key.replace('_', '-')}")
            raise _error(
                path, f"is of another shape: {what} is {here}, and was {was} when it was trained; use the same"
            )


def load_weights(qformer: nn.Module, weights: dict[str, Tensor], path: Path | str) -> None:
    """Copy a checkpoint's weights into a Q-Former. Raises: UserError where they are of another shape, or not finite."""
    try:
        qformer.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()  # the first parameter; line 0 names the class
        advice = "use the settings it was trained with, or another --checkpoint"
        raise _error(path, f"is of another shape: {reason} {advice}") from None
    for name, parameter in qformer.named_parameters():
        if not parameter.isfinite().all():
            raise _error(path, f"holds numbers that are not finite ({name}); use an earlier one")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Copy AdamW's averages into `optimizer`; its settings stay its own. False where they are not of its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        entries = [(entry, parameters[index]) for index, entry in state["state"].items()]
        pairs = [(entry[name], parameter) for entry, parameter in entries for name in ("exp_avg", "exp_avg_sq")]
        if not all(average.shape == parameter.shape and average.isfinite().all() for average, parameter in pairs):
            return False
        optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (TypeError, KeyError, IndexError, AttributeError):  # it is no optimizer's state
        return False
    return True
