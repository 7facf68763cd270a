"""What runs only on a GPU: bfloat16 autocast, the compiled encoder, pinned memory. `test_gpu.py` runs it where one is.

Each is compared with the same on the CPU, as closely as half precision allows.
"""

import json

import pytest
import torch

import evaluate
import infer
import prepare_annotations
import preprocess_something_something_v2 as preprocess
import train
from features import cache
from features.reader import feature_batches
from models.vjepa2 import VideoEncoder
from qformer import QFormer, VideoCaptioner
from tests import reference as textbook
from tests import tiny, videos

GPU = torch.device("cuda")
CLIPS = [[tiny.CAPTIONS[0], tiny.CAPTIONS[2]], [tiny.CAPTIONS[1]], [tiny.CAPTIONS[3], tiny.CAPTIONS[4]]]


def some_features(batch=3, tokens=6, width=16):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


def captioners():
    """The same one on the CPU in float32, and on the GPU with its language model in bfloat16."""
    made = [VideoCaptioner(tiny.tiny_lm(), tiny.tiny_tokenizer(), tiny.tiny_qformer()).eval() for _ in range(2)]
    made[1].lm.to(torch.bfloat16)
    return made[0], made[1].to(GPU)


def test_absorbed_attention_equals_the_textbook_in_float32():
    sizes = {"num_queries": 16, "dim": 64, "visual_dim": 48, "num_heads": 4, "dropout": 0.0, "mlp_dropout": 0.0}
    torch.manual_seed(0)
    absorbed, reference = QFormer(**sizes).to(GPU), textbook.TextbookQFormer(**sizes).to(GPU)
    reference.load_state_dict(absorbed.state_dict())
    features = some_features(4, 100, 48).to(GPU)
    outputs = [model(features) for model in (absorbed, reference)]
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < 1e-5
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2)).to(GPU)
    for output in outputs:
        (output * weights).sum().backward()
    for (name, one), other in zip(absorbed.named_parameters(), reference.parameters(), strict=True):
        assert (one.grad - other.grad).norm() / other.grad.norm() < 1e-4, name


def test_attention_under_autocast_sums_to_one_and_is_near_the_cpus():
    features = some_features(tokens=8)
    ours, theirs = (captioner.attention(features.to(captioner.device), (2, 2, 2)).cpu() for captioner in captioners())
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs.sum((2, 3, 4)), torch.ones(3, 4))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_losses_gradients_and_scores_under_autocast_are_near_the_cpus():
    on_cpu, on_gpu = captioners()
    losses = [captioner.per_caption_nll(some_features().to(captioner.device), CLIPS) for captioner in (on_cpu, on_gpu)]
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=0.05, atol=0.05)
    for loss in losses:
        loss.mean().backward()
    ours, theirs = (captioner.qformer.query_tokens.grad.cpu() for captioner in (on_gpu, on_cpu))
    assert (ours - theirs).norm() / theirs.norm() < 0.1
    scores = [
        captioner.log_likelihood(some_features().to(captioner.device), tiny.CAPTIONS) for captioner in (on_cpu, on_gpu)
    ]
    torch.testing.assert_close(scores[1].cpu(), scores[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_features_are_dequantized_on_the_gpu(dtype, tmp_path):
    cache.save(tmp_path / "a.pt", cache.quantize(some_features()[0], dtype))
    (packed,) = feature_batches(tmp_path, [["a", "a"]], pin=True)
    assert packed.values.is_pinned()
    there = cache.dequantize(packed, GPU, torch.float32)
    assert there.device.type == "cuda" and torch.equal(there.cpu(), cache.dequantize(packed))


def test_the_compiled_encoder_gives_the_cpus_features(tmp_path):
    name = videos.tiny_vjepa(tmp_path / "encoder")
    on_gpu, on_cpu = (VideoEncoder(name, device, frames=4) for device in (GPU, "cpu"))
    clips = torch.randint(0, 255, (5, 4, 3, 32, 32), dtype=torch.uint8)
    assert on_gpu.weights == on_cpu.weights
    assert on_gpu.prepare(4) == 4
    found = torch.cat([on_gpu.encode(clips[:4]), on_gpu.encode(clips[4:])]).float().cpu()  # the last one is filled up
    torch.testing.assert_close(found, on_cpu.encode(clips), rtol=0.05, atol=0.05)


def test_the_five_scripts_from_video_to_captions(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    ids = videos.write_dataset(data, {"train": 9, "validation": 5, "test": 3})
    encoder, lm = videos.tiny_vjepa(tmp_path / "encoder"), tiny.save_lm(tmp_path / "lm")
    (data / "labels" / "labels.json").write_text(json.dumps({"Moving something": "0"}))
    made = f"--data {data} --encoder {encoder} --frames 4 --dtype int8 --splits train validation test"
    assert preprocess.main(made.split()) == 0
    assert len(list((data / "features").glob("*/*.pt"))) == len(ids)
    prepare_annotations.main(["--data", str(data)])
    words = f"--data {data} --checkpoint {out}/checkpoint.pt --results {out} --max-new-tokens 5"
    training = f"{words} --llm {lm} --num-queries 4 --batch-size 2 --accumulate 2 --lr 1e-3 --save-every 1 --epochs"
    assert train.main([*training.split(), "1"]) == 0 and train.main([*training.split(), "2"]) == 0
    assert len((out / "losses.txt").read_text().splitlines()) == 2
    assert evaluate.main([*words.split(), "--actions", "--grounding", "--no-meteor"]) == 0
    assert json.loads((out / "evaluation.json").read_text())["clips"] == 5
    assert infer.main([*words.split(), "--num-samples", "3"]) == 0
    assert json.loads((out / "inference" / "results.json").read_text())["failed"] == 0
