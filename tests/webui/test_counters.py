"""What the host shows other extensions at each model call, and its progress bar, while the model is driven."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lib_unsampler.core.rehearsal import forward

FULL = {"denoising_strength": 1.0, "cfg_scale": 1}


@pytest.fixture
def shown(host: SimpleNamespace) -> list[tuple[Any, ...]]:
    """What an extension's callback is given at every model call: counters, the denoiser's own and the sigma."""
    from modules import script_callbacks

    seen: list[tuple[Any, ...]] = []

    def probe(params: Any) -> None:
        counters = (
            params.sampling_step,
            params.total_sampling_steps,
            params.denoiser.step,
            params.denoiser.total_steps,
        )
        seen.append((*counters, round(float(params.sigma[0]), 4)))

    script_callbacks.on_cfg_denoiser(probe)
    return seen


def plain(host: SimpleNamespace, shown: list[tuple[Any, ...]], **fields: Any) -> list[tuple[Any, ...]]:
    """What is shown in a run of img2img without us."""
    host.run(**fields)
    seen = list(shown)
    shown.clear()
    return seen


@pytest.mark.parametrize("solver", ["exact", "reverse"])
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2", "DPM++ 2M", "LMS", "Euler a", "DPM++ 2S a"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.one_of(3)
def test_an_inversion_shows_what_the_forward_run_shows(
    host: SimpleNamespace, shown: list[tuple[Any, ...]], sampler: str, solver: str, strength: float
) -> None:
    fields = {**FULL, "sampler_name": sampler, "denoising_strength": strength}
    run = plain(host, shown, **fields)
    host.run({"mode": "invert", "output": ["init", "frames"], "solver": solver, "panel": True}, **fields)
    back, forth = shown[: -len(run)], shown[-len(run) :]
    assert forth == run and set(back) <= set(run)
    if sampler in ("Euler", "Heun", "DPM2", "DPM++ 2M"):
        assert set(back) == set(run) or solver == "reverse"
    assert {call[-1] for call in back} >= {run[0][-1], run[-1][-1]}  # every level, the panels' too


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M"])
def test_a_report_shows_what_the_forward_run_shows(
    host: SimpleNamespace, shown: list[tuple[Any, ...]], sampler: str
) -> None:
    fields = {**FULL, "sampler_name": sampler}
    run = plain(host, shown, **fields)
    host.run({"mode": "invert", "output": ["init"], "report": True}, **fields)
    assert shown[-2 * len(run) :] == run * 2  # the report's, then init's


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2S a", "DPM++ SDE"])
@pytest.mark.parametrize("skip", [0, 3])
def test_a_replay_shows_what_the_forward_run_shows(
    host: SimpleNamespace, shown: list[tuple[Any, ...]], sampler: str, skip: int
) -> None:
    fields = {**FULL, "sampler_name": sampler}
    run = plain(host, shown, **fields)
    host.run({"mode": "replay", "output": ["init"], "skip": skip}, **fields)
    begins = next(i for i, call in enumerate(run) if call == shown[0])
    left = run[begins:]
    assert len(left) == len(run) - skip * (1 if sampler == "Euler a" else 2)
    assert shown == [left[0], *left, *left]  # the first is asked twice


@pytest.mark.parametrize(("sampler", "lag"), [("Euler", 1), ("DPM++ 2M", 1), ("LMS", 1)])
def test_the_host_s_number_lags_by_one(host: SimpleNamespace, sampler: str, lag: int) -> None:
    """Derived from the sampler, not listed: call k of a one-call sampler is shown k - 1, as DESIGN 3.2 says."""
    import torch
    from k_diffusion import sampling
    from modules import sd_samplers

    function = getattr(sampling, sd_samplers.FUNCTIONS[sampler])
    counted = forward(function, None, torch.zeros(1, 4, 8, 8), sigmas=sampling.get_sigmas_karras(8, 0.03, 14.6))
    assert counted.shown == tuple(max(0, k - lag) for k in range(8)) and counted.first == tuple(range(8))


@pytest.mark.parametrize("window", [(0, 0.5), (0.5, 1), (0.25, 0.75)])
@pytest.mark.parametrize("solver", ["exact"])
def test_an_effect_on_some_steps_comes_back(host: SimpleNamespace, window: tuple[float, float], solver: str) -> None:
    """ControlNet's start and end, LoRA block weight and others are active on a share of the steps that is shown."""
    from modules import script_callbacks

    def effect(params: Any) -> None:
        if window[0] <= params.sampling_step / params.total_sampling_steps <= window[1]:
            params.x = params.x * (1 - 0.4 * params.sigma.max() / (1 + params.sigma.max()))

    script_callbacks.on_cfg_denoiser(effect)
    p, _ = host.run({"mode": "invert", "output": ["init"], "solver": solver}, **FULL)
    assert not p.comments
    assert (p.latest_samples - p.init_latent).square().mean().sqrt() < 1e-5


