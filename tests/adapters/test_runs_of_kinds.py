"""Each kind of adapter through a run as a user types it: trained, resumed, asked, written, read."""

import json
import shutil

import jax
import numpy as np
import pytest
from common import ROOT
from test_finetune import decoder, encoder, files, home, load  # noqa: F401

from fmjax.adapters import peft
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.io import retention
from fmjax.params import paths, sharding
from fmjax.tasks import export, predict, train

POOL = "--config.objectives.classify.pool="  # as the classes of transformers have it
WHOLE = ["--config.adapter.whole=prompt", "--config.adapter.length=4"]
KINDS = {
    "ia3": ("finetune_ia3.py", []),
    "lora": ("finetune_lora.py", ["--config.adapter.rank=2", "--config.adapter.dora=True"]),
    "prompt": ("finetune_prompt.py", [*WHOLE, "--config.adapter.init=text"]),
    "lstm": ("finetune_prompt.py:kind=lstm", [*WHOLE, "--config.adapter.hidden=8"]),
    "prefix": ("finetune_prompt.py:kind=prefix", ["--config.adapter.length=4"]),
    "houlsby": ("finetune_adapter.py:kind=houlsby", ["--config.adapter.width=4"]),
}


def config_of(kind, home, base, *words):  # noqa: F811
    file, own = KINDS[kind]
    own = [*own, "--config.adapter.text=a red fox"] if kind == "prompt" else own
    given = [*files(home), f"--config.init={base}", "--config.data.seq_len=24", "--config.total=8"]
    if base.name == "clm":
        own = [POOL + "last", *(word for word in own if "adapter.whole" not in word)]
    return load(file, *given, POOL + "first", *own, *words)


def params_of(folder):
    return paths.unstack(pretrained.open_folder(str(folder), sharding.make_mesh()).params)


ALWAYS = (("prompt", "encoder"),)


@pytest.mark.parametrize(
    "kind, base",
    [
        pytest.param(kind, base, marks=[] if (kind, base) in ALWAYS else pytest.mark.slow)
        for kind in KINDS
        for base in ("encoder", "decoder")
    ],
)
@pytest.mark.slow
def test_a_run_of_each_kind(kind, base, home, request, tmp_path, capsys):  # noqa: F811
    base = request.getfixturevalue(base)
    run, config = tmp_path / "run", config_of(kind, home, base, "--config.keep=9")
    train.run(config, run)

    # Stopped half way it ends with the same bits.
    again = shutil.copytree(run, tmp_path / "again")
    steps = retention.finished(again / "checkpoints")
    shutil.rmtree(again / "checkpoints" / str(steps[-1]))
    status = json.loads((again / "status.json").read_text())
    status |= {"checkpoint": steps[-2], "state": "running"}
    (again / "status.json").write_text(json.dumps(status))
    train.run(config, again)
    one, other = params_of(run), params_of(again)
    assert all(np.array_equal(one[name], other[name]) for name in one)

    # It says something of new records, the same however it is asked.
    words = [f"--config.folder={run}", f"--config.data.train={home}/dev.jsonl"]
    words += [f"--config.output={tmp_path}/said.jsonl"]
    predict.run(configs.load(str(ROOT / "configs/predict.py"), words), tmp_path)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) > 10

    # And goes to PEFT's format, where that has it, and back.
    words = [f"--config.folder={run}", f"--config.output={tmp_path}/a", "--config.merge=False"]
    written = configs.load(str(ROOT / "configs/export.py"), words)
    if kind == "houlsby":
        with pytest.raises(ConfigError, match="PEFT has no adapters of the kind Bottleneck"):
            export.run(written, tmp_path)
        return
    export.run(written, tmp_path)
    assert "read back: equal" in capsys.readouterr().out
    opened = pretrained.open_folder(str(run), sharding.make_mesh())
    base = peft.merge.separate(opened.params)[0]
    model, params = peft.read(tmp_path / "a", opened.model.model, base)
    arrays = [
        np.full((2, 8), 7),
        np.ones((2, 8), int),
        np.tile(np.arange(8), (2, 1)),
        np.zeros((2, 8), int),
    ]
    arrays = [jax.numpy.asarray(x, jax.numpy.int32) for x in arrays]
    encode = lambda model, params: model.apply({"params": params}, *arrays, method="encode")
    np.testing.assert_allclose(
        encode(model, params), encode(opened.model, opened.params), atol=1e-5
    )
    merging = configs.load(
        str(ROOT / "configs/export.py"), [*words[:1], f"--config.output={tmp_path}/b"]
    )
    if kind in ("ia3", "lora"):
        export.run(merging, tmp_path)
        assert "KL(merged || unmerged)" in capsys.readouterr().out
    else:
        with pytest.raises(ConfigError, match="cannot be merged.*config.merge=False"):
            export.run(merging, tmp_path)


def test_the_text_of_a_prompt_is_tokens_of_the_bases_tokenizer(home, encoder, tmp_path):  # noqa: F811
    train.run(
        config_of("prompt", home, encoder, "--config.total=1", "--config.optim.lr=1e-9"),
        tmp_path / "run",
    )
    named = params_of(tmp_path / "run")
    table, rows = (np.asarray(named[f"embed/token/{n}"]) for n in ("embedding", "prompt_tokens"))
    nearest = [np.abs(table - row).max(-1).argmin() for row in rows]
    from fmjax.data.tokenizer import load as load_tokenizer

    ids = load_tokenizer(encoder / "tokenizer").encode("a red fox", add_special_tokens=False)
    assert nearest == np.resize(ids, 4).tolist()


def test_heads_of_a_prompt_that_see_a_mean_are_refused(home, encoder, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="classify.pool='mean' takes all"):
        words = ["--config.objectives.classify.pool=mean"]
        train.run(config_of("lstm", home, encoder, *words), tmp_path / "run")
    with pytest.raises(ConfigError, match="config.adapter puts vectors before the tokens"):
        words = [
            "--config.cache_prefix=True",
            "--config.groups=(('head/.*', 'train'), ('.*', 'freeze'))",
        ]
        words += ["--config.model.dropout=0.0", "--config.model.attention_dropout=0.0"]
        train.run(config_of("lstm", home, encoder, *words), tmp_path / "cached")
