// Every kernel by four threads at once, for a build with ThreadSanitizer: parts may not meet, and
// their results must have the bits of one thread's. Says what differs and returns 1, or returns 0;
// returns 77 where this processor hasn't the instructions that LORA_KERNELS_TEST_ISA names.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace lora_kernels;

namespace {

constexpr int64_t kRows = 203, kIn = 331, kOut = 270, kRank = 21;
constexpr int kSkipped = 77;

std::vector<uint16_t> numbers(int64_t count) {
  static std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<uint16_t> halves(static_cast<size_t>(count) * 2);
  for (int64_t i = 0; i < count; ++i) {
    const float value = uniform(random);
    std::memcpy(&halves[static_cast<size_t>(2 * i)], &value, sizeof value);
  }
  return halves;
}

// As bfloat16 the same memory holds other numbers: some are not finite, and their bits must agree too.
Matrix matrix(std::vector<uint16_t>& memory, int64_t rows, int64_t columns, bool is_bf16) {
  if (is_bf16) {
    for (uint16_t& half : memory) half &= 0xBFFF;  // below 2
  }
  return {memory.data(), columns, rows, columns, is_bf16};
}

// Runs f over [0, count) in steps, by so many threads.
void split(int64_t count, int64_t step, int threads, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t part = round_up((count + threads - 1) / threads, step);
  std::vector<std::thread> running;
  for (int64_t begin = 0; begin < count; begin += part) {
    running.emplace_back(f, begin, std::min(begin + part, count));
  }
  for (std::thread& thread : running) thread.join();
}

struct Results {
  std::vector<float> q, sums;
  std::vector<uint16_t> y, dx, few;
  std::vector<float> squares, passed;
  std::vector<uint16_t> dropped, rescaled;
};

Results run(const Kernels& kernel, bool is_bf16, int threads) {
  static std::vector<uint16_t> x = numbers(kRows * kIn), w = numbers(kOut * kIn), a = numbers(kRank * kIn),
                               b = numbers(kOut * kRank), start = numbers(kRows * kIn);
  const Matrix inputs = matrix(x, kRows, kIn, is_bf16), weight = matrix(w, kOut, kIn, is_bf16);
  const Matrix first = matrix(a, kRank, kIn, is_bf16), second = matrix(b, kOut, kRank, is_bf16);
  const Mask mask{kIn, 12345, 9000};
  const Panel over_k = kernel.panel_over_columns(first), over_r = kernel.panel_over_columns(second);
  const Panel by_rows = kernel.panel_over_rows(first);
  const int64_t stride = over_k.pitch, pitch = round_up(kIn, kColumnBlock);
  Results out{std::vector<float>(kRows * stride), std::vector<float>(stride * pitch), start, start,
              std::vector<uint16_t>(2 * 5 * kOut), std::vector<float>(kRows), std::vector<float>(pitch), start, start};
  const Matrix y = matrix(out.y, kRows, kOut, is_bf16), dx = matrix(out.dx, kRows, kIn, is_bf16);
  split(kRows, 8, threads, [&](int64_t begin, int64_t end) {
    kernel.rows_product(inputs, over_k, 0.5f, out.q.data(), mask, begin, end);
    kernel.add_low_rank(y, over_r, out.q.data(), stride, begin, end);
  });
  split(kIn, kColumnBlock, threads, [&](int64_t begin, int64_t end) {
    kernel.column_pass(dx, inputs, by_rows, out.q.data(), stride, out.sums.data(), pitch, mask, begin, end);
  });
  const Matrix few{x.data(), kIn, 5, kIn, is_bf16}, into{out.few.data(), kOut, 5, kOut, is_bf16};
  split(kOut, 8, threads, [&](int64_t begin, int64_t end) {
    kernel.few_rows(few, weight, Matrix{}, into, begin, end);
  });
  const std::vector<float> gain(pitch, 0.75f);
  const Matrix dropped = matrix(out.dropped, kRows, kIn, is_bf16), rescaled = matrix(out.rescaled, kRows, kIn, is_bf16);
  split(kRows, 8, threads, [&](int64_t begin, int64_t end) {
    kernel.row_squares(inputs, out.squares.data(), begin, end);
    kernel.add_kept(inputs, 0.5f, mask, 3, dropped, true, begin, end);
    kernel.rescale(inputs, gain.data(), dropped, gain.data(), dropped, begin, end);
  });
  split(kIn, kColumnBlock, threads, [&](int64_t begin, int64_t end) {
    kernel.gain_pass(inputs, gain.data(), dropped, rescaled, out.passed.data(), begin, end);
  });
  return out;
}

template <class T>
bool same(const std::vector<T>& one, const std::vector<T>& other, const char* kernel, const char* what) {
  if (!std::memcmp(one.data(), other.data(), one.size() * sizeof(T))) return true;
  std::printf("%s: %s differs with the number of threads\n", kernel, what);
  return false;
}

}  // namespace

int main() {
  const char* wanted = std::getenv("LORA_KERNELS_TEST_ISA");
  if (wanted && std::strcmp(wanted, kernels().name)) {
    std::printf("%s: not run on this processor\n", wanted);
    return kSkipped;
  }
  bool good = true;
  for (const bool is_bf16 : {false, true}) {
    const Kernels& kernel = kernels();
    const Results alone = run(kernel, is_bf16, 1), together = run(kernel, is_bf16, 4);
    good &= same(alone.q, together.q, kernel.name, "q") && same(alone.sums, together.sums, kernel.name, "sums");
    good &= same(alone.y, together.y, kernel.name, "y") && same(alone.dx, together.dx, kernel.name, "dx");
    good &= same(alone.few, together.few, kernel.name, "the product of few rows");
    good &= same(alone.squares, together.squares, kernel.name, "squares of rows");
    good &= same(alone.dropped, together.dropped, kernel.name, "D(x)") && same(alone.passed, together.passed, kernel.name, "dm");
    good &= same(alone.rescaled, together.rescaled, kernel.name, "dz");
    std::printf("%s, %s: %s\n", kernel.name, is_bf16 ? "bfloat16" : "float32", good ? "the same bits" : "differs");
  }
  return good ? 0 : 1;
}
