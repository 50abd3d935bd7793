// The recurrences on a matrix state, chunked and as a step, and the elementwise scan: csrc/matrix.hpp, step.hpp, scan.hpp;
// linstate/ops/native/matrix.py, step.py, scan.py.

#include <algorithm>

#include "bindings.hpp"

namespace linstate {

void run_matrix(const MatrixCall& call, const MatrixKernel& kernel, Size width, int threads) {
    struct MatrixWork {
        const MatrixCall* call;
        MatrixRun run;
        Size splits, width;  // of the value columns
    } const job{&call, kernel.run, call.v > 0 ? (call.v + width - 1) / width : 0, width};
    pool_tasks(call.rows * call.hv * job.splits, threads, kernel.scratch(call.k, width), &job,
               [](const void* context, Size number, void* scratch) {
                   const MatrixWork& w = *static_cast<const MatrixWork*>(context);
                   const Size head = number / w.splits, split = number % w.splits;
                   MatrixTask task;
                   task.row = head / w.call->hv, task.head = head % w.call->hv;
                   task.from = split * w.width;
                   task.to = task.from + w.width < w.call->v ? task.from + w.width : w.call->v;
                   w.run(*w.call, task, scratch);
               });
}

namespace {

constexpr Size kLargest = 256;  // of K and V: what chunks have room for

// Unit keys of few channels are far from orthogonal, and with beta up to 2 the triangular systems of a chunk then amplify
// roundings of their coefficients beyond the 1e-2 that is promised for bf16 (docs/kernels-tiles.md). Below this K the two
// recurrences that solve such systems compute in float32 for bf16 inputs too; little of a tile would be used there anyway.
constexpr Size kLeastKeyOfRoundedSolve = 64;

// Columns of a task: at most `width`, and fewer where there would be fewer tasks than threads. Whole steps.
Size share(Size v, Size width, Size step, Size heads, int threads) {
    if (heads <= 0) return width;
    Size splits = (threads + heads - 1) / heads;
    const Size even = ((v + splits - 1) / splits + step - 1) / step * step;
    return even < width ? (even > 0 ? even : step) : width;
}

// What all of them have: sizes by v [B, T, Hv, V] and the keys' heads, packed sequences, states.
MatrixCall read_sizes(const Check& check, const Tensor& v, Size hk, Size k, const MaybeTensor& bounds, const MaybeTensor& before,
                      const Tensor& after, const Tensor& out, float scale) {
    MatrixCall call;
    expect_dims(check, "v", v, 4);
    const Size batch = v.size(0);
    call.tokens = v.size(1), call.hv = v.size(2), call.v = v.size(3), call.hk = call.hg = hk, call.k = k;
    check.that(hk > 0 && call.hv % hk == 0, "the heads of v must be a multiple of those of k");
    call.value = check.sequence("v", v, {batch, call.tokens, call.hv, call.v});
    call.out = check.output("out", out, {batch, call.tokens, call.hv, call.v});
    call.bounds = check.bounds(bounds, batch, call.tokens, call.rows);
    call.before = check.floats("before", before, {call.rows, call.hv, k, call.v});
    call.after = check.floats_out("after", after, {call.rows, call.hv, k, call.v});
    call.scale = scale;
    return call;
}

// States that are kept on the way, [rows, Hv, N, K, V].
void read_snapshots(const Check& check, MatrixCall& call, const MaybeTensor& kept, Size every) {
    if (!kept) return;
    check.that(every > 0, "snapshots are so many tokens apart");
    expect_dims(check, "kept", kept, 5);
    call.every = every, call.snapshot_count = kept.size(2);
    call.snapshots = check.floats_out("kept", kept, {call.rows, call.hv, call.snapshot_count, call.k, call.v});
}

MatrixCall read_matrix(const Check& check, Recurrence kind, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& a,
                       const MaybeTensor& b, const MaybeTensor& beta, const MaybeTensor& g, const MaybeTensor& bonus, float scale,
                       const MaybeTensor& bounds, const MaybeTensor& before, const Tensor& after, const Tensor& out) {
    expect_dims(check, "k", k, 4);
    MatrixCall call = read_sizes(check, v, k.size(2), k.size(3), bounds, before, after, out, scale);
    check.that(beta.given == (kind == Recurrence::delta_rule), "beta is of the delta rule");
    check.that(a.given == (kind == Recurrence::dplr) && b.given == a.given, "a and b are of dplr");
    check.that(!bonus || kind == Recurrence::linear_attention, "a bonus is of linear attention");
    const Size batch = v.size(0), tokens = call.tokens;
    call.q = check.sequence("q", q, {batch, tokens, call.hk, call.k}), call.key = check.sequence("k", k, {batch, tokens, call.hk, call.k});
    call.a = check.sequence("a", a, {batch, tokens, call.hk, call.k}), call.b = check.sequence("b", b, {batch, tokens, call.hk, call.k});
    call.beta = check.sequence("beta", beta, {batch, tokens, call.hv});
    if (g && g.dims == 3) {
        call.gate = Gate::scalar, call.hg = call.hv;
        call.g = check.sequence("g", g, {batch, tokens, call.hv});
    } else if (g) {
        expect_dims(check, "g", g, 4);
        call.gate = Gate::channel, call.hg = g.size(2) == call.hk ? call.hk : call.hv;
        call.g = check.sequence("g", g, {batch, tokens, call.hg, call.k});
    }
    call.bonus = check.floats("bonus", bonus, {call.hv, call.k});
    return call;
}

void matrix(Recurrence kind, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& a, const MaybeTensor& b,
            const MaybeTensor& beta, const MaybeTensor& g, const MaybeTensor& bonus, float scale, const MaybeTensor& bounds,
            const MaybeTensor& before, const Tensor& after, const Tensor& out, const MaybeTensor& kept, Size every, int threads) {
    const Check check("matrix");
    MatrixCall call = read_matrix(check, kind, q, k, v, a, b, beta, g, bonus, scale, bounds, before, after, out);
    check.that(call.k <= kLargest && call.v <= kLargest, "K and V go up to 256");
    read_snapshots(check, call, kept, every);
    const Kernels& table = kernels_in_use();
    const bool bf16 = call.value.dtype == Dtype::bf16 && (kind == Recurrence::linear_attention || call.k >= kLeastKeyOfRoundedSolve);
    const MatrixKernel kernel = kind == Recurrence::linear_attention ? (bf16 ? table.linear_attention_bf16 : table.linear_attention)
                                : kind == Recurrence::delta_rule     ? (bf16 ? table.delta_rule_bf16 : table.delta_rule)
                                                                     : (bf16 ? table.dplr_bf16 : table.dplr);
    nb::gil_scoped_release release;
    const Size heads = call.rows * call.hv;
    // A thread is worth making for about a million operations; the state alone counts as a chunk's.
    const double work = double(call.bounds ? call.tokens : call.tokens * call.rows) * double(call.hv) * double(call.k * call.v) * 8;
    const Size worth = Size(work / 1e6) + 1;
    const Size wanted = worth < threads ? worth : threads;
    Size width = call.v;
    if (heads > 0 && heads < wanted) {
        const Size steps = (call.v + table.column_step - 1) / table.column_step;
        const Size splits = std::min((wanted + heads - 1) / heads, steps);
        if (splits > 0) width = (steps + splits - 1) / splits * table.column_step;
    }
    run_matrix(call, kernel, width, int(wanted));
}

void step(Recurrence kind, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& a, const MaybeTensor& b,
          const MaybeTensor& beta, const MaybeTensor& g, const MaybeTensor& bonus, float scale, const MaybeTensor& before,
          const Tensor& after, const Tensor& out, int threads) {
    const Check check("step");
    const MatrixCall call = read_matrix(check, kind, q, k, v, a, b, beta, g, bonus, scale, {}, before, after, out);
    check.that(call.tokens == 1, "a step takes one token a row");
    const Kernels& table = kernels_in_use();
    const MatrixKernel& kernel = kind == Recurrence::linear_attention ? table.token->linear_attention_step
                                 : kind == Recurrence::delta_rule     ? table.token->delta_rule_step
                                                                      : table.token->dplr_step;
    nb::gil_scoped_release release;
    const int used = worth(0.25 * double(call.rows * call.hv) * double(call.k * call.v), threads);
    const Size whole = (call.v + table.column_step - 1) / table.column_step * table.column_step;
    run_matrix(call, kernel, share(call.v, whole > 0 ? whole : 1, table.column_step, call.rows * call.hv, used), used);
}

// Without q and k the state has one row, which adds v up.
void scan(const MaybeTensor& q, const MaybeTensor& k, const Tensor& v, const Tensor& g, const MaybeTensor& rates, float scale,
          const MaybeTensor& bounds, const MaybeTensor& before, const Tensor& after, const Tensor& out, const MaybeTensor& kept,
          Size every, int threads) {
    const Check check("scan");
    check.that(q.given == k.given, "q and k are there together");
    if (k) expect_dims(check, "k", k, 4);
    MatrixCall call = read_sizes(check, v, k ? k.size(2) : 1, k ? k.size(3) : 1, bounds, before, after, out, scale);
    const Size batch = v.size(0);
    call.hg = call.hv;
    call.q = check.sequence("q", q, {batch, call.tokens, call.hk, call.k});
    call.key = check.sequence("k", k, {batch, call.tokens, call.hk, call.k});
    call.g = check.sequence("g", g, {batch, call.tokens, call.hv, call.v});
    call.rates = check.floats("rates", rates, {call.hv, call.k, call.v});
    read_snapshots(check, call, kept, every);
    const Kernels& table = kernels_in_use();
    nb::gil_scoped_release release;
    const double tokens = double(call.bounds ? call.tokens : call.tokens * call.rows);
    const int used = worth((tokens * 0.2 + 0.1) * double(call.hv * call.k * call.v), threads);
    const Size columns = table.column_step;
    run_matrix(call, table.token->selective_scan, share(call.v, scan_columns(call.k, columns), columns, call.rows * call.hv, used),
               used);
}

}  // namespace

LINSTATE_BINDINGS(matrix) {
    nb::module_& m = to.module;
    nb::enum_<Recurrence>(m, "Recurrence", "On a matrix state.")
        .value("linear_attention", Recurrence::linear_attention)
        .value("delta_rule", Recurrence::delta_rule)
        .value("dplr", Recurrence::dplr);
    m.def("matrix", &matrix, nb::arg("recurrence"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("a").none(), nb::arg("b").none(),
          nb::arg("beta").none(), nb::arg("g").none(), nb::arg("bonus").none(), nb::arg("scale"), nb::arg("bounds").none(),
          nb::arg("before").none(), nb::arg("after"), nb::arg("out"), nb::arg("kept").none(), nb::arg("every"), nb::arg("threads"),
          "A chunked recurrence on a matrix state; see linstate/ops/native/matrix.py.");
    m.def("step", &step, nb::arg("recurrence"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("a").none(), nb::arg("b").none(),
          nb::arg("beta").none(), nb::arg("g").none(), nb::arg("bonus").none(), nb::arg("scale"), nb::arg("before").none(),
          nb::arg("after"), nb::arg("out"), nb::arg("threads"),
          "One token of a recurrence on a matrix state; see linstate/ops/native/step.py.");
    m.def("scan", &scan, nb::arg("q").none(), nb::arg("k").none(), nb::arg("v"), nb::arg("g"), nb::arg("rates").none(),
          nb::arg("scale"), nb::arg("bounds").none(), nb::arg("before").none(), nb::arg("after"), nb::arg("out"),
          nb::arg("kept").none(), nb::arg("every"), nb::arg("threads"), "The elementwise scan; see linstate/ops/native/scan.py.");
}

}  // namespace linstate
