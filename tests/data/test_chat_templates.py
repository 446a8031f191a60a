"""Templates that write an answer in several ways, and such as take too much time or memory."""

import itertools
import os
import signal
from types import SimpleNamespace

import pytest
import tiny_folders
from transformers import AutoTokenizer

from fmjax.data import chat, records, templates, turns
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError

# As Qwen 3's: what was thought stands before the answers to the last question alone.
THINKS = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages if m.role == 'user' %}"
    "{%- set ns.last = ns.last + 1 %}{%- endfor %}{%- set seen = namespace(users=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set seen.users = seen.users + 1 %}"
    "{%- endif %}{{- '<|start|>' + m.role + '\n' }}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- if m.role == 'assistant' and seen.users == ns.last %}"
    "{{- '<think>\n' + (parts[0].split('<think>')[-1].strip() if parts|length > 1 else '') }}"
    "{{- '\n</think>\n\n' }}{%- endif %}{{- parts[-1].strip() + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}"
)
# As DeepSeek-R1's distilled models: a prompt begins the thought, answers of the past have none.
PROMPTS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' if m.role == 'assistant' else '<|u|>' }}"
    "{{ m.content.split('</think>')[-1] }}{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|><think>\n' }}{% endif %}"
)
# A turn has a number: what is before an answer is another text when more follows.
COUNTS = (
    "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ m.role ~ ': ' ~ m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ messages|length + 1 }}{% endif %}"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny_folders.tokenizer(tmp_path_factory.mktemp("words"))


def says(*turns):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def learnt(folder, template, messages):
    """What is learnt of each answer."""
    text, spans = turns.Turns(tokenizers.load(folder), template).spans(messages)
    assert text == tokenizers.load(folder).apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    return [text[start:end] for start, end in spans]


def test_an_answer_is_learnt_as_the_whole_conversation_has_it(words):
    thought = "<think>\n{}\n</think>\n\n{}<|end|>".format
    found = learnt(words, THINKS, says("dog?", "A cat.", "tree?", "good"))
    assert found == ["A cat.<|end|>", thought("", "good")]
    found = learnt(words, THINKS, says("dog?", "<think>hm</think>A", "tree?", "<think>so</think>B"))
    assert found == ["A<|end|>", thought("so", "B")]
    # Words that stand elsewhere too are those of the answer.
    assert learnt(words, THINKS, says("good", "good", "good", " good"))[0] == "good<|end|>"


def test_a_prompt_that_begins_the_answer_is_not_learnt(words):
    assert learnt(words, PROMPTS, says("a", "b", "c", "d")) == ["b<|end|>", "d<|end|>"]
    kept = PROMPTS.replace(".split('</think>')[-1]", "")
    assert learnt(words, kept, says("a", "<think>\nb</think>c")) == ["b</think>c<|end|>"]
    reader = chat.Reader(words, PROMPTS)
    assert reader.turns.text(says("a"), add_generation_prompt=True).endswith("<|start|><think>\n")


def test_what_is_before_an_answer_may_depend_on_what_follows(words):
    assert learnt(words, COUNTS, says("a", "b", "c", "d")) == ["/4assistant: b<|end|>"] + [
        "/4assistant: d<|end|>"
    ]


@pytest.mark.parametrize(
    "inner", ["{{ m.content }}{{ m.content }}", "{{ m.content ~ m.content|length }}", ""]
)
def test_what_cannot_be_told_is_refused(words, inner):
    template = "{% for m in messages %}" + inner + "<|end|>{% endfor %}"
    with pytest.raises(
        chat.Unfit, match="message 2: the chat template does not write it just once"
    ):
        chat.Reader(words, template).tokens(says("dog", "a cat"))


def test_a_line_break_among_the_tokens_ends_no_answer(tmp_path):
    """Gemma's tokenizers have line breaks and tags among the added tokens that are not special."""
    words = tiny_folders.tokenizer(tmp_path / "words", added=("\n", "\n\n", "<b>", "###"))
    reader = chat.Reader(words, tiny_folders.CHATML)
    end = tokenizers.load(words).convert_ids_to_tokens(reader.end())
    assert end == "<|end|>"
    assert learnt(words, tiny_folders.CHATML, says("hi", "one\ntwo")) == ["one\ntwo<|end|>"]
    # An end that is not special is one where there is no special one.
    other = tiny_folders.CHATML.replace("<|end|>", "###")
    assert learnt(words, other, says("hi", "one\ntwo")) == ["one\ntwo###"]


def test_a_conversation_is_gone_on_with_behind_its_last_words(words):
    reader = chat.Reader(words, tiny_folders.CHATML)
    for said in ("b", "b ", "\n"):
        messages = says("a", said)
        theirs = tokenizers.load(words).apply_chat_template(
            messages,
            chat_template=tiny_folders.CHATML,
            tokenize=False,
            continue_final_message=True,
        )
        assert reader.turns.unfinished(messages) == theirs


def test_the_text_is_that_of_transformers(words):
    template = (
        "{% generation %}{{ messages[0] | tojson }}{% endgeneration %}{% for m in messages %}\n"
        "  {% if loop.index > 1 %}\n{% break %}{% endif %}\n{{ m.content|upper }}\n{% endfor %}\n"
        "{{ strftime_now('%Y') ~ eos_token ~ (tools is none) }}"
    )
    messages = says("<é> \"q\" & 'r'", "b")
    theirs = AutoTokenizer.from_pretrained(words).apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    assert chat.Reader(words, template).turns.text(messages) == theirs


# ---- weights ----


def test_an_answer_of_weight_0_is_not_learnt(words):
    weighed = says("dog?", "bad", "cat?", "good")
    for message, weight in zip(weighed, (None, 0, None, 1), strict=True):
        message["weight"] = weight
    fields, bad = records.read({"messages": weighed}, {"messages": "messages"})
    assert not bad and learnt(words, tiny_folders.CHATML, fields["messages"]) == ["good<|end|>"]
    columns = {key: [message[key] for message in weighed] for key in weighed[0]}
    assert records.read({"messages": columns}, {"messages": "messages"}) == (fields, "")
    plain = [{key: m[key] for key in ("role", "content")} for m in weighed]
    harmless = [m | {"id": 3, "tool_calls": [], "name": None} for m in plain]
    assert records.read({"messages": harmless}, {"messages": "messages"})[0]["messages"] == plain


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"weight": 0.5}, "message 2: the weight 0.5 is neither 0, not to be learnt, nor 1"),
        ({"weight": "0"}, "message 2: the weight '0' is neither"),
        ({"weight": 0}, "the weight of each message of the assistant is 0"),
        ({"tool_calls": [{"id": 1}]}, "message 2: the key 'tool_calls' would be lost"),
        ({"train": False}, "message 2: the key 'train' would be lost"),
    ],
)
def test_what_a_message_says_beside_its_words_is_not_lost(keys, reason):
    messages = says("a", "b")
    messages[1] |= keys
    assert reason in records.read({"messages": messages}, {"messages": "messages"})[1]
    messages = says("a", "b")
    messages[0]["weight"] = 1
    bad = records.read({"messages": messages}, {"messages": "messages"})[1]
    assert bad == "message 1: weight 1 of the user, from whom nothing is learnt"


