// MpiTransport uses whichever libmpi mpi4py has loaded, bound at run time: the wheel links no MPI and serves them all.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "transport.hpp"

namespace mlpint {

struct MpiLibrary;

class MpiTransport final : public Transport {
 public:
  // `module` is the path of mpi4py's extension module, whose dependencies include libmpi; `comm` and `byte` are
  // MPI_Comm and MPI_BYTE handles as mpi4py's _handleof gives them.
  MpiTransport(const std::string& module, std::uintptr_t comm, std::uintptr_t byte);
  ~MpiTransport() override;
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  TransferPtr send(int to, int tag, State state) override;
  TransferPtr receive(int from, int tag, State into) override;

 private:
  TransferPtr start(bool sending, int peer, int tag, State state);
  std::shared_ptr<MpiLibrary> mpi_;
  int rank_ = 0, size_ = 1;
};

}  // namespace mlpint
