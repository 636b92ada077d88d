// The two kinds of targets; see target.h.

#include "target.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "python.h"
#include "runtime.h"

namespace lora_kernels {

namespace {

constexpr int kGrain = 4096;

Tensor int_zeros(const Tensor& like, int count) { return torch::stable::new_zeros(like, {count}, ScalarType::Int); }

// Zeros of a device and stream, made once: two streams never share flags. Under capture a call has its own, in the
// graph's memory, since graphs captured on one stream may be replayed on several at once; so it has in a pool that may
// not keep what isn't its owner's.
Tensor zeros_of(const Tensor& like, int count, int device, void* stream) {
  if (is_capturing(stream)) return int_zeros(like, count);
  static std::mutex mutex;
  static std::map<std::pair<int, void*>, Tensor> blocks;
  const auto key = std::make_pair(device, stream);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = blocks.find(key);
    if (found != blocks.end() && found->second.numel() >= count) return found->second;
  }
  const Tensor block = int_zeros(like, (count + kGrain - 1) / kGrain * kGrain);
  // Asked without the lock: another thread may hold Python's, and wait for this one.
  if (ask_python<bool>("lora_kernels::in_shared_pool", block)) {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.insert_or_assign(key, block);
  }
  return block;
}

// The current stream of a tensor's device.
class Gpu final : public Target {
 public:
  explicit Gpu(const Tensor& t) : index_(t.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}

  // Less the multiprocessors that torch spares for others, communication for instance, as its switch is now.
  Device device() override {
    Device device = device_of(index_);
    device.multiprocessors -= static_cast<int>(ask_python<int64_t>("lora_kernels::spared_multiprocessors"));
    device.multiprocessors = std::max(device.multiprocessors, 1);
    return device;
  }
  Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type) override {
    return torch::stable::new_empty(like, sizes, type);
  }
  Tensor zeros(const Tensor& like, int count) override { return zeros_of(like, count, index_, stream_); }
  void reads(const Tensor&) override {}
  TensorMap map(const Boxes& boxes) override { return encoded(boxes); }
  void launch(const Launch& how, const void* params, size_t) override { lora_kernels::launch(how, params, stream_); }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

// The executor of this context, of which Python knows (lora_kernels/impl/cuda/launch.py).
class Executor final : public Target {
 public:
  explicit Executor(const Tensor& like) : like_(like) {}

  Device device() override {
    return Device::of(ask_python<std::vector<int64_t>>("lora_kernels::executor_device", like_));
  }
  // What no kernel writes shows.
  Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type) override {
    Tensor made = torch::stable::new_empty(like, sizes, type);
    memory_.push_back(torch::stable::fill_(made, std::numeric_limits<double>::quiet_NaN()));
    return made;
  }
  Tensor zeros(const Tensor& like, int count) override {
    memory_.push_back(ask_python<Tensor>("lora_kernels::executor_zeros", like, int64_t{count}));
    return memory_.back();
  }
  void reads(const Tensor& t) override { memory_.push_back(t); }
  // What an executor has to encode, in the map's place.
  TensorMap map(const Boxes& boxes) override {
    TensorMap map{};
    std::memcpy(map.bytes, &boxes, sizeof boxes);
    return map;
  }
  void launch(const Launch& how, const void* params, size_t bytes) override {
    const std::vector<int64_t> numbers{how.grid, how.threads, how.shared_bytes, how.together};
    const auto* first = static_cast<const uint8_t*>(params);
    ask_python<void>(
        "lora_kernels::executor_launch", how.kernel, numbers, std::vector<int64_t>(first, first + bytes), memory_);
  }

 private:
  Tensor like_;
  std::vector<Tensor> memory_;  // that a launch may touch
};

}  // namespace

std::unique_ptr<Target> target_of(const Tensor& t) {
  if (arguments::device_type(t) == aoti_torch_device_type_cuda()) return std::make_unique<Gpu>(t);
  return std::make_unique<Executor>(t);
}

}  // namespace lora_kernels
