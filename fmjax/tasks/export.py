"""A run folder as a folder that `transformers` loads, an adapter merged into its base."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax

from fmjax import adapters, convert
from fmjax.adapters import peft, peft_formats, peft_loading, peft_settings
from fmjax.adapters.lora import Lora
from fmjax.adapters.wrapper import Adapted
from fmjax.checkpoints import pretrained, tokenizer_export
from fmjax.data import tokenizer as tokenizers
from fmjax.distributed import launch, processes
from fmjax.errors import ConfigError
from fmjax.evaluation.export_check import _check_merged, _compare, check, divergence
from fmjax.evaluation.export_folder import exported
from fmjax.generation import conversations
from fmjax.io import results
from fmjax.models import param_init
from fmjax.params import groups, paths


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: writes the run `config.folder` to `config.output`, reads it back and compares."""
    with launch.start(config) as mesh:
        output = Path(config.output or Path(config.folder) / "export")
        processes.first(lambda: results.check_folder(output))
        # Parameters are float32: what is compared must not drown in the rounding of a run's dtype.
        opened = pretrained.open_folder(config.folder, mesh, "float32", config.step)
        if opened.config is None:
            raise ConfigError(
                f"config.folder={config.folder!r} is in Hugging Face format already; "
                "give the folder of a run."
            )
        _check_class(opened)
        if dry_run:
            if jax.process_index() == 0:
                print(f"would export {opened} to {output}")
            return
        if not config.merge:
            with tokenizer_export.prepared(opened, mesh, whole=False) as complete:
                _adapter(output, complete)
            return
        model, params = adapters.merged(opened.model, opened.params)
        if isinstance(opened.model, Adapted):
            apart = divergence(opened, model, params)
            _check_merged(apart, config.max_kl)
            _compare(opened, model, params, mesh, config.limit)
        opened = opened._replace(model=model, params=params)
        with tokenizer_export.prepared(opened, mesh) as complete, exported(output) as folder:
            left_out = convert.export(
                folder,
                complete.model,
                complete.params,
                complete.tokenizer,
                labels=complete.labels,
                several=complete.several,
                stop=_stop_tokens(complete),
            )
            write_template(complete, folder)
            check(folder, complete, left_out, param_init.abstract_params(complete.model, mesh))
    if jax.process_index() != 0:
        return
    files = [path for path in output.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"exported {opened} to {output}: {len(files)} files, {size:,.1f} MiB")
    print("read back: equal to the run's parameters bit by bit")
    if heads := ", ".join(sorted({name.rpartition("/")[0] for name in left_out})):
        print(f"left out, as transformers has no class with them beside the rest: {heads}")
    (architecture,) = json.loads((output / "config.json").read_text())["architectures"]
    if getattr(opened.model.cfg, "prefix", False):
        print("the model reads a prompt in both directions, but with transformers only forwards")
    print(f"to load: transformers.{architecture}.from_pretrained({str(output)!r})")


def _stop_tokens(opened: pretrained.Opened) -> tuple[int, ...]:
    """The tokens that end what the model writes, where it does."""
    if not opened.model.causal and not opened.model.decodes:
        return ()
    return conversations.stop_tokens(opened, tokenizers.load(opened.tokenizer))


def write_template(opened: pretrained.Opened, output: Path) -> None:
    """The chat template that the run was trained with, which may be another than its tokenizer's,
    or the only one."""
    if jax.process_index() == 0 and conversations.learnt_to_answer(opened):
        _, template, _ = conversations.template_of(opened, tokenizers.load(opened.tokenizer))
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_class(opened: pretrained.Opened) -> None:
    """Raises ConfigError for a run with heads that no class of transformers has."""
    model = adapters.base(opened.model)
    convert.check_pool(model, opened.config.objectives.to_dict())
    convert.architecture(model, paths.unstack(opened.params))


def _adapter(output: Path, opened: pretrained.Opened) -> None:
    """The run's adapter and the heads that it trained in PEFT's format, with the tokenizer."""
    if not isinstance(opened.model, Adapted) or opened.model.adapter.keeps:
        raise ConfigError(
            f"config.merge=False writes an adapter alone, but {opened.source} has none: leave it "
            "at True."
        )
    peft_formats.of(opened.model)
    init = getattr(opened.model.adapter, "init", "uniform")
    if isinstance(opened.model.adapter, Lora) and init != "uniform":
        raise ConfigError(
            f"The run has config.adapter.init={init!r}, which changed its base: its adapter fits "
            "no other. Leave config.merge at True."
        )
    names = list(paths.unstack(opened.params))
    moving = groups.trained(groups.assign(names, opened.config.groups))
    apart = re.compile(rf"head/.*|{adapters.LEAVES}")
    if others := [name for name in moving if not apart.fullmatch(name)]:
        raise ConfigError(
            f"The run trained {others[0]} beside its adapter (config.groups), which an adapter's "
            "folder has no place for. Leave config.merge at True."
        )
    whole = [name for name in moving if not re.fullmatch(adapters.LEAVES, name)]
    heads = sorted({name.split("/")[1] for name in whole})
    with exported(output, peft_settings.CONFIG) as folder:
        written = peft.write(
            folder,
            opened.model,
            opened.params,
            heads="|".join(map(re.escape, heads)),
            source=opened.config.init,
        )
        convert.copy_tokenizer(opened.tokenizer, folder)
        write_template(opened, folder)
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file()) / 2**20
    print(f"wrote the adapter of {opened} and the heads {heads} to {output}: {size:,.1f} MiB")
    print("read back: equal to the run's parameters bit by bit")
    print(peft_loading.command(str(output), written, opened))
    if name := opened.config.to_dict().get("quantise", {}).get("name"):
        print(
            f"The run's base was kept in {name}: over the base in full precision the adapter gives "
            "outputs a little different. With config.merge=True the difference is measured."
        )
