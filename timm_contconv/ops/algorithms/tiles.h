// Tiles of an image with channels as vector lanes, and the two inner kernels that work on pairs of tiles.
// Included by direct.cpp alone, which explains the method.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {


#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));

// Pixels that are packed at a time where rows are contiguous: at least as many as the widest tile has.
constexpr int BLOCK = 8;

// ---------------------------------------------------------------------------------------------- problem

// What Python passes, as int64 in this order. Strides count elements: batch, channel, row, column.
struct Problem {
    int64_t batch, channels, threads, bf16;
    int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2];
    int64_t in_strides[4], out_strides[4];
};

struct Tasks {
    int64_t blocks, splits;
    Tasks(const Problem& p, int64_t splits) : blocks((p.channels + LANES - 1) / LANES), splits(splits) {}
    int64_t count() const { return blocks * splits; }
};

// One task: a block of channels, and a share of the batch.
struct Share {
    int64_t c0, first, last, split;
    int lanes;
    Share(const Problem& p, const Tasks& tasks, int64_t task)
        : c0(task / tasks.splits * LANES),
          first(task % tasks.splits * p.batch / tasks.splits),
          last((task % tasks.splits + 1) * p.batch / tasks.splits),
          split(task % tasks.splits),
          lanes(static_cast<int>(std::min<int64_t>(LANES, p.channels - c0))) {}
};

// One phase of one spatial axis, as a convolution of stride 1: input pixel `offset + stride * j` for j < size,
// kernel tap `tap + stride * t` for t < taps, output pixel i; i meets t at j = i + lag + t.
struct Axis {
    int size, offset, stride, tap, taps, lag;
};

int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

Axis axis_phase(const Problem& p, int axis, int phase) {
    const int stride = p.stride[axis], padding = p.padding[axis], kernel = p.kernel[axis];
    Axis a{};
    a.stride = stride;
    a.offset = phase;
    a.size = p.in_size[axis] > phase ? (p.in_size[axis] - phase + stride - 1) / stride : 0;
    a.tap = ((phase + padding) % stride + stride) % stride;
    a.taps = kernel > a.tap ? (kernel - a.tap + stride - 1) / stride : 0;
    a.lag = floor_div(a.tap - padding, stride);
    // Taps that meet nothing but padding.
    const int first = std::max(0, -static_cast<int>(p.out_size[axis] - 1) - a.lag);
    const int last = std::min(a.taps, a.size - a.lag);
    a.tap += first * stride;
    a.lag += first;
    a.taps = std::max(0, last - first);
    return a;
}

// ------------------------------------------------------------------------------------- packing and unpacking

struct Buffer {
    explicit Buffer(size_t vectors) : data(new (std::align_val_t(64)) vec[vectors]), size(vectors) { zero(); }
    ~Buffer() { ::operator delete[](data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void zero() { std::memset(data, 0, size * sizeof(vec)); }
    vec* data;
    size_t size;
};

struct Bf16 {
    uint16_t bits;
};

float load(float v) { return v; }
float load(Bf16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
void store(float& to, float v) { to = v; }
void store(Bf16& to, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// The pixels (offset + stride * j) of LANES channels of one image of a tensor.
template <typename S>
struct Pixels {
    S* data;
    int64_t row, column, channel;
    int rows, columns, lanes;
};

template <typename S>
Pixels<S> pixels(S* base, const int64_t* strides, int64_t n, int64_t c, int lanes, const Axis& y, const Axis& x) {
    S* data = base + n * strides[0] + c * strides[1] + y.offset * strides[2] + x.offset * strides[3];
    return {data, y.stride * strides[2], x.stride * strides[3], strides[1], y.size, x.size, lanes};
}

// Whether BLOCK pixels of the last row can be read or written at a column without leaving the channel.
template <typename S>
bool fits(const Pixels<S>& p, int y, int x) {
    return LANES >= BLOCK && p.column == 1 && p.lanes == LANES && p.row >= p.columns &&
           y * p.row + x + BLOCK <= (p.rows - 1) * p.row + p.columns;
}

template <int STEP>
constexpr int shuffled(int lane, bool high) {
    return high ? (lane & STEP ? LANES + lane : lane + STEP) : (lane & STEP ? LANES + lane - STEP : lane);
}

// Exchanges, in two vectors, the lanes whose numbers differ in the bit STEP.
template <int STEP, int... L>
void exchange(vec& a, vec& b, std::integer_sequence<int, L...>) {
#if defined(__clang__) || __GNUC__ >= 12
    const vec low = __builtin_shufflevector(a, b, shuffled<STEP>(L, false)...);
    b = __builtin_shufflevector(a, b, shuffled<STEP>(L, true)...);
#else
    typedef int indices __attribute__((vector_size(4 * LANES)));
    const vec low = __builtin_shuffle(a, b, indices{shuffled<STEP>(L, false)...});
    b = __builtin_shuffle(a, b, indices{shuffled<STEP>(L, true)...});
#endif
    a = low;
}

template <int STEP>
void exchange_all(vec* rows) {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i)
        if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, LANES>());
}

// Transposes each BLOCK x BLOCK block of BLOCK vectors: BLOCK pixels of each channel, or all channels of each pixel.
void transpose(vec* rows) {
    exchange_all<4>(rows);
    exchange_all<2>(rows);
    exchange_all<1>(rows);
}

template <typename S>
void load_block(const S* from, int64_t channel, vec* rows) {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i) {
        float* lanes = reinterpret_cast<float*>(rows + i);
#pragma GCC unroll 2
        for (int c = i; c < LANES; c += BLOCK)
#pragma GCC unroll 8
            for (int x = 0; x < BLOCK; ++x) lanes[c / BLOCK * BLOCK + x] = load(from[c * channel + x]);
    }
    transpose(rows);
}

template <typename S>
void store_block(vec* rows, S* to, int64_t channel) {
    transpose(rows);
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i) {
        const float* lanes = reinterpret_cast<const float*>(rows + i);
        for (int c = i; c < LANES; c += BLOCK)
            for (int x = 0; x < BLOCK; ++x) store(to[c * channel + x], lanes[c / BLOCK * BLOCK + x]);
    }
}

