// Modules: from bytes, through freezing, to forwards.

#include "module.h"

#include "error.h"

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

struct CoevalModule {
  torch::jit::Module module;
  int32_t number;
  c10::Device device;
  // Of its own, so that executors on one accelerator do not wait for each other's work.
  std::optional<c10::Stream> stream;
};

struct CoevalOutputs {
  // Dense, on the CPU.
  std::vector<at::Tensor> tensors;
};

namespace {

// Reads the caller's bytes where they lie.
class Bytes final : public caffe2::serialize::ReadAdapterInterface {
 public:
  Bytes(const void* bytes, size_t size) : bytes_(static_cast<const char*>(bytes)), size_(size) {}

  size_t size() const override {
    return size_;
  }

  size_t read(uint64_t position, void* buffer, size_t n, const char* what) const override {
    TORCH_CHECK(position <= size_ && n <= size_ - position, "the file ends early, while reading ", what);
    std::memcpy(buffer, bytes_ + position, n);
    return n;
  }

 private:
  const char* bytes_;
  size_t size_;
};

c10::Device device_of(int32_t number) {
  if (number == kCpu) {
    return c10::Device(c10::DeviceType::CPU);
  }
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(number));
}

// What was copied or computed there outside of an executor's stream is done when this returns.
void finish(const c10::Device& device) {
  if (!device.is_cpu()) {
    at::accelerator::synchronizeDevice(device.index());
  }
}

// A copy, because a module may keep what it was passed for longer than the caller does.
at::Tensor copy_in(const CoevalTensor& tensor, const c10::Device& device) {
  const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(tensor.dtype));
  const at::IntArrayRef sizes(tensor.sizes, tensor.dimensions);
  // From pinned memory, the way to the accelerator needs nobody to wait.
  at::Tensor copy = at::empty(sizes, options.pinned_memory(!device.is_cpu()));
  if (copy.nbytes() > 0) {
    std::memcpy(copy.mutable_data_ptr(), tensor.data, copy.nbytes());
  }
  return device.is_cpu() ? copy : copy.to(device, /*non_blocking=*/true);
}

// Returns when the tensor is computed.
at::Tensor copy_out(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), "the module returned an empty tensor");
  TORCH_CHECK(
      tensor.layout() == c10::kStrided && !tensor.is_quantized(), "the module returned a tensor that is not dense");
  return tensor.to(c10::kCPU).contiguous();
}

std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  const char* expected = "the module must return a tensor, or a tuple or list of tensors";
  std::vector<at::Tensor> tensors;
  if (value.isTensor()) {
    tensors.push_back(copy_out(value.toTensor()));
  } else if (value.isTuple()) {
    for (const c10::IValue& element : value.toTupleRef().elements()) {
      TORCH_CHECK(element.isTensor(), expected);
      tensors.push_back(copy_out(element.toTensor()));
    }
  } else {
    TORCH_CHECK(value.isTensorList(), expected);
    for (const at::Tensor& element : value.toTensorVector()) {
      tensors.push_back(copy_out(element));
    }
  }
  return tensors;
}

} // namespace

void set_interpreter() {
  // The profiling executor compiles for shapes that it has seen, in the middle of serving, and lets the same row differ
  // between the first calls and later ones.
  torch::jit::getProfilingMode() = false;
  // An exception keeps its type on the way through TorchScript; else all become std::runtime_error.
  FLAGS_torch_jit_enable_rethrow_caught_exception = true;
}

// A module in evaluation mode. The bytes are read before this returns.
int32_t coeval_load(const void* bytes, size_t size, int32_t number, CoevalModule** loaded) {
  return guarded(number, [&] {
    const at::NoGradGuard no_grad;
    const c10::Device device = device_of(number);
    auto module = torch::jit::load(std::make_shared<Bytes>(bytes, size), device);
    module.eval();
    std::optional<c10::Stream> stream;
    if (!device.is_cpu()) {
      stream = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
    }
    finish(device);
    *loaded = new CoevalModule{std::move(module), number, device, stream};
  });
}

// The same module in another form; the first stays as it is.
int32_t coeval_prepare(const CoevalModule* loaded, int32_t form, CoevalModule** prepared) {
  return guarded(loaded->number, [&] {
    const at::NoGradGuard no_grad;
    torch::jit::Module module = loaded->module;
    module = form == kFrozen ? torch::jit::freeze(module) : torch::jit::optimize_for_inference(module);
    finish(loaded->device);
    *prepared = new CoevalModule{std::move(module), loaded->number, loaded->device, loaded->stream};
  });
}

int32_t coeval_forward(CoevalModule* module, const CoevalTensor* inputs, size_t count, CoevalOutputs** outputs) {
  return guarded(module->number, [&] {
    // These belong to the thread, and are set where they are needed rather than trusted to be there.
    const c10::InferenceMode inference;
    const torch::jit::GraphOptimizerEnabledGuard as_written(false);
    std::optional<c10::StreamGuard> stream;
    if (module->stream) {
      stream.emplace(*module->stream);
    }
    std::vector<c10::IValue> values;
    values.reserve(count);
    for (size_t index = 0; index < count; ++index) {
      values.emplace_back(copy_in(inputs[index], module->device));
    }
    const c10::IValue output = module->module.forward(std::move(values));
    *outputs = new CoevalOutputs{tensors_of(output)};
  });
}

size_t coeval_output_count(const CoevalOutputs* outputs) {
  return outputs->tensors.size();
}

// A view; it ends with the outputs.
void coeval_output(const CoevalOutputs* outputs, size_t index, CoevalTensor* output) {
  const at::Tensor& tensor = outputs->tensors[index];
  *output = {
      tensor.const_data_ptr(),
      tensor.sizes().data(),
      tensor.sizes().size(),
      static_cast<int32_t>(tensor.scalar_type()),
  };
}

void coeval_free_outputs(CoevalOutputs* outputs) {
  delete outputs;
}

void coeval_free_module(CoevalModule* module) {
  delete module;
}
