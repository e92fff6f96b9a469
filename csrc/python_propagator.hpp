// PythonPropagator hands its calls on to an object of Python's, and takes the interpreter lock for each of them.
#pragma once

#include <pybind11/pybind11.h>

#include "propagator.hpp"
#include "python_state.hpp"

namespace mlpint {

class PythonPropagator final : public Propagator {
 public:
  explicit PythonPropagator(pybind11::object object) : object_(std::move(object)) {}

  void evaluate(std::vector<Evaluation>& batch, int level, Sweep sweep, int slice) override {
    pybind11::gil_scoped_acquire gil;
    pybind11::list positions, inputs, outputs;
    for (const Evaluation& e : batch) {
      positions.append(e.position);
      inputs.append(unwrap(e.input));
      outputs.append(unwrap(e.output));
    }
    const pybind11::list results = object_.attr("evaluate")(positions, inputs, outputs, level, sweep, slice);
    for (std::size_t i = 0; i < batch.size(); ++i) batch[i].output = wrap(results[i]);
  }
  State extrapolate(const State& u, const State& v, int length) override {
    pybind11::gil_scoped_acquire gil;
    return wrap(object_.attr("extrapolate")(unwrap(u), unwrap(v), length));
  }
  State axpy(double a, const State& x, const State& y) override {
    pybind11::gil_scoped_acquire gil;
    return wrap(object_.attr("axpy")(a, unwrap(x), unwrap(y)));
  }
  State increments(const State& u, const std::vector<State>& outputs) override {
    pybind11::gil_scoped_acquire gil;
    pybind11::list states;
    for (const State& s : outputs) states.append(unwrap(s));
    return wrap(object_.attr("increments")(unwrap(u), states));
  }
  double squared_norm(const State& x) override {
    pybind11::gil_scoped_acquire gil;
    return object_.attr("squared_norm")(unwrap(x)).cast<double>();
  }
  State empty(int slice) override {
    pybind11::gil_scoped_acquire gil;
    return wrap(object_.attr("empty")(slice));
  }
  int slices() override {
    pybind11::gil_scoped_acquire gil;
    return object_.attr("slices")().cast<int>();
  }
  State slice(const State& x, int index) override {
    pybind11::gil_scoped_acquire gil;
    return wrap(object_.attr("slice")(unwrap(x), index));
  }
  State join(const std::vector<State>& slices) override {
    pybind11::gil_scoped_acquire gil;
    pybind11::list states;
    for (const State& s : slices) states.append(unwrap(s));
    return wrap(object_.attr("join")(states));
  }
  bool finishes_on_chain() override {
    pybind11::gil_scoped_acquire gil;
    return object_.attr("finishes_on_chain")().cast<bool>();
  }
  State learnt_step(const CoarseStep& s, const State& u, const State& v) override {
    pybind11::gil_scoped_acquire gil;
    return wrap(object_.attr("learnt_step")(s.position, s.length, unwrap(u), unwrap(v)));
  }
  bool learns() override {
    pybind11::gil_scoped_acquire gil;
    return object_.attr("learns")().cast<bool>();
  }
  void observe(const CoarseStep& s, const State& u, const State& v, const State& end) override {
    pybind11::gil_scoped_acquire gil;
    object_.attr("observe")(s.position, s.length, unwrap(u), unwrap(v), unwrap(end));
  }

 private:
  pybind11::object object_;
};

}  // namespace mlpint
