// The C interface between Rust and libtorch: everything that `library.rs` looks up by name, and nothing else leaves the
// library. What can fail returns one of `Kind`; the text of the last failure is kept per thread.
#pragma once

#include <cstddef>
#include <cstdint>

#define COEVAL_API extern "C" __attribute__((visibility("default")))

// Numbers shared with ffi.rs, divided by what the caller does next.
enum Kind : int32_t {
  kOk = 0,
  // A smaller batch may pass.
  kOutOfMemory = 1,
  // The device is lost to this process; only a new one gets it back.
  kDevice = 2,
  // The model or its input.
  kOther = 3,
};

// The CPU; accelerators count from 0.
constexpr int32_t kCpu = -1;

// How a module is prepared after loading. Numbers shared with ffi.rs.
enum Form : int32_t {
  kFrozen = 1,
  kOptimised = 2,
};

// A dense tensor in row-major order. Whoever hands it over owns all of it.
struct CoevalTensor {
  const void* data;
  const int64_t* sizes;
  size_t dimensions;
  // The number of c10::ScalarType.
  int32_t dtype;
};

// Bytes on a device.
struct CoevalMemory {
  // In tensors; their most since the last reset.
  int64_t allocated;
  int64_t allocated_peak;
  // Taken from the device, in tensors or kept for the next ones; their most since the last reset.
  int64_t reserved;
  int64_t reserved_peak;
};

struct CoevalModule;
struct CoevalOutputs;

// error.cc
COEVAL_API const char* coeval_error_text();

// memory.cc
COEVAL_API void coeval_set_memory_limit(int64_t bytes);
COEVAL_API void coeval_release_memory();

// device.cc
COEVAL_API int32_t coeval_start();
COEVAL_API int32_t coeval_set_threads(int32_t threads);
COEVAL_API int32_t coeval_device_count();
COEVAL_API int32_t coeval_start_device();
COEVAL_API int32_t coeval_device_memory(int32_t device, uint64_t* free, uint64_t* total);
COEVAL_API int32_t coeval_memory(int32_t device, CoevalMemory* memory);
COEVAL_API int32_t coeval_reset_peak(int32_t device);
COEVAL_API int32_t coeval_empty_cache();
COEVAL_API int32_t coeval_set_allocator(const char* settings);

// module.cc
COEVAL_API int32_t coeval_load(const void* bytes, size_t size, int32_t device, CoevalModule** loaded);
COEVAL_API int32_t coeval_prepare(const CoevalModule* loaded, int32_t form, CoevalModule** prepared);
COEVAL_API int32_t coeval_forward(
    CoevalModule* module,
    const CoevalTensor* inputs,
    size_t count,
    CoevalOutputs** outputs);
COEVAL_API size_t coeval_output_count(const CoevalOutputs* outputs);
COEVAL_API void coeval_output(const CoevalOutputs* outputs, size_t index, CoevalTensor* output);
COEVAL_API void coeval_free_outputs(CoevalOutputs* outputs);
COEVAL_API void coeval_free_module(CoevalModule* module);
