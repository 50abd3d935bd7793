// One token of softmax attention between its projections, over keys and values in bf16.
//
// Places are taken in blocks of a fixed size, each a task that leaves a weighted sum of its values with its largest logit and its
// sum of weights; a head's blocks are then put together in order. So a row's result does not depend on threads or neighbours.
#pragma once

#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

struct AttendStep {
    static constexpr Size BLOCK = ATTEND_BLOCK;

    static std::size_t scratch(const AttendCall& call) {
        const Size kp = round_up(call.k, W), vp = round_up(call.v, W);
        return std::size_t(2 * kp + 2 * vp + 4 * round_up(BLOCK, W)) * 4 + 64 * 4;
    }

    // q of the row as it is multiplied, and the new place of its keys and values.
    static void begin(const AttendCall& call, Size row, void* memory) {
        const Size K = call.k, kp = round_up(K, W);
        Arena arena(memory);
        float *x = arena.floats(kp), *room = arena.floats(kp);
        for (Size h = 0; h < call.hq; ++h) {
            head(call, row, call.q, h, call.q_norm, x, room);
            float* to = call.ready + (row * call.hq + h) * K;
            for (Size c = 0; c < K; ++c) to[c] = x[c] * call.scale;
        }
        if (!call.key.data) return;
        const Size place = call.row[row].places - 1;
        for (Size h = 0; h < call.hk; ++h) {
            head(call, row, call.key, h, call.k_norm, x, room);
            write_row(call.row[row].keys, Dtype::bf16, (place * call.hk + h) * K, x, K);
        }
        const auto* value = static_cast<const std::uint16_t*>(call.value.data) + row * call.value.batch;
        __builtin_memcpy(call.row[row].values + place * call.hk * call.v, value, std::size_t(call.hk * call.v) * 2);
    }

    static void run(const AttendCall& call, Size row, Size key_head, Size block, void* memory) {
        const Size places = call.row[row].places, from = block * BLOCK, group = call.hq / call.hk;
        const Size count = places - from < BLOCK ? places - from : BLOCK;
        if (count <= 0) return;
        Arena arena(memory);
        float* logits = arena.floats(4 * round_up(BLOCK, W));
        Size h = 0;
        for (; h + 4 <= group; h += 4) heads<4>(call, row, key_head, h, block, count, logits);
        for (; h + 2 <= group; h += 2) heads<2>(call, row, key_head, h, block, count, logits);
        for (; h < group; ++h) heads<1>(call, row, key_head, h, block, count, logits);
    }

    static void end(const AttendCall& call, Size row, Size key_head, void* memory) {
        const Size V = call.v, vp = round_up(V, W), group = call.hq / call.hk;
        const Size blocks = (call.row[row].places + BLOCK - 1) / BLOCK;
        Arena arena(memory);
        float *sum = arena.floats(vp), *room = arena.floats(vp > call.k ? vp : call.k);
        for (Size h = 0; h < group; ++h) {
            float largest = parts(call, row, key_head, 0, h)[V];
            for (Size b = 1; b < blocks; ++b) {
                const float m = parts(call, row, key_head, b, h)[V];
                largest = m > largest ? m : largest;
            }
            zero(sum, vp);
            float total = 0.0f;
            for (Size b = 0; b < blocks; ++b) {
                const float* p = parts(call, row, key_head, b, h);
                const float factor = exp(all(p[V] - largest))[0];
                total += factor * p[V + 1];
                for (Size c = 0; c < V; ++c) sum[c] += factor * p[c];
            }
            const Size at = (key_head * group + h) * V;
            multiply(sum, 1.0f / total, vp);
            if (call.z.data) {
                read_row(room, call.z.data, call.z.dtype, row * call.z.batch + at, V, vp, 1.0f);
                for (Size c = 0; c < vp; c += W) store(sum + c, load(sum + c) * sigmoid(load(room + c)));
            }
            write_row(call.out.data, call.out.dtype, row * call.out.batch + at, sum, V);
        }
    }

   private:
    static float* parts(const AttendCall& call, Size row, Size key_head, Size block, Size head) {
        const Size group = call.hq / call.hk;
        return call.part + (((row * call.hk + key_head) * call.blocks + block) * group + head) * (call.v + 2);
    }

    static void round(float* x, Size n) {
        for (Size c = 0; c < n; ++c) x[c] = from_bf16(to_bf16(x[c]));
    }

