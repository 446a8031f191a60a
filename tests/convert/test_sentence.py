"""Folders of sentence-transformers: the same vectors, and what is refused by its name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import CACHE, ROOT

from fmjax import convert
from fmjax.config import load as configs
from fmjax.convert import sentence
from fmjax.errors import CheckpointError, ConfigError
from fmjax.models import bert, param_init, text_pooling
from fmjax.tasks import embed

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the a dog cat sees likes river runs query : good bad".split()
)
RECORDS = ["the dog sees a cat", "a river", "the good dog runs the bad cat likes a river runs runs"]
SPECIAL = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT in Hugging Face format, with a tokenizer of words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    words = tokenizers.Tokenizer(models.WordLevel(dict(zip(WORDS, range(99))), "[UNK]"))  # noqa: B905
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(WORDS[:5])
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made = folder / "words"
    made.mkdir()
    words.save(str(made / "tokenizer.json"))
    options = dict(tokenizer_class="PreTrainedTokenizerFast", mask_token="[MASK]", **SPECIAL)
    (made / "tokenizer_config.json").write_text(json.dumps(options | {"model_max_length": 20}))
    sizes = dict(vocab_size=len(WORDS), width=16, depth=2, heads=2, mlp=24, max_len=32)
    model = bert.Model("tiny", **sizes)
    params = jax.jit(lambda: param_init.init_params(model, jax.random.key(0)))()
    params = jax.tree.map(lambda x: 5 * x, params)
    convert.export(folder / "bert", model, params, made)
    return folder / "bert"


def folder_of(encoder, path, modules, **files):
    """`encoder` as a folder of sentence-transformers: (type, config, tensors) after the trunk."""
    import shutil

    from safetensors.numpy import save_file

    shutil.copytree(encoder, path)
    kinds = ["Transformer", *(kind for kind, *_ in modules)]
    places = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    rows = [
        dict(idx=i, name=str(i), path=place, type=f"sentence_transformers.models.{kind}")
        for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    (path / "modules.json").write_text(json.dumps(rows))
    for place, (_, config, tensors) in zip(places[1:], modules, strict=True):
        (path / place).mkdir()
        (path / place / "config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, path / place / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def pooling(*modes, **more):
    flags = {key: mode in modes for key, mode in sentence._FLAGS.items()}
    return "Pooling", {"word_embedding_dimension": 16, **flags, **more}, {}


def dense(inputs, outputs, activation="torch.nn.modules.activation.Tanh", bias=True):
    rng = np.random.default_rng(inputs)
    tensors = {"linear.weight": rng.standard_normal((outputs, inputs)).astype(np.float32)}
    tensors |= {"linear.bias": np.arange(outputs, dtype=np.float32) / 9} if bias else {}
    config = dict(in_features=inputs, out_features=outputs, bias=bias)
    return "Dense", config | {"activation_function": activation}, tensors


def vectors(folder, tmp_path, *words):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in RECORDS))
    given = [f"--config.folder={folder}", f"--config.data.train={tmp_path}/texts.jsonl"]
    given += [f"--config.output={tmp_path}/out.npy", f"--config.data.cache={CACHE}"]
    given += ["--config.batch_size=8", "--config.normalize=False"]
    embed.run(configs.load(str(ROOT / "configs/embed.py"), [*given, *words]), tmp_path)
    return np.load(tmp_path / "out.npy")


PROMPTS = dict(prompts={"query": "query : ", "other": ""}, default_prompt_name="query")
NORMALIZE = "Normalize", {}, {}
FOLDERS = {
    "cls": ([pooling("cls"), NORMALIZE], {}),
    "mean": ([pooling("mean")], dict(sentence_bert_config=dict(max_seq_length=8))),
    "old name": ([pooling("mean")], dict(sentence_roberta_config=dict(max_seq_length=8))),
    "all": ([pooling(*sentence.POOLS)], {}),
    "dense": (
        [pooling("max", "weightedmean"), dense(32, 8), dense(8, 4, "torch.nn.Identity", False)],
        dict(config_sentence_transformers=PROMPTS),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FOLDERS)
def test_vectors_are_those_of_sentence_transformers(kind, encoder, tmp_path):
    reference = pytest.importorskip("sentence_transformers", reason="the reference is missing")
    modules, more = FOLDERS[kind]
    folder = folder_of(encoder, tmp_path / "folder", modules, **more)
    theirs = reference.SentenceTransformer(str(folder), device="cpu").encode(RECORDS)
    found = vectors(folder, tmp_path)
    assert found.shape == theirs.shape
    np.testing.assert_allclose(found, theirs, atol=1e-5)


def test_what_the_user_says_goes_before_the_folder(encoder, tmp_path):
    more = dict(config_sentence_transformers=PROMPTS, sentence_bert_config={"max_seq_length": 8})
    folder = folder_of(encoder, tmp_path / "folder", [pooling("cls")], **more)
    words = ["--config.pool=mean", "--config.data.seq_len=16", "--config.data.source_prefix="]
    plain = vectors(encoder, tmp_path, "--config.data.seq_len=16")  # a folder that says nothing
    np.testing.assert_array_equal(vectors(folder, tmp_path, *words), plain)
    assert np.abs(vectors(folder, tmp_path) - plain).max() > 0.01


def test_pools_by_hand():
    hidden = jnp.asarray([[[1.0], [4.0], [-2.0], [99.0]]])
    segment_ids = jnp.asarray([[1, 1, 1, 0]])
    expected = dict(first=1, last=-2, mean=1, max=4)
    expected |= dict(weighted_mean=(1 + 8 - 6) / 6, sum_over_sqrt=3 / 3**0.5)
    for pool, value in expected.items():
        np.testing.assert_allclose(
            text_pooling.pooled(hidden, segment_ids, pool), [[value]], rtol=1e-6
        )


@pytest.mark.parametrize(
    "modules, more, message",
    [
        ([dense(16, 4)], {}, "Transformer > Dense"),
        ([pooling("cls"), ("LSTM", {}, {})], {}, "possible are Transformer > Pooling"),
        ([("Pooling", {"pooling_mode": "median"}, {})], {}, "pooling_mode=.*median"),
        ([pooling("cls", pooling_mode_median=True)], {}, "pooling_mode_median=True"),
        ([pooling("cls"), dense(16, 4, "evil.Module")], {}, "activation_function='evil.Module'"),
        ([pooling("cls")], dict(sentence_bert_config={"do_lower_case": True}), "do_lower_case"),
        ([pooling("cls")], dict(config_sentence_transformers={"truncate_dim": 4}), "truncate_dim"),
        (
            [pooling("cls", include_prompt=False)],
            dict(config_sentence_transformers=PROMPTS),
            "include_prompt.*source_prefix= to have no prompt",
        ),
        ([pooling("cls", "mean"), dense(16, 4)], {}, "give 32 numbers.* takes 16"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(modules, more, message, encoder, tmp_path):
    folder = folder_of(encoder, tmp_path / "folder", modules, **more)
    with pytest.raises(ConfigError, match=message):
        vectors(folder, tmp_path)


def test_modules_of_others_and_damaged_files_are_refused(encoder, tmp_path):
    folder = folder_of(encoder, tmp_path / "folder", [pooling("cls")])
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "custom_st.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="custom_st.Pooling.*never run"):
        sentence.read(folder)
    (folder / "modules.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="modules.json is damaged"):
        sentence.read(folder)
