"""A model's output for one example, on one readable line."""

from typing import Any

LARGEST = 3  # and numbers of each


WIDTH = 90  # and characters of each text


def readable(said: Any) -> str:
    """On one line, of several numbers with names the largest."""
    if isinstance(said, float):
        return f"{said:.3f}"
    if isinstance(said, list):
        return cut(" ".join(map(readable, said[:WIDTH])))
    if not isinstance(said, dict):
        return cut(str(said))
    if said and all(isinstance(value, float) for value in said.values()):
        said = dict(sorted(said.items(), key=lambda item: -item[1])[:LARGEST])
    return ", ".join(f"{name} {readable(value)}" for name, value in said.items())


def cut(text: str, width: int = WIDTH) -> str:
    """On one line of at most `width` characters, all of which can be printed."""
    words = " ".join(text[: 2 * width].split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return shown if len(shown) <= width and len(text) <= 2 * width else f"{shown[: width - 1]}…"
