// The elementwise scan: S_t = exp(g_t A) * S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, token by token.
//
// Every entry of the state has a decay of its own, so there is no matmul to be had: the work is one exponential for each
// entry and token, and the scan is as fast as that is cheap. A tile of the state [K, columns] and of A stays in the
// first-level cache for all tokens; rows of v and g are read once. A cut between two tokens changes no bit.
#pragma once

#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

struct SelectiveScan {
    static std::size_t scratch(Size k, Size columns) {
        const Size vp = round_up(columns, W), kp = round_up(k, W);
        return std::size_t(2 * k * vp + 2 * CHUNK * kp + 3 * vp) * 4 + 64 * 7;
    }

    static void run(const MatrixCall& call, const MatrixTask& task, void* memory) {
        const Size K = call.k, columns = task.to - task.from, vp = round_up(columns, W), kp = round_up(K, W);
        const Size key_head = task.head / (call.hv / call.hk), number = task.row * call.hv + task.head;
        Size batch = task.row, start = 0, tokens = call.tokens;
        if (call.bounds) batch = 0, start = call.bounds[task.row], tokens = call.bounds[task.row + 1] - start;
        Arena arena(memory);
        float *state = arena.floats(K * vp), *rates = arena.floats(K * vp), *qs = arena.floats(CHUNK * kp),
              *ks = arena.floats(CHUNK * kp), *v = arena.floats(vp), *g = arena.floats(vp), *o = arena.floats(vp);
        for (Size n = 0; n < K; ++n) {
            const Size at = (number * K + n) * call.v + task.from;
            if (call.before)
                read_row(state + n * vp, call.before, Dtype::f32, at, columns, vp, 1.0f);
            else
                zero(state + n * vp, vp);
            if (call.rates)
                read_row(rates + n * vp, call.rates, Dtype::f32, (task.head * K + n) * call.v + task.from, columns, vp,
                         LOG2E);
        }
        const bool reads = call.q.data != nullptr;
        for (Size done = 0; done < tokens; done += CHUNK) {
            const Size size = tokens - done < CHUNK ? tokens - done : CHUNK;
            for (Size i = 0; reads && i < size; ++i) {
                read_row(qs + i * kp, call.q.data, call.q.dtype, place(call.q, batch, start + done + i, key_head), K, kp,
                         call.scale);
                read_row(ks + i * kp, call.key.data, call.key.dtype, place(call.key, batch, start + done + i, key_head), K,
                         kp, 1.0f);
            }
            for (Size i = 0; i < size; ++i) {
                const Size t = start + done + i;
                const float* vt = row(v, call.value, place(call.value, batch, t, task.head) + task.from, columns, vp);
                const float* gt = row(g, call.g, place(call.g, batch, t, task.head) + task.from, columns, vp);
                const Output& out = call.out;
                const Size at = batch * out.batch + t * out.time + task.head * out.head + task.from;
                const bool direct = out.dtype == Dtype::f32 && columns == vp;
                float* ot = direct ? static_cast<float*>(out.data) + at : o;
                const float *q = qs + i * kp, *k = ks + i * kp;
                if (!reads)
                    token<true, false>(1, state, rates, vp, nullptr, nullptr, vt, gt, ot, call.rates, call.scale);
                else if (call.rates)
                    token<false, true>(K, state, rates, vp, q, k, vt, gt, ot, true, 1.0f);
                else
                    token<false, false>(K, state, rates, vp, q, k, vt, gt, ot, false, 1.0f);
                if (!direct) write_row(out.data, out.dtype, at, o, columns);
            }
            const Size read = done + size;
            if (call.snapshots && read % call.every == 0 && read / call.every <= call.snapshot_count)
                save(call.snapshots, (number * call.snapshot_count + read / call.every - 1) * K, call, task, state, vp);
        }
        save(call.after, number * K, call, task, state, vp);
    }

   private:
    static Size place(const Sequence& s, Size batch, Size t, Size head) {
        return batch * s.batch + t * s.time + head * s.head;
    }
    // Where a row can be read as it stands, it is.
    static const float* row(float* room, const Sequence& s, Size at, Size n, Size padded) {
        if (s.dtype == Dtype::f32 && n == padded) return static_cast<const float*>(s.data) + at;
        read_row(room, s.data, s.dtype, at, n, padded, 1.0f);
        return room;
    }
    static void save(float* to, Size first, const MatrixCall& call, const MatrixTask& task, const float* state, Size vp) {
        for (Size n = 0; n < call.k; ++n)
            write_row(to, Dtype::f32, (first + n) * call.v + task.from, state + n * vp, task.to - task.from);
    }

    template <bool Ones, bool Rates>
    static LINSTATE_INLINE void token(Size k, float* state, const float* rates, Size vp, const float* q, const float* key,
                                      const float* v, const float* g, float* o, bool rated, float scale) {
        Size c = 0;
        for (; c + 2 * W <= vp; c += 2 * W)
            columns<2, Ones, Rates>(k, state + c, rates + c, vp, q, key, v + c, g + c, o + c, rated, scale);
        if (c < vp) columns<1, Ones, Rates>(k, state + c, rates + c, vp, q, key, v + c, g + c, o + c, rated, scale);
    }
    // One token of N vectors of columns. Ones: K = 1, q = scale and k = 1.
    template <int N, bool Ones, bool Rates>
    static LINSTATE_INLINE void columns(Size k, float* state, const float* rates, Size vp, const float* q, const float* key,
                                        const float* v, const float* g, float* o, bool rated, float scale) {
        F vt[N], gt[N], sum[N], decay[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) vt[j] = load(v + j * W), gt[j] = load(g + j * W), sum[j] = F{};
        if constexpr (Ones) {
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) {
                const F x = rated ? gt[j] * load(rates + j * W) : gt[j] * LOG2E;
                const F s = decay2(x) * load(state + j * W) + vt[j];
                store(state + j * W, s);
                store(o + j * W, s * scale);
            }
            return;
        }
        if constexpr (!Rates)
            for (int j = 0; j < N; ++j) decay[j] = decay2(gt[j] * LOG2E);
        for (Size n = 0; n < k; ++n) {
            const F qn = all(q[n]), kn = all(key[n]);
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) {
                float* at = state + n * vp + j * W;
                if constexpr (Rates) decay[j] = decay2(gt[j] * load(rates + n * vp + j * W));
                const F s = decay[j] * load(at) + kn * vt[j];
                store(at, s);
                sum[j] += qn * s;
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store(o + j * W, sum[j]);
    }
};

}  // namespace linstate::LINSTATE_VARIANT
