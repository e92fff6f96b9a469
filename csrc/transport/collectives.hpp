// Collective operations are built on point-to-point transfers, so that a transport has to provide no more than those.
//
// Those over a list of ranks run along a binomial tree whose root is the first rank listed. Every rank listed calls
// them with the same list, and other ranks return at once. Waiting time is added to `clock`.
#pragma once

#include <functional>
#include <vector>

#include "transport.hpp"
#include "wait_clock.hpp"

namespace mlpint {

// Copies `state` of ranks[0] into `state` of the other ranks. The messages may still be on their way when it returns.
void broadcast(Transport&, const std::vector<int>& ranks, int tag, const State& state, WaitClock& clock);

// Returns what add(arrived, own) makes of the `own` states of all ranks on ranks[0], and null on other ranks. empty()
// gives memory that a state can be received into.
State reduce(Transport&, const std::vector<int>& ranks, int tag, State own, const std::function<State()>& empty,
             const std::function<State(const State& arrived, const State& own)>& add, WaitClock& clock);

// Copies `state` of rank `root` into `state` of every rank, and waits until it has left: the caller may overwrite the
// state as soon as this returns.
void broadcast(Transport&, const State& state, int root);

// Returns the sum over all ranks, added in rank order and equal to the last bit everywhere.
double sum(Transport&, double value);

}  // namespace mlpint
