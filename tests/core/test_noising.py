r"""Noising: marginals, independence and path covariance against theory, and every promise held bit for bit.

Statistical bounds are six standard errors of the estimate: for standard normals with correlation
:math:`\rho`, the mean of N products has standard error :math:`\sqrt{(1 + \rho^2) / N}`. Seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lib_unsampler.core.noising import (
    SeededDraws,
    add_noise,
    blend,
    diffuse,
    implied_noise,
    normalize_noise,
    signal_scale,
    unsample,
    variance_preserving,
    walk,
)
from lib_unsampler.core.schedule import levels

EPS = torch.tensor([14.6146, 6.0, 2.0, 0.5, 0.0292, 0.0])
FLOW = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.05, 0.0])
SCHEDULES = {"eps": EPS, "v": EPS, "flow": FLOW}
KINDS = ("shared", "independent", "path")
BOTH = ("eps", "flow")
RANKS = ((3, 4, 6, 5), (2, 4, 3, 6, 5))

kinds = pytest.mark.parametrize("kind", KINDS)
predictions = pytest.mark.parametrize("prediction", BOTH)
normalizes = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
Latent = Callable[..., Tensor]
Known = Callable[..., tuple[Callable[[int], Tensor], Tensor]]


def signal(sigma: float, prediction: str) -> float:
    return 1 - sigma if prediction == "flow" else 1.0


def noise_of(z: Tensor, x: Tensor, sigmas: Tensor, prediction: str) -> Tensor:
    """The noise of every level of a batch, in float64, by the definition of z."""
    pairs = zip(z.double(), sigmas.tolist())
    return torch.stack([(level - signal(s, prediction) * x.double()) / s for level, s in pairs])


def correlation(kind: str, prediction: str, low: float, high: float) -> float:
    """Of the noises at two levels, low <= high, by the theory of each kind."""
    if kind == "shared" or low == high:
        return 1.0
    if kind == "independent":
        return 0.0
    return low / high * (signal(high, prediction) / signal(low, prediction))


@kinds
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_covariance_of_the_levels_is_the_theorys(kind: str, prediction: str, latent: Latent) -> None:
    """Marginals N(a x, s^2) on the diagonal; off it, independence or the path's Markov covariance."""
    x = latent(2, 4, 96, 96)
    plan = levels(SCHEDULES[prediction])
    z = unsample(x, plan, SeededDraws((1, 2), x.shape[1:]), kind, prediction)
    n = noise_of(z, x, plan.sigmas, prediction).flatten(1)
    count, sigmas = n.shape[1], plan.sigmas.tolist()
    for (i, low), (j, high) in product(enumerate(sigmas), repeat=2):
        if low <= high:
            rho = correlation(kind, prediction, low, high)
            assert abs((n[i] * n[j]).mean() - rho) < 6 * ((1 + rho**2) / count) ** 0.5
    assert (n.mean(1).abs() < 6 / count**0.5).all()
    assert ((n**4).mean(1) - 3).abs().max() < 6 * (96 / count) ** 0.5  # var n^4 = E n^8 - 9 = 96


@kinds
@predictions
def test_noise_is_white_over_pixels_channels_and_images(kind: str, prediction: str, latent: Latent) -> None:
    x = latent(2, 4, 96, 96)
    plan = levels(SCHEDULES[prediction])
    z = unsample(x, plan, SeededDraws((1, 2), x.shape[1:]), kind, prediction)
    n = noise_of(z, x, plan.sigmas, prediction)
    neighbours = [(n[..., 1:], n[..., :-1]), (n[..., 1:, :], n[..., :-1, :]), (n[:, :, 1:], n[:, :, :-1])]
    for one, other in [*neighbours, (n[:, 0], n[:, 1])]:
        together = (one * other).flatten(1)
        assert together.mean(1).abs().max() < 6 / together.shape[1] ** 0.5


