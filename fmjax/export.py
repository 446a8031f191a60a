"""A run folder as a folder that `transformers` loads, an adapter merged into its base."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import adapters, convert, groups, pretrained, processes, state, trees
from fmjax.adapters import peft
from fmjax.adapters.lora import Lora
from fmjax.adapters.wrapper import Adapted
from fmjax.errors import CheckpointError, ConfigError


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: writes the run `config.folder` to `config.output`, reads it back and compares."""
    with processes.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, step=config.step)
        if opened.config is None:
            raise ConfigError(
                f"config.folder={config.folder!r} is in Hugging Face format already; "
                "give the folder of a run."
            )
        output = Path(config.output or Path(config.folder) / "export")
        if dry_run:
            if jax.process_index() == 0:
                print(f"would export {opened} to {output}")
            return
        if not config.merge:
            _adapter(output, opened)
            return
        _check_pool(opened)
        model, params = adapters.merged(opened.model, opened.params)
        opened = opened._replace(model=model, params=params)
        left_out = convert.export(
            output, opened.model, opened.params, opened.tokenizer, labels=opened.labels
        )
        check(output, opened, left_out, state.abstract_params(opened.model, mesh))
    if jax.process_index() != 0:
        return
    files = [path for path in output.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"exported {opened} to {output}: {len(files)} files, {size:,.1f} MiB")
    print("read back: equal to the run's parameters bit by bit")
    if heads := ", ".join(sorted({name.rpartition("/")[0] for name in left_out})):
        print(f"left out, as transformers has no class with them beside the rest: {heads}")
    (architecture,) = json.loads((output / "config.json").read_text())["architectures"]
    print(f"to load: transformers.{architecture}.from_pretrained({str(output)!r})")


def _adapter(output: Path, opened: pretrained.Opened) -> None:
    """The run's adapter and the heads that it trained in PEFT's format, with the tokenizer."""
    if not (isinstance(opened.model, Adapted) and isinstance(opened.model.adapter, Lora)):
        raise ConfigError(
            f"config.merge=False writes an adapter alone, but {opened.source} has none: leave it "
            "at True."
        )
    if (init := opened.model.adapter.init) != "uniform":
        raise ConfigError(
            f"The run has config.adapter.init={init!r}, which changed its base: its adapter fits "
            "no other. Leave config.merge at True."
        )
    names = list(trees.unstack(opened.params))
    moving = groups.trained(groups.assign(names, opened.config.groups))
    apart = re.compile(rf"head/.*|{adapters.LEAVES}")
    if others := [name for name in moving if not apart.fullmatch(name)]:
        raise ConfigError(
            f"The run trained {others[0]} beside its adapter (config.groups), which an adapter's "
            "folder has no place for. Leave config.merge at True."
        )
    heads = sorted({name.split("/")[1] for name in moving if name.startswith("head/")})
    peft.write(output, opened.model, opened.params, heads="|".join(map(re.escape, heads)))
    convert.copy_tokenizer(opened.tokenizer, output)
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file()) / 2**20
    print(f"wrote the adapter of {opened} and the heads {heads} to {output}: {size:,.1f} MiB")
    print("read back: equal to the run's parameters bit by bit")
    print(f"to load: peft.PeftModel.from_pretrained(<the model that it was made for>, '{output}')")


def check(
    output: Path, opened: pretrained.Opened, left_out: tuple[str, ...], abstract: Any
) -> None:
    """Raises CheckpointError unless the folder holds every bit of the parameters exported."""
    kept = {p: x for p, x in trees.flatten(opened.params).items() if p not in left_out}
    like = {path: leaf for path, leaf in trees.flatten(abstract).items() if path in kept}
    again, _ = convert.load(output, trees.unflatten(like))
    again = trees.flatten(again)
    if wrong := [path for path in kept if not _same_bits(kept[path], again[path])]:
        raise CheckpointError(
            f"{output} was written, but reads back differently: {', '.join(wrong[:5])}. Do not use "
            "it; set config.output to another folder, on another disk if it happens again."
        )


def _check_pool(opened: pretrained.Opened) -> None:
    """Refuses a head on the mean of the tokens, where the classes of transformers take the
    first."""
    model = adapters.base(opened.model)
    family = convert.family_of(model)
    for name, args in opened.config.objectives.items():
        written = family.place(family.type_of(model.cfg), f"head/{name}/kernel")
        if args.get("pool") == "mean" and name in dict(model.cfg.classes) and written:
            raise ConfigError(
                f"The run has config.objectives.{name}.pool='mean', which no class of transformers "
                "has: its outputs would differ. Train with pool='first' to export."
            )


def _same_bits(one: jax.Array, other: jax.Array) -> bool:
    """Compares what this process holds, as bits: NaN equals itself, -0 differs from 0."""
    return all(
        np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True)
    )
