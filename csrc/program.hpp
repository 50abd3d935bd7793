// Several calls of native kernels as one: what a decoded token needs of a layer, or of all of them.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "linear.hpp"
#include "tensor.hpp"

namespace linstate {

// How many states a call has; what has some overloads this and `place_states`.
template <class Call>
constexpr std::size_t states_of(const Call&) {
    return 0;
}

// Products that need nothing of each other, as one.
struct LinearGroup {
    static constexpr std::size_t kMost = 16;
    std::vector<LinearCall> calls;

    // Adds a call, if it reads nothing that the others write.
    bool join(const LinearCall& call);
};
void run_call(const LinearCall& call, int threads);
void run_call(const LinearGroup& group, int threads);

// Buffers stand where they stood when the calls were recorded (linstate/ops/native/program.py keeps them); only states come and
// go. Neighbouring products that need nothing of each other are one call.
class Program {
    struct Recorded {
        virtual ~Recorded() = default;
        virtual std::size_t states() const = 0;
        virtual void place(const MaybeTensor* before, const MaybeTensor* after) = 0;
        virtual void run(bool past, int threads) = 0;
        virtual LinearGroup* group() { return nullptr; }
    };
    template <class Call>
    struct Of : Recorded {
        Call call;

        explicit Of(const Call& given) : call(given) {}
        std::size_t states() const override { return states_of(call); }
        void place(const MaybeTensor* before, const MaybeTensor* after) override {
            if constexpr (requires { place_states(call, before, after); }) place_states(call, before, after);
        }
        void run(bool past, int threads) override {
            if constexpr (requires { call.past; }) call.past = past;
            run_call(call, threads);
        }
        LinearGroup* group() override {
            if constexpr (requires { call.join(call.calls[0]); }) return &call;
            return nullptr;
        }
    };
    std::vector<std::unique_ptr<Recorded>> calls_;
    std::size_t states_ = 0;

   public:
    Program() = default;
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    template <class Call>
    void append(const Call& call) {
        states_ += states_of(call);
        calls_.push_back(std::make_unique<Of<Call>>(call));
    }
    void append(const LinearCall& call) {
        if (LinearGroup* group = calls_.empty() ? nullptr : calls_.back()->group())
            if (group->join(call)) return;
        calls_.push_back(std::make_unique<Of<LinearGroup>>(LinearGroup{{call}}));
    }

    std::size_t size() const { return calls_.size(); }

    // States of each call that has some, in the order of the calls. The first `count` calls are run; past: states are written past
    // the caches. Everything is checked before anything runs.
    void run(const std::vector<MaybeTensor>& before, const std::vector<MaybeTensor>& after, std::size_t count, bool past, int threads);
};

}  // namespace linstate
