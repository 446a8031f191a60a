"""Data and the model that is to read them. What data may not hold is tested in ../data."""

import pytest
from common import ROOT
from tiny import VOCAB

from fmjax import build
from fmjax.config import load as configs
from fmjax.errors import ConfigError


def test_row48_a_model_with_fewer_rows_than_the_tokenizer_has_words_is_refused():
    config = lambda size: configs.load(
        str(ROOT / "configs" / "mlm.py"), [f"--config.model.vocab_size={size}"]
    )
    facts = dict(target="", labels=(), vocab=VOCAB, vocab_size=4096)
    with pytest.raises(ConfigError, match=r"config.model.vocab_size=4095 is .* tokenizer's 4096"):
        build.model(config(4095), facts)
    assert build.model(config(4200), facts).cfg.vocab_size == 4200
