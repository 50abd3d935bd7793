// The bindings of the kernels that walk token by token; see module.cpp.

#include <cmath>
#include <vector>

#include "bindings.hpp"
#include "pool.hpp"

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

const float* angles(std::vector<float>& turn, const Size* position, Size rows, Size turned, double base) {
    const Size half = turned / 2;
    turn.resize(std::size_t(rows * turned));
    for (Size i = 0; i < half; ++i) {
        const double speed = std::pow(base, -2.0 * double(i) / double(turned));
        for (Size row = 0; row < rows; ++row) {
            const double angle = double(position[row]) * speed;
            turn[std::size_t(row * turned + i)] = float(std::cos(angle));
            turn[std::size_t(row * turned + half + i)] = float(std::sin(angle));
        }
    }
    return turn.data();
}

namespace {

// Columns of a task: at most `width`, and fewer where there would be fewer tasks than threads. Whole steps.
Size share(Size v, Size width, Size step, Size heads, int threads) {
    if (heads <= 0) return width;
    Size splits = (threads + heads - 1) / heads;
    const Size even = ((v + splits - 1) / splits + step - 1) / step * step;
    return even < width ? (even > 0 ? even : step) : width;
}

void read_sizes(MatrixCall& call, const nb::tuple& sizes) {
    call.rows = nb::cast<Size>(sizes[0]), call.tokens = nb::cast<Size>(sizes[1]);
    call.hk = nb::cast<Size>(sizes[2]), call.hv = nb::cast<Size>(sizes[3]), call.hg = nb::cast<Size>(sizes[4]);
    call.k = nb::cast<Size>(sizes[5]), call.v = nb::cast<Size>(sizes[6]);
}

Output output(nb::handle h) {
    const Sequence o = sequence(h);
    return {const_cast<void*>(o.data), o.batch, o.time, o.head, o.dtype};
}

void scan(const nb::tuple& sizes, const nb::tuple& tensors, nb::handle rates, float scale, nb::handle bounds,
          nb::handle before, nb::handle after, nb::handle out, nb::handle snapshots, Size every, Size snapshot_count,
          int threads) {
    MatrixCall call;
    read_sizes(call, sizes);
    call.q = sequence(tensors[0]), call.key = sequence(tensors[1]), call.value = sequence(tensors[2]);
    call.g = sequence(tensors[3]);
    call.rates = address<const float>(rates);
    call.scale = scale;
    call.bounds = address<const Size>(bounds);
    call.before = address<const float>(before), call.after = address<float>(after);
    call.out = output(out);
    call.snapshots = address<float>(snapshots), call.every = every, call.snapshot_count = snapshot_count;
    const Kernels& table = kernels_in_use();
    nb::gil_scoped_release release;
    const double tokens = double(call.bounds ? call.tokens : call.tokens * call.rows);
    const int used = worth((tokens * 0.2 + 0.1) * double(call.hv * call.k * call.v), threads);
    const Size step = table.column_step;
    run_matrix(call, table.token->selective_scan,
               share(call.v, scan_columns(call.k, step), step, call.rows * call.hv, used), used);
}

// kind: 0 linear attention, 1 delta rule, 2 diagonal plus low rank
void step(int kind, const nb::tuple& sizes, const nb::tuple& tensors, int gate, float scale, nb::handle bonus,
          nb::handle before, nb::handle after, nb::handle out, int threads) {
    MatrixCall call;
    read_sizes(call, sizes);
    call.q = sequence(tensors[0]), call.key = sequence(tensors[1]), call.value = sequence(tensors[2]);
    call.a = sequence(tensors[3]), call.b = sequence(tensors[4]);
    call.beta = sequence(tensors[5]), call.g = sequence(tensors[6]);
    call.gate = static_cast<Gate>(gate);
    call.scale = scale;
    call.bonus = address<const float>(bonus), call.before = address<const float>(before);
    call.after = address<float>(after);
    call.out = output(out);
    const Kernels& table = kernels_in_use();
    const MatrixKernel& kernel = kind == 0   ? table.token->linear_attention_step
                                 : kind == 1 ? table.token->delta_rule_step
                                             : table.token->dplr_step;
    nb::gil_scoped_release release;
    const int used = worth(0.25 * double(call.rows * call.hv) * double(call.k * call.v), threads);
    const Size whole = (call.v + table.column_step - 1) / table.column_step * table.column_step;
    run_matrix(call, kernel, share(call.v, whole > 0 ? whole : 1, table.column_step, call.rows * call.hv, used), used);
}

struct ConvWork {
    const ConvCall* call;
    void (*run)(const ConvCall&, const ConvTask&, void*);
    Size pieces, width, blocks, length;  // of the channels, of the tokens
};

void conv(const nb::tuple& sizes, nb::handle x, nb::handle weight, nb::handle bias, bool silu, nb::handle bounds,
          nb::handle before, nb::handle after, nb::handle out, int threads) {
    ConvCall call;
    call.rows = nb::cast<Size>(sizes[0]), call.tokens = nb::cast<Size>(sizes[1]);
    call.channels = nb::cast<Size>(sizes[2]), call.taps = nb::cast<Size>(sizes[3]);
    call.x = sequence(x);
    const Sequence w = sequence(weight), b = sequence(bias);
    call.weight = w.data, call.weight_dtype = w.dtype, call.bias = b.data, call.bias_dtype = b.dtype;
    call.silu = silu;
    call.bounds = address<const Size>(bounds);
    call.before = address<const float>(before), call.after = address<float>(after);
    call.out = output(out);
    const TokenKernels& table = *kernels_in_use().token;
    nb::gil_scoped_release release;
    const double tokens = double(call.bounds ? call.tokens : call.tokens * call.rows);
    const int used = worth((tokens * 0.8 + 0.5 * double(call.rows)) * double(call.channels), threads);
    ConvWork job{&call, table.conv, (call.channels + CONV_COLUMNS - 1) / CONV_COLUMNS, CONV_COLUMNS, 1, 0};
    // Time is cut where there are few channels: at multiples of 64 tokens, and not where sequences are packed.
    if (!call.bounds && call.rows * job.pieces > 0) {
        const Size tasks = used > 1 ? 4 * used : 1;
        Size blocks = (tasks + call.rows * job.pieces - 1) / (call.rows * job.pieces);
        if (blocks > 1) {
            job.length = ((call.tokens + blocks - 1) / blocks + 63) / 64 * 64;
            job.blocks = job.length > 0 ? (call.tokens + job.length - 1) / job.length : 1;
            if (job.blocks < 1) job.blocks = 1;
        }
    }
    const Size width = call.channels < CONV_COLUMNS ? call.channels : CONV_COLUMNS;
    pool_tasks(call.rows * job.pieces * job.blocks, used, table.conv_scratch(call.taps, width), &job,
               [](const void* context, Size number, void* scratch) {
                   const ConvWork& w = *static_cast<const ConvWork*>(context);
                   const ConvCall& c = *w.call;
                   ConvTask task;
                   const Size block = number % w.blocks, piece = number / w.blocks % w.pieces;
                   task.row = number / w.blocks / w.pieces;
                   const Size tokens = c.bounds ? c.bounds[task.row + 1] - c.bounds[task.row] : c.tokens;
                   task.first = block * w.length;
                   task.last = block + 1 == w.blocks ? tokens : task.first + w.length;
                   task.from = piece * w.width;
                   task.to = task.from + w.width < c.channels ? task.from + w.width : c.channels;
                   w.run(c, task, scratch);
               });
}

}  // namespace

