// This makes the core the Python module mlpint._core. The interpreter lock is released for a whole solve and taken back
// for each call of the propagator, so that it is free while a rank waits.
#include "transport/bindings.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cyclic.hpp"
#include "python_propagator.hpp"
#include "python_state.hpp"
#include "solver.hpp"

namespace py = pybind11;
using namespace mlpint;

namespace {

template <class AnySolver>
SolveResult solve(AnySolver& solver, py::object propagator, py::object initial, int iterations) {
  PythonPropagator p(std::move(propagator));
  State start = wrap(std::move(initial));
  py::gil_scoped_release nogil;
  return solver.solve(p, std::move(start), iterations);
}

template <class AnySolver>
std::tuple<std::string, int, int> where(const AnySolver& solver) {
  const Where& w = solver.where();
  return {w.operation, w.level, w.position};
}

template <class AnySolver>
int iteration(const AnySolver& solver) {
  return solver.where().iteration;
}

// Returns (begin, end, operation, level, iteration) of each wait.
std::vector<std::tuple<double, double, std::string, int, int>> waits(const SolveResult& result) {
  std::vector<std::tuple<double, double, std::string, int, int>> all;
  for (const Wait& w : result.waits)
    all.emplace_back(w.begin, w.end, w.where.operation, w.where.level, w.where.iteration);
  return all;
}

// Returns (time, to, operation, level, iteration) of each message.
std::vector<std::tuple<double, int, std::string, int, int>> sent(const SolveResult& result) {
  std::vector<std::tuple<double, int, std::string, int, int>> all;
  for (const Sent& s : result.sent) all.emplace_back(s.at, s.to, s.where.operation, s.where.level, s.where.iteration);
  return all;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of mlpint: the MGRIT solver and the transports.";

  bind_transports(m);

  py::enum_<Sweep>(m, "Sweep")
      .value("intermediate", Sweep::intermediate)
      .value("final_coarse", Sweep::final_coarse)
      .value("final_fine", Sweep::final_fine);

  py::class_<Grid>(m, "Grid")
      .def(py::init<int, int, int>(), py::arg("steps"), py::arg("cfactor"), py::arg("levels"))
      .def("mirrored", &Grid::mirrored)
      .def_property_readonly("levels", &Grid::levels)
      .def("steps", &Grid::steps, py::arg("level"))
      .def("position", &Grid::position, py::arg("level"), py::arg("point"))
      .def("length", &Grid::length, py::arg("level"), py::arg("step"));

  py::class_<Partition>(m, "Partition")
      .def(py::init<std::vector<int>, int>(), py::arg("offsets"), py::arg("steps"))
      .def_static("even", &Partition::even, py::arg("steps"), py::arg("granularity"), py::arg("slots"))
      .def("mirrored", &Partition::mirrored)
      .def("owner", &Partition::owner, py::arg("position"));

  py::class_<SolveResult>(m, "SolveResult")
      .def_property_readonly("final_value", [](const SolveResult& r) { return unwrap(r.final_value); })
      .def_readonly("iterations", &SolveResult::iterations)
      .def_readonly("residual_norms", &SolveResult::residual_norms)
      .def_readonly("waited", &SolveResult::waited)
      .def_property_readonly("waits", &waits)
      .def_property_readonly("sent", &sent);

  m.def("note_waits", [](bool on) { WaitClock::notes = on; }, py::arg("on"));

  py::class_<Solver>(m, "Solver")
      .def(py::init([](const Grid& grid, const Partition& partition, std::vector<int> ranks,
                       std::shared_ptr<Transport> transport, const std::string& coarse, bool fcf, double tolerance,
                       bool norms) {
             return std::make_unique<Solver>(grid, partition, std::move(ranks), std::move(transport),
                                             make_coarse_operator(coarse), SolverOptions{fcf, tolerance, norms});
           }),
           py::arg("grid"), py::arg("partition"), py::arg("ranks"), py::arg("transport"), py::arg("coarse"),
           py::arg("fcf"), py::arg("tolerance"), py::arg("norms"))
      .def("solve", &solve<Solver>, py::arg("propagator"), py::arg("initial"), py::arg("iterations"))
      .def_property_readonly("where", &where<Solver>)
      .def_property_readonly("iteration", &iteration<Solver>);

  py::class_<CyclicSolver>(m, "CyclicSolver")
      .def(py::init([](const Grid& grid, std::vector<int> owners, std::shared_ptr<Transport> transport,
                       double tolerance, bool norms) {
             return std::make_unique<CyclicSolver>(grid, std::move(owners), std::move(transport),
                                                   SolverOptions{false, tolerance, norms});
           }),
           py::arg("grid"), py::arg("owners"), py::arg("transport"), py::arg("tolerance"), py::arg("norms"))
      .def("solve", &solve<CyclicSolver>, py::arg("propagator"), py::arg("initial"), py::arg("iterations"))
      .def_property_readonly("where", &where<CyclicSolver>)
      .def_property_readonly("iteration", &iteration<CyclicSolver>);
}
