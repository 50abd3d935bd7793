// One token of softmax attention between its projections: csrc/attend.hpp, linstate/ops/native/attend.py.

#include <cstring>
#include <vector>

#include "bindings.hpp"

namespace linstate {
namespace {

// Norms, rotation, attention, gate of all rows; angles and what passes between tasks in memory of the caller's thread.
void attend(AttendCall call, int threads) {
    const TokenKernels& table = *kernels_in_use().token;
    thread_local std::vector<float> turn, ready, part;
    if (call.position) call.turn = angles(turn, call.position, call.rows, call.turned, call.rotary_base);
    Size places = 0, longest = 0;
    for (Size row = 0; row < call.rows; ++row) {
        places += call.row[row].places;
        if (call.row[row].places > longest) longest = call.row[row].places;
    }
    call.blocks = (longest + ATTEND_BLOCK - 1) / ATTEND_BLOCK;
    ready.resize(std::size_t(call.rows * call.hq * call.k));
    part.resize(std::size_t(call.rows * call.hq * call.blocks * (call.v + 2)));
    call.ready = ready.data(), call.part = part.data();
    struct Work {
        const AttendCall* call;
        const TokenKernels* table;
    } const job{&call, &table};
    const std::size_t scratch = table.attend_scratch(call);
    const double heads = double(call.rows) * double((call.hq + call.hk) * call.k);
    pool_tasks(call.rows, worth_calling(heads, threads), scratch, &job, [](const void* context, Size row, void* scratch) {
        const Work& w = *static_cast<const Work*>(context);
        w.table->attend_begin(*w.call, row, scratch);
    });
    pool_tasks(call.rows * call.hk * call.blocks, worth_calling(0.1 * double(places) * double(call.hq * (call.k + call.v)), threads),
               scratch, &job, [](const void* context, Size task, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   const Size block = task % w.call->blocks, head = task / w.call->blocks;
                   w.table->attend(*w.call, head / w.call->hk, head % w.call->hk, block, scratch);
               });
    pool_tasks(call.rows * call.hk, worth_calling(heads * double(call.blocks), threads), scratch, &job,
               [](const void* context, Size head, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   w.table->attend_end(*w.call, head / w.call->hk, head % w.call->hk, scratch);
               });
}

}  // namespace

// What is the same for every token.
struct AttendPlan {
    Size hq = 0, hk = 0, k = 0, v = 0, turned = 0;
    float eps = 0.0f, weight_plus = 0.0f, scale = 1.0f;
    double rotary_base = 1.0;
};

static AttendToken read_attend(const AttendPlan& plan, const Tensor& q, const Tensor& key, const Tensor& value, const MaybeTensor& z,
                               const MaybeTensor& q_norm, const MaybeTensor& k_norm, const Tensor& out) {
    const Check check("attend");
    check.that(plan.hk > 0 && plan.hq > 0 && plan.hq % plan.hk == 0, "the heads of q must be a multiple of those of k");
    check.that(plan.k > 0 && plan.v > 0 && plan.turned >= 0 && plan.turned <= plan.k && plan.turned % 2 == 0,
               "an even number of a head's channels turns");
    AttendToken token;
    AttendCall& call = token.call;
    call.rows = 1, call.hq = plan.hq, call.hk = plan.hk, call.k = plan.k, call.v = plan.v, call.turned = plan.turned;
    call.eps = plan.eps, call.weight_plus = plan.weight_plus, call.scale = plan.scale, call.rotary_base = plan.rotary_base;
    check.that(q.narrow() && key.narrow() && value.narrow(), "q, k and v must be bfloat16");
    call.q = check.rows("q", q, 1, call.hq * call.k), call.key = check.rows("k", key, 1, call.hk * call.k);
    call.value = check.rows("v", value, 1, call.hk * call.v), call.z = check.rows("z", z, 1, call.hq * call.v);
    call.q_norm = check.weight("q_norm", q_norm, call.k), call.k_norm = check.weight("k_norm", k_norm, call.k);
    call.out = check.rows_out("out", out, 1, call.hq * call.v);
    return token;
}

// Keys [1, S, Hk, K], values, length and position of the cache. After it, keys and values have room for a place more at least; where they
// go on in the memory that they are in, the address is the same.
constexpr std::size_t states_of(const AttendToken&) { return 4; }
void place_states(AttendToken& token, const MaybeTensor* before, const MaybeTensor* after) {
    const Check check("attend");
    for (int i = 0; i < 4; ++i) check.that(before[i].given && after[i].given, "a cache has keys, values, length and position");
    expect_dims(check, "keys", before[0], 4), expect_dims(check, "keys after", after[0], 4), expect_dims(check, "values after", after[1], 4);
    const AttendCall& call = token.call;
    const Size places = before[0].size(1), room = after[0].size(1), room_of_values = after[1].size(1);
    check.that(room > places && room_of_values > places, "the cache after it must have room for a place more");
    token.places = places;
    token.keys = check.narrow("keys", before[0], {1, places, call.hk, call.k});
    token.values = check.narrow("values", before[1], {1, places, call.hk, call.v});
    token.keys_after = const_cast<std::uint16_t*>(check.narrow("keys after", after[0], {1, room, call.hk, call.k}));
    token.values_after = const_cast<std::uint16_t*>(check.narrow("values after", after[1], {1, room_of_values, call.hk, call.v}));
    token.length = check.integers("length", before[2], {1}), token.position = check.integers("position", before[3], {1});
    token.length_after = const_cast<Size*>(check.integers("length after", after[2], {1}));
    token.position_after = const_cast<Size*>(check.integers("position after", after[3], {1}));
    check.that(*token.length >= 0 && *token.length <= places, "a cache's length must be one of its places");
}

void run_call(const AttendToken& token, int threads) {
    AttendCall call = token.call;
    const Size length = *token.length, keys = call.hk * call.k, values = call.hk * call.v;
    if (length < 0 || length > token.places) throw ArgumentError("attend: a cache's length must be one of its places");
    if (token.places > 0 && token.keys != token.keys_after)
        std::memcpy(token.keys_after, token.keys, std::size_t(token.places * keys) * 2);
    if (token.places > 0 && token.values != token.values_after)
        std::memcpy(token.values_after, token.values, std::size_t(token.places * values) * 2);
    const Size first = token.places - length;
    const AttendRow row{token.keys_after + first * keys, token.values_after + first * values, length + 1};
    call.row = &row;
    call.position = call.turned > 0 ? token.position : nullptr;
    attend(call, threads);
    *token.length_after = length + 1;
    *token.position_after = *token.position + 1;
}

LINSTATE_BINDINGS(attend) {
    nb::class_<AttendPlan>(to.module, "AttendPlan", "Of an attention layer; see linstate/ops/native/attend.py.")
        .def("__init__", [](AttendPlan* self, Size hq, Size hk, Size k, Size v, Size turned, float eps, float weight_plus, float scale,
                            double rotary_base) {
                 new (self) AttendPlan{hq, hk, k, v, turned, eps, weight_plus, scale, rotary_base};
             },
             nb::kw_only(), nb::arg("hq"), nb::arg("hk"), nb::arg("k"), nb::arg("v"), nb::arg("turned"), nb::arg("eps"),
             nb::arg("weight_plus"), nb::arg("scale"), nb::arg("rotary_base"));
    define_with_states(to, "attend", &read_attend, "One token of softmax attention between its projections; see linstate/ops/native/attend.py.",
                       nb::arg("plan"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("z").none(), nb::arg("q_norm").none(),
                       nb::arg("k_norm").none(), nb::arg("out"));
}

}  // namespace linstate
