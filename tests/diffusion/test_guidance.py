"""Guidance: exactness on mixtures, cost, composition."""

from functools import partial

import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import path, prediction, solvers, spacing
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import ClassifierGuided, Guidance
from ldm.diffusion.prediction import Prediction
from tests.diffusion.closed_form import MIXTURE, PREDICTIONS, Exact, last, noise_of

COSINE = spacing.Trailing(steps=8).grid(path.cosine())
ROW = COSINE.rows()[3]
SOLVERS = {
    "ddim": solvers.ddim,
    "ancestral": solvers.euler_ancestral,
    "heun": solvers.heun,
    "2m": solvers.dpmpp_2m,
    "3s": solvers.dpmpp_3s,
    "unipc": solvers.unipc,
}


class ByToken:
    """A conditional denoiser: the tokens choose the component of a mixture, a null token all of them."""

    def __init__(self, kind: prediction.Target):
        self.prediction, self.calls = kind, 0
        self.experts = [*(Exact(MIXTURE.only(k), kind) for k in range(3)), Exact(MIXTURE, kind)]

    def __call__(self, x, level, condition=None):
        self.calls += 1
        chosen = condition.tokens[:, 0, 0].long()
        rows = [self.experts[c](x[i : i + 1], level) for i, c in enumerate(chosen.tolist())]
        return Prediction(*(torch.cat(field) for field in list(zip(*rows))[:2]))


def tokens(*which: int) -> Condition:
    return Condition(tokens=torch.tensor(which, dtype=torch.float64)[:, None, None])


WANTED, NULL = tokens(0, 1, 2, 1), tokens(3, 3, 3, 3)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(("cfg", "calls"), [(1.0, 1), (0.0, 1), (7.5, 1)])
def test_cfg_is_the_formula(cfg, calls):
    denoise = ByToken(PREDICTIONS["v"])
    guided = Guidance(cfg=cfg)(denoise, NULL)(X, ROW, WANTED)
    assert denoise.calls == calls
    towards, away = denoise(X, ROW, WANTED), denoise(X, ROW, NULL)
    for a, u, found in zip(towards[:2], away[:2], guided[:2]):
        torch.testing.assert_close(found, u + cfg * (a - u))


def test_cfg_one_costs_one_evaluation_of_the_batch_itself():
    sizes = []

    def denoise(x, level, condition):
        sizes.append(len(x))
        return Prediction(x, x)

    Guidance(cfg=1.0)(denoise, NULL)(X, ROW, WANTED)
    Guidance(cfg=2.0)(denoise, NULL)(X, ROW, WANTED)
    Guidance(cfg=2.0, batched=False)(denoise, NULL)(X, ROW, WANTED)
    assert sizes == [4, 8, 4, 4]


def test_batched_equals_two_calls():
    both = [Guidance(cfg=3.0, batched=b)(ByToken(PREDICTIONS["eps"]), NULL)(X, ROW, WANTED) for b in (True, False)]
    for a, b in zip(both[0][:2], both[1][:2]):
        torch.testing.assert_close(a, b)


def test_a_negative_prompt_takes_the_place_of_the_null():
    one, other = (
        Guidance(cfg=3.0)(ByToken(PREDICTIONS["v"]), n)(X, ROW, WANTED).x0 for n in (NULL, tokens(2, 2, 0, 0))
    )
    assert (one - other).abs().max() > 1e-3


def test_interval_guides_inside_alone():
    guidance = Guidance(cfg=4.0, interval=(0.5, 2.0))
    plain = ByToken(PREDICTIONS["v"])
    inside = [0.5 <= row.sigma / row.alpha <= 2.0 if row.alpha else False for row in COSINE.rows()[:-1]]
    assert any(inside)
    assert not all(inside)
    for row, expected in zip(COSINE.rows(), inside):
        guided = guidance(plain, NULL)(X, row, WANTED).x0
        assert (guided - plain(X, row, WANTED).x0).abs().max().gt(1e-9) == expected
    noisiest = spacing.Trailing(steps=2).grid(path.Flow()).rows()[0]  # alpha = 0: sigma / alpha is infinite
    assert not guidance.acts_on(noisiest)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_rescale_acts_on_the_networks_output(kind, amount):
    """Lin et al. eq. 15 and 16 by hand, on y of this kind."""
    target, denoise = PREDICTIONS[kind], ByToken(PREDICTIONS[kind])
    guided = Guidance(cfg=5.0, rescale=amount)(denoise, NULL)(X, ROW, WANTED)
    towards, away = (target.raw(denoise(X, ROW, c), ROW) for c in (WANTED, NULL))
    y = away + 5.0 * (towards - away)
    y = amount * y * towards.std(1, keepdim=True) / y.std(1, keepdim=True) + (1 - amount) * y
    torch.testing.assert_close(target.raw(guided, ROW), y)
    torch.testing.assert_close(ROW.alpha * guided.x0 + ROW.sigma * guided.eps, X)  # the two still make up x


