"""The small trained model's layout, its prompts and pictures, and the program that trains it; without its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import small_model
import torch
import train_model
import yaml
from small_model import CONTEXT, FULL, NARROW, TOKENS, Autoencoder, Denoiser, TextEncoder, Widths
from torch import Tensor, nn

PUBLISHED = Widths(channels=320, multipliers=(1, 2, 4, 4), ae_channels=128, ae_blocks=2)
"""Stable Diffusion 1.5's."""
TINY = Widths(channels=32, multipliers=(1, 2), blocks=1, ae_channels=32, ae_multipliers=(1, 2, 2, 4), ae_blocks=1)
WIDE = Widths(channels=96, multipliers=(1, 2), blocks=1, ae_channels=64, ae_multipliers=(1, 4, 4, 6), ae_blocks=2)
"""Two to four times TINY, with blocks too many."""


def on_meta(kind: type[nn.Module], *widths: Widths) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a network's weights, without making them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(*widths).state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "widths", "tensors", "numbers"),
    [
        (Denoiser, (PUBLISHED,), 686, 859_520_964),
        (Autoencoder, (PUBLISHED,), 248, 83_653_863),
        (TextEncoder, (), 196, 123_060_480),
    ],
)
def test_at_stable_diffusions_width_the_networks_are_its_own(
    kind: type[nn.Module], widths: tuple[Widths, ...], tensors: int, numbers: int
) -> None:
    """The counts of tensors and numbers in every published checkpoint of version 1."""
    shapes = on_meta(kind, *widths)
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == numbers


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        (Denoiser, "time_embed.2.weight", (256, 256)),
        (Denoiser, "input_blocks.0.0.weight", (64, 4, 3, 3)),
        (Denoiser, "input_blocks.3.0.op.weight", (64, 64, 3, 3)),
        (Denoiser, "input_blocks.4.0.skip_connection.weight", (128, 64, 1, 1)),
        (Denoiser, "input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight", (128, CONTEXT)),
        (Denoiser, "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight", (1024, 128)),
        (Denoiser, "middle_block.2.emb_layers.1.weight", (128, 256)),
        (Denoiser, "output_blocks.2.2.conv.weight", (128, 128, 3, 3)),
        (Denoiser, "output_blocks.8.0.in_layers.0.weight", (128,)),
        (Denoiser, "out.2.bias", (4,)),
        (Autoencoder, "encoder.down.1.block.0.nin_shortcut.weight", (128, 64, 1, 1)),
        (Autoencoder, "encoder.down.2.downsample.conv.weight", (256, 256, 3, 3)),
        (Autoencoder, "encoder.conv_out.weight", (8, 256, 3, 3)),
        (Autoencoder, "decoder.mid.attn_1.proj_out.weight", (256, 256, 1, 1)),
        (Autoencoder, "decoder.up.1.block.0.conv1.weight", (128, 256, 3, 3)),
        (Autoencoder, "decoder.up.3.upsample.conv.weight", (256, 256, 3, 3)),
        (Autoencoder, "post_quant_conv.weight", (4, 4, 1, 1)),
    ],
)
def test_narrow_weights_have_the_names_that_the_hosts_read(
    kind: type[nn.Module], name: str, shape: tuple[int, ...]
) -> None:
    assert on_meta(kind, NARROW)[name] == shape


def test_narrow_weights_fit_into_sixty_mebibytes() -> None:
    shapes = [*on_meta(Denoiser, NARROW).values(), *on_meta(Autoencoder, NARROW).values()]
    assert sum(2 * torch.Size(shape).numel() for shape in shapes) <= 60 * 2**20


def test_the_configuration_tells_the_widths() -> None:
    parts = yaml.safe_load(small_model.configuration(NARROW))["model"]["params"]
    denoiser = parts["unet_config"]["params"]
    assert (denoiser["model_channels"], denoiser["channel_mult"], denoiser["num_res_blocks"]) == (64, [1, 2, 2], 2)
    autoencoder = parts["first_stage_config"]["params"]["ddconfig"]
    assert (autoencoder["ch"], autoencoder["ch_mult"], autoencoder["num_res_blocks"]) == (64, [1, 2, 4, 4], 1)
    assert parts["scale_factor"] == small_model.SCALE_FACTOR


def shaken(network: nn.Module) -> nn.Module:
    """The network in double precision with every weight moved, so that no bias is 0 and no scale 1."""
    torch.manual_seed(3)
    network.double().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return network


def wide_of(narrow: nn.Module, kind: type[nn.Module], widths: Widths) -> nn.Module:
    with torch.device("meta"):
        network = kind(widths)
    weights = small_model.widened(narrow.state_dict(), network)
    network.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, assign=True)
    return network


def test_a_widened_denoiser_answers_as_the_narrow_one() -> None:
    narrow = shaken(Denoiser(TINY))
    given = torch.randn(2, 4, 8, 8).double(), torch.tensor([3.5, 700.0]), torch.randn(2, TOKENS, CONTEXT).double()
    expected = narrow(*given)
    assert expected.std() > 0.1
    torch.testing.assert_close(wide_of(narrow, Denoiser, WIDE)(*given), expected, rtol=0, atol=1e-5)


def test_a_widened_autoencoder_answers_as_the_narrow_one() -> None:
    narrow, x = shaken(Autoencoder(TINY)), torch.rand(1, 3, 32, 32).double()
    wide = wide_of(narrow, Autoencoder, WIDE)
    (mean, log_variance), found = narrow.encode(x), wide.encode(x)
    assert mean.std() > 0.01
    torch.testing.assert_close(found, (mean, log_variance), rtol=0, atol=1e-9)
    torch.testing.assert_close(wide.decode(mean), narrow.decode(mean), rtol=0, atol=1e-9)


