// This makes the transports part of the Python module mlpint._core.
#pragma once

#include <pybind11/pybind11.h>

namespace mlpint {

void bind_transports(pybind11::module_& m);

}  // namespace mlpint
