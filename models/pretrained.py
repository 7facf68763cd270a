"""What loading the two frozen models has in common: where they are, errors in one line, fingerprints of weights.

transformers is imported where something is loaded: worker processes that only decode start without it.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.files import UserError


def tell(text: str) -> None:
    """Print on stderr; under torchrun, one process tells for all."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def locate(name: str, flag: str) -> str:
    """A local folder's absolute path, so that it is found again from any working directory; else the name, a hub's.

    Says that it is loaded, which can take long.
    Raises: UserError where it can only be a local folder's, and there is none: no hub is asked.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        tell(f"loading {folder}")
        return str(folder.absolute())
    local = folder.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1
    if local or "\\" in name or ":" in name or folder.exists():
        raise UserError(f"{name} does not load: there is no such folder; say with {flag} where the model is")
    from huggingface_hub import constants

    tell(f"loading {name}: what {constants.HF_HUB_CACHE} does not hold yet is downloaded from {constants.ENDPOINT}")
    return name


def load(from_pretrained: Callable[..., Any], name: str, what: str, flag: str, **settings: Any) -> Any:
    """What `from_pretrained(name, **settings)` of transformers returns, without its bars and warnings.

    Only the download of a model's weights has a bar, the `tqdm_class` in `settings`.
    Raises: UserError where the folder, or the hub's model, is damaged or of another kind.
    """
    from transformers.utils import logging

    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{what} {name!r}: this is an adapter: merge it into its base model first")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # no tables of weights that are not wanted
    logging.disable_progress_bar()
    try:
        # A checkpoint names its models: code that comes with one is not run, nor is the user asked.
        return from_pretrained(name, trust_remote_code=False, **settings)
    except (MemoryError, torch.OutOfMemoryError):
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
