"""BOTTLENECK where a code is drowned by its noise; healthy where it tells something, or is about to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import gradflow as gf
from gradflow.detect import drowned_codes

BASIS = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))


class Coder(nn.Module):
    """A variational autoencoder that draws its code by hand or by a distribution."""

    def __init__(self, how: str = "hand") -> None:
        super().__init__()
        self.how, self.noise, self.given = how, torch.empty(0), torch.empty(0)
        self.enc, self.mean, self.log_scale = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.dec = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 20))

    def draw(self, mean: Tensor, scale: Tensor) -> Tensor:
        if self.how == "distribution":
            return Normal(mean, scale).rsample()
        noise = torch.randn_like(mean)
        return torch.addcmul(mean, noise, scale) if self.how == "addcmul" else mean + noise * scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.enc(x).tanh()
        mean, log_scale = self.mean(h), self.log_scale(h)
        z = self.draw(mean, log_scale.exp())
        self.noise, self.given = (z - mean).detach(), mean.detach()
        return self.dec(z), mean, log_scale


def trained(weight: float, *, how: str = "hand", before: int = 150) -> gf.Report:
    """Return the report on an autoencoder whose KL term has a weight, after some steps of training."""
    torch.manual_seed(0)
    model = Coder(how)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    held: list[Tensor] = []

    def batch() -> Tensor:
        held[:] = [torch.randn(64, 3) @ BASIS]
        return held[0]

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        again, mean, log_scale = output
        kl = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1).mean()
        return F.mse_loss(again, held[0]) + weight * kl

    for _ in range(before):
        optimizer.zero_grad()
        x = batch()
        loss(model(x)).backward()
        optimizer.step()
    return gf.diagnose(model, batch, loss, steps=10, optimizer=optimizer)


def drowned(report: gf.Report) -> list[str]:
    return [issue.layer for issue in drowned_codes()(report.record)]


@pytest.mark.parametrize("how", ["hand", "addcmul", "distribution"])
def test_a_posterior_that_has_collapsed(how: str) -> None:
    report = trained(50.0, how=how)
    assert drowned(report) == ["mean"]
    assert (report.causes[0].issue_type.value, report.causes[0].layer) == ("BOTTLENECK", "mean")


def test_a_code_that_tells_something() -> None:
    report = trained(0.01)
    (found,) = report.record.parts.draws
    assert found.signal[-1] > found.noise[-1]
    assert not drowned(report)


@pytest.mark.parametrize("weight", [0.01, 50.0])
def test_a_fresh_model(weight: float) -> None:
    assert not drowned(trained(weight, before=0))


class Slots(nn.Module):
    """Slots start at random round a mean that is a parameter, and each takes its share of what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.enc = nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(20, 8)
        self.dec = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.mean + torch.randn(len(x), 4, 8)
        given = self.enc(x)[:, None]
        return self.dec((1e-3 * given * slots).sum(1))


def test_a_random_start_that_no_sample_enters_is_no_code() -> None:
    torch.manual_seed(0)
    model = Slots()
    held: list[Tensor] = []

    def batch() -> Tensor:
        held[:] = [torch.randn(32, 20)]
        return held[0]

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, batch, lambda y: F.mse_loss(y, held[0]), steps=10, optimizer=optimizer)
    assert all(found.signal.max() == 0 for found in report.record.parts.draws)
    assert not drowned(report)


