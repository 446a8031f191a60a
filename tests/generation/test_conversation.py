"""Conversations in the terminal: who said what, what is forgotten, and how they end."""

import jax
import pytest
from common import ROOT

from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data.chat import Unfit
from fmjax.errors import ConfigError
from fmjax.params import sharding
from fmjax.tasks import chat, train


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A run of configs/instruct.py of a few steps, from nothing."""
    home = tmp_path_factory.mktemp("chat")
    words = ["--config.total=2", "--config.log_every=2", "--config.ledger=()"]
    base = configs.load(f"{ROOT}/configs/clm.py:tiny", words)
    train.run(base, home / "clm")
    words += [f"--config.init={home / 'clm'}", "--config.data.max_documents=200"]
    train.run(configs.load(f"{ROOT}/configs/instruct.py", words), home / "run")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        yield pretrained.open_folder(str(home / "run"), mesh)


def talk(opened, **changes):
    how = configs.load(f"{ROOT}/configs/chat.py", ["--config.folder=x"]).to_dict()
    return chat.Talk(opened, how | dict(length=4) | changes)


def test_an_answer_is_what_was_shown_and_stays_in_the_conversation(opened):
    one, shown = talk(opened), []
    said = one.answer("What does len do?", shown.append)
    assert said == "".join(shown) and one.name == "plain"
    assert [m["role"] for m in one.messages] == ["user", "assistant"]
    assert one.messages[1]["content"] == said
    assert said == talk(opened).answer("What does len do?", shown.append)


def test_the_oldest_turn_is_forgotten_aloud_where_there_is_no_room(opened):
    one = talk(opened, system="Be brief.")
    one.answer("a " * 20, lambda text: None)
    one.room = len(one.reader.opening(one.messages)) + 5
    shown = []
    one.answer("b " * 20, shown.append)
    assert shown[0] == "(forgot the first turn)\n"
    assert [m["content"].split()[0] for m in one.messages[:2]] == ["Be", "b"]
    before = list(one.messages)
    with pytest.raises(Unfit, match="tokens, and there is room for"):
        one.answer("c " * 500, shown.append)
    assert one.messages == before


def test_a_conversation_ends_with_its_input_or_an_interrupt(opened, capsys):
    one = talk(opened)
    lines = iter(["", "/help", "hello", "<|endoftext|>", "/new", "/quit"])
    chat.converse(one, lambda prompt: next(lines))
    out = capsys.readouterr().out
    assert "/new forgets" in out and "a special token" in out and not one.messages

    def leave(error):
        def ask(prompt):
            raise error

        return ask

    chat.converse(one, leave(EOFError()))
    chat.converse(one, leave(KeyboardInterrupt()))


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(opened, capsys):
    one = talk(opened)
    lines = iter(["hello", "again", "/quit"])
    behind = one.author.behind

    def interrupted(ids, how, seed, show):
        show("Well")
        raise KeyboardInterrupt

    one.author.behind = interrupted
    chat.converse(one, lambda prompt: next(lines))
    assert [m["content"] for m in one.messages] == ["hello", "Well", "again", "Well"]
    one.author.behind = behind


@pytest.mark.parametrize("wrote", ["a <|endoftext|>b", "a <|endof<|endoftext|>text|>b"])
def test_special_tokens_in_an_answer_do_not_end_the_conversation(wrote, opened, capsys):
    one, asked = talk(opened), []
    lines = iter(["hello", "again", "/quit"])

    def behind(ids, how, seed, show):
        asked.append(ids)
        show(wrote)

    one.author.behind = behind
    chat.converse(one, lambda prompt: next(lines))
    kept = [m["content"] for m in one.messages]
    assert kept == ["hello", "a b", "again", "a b"]
    assert asked[1] == one.reader.opening(one.messages[:3])
    assert one.author.words.decode(asked[1]).count("a b") == 1
    out = capsys.readouterr().out
    assert out.count("(special tokens left out of what the conversation goes on with: ") == 2
    assert f"{wrote}\n(special tokens" in out and "'<|endoftext|>')" in out


def test_a_system_without_room_is_refused(opened):
    with pytest.raises(ConfigError, match="the template with config.system takes"):
        talk(opened, system="word " * 400)
