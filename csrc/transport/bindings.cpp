#include "bindings.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "../python_state.hpp"
#include "collectives.hpp"
#include "mpi.hpp"
#include "nccl.hpp"
#include "python.hpp"
#include "self.hpp"
#include "tags.hpp"
#include "wait.hpp"

namespace py = pybind11;

namespace mlpint {

void bind_transports(py::module_& m) {
  wait_hook() = [] {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };

  py::register_exception<TransferError>(m, "TransferError", PyExc_RuntimeError);

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
}

}  // namespace mlpint
