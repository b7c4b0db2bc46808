"""Every field of Batch Unsampler, once: type, bounds, default and help.

The command line, the accordion, the API, infotext and the README's table all read this file,
so a bound or a help text can not differ between them. Standard library only: `--help` and
parse errors must come without importing torch.

A surface is where a field can be set: ``cli`` (the command line over the embedded models) or
``host`` (the WebUI's accordion and API, where sampler, seed and prompts are img2img's own).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
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
OUTPUTS = ("frames", "animation", "contact sheet", "sigma curve", "latents", "init")
FORMATS = ("gif", "webp", "apng", "mp4")
BOTH = ("cli", "host")
TITLE = "Batch Unsampler"
"""The script's name in the WebUI's page and API."""


class SettingsError(ValueError):
    """All that is wrong with a request: ``errors`` holds one sentence per bad field."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("; ".join(self.errors))


def option(
    default: Any,
    label: str,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    surfaces: tuple[str, ...] = BOTH,
    cli: str = "",
) -> Any:
    """A dataclass field with its documentation and bounds as metadata; ``cli`` is what only the command line adds."""
    return field(
        default=default,
        metadata={
            "label": label,
            "help": help,
            "minimum": minimum,
            "maximum": maximum,
            "choices": choices,
            "surfaces": surfaces,
            "cli": cli,
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
        "latents, or (init) the latent from which img2img's own sampling starts.",
        choices=OUTPUTS,
        surfaces=("host",),
    )
    steps: int = option(
        0,
        "Steps (0: as img2img)",
        "Steps of the schedule that is walked backwards. 0 follows img2img. "
        "With init it must be 0, because the levels are img2img's own.",
        cli="On the command line 0 is 20.",
        minimum=0,
        maximum=10000,
    )
    end_at_step: int = option(
        -1,
        "End at step (0: pure noise; -1: automatic)",
        "Stop at the noise level where a sampler starting at this step would go on: 0 is the noisiest. "
        "-1 chooses: 0, or img2img's start level (from the denoising strength) with init.",
        minimum=-1,
        maximum=10000,
    )
    step_increment: int = option(
        1,
        "Step increment (keep every n-th level)",
        "Keep every n-th level, counted down from the noisiest. Thins frames and files, never init.",
        minimum=1,
        maximum=10000,
    )
    noise: str = option(
        "shared",
        "Noise",
        "shared: img2img's own noise at every level; independent: a fresh draw per level; "
        "path: one random walk from clean to noise, the forward process itself.",
        choices=("shared", "independent", "path"),
    )
    normalize: bool = option(
        False,
        "Normalize each image's noise",
        "Bring each image's noise to mean 0 and variance 1; the noise level stays.",
    )
    include_clean: bool = option(
        True,
        "Begin with the clean source",
        "Frames and animation begin with the source itself, at sigma 0. Latents never hold it.",
    )
    view: str = option(
        "variance preserving",
        "Show noise levels",
        "How a frame shows z: scaled to unit variance as in the diffusion papers, or raw "
        "(burnt colours at high sigma). Flow models are shown as they are.",
        choices=("variance preserving", "raw"),
    )
    reverse: bool = option(False, "Reverse the animation", "Play the animation from noise to picture.")
    duration: float = option(
        0.1,
        "Seconds per frame",
        "Seconds each frame of the animation is shown: 0.04 is 25 frames per second (GIF rounds to 1/100 s).",
        minimum=0.02,
        maximum=60.0,
    )
    timing: str = option(
        "even",
        "Timing",
        "even: every frame for the same time; log sigma: each for its share of the way from picture to noise "
        "on a logarithmic scale, with the seconds per frame as the mean.",
        choices=("even", "log sigma"),
    )
    hold_first: float = option(
        0.0,
        "Hold the first frame",
        "Seconds the first frame shown stays beyond its own.",
        minimum=0.0,
        maximum=60.0,
    )
    hold_last: float = option(
        0.0,
        "Hold the last frame",
        "Seconds the last frame shown stays beyond its own (there and back: the one it turns at).",
        minimum=0.0,
        maximum=60.0,
    )
    ping_pong: bool = option(False, "There and back", "Play the animation forwards, then backwards.")
    loop: int = option(
        0,
        "Plays (0: for ever)",
        "How often the animation plays. MP4 leaves it to the player.",
        minimum=0,
        maximum=65535,
    )
    captions: bool = option(
        False,
        "Captions",
        "Write step, sigma, timestep (where the model has them) and noise kind on every frame of the pictures "
        "and the animation.",
    )
    format: str = option(
        "gif",
        "Animation format",
        "gif: plays everywhere, 256 colours a frame; webp: small and in true colour; apng: without any loss, large; "
        "mp4: the smallest, needs PyAV (pip install av in the WebUI's environment).",
        choices=FORMATS,
        surfaces=("host",),
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
        "Skip (replay: keep more of the picture)",
        "Replay: leave out this many of the noisiest steps; more of the picture stays. At least one step remains.",
        minimum=0,
        maximum=10000,
    )
    seed: int = option(
        0,
        "Seed",
        "Seed of the first picture's noise; the next pictures count up from it.",
        minimum=0,
        maximum=2**63 - 1,
        surfaces=("cli",),
    )
    sampler: str = option(
        "euler",
        "Sampler",
        "k-diffusion sampler that carries the latent back to a picture.",
        choices=SAMPLERS,
        surfaces=("cli",),
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
        "CFG scale for the source",
        "Invert and replay: the guidance scale under which the model sees the source; 1 is the positive prompt alone.",
        cli="On the command line the resampling's scale too.",
        minimum=0.0,
        maximum=100.0,
    )
    positive: str = option(
        "",
        "Prompt for the source (empty: img2img's own)",
        "Invert and replay: the prompt under which the model sees the source. Empty is img2img's own; a space is an "
        "empty prompt.",
        cli="On the command line the resampling's prompt too: a few words, each a picture's mean colours.",
    )
    negative: str = option(
        "",
        "Negative prompt for the source (empty: img2img's own)",
        "What the guidance moves away from; as the prompt.",
    )
    solver: str = option(
        "exact",
        "Solver of the inversion",
        "exact: each level solves for the state that the sampler's own step maps onto the one below (Euler, Heun, "
        "DPM2; DPM++ 2M at several times the calls), so sampling again gives the source; reverse: the sampler is run "
        "up the schedule, a call or two a step.",
        choices=("exact", "reverse"),
    )
    tolerance: float = option(
        1e-6,
        "Tolerance of the exact solver",
        "Exact: how far the sampler's step may miss the level below, as a share of the noisy latent's deviation. "
        "A half-precision model stops earlier, where it no longer gets nearer.",
        minimum=1e-12,
        maximum=0.1,
    )
    max_calls: int = option(
        40,
        "Most model calls for a level",
        "Exact: the most model calls for one image at one level; what did not converge by then is named.",
        minimum=1,
        maximum=1000,
    )
    panel: bool = option(
        False,
        "Show the model's estimate beside z",
        "Invert: each frame shows the source, z, and the picture that the model sees in z.",
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
        "Levels from a latents file",
        "Use the levels of a saved latents file, named by its path below the img2img output folder, in place of new "
        "ones: its frames are shown, init starts from its noisiest level, and with replay its noises are replayed. "
        "Model type, size, batch and schedule must be the file's.",
        surfaces=("host",),
    )
    resample_cfg: float = option(
        -1.0,
        "CFG scale of the resampling (-1: as cfg)",
        "Guidance scale of the resampling; -1 is that of cfg.",
        minimum=-1.0,
        maximum=100.0,
        surfaces=("cli",),
    )
    resample_positive: str = option(
        "",
        "Prompt of the resampling (empty: as positive)",
        "Prompt of the resampling; empty is that of positive, a space is an empty prompt.",
        surfaces=("cli",),
    )
    resample_negative: str = option(
        "",
        "Negative prompt of the resampling (empty: as negative)",
        "Negative prompt of the resampling; empty is that of negative, a space is an empty prompt.",
        surfaces=("cli",),
    )

    @property
    def samples(self) -> bool:
        """Whether img2img's own sampling is wanted at all (WebUI)."""
        return "init" in self.output


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
    """A field's help with what the command line adds."""
    return " ".join(part for part in (f.metadata["help"], f.metadata["cli"]) if part)


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
    return f"{number} from {low:g} to {high:g}" if high < 1e15 else f"{number} from {low:g} to 2^63 - 1"


def convert(f: Any, value: Any) -> Any:
    """``value`` as the field's type. Text is read (command line, infotext); raises ValueError."""
    kind = type(f.default)
    if kind is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
            raise ValueError
        wanted = {p.strip() for p in parts}
        if not wanted or wanted - set(f.metadata["choices"]):
            raise ValueError
        return tuple(c for c in f.metadata["choices"] if c in wanted)
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
    elif isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python would read 1_0 as 10
        raise ValueError
    elif kind is int:
        value = int(value) if isinstance(value, (str, int)) else _whole(value)
    else:
        value = float(value)
    _check_bounds(f, value)
    return value


def read(f: Any, value: Any) -> Any:
    """``value`` as the field's type, like :func:`convert`.

    Raises:
        SettingsError: naming the field, the value and what is allowed.
    """
    try:
        return convert(f, value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise SettingsError([f"{f.name}: {value!r} is not {allowed(f)}"]) from None


def _whole(value: Any) -> int:
    if not isinstance(value, float) or not value.is_integer():
        raise ValueError
    return int(value)


def _check_bounds(f: Any, value: Any) -> None:
    low, high, choices = (f.metadata[k] for k in ("minimum", "maximum", "choices"))
    if choices is not None and value not in choices:
        raise ValueError
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ValueError


def _read_all(values: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Each value as its field's type, and a sentence for each that is unknown or not allowed."""
    good, errors = {}, []
    for name, value in values.items():
        if name not in known:
            errors.append(f"{name}: unknown field (known: {', '.join(known)})")
            continue
        try:
            good[name] = read(known[name], value)
        except SettingsError as error:
            errors += error.errors
    return good, errors


def parse_preferences(values: Mapping[str, Any]) -> Preferences:
    """Preferences from what the WebUI keeps of them.

    Raises:
        SettingsError: naming each one that its bounds do not allow, as the Settings tab shows it.
    """
    good, errors = _read_all(values, {f.name: f for f in fields(Preferences)})
    if errors:
        raise SettingsError([f"Settings, {TITLE}: {error}" for error in errors])
    return Preferences(**good)


def parse(values: Mapping[str, Any], surface: str) -> Settings:
    """Settings from a mapping of field names, for one surface.

    Raises:
        SettingsError: with one sentence per unknown key, bad value or contradiction, all at once.
    """
    good, errors = _read_all(values, {f.name: f for f in surface_fields(surface)})
    if "init" in good.get("output", ()) and good.get("steps", 0) != 0:
        errors.append(f"steps: {good['steps']} is not 0, which init needs (its levels are img2img's own)")
    errors += _contradictions(good) + _check_replay(good, surface)
    if errors:
        raise SettingsError(errors)
    if good.get("mode") == "replay":
        good["noise"] = "independent"
    return Settings(**good)


def _contradictions(read: Mapping[str, Any]) -> list[str]:
    """What does not go with the mode: a mode's own fields in another, or noise where the model makes it."""
    inverts = read.get("mode", Settings.mode) == "invert"
    errors = []
    if inverts and read.get("noise", "shared") != "shared":
        errors.append(f"noise: {read['noise']!r} is not shared; with mode invert the model makes the noise")
    if inverts and read.get("normalize", False):
        errors.append("normalize: true does not go with mode invert, whose noise would no longer be the model's")
    for name in ("panel", "report"):
        if read.get(name, False) and not inverts:
            errors.append(f"{name}: true needs mode invert")
    if read.get("mode") == "replay" and read.get("noise") == "path":
        errors.append("noise: 'path' is not independent, which every level of mode replay is")
    if read.get("trajectory"):
        if inverts:
            errors.append("trajectory: a file's levels go with mode noise or replay, not with invert")
        names = ["steps", "end_at_step", "step_increment", "normalize"]
        for name in names if read.get("mode") == "replay" else [*names, "noise"]:
            default = Settings.__dataclass_fields__[name].default
            if read.get(name, default) != default:
                errors.append(f"{name}: {read[name]!r} does not go with trajectory, whose levels are the file's")
    if read.get("mode") != "replay" and read.get("skip", 0):
        errors.append(f"skip: {read['skip']} needs mode replay")
    return errors


def _check_replay(read: Mapping[str, Any], surface: str) -> list[str]:
    """In the host the sampler is img2img's own, and known later."""
    sampler = read.get("sampler", Settings.sampler)
    if read.get("mode") != "replay" or surface != "cli" or sampler in STOCHASTIC:
        return []
    return [f"sampler: {sampler!r} adds no noise, which mode replay needs (one of {', '.join(STOCHASTIC)})"]


def named(args: Sequence[Any], surface: str) -> dict[str, Any]:
    """An always-on script's arguments by name, ``enabled`` among them; nothing is checked but their number.

    ``args`` is either one dict of fields, optionally with ``enabled`` (default true: whoever
    names the script wants it), or positional: enabled, then the surface's fields in order.
    """
    args = list(args)
    if args and isinstance(args[0], Mapping):
        return {"enabled": True, **args[0]}
    names = ["enabled", *(f.name for f in surface_fields(surface))]
    if len(args) > len(names):
        raise SettingsError([f"args: {len(args)} values where at most {len(names)} are known"])
    return {"enabled": False, **dict(zip(names, args))}


def parse_args(
    args: Sequence[Any], surface: str, defaults: Mapping[str, Any] = MappingProxyType({})
) -> tuple[bool, Settings]:
    """``(enabled, settings)`` from an always-on script's arguments, as :func:`named` takes them.

    Arguments:
        defaults: Values of fields that are left out, where they are not the fields' own defaults.
    """
    values = {**defaults, **named(args, surface)}
    enabled = values.pop("enabled")
    if not isinstance(enabled, bool):
        raise SettingsError([f"enabled: {enabled!r} is not true or false"])
    return enabled, (parse(values, surface) if enabled else Settings())


INFOTEXT_PREFIX = "Unsampler "
SIZE = re.compile(r"\d+x\d+$")


def infotext_key(f: Any) -> str:
    """The name of a field in an image's generation parameters."""
    return INFOTEXT_PREFIX + f.name.replace("_", " ")


def _plain(value: Any) -> str:
    """A value as text that comes back whole from the host's parameters.

    The host strips text, takes quotes off and splits ``512x512`` in two: a text that it would change
    is written as a JSON list of one.
    """
    if isinstance(value, tuple):
        return ", ".join(value)
    text = str(value)
    odd = text != text.strip() or not text.isprintable() or text.startswith(('"', '["')) or SIZE.match(text)
    return json.dumps([text]) if odd or not text else text


def _whole_text(text: str) -> str:
    """The text that :func:`_plain` wrote."""
    if not (text.startswith('["') and text.endswith('"]')):
        return text
    try:
        (read,) = json.loads(text)
    except ValueError:
        return text
    return read


def to_infotext(settings: Settings, surface: str) -> dict[str, str]:
    """The fields that differ from their defaults, for the image's generation parameters."""
    pairs = ((f, getattr(settings, f.name)) for f in surface_fields(surface))
    return {infotext_key(f): _plain(v) for f, v in pairs if v != f.default}


def from_infotext(params: Mapping[str, str], surface: str) -> Settings:
    """The settings that :func:`to_infotext` wrote; absent keys are defaults.

    Raises:
        SettingsError: if a value was edited into something the field does not allow.
    """
    keys = {infotext_key(f): f.name for f in surface_fields(surface)}
    return parse({keys[k]: _whole_text(str(v)) for k, v in params.items() if k in keys}, surface)


VERSION_KEY = INFOTEXT_PREFIX + "version"
"""Written into every image's parameters while the extension is enabled, whatever the settings."""


def pasted(params: Mapping[str, str], surface: str) -> dict[str, Any] | None:
    """Every field's value from pasted generation parameters; None if they are not ours or were edited wrong."""
    if VERSION_KEY not in params:
        return None
    try:
        settings = from_infotext(params, surface)
    except SettingsError:
        return None
    return {f.name: getattr(settings, f.name) for f in surface_fields(surface)}