@predictions
def test_path_is_the_sum_of_its_increments(prediction: str, latent: Latent, known_draws: Known) -> None:
    r"""Sigma space: z = x + sum sqrt(s'^2 - s^2) n; flow: the same walk of z / (1 - s), where s / (1 - s) is sigma."""
    schedule = torch.tensor([0.9, 0.5, 0.5, 0.2, 0.0])
    x = latent(2, 4, 6, 5)
    draw, n = known_draws(4, *x.shape)
    z = unsample(x, levels(schedule), draw, "path", prediction)
    rising = schedule.double().flip(0)
    a = torch.tensor([signal(s, prediction) for s in rising.tolist()]).double()
    increments = ((rising / a).square().diff().sqrt()).reshape(-1, 1, 1, 1, 1) * n.double()
    truth = (x.double() + increments.cumsum(0)) * a[1:].reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(z.double(), truth, rtol=1e-6, atol=1e-6)
    assert torch.equal(z[1], z[2])  # a repeated sigma


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("rank", RANKS, ids=["rank4", "rank5"])
def test_hosts_order_of_operations_in_sigma_space(
    rank: tuple[int, ...], prediction: str, latent: Latent, known_draws: Known
) -> None:
    x, sigma = latent(*rank), EPS[0]
    noise = known_draws(1, *rank)[1][0]
    z = add_noise(x, noise, sigma, prediction)
    assert torch.equal(z, x + noise * sigma)
    once = (x.double() + noise.double() * sigma.double()).float()
    assert not torch.equal(z, once)  # so the order can be seen at all


@pytest.mark.parametrize("rank", RANKS, ids=["rank4", "rank5"])
def test_hosts_order_of_operations_on_flow(rank: tuple[int, ...], latent: Latent, known_draws: Known) -> None:
    x, noise = latent(*rank), known_draws(1, *rank)[1][0]
    for sigma in FLOW:
        assert torch.equal(add_noise(x, noise, sigma, "flow"), sigma * noise + (1.0 - sigma) * x)
    assert torch.equal(add_noise(x, noise, torch.ones(()), "flow"), noise)  # sigma 1 is pure noise


@predictions
def test_shared_noise_at_the_hand_off_level_is_img2imgs_start(prediction: str, latent: Latent) -> None:
    x = latent(2, 4, 6, 5)
    seeds, sigma = (7, 11), SCHEDULES[prediction][1]
    first = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
    z = unsample(x, levels(SCHEDULES[prediction], 1), SeededDraws(seeds, x.shape[1:]), "shared", prediction)
    host = sigma * first + (1.0 - sigma) * x if prediction == "flow" else x + first * sigma
    assert torch.equal(z[-1], host)


@predictions
@pytest.mark.parametrize("rank", RANKS, ids=["rank4", "rank5"])
def test_noising_and_its_inverse_cancel(
    rank: tuple[int, ...], prediction: str, latent: Latent, known_draws: Known
) -> None:
    """To the rounding that float32 gives z, a x and s n: at most four roundings of half a 2^-23."""
    x, noise = latent(*rank), known_draws(1, *rank)[1][0]
    sigma = torch.linspace(0.05, 1.0, rank[0])  # one per image
    back = implied_noise(add_noise(x, noise, sigma, prediction), x, sigma, prediction)
    s = sigma.reshape(-1, *[1] * (len(rank) - 1))
    bound = 4 * 2**-24 * (x.abs() + 2 * s * noise.abs()) / s
    assert ((back - noise).abs() <= bound).all()


@kinds
@predictions
@normalizes
@pytest.mark.parametrize("rank", RANKS, ids=["rank4", "rank5"])
def test_a_batch_is_its_single_runs_bit_for_bit(
    kind: str, prediction: str, normalize: bool, rank: tuple[int, ...], latent: Latent
) -> None:
    x, plan = latent(*rank), levels(SCHEDULES[prediction], 0, 2)
    seeds = tuple(range(5, 5 + rank[0]))

    def run(images: slice) -> Tensor:
        return unsample(x[images], plan, SeededDraws(seeds[images], rank[1:]), kind, prediction, normalize)

    together = run(slice(None))
    for i in range(rank[0]):
        assert torch.equal(together[:, i : i + 1], run(slice(i, i + 1)))
    assert not torch.equal(together[:, 0] - x[0], together[:, 1] - x[1])


@kinds
@predictions
@normalizes
def test_thinning_and_ending_never_change_what_remains(
    kind: str, prediction: str, normalize: bool, latent: Latent
) -> None:
    x, schedule = latent(2, 3, 4, 5), torch.linspace(1, 0, 9)

    def run(end: int, increment: int) -> dict[int, Tensor]:
        draw = SeededDraws((1, 2), x.shape[1:])
        return dict(walk(x, levels(schedule, end, increment), draw, kind, prediction, normalize))

    whole = run(0, 1)
    for end, increment in product((0, 1, 4, 7), (1, 2, 3, 20)):
        part = run(end, increment)
        assert end in part
        assert all(torch.equal(z, whole[i]) for i, z in part.items())


