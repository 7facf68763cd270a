"""Two runs side by side: the differences of their scores on the same clips, and which clips got better.

Both runs' captions are scored anew from what evaluation.json holds of each clip, so that tokenizer and document
frequencies are the same for both. A score that one of the files holds too little for is left out.
"""

from pathlib import Path
from typing import Any

from dataset import Record
from evaluation.bootstrap import Resampled, fractions
from evaluation.scores import Scorer, action_scores
from evaluation.ssv2 import score_clip
from runtime import files
from runtime.files import UserError

SAME = 0.005  # CIDEr of a clip: two decimals do not show a smaller change
PER_CLIP = {"rank": int, "shuffled": str, "reversed": str, "attention": dict}  # held where its flag was given

Rows = dict[str, dict[str, Any]]  # predictions of evaluation.json, by clip id


def read(path: Path, split: str, records: list[Record], written: Path) -> dict[str, Any]:
    """Another run's evaluation.json (or the folder that holds it) for `compare`, with the predictions of our clips.

    Raises: UserError where it is something else, of another split or of other references, has none of our clips, or
    is the file that this run will write.
    """
    path = path / "evaluation.json" if path.is_dir() else path
    other = files.read_json(path, "--compare")
    if path.resolve() == written.resolve():
        raise UserError(f"--compare {path} is the file that this run writes: give --results another folder")
    try:
        theirs, of = {row["id"]: row for row in other["predictions"]}, other["split"]
        if not all(isinstance(row["prediction"], str) for row in theirs.values()):
            raise TypeError
        shared = [(record, theirs[record["id"]]) for record in records if record["id"] in theirs]
        changed = [record["id"] for record, row in shared if row["references"] != record["label"]]
    except (TypeError, LookupError):
        advice = "give one that evaluate.py wrote, or its folder"
        raise UserError(f"--compare {path} is no evaluation.json; {advice}") from None
    if of != split:
        raise UserError(f"--compare {path} is of the {of!r:.20} split, this run of {split!r}: give --split the same")
    if not shared:
        raise UserError(f"--compare {path} has no clip of this run's; give a run on the same --data")
    if changed:
        reason = f"has other references for {len(changed):,} of {len(shared):,} clips (the first is {changed[0]})"
        raise UserError(f"--compare {path} {reason}; run that checkpoint's evaluate.py again on this --data")
    return {**other, "path": files.display_path(path), "predictions": [row for _, row in shared]}


def compare(result: dict[str, Any], other: dict[str, Any], scorer: Scorer, pairs: dict[str, str]) -> dict[str, Any]:
    """Scores of this run (`result`) minus the other's on the clips of both, by sections of evaluation.json.

    Each has its paired 95 % interval where the score has one. Each of the result's predictions that both have gets
    "compared": the other's caption, its CIDEr, our CIDEr minus that, and "better", "same" or "worse".
    """
    theirs: Rows = {row["id"]: row for row in other["predictions"]}  # in the order of the records, as ours
    ours: Rows = {row["id"]: row for row in result["predictions"] if row["id"] in theirs}
    held = {
        name: [key for key in ours if all(isinstance(rows[key].get(name), kind) for rows in (ours, theirs))]
        for name, kind in PER_CLIP.items()
    }
    meteor = result["metrics"]["METEOR"] is not None
    one, ciders = _scores(ours, result, held, scorer, pairs, meteor)
    two, others = _scores(theirs, other, held, scorer, pairs, meteor)
    for key, row in ours.items():
        gain = ciders[key] - others[key]
        change = "same" if abs(gain) < SAME else "better" if gain > 0 else "worse"
        row["compared"] = {"prediction": theirs[key]["prediction"], "CIDEr": others[key]}
        row["compared"] |= {"difference": gain, "change": change}
    changes = [row["compared"]["change"] for row in ours.values()]
    about = {name: other.get(name) for name in ("path", "checkpoint", "epoch", "made_by")}
    counts = {"clips": len(ours), **{name: changes.count(name) for name in ("better", "same", "worse")}}
    return {**about, **counts, **{name: (one[name] - two[name]).summary() for name in one if name in two}}


def _scores(
    rows: Rows, run: dict[str, Any], held: dict[str, list[str]], scorer: Scorer, pairs: dict[str, str], meteor: bool
) -> tuple[dict[str, Resampled], dict[str, float]]:
    """A run's scores of these clips by section, and each clip's CIDEr; `held`: the clips that both runs have it for."""
    captions = {key: row["prediction"] for key, row in rows.items()}
    ngrams = scorer.ngrams(captions, meteor)
    found = {"metrics": ngrams["resampled"]}
    if scorer.reader is not None:
        clips = [score_clip(text, scorer.records[key], scorer.reader) for key, text in captions.items()]
        found["ssv2"] = fractions([clip["counts"] for clip in clips], scorer.seed)
    if held["rank"]:
        found["actions"] = action_scores([rows[key]["rank"] for key in held["rank"]], scorer.seed)
    if held["attention"]:
        found["attention"] = fractions([rows[key]["attention"] for key in held["attention"]], scorer.seed)
    if held["shuffled"]:
        lies = {name: {key: rows[key][name] for key in held[name]} for name in ("shuffled", "reversed")}
        lies["most_common"] = dict.fromkeys(captions, run["grounding"]["most_common_caption"])
        lies["forwards"] = {key: captions[key] for key in held["reversed"]}
        found["grounding"] = scorer.grounding(lies, pairs)
    return found, ngrams["per_clip"]["CIDEr"]