// Packs to [tile][row][TILE], with zeros past the edge; lanes without a channel must already be zero.
template <int TILE, typename S>
void pack(const Pixels<S>& from, vec* to) {
    for (int y = 0; y < from.rows; ++y) {
        for (int x0 = 0; x0 < from.columns; x0 += TILE) {
            const S* row = from.data + y * from.row + x0 * from.column;
            float* tile = reinterpret_cast<float*>(to + (static_cast<int64_t>(x0 / TILE) * from.rows + y) * TILE);
            const int width = std::min(TILE, from.columns - x0);
            if (from.channel == 1 && from.lanes == LANES) {
                for (int x = 0; x < width; ++x)
                    for (int c = 0; c < LANES; ++c) tile[x * LANES + c] = load(row[x * from.column + c]);
            } else if (fits(from, y, x0)) {
                vec block[BLOCK];
                load_block(row, from.channel, block);
                std::memcpy(tile, block, width * sizeof(vec));
            } else {
                for (int c = 0; c < from.lanes; ++c)
                    for (int x = 0; x < width; ++x)
                        tile[x * LANES + c] = load(row[c * from.channel + x * from.column]);
            }
            std::memset(tile + width * LANES, 0, (TILE - width) * sizeof(vec));
        }
    }
}

template <int TILE, typename S>
void unpack(const vec* from, const Pixels<S>& to) {
    for (int y = 0; y < to.rows; ++y) {
        for (int x0 = 0; x0 < to.columns; x0 += TILE) {
            S* row = to.data + y * to.row + x0 * to.column;
            const vec* vectors = from + (static_cast<int64_t>(x0 / TILE) * to.rows + y) * TILE;
            const float* tile = reinterpret_cast<const float*>(vectors);
            const int width = std::min(TILE, to.columns - x0);
            if (to.channel == 1 && to.lanes == LANES) {
                for (int x = 0; x < width; ++x)
                    for (int c = 0; c < LANES; ++c) store(row[x * to.column + c], tile[x * LANES + c]);
            } else if (fits(to, y, x0) && (x0 + BLOCK <= to.columns || to.row == to.columns)) {
                // Pixels past the tile are written, too; what belongs there follows, as it is of the next row.
                vec block[BLOCK];
                std::memcpy(block, vectors, width * sizeof(vec));
                store_block(block, row, to.channel);
            } else {
                for (int c = 0; c < to.lanes; ++c)
                    for (int x = 0; x < width; ++x)
                        store(row[c * to.channel + x * to.column], tile[x * LANES + c]);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------- inner kernels

// Both kernels sum over pairs (i, j) of a TILE of output pixels and a TILE of input pixels with
// LOW <= d = j - i <= HIGH; `weight` points at the tap of d = 0.
using Kernel = void (*)(vec* out, const vec* in, vec* weight, int64_t weight_row, int rows);

// out[i] += weight[d] in[j], over `rows` rows of the kernel.
struct OutputPass {
    template <int TILE, int LOW, int HIGH>
    static void run(vec* out, const vec* in, vec* weight, int64_t weight_row, int rows) {
        vec acc[TILE];
#pragma GCC unroll 16
        for (int i = 0; i < TILE; ++i) acc[i] = out[i];
        for (int r = 0; r < rows; ++r, in += TILE, weight += weight_row) {
            vec pixel[TILE];
#pragma GCC unroll 16
            for (int j = 0; j < TILE; ++j) pixel[j] = in[j];
#pragma GCC unroll 32
            for (int d = LOW; d <= HIGH; ++d) {
                const vec tap = weight[d];
#pragma GCC unroll 16
                for (int i = 0; i < TILE; ++i)
                    if (i + d >= 0 && i + d < TILE) acc[i] += tap * pixel[i + d];
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < TILE; ++i) out[i] = acc[i];
    }
};

// weight[d] += out[i] in[j], over `rows` rows of the image; `out` holds the gradient of the output.
struct WeightPass {
    template <int TILE, int LOW, int HIGH>
    static void run(vec* out, const vec* in, vec* weight, int64_t, int rows) {
        vec acc[HIGH - LOW + 1];
#pragma GCC unroll 32
        for (int d = LOW; d <= HIGH; ++d) acc[d - LOW] = vec{};
        for (int r = 0; r < rows; ++r, in += TILE, out += TILE) {
            vec grad[TILE];
#pragma GCC unroll 16
            for (int i = 0; i < TILE; ++i) grad[i] = out[i];
#pragma GCC unroll 16
            for (int j = 0; j < TILE; ++j) {
                const vec pixel = in[j];
#pragma GCC unroll 16
                for (int i = 0; i < TILE; ++i)
                    if (j - i >= LOW && j - i <= HIGH) acc[j - i - LOW] += pixel * grad[i];
            }
        }
#pragma GCC unroll 32
        for (int d = LOW; d <= HIGH; ++d) weight[d] += acc[d - LOW];
    }
};

// Where an edge of the convolution kernel cuts through a pair of tiles, a variant computes only what lies inside.
// If both edges do, the nearer one is left to the margin of the weight buffer.
template <class Pass, int TILE, int... S>
Kernel variant(int low, int high, std::integer_sequence<int, S...>) {
    static constexpr Kernel from[] = {Pass::template run<TILE, S - TILE + 1, TILE - 1>...};
    static constexpr Kernel to[] = {Pass::template run<TILE, 1 - TILE, S - TILE + 1>...};
    return low + high > 0 ? from[low + TILE - 1] : to[high + TILE - 1];
}

// A packed image or kernel: [tiles][rows][TILE] vectors, or [rows][width] for a kernel.
template <int TILE>
struct Plane {
    vec* data;
    int rows, columns;
    int tiles() const { return (columns + TILE - 1) / TILE; }
    vec* at(int tile, int row) const { return data + (static_cast<int64_t>(tile) * rows + row) * TILE; }
};

template <int TILE>
struct Taps {
    static constexpr int MARGIN = 2 * (TILE - 1);
    vec* data;
    Axis y, x;
    int width() const { return x.taps + 2 * MARGIN; }
    vec* at(int row, int column) const { return data + static_cast<int64_t>(row) * width() + MARGIN + column; }
};

// Visits every pair of tiles that the kernel joins: fn(output tile, input tile, column of tap d = 0, variant).
template <class Pass, int TILE, class F>
void for_tile_pairs(const Plane<TILE>& out, const Plane<TILE>& in, const Axis& x, F fn) {
    for (int a = 0; x.taps && a < out.tiles(); ++a) {
        const int first = std::max(0, a + floor_div(x.lag, TILE));
        const int last = std::min(in.tiles() - 1, a + floor_div(x.lag + x.taps + TILE - 2, TILE));
        for (int b = first; b <= last; ++b) {
            const int centre = TILE * (b - a) - x.lag;
            const int low = std::max(-centre, 1 - TILE), high = std::min(x.taps - 1 - centre, TILE - 1);
            fn(a, b, centre, variant<Pass, TILE>(low, high, std::make_integer_sequence<int, 2 * TILE - 1>()));
        }
    }
}

template <int TILE>
void output_pass(const Plane<TILE>& out, const Plane<TILE>& in, const Taps<TILE>& taps) {
    for_tile_pairs<OutputPass>(out, in, taps.x, [&](int a, int b, int centre, Kernel kernel) {
        for (int row = 0; row < out.rows; ++row) {
            const int top = row + taps.y.lag;
            const int first = std::max(0, -top), last = std::min(taps.y.taps, in.rows - top);
            if (first < last)
                kernel(out.at(a, row), in.at(b, top + first), taps.at(first, centre), taps.width(), last - first);
        }
    });
}

template <int TILE>
void weight_pass(const Plane<TILE>& out, const Plane<TILE>& in, const Taps<TILE>& taps) {
    for_tile_pairs<WeightPass>(out, in, taps.x, [&](int a, int b, int centre, Kernel kernel) {
        for (int tap = 0; tap < taps.y.taps; ++tap) {
            const int shift = taps.y.lag + tap;
            const int first = std::max(0, -shift), last = std::min(out.rows, in.rows - shift);
            if (first < last)
                kernel(out.at(a, first), in.at(b, first + shift), taps.at(tap, centre), 0, last - first);
        }
    });
}

}  // namespace
