"""Replay over the real k-diffusion samplers: every state repeated bit for bit, the source given back bit for
bit, and an edit that follows the closed form of the Gaussian prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_unsampler.bench import replay as bench
from lib_unsampler.core.kept import InMemory, Kept
from lib_unsampler.core.noising import SeededDraws, walk
from lib_unsampler.core.replay import Recorder, Recording, ReplayError, check_function, record, replay
from lib_unsampler.core.schedule import levels
from lib_unsampler.standalone.embedded import Denoiser, GaussianPrior, guided, make_model, masked
from lib_unsampler.standalone.sampling import STOCHASTIC, get_sigmas, kd

HEIGHT, WIDTH, STEPS = 12, 16, 10
MODELS = ("gaussian", "mixture")
SEEDS = (3, 4)
MULTISTEP = ("dpmpp_2m_sde", "dpmpp_3m_sde")
ONE_STEP = tuple(s for s in STOCHASTIC if s not in MULTISTEP)
samplers = pytest.mark.parametrize("sampler", STOCHASTIC)


def flow_ancestral(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Callable[[Mapping[str, Any]], None] = lambda info: None,
    disable: bool = True,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The rectified-flow ancestral step, as Forge has it: down past s', then renoised to s'."""
    assert noise_sampler is not None
    for i, (s, to) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model(x, s.expand(len(x)))
        callback({"x": x, "i": i, "denoised": denoised})
        if to == 0:
            return denoised
        down = to * (1 + (to / s - 1) * eta)
        renoise = (to**2 - down**2 * (1 - to) ** 2 / (1 - down) ** 2) ** 0.5
        x = down / s * x + (1 - down / s) * denoised
        x = ((1 - to) / (1 - down)) * x + noise_sampler(s, to) * s_noise * renoise
    raise AssertionError("the schedule ends above 0")


