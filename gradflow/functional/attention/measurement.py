"""Attention in any model: `attention_weights` returns it, `attention` measures it in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.attention.capture import Capture, Seen
from gradflow.functional.attention.session import AttentionSession
from gradflow.functional.measurement import Session
from gradflow.functional.model.batches import private_batch, run_model
from gradflow.functional.model.setting import Setting
from gradflow.functional.model.supported import check_model
from gradflow.functional.model.threads import measuring, uncompiled
from gradflow.functional.tap.asked import Asked
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.tapped import TappedModel
from gradflow.functional.tap.taps import tapped
from gradflow.functional.tap.watch import Watch


@attrs.frozen
class Attention:
    """The measurement of attention and of residual branches; see `attention`."""

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return AttentionSession(modules)


def attention() -> Attention:
    """Return the measurement of attention: `analyze(..., measurements=[attention()])`.

    In the steps that are looked at, every attention of the model is seen, whatever it is written with (see
    NOTE [Where attention is seen] in `gradflow.functional.attention.capture`), and so is every sum that ends
    a residual branch. The record has them as `record.transformer`: statistics of the weights by head, the
    gradient at queries, keys and values, how alike the positions are before and after, and how much each
    branch adds to its stream. Weights are taken before dropout. Those of fused attention are computed for
    some samples at a time; those of attention written out are held until they are used.

    >>> import gradflow as gf
    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> record = gf.analyze(model, [torch.randn(2, 5, 8)], lambda y: y.square().mean(),
    ...                     measurements=[attention()])
    >>> [(a.name, a.num_heads, a.entropy.shape) for a in record.transformer.attention]
    [('self_attn', 2, (1, 2))]
    """
    return Attention()


@measuring()
def attention_weights(model: nn.Module, batch: Any, *, seed: int | None = None) -> dict[str, Tensor]:
    """Return the attention weights of every attention layer of a model at a batch.

    The model runs once, without gradients and in the modes it is in. Pure: everything of the model's and
    every random state is put back, also when it raises.

    Args:
        model: the model.
        batch: what the model takes, without a target: a tensor, a tuple `model(*batch)` or a mapping.
        seed: seeds torch, numpy and Python for the run; None goes on from the present states.

    Returns:
        By the qualified name of the innermost module that computes it (`h.0.attn`; `h.0.attn@1` for a second
        one in a run), the weights before dropout, shape (samples, heads, queries, keys): what a softmax in
        the model gave, or else computed again from queries and keys in single precision at least. Where
        samples and heads are merged in one axis, they are taken for samples. Rows in which no key is allowed
        are zero where they are computed again.

    Raises:
        ModelInputError: if `model` is no module, is lazy or is on the meta device.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> weights = attention_weights(model, torch.randn(3, 5, 8))
    >>> weights["self_attn"].shape, weights["self_attn"].sum(-1).allclose(torch.ones(3, 2, 5))
    (torch.Size([3, 2, 5, 5]), True)
    """
    check_model(model)
    batch = private_batch(model, batch)
    found: dict[str, Tensor] = {}

    def keep(seen: Seen) -> None:
        weights = torch.cat([part.weights.detach() for part in seen.parts()])
        if seen.scored is not None:  # small ones are computed in double precision
            weights = weights.to(torch.promote_types(seen.scored.query.dtype, torch.float32))
        found[seen.name] = weights.clone()

    taps, session = TappedModel.of(model), Capture(keep)
    recorder = Recorder(taps, Asked(watched=True, listeners=(session,)))
    setting = Setting.of(model, parameters={}, seed=seed)
    with (
        torch.inference_mode(False), torch.no_grad(), setting.evaluating(), uncompiled(), tapped(taps),
        taps.heard_by(recorder), Watch(recorder),
    ):  # fmt: skip
        session.begin(0, recorder)
        run_model(model, batch)
    return found
