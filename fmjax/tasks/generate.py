"""Text that a model writes, after a prompt or, of an encoder–decoder, about a source."""

import os
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.distributed import launch
from fmjax.generation.text_generator import TextGenerator, quantization_of, sampling_of, shown


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: prints `config.count` continuations of `config.prompt`, each drawn by itself; a
    single one while it is written, as there is where nothing is drawn.

    The folder is a run's, one in Hugging Face format, or a hub id.
    """
    with launch.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        how = config.to_dict()
        author = TextGenerator(opened, bits=quantization_of(how))
        if config.draft:
            draft = pretrained.open_folder(config.draft, mesh, config.precision)
            author.use_draft(TextGenerator(draft, bits=quantization_of(how)), config.ahead)
        author.ids(how)
        if dry_run:
            return
        first = jax.process_index() == 0
        if first:
            print(f"\n{opened}\n")
        if config.count > 1 and sampling_of(how).draws:
            found = author.texts(how, config.seed)
            if first:
                print(shown(author.before(how["prompt"]), found))
            return
        show = lambda text: print(text, end="", flush=True) if first else None
        show(author.before(how["prompt"]))
        author.texts(how, config.seed, show)
        show("\n")
        if config.draft:
            written, rounds = author.writer.written, author.writer.rounds
            show(f"({written:,} tokens of which the model read {written / rounds:.2f} at once)\n")