def test_rescale_needs_to_know_the_output():
    with pytest.raises(ValueError, match="rescale: needs a denoiser with a `prediction`"):
        Guidance(cfg=2.0, rescale=0.5)(lambda x, *_: Prediction(x, x), NULL)(X, ROW, WANTED)


def test_the_learned_variance_is_the_conditional_branchs():
    def denoise(x, level, condition):
        frac = condition.tokens[:, 0].expand_as(x)
        return Prediction(x, x, frac=frac)

    for batched in (True, False):
        guided = Guidance(cfg=2.0, batched=batched)(denoise, NULL)(X, ROW, WANTED)
        torch.testing.assert_close(guided.frac, WANTED.tokens[:, 0].expand_as(X))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"cfg": float("nan")}, "cfg: must be finite, got nan"),
        ({"rescale": 1.5}, "rescale: must lie between 0 and 1, got 1.5"),
        ({"interval": (2.0, 1.0)}, "interval: must be two increasing numbers, not negative, got [2.0, 1.0]"),
    ],
)
def test_impossible_numbers(numbers, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        Guidance(**numbers)
    assert str(error.value) == message


def log_share(component: int):
    """log p(component | x_t), exactly."""

    def log_prob(x, level):
        return MIXTURE.log_components(x, level.alpha, level.sigma).log_softmax(1)[:, component]

    return log_prob


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("where", ["linear", "flow"])
@pytest.mark.parametrize("component", [0, 2])
def test_classifier_guidance_of_scale_one_is_the_conditional_sampler(name, where, component):
    """Bayes: the score of p(x | y) is that of p(x) plus the gradient of log p(y | x)."""
    grid = spacing.Trailing(steps=9).grid({"linear": path.linear(), "flow": path.Flow(last=0.99)}[where])
    guided = ClassifierGuided(Exact(MIXTURE), log_share(component))
    found = last(SOLVERS[name](guided, X, grid, noise_of(2, X)))
    expected = last(SOLVERS[name](Exact(MIXTURE.only(component)), X, grid, noise_of(2, X)))
    assert (found - expected).abs().max() < 1e-10
    assert (found - last(SOLVERS[name](Exact(MIXTURE), X, grid, noise_of(2, X)))).abs().max() > 1e-2


@pytest.mark.parametrize("noise_var", ["small", "large"])
def test_algorithm_one_moves_the_mean_by_its_variance(noise_var):
    now, next = COSINE.rows()[3:5]
    guided = ClassifierGuided(Exact(MIXTURE), log_share(1), scale=2.5, form="mean")(X, now)
    step = solvers.ddim_step(X, guided, now, next, eta=1.0, noise_var=noise_var)
    plain = solvers.ddim_step(X, Exact(MIXTURE)(X, now), now, next, eta=1.0, noise_var=noise_var)
    x = X.clone().requires_grad_()
    gradient = torch.autograd.grad(log_share(1)(x, now).sum(), x)[0]
    torch.testing.assert_close(step.mean, plain.mean + plain.std**2 * 2.5 * gradient)
    assert step.std == plain.std


def test_algorithm_one_converges_to_the_conditional_distribution():
    """With many steps its samples are the component's: mean and variance over 4,000 samples."""
    grid = spacing.Trailing(steps=400).grid(path.cosine(steps=400))
    x = noise_of(0, torch.empty(4000, 2))()
    guided = ClassifierGuided(Exact(MIXTURE), log_share(0), form="mean")
    end = last(solvers.euler_ancestral(guided, x, grid, noise_of(1, x)))
    torch.testing.assert_close(end.mean(0), MIXTURE.means[0], rtol=0, atol=0.03)
    torch.testing.assert_close(end.var(0), MIXTURE.variances[0], rtol=0.1, atol=0.01)


def test_algorithm_one_needs_noise():
    guided = ClassifierGuided(Exact(MIXTURE), log_share(0), form="mean")
    with pytest.raises(ValueError, match="classifier guidance with form='mean' needs a stochastic solver"):
        last(solvers.ddim(guided, X, COSINE))
    with pytest.raises(ValueError, match="form: must be score or mean, got logit"):
        ClassifierGuided(Exact(MIXTURE), log_share(0), form="logit")


def test_guidances_compose():
    """Classifier guidance around classifier-free guidance, and the other way round."""
    free = Guidance(cfg=2.0, rescale=0.2)
    denoise = ByToken(PREDICTIONS["v"])
    outer = ClassifierGuided(free(denoise, NULL), log_share(1), scale=0.5)(X, ROW, WANTED)
    inner = free(ClassifierGuided(denoise, log_share(1), scale=0.5), NULL)(X, ROW, WANTED)
    for guided in (outer, inner):
        torch.testing.assert_close(ROW.alpha * guided.x0 + ROW.sigma * guided.eps, X)
    assert (outer.x0 - free(denoise, NULL)(X, ROW, WANTED).x0).abs().max() > 1e-3


def test_gradients_flow_through_classifier_guidance():
    def sample(x):
        return last(solvers.dpmpp_2m(ClassifierGuided(Exact(MIXTURE), log_share(0)), x, COSINE))

    assert torch.autograd.gradcheck(sample, X.clone().requires_grad_())


class Recorder(nn.Module):
    """A backbone that keeps what it was given."""

    def forward(self, x, t, **keywords):
        self.seen = {"x": x, "t": t, **keywords}
        return x[:, :2] * 0.5


def test_the_denoiser_feeds_the_network():
    where, network = path.VE(sigma_data=0.5), Recorder()
    denoiser = Denoiser(network, where, prediction.EDM(sigma_data=0.5))
    x, level = torch.randn(3, 2, 4, 4), where.level(torch.tensor([0.2, 0.5, 0.9]).double())
    condition = Condition(tokens=torch.randn(3, 5, 7), mask=torch.ones(3, 5).bool(), concat=torch.randn(3, 1, 4, 4))
    found = denoiser(x, level, condition)
    scaled = x * level.c_in.float()[:, None, None, None]
    torch.testing.assert_close(network.seen["x"], torch.cat([scaled, condition.concat], 1))
    torch.testing.assert_close(network.seen["t"], (level.sigma.log() / 4).float())
    assert network.seen["tokens"] is condition.tokens
    assert network.seen["mask"] is condition.mask
    assert "pooled" not in network.seen
    s, d = level.sigma.float()[:, None, None, None], 0.5
    expected = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * network(network.seen["x"], None)
    torch.testing.assert_close(found.x0, expected)


def test_the_loss_is_the_outputs_squared_error_per_sample():
    where, network = path.cosine(), Recorder()
    x0, noise = torch.randn(2, 3, 2, 4)
    level = where.level(torch.tensor([0.2, 0.5, 0.9]).double())
    a, s = (v.float()[:, None, None] for v in (level.alpha, level.sigma))
    found = Denoiser(network, where, prediction.V()).loss(x0, level, noise)
    expected = ((0.5 * (a * x0 + s * noise) - (a * noise - s * x0)) ** 2).mean((1, 2))
    torch.testing.assert_close(found, expected)


def test_conditions_map_and_stack():
    condition = Condition(tokens=torch.ones(2, 3, 4), pooled=torch.ones(2, 5))
    stacked = Condition.stack([condition, condition.map(torch.zeros_like)])
    assert stacked.tokens.shape == (4, 3, 4)
    assert stacked.mask is None
    assert stacked.pooled.sum() == 10
    with pytest.raises(ValueError, match=r"condition.pooled: given for some of the batch"):
        Condition.stack([condition, Condition(tokens=torch.ones(2, 3, 4))])


def test_partials_keep_their_settings():
    assert isinstance(solvers.dpmpp_2m_sde, partial)
    assert solvers.dpmpp_2m_sde.keywords == {"order": 2, "eta": 1.0}
