// Launches: every launch of the compiled kernels passes here.

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.h"
#include "runtime.h"

namespace lora_kernels {

namespace {

void check(cudaError_t error, const std::string& call) {
  if (error != cudaSuccess) throw std::runtime_error(call + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute on device " + std::to_string(index));
  return value;
}

const void* address_of(const std::string& name) {
  static const std::unordered_map<std::string, const void*> table = [] {
    std::unordered_map<std::string, const void*> all;
    for (const Kernels& some : {bf16_kernels(), half_kernels(), float_kernels()}) {
      for (int i = 0; i < some.count; ++i) all[some.first[i].name] = some.first[i].address;
    }
    return all;
  }();
  const auto found = table.find(name);
  if (found == table.end()) throw std::runtime_error("no compiled kernel is called " + name);
  return found->second;
}

}  // namespace

Device device_of(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const int arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  const Device device{arch, attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  return known[index] = device;
}

void launch(const Launch& how, const void* params, void* stream) {
  const void* kernel = address_of(how.kernel);
  // Cheap, and per device: so it is asked for anew each time.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes),
        how.kernel + ": cudaFuncSetAttribute of " + std::to_string(how.shared_bytes) + " bytes of shared memory");
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  // Programs that wait for others must be resident together.
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernelExC(&config, kernel, arguments),
        how.kernel + ": launch of " + std::to_string(how.grid) + " programs of " + std::to_string(how.threads) + " threads");
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace lora_kernels
