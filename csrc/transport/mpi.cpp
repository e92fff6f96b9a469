#include "mpi.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "wait.hpp"

namespace mlpint {

// MpiLibrary binds the few calls used. Handles cross as uintptr_t: MPICH's are ints and Open MPI's are pointers, and
// either passes unchanged in an integer register.
struct MpiLibrary {
  using Handle = std::uintptr_t;
  int (*Comm_rank)(Handle, int*) = nullptr;
  int (*Comm_size)(Handle, int*) = nullptr;
  int (*Isend)(const void*, int, Handle, int, int, Handle, Handle*) = nullptr;
  int (*Irecv)(void*, int, Handle, int, int, Handle, Handle*) = nullptr;
  int (*Test)(Handle*, int*, void*) = nullptr;
  int (*Error_string)(int, char*, int*) = nullptr;
  Handle comm = 0, byte = 0;

  explicit MpiLibrary(const std::string& module) {
    // mpi4py's module is loaded already; its handle also searches what it depends on, libmpi among them.
    void* handle = dlopen(module.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!handle) throw std::runtime_error("cannot find the MPI that mpi4py loaded (" + module + "): " + dlerror());
    auto bind = [&](auto& f, const char* name) {
      f = reinterpret_cast<std::decay_t<decltype(f)>>(dlsym(handle, name));
      if (!f) throw std::runtime_error(std::string("the MPI library that mpi4py loaded has no ") + name);
    };
    bind(Comm_rank, "MPI_Comm_rank");
    bind(Comm_size, "MPI_Comm_size");
    bind(Isend, "MPI_Isend");
    bind(Irecv, "MPI_Irecv");
    bind(Test, "MPI_Test");
    bind(Error_string, "MPI_Error_string");
  }

  std::string message(int code) const {
    char text[4096] = {0};
    int length = 0;
    Error_string(code, text, &length);
    return text;
  }
};

namespace {

class MpiTransfer final : public Transfer {
 public:
  MpiTransfer(std::shared_ptr<MpiLibrary> mpi, std::shared_ptr<Transport::Watch> watch, State state, int peer,
              std::string what)
      : mpi_(std::move(mpi)), watch_(std::move(watch)), state_(std::move(state)), peer_(peer), what_(std::move(what)) {}

  ~MpiTransfer() override {
    // A transfer may be abandoned half-way, by an error elsewhere. MPI still writes to or reads from this memory, so it
    // is never freed.
    if (done_ < requests_.size()) new auto(std::make_pair(std::move(state_), std::move(requests_)));
  }

  MpiLibrary::Handle* add() {
    requests_.push_back(0);
    return &requests_.back();
  }
  void check(int code) const {
    if (code) throw TransferError(what_ + " failed: " + mpi_->message(code));
  }
  bool test() override {
    // One request is tested at a time, because MPI_Testall's arrays differ between handle sizes.
    for (; done_ < requests_.size(); ++done_) {
      int flag = 0;
      // The status buffer is a real one, because the value of MPI_STATUS_IGNORE differs by MPI family. No MPI's status
      // is over 64 bytes.
      alignas(16) char status[256];
      check(mpi_->Test(&requests_[done_], &flag, status));
      if (!flag) return false;
    }
    state_.reset();
    return true;
  }
  void wait(double seconds) override {
    const auto watch = [this](double waited) {
      if (*watch_) (*watch_)(peer_, waited);
    };
    if (!poll_until([this] { return test(); }, seconds, watch))
      throw TransferError(what_ + ": nothing moved for " + std::to_string(static_cast<int>(seconds)) +
                          " s; that rank is stopped, hung or out of step");
  }

 private:
  std::shared_ptr<MpiLibrary> mpi_;
  std::shared_ptr<Transport::Watch> watch_;
  State state_;
  int peer_;
  std::string what_;
  std::deque<MpiLibrary::Handle> requests_;  // deque: a request must not move while it is active
  std::size_t done_ = 0;
};

}  // namespace

MpiTransport::MpiTransport(const std::string& module, std::uintptr_t comm, std::uintptr_t byte)
    : mpi_(std::make_shared<MpiLibrary>(module)) {
  mpi_->comm = comm;
  mpi_->byte = byte;
  mpi_->Comm_rank(comm, &rank_);
  mpi_->Comm_size(comm, &size_);
}

MpiTransport::~MpiTransport() = default;

TransferPtr MpiTransport::start(bool sending, int peer, int tag, State state) {
  const auto buffers = state->buffers();
  auto transfer =
      std::make_unique<MpiTransfer>(mpi_, watch, std::move(state), peer,
                                    "rank " + std::to_string(rank_) + (sending ? " sending to" : " receiving from") +
                                        " rank " + std::to_string(peer));
  for (const Buffer& b : buffers)
    if (b.device >= 0)
      throw std::invalid_argument("the MPI transport moves host memory, and this state is on GPU " +
                                  std::to_string(b.device) + "; use the NCCL transport");
  constexpr std::size_t chunk = std::size_t(1) << 30;  // counts are ints
  for (const Buffer& b : buffers)
    for (std::size_t at = 0; at < b.bytes; at += chunk) {
      char* data = static_cast<char*>(b.data) + at;
      const int count = static_cast<int>(std::min(chunk, b.bytes - at));
      auto* request = transfer->add();
      transfer->check(sending ? mpi_->Isend(data, count, mpi_->byte, peer, tag, mpi_->comm, request)
                              : mpi_->Irecv(data, count, mpi_->byte, peer, tag, mpi_->comm, request));
    }
  return transfer;
}

TransferPtr MpiTransport::send(int to, int tag, State state) { return start(true, to, tag, std::move(state)); }
TransferPtr MpiTransport::receive(int from, int tag, State into) { return start(false, from, tag, std::move(into)); }

}  // namespace mlpint
