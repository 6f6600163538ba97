#include "error.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include <ATen/DeviceAccelerator.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/runtime/jit_exception.h>

namespace {

// Fixed, so that telling of a failed allocation allocates nothing.
constexpr size_t kTextMax = 8192;
thread_local char text[kTextMax];

// cudaError_t by number, so that no CUDA header is needed. After these every call fails until the process ends.
bool is_sticky(int32_t code) {
  switch (code) {
    case 46: // cudaErrorDevicesUnavailable
    case 100: // cudaErrorNoDevice
    case 214: // cudaErrorECCUncorrectable
    case 220: // cudaErrorNvlinkUncorrectable
    case 226: // cudaErrorContained
    case 700: // cudaErrorIllegalAddress
    case 702: // cudaErrorLaunchTimeout
    case 709: // cudaErrorContextIsDestroyed
    case 710: // cudaErrorAssert
    case 713: // cudaErrorHardwareStackError
    case 714: // cudaErrorIllegalInstruction
    case 715: // cudaErrorMisalignedAddress
    case 716: // cudaErrorInvalidAddressSpace
    case 717: // cudaErrorInvalidPc
    case 718: // cudaErrorLaunchFailure on some devices
    case 719: // cudaErrorLaunchFailure
      return true;
    default:
      return false;
  }
}

constexpr int32_t kCudaErrorMemoryAllocation = 2;

// Libraries on top of CUDA have no type for it.
bool says_out_of_memory(const char* text) {
  return std::strstr(text, "CUBLAS_STATUS_ALLOC_FAILED") != nullptr ||
      std::strstr(text, "CUDNN_STATUS_ALLOC_FAILED") != nullptr || std::strstr(text, "out of memory") != nullptr;
}

// A device that is lost says so to whoever asks next, whatever the first error was called.
bool is_lost(int32_t device) noexcept {
  try {
    at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(device));
    return false;
  } catch (...) {
    return true;
  }
}

int32_t other(int32_t device, const char* what) noexcept {
  failed(kOther, what);
  if (device == kCpu) {
    return kOther;
  }
  if (says_out_of_memory(text)) {
    return kOutOfMemory;
  }
  return is_lost(device) ? kDevice : kOther;
}

} // namespace

int32_t failed(Kind kind, const char* what) noexcept {
  std::snprintf(text, kTextMax, "%s", what);
  return kind;
}

int32_t caught(int32_t device) noexcept {
  try {
    throw;
  } catch (const c10::OutOfMemoryError& error) {
    return failed(kOutOfMemory, error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    return failed(kOutOfMemory, "cannot allocate memory");
  } catch (const c10::AcceleratorError& error) {
    if (is_sticky(error.get_error_code())) {
      return failed(kDevice, error.what_without_backtrace());
    }
    if (error.get_error_code() == kCudaErrorMemoryAllocation) {
      return failed(kOutOfMemory, error.what_without_backtrace());
    }
    return other(device, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    return other(device, error.what_without_backtrace());
  } catch (const torch::jit::JITException& error) {
    // What the code of the model raises itself.
    try {
      const std::string name = error.getPythonClassName().value_or("");
      const std::string builtins = "builtins.";
      const std::string shown = name.rfind(builtins, 0) == 0 ? name.substr(builtins.size()) : name;
      return other(device, (shown.empty() ? error.what() : shown + ": " + error.what()).c_str());
    } catch (...) {
      return other(device, error.what());
    }
  } catch (const std::exception& error) {
    return other(device, error.what());
  } catch (...) {
    return other(device, "an exception that is no std::exception");
  }
}

const char* coeval_error_text() {
  return text;
}
