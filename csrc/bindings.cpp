// The core as the Python module mlpint._core. The interpreter lock is released for a whole solve and taken back for
// each call of the propagator, so that it is free while a rank waits.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cyclic.hpp"
#include "python_state.hpp"
#include "solver.hpp"
#include "transport/collectives.hpp"
#include "transport/mpi.hpp"
#include "transport/nccl.hpp"
#include "transport/python.hpp"
#include "transport/self.hpp"
#include "transport/tags.hpp"
#include "transport/wait.hpp"

namespace py = pybind11;
using namespace mlpint;

namespace {

State wrap(py::object object) { return object.is_none() ? nullptr : std::make_shared<PythonState>(std::move(object)); }

py::object unwrap(const State& state) { return state ? static_cast<PythonState*>(state.get())->object : py::none(); }

class PythonPropagator final : public Propagator {
 public:
  explicit PythonPropagator(py::object object) : object_(std::move(object)) {}

  void evaluate(std::vector<Evaluation>& batch, int level, Visit visit) override {
    py::gil_scoped_acquire gil;
    py::list positions, inputs, outputs;
    for (const Evaluation& e : batch) {
      positions.append(e.position);
      inputs.append(unwrap(e.input));
      outputs.append(unwrap(e.output));
    }
    const py::list results = object_.attr("evaluate")(positions, inputs, outputs, level, visit);
    for (std::size_t i = 0; i < batch.size(); ++i) batch[i].output = wrap(results[i]);
  }
  State extrapolate(const State& u, const State& v, int length) override {
    py::gil_scoped_acquire gil;
    return wrap(object_.attr("extrapolate")(unwrap(u), unwrap(v), length));
  }
  State axpy(double a, const State& x, const State& y) override {
    py::gil_scoped_acquire gil;
    return wrap(object_.attr("axpy")(a, unwrap(x), unwrap(y)));
  }
  double squared_norm(const State& x) override {
    py::gil_scoped_acquire gil;
    return object_.attr("squared_norm")(unwrap(x)).cast<double>();
  }
  State empty() override {
    py::gil_scoped_acquire gil;
    return wrap(object_.attr("empty")());
  }
  State learnt_step(const CoarseStep& s, const State& u, const State& v) override {
    py::gil_scoped_acquire gil;
    return wrap(object_.attr("learnt_step")(s.position, s.length, unwrap(u), unwrap(v)));
  }
  bool learns() override {
    py::gil_scoped_acquire gil;
    return object_.attr("learns")().cast<bool>();
  }
  void observe(const CoarseStep& s, const State& u, const State& v, const State& end) override {
    py::gil_scoped_acquire gil;
    object_.attr("observe")(s.position, s.length, unwrap(u), unwrap(v), unwrap(end));
  }

 private:
  py::object object_;
};

template <class AnySolver>
SolveResult solve(AnySolver& solver, py::object propagator, py::object initial, int iterations) {
  PythonPropagator p(std::move(propagator));
  State start = wrap(std::move(initial));
  py::gil_scoped_release nogil;
  return solver.solve(p, std::move(start), iterations);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of mlpint: the MGRIT solver and the transports.";

  wait_hook() = [] {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };

  py::register_exception<TransferError>(m, "TransferError", PyExc_RuntimeError);

  py::enum_<Visit>(m, "Visit").value("relax", Visit::relax).value("chain", Visit::chain).value("last", Visit::last);

  py::class_<Transfer>(m, "Transfer")
      .def("test", &Transfer::test)
      .def("wait", &Transfer::wait, py::call_guard<py::gil_scoped_release>());

  py::class_<Transport, std::shared_ptr<Transport>>(m, "Transport")
      .def_property_readonly("rank", &Transport::rank)
      .def_property_readonly("size", &Transport::size)
      .def_property_readonly("control", &Transport::control, py::return_value_policy::reference_internal)
      .def_readwrite("stall_limit", &Transport::stall_limit)
      .def("post",
           [](Transport& t, int to, int tag, py::object object) {
             State state = wrap(std::move(object));
             py::gil_scoped_release nogil;  // NCCL's first send to a rank waits for that rank
             t.post(to, tag, std::move(state));
           })
      .def("receive",
           [](Transport& t, int from, int tag, py::object into) { return t.receive(from, tag, wrap(std::move(into))); })
      .def("set_watch", [](Transport& t, Transport::Watch watch) { *t.watch = std::move(watch); })
      .def("progress", &Transport::progress)
      .def("flush", &Transport::flush, py::call_guard<py::gil_scoped_release>())
      .def("broadcast",
           [](Transport& t, py::object object, int root) {
             State state = wrap(std::move(object));
             py::gil_scoped_release nogil;
             broadcast(t, std::move(state), root);
           })
      .def("sum", [](Transport& t, double value) { return sum(t, value); }, py::call_guard<py::gil_scoped_release>());
  py::class_<SelfTransport, Transport, std::shared_ptr<SelfTransport>>(m, "SelfTransport").def(py::init<>());
  py::class_<MpiTransport, Transport, std::shared_ptr<MpiTransport>>(m, "MpiTransport")
      .def(py::init<const std::string&, std::uintptr_t, std::uintptr_t>(), py::arg("module"), py::arg("comm"),
           py::arg("byte"));
  py::class_<PythonTransport, Transport, std::shared_ptr<PythonTransport>>(m, "PythonTransport")
      .def(py::init<py::object>());
  py::class_<NcclLibrary, std::shared_ptr<NcclLibrary>>(m, "NcclLibrary")
      .def(py::init<const std::vector<std::string>&>(), py::arg("candidates"))
      .def_property_readonly("path", &NcclLibrary::path)
      .def_property_readonly("version", &NcclLibrary::version)
      .def("unique_id", [](const NcclLibrary& l) { return py::bytes(l.unique_id()); });
  py::class_<NcclTransport, Transport, std::shared_ptr<NcclTransport>>(m, "NcclTransport")
      .def(py::init<std::shared_ptr<NcclLibrary>, std::shared_ptr<Transport>, const std::string&, int,
                    std::function<std::uintptr_t()>>(),
           py::arg("library"), py::arg("control"), py::arg("unique_id"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("device", &NcclTransport::device)
      .def("check", &NcclTransport::check)
      .def("abort", &NcclTransport::abort, py::call_guard<py::gil_scoped_release>())
      .def("close", &NcclTransport::close, py::call_guard<py::gil_scoped_release>());
  m.attr("USER_TAG") = tag::user;

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
      .def_readonly("waited", &SolveResult::waited);

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
      .def_property_readonly("where", &Solver::where);

  py::class_<CyclicSolver>(m, "CyclicSolver")
      .def(py::init([](const Grid& grid, std::vector<int> owners, std::shared_ptr<Transport> transport,
                       double tolerance, bool norms) {
             return std::make_unique<CyclicSolver>(grid, std::move(owners), std::move(transport),
                                                   SolverOptions{false, tolerance, norms});
           }),
           py::arg("grid"), py::arg("owners"), py::arg("transport"), py::arg("tolerance"), py::arg("norms"))
      .def("solve", &solve<CyclicSolver>, py::arg("propagator"), py::arg("initial"), py::arg("iterations"))
      .def_property_readonly("where", &CyclicSolver::where);
}
