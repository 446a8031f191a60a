"""Sentence order prediction (ALBERT, Lan et al. 2020, §3.1): are two consecutive segments in order
or swapped?

Differs from `nsp` only in how the pairs are made (`config.data.pair = "sop"`) and in its head.
"""

import functools

from fmjax.objectives import nsp


@functools.wraps(nsp.loss_fn)
def loss_fn(apply, params, batch, *, head="sop"):
    return nsp.loss_fn(apply, params, batch, head=head)
