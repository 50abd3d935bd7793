// The three recurrences on a matrix state, each one pass over its inputs, a chunk of one head at a time.
//
// In: q, k, v and what else there is, of any strides. Out: o. Everything between stays in the cache: the state [K, V] of the
// head in float32, the chunk's rows and scores. Derivations: docs/kernels.md.
#pragma once

#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

// The part that all three share: where a head's tokens, state and room are.
template <class Core, int R, int C>
struct Head {
    const MatrixCall& call;
    const MatrixTask& task;
    Core core;
    Chunk<Core, R, C> chunk;
    Size columns, vp, ldv;     // value columns of this task, in whole vectors, leading dimension
    Size start, tokens;        // of the sequence, along T
    Size batch, key_head;
    float* state;              // [K, ldv]
    float* out;                // [R * CHUNK, ldv]: what the rows read from the state
    float* values;             // [CHUNK, ldv]
    float* row;                // [ldv]

    static std::size_t bytes(Size k, Size v) {
        const Size ldv = leading(v);
        return Chunk<Core, R, C>::bytes(k) + std::size_t(k + (R + 1) * CHUNK + 1) * std::size_t(ldv) * 4 + 64 * 8 +
               Core::scratch(k, v);
    }
    Head(const MatrixCall& c, const MatrixTask& t, void* scratch)
        : call(c),
          task(t),
          core(static_cast<char*>(scratch) + bytes(c.k, t.to - t.from) - Core::scratch(c.k, t.to - t.from), c.k,
               t.to - t.from) {
        Arena arena(scratch);
        columns = t.to - t.from, vp = round_up(columns, W), ldv = leading(columns);
        chunk.place(arena, c.k);
        chunk.gate = c.gate;
        state = arena.floats(c.k * ldv), out = arena.floats(R * CHUNK * ldv), values = arena.floats(CHUNK * ldv);
        row = arena.floats(ldv);
        key_head = t.head / (c.hv / c.hk);
        if (c.bounds)
            batch = 0, start = c.bounds[t.row], tokens = c.bounds[t.row + 1] - start;
        else
            batch = t.row, start = 0, tokens = c.tokens;
        zero(state, c.k * ldv);
        if (c.before)
            for (Size i = 0; i < c.k; ++i)
                for (Size j = 0; j < columns; ++j) state[i * ldv + j] = c.before[at(t.row * c.hv + t.head, i) + j];
    }
    Size at(Size state_number, Size i) const { return (state_number * call.k + i) * call.v + task.from; }