# ---- bounds ----


def test_an_interrupted_question_does_not_shift_the_answers():
    """The unread answer is not returned for the next conversation."""
    render = templates.Renderer("{{ messages[0]['content'] }}", {})
    say = lambda text: render([{"role": "user", "content": text}])
    assert say("first") == "first"
    process, reads = render._process, render._process.stdout

    def interrupted():
        raise KeyboardInterrupt

    process.stdout = SimpleNamespace(readline=interrupted, close=reads.close)
    with pytest.raises(KeyboardInterrupt):
        say("second")
    assert say("third") == "third"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{{ 10 ** (10 ** 10) }}",
    ],
)
def test_a_template_without_end_is_ended(words, template, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0)
    with pytest.raises(ConfigError, match="chat_template takes more than 0 s of a processor"):
        chat.Reader(words, template + "<|end|>").tokens(chat.PROBE)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ ('x' * 10 ** 9) | length }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{% set t = namespace(s='x') %}{% for _ in range(40) %}{% set t.s = t.s * 2 %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_of_more_memory_than_it_may_have_is_refused(words, template):
    with pytest.raises(ConfigError, match="chat_template takes more than 512 MiB of memory"):
        chat.Reader(words, template + "<|end|>").tokens(chat.PROBE)


def test_a_template_may_fail_in_any_way(words, tmp_path):
    for template, reason in (
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '(' * 9 }}{{ " + "(" * 100_000, ""),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", ""),
    ):
        with pytest.raises(chat.Unfit, match=f"the chat template fails: .*{reason}") as error:
            chat.Reader(words, template).tokens(chat.PROBE)
        assert len(str(error.value)) < 300
    render = templates.Renderer("{{ messages[0].content }}", {})
    assert render(says("a")) == "a"
    os.kill(render._process.pid, signal.SIGKILL)
    with pytest.raises(ConfigError, match="chat_template ends the process .* with code -9"):
        render(says("a"))
    assert render(says("b")) == "b"  # another process