    // A head, normed and turned; in bf16 in between, as torch's layers are.
    static void head(const AttendCall& call, Size row, const Sequence& s, Size h, const Sequence& norm, float* x, float* room) {
        const Size K = call.k, kp = round_up(K, W);
        read_row(x, s.data, s.dtype, row * s.batch + h * K, K, kp, 1.0f);
        if (norm.data) {
            multiply(x, 1.0f / __builtin_sqrtf(dot(x, x, kp) / float(K) + call.eps), kp);
            read_row(room, norm.data, norm.dtype, 0, K, kp, 1.0f);
            for (Size c = 0; c < K; ++c) x[c] *= room[c] + call.weight_plus;
            round(x, K);
        }
        if (!call.turn) return;
        const float* turns = call.turn + row * call.turned;
        const Size half = call.turned / 2;
        for (Size c = 0; c < half; ++c) {
            const float first = x[c], second = x[half + c];
            x[c] = first * turns[c] - second * turns[half + c];
            x[half + c] = second * turns[c] + first * turns[half + c];
        }
        round(x, K);
    }

    template <int G>
    static void heads(const AttendCall& call, Size row, Size key_head, Size h, Size block, Size count, float* logits) {
        const Size K = call.k, V = call.v, group = call.hq / call.hk, from = block * BLOCK, padded = round_up(count, W);
        const Size key_step = call.hk * K, value_step = call.hk * V;
        const float* q = call.ready + (row * call.hq + key_head * group + h) * K;
        const std::uint16_t* key = call.row[row].keys + from * key_step + key_head * K;
        const std::uint16_t* value = call.row[row].values + from * value_step + key_head * V;
        const Size whole = K / W * W;
        for (Size s = 0; s < count; ++s, key += key_step) {
            F acc[G] = {};
            for (Size c = 0; c < whole; c += W) {
                const F x = load_bf16(key + c);
#pragma GCC unroll 4
                for (int j = 0; j < G; ++j) acc[j] += x * load(q + j * K + c);
            }
#pragma GCC unroll 4
            for (int j = 0; j < G; ++j) {
                float a = sum(acc[j]);
                for (Size c = whole; c < K; ++c) a += from_bf16(key[c]) * q[j * K + c];
                logits[j * BLOCK + s] = a;
            }
        }
        for (int j = 0; j < G; ++j) {
            float* l = logits + j * BLOCK;
            float* to = parts(call, row, key_head, block, h + j);
            float largest = l[0];
            for (Size s = 1; s < count; ++s) largest = l[s] > largest ? l[s] : largest;
            for (Size s = count; s < padded; ++s) l[s] = -__builtin_inff();
            F total = F{};
            for (Size s = 0; s < padded; s += W) {
                const F p = exp(load(l + s) - largest);
                store(l + s, p), total += p;
            }
            to[V] = largest, to[V + 1] = sum(total);
        }
        // Columns two vectors at a time, whose sums stay in registers.
        Size c = 0;
        for (; c + 2 * W <= V; c += 2 * W) columns<G, 2>(call, row, key_head, h, block, count, logits, value + c, c);
        for (; c + W <= V; c += W) columns<G, 1>(call, row, key_head, h, block, count, logits, value + c, c);
        for (; c < V; ++c)
            for (int j = 0; j < G; ++j) {
                float a = 0.0f;
                for (Size s = 0; s < count; ++s) a += logits[j * BLOCK + s] * from_bf16(value[s * value_step + c]);
                parts(call, row, key_head, block, h + j)[c] = a;
            }
    }

    template <int G, int N>
    static LINSTATE_INLINE void columns(const AttendCall& call, Size row, Size key_head, Size h, Size block, Size count,
                                        const float* weights, const std::uint16_t* value, Size at) {
        const Size step = call.hk * call.v;
        F acc[G][N] = {};
        for (Size s = 0; s < count; ++s, value += step) {
            F x[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) x[n] = load_bf16(value + n * W);
#pragma GCC unroll 4
            for (int j = 0; j < G; ++j)
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) acc[j][n] += x[n] * weights[j * BLOCK + s];
        }
        for (int j = 0; j < G; ++j)
            for (int n = 0; n < N; ++n) store(parts(call, row, key_head, block, h + j) + at + n * W, acc[j][n]);
    }
};

}  // namespace linstate::LINSTATE_VARIANT
