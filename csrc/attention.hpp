// Softmax attention, a block of keys at a time: largest score and sum are kept for each row, and what was summed before counts
// less when a larger score comes (Milakov 2018, arXiv 1805.02867; Dao 2022, arXiv 2205.14135). All heads of a key head are rows
// of one task, so its keys are turned and packed once for some 256 rows.
#pragma once

#include "entry.hpp"
#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

// The largest lane, in all lanes.
template <int Half, int... Lane>
LINSTATE_INLINE F turned(F x, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(x, x, (Lane ^ Half)...);
}
template <int Half = W / 2>
LINSTATE_INLINE F largest(F x) {
    if constexpr (Half > 0)
        return largest<Half / 2>(max(x, turned<Half>(x, std::make_integer_sequence<int, W>())));
    else
        return x;
}

template <class Core>
struct Attention {
    static constexpr Size KEYS = CHUNK;

    static std::size_t scratch(const AttentionCall& c) {
        const Size rows = c.tile() * c.groups, ldk = leading(c.k), ldv = leading(c.v);
        const Size floats = rows * (ldk + LDC + ldv + 2 * W) + KEYS * (ldk + ldv) + c.k * LDC;
        return std::size_t(floats) * 4 + 64 * 10 + Core::scratch(c.k, c.v);
    }

    static void run(const AttentionCall& c, const AttentionTask& task, void* memory) {
        const Size n = task.to - task.from, rows = n * c.groups, kp = round_up(c.k, W), vp = round_up(c.v, W);
        const Size ldk = leading(c.k), ldv = leading(c.v);
        Arena arena(memory);
        float *q = arena.floats(rows * ldk), *scores = arena.floats(rows * LDC), *out = arena.floats(rows * ldv);
        float *most = arena.floats(rows * W), *total = arena.floats(rows * W);  // in all lanes; in its lanes
        float *keys = arena.floats(KEYS * ldk), *turned_keys = arena.floats(c.k * LDC), *values = arena.floats(KEYS * ldv);
        Core core(arena.at, c.k, c.v);
        const F lowest = all(-__builtin_inff());
        for (Size g = 0; g < c.groups; ++g)
            for (Size i = 0; i < n; ++i) {
                const Size row = g * n + i, head = task.key_head * c.groups + g;
                const Size at = task.row * c.q.batch + (task.from + i) * c.q.time + head * c.q.head;
                read_row(q + row * ldk, c.q.data, c.q.dtype, at, c.k, kp, c.scale * LOG2E);  // scores in units of log 2
                store(most + row * W, lowest), store(total + row * W, F{});
                zero(out + row * ldv, vp);
            }
        Size begin = c.first[task.row] > 0 ? c.first[task.row] : 0;
        const Size end = c.past + task.to, sees = c.past + task.from - c.window + 1;
        if (c.window && sees > begin) begin = sees;
        for (Size at = begin; at < end; at += KEYS) {
            const Size m = end - at < KEYS ? end - at : KEYS, mp = round_up(m, W);
            load(keys, ldk, kp, c.key, c.k, task, at, m);
            load(values, ldv, vp, c.value, c.v, task, at, m);
            transpose(turned_keys, 0, keys, ldk, m, c.k);
            core.gemm(rows, mp, c.k, q, ldk, turned_keys, LDC, scores, LDC, Start::zero);
            for (Size g = 0; g < c.groups; ++g)
                for (Size i = 0; i < n; ++i) {
                    const Size row = g * n + i, own = c.past + task.from + i - at;  // column of the token itself
                    float* s = scores + row * LDC;
                    for (Size j = own + 1 < 0 ? 0 : own + 1 < m ? own + 1 : m; j < mp; ++j) s[j] = lowest[0];
                    if (c.window)
                        for (Size j = 0; j <= own - c.window && j < mp; ++j) s[j] = lowest[0];
                    weigh(s, mp, most + row * W, total + row * W, out + row * ldv, vp);
                }
            core.gemm(rows, vp, m, scores, LDC, values, ldv, out, ldv, Start::keep);
        }
        for (Size g = 0; g < c.groups; ++g)
            for (Size i = 0; i < n; ++i) {
                const Size row = g * n + i, head = task.key_head * c.groups + g;
                const float sum_of_row = sum(linstate::LINSTATE_VARIANT::load(total + row * W));
                multiply(out + row * ldv, sum_of_row > 0.0f ? 1.0f / sum_of_row : 0.0f, vp);
                const Size at = task.row * c.out.batch + (task.from + i) * c.out.time + head * c.out.head;
                write_row(c.out.data, c.out.dtype, at, out + row * ldv, c.v);
            }
    }

   private:
    static void load(float* to, Size ld, Size padded, const Sequence& s, Size size, const AttentionTask& task, Size at, Size m) {
        for (Size j = 0; j < m; ++j)
            read_row(to + j * ld, s.data, s.dtype, task.row * s.batch + (at + j) * s.time + task.key_head * s.head, size, padded,
                     1.0f);
    }
    // Scores of a row to weights; what was summed before is brought to the new largest score.
    static LINSTATE_INLINE void weigh(float* s, Size mp, float* most, float* total, float* out, Size vp) {
        using linstate::LINSTATE_VARIANT::load;
        const F before = load(most);
        F now = before;
        for (Size j = 0; j < mp; j += W) now = max(load(s + j), now);
        now = largest(now);
        F sums = F{};
        if (now[0] == -__builtin_inff()) {  // the row sees nothing yet
            zero(s, mp);
            return;
        }
        for (Size j = 0; j < mp; j += W) {
            const F p = decay2(load(s + j) - now);
            store(s + j, p);
            sums += p;
        }
        if (before[0] == now[0]) {
            store(total, load(total) + sums);
            return;
        }
        const F kept = decay2(before - now);
        store(most, now), store(total, load(total) * kept + sums);
        multiply(out, kept[0], vp);
    }
};

template <class Core>
void run_attention(const AttentionCall& call, const AttentionTask& task, void* scratch) {
    const FlushDenormals flush;
    Attention<Core>::run(call, task, scratch);
}

template <class Core>
constexpr AttentionKernel attention_kernel() {
    return {&run_attention<Core>, &Attention<Core>::scratch};
}

}  // namespace linstate::LINSTATE_VARIANT
