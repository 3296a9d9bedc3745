// Depthwise convolution on the CPU: output, gradient for the input, gradient for the weight.
//
// The channels are the vector lanes. A block of LANES channels of one image is packed into columns of TILE
// pixels, so that one tile is a contiguous run of vectors down the rows, whatever the layout of the tensor.
// A tile of output pixels meets a tile of input pixels at 2 TILE - 1 kernel columns ("lags"); all of
// their products happen in registers. Pairs of tiles that the kernel does not join, and kernel rows that lie in
// the padding, are never visited, so the work is the true number of products and not H W K^2.
//
// A stride is split into phases: every stride-th pixel of the input meets every stride-th tap of the kernel in
// an ordinary convolution of stride 1.
//
// Plain C++ without headers of PyTorch: a few seconds to build, once per machine (library.py); called through ctypes
// (direct.py).

#include "rows.h"
#include "tiles.h"

#include <memory>

namespace {

// ----------------------------------------------------------------------------------------- the three passes

Axis whole(int64_t size) { return {static_cast<int>(size), 0, 1, 0, 0, 0}; }

// The gradient for the input is the convolution of the output's gradient with the kernel reversed.
Axis reversed(const Axis& a, int64_t out_size) {
    return {static_cast<int>(out_size), 0, 1, a.tap + (a.taps - 1) * a.stride, a.taps, 1 - a.lag - a.taps};
}

struct Phase {
    Axis y, x;
};

std::vector<Phase> phases(const Problem& p) {
    std::vector<Phase> all;
    for (int y = 0; y < p.stride[0]; ++y)
        for (int x = 0; x < p.stride[1]; ++x) {
            const Phase phase{axis_phase(p, 0, y), axis_phase(p, 1, x)};
            if (phase.y.size && phase.x.size) all.push_back(phase);
        }
    return all;
}

template <int TILE>
size_t plane_vectors(int64_t rows, int64_t columns) {
    return rows * ((columns + TILE - 1) / TILE) * TILE;
}

// The taps of one phase between the weight tensor (C, 1, kernel[0], kernel[1]) and vectors over channels;
// `step` is the distance between taps: the stride, negative where the kernel is reversed.
template <int TILE, class F>
void for_taps(const Problem& p, const Taps<TILE>& taps, int step_y, int step_x, int64_t c0, int lanes, F fn) {
    for (int c = 0; c < lanes; ++c)
        for (int t = 0; t < taps.y.taps; ++t)
            for (int u = 0; u < taps.x.taps; ++u) {
                const int64_t row = taps.y.tap + t * step_y, column = taps.x.tap + u * step_x;
                fn(((c0 + c) * p.kernel[0] + row) * p.kernel[1] + column,
                   reinterpret_cast<float*>(taps.at(t, u)) + c);
            }
}

template <int TILE, typename S>
void forward(const Problem& p, const Share& share, const S* in, const float* weight, const float* bias,
             S* out) {
    const auto all = phases(p);
    const Axis oy = whole(p.out_size[0]), ox = whole(p.out_size[1]);
    Buffer result(plane_vectors<TILE>(oy.size, ox.size));
    Buffer image(plane_vectors<TILE>(p.in_size[0], p.in_size[1] + TILE));
    std::vector<std::unique_ptr<Buffer>> kernels;
    for (const Phase& phase : all) {
        Taps<TILE> taps{nullptr, phase.y, phase.x};
        kernels.push_back(std::make_unique<Buffer>(static_cast<size_t>(taps.y.taps) * taps.width()));
        taps.data = kernels.back()->data;
        for_taps(p, taps, phase.y.stride, phase.x.stride, share.c0, share.lanes,
                 [&](int64_t index, float* lane) { *lane = weight[index]; });
    }
    vec start{};
    for (int c = 0; bias && c < share.lanes; ++c) start[c] = bias[share.c0 + c];
    for (int64_t n = share.first; n < share.last; ++n) {
        std::fill_n(result.data, result.size, start);
        for (size_t i = 0; i < all.size(); ++i) {
            const Plane<TILE> plane{image.data, all[i].y.size, all[i].x.size};
            pack<TILE>(pixels(in, p.in_strides, n, share.c0, share.lanes, all[i].y, all[i].x), plane.data);
            output_pass<TILE>({result.data, oy.size, ox.size}, plane, {kernels[i]->data, all[i].y, all[i].x});
        }
        unpack<TILE>(result.data, pixels(out, p.out_strides, n, share.c0, share.lanes, oy, ox));
    }
}

template <int TILE, typename S>
void input_gradient(const Problem& p, const Share& share, const S* grad, const float* weight, S* result) {
    const Axis oy = whole(p.out_size[0]), ox = whole(p.out_size[1]);
    Buffer out(plane_vectors<TILE>(oy.size, ox.size));
    Buffer image(plane_vectors<TILE>(p.in_size[0], p.in_size[1] + TILE));
    for (const Phase& phase : phases(p)) {
        Taps<TILE> taps{nullptr, reversed(phase.y, oy.size), reversed(phase.x, ox.size)};
        Buffer kernel(static_cast<size_t>(taps.y.taps) * taps.width());
        taps.data = kernel.data;
        for_taps(p, taps, -phase.y.stride, -phase.x.stride, share.c0, share.lanes,
                 [&](int64_t index, float* lane) { *lane = weight[index]; });
        for (int64_t n = share.first; n < share.last; ++n) {
            image.zero();
            pack<TILE>(pixels(grad, p.out_strides, n, share.c0, share.lanes, oy, ox), out.data);
            output_pass<TILE>({image.data, phase.y.size, phase.x.size}, {out.data, oy.size, ox.size}, taps);
            unpack<TILE>(image.data, pixels(result, p.in_strides, n, share.c0, share.lanes, phase.y, phase.x));
        }
    }
}

template <int TILE, typename S>
void weight_gradient(const Problem& p, const Share& share, const S* grad, const S* in, float* weight) {
    const Axis oy = whole(p.out_size[0]), ox = whole(p.out_size[1]);
    Buffer out(plane_vectors<TILE>(oy.size, ox.size));
    Buffer image(plane_vectors<TILE>(p.in_size[0], p.in_size[1] + TILE));
    weight += share.split * p.channels * p.kernel[0] * p.kernel[1];
    for (const Phase& phase : phases(p)) {
        Taps<TILE> taps{nullptr, phase.y, phase.x};
        Buffer kernel(static_cast<size_t>(taps.y.taps) * taps.width());
        taps.data = kernel.data;
        for (int64_t n = share.first; n < share.last; ++n) {
            const Plane<TILE> plane{image.data, phase.y.size, phase.x.size};
            pack<TILE>(pixels(grad, p.out_strides, n, share.c0, share.lanes, oy, ox), out.data);
            pack<TILE>(pixels(in, p.in_strides, n, share.c0, share.lanes, phase.y, phase.x), plane.data);
            weight_pass<TILE>({out.data, oy.size, ox.size}, plane, taps);
        }
        for_taps(p, taps, phase.y.stride, phase.x.stride, share.c0, share.lanes,
                 [&](int64_t index, float* lane) { weight[index] = *lane; });
    }
}

// Runs fn(share) for every task on `threads` threads.
template <class F>
void parallel(const Problem& p, int64_t splits, F fn) {
    const Tasks tasks(p, splits);
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(p.threads))
    for (int64_t task = 0; task < tasks.count(); ++task) fn(Share(p, tasks, task));
}

