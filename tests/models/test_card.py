import json
import re

import pytest
from huggingface_hub import ModelCard

from models import checkpoint
from qformer import VideoCaptioner
from runtime.files import UserError
from tests import tiny, videos

HISTORY = [
    {"epoch": 1, "train_loss": 3.5, "val_loss": 3.25, "CIDEr": 0.5},
    {"epoch": 2, "train_loss": 2.5, "val_loss": 2.25, "CIDEr": 0.75},
]
RECIPE = {"batch_size": 8, "lr": 5e-05, "clips": 168913}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.save_lm(tmp_path_factory.mktemp("models") / "lm")


def captioner(llm, tmp_path, history=HISTORY, **config):
    """A captioner read back from a checkpoint, as people have it whose card it is."""
    made = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer(seed=2))
    known = {**made.config, "llm": str(llm), "features": tiny.features_config("facebook/vjepa2-x").to_dict(), **config}
    saved = checkpoint.Checkpoint(known, made.qformer.state_dict(), 2, None, {"run": RECIPE, "history": history})
    checkpoint.write(tmp_path / "c.pt", saved)
    return VideoCaptioner.from_checkpoint(tmp_path / "c.pt", device="cpu")


def test_the_card_says_what_it_is_trained_on_with_which_scores(llm, tmp_path):
    trained_by = {"command": "python train.py", "commit": "1f2e3d4c5b6a"}
    made = captioner(llm, tmp_path, data="Something-Something V2", trained_by=trained_by)
    made.config["llm"] = "Qwen/Qwen2-1.5B"
    made.save_pretrained(tmp_path / "folder")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    head = card.data.to_dict()
    assert head["base_model"] == ["Qwen/Qwen2-1.5B", "facebook/vjepa2-x"]
    assert head["pipeline_tag"] == "video-text-to-text" and head["library_name"] == "vjepa2-video-captioning"
    assert head["license"] == "other" and head["datasets"] == ["HuggingFaceM4/something_something_v2"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("Something-Something V2", "validation")
    assert (result.metric_name, result.metric_value) == ("CIDEr", 0.75)
    for text in (
        "| 2 (these weights) | 2.5000 | 2.2500 | 0.7500 |",
        "| 1 | 3.5000 |",
        "batch size 8, lr 5e-05.",
        "168,913 clips",
        "commit 1f2e3d4c5b6a",
        "[facebook/vjepa2-x](https://huggingface.co/facebook/vjepa2-x): 4 frames of 32 x 32",
        "CIDEr of the validation split: 0.7500",
        "has not named a licence",
        "The code is MIT.",
    ):
        assert text in card.text, text
    assert not re.search(r"[{}]|None|Undefined", card.text)


def test_scores_of_an_evaluation_and_a_licence_come_through_save_pretrained(llm, tmp_path):
    metrics = {"Bleu_4": 0.25, "METEOR": None, "CIDEr": 0.5}
    evaluation = {"epoch": 2, "split": "test", "clips": 1300, "metrics": metrics, "tokenizer": "PTB (pycocoevalcap)"}
    evaluation |= {"intervals": {"Bleu_4": None, "METEOR": None, "CIDEr": [0.25, 0.75]}}
    evaluation |= {"made_by": {"command": "python evaluate.py --split test", "commit": "1f2e"}}
    trained_by = {"command": "python train.py --seed 1", "commit": "1f2e"}
    evaluation["recipe"] = {"epoch": 2, "trained_by": trained_by}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation))
    made = captioner(llm, tmp_path, data='mine: "a" & b', trained_by=trained_by)
    settings = {"evaluation": path, "license": "cc-by-nc-4.0"}
    made.save_pretrained(tmp_path / "folder", model_card_kwargs=settings)
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert [(r.dataset_split, r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("test", "Bleu_4", 0.25),
        ("test", "CIDEr", 0.5),
    ]
    assert card.data.eval_results[0].dataset_name == 'mine: "a" & b' and card.data.license == "cc-by-nc-4.0"
    assert card.data.to_dict()["base_model"] == ["facebook/vjepa2-x"]  # the other one is a folder
    assert "datasets" not in card.data.to_dict() and str(llm) not in str(card)
    for text in (
        "1,300 clips of the test split",
        "| CIDEr | 0.5000 [0.2500, 0.7500] |",
        "| Bleu_4 | 0.2500 |",
        "evaluate.py --split test",
    ):
        assert text in card.text, text
    path.write_text(json.dumps({**evaluation, "epoch": 1}))
    with pytest.raises(UserError, match="is of epoch 1, the weights of 2"):
        made.generate_model_card(evaluation=path)
    path.write_text(json.dumps({**evaluation, "recipe": {"trained_by": {**trained_by, "commit": "3a4b"}}}))
    with pytest.raises(UserError, match="is of weights that another run trained"):
        made.generate_model_card(evaluation=path)
    for other in ([], {"epoch": 2}):
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match="is not what evaluate.py writes"):
            made.generate_model_card(evaluation=path)


def test_a_captioner_of_which_little_is_known_has_a_card_too(tmp_path):
    made = VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer())
    card = made.generate_model_card()
    assert "None are recorded" in card.text and "do not say with which settings" in card.text
    assert card.data.eval_results is None and "base_model" not in card.data.to_dict()
    assert not re.search(r"[{}]|Undefined", card.text)


def test_what_a_folder_says_of_its_training_survives_another_saving(llm, tmp_path):
    made = captioner(llm, tmp_path, data="mine")
    made.save_pretrained(tmp_path / "one")
    again = VideoCaptioner.from_pretrained(tmp_path / "one", device="cpu")
    assert (again.epoch, again.history, again.recipe) == (2, HISTORY, RECIPE)
    again.save_pretrained(tmp_path / "two")
    for name in ("README.md", "config.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_the_cards_code_runs(llm, tmp_path, capsys):
    assert "captioner.generate(features)" in captioner(llm, tmp_path, features=None).generate_model_card().text
    encoder = tiny.save_encoder(tmp_path / "encoder")
    features = {**tiny.features_config(str(encoder)).to_dict(), "tokens": 32}
    made = captioner(llm, tmp_path, features=features)
    made.save_pretrained(tmp_path / "folder")
    video = videos.write(tmp_path / "clip.webm", videos.moving(10))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "folder" / "README.md").read_text(), re.DOTALL)
    code = code.replace("FOLDER_OR_NAME", str(tmp_path / "folder")).replace("clip.webm", str(video))
    exec(code, {})
    assert len(capsys.readouterr().out.strip()) > 0
