// One token of the recurrences on a matrix state: the state is read once from memory and written once, to another place; past
// the caches where it would not be there any more when the next token reads it (an ordinary store reads a line before it writes).
//
// The delta rule and its relatives need what the old state answers before they can write, so a head's state passes twice;
// the second time it comes from the cache. What the new state answers to q follows from the old one's answer,
// q^T (D S + k u^T) = (D q)^T S + (q . k) u^T, so that the first pass serves both.
#pragma once

#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

// The state [K, columns] of one head before and after; a stride of 0 before: all rows are the one row of zeros.
struct StatePass {
    const float* before = nullptr;
    Size before_stride = 0;
    float* after = nullptr;
    Size after_stride = 0;
    Size k = 0, columns = 0;
    bool past = false;  // what is written goes past the caches
    bool more = false;  // behind this head's state before stands that of the next one of this task: it is fetched during a second pass

    // answers_m += x_m^T S for M vectors, [columns] each, padded with zeros to whole vectors
    template <int M>
    void read(const float* const (&x)[M], float* const (&answers)[M]) const {
        Size i = 0;
        for (; i + 4 <= k; i += 4) read_rows<M, 4>(x, answers, i);
        for (; i < k; ++i) read_rows<M, 1>(x, answers, i);
    }
    // S' = diag(decay) S + sum_m x_m y_m^T; no decay: 1
    template <int M>
    void write(const float* decay, const float* const (&x)[M], const float* const (&y)[M]) const {
        const bool aligned = streams();
        for (Size i = 0; i < k; ++i) {
            const float* from = before + i * before_stride;
            float* to = after + i * after_stride;
            if (more)
                for (Size c = 0; c < columns; c += 16) __builtin_prefetch(from + k * before_stride + c, 0, 2);
            const F d = all(decay ? decay[i] : 1.0f);
            Size c = 0;
            if (aligned)
                for (; c + W <= columns; c += W) store_past(to + c, written<M>(load(from + c), d, x, y, i, c));
            for (; c + W <= columns; c += W) store(to + c, written<M>(load(from + c), d, x, y, i, c));
            if (c < columns)
                store_part(to + c, written<M>(load_part(from + c, columns - c), d, x, y, i, c), columns - c);
        }
    }
    // Both at once, where what is written does not depend on what is read: answers += q^T S' (new) or q^T S (old).
    template <bool New>
    void read_and_write(const float* q, float* answers, const float* decay, const float* x, const float* y) const {
        const bool aligned = streams();
        Size i = 0;
        for (; i + 4 <= k; i += 4) both_rows<New, 4>(q, answers, decay, x, y, i, aligned);
        for (; i < k; ++i) both_rows<New, 1>(q, answers, decay, x, y, i, aligned);
    }

   private:
    bool streams() const { return past && after_stride % W == 0 && reinterpret_cast<std::uintptr_t>(after) % (4 * W) == 0; }
    // Rows from `from` on, or the next head's behind the last, so early that they are there when they are read: four streams at once are more than the
    // processor's own prefetching follows (measured: a pass from memory takes two thirds of the time).
    template <int R>
    LINSTATE_INLINE void prefetch(const float* from) const {
        const char* p = reinterpret_cast<const char*>(from);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            for (Size c = 0; c < columns; c += 16) __builtin_prefetch(p + (r * before_stride + c) * 4);
    }
    template <int M>
    static LINSTATE_INLINE F written(F s, F d, const float* const (&x)[M], const float* const (&y)[M], Size i, Size c) {
        s *= d;
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) s += x[m][i] * load(y[m] + c);
        return s;
    }
    template <int M, int R>
    LINSTATE_INLINE void read_rows(const float* const (&x)[M], float* const (&answers)[M], Size i) const {
        const float* from = before + i * before_stride;
        if (R > 1) prefetch<R>(from + 2 * R * before_stride);
        F weight[M][R];
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) weight[m][r] = all(x[m][i + r]);
        const auto at = [&](Size c, const auto& get) {
            F s[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) s[r] = get(from + r * before_stride + c);
#pragma GCC unroll 2
            for (int m = 0; m < M; ++m) {
                F sum = load(answers[m] + c);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum += weight[m][r] * s[r];
                store(answers[m] + c, sum);
            }
        };
        Size c = 0;
        for (; c + W <= columns; c += W) at(c, [](const float* p) { return load(p); });
        const Size rest = columns - c;
        if (rest) at(c, [rest](const float* p) { return load_part(p, rest); });
    }
    template <bool New, int R>
    LINSTATE_INLINE void both_rows(const float* q, float* answers, const float* decay, const float* x, const float* y,
                                   Size i, bool aligned) const {
        const float* from = before + i * before_stride;
        float* to = after + i * after_stride;
        if (R > 1) prefetch<R>(from + 2 * R * before_stride);
        F qs[R], ds[R], xs[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) qs[r] = all(q[i + r]), xs[r] = all(x[i + r]), ds[r] = all(decay ? decay[i + r] : 1.0f);
        const auto at = [&](Size c, const auto& get, const auto& put) {
            const F yc = load(y + c);
            F sum = load(answers + c);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F old = get(from + r * before_stride + c);
                const F s = old * ds[r] + xs[r] * yc;
                sum += qs[r] * (New ? s : old);
                put(to + r * after_stride + c, s);
            }
            store(answers + c, sum);
        };
        Size c = 0;
        if (aligned)
            for (; c + W <= columns; c += W)
                at(c, [](const float* p) { return load(p); }, [](float* p, F s) { store_past(p, s); });
        for (; c + W <= columns; c += W)
            at(c, [](const float* p) { return load(p); }, [](float* p, F s) { store(p, s); });
        const Size rest = columns - c;
        if (rest)
            at(c, [rest](const float* p) { return load_part(p, rest); },
               [rest](float* p, F s) { store_part(p, s, rest); });
    }
};

