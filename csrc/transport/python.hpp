// PythonTransport is a transport written in Python. It is how torch.distributed process groups, which have no C
// interface, come in.
#pragma once

#include <pybind11/pybind11.h>

#include "transport.hpp"

namespace mlpint {

class PythonTransport final : public Transport {
 public:
  // `object` has rank, size, send(to, tag, state) and receive(from, tag, state), each of which returns an object with
  // wait(seconds) and test(). States of the core itself arrive there as memoryviews.
  explicit PythonTransport(pybind11::object object);
  ~PythonTransport() override;
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  TransferPtr send(int to, int tag, State state) override;
  TransferPtr receive(int from, int tag, State into) override;

 private:
  TransferPtr start(const char* method, int peer, int tag, State state);
  pybind11::object object_;
  int rank_, size_;
};

}  // namespace mlpint
