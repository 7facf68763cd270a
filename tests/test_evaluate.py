import json
import os
import shutil

import pytest
import torch

import evaluate
import train
from qformer import VideoCaptioner
from runtime.files import UserError
from tests import processes, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dataset and a checkpoint trained on it for one epoch."""
    root = tmp_path_factory.mktemp("run")
    data = tiny.make_dataset(root / "data")
    llm = tiny.save_lm(root / "lm")
    words = f"--data {data} --llm {llm} --checkpoint {root / 'checkpoint.pt'} --results {root / 'trained'} --epochs 1"
    train.main([*words.split(), "--num-queries", "4", "--lr", "1e-3", "--max-new-tokens", "5"])
    return root


def flags(run, out, *more):
    return ["--data", str(run / "data"), "--checkpoint", str(run / "checkpoint.pt"), "--results", str(out), *more]


def test_evaluation_holds_all_that_was_promised(run, tmp_path, capsys):
    assert evaluate.main(flags(run, tmp_path, "--actions", "--grounding", "--no-meteor")) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["epoch"] == 1 and result["split"] == "validation" and result["clips"] == 5
    assert set(result["metrics"]) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"}
    assert result["metrics"]["METEOR"] is None
    assert [row["id"] for row in result["predictions"]] == ["11", "12", "13", "14", "15"]
    assert all(isinstance(row["prediction"], str) and row["references"] for row in result["predictions"])
    assert {"CIDEr_shuffled", "CIDEr_most_common"} <= set(result["grounding"])
    assert 0 <= result["actions"]["top1"] <= result["actions"]["top5"] <= 1
    low, high = result["intervals"]["CIDEr"]
    assert low <= result["metrics"]["CIDEr"] <= high
    assert "evaluate" in (tmp_path / "index.html").read_text() or (tmp_path / "index.html").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "6 templates for 5 clips" in said and "TFLOP in all" in said and "CIDEr, features shuffled" in said
    assert said.index("TFLOP in all") < said.index("CIDEr")


def test_predictions_are_the_captioners_own(run, tmp_path):
    evaluate.main(flags(run, tmp_path, "--no-meteor", "--batch-size", "2", "--max-new-tokens", "6"))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    captioner = VideoCaptioner.from_checkpoint(run / "checkpoint.pt")
    for row in result["predictions"]:
        features = torch.load(run / "data" / "features" / "validation" / f"{row['id']}.pt", weights_only=True)
        assert captioner.generate(features[None].float(), max_new_tokens=6) == [row["prediction"]]


def test_actions_rank_templates_by_their_own_likelihood(run, tmp_path):
    evaluate.main(flags(run, tmp_path, "--no-meteor", "--actions"))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    captioner = VideoCaptioner.from_checkpoint(run / "checkpoint.pt")
    records = json.loads((run / "data" / "annotations" / "val_ready.json").read_text())
    right = []
    for record in records:
        features = torch.load(run / "data" / "features" / "validation" / f"{record['id']}.pt", weights_only=True)
        texts = {template: template.replace("[", "").replace("]", "").lower() for template in tiny.TEMPLATES}
        losses = {template: captioner.loss(features[None].float(), [text]).item() for template, text in texts.items()}
        right.append(min(losses, key=losses.get) == record["template"])
    assert result["actions"]["top1"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(("capitals", "scored"), [(1, "moving something up"), (10, "Moving something up")])
def test_templates_are_scored_in_the_case_of_most_captions(run, tmp_path, monkeypatch, capitals, scored):
    """One label that begins with a capital, as real label sets have some, changes the case of no template."""
    shutil.copytree(run / "data", tmp_path / "data")
    path = tmp_path / "data" / "annotations" / "train_ready.json"
    records = json.loads(path.read_text())
    for record in records[:capitals]:
        record["label"][0] = record["label"][0].capitalize()
    path.write_text(json.dumps(records))
    texts, score = [], VideoCaptioner.score
    monkeypatch.setattr(
        VideoCaptioner, "score", lambda self, clips, said: texts.extend(said) or score(self, clips, said)
    )
    words = ["--data", str(tmp_path / "data"), "--results", str(tmp_path / "out"), "--no-meteor", "--actions"]
    evaluate.main(["--checkpoint", str(run / "checkpoint.pt"), *words])
    assert texts[0] == scored


def test_every_setting_reaches_what_it_sets(run, tmp_path, monkeypatch):
    """Beams, lengths, Java's patience, and which reversed clips are decoded for how long."""
    data = shutil.copytree(run / "data", tmp_path / "data")
    (data / "20bn-something-something-v2").mkdir()
    for clip in range(11, 16):  # 12 and 13 move up and down, 14 is covering: they have opposites
        (data / "20bn-something-something-v2" / f"{clip}.webm").touch()
    told, make = {}, evaluate.Scorer

    def generate(_, clips, max_new_tokens, num_beams):
        told["captions"] = (max_new_tokens, num_beams)
        return ["moving a red ball up"] * len(clips)

    def reversed_captions(_, videos, *settings):
        told["reversed"] = (sorted(videos), settings[:-1])
        return {}

    monkeypatch.setattr(VideoCaptioner, "generate", generate)
    monkeypatch.setattr(evaluate.grounding, "reversed_captions", reversed_captions)
    monkeypatch.setattr(evaluate, "Scorer", lambda *given: told.update(java=given[2], seed=given[3]) or make(*given))
    words = "--grounding --no-meteor --num-beams 3 --max-new-tokens 7 --batch-size 2 --clip-timeout 9 --java-timeout 8"
    for most, clips in ((1, 1), (9, 3)):
        more = [*words.split(), "--data", str(data), "--seed", "4", "--reversed-clips", str(most)]
        evaluate.main(flags(run, tmp_path, *more))
        assert told["captions"] == (7, 3) and (told["java"], told["seed"]) == (8.0, 4)
        assert len(told["reversed"][0]) == clips and told["reversed"][1] == (2, 7, 3, 9.0)
    assert told["reversed"][0] == ["12", "13", "14"]