// `sizes`, `numbers` and `tensors` in the order of linstate/ops/native/mixer.py.
MixerCall read_mixer(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, nb::handle out) {
    MixerCall call;
    call.rows = rows;
    std::size_t i = 0;
    const auto size = [&] { return nb::cast<Size>(sizes[i++]); };
    call.hk = size(), call.hv = size(), call.k = size(), call.v = size();
    call.update = static_cast<MixerCall::Update>(size());
    call.q_at = size(), call.k_at = size(), call.v_at = size();
    call.conv_at = size(), call.channels = size(), call.taps = size();
    call.decay = static_cast<MixerCall::Decay>(size());
    call.stepped_values = size() != 0, call.elu_plus_one = size() != 0, call.gate_first = size() != 0;
    call.norm = static_cast<MixerCall::Norm>(size());
    call.gate = static_cast<MixerCall::OutputGate>(size());
    i = 0;
    const auto number = [&] { return nb::cast<float>(numbers[i++]); };
    call.unit_eps = number(), call.scale = number(), call.beta_scale = number(), call.divisor = number();
    call.step_low = number(), call.step_high = number(), call.norm_eps = number();
    call.normaliser_eps = number(), call.rotary_base = nb::cast<double>(numbers[i++]);
    i = 0;
    const auto tensor = [&] { return rows_of(tensors[i++]); };
    call.mixed = tensor(), call.weight = tensor(), call.bias = tensor(), call.beta = tensor(), call.step = tensor();
    call.rate = tensor(), call.step_bias = tensor(), call.skip = tensor(), call.bonus = tensor();
    call.norm_weight = tensor(), call.norm_bias = tensor(), call.z = tensor(), call.key = tensor(), call.value = tensor();
    call.position = static_cast<const Size*>(tensor().data);
    const Sequence o = rows_of(out);
    call.out.data = const_cast<void*>(o.data), call.out.batch = o.batch, call.out.dtype = o.dtype;
    return call;
}

