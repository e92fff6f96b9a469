// States are what moves through the solver: opaque, and held by reference count. The core never looks inside one; a
// transport asks for its memory when it has to cross to another rank.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace mlpint {

struct Buffer {
  void* data;
  std::size_t bytes;
  int device;  // index of the accelerator that holds the memory, -1 for the host
};

class StateData {
 public:
  virtual ~StateData() = default;
  // Returns the contiguous pieces of memory that make up the state, in an order that is the same on every rank.
  virtual std::vector<Buffer> buffers() = 0;
};

using State = std::shared_ptr<StateData>;

// BytesState is host memory of the core itself, for norms and other small messages.
class BytesState final : public StateData {
 public:
  explicit BytesState(std::size_t size) : bytes(size) {}
  std::vector<Buffer> buffers() override { return {{bytes.data(), bytes.size(), -1}}; }
  std::vector<unsigned char> bytes;
};

}  // namespace mlpint
