import json
import os
import shutil
import signal

import pytest
import torch

import dataset
import evaluate
import train
from qformer import VideoCaptioner
from runtime.files import UserError
from runtime.signals import Interrupted
from tests import tiny, videos


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
    assert result["grounding"]["most_common_caption"] == "covering a cup with paper"  # a label
    assert 0 <= result["actions"]["top1"] <= result["actions"]["top5"] <= 1
    low, high = result["intervals"]["CIDEr"]
    assert low <= result["metrics"]["CIDEr"] <= high
    assert "evaluate" in (tmp_path / "index.html").read_text() or (tmp_path / "index.html").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "CIDEr, features shuffled" in said and "METEOR" in said and "left out" in said


def test_a_run_is_compared_with_another_and_with_itself(run, tmp_path, capsys, without_java, monkeypatch):
    words = ["--actions", "--grounding"]
    evaluate.main(flags(run, tmp_path / "old", *words))
    old = json.loads((tmp_path / "old" / "evaluation.json").read_text())
    assert all(1 <= row["rank"] <= 6 and isinstance(row["shuffled"], str) for row in old["predictions"])
    assert old["actions"]["top1"] == sum(row["rank"] == 1 for row in old["predictions"]) / 5
    for name in ("same", "other"):
        if name == "other":
            said = [record["label"][0] for record in dataset.read_ready(run / "data", "validation")]
            monkeypatch.setattr(VideoCaptioner, "generate", lambda *_, said=said: said)
        assert evaluate.main(flags(run, tmp_path / name, *words, "--compare", str(tmp_path / "old"))) == 0
        new = json.loads((tmp_path / name / "evaluation.json").read_text())
        compared, said = new["compared"], capsys.readouterr().out
        assert (compared["clips"], compared["epoch"], compared["made_by"]) == (5, 1, old["made_by"])
        assert compared["checkpoint"] == old["checkpoint"] and compared["path"].endswith("evaluation.json")
        gain = new["metrics"]["ROUGE_L"] - old["metrics"]["ROUGE_L"]
        assert compared["metrics"]["ROUGE_L"] == pytest.approx(gain, abs=1e-12) and (gain == 0) == (name == "same")
        assert "on 5 clips" in said and f"difference {gain:+.4f}" in said
        assert 'href="../old/index.html"' in (tmp_path / name / "index.html").read_text()
        assert {"CIDEr_shuffled", "CIDEr_most_common"} <= set(compared["grounding"]) and "top1" in compared["actions"]
    captions = {row["id"]: row["prediction"] for row in old["predictions"]}
    assert {row["id"]: row["compared"]["prediction"] for row in new["predictions"]} == captions


def test_what_cannot_be_compared_is_told_before_the_models_load(run, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoCaptioner, "from_checkpoint", lambda *_: pytest.fail("loaded"))
    (tmp_path / "evaluation.json").write_text('{"split": "test", "predictions": []}')
    for place, error in ((tmp_path, "this run writes"), (tmp_path / "none.json", "there is no file")):
        with pytest.raises(UserError, match=error):
            evaluate.main(flags(run, tmp_path, "--compare", str(place)))
    with pytest.raises(UserError, match="'test' split, this run of 'validation'"):
        evaluate.main(flags(run, tmp_path / "new", "--compare", str(tmp_path / "evaluation.json")))


