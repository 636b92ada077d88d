// Products of torch's C interface on CPUs; see csrc/torch_abi/README.md.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#pragma GCC visibility push(default)

extern "C" {

AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
AOTITorchError aoti_torch_cpu_addmm_out(
    AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1, AtenTensorHandle mat2, double beta,
    double alpha);

}  // extern "C"

#pragma GCC visibility pop
