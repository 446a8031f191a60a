"""Every family with unusual but legal keys of its config.json: the logits of transformers, or a
refusal that names the key.

    python tests/convert/test_keys_table.py

prints how many rows are equal and how many refused.
"""

import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from key_rows import BASES, ROWS, WRITTEN, WRITTEN_KEYS, Row

from fmjax import convert
from fmjax.errors import ConfigError
from fmjax.generation import decoder
from fmjax.generation.sampling import Sampling
from fmjax.models import bert, gpt2, llama, t5
from fmjax.params import paths

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

FILES = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5}
TOLERANCE = 1e-5  # of the largest logit
LENGTHS = (12, 9)
# The others have their gradients compared in test_parity.py.
QUICK = ("xlm-roberta", "electra", "ministral", "mt5", "umt5")


def quick(row: Row) -> Any:
    """Marks: of rows that are equal one of some families is tested always."""
    return [] if row == Row(row.family) and row.family in QUICK else pytest.mark.slow


EQUAL = [
    pytest.param(row, id=f"{i}-{row}", marks=quick(row))
    for i, row in enumerate(ROWS)
    if not row.refusal
]
REFUSED = [pytest.param(row, id=f"{i}-{row}") for i, row in enumerate(ROWS) if row.refusal]


def make(row: Row, folder: Path) -> SimpleNamespace:
    """A random model of transformers in a folder, with what the row edits in its config.json."""
    name, sizes = BASES[row.family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes | row.options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = re.search(r"norm|ln_", key.lower()) and key.endswith("weight")
            parameter.normal_(float(bool(norm)), 1.0 if key == "shared.weight" else 0.2)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | row.edits
    gone = {key for key, value in row.edits.items() if value is None}
    path.write_text(json.dumps({key: config[key] for key in config.keys() - gone}))
    return SimpleNamespace(model_class=model_class, folder=folder)


def inputs(config) -> dict[str, np.ndarray]:
    """Two rows of tokens, the shorter padded."""
    rng, time = np.random.default_rng(0), max(LENGTHS)
    real = np.arange(time) < np.array(LENGTHS)[:, None]
    ids = np.where(real, rng.integers(5, 61, (len(LENGTHS), time)), config.pad_token_id)
    types = rng.integers(0, getattr(config, "type_vocab_size", 1), ids.shape)
    return dict(ids=ids, real=real, types=types)


def theirs(model_class, folder):
    """(the model, its logits of real tokens)."""
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    given = inputs(model.config)
    ids, mask = torch.tensor(given["ids"]), torch.tensor(given["real"].astype(int))
    how = dict(input_ids=ids, attention_mask=mask)
    if hasattr(model.config, "type_vocab_size"):
        how["token_type_ids"] = torch.tensor(given["types"])
    if model.config.is_encoder_decoder:
        how["decoder_input_ids"] = ids
    with torch.no_grad():
        return model, model(**how).logits.numpy()[given["real"]]


def ours(folder, config):
    """(the model, its parameters, its logits of real tokens)."""
    name, options = convert.describe(folder)
    model = FILES[name].Model(**options, attention="xla")
    model = model.clone(stacks=paths.runs(model.kinds))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    params, _ = convert.load(folder, shapes)
    given = inputs(config)
    ids, real = jnp.asarray(given["ids"], jnp.int32), jnp.asarray(given["real"], jnp.int32)
    positions = jnp.tile(jnp.arange(ids.shape[1]), (len(ids), 1))

    @jax.jit
    def logits(params):
        apply = lambda method, *args: model.apply({"params": params}, *args, method=method)
        hidden = apply("encode", ids, real, positions, jnp.asarray(given["types"]))
        if model.decodes:
            hidden = apply("decode", ids, real, positions, hidden, real)
        return apply("logits", hidden)

    return model, params, np.asarray(logits(params))[given["real"]]


def error(mine: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(mine - reference).max() / np.abs(reference).max())


def compare(row: Row, folder: Path) -> None:
    """Asserts equal logits, also after a round trip, and for some rows equal text."""
    made = make(row, folder / "theirs")
    reference, expected = theirs(made.model_class, made.folder)
    model, params, found = ours(made.folder, reference.config)
    assert error(found, expected) < TOLERANCE, f"logits differ by {error(found, expected):.1e}"
    assert convert.export(folder / "out", model, params) == ()
    written = json.loads((folder / "out" / "config.json").read_text())
    again = getattr(transformers, written["architectures"][0])
    for key in ("pad_token_id", "eos_token_id"):  # from the tokenizer, and here is none
        written[key] = getattr(reference.config, key)
    (folder / "out" / "config.json").write_text(json.dumps(written))
    _, exported = theirs(again, folder / "out")
    assert error(exported, expected) < TOLERANCE, f"exported: {error(exported, expected):.1e}"
    keys = row.options.keys() | row.edits.keys()
    if row.family in WRITTEN and (not keys or keys & WRITTEN_KEYS):
        prompt = inputs(reference.config)["ids"][0, :4].tolist()
        greedy = decoder.Generator(model, params)([prompt], 4, Sampling(temperature=0))
        assert greedy == [text(reference, prompt)]


def text(model, prompt: list[int]) -> list[int]:
    """Four tokens that transformers writes."""
    ids = torch.tensor([prompt])
    how = dict(do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    how |= dict(use_cache=False)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return out[0].tolist()[1 if model.config.is_encoder_decoder else len(prompt) :]


@pytest.mark.parametrize("row", EQUAL)
def test_the_logits_are_those_of_transformers_and_survive_a_round_trip(row, tmp_path):
    compare(row, tmp_path)


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_not_computed_is_refused_by_the_name_of_its_key(row, tmp_path):
    config = getattr(transformers, BASES[row.family][0]).config_class
    values = config(**BASES[row.family][1] | row.options).to_dict() | row.edits
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(ConfigError, match=row.refusal):
        name, options = convert.describe(tmp_path)
        FILES[name].Model(**options)


def main() -> None:
    """Prints the outcome of every row that is neither, and the two counts."""
    warnings.simplefilter("ignore")
    counts = {"equal": 0, "refused": 0}
    chosen = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    for i, row in enumerate(ROWS):
        if not chosen.search(str(row)):
            continue
        check = test_what_is_not_computed_is_refused_by_the_name_of_its_key
        with tempfile.TemporaryDirectory() as folder:
            try:
                (check if row.refusal else compare)(row, Path(folder))
                counts["refused" if row.refusal else "equal"] += 1
            except BaseException as failure:  # pytest's own are not Exceptions
                print(f"{i} {row}: {type(failure).__name__} {str(failure)[:400]}", flush=True)
    print(counts)


if __name__ == "__main__":
    main()