def test_signal_and_noise_are_their_root_mean_squares() -> None:
    torch.manual_seed(0)
    model = Coder()
    x = torch.randn(16, 20)
    record = gf.analyze(model, [x], lambda y: y[0].square().mean())
    (found,) = record.parts.draws
    torch.manual_seed(0)
    model = Coder()
    torch.randn(16, 20)
    model(x)
    assert found.layer == "mean"
    assert found.signal[0] == pytest.approx(float(model.given.std(0, correction=0).square().mean().sqrt()))
    assert found.noise.shape == (1,)
    assert found.noise[0] == pytest.approx(float(model.noise.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("rate", [3e-3, 1e-2])
@pytest.mark.parametrize(("weight", "lost"), [(100.0, True), (30.0, True), (0.1, False), (1e-3, False)])
def test_a_posterior_that_collapses_within_the_run(weight: float, lost: bool, rate: float) -> None:
    torch.manual_seed(0)
    model, held = Coder(), list[Tensor]()

    def batch() -> Tensor:
        held[:] = [torch.randn(64, 3) @ BASIS]
        return held[0]

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        again, mean, log_scale = output
        kl = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1).mean()
        return F.mse_loss(again, held[0]) + weight * kl

    optimizer = torch.optim.Adam(model.parameters(), rate)
    assert bool(drowned(gf.diagnose(model, batch, loss, steps=30, optimizer=optimizer))) == lost


class Faint(nn.Module):
    """An autoencoder of pictures, whose encoder starts so faint that its means are lost in noise."""

    def __init__(self, width: int, *, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.enc = nn.Sequential(nn.Linear(64, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())
        self.mean, self.log_var = nn.Linear(width, 8), nn.Linear(width, 8)
        self.dec = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 64)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.enc(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.dec(z.detach() if self.cut else z), mean, log_var


@pytest.mark.parametrize(
    ("weight", "sums", "cut", "sick"),
    [(1.0, 1.0, False, False), (1.0, 1 / 64, False, True), (60.0, 1.0, False, True), (1.0, 1.0, True, True)],
)
@pytest.mark.parametrize("width", [48, 96])
def test_a_fresh_decoder_learns_first_what_all_samples_share(
    weight: float, sums: float, cut: bool, sick: bool, width: int
) -> None:
    """With both terms in balance the code comes into use later: after 400 steps its means are a quarter of
    the noise at a weight of 1, and a thousandth in the three other cases."""
    torch.manual_seed(0)
    model, held = Faint(width, cut=cut), list[Tensor]()
    drawn = torch.Generator().manual_seed(1)
    shared = 2 * torch.randn(64, generator=drawn) - 1
    own = 2 * torch.randn(10, 64, generator=drawn)

    def batch() -> Tensor:
        kinds = torch.randint(10, (128,), generator=drawn)
        held[:] = [torch.sigmoid(shared + own[kinds] + 0.3 * torch.randn(128, 64, generator=drawn))]
        return held[0]

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        again, mean, log_var = output
        error = F.binary_cross_entropy_with_logits(again, held[0], reduction="none").sum(1).mean()
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return sums * error + weight * kl

    report = gf.diagnose(model, batch, loss, optimizer=torch.optim.Adam(model.parameters(), 4e-3))
    assert [i.layer for i in report.issues if i.severity.is_serious] == (["mean"] if sick else [])


class Conditional(nn.Module):
    """Draws what a shape, which goes past the code, and a look, which is in the code alone, make together."""

    def __init__(self, how: str, act: type[nn.Module] = nn.ReLU, codes: int = 1) -> None:
        super().__init__()
        self.how = how
        self.enc = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 32), act(), nn.Linear(32, 8)) for _ in range(codes)
        )
        self.skip = nn.Sequential(nn.Linear(12, 32), act())
        self.mix, self.out = nn.Linear(4 * codes + 32, 32), nn.Linear(64, 20)

    def forward(self, x: Tensor, shape: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = (torch.cat(y, 1) for y in zip(*(e(x).chunk(2, 1) for e in self.enc), strict=True))
        if self.how == "given":
            code = mean + noise * (0.5 * spread).exp()
        else:
            code = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        skip = self.skip(shape)
        return self.out(torch.cat([self.mix(torch.cat([code, skip], 1)).relu(), skip], 1)), mean, spread


def conditional(how: str, weight: float, *, act: type[nn.Module] = nn.ReLU, rate: float = 1e-2) -> gf.Report:
    torch.manual_seed(0)
    model, held = Conditional(how, act), list[Tensor]()
    by_shape, by_look = torch.randn(12, 20) / 4, torch.randn(3, 20) / 2

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        shape = torch.randn(64, 12)
        held[:] = [shape @ by_shape + torch.randn(64, 3) @ by_look]
        return held[0], shape, torch.randn(64, 4)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        again, mean, spread = output
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1).mean()
        return F.mse_loss(again, held[0]) + weight * kl

    optimizer = torch.optim.Adam(model.parameters(), rate)
    return gf.diagnose(model, batch, loss, steps=30, optimizer=optimizer)


