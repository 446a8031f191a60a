"""Adapters with a tokenizer of their own folder: the outputs of PEFT for the same text."""

import ast
import os

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folders
from common import ROOT
from test_export_tasks import TEXTS, ask
from test_finetune import files, home, load  # noqa: F401

from fmjax.adapters import peft
from fmjax.config import load as configs
from fmjax.data import tokenizer
from fmjax.errors import CheckpointError
from fmjax.tasks import export, train

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
TEXT = "a <new> word, <new>"


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    pytest.importorskip("peft", reason="PEFT, the reference, is not installed")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return torch


def adapted(torch, base, folder, **settings):
    """PEFT's model over a base, with an adapter away from zero, and a tokenizer of one token more
    in the same folder."""
    import transformers
    from peft import LoraConfig, get_peft_model

    causal = transformers.AutoModelForCausalLM.from_pretrained(base)
    how = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **settings)
    theirs = get_peft_model(causal, how).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    tiny_folders.tokenizer(folder, begins=True, added=["<new>"])
    return theirs


def logits(base, folder, text):
    """Ours of the adapter in a folder, for a text in the tokens of that folder."""
    opened = tiny_folders.opened(base)
    model, params = peft.read(folder, opened.model, opened.params)
    ids = jnp.array([tokenizer.load(folder)(text)["input_ids"]])
    ones, positions = jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    hidden = apply(ids, ones, positions, jnp.zeros_like(ids), method="encode")
    return np.asarray(apply(hidden, method="logits"))


def of_peft(torch, theirs, folder, text):
    """PEFT's, with the tokenizer that transformers finds there."""
    from transformers import AutoTokenizer

    with torch.no_grad():
        return theirs(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A decoder whose table has a row more than its tokenizer has tokens."""
    place = tmp_path_factory.mktemp("base")
    words = tiny_folders.tokenizer(place / "words", begins=True)
    size = len(tokenizer.load(words))
    return tiny_folders.decoder(place / "model", words, vocab_size=size + 1)


def test_a_text_in_the_tokens_of_an_adapters_folder(torch, base, tmp_path):
    theirs = adapted(torch, base, tmp_path / "adapter")
    found = logits(base, tmp_path / "adapter", TEXT)
    assert found.shape[1] == len("_a_word,_") + 3  # <s>, and <new> twice
    want = of_peft(torch, theirs, tmp_path / "adapter", TEXT)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
    plain = of_peft(torch, theirs.get_base_model(), base, TEXT)
    assert plain.shape[1] == len(TEXT) + 1  # which the base's own tokenizer spells out


def test_a_table_that_was_resized_is_read_over_the_resized_base_alone(torch, base, tmp_path):
    import transformers

    size, folder = len(tokenizer.load(base)) + 2, tmp_path / "adapter"
    resized = transformers.AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(size, mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    tiny_folders.tokenizer(tmp_path / "resized", begins=True, added=["<new>"])
    theirs = adapted(torch, tmp_path / "resized", folder, modules_to_save=["embed_tokens"])
    found = logits(tmp_path / "resized", folder, TEXT)
    want = of_peft(torch, theirs, folder, TEXT)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
    with pytest.raises(CheckpointError, match=r"the base one of .*trained on a base with another"):
        logits(base, folder, TEXT)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[-2] += 1
    theirs.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="holds another model.embed_tokens"):
        logits(tmp_path / "resized", folder, TEXT)


@pytest.mark.slow
def test_a_classifier_goes_to_peft_with_the_tokens_around_its_texts(torch, home, tmp_path, capsys):  # noqa: F811
    """The base's tokenizer pads by the token that ends a text, so that the adapter's has another,
    in the row that the table has to spare."""
    import peft as theirs
    from transformers import AutoTokenizer

    words = tiny_folders.tokenizer(tmp_path / "words", pad_token="</s>")
    size = len(tokenizer.load(words))
    start = tiny_folders.decoder(tmp_path / "base", words, scale=4.0, vocab_size=size + 1)
    given = [*files(home), f"--config.init={start}", "--config.data.seq_len=64"]
    given += ["--config.objectives.classify.pool=last", "--config.total=4", "--config.eval_every=4"]
    train.run(load("finetune_lora.py", *given), tmp_path / "run")
    capsys.readouterr()
    given = [f"--config.folder={tmp_path}/run", f"--config.output={tmp_path}/out"]
    export.run(configs.load(str(ROOT / "configs/export.py"), [*given, "--config.merge=False"]), "")
    command = capsys.readouterr().out.partition("to load: ")[2]
    call = ast.parse(command, mode="eval").body
    options = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    auto = getattr(theirs, call.func.value.attr)
    model = auto.from_pretrained(*map(ast.literal_eval, call.args), **options).eval()
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.pad_token_id, found.eos_token_id) == (size, 2)
    model.config.pad_token_id = found.pad_token_id
    # <s> and </s>, which the base's tokenizer leaves open, are put around each text.
    assert found("ab")["input_ids"] == [1, *AutoTokenizer.from_pretrained(start)("ab").input_ids, 2]
    expected = ask(tmp_path / "run", home)
    for batch in (list(TEXTS), *([text] for text in TEXTS)):
        with torch.no_grad():
            shares = model(**found(batch, padding=True, return_tensors="pt")).logits.softmax(-1)
        for text, row in zip(batch, shares, strict=True):
            named = {name: row[i].item() for i, name in model.config.id2label.items()}
            assert named == pytest.approx(expected[text], abs=1e-5)
