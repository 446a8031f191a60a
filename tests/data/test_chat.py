"""Conversations: which tokens are learnt, by hand and by the templates of known models."""

import itertools
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fmjax import data
from fmjax.data import chat, pydocs
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError, DataError

PAD, CLS, SEP = 0, 2, 3
# Of each turn [CLS], the first letter of its role, what is said, [SEP] and a line break.
TEMPLATE = (
    "{% for m in messages %}{{ '[CLS]' + m['role'][0] + m['content'] + '[SEP]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[CLS]a{% endif %}"
)


def says(**turns):
    return [{"role": role, "content": text} for role, text in turns.items()]


@pytest.fixture
def conversations(tmp_path, letters):
    """conversations(records, template, **config.data): a file of them, prepared."""

    def conversations(
        records, jinja=TEMPLATE, name="a.jsonl", source="text", log=lambda _: None, **how
    ):
        shutil.rmtree(tmp_path / "words", ignore_errors=True)
        words = tokenizers.load(letters)
        words.chat_template = jinja
        words.save_pretrained(tmp_path / "words")
        content = "".join(json.dumps(row) + "\n" for row in records)
        content = content if name == "a.jsonl" else json.dumps(records)
        (tmp_path / name).write_text(content)
        defaults = dict(name=source, train=str(tmp_path / name), validation_fraction=0)
        defaults |= dict(format="chat", columns="messages", long="drop", seq_len=16)
        defaults |= dict(cache=str(tmp_path / "cache"))
        return data.prepare(defaults | how, {"name": str(tmp_path / "words")}, log=log)

    return conversations


def rows(dataset):
    split = dataset.splits["train"]
    return split.rows(np.arange(len(split)))


# ---- by hand ----


def test_two_conversations_share_a_row(conversations):
    one = says(user="b", assistant="cd")
    two = [*says(user="e", assistant="f"), *says(user="g", assistant="h")]
    a, u = 5, 25
    first = [CLS, u, 6, SEP, CLS, a, 7, 8, SEP]
    again = [CLS, u, 9, SEP, CLS, a, 10, SEP, CLS, u, 11, SEP, CLS, a, 12, SEP]
    learnt = [0] * 6 + [1] * 3
    learnt_again = [0] * 6 + [1, 1] + [0] * 6 + [1, 1]
    together = conversations([{"messages": one}, {"messages": two}], seq_len=25)
    batch = rows(together)
    assert batch["input_ids"].tolist() == [first + again]
    assert batch["segment_ids"].tolist() == [[1] * 9 + [2] * 16]
    assert batch["loss_mask"].tolist() == [learnt + learnt_again]
    assert together.counts["train"]["learnt_tokens"] == 7
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    apart = rows(conversations([{"messages": one}, {"messages": two}], seq_len=24))
    assert sorted(apart["segment_ids"].max(1)) == [1, 1]  # no conversation is cut to fill a row


def test_padded_puts_one_conversation_in_a_row(conversations):
    found = [{"messages": says(user=x, assistant=x)} for x in "bcd"]
    batch = rows(conversations(found, format="chat_padded"))
    assert batch["input_ids"].shape == (3, 16)
    assert batch["segment_ids"].tolist() == [[1] * 8 + [0] * 8] * 3
    assert batch["loss_mask"].tolist() == [[0] * 6 + [1, 1] + [0] * 8] * 3


def test_columns_in_another_order_are_another_conversation(conversations):
    row = {"ask": "a", "say": "b"}
    one, other = (conversations([row], columns=columns) for columns in ("ask,say", "say,ask"))
    swapped = conversations([{"ask": "b", "say": "a"}], columns="ask,say")
    np.testing.assert_array_equal(rows(other)["input_ids"], rows(swapped)["input_ids"])
    assert (rows(one)["input_ids"] != rows(other)["input_ids"]).any()


def test_questions_and_answers_in_columns(conversations):
    row = {"ask": "b", "more": "", "say": "c"}
    batch = rows(conversations([row], columns="ask,say"))
    expected = [CLS, 25, 6, SEP, CLS, 5, 7, SEP]
    assert batch["input_ids"].tolist() == [expected + [PAD] * 8]
    assert batch["loss_mask"].tolist() == [[0] * 6 + [1, 1] + [0] * 8]
    batch = rows(conversations([row, row | {"more": "d"}], columns="ask,more,say", seq_len=17))
    assert batch["input_ids"].tolist() == [[*expected, CLS, 25, 6, 8, SEP, CLS, 5, 7, SEP]]


def test_what_is_too_long_is_cut_or_left_out_and_counted(conversations):
    lines = []
    found = [
        {"messages": says(user="b", assistant="c" * 20)},
        {"messages": says(user="b" * 20, assistant="c")},  # cut, it has no answer
        {"messages": says(user="b", assistant="c")},
    ]
    batch = rows(conversations(found, long="truncate", log=lines.append))
    assert batch["loss_mask"].sum(1).tolist() == [10, 2]
    assert "22 truncated tokens" in lines[-1] and "1 dropped documents" in lines[-1]
    dataset = conversations(found, long="drop")
    assert rows(dataset)["loss_mask"].sum(1).tolist() == [2]
    assert dataset.counts["train"]["dropped_documents"] == 2
    with pytest.raises(DataError, match="2 documents are longer than the 16 tokens"):
        conversations(found, long="error")


