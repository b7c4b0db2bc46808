"""The batch in one go: in-place torch everywhere, one kernel on CUDA, the same numbers from both."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib_unsampler.bench.__main__ import main as bench
from lib_unsampler.core import fused
from lib_unsampler.core.noising import (
    NOISE_KINDS,
    Draw,
    SeededDraws,
    add_noise,
    diffuse,
    normalize_noise,
    runs_fused,
    unsample,
    walk,
)
from lib_unsampler.core.philox import PhiloxDraws, box_muller, philox
from lib_unsampler.core.schedule import Levels, levels

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
cuda = pytest.mark.skipif(not CUDA, reason="no CUDA")
triton = pytest.mark.skipif(not CUDA or fused.kernels() is None, reason="no CUDA or no Triton")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
kinds = pytest.mark.parametrize("kind", NOISE_KINDS)
predictions = pytest.mark.parametrize("prediction", ["eps", "flow"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

SEEDS = (3, 2**40 + 1)
KERNEL_ERROR = 1e-5
"""Largest difference between the kernel's noise and the host's."""


def source(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def plan(prediction: str, count: int = 12, end: int = 0, increment: int = 1) -> Levels:
    top = 1.0 if prediction == "flow" else 14.6
    return levels(torch.linspace(top, 0.03, count), end, increment)


def plain(draw: Draw) -> Draw:
    """The same draws, in a form that no kernel serves."""
    return lambda j: draw(j)


def formula(x: Tensor, walked: Levels, draw: Draw, kind: str, prediction: str) -> Tensor:
    """The batch level by level through the public one-level functions."""
    states, z, sigma = {}, x.float(), torch.zeros(())
    for index in walked.visited:
        level = walked.schedule[index]
        if kind == "path":
            z = diffuse(z, draw(walked.draw_index(index)), sigma, level, prediction)
        else:
            z = add_noise(x, draw(0 if kind == "shared" else walked.draw_index(index)), level, prediction)
        states[index], sigma = z, level
    return torch.stack([states[index] for index in walked.kept]).to(x.dtype)


@devices
@kinds
@predictions
@dtypes
def test_the_torch_path_is_the_formula(device: str, kind: str, prediction: str, dtype: torch.dtype) -> None:
    x = source(2, 3, 5, 7, device=device, dtype=dtype)
    draw = plain(PhiloxDraws(SEEDS, x.shape[1:], device))
    walked = plan(prediction, increment=3)
    expected = formula(x, walked, draw, kind, prediction)
    # 'shared' is the kernel's on CUDA even for given noise, and equal to the last bit.
    assert torch.equal(unsample(x, walked, draw, kind, prediction), expected)


@devices
@kinds
@predictions
@dtypes
def test_a_level_alone_equals_the_level_in_the_batch(
    device: str, kind: str, prediction: str, dtype: torch.dtype
) -> None:
    x = source(2, 4, 9, 11, device=device, dtype=dtype)
    draw = PhiloxDraws(SEEDS, x.shape[1:], device)
    walked = plan(prediction, 40)
    batch = unsample(x, walked, draw, kind, prediction)
    for slot, index in list(enumerate(walked.kept))[::7]:
        alone = unsample(x, replace(walked, kept=(index,)), draw, kind, prediction)
        assert torch.equal(alone[0], batch[slot])


@devices
@kinds
def test_a_batch_equals_its_images_alone(device: str, kind: str) -> None:
    x = source(2, 4, 9, 11, device=device)
    walked = plan("eps", 7)
    batch = unsample(x, walked, PhiloxDraws(SEEDS, x.shape[1:], device), kind, "eps")
    for image, seed in enumerate(SEEDS):
        alone = unsample(x[image : image + 1], walked, PhiloxDraws((seed,), x.shape[1:], device), kind, "eps")
        assert torch.equal(alone[:, 0], batch[:, image])


@devices
@kinds
@pytest.mark.parametrize("increment", [2, 5])
def test_thinning_keeps_the_levels_that_remain(device: str, kind: str, increment: int) -> None:
    x = source(1, 4, 8, 8, device=device)
    draw = PhiloxDraws((1,), x.shape[1:], device)
    whole, thin = plan("eps", 23, end=4), plan("eps", 23, end=4, increment=increment)
    batch = dict(zip(whole.kept, unsample(x, whole, draw, kind, "eps")))
    for index, z in zip(thin.kept, unsample(x, thin, draw, kind, "eps")):
        assert torch.equal(z, batch[index])


@devices
@kinds
@predictions
def test_a_repeated_final_zero_is_no_level(device: str, kind: str, prediction: str) -> None:
    x = source(2, 4, 8, 8, device=device)
    draw = PhiloxDraws(SEEDS, x.shape[1:], device)
    walked = levels(torch.tensor([0.9, 0.5, 0.2, 0.0, 0.0]))
    found = unsample(x, walked, draw, kind, prediction)
    torch.testing.assert_close(found, formula(x, walked, draw, kind, prediction), rtol=0, atol=3 * KERNEL_ERROR)


@devices
@kinds
@dtypes
def test_unsample_is_walk_collected(device: str, kind: str, dtype: torch.dtype) -> None:
    x = source(2, 4, 3, 8, 8, device=device, dtype=dtype)
    draw = plain(PhiloxDraws(SEEDS, x.shape[1:], device))
    walked = plan("eps", 9, increment=2)
    states = torch.stack([z for _, z in walk(x, walked, draw, kind, "eps")]).to(dtype)
    assert torch.equal(unsample(x, walked, draw, kind, "eps"), states)


@devices
@kinds
def test_normalized_batches(device: str, kind: str) -> None:
    x = source(2, 4, 8, 8, device=device)
    draw = PhiloxDraws(SEEDS, x.shape[1:], device)
    walked = plan("eps", 6)
    found = unsample(x, walked, draw, kind, "eps", normalize=True)
    states = [z for _, z in walk(x, walked, draw, kind, "eps", normalize=True)]
    assert torch.equal(found, torch.stack(states))
    if kind == "shared":
        assert torch.equal(found[-1], x + normalize_noise(draw(0)) * walked.sigmas[-1].to(device))


@devices
def test_torchs_own_generators(device: str) -> None:
    """The host's CPU and GPU sources: draw j of each image is its generator's j-th randn."""
    shape = (4, 16, 16)
    generators = [torch.Generator(device).manual_seed(seed) for seed in (5, 6)]
    expected = [[torch.randn(shape, generator=g, device=device) for g in generators] for _ in range(4)]
    draws = SeededDraws((5, 6), shape, device)
    assert torch.equal(draws(0), torch.stack(expected[0]))
    assert torch.equal(draws(3), torch.stack(expected[3]))


@devices
@predictions
def test_shared_noise_at_the_start_level_is_the_hosts_state(device: str, prediction: str) -> None:
    """img2img's own arithmetic: multiply, then add, each rounded."""
    x = source(1, 4, 64, 64, device=device)
    walked = plan(prediction, end=3)
    noise = SeededDraws((9,), x.shape[1:], device)(0)
    sigma = walked.sigmas[-1].to(device)
    host = noise * sigma + (1 - sigma) * x if prediction == "flow" else x + noise * sigma
    assert torch.equal(unsample(x, walked, SeededDraws((9,), x.shape[1:], device), "shared", prediction)[-1], host)


