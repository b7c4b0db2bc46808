r"""The Triton kernel that writes a whole batch of noisy latents once.

Each program owns a run of one image's elements and walks up a run of levels. All of Philox,
Box-Muller, scaling, adding and casting happens in registers; memory sees x once and z once.

Philox spends a block on every number, so the kernel is bound by 32-bit multiplications. With the
counter (draw, 0, element, 0) the first two rounds' four products each depend on the element alone
(:math:`M_1 e`, :math:`M_0 c_0'`: the compiler hoists them out of the level loop) or on the level
alone (:math:`M_0 j`, :math:`M_1 c_2'`: scalars), and rounds 9 and 10 need only the parts that reach
the first two output words (dead code). 15 of the 20 multiplications remain.

Constants are written out, since Triton compares each global it reads at every launch; philox.py
names them and has the formulas. Only fused.py imports this file, and only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def _multiply(word, multiplier: tl.constexpr):
    """High and low word of the 64-bit product: one wide multiplication."""
    product = word.to(tl.uint64) * tl.full((), multiplier, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _approximate(x, function: tl.constexpr):
    """The special function unit's lg2, sin or sqrt of a float32."""
    return tl.inline_asm_elementwise(
        function + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def philox_words(element, draw, k0, k1):
    """The first two words of philox.philox((draw, 0, element, 0), (k0, k1)), in uint32."""
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    # Rounds 1 and 2, grouped so that what depends on the element alone stays apart from the draw.
    high1, low1 = _multiply(element, 0xCD9E8D57)
    high0, low0 = _multiply(draw, 0xD2511F53)
    element_high, element_low = _multiply(high1 ^ k0, 0xD2511F53)
    draw_high, draw_low = _multiply(high0 ^ k1, 0xCD9E8D57)
    k0 += w0
    k1 += w1
    c0 = draw_high ^ (low1 ^ k0)
    c1 = draw_low
    c2 = low0 ^ (element_high ^ k1)
    c3 = element_low
    for _ in tl.static_range(8):
        k0 += w0
        k1 += w1
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0 = high1 ^ (c1 ^ k0)
        c1 = low1
        c2 = high0 ^ (c3 ^ k1)
        c3 = low0
    return c0, c1


@triton.jit
def box_muller(x, y):
    r"""philox.box_muller in float32, within 1e-5 of it for every pair of words.

    Read as signed, x gives :math:`q = u` in the lower half and :math:`q = u - 1`, exact near 0, in
    the upper. Where u is above :math:`1 - 2^{-7}`, lg2 would lose the small logarithm, so
    :math:`-2 \ln(1 + q) = q (q - 2) + O(q^3)` stands in. y as signed turns v by a whole period, give or take 2e-7.
    """
    turn: tl.constexpr = 1.462918119976564e-09
    q = tl.fma(x.to(tl.int32, bitcast=True).to(tl.float32), 2.0**-32, 2.0**-33)
    u = tl.where(q < 0, q + 1.0, q)
    square = tl.where(x >= 0xFE000000, q * (q - 2.0), _approximate(u, "lg2") * -1.3862943611198906)
    v = tl.fma(y.to(tl.int32, bitcast=True).to(tl.float32), turn, turn / 2)
    return _approximate(square, "sqrt") * _approximate(v, "sin")


@triton.jit
def normal(element, draw, k0, k1):
    """The NV noise of an element in a draw, float32."""
    x, y = philox_words(element, draw, k0, k1)
    return box_muller(x, y)


@triton.jit(do_not_specialize=["k0", "k1", "images", "levels", "chunk", "clean", "least", "stride"])
def unsample(
    z, x, noise, factors, keys, k0, k1, size, images, levels, chunk, clean, least, stride,
    KIND: tl.constexpr, FLOW: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r"""``z[slot] = scale * n + signal * base`` for every level of the walk; see fused.fill.

    Each product and the sum are rounded to float32 (launch with ``enable_fp_fusion=False``). base is
    x, or on a path the level before, where levels between the kept ones are walked, not written.
    A key is one image's (``ONE``) k0 and k1, or two words of ``keys``.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    image = (program // blocks) % images
    first = program // blocks // images * chunk
    element = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    if not ONE:
        k0 = tl.load(keys + 2 * image)
        k1 = tl.load(keys + 2 * image + 1)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    source = image.to(tl.int64) * size + element
    base = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    n = base
    if KIND == "given":
        n = tl.load(noise + source, mask=inside, other=0.0)
    if KIND == "shared":
        n = normal(element.to(tl.uint32), tl.zeros((), tl.uint32), k0, k1)
    slot = first
    wait = clean - 1 - least  # levels of a path until the next one that is written
    for level in range(first, tl.minimum(first + chunk, levels)):
        written = inside
        if KIND == "path":
            draw = level
            signal = tl.load(factors + 2 * level)
            scale = tl.load(factors + 2 * level + 1)
            written = inside & (wait == 0)
        else:
            index = least - level * stride
            draw = clean - 1 - index
            scale = tl.load(factors + index)
            signal = 1.0 - scale
        if KIND == "independent" or KIND == "path":
            n = normal(element.to(tl.uint32), draw.to(tl.uint32), k0, k1)
        state = base
        if FLOW:
            state = signal * base
        state += scale * n
        target = z + (slot.to(tl.int64) * images + image) * size + element
        tl.store(target, state.to(z.dtype.element_ty), mask=written)
        if KIND == "path":
            base = state
            slot += (wait == 0).to(tl.int32)
            wait = tl.where(wait == 0, stride, wait) - 1
        else:
            slot += 1