def test_a_token_that_crosses_into_an_answer_is_cut(tmp_path):
    """Bytes, of which ":b" is one token where a text is not cut between them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, ":b", "xy", "<end>"])}
    words = Tokenizer(models.BPE(vocab, [(":", "b"), ("x", "y")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    folder = tmp_path / "bytes"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    reader = chat.Reader(folder, template)

    def read(**turns):
        ids, learnt = reader.tokens(says(**turns))
        names = {i: token for token, i in vocab.items()}
        return [names[i] for i in ids], learnt.astype(int).tolist()

    assert read(user="b", assistant="bxy") == (
        ["u", ":b", "<end>", "a", ":", "b", "xy", "<end>"],
        [0, 0, 0, 0, 0, 1, 1, 1],
    )
    # Of "é" both bytes are learnt.
    assert read(user="é", assistant="é")[1] == [0] * 7 + [1] * 3


def test_a_text_is_tokenised_as_a_whole_where_no_token_crosses(tmp_path):
    """Tokenised apart, an answer of a sentencepiece tokenizer would get a space of its own."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "[", "]", "I", "/"]
    words = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    named = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(tmp_path / "pieces")
    template = (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[I] ' + m['content'] + ' [/I]' }}{% else %}"
        "{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    reader = chat.Reader(tmp_path / "pieces", template)
    ids, learnt = reader.tokens(says(user="a", assistant="b"))
    assert [pieces[i] for i in ids][-3:] == ["]", "▁b", "</s>"]
    assert learnt.tolist() == [False] * (len(ids) - 2) + [True, True]


# ---- templates of known models, shortened to what is asked here ----

KNOWN = {
    # Qwen 2, SmolLM: a line break behind what ends a turn
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>user\nhi you<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] "
        "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi you<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    # Llama 2, Mistral: no prompt for an answer, a space before it
    "llama2": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>[INST] hi you [/INST]",
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
        "<s><start_of_turn>user\nhi you<end_of_turn>\n<start_of_turn>model\n",
    ),
    "plain": (chat.TEMPLATES["plain"], "</s>", "<s>### User:\nhi you\n\n### Assistant:\n"),
    "alpaca": (
        chat.TEMPLATES["alpaca"],
        "</s>",
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nhi you\n\n### Response:\n",
    ),
}
MARKS = "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
MARKS += " <start_of_turn> <end_of_turn>"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A byte-level tokenizer as GPT-2's that has the marks of all."""
    words = Tokenizer(models.BPE(byte_fallback=False))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊĊ", "hi", "Ġhi"])}
    words = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ"), ("h", "i"), ("Ġ", "hi")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in MARKS.split()]
    )
    folder = tmp_path_factory.mktemp("real")
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates(name, real):
    template, end, prompt = KNOWN[name]
    reader, words = chat.Reader(real, template), tokenizers.load(real)
    turns = [*says(user="hi you", assistant="hi there"), *says(user="why", assistant="\n\nso é")]
    ids, learnt = reader.tokens(turns)
    # The text is that of transformers.
    assert words.decode(ids) == words.apply_chat_template(
        turns, chat_template=template, tokenize=False
    )
    # What is not learnt before the first answer is the prompt that a model is asked with.
    first = int(np.argmax(learnt))
    assert words.decode(ids[:first]) == prompt
    asked = words.apply_chat_template(
        turns[:1], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert ids[:first].tolist() == asked
    runs = [
        words.decode([i for i, _ in run])
        for mine, run in itertools.groupby(zip(ids, learnt, strict=True), key=lambda x: x[1])
        if mine
    ]
    space = " " * (name == "llama2")
    last = "so é" if "trim" in template else "\n\nso é"
    assert runs == [f"{space}hi there{end}", f"{space}{last}{end}"]


# ---- templates that cannot be used, and bad records ----


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no special token at its end"),
        ("{{ raise_exception('not today') }}", "the chat template fails: 'not today'"),
        ("{% if %}", "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}[SEP]", "the chat template fails: .*unsafe"),
        (
            "{% for m in messages %}{{ m['content'] ~ m['content'] + '[SEP]' }}{% endfor %}",
            "message 2: the chat template does not write it just once",
        ),
    ],
)
def test_templates_that_cannot_be_used(conversations, template, reason):
    with pytest.raises(ConfigError, match=f"config.data.template='tokenizer' cannot.*{reason}"):
        conversations([{"messages": says(user="b", assistant="c")}], jinja=template)


def test_the_template_is_the_tokenizers_or_is_said(conversations):
    found, lines = [{"messages": says(user="b", assistant="c")}], []
    own = conversations(found, log=lines.append)
    assert "template 'tokenizer'" in lines[0]
    plain = conversations(found, jinja=None, log=lines.append, seq_len=64)
    assert any("template 'plain'" in line for line in lines)
    assert plain.digest != own.digest
    with pytest.raises(ConfigError, match="'tokenizer', but the tokenizer has no chat template"):
        conversations(found, jinja=None, template="tokenizer")