def test_what_the_scores_need_is_missed_before_any_clip_is_captioned(run, tmp_path, monkeypatch):
    shutil.copytree(run / "data", tmp_path / "data")
    (tmp_path / "data" / "labels" / "labels.json").write_text('{"Moving [something] up": "0"}')
    monkeypatch.setattr(VideoCaptioner, "generate", lambda *_, **__: pytest.fail("captioned"))
    words = ["--data", str(tmp_path / "data"), "--checkpoint", str(run / "checkpoint.pt"), "--results", str(tmp_path)]
    with pytest.raises(UserError, match="labels.json does not hold clip 11's"):
        evaluate.main([*words, "--actions"])
    (tmp_path / "data" / "labels" / "opposites.json").write_text("[1]")
    with pytest.raises(UserError, match="opposite"):
        evaluate.main([*words, "--grounding"])


def test_mistakes_are_one_line_with_exit_code_2(run, tmp_path):
    with pytest.raises(UserError, match="test_ready.json; run prepare_annotations.py"):
        evaluate.main(flags(run, tmp_path, "--split", "test"))
    with pytest.raises(UserError, match="there is no file"):
        evaluate.main(["--data", str(run / "data"), "--checkpoint", str(tmp_path / "none.pt")])
    out = tmp_path / "out"
    script = processes.Script("evaluate", flags(run, out, "--split", "vallidation"), tmp_path / "log")
    assert script.wait() == 2 and "unknown split 'vallidation'" in script.said()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_checkpoint_of_other_features_is_refused(run, tmp_path):
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    saved["config"]["features"]["frames"] = 99
    torch.save(saved, tmp_path / "other.pt")
    words = ["--data", str(run / "data"), "--checkpoint", str(tmp_path / "other.pt"), "--results", str(tmp_path)]
    with pytest.raises(UserError, match="frames 99, not 4"):
        evaluate.main(words)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model_state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.pt")
    words = ["--data", str(run / "data"), "--checkpoint", str(tmp_path / "bomb.pt"), "--results", str(tmp_path)]
    script = processes.Script("evaluate", words, tmp_path / "log")
    assert script.wait() == 2 and "refused" in script.said() and len(script.errors()) == 1
    assert not (tmp_path / "ran").exists()
