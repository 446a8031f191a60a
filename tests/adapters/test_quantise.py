"""A base in few bits: the codes themselves, what a step with them computes and keeps, loading."""

import functools
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from common import ROOT
from test_finetune import encoder, files, home, load  # noqa: F401

from fmjax import adapters, convert
from fmjax.adapters import lora, peft, quantise
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError
from fmjax.evaluation import export_check
from fmjax.models import bert, layers, param_init
from fmjax.params import paths, sharding
from fmjax.tasks import export, train
from fmjax.training import initialize

MATRICES = r"block_.*/(attn|mlp)/.*"
LORA = dict(name="lora", targets=((MATRICES, 4),), rank=4, alpha=8.0)
TRAIN = ((r".*/lora_.", "train"), (".*", "freeze"))
SIZES = dict(width=64, mlp=128)  # blocks of 64 inputs
SCHEMES = list(quantise.SCHEMES)


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_the_table_is_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: 7 below zero, zero and 8 above, each half from the same outermost one."""
    quantile = lambda n: scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1])
    table = np.sort([*quantile(9), 0.0, *-quantile(8)])
    np.testing.assert_allclose(table / table.max(), quantise.NF4, atol=1e-6)


def test_nf4_by_hand():
    """Of 64 inputs the largest is 2; 0.3 is 0.15 of it, nearest to 0.1609; -2 is code 0."""
    w = np.zeros((64, 1), np.float32)
    w[:4, 0] = -2, 0.3, 1, 0
    packed = quantise.pack_nf4(jnp.asarray(w))
    assert packed["codes"].shape == (32, 1)
    # 1 / 2 is nearer to 0.4407 (12) than to 0.5626 (13); zero is code 7.
    assert packed["codes"][:3, 0].tolist() == [0x09, 0xC7, 0x77]
    values = np.asarray(quantise.unpack_nf4(packed))[:4, 0]
    np.testing.assert_allclose(values, [-2, 0.32186, 0.88142, 0], atol=1e-5)


def test_codes_and_scales_are_those_of_bitsandbytes():
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    functional = pytest.importorskip("bitsandbytes", reason="the reference").functional
    w = weight(256, 96)
    theirs = torch.from_numpy(np.array(w.T))  # (out, in), in blocks along a row
    codes, how = functional.quantize_4bit(theirs, blocksize=64, quant_type="nf4")
    packed = quantise.pack_nf4(w)
    np.testing.assert_array_equal(np.asarray(packed["codes"]).T.reshape(-1, 1), codes)
    np.testing.assert_array_equal(quantise.NF4, how.code.numpy())
    whole = functional.dequantize_4bit(codes, how).numpy().T
    double = functional.quantize_4bit(theirs, quant_type="nf4", compress_statistics=True)
    off = lambda values: np.abs(np.asarray(values) - whole).max()
    ours = off(quantise.unpack_nf4(packed))
    assert 0 < ours < off(functional.dequantize_4bit(*double).numpy().T)


@pytest.mark.parametrize("scheme, bits", [("nf4", 4.127), ("int8", 8.04), ("fp8", 8.04)])
def test_bits_of_a_weight(scheme, bits):
    w = weight(768, 3072)
    packed = quantise.SCHEMES[scheme].pack(w)
    assert 8 * sum(x.nbytes for x in packed.values()) / w.size == pytest.approx(bits, abs=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_are_bounded_and_zeros_stay(scheme):
    w = weight(128, 80)  # 160 scales: no whole group
    w = (
        w.at[:, 3].set(0).at[:64, 4].set(0).at[5, 6].set(40)
    )  # an outlier is felt by its own scale alone
    back = np.asarray(quantise.dense(quantise.SCHEMES[scheme].pack(w)))
    assert not back[:, 3].any() and np.abs(back[:64, 4]).max() < (0.05 if scheme == "nf4" else 1e-9)
    rest = np.arange(80) > 6
    error = np.sqrt(np.mean(np.square((back - w)[:, rest])))
    assert 1e-4 < error < {"nf4": 0.1, "int8": 0.01, "fp8": 0.03}[scheme]


def test_nf4_is_nearer_than_even_steps():
    from fmjax.adapters import initial

    w = weight(1024, 64)
    error = lambda values: np.sqrt(np.mean(np.square(np.asarray(values) - w)))
    assert error(quantise.dense(quantise.pack_nf4(w))) < error(initial.int4(w))


@functools.cache
def made(scheme, family="bert", **options):
    how = dict(name=scheme, targets=MATRICES) if scheme else None
    return tiny.make(TRAIN, adapter=LORA, quantise=how, family=family, **SIZES, **options)


@functools.cache
def stepped(scheme, family="bert", scan=True, layout=None):
    """(parameters, losses) after two steps."""
    mesh = sharding.make_mesh(**dict(layout or [("data", -1)]))
    if layout is None:
        mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        run = made(scheme, family, scan=scan, mesh=mesh, dropout=0.0, attention_dropout=0.0)
        place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        current, losses = run.state(), []
        for seed in (0, 1):
            batch = {name: jax.device_put(x, place) for name, x in tiny.batch(8, seed).items()}
            current, found = run.step(current, batch)
            losses.append(float(found["loss"]))
    return paths.unstack(jax.device_get(current.params)), losses


@pytest.mark.parametrize(
    "scheme, family",
    [
        ("int8", "bert"),
        pytest.param("nf4", "bert", marks=pytest.mark.slow),
        pytest.param("nf4", "llama", marks=pytest.mark.slow),
        pytest.param("int8", "gpt2", marks=pytest.mark.slow),
        pytest.param("fp8", "bert", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_step_is_that_of_a_base_that_lost_what_quantising_loses(scheme, family):
    run, whole = made(scheme, family, dropout=0.0), made(None, family, dropout=0.0)
    start = run.state().params
    model, restored = quantise.restored(run.model, start)
    assert model == whole.model.clone(stacks=model.stacks)
    start_whole = whole.state(params=paths.restack(restored, whole.model.stacks))
    one, other = run.state(), start_whole
    for seed in (0, 1):
        one, found = run.step(one, tiny.batch(8, seed))
        other, wanted = whole.step(other, tiny.batch(8, seed))
        np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-6)
    before, got, wanted = (
        paths.unstack(jax.device_get(x)) for x in (start, one.params, other.params)
    )
    for name in (name for name in got if "/lora_" in name):
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-6, err_msg=name)
    moved = [name for name in got if not np.array_equal(got[name], before[name])]
    assert moved and all("/lora_" in name for name in moved)


LAYOUTS = (("data", 1), ("fsdp", 8)), (("data", 2), ("fsdp", 2), ("tensor", 2))


@pytest.mark.parametrize(
    "scheme, layout, family",
    [
        pytest.param("nf4", LAYOUTS[0], "bert", marks=pytest.mark.slow),
        pytest.param("nf4", LAYOUTS[1], "bert", marks=pytest.mark.slow),
        pytest.param("nf4", LAYOUTS[1], "llama", marks=pytest.mark.slow),
        *(pytest.param("int8", layout, "bert", marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
    ids=str,
)
def test_any_layout_gives_the_same_numbers(scheme, layout, family):
    params, losses = stepped(scheme, family, layout=layout)
    wanted, wanted_losses = stepped(scheme, family)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
    for name, leaf in params.items():
        np.testing.assert_allclose(
            leaf.astype(np.float32), wanted[name].astype(np.float32), atol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_stacking_changes_no_number():
    (params, losses), (wanted, wanted_losses) = stepped("nf4", scan=False), stepped("nf4")
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
    assert params.keys() == wanted.keys()
    for name, leaf in params.items():
        np.testing.assert_allclose(
            leaf.astype(np.float32), wanted[name].astype(np.float32), atol=1e-6, err_msg=name
        )


def test_a_step_keeps_no_whole_matrix():
    """What the temporaries of a deeper model have more is less than one of its layers' matrices."""

    def temporaries(depth):
        run = tiny.make(
            TRAIN, adapter=LORA, quantise=dict(name="nf4", targets=MATRICES),
            width=256, mlp=1024, depth=depth, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        lowered = run.step.lower(run.abstract, jax.eval_shape(lambda: tiny.batch(1)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    layer = 4 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert temporaries(6) - temporaries(2) < 0.2 * layer


@pytest.mark.slow
def test_dora_over_a_quantised_base_starts_as_the_base():
    dora = LORA | dict(dora=True)
    how = dict(name="nf4", targets=MATRICES)
    run = tiny.make(TRAIN, adapter=dora, quantise=how, **SIZES)
    arrays = [tiny.batch(2)[name] for name in ("input_ids", "segment_ids", "positions")]
    encode = lambda model, params: model.apply(
        {"params": params}, *arrays, jnp.zeros_like(arrays[0]), method="encode"
    )
    params = run.state().params
    base = adapters.wrapper.Adapted(adapters.base(run.model), run.model.model.adapter)
    same = adapters.merge.separate(params)[0]
    np.testing.assert_allclose(encode(run.model, params), encode(base, same), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(name="nf4", targets=r"block_.*/attn/.*"), "cuts the 48 inputs of block_00/attn"),
        (dict(name="int8", targets=r"embed/token"), r"cannot be adapted: embed/token \(Embedding"),
        (dict(name="int8", targets=r"blocks/.*"), "config.quantise.targets: 'blocks/.*' decides"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised(how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.make(TRAIN, adapter=LORA, quantise=how, width=48, mlp=64)


def test_what_is_quantised_does_not_train():
    groups = ((r".*/query/kernel.*|.*/lora_.", "train"), (".*", "freeze"))
    with pytest.raises(ConfigError, match="keeps block_00/attn/query/kernel in a few bits, but"):
        tiny.make(groups, adapter=LORA, quantise=dict(name="nf4", targets=MATRICES), **SIZES)


def test_a_bias_and_the_dtype_are_the_modules_own():
    module = layers.Linear(3, dtype=jnp.bfloat16)
    kernel, x = weight(64, 3), weight(5, 64, seed=1)

    class One(layers.nn.Module):
        def example(self):
            return (jnp.ones((1, 64)),)

        @layers.nn.compact
        def __call__(self, x):
            return layers.Linear(3, dtype=jnp.bfloat16, name="out")(x)

    model = quantise.wrap(One(), name="int8", targets="out")
    bias = jnp.array([1.0, -2.0, 3.0])
    params = {"out": {"kernel": quantise.SCHEMES["int8"].pack(kernel), "bias": bias}}
    whole = {"kernel": quantise.dense(params["out"]["kernel"]), "bias": bias}
    y = model.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, module.apply({"params": whole}, x))


# --- from a folder into few bits, through a run, and out again ---


def test_a_folder_is_quantised_while_it_is_loaded(tmp_path):
    """To the same bits as the whole would be."""
    model = bert.Model("tiny", **tiny.SIZES | SIZES)
    params = param_init.init_params(model, jax.random.key(3))
    convert.export(tmp_path / "hf", model, params)
    wrapped = lora.wrap(
        quantise.wrap(model, name="nf4", targets=MATRICES), targets=((MATRICES, 2),)
    )
    wrapped = wrapped.clone(stacks=(3,))
    abstract = param_init.abstract_params(wrapped, sharding.make_mesh(data=1, fsdp=8))
    fresh = lambda: param_init.init_params(wrapped, jax.random.key(0))
    loaded, report = convert.load(
        tmp_path / "hf", abstract, may_miss=pretrained.FRESH,
        packings=adapters.packings(wrapped), initial=fresh,
    )  # fmt: skip
    assert all("/lora_" in name for name in report.kept) and not report.unused
    wanted = paths.unstack(wrapped.model.add(paths.restack(params, (3,)), jax.random.key(0)))
    got = paths.unstack(loaded)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert loaded["blocks_00_02"]["attn"]["query"]["kernel"]["codes"].sharding.spec[1] == "fsdp"
    cut = bert.Model("tiny", **tiny.SIZES | dict(width=128, mlp=128))
    narrow = quantise.wrap(cut, name="nf4", targets=MATRICES)
    with pytest.raises(CheckpointError, match=r"\(128,\) in the model, \(64,\) in the files"):
        convert.load(
            tmp_path / "hf", param_init.abstract_params(narrow, sharding.make_mesh()),
            packings=adapters.packings(narrow),
        )  # fmt: skip


@pytest.fixture(scope="module")
def config(home, encoder):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", "--config.adapter.rank=2"]
    words += ["--config.objectives.classify.pool=first", "--config.total=8"]
    return load("finetune_qlora.py", *words, "--config.quantise.name=int8")


@pytest.fixture(scope="module")
def adapted(home, config):  # noqa: F811
    train.run(config, home / "quantised")
    return home / "quantised"


def test_a_run_opens_as_it_was_trained_and_merges_into_a_whole_model(adapted):
    opened = pretrained.open_folder(str(adapted), sharding.make_mesh())
    codes = [n for n, x in paths.unstack(opened.params).items() if x.dtype == jnp.int8]
    assert len(codes) == len(adapters.packings(opened.model)) > 0
    model, params = adapters.merged(opened.model, opened.params)
    assert model == adapters.base(opened.model)
    arrays = [tiny.batch(2)[name] for name in ("input_ids", "segment_ids", "positions")]
    arrays.append(jnp.zeros_like(arrays[0]))
    encode = lambda model, params: model.apply({"params": params}, *arrays, method="encode")
    np.testing.assert_allclose(
        encode(model, params), encode(opened.model, opened.params), atol=2e-5
    )


@pytest.mark.slow
def test_an_export_says_how_near_it_is_and_refuses_what_is_not(adapted, tmp_path, capsys):
    words = [f"--config.folder={adapted}", f"--config.output={tmp_path}/one"]
    export.run(configs.load(str(ROOT / "configs/export.py"), words), tmp_path)
    told = capsys.readouterr().out
    assert re.search(r"KL\(merged \|\| unmerged\).*classify \S+e-\d\d", told)
    summary = json.loads((adapted / "summary.json").read_text())["metrics"]
    for name in ("loss", "classify/accuracy", "classify/ece"):
        before, after = re.search(rf"[:,] {name} (\S+) -> ([^\s,]+)", told).groups()
        np.testing.assert_allclose(float(before), summary[f"validation/{name}"], rtol=1e-5)
        np.testing.assert_allclose(float(after), float(before), rtol=1e-4)
    opened = pretrained.open_folder(str(adapted), sharding.make_mesh())
    model, params = adapters.merged(opened.model, opened.params)
    near = export_check.divergence(opened, model, params)["classify"]
    assert abs(near) < 1e-6
    params["head"]["classify"]["kernel"] = 2 * params["head"]["classify"]["kernel"]
    far = export_check.divergence(opened, model, params)
    assert far["classify"] > 1e-4
    with pytest.raises(ConfigError, match="Merged, the head classify gives other outputs"):
        export_check._check_merged(far, 1e-6)
    with pytest.raises(ConfigError, match="Merged, the head classify"):
        export_check._check_merged({"classify": float("nan")}, 1e-6)


def test_an_export_without_the_data_says_that_nothing_was_measured(adapted, tmp_path, capsys):
    elsewhere = shutil.copytree(adapted, tmp_path / "run")
    saved = json.loads((elsewhere / "config.json").read_text())
    saved["data"]["train"] = "gone.tsv"
    (elsewhere / "config.json").write_text(json.dumps(saved))
    words = [f"--config.folder={elsewhere}", f"--config.output={tmp_path}/one"]
    export.run(configs.load(str(ROOT / "configs/export.py"), words), tmp_path)
    told = capsys.readouterr().out
    assert re.search("not measured on the run's validation split: .*gone.tsv", told)
    assert "bit by bit" in told


@pytest.mark.slow
def test_a_start_says_what_was_lost(adapted, home, encoder, tmp_path, capsys):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", "--config.total=1"]
    name = "--config.quantise.name=int8"
    train.run(load("finetune_qlora.py", *words, name), tmp_path / "run")
    assert re.search(
        r"\d+ matrices in int8: 0\.\d+ % of their norm is lost .*block_0", capsys.readouterr().out
    )


@pytest.mark.slow
def test_another_run_starts_from_it_only_as_it_is(adapted, home, config, tmp_path):  # noqa: F811
    words = [*files(home), f"--config.init={adapted}", "--config.total=2"]
    words += ["--config.adapter.rank=2"]
    with pytest.raises(ConfigError, match="has a quantised base: set config.quantise as in its"):
        train.run(load("finetune_lora.py", *words), tmp_path / "whole")
    with pytest.raises(ConfigError, match="has a quantised base"):
        name = "--config.quantise.name=fp8"
        train.run(load("finetune_qlora.py", *words, name), tmp_path / "other")
    name = "--config.quantise.name=int8"
    train.run(load("finetune_qlora.py", *words, name), tmp_path / "same")
    before, after = (
        paths.unstack(pretrained.open_folder(str(path), sharding.make_mesh()).params)
        for path in (adapted, tmp_path / "same")
    )
    assert all(np.array_equal(before[n], after[n]) for n in before if n.endswith("/codes"))


def test_the_line_on_what_was_lost_is_of_all_matrices_and_the_worst():
    """0.125, 1.5, 2 and 7 % are lost: the median is 1.75 %."""
    lost = {"a": 0.015, "b": 0.07, "c": 0.00125, "d": 0.02}
    assert initialize._told(lost, "nf4") == (
        "4 matrices in nf4: 1.8 % of their norm is lost (the median), most of "
        "b (7 %), d (2 %), a (1.5 %)"
    )


def test_its_adapter_goes_with_the_base_it_was_made_for(adapted, tmp_path, capsys):
    words = [f"--config.folder={adapted}", "--config.merge=False", f"--config.output={tmp_path}/a"]
    export.run(configs.load(str(ROOT / "configs/export.py"), words), tmp_path)
    assert capsys.readouterr().out.endswith(
        "\nThe run's base was kept in int8: over the base in full precision the adapter gives "
        "outputs a little different. With config.merge=True the difference is measured.\n"
    )
    opened = pretrained.open_folder(str(adapted), sharding.make_mesh())
    base = {n: x for n, x in paths.unstack(opened.params).items() if "/lora_" not in n}
    model, params = peft.read(
        tmp_path / "a", opened.model.model, paths.stack(base, opened.model.stacks)
    )
    one, other = paths.unstack(params), paths.unstack(opened.params)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    codes = next(name for name in base if name.endswith("/codes"))
    wrong = base | {codes: -base[codes]}
    with pytest.raises(CheckpointError, match="was made for another base"):
        peft.read(tmp_path / "a", opened.model.model, paths.stack(wrong, opened.model.stacks))


@pytest.mark.slow
def test_a_whole_base_is_the_right_one_if_its_codes_are(tmp_path):
    """At sizes where the order of a sum changes its bits, from a folder as a run has it."""
    model = bert.Model("tiny", **tiny.SIZES | dict(width=768, mlp=1024)).clone(stacks=(3,))
    base = param_init.init_params(model, jax.random.key(3))
    convert.export(tmp_path / "hf", model, base)
    nf4 = quantise.wrap(model, name="nf4", targets=MATRICES)
    adapted = lora.wrap(nf4, targets=((MATRICES, 2),))
    params, _ = convert.load(
        tmp_path / "hf", param_init.abstract_params(adapted, sharding.make_mesh()),
        may_miss=pretrained.FRESH, packings=adapters.packings(nf4),
        initial=lambda: param_init.init_params(adapted, jax.random.key(1)),
    )  # fmt: skip
    peft.write(tmp_path / "a", adapted, params)
    peft.read(tmp_path / "a", model, base)
    other = paths.map_names(lambda _, x: 1.5 * x, base)
    with pytest.raises(CheckpointError, match="was made for another base"):
        peft.read(tmp_path / "a", model, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_matrix_counts_as_it_was(scheme):
    whole, few = made(None), made(scheme)
    number = adapters.parameters(whole.model, whole.abstract.params)
    assert number == paths.size(whole.abstract.params)
    assert adapters.parameters(few.model, few.abstract.params) == number


def test_names_of_the_base_stay():
    model = bert.Model("tiny", **tiny.SIZES | SIZES)
    plain = set(paths.unstack(param_init.abstract_params(model)))
    wrapped = quantise.wrap(model, name="nf4", targets=MATRICES)
    found = set(paths.unstack(param_init.abstract_params(wrapped.clone(stacks=(3,)))))
    parts = set(adapters.packings(wrapped))
    assert {name for name in found if name.rpartition("/")[0] not in parts} == plain - parts
    ends = itertools.product(parts, ("codes", "absmax", "scales", "mean"))
    assert {f"{name}/{part}" for name, part in ends} <= found


@pytest.mark.parametrize("source", ["folder", pytest.param("run", marks=pytest.mark.slow)])
@pytest.mark.parametrize("init, dora", [("loftq", False), ("pissa", False), ("loftq", True)])
def test_an_adapter_that_starts_from_what_quantising_loses(init, dora, source, tmp_path, encoder):  # noqa: F811
    """Base and adapter together are nearer to the weights than the base alone would be."""
    if source == "folder":
        model = bert.Model("tiny", **tiny.SIZES | SIZES)
        params = param_init.init_params(model, jax.random.key(3))
        convert.export(tmp_path / "hf", model, params)
        name, wanted = str(tmp_path / "hf"), paths.unstack(params)
    else:
        opened = pretrained.open_folder(str(encoder), sharding.make_mesh())
        model, wanted, name = opened.model, paths.unstack(opened.params), str(encoder)
    attention = r"block_.*/attn/.*"
    how = dict(name="int8" if source == "run" else "nf4", targets=attention)
    wrapped = quantise.wrap(model.clone(stacks=None), **how)
    wrapped = lora.wrap(wrapped, targets=((attention, 4),), init=init, dora=dora)
    config = SimpleNamespace(
        init=name, new_head=False, objectives={}, seed=0, quantise=SimpleNamespace(name="nf4")
    )
    params = initialize.initial(
        config, wrapped, param_init.abstract_params(wrapped, sharding.make_mesh())
    ).params
    found = paths.unstack(adapters.merged(wrapped, params)[1])
    path = "block_00/attn/query/kernel"
    error = lambda x: np.linalg.norm(np.asarray(x) - np.asarray(wanted[path]))
    plain = quantise.dense(quantise.SCHEMES[how["name"]].pack(jnp.asarray(wanted[path])))
    assert 0 < error(found[path]) < (1.0 if source == "run" else 0.95) * error(plain)
    assert np.abs(paths.unstack(params)["block_00/attn/query/lora_b"]).max() > 0