// Calls fn with the tile width that pads the rows least and with the element type of the images.
template <class F>
void specialise(const Problem& p, F fn) {
    const int64_t columns = p.out_size[1];
    const bool seven = (columns + 6) / 7 * 7 < (columns + 7) / 8 * 8;
    const auto with_tile = [&](auto tile) { p.bf16 ? fn(tile, Bf16{}) : fn(tile, float{}); };
    seven ? with_tile(std::integral_constant<int, 7>{}) : with_tile(std::integral_constant<int, 8>{});
}

}  // namespace

extern "C" {

int64_t contconv_lanes() { return LANES; }

// `in` and `out` are float or bfloat16 (Problem::bf16), weights and bias float; bias may be null.
void contconv_forward(const Problem* p, int64_t splits, const void* in, const float* weight, const float* bias,
                      void* out) {
    specialise(*p, [&](auto tile, auto element) {
        using S = decltype(element);
        parallel(*p, splits, [&](const Share& share) {
            const S* from = static_cast<const S*>(in);
            S* to = static_cast<S*>(out);
            if (has_rows(*p)) return correlate_share(*p, share, from, weight, bias, to, false);
            forward<tile.value, S>(*p, share, from, weight, bias, to);
        });
    });
}

void contconv_input_gradient(const Problem* p, int64_t splits, const void* grad, const float* weight,
                             void* result) {
    specialise(*p, [&](auto tile, auto element) {
        using S = decltype(element);
        parallel(*p, splits, [&](const Share& share) {
            const S* from = static_cast<const S*>(grad);
            S* to = static_cast<S*>(result);
            if (has_rows(*p)) return correlate_share<S>(*p, share, from, weight, nullptr, to, true);
            input_gradient<tile.value, S>(*p, share, from, weight, to);
        });
    });
}

// `weight` holds `splits` zeroed gradients, whose sum is the result.
void contconv_weight_gradient(const Problem* p, int64_t splits, const void* grad, const void* in,
                              float* weight) {
    specialise(*p, [&](auto tile, auto element) {
        using S = decltype(element);
        parallel(*p, splits, [&](const Share& share) {
            const S* from = static_cast<const S*>(grad);
            const S* image = static_cast<const S*>(in);
            if (has_rows(*p)) return weight_share(*p, share, from, image, weight);
            weight_gradient<tile.value, S>(*p, share, from, image, weight);
        });
    });
}

}  // extern "C"
