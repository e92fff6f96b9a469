#include "collectives.hpp"

#include <algorithm>
#include <cstring>

#include "tags.hpp"

namespace mlpint {

namespace {

// Returns the place of this rank in the tree, or the number of ranks listed if it is not one of them.
int place(const Transport& t, const std::vector<int>& ranks) {
  return static_cast<int>(std::find(ranks.begin(), ranks.end(), t.rank()) - ranks.begin());
}

}  // namespace

void broadcast(Transport& t, const std::vector<int>& ranks, int tag, const State& state, WaitClock& clock) {
  const int size = static_cast<int>(ranks.size()), me = place(t, ranks);
  if (me == size) return;
  int bit = 1;
  while (bit < size && !(me & bit)) bit <<= 1;
  if (me > 0) clock.wait(t, t.receive(ranks[me - bit], tag, state));
  for (bit >>= 1; bit > 0; bit >>= 1)
    if (me + bit < size) t.post(ranks[me + bit], tag, state);
}

State reduce(Transport& t, const std::vector<int>& ranks, int tag, State own, const std::function<State()>& empty,
             const std::function<State(const State& arrived, const State& own)>& add, WaitClock& clock) {
  const int size = static_cast<int>(ranks.size()), me = place(t, ranks);
  if (me == size) return nullptr;
  for (int bit = 1; bit < size; bit <<= 1) {
    if (me & bit) {
      t.post(ranks[me - bit], tag, own);
      return nullptr;
    }
    if (me + bit < size) {
      const State arrived = empty();
      clock.wait(t, t.receive(ranks[me + bit], tag, arrived));
      own = add(arrived, own);
    }
  }
  return own;
}

void broadcast(Transport& t, const State& state, int root) {
  std::vector<int> ranks;
  for (int i = 0; i < t.size(); ++i) ranks.push_back((root + i) % t.size());
  WaitClock clock;
  broadcast(t, ranks, tag::broadcast, state, clock);
  t.flush();
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