@pytest.mark.parametrize("how", ["given", "hand"])
@pytest.mark.parametrize(("act", "rate"), [(nn.ReLU, 1e-2), (nn.Tanh, 5e-3)])
def test_a_code_that_a_model_does_without(how: str, act: type[nn.Module], rate: float) -> None:
    report = conditional(how, 2.0, act=act, rate=rate)
    assert drowned(report) == ["enc.0.2"]
    (found,) = report.record.parts.draws
    assert found.given == (how == "given")
    assert found.pull[-1] > 0.7
    (issue,) = drowned_codes()(report.record)
    assert issue.severity is gf.IssueSeverity.MEDIUM
    assert "shrink" in issue.description


@pytest.mark.parametrize("how", ["given", "hand"])
@pytest.mark.parametrize("weight", [0.3, 0.05, 1e-3])
def test_a_code_beside_another_way(how: str, weight: float) -> None:
    assert not drowned(conditional(how, weight))


class Shifted(nn.Module):
    """A step of a flow: half of the data, scaled and shifted by what the other half tells."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, moved = x.chunk(2, 1)
        shift, scale = (0.1 * self.net(kept)).chunk(2, 1)
        return kept, moved * scale.exp() + shift, scale


def test_a_flow_scales_and_shifts_its_data() -> None:
    torch.manual_seed(0)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        kept, moved, scale = output
        return (0.5 * (kept.square() + moved.square()) - scale).sum(1).mean()

    model = Shifted()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    report = gf.diagnose(model, lambda: torch.randn(64, 8), loss, steps=40, optimizer=optimizer)
    assert [found.given for found in report.record.parts.draws] == [True]
    assert not drowned(report)


def test_a_fresh_decoder_that_is_about_to_hear_is_no_collapse() -> None:
    torch.manual_seed(0)
    enc = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()
    )
    model = Pictures(enc)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    held: list[Tensor] = []

    def batch() -> Tensor:
        at = 3 + 10 * torch.rand(64, 2, 1, 1)
        far = ((rows - at[:, 0]).square() + (columns - at[:, 1]).square()).sqrt()
        held[:] = [torch.sigmoid(3 * (3 - far))[:, None]]
        return held[0]

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        again, mean, spread = output
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1).mean()
        every = F.binary_cross_entropy_with_logits(again, held[0].flatten(1), reduction="none")
        return every.sum(1).mean() + kl

    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    report = gf.diagnose(model, batch, loss, steps=15, optimizer=optimizer)
    (found,) = report.record.parts.draws
    assert (found.signal / found.noise).max() < 0.03
    assert not drowned(report)


class Pictures(nn.Module):
    """A variational autoencoder of pictures of 16 × 16."""

    def __init__(self, enc: nn.Module) -> None:
        super().__init__()
        self.enc, self.mid = enc, nn.Sequential(nn.Linear(512, 200), nn.ReLU())
        self.mean, self.spread = nn.Linear(200, 20), nn.Linear(200, 20)
        self.dec = nn.Sequential(
            nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 256)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.mid(self.enc(x))
        mean, spread = self.mean(h), self.spread(h)
        return self.dec(mean + torch.randn_like(mean) * (0.5 * spread).exp()), mean, spread


def test_the_pull_is_the_cosine_of_gradient_and_means() -> None:
    torch.manual_seed(0)
    model, x = Coder(), torch.randn(16, 20)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        again, mean, _ = output
        return again.square().mean() + 0.1 * mean.square().sum()

    with torch.random.fork_rng():
        h = model.enc(x).tanh()
        mean = model.mean(h).detach().requires_grad_()
        scale = model.log_scale(h).detach().exp()
        z = mean + torch.randn_like(mean) * scale
        (slope,) = torch.autograd.grad(loss((model.dec(z), mean, scale)), mean)
    expected = float(F.cosine_similarity(slope.flatten(), mean.detach().flatten(), dim=0))
    (found,) = gf.analyze(model, [x], loss).parts.draws
    assert found.pull == pytest.approx([expected], rel=1e-4)