def consistency(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Callable[[Mapping[str, Any]], None] = lambda info: None,
    disable: bool = True,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """LCM's step as the WebUI writes it: the noise scaled from the left, added in place."""
    assert noise_sampler is not None
    for i, (s, to) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model(x, s.expand(len(x)))
        callback({"x": x, "i": i, "denoised": denoised})
        x = denoised.clone()
        if to > 0:
            x += to * noise_sampler(s, to)
    return x


def function_of(sampler: str) -> Callable[..., Tensor]:
    own = {"flow_ancestral": flow_ancestral, "consistency": consistency}
    return own[sampler] if sampler in own else getattr(kd, f"sample_{sampler}")


def fresh(first: int, seeds: tuple[int, ...] = SEEDS) -> Iterator[Tensor]:
    draw = SeededDraws(seeds, (3, HEIGHT, WIDTH))
    return (draw(j) for j in count(first))


@dataclass
class World:
    """A source, its drawn levels, and a denoiser that counts its calls."""

    model: str
    cfg: float = 1.0
    seeds: tuple[int, ...] = SEEDS
    steps: int = STEPS

    def __post_init__(self) -> None:
        self.prediction = "flow" if self.model == "gaussian-flow" else "eps"
        self.sigmas = get_sigmas("karras", self.steps, self.prediction)
        noise = SeededDraws(self.seeds, (3, HEIGHT, WIDTH))(0)
        self.source = 0.6 * make_model("gaussian", "sunset", HEIGHT, WIDTH).mean + 0.3 * noise
        draw = SeededDraws(self.seeds, (3, HEIGHT, WIDTH))
        plan = levels(self.sigmas)
        self.states = torch.stack([z for _, z in walk(self.source, plan, draw, "independent", self.prediction)])
        self.calls = 0

    def denoiser(self, prompt: str = "sunset") -> Denoiser:
        pair = [make_model(self.model, p, HEIGHT, WIDTH) for p in (prompt, "night")]
        inner = guided(*pair, self.cfg)

        def model(z: Tensor, sigma: Tensor) -> Tensor:
            self.calls += 1
            return inner(z, sigma)

        return model

    def record(self, sampler: str, **options: Any) -> Recording:
        options = {"disable": True, **options}
        model = options.pop("model", None) or self.denoiser()
        return record(
            function_of(sampler), model, self.sigmas, self.states, self.source,
            fresh(self.steps, self.seeds), self.prediction, **options,
        )  # fmt: skip

    def replay(self, recording: Recording, prompt: str = "sunset", skip: int = 0, **options: Any) -> Tensor:
        options = {"disable": True, **options}
        model = options.pop("model", None) or self.denoiser(prompt)
        return replay(function_of(recording.sampler), model, self.sigmas, recording, skip, **options)


def decibels(found: Tensor, truth: Tensor) -> float:
    return float(20 * torch.log10(truth.std() / (found - truth).double().square().mean().sqrt()))


CASES = [(s, m) for s in STOCHASTIC for m in MODELS]
CASES += [("consistency", "gaussian"), ("flow_ancestral", "gaussian-flow")]


@pytest.mark.parametrize(("sampler", "model"), CASES)
@pytest.mark.parametrize("cfg", [1.0, 3.0, 7.0, 12.0])
def test_replay_repeats_every_state_and_gives_the_source_bit_for_bit(sampler: str, model: str, cfg: float) -> None:
    world = World(model, cfg)
    recording = world.record(sampler)
    recorded, world.calls = world.calls, 0
    seen: list[Tensor] = []
    out = world.replay(recording, callback=lambda info: seen.append(info["x"]))
    replayed, world.calls = world.calls, 0
    assert torch.equal(torch.stack(seen), recording.states)
    assert torch.equal(out, world.source)
    plain = function_of(sampler)(
        world.denoiser(), world.states[-1], world.sigmas, disable=True, noise_sampler=lambda *_: torch.zeros(())
    )
    assert recorded == replayed == world.calls and plain.shape == out.shape


@pytest.mark.parametrize(("sampler", "model"), CASES)
def test_the_states_are_the_drawn_levels(sampler: str, model: str) -> None:
    """Exact but for the rounding of a noise, also where the sampler asks for one between two levels."""
    world = World(model, 7.0)
    levels_seen: dict[float, Tensor] = {}
    inner = world.denoiser()

    def model_seen(z: Tensor, sigma: Tensor) -> Tensor:
        levels_seen[float(sigma[0])] = z
        return inner(z, sigma)

    recording = world.record(sampler, model=model_seen)
    torch.testing.assert_close(recording.states, world.states.flip(0), rtol=2e-6, atol=2e-6)
    if sampler == "dpmpp_sde":
        middles = sorted(set(levels_seen) - set(world.sigmas.tolist()), reverse=True)
        assert len(middles) == STEPS - 1
        for sigma, noise in zip(middles, fresh(STEPS)):
            torch.testing.assert_close(levels_seen[sigma], world.source + sigma * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.0), (1.0, 1.1), (0.7, 0.9)])
def test_the_noises_are_the_papers(eta: float, s_noise: float) -> None:
    """Euler a, written out in float64 from the states alone."""
    world = World("gaussian", 3.0)
    recording = world.record("euler_ancestral", eta=eta, s_noise=s_noise)
    model, sigmas, x = world.denoiser(), world.sigmas.double(), recording.states.double()
    for i in range(STEPS - 1):
        down, up = kd.get_ancestral_step(sigmas[i], sigmas[i + 1], eta)
        denoised = model(x[i], sigmas[i].expand(2))
        mu = denoised + (x[i] - denoised) * down / sigmas[i]
        truth = (world.states[-2 - i] - mu) / (s_noise * up)
        torch.testing.assert_close(recording.maps[i].double(), truth, rtol=1e-4, atol=1e-4)
    assert torch.equal(world.replay(recording, eta=eta, s_noise=s_noise), world.source)


