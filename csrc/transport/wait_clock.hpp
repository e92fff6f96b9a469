// WaitClock waits for other ranks and counts how long that takes.
#pragma once

#include <chrono>

#include "transport.hpp"

namespace mlpint {

class WaitClock {
 public:
  // Waits until the transfer is complete; messages that were posted before move on first.
  void wait(Transport& transport, TransferPtr transfer) {
    const auto started = std::chrono::steady_clock::now();
    transport.progress();
    transfer->wait(transport.stall_limit);
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }
  // Returns the seconds that all waits have taken so far.
  double seconds() const { return seconds_; }

 private:
  double seconds_ = 0;
};

}  // namespace mlpint
