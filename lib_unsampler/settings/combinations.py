"""Which fields go together: one table for the page, the API and the command line.

A rule names the fields it is about, when it speaks, and what it says. A refusal is an error of the request; a remark
is said and the request goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .fields import SAMPLING, Settings

Test = Callable[[Settings], bool]


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    speaks: Test
    says: Callable[[Settings], str]


def _guides(s: Settings) -> bool:
    return "guide" in s.output


def _sampling_output(s: Settings) -> str:
    return next((name for name in s.output if name in SAMPLING), "resample")


def _rule(speaks: Test, says: str) -> Rule:
    """A rule whose text names fields' values in braces."""
    return Rule(speaks, lambda s: says.format(**vars(s), wanted=_sampling_output(s)))


INVERTS: Test = lambda s: s.mode == "invert"  # noqa: E731
REPLAYS: Test = lambda s: s.mode == "replay"  # noqa: E731

REFUSED = (
    _rule(
        lambda s: bool(SAMPLING & set(s.output)) and s.steps != 0,
        "steps: {steps} is not 0, which {wanted} needs (its levels are img2img's own)",
    ),
    _rule(
        lambda s: INVERTS(s) and s.noise != "shared",
        "noise: {noise!r} is not shared; with mode invert the model makes the noise",
    ),
    _rule(
        lambda s: INVERTS(s) and s.normalize,
        "normalize: true does not go with mode invert, whose noise would no longer be the model's",
    ),
    _rule(lambda s: s.panel and not INVERTS(s), "panel: true needs mode invert"),
    _rule(
        lambda s: s.panel and s.film != "noising",
        "panel: true does not go with film {film}, whose frames are single pictures",
    ),
    _rule(lambda s: s.report and not INVERTS(s), "report: true needs mode invert"),
    _rule(
        lambda s: REPLAYS(s) and s.noise == "path",
        "noise: 'path' is not independent, which every level of mode replay is",
    ),
    _rule(
        lambda s: bool(s.trajectory) and INVERTS(s),
        "trajectory: a file's levels go with mode noise or replay, not with invert",
    ),
    _rule(lambda s: not REPLAYS(s) and s.skip > 0, "skip: {skip} needs mode replay"),
    _rule(
        lambda s: s.end_at_sigma > 0 and s.end_at_step >= 0,
        "end_at_sigma: {end_at_sigma:g} and end_at_step: {end_at_step} both say where to stop; give one of them",
    ),
    _rule(
        lambda s: _guides(s) and REPLAYS(s),
        "output: guide does not go with mode replay, whose noises fit the sampler's own states only",
    ),
    _rule(
        lambda s: _guides(s) and not REPLAYS(s) and s.noise != "shared",
        "noise: {noise!r} does not go with guide, whose levels need one noise (shared, or mode invert)",
    ),
    _rule(
        lambda s: _guides(s) and s.guide_from > s.guide_until,
        "guide_from: {guide_from:g} is above guide_until, {guide_until:g}",
    ),
    _rule(
        lambda s: "strength sweep" in s.output and _guides(s),
        "output: strength sweep does not go with guide: each of its pictures is sampled from its own level alone",
    ),
    _rule(
        lambda s: "strength sweep" in s.output and s.film != "noising",
        "film: {film!r} does not go with strength sweep, which samples once for every level",
    ),
    _rule(
        lambda s: "strength sweep" in s.output and REPLAYS(s),
        "output: strength sweep does not go with mode replay, whose noises begin at one level",
    ),
)
"""What is refused, each by name."""

FILE_OWNED = ("steps", "end_at_step", "step_increment", "normalize", "end_at_sigma")
"""Fields that a latents file has decided already."""


def refusals(settings: Settings) -> list[str]:
    """A sentence for each combination that cannot be."""
    said = [rule.says(settings) for rule in REFUSED if rule.speaks(settings)]
    if settings.trajectory and settings.mode != "invert":
        names = FILE_OWNED if settings.mode == "replay" else (*FILE_OWNED, "noise")
        for name in names:
            value = getattr(settings, name)
            if value != Settings.__dataclass_fields__[name].default:
                said.append(f"{name}: {value!r} does not go with trajectory, whose levels are the file's")
    return said
