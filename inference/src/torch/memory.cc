// What neither torch-sys nor tch has: how much memory libtorch's tensors take on the CPU, counted where they are
// allocated. The counters belong to the thread: an executor allocates and frees on its own one, so that what its model
// takes can be told apart from what all others do meanwhile.

#include <malloc.h>

#include <cstdint>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

thread_local int64_t held = 0;
thread_local int64_t peak = 0;

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
    void* data = c10::alloc_cpu(bytes);
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

extern "C" {

// Puts the allocator in place of libtorch's. What was allocated before keeps its own way of being freed.
void coeval_count_memory() {
  c10::SetCPUAllocator(&counting, /*priority=*/100);
}

// Bytes that this thread has allocated and not freed; below zero when it freed what others allocated.
int64_t coeval_memory_held() {
  return held;
}

// The most that was held since the last call.
int64_t coeval_memory_take_peak() {
  int64_t most = peak;
  peak = held;
  return most;
}
}
