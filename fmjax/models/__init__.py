"""AnyModel families, one file each, and what the rest of the code asks of any of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

TOKEN_HEADS = ("tag", "span")  # linear heads on every token; the others: on the whole
WHOLE_HEADS = ("classify", "regress", "choose")  # those on the whole that transformers has too


@runtime_checkable
class AnyModel(Protocol):
    """A Linen module of one of the families, or a wrapper of one that keeps parameter names."""

    cfg: Any  # a frozen dataclass with `depth`, `dtype`, `scan` and `remat`
    stacks: Any  # lengths of the runs of layers that are scanned together (`paths.Stacks`)
    causal: bool  # whether a token sees only what is before it
    decodes: bool  # whether a decoder follows the encoder
    encoded: int  # how many of the layers, from the first on, `encode` runs
    inputs: Sequence[str]  # names of the arrays of a batch that `encode` takes, in order
    # One word a layer, of several models {prefix: those of each}; only equal neighbours can be
    # scanned together.
    kinds: Sequence[str] | Mapping[str, Sequence[str]]

    def example(self) -> tuple[Any, ...]: ...

    def init(self, key: Any, *args: Any) -> Any: ...

    def apply(
        self, variables: Any, *args: Any, method: Any = None, mutable: Any = False
    ) -> Any: ...

    def clone(self, **changes: Any) -> "AnyModel": ...
