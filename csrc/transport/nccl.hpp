// NCCL, bound at run time: torch's CUDA builds bring libnccl and have it loaded, and the wheel links none.
//
// Transfers are operations on torch's current stream, so the host does not wait for them: a transfer is complete, as
// far as the solver is concerned, once it has been enqueued. Two things follow.
//
// Order. NCCL has neither tags nor receives posted ahead: of the messages from one rank to another the k-th sent meets
// the k-th received, and an enqueued receive holds up everything behind it on the stream. A receive is therefore
// enqueued when it is first waited for, never when it is posted; a send is enqueued at once. The solver's messages
// match in this order because every rank goes through the same phases (coarsest sweep, relaxation, C-relaxation,
// exchange of residuals, level by level), each of which sends at most one message from any rank to any other and waits
// for all that it receives before it ends. The one receive posted ahead of a phase, the chain's, is waited for inside
// its phase too.
//
// Deadlock. A send may hold up the stream until the receiver gets there. Within a phase no circle of ranks can wait for
// one another: first come the messages to later ranks (the chain, F-points, C-points), then those to earlier ranks
// (ends of intervals, residuals), and within each kind the waiting runs one way along the ranks. What is built on a
// transport beside the solver must see to it too: where two ranks exchange messages, one of them receives before it
// sends.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transport.hpp"

namespace mlpint {

struct NcclCalls;
class NcclCommunicator;

class NcclLibrary {
 public:
  // Takes the first of `candidates` (file names or paths) that is loaded already, else the first that can be loaded.
  explicit NcclLibrary(const std::vector<std::string>& candidates);
  ~NcclLibrary();
  const NcclCalls& calls() const { return *calls_; }
  const std::string& path() const { return path_; }
  int version() const;            // as NCCL codes it: 22703 is 2.27.3
  std::string unique_id() const;  // made on one rank, handed to all

 private:
  std::unique_ptr<NcclCalls> calls_;
  std::string path_;
};

class NcclTransport final : public Transport {
 public:
  // control: moves host memory between the same ranks; states on the host and the core's own messages go over it.
  // device: index of the accelerator whose memory is moved, which must be the calling thread's current one; -1 for host
  // memory, which only a substitute for NCCL can move. stream: asked for the current stream (a cudaStream_t) at each
  // transfer. Collective over all ranks: returns once every rank has joined.
  NcclTransport(std::shared_ptr<NcclLibrary> library, std::shared_ptr<Transport> control, const std::string& unique_id,
                int device, std::function<std::uintptr_t()> stream);
  ~NcclTransport() override;
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  TransferPtr send(int to, int tag, State state) override;
  TransferPtr receive(int from, int tag, State into) override;
  Transport& control() override { return *control_; }
  int device() const { return device_; }

  // Throws TransferError if NCCL has found a transfer to have failed. Done whenever messages are moved on.
  void check() const;
  // Ends what is enqueued, now. The other ranks are not told: for a rank that is about to report an error.
  void abort();
  // Waits for what is enqueued, unless a transfer has failed. The transport cannot be used any more.
  void close();

 private:
  bool on_host(const std::vector<Buffer>& buffers, const char* what, int peer) const;
  std::shared_ptr<Transport> control_;
  std::shared_ptr<NcclCommunicator> communicator_;
  int device_, rank_, size_;
};

}  // namespace mlpint
