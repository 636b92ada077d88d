// What the compiled CUDA part finds as the current stream, with the libraries named on the command line loaded as
// Python loads torch's: locally. Prints the stream, or the error and leaves with 1.

#include <dlfcn.h>

#include <cstdio>
#include <exception>

#include "runtime.h"

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    if (!dlopen(names[i], RTLD_NOW | RTLD_LOCAL)) return std::puts(dlerror()), 2;
  }
  try {
    std::printf("%zu\n", reinterpret_cast<size_t>(lora_kernels::current_stream(3)));
  } catch (const std::exception& error) {
    return std::puts(error.what()), 1;
  }
}
