// Settings of the process and of threads, and what devices there are. Accelerators only through the device-neutral calls
// of libtorch, so that one library serves with and without CUDA.

#include "error.h"
#include "memory.h"
#include "module.h"

#include <string>
#include <tuple>

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/AllocatorConfig.h>
#include <torch/version.h>

// Once, before anything else. Refuses a libtorch that this was not compiled against: its classes may be laid out otherwise.
int32_t coeval_start() {
  return guarded(kCpu, [] {
    const std::string config = at::show_config();
    TORCH_CHECK(
        config.find("TORCH_VERSION=" TORCH_VERSION) != std::string::npos,
        "it is another version than " TORCH_VERSION ", which this program was built against");
    // We never fork inside a forward, and the setting is refused once libtorch has run something in parallel.
    at::set_num_interop_threads(1);
    set_interpreter();
    count_cpu_memory();
  });
}

// Threads inside one operation. libtorch keeps the number for the process, OpenMP also one for the calling thread.
int32_t coeval_set_threads(int32_t threads) {
  return guarded(kCpu, [&] { at::set_num_threads(threads); });
}

int32_t coeval_device_count() {
  return at::accelerator::getAccelerator(false).has_value() ? at::accelerator::deviceCount() : 0;
}

// Once, before anything else is asked of an accelerator but how many there are.
int32_t coeval_start_device() {
  return guarded(kCpu, [] { at::globalContext().lazyInitDevice(c10::DeviceType::CUDA); });
}

int32_t coeval_device_memory(int32_t device, uint64_t* free, uint64_t* total) {
  return guarded(device, [&] {
    std::tie(*free, *total) = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(device));
  });
}

int32_t coeval_memory(int32_t device, CoevalMemory* memory) {
  if (device == kCpu) {
    *memory = cpu_memory();
    return kOk;
  }
  return guarded(device, [&] {
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto& allocated = stats.allocated_bytes[all];
    const auto& reserved = stats.reserved_bytes[all];
    *memory = {allocated.current, allocated.peak, reserved.current, reserved.peak};
  });
}

int32_t coeval_reset_peak(int32_t device) {
  if (device == kCpu) {
    reset_cpu_peak();
    return kOk;
  }
  return guarded(device, [&] { at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

// Gives what accelerators keep for later tensors back to them.
int32_t coeval_empty_cache() {
  return guarded(kCpu, [] {
    if (at::accelerator::getAccelerator(false).has_value()) {
      at::accelerator::emptyCache();
    }
  });
}

// Settings of the accelerators' allocator, in the form of PYTORCH_ALLOC_CONF. Before anything is allocated there.
int32_t coeval_set_allocator(const char* settings) {
  return guarded(kCpu, [&] { c10::CachingAllocator::setAllocatorSettings(settings); });
}
