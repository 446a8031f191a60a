"""Every shipped training config builds at full size without memory, and takes steps at its tiny
variant."""

import jax
import numpy as np
import pytest
from common import ROOT

from fmjax import build
from fmjax.config import load
from fmjax.data import Vocab, settings
from fmjax.data.images import ImageDataset, ImageSplit
from fmjax.data.texts import TextDataset
from fmjax.data.token_rows import TokenRows
from fmjax.params import paths, sharding
from fmjax.tasks import train
from fmjax.training import setup
from fmjax.training.step import make_train_step

FULL = [
    "clm.py",
    "clm_code.py",
    "instruct.py",
    "seq2seq.py",
    "seq2seq.py:summarise",
    "span_corruption.py",
    "span_corruption.py:ul2",
    "mlm.py",
    "mlm.py:bert_base",
    "nsp.py",
    "nsp.py:sop",
    "nsp.py:nsp,variant=bert_base",
    "shakespeare.py",
]
FULL += ["mlm.py:bert_base,runlocal", "nsp.py:nsp,variant=bert_base,runlocal"]
FULL += [
    "finetune_head.py",
    "finetune_last.py:layers=2",
    "finetune_bitfit.py",
    "finetune_unfreeze.py",
]
FULL += ["finetune_lora.py", "finetune_lora.py:plus=16.0", "finetune_qlora.py", "finetune_ia3.py"]
FULL += [f"finetune_adapter.py:kind={kind}" for kind in ("houlsby", "pfeiffer", "parallel")]
KINDS = "prompt", "mlp", "lstm", "prefix", "projected"
FULL += [f"finetune_prompt.py:kind={kind}" for kind in KINDS]
FULL += [
    f"finetune.py:{task}" for task in ("classify", "regress", "tag", "span", "choose", "contrast")
]
VISION = {"vision/vit.py": (8, 8, 1), "vision/vit.py:mnist": (28, 28, 1)}  # the shape of an image


def test_every_config_is_in_this_list():
    known = {name.partition(":")[0] for name in FULL} | {
        "chat.py",
        "compare.py",
        "compare_decoder.py",
        "embed.py",
        "evaluate.py",
        "export.py",
        "fewshot.py",
        "fill_mask.py",
        "generate.py",
        "harness.py",
        "llama2c.py",
        "predict.py",
        "probe.py",
        "replay.py",
        "report.py",
        "translate.py",
    }
    assert {path.name for path in (ROOT / "configs").glob("*.py")} <= known
    vision = {f"vision/{path.name}" for path in (ROOT / "configs/vision").glob("*.py")}
    assert vision == {name.partition(":")[0] for name in VISION}


