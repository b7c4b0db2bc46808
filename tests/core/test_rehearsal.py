"""What a sampler of any host does is found out on a stand-in, and replay's one rule is held to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import pytest
import torch
from k_diffusion import sampling as kd
from torch import Tensor

from lib_unsampler.core.noising import SeededDraws, unsample
from lib_unsampler.core.rehearsal import Still, draws_noise, forward
from lib_unsampler.core.replay import Recording, ReplayError, check_replay, first_answer, record, rehearsed, replay
from lib_unsampler.core.schedule import levels

SHAPE = (2, 4, 6, 5)
SIGMAS = kd.get_sigmas_karras(8, 0.03, 14.6)
SOURCE = torch.linspace(-1, 1, 240).reshape(SHAPE)
STATES = unsample(SOURCE, levels(SIGMAS), SeededDraws((3, 4), SHAPE[1:]), "independent", "eps")
TOLD: Callable[[Mapping[str, Any]], None] = lambda info: None  # noqa: E731
Noise = Callable[[Tensor, Tensor], Any]


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.3 + 0.6 * x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def stepping(step: Callable[[Tensor, Tensor, Any, Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """A sampler of one step's rule, ``step(x, D, noise, sigmas, i)``, as extensions write theirs."""

    def sample_own(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = TOLD,
        disable: Any = None,
        noise_sampler: Noise = lambda *_: torch.zeros(()),
        eta: float = 1.0,
    ) -> Tensor:
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i].expand(len(x)))
            if callback is not None:
                callback({"x": x, "i": i, "denoised": denoised})
            last = sigmas[i + 1] == 0
            x = denoised if last else step(x, denoised, lambda s=i: noise_sampler(sigmas[s], sigmas[s + 1]), sigmas, i)
        return x

    return sample_own


