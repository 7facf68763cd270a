"""The model card that hubs show: the README.md beside a captioner's weights."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from runtime import files
from runtime.files import UserError


def model_card(captioner: Any, evaluation: Path | str | None = None, license: str = "other") -> ModelCard:
    """What is known of a captioner, its training and its scores, as card.md.j2 tells it.

    `evaluation`: evaluate.py's evaluation.json of these weights; without it the scores are those of the validation.
    `license`: of the weights, a name that the hub knows. Raises: UserError where the evaluation is of other weights.
    """
    import jinja2

    result = files.read_json(evaluation, "the evaluation") if evaluation else {}
    if evaluation and not (isinstance(result, dict) and {"epoch", "metrics", "recipe"} <= set(result)):
        raise UserError(f"{evaluation} is not what evaluate.py writes; give its evaluation.json")
    if evaluation and result["recipe"].get("trained_by") != captioner.config.get("trained_by"):
        raise UserError(f"{evaluation} is of weights that another run trained: evaluate these")
    if evaluation and result["epoch"] != captioner.epoch:
        raise UserError(f"{evaluation} is of epoch {result['epoch']}, the weights of {captioner.epoch}: evaluate these")
    now = next((line for line in captioner.history if line["epoch"] == captioner.epoch), {})
    features = captioner.config["features"] or {}
    names = [captioner.config["llm"], features.get("encoder", "an encoder that is not recorded")]
    base = [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]  # others are folders
    llm, encoder = (f"[{n}](https://huggingface.co/{n})" if n in base else Path(n).name for n in names)
    size = sum(parameter.numel() for parameter in captioner.qformer.parameters())
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    known = {"features": features, "base": base, "llm": llm, "encoder": encoder, "size": size, "license": license}
    known |= {"captioner": captioner, "config": captioner.config, "now": now, "evaluation": result}
    return ModelCard(page.render(known))
