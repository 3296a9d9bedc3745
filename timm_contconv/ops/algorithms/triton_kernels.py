"""Triton kernels of the depthwise convolution: implicit matrix products with the Toeplitz bands of the kernels.

A tile is ROWS x COLUMNS outputs of one channel. The pixels that it needs stand in lines of the image. For one channel
and one line, the line's part of the tiles of all images is a matrix product: the line's pixels (a row for each tile,
and DEPTH pixels) times a band matrix (DEPTH by ROWS * COLUMNS), which holds a row of the kernel along its diagonals.
`band_kernel` lays these matrices out once per call, so that everything is loaded as vectors of 16 bytes.

Images are contiguous (N, C, H, W), their W a multiple of VECTOR, the numbers in 16 bytes; sums are float32. `g` is a
`Geometry` (triton.py). UPCAST is for Triton's interpreter, whose product of bfloat16 blocks multiplies their bits.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["band_kernel", "diagonal_kernel", "output_kernel", "weight_kernel"]


@triton.jit
def band_kernel(weight, bands, g, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Lays out `bands` (C, lines * blocks, DEPTH, ROWS * COLUMNS) of `weight` (C, KH, KW); grid (lines * blocks, C)."""
    step, channel = tl.program_id(0), tl.program_id(1)
    cell = tl.arange(0, ROWS * COLUMNS)
    depth = tl.arange(0, DEPTH)
    tap_y = (step // g.blocks - cell // COLUMNS * g.stride_y + g.first_y)[None, :]
    tap_x = (step % g.blocks * DEPTH + depth)[:, None] - (cell % COLUMNS * g.stride_x)[None, :] + g.first_x
    mask = (tap_y >= 0) & (tap_y < g.kernel_height) & (tap_x >= 0) & (tap_x < g.kernel_width)
    taps = tl.load(weight + (channel * g.kernel_height + tap_y) * g.kernel_width + tap_x, mask=mask, other=0.0)
    target = bands + (channel * g.lines * g.blocks + step).to(tl.int64) * (DEPTH * ROWS * COLUMNS)
    tl.store(target + depth[:, None] * (ROWS * COLUMNS) + cell[None, :], taps)


@triton.jit
def _pixels(
    images, batch, g, channel, tile, first, line, start, VECTOR: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """One line's DEPTH pixels from `start` on, for a block of tiles (of all images) whose first column is `first`."""
    tiles = tl.cdiv(g.out_height, ROWS)
    image = tile // tiles
    y = tile % tiles * ROWS * g.stride_y + line - g.offset_y
    x = first * g.stride_x - g.offset_x * VECTOR + start + tl.arange(0, DEPTH)
    source = images + ((image.to(tl.int64) * g.channels + channel) * g.height + y) * (g.width * VECTOR)
    inside = (image < batch) & (y >= 0) & (y < g.height)
    mask = inside[:, None] & (x >= 0)[None, :] & (x < g.width * VECTOR)[None, :]
    return tl.load(source[:, None] + x[None, :], mask=mask, other=0.0)


@triton.jit
def _cells(batch, g, channel, tile, first, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the outputs of a block of tiles stand in (N, C, H, width), and which of them there are."""
    tiles = tl.cdiv(g.out_height, ROWS)
    image, y = tile // tiles, tile % tiles * ROWS
    row, x = tl.arange(0, ROWS * COLUMNS) // COLUMNS, first + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    place = ((image.to(tl.int64) * g.channels + channel) * g.out_height + y) * width
    mask = (image < batch)[:, None] & (y[:, None] + row[None, :] < g.out_height) & (x < width)[None, :]
    return place[:, None] + (row * width + x)[None, :], mask


@triton.jit(do_not_specialize=["batch"])
def output_kernel(
    images, bands, bias, out, batch, g, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, VECTOR: tl.constexpr, STORED: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """TILES tiles of the output of one channel; grid (tiles of all images / TILES, columns / COLUMNS, C)."""
    channel = tl.program_id(2)
    first = tl.program_id(1) * COLUMNS
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    cell = tl.arange(0, ROWS * COLUMNS)
    total = tl.zeros((TILES, ROWS * COLUMNS), dtype=tl.float32)
    steps = g.lines * g.blocks
    source = bands + (channel * steps).to(tl.int64) * (DEPTH * ROWS * COLUMNS)
    source = source + tl.arange(0, DEPTH)[:, None] * (ROWS * COLUMNS) + cell[None, :]
    for step in range(steps):
        pixels = _pixels(
            images, batch, g, channel, tile, first, step // g.blocks, step % g.blocks * DEPTH, VECTOR, ROWS, DEPTH
        )
        band = tl.load(source + step * (DEPTH * ROWS * COLUMNS))
        if UPCAST:
            pixels, band = pixels.to(tl.float32), band.to(tl.float32)
        total = tl.dot(pixels, band, total, input_precision=PRECISION)
    total += tl.load(bias + channel).to(tl.float32)
    source, mask = _cells(batch, g, channel, tile, first, g.out_width // STORED * STORED, ROWS, COLUMNS)
    tl.store(out + source, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "tiles_per_split"])
def weight_kernel(
    grad, images, parts, batch, tiles_per_split, g, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, VECTOR: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of the products of every output in a tile with every pixel of one line that it may need.

    grid (splits, lines * blocks, C); `parts` is (splits, C, lines * blocks, ROWS * COLUMNS, DEPTH), and `grad` is laid
    out as images are. The gradient is the sums along the diagonals of `parts`.
    """
    split, step, channel = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(g.out_width, COLUMNS)
    width = tl.cdiv(g.out_width, VECTOR) * VECTOR
    total = tl.zeros((ROWS * COLUMNS, DEPTH), dtype=tl.float32)
    for part in range(tiles_per_split // TILES * across):
        first = part % across * COLUMNS
        tile = split * tiles_per_split + part // across * TILES + tl.arange(0, TILES)
        pixels = _pixels(
            images, batch, g, channel, tile, first, step // g.blocks, step % g.blocks * DEPTH, VECTOR, ROWS, DEPTH
        )
        source, mask = _cells(batch, g, channel, tile, first, width, ROWS, COLUMNS)
        grads = tl.load(grad + source, mask=mask, other=0.0)
        if UPCAST:
            grads, pixels = grads.to(tl.float32), pixels.to(tl.float32)
        total = tl.dot(tl.trans(grads), pixels, total, input_precision=PRECISION)
    place = (split * g.channels + channel).to(tl.int64) * (g.lines * g.blocks) + step
    place = place * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
    tl.store(parts + place[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :], total)


@triton.jit(do_not_specialize=["splits"])
def diagonal_kernel(
    parts, out, splits, g, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TAPS: tl.constexpr
):
    """Sums of `parts` along their diagonals: TAPS taps of `out` (C, KH, KW); grid (KW / TAPS, KH, C)."""
    tap_x = tl.program_id(0) * TAPS + tl.arange(0, TAPS)
    tap_y, channel = tl.program_id(1), tl.program_id(2)
    cell = tl.arange(0, ROWS * COLUMNS)[:, None]
    line = tap_y + cell // COLUMNS * g.stride_y - g.first_y
    depth = tap_x[None, :] + cell % COLUMNS * g.stride_x - g.first_x
    inside = (line >= 0) & (line < g.lines) & (depth >= 0) & (depth < g.blocks * DEPTH)
    total = tl.zeros((ROWS * COLUMNS, TAPS), dtype=tl.float32)
    for split in range(splits):
        place = (split * g.channels + channel).to(tl.int64) * (g.lines * g.blocks) + line * g.blocks + depth // DEPTH
        source = parts + (place * (ROWS * COLUMNS) + cell) * DEPTH + depth % DEPTH
        total += tl.load(source, mask=inside, other=0.0)
    target = out + (channel * g.kernel_height + tap_y) * g.kernel_width + tap_x
    tl.store(target, tl.sum(total, 0).to(out.dtype.element_ty), mask=tap_x < g.kernel_width)
