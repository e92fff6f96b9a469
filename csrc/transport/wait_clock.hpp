// WaitClock waits for other ranks and counts how long that takes; where it is told to, it notes each wait and message.
#pragma once

#include <chrono>
#include <vector>

#include "../where.hpp"
#include "transport.hpp"

namespace mlpint {

// One wait, in seconds of the steady clock.
struct Wait {
  double begin, end;
  Where where;
};

// One message that was sent to a rank.
struct Sent {
  double at;
  int to;
  Where where;
};

class WaitClock {
 public:
  WaitClock() = default;
  // Notes what `where` says at each wait, while `notes` is set. It must outlive this.
  explicit WaitClock(const Where& where) : where_(&where) {}

  // Waits until the transfer is complete; messages that were posted before move on first.
  void wait(Transport& transport, TransferPtr transfer) {
    const double begin = now();
    transport.progress();
    transfer->wait(transport.stall_limit);
    const double end = now();
    seconds_ += end - begin;
    if (notes && where_) waits_.push_back({begin, end, *where_});
  }
  // Notes a message that is about to be posted.
  void sends(int to) {
    if (notes && where_) sent_.push_back({now(), to, *where_});
  }
  // Returns the seconds that all waits have taken so far.
  double seconds() const { return seconds_; }
  const std::vector<Wait>& waits() const { return waits_; }
  const std::vector<Sent>& messages() const { return sent_; }

  static inline bool notes = false;  // whether anything is noted, in the whole process

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  const Where* where_ = nullptr;
  double seconds_ = 0;
  std::vector<Wait> waits_;
  std::vector<Sent> sent_;
};

}  // namespace mlpint
