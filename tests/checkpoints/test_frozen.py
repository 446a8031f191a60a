"""What does not train is saved once; checkpoints are as small as what does, and resume the same."""

import json
import shutil

import jax
import numpy as np
import pytest
from common import ROOT
from test_finetune import encoder, files, home, load  # noqa: F401

from fmjax.adapters import peft
from fmjax.checkpoints import checkpointer, pretrained
from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError
from fmjax.io import retention
from fmjax.models import param_init
from fmjax.params import paths, sharding
from fmjax.tasks import export, train

LORA = "(('.*/lora_.|head/.*', 'train'), ('.*', 'freeze'))"


@pytest.fixture(scope="module")
def config(home, encoder):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", f"--config.groups={LORA}"]
    words += ["--config.adapter.name=lora", "--config.adapter.rank=2", "--config.total=8"]
    words += ["--config.objectives.classify.pool=first", "--config.keep=9"]
    return load("finetune_lora.py", *words)


@pytest.fixture(scope="module")
def adapted(home, config):  # noqa: F811
    train.run(config, home / "adapted")
    return home / "adapted"


def params_of(folder):
    return paths.unstack(checkpointer.load_params(folder)[0])


def test_a_checkpoint_is_as_large_as_what_trains_and_its_optimizer(encoder, adapted):  # noqa: F811
    meta = checkpointer.load_meta(adapted)
    sizes = {}
    for path, shown in meta["arrays"].items():
        shape = shown.partition("[")[2].rstrip("]").split(",")
        kind = path.partition("/")[0]
        sizes[kind] = sizes.get(kind, 0) + int(np.prod([int(n) for n in shape if n] or [1]))
    found = params_of(adapted)
    moving = {n: x for n, x in found.items() if n.startswith("head/") or "/lora_" in n}
    number = sum(x.size for x in moving.values())
    assert sizes["params"] == number
    assert 2 * number <= sizes["opt_state"] <= 2 * number + 16  # two moments, and counts
    # The frozen ones are those of the encoder, and lie beside the checkpoints once.
    before = params_of(encoder)
    for name in found.keys() - moving.keys():
        np.testing.assert_array_equal(found[name], before[name], err_msg=name)
    assert [p.name for p in adapted.glob("checkpoints/*") if p.name == "frozen"] == ["frozen"]


def test_a_run_goes_on_from_what_trains_and_what_does_not(adapted, config, tmp_path):
    again = shutil.copytree(adapted, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "8")
    assert retention.finished(again / "checkpoints") == [4]
    status = json.loads((again / "status.json").read_text())
    (again / "status.json").write_text(json.dumps(status | {"checkpoint": 4, "state": "running"}))
    train.run(config, again)
    one, other = params_of(adapted), params_of(again)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("harm, said", [("flip", "is damaged"), ("remove", "is missing")])
def test_frozen_parameters_that_are_not_what_they_were(adapted, config, tmp_path, harm, said):
    again = shutil.copytree(adapted, tmp_path / "again")
    frozen = again / "checkpoints" / "frozen"
    if harm == "remove":
        shutil.rmtree(frozen)
    else:
        file = max(frozen.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        pretrained.open_folder(str(again), sharding.make_mesh())
    shutil.rmtree(again / "checkpoints" / "8")
    with pytest.raises(CheckpointError, match=said):
        train.run(config, again)


def test_frozen_parameters_of_another_run_are_refused(adapted, home, encoder, config, tmp_path):  # noqa: F811
    again = shutil.copytree(adapted, tmp_path / "again")
    words = [*files(home), f"--config.init={encoder}", "--config.total=2"]
    train.run(load("finetune_head.py", *words), tmp_path / "head")
    shutil.rmtree(again / "checkpoints" / "frozen")
    shutil.copytree(tmp_path / "head" / "checkpoints" / "frozen", again / "checkpoints" / "frozen")
    with pytest.raises(CheckpointError, match="of another run"):
        pretrained.open_folder(str(again), sharding.make_mesh())


@pytest.mark.slow
def test_the_adapter_alone_is_written_with_its_head_and_tokenizer(
    adapted,
    encoder,  # noqa: F811
    tmp_path,
    capsys,
):
    words = [f"--config.folder={adapted}", "--config.merge=False", f"--config.output={tmp_path}/a"]
    export.run(configs.load(str(ROOT / "configs/export.py"), words), tmp_path)
    told, folder = capsys.readouterr().out, tmp_path / "a"
    assert "read back: equal" in told
    # Its base is a run, which PEFT cannot open before it is exported.
    assert f"--config=configs/export.py --config.folder={encoder}, then peft.PeftModel" in told
    settings = json.loads((folder / peft.CONFIG).read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["base_model_name_or_path"] is None
    assert (folder / "tokenizer.json").exists() and (folder / peft.BASE).exists()
    opened = pretrained.open_folder(str(adapted), sharding.make_mesh())
    base, _ = opened.model.model, None
    frozen = {n: x for n, x in paths.unstack(opened.params).items() if "/lora_" not in n}
    fresh = paths.unstack(param_init.init_params(base, jax.random.key(7)))
    start = {name: fresh[name] if name.startswith("head/") else x for name, x in frozen.items()}
    model, params = peft.read(folder, base, paths.stack(start, base.stacks))
    again, wanted = paths.unstack(params), paths.unstack(opened.params)
    assert again.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(again[name], wanted[name], err_msg=name)
    size = (folder / peft.WEIGHTS).stat().st_size
    moving = sum(x.nbytes for n, x in wanted.items() if n.startswith("head/") or "/lora_" in n)
    assert moving <= size <= moving + 16384  # names and shapes


def test_a_run_without_an_adapter_has_none_to_write(encoder, tmp_path):  # noqa: F811
    words = [f"--config.folder={encoder}", "--config.merge=False", f"--config.output={tmp_path}/a"]
    with pytest.raises(ConfigError, match="config.merge=False writes an adapter alone"):
        export.run(configs.load(str(ROOT / "configs/export.py"), words), tmp_path)
