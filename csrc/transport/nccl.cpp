#include "nccl.hpp"

#include <dlfcn.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <type_traits>

namespace mlpint {

// NcclCalls holds the few calls used, as nccl.h declares them.
struct NcclCalls {
  using Comm = void*;
  using Stream = void*;
  struct UniqueId {
    char internal[128];
  };
  static constexpr int success = 0, in_progress = 7;  // ncclResult_t
  static constexpr int int8 = 0;                      // ncclDataType_t

  int (*GetVersion)(int*) = nullptr;
  int (*GetUniqueId)(UniqueId*) = nullptr;
  int (*CommInitRank)(Comm*, int, UniqueId, int) = nullptr;
  int (*CommGetAsyncError)(Comm, int*) = nullptr;
  int (*CommAbort)(Comm) = nullptr;
  int (*CommDestroy)(Comm) = nullptr;
  int (*Send)(const void*, std::size_t, int, int, Comm, Stream) = nullptr;
  int (*Recv)(void*, std::size_t, int, int, Comm, Stream) = nullptr;
  int (*GroupStart)() = nullptr;
  int (*GroupEnd)() = nullptr;
  const char* (*GetErrorString)(int) = nullptr;

  std::string message(int code) const {
    return std::string(GetErrorString(code)) + " (NCCL_DEBUG=WARN in the environment makes NCCL say more)";
  }
};

NcclLibrary::NcclLibrary(const std::vector<std::string>& candidates) : calls_(std::make_unique<NcclCalls>()) {
  void* handle = nullptr;
  std::string tried;
  auto open = [&](int flags) {
    for (const std::string& name : candidates) {
      if (handle) return;
      if ((handle = dlopen(name.c_str(), flags)))
        path_ = name;
      else if (!(flags & RTLD_NOLOAD))
        tried += "\n  " + std::string(dlerror());
    }
  };
  open(RTLD_NOW | RTLD_NOLOAD);  // a second NCCL beside torch's would only cost memory
  if (!handle) open(RTLD_NOW | RTLD_LOCAL);
  if (!handle)
    throw std::runtime_error(
        "cannot load NCCL; install a CUDA build of torch, which brings it, or set MLPINT_NCCL to "
        "the path of libnccl.so.2. Tried:" +
        tried);
  auto bind = [&](auto& f, const char* name) {
    f = reinterpret_cast<std::decay_t<decltype(f)>>(dlsym(handle, name));
    if (!f) throw std::runtime_error("the NCCL library " + path_ + " has no " + name + "; NCCL 2.7 or later is needed");
  };
  bind(calls_->GetVersion, "ncclGetVersion");
  bind(calls_->GetUniqueId, "ncclGetUniqueId");
  bind(calls_->CommInitRank, "ncclCommInitRank");
  bind(calls_->CommGetAsyncError, "ncclCommGetAsyncError");
  bind(calls_->CommAbort, "ncclCommAbort");
  bind(calls_->CommDestroy, "ncclCommDestroy");
  bind(calls_->Send, "ncclSend");
  bind(calls_->Recv, "ncclRecv");
  bind(calls_->GroupStart, "ncclGroupStart");
  bind(calls_->GroupEnd, "ncclGroupEnd");
  bind(calls_->GetErrorString, "ncclGetErrorString");
}

NcclLibrary::~NcclLibrary() = default;  // stays loaded: torch may be using it

int NcclLibrary::version() const {
  int version = 0;
  if (const int code = calls_->GetVersion(&version))
    throw std::runtime_error("ncclGetVersion failed: " + calls_->message(code));
  return version;
}

std::string NcclLibrary::unique_id() const {
  NcclCalls::UniqueId id;
  if (const int code = calls_->GetUniqueId(&id))
    throw std::runtime_error("ncclGetUniqueId failed: " + calls_->message(code));
  return std::string(id.internal, sizeof id.internal);
}

class NcclCommunicator {
 public:
  NcclCommunicator(std::shared_ptr<NcclLibrary> library, const std::string& unique_id, int rank, int size,
                   std::function<std::uintptr_t()> stream)
      : library_(std::move(library)), nccl_(library_->calls()), stream_(std::move(stream)), rank_(rank) {
    NcclCalls::UniqueId id;
    if (unique_id.size() != sizeof id.internal)
      throw std::invalid_argument("an NCCL unique id has " + std::to_string(sizeof id.internal) + " bytes, got " +
                                  std::to_string(unique_id.size()));
    std::memcpy(id.internal, unique_id.data(), sizeof id.internal);
    if (const int code = nccl_.CommInitRank(&comm_, size, id, rank))
      throw TransferError("rank " + std::to_string(rank) + " of " + std::to_string(size) +
                          " cannot join the NCCL communicator: " + nccl_.message(code) +
                          "; a common cause is two ranks on one GPU");
  }
  ~NcclCommunicator() { leave(failed_ || std::uncaught_exceptions() > 0); }

  // Destroying waits for what is enqueued, and that waits for the other ranks, so it is not done after a failure.
  void leave(bool abort) {
    if (comm_) (abort ? nccl_.CommAbort : nccl_.CommDestroy)(comm_);
    comm_ = nullptr;
  }
  void close() { leave(failed_); }

