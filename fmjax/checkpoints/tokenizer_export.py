"""The tokenizer of a classifier, tagger or reader as transformers needs it.

Training puts tokens around a text where the tokenizer does not (`data.encoding.Reader`), and knows
padding by its segment; transformers has the tokenizer's files alone. Its causal classifiers take
the last token that is not the padding, which so must not be the one that ends a text.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.checkpoints import pretrained
from fmjax.data import tokenizer as tokenizers
from fmjax.data import vocabulary
from fmjax.data.encoding import Reader
from fmjax.data.settings import DataSettings, read
from fmjax.errors import ConfigError
from fmjax.io import results, storage
from fmjax.io.snapshot import read_json
from fmjax.models import WHOLE_HEADS, param_init
from fmjax.params import paths

PADDING = "<|pad|>"


@contextlib.contextmanager
def prepared(
    opened: pretrained.Opened, mesh: jax.sharding.Mesh, *, whole: bool = True
) -> Iterator[pretrained.Opened]:
    """`opened` with the tokenizer that its exported folder gets, in a folder that is removed; and
    with a row more in its vocabulary where that needs one for padding. An adapter alone (not
    `whole`) cannot have one, so that its tokenizer has no padding there.

    Raises ConfigError for an adapter whose tokenizer pads by the token that ends a text.
    As it is, unless the run was trained on labelled examples.
    """
    settings = read(DataSettings, opened.config.data.to_dict(), "data")
    if not settings.labelled or opened.model.decodes:
        yield opened
        return
    tokenizer = tokenizers.load(opened.tokenizer)
    vocab = vocabulary.of(tokenizer, str(opened.tokenizer))
    words = tokenizers.Prepared(vocab, Path(opened.tokenizer), "")
    around = Reader(words, settings).post_processor
    last = opened.model.causal and {name for name, _ in opened.model.cfg.classes} & {*WHOLE_HEADS}
    pads = tokenizer.pad_token_id
    lacks = pads is None or bool(last and pads in vocab.last[-1:])
    room = opened.model.cfg.vocab_size > vocab.size
    if lacks and not (whole or room):
        if pads is not None:
            raise ConfigError(
                "The tokenizer pads by the token that ends a text, after which transformers looks "
                "for the last token, and an adapter has no row for another. Leave config.merge at "
                "True."
            )
        lacks = False
    with results.temporary_folder() as folder:
        with storage.writing(folder, storage.TMPDIR):
            target = shutil.copytree(opened.tokenizer, folder / "tokenizer")
            _edit(target / "tokenizer.json", lambda file: file | {"post_processor": around})
            if lacks:
                padding = next(x for x in _names(PADDING) if x not in tokenizer.get_vocab())
                _add_padding(target, padding, vocab.size)
            if getattr(opened.model.cfg, "types", 0) < 2:
                takes = {"model_input_names": ["input_ids", "attention_mask"]}
                _edit(target / "tokenizer_config.json", lambda file: file | takes)
        opened = opened._replace(tokenizer=target)
        if lacks and not room:
            opened = _widened(opened, vocab.size + 1, mesh)
        yield opened


def _names(name: str) -> Iterator[str]:
    while True:
        yield name
        name = f"<{name}>"


def _add_padding(folder: Path, token: str, number: int) -> None:
    """Makes `token`, with the id `number`, the padding of a tokenizer's files."""
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    options |= {"content": token, "special": True}

    def add(file: dict[str, Any]) -> dict[str, Any]:
        return file | {"added_tokens": [*file["added_tokens"], {"id": number, **options}]}

    def named(file: dict[str, Any]) -> dict[str, Any]:
        added = file.get("added_tokens_decoder")
        own = {"added_tokens_decoder": {**added, str(number): options}} if added else {}
        return file | own | {"pad_token": token}

    _edit(folder / "tokenizer.json", add)
    _edit(folder / "tokenizer_config.json", named)
    if (folder / "special_tokens_map.json").is_file():
        _edit(folder / "special_tokens_map.json", lambda file: file | {"pad_token": token})


def _edit(path: Path, change: Any) -> None:
    text = json.dumps(change(read_json(path)), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _widened(opened: pretrained.Opened, size: int, mesh: jax.sharding.Mesh) -> pretrained.Opened:
    """The model with a vocabulary of `size`, whose new rows are zeros."""
    model = opened.model.clone(cfg=dataclasses.replace(opened.model.cfg, vocab_size=size))
    abstract = paths.flatten(param_init.abstract_params(model, mesh))

    def widen(params):
        return {
            path: jnp.pad(
                x, [(0, n - m) for n, m in zip(abstract[path].shape, x.shape, strict=True)]
            )
            for path, x in params.items()
        }

    shardings = {path: leaf.sharding for path, leaf in abstract.items()}
    params = jax.jit(widen, out_shardings=shardings)(paths.flatten(opened.params))
    return opened._replace(model=model, params=paths.unflatten(params))
