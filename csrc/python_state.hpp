// PythonState is a state that is a Python object. Only the bindings and the transports written in Python know of it.
#pragma once

#include <pybind11/pybind11.h>

#include "state.hpp"

namespace mlpint {

class PythonState final : public StateData {
 public:
  explicit PythonState(pybind11::object o) : object(std::move(o)) {}
  ~PythonState() override {
    pybind11::gil_scoped_acquire gil;
    object = pybind11::object();
  }
  // Asks the object, whose buffers() gives a list of (pointer, bytes, device).
  std::vector<Buffer> buffers() override {
    pybind11::gil_scoped_acquire gil;
    std::vector<Buffer> result;
    for (pybind11::handle item : object.attr("buffers")()) {
      const auto b = pybind11::reinterpret_borrow<pybind11::tuple>(item);
      result.push_back(
          {reinterpret_cast<void*>(b[0].cast<std::uintptr_t>()), b[1].cast<std::size_t>(), b[2].cast<int>()});
    }
    return result;
  }

  pybind11::object object;
};

// None stands for no state.
inline State wrap(pybind11::object object) {
  return object.is_none() ? nullptr : std::make_shared<PythonState>(std::move(object));
}

inline pybind11::object unwrap(const State& state) {
  return state ? static_cast<PythonState*>(state.get())->object : pybind11::none();
}

}  // namespace mlpint
