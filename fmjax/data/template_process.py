"""Renders one chat template in a process of its own, which `templates.Renderer` starts.

A template is a program of whoever made the tokenizer. jinja2's sandbox keeps it from files and
from attributes of Python, but not from running for ever, nor from filling the memory: of a text,
a list, a filter or a macro it bounds neither size nor number. So the process is bounded as a whole,
by what the kernel enforces. It imports nothing of fmjax and reads JSON lines: first
{"template", "tokens", "seconds", "bytes"}, then messages, of which each is answered by a line.
"""

import datetime
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks what a model says, as its text alone."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The jinja2 environment that chat templates expect, as transformers provides it."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return made


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    how = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators)
    return json.dumps(value, sort_keys=sort_keys, **how)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]  # which nobody may raise
    bounded = hard != resource.RLIM_INFINITY and hard < most
    resource.setrlimit(kind, (hard if bounded else most, hard))


def main() -> None:
    start = json.loads(sys.stdin.readline())
    _limit(resource.RLIMIT_AS, start["bytes"])
    template = None
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + start["seconds"])
        try:
            template = template or environment().from_string(start["template"])
            how = dict(tools=None, documents=None) | start["tokens"] | json.loads(line)
            answer = {"text": template.render(how)}
            if len(answer["text"]) > start["bytes"] // 8:  # before copies of it are made
                raise MemoryError
            answer = json.dumps(answer)
        except MemoryError:
            answer = json.dumps({"bound": "memory"})
        except Exception as error:  # a template may raise whatever it likes
            answer = json.dumps({"error": f"{error or type(error).__name__}"[:1000]})
        print(answer, flush=True)


if __name__ == "__main__":
    main()