def plain(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    return denoised + 0.8 * (sigmas[i + 1] * noise())


def eta_0(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    """Res Multistep in Neo: asks for noise, of factor 0."""
    return denoised + (x - denoised) * sigmas[i + 1] / sigmas[i] + noise() * (0 * sigmas[i])


def first_half(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    """Kohaku LoNyu Yog: no noise in the second half."""
    x = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]
    return x + noise() * sigmas[i + 1] if i <= (len(sigmas) - 1) / 2 else x


def dropped(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    """Asks for noise and drops it."""
    noise()
    return denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]


def centred(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    """Does arithmetic on the noise before it is added."""
    drawn = noise()
    return denoised + sigmas[i + 1] * (drawn - drawn.mean())


def shaped(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    """Neo's LCM: asks for the noise's rank, scales it, and adds the rest in place."""
    drawn = noise()
    drawn = drawn * sigmas[i + 1].view((1,) * drawn.ndim)
    drawn += denoised
    return drawn


def two_noises(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    return denoised + noise() * (0.6 * sigmas[i + 1]) + noise() / 4


def own_draws(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    return denoised + sigmas[i + 1] * noise() + 0.1 * torch.randn_like(x)


def infinite(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    return denoised + noise() * (1e-38 * sigmas[i + 1]) * 1e-7


def per_image(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
    return denoised + noise() * sigmas[i + 1].expand(len(x)).reshape(-1, 1, 1, 1)


def fresh(first: int) -> Iterator[Tensor]:
    draw = SeededDraws((3, 4), SHAPE[1:])
    return (draw(j) for j in count(first))


def recorded(function: Callable[..., Tensor], model: Any = denoise, **options: Any) -> tuple[Recording, Tensor]:
    return record(function, model, SIGMAS, STATES, SOURCE, fresh(8), "eps", disable=True, **options), SOURCE


@pytest.mark.parametrize("step", [plain, shaped, two_noises, per_image])
def test_a_sampler_that_scales_and_adds_its_noise_is_served(step: Any) -> None:
    made, source = recorded(stepping(step))
    assert torch.equal(replay(stepping(step), denoise, SIGMAS, made, disable=True), source)
    for skip in (1, 4, 7):
        assert torch.equal(replay(stepping(step), denoise, SIGMAS, made, skip, disable=True), source)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (eta_0, r"'own' adds no noise at step 0 \(sigma 14.6 to"),
        (first_half, "'own' adds no noise at step 5"),
        (dropped, "'own' adds no noise at step 0"),
        (centred, "'own' cannot be tried out: AttributeError"),
        (own_draws, "'own' does not repeat itself"),
        (infinite, "'own' .*not finite|'own' adds no noise"),
    ],
)
def test_any_other_is_refused_by_name_before_a_model_call(step: Any, said: str) -> None:
    with pytest.raises(ReplayError, match=f"sampler: {said}"):
        recorded(stepping(step), lambda *_: pytest.fail("the model was called"))


def test_a_sampler_that_tells_of_no_steps_is_refused_by_name() -> None:
    def sample_silent(model: Any, x: Tensor, sigmas: Tensor, noise_sampler: Any = None, **_: Any) -> Tensor:
        return model(x, sigmas[:1].expand(len(x)))

    with pytest.raises(ReplayError, match="sampler: 'silent' tells of 0 steps on a schedule of 8"):
        recorded(sample_silent)


def remembering() -> Callable[..., Tensor]:
    """ER SDE in Neo looks back over its steps: so does this, from its second step on."""
    past: list[Tensor] = []

    def step(x: Tensor, denoised: Tensor, noise: Any, sigmas: Tensor, i: int) -> Tensor:
        if i == 0:
            past.clear()
        before = past[-1] if past else denoised
        past.append(denoised)
        return denoised + 0.2 * (denoised - before) + sigmas[i + 1] * noise()

    return stepping(step)


def test_whether_a_sampler_looks_back_is_found_out() -> None:
    made, source = recorded(remembering())
    assert torch.equal(replay(remembering(), denoise, SIGMAS, made, disable=True), source)
    for skip in (1, 5):
        with pytest.raises(ReplayError, match="skip: 'own' looks back over its steps"):
            check_replay(remembering(), SIGMAS, made, skip)
    for name, looks_back in (("euler_ancestral", False), ("dpmpp_2m_sde", True), ("dpmpp_3m_sde", True)):
        like = torch.zeros(SHAPE)
        rehearsed(getattr(kd, f"sample_{name}"), None, SIGMAS, like, "eps", 0)
        if looks_back:
            with pytest.raises(ReplayError, match=f"skip: '{name}' looks back"):
                rehearsed(getattr(kd, f"sample_{name}"), None, SIGMAS, like, "eps", 3)
        else:
            rehearsed(getattr(kd, f"sample_{name}"), None, SIGMAS, like, "eps", 3)


def test_a_model_with_two_answers_to_one_question_is_refused() -> None:
    """Token merging draws its tokens anew at each call."""
    calls = 0

    def merging(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, sigma) + 0.05 * sigma.max() * torch.sin(torch.arange(5) * 1.0 * calls)

    before = first_answer(stepping(plain), merging, STATES[-1], SIGMAS)
    with pytest.raises(ReplayError, match="asked the same twice it gives two answers"):
        recorded(stepping(plain), merging, before=before)
    assert calls == 2  # nothing more is spent


def test_the_first_question_is_that_of_the_run_and_the_only_one() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def noting(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.clone(), sigma))
        return denoise(x, sigma)

    before = first_answer(stepping(plain), noting, STATES[-1], SIGMAS)
    assert torch.equal(before, denoise(*seen[0])) and len(seen) == 1
    recorded(stepping(plain), noting, before=before)
    assert len(seen) == 9 and torch.equal(seen[0][0], seen[1][0])


def test_the_stand_in_is_asked_and_no_generator_is() -> None:
    before = torch.random.get_rng_state()
    rehearsed(kd.sample_dpmpp_sde, None, SIGMAS, torch.zeros(SHAPE), "eps", 3)
    forward(kd.sample_heun, None, torch.zeros(SHAPE), sigmas=SIGMAS, s_churn=0.0)
    draws_noise(kd.sample_heun, None, torch.zeros(SHAPE), sigmas=SIGMAS, s_churn=2.0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_is_found_out(name: str) -> None:
    """s_churn adds noise where the sigma is between s_tmin and s_tmax, and nowhere else."""
    function, like = getattr(kd, f"sample_{name}"), torch.zeros(SHAPE)
    assert draws_noise(function, None, like, sigmas=SIGMAS, s_churn=1.0)
    assert not draws_noise(function, None, like, sigmas=SIGMAS)
    assert not draws_noise(function, None, like, sigmas=SIGMAS, s_churn=1.0, s_tmin=20.0)


@pytest.mark.parametrize(
    ("name", "first", "shown"),
    [
        ("euler", [0, 1, 2, 3], [0, 0, 1, 2]),
        ("dpmpp_2m", [0, 1, 2, 3], [0, 0, 1, 2]),
        ("euler_ancestral", [0, 1, 2, 3], [0, 0, 1, 2]),
        ("heun", [0, 2, 4, 6], [0, 0, 0, 1, 1, 2, 2]),
        ("dpm_2", [0, 2, 4, 6], [0, 0, 0, 1, 1, 2, 2]),
        ("dpmpp_sde", [0, 2, 4, 6], [0, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_the_forward_run_is_counted(name: str, first: list[int], shown: list[int]) -> None:
    sigmas = kd.get_sigmas_karras(4, 0.03, 14.6)
    counted = (
        forward(getattr(kd, f"sample_{name}"), None, torch.zeros(SHAPE), sigmas=sigmas, noise_sampler=None)
        if ("ancestral" in name or "sde" in name)
        else forward(getattr(kd, f"sample_{name}"), None, torch.zeros(SHAPE), sigmas=sigmas)
    )
    assert list(counted.first) == first and list(counted.shown) == shown
    assert counted.call(3, 1) == len(shown) - 1 == counted.call(3, 0)  # the last step is one call


def test_a_model_held_still_draws_by_sigma_and_leaves_the_generator_alone() -> None:
    def drawing(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape)

    still, x = Still(drawing), torch.zeros(2, 4, 3, 3)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    answers = [still(x, torch.full((2,), sigma)) for sigma in (1.0, 3.0, 1.0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
