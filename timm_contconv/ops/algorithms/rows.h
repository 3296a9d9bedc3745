// Small kernels on images whose rows are contiguous: pixels of a row are the vector lanes, so that nothing is
// transposed. Stride 1; 3, 5 or 7 taps a side. Included by direct.cpp alone.

#pragma once

#include "tiles.h"

namespace {

// Rows of the output that are computed together, as they share pixels, by the vectors of a row: as many sums as keep
// the processor's multipliers busy.
constexpr int rows_of(int vectors) { return vectors == 1 ? 7 : 4; }

int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

bool is_small(int64_t taps) { return taps == 3 || taps == 5 || taps == 7; }

bool has_rows(const Problem& p) {
    // Of narrower images most lanes would be empty.
    const bool is_wide = std::min(p.in_size[1], p.out_size[1]) >= 10;
    return is_wide && p.stride[0] == 1 && p.stride[1] == 1 && is_small(p.kernel[0]) && is_small(p.kernel[1]) &&
           p.in_strides[3] == 1 && p.out_strides[3] == 1;
}

// Into a register, for several uses: the compiler would read it again for each, and most reads cross cache lines.
vec load_vector(const float* from) {
    vec v;
    std::memcpy(&v, from, sizeof v);
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}

float total(const vec& v) {
    float lanes[LANES];
    std::memcpy(lanes, &v, sizeof v);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}

template <int N, typename From, typename To>
void copy_exactly(const From* __restrict from, To* __restrict to) {
    for (int x = 0; x < N; ++x) store(to[x], load(from[x]));
}

// Copies n numbers, the last of them twice where that makes full vectors.
template <typename From, typename To>
void copy_row(const From* from, To* to, int64_t n) {
    constexpr int WIDE = 16, NARROW = 8;
    int64_t x = 0;
    for (; x + WIDE <= n; x += WIDE) copy_exactly<WIDE>(from + x, to + x);
    if (x == n) return;
    if (n >= WIDE) return copy_exactly<WIDE>(from + n - WIDE, to + n - WIDE);
    if (n >= NARROW) {
        copy_exactly<NARROW>(from, to);
        return copy_exactly<NARROW>(from + n - NARROW, to + n - NARROW);
    }
    for (; x < n; ++x) store(to[x], load(from[x]));
}

// One channel of one image, with zeros around it.
struct Padded {
    int rows, columns;
    std::vector<float> data;
    Padded(int rows, int columns) : rows(rows), columns(columns), data(static_cast<size_t>(rows) * columns) {}
    const float* at(int row, int column) const { return data.data() + static_cast<int64_t>(row) * columns + column; }

    // Pixel (0, 0) goes to (top, left), which may lie outside.
    template <typename S>
    void fill(const S* from, int64_t row, const int64_t* size, int top, int left) {
        const int first = std::max(0, -left), last = static_cast<int>(std::min<int64_t>(size[1], columns - left));
        for (int y = std::max(0, -top); y < size[0] && y + top < rows; ++y) {
            float* to = data.data() + static_cast<int64_t>(y + top) * columns + left;
            if (first < last) copy_row(from + y * row + first, to + first, last - first);
        }
    }
};

// The correlation of a padded image with KH x width taps.
template <int KH, int VECTORS, typename S>
void correlate(const Padded& in, const float* taps, int width, float bias, S* out, int64_t row, const int64_t* size) {
    constexpr int ROWS = rows_of(VECTORS);
    for (int y0 = 0; y0 < size[0]; y0 += ROWS)
        for (int x0 = 0; x0 < size[1]; x0 += VECTORS * LANES) {
            vec sums[ROWS][VECTORS];
            for (auto& line : sums)
                for (vec& sum : line) sum = bias - vec{};
            for (int u = 0; u < width; ++u) {
                vec tap[KH];
#pragma GCC unroll 8
                for (int t = 0; t < KH; ++t) tap[t] = taps[t * width + u] - vec{};
#pragma GCC unroll 16
                for (int i = 0; i < ROWS + KH - 1; ++i)
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; ++v) {
                        const vec pixels = load_vector(in.at(y0 + i, x0 + v * LANES + u));
#pragma GCC unroll 8
                        for (int r = 0; r < ROWS; ++r)
                            if (i - r >= 0 && i - r < KH) sums[r][v] += tap[i - r] * pixels;
                    }
            }
            const int64_t columns = std::min<int64_t>(VECTORS * LANES, size[1] - x0);
            for (int r = 0; r < ROWS && y0 + r < size[0]; ++r)
                copy_row(reinterpret_cast<const float*>(sums[r]), out + (y0 + r) * row + x0, columns);
        }
}