@pytest.mark.parametrize("name", FULL)
def test_full_size_step_has_the_right_shapes(name, monkeypatch):
    """The whole step is traced at full size: state in, state out, nothing allocated."""
    own = ["init=", "model.name=bert", "model.variant=base", "tokenizer.name=train"]
    if name == "instruct.py":
        own = ["init=", "model.name=gpt2", "model.variant=tiny", "tokenizer.name=train"]
    tuned = name.startswith(("finetune", "instruct"))
    words = [f"--config.{word}" for word in own] if tuned else []
    if name == "shakespeare.py":  # whose 12 rows cannot be cut over the 8 devices of tests
        words = ["--config.batch_size=16", "--config.data.train=input.txt"]
    if name.startswith("seq2seq"):
        words = ["--config.data.train=pairs.jsonl"]
    if name.endswith(("kind=prompt", "mlp", "lstm")):  # which start from a trained table
        words.append("--config.adapter.init=normal")
    made = load.load(str(ROOT / "configs" / name), words)
    size, length = made.tokenizer.vocab_size, made.data.seq_len

    class Rows(TokenRows):
        seq_len, tokens = length, 10**6

        def __len__(self):
            return 10**4

        def rows(self, index, examples=None, seed=0):
            keys = ["input_ids", "segment_ids", "positions", "token_types"]
            shape = (len(index), *[4] * ("choose" in name), length)
            rows = {key: np.zeros(shape, np.int32) for key in keys}
            dtype = np.float32 if "regress" in name else np.int32
            shape = (len(index), *{"tag": [length], "span": [2]}.get(name.split(":")[-1], []))
            labels = np.zeros(shape, dtype)
            if name == "instruct.py":
                rows["loss_mask"] = rows["segment_ids"]
            if name.startswith("seq2seq"):
                for key in ("ids", "segment_ids", "positions"):
                    rows[f"target_{key}"] = rows["positions"]
            return rows | ({"labels": labels} if name.startswith(("nsp", "finetune")) else {})

    special, all_words = np.arange(size) < 5, np.ones(size, bool)
    vocab = Vocab(size, 0, 4, (2,), (3,), special, all_words, range(100), fim=(5, 6, 7))
    chosen = settings.read(settings.DataSettings, made.data.to_dict(), "data")
    fake = TextDataset(
        vocab=vocab,
        splits={"train": Rows()},
        tokenizer_dir=ROOT,
        labels=("a", "b", "c"),
        target=chosen.target,
        digest="0",
        format="0",
        counts={},
        settings=chosen,
    )
    run = traced(made, fake, monkeypatch)
    if "bert_base" in name:
        # BERT-base with a tied MLM head, 110 M in the paper's count; the pooler only for sentence
        # pairs.
        pooler = 768 * 768 + 768 + 768 * 2 + 2 if "nsp" in name else 0
        assert paths.size(run.abstract.params) == 109_514_298 + pooler


def traced(config, dataset, monkeypatch):
    """The run of a config on fake data, whose step keeps the shapes of the state."""
    monkeypatch.setattr(setup.data, "prepare", lambda *args, **kwargs: dataset)
    run = setup.setup(config, sharding.make_mesh())
    step = make_train_step(
        build.apply(run.model), run.objectives, run.optimizer.tx, run.split, config.accumulate
    )
    after, found = jax.eval_shape(step, run.abstract, setup.batch_spec(run))
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert shapes(after) == shapes(run.abstract)
    assert found["loss"].shape == ()
    return run


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("variant", [None, "base"])
def test_full_size_step_on_images_has_the_right_shapes(name, variant, tmp_path, monkeypatch):
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(28 * 28))
    words = [f"--config.data.train={file}"] if ":" in name else []
    words += [f"--config.model.variant={variant}", "--config.model.patch=2"] if variant else []
    made, shape = load.load(str(ROOT / "configs" / name), words), VISION[name]

    class Split(ImageSplit):
        row_size = "an image"

        def __init__(self):  # reads no file
            pass

        def __len__(self):
            return 10**4

        def rows(self, index, examples=None, seed=0):
            images = np.zeros((len(index), *shape), np.float32)
            return {"images": images, "labels": np.zeros(len(index), np.int32)}

    labels = tuple("0123456789")
    about = dict(digest="0", format="images", counts={}, target="classes", labels=labels)
    about |= dict(image_shape=shape, processor=tmp_path)
    run = traced(made, ImageDataset({"train": Split()}, **about), monkeypatch)
    assert paths.size(run.abstract.params) > (85e6 if variant else 135e3)


@pytest.mark.parametrize(
    "name",
    [
        "clm.py:tiny",
        "nsp.py:nsp,variant=tiny",
        "span_corruption.py:variant=tiny",
        pytest.param("clm_code.py:tiny", marks=pytest.mark.slow),
        pytest.param("nsp.py:sop,variant=tiny", marks=pytest.mark.slow),
    ],
)
def test_tiny_variant_trains(name, tmp_path, capsys):
    made = load.load(
        str(ROOT / "configs" / name),
        ["--config.total=4", "--config.log_every=2", "--config.tensorboard=False"],
    )
    train.run(made, tmp_path / "run")
    out = capsys.readouterr().out
    assert "step  4/4" in out or "step 4/4" in out
    assert (tmp_path / "run" / "report.html").exists()
