"""Chat templates, rendered where they can take only so much time and memory."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError

SECONDS = 5  # of a processor, for one conversation; templates take thousandths
BYTES = 2**29  # of memory; a conversation has 2**24 at most, and is copied some times
_PROGRAM = Path(__file__).with_name("template_process.py")


class TemplateError(Exception):
    """An objection of a template, or of jinja2 reading it, to a conversation."""


class Renderer:
    """Texts of conversations by a template, in which the special `tokens` have their names.

    The template runs in a process of its own (template_process.py), which the first conversation
    starts and which ends with this one.
    """

    def __init__(self, template: str, tokens: Mapping[str, Any]):
        self._start = dict(template=template, tokens=dict(tokens), seconds=SECONDS, bytes=BYTES)
        self._process: subprocess.Popen | None = None

    def __call__(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> str:
        """The text of the messages. Raises TemplateError, and ConfigError where the template takes
        more than it may."""
        process = self._process or self._started()
        asked = dict(messages=list(messages), add_generation_prompt=add_generation_prompt)
        try:
            _write(process, asked)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # Ctrl-C: its answer would be taken for that of the next
            self._process = None
            _end(process)
            raise
        if not line:
            self._process = None
            raise _refused(process.wait())
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        if "text" not in answer:
            raise ConfigError(f"{_TEMPLATE} takes more than {BYTES >> 20} MiB of memory {_INSTEAD}")
        return answer["text"]

    def _started(self) -> subprocess.Popen:
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],  # -P: its folder has no modules for it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a Ctrl-C is for us: it ends with its input
        )
        weakref.finalize(self, _end, process)
        _write(process, self._start)
        return process


_TEMPLATE = "the tokenizer's chat_template"
_INSTEAD = (
    "for one conversation. Set config.data.template (in configs/chat.py config.template) to "
    "'plain' or 'alpaca', or use another tokenizer."
)


def _refused(code: int) -> ConfigError:
    """Why the process ended with that code."""
    if code == -signal.SIGXCPU:
        return ConfigError(f"{_TEMPLATE} takes more than {SECONDS} s of a processor {_INSTEAD}")
    return ConfigError(
        f"{_TEMPLATE} ends the process that renders it, with code {code}, {_INSTEAD}"
    )


def _write(process: subprocess.Popen, message: Mapping[str, Any]) -> None:
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what is left to be written has no reader
            pipe.close()


def renderer(template: str, tokens: Mapping[str, Any]) -> Renderer:
    """The one for the template and the tokens: shards share its process."""
    return _renderer(template, json.dumps(dict(tokens), sort_keys=True, default=str), os.getpid())


@functools.lru_cache(maxsize=4)
def _renderer(template: str, tokens: str, process_id: int) -> Renderer:
    return Renderer(template, json.loads(tokens))
