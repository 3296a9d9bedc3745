"""Triton kernels of the depthwise convolution: implicit matrix products with the kernel rows' Toeplitz bands.

For one channel and one kernel row, the output rows are the input rows times a band matrix that holds that row of
the kernel along its diagonals. The band is never stored: each program gathers the block of it that it needs. Images
are contiguous (N, C, H, W), weights (C, KH, KW); sums are float32. UPCAST is for Triton's interpreter, whose product of
bfloat16 blocks multiplies their bits.
"""

import triton
import triton.language as tl

__all__ = ["input_kernel", "output_kernel", "weight_kernel"]


@triton.jit
def output_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, batch, channels, height, width, out_height, out_width, kernel_height, kernel_width,
    stride_y, stride_x, pad_y, pad_x, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of (n, y) rows by x columns of the output of one channel; grid (row blocks, column blocks, C)."""
    channel = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image, y = row // out_height, row % out_height
    first = tl.program_id(1) * COLUMNS
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap_y in range(kernel_height):
        from_y = y * stride_y + tap_y - pad_y
        inside = (image < batch) & (from_y >= 0) & (from_y < height)
        source = x + ((image.to(tl.int64) * channels + channel) * height + from_y) * width
        for start in range(0, (COLUMNS - 1) * stride_x + kernel_width, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            from_x = first * stride_x - pad_x + depth
            pixels = tl.load(
                source[:, None] + from_x[None, :],
                mask=inside[:, None] & (from_x >= 0)[None, :] & (from_x < width)[None, :],
                other=0.0,
            )
            tap_x = depth[:, None] - column[None, :] * stride_x
            band = tl.load(
                weight + (channel * kernel_height + tap_y) * kernel_width + tap_x,
                mask=(tap_x >= 0) & (tap_x < kernel_width),
                other=0.0,
            )
            if UPCAST:
                pixels, band = pixels.to(tl.float32), band.to(tl.float32)
            total = tl.dot(pixels, band, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    to_x = first + column
    target = out + ((image.to(tl.int64) * channels + channel) * out_height + y) * out_width
    mask = (image < batch)[:, None] & (to_x < out_width)[None, :]
    tl.store(target[:, None] + to_x[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def input_kernel(  # type: ignore[no-untyped-def]
    grad, weight, out, batch, channels, height, width, out_height, out_width, kernel_height, kernel_width,
    stride_y, stride_x, pad_y, pad_x, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of (n, y) rows by x columns of the gradient for the input; grid (row blocks, column blocks, C)."""
    channel = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image, y = row // height, row % height
    to_x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # The first output column that reaches this block, and the number of those that do.
    first = tl.maximum(0, tl.program_id(1) * COLUMNS + pad_x - kernel_width + stride_x) // stride_x
    span = (COLUMNS + kernel_width - 2) // stride_x + 1
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap_y in range(kernel_height):
        scaled = y + pad_y - tap_y
        from_y = scaled // stride_y
        inside = (image < batch) & (scaled >= 0) & (scaled % stride_y == 0) & (from_y < out_height)
        source = grad + ((image.to(tl.int64) * channels + channel) * out_height + from_y) * out_width
        for start in range(0, span, DEPTH):
            from_x = first + start + tl.arange(0, DEPTH)
            pixels = tl.load(
                source[:, None] + from_x[None, :],
                mask=inside[:, None] & (from_x < out_width)[None, :],
                other=0.0,
            )
            tap_x = to_x[None, :] + pad_x - from_x[:, None] * stride_x
            band = tl.load(
                weight + (channel * kernel_height + tap_y) * kernel_width + tap_x,
                mask=(tap_x >= 0) & (tap_x < kernel_width),
                other=0.0,
            )
            if UPCAST:
                pixels, band = pixels.to(tl.float32), band.to(tl.float32)
            total = tl.dot(pixels, band, total, input_precision=PRECISION)
    target = out + ((image.to(tl.int64) * channels + channel) * height + y) * width
    mask = (image < batch)[:, None] & (to_x < width)[None, :]
    tl.store(target[:, None] + to_x[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(  # type: ignore[no-untyped-def]
    grad, x, parts, batch, channels, height, width, out_height, out_width, kernel_height, kernel_width,
    stride_y, stride_x, pad_y, pad_x, rows_per_split, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One kernel row's gradient over a share of the (n, y) rows and a block of output columns of one channel.

    grid (splits * column blocks, KH, C); `parts` is (splits * column blocks, C, KH, KW). The products of every output
    column with every input column are a matrix product over rows; the gradient is the sums along its diagonals.
    """
    channel, tap_y = tl.program_id(2), tl.program_id(1)
    blocks = tl.cdiv(out_width, COLUMNS)
    split = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    taps = tl.arange(0, TAPS)
    result = tl.zeros((TAPS,), dtype=tl.float32)
    for start in range(0, (COLUMNS - 1) * stride_x + kernel_width, COLUMNS):
        from_x = first * stride_x - pad_x + start + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS, COLUMNS), dtype=tl.float32)
        for begin in range(0, rows_per_split, ROWS):
            row = split * rows_per_split + begin + tl.arange(0, ROWS)
            image, y = row // out_height, row % out_height
            from_y = y * stride_y + tap_y - pad_y
            known = (image < batch) & (begin + tl.arange(0, ROWS) < rows_per_split)
            inside = known & (from_y >= 0) & (from_y < height)
            base = image.to(tl.int64) * channels + channel
            grads = tl.load(
                grad + ((base * out_height + y) * out_width)[None, :] + column[:, None],
                mask=inside[None, :] & (column < out_width)[:, None],
                other=0.0,
            )
            pixels = tl.load(
                x + ((base * height + from_y) * width)[:, None] + from_x[None, :],
                mask=inside[:, None] & (from_x >= 0)[None, :] & (from_x < width)[None, :],
                other=0.0,
            )
            if UPCAST:
                grads, pixels = grads.to(tl.float32), pixels.to(tl.float32)
            total = tl.dot(grads, pixels, total, input_precision=PRECISION)
        tap_x = from_x[None, :] - column[:, None] * stride_x + pad_x
        for tap in range(kernel_width):
            diagonal = tl.sum(tl.sum(tl.where(tap_x == tap, total, 0.0), 1), 0)
            result += tl.where(taps == tap, diagonal, 0.0)
    target = parts + ((tl.program_id(0) * channels + channel) * kernel_height + tap_y) * kernel_width
    tl.store(target + taps, result, mask=taps < kernel_width)
