"""Checkpoints: the Q-Former with all that is needed to use it or to go on training, never the frozen models.

A checkpoint file is a dict with the published code's keys ("epoch", "model_state_dict", "optimizer_state_dict",
"train_loss") and this project's ("config", "progress"). Files are opened as tensors and plain values only.
"""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from features.cache import CacheConfig
from models import language_model, pretrained
from runtime import files
from runtime.files import UserError

PREFIX = "qformer."
PUBLISHED = {  # what the published code trained with, and does not say in its checkpoints
    "published": True,  # so that features of another encoder are not refused by name
    "llm": "Qwen/Qwen2-1.5B",
    "prompt": "a video showing:",
    "caption_space": False,
    "qformer": {"num_heads": 4},  # the one size that leaves no trace in the weights
    "features": CacheConfig(
        encoder="facebook/vjepa2-vitl-fpc64-256",
        frames=32,
        size=256,
        crop=False,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        dtype="float16",
        pool=1,
        tokens=4096,
        dim=1024,
    ).to_dict(),
}
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


def fetch_folder(name: str | Path, **download: Any) -> Path:
    """A local folder (or file) as it is, or a hub's repository, downloaded. Raises: TypeError for unknown keywords."""
    download["allow_patterns"] = ["config.json", "model.safetensors"]  # no code is fetched
    inspect.signature(snapshot_download).bind(str(name), **download)
    if Path(name).exists():
        return Path(name)
    return Path(snapshot_download(pretrained.check_name(str(name), "from_pretrained"), **download))


def read(path: Path | str) -> Checkpoint:
    """Read a checkpoint file (this project's or the published code's) or a folder of `write_folder`.

    Raises: UserError where it is missing, damaged, would run code, or is no checkpoint of a captioner.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"the checkpoint: there is no file {path}; train.py makes one, or give --checkpoint another")
    saved = _read_folder(path) if path.is_dir() else files.load_tensors(path, "the checkpoint")
    if not isinstance(saved, dict) or not isinstance(saved.get("model_state_dict"), dict):
        raise _error(path, "holds no model_state_dict; give --checkpoint a file that train.py wrote")
    state = saved["model_state_dict"].items()
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in state if str(name).startswith(PREFIX)}
    epoch, progress = saved.get("epoch", 0), saved.get("progress") or {}
    if not isinstance(epoch, int) or not isinstance(progress, dict):
        raise _error(path, "is damaged (its epoch or its progress); use an earlier one")
    config = _config(saved.get("config"), weights, path)
    return Checkpoint(config, weights, epoch, saved.get("optimizer_state_dict"), progress)


def _read_folder(folder: Path) -> dict[str, Any]:
    """A folder's content in the form that a file has."""
    path = folder / "model.safetensors"
    config = files.read_json(folder / "config.json", "the checkpoint")
    try:
        return {"config": config, "model_state_dict": load_file(path)}
    except FileNotFoundError:
        raise UserError(f"the checkpoint: there is no file {path}") from None
    except SafetensorError as error:
        raise _error(path, f"is damaged ({error})") from None


def _config(config: Any, weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """A checkpoint's config with the sizes of its weights; the published code's where there is none."""
    try:
        _, queries, dim = weights["query_tokens"].shape
        visual_dim = weights["visual_proj.weight"].shape[1]
        ratio = weights["blocks.0.mlp.0.weight"].shape[0] // dim
    except (KeyError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        raise _error(path, "holds no Q-Former; give --checkpoint a file that train.py wrote") from None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    config = PUBLISHED if config is None else config
    if not isinstance(config, dict) or any(not isinstance(config.get(key), kind) for key, kind in PARTS.items()):
        raise _error(path, "has a config that is damaged or of another program")
    sizes = {"num_queries": queries, "dim": dim, "visual_dim": visual_dim, "depth": depth, "mlp_ratio": ratio}
    return {"caption_space": True, **config, "qformer": {**config["qformer"], **sizes}}


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


def with_models(config: dict[str, Any], path: Path | str, llm: str | None, encoder: str | None) -> dict[str, Any]:
    """The config of the checkpoint `path` with its models where they are now; `llm`, `encoder`: where the user says.

    Raises: UserError where the language model is a local folder, and gone.
    """
    config = {**config, "llm": llm or pretrained.check_name(pretrained.find(config["llm"], Path(path)), "--llm")}
    if config["features"]:  # an encoder that is gone is an error only where one is needed
        found = encoder or pretrained.find(config["features"].get("encoder", ""), Path(path))
        config["features"] = {**config["features"], "encoder": found}
    return config


def check_llm(config: dict[str, Any], lm: nn.Module, name: str, path: Path | str) -> str | None:
    """A note where the checkpoint `path` does not know its language model. Raises: UserError where `lm` is another."""
    if not config.get("llm_weights"):
        return f"{path} does not say which language model it was trained with: {name} is taken for it"
    if config["llm_weights"] != language_model.fingerprint(lm):
        raise UserError(f"{name} is not the language model that {path} was trained with; give that one with --llm")
    return None
