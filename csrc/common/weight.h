// W as an operator was given it: itself or its codes, what it is made of besides, and the numbers of its format
// (lora_kernels/operands).

#pragma once

#include <array>
#include <charconv>
#include <utility>

#include "arguments.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
// What an operator takes of a weight besides W or its codes; none of a dense one.
using Parts = std::optional<std::vector<Tensor>>;

// W [n, k] as it is stored.
struct Weight {
  Tensor matrix;
  Parts parts;
  std::string format;
  std::vector<int64_t> numbers;  // "nf4:64:512:256" is the format nf4 with three
  int64_t n, k;

  bool has_four_bits() const { return format == "nf4" || format == "fp4"; }
  bool is_quantised() const { return has_four_bits() || format == "int8" || format == "float8"; }
};

namespace arguments {

constexpr int64_t kNestedBlock = 256;  // scales that share a scale of their own
constexpr int64_t kSmallestBlock = 32, kLargestBlock = 4096;
constexpr int64_t kLargestNumber = int64_t{1} << 31;  // of a format, so that no product overflows

// The numbers after a format's word.
inline std::vector<int64_t> numbers_of(const std::string& form, size_t after) {
  std::vector<int64_t> numbers;
  const char *p = form.data() + after, *const end = form.data() + form.size();
  while (p < end) {
    int64_t number = 0;
    const auto [last, error] = std::from_chars(p + 1, end, number);
    const bool right = error == std::errc() && (last == end || *last == ':') && 1 <= number && number <= kLargestNumber;
    STD_TORCH_CHECK(right, "format: expected numbers of at least 1 after a word, got ", form);
    numbers.push_back(number);
    p = last;
  }
  return numbers;
}

inline Weight weight_of(Tensor matrix, Parts parts, const Format& given) {
  const std::string form = taken(given);
  const size_t after = std::min(form.find(':'), form.size());
  Weight weight{std::move(matrix), std::move(parts), form.substr(0, after), numbers_of(form, after), 0, 0};
  STD_TORCH_CHECK(
      weight.numbers.size() == (weight.is_quantised() ? 3 : 0), "format: expected ",
      weight.is_quantised() ? "three numbers" : "no number", " after ", weight.format, ", got ", form);
  if (weight.has_four_bits()) {
    weight.n = weight.numbers[1], weight.k = weight.numbers[2];
  } else if (weight.matrix.dim() == 2) {
    weight.n = weight.matrix.size(0), weight.k = weight.matrix.size(1);
  }
  return weight;
}

// The format of W is one of those that an implementation reads.
template <size_t count>
void check_format(const Weight& weight, const std::array<const char*, count>& known) {
  if (std::none_of(known.begin(), known.end(), [&](const char* name) { return weight.format == name; })) {
    std::string names;
    for (const char* name : known) names += (names.empty() ? "" : " or ") + std::string(name);
    STD_TORCH_CHECK(false, "format: expected ", names, ", got ", weight.format);
  }
  STD_TORCH_CHECK(weight.format != "dense" || !weight.parts, "parts: expected none of a dense weight, got some");
}

// One of the tensors that a quantised W is made of.
inline void check_part(const char* name, const Tensor& t, ScalarType type, int64_t count, const Tensor& like) {
  check_memory(name, t, like);
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected the dtype of its format, got another");
  STD_TORCH_CHECK(t.numel() == count, name, ": expected ", count, " elements, got ", t.numel());
}

inline void check_codebook(const Weight& weight, const Tensor& like) {
  const int64_t block = weight.numbers[0], count = weight.n * weight.k, blocks = (count + block - 1) / block;
  STD_TORCH_CHECK(
      kSmallestBlock <= block && block <= kLargestBlock && (block & (block - 1)) == 0,
      "weight: expected a block of 2^n codes, 32 to 4096, got ", block);
  const std::vector<Tensor> none, &parts = weight.parts ? *weight.parts : none;
  const bool nested = parts.size() == 5;
  STD_TORCH_CHECK(nested || parts.size() == 2, "parts: expected 2, or 5 nested, got ", parts.size());
  check_part("weight", weight.matrix, ScalarType::Byte, (count + 1) / 2, like);
  check_part("absmax", parts[0], nested ? ScalarType::Byte : ScalarType::Float, blocks, like);
  check_part("code", parts[1], ScalarType::Float, 16, like);
  if (!nested) return;
  check_part("nested code", parts[2], ScalarType::Float, 256, like);
  check_part("nested absmax", parts[3], ScalarType::Float, (blocks + kNestedBlock - 1) / kNestedBlock, like);
  check_part("nested offset", parts[4], ScalarType::Float, 1, like);
}

inline void check_scaled(const Weight& weight, const Tensor& like) {
  const int64_t rows = weight.numbers[0], columns = weight.numbers[1];
  const ScalarType type = weight.format == "int8" ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  check_size(weight.matrix.dim() == 2, "weight", "[N, K]", weight.matrix);
  check_part("weight", weight.matrix, type, weight.n * weight.k, like);
  STD_TORCH_CHECK(weight.parts && weight.parts->size() == 1, "parts: expected the scales alone");
  const Tensor& scales = (*weight.parts)[0];
  const ScalarType given = scales.scalar_type();
  STD_TORCH_CHECK(
      given == ScalarType::Float || given == ScalarType::BFloat16 || given == ScalarType::Half ||
          given == ScalarType::Float8_e8m0fnu,
      "scales: expected float32, or less wide");
  check_part("scales", scales, given, ((weight.n + rows - 1) / rows) * ((weight.k + columns - 1) / columns), like);
}

// W beside v: x or dy.
inline void check_weight(const Weight& weight, const Tensor& v) {
  if (weight.has_four_bits()) return check_codebook(weight, v);
  if (weight.is_quantised()) return check_scaled(weight, v);
  check_memory("weight", weight.matrix, v);
  check_size(weight.matrix.dim() == 2, "weight", "[N, K]", weight.matrix);
  check_type("weight", weight.matrix, v.scalar_type());
}

}  // namespace arguments

}  // namespace lora_kernels
