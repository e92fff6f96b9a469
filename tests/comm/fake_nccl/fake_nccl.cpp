// A substitute for libnccl.so.2 that moves host memory between processes of one machine over Unix-domain sockets, with
// the calls that mlpint uses and NCCL's semantics taken at their strictest: a send returns only once the receiver has
// taken the message (NCCL may buffer it, and may not), messages between two ranks have no tags and match in order, and
// every call blocks, as if the host waited for the stream after each.
//
// Where NCCL would hang or corrupt memory, this reports an error: sizes that differ, a rank that has gone, and a wait
// of more than FAKE_NCCL_TIMEOUT seconds (default 20). FAKE_NCCL_STREAM: the only stream that is accepted.
// FAKE_NCCL_START: seconds that a rank takes to join.
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace {

enum Result { success, cuda_error, system_error, internal_error, invalid_argument, invalid_usage, remote_error };
constexpr uint64_t goodbye = ~uint64_t(0);  // in place of a message's size
constexpr int int8 = 0;

struct UniqueId {
  char internal[128];
};

struct Comm {
  int rank, size;
  std::vector<int> to, from;  // [peer] sockets, one for each direction
  int async_error = success;
};

struct Operation {
  bool sending;
  char* data;
  size_t bytes;
  int peer;
  Comm* comm;
};

thread_local int group_depth = 0;
thread_local std::vector<Operation> group;

double timeout() {
  const char* text = getenv("FAKE_NCCL_TIMEOUT");
  return text ? atof(text) : 20.0;
}

int report(Comm* c, const Operation& o, int result, const std::string& what) {
  fprintf(stderr, "fake NCCL: rank %d %s rank %d: %s\n", c->rank, o.sending ? "sending to" : "receiving from", o.peer,
          what.c_str());
  return c->async_error = result;
}

// Exactly `bytes`, or an error: 0 at the end of the stream, -1 otherwise.
ssize_t read_all(int socket, void* data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = recv(socket, static_cast<char*>(data) + done, bytes - done, 0);
    if (n <= 0) return n;
    done += n;
  }
  return 1;
}
ssize_t write_all(int socket, const void* data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = send(socket, static_cast<const char*>(data) + done, bytes - done, MSG_NOSIGNAL);
    if (n <= 0) return n;
    done += n;
  }
  return 1;
}

int broken(const Operation& o, ssize_t code) {
  const bool timed_out = code < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
  return report(o.comm, o, timed_out ? system_error : remote_error,
                timed_out ? "nothing has come for too long, where NCCL would hang" : "that rank has gone");
}

int run(const Operation& o) {
  Comm* c = o.comm;
  const int socket = o.sending ? c->to[o.peer] : c->from[o.peer];
  ssize_t code;
  uint64_t size = o.bytes;
  char accepted = 0;
  if (o.sending) {
    if ((code = write_all(socket, &size, sizeof size)) <= 0 || (code = read_all(socket, &accepted, 1)) <= 0)
      return broken(o, code);
    if (!accepted) return report(c, o, invalid_usage, "that rank expects a message of another size");
    if ((code = write_all(socket, o.data, o.bytes)) <= 0 || (code = read_all(socket, &accepted, 1)) <= 0)
      return broken(o, code);
    return success;
  }
  if ((code = read_all(socket, &size, sizeof size)) <= 0) return broken(o, code);
  if (size == goodbye) return report(c, o, remote_error, "that rank has left");
  accepted = size == o.bytes;
  if ((code = write_all(socket, &accepted, 1)) <= 0) return broken(o, code);
  if (!accepted)
    return report(c, o, invalid_usage,
                  "a message of " + std::to_string(size) + " bytes where " + std::to_string(o.bytes) + " are expected");
  if ((code = read_all(socket, o.data, o.bytes)) <= 0 || (code = write_all(socket, &accepted, 1)) <= 0)
    return broken(o, code);
  return success;
}

sockaddr_un address(const UniqueId& id, int rank, socklen_t* length) {
  sockaddr_un a{};
  a.sun_family = AF_UNIX;  // in the abstract namespace: no file is left behind
  const int n = snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "fake-nccl-%s-%d", id.internal, rank);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + n);
  return a;
}

void limit_waits(int socket) {
  timeval t{};
  t.tv_sec = static_cast<time_t>(timeout());
  t.tv_usec = static_cast<suseconds_t>((timeout() - t.tv_sec) * 1e6);
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
}

int connect_to(const UniqueId& id, int peer) {
  socklen_t length;
  const sockaddr_un a = address(id, peer, &length);
  const time_t limit = time(nullptr) + static_cast<time_t>(timeout()) + 1;
  while (time(nullptr) < limit) {
    const int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0) return -1;
    if (connect(s, reinterpret_cast<const sockaddr*>(&a), length) == 0) return s;
    close(s);
    usleep(2000);
  }
  return -1;
}

