"""Every field of Batch Unsampler, once: type, bounds, default and help.

The command line, the accordion, the API, infotext and the README's table all read this file,
so a bound or a help text can not differ between them.

A surface is where a field can be set: ``cli`` (the command line over the embedded models) or
``host`` (the WebUI's accordion and API, where sampler, seed and prompts are img2img's own).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
)


STOCHASTIC = (
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
)
"""Those that add noise at each step, by sigma space's rule: what replay needs."""


SCHEDULERS = ("karras", "exponential", "polyexponential", "vp")


MODELS = ("gaussian", "gaussian-flow", "mixture")


OUTPUTS = (
    "frames",
    "animation",
    "contact sheet",
    "sigma curve",
    "latents",
    "init",
    "guide",
    "strength sweep",
    "comfyui",
)
SAMPLING = frozenset({"init", "guide", "strength sweep"})
"""Outputs for which img2img samples a picture; their levels are img2img's own."""


FORMATS = ("gif", "webp", "apng", "mp4")


BOTH = ("cli", "host")


MOVING = ("animation", "strength sweep")
SHOWN = ("frames", "animation", "contact sheet")
THINNED = (*SHOWN, "sigma curve", "latents", "comfyui", "strength sweep")
RESAMPLED = ("resample",)
"""Outputs that fields belong to; ``resample`` and ``report`` are the command line's, beside :data:`OUTPUTS`."""


TITLE = "Batch Unsampler"
"""The script's name in the WebUI's page and API."""


def option(
    default: Any,
    label: str,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    automatic: float | None = None,
    surfaces: tuple[str, ...] = BOTH,
    host: str = "",
    cli: str = "",
    modes: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
    word: str = "",
    pasted: bool = True,
) -> Any:
    """A dataclass field with its documentation and bounds as metadata.

    Arguments:
        automatic: A number outside the bounds that has the program choose.
        host: What only the WebUI adds to the help.
        cli: What only the command line adds to it.
        modes: The modes that use the field, if not all do.
        outputs: The outputs that use it, if not all do; with both, either is enough.
        word: What a number's default is called, where that is no amount: both are accepted.
        pasted: Whether it belongs to the picture, and so into its generation parameters.
    """
    return field(
        default=default,
        metadata={
            "label": label,
            "help": help,
            "minimum": minimum,
            "maximum": maximum,
            "choices": choices,
            "automatic": automatic,
            "surfaces": surfaces,
            "host": host,
            "cli": cli,
            "modes": modes,
            "outputs": outputs,
            "word": word,
            "pasted": pasted,
        },
    )


