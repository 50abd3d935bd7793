// Everything between the projections of a mixer, of one token and of many: csrc/mixer.hpp, csrc/block.hpp.

#include <cmath>
#include <vector>

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

// What a mixer does between its projections (linstate/ops/fused): the part of a call that is the same for every token.
struct MixerPlan : MixerCall {};

namespace {

MixerCall read_mixer(const Check& check, const MixerPlan& plan, const Tensor& mixed, const MaybeTensor& weight,
                     const MaybeTensor& bias, const MaybeTensor& beta, const MaybeTensor& step, const MaybeTensor& rate,
                     const MaybeTensor& step_bias, const MaybeTensor& skip, const MaybeTensor& bonus, const MaybeTensor& norm,
                     const MaybeTensor& norm_bias, const MaybeTensor& z, const MaybeTensor& key, const MaybeTensor& value,
                     const MaybeTensor& position) {
    using Decay = MixerCall::Decay;
    MixerCall call = plan;
    check.that(call.hk > 0 && call.hv > 0 && call.hv % call.hk == 0 && call.k > 0 && call.v > 0, "the plan's sizes do not fit");
    const Size channels = mixed.last(), keys = call.hk * call.k, values = call.hv * call.v;
    const Size rows = call.rows = rows_of(mixed);
    call.mixed = check.rows("mixed", mixed, rows, channels);
    // Channels [at, at + size) of mixed, and of those that the convolution reads.
    const auto among = [&](Size at, Size size) {
        const Size first = call.taps ? call.conv_at : 0, last = call.taps ? call.conv_at + call.channels : channels;
        return at >= first && at + size <= last;
    };
    check.that(call.taps >= 0 && call.conv_at >= 0 && call.channels >= 0 && call.conv_at + call.channels <= channels,
               "the convolution's channels must be among those of mixed");
    check.that(among(call.q_at, keys) && (key || among(call.k_at, keys)) && (value || among(call.v_at, values)),
               "q, k and v must be among the channels of mixed");
    check.that(weight.given == (call.taps > 0), "a convolution has a weight, and a weight a convolution");
    call.weight = check.weight("weight", weight, call.channels * call.taps), call.bias = check.weight("bias", bias, call.channels);

    check.that(call.update != Recurrence::dplr, "a mixer's recurrence is linear attention or the delta rule");
    check.that(beta.given == (call.update == MixerCall::Update::delta_rule), "beta is of the delta rule");
    call.beta = check.rows("beta", beta, rows, call.hv);
    const bool by_rate = call.decay == Decay::head || call.decay == Decay::channel || call.decay == Decay::fixed;
    const bool by_bias = call.decay == Decay::head || call.decay == Decay::channel || call.decay == Decay::exponential;
    check.that((rate || !by_rate) && (step_bias || !by_bias) && (step || call.decay != Decay::head), "the decay lacks a tensor");
    const Size steps = call.decay == Decay::head ? call.hv : keys;
    call.step = check.rows("step", step, rows, steps), call.step_bias = check.weight("step_bias", step_bias, steps);
    call.rate = check.weight("rate", rate, call.hv);
    call.skip = check.weight("skip", skip, call.hv), call.bonus = check.weight("bonus", bonus, call.hv * call.k);

    check.that(norm.given == (call.norm != MixerCall::Norm::none), "a norm has a weight, and a weight a norm");
    call.norm_weight = check.weight("norm", norm, call.norm == MixerCall::Norm::head ? call.v : values);
    call.norm_bias = check.weight("norm_bias", norm_bias, values);
    check.that(z.given == (call.gate != OutputGate::none), "a gate needs its z, and z a gate");
    call.z = check.rows("z", z, rows, values);
    call.key = check.rows("key", key, rows, keys), call.value = check.rows("value", value, rows, values);
    call.position = static_cast<const Size*>(check.flat("position", position, rows, Tensor::Type::i64));
    return call;
}

MixerCall read_token(const MixerPlan& plan, const Tensor& mixed, const MaybeTensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& beta, const MaybeTensor& step, const MaybeTensor& rate, const MaybeTensor& step_bias,
                     const MaybeTensor& skip, const MaybeTensor& bonus, const MaybeTensor& norm, const MaybeTensor& norm_bias,
                     const MaybeTensor& z, const MaybeTensor& key, const MaybeTensor& value, const MaybeTensor& position,
                     const Tensor& out) {
    const Check check("mixer");
    MixerCall call = read_mixer(check, plan, mixed, weight, bias, beta, step, rate, step_bias, skip, bonus, norm, norm_bias, z, key,
                                value, position);
    call.out = check.rows_out("out", out, call.rows, call.hv * call.v);
    return call;
}

}  // namespace

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

