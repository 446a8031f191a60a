"""Fill-in of masked words in a sentence."""

import os
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.data.tokenizer import load as load_tokenizer
from fmjax.distributed import launch
from fmjax.errors import ConfigError
from fmjax.evaluation.fill_in import encode, guesses, room, table


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: prints the `config.top_k` best guesses for each masked token of `config.text`.

    Every line of the text is a sentence of its own. The folder is a run's, one in Hugging Face
    format, or a hub id.
    """
    sentences = [line.strip() for line in config.text.splitlines() if line.strip()]
    with launch.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        if opened.model.causal:
            raise ConfigError(
                f"config.folder={config.folder!r} has a model that writes on, and fills no gaps: "
                "use configs/generate.py."
            )
        opened.require_output()
        tokenizer = load_tokenizer(opened.tokenizer)
        rows = encode(sentences, tokenizer, room(opened.model))
        if dry_run:
            return
        found = guesses(opened, tokenizer, rows, config.top_k)
    if jax.process_index() != 0:
        return
    print(f"\n{opened}")
    for sentence, masks in zip(sentences, found, strict=True):
        print(f"\n{sentence}\n{table(masks, tokenizer.mask_token)}")