    // Asks memory for what is read later: the row that the next chunk reads in this place, into the second-level cache, and the
    // row AHEAD behind this one into the first, which cannot hold all of a chunk's: they lie apart by a power of two, on few of
    // its sets. (Inlined by force, here and wherever memory is asked: to gcc a function that only asks does nothing, and it leaves
    // out the calls.) Unasked the processor guesses neither, and reading took a quarter of the time (docs/kernels-tiles.md).
    static constexpr Size AHEAD = 8;
    LINSTATE_INLINE void ask_for_next(const Sequence& s, Size t, Size at, Size n) const {
        const Size width = s.dtype == Dtype::f32 ? 4 : 2, end = start + tokens;
        const char* row = static_cast<const char*>(s.data);
        if (t + CHUNK < end) ask<0, 2>(row + (at + CHUNK * s.time) * width, n * width);
        if (t + AHEAD < end) ask<0, 3>(row + (at + AHEAD * s.time) * width, n * width);
    }
    // The row that is written for this token, so that writing does not wait for what was there.
    LINSTATE_INLINE void ask_for_output(Size t) const {
        const Size width = call.out.dtype == Dtype::f32 ? 4 : 2;
        ask<1, 2>(static_cast<const char*>(call.out.data) + output_at(t) * width, columns * width);
    }
    template <int Write, int Locality>
    static LINSTATE_INLINE void ask(const char* from, Size bytes) {
        for (Size byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, Write, Locality);
    }
    Size output_at(Size t) const {
        return batch * call.out.batch + t * call.out.time + task.head * call.out.head + task.from;
    }
    void load_rows(float* x, const Sequence& s, Size head, Size t0, float factor) const {
        for (Size i = 0; i < chunk.n; ++i) {
            const Size place = batch * s.batch + (t0 + i) * s.time + head * s.head;
            ask_for_next(s, t0 + i, place, call.k);
            read_row(x + i * chunk.ldk, s.data, s.dtype, place, call.k, chunk.kp, factor);
        }
    }
    void copy_rows(float* to, const float* from) const {
        for (Size i = 0; i < chunk.n * chunk.ldk; i += W) store(to + i, load(from + i));
    }
    void load_values(Size t0) const {
        const Sequence& s = call.value;
        for (Size i = 0; i < chunk.n; ++i) {
            const Size place = batch * s.batch + (t0 + i) * s.time + task.head * s.head + task.from;
            ask_for_next(s, t0 + i, place, columns);
            ask_for_output(t0 + i);
            read_row(values + i * ldv, s.data, s.dtype, place, columns, vp, 1.0f);
        }
    }
    void load_decays(Size t0) const {
        const Sequence& s = call.g;
        float* d = chunk.decays;
        if (call.gate == Gate::scalar) {
            for (Size i = 0; i < chunk.n; ++i)
                d[i] = read_one(s.data, s.dtype, batch * s.batch + (t0 + i) * s.time + task.head * s.head);
            for (Size i = chunk.n; i < CHUNK; ++i) d[i] = 0.0f;
            for (Size i = 0; i < CHUNK; i += W) store(d + i, exp(load(d + i)));
        } else if (call.gate == Gate::channel) {
            const Size head = call.hg == call.hv ? task.head : key_head;
            load_rows(d, s, head, t0, 1.0f);
            for (Size i = 0; i < chunk.n; ++i)
                for (Size c = 0; c < chunk.kp; c += W) store(d + i * chunk.ldk + c, exp(load(d + i * chunk.ldk + c)));
        }
    }
    // rows of every set: out = rows S
    void read_state() { core.gemm(R * chunk.n, vp, chunk.k, chunk.rows[0].x, chunk.ldk, state, ldv, out, ldv, Start::zero); }
    float* out_of(int r) const { return out + r * chunk.n * ldv; }
    // S = diag(total) S + end x
    void update_state(const float* end, typename Core::Right x, bool decayed) {
        const bool scaled = !decayed && call.gate != Gate::none;
        core.gemm(chunk.k, vp, chunk.n, end, LDC, x, state, ldv, scaled ? Start::scaled : Start::keep, chunk.total);
    }
    void write(const float* o, Size t0) const {
        for (Size i = 0; i < chunk.n; ++i)
            write_row(call.out.data, call.out.dtype, output_at(t0 + i), o + i * ldv, columns);
    }
    void save_state(float* to, Size number) const {
        for (Size i = 0; i < call.k; ++i)
            for (Size j = 0; j < columns; ++j) to[at(number, i) + j] = state[i * ldv + j];
    }
    template <class Body>
    void chunks(Body body) {
        for (Size done = 0; done < tokens; done += CHUNK) {
            chunk.begin(tokens - done < CHUNK ? tokens - done : CHUNK);
            body(start + done);
            const Size read = done + chunk.n;
            if (call.snapshots && read % call.every == 0 && read / call.every <= call.snapshot_count)
                save_state(call.snapshots,
                           (task.row * call.hv + task.head) * call.snapshot_count + read / call.every - 1);
        }
        save_state(call.after, task.row * call.hv + task.head);
    }
};

// o_i = q_i' S + sum_{j <= i} P_ij v_j        S' = diag(total) S + sum_j k_j' v_j^T
template <class Core>
struct LinearAttention {
    using H = Head<Core, 1, 1>;
    static std::size_t scratch(Size k, Size v) { return H::bytes(k, v); }
    static void run(const MatrixCall& call, const MatrixTask& task, void* memory) {
        H h(call, task, memory);
        auto& chunk = h.chunk;
        RowSet& q = chunk.rows[0];
        q.before = call.bonus != nullptr;
        h.chunks([&](Size t0) {
            h.load_rows(q.x, call.q, h.key_head, t0, call.scale);
            h.load_rows(chunk.columns[0].x, call.key, h.key_head, t0, 1.0f);
            h.load_decays(t0);
            h.load_values(t0);
            float own[CHUNK];  // what token i adds to itself by the bonus
            if (call.bonus)
                for (Size i = 0; i < chunk.n; ++i) {
                    const float* u = call.bonus + task.head * call.k;
                    float s = 0.0f;
                    for (Size c = 0; c < call.k; ++c)
                        s += q.x[i * chunk.ldk + c] * u[c] * chunk.columns[0].x[i * chunk.ldk + c];
                    own[i] = s;
                }
            chunk.run(h.core);
            float* p = chunk.scores[0][0];
            if (call.bonus)
                for (Size i = 0; i < chunk.n; ++i) p[i * LDC + i] = own[i];
            h.read_state();
            const typename Core::Right values = h.core.keep(chunk.n, h.vp, h.values, h.ldv);
            h.core.gemm(chunk.n, h.vp, chunk.n, p, LDC, values, h.out, h.ldv, Start::keep, nullptr, Shape::lower_k);
            h.write(h.out, t0);
            h.update_state(chunk.columns[0].end, values, false);
        });
    }
};

