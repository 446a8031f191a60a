"""Fine-tuning to the end, beside transformers (+ peft) on torch: the same files, model and
hyperparameters, several seeds.

    python benchmarks/finetune_quality.py --model=<HF folder> --task=classify \\
        --train=SST-2/train.tsv --validation=SST-2/dev.tsv --columns=sentence --examples=3200

Needs torch, peft and accelerate. Ours is `python run.py` as a user types it, theirs the Trainer.
Both have AdamW (0.9, 0.999, 1e-8), weight decay 0.01 on matrices, a linear schedule with 10 %
warm-up, gradients clipped at 1, the dropout of the model, and the head that transformers has for
the task. Order, dropout and the head's first values are drawn by each for itself, so numbers agree
within the noise of the seed; printed are mean and standard deviation over the seeds. Methods other
than full and lora are ours alone; `features` is scikit-learn's logistic regression on the mean of
the frozen model's last states. Minutes are those of a seed on average, with evaluation, import and
compilation; ours keeps prepared data and compiled programs for the next seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {  # what follows "configs/finetune", and the task
    "full": (".py", ""),
    "lora": ("_lora.py", ""),
    "qlora": ("_qlora.py", ""),
    "last2": ("_last.py", ",layers=2"),
    "head": ("_head.py", ""),
    "ia3": ("_ia3.py", ""),
    **{kind: ("_adapter.py", f",kind={kind}") for kind in ("houlsby", "pfeiffer", "parallel")},
    **{
        kind: ("_prompt.py", f",kind={kind}")
        for kind in ("prompt", "mlp", "lstm", "prefix", "projected")
    },
}
METRICS = {
    "classify": ("accuracy",),
    "regress": ("spearman",),
    "tag": ("f1",),
    "span": ("exact_match", "f1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="folder in Hugging Face format")
    parser.add_argument("--task", choices=METRICS, default="classify")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", default="", help="else a share of --train, by its text")
    parser.add_argument("--columns", default="")
    parser.add_argument("--label", default="")
    parser.add_argument("--examples", type=int, default=0, help="only the first, 0 = all")
    parser.add_argument("--methods", default="full,lora", help=f"of {','.join(CONFIGS)},features")
    parser.add_argument("--lr", default="5e-5,5e-4", help="of each method")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", default="ours,theirs")
    flags = parser.parse_args()
    for key in ("model", "train", "validation"):  # ours is run from elsewhere
        if os.path.exists(getattr(flags, key)):
            setattr(flags, key, os.path.abspath(getattr(flags, key)))
    if "features" in flags.methods and flags.task != "classify":
        parser.error("features are for --task=classify")
    rates = dict(zip(flags.methods.split(","), flags.lr.split(","), strict=True))
    print(f"{'':9} {'':6} {'lr':>7} {'minutes':>8}  mean ± deviation (each seed)", flush=True)
    for method, rate in rates.items():
        for side in flags.sides.split(","):
            if side == "theirs" and method not in ("full", "lora"):
                continue
            seeds = range(1 if method == "features" else flags.seeds)  # which draws nothing
            start = time.time()
            found = [globals()[side](method, rate, seed, flags) for seed in seeds]
            minutes = (time.time() - start) / len(found) / 60
            print(f"{method:9} {side:6} {rate:>7} {minutes:8.1f}  {spread(found)}", flush=True)


def spread(found: list[dict[str, float]]) -> str:
    parts = []
    for name in found[0]:
        each = [100 * metrics[name] for metrics in found]
        deviation = f" ± {statistics.stdev(each):.1f}" if len(each) > 1 else ""
        told = ", ".join(f"{value:.1f}" for value in each)
        parts.append(f"{name} {statistics.mean(each):.1f}{deviation} ({told})")
    return "; ".join(parts)


def data_flags(flags: argparse.Namespace) -> list[str]:
    """What the config of every task takes."""
    given = {key: getattr(flags, key) for key in ("train", "validation", "columns", "label")}
    given |= {"seq_len": flags.seq, "max_documents": flags.examples}
    return [f"--config.data.{key}={value}" for key, value in given.items() if value]


def ours(method: str, rate: str, seed: int, flags: argparse.Namespace) -> dict[str, float]:
    """The metrics of one run of ours after its last step."""
    with tempfile.TemporaryDirectory() as folder:
        if method == "features":
            given = ["--config=configs/probe.py", f"--config.folder={flags.model}"]
        else:
            file, kind = CONFIGS[method]
            given = [
                f"--config=configs/finetune{file}:{flags.task}{kind}",
                *(f"--config.init={flags.model}", f"--config.seed={seed}"),
                *(f"--config.total={flags.epochs} epochs", f"--config.batch_size={flags.batch}"),
                *(f"--config.optim.lr={rate}", "--config.optim.args.eps=1e-8"),
                "--config.optim.decay=.*/(kernel|embedding|lora_.)",
                *("--config.eval_every=0", "--config.save_every=0"),
            ]
            if flags.task in ("classify", "regress"):
                given.append(f"--config.objectives.{flags.task}.pool=first")
        workdir = Path(folder, "run")
        command = [sys.executable, "run.py", *given, *data_flags(flags), f"--workdir={workdir}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(Path(workdir, "summary.json").read_text())["metrics"]
    return {name: found[f"validation/{flags.task}/{name}"] for name in METRICS[flags.task]}


def theirs(method: str, rate: str, seed: int, flags: argparse.Namespace) -> dict[str, float]:
    """The same of transformers' Trainer."""
    import peer_tasks
    import peft
    import transformers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(seed)
    task = peer_tasks.make(flags.task, flags.model, flags.seq, examples(flags))
    model = task.model
    if method == "lora":
        linear = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
        heads = ["classifier", "qa_outputs", "pooler"]
        saved = [name for name, _ in model.named_modules() if name.split(".")[-1] in heads]
        adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules=linear, modules_to_save=saved)
        model = peft.get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=flags.epochs,
            per_device_train_batch_size=flags.batch,
            per_device_eval_batch_size=64,
            learning_rate=float(rate),
            weight_decay=0.01,
            warmup_steps=0.1,  # below 1: a share of the steps
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=task.train, data_collator=task.collate
        )
        trainer.train()
        return task.score(trainer.predict(task.validation).predictions)


def examples(flags: argparse.Namespace) -> dict[str, list[list]]:
    """{split: [[column, …, label]]}, the records as our reader gives and splits them."""
    from fmjax.config import load
    from fmjax.data import settings, sources

    file = ROOT / "configs" / f"finetune.py:{flags.task}"
    data = load.load(str(file), data_flags(flags)).data.to_dict()
    chosen = settings.read(settings.DataSettings, data, "data")
    columns = [*chosen.column_names, chosen.label]
    found: dict[str, list[list]] = {"train": [], "validation": []}
    for document in sources.read(chosen, print).documents():
        found[document.split].append([document.fields[column] for column in columns])
    return found


if __name__ == "__main__":
    main()