@dataclass(frozen=True)
class Settings:
    """What one run of Batch Unsampler is asked to do. Build it with :func:`parse`."""

    output: tuple[str, ...] = option(
        ("frames", "animation"),
        "Output",
        "Each noise level as an image, the moving progression, one sheet of all frames (of 400 "
        "where there are more), a picture of the schedule with the kept levels marked, a safetensors file of the "
        "latents, the latent from which img2img's own sampling starts (init), the levels towards which it is drawn at "
        "each step (guide), a picture sampled from every level (strength sweep), or ComfyUI's .latent file (comfyui).",
        choices=OUTPUTS,
        surfaces=("host",),
    )
    steps: int = option(
        0,
        "Steps",
        "Steps of the schedule that is walked backwards.",
        host="automatic (0) follows img2img, and is what init, guide and strength sweep need: they use its levels.",
        cli="automatic is 20.",
        word="automatic",
        minimum=0,
        maximum=10000,
    )
    end_at_step: int = option(
        -1,
        "End at step",
        "Stop at the noise level where a sampler starting at this step would go on: 0 is the noisiest, and so is "
        "automatic (-1).",
        host="With init automatic is img2img's start level (from the denoising strength).",
        word="automatic",
        minimum=-1,
        maximum=10000,
    )
    step_increment: int = option(
        1,
        "Increment",
        "Keep every n-th level, counted down from the noisiest. Thins frames and files, never what is sampled from.",
        outputs=THINNED,
        minimum=1,
        maximum=10000,
    )
    noise: str = option(
        "shared",
        "Noise",
        "shared: one draw, the same at every level; independent: a fresh draw per level; "
        "path: one random walk from clean to noise, the forward process itself.",
        host="The shared draw is img2img's own.",
        modes=("noise",),
        choices=("shared", "independent", "path"),
    )
    normalize: bool = option(
        False,
        "Normalize the noise",
        "Bring each image's noise to mean 0 and variance 1; the noise level stays.",
        modes=("noise", "replay"),
    )
    include_clean: bool = option(
        True,
        "Begin with the clean source",
        "Frames and animation begin with the source itself, at sigma 0. Latents never hold it.",
        outputs=SHOWN,
    )
    view: str = option(
        "variance preserving",
        "Show noise levels",
        "How a frame shows z: scaled to unit variance as in the diffusion papers, or raw "
        "(burnt colours at high sigma). Flow models are shown as they are.",
        choices=("variance preserving", "raw"),
        outputs=SHOWN,
    )
    reverse: bool = option(False, "Reverse the animation", "Play the animation from noise to picture.", outputs=MOVING)
    duration: float = option(
        0.1,
        "Seconds per frame",
        "Seconds each frame of the animation is shown: 0.04 is 25 frames per second (GIF rounds to 1/100 s).",
        minimum=0.02,
        maximum=60.0,
        outputs=MOVING,
    )
    timing: str = option(
        "even",
        "Timing",
        "even: every frame for the same time; log sigma: each for its share of the way from picture to noise "
        "on a logarithmic scale, with the seconds per frame as the mean.",
        choices=("even", "log sigma"),
        outputs=MOVING,
    )
    hold_first: float = option(
        0.0,
        "Hold the first frame",
        "Seconds the first frame shown stays beyond its own.",
        minimum=0.0,
        maximum=60.0,
        outputs=MOVING,
    )
    hold_last: float = option(
        0.0,
        "Hold the last frame",
        "Seconds the last frame shown stays beyond its own (there and back: the one it turns at).",
        minimum=0.0,
        maximum=60.0,
        outputs=MOVING,
    )
    ping_pong: bool = option(False, "There and back", "Play the animation forwards, then backwards.", outputs=MOVING)
    loop: int = option(
        0,
        "Plays",
        "How often the animation plays; for ever is 0. MP4 leaves it to the player.",
        word="for ever",
        minimum=0,
        maximum=65535,
        outputs=MOVING,
    )
    captions: bool = option(
        False,
        "Captions",
        "Write step, sigma, timestep (where the model has them) and noise kind on every frame of the pictures "
        "and the animation.",
        outputs=("frames", "animation", "strength sweep"),
    )
    format: str = option(
        "gif",
        "Animation format",
        "gif: plays everywhere, 256 colours a frame; webp: small and in true colour; apng: without any loss, large; "
        "mp4: the smallest, needs PyAV (pip install av).",
        host="PyAV goes into the WebUI's environment.",
        cli="It is for the animations in a folder; a file's ending is its format.",
        choices=FORMATS,
        outputs=MOVING,
    )
    mode: str = option(
        "noise",
        "Mode",
        "noise: the forward process, no model call; invert: the model itself walks its schedule backwards, so that "
        "sampling again gives the source; replay: the picture becomes the very noises of an ancestral or SDE sampler: "
        "its own prompt gives back every bit, another one an edit that keeps the structure.",
        choices=("noise", "invert", "replay"),
    )
    skip: int = option(
        0,
        "Skip steps",
        "Replay: leave out this many of the noisiest steps; more of the picture stays. At least one step remains.",
        minimum=0,
        maximum=10000,
        modes=("replay",),
    )
    seed: int = option(
        0,
        "Seed",
        "Seed of the first picture's noise; the next pictures count up from it.",
        minimum=0,
        maximum=2**63 - 1,
        surfaces=("cli",),
        modes=("noise", "replay"),
    )
    sampler: str = option(
        "euler",
        "Sampler",
        "k-diffusion sampler that carries the latent back to a picture.",
        choices=SAMPLERS,
        surfaces=("cli",),
        modes=("invert", "replay"),
        outputs=RESAMPLED,
    )
    scheduler: str = option(
        "karras",
        "Scheduler",
        "k-diffusion noise schedule that is walked.",
        choices=SCHEDULERS,
        surfaces=("cli",),
    )
    model: str = option(
        "gaussian",
        "Model",
        "Embedded model with an exact answer: a Gaussian image prior with a 1/f^2 spectrum "
        "(noise levels as in SD, or as a flow model), or a Gaussian mixture.",
        choices=MODELS,
        surfaces=("cli",),
    )
    cfg: float = option(
        1.0,
        "CFG for the source",
        "Invert and replay: the guidance scale under which the model sees the source; 1 is the positive prompt alone.",
        cli="The resampling's scale too.",
        modes=("invert", "replay"),
        outputs=RESAMPLED,
        minimum=0.0,
        maximum=100.0,
    )
    positive: str = option(
        "",
        "Prompt for the source",
        "Invert and replay: the prompt under which the model sees the source.",
        host="Empty is img2img's own; a space is an empty prompt.",
        cli="The resampling's prompt too: empty, sea, sunset, forest, night or snow, each a picture's mean colours.",
        modes=("invert", "replay"),
        outputs=RESAMPLED,
    )
    negative: str = option(
        "",
        "Negative prompt for the source",
        "What the guidance moves away from; as the prompt, empty is img2img's own.",
        modes=("invert", "replay"),
        outputs=RESAMPLED,
    )
    solver: str = option(
        "exact",
        "Solver",
        "exact: each level solves for the state that the sampler's own step maps onto the one below (Euler, Heun, "
        "DPM2; DPM++ 2M at half as many calls again), so sampling again gives the source; reverse: the sampler is run "
        "up the schedule, a call or two a step.",
        choices=("exact", "reverse"),
        modes=("invert",),
    )
    tolerance: float = option(
        1e-6,
        "Tolerance",
        "Exact: how far the sampler's step may miss the level below, as a share of the noisy latent's deviation. "
        "A half-precision model stops earlier, where it no longer gets nearer.",
        minimum=1e-12,
        maximum=0.1,
        modes=("invert",),
    )
    max_calls: int = option(
        40,
        "Most calls a level",
        "Exact: the most model calls for one image at one level; what did not converge by then is named.",
        minimum=1,
        maximum=1000,
        modes=("invert",),
    )
    panel: bool = option(
        False,
        "Estimate beside z",
        "Invert: each frame shows the source, z, and the picture that the model sees in z.",
        outputs=SHOWN,
    )
    report: bool = option(
        False,
        "Round-trip report",
        "Invert: sample back and report the distance to the source in latents and pixels, beside the VAE's own, "
        "with a plot of the residuals.",
        surfaces=("host",),
    )
    trajectory: str = option(
        "",
        "Latents file",
        "Use the levels of a saved latents file, named by its path below the img2img output folder, in place of new "
        "ones: its frames are shown, init starts from its noisiest level, and with replay its noises are replayed. "
        "Model type, size, batch and schedule must be the file's.",
        surfaces=("host",),
    )
    resample_cfg: float = option(
        -1.0,
        "CFG of the resampling",
        "Guidance scale of the resampling; as cfg (-1) is that of cfg.",
        word="as cfg",
        minimum=0.0,
        maximum=100.0,
        automatic=-1.0,
        surfaces=("cli",),
        outputs=RESAMPLED,
    )
    resample_positive: str = option(
        "",
        "Prompt of the resampling",
        "Prompt of the resampling; empty is that of positive, a space is an empty prompt.",
        surfaces=("cli",),
        outputs=RESAMPLED,
    )
    resample_negative: str = option(
        "",
        "Negative prompt of the resampling",
        "Negative prompt of the resampling; empty is that of negative, a space is an empty prompt.",
        surfaces=("cli",),
        outputs=RESAMPLED,
    )

    guide_strength: float = option(
        1.0,
        "Guide strength",
        "Guide: how far each sampling step is drawn towards its noise level; 0 is plain img2img.",
        minimum=0.0,
        maximum=1.0,
        outputs=("guide", "resample"),
    )
    guide_alpha: float = option(
        3.0,
        "Guide alpha",
        "Guide: how soon it lets go on the way to the picture. 0 never does; 3 is DemoFusion's.",
        minimum=0.0,
        maximum=100.0,
        outputs=("guide", "resample"),
    )
    guide_from: float = option(
        0.0,
        "Guide from",
        "Guide: the share of the executed steps at which it begins.",
        minimum=0.0,
        maximum=1.0,
        outputs=("guide", "resample"),
    )
    guide_until: float = option(
        1.0,
        "Guide until",
        "Guide: the share of the executed steps at which it ends.",
        minimum=0.0,
        maximum=1.0,
        outputs=("guide", "resample"),
    )
    guide_weight: str = option(
        "skip residual",
        "Guide weight",
        "Guide: skip residual draws the whole picture, less and less; map reads the inpaint mask as a map of "
        "strengths: white places change as much as the denoising strength says, black ones not at all.",
        choices=("skip residual", "map"),
        surfaces=("host",),
        outputs=("guide",),
    )
    end_at_sigma: float = option(
        0.0,
        "End at sigma",
        "Stop at the noisiest level at or below this sigma; 0 leaves it to end_at_step.",
        minimum=0.0,
        maximum=10000.0,
    )
    film: str = option(
        "noising",
        "Film",
        "What frames and animation show: the noising, the sampling back to a picture, or both, there and back.",
        host="The sampling is img2img's own.",
        cli="The sampling is that of --resample.",
        choices=("noising", "sampling", "both"),
        outputs=("init", "guide", "resample"),
    )
    film_view: str = option(
        "state",
        "Film view",
        "How the sampling's steps are shown: the state itself, or the picture that the model sees in it.",
        choices=("state", "estimate"),
        outputs=("init", "guide", "resample"),
    )
    reply: str = option(
        "all",
        "Reply",
        "all: animations first, img2img's own pictures last; own first: each image's own picture (or its noisiest "
        "frame) first, then all the others; own only: no others, they are saved, and its parameters name their files.",
        choices=("all", "own first", "own only"),
        surfaces=("host",),
        pasted=False,
    )
    guide: bool = option(
        False,
        "Guide",
        "Draw the resampling towards the noise levels at each step (DemoFusion's skip residual).",
        surfaces=("cli",),
        outputs=RESAMPLED,
    )

    animation_side: int = option(
        0,
        "Longest side",
        "Longest side of the animation's frames in pixels; larger ones are brought down to it (Lanczos). The frames "
        "themselves keep their size.",
        word="as the frames",
        minimum=0,
        maximum=16384,
        outputs=MOVING,
    )
    max_megabytes: float = option(
        0.0,
        "Most megabytes",
        "The animation's file is never larger than so many million bytes: the quality goes first (WebP and MP4), then "
        "the side, down to 128 pixels; never a frame or its time. What was chosen is said; what cannot be small enough "
        "is said and not made.",
        word="off",
        minimum=0.0,
        maximum=10000.0,
        outputs=MOVING,
    )

    @property
    def maps(self) -> bool:
        """Whether the inpaint mask is a map of strengths that guides (WebUI)."""
        return "guide" in self.output and self.guide_weight == "map"

    @property
    def samples(self) -> bool:
        """Whether img2img's own sampling is wanted at all (WebUI)."""
        return bool(SAMPLING & set(self.output))


