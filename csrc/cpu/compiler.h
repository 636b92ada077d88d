// What g++ and clang++ say differently.

#pragma once

#define LORA_PRAGMA(text) _Pragma(#text)

// LORA_UNROLL(n), before a loop of constant length: its body is written out up to n times.
//
// LORA_TARGET_BEGIN("...") and LORA_TARGET_END: functions between them are for processors with these
// instructions. They stand after all headers, whose functions must not be compiled for such a
// processor alone: another file's may be the copy that is linked.
#if defined(__clang__)
#define LORA_UNROLL(n) LORA_PRAGMA(clang loop unroll(full))
#define LORA_TARGET_BEGIN(features) \
  LORA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LORA_TARGET_END LORA_PRAGMA(clang attribute pop)
#else
#define LORA_UNROLL(n) LORA_PRAGMA(GCC unroll n)
#define LORA_TARGET_BEGIN(features) LORA_PRAGMA(GCC push_options) LORA_PRAGMA(GCC target(features))
#define LORA_TARGET_END LORA_PRAGMA(GCC pop_options)
#endif

// Lanes of two vectors by constant numbers; those of b follow those of a. g++ 11 has not the first.
#if __has_builtin(__builtin_shufflevector)
#define LORA_LANES(Vector, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LORA_LANES(Vector, a, b, ...) __builtin_shuffle(a, b, Vector{__VA_ARGS__})
#endif
