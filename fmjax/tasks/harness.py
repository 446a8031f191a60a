"""Models in lm-evaluation-harness (Gao et al. 2023): its tasks, prompts and metrics over our runs.

    pip install lm-eval
    python run.py --config=configs/harness.py --config.folder=runs/clm-… --config.tasks="('mine',)"

Masked models are judged by their pseudo-log-likelihood, which the harness itself does not have.
Only this file needs the package.
"""

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.data import chat, vocabulary
from fmjax.data import tokenizer as tokenizers
from fmjax.distributed import launch
from fmjax.errors import ConfigError
from fmjax.evaluation import scoring
from fmjax.evaluation.results_log import ResultsLog
from fmjax.generation import conversations, text_generator
from fmjax.generation.sampling import Sampling
from fmjax.io import metrics_log

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(
        "config.task='harness' needs lm-evaluation-harness: pip install lm-eval; "
        "configs/fewshot.py does without."
    ) from error

FILE = "harness.jsonl"
# Of the harness's settings of generation, ours of the same meaning.
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LENGTH = 256  # tokens of an answer where a task says nothing


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: `config.tasks` of the harness, or of the folder `config.include`, on the model of
    `config.folder`. Adds a line to harness.jsonl in the run folder, else in `workdir`.
    """
    with launch.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='harness' works in one process.")
        log = ResultsLog(config.folder, workdir, FILE)
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        model = Model(opened, config.batch_size, config.score)
        own = dict(include_path=config.include, include_defaults=False) if config.include else {}
        manager = TaskManager(**own)
        if unknown := sorted(set(config.tasks) - set(manager.all_tasks)):
            raise ConfigError(
                f"config.tasks: the harness has no {unknown[0]!r}. With config.include the tasks "
                f"are those of that folder: {', '.join(sorted(manager.all_tasks)[:20])}."
            )
        if dry_run:
            return
        # The harness draws its bootstrap in other processes: forked ones, beside jax's threads, can
        # wait for ever.
        multiprocessing.set_start_method("spawn", force=True)
        start = time.perf_counter()
        found = simple_evaluate(
            model=model,
            tasks=list(config.tasks),
            task_manager=manager,
            num_fewshot=config.shots,
            limit=config.limit or None,
            apply_chat_template=config.chat,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    for name, metrics in found["results"].items():
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in metrics.items() if k != "alias"))
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": opened.source,
        "step": opened.step,
        "seconds": time.perf_counter() - start,
        "results": json.loads(json.dumps(metrics_log.plain(found["results"]), default=str)),
    }
    log.append(record)


class Model(TemplateLM):
    """A model of a folder as the harness wants one."""

    def __init__(self, opened: pretrained.Opened, batch_size: int = 32, way: str = "token"):
        super().__init__()
        self.opened, self.batch_size = opened, batch_size
        self.tokenizer = tokenizers.load(opened.tokenizer)
        self.scorer = scoring.scorer_of(opened, self.tokenizer, batch_size, way)
        self.masked = not opened.model.causal and not opened.model.decodes
        self.backend = "seq2seq" if opened.model.decodes else "causal"
        begins = self.scorer.first or self.scorer.last
        if not begins:
            raise ConfigError("the tokenizer has no token that begins or ends a text.")
        self._begins = begins[0]
        self._put: list[int] = []  # before each text by the tokenizer, as in transformers
        if opened.model.causal:
            self._put = list(vocabulary.frame(self.tokenizer.backend_tokenizer)[0])
            self.scorer.first = []  # a context has it from `tok_encode`
        self._author = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return (self.scorer.last or [self._begins])[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text without a context."""
        return self._begins

    @property
    def max_length(self) -> int:
        """Tokens of a row."""
        return self.scorer.width

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps what it has tokenised."""
        return str(self.opened.tokenizer).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text. Where nothing is said of special ones, that of a decoder has those that
        its tokenizer puts before a text, unless it begins so already, as by a chat template.
        `Scorer` puts them around the texts of other models."""
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self._begins]))
            return self._ids(string, False) if begun else [*self._put, *self._ids(string, False)]
        return self._ids(string, add_special_tokens)

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, by the template that the run was trained with, else by
        the tokenizer's own, else by "plain"."""
        _, _, reader = conversations.template_of(self.opened, self.tokenizer)
        try:
            if add_generation_prompt:
                return reader.turns.text(chat_history, add_generation_prompt=True)
            return reader.turns.unfinished(chat_history)
        except chat.Unfit as error:
            raise ConfigError(f"config.chat=True: a conversation of a task: {error}.") from error

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple]:
        """(log probability, whether it is greedy) of each continuation after its context."""
        if not self.masked:
            return super().loglikelihood(requests, disable_tqdm)
        pairs = [request.args for request in requests]
        encode = lambda pair: (
            self._encode_pair(*pair) if pair[0] else ([], self.tok_encode(pair[1]))
        )
        return self._loglikelihood_tokens([(pair, *encode(pair)) for pair in pairs])

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs: Any) -> list[tuple]:
        found = self.scorer([(context, said) for _, context, said in requests])
        return [(-one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log probability of each whole text."""
        before = [] if self.masked else [self._begins]
        pairs = [(before, self.tok_encode(request.args[0])) for request in requests]
        return [-one.nats for one in self.scorer(pairs)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of the texts that end it."""
        answers: dict[int, str] = {}
        kind = lambda i: json.dumps(requests[i].args[1], sort_keys=True, default=str)
        for _, same in itertools.groupby(sorted(range(len(requests)), key=kind), key=kind):
            same = sorted(same, key=lambda i: len(requests[i].args[0]))
            for first in range(0, len(same), self.batch_size):
                batch = same[first : first + self.batch_size]
                texts = self._written(
                    [requests[i].args[0] for i in batch], requests[batch[0]].args[1]
                )
                answers |= dict(zip(batch, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _written(self, contexts: list[str], how: dict[str, Any]) -> list[str]:
        if self._author is None:
            self._author = text_generator.TextGenerator(
                self.opened, (self.eot_token_id,), alone=True
            )
        author = self._author
        length = int(how.get("max_gen_toks", how.get("max_new_tokens", LENGTH)))
        until = how.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        given = {key: how[key] for key in SETTINGS if how.get(key) is not None}
        if not how.get("do_sample", given.get("temperature", 0) > 0):
            given["temperature"] = 0.0
        room = text_generator.room(self.opened.model, self.scorer.width) - length
        if self.backend == "seq2seq":
            room = self.scorer.width
        if room < 1:
            raise ConfigError(f"a task asks for {length} tokens, and a row has {self.max_length}.")
        prompts = []
        for context in contexts:
            last = self.scorer.last if self.backend == "seq2seq" else []
            ids = self.tok_encode(context) or [self._begins]
            prompts.append([*ids[-(room - len(last)) :], *last])
        return author.each(prompts, length, Sampling(**given), stop)
