"""A conversation in the terminal, with a model that was trained for some."""

import os
from collections.abc import Callable
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.data import chat
from fmjax.data import tokenizer as tokenizers
from fmjax.distributed import launch
from fmjax.errors import ConfigError, quoted
from fmjax.generation import conversations, text_generator

HELP = "/new forgets what was said, /quit or Ctrl-D ends, Ctrl-C ends an answer"


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: reads what a person says, a line each, and writes the model's answers.

    The folder is a run's, one in Hugging Face format, or a hub id.
    """
    with launch.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='chat' works in one process: talk to a model in one.")
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        talk = Talk(opened, config.to_dict())
        if dry_run:
            return
        print(f"\n{opened}, with the template {talk.name!r}. {HELP}.\n")
        converse(talk, input)


def converse(talk: "Talk", ask: Callable[[str], str]) -> None:
    """Turns until the person leaves; `ask` gives what is said after a prompt."""
    while True:
        try:
            said = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in ("/quit", "/exit"):
            return
        if said == "/new":
            talk.begin()
        elif said.startswith("/"):
            print(f"({HELP})")
        elif said:
            try:
                talk.answer(said, lambda text: print(text, end="", flush=True))
            except chat.Unfit as error:
                print(f"({error})", end="")
            except KeyboardInterrupt:
                print(" …", end="")
            print("\n")


class Talk:
    """A conversation so far; `how` as configs/chat.py has it."""

    def __init__(self, opened: pretrained.Opened, how: dict[str, Any]):
        words = tokenizers.load(opened.tokenizer)
        found = conversations.template_of(opened, words, how["template"], "config.template")
        self.name, _, self.reader = found
        self.author = text_generator.TextGenerator(
            opened, (self.reader.end(),), text_generator.quantization_of(how)
        )
        if opened.model.decodes:
            raise ConfigError(
                "the model is an encoder–decoder, which answers a source and has no conversations: "
                "use configs/generate.py."
            )
        self.how, self.turns, self.messages = how | {"count": 1}, 0, []
        data = opened.config.data if opened.config else {}
        self.room = text_generator.room(opened.model, data.get("seq_len")) - how["length"]
        self.begin()
        if (least := len(self.reader.opening([*self.messages, chat.PROBE[0]]))) > self.room:
            raise ConfigError(
                f"config.length={how['length']} leaves {self.room} of the model's "
                f"{self.room + how['length']} tokens for what is said, and the template with "
                f"config.system takes {least} for a letter: make one of them shorter."
            )

    def begin(self) -> None:
        """Forgets all but what the system says."""
        system = self.how["system"]
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, said: str, show: Callable[[str], None]) -> str:
        """The model's answer, shown as it grows. If there is no room for everything, the oldest
        question and its answer are dropped, with a message.

        Special tokens that the model wrote are left out of what later turns read, with a message,
        as transformers' pipeline and chat do: in a template they would end or begin a turn.

        Raises Unfit where the template cannot have it, or it alone is too long: nothing is kept.
        """
        messages = [*self.messages, {"role": "user", "content": said}]
        first, forgotten = int(bool(self.how["system"])), 0
        while len(ids := self.reader.opening(messages)) > self.room:
            if len(messages) <= first + 1:
                raise chat.Unfit(f"that has {len(ids)} tokens, and there is room for {self.room}")
            del messages[first : first + 2]
            forgotten += 1
        if forgotten:
            show(f"(forgot the first {'turn' if forgotten == 1 else f'{forgotten} turns'})\n")
        self.turns += 1
        given = []

        def both(text):
            given.append(text)
            show(text)

        try:
            self.author.behind(ids, self.how, self.how["seed"] + self.turns, both)
        finally:  # what an interrupted model had said, was said
            content, special = self.reader.without_special("".join(given))
            self.messages = [*messages, {"role": "assistant", "content": content}]
        if special:
            names = ", ".join(map(quoted, dict.fromkeys(special)))
            show(f"\n(special tokens left out of what the conversation goes on with: {names})")
        return content
