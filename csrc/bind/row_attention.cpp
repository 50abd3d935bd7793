// Softmax attention of one token a row, each over places of its own: csrc/row_attention.hpp, linstate/ops/native/row_attention.py.

#include <string>

#include "bindings.hpp"
#include "row_attention.hpp"

namespace linstate {
namespace {

// Places of one row, checked when it is made: keys [S, Hk, K] and values [S, Hk, V] without gaps, of which `places` from `first` on
// are seen, and where the newest token is written, behind `moved` of them.
struct Row : RowPlaces {
    Size hk = 0, k = 0, v = 0;
    Dtype dtype = Dtype::f32;
    bool sees = false;
};

char* at(const Check& check, const char* name, const Tensor& t, Size first, Size count, Size heads, Size size, Dtype dtype) {
    check.that(first >= 0 && count >= 0 && first <= t.size(0) - count, "a row's places must be those of its cache");
    const void* begin = check.whole(name, t, {t.size(0), heads, size}, dtype == Dtype::bf16 ? Tensor::Type::bf16 : Tensor::Type::f32);
    return static_cast<char*>(const_cast<void*>(begin)) + first * heads * size * (dtype == Dtype::bf16 ? 2 : 4);
}

Row read_row_places(const Tensor& keys, Size keys_first, const Tensor& values, Size values_first, Size places, const MaybeTensor& to_keys,
                    Size to_keys_first, const MaybeTensor& to_values, Size to_values_first, Size moved) {
    const Check check("attend_rows");
    expect_dims(check, "keys", keys, 3), expect_dims(check, "values", values, 3);
    // What goes along ends with the places that are seen, and may begin before them.
    check.that(moved >= 0 && moved <= keys_first + places && moved <= values_first + places, "a row's places must be those of its cache");
    check.that(to_keys.given == to_values.given, "keys and values are written together");
    Row row;
    row.hk = keys.size(1), row.k = keys.size(2), row.v = values.size(2), row.dtype = keys.narrow() ? Dtype::bf16 : Dtype::f32;
    row.places = places, row.moved = moved, row.sees = true;
    row.keys = at(check, "keys", keys, keys_first, places, row.hk, row.k, row.dtype);
    row.values = at(check, "values", values, values_first, places, row.hk, row.v, row.dtype);
    if (!to_keys) return row;
    expect_dims(check, "to_keys", to_keys, 3), expect_dims(check, "to_values", to_values, 3);
    row.to_keys = at(check, "to_keys", to_keys, to_keys_first, moved + 1, row.hk, row.k, row.dtype);
    row.to_values = at(check, "to_values", to_values, to_values_first, moved + 1, row.hk, row.v, row.dtype);
    return row;
}

// q [B, 1, Hq, K], k and v [B, 1, Hk, *], out [B, 1, Hq, V].
void attend_rows(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Row>& rows, float scale, const Tensor& out,
                 int threads) {
    const Check check("attend_rows");
    expect_dims(check, "q", q, 4), expect_dims(check, "k", k, 4), expect_dims(check, "v", v, 4);
    RowAttentionCall call;
    call.rows = q.size(0), call.hq = q.size(2), call.hk = k.size(2), call.k = q.size(3), call.v = v.size(3), call.scale = scale;
    check.that(call.hk > 0 && call.hq % call.hk == 0, "the heads of q must be a multiple of those of k");
    call.q = check.sequence("q", q, {call.rows, 1, call.hq, call.k}), call.key = check.sequence("k", k, {call.rows, 1, call.hk, call.k});
    call.value = check.sequence("v", v, {call.rows, 1, call.hk, call.v}), call.out = check.output("out", out, {call.rows, 1, call.hq, call.v});
    call.dtype = call.key.dtype;
    check.that(call.value.dtype == call.dtype, "k and v must have one dtype");
    check.that(Size(rows.size()) == call.rows, "there must be a row for each of the batch");
    call.key_place = call.hk * call.k, call.key_head = call.k, call.value_place = call.hk * call.v, call.value_head = call.v;
    std::vector<RowPlaces> places(rows.begin(), rows.end());
    for (const Row& row : rows) {
        check.that(!row.sees || (row.hk == call.hk && row.k == call.k && row.v == call.v && row.dtype == call.dtype),
                   "a row's keys and values must be like k and v");
        call.most = row.places > call.most ? row.places : call.most;
    }
    call.row = places.data();
    nb::gil_scoped_release release;
    struct Work {
        const RowAttentionCall* call;
        void (*run)(const RowAttentionCall&, Size, Size, void*);
    } const job{&call, LINSTATE_IN_USE(row_attention).run};
    double seen = 0;
    for (const RowPlaces& row : places) seen += double(row.places + row.moved + 1);
    const double work = 0.2 * seen * double(call.hk) * double(call.k + call.v);
    pool_tasks(call.rows * call.hk, worth(work, threads), row_attention_scratch(call), &job,
               [](const void* context, Size task, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   w.run(*w.call, task / w.call->hk, task % w.call->hk, scratch);
               });
}

}  // namespace

LINSTATE_BINDINGS(row_attention) {
    nb::class_<Row>(to.module, "Row", "The places that one row of attend_rows looks at; they must outlive the call.")
        .def(nb::init<>(), "It sees only itself, and is written nowhere.")
        .def("__init__", [](Row* self, const Tensor& keys, Size keys_first, const Tensor& values, Size values_first, Size places,
                            const MaybeTensor& to_keys, Size to_keys_first, const MaybeTensor& to_values, Size to_values_first,
                            Size moved) {
                 new (self) Row(read_row_places(keys, keys_first, values, values_first, places, to_keys, to_keys_first, to_values,
                                                to_values_first, moved));
             },
             nb::arg("keys"), nb::arg("keys_first"), nb::arg("values"), nb::arg("values_first"), nb::arg("places"),
             nb::arg("to_keys").none(), nb::arg("to_keys_first"), nb::arg("to_values").none(), nb::arg("to_values_first"),
             nb::arg("moved"));
    to.module.def("attend_rows", &attend_rows, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("rows"), nb::arg("scale"), nb::arg("out"),
                  nb::arg("threads"), "Softmax attention of one token a row; see linstate/ops/native/row_attention.py.");
}

}  // namespace linstate
