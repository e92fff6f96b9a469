#include "collectives.hpp"

#include <cstring>

#include "tags.hpp"

namespace mlpint {

void broadcast(Transport& t, State state, int root) {
  const int size = t.size(), me = (t.rank() - root + size) % size;  // the root is 0 in the tree
  int bit = 1;
  for (; bit < size; bit <<= 1)
    if (me & bit) {
      t.receive((me - bit + root) % size, tag::broadcast, state)->wait(t.stall_limit);
      break;
    }
  for (bit >>= 1; bit > 0; bit >>= 1)
    if (me + bit < size) t.post((me + bit + root) % size, tag::broadcast, state);
  t.flush();  // the caller may overwrite the state as soon as this returns
}

double sum(Transport& t, double value) {
  Transport& c = t.control();
  auto message = std::make_shared<BytesState>(sizeof(double));
  if (c.rank() == 0) {
    for (int r = 1; r < c.size(); ++r) {
      double other;
      c.receive(r, tag::sum, message)->wait(c.stall_limit);
      std::memcpy(&other, message->bytes.data(), sizeof other);
      value += other;
    }
  } else {
    std::memcpy(message->bytes.data(), &value, sizeof value);
    c.post(0, tag::sum, message);
    c.flush();
  }
  std::memcpy(message->bytes.data(), &value, sizeof value);
  broadcast(c, message, 0);
  std::memcpy(&value, message->bytes.data(), sizeof value);
  return value;
}

}  // namespace mlpint
