"""Unrolled layers against PyTorch's kernels, and ∂L/∂h_t against slow loops and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence

from gradflow.errors import ModelInputError
from gradflow.functional import hidden_gradients, levels_of, unroll
from gradflow.functional.recurrent.unroll import Layout, given_state, track_gradients

from .models import LAYERS, layer, looped, weighed

KINDS = ["tanh", "relu", "lstm", "gru"]
WIRINGS = {"one": (1, False), "two levels": (2, False), "both directions": (2, True)}


def inputs(steps: int = 6, samples: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(steps, samples, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first_state(module: nn.RNNBase, samples: int = 3) -> Any:
    torch.manual_seed(2)
    levels = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(levels, samples, module.proj_size or module.hidden_size, dtype=torch.float64)
    if not isinstance(module, nn.LSTM):
        return h
    return h, torch.randn(levels, samples, module.hidden_size, dtype=torch.float64)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_kernel(name: str, wiring: str) -> None:
    num_layers, bidirectional = WIRINGS[wiring]
    module = layer(name, num_layers=num_layers, bidirectional=bidirectional)
    hx, x = first_state(module), inputs().requires_grad_()
    result = module(x, hx)
    last = result[1] if isinstance(result[1], tuple) else (result[1],)
    own = inputs().requires_grad_()
    unrolled = unroll(levels_of(module), own, given_state(Layout(), hx, torch.float64))
    torch.testing.assert_close(unrolled.output, result[0], rtol=0, atol=1e-10)
    for a, b in zip(unrolled.last, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    (expected,) = torch.autograd.grad(weighed(result), x, retain_graph=True)
    h_n = unrolled.last if len(last) > 1 else unrolled.last[0]
    (found,) = torch.autograd.grad(weighed((unrolled.output, h_n)), own, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # the gradient at the drive, summed over steps with what entered, is that of the input weights
    cotangents = torch.autograd.grad(weighed(result), [result[0], *last], retain_graph=True)
    gradients = track_gradients(unrolled, cotangents[0], cotangents[1:])
    weights = [p for n, p in module.named_parameters() if n.startswith("weight_ih")]
    per_weight = torch.autograd.grad(weighed(result), weights)
    entering = own
    for i, (track, gradient) in enumerate(zip(unrolled.tracks, gradients, strict=True)):
        if track.level.index == 0:
            summed = torch.einsum("tbg,tbi->gi", gradient.drive, entering)
            torch.testing.assert_close(summed, per_weight[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("given", [False, True], ids=["zero state", "given state"])
@pytest.mark.parametrize("name", KINDS)
def test_hidden_gradients_are_those_of_a_loop_over_cells(name: str, given: bool, wiring: str) -> None:
    num_layers, bidirectional = WIRINGS[wiring]
    module = layer(name, num_layers=num_layers, bidirectional=bidirectional)
    hx = first_state(module) if given else None
    output, last, every = looped(module, inputs(), hx)
    kernel = module(inputs(), hx)
    torch.testing.assert_close(output, kernel[0])
    expected = torch.autograd.grad(weighed((output, last)), [h for steps in every for h in steps])
    found = hidden_gradients(module, inputs(), weighed, hx)
    assert list(found) == [level.name for level in levels_of(module)]
    flat = torch.stack(expected).reshape(len(every), len(output), *expected[0].shape)
    for gradient, reference in zip(found.values(), flat, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_hidden_gradients_are_those_of_central_differences(name: str) -> None:
    """The rest of the loss as a function of h_t of the lower level, the upper one behind it, c_t held."""
    module = layer(name, num_layers=2)
    x = inputs(5, 2)
    found = hidden_gradients(module, x, weighed)["l0"]
    levels, t = levels_of(module), 2
    track = unroll(levels, x).tracks[0]

    def loss(h: Tensor) -> Tensor:
        state = (h, *track.after[t][1:])
        rest = unroll(levels[:1], x[t + 1 :], tuple(part[None] for part in state))
        lower = torch.cat([torch.stack([s[0] for s in track.after[:t]]), h[None], rest.output])
        upper = unroll(levels[1:], lower)
        last = tuple(torch.stack([a[0], b[0]]) for a, b in zip(rest.last, upper.last, strict=True))
        return weighed((upper.output, last if len(last) > 1 else last[0]))

    h, step = track.after[t][0], 1e-6
    for index in [(0, 0), (1, 3)]:
        e = torch.zeros_like(h)
        e[index] = step
        slope = (loss(h + e) - loss(h - e)) / (2 * step)
        assert float(found[t][index]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


def test_a_projection() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2).double()
    hx = first_state(module)
    unrolled = unroll(levels_of(module), inputs(), given_state(Layout(), hx, torch.float64))
    output, (h_n, c_n) = module(inputs(), hx)
    torch.testing.assert_close(unrolled.output, output, rtol=0, atol=1e-10)
    torch.testing.assert_close(unrolled.last[0], h_n, rtol=0, atol=1e-10)
    torch.testing.assert_close(unrolled.last[1], c_n, rtol=0, atol=1e-10)
    assert levels_of(module)[0].cell.sizes == (2, 5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(name: str, bidirectional: bool) -> None:
    """Unequal lengths, unsorted: each sample by itself gives the same states and gradients."""
    module = layer(name, num_layers=2, bidirectional=bidirectional)
    parts = [inputs(n, 1, seed=n)[:, 0] for n in (2, 5, 3)]
    packed, hx = pack_sequence(parts, enforce_sorted=False), first_state(module)
    layout = Layout.of(module, packed)
    x = layout.steps(packed.data).requires_grad_()
    unrolled = unroll(levels_of(module), x, given_state(layout, hx, torch.float64), alive=layout.alive)
    output, last = module(packed, hx)
    last = last if isinstance(last, tuple) else (last,)
    assert layout.alive is not None
    mine = torch.where(layout.alive[..., None], unrolled.output, 0.0)
    torch.testing.assert_close(mine, layout.steps(output.data), rtol=0, atol=1e-10)
    for a, b in zip(unrolled.last, last, strict=True):
        torch.testing.assert_close(a, layout.states(b), rtol=0, atol=1e-10)
    ones = torch.where(layout.alive[..., None], 1.0, 0.0).expand_as(unrolled.output).double()
    gradients = track_gradients(unrolled, ones, [torch.ones_like(part) for part in unrolled.last])
    for place, sample in enumerate(packed.sorted_indices.tolist()):
        own = tuple(part[:, sample : sample + 1] for part in (hx if isinstance(hx, tuple) else (hx,)))
        alone = hidden_gradients(
            module,
            parts[sample][:, None],
            lambda r: r[0].sum() + sum(p.sum() for p in (r[1] if isinstance(r[1], tuple) else (r[1],))),
            own if len(own) > 1 else own[0],
        )
        for track, gradient in zip(unrolled.tracks, gradients, strict=True):
            length = len(parts[sample])
            h = gradient.h.flip(0) if track.level.reverse else gradient.h
            torch.testing.assert_close(h[:length, place], alone[track.level.name][:, 0])
            assert not h[length:, place].any()


def test_layouts() -> None:
    plain, first = nn.GRU(3, 4), nn.GRU(3, 4, batch_first=True)
    x = torch.randn(5, 2, 3)
    assert Layout.of(plain, x).steps(x) is x
    torch.testing.assert_close(Layout.of(first, x).steps(x), x.transpose(0, 1))
    assert Layout.of(plain, x[:, 0]).steps(x[:, 0]).shape == (5, 1, 3)
    assert Layout.of(plain, x[:, 0]).states(torch.zeros(1, 4)).shape == (1, 1, 4)
    assert Layout.of(plain, pack_sequence([x[:, 0], x[:, 1]])).alive is None  # equally long


def test_unbatched_input_and_batch_first() -> None:
    first, x = layer("gru", batch_first=True), inputs()
    plain = layer("gru")
    a = hidden_gradients(first, x.transpose(0, 1), lambda r: r[0].square().sum())["l0"]
    b = hidden_gradients(plain, x, lambda r: r[0].square().sum())["l0"]
    torch.testing.assert_close(a, b)
    alone = hidden_gradients(plain, x[:, 0], lambda r: r[0].square().sum() + r[1].sum())["l0"]
    both = hidden_gradients(plain, x[:, :1], lambda r: r[0].square().sum() + r[1].sum())["l0"]
    torch.testing.assert_close(alone, both)


def test_computed_weights_are_taken_as_computed() -> None:
    module = weight_norm(layer("tanh"), "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2.0)
    torch.testing.assert_close(unroll(levels_of(module), inputs()).output, module(inputs())[0])


def test_a_half_is_unrolled_in_float32_and_the_layer_is_left_alone() -> None:
    module = layer("lstm", torch.bfloat16)
    before = {name: p.clone() for name, p in module.named_parameters()}
    found = hidden_gradients(module, inputs().bfloat16(), lambda r: r[0].sum())
    assert found["l0"].dtype == torch.float32
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())


def test_what_is_no_recurrent_layer_is_refused() -> None:
    with pytest.raises(ModelInputError, match="expected an nn.RNN, nn.LSTM or nn.GRU .* got Linear"):
        hidden_gradients(nn.Linear(2, 2), torch.ones(1, 2), lambda r: r.sum())  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match="got GRU and PackedSequence"):
        hidden_gradients(nn.GRU(3, 4), pack_sequence([torch.ones(2, 3)]), lambda r: r)  # type: ignore