  void check(const std::string& what) {
    require_open();
    int result = NcclCalls::success;
    const int code = nccl_.CommGetAsyncError(comm_, &result);
    if (code) fail(what, code);
    if (result != NcclCalls::success && result != NcclCalls::in_progress) fail(what, result);
  }

  void enqueue(bool sending, int peer, const std::vector<Buffer>& buffers, const std::string& what) {
    check(what);
    const auto stream = reinterpret_cast<NcclCalls::Stream>(stream_());
    int code = nccl_.GroupStart();
    for (const Buffer& b : buffers)
      if (!code && b.bytes)
        code = sending ? nccl_.Send(b.data, b.bytes, NcclCalls::int8, peer, comm_, stream)
                       : nccl_.Recv(b.data, b.bytes, NcclCalls::int8, peer, comm_, stream);
    const int end = nccl_.GroupEnd();
    if (code || end) fail(what, code ? code : end);
  }

  std::string describe(bool sending, int peer) const {
    return "rank " + std::to_string(rank_) + (sending ? " sending to" : " receiving from") + " rank " +
           std::to_string(peer) + " over NCCL";
  }
  std::string describe() const { return "rank " + std::to_string(rank_) + " checking NCCL's transfers"; }

 private:
  void require_open() const {
    if (!comm_) throw std::logic_error("the NCCL transport of rank " + std::to_string(rank_) + " has been closed");
  }
  [[noreturn]] void fail(const std::string& what, int code) {
    failed_ = true;
    throw TransferError(what + " failed: " + nccl_.message(code));
  }

  const std::shared_ptr<NcclLibrary> library_;
  const NcclCalls& nccl_;
  const std::function<std::uintptr_t()> stream_;
  const int rank_;
  NcclCalls::Comm comm_ = nullptr;
  bool failed_ = false;
};

namespace {

// A transfer is enqueued on construction (a send) or when first waited for (a receive). The state is let go as soon as
// it is enqueued, while the GPU may still be using it: its memory came from the same stream, so whatever torch's
// caching allocator gives it to next runs behind the transfer.
class NcclTransfer final : public Transfer {
 public:
  NcclTransfer(std::shared_ptr<NcclCommunicator> communicator, bool sending, int peer, State state,
               std::vector<Buffer> buffers)
      : communicator_(std::move(communicator)),
        sending_(sending),
        peer_(peer),
        state_(std::move(state)),
        buffers_(std::move(buffers)) {
    if (sending_) enqueue();
  }

  bool test() override {
    communicator_->check(communicator_->describe(sending_, peer_));
    return !state_;
  }
  // The stall limit does not apply: the host waits for nothing here, the stream does.
  void wait(double) override {
    if (state_) enqueue();
  }

 private:
  void enqueue() {
    communicator_->enqueue(sending_, peer_, buffers_, communicator_->describe(sending_, peer_));
    state_.reset();
  }

  const std::shared_ptr<NcclCommunicator> communicator_;
  const bool sending_;
  const int peer_;
  State state_;
  const std::vector<Buffer> buffers_;
};

}  // namespace

NcclTransport::NcclTransport(std::shared_ptr<NcclLibrary> library, std::shared_ptr<Transport> control,
                             const std::string& unique_id, int device, std::function<std::uintptr_t()> stream)
    : control_(std::move(control)), device_(device), rank_(control_->rank()), size_(control_->size()) {
  stall_limit = control_->stall_limit;
  communicator_ = std::make_shared<NcclCommunicator>(std::move(library), unique_id, rank_, size_, std::move(stream));
}

NcclTransport::~NcclTransport() = default;

bool NcclTransport::on_host(const std::vector<Buffer>& buffers, const char* what, int peer) const {
  bool host = device_ >= 0, own = true;
  int other = device_;
  for (const Buffer& b : buffers) {
    if (b.device >= 0) host = false;
    if (b.device != device_) own = false, other = b.device;
  }
  if (host || own) return host && !buffers.empty();
  auto name = [](int device) { return device < 0 ? std::string("the host") : "GPU " + std::to_string(device); };
  throw std::invalid_argument("rank " + std::to_string(rank_) + " " + what + " rank " + std::to_string(peer) +
                              ": part of the state is on " + name(other) + " and this rank's NCCL moves memory of " +
                              name(device_) + "; put all tensors of a state there");
}

TransferPtr NcclTransport::send(int to, int tag, State state) {
  auto buffers = state->buffers();
  if (on_host(buffers, "sending to", to)) return control_->send(to, tag, std::move(state));
  return std::make_unique<NcclTransfer>(communicator_, true, to, std::move(state), std::move(buffers));
}

TransferPtr NcclTransport::receive(int from, int tag, State into) {
  auto buffers = into->buffers();
  if (on_host(buffers, "receiving from", from)) return control_->receive(from, tag, std::move(into));
  return std::make_unique<NcclTransfer>(communicator_, false, from, std::move(into), std::move(buffers));
}

void NcclTransport::check() const { communicator_->check(communicator_->describe()); }
void NcclTransport::abort() { communicator_->leave(true); }
void NcclTransport::close() { communicator_->close(); }

}  // namespace mlpint