def test_an_open_loop_and_a_missing_residual_are_worse() -> None:
    """Noises taken from the drawn z alone, as in the paper's formula, let the rounding grow."""
    world = World("mixture", 12.0, steps=20)
    recording = world.record("euler_ancestral")
    maps = []
    for i in range(19):
        here = world.states[-1 - i]
        maps_of = InMemory()
        given = (world.sigmas[i:], world.states[: 20 - i], world.source, fresh(20), "eps")
        recorder = Recorder(*given, InMemory(), maps_of)
        kd.sample_euler_ancestral(
            world.denoiser(), here, world.sigmas[i : i + 2], noise_sampler=recorder, callback=recorder.callback,
            disable=True,
        )  # fmt: skip
        recorder.close()
        maps += [*maps_of.stack()]
    values = {**vars(recording), "maps": torch.stack(maps)}
    open_loop = decibels(world.replay(Recording(**values)), world.source)
    bare = Recording(**{**vars(recording), "residual": torch.zeros_like(recording.residual)})
    assert decibels(world.replay(bare), world.source) < 60 < open_loop < 180


@samplers
def test_a_batch_is_its_single_runs(sampler: str) -> None:
    together = World("gaussian", 7.0).record(sampler)
    for i, seed in enumerate(SEEDS):
        alone = World("gaussian", 7.0, seeds=(seed,)).record(sampler)
        assert torch.equal(together.maps[:, i : i + 1], alone.maps)
        assert torch.equal(together.residual[i : i + 1], alone.residual)


def test_another_prompt_moves_the_source_by_the_closed_form() -> None:
    r"""On Gaussian priors that differ in their mean, whatever the maps:
    :math:`\delta' = \frac{down}{s} \delta + (1 - \frac{down}{s}) (G \delta + (1 - G) \Delta\mu)`, G the gain at s.
    """
    world = World("gaussian")
    recording = world.record("euler_ancestral")
    own, other = (make_model("gaussian", p, HEIGHT, WIDTH) for p in ("sunset", "sea"))
    assert isinstance(own, GaussianPrior) and isinstance(other, GaussianPrior)
    apart = (other.mean - own.mean)[None]
    for skip in (0, 4, 9):
        delta = torch.zeros_like(apart)
        for s, to in zip(world.sigmas[skip:], world.sigmas[skip + 1 :]):
            keep = kd.get_ancestral_step(s, to)[0] / s
            gain = own.power / (own.power + s**2)
            delta = keep * delta + (1 - keep) * (apart + GaussianPrior._filter(delta - apart, gain))
        edit = world.replay(recording, "sea", skip)
        torch.testing.assert_close(edit - world.source, delta.expand_as(edit), rtol=0, atol=2e-5)
    assert delta.abs().max() < 0.02 < 0.5 < (world.replay(recording, "sea") - world.source).abs().max()


@pytest.mark.parametrize("sampler", [*ONE_STEP, "consistency"])
def test_every_skip_gives_the_source_and_more_of_it_under_another_prompt(sampler: str) -> None:
    world = World("gaussian", 3.0)
    recording = world.record(sampler)
    changes = []
    for skip in range(STEPS):
        assert torch.equal(world.replay(recording, skip=skip), world.source)
        changes.append(float((world.replay(recording, "sea", skip) - world.source).square().mean()))
    assert changes == sorted(changes, reverse=True) and changes[-1] < 1e-3 * changes[0]
    assert torch.equal(world.replay(recording, "sea", 99), world.replay(recording, "sea", STEPS - 1))


@pytest.mark.parametrize("sampler", MULTISTEP)
def test_samplers_that_look_back_refuse_to_skip(sampler: str) -> None:
    world = World("gaussian")
    with pytest.raises(ReplayError, match=f"skip: '{sampler}' looks back"):
        world.replay(world.record(sampler), skip=1)


