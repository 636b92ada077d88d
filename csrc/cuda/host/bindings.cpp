// lora_kernels::lora_linear_{forward,backward}_cuda, and cuda_recorded: the same calls with their launches
// written down instead of made, for machines that execute the kernels' code. Schemas stand in lora_kernels/ops/linear.py.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "../../common/arguments.h"
#include "calls.h"
#include "runtime.h"

namespace lora_kernels {

namespace {

constexpr int kGrain = 4096;

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type) {
  return torch::stable::new_empty(like, sizes, type);
}

Tensor int_zeros(const Tensor& like, int count) { return torch::stable::new_zeros(like, {count}, ScalarType::Int); }

// Whether a tensor lies where torch's allocator serves all calls, and not in a pool of a graph's own, say: Python knows.
bool in_shared_pool(const Tensor& t) {
  StableIValue stack[1] = {torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lora_kernels::in_shared_pool", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// A GPU less the multiprocessors that torch spares for others, communication for instance, as its switch is now: Python knows.
Device device_left(int index) {
  StableIValue answer[1];
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lora_kernels::spared_multiprocessors", "", answer, TORCH_ABI_VERSION));
  Device device = device_of(index);
  device.multiprocessors -= static_cast<int>(torch::stable::detail::to<int64_t>(answer[0]));
  device.multiprocessors = std::max(device.multiprocessors, 1);
  return device;
}

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
  if (in_shared_pool(block)) {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.insert_or_assign(key, block);
  }
  return block;
}

// The current stream of a tensor's device.
struct Gpu {
  int index;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;

  explicit Gpu(const Tensor& t) : index(t.get_device_index()), guard(index), stream(current_stream(index)) {}
  Target target() {
    return {device_left(index), empty, [this](const Tensor& like, int count) { return zeros_of(like, count, index, stream); },
            [this](const Launch& how, const void* params, size_t) { launch(how, params, stream); }, encoded,
            [](const Tensor&) {}};
  }
};

std::tuple<Tensor, Tensor> forward(
    Tensor x, Tensor weight, arguments::Parts parts, arguments::Format format, Tensor lora_A, Tensor lora_B, OptionalTensor bias,
    OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling) {
  arguments::check_format(format, parts, {"dense"});
  Gpu gpu(x);
  return forward_call(x, {weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold}, bias, gpu.target());
}

Tensor in_type_of(const Tensor& parameter, const Tensor& gradient) {
  const ScalarType type = parameter.scalar_type();
  return gradient.scalar_type() == type ? gradient : torch::stable::to(gradient, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, OptionalTensor x, OptionalTensor xa, Tensor weight, arguments::Parts parts, arguments::Format format,
    Tensor lora_A, Tensor lora_B, OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling,
    std::vector<bool> wanted) {
  arguments::check_format(format, parts, {"dense"});
  Gpu gpu(dy);
  const auto [dx, da, db, dbias] =
      backward_call(dy, x, xa, {weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold}, wanted, gpu.target());
  return {dx, in_type_of(lora_A, da), in_type_of(lora_B, db), dbias};
}

Device device_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 3, "device: expected [arch, multiprocessors, bytes of shared memory]");
  return {static_cast<int>(numbers[0]), static_cast<int>(numbers[1]), static_cast<int>(numbers[2]), numbers[0] == 90};
}

// The launches of a call, written down: names one a line, numbers [launches, 5] (programs, threads, bytes of shared
// memory, programs that must run together, bytes of parameters), the parameters one after the other, and memory used
// beyond inputs and outputs.
struct Record {
  std::string names;
  std::vector<int64_t> numbers;
  std::vector<uint8_t> params;
  std::vector<Tensor> scratch;

