// Memory in huge pages, for what a token reads from end to end: packed weights and states. See linstate/ops/native/memory.py.

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <nanobind/ndarray.h>

#include "bindings.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define LINSTATE_MMAP 1
#endif

namespace linstate {
namespace {

constexpr std::size_t kPage = std::size_t(2) << 20;

// Whole pages of 2 MB, aligned to them; where the system has them, they are huge ones.
char* map(std::size_t bytes) {
#if defined(LINSTATE_MMAP)
    void* found = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(found);
    const std::size_t before = (kPage - reinterpret_cast<std::uintptr_t>(begin) % kPage) % kPage;
    if (before > 0) munmap(begin, before);
    munmap(begin + before + bytes, kPage - before);
#if defined(MADV_HUGEPAGE)
    madvise(begin + before, bytes, MADV_HUGEPAGE);
#endif
    return begin + before;
#else
    return static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
#endif
}

void unmap(char* p, std::size_t bytes) {
#if defined(LINSTATE_MMAP)
    munmap(p, bytes);
#else
    (void)bytes;
    ::operator delete(p, std::align_val_t(64));
#endif
}

struct Block {
    char* data;
    std::size_t bytes;
    bool kept;
};

// Blocks that were let go and may be given out again: the next state's memory is that of the one before the last, whose pages the
// system need not find and clear anew. Two are kept, the last ones.
class Kept {
    std::mutex mutex_;
    std::vector<Block> blocks_;

   public:
    char* take(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (std::size_t i = 0; i < blocks_.size(); ++i)
            if (blocks_[i].bytes == bytes) {
                char* found = blocks_[i].data;
                blocks_.erase(blocks_.begin() + std::ptrdiff_t(i));
                return found;
            }
        return nullptr;
    }
    void give(const Block& block) {
        const std::lock_guard<std::mutex> lock(mutex_);
        blocks_.push_back(block);
        if (blocks_.size() > 2) {
            unmap(blocks_[0].data, blocks_[0].bytes);
            blocks_.erase(blocks_.begin());
        }
    }
};

Kept& kept_blocks() {
    static Kept& one = *new Kept;  // never destroyed: tensors may end after it would
    return one;
}

using Bytes = nb::ndarray<nb::pytorch, std::uint8_t, nb::ndim<1>, nb::device::cpu>;

Bytes memory(std::size_t bytes, bool kept) {
    const std::size_t whole = (bytes + kPage - 1) / kPage * kPage;
    char* data = kept ? kept_blocks().take(whole) : nullptr;
    auto block = std::make_unique<Block>(Block{data ? data : map(whole), whole, kept});
    nb::capsule owner(block.get(), [](void* p) noexcept {
        const std::unique_ptr<Block> block(static_cast<Block*>(p));
        if (block->kept)
            kept_blocks().give(*block);
        else
            unmap(block->data, block->bytes);
    });
    return Bytes(block.release()->data, {bytes}, owner);
}

}  // namespace

LINSTATE_BINDINGS(memory) {
    to.module.def("memory", &memory, nb::arg("bytes"), nb::arg("kept"), nb::sig("def memory(bytes: int, kept: bool) -> torch.Tensor"),
                  "A tensor of so many bytes in huge pages; kept: its memory is kept when it goes. See linstate/ops/native/memory.py.");
}

}  // namespace linstate
