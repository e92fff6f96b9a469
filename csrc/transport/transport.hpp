// A transport moves states between ranks. It posts sends and receives and completes them in order; everything else
// (broadcast, reductions) is built on these two in collectives.hpp.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "../state.hpp"

namespace mlpint {

// TransferError is for a transfer that did not complete, and names both ranks.
class TransferError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Transfer is one transfer under way. It holds its state until it has completed.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual bool test() = 0;                // progress without blocking; true once complete
  virtual void wait(double seconds) = 0;  // throws TransferError after `seconds` without completion
};

using TransferPtr = std::unique_ptr<Transfer>;

class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual TransferPtr send(int to, int tag, State state) = 0;
  virtual TransferPtr receive(int from, int tag, State into) = 0;
  // Returns the transport for small host messages; an accelerator transport names a host one.
  virtual Transport& control() { return *this; }

  // Sends without waiting; the message is kept here until it has left.
  void post(int to, int tag, State state) {
    outbox_.push_back(send(to, tag, std::move(state)));
    progress();
  }
  // Lets messages under way move on. This is called between layer evaluations, since an MPI without a progress thread
  // moves large messages only inside its own calls.
  void progress() {
    while (!outbox_.empty() && outbox_.front()->test()) outbox_.pop_front();
    for (auto& t : outbox_) t->test();
    if (&control() != this) control().progress();
  }
  // Waits until every posted message has left.
  void flush() {
    while (!outbox_.empty()) {
      outbox_.front()->wait(stall_limit);
      outbox_.pop_front();
    }
  }

  double stall_limit = 600.0;  // seconds a rank waits for another before it gives up

  // A watch is called now and then while this rank waits for `peer`, with the seconds that it has waited, from 0 in
  // each wait. It may throw, as when that rank has left. Transfers share it.
  using Watch = std::function<void(int peer, double waited)>;
  const std::shared_ptr<Watch> watch = std::make_shared<Watch>();

 private:
  std::deque<TransferPtr> outbox_;
};

}  // namespace mlpint