// u_i = beta_i (v_i - k_i' S - sum_{j < i} A_ij u_j)    o_i = q_i' S + sum_{j <= i} P_ij u_j    S' = diag(total) S + sum_j k_j' u_j^T
template <class Core>
struct DeltaRule {
    using H = Head<Core, 2, 1>;
    static std::size_t scratch(Size k, Size v) { return H::bytes(k, v); }
    static void run(const MatrixCall& call, const MatrixTask& task, void* memory) {
        H h(call, task, memory);
        auto& chunk = h.chunk;
        chunk.rows[0].diagonal = false;  // k
        h.chunks([&](Size t0) {
            h.load_rows(chunk.rows[0].x, call.key, h.key_head, t0, 1.0f);
            h.load_rows(chunk.rows[1].x, call.q, h.key_head, t0, call.scale);
            h.copy_rows(chunk.columns[0].x, chunk.rows[0].x);
            h.load_decays(t0);
            h.load_values(t0);
            chunk.run(h.core);
            h.read_state();
            float *u = h.out_of(0), *o = h.out_of(1), *a = chunk.scores[0][0], *p = chunk.scores[1][0];
            for (Size i = 0; i < chunk.n; ++i) {
                const float beta = read_one(call.beta.data, call.beta.dtype,
                                            h.batch * call.beta.batch + (t0 + i) * call.beta.time + task.head * call.beta.head);
                const F b = all(beta);
                for (Size c = 0; c < h.vp; c += W)
                    store(u + i * h.ldv + c, (load(h.values + i * h.ldv + c) - load(u + i * h.ldv + c)) * b);
                multiply(a + i * LDC, -beta, LDC);
            }
            const typename Core::Right solved = h.core.solve(chunk.n, h.vp, a, LDC, u, h.ldv);
            h.core.gemm(chunk.n, h.vp, chunk.n, p, LDC, solved, o, h.ldv, Start::keep, nullptr, Shape::lower_k);
            h.write(o, t0);
            h.update_state(chunk.columns[0].end, solved, false);
        });
    }
};

// z_i = b_i' S + sum_{j < i} (b_i a_j) z_j + (b_i k_j) v_j      o_i = q_i' S + sum_{j <= i} (q_i a_j) z_j + (q_i k_j) v_j
// S' = diag(total) S + sum_j a_j' z_j^T + k_j' v_j^T            b before the decay of its own token, q behind it
template <class Core>
struct Dplr {
    using H = Head<Core, 2, 2>;
    static std::size_t scratch(Size k, Size v) { return H::bytes(k, v); }
    static void run(const MatrixCall& call, const MatrixTask& task, void* memory) {
        H h(call, task, memory);
        auto& chunk = h.chunk;
        chunk.rows[0].before = true;  // b
        h.chunks([&](Size t0) {
            h.load_rows(chunk.rows[0].x, call.b, h.key_head, t0, 1.0f);
            h.load_rows(chunk.rows[1].x, call.q, h.key_head, t0, call.scale);
            h.load_rows(chunk.columns[0].x, call.a, h.key_head, t0, 1.0f);
            h.load_rows(chunk.columns[1].x, call.key, h.key_head, t0, 1.0f);
            h.load_decays(t0);
            h.load_values(t0);
            chunk.run(h.core);
            h.read_state();
            float *z = h.out_of(0), *o = h.out_of(1);
            const Size n = chunk.n, vp = h.vp, ldv = h.ldv;
            const typename Core::Right values = h.core.keep(n, vp, h.values, ldv);
            h.core.gemm(n, vp, n, chunk.scores[0][1], LDC, values, z, ldv, Start::keep, nullptr, Shape::lower_k);
            const typename Core::Right solved = h.core.solve(n, vp, chunk.scores[0][0], LDC, z, ldv);
            h.core.gemm(n, vp, n, chunk.scores[1][0], LDC, solved, o, ldv, Start::keep, nullptr, Shape::lower_k);
            h.core.gemm(n, vp, n, chunk.scores[1][1], LDC, values, o, ldv, Start::keep, nullptr, Shape::lower_k);
            h.write(o, t0);
            h.update_state(chunk.columns[0].end, solved, false);
            h.update_state(chunk.columns[1].end, values, true);
        });
    }
};

}  // namespace linstate::LINSTATE_VARIANT
