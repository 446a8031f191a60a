"""Tiny folders in Hugging Face format, with random weights and bytes for tokens; without torch."""

import json
from pathlib import Path

import jax
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fmjax import convert
from fmjax.checkpoints import pretrained
from fmjax.models import llama
from fmjax.params import sharding

MARKS = ("<pad>", "<s>", "</s>", "<|start|>", "<|end|>")
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tokenizer(folder: Path, begins: bool = False, added=(), **options) -> Path:
    """Bytes, with `MARKS` first; `begins`: it puts <s> before each text; `added` are tokens that
    are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*MARKS, *alphabet])}
    words = Tokenizer(models.BPE(vocab, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    words.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    if begins:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    named = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>") | options
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return folder


def bases(folder: Path) -> Path:
    """A, C, G and T after <pad>, <s> and </s>, without a token for the unknown, which is left out;
    <s> is put before each text."""
    marks = MARKS[:3]
    words = Tokenizer(models.BPE({token: i for i, token in enumerate([*marks, *"ACGT"])}, []))
    words.decoder = decoders.Fuse()
    words.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    named = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return folder


def decoder(folder: Path, words: Path, scale: float = 20.0, **options) -> Path:
    """A Llama whose logits are `scale` times as far apart as at its start, as of a trained one."""
    size = len(json.loads((words / "tokenizer.json").read_text())["model"]["vocab"])
    sizes = dict(vocab_size=size, width=16, depth=2, heads=2, kv_heads=1, mlp=32, tied=False)
    model = llama.Model("tiny", **sizes | options)
    params = model.init(jax.random.key(1), *model.example())["params"]
    params = jax.tree.map(lambda x: x * scale if x.ndim == 2 else x, params)
    convert.export(folder, model, params, words)
    return folder


def tensors(folder: Path, **changes) -> None:
    """Changes tensors of the file by functions; None takes one out."""
    found = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        value = found.pop(name)
        found |= {name: change(value)} if change else {}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def settings(path: Path, **values) -> None:
    """Sets keys of a JSON file, which need not be there."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def opened(folder: Path) -> pretrained.Opened:
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        return pretrained.open_folder(str(folder), mesh)