def test_the_checkpoints_recipe_is_in_evaluation_json_and_on_the_page(run, tmp_path):
    evaluate.main(flags(run, tmp_path, "--no-meteor"))
    recipe = json.loads((tmp_path / "evaluation.json").read_text())["recipe"]
    captioner = VideoCaptioner.from_checkpoint(run / "checkpoint.pt")
    assert recipe["llm"] == captioner.config["llm"] and recipe["qformer"]["num_queries"] == 4
    assert recipe["features"]["encoder"] == "tiny-encoder" and recipe["epoch"] == 1
    assert recipe["training"] == captioner.recipe
    page = (tmp_path / "index.html").read_text()
    assert "<span>num queries 4</span>" in page and 'href="evaluation.json"' in page


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
    texts, score = [], VideoCaptioner.log_likelihood
    monkeypatch.setattr(
        VideoCaptioner, "log_likelihood", lambda self, clips, asked: texts.extend(asked) or score(self, clips, asked)
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
    told, make = {}, evaluate.scores.Scorer

    def generate(_, clips, max_new_tokens, num_beams):
        told["captions"] = (max_new_tokens, num_beams)
        return ["moving a red ball up"] * len(clips)

    def reversed_captions(reader, videos, timeout, max_new_tokens, num_beams):
        told["reversed"] = (list(videos), (timeout, reader.batch_size, max_new_tokens, num_beams))
        return {}

    monkeypatch.setattr(VideoCaptioner, "generate", generate)
    monkeypatch.setattr(evaluate, "reversed_captions", reversed_captions)
    monkeypatch.setattr(
        evaluate.scores, "Scorer", lambda *given: told.update(java=given[2], seed=given[3]) or make(*given)
    )
    words = "--grounding --no-meteor --num-beams 3 --max-new-tokens 7 --batch-size 2 --clip-timeout 9 --java-timeout 8"
    for most, clips in ((1, 1), (9, 3)):
        more = [*words.split(), "--data", str(data), "--seed", "4", "--reversed-clips", str(most)]
        evaluate.main(flags(run, tmp_path, *more))
        assert told["captions"] == (7, 3) and (told["java"], told["seed"]) == (8.0, 4)
        assert len(told["reversed"][0]) == clips and told["reversed"][1] == (9.0, 2, 7, 3)
    assert told["reversed"][0] == ["12", "13", "14"]


def caption_of(features):
    return tiny.CAPTIONS[int(features.abs().sum() * 1000) % len(tiny.CAPTIONS)]


def test_everything_that_a_seed_decides_is_the_same_twice(run, tmp_path, monkeypatch):
    """The first of the reversed clips takes longest to decode: the order must not be that in which they are done."""
    data, out = shutil.copytree(run / "data", tmp_path / "data"), tmp_path / "out"
    for clip, count in ((12, 150), (13, 5), (14, 5)):
        videos.write(data / "20bn-something-something-v2" / f"{clip}.webm", videos.moving(count, seed=clip))
    words = ["--data", str(data), "--grounding", "--actions", "--no-meteor", "--batch-size", "2"]
    words += ["--encoder", str(tiny.save_encoder(tmp_path / "encoder"))]
    made = tiny.features_config(str(tmp_path / "encoder"))
    (data / "features" / "config.json").write_text(json.dumps(made.to_dict()))
    found = []
    # Captions that differ from clip to clip: of equal ones all orders look the same.
    monkeypatch.setattr(VideoCaptioner, "generate", lambda _, clips, *__: [caption_of(clip) for clip in clips])
    for seed in (3, 3, 4):
        assert evaluate.main(flags(run, out, *words, "--seed", str(seed))) == 0
        found.append(json.loads((out / "evaluation.json").read_text()))
        assert found[-1]["grounding"]["reversed_clips"] == 3
    assert found[0] == found[1] != found[2]


def test_an_interrupt_writes_nothing(run, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(VideoCaptioner, "generate", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        evaluate.main(flags(run, tmp_path))
    assert stop.value.code == 128 + signal.SIGTERM  # which is what the script ends with: see test_cli.py
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is before


def test_an_unwritable_results_folder_is_told_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(VideoCaptioner, "from_checkpoint", lambda *_: pytest.fail("loaded"))
    with pytest.raises(OSError, match="file"):
        evaluate.main(flags(run, tmp_path / "file" / "out"))


def test_without_any_features_the_command_that_makes_them_is_named(run, tmp_path):
    shutil.copytree(run / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "features")
    words = ["--data", str(tmp_path / "data"), "--checkpoint", str(run / "checkpoint.pt"), "--results", str(tmp_path)]
    with pytest.raises(UserError, match="all 5 .* --splits validation .*--encoder tiny-encoder") as error:
        evaluate.main(words)
    assert "--max-missing" not in str(error.value)


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
    with pytest.raises(UserError, match="test_ready.json; run python prepare_annotations.py"):
        evaluate.main(flags(run, tmp_path, "--split", "test"))
    with pytest.raises(UserError, match="there is no file"):
        evaluate.main(["--data", str(run / "data"), "--checkpoint", str(tmp_path / "none.pt")])
    with pytest.raises(UserError, match="--seed: '-1' is not a whole number, 0 or more"):
        evaluate.main(["--seed", "-1"])
    with pytest.raises(UserError, match="invalid choice: 'vallidation'"):
        evaluate.main(flags(run, tmp_path / "out", "--split", "vallidation"))
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UserError, match="nothing in it was run"):
        evaluate.main(words)
    assert not (tmp_path / "ran").exists()