@samplers
def test_outside_a_mask_an_edit_is_the_source(sampler: str) -> None:
    world = World("gaussian", 7.0)
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 4:] = 0.5
    mask[..., 8:] = 1.0
    recording = world.record(sampler, model=masked(world.denoiser(), world.source, mask))
    own = world.replay(recording, model=masked(world.denoiser(), world.source, mask))
    edit = world.replay(recording, model=masked(world.denoiser("sea"), world.source, mask))
    assert torch.equal(own, world.source)
    assert torch.equal(edit[..., :4], world.source[..., :4])
    assert (edit - world.source)[..., 8:].abs().mean() > 0.1


def test_a_single_picture_serves_a_batch_of_prompts() -> None:
    world = World("gaussian", seeds=(3,))
    recording = world.record("euler_ancestral")
    means = torch.stack([make_model("gaussian", p, HEIGHT, WIDTH).mean for p in ("sunset", "sea", "snow")])
    prior = make_model("gaussian", "", HEIGHT, WIDTH)
    assert isinstance(prior, GaussianPrior)
    batch = recording.like(torch.empty(3, 3, HEIGHT, WIDTH))
    out = world.replay(batch, model=GaussianPrior(means, prior.power))
    torch.testing.assert_close(out[:1], world.source, rtol=0, atol=1e-5)  # a batch's mean broadcasts, rounding differs
    for one, prompt in zip(out[1:], ("sea", "snow")):
        torch.testing.assert_close(one[None], world.replay(recording, prompt), rtol=0, atol=1e-5)
    with pytest.raises(ReplayError, match=r"\(1, 3, 12, 16\), which do not fit \(3, 3, 8, 16\)"):
        recording.like(torch.empty(3, 3, 8, 16))


def test_one_step_alone_and_repeated_levels() -> None:
    """One level has no noise, only a residual; between two equal levels a sampler adds none."""
    one = World("gaussian", 7.0, steps=1)
    recording = one.record("euler_ancestral")
    assert recording.maps.shape == (0, 2, 3, HEIGHT, WIDTH) and torch.equal(one.replay(recording), one.source)
    world = World("gaussian", 7.0)
    world.sigmas = torch.cat([world.sigmas[:1], world.sigmas])
    world.states = torch.cat([world.states, world.states[-1:]])
    recording = world.record("euler_ancestral")
    assert torch.isfinite(recording.maps).all() and torch.equal(world.replay(recording), world.source)


@pytest.mark.parametrize("sampler", [*STOCHASTIC, "consistency"])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_a_schedule_that_ends_above_zero_has_the_source_there(sampler: str, cfg: float) -> None:
    world = World("gaussian", cfg)
    world.sigmas = kd.get_sigmas_karras(STEPS + 1, 0.03, 14.6)[:-1]
    draw = SeededDraws(world.seeds, (3, HEIGHT, WIDTH))
    plan = levels(world.sigmas, whole=True)
    assert len(plan.visited) == STEPS
    world.states = torch.stack([z for _, z in walk(world.source, plan, draw, "independent", "eps")])
    recording = world.record(sampler)
    assert torch.equal(world.replay(recording), world.source)
    torch.testing.assert_close(recording.states, world.states.flip(0), rtol=2e-6, atol=2e-6)
    edit = world.replay(recording, "sea")
    assert (edit - world.source).abs().max() > 0.01 and edit.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_on_disk_it_is_the_same_recording(sampler: str, tmp_path: Path) -> None:
    world = World("gaussian", 7.0)
    held = world.record(sampler)
    kept = world.record(sampler, store=lambda: Kept(tmp_path / "x.safetensors"))
    assert kept.steps == held.steps and not list(tmp_path.iterdir())
    for part in ("states", "maps", "residual"):
        assert torch.equal(getattr(kept, part), getattr(held, part))
    assert torch.equal(world.replay(kept), world.source)