// ------------------------------------------------------------------------------------------------ many tokens

namespace {

// What stands before the recurrence of many tokens; each of the last five where it is wanted.
void mixer_gates(const MixerPlan& plan, const Tensor& mixed, const MaybeTensor& beta, const MaybeTensor& step,
                 const MaybeTensor& rate, const MaybeTensor& step_bias, const MaybeTensor& key, const MaybeTensor& value,
                 const MaybeTensor& q_out, const MaybeTensor& k_out, const MaybeTensor& v_out, const MaybeTensor& beta_out,
                 const MaybeTensor& g_out, int threads) {
    const Check check("mixer_gates");
    MixerPlan gates = plan;  // what follows the recurrence is finish's
    gates.norm = MixerCall::Norm::none, gates.gate = OutputGate::none;
    MixerGates call;
    call.mixer = read_mixer(check, gates, mixed, {}, {}, beta, step, rate, step_bias, {}, {}, {}, {}, {}, key, value, {});
    const MixerCall& c = call.mixer;
    check.that(c.taps == 0, "the convolution has been made");
    check.that(beta.given == beta_out.given, "beta and what is made of it are there together");
    check.that(!v_out || (!value && c.decay == MixerCall::Decay::head), "values among mixed are stepped by a head's step");
    check.that(c.decay != MixerCall::Decay::fixed && g_out.given == (c.decay != MixerCall::Decay::none), "a decay has its output");
    const Size decays = c.decay == MixerCall::Decay::head ? c.hv : c.decay == MixerCall::Decay::channel ? c.hv * c.k : c.hk * c.k;
    const auto out = [&](const char* name, const MaybeTensor& t, Size numbers) {  // rows without gaps
        Output o;
        if (!t) return o;
        o.data = const_cast<void*>(check.flat(name, t, c.rows * numbers, t.narrow() ? Tensor::Type::bf16 : Tensor::Type::f32));
        o.batch = numbers, o.dtype = t.narrow() ? Dtype::bf16 : Dtype::f32;
        return o;
    };
    call.q = out("q_out", q_out, c.hk * c.k), call.key = out("k_out", k_out, c.hk * c.k);
    call.value = out("v_out", v_out, c.hv * c.v), call.beta = out("beta_out", beta_out, c.hv), call.g = out("g_out", g_out, decays);
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).gates, c.rows, 0.5 * double(c.hk * c.k + c.hv * c.v), block_scratch(c), threads);
}

// What follows it, in place: `out` holds what the recurrence made.
void mixer_finish(const MixerPlan& plan, const Tensor& mixed, const MaybeTensor& skip, const MaybeTensor& norm,
                  const MaybeTensor& norm_bias, const MaybeTensor& z, const Tensor& out, int threads) {
    const Check check("mixer_finish");
    MixerFinish call;
    MixerCall& c = call.mixer = plan;
    check.that(c.hk > 0 && c.hv > 0 && c.hv % c.hk == 0 && c.v > 0, "the plan's sizes do not fit");
    const Size channels = mixed.last(), values = c.hv * c.v;
    c.rows = rows_of(mixed);
    c.mixed = check.rows("mixed", mixed, c.rows, channels), c.skip = check.weight("skip", skip, c.hv);
    check.that(!skip || (c.v_at >= 0 && c.v_at + values <= channels), "values that skip must be among the channels of mixed");
    check.that(norm.given == (c.norm != MixerCall::Norm::none), "a norm has a weight, and a weight a norm");
    c.norm_weight = check.weight("norm", norm, c.norm == MixerCall::Norm::head ? c.v : values);
    c.norm_bias = check.weight("norm_bias", norm_bias, values);
    check.that(z.given == (c.gate != OutputGate::none), "a gate needs its z, and z a gate");
    c.z = check.rows("z", z, c.rows, values);
    c.out.data = const_cast<void*>(
        check.flat("out", out, c.rows * values, out.narrow() ? Tensor::Type::bf16 : Tensor::Type::f32));
    c.out.batch = values, c.out.dtype = out.narrow() ? Dtype::bf16 : Dtype::f32;
    call.made.data = c.out.data, call.made.batch = c.out.batch, call.made.dtype = c.out.dtype;
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).finish, c.rows, 0.7 * double(c.hv * c.v), block_scratch(c), threads);
}

}  // namespace

