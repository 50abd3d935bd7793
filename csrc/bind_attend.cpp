// The binding of one token of softmax attention; see module.cpp.

#include <cstring>
#include <stdexcept>
#include <vector>

#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "pool.hpp"

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

// `sizes`, `numbers` and `tensors` in the order of linstate/ops/native/attend.py.
AttendToken read_attend(const nb::tuple& sizes, const nb::tuple& numbers, const nb::tuple& tensors, nb::handle out) {
    AttendToken token;
    AttendCall& call = token.call;
    call.rows = 1;
    call.hq = nb::cast<Size>(sizes[0]), call.hk = nb::cast<Size>(sizes[1]), call.k = nb::cast<Size>(sizes[2]);
    call.v = nb::cast<Size>(sizes[3]), call.turned = nb::cast<Size>(sizes[4]);
    call.eps = nb::cast<float>(numbers[0]), call.weight_plus = nb::cast<float>(numbers[1]);
    call.scale = nb::cast<float>(numbers[2]), call.rotary_base = nb::cast<double>(numbers[3]);
    std::size_t i = 0;
    const auto tensor = [&] { return rows_of(tensors[i++]); };
    call.q = tensor(), call.key = tensor(), call.value = tensor(), call.z = tensor(), call.q_norm = tensor(), call.k_norm = tensor();
    const Sequence o = rows_of(out);
    call.out.data = const_cast<void*>(o.data), call.out.batch = o.batch, call.out.dtype = o.dtype;
    return token;
}

// Before and after of keys, values, length and position, then how many places there are before.
void place_states(AttendToken& token, const std::uintptr_t* at) {
    token.keys = reinterpret_cast<const std::uint16_t*>(at[0]), token.keys_after = reinterpret_cast<std::uint16_t*>(at[1]);
    token.values = reinterpret_cast<const std::uint16_t*>(at[2]), token.values_after = reinterpret_cast<std::uint16_t*>(at[3]);
    token.length = reinterpret_cast<const Size*>(at[4]), token.length_after = reinterpret_cast<Size*>(at[5]);
    token.position = reinterpret_cast<const Size*>(at[6]), token.position_after = reinterpret_cast<Size*>(at[7]);
    token.places = Size(at[8]);
}

void run_call(const AttendToken& token, int threads) {
    AttendCall call = token.call;
    const Size length = *token.length, keys = call.hk * call.k, values = call.hk * call.v;
    if (length < 0 || length > token.places) throw std::invalid_argument("a cache's length must be one of its places at most");
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

void bind_attend(nb::module_& m) {
    m.def("attend",
          [](const nb::tuple& sizes, const nb::tuple& numbers, const nb::tuple& tensors, nb::handle out,
             const std::vector<std::uintptr_t>& states, int threads) {
              AttendToken token = read_attend(sizes, numbers, tensors, out);
              if (states.size() != 9) throw std::invalid_argument("attention needs nine addresses and numbers of its state");
              place_states(token, states.data());
              nb::gil_scoped_release release;
              run_call(token, threads);
          },
          nb::arg("sizes"), nb::arg("numbers"), nb::arg("tensors"), nb::arg("out"), nb::arg("states"), nb::arg("threads"),
          "One token of softmax attention between its projections; see linstate/ops/native/attend.py.");
}

}  // namespace linstate
