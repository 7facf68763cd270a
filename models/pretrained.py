"""What loading the two frozen models has in common: their names, quiet loading, errors in one line, fingerprints.

transformers is imported where something is loaded: worker processes that only decode start without it.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from runtime.files import UserError
from runtime.signals import Interrupted


def find(name: str, near: Path | None = None) -> str:
    """A local folder, as named or relative to the folder of the checkpoint `near`; the name itself where none is."""
    folders = [Path(name).expanduser()]
    if near is not None:
        folders.append((near if near.is_dir() else near.parent) / folders[0])
    return next((str(folder) for folder in folders if name and folder.is_dir()), name)


def check_name(name: str, flag: str) -> str:
    """The name itself. Raises: UserError where it can only be a local folder's, and there is none: no hub is asked."""
    local = Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1
    if not Path(name).is_dir() and (local or "\\" in name or ":" in name or Path(name).exists()):
        raise UserError(f"{name} does not load: there is no such folder; say with {flag} where the model is")
    return name


def keep(name: str) -> str:
    """A model's name as checkpoints hold it: a local folder is found again from any working directory."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


@contextlib.contextmanager
def loading(what: str, name: str, flag: str) -> Iterator[None]:
    """Within it `name` is loaded, quietly, and nothing of this project runs: whatever fails there is its damage.

    Raises: UserError where the folder, or the hub's model, is damaged or of another kind.
    """
    from transformers.utils import logging

    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{what} {name!r}: this is an adapter: merge it into its base model first")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # no tables of weights that are not wanted
    logging.disable_progress_bar()
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, Interrupted):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub raise whatever they meet
        reason = " ".join((str(error) or type(error).__name__).strip().splitlines()[:2])
        raise UserError(f"{what} {name!r} does not load ({reason}); give {flag} a hub name or a local folder") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def fingerprint(model: nn.Module, dtype: torch.dtype) -> str:
    """A name for weights, whatever folder they are in: 16 hex digits of a hash of some of each tensor, as `dtype`."""
    tensors = [tensor.detach().flatten() for _, tensor in sorted(model.named_parameters())]
    parts = [tensor[:: max(1, len(tensor) // 256)][:256].to(dtype) for tensor in tensors]
    return hashlib.sha256(torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