LINSTATE_BINDINGS(mixer) {
    nb::module_& m = to.module;
    nb::enum_<MixerCall::Decay>(m, "Decay").value("none", MixerCall::Decay::none).value("head", MixerCall::Decay::head)
        .value("channel", MixerCall::Decay::channel).value("sigmoid", MixerCall::Decay::sigmoid)
        .value("fixed", MixerCall::Decay::fixed).value("exponential", MixerCall::Decay::exponential);
    nb::enum_<MixerCall::Norm>(m, "Norm").value("none", MixerCall::Norm::none).value("head", MixerCall::Norm::head)
        .value("group", MixerCall::Norm::group).value("centred", MixerCall::Norm::centred);
    // Fields as of csrc/kernels.hpp's MixerCall.
    nb::class_<MixerPlan>(m, "MixerPlan", "What a mixer does between its projections; see linstate/ops/native/mixer.py.")
        .def(nb::init<>())
        .def("__deepcopy__", [](const MixerPlan& plan, nb::handle) { return MixerPlan(plan); }, nb::arg("memo"))
        .def_rw("hk", &MixerPlan::hk).def_rw("hv", &MixerPlan::hv).def_rw("k", &MixerPlan::k).def_rw("v", &MixerPlan::v)
        .def_rw("recurrence", &MixerPlan::update)
        .def_rw("q_at", &MixerPlan::q_at).def_rw("k_at", &MixerPlan::k_at).def_rw("v_at", &MixerPlan::v_at)
        .def_rw("conv_at", &MixerPlan::conv_at).def_rw("channels", &MixerPlan::channels).def_rw("taps", &MixerPlan::taps)
        .def_rw("decay", &MixerPlan::decay).def_rw("divisor", &MixerPlan::divisor)
        .def_rw("step_low", &MixerPlan::step_low).def_rw("step_high", &MixerPlan::step_high)
        .def_rw("stepped_values", &MixerPlan::stepped_values).def_rw("elu_plus_one", &MixerPlan::elu_plus_one)
        .def_rw("rotary_base", &MixerPlan::rotary_base).def_rw("unit_eps", &MixerPlan::unit_eps)
        .def_rw("scale", &MixerPlan::scale).def_rw("beta_scale", &MixerPlan::beta_scale)
        .def_rw("normaliser_eps", &MixerPlan::normaliser_eps)
        .def_rw("norm", &MixerPlan::norm).def_rw("norm_eps", &MixerPlan::norm_eps)
        .def_rw("gate", &MixerPlan::gate).def_rw("gate_first", &MixerPlan::gate_first);
    define_with_states(to, "mixer", &read_token, "One token of a mixer between its projections; see linstate/ops/native/mixer.py.",
                       nb::arg("plan"), nb::arg("mixed"), nb::arg("weight").none(), nb::arg("bias").none(),
                       nb::arg("beta").none(), nb::arg("step").none(), nb::arg("rate").none(),
                       nb::arg("step_bias").none(), nb::arg("skip").none(),
                       nb::arg("bonus").none(), nb::arg("norm").none(),
                       nb::arg("norm_bias").none(), nb::arg("z").none(), nb::arg("key").none(),
                       nb::arg("value").none(), nb::arg("position").none(), nb::arg("out"));
    m.def("mixer_gates", &mixer_gates, nb::arg("plan"), nb::arg("mixed"), nb::arg("beta").none(), nb::arg("step").none(),
          nb::arg("rate").none(), nb::arg("step_bias").none(), nb::arg("key").none(), nb::arg("value").none(), nb::arg("q_out").none(), nb::arg("k_out").none(),
          nb::arg("v_out").none(), nb::arg("beta_out").none(), nb::arg("g_out").none(), nb::arg("threads"),
          "What stands before the recurrence of many tokens; see linstate/ops/native/block.py.");
    m.def("mixer_finish", &mixer_finish, nb::arg("plan"), nb::arg("mixed"), nb::arg("skip").none(), nb::arg("norm").none(),
          nb::arg("norm_bias").none(), nb::arg("z").none(), nb::arg("out"), nb::arg("threads"),
          "What follows it, in place; see linstate/ops/native/block.py.");
}

}  // namespace linstate
