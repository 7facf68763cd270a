"""What loading the two frozen models has in common: their names, quiet loading, errors in one line, fingerprints.

transformers is imported where something is loaded: worker processes that only decode start without it.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from runtime.files import UserError

# What transformers, json and safetensors raise where a folder is damaged or holds something else. tokenizers raises
# bare Exceptions.
DAMAGE = (
    OSError,  # no such file, no such name on the hub, or no network
    ValueError,  # not JSON, not UTF-8, a model that transformers does not know, code that would have to be run
    RuntimeError,  # weights of other shapes
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


def find(name: str, near: Path | None = None) -> str:
    """A local folder's path, as named or from the folder that the checkpoint `near` is in; else the name itself."""
    folder = Path(name).expanduser()
    beside = near if near is None or near.is_dir() else near.parent
    candidates = [folder] if beside is None else [folder, beside / folder]
    return next((str(candidate) for candidate in candidates if name and candidate.is_dir()), name)


def check_name(name: str, flag: str) -> str:
    """The name of a model that can be loaded: a local folder's, or one that a hub may have.

    Raises: UserError where it can only be a local folder's, and there is none: no hub is asked.
    """
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or ":" in name or name.endswith("/")
    if not path.is_dir() and (local or name.count("/") > 1 or path.exists()):
        raise UserError(f"{name} does not load: there is no such folder; say with {flag} where the model is")
    return name


def keep(name: str) -> str:
    """A model's name as checkpoints hold it: a local folder is found again from any working directory."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


@contextlib.contextmanager
def loading(what: str, name: str, flag: str) -> Iterator[None]:
    """Within it `name` is loaded, and nothing else done: quietly, and with damage told in one line.

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
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not isinstance(error, DAMAGE) and type(error) is not Exception:
            raise
        reason = " ".join((str(error) or type(error).__name__).strip().splitlines()[:2])
        raise UserError(f"{what} {name!r} does not load ({reason}); give {flag} a hub name or a local folder") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def fingerprint(model: nn.Module, dtype: torch.dtype) -> str:
    """A name for a model's weights, whatever folder they are in: 16 hex digits of a hash of some of each tensor.

    Read through `dtype`, in which the same weights agree on a GPU and on a CPU.
    """
    parts = [
        p.detach().flatten()[:: max(1, p.numel() // 256)][:256].to(dtype) for _, p in sorted(model.named_parameters())
    ]
    return hashlib.sha256(torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
