// Launches: every launch of the compiled kernels passes here.

#include <cuda.h>
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

#ifdef LORA_SM90A
constexpr bool kHasSm90a = true;
const Kernels kTables[] = {bf16_kernels(),      half_kernels(),     float_kernels(), tf32_kernels(),
                           codes_kernels(), bf16_kernels_sm90(), half_kernels_sm90()};
#else
constexpr bool kHasSm90a = false;
const Kernels kTables[] = {bf16_kernels(), half_kernels(), float_kernels(), tf32_kernels(), codes_kernels()};
#endif

const void* address_of(const std::string& name) {
  static const std::unordered_map<std::string, const void*> table = [] {
    std::unordered_map<std::string, const void*> all;
    for (const Kernels& some : kTables) {
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
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), kHasSm90a && arch == 90};
  return known[index] = device;
}

TensorMap encoded(const Boxes& b) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
          "cudaGetDriverEntryPointByVersion of cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the map is passed as bytes");
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(b.columns), static_cast<cuuint64_t>(b.rows)};
  const cuuint64_t strides[] = {2 * static_cast<cuuint64_t>(b.stride)};
  const cuuint32_t side = static_cast<cuuint32_t>(b.box), box[] = {side, side}, steps[] = {1, 1};
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(map.bytes), b.is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, b.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

void launch(const Launch& how, const void* params, void* stream) {
  const void* kernel = address_of(how.kernel);
  // Cheap, and per device: so it is asked for anew each time.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes),
        how.kernel + ": cudaFuncSetAttribute of " + std::to_string(how.shared_bytes) + " bytes of shared memory");
  void* arguments[] = {const_cast<void*>(params)};
  // An ordinary one: see Numbers in order.cuh.
  check(cudaLaunchKernel(kernel, dim3(how.grid), dim3(how.threads), arguments, how.shared_bytes, static_cast<cudaStream_t>(stream)),
        how.kernel + ": launch of " + std::to_string(how.grid) + " programs of " + std::to_string(how.threads) +
            " threads and " + std::to_string(how.shared_bytes) + " bytes of shared memory, of which " +
            std::to_string(how.together) + " must run together (where it fails again, or a wait for another program gave up "
            "after half a minute, try impl='eager')");
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace lora_kernels