@pytest.mark.parametrize(
    "value, reason",
    [
        ("hello", "the value is str, not a list of {'role': ..., 'content': ...}"),
        ([], "the value is an empty list, not a list of"),
        (["a"], "message 1: it is str, not"),
        ([{"from": "human", "value": "a"}], "message 1: it has no 'role', but 'from', 'value'"),
        (says(user="b", robot="c"), "message 2: the role 'robot' is none of system, user"),
        (says(user="b"), "no message of the assistant"),
        (says(user="b", assistant=" "), "message 2: an empty text"),
        (says(user="b", assistant=None), "message 2: the value is null, not text"),
        (says(user="b\0", assistant="c"), "message 1: NUL character"),
        (says(user="b", assistant="c[SEP]"), "message 2 holds '[SEP]', a special token"),
    ],
)
def test_bad_conversations_are_named(conversations, value, reason):
    good = {"messages": says(user="b", assistant="c")}
    with pytest.raises(DataError) as error:
        conversations([good, {"messages": value}])
    assert "a.jsonl:2: " in str(error.value) and reason in str(error.value)
    assert "config.data.on_bad_record" in str(error.value)
    with pytest.raises(DataError, match=r"a\.json:record 2: "):
        conversations([good, {"messages": value}], name="a.json")
    dataset = conversations([good, {"messages": value}], on_bad_record="quarantine")
    assert dataset.counts["bad_records"] == 1 and dataset.counts["train"]["documents"] == 1


@pytest.mark.parametrize(
    "row, how, reason",
    [
        ({"a": "b", "c": " "}, dict(columns="a,c"), "column 'c': an empty text"),
        ({"a": "b"}, dict(columns="a,c"), "no column 'c'"),
        ({"a": "b", "i": None, "c": "d"}, dict(columns="a,i,c"), "column 'i': the value is null"),
    ],
)
def test_bad_columns_are_named(conversations, row, how, reason):
    with pytest.raises(DataError, match=f"a.jsonl:1: {reason}"):
        conversations([row], **how)


@pytest.mark.parametrize(
    "how, reason",
    [
        (dict(long="split"), "config.data.long='split' has no meaning with format='chat'"),
        (dict(frame="document"), "config.data.frame='document' has no meaning"),
        (dict(columns="a,b,c,d"), "needs 1 or 2 or 3 different columns"),
    ],
)
def test_settings_that_contradict_each_other(conversations, how, reason):
    with pytest.raises(ConfigError, match=reason):
        conversations([], **how)


# ---- as all data ----


def test_messages_in_parquet(conversations, tmp_path):
    table = pyarrow.table({"messages": [says(user="b", assistant="c")] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    how = dict(train=str(tmp_path / "a.parquet"), format="chat_padded")
    assert rows(conversations([], **how))["loss_mask"].sum(1).tolist() == [2, 2, 2]
    text = pyarrow.array([b"b", b"\xff"]).cast(pyarrow.binary())
    broken = pyarrow.StructArray.from_arrays([text, text], ["role", "content"])
    column = pyarrow.ListArray.from_arrays([0, 2], broken)
    kind = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    table = pyarrow.table({"messages": column.view(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet:row 1: byte 0xff at place 1"):
        conversations([], **how)


def test_messages_of_a_dataset(conversations, tmp_path):
    (tmp_path / "hub").mkdir()
    row = {"messages": says(user="b", assistant="c")}
    (tmp_path / "hub" / "train.jsonl").write_text((json.dumps(row) + "\n") * 2)
    found = conversations([], source="hub", path=str(tmp_path / "hub"), train="train")
    assert rows(found)["loss_mask"].sum() == 4


def test_order_and_resume(conversations):
    found = [{"messages": says(user="b", assistant="c" * i)} for i in range(1, 9)]
    split = conversations(found, format="chat_padded", seq_len=20).splits["train"]
    made = data.batches(split, batch_size=4, seeds=[3])
    straight = list(itertools.islice(made, 5))
    made.close()
    made = data.batches(split, batch_size=4, seeds=[3], start=3)
    for name, array in next(made).items():
        np.testing.assert_array_equal(array, straight[3][name])
    made.close()
    counts = sorted(n for batch in straight[:2] for n in batch["loss_mask"].sum(1).tolist())
    assert counts == list(range(2, 10))  # each once in an epoch: its letters and what ends it


def test_other_templates_are_other_data(conversations):
    found = [{"messages": says(user="b", assistant="c")}]
    other = TEMPLATE.replace("m['content']", "m['content'] + 'z'")
    one, two = conversations(found), conversations(found, other)
    assert one.digest != two.digest and conversations(found).digest == one.digest


def test_the_default_asks_what_functions_do():
    found = pydocs.conversations()
    assert len(found) > 3000 and len({answer for *_, answer in found}) == len(found)
    named = {question: answer for _, question, answer in found}
    assert named["What does textwrap.wrap(text, width=70, **kwargs) do?"] == (
        "Wrap a single paragraph of text, returning a list of wrapped lines."
    )
