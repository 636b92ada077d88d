// What the host side asks of CUDA's runtime and of torch's CUDA library; errors are thrown as std::runtime_error that
// names the call.

#pragma once

#include "plan.h"

namespace lora_kernels {

// The properties of a CUDA device; asked of the driver once per device.
Device device_of(int index);

// A map for copies of boxes, whose chunks are permuted in shared memory by 128 bytes.
TensorMap encoded(const Boxes& boxes);

// Launches a kernel of the list on the current device: `params` are copied.
void launch(const Launch& how, const void* params, void* stream);

// The stream that torch's next launch on a device goes to.
void* current_stream(int device);

// Whether a graph is being captured on a stream.
bool is_capturing(void* stream);

}  // namespace lora_kernels
