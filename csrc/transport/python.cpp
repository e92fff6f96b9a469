#include "python.hpp"

#include "../python_state.hpp"

namespace py = pybind11;

namespace mlpint {

namespace {

class PythonTransfer final : public Transfer {
 public:
  PythonTransfer(py::object object, State state) : object_(std::move(object)), state_(std::move(state)) {}
  ~PythonTransfer() override {
    py::gil_scoped_acquire gil;
    object_ = py::object();
  }
  bool test() override {
    if (done_) return true;
    py::gil_scoped_acquire gil;
    done_ = object_.attr("test")().cast<bool>();
    return done_;
  }
  void wait(double seconds) override {
    if (done_) return;
    py::gil_scoped_acquire gil;
    object_.attr("wait")(seconds);
    done_ = true;
  }

 private:
  py::object object_;
  State state_;
  bool done_ = false;
};

}  // namespace

PythonTransport::PythonTransport(py::object object)
    : object_(std::move(object)), rank_(object_.attr("rank").cast<int>()), size_(object_.attr("size").cast<int>()) {}

PythonTransport::~PythonTransport() {
  py::gil_scoped_acquire gil;
  object_ = py::object();
}

TransferPtr PythonTransport::start(const char* method, int peer, int tag, State state) {
  py::gil_scoped_acquire gil;
  py::object passed;
  if (auto* p = dynamic_cast<PythonState*>(state.get())) {
    passed = p->object;
  } else {
    const Buffer b = state->buffers().at(0);
    passed = py::memoryview::from_memory(b.data, static_cast<py::ssize_t>(b.bytes));
  }
  return std::make_unique<PythonTransfer>(object_.attr(method)(peer, tag, passed), std::move(state));
}

TransferPtr PythonTransport::send(int to, int tag, State state) { return start("send", to, tag, std::move(state)); }
TransferPtr PythonTransport::receive(int from, int tag, State into) {
  return start("receive", from, tag, std::move(into));
}

}  // namespace mlpint