def test_networks_of_another_shape_cannot_be_widened() -> None:
    narrow = {name: torch.zeros(shape) for name, shape in on_meta(Autoencoder, TINY).items()}
    with torch.device("meta"):
        other = Autoencoder(Widths(ae_channels=64, ae_multipliers=(1, 2, 4, 4), ae_blocks=2))
    with pytest.raises(ValueError, match="nin_shortcut"):
        small_model.widened(narrow, other)


def test_the_full_width_is_the_one_that_forge_builds() -> None:
    """Its U-Net is looked up by its first convolution and its depth of context; its autoencoder is always the same."""
    assert on_meta(Autoencoder, FULL) == on_meta(Autoencoder, PUBLISHED)
    shapes = on_meta(Denoiser, FULL)
    assert shapes["input_blocks.0.0.weight"][0] == 320
    assert shapes["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1] == 768
    with torch.device("meta"):
        wide = Denoiser(FULL)
    narrow = {name: torch.zeros(shape) for name, shape in on_meta(Denoiser, NARROW).items()}
    assert {name: tuple(t.shape) for name, t in small_model.widened(narrow, wide).items()} == shapes


def test_every_word_is_the_token_that_the_hosts_find() -> None:
    pytest.importorskip("clip", reason="CLIP's own tokenizer: pip install clip-anytorch")
    from clip.simple_tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    for prompt in train_model.PROMPTS:
        asked = tokenizer.encode(prompt)
        assert small_model.tokens(prompt) == [small_model.START, *asked] + [small_model.END] * (TOKENS - 1 - len(asked))


def test_prompts_are_distinct_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen through one of the layers, which is where most of the difference comes from; the mean must not be 0."""
    monkeypatch.setattr(small_model, "TEXT_LAYERS", 1)
    contexts = small_model.contexts(train_model.PROMPTS, small_model.text_weights())
    apart = torch.cdist(contexts.flatten(1), contexts.flatten(1)) / (TOKENS * CONTEXT) ** 0.5
    assert len(contexts) == 1 + 4 * 13
    assert apart[~torch.eye(len(apart), dtype=torch.bool)].min() > 0.05
    assert contexts.mean() > 0.05


def test_every_photograph_ships_with_its_terms() -> None:
    listed = [line.split(None, 2) for line in (train_model.__doc__ or "").splitlines()]
    terms = {row[0]: (row[1], row[2]) for row in listed if len(row) == 3}
    for word, name in train_model.PHOTOGRAPHS.items():
        assert terms[name][0] == word
        assert terms[name][1].startswith(("CC0", "public domain", "no known copyright restrictions"))
    pictures = train_model.photographs("cpu")
    assert len(pictures) == 13
    assert all(picture.shape[0] == 3 and min(picture.shape[1:]) >= 128 for picture in pictures)
    assert all(picture.max() > 0.5 > picture.min() >= 0 for picture in pictures)


def test_normalising_changes_no_picture_and_gives_latents_of_deviation_one() -> None:
    network, bank = Autoencoder(TINY).requires_grad_(False), torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    x = train_model.signed(bank)
    before, (mean, log_variance) = network.decode(network.encode(x)[0]), network.encode(x)
    train_model.normalise(network, bank)
    torch.testing.assert_close(network.decode(network.encode(x)[0]), before, rtol=0, atol=1e-4)
    latents = network.encode(x)[0] * small_model.SCALE_FACTOR
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)
    shares = (0.5 * (log_variance - network.encode(x)[1])).exp()
    spread = mean.std((0, 2, 3)) * small_model.SCALE_FACTOR
    torch.testing.assert_close(shares, spread[None, :, None, None].expand_as(shares), rtol=1e-3, atol=0)


def test_both_networks_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step or two of each; what comes back is finite and has moved."""
    monkeypatch.setattr(train_model, "NARROW", TINY)
    monkeypatch.setattr(train_model, "CANDIDATES", 2)
    monkeypatch.setattr(train_model, "KEPT_EVERY", 1)

    def moved(kind: type[nn.Module], network: nn.Module) -> bool:
        torch.manual_seed(0)
        fresh = kind(TINY).state_dict()
        assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
        return any(not torch.equal(tensor, fresh[name]) for name, tensor in network.state_dict().items())

    def bank(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    pictures = [bank(4, 3, 16, 16), bank(4, 3, 32, 32)]
    latents = [torch.randn(26, 4, 4, 4), torch.randn(26, 4, 8, 8)]
    table = torch.randn(len(train_model.PROMPTS), TOKENS, CONTEXT)
    torch.manual_seed(0)
    autoencoder = train_model.train_autoencoder(pictures, 4, 0.5)
    assert moved(Autoencoder, autoencoder)
    torch.manual_seed(0)
    assert moved(Denoiser, train_model.train_denoiser(latents, table, 4, 0.5))


def test_weights_come_back_from_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model, "PART_BYTES", 400_000)
    network = Autoencoder(TINY).half()
    train_model.save_parts(network, "autoencoder", tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 2 and max(sizes) < 410_000
    found = train_model.load_parts("autoencoder", tmp_path)
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    assert train_model.load_parts("denoiser", tmp_path) == {}


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_model.py", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        train_model.main()