class Bar:
    """The host's progress, as its API reckons it, asked at every model call and wherever ours moves it."""

    def __init__(self, host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        from modules import script_callbacks

        from lib_unsampler.webui.host import progress

        self.state, self.seen = host.shared.state, []
        script_callbacks.on_cfg_denoiser(lambda params: self.ask())
        for owner, name in ((progress.Mirrored, "at"), (progress.Mirrored, "done"), (progress.Progress, "at")):
            monkeypatch.setattr(owner, name, self._asking(getattr(owner, name)))
        nextjob = type(self.state).nextjob
        monkeypatch.setattr(type(self.state), "nextjob", self._asking(nextjob))

    def _asking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def asking(*args: Any) -> Any:
            made = function(*args)
            self.ask()
            return made

        return asking

    def ask(self) -> None:
        state = self.state
        done = state.job_no / state.job_count
        if state.sampling_steps:
            done += state.sampling_step / state.sampling_steps / state.job_count
        self.seen.append(done)


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M"])
@pytest.mark.parametrize("output", [["init"], ["frames"], ["init", "frames"]])
@pytest.mark.parametrize("report", [False, True])
@pytest.mark.one_of(4)
def test_the_bar_never_falls_in_an_inversion(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, sampler: str, output: list[str], report: bool
) -> None:
    bar = Bar(host, monkeypatch)
    settings = {"mode": "invert", "output": output, "panel": "frames" in output, "report": report}
    for _ in range(2):  # the second time what was inverted is taken again
        bar.seen.clear()
        host.run(settings, sampler_name=sampler, n_iter=2, **FULL)
        assert_rises(bar, host.shared.state)


@pytest.mark.parametrize("output", [["init"], ["frames"], ["init", "frames"], ["latents"]])
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.one_of(3)
def test_the_bar_never_falls_in_a_replay(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, output: list[str], skip: int
) -> None:
    bar = Bar(host, monkeypatch)
    host.run({"mode": "replay", "output": output, "skip": skip}, sampler_name="Euler a", n_iter=2, **FULL)
    assert_rises(bar, host.shared.state)


def test_the_bar_goes_on_where_jobs_are_added_later(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """X/Y/Z plot and loopback count their cells before each adds what it does beside the sampling."""
    bar = Bar(host, monkeypatch)
    host.shared.state.__init__()
    host.shared.state.job_count = 3
    for _ in range(3):
        host.processing.process_images(host.make(({"mode": "invert", "output": ["init", "frames"]},), **FULL))
    assert_rises(bar, host.shared.state)


def assert_rises(bar: Bar, state: Any) -> None:
    assert all(later >= before - 1e-9 for before, later in zip(bar.seen, bar.seen[1:])), bar.seen
    assert 0 <= bar.seen[0] <= 0.25 and bar.seen[-1] > 0.9
    assert state.job_no == pytest.approx(state.job_count) and state.textinfo is None


def test_previews_go_on_while_the_step_counts_down(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host shows its latent when steps have gone by since the last preview."""
    from lib_unsampler.webui.host.progress import Mirrored

    state, at = host.shared.state, Mirrored.at

    def polled(self: Any, part: int, text: str) -> None:
        at(self, part, text)
        state.set_current_image()

    monkeypatch.setattr(Mirrored, "at", polled)
    host.run({"mode": "invert", "output": ["latents"]}, **FULL)
    assert (
        sum(not isinstance(shown, Image.Image) for shown in state.previews) == 7
    )  # as many as there are levels between two
