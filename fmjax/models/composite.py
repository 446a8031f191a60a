"""Several models side by side in one run: an image and a text tower, a student and a teacher, …

    config.model = dict(
        name="composite",
        parts=dict(image=dict(name="vit", variant="tiny"), text=dict(name="bert", variant="tiny")),
    )

Each part is a model of its own. Its parameters are under its name, `image/block_07/…`, by which
groups, layer decay, sharding and checkpoints know them, and it can start from a folder of its own:
`config.init = dict(image=…)`. An objective runs a part by its name:
`apply(params, batch, method="encode", model="image")`.
"""

import dataclasses
import importlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from fmjax.config import plugins, rules
from fmjax.errors import ConfigError, did_you_mean, quoted
from fmjax.models import AnyModel

FACTS = ("facts",)  # all of them, of which each part takes its own


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts, and how all of them are computed."""

    parts: tuple[tuple[str, str, Any], ...]  # (name, family, its config)
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    classes = ()  # heads are those of the parts
    lm_head = False
    dropout = 0.0


def Model(
    parts: Mapping[str, Mapping[str, Any]] | Sequence[Sequence[Any]],
    facts: Mapping[str, Any] = MappingProxyType({}),
    classes: Mapping[str, int] | Sequence[Any] = (),
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
) -> "Composite":
    """The models of `parts`: {name: {"name": family, …}} of a config, or what `Config.parts` has.

    Raises ConfigError for heads that are of no part, and where a part cannot be built.
    """
    if classes:
        head = next(iter(dict(classes)))
        raise ConfigError(
            f"config.objectives.{head} needs a model with a head, but config.model.name="
            "'composite' is several models: use an objective that runs them by their names."
        )
    rows = [_row(name, given) for name, given in parts.items()] if _named(parts) else parts
    if len(rows) < 2:
        raise ConfigError("config.model.parts must have two models or more: {name: {'name': …}}.")
    models, configs = {}, []
    for name, family, fields in rows:
        if not name.isidentifier() or name.startswith("block"):
            raise ConfigError(f"config.model.parts: {name!r} cannot be the name of a model.")
        module = _module(name, family)
        known = {key: facts[key] for key in module.FACTS if key in facts}
        how = dict(dtype=dtype, scan=scan, remat=remat)
        models[name] = module.Model(**known | fields | how)
        configs.append((name, family, models[name].cfg))
    return Composite(Config(tuple(configs), dtype, scan, remat), tuple(models.items()))


@dataclasses.dataclass(frozen=True)
class Composite:
    """Models under their names, with the interface of a model (`fmjax.models.AnyModel`)."""

    cfg: Config
    members: tuple[tuple[str, AnyModel], ...]

    inputs = ()  # a part is given its own by the objective
    causal = decodes = False
    encoded = 0

    @property
    def parts(self) -> dict[str, AnyModel]:
        """{name: model}."""
        return dict(self.members)

    @property
    def kinds(self) -> dict[str, Sequence[str]]:
        """{prefix of the parameters of a part: a word for each of its layers}."""
        return {f"{name}/": part.kinds for name, part in self.members}

    @property
    def stacks(self) -> dict[str, Sequence[int] | None]:
        """{prefix: lengths of the runs of layers that are stored together}."""
        return {f"{name}/": part.stacks for name, part in self.members}

    def example(self) -> tuple[Any, ...]:
        """Nothing: each part has its own."""
        return ()

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters; those of a part do not depend on the others."""
        init = lambda name, part: part.init(part_key(key, name), *part.example())["params"]
        return {"params": {name: init(name, part) for name, part in self.members}}

    def apply(self, variables: Any, *args: Any, method: Any = None, mutable: Any = False) -> Any:
        raise ConfigError(
            f"The run has the models {', '.join(self.parts)}: its objective has to say which of "
            "them it runs, apply(…, model=…)."
        )

    def clone(
        self,
        cfg: Config | None = None,
        stacks: Mapping[str, Sequence[int] | None] | None = None,
    ) -> "Composite":
        """With other stacks ({prefix: …}; None: layers one by one), or computed as `cfg` says."""
        if cfg is None:
            members = [
                (n, part.clone(stacks=stacks and stacks[f"{n}/"])) for n, part in self.members
            ]
            return dataclasses.replace(self, members=tuple(members))
        how = dict(dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
        parts = [
            (n, part.clone(cfg=dataclasses.replace(part.cfg, **how))) for n, part in self.members
        ]
        return dataclasses.replace(self, cfg=cfg, members=tuple(parts))


def part_key(key: jax.Array, name: str) -> jax.Array:
    """The key that the fresh parameters of the part `name` are drawn by."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _named(parts: Any) -> bool:
    return isinstance(parts, Mapping)


def _row(name: str, given: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(name, family, fields) of a part as a config has it."""
    if "name" not in given:
        raise ConfigError(f"config.model.parts.{name} has no 'name' of a model family.")
    fields = {key: value for key, value in given.items() if key != "name" and value is not None}
    return name, given["name"], fields


def _module(name: str, family: str) -> Any:
    """The module of the family of the part `name`. Raises ConfigError where there is none."""
    if plugins.is_object(family):
        return sys.modules[plugins.load(family, f"model.parts.{name}.name").__module__]
    possible = set(rules.Modules("models", "Model").names()) - {"composite"}
    if family not in possible:
        raise ConfigError(
            f"config.model.parts.{name}.name={quoted(family)} is no model that can be a part."
            + did_you_mean(str(family), possible)
        )
    return importlib.import_module(f"fmjax.models.{family}")
