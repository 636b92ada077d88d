// Which kernel serves a call, on which grid.
//
// Of the kernels that make the shrink beside the large one, if any do, the one of the smallest cost: waves of
// tiles, each at the share of the peak that its size reaches.
// The shares are estimates: nothing here was measured on a GPU.

#include "plan.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "shapes.h"

namespace lora_kernels {

namespace {

constexpr int kMaxRank = 256;
// Of the products; as many again are left for sums.
constexpr int kMostTiles = 1 << 30;

// A kernel of one kind as the list has it.
struct Choice {
  const char* shape;
  int rows, columns, depth, threads, ranks, shared_bytes;
  bool dropout, in_chunks, sm90a;
  bool ahead;  // whether its loop takes rows of whole chunks alone
};

template <class S>
Choice choice(const char* shape, int ranks, bool dropout, bool in_chunks, int shared_bytes) {
  return {.shape = shape, .rows = S::kRows, .columns = S::kColumns, .depth = S::kDepth, .threads = S::kThreads, .ranks = ranks,
          .shared_bytes = shared_bytes + kNumberBytes, .dropout = dropout, .in_chunks = in_chunks, .sm90a = false,
          .ahead = S::kAhead};
}

template <class S>
Choice hopper_choice(const char* shape, int ranks, bool dropout) {
  return {.shape = shape, .rows = S::kRows, .columns = S::kColumns, .depth = S::kDepth, .threads = S::kThreads + kHopperCopying,
          .ranks = ranks, .shared_bytes = hopper_bytes<S>(ranks), .dropout = dropout, .in_chunks = true, .sm90a = true, .ahead = false};
}

bool is_16_bit(Type type) { return type == Type::kBf16 || type == Type::kHalf; }

const std::vector<Choice>& choices(bool backward, Type type) {
#define LORA_FORWARD_CHOICE(S, ranks, dropout, chunks) choice<S>(#S, ranks, dropout, chunks, forward_bytes<S>(ranks)),
#define LORA_BACKWARD_CHOICE(S, ranks, dropout, chunks) choice<S>(#S, ranks, dropout, chunks, backward_bytes<S>(ranks)),
#define LORA_HOPPER_CHOICE(S, ranks, dropout) hopper_choice<S>(#S, ranks, dropout),
  static const std::vector<Choice> forwards[] = {
      {LORA_EACH_FORWARD(LORA_FORWARD_CHOICE) LORA_EACH_HOPPER(LORA_HOPPER_CHOICE)},
      {LORA_EACH_FORWARD_FLOAT(LORA_FORWARD_CHOICE)},
      {LORA_EACH_FORWARD_TF32(LORA_FORWARD_CHOICE)}};
  static const std::vector<Choice> backwards[] = {
      {LORA_EACH_BACKWARD(LORA_BACKWARD_CHOICE) LORA_EACH_HOPPER(LORA_HOPPER_CHOICE)},
      {LORA_EACH_BACKWARD_FLOAT(LORA_BACKWARD_CHOICE)},
      {LORA_EACH_BACKWARD_TF32(LORA_BACKWARD_CHOICE)}};
  const int list = is_16_bit(type) ? 0 : type == Type::kFloat ? 1 : 2;
  return (backward ? backwards : forwards)[list];
}

const char* name_of(Type type) {
  return type == Type::kBf16 ? "bf16" : type == Type::kHalf ? "half" : type == Type::kFloat ? "float" : "tf32";
}

std::string word_of(Store store) { return store == Store::kDense ? "" : store == Store::kFlat ? "flat_" : "nested_"; }

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Columns of tiles that make the shrink beside the large one, each a slice of ranks; 0: tiles of its own make it,
// or nobody needs it. The tiles of a row panel wait for each other, so that as many programs have to run together.
int xa_columns(const Choice& c, const Problem& p, const Device& d) {
  const int slices = ceil_div(p.r, c.ranks), columns = ceil_div(p.backward ? p.k : p.n, c.columns);
  return slices > std::min(columns, d.multiprocessors) || (p.backward && !p.dx) ? 0 : slices;
}

// Why a kernel can't serve a problem on a device; empty if it can.
std::string refusal(const Choice& c, const Problem& p, const Device& d) {
  if (c.dropout != p.dropout) return "is for another mode of dropout";
  if (c.in_chunks && !p.in_chunks) return "needs rows that start at multiples of 16 bytes";
  if (c.ahead && (p.k % 8 || (p.backward && p.n % 8))) return "needs rows of whole chunks of 16 bytes";
  if (c.shared_bytes > d.shared_bytes) return "needs more shared memory";
  if (c.sm90a && (!d.sm90a || !p.in_boxes)) return "needs sm_90a, and rows that don't overlap";
  if ((c.sm90a || c.ahead) && !xa_columns(c, p, d)) return "makes the shrink product beside the large one only";
  return "";
}

// Relative time: waves of tiles, each its work over the share of the peak that a tile of its size reaches, with
// a few steps' time to fill the pipeline and to store. On sm_90 the share is of what wgmma's 128 x 128 reaches: 0.80 of the
// peak by docs/kernels.md, which 128 x 256 may reach as a whole.
double cost(const Choice& c, const Problem& p, const Device& d) {
  const int out = p.backward ? p.k : p.n, depth = p.backward ? p.n : p.k;
  const double tiles = static_cast<double>(ceil_div(p.m, c.rows)) * ceil_div(out, c.columns);
  const double waves = std::max(1.0, tiles / d.multiprocessors);
  const int area = c.rows * c.columns;
  const double share = c.sm90a ? (area > 16384 ? 1.25 : 1.0) : c.ahead ? 0.82 : area >= 16384 ? 0.75 : area >= 8192 ? 0.62 : 0.5;
  const double tile = area / share * (ceil_div(depth, c.depth) * c.depth + 192.0);
  return (waves < 4 ? ceil_div(static_cast<int64_t>(tiles), d.multiprocessors) : waves) * tile;
}

// Whether a is the better of two: shrinks beside the large product come first, then fewer slices of ranks, then the cost.
bool better(const Choice& a, const Choice& b, const Problem& p, const Device& d) {
  const bool beside_a = xa_columns(a, p, d), beside_b = xa_columns(b, p, d);
  if (beside_a != beside_b) return beside_a;
  const int slices_a = ceil_div(p.r, a.ranks), slices_b = ceil_div(p.r, b.ranks);
  return slices_a != slices_b ? slices_a < slices_b : cost(a, p, d) < cost(b, p, d);
}

std::string name_of(const char* kind, const Choice& c, const Problem& p) {
  return std::string("lora_") + kind + "_" + c.shape + "_" + name_of(p.type) + "_r" + std::to_string(c.ranks) +
         (c.dropout ? "_d1" : "_d0") + (c.in_chunks ? "_c1" : "_c0");
}

// Rows that a tile of da or db sums: few enough that a sum, which waits for memory, lasts no longer than a tile of
// dx; so many that the partial sums, written and read again, stay below 3 % of the call's bytes.
int segment_rows(const Problem& p, const Choice& c) {
  const int balanced = static_cast<int>(static_cast<int64_t>(c.rows + c.columns) * p.n / (4 * kSumColumns));
  const int rows = std::max(balanced, 128 * std::max(16, p.r)), step = std::max(c.rows, kSumRows);
  return ceil_div(std::min(rows, p.m), step) * step;
}

void number_tiles(Plan& plan, const Problem& p, const Choice& c) {
  Kinds& k = plan.kinds;
  plan.segment = segment_rows(p, c);
  k.parts = ceil_div(p.m, plan.segment);
  k.slabs = ceil_div(p.r, c.ranks);
  k.db_blocks = ceil_div(p.n, kSumColumns) * k.slabs;
  k.da_blocks = ceil_div(p.k, kSumColumns) * k.slabs;
  k.dxa = plan.grid.panels * plan.shrink.xa_columns + plan.shrink.alone;
  k.db = k.dxa + (p.db || p.dbias ? k.db_blocks * k.parts : 0);
  k.da = k.db + (p.da ? k.da_blocks * k.parts : 0);
  k.all = k.da + (p.dx ? plan.grid.panels * (plan.grid.columns - plan.shrink.xa_columns) : 0);
  plan.partials = k.parts > 1 ? int64_t{k.db_blocks + k.da_blocks} * k.parts * (c.ranks + 1) * kSumColumns : 0;
  plan.counters += k.db_blocks + k.da_blocks;
  plan.mask_rows = p.dropout && p.dx && p.da ? ceil_div(p.m, kSumRows) * kSumRows : 0;
}

// As many shares of each row panel's mask as give every program one, if the columns allow.
void share_mask(Plan& plan, const Problem& p) {
  const int64_t chunks = ceil_div(p.k, kDrawnColumns);
  plan.share = static_cast<int>(std::min(chunks, (plan.grid.panels * chunks + plan.large.grid - 1) / plan.large.grid));
  plan.draws = ceil_div(chunks, plan.share);
  plan.mask_words = int64_t{plan.grid.panels} * plan.rows * chunks * kDrawnColumns / 32;
}

// Codes have a product of their own, without an adapter.
void check(const Problem& p) {
  const int least = p.store == Store::kDense ? 1 : 0;
  if (p.r < least || p.r > kMaxRank) throw std::invalid_argument("lora_A: expected a rank from 1 to 256");
}

}  // namespace

Device Device::of(const std::vector<int64_t>& numbers) {
  if (numbers.size() != 3) throw std::invalid_argument("device: expected [arch, multiprocessors, bytes of shared memory]");
  const auto [arch, multiprocessors, shared_bytes] = std::array{numbers[0], numbers[1], numbers[2]};
  return {static_cast<int>(arch), static_cast<int>(multiprocessors), static_cast<int>(shared_bytes), arch == 90};
}

bool has_few_rows(const Problem& p) {
  return !p.backward && p.m <= kFewRows && !p.dropout && (p.store == Store::kDense ? p.in_chunks : is_16_bit(p.type));
}

// The columns are divided so that programs come out even: a round costs what its share of W takes to read, and some
// time in which memory waits, estimated as that of 16 KB. A share has a step for each warp, of codes for a quarter of them:
// their steps are long.
FewRowsPlan few_rows_plan(const Problem& p, const Device& d) {
  check(p);
  const int tiles = ceil_div(p.r, kFewRowsColumns) + ceil_div(p.n, kFewRowsColumns);
  const bool coded = p.store != Store::kDense;
  const double bytes = coded ? 0.5 : is_16_bit(p.type) ? 2 : 4;
  const int steps = coded ? ceil_div(p.k, 4 * kCodedColumns) : static_cast<int>(bytes * p.k / 64);
  const int most = std::clamp(steps / (coded ? kFewRowsWarps / 4 : kFewRowsWarps), 1, 16);
  int parts = 1;
  double least = 0;
  for (int tried = 1; tried <= most; ++tried) {
    const double round = bytes * kFewRowsColumns * p.k / tried + 16384;
    const double time = round * ceil_div(static_cast<int64_t>(tiles) * tried, d.multiprocessors);
    if (tried == 1 || time < least) parts = tried, least = time;
  }
  const int64_t all = static_cast<int64_t>(tiles) * parts;
  const int grid = static_cast<int>(std::min<int64_t>(all, d.multiprocessors));
  const std::string kernel = std::string("lora_few_rows_") + word_of(p.store) + name_of(p.type);
  return {{kernel, grid, kFewRowsThreads, kFewRowsBytes + kNumberBytes, 1}, parts, tiles + 2, static_cast<int>(all),
          parts > 1 ? all * kFewRowsTile : 0};
}

Launch decode_plan(int64_t count, Type type, Store store) {
  const int64_t programs = (count + kDecoded - 1) / kDecoded;
  if (programs > kMost) throw std::invalid_argument("weight: expected fewer elements: programs are numbered by 31 bits");
  const std::string kernel = std::string("lora_decode_") + word_of(store) + name_of(type == Type::kTf32 ? Type::kFloat : type);
  return {kernel, static_cast<int>(programs), kDecodeThreads, 0, 1};
}

Plan plan(const Problem& p, const Device& d) {
  check(p);
  const Choice* best = nullptr;
  for (const Choice& c : choices(p.backward, p.type)) {
    if (!refusal(c, p, d).empty()) continue;
    if (!best || better(c, *best, p, d)) best = &c;
  }
  if (!best) throw std::invalid_argument("no kernel serves this call on this device");
  const Choice& c = *best;
  Plan plan{};
  plan.rows = c.rows;
  plan.columns = c.columns;
  plan.ranks = c.ranks;
  plan.grid = {ceil_div(p.m, c.rows), ceil_div(p.backward ? p.k : p.n, c.columns)};
  const bool wants_shrink = !p.backward || p.dx || p.da;
  plan.shrink.slices = wants_shrink ? ceil_div(p.r, c.ranks) : 0;
  plan.shrink.xa_columns = xa_columns(c, p, d);
  if (int64_t{plan.grid.panels} * (plan.grid.columns + plan.shrink.slices) > kMostTiles)
    throw std::invalid_argument("x: expected fewer rows: their tiles are numbered by 31 bits");
  plan.shrink.alone = plan.shrink.xa_columns ? 0 : plan.grid.panels * plan.shrink.slices;
  int tiles = plan.grid.panels * plan.grid.columns + plan.shrink.alone;
  plan.counters = plan.grid.panels + 1;
  if (p.backward) {
    number_tiles(plan, p, c);
    tiles = plan.kinds.all;
  }
  plan.large = {name_of(p.backward ? "backward" : "forward", c, p), std::min(tiles, d.multiprocessors), c.threads,
                c.shared_bytes, std::max(plan.shrink.xa_columns, 1)};
  // float32's products outweigh the mask, and its fragments take other bits.
  if (p.dropout && !p.backward && is_16_bit(p.type)) share_mask(plan, p);
  plan.numbers = tiles + plan.grid.panels * plan.draws;
  plan.sm90a = c.sm90a;
  return plan;
}

}  // namespace lora_kernels
