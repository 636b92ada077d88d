// The current stream, by a function of torch's CUDA builds: the library loads beside others too.

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "runtime.h"

namespace lora_kernels {

namespace {

constexpr char kLibrary[] = "libtorch_cuda.so", kName[] = "aoti_torch_get_current_cuda_stream";
using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

std::string loader_error() {
  const char* text = dlerror();
  return text ? std::string(": ") + text : "";
}

// Python loads torch's libraries locally, so that no symbol linked weakly is found in one which this library doesn't
// name among its needs; and it can't name one that other builds of torch lack.
CurrentStream find() {
  void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) {
    throw std::runtime_error(
        std::string("impl: 'cuda' needs a CUDA build of torch, expected ") + kLibrary + " among the loaded libraries" +
        loader_error());
  }
  void* found = dlsym(library, kName);
  if (!found) {
    throw std::runtime_error(
        std::string("impl: 'cuda' needs torch 2.10 or newer, expected ") + kName + " in " + kLibrary + loader_error());
  }
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

void* current_stream(int device) {
  static const CurrentStream current = find();
  void* stream = nullptr;
  if (current(device, &stream)) {
    throw std::runtime_error(std::string(kName) + " of device " + std::to_string(device) + " failed");
  }
  return stream;
}

}  // namespace lora_kernels