@kinds
@predictions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", RANKS, ids=["rank4", "rank5"])
def test_maths_is_float32_whatever_the_latents_dtype(
    kind: str, prediction: str, dtype: torch.dtype, rank: tuple[int, ...], latent: Latent, known_draws: Known
) -> None:
    x, (draw, noise) = latent(*rank, dtype=dtype), known_draws(5, *rank)
    plan = levels(SCHEDULES[prediction])
    z = unsample(x, plan, draw, kind, prediction)
    single = unsample(x.float(), plan, draw, kind, prediction)
    assert z.dtype == dtype and single.dtype == torch.float32
    assert torch.equal(z, single.to(dtype))
    if kind == "independent":
        own = noise[2].to(dtype) * plan.sigmas[2].to(dtype) + signal(plan.sigmas[2].item(), prediction) * x
        assert not torch.equal(z[2], own)  # so the dtype of the arithmetic can be seen at all


@kinds
@predictions
def test_normalize_brings_each_images_noise_to_mean_0_and_variance_1(
    kind: str, prediction: str, latent: Latent, known_draws: Known
) -> None:
    """With noise that is far from it, differently in each image: over the batch it could not come out right."""
    x = latent(2, 4, 12, 10)
    draws = known_draws(5, *x.shape)[1] * torch.tensor([3.0, 0.4]).reshape(2, 1, 1, 1)
    draws = draws + torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
    plan = levels(SCHEDULES[prediction])
    z = unsample(x, plan, lambda j: draws[j], kind, prediction, normalize=True)
    n = noise_of(z, x, plan.sigmas, prediction).flatten(2)
    rounding = 2**-23 * (x.abs().max() / plan.sigmas[0]).item()
    assert n.mean(-1).abs().max() < rounding
    assert (n.square().mean(-1) - 1).abs().max() < 4 * rounding


@predictions
def test_normalize_keeps_the_noises_shape(prediction: str, latent: Latent, known_draws: Known) -> None:
    """It only shifts and scales: the path's own implied noise, standardized."""
    x, (draw, _) = latent(2, 4, 12, 10), known_draws(5, 2, 4, 12, 10)
    plan = levels(SCHEDULES[prediction])
    for kind in KINDS:
        before, after = (
            noise_of(unsample(x, plan, draw, kind, prediction, n), x, plan.sigmas, prediction).flatten(2)
            for n in (False, True)
        )
        standard = (before - before.mean(-1, keepdim=True)) / before.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(after, standard, rtol=0, atol=1e-4)


def test_noise_without_variance_is_only_centred() -> None:
    assert torch.equal(normalize_noise(torch.full((2, 1, 2, 2), 5.0)), torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_shape", [(1, 1, 6, 5), (2, 1, 6, 5), (6, 5)], ids=str)
def test_hard_mask_keeps_the_clean_latent_outside_and_z_inside_exactly(
    dtype: torch.dtype, mask_shape: tuple[int, ...], latent: Latent, known_draws: Known
) -> None:
    x, (draw, _) = latent(2, 4, 6, 5, dtype=dtype), known_draws(5, 2, 4, 6, 5)
    z = unsample(x, levels(EPS), draw, "independent", "eps")
    mask = (torch.arange(torch.tensor(mask_shape).prod()).reshape(mask_shape) % 3 == 0).float()
    shown = blend(z, x, mask)
    inside = mask.bool().expand(z.shape)
    assert shown.dtype == dtype
    assert torch.equal(shown[inside], z[inside]) and torch.equal(shown[~inside], x.expand_as(z)[~inside])
    assert blend(z, x, None) is z


@pytest.mark.parametrize("rank", RANKS, ids=["rank4", "rank5"])
def test_soft_masks_blend(rank: tuple[int, ...], latent: Latent, known_draws: Known) -> None:
    x, z = latent(*rank), known_draws(3, *rank)[1]
    mask = torch.linspace(0, 1, rank[-1] * rank[-2]).reshape(rank[-2:])
    truth = x.double() + mask.double() * (z.double() - x.double())
    torch.testing.assert_close(blend(z, x, mask).double(), truth, rtol=0, atol=1e-6)


def test_the_original_nodes_batch_frame_for_frame(latent: Latent, known_draws: Known) -> None:
    """ComfyUI BatchUnsampler's own lines: sigmas flipped, the first (0) ignored, one randn_like of the batch."""
    x = latent(3, 4, 8, 6)
    sigmas = EPS.flip(0)[1:]
    (draw, noise), count = known_draws(len(sigmas), *x.shape), len(sigmas)
    batch = x.repeat(count, 1, 1, 1)
    batch = batch + noise.flatten(0, 1) * sigmas.repeat_interleave(len(x)).view(-1, 1, 1, 1)
    ours = unsample(x, levels(EPS), draw, "independent", "eps").flatten(0, 1)
    assert ours.shape == (15, 4, 8, 6) and torch.equal(ours, batch)


def test_seeded_draws_are_one_generator_per_image() -> None:
    generators = [torch.Generator().manual_seed(s) for s in (3, 4, 3)]
    draw = SeededDraws((3, 4, 3), (2, 5))
    for j in range(4):
        truth = torch.stack([torch.randn(2, 5, generator=g) for g in generators])
        if j != 2:  # skipping one discards it
            assert torch.equal(draw(j), truth)
    with pytest.raises(ValueError, match="draw 3 was already taken"):
        draw(3)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    SeededDraws((1,), (3,))(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 14.6])