@dataclass(frozen=True)
class Preferences:
    """What a WebUI's owner sets once, in its Settings tab, rather than with each request."""

    duration: float = option(
        0.1,
        "Seconds per frame to begin with",
        "What the accordion's field shows after a reload of the UI, and what an API request without it gets.",
        minimum=0.02,
        maximum=60.0,
    )
    format: str = option(
        "gif",
        "Animation format to begin with",
        "As the frame time: for the accordion, and for API requests that name none.",
        choices=FORMATS,
    )
    gallery_limit: int = option(
        500,
        "Most frames shown of one run",
        "In the gallery and in an API reply, spread evenly over the levels. The others are only saved, and the "
        "result's info says so.",
        minimum=1,
        maximum=100000,
    )
    megapixels: int = option(
        20000,
        "Most work of one run, in megapixels",
        "Frames x width x height of a batch count x size. A larger request is refused before any work.",
        minimum=1,
        maximum=10**9,
    )
    animation_folder: str = option(
        "",
        "Folder of the animations",
        "Where finished animations go; empty: the img2img output folder.",
    )


def surface_fields(surface: str) -> list[Any]:
    """The dataclass fields that can be set on ``surface``, in order."""
    return [f for f in fields(Settings) if surface in f.metadata["surfaces"]]


def whole_help(f: Any) -> str:
    """A field's help with what each surface adds."""
    cli = f"On the command line: {f.metadata['cli']}" if f.metadata["cli"] else ""
    return " ".join(part for part in (f.metadata["help"], f.metadata["host"], cli) if part)


def help_on(f: Any, surface: str) -> str:
    """A field's help for one surface alone."""
    return " ".join(part for part in (f.metadata["help"], f.metadata[surface]) if part)


def allowed(f: Any) -> str:
    """The allowed values of a field, in words: used by errors, help and the README's table."""
    low, high, choices = (f.metadata[k] for k in ("minimum", "maximum", "choices"))
    kind = type(f.default)
    if choices:
        listed = ", ".join(choices)
        return f"any of {listed}" if kind is tuple else f"one of {listed}"
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text"
    number = "a whole number" if kind is int else "a number"
    if f.metadata["word"]:
        number = f"{f.metadata['word']} ({f.default:g}), or {number}"
    top = f"{high:g}" if high < 1e15 else "2^63 - 1"
    return f"{number} from {low:g} to {top}"
