// Everything between the projections of a mixer, of one token and of many: csrc/mixer.hpp, csrc/block.hpp.

#include <cmath>
#include <vector>

#include "addresses.hpp"
#include "bindings.hpp"
#include "block.hpp"

namespace linstate {

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
    const auto tensor = [&] { return row_sequence(tensors[i++]); };
    call.mixed = tensor(), call.weight = tensor(), call.bias = tensor(), call.beta = tensor(), call.step = tensor();
    call.rate = tensor(), call.step_bias = tensor(), call.skip = tensor(), call.bonus = tensor();
    call.norm_weight = tensor(), call.norm_bias = tensor(), call.z = tensor(), call.key = tensor(), call.value = tensor();
    call.position = static_cast<const Size*>(tensor().data);
    const Sequence o = row_sequence(out);
    call.out.data = const_cast<void*>(o.data), call.out.batch = o.batch, call.out.dtype = o.dtype;
    return call;
}

// The convolution's tail [rows, taps - 1, channels] and the matrix [rows, hv, k, columns].
constexpr std::size_t states_of(const MixerCall&) { return 2; }
void place_states(MixerCall& call, const MaybeTensor* before, const MaybeTensor* after) {
    const Check check("mixer");
    const Size tail = call.taps > 1 ? call.rows * (call.taps - 1) * call.channels : 0;
    check.that(tail == 0 || after[0], "a convolution needs its state after it");
    check.that(after[1].given, "the matrix after it is missing");
    const auto floats = [&](const char* name, const Tensor& t, Size numbers) {
        return static_cast<float*>(const_cast<void*>(check.flat(name, t, numbers, Tensor::Type::f32)));
    };
    const Size matrix = call.rows * call.hv * call.k * call.columns();
    if (tail > 0) call.tail_before = floats("tail before", before[0], tail), call.tail_after = floats("tail after", after[0], tail);
    call.before = floats("matrix before", before[1], matrix), call.after = floats("matrix after", after[1], matrix);
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

// `sizes`, `numbers` and `tensors` as of a step (bind_token.cpp); the others (address, row stride, is bf16), or None.
void mixer_gates(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, const nb::tuple& outs,
                 int threads) {
    MixerGates call;
    call.mixer = read_mixer(sizes, numbers, rows, tensors, nb::none());
    call.q = row_output(outs[0]), call.key = row_output(outs[1]), call.value = row_output(outs[2]);
    call.beta = row_output(outs[3]), call.g = row_output(outs[4]);
    nb::gil_scoped_release release;
    const MixerCall& c = call.mixer;
    by_rows(call, LINSTATE_IN_USE(between).gates, rows, 0.5 * double(c.hk * c.k + c.hv * c.v), block_scratch(c), threads);
}

void mixer_finish(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, nb::handle made,
                  nb::handle out, int threads) {
    MixerFinish call;
    call.mixer = read_mixer(sizes, numbers, rows, tensors, out);
    call.made = row_sequence(made);
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).finish, rows, 0.7 * double(call.mixer.hv * call.mixer.v), block_scratch(call.mixer), threads);
}

}  // namespace

LINSTATE_BINDINGS(mixer) {
    nb::module_& m = to.module;
    m.def("mixer", &mixer, nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"),
          nb::arg("tail_before").none(), nb::arg("tail_after").none(), nb::arg("before").none(), nb::arg("after"),
          nb::arg("out"), nb::arg("threads"),
          "One token of a mixer between its projections; see linstate/ops/native/mixer.py.");
    to.program.def("mixer", [](Program& p, const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors,
                               nb::handle out) { p.append(read_mixer(sizes, numbers, rows, tensors, out)); },
                   nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"), nb::arg("out"));
    m.def("mixer_gates", &mixer_gates, nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"),
          nb::arg("outs"), nb::arg("threads"), "What stands before a mixer's recurrence; see linstate/ops/native/block.py.");
    m.def("mixer_finish", &mixer_finish, nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"),
          nb::arg("made"), nb::arg("out"), nb::arg("threads"), "What stands behind it; see linstate/ops/native/block.py.");
}

}  // namespace linstate