void run_call(const MixerCall& given, int threads) {
    const TokenKernels& table = *kernels_in_use().token;
    MixerCall call = given;
    std::vector<float> turn;
    if (call.position) call.turn = angles(turn, call.position, call.rows, call.k, call.rotary_base);
    // Stretches of key heads are shared out, two for a thread; where there are fewer, the value heads of each.
    const int used = worth_calling(0.1 * double(call.rows * call.hv) * double(call.k * call.v), threads);
    struct Work {
        const MixerCall* call;
        const TokenKernels* table;
        Size heads, tasks, group, splits;
    } job{&call, &table, call.rows * call.hk, used > 1 ? 2 * used : 1, call.hv / call.hk, 1};
    if (job.heads <= 0) return;
    if (job.heads < job.tasks) {
        job.splits = (job.tasks + job.heads - 1) / job.heads;
        if (job.splits > job.group) job.splits = job.group;
        job.tasks = job.heads * job.splits;
    }
    thread_local std::vector<float> raw;
    if (job.splits > 1 && call.norm == MixerCall::Norm::group) {
        raw.resize(std::size_t(call.rows * call.hv * call.v));
        call.raw = raw.data();
    }
    const std::size_t scratch = table.mixer_scratch(call);
    pool_tasks(job.tasks, used, scratch, &job, [](const void* context, Size task, void* scratch) {
        const Work& w = *static_cast<const Work*>(context);
        const Size hk = w.call->hk;
        if (w.tasks == w.heads * w.splits) {
            const Size part = task % w.splits, head = task / w.splits;
            w.table->mixer(*w.call, head / hk, head % hk, part * w.group / w.splits, (part + 1) * w.group / w.splits, false,
                           scratch);
            return;
        }
        const Size last = (task + 1) * w.heads / w.tasks;
        for (Size head = task * w.heads / w.tasks; head < last; ++head)
            w.table->mixer(*w.call, head / hk, head % hk, 0, w.group, head + 1 < last, scratch);
    });
    if (!call.raw) return;
    pool_tasks(job.heads, worth_calling(2.0 * double(call.rows * call.hv * call.v), threads), scratch, &job,
               [](const void* context, Size head, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   w.table->mixer_finish(*w.call, head / w.call->hk, head % w.call->hk, scratch);
               });
}

namespace {

void mixer(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, nb::handle tail_before,
           nb::handle tail_after, nb::handle before, nb::handle after, nb::handle out, int threads) {
    MixerCall call = read_mixer(sizes, numbers, rows, tensors, out);
    call.tail_before = address<const float>(tail_before), call.tail_after = address<float>(tail_after);
    call.before = address<const float>(before), call.after = address<float>(after);
    nb::gil_scoped_release release;
    run_call(call, threads);
}

}  // namespace

void bind_token(nb::module_& m) {
    m.def("scan", &scan, nb::arg("sizes"), nb::arg("tensors"), nb::arg("rates").none(), nb::arg("scale"),
          nb::arg("bounds").none(), nb::arg("before").none(), nb::arg("after"), nb::arg("out"), nb::arg("snapshots").none(),
          nb::arg("every"), nb::arg("snapshot_count"), nb::arg("threads"),
          "The elementwise scan; see linstate/ops/native/scan.py.");
    m.def("conv", &conv, nb::arg("sizes"), nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("silu"),
          nb::arg("bounds").none(), nb::arg("before").none(), nb::arg("after"), nb::arg("out"), nb::arg("threads"),
          "The short causal convolution; see linstate/ops/native/scan.py.");
    m.def("step", &step, nb::arg("kind"), nb::arg("sizes"), nb::arg("tensors"), nb::arg("gate"), nb::arg("scale"),
          nb::arg("bonus").none(), nb::arg("before").none(), nb::arg("after"), nb::arg("out"), nb::arg("threads"),
          "One token of a recurrence on a matrix state; see linstate/ops/native/step.py.");
    m.def("mixer", &mixer, nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"),
          nb::arg("tail_before").none(), nb::arg("tail_after").none(), nb::arg("before").none(), nb::arg("after"),
          nb::arg("out"), nb::arg("threads"),
          "One token of a mixer between its projections; see linstate/ops/native/mixer.py.");
}

}  // namespace linstate
