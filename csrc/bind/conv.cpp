// The short causal convolution: csrc/conv.hpp, linstate/ops/native/scan.py.

#include "bindings.hpp"

namespace linstate {
namespace {

struct ConvWork {
    const ConvCall* call;
    void (*run)(const ConvCall&, const ConvTask&, void*);
    Size pieces, width, blocks, length;  // of the channels, of the tokens
};

void conv(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool silu, const MaybeTensor& bounds,
          const MaybeTensor& before, const Tensor& after, const Tensor& out, int threads) {
    const Check check("conv");
    expect_dims(check, "x", x, 3), expect_dims(check, "weight", weight, 2);
    ConvCall call;
    const Size batch = x.size(0);
    call.tokens = x.size(1), call.channels = x.size(2), call.taps = weight.size(1), call.silu = silu;
    check.that(call.taps > 0 && weight.size(0) == call.channels, "weight must be [channels of x, taps]");
    call.x = check.sequence("x", x, {batch, call.tokens, call.channels}, true);
    call.out = check.output("out", out, {batch, call.tokens, call.channels}, true);
    const Sequence w = check.weight("weight", weight, call.channels * call.taps), b = check.weight("bias", bias, call.channels);
    call.weight = w.data, call.weight_dtype = w.dtype, call.bias = b.data, call.bias_dtype = b.dtype;
    call.bounds = check.bounds(bounds, batch, call.tokens, call.rows);
    call.before = check.floats("before", before, {call.rows, call.taps - 1, call.channels});
    call.after = check.floats_out("after", after, {call.rows, call.taps - 1, call.channels});
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

LINSTATE_BINDINGS(conv) {
    to.module.def("conv", &conv, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("silu"), nb::arg("bounds").none(),
                  nb::arg("before").none(), nb::arg("after"), nb::arg("out"), nb::arg("threads"),
                  "The short causal convolution; see linstate/ops/native/scan.py.");
}

}  // namespace linstate