def test_variance_preserving_view(sigma: float, latent: Latent) -> None:
    z, s = latent(2, 3, 4, 5), torch.tensor(sigma)
    for prediction in ("eps", "v"):
        torch.testing.assert_close(variance_preserving(z, s, prediction), z / (1 + sigma**2) ** 0.5)
    assert torch.equal(variance_preserving(z, s, "flow"), z)
    per_image = variance_preserving(z, torch.tensor([sigma, 1.0]), "eps")
    assert torch.equal(per_image[:1], variance_preserving(z[:1], s, "eps"))


@pytest.mark.parametrize(("prediction", "low", "high"), [("eps", 2.0, 5.0), ("flow", 0.2, 0.6), ("flow", 0.5, 1.0)])
def test_a_step_of_the_forward_process(
    prediction: str, low: float, high: float, latent: Latent, known_draws: Known
) -> None:
    r"""It scales the signal to a(s') and adds what the noise's variance lacks: z' = r z + sqrt(s'^2 - r^2 s^2) n."""
    z, noise = latent(2, 3, 4, 5), known_draws(1, 2, 3, 4, 5)[1][0]
    r = signal(high, prediction) / signal(low, prediction)
    truth = r * z.double() + (high**2 - (r * low) ** 2) ** 0.5 * noise.double()
    got = diffuse(z, noise, torch.tensor(low), torch.tensor(high), prediction)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-6)


@predictions
def test_diffusing_to_the_same_level_changes_nothing(prediction: str, latent: Latent) -> None:
    z, one = latent(1, 3, 4, 5), torch.ones(())
    assert torch.equal(diffuse(z, torch.full_like(z, torch.nan), one, one, prediction), z)


def test_unknown_kinds_are_refused(latent: Latent, known_draws: Known) -> None:
    x = latent(1, 3, 4, 5)
    with pytest.raises(ValueError, match="noise: 'loud' is not one of shared, independent, path"):
        unsample(x, levels(FLOW), known_draws(5, *x.shape)[0], "loud", "eps")


@kinds
@pytest.mark.parametrize("prediction", ["epsilon", "const"])
def test_unknown_predictions_are_refused(kind: str, prediction: str, latent: Latent, known_draws: Known) -> None:
    x = latent(1, 3, 4, 5)
    with pytest.raises(ValueError, match="prediction: .* is not one of"):
        unsample(x, levels(FLOW), known_draws(5, *x.shape)[0], kind, prediction)


def test_signal_scale() -> None:
    assert signal_scale(FLOW, "flow").tolist() == (1 - FLOW).tolist()
    with pytest.raises(ValueError, match="prediction: 'const' is not one of eps, v, flow"):
        signal_scale(FLOW, "const")
    assert signal_scale(EPS, "eps").tolist() == signal_scale(EPS, "v").tolist() == [1] * 6


@predictions
def test_a_path_begins_clean_wherever_the_schedule_ends(prediction: str, latent: Latent, known_draws: Known) -> None:
    """KL Optimal ends above 0: the levels above have their whole noise all the same."""
    ended, whole = torch.tensor([0.9, 0.5, 0.2, 0.1]), torch.tensor([0.9, 0.5, 0.2, 0.0])
    x = latent(2, 4, 6, 5)
    draw, _ = known_draws(3, *x.shape)
    z = [unsample(x, levels(s, whole=True), draw, "path", prediction) for s in (ended, whole)]
    assert len(z[0]) == 3 and torch.equal(*z)