// The vectors of one head in float32, padded with zeros to whole vectors.
struct StepVectors {
    float *q, *key, *a, *b, *decay, *decayed_q, *decayed_k;  // [K]
    float *value, *answer, *out;                             // [columns]

    static std::size_t bytes(Size k, Size columns) {
        return std::size_t(7 * round_up(k, W) + 3 * round_up(columns, W)) * 4 + 64 * 10;
    }
    StepVectors(Arena& arena, Size k, Size columns) {
        float** const of_keys[] = {&q, &key, &a, &b, &decay, &decayed_q, &decayed_k};
        for (float** p : of_keys) *p = arena.floats(round_up(k, W));
        float** const of_columns[] = {&value, &answer, &out};
        for (float** p : of_columns) *p = arena.floats(round_up(columns, W));
    }
};

// out = S'^T q and S', from vectors that are there; `gated`: decay holds something.
struct TokenUpdate {
    const StatePass& state;
    const StepVectors& x;
    Size kp, vp;
    const float* decay;

    TokenUpdate(const StatePass& s, const StepVectors& vectors, bool gated)
        : state(s), x(vectors), kp(round_up(s.k, W)), vp(round_up(s.columns, W)), decay(gated ? vectors.decay : nullptr) {
        zero(x.out, vp);
        zero(x.answer, vp);
    }
    const float* decayed(float* room, const float* from) const {
        if (!decay) return from;
        for (Size c = 0; c < kp; c += W) store(room + c, load(from + c) * load(decay + c));
        return room;
    }
    void add(float* to, float factor, const float* from) const {
        for (Size c = 0; c < vp; c += W) store(to + c, load(to + c) + factor * load(from + c));
    }

    void linear_attention(const float* bonus) const {
        if (!bonus) {
            state.read_and_write<true>(x.q, x.out, decay, x.key, x.value);
            return;
        }
        state.read_and_write<false>(x.q, x.out, decay, x.key, x.value);
        float own = 0.0f;
        for (Size c = 0; c < state.k; ++c) own += x.q[c] * bonus[c] * x.key[c];
        add(x.out, own, x.value);
    }
    void delta_rule(float beta) const {
        state.read<2>({decayed(x.decayed_k, x.key), decayed(x.decayed_q, x.q)}, {x.answer, x.out});
        for (Size c = 0; c < vp; c += W) store(x.value + c, (load(x.value + c) - load(x.answer + c)) * beta);
        add(x.out, dot(x.q, x.key, kp), x.value);
        state.write<1>(decay, {x.key}, {x.value});
    }
    void dplr() const {
        state.read<2>({x.b, decayed(x.decayed_q, x.q)}, {x.answer, x.out});
        add(x.out, dot(x.q, x.a, kp), x.answer);
        add(x.out, dot(x.q, x.key, kp), x.value);
        state.write<2>(decay, {x.a, x.key}, {x.answer, x.value});
    }
};

using Kind = Recurrence;

template <Kind kind>
struct Step {
    static std::size_t scratch(Size k, Size columns) {
        return StepVectors::bytes(k, columns) + std::size_t(round_up(columns, W)) * 4 + 64;
    }
    static void run(const MatrixCall& call, const MatrixTask& task, void* memory) {
        const Size columns = task.to - task.from, kp = round_up(call.k, W), vp = round_up(columns, W);
        const Size key_head = task.head / (call.hv / call.hk), number = task.row * call.hv + task.head;
        Arena arena(memory);
        const StepVectors x(arena, call.k, columns);
        const auto get = [&](float* to, const Sequence& s, Size head, float factor) {
            read_row(to, s.data, s.dtype, task.row * s.batch + head * s.head, call.k, kp, factor);
        };
        get(x.q, call.q, key_head, call.scale);
        get(x.key, call.key, key_head, 1.0f);
        if (kind == Kind::dplr) get(x.a, call.a, key_head, 1.0f), get(x.b, call.b, key_head, 1.0f);
        read_row(x.value, call.value.data, call.value.dtype,
                 task.row * call.value.batch + task.head * call.value.head + task.from, columns, vp, 1.0f);
        if (call.gate == Gate::scalar) {
            const float log = read_one(call.g.data, call.g.dtype, task.row * call.g.batch + task.head * call.g.head);
            const F d = exp(all(log));
            for (Size c = 0; c < kp; c += W) store(x.decay + c, d);
        } else if (call.gate == Gate::channel) {
            get(x.decay, call.g, call.hg == call.hv ? task.head : key_head, 1.0f);
            for (Size c = 0; c < kp; c += W) store(x.decay + c, exp(load(x.decay + c)));
        }
        StatePass state;
        state.k = call.k, state.columns = columns;
        state.after = call.after + number * call.k * call.v + task.from, state.after_stride = call.v;
        if (call.before) {
            state.before = call.before + number * call.k * call.v + task.from, state.before_stride = call.v;
        } else {
            float* none = arena.floats(vp);
            zero(none, vp);
            state.before = none;
        }
        const TokenUpdate update(state, x, call.gate != Gate::none);
        if (kind == Kind::linear_attention)
            update.linear_attention(call.bonus ? call.bonus + task.head * call.k : nullptr);
        else if (kind == Kind::delta_rule)
            update.delta_rule(
                read_one(call.beta.data, call.beta.dtype, task.row * call.beta.batch + task.head * call.beta.head));
        else
            update.dplr();
        write_row(call.out.data, call.out.dtype, task.row * call.out.batch + task.head * call.out.head + task.from, x.out,
                  columns);
    }
};

}  // namespace linstate::LINSTATE_VARIANT
