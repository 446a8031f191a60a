"""A model of llama2.c as a folder that `transformers` and fmjax load."""

import os
from pathlib import Path
from typing import Any

import jax

from fmjax import convert
from fmjax.checkpoints import pretrained
from fmjax.convert import llama2c
from fmjax.distributed import launch, processes
from fmjax.errors import ConfigError
from fmjax.evaluation import export_check
from fmjax.evaluation.export_folder import exported
from fmjax.io import results
from fmjax.io.storage import TMPDIR, writing
from fmjax.models import param_init
from fmjax.params import paths


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: writes `config.file` and `config.vocabulary` to `config.output`, reads it back and
    compares."""
    for key in ("file", "vocabulary"):
        if not os.path.isfile(config[key]):
            raise ConfigError(f"config.{key}={config[key]!r}: no such file.")
    if not config.output:
        raise ConfigError("config.output is empty: name a new folder.")
    output = Path(config.output)
    with launch.start(config) as mesh, results.temporary_folder() as words:
        processes.first(lambda: results.check_folder(output))
        model, params = llama2c.read_model(config.file)
        vocabulary = llama2c.read_vocabulary(config.vocabulary, model.cfg.vocab_size)
        with writing(words, TMPDIR):
            llama2c.write_tokenizer(words, vocabulary, model.cfg.max_len)
        abstract = param_init.abstract_params(model, mesh)
        place = lambda leaf, like: jax.device_put(leaf, like.sharding)
        params = jax.tree.map(place, paths.unflatten(params), abstract)
        opened = pretrained.Opened(config.file, model, params, words, (), None, None)
        told = f"{opened} ({paths.size(params):,} parameters)"
        if dry_run:
            if jax.process_index() == 0:
                print(f"would convert {told} to {config.output}")
            return
        with exported(output) as folder:
            convert.export(folder, model, params, words)
            export_check.check(folder, opened, (), abstract)
    if jax.process_index() == 0:
        print(f"converted {told} to {config.output}")
        print("read back: equal to the file's parameters bit by bit")
