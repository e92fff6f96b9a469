// SelfTransport is for one process alone, which owns every layer, so nothing is ever sent.
#pragma once

#include "transport.hpp"

namespace mlpint {

class SelfTransport final : public Transport {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  TransferPtr send(int to, int, State) override { refuse("send to", to); }
  TransferPtr receive(int from, int, State) override { refuse("receive from", from); }

 private:
  [[noreturn]] static void refuse(const char* what, int peer) {
    throw std::logic_error(std::string("a process alone cannot ") + what + " rank " + std::to_string(peer));
  }
};

}  // namespace mlpint
