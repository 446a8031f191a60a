"""Heads of every family against transformers: read from a folder and written to one, by class."""

import importlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmjax import convert
from fmjax.convert.llama_options import ANSWERED, CLASSIFIED, PREFIXES, TAGGED
from fmjax.models import TOKEN_HEADS
from fmjax.params import paths

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
import transformers  # noqa: E402

V, PAD = 61, 3
TOKENS = dict(vocab_size=V, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
ENCODER = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    initializer_range=0.3,
)
DECODER = ENCODER | dict(num_key_value_heads=1, head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2)
SIZES = {
    "bert": ENCODER,
    "roberta": ENCODER | dict(type_vocab_size=1),
    "distilbert": dict(
        dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40,
        initializer_range=0.3,
    ),
    "modernbert": ENCODER | dict(classifier_pooling="cls", cls_token_id=1, sep_token_id=2),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.3),
    "bloom": dict(hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    "smollm3": DECODER | dict(no_rope_layer_interval=2),
    "mixtral": DECODER | EXPERTS,
    "qwen2_moe": DECODER | EXPERTS
    | dict(moe_intermediate_size=12, shared_expert_intermediate_size=12),
    "qwen3_moe": DECODER | EXPERTS | dict(moe_intermediate_size=12),
}  # fmt: skip
# {head: what the class of transformers is for}
TASKS = {
    "classify": "SequenceClassification",
    "regress": "SequenceClassification",
    "tag": "TokenClassification",
    "span": "QuestionAnswering",
    "choose": "MultipleChoice",
}
ENCODERS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "modernbert": "ModernBert",
}
PROBLEMS = {
    "classify": {"id2label": {0: "b", 1: "c", 2: "a"}, "label2id": {"b": 0, "c": 1, "a": 2}},
    "regress": dict(num_labels=1, problem_type="regression"),
    "tag": {"id2label": {0: "O", 1: "B-x"}, "label2id": {"O": 0, "B-x": 1}},
}


def rows():
    """(model_type, head, class of transformers, changes of its config)."""
    for kind, prefix in ENCODERS.items():
        for head, task in TASKS.items():
            yield kind, head, f"{prefix}For{task}", {}
    for head in ("classify", "choose"):
        mean = dict(classifier_pooling="mean")
        yield "modernbert", head, f"ModernBertFor{TASKS[head]}", mean
    for head in ("classify", "regress", "tag", "span"):
        yield "gpt2", head, f"GPT2For{TASKS[head]}", {}
    for kind, prefix in PREFIXES.items():
        yield kind, "classify", f"{CLASSIFIED[kind]}ForSequenceClassification", {}
        if kind in TAGGED:
            yield kind, "tag", f"{prefix}ForTokenClassification", {}
        if kind in ANSWERED:
            yield kind, "span", f"{prefix}ForQuestionAnswering", {}


QUICK = {
    *("RobertaForSequenceClassification", "DistilBertForSequenceClassification"),
    *("ModernBertForSequenceClassification", "ModernBertForTokenClassification"),
    *("Gemma3TextForSequenceClassification", "LlamaForQuestionAnswering"),
    "MistralForTokenClassification",
}
ROWS = [
    pytest.param(*row, id=f"{row[2]}-{row[1]}{'-mean' * bool(row[3])}",
                 marks=[] if row[2] in QUICK and row[1] != "regress" else pytest.mark.slow)
    for row in rows()
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def saved(kind, head, name, changes, folder):
    """A random model of the class, in the folder too."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    options = SIZES.get(kind, DECODER) | TOKENS | PROBLEMS.get(head, {}) | changes
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():  # biases and norms are constants at first, which hides their places
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def opened(folder):
    """(model, parameters) of a folder, which has all of them and nothing else."""
    name, options = convert.describe(folder)
    module = importlib.import_module(f"fmjax.models.{name}")
    model = module.Model(**options | dict(lm_head=False), attention="xla")
    model = model.clone(stacks=paths.runs(model.kinds))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example())["params"])
    params, report = convert.load(folder, like)
    assert report == ((), ())
    return model, params


def batch(kind):
    """(ids, mask) of rows of different lengths, padded behind."""
    lengths = np.array([9, 4, 7])[:, None]
    mask = np.arange(9) < lengths
    ids = np.where(mask, np.random.default_rng(0).integers(4, V, (3, 9)), PAD)
    return ids, mask.astype(np.int32)


def outputs(model, params, head, ids, mask):
    """Those of the head, of real tokens or of whole rows."""

    @jax.jit
    def run(params, ids, mask):
        places = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape) * mask
        call = lambda *args, method: model.apply({"params": params}, *args, method=method)
        hidden = call(ids, mask, places, 0 * ids, method="encode")
        if head in TOKEN_HEADS:
            return call(hidden, head, method="project")
        return call(hidden, mask, head, method="classify")

    return np.asarray(run(params, jnp.asarray(ids), jnp.asarray(mask)))


def reference(model, head, ids, mask):
    """The same of a model of transformers."""
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    if head == "choose":
        ids, mask = ids[None], mask[None]
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask)
    if head == "span":
        return torch.stack([found.start_logits, found.end_logits], -1).numpy()
    return found.logits.T.numpy() if head == "choose" else found.logits.numpy()


@pytest.mark.parametrize("kind, head, name, changes", ROWS)
def test_a_head_is_read_and_written_as_its_class(kind, head, name, changes, tmp_path):
    theirs = saved(kind, head, name, changes, tmp_path / "in")
    convert.check_class(tmp_path / "in")
    model, params = opened(tmp_path / "in")
    assert set(dict(model.cfg.classes)) == {head}
    ids, mask = batch(kind)
    real = mask > 0 if head in TOKEN_HEADS else ...
    expected = reference(theirs, head, ids, mask)
    np.testing.assert_allclose(
        outputs(model, params, head, ids, mask)[real], expected[real], atol=1e-5, rtol=1e-4
    )

    labels = convert.labels(tmp_path / "in")
    assert convert.export(tmp_path / "out", model, params, labels=labels) == ()
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], strict=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["pad_token_id"] = PAD  # which the tokenizer says, and there is none here
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert config["architectures"] == [name]
    auto = getattr(transformers, f"AutoModelFor{TASKS[head]}")
    again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again).__name__ == name and not any(info.values()), info
    np.testing.assert_allclose(
        reference(again.eval(), head, ids, mask)[real], expected[real], atol=1e-6, rtol=1e-6
    )
    assert again.config.id2label == theirs.config.id2label
    assert again.config.problem_type in (theirs.config.problem_type, "single_label_classification")