  Target target(const std::vector<int64_t>& device, const OptionalTensor& zeros) {
    return {device_of(device),
            // What no kernel writes shows.
            [](const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type) {
              Tensor made = empty(like, sizes, type);
              return torch::stable::fill_(made, std::numeric_limits<double>::quiet_NaN());
            },
            [this, zeros](const Tensor& like, int count) {
              STD_TORCH_CHECK(!zeros || zeros->numel() >= count, "zeros: expected at least ", count, " numbers");
              scratch.push_back(zeros ? *zeros : int_zeros(like, count));
              return scratch.back();
            },
            [this](const Launch& how, const void* bytes, size_t size) {
              names += how.kernel + "\n";
              numbers.insert(
                  numbers.end(), {how.grid, how.threads, how.shared_bytes, how.together, static_cast<int64_t>(size)});
              const auto* first = static_cast<const uint8_t*>(bytes);
              params.insert(params.end(), first, first + size);
            },
            // What a machine has to encode, in the map's place.
            [](const Boxes& boxes) {
              TensorMap map{};
              std::memcpy(map.bytes, &boxes, sizeof boxes);
              return map;
            },
            [this](const Tensor& t) { scratch.push_back(t); }};
  }

  std::tuple<std::string, Tensor, Tensor> as_tensors(const Tensor& like) const {
    const Tensor as_numbers = torch::stable::new_empty(like, {static_cast<int64_t>(numbers.size())}, ScalarType::Long);
    std::copy(numbers.begin(), numbers.end(), static_cast<int64_t*>(as_numbers.mutable_data_ptr()));
    const Tensor as_bytes = torch::stable::new_empty(like, {static_cast<int64_t>(params.size())}, ScalarType::Byte);
    std::copy(params.begin(), params.end(), static_cast<uint8_t*>(as_bytes.mutable_data_ptr()));
    return {names, as_numbers, as_bytes};
  }
};

std::tuple<Tensor, Tensor, std::string, Tensor, Tensor, std::vector<Tensor>> forward_recorded(
    Tensor x, Tensor weight, arguments::Parts parts, arguments::Format format, Tensor lora_A, Tensor lora_B, OptionalTensor bias,
    OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling, std::vector<int64_t> device,
    OptionalTensor zeros) {
  arguments::check_format(format, parts, {"dense"});
  Record record;
  const auto [y, xa] = forward_call(
      x, {weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold}, bias, record.target(device, zeros));
  const auto [names, numbers, params] = record.as_tensors(x);
  return {y, xa, names, numbers, params, record.scratch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::string, Tensor, Tensor, std::vector<Tensor>> backward_recorded(
    Tensor dy, OptionalTensor x, OptionalTensor xa, Tensor weight, arguments::Parts parts, arguments::Format format,
    Tensor lora_A, Tensor lora_B, OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling,
    std::vector<bool> wanted, std::vector<int64_t> device, OptionalTensor zeros) {
  arguments::check_format(format, parts, {"dense"});
  Record record;
  const auto [dx, da, db, dbias] = backward_call(
      dy, x, xa, {weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold}, wanted, record.target(device, zeros));
  const auto [names, numbers, params] = record.as_tensors(dy);
  return {dx, da, db, dbias, names, numbers, params, record.scratch};
}

// The launch that a plan asks for: its kernel; programs, threads, bytes of shared memory, programs that must run together.
std::tuple<std::string, std::vector<int64_t>> planned(std::vector<int64_t> problem, std::vector<int64_t> device) {
  STD_TORCH_CHECK(problem.size() == 12 && device.size() == 3, "problem: expected 12 numbers, and 3 of device");
  const auto number = [&](int which) { return static_cast<int>(problem[which]); };
  const auto flag = [&](int which) { return problem[which] != 0; };
  const Problem p{number(0), number(1), number(2), number(3), static_cast<Type>(problem[4]), flag(5),
                  flag(6),   flag(6),   flag(7),   flag(8),   flag(9),                       flag(10), flag(11)};
  const Launch how = has_few_rows(p) ? few_rows_plan(p, device_of(device)).launch : plan(p, device_of(device)).large;
  return {how.kernel, {how.grid, how.threads, how.shared_bytes, how.together}};
}

}  // namespace

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("lora_linear_forward_cuda", TORCH_BOX(&lora_kernels::forward));
  m.impl("lora_linear_backward_cuda", TORCH_BOX(&lora_kernels::backward));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&lora_kernels::planned));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("cuda_forward_recorded", TORCH_BOX(&lora_kernels::forward_recorded));
  m.impl("cuda_backward_recorded", TORCH_BOX(&lora_kernels::backward_recorded));
}
