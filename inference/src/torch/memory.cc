// How much memory libtorch's tensors take on the CPU, counted where they are allocated. The counters belong to the thread:
// an executor allocates and frees on its own one, so that what its model takes can be told apart from what all others do
// meanwhile.

#include "memory.h"

#include <malloc.h>

#include <limits>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

namespace {

thread_local int64_t held = 0;
thread_local int64_t peak = 0;
thread_local int64_t limit = std::numeric_limits<int64_t>::max();

void release(void* data) {
  if (data != nullptr) {
    held -= static_cast<int64_t>(malloc_usable_size(data));
    c10::free_cpu(data);
  }
}

// Data and context are one pointer, as in libtorch's own allocator: some operators rely on it. The size is asked of
// malloc, which knows it, so that there is no header to keep.
struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    // The kernel grants what it does not have and kills the process once it is touched; so there is a limit before it.
    const auto room = static_cast<uint64_t>(limit > held ? limit - held : 0);
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        bytes <= room,
        "cannot allocate ",
        bytes,
        " bytes: this thread's tensors hold ",
        held,
        " bytes and may hold ",
        limit);
    void* data = nullptr;
    try {
      data = c10::alloc_cpu(bytes);
    } catch (const c10::Error&) {
      // libtorch throws the same type for everything.
      TORCH_CHECK_WITH(OutOfMemoryError, false, "cannot allocate ", bytes, " bytes");
    }
    if (data != nullptr) {
      held += static_cast<int64_t>(malloc_usable_size(data));
      peak = held > peak ? held : peak;
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

CountingAllocator counting;

} // namespace

void count_cpu_memory() {
  c10::SetCPUAllocator(&counting, /*priority=*/100);
}

CoevalMemory cpu_memory() {
  return {held, peak, held, peak};
}

void reset_cpu_peak() {
  peak = held;
}

// The most that tensors of this thread may hold together; below 0 for no limit.
void coeval_set_memory_limit(int64_t bytes) {
  limit = bytes < 0 ? std::numeric_limits<int64_t>::max() : bytes;
}

// Gives the pages that malloc keeps of freed tensors back to the system.
void coeval_release_memory() {
  malloc_trim(0);
}