int enqueue(bool sending, void* data, size_t count, int datatype, int peer, Comm* c, void* stream) {
  if (!c || peer < 0 || peer >= c->size || peer == c->rank || datatype != int8) return invalid_argument;
  const char* expected = getenv("FAKE_NCCL_STREAM");
  if (expected && strtoull(expected, nullptr, 0) != reinterpret_cast<uintptr_t>(stream)) {
    fprintf(stderr, "fake NCCL: rank %d was given stream %p, not %s\n", c->rank, stream, expected);
    return invalid_argument;
  }
  if (c->async_error) return c->async_error;
  const Operation o{sending, static_cast<char*>(data), count, peer, c};
  if (group_depth == 0) return run(o);
  group.push_back(o);
  return success;
}

void leave(Comm* c) {
  for (std::vector<int>* sockets : {&c->to, &c->from})
    for (int s : *sockets)
      if (s >= 0) close(s);
  delete c;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  const char* text = getenv("FAKE_NCCL_VERSION");
  *version = text ? atoi(text) : 22703;
  return success;
}

int ncclGetUniqueId(UniqueId* id) {
  unsigned char random[16];
  const int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  const bool ok = file >= 0 && read(file, random, sizeof random) == sizeof random;
  if (file >= 0) close(file);
  if (!ok) return system_error;
  memset(id, 0, sizeof *id);
  for (size_t i = 0; i < sizeof random; ++i) snprintf(id->internal + 2 * i, 3, "%02x", random[i]);
  return success;
}

int ncclCommInitRank(Comm** comm, int size, UniqueId id, int rank) {
  if (rank < 0 || rank >= size) return invalid_argument;
  if (const char* text = getenv("FAKE_NCCL_START")) sleep(atoi(text));
  Comm* c = new Comm{rank, size, std::vector<int>(size, -1), std::vector<int>(size, -1)};
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  socklen_t length;
  const sockaddr_un a = address(id, rank, &length);
  limit_waits(listener);
  int result = system_error;
  if (bind(listener, reinterpret_cast<const sockaddr*>(&a), length) == 0 && listen(listener, size) == 0) {
    result = success;
    for (int peer = 0; peer < size && !result; ++peer)
      if (peer != rank) {
        c->to[peer] = connect_to(id, peer);
        if (c->to[peer] < 0 || write_all(c->to[peer], &rank, sizeof rank) <= 0) result = remote_error;
      }
    for (int i = 1; i < size && !result; ++i) {
      int peer = -1;
      const int s = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      if (s < 0 || read_all(s, &peer, sizeof peer) <= 0)
        result = remote_error;
      else
        c->from[peer] = s;
    }
    for (std::vector<int>* sockets : {&c->to, &c->from})
      for (int s : *sockets)
        if (s >= 0) limit_waits(s);
  }
  close(listener);
  if (result)
    leave(c);
  else
    *comm = c;
  return result;
}

int ncclSend(const void* data, size_t count, int datatype, int peer, Comm* c, void* stream) {
  return enqueue(true, const_cast<void*>(data), count, datatype, peer, c, stream);
}
#ifndef FAKE_NCCL_WITHOUT_RECV
int ncclRecv(void* data, size_t count, int datatype, int peer, Comm* c, void* stream) {
  return enqueue(false, data, count, datatype, peer, c, stream);
}
#endif
int ncclGroupStart() {
  ++group_depth;
  return success;
}
// In order, not at once as NCCL does: mlpint's groups go one way, to one rank.
int ncclGroupEnd() {
  if (group_depth == 0) return invalid_usage;
  if (--group_depth > 0) return success;
  int result = success;
  for (const Operation& o : group)
    if (!result) result = run(o);
  group.clear();
  return result;
}

int ncclCommGetAsyncError(Comm* c, int* result) {
  for (int s : c->from) {
    char byte;
    if (s >= 0 && recv(s, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0) c->async_error = remote_error;
  }
  *result = c->async_error;
  return success;
}
int ncclCommAbort(Comm* c) {
  leave(c);
  return success;
}
int ncclCommDestroy(Comm* c) {
  for (int s : c->to)
    if (s >= 0) write_all(s, &goodbye, sizeof goodbye);
  leave(c);
  return success;
}

const char* ncclGetErrorString(int result) {
  static const char* const names[] = {"no error",
                                      "unhandled cuda error",
                                      "unhandled system error",
                                      "internal error",
                                      "invalid argument",
                                      "invalid usage",
                                      "remote process exited or there was a network error"};
  return result >= 0 && result <= remote_error ? names[result] : "unknown result code";
}

}  // extern "C"