@pytest.mark.parametrize("kind", ["independent", "path"])
def test_draws_of_another_shape_are_refused(kind: str) -> None:
    x = source(2, 4, 8, 8, device="cpu")
    with pytest.raises(ValueError, match="draws of shape"):
        unsample(x, plan("eps"), PhiloxDraws((1,), (4, 8, 8)), kind, "eps")


def test_the_cpu_takes_the_torch_path() -> None:
    x = source(1, 4, 8, 8, device="cpu")
    assert not any(runs_fused(x, plan("eps"), PhiloxDraws((1,), (4, 8, 8)), kind) for kind in NOISE_KINDS)


def tolerance(expected: Tensor, walked: Levels) -> Tensor:
    """The kernel's noise error at the largest sigma, and one rounding to the output's dtype."""
    return KERNEL_ERROR * walked.schedule.max() + torch.finfo(expected.dtype).eps * expected.abs().float()


@triton
@kinds
@predictions
@dtypes
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (2, 3, 5, 7), (2, 16, 2, 33, 31)], ids=str)
def test_kernel_and_torch_agree(kind: str, prediction: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = source(*shape, device="cuda", dtype=dtype)
    draw = PhiloxDraws(SEEDS, shape[1:], "cuda")
    walked = plan(prediction, 75, increment=2)
    assert runs_fused(x, walked, draw, kind)
    found = unsample(x, walked, draw, kind, prediction)
    expected = formula(x, walked, draw, kind, prediction)
    # On a path the errors of up to 75 draws add up as variances do.
    bound = tolerance(expected, walked) * (3 if kind == "path" else 1)
    assert ((found.float() - expected.float()).abs() <= bound).all()


@triton
def test_kernel_noise_is_the_hosts_within_1e5() -> None:
    """66 million numbers: x = 0 at sigma 1 leaves the noise itself."""
    shape, count = (4, 128, 128), 1000
    walked = levels(torch.ones(count))
    draw = PhiloxDraws((7,), shape, "cuda")
    found = unsample(torch.zeros((1, *shape), device="cuda"), walked, draw, "independent", "eps")
    worst = max(float((found[j] - draw(j)).abs().max()) for j in range(count))
    assert worst <= KERNEL_ERROR


@triton
def test_the_kernels_words_and_transform_at_the_extremes() -> None:
    import triton as tt
    import triton.language as tl

    from lib_unsampler.core import kernels

    @tt.jit
    def transform(out, x, y, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202 (Triton's own language)
        i = tl.arange(0, BLOCK)
        bits_x = tl.load(x + i).to(tl.uint32)
        bits_y = tl.load(y + i).to(tl.uint32)
        tl.store(out + i, kernels.box_muller(bits_x, bits_y))

    low = torch.arange(512)
    x = torch.cat([low, 2**31 - 256 + low, 2**32 - 2**25 - 256 + low, 2**32 - 512 + low]).cuda()
    y = torch.randint(0, 2**32, (2048,), generator=torch.Generator().manual_seed(0)).cuda()
    for ends in (y, torch.full_like(y, 2**30), torch.full_like(y, 3 * 2**30), torch.full_like(y, 2**32 - 1)):
        out = torch.empty(2048, device="cuda")
        transform[(1,)](out, x, ends, BLOCK=2048)
        assert float((out - box_muller(x, ends)).abs().max()) <= KERNEL_ERROR


@triton
@kinds
def test_nothing_waits_for_the_device(kind: str) -> None:
    x = source(1, 4, 64, 64, device="cuda")
    draw = PhiloxDraws((1,), x.shape[1:], "cuda")
    assert runs_fused(x, plan("eps", 500), draw, kind)
    torch.cuda.set_sync_debug_mode("error")
    try:
        unsample(x, plan("eps", 500), draw, kind, "eps")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@triton
@kinds
@dtypes
def test_peak_memory_is_the_output(kind: str, dtype: torch.dtype) -> None:
    x = source(1, 4, 64, 64, device="cuda", dtype=dtype)
    draw = PhiloxDraws((1,), x.shape[1:], "cuda")
    unsample(x, plan("eps", 3), draw, kind, "eps")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    z = unsample(x, plan("eps", 1000), draw, kind, "eps")
    assert torch.cuda.max_memory_allocated() - before <= 1.001 * z.numel() * z.element_size()


@triton
def test_views_that_are_not_contiguous() -> None:
    x = source(2, 8, 8, 4, device="cuda").permute(0, 3, 1, 2)
    draw = PhiloxDraws(SEEDS, x.shape[1:], "cuda")
    found = unsample(x, plan("eps"), draw, "independent", "eps")
    assert torch.equal(found, unsample(x.contiguous(), plan("eps"), draw, "independent", "eps"))


@triton
def test_addresses_that_are_not_aligned() -> None:
    """A kernel compiled for aligned latents, kept for its next launch, must not meet others."""
    memory = source(1 + 4 * 8 * 8, device="cuda")
    draw = PhiloxDraws((1,), (4, 8, 8), "cuda")
    for _ in range(2):
        for start in (0, 1):
            x = memory[start : start + 4 * 8 * 8].view(1, 4, 8, 8)
            found = unsample(x, plan("eps"), draw, "independent", "eps")
            assert torch.equal(found, unsample(x.clone(), plan("eps"), draw, "independent", "eps"))


@triton
@kinds
def test_every_stream_and_every_schedule(kind: str) -> None:
    """Factors stay on the device; another stream, schedule, start or prediction must not get the wrong ones."""
    x = source(1, 4, 8, 8, device="cuda")
    draw = PhiloxDraws((2**64 - 1,), x.shape[1:], "cuda")
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for prediction, top, end in (("eps", 1.0, 0), ("flow", 1.0, 0), ("eps", 1.0, 5), ("eps", 0.9, 0)):
                walked = levels(torch.linspace(top, 0.03, 12), end)
                found = unsample(x, walked, draw, kind, prediction)
                expected = formula(x, walked, draw, kind, prediction)
                assert float((found - expected).abs().max()) <= 3 * KERNEL_ERROR


@triton
@kinds
def test_uneven_levels_take_the_torch_path(kind: str) -> None:
    x = source(2, 4, 8, 8, device="cuda")
    draw = PhiloxDraws(SEEDS, x.shape[1:], "cuda")
    uneven = replace(plan("eps"), kept=(11, 9, 8, 2))
    assert not runs_fused(x, uneven, draw, kind)
    assert torch.equal(unsample(x, uneven, draw, kind, "eps"), formula(x, uneven, draw, kind, "eps"))


@triton
def test_words_of_the_first_draw() -> None:
    """The kernel's x = 0, sigma = 1 batch follows philox() for keys and draws of all 32 bits."""
    key = 0x299F31D0A4093822
    draw = PhiloxDraws((key,), (1, 4, 4), "cuda")
    found = unsample(torch.zeros((1, 1, 4, 4), device="cuda"), levels(torch.ones(1)), draw, "independent", "eps")
    zero = torch.zeros(16, dtype=torch.int64)
    x, y, _, _ = philox((zero, zero, torch.arange(16), zero), (key & 0xFFFFFFFF, key >> 32))
    torch.testing.assert_close(found.cpu().flatten(), box_muller(x, y), rtol=0, atol=KERNEL_ERROR)


def test_the_bench_names_the_code_path(capsys: pytest.CaptureFixture[str]) -> None:
    bench(["noising", "--json", "--device", "cpu", "--frames", "2"])
    report = json.loads(capsys.readouterr().out)
    used = {record["path"] for record in report["records"] if record["method"].startswith("ours")}
    assert used == {"torch"}
    assert {record["shape"] for record in report["records"]} == {"SD1.5", "SDXL", "Flux"}
    assert report["machine"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("args", [["loudness"], [], ["noising", "--frames", "0"], ["noising", "--frames", "many"]])
def test_a_mistaken_bench_exits_with_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench(args)
    assert stop.value.code == 2
    if args:
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_triton_is_not_imported_before_it_is_used() -> None:
    """Inside a WebUI every extension is imported at start: Triton must wait for its first batch."""
    code = "import sys, lib_unsampler.core.noising as n; assert 'triton' not in sys.modules; print(n.fused.kernels())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