def own_memory() -> int:
    """Bytes of this process that the system could not drop and read again."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told so by Linux alone")
def test_recording_holds_a_few_levels_however_many_there_are(tmp_path: Path) -> None:
    sigmas, source = get_sigmas("karras", 60, "eps"), torch.rand(1, 3, 512, 512)
    room: list[int] = []

    with Kept(tmp_path / "x") as drawn:
        for _, z in walk(source, levels(sigmas), SeededDraws((1,), (3, 512, 512)), "independent", "eps"):
            drawn.add(z)
        made = record(
            kd.sample_euler_ancestral, lambda x, _: 0.5 * x, sigmas, drawn.stack(), source, iter(()), "eps",
            store=lambda: Kept(tmp_path / "x"), callback=lambda _: room.append(own_memory()), disable=True,
        )  # fmt: skip

    assert made.states.shape == (60, *source.shape)
    assert max(*room[10:], own_memory()) - room[10] < 16 * 4 * source.numel()  # held, the last 50 twice would be 100


def test_the_samplers_callback_is_called_while_recording() -> None:
    seen: list[int] = []
    World("gaussian").record("euler_ancestral", callback=lambda info: seen.append(info["i"]))
    assert seen == list(range(STEPS))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpm_fast", "dpm_adaptive"])
def test_samplers_without_noise_are_refused_by_name(sampler: str) -> None:
    with pytest.raises(ReplayError, match=f"sampler: '{sampler}' adds no noise.*'euler_ancestral'"):
        check_function(function_of(sampler))


@pytest.mark.parametrize("option", ["eta", "s_noise"])
def test_no_noise_is_refused_by_name(option: str) -> None:
    with pytest.raises(ReplayError, match=f"{option}: 0 leaves 'euler_ancestral' without noise"):
        World("gaussian").record("euler_ancestral", **{option: 0.0})


def test_what_differs_from_the_recording_is_refused_by_name() -> None:
    world = World("gaussian")
    recording = world.record("euler_ancestral")
    with pytest.raises(ReplayError, match="eta: 0.5 is not 1.0, which was recorded"):
        world.replay(recording, eta=0.5)
    with pytest.raises(ReplayError, match="sampler: 'dpm_2_ancestral' is not 'euler_ancestral'"):
        replay(kd.sample_dpm_2_ancestral, world.denoiser(), world.sigmas, recording)
    with pytest.raises(ReplayError, match="schedule: not the one"):
        replay(kd.sample_euler_ancestral, world.denoiser(), world.sigmas * 0.9, recording)
    with pytest.raises(ReplayError, match="states: .* are not one z for each of 9 levels"):
        world.sigmas = world.sigmas[1:]
        world.record("euler_ancestral")
    with pytest.raises(ReplayError, match="do not fit residual"):
        Recording(**{**vars(recording), "maps": recording.maps[1:]})
    with pytest.raises(ReplayError, match="do not fit residual"):
        Recording(**{**vars(recording), "states": recording.states[1:]})


def test_the_bench_compares_at_equal_calls() -> None:
    world = World("gaussian")
    found = {name: bench.measure(name, "gaussian", 1.0, world.source, world.sigmas) for name in bench.METHODS}
    calls = {name: r["calls"] for name, r in found.items()}
    two_calls, solved = calls.pop("replay, DPM++ SDE"), calls.pop("exact inversion, Euler")
    assert set(calls.values()) == {2 * STEPS} and two_calls == 2 * (2 * STEPS - 1) and solved > 2 * STEPS
    assert {name for name, r in found.items() if r["exact"]} == {
        "replay, Euler a", "replay, DPM++ 2M SDE", "replay, DPM++ SDE"
    }  # fmt: skip
    fine = get_sigmas("karras", 8 * STEPS, "eps")
    coarse = found["FlipSigmas, Euler"]["db"]
    assert bench.measure("FlipSigmas, Euler", "gaussian", 1.0, world.source, fine)["db"] > coarse + 6
