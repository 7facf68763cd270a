"""The page of a training run: its curves, and the last epoch's captions of the validation split."""

from pathlib import Path
from typing import Any

from dataset import Layout, Record
from evaluation import report, scores
from runtime import files, provenance


def write_training_page(results: Path, history: list[dict[str, Any]], records: list[Record], layout: Layout) -> str:
    """Write losses.png and training/index.html into `results`; returns a line that says so.

    history: one {"epoch", "train_loss", "val_loss", "CIDEr"} an epoch; records: the validation split's.
    """
    report.save_curves(results / "losses.png", history)
    epoch = history[-1]["epoch"]
    path = results / f"validation_epoch_{epoch}.json"
    predictions = files.read_json(path, "the last predictions")["predictions"]
    kept = [record for record in records if record["id"] in predictions]
    scored = scores.Scorer(kept, layout).scores({r["id"]: predictions[r["id"]] for r in kept}, meteor=False)
    page, result = results / "training" / "index.html", {**scored, "made_by": provenance.made_by()}
    report.write_scored_page(page, f"Training, epoch {epoch}", result, layout, history)
    return f"curves: {results / 'losses.png'}, page: {page}"
