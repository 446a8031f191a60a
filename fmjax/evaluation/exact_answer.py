"""Questions whose answers a model writes: what counts is the number (Cobbe et al. 2021).

Texts of GSM8K end in "#### 18"; of one without that mark the last number counts, as whoever grades
a person would.
"""

import re
from collections.abc import Sequence

from fmjax.evaluation import multiple_choice
from fmjax.evaluation.multiple_choice import Item
from fmjax.generation import text_generator
from fmjax.generation.sampling import Sampling

STOP = ("\nQuestion:",)  # where the model continues with a question of its own
# A line between two numbers is no sign.
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def number(text: str) -> str:
    """The number that a text comes to, as digits alone; "" where it has none."""
    _, mark, end = text.rpartition("####")
    found = _NUMBER.findall(end)
    if not found:
        return ""
    digits = (found[0] if mark else found[-1]).replace(",", "")
    whole, _, part = digits.partition(".")
    whole, part = whole if whole.strip("-") else f"{whole}0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def written(
    author: text_generator.TextGenerator, items: Sequence[Item], how: dict, batch_size: int
) -> list[str]:
    """The greedy continuation of each item; `how` has `length` and `long` as configs/generate.py
    has them."""
    prompts = [author.ids(how | {"prompt": item.context}) for item in items]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        greedy = Sampling(temperature=0)
        found = author.each([prompts[i] for i in rows], how["length"], greedy, STOP)
        texts |= dict(zip(rows, found, strict=True))
    return [texts[i] for i in range(len(items))]


def metrics(items: Sequence[Item], texts: Sequence[str]) -> dict[str, dict]:
    """The share of texts with the number that the worked answer has, as
    `multiple_choice.metrics`."""
    right = [
        number(text) == number(item.choices[0]) != ""
        for item, text in zip(items, texts, strict=True)
    ]
    return {"accuracy": multiple_choice.mean(right, [item.group for item in items])}
