// Work for torch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace lora_kernels {

constexpr int64_t kWork = 1 << 18;  // multiplications that pay for a thread, some microseconds
constexpr int64_t kRowGroup = 8;    // rows that are computed together

// Runs f(begin, end) over a range in steps, a thread for every kWork multiplications.
template <class F>
void in_parallel(int64_t count, int64_t step, int64_t work_of_one, F f) {
  const int64_t steps = (count + step - 1) / step;
  const int64_t grain = 1 + kWork / (step * work_of_one + 1);
  torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    f(begin * step, std::min(end * step, count));
  });
}

}  // namespace lora_kernels