// sums[t][u] += the products of the gradient and the image at tap (first + t, u), for KY rows of WIDTH taps.
constexpr int MARGIN = 2;

template <int KY, int WIDTH>
void correlate_gradient(const Padded& grad, const Padded& image, int first, vec* sums) {
    vec local[KY][WIDTH];
    std::memcpy(local, sums + first * WIDTH, sizeof local);
    // The gradient has MARGIN rows of zeros above and below.
    for (int y = 0; y < grad.rows - 2 * MARGIN + KY - 1; ++y)
        for (int x = 0; x < grad.columns; x += LANES) {
            vec g[KY];
#pragma GCC unroll 4
            for (int t = 0; t < KY; ++t) g[t] = load_vector(grad.at(y + MARGIN - t, x));
#pragma GCC unroll 8
            for (int u = 0; u < WIDTH; ++u) {
                const vec pixels = load_vector(image.at(y + first, x + u));
#pragma GCC unroll 4
                for (int t = 0; t < KY; ++t) local[t][u] += g[t] * pixels;
            }
        }
    std::memcpy(sums + first * WIDTH, local, sizeof local);
}

// Calls fn with a number of taps as a constant.
template <class F>
void with_taps(int64_t taps, F fn) {
    if (taps == 3) fn(std::integral_constant<int, 3>{});
    if (taps == 5) fn(std::integral_constant<int, 5>{});
    if (taps == 7) fn(std::integral_constant<int, 7>{});
}

// The output (or, with the kernel reversed, the gradient for the input) of a share of channels and images.
template <typename S>
void correlate_share(const Problem& p, const Share& share, const S* from, const float* weight, const float* bias,
                     S* to, bool is_reversed) {
    const int64_t *in_strides = p.in_strides, *out_strides = p.out_strides, *in = p.in_size, *out = p.out_size;
    int64_t top = p.padding[0], left = p.padding[1];
    if (is_reversed) {
        std::swap(in_strides, out_strides);
        std::swap(in, out);
        top = p.kernel[0] - 1 - top;
        left = p.kernel[1] - 1 - left;
    }
    const int width = static_cast<int>(p.kernel[1]), taps = static_cast<int>(p.kernel[0]) * width;
    const int vectors = out[1] > LANES ? 2 : 1;
    Padded image(round_up(out[0], rows_of(vectors)) + p.kernel[0] - 1, round_up(out[1], vectors * LANES) + width - 1);
    for (int64_t c = share.c0; c < share.c0 + share.lanes; ++c) {
        float kernel[49];
        for (int t = 0; t < taps; ++t) kernel[t] = weight[c * taps + (is_reversed ? taps - 1 - t : t)];
        for (int64_t n = share.first; n < share.last; ++n) {
            image.fill(from + n * in_strides[0] + c * in_strides[1], in_strides[2], in, top, left);
            S* target = to + n * out_strides[0] + c * out_strides[1];
            with_taps(p.kernel[0], [&](auto height) {
                const auto run = vectors == 2 ? correlate<height.value, 2, S> : correlate<height.value, 1, S>;
                run(image, kernel, width, bias ? bias[c] : 0.0f, target, out_strides[2], out);
            });
        }
    }
}

template <typename S>
void weight_share(const Problem& p, const Share& share, const S* grad, const S* in, float* weight) {
    const int height = static_cast<int>(p.kernel[0]), width = static_cast<int>(p.kernel[1]);
    const int columns = round_up(p.out_size[1], LANES);
    Padded g(p.out_size[0] + 2 * MARGIN, columns);
    Padded image(p.out_size[0] + MARGIN + height - 1, columns + width - 1);
    weight += share.split * p.channels * height * width;
    for (int64_t c = share.c0; c < share.c0 + share.lanes; ++c) {
        vec sums[49] = {};
        for (int64_t n = share.first; n < share.last; ++n) {
            g.fill(grad + n * p.out_strides[0] + c * p.out_strides[1], p.out_strides[2], p.out_size, MARGIN, 0);
            image.fill(in + n * p.in_strides[0] + c * p.in_strides[1], p.in_strides[2], p.in_size, p.padding[0],
                       p.padding[1]);
            with_taps(width, [&](auto w) {
                for (int t = 0; t < height; t += 3) {
                    if (height - t >= 3) correlate_gradient<3, w.value>(g, image, t, sums);
                    if (height - t == 2) correlate_gradient<2, w.value>(g, image, t, sums);
                    if (height - t == 1) correlate_gradient<1, w.value>(g, image, t, sums);
                }
            });
        }
        for (int t = 0; t < height * width; ++t) weight[c * height * width + t] = total(sums[t]);
    }
}

}  // namespace
