// Collective operations built on point-to-point transfers, so that a transport has to provide no more than those.
#pragma once

#include "transport.hpp"

namespace mlpint {

// Copies `state` of rank `root` into `state` of every rank, along a binomial tree.
void broadcast(Transport&, State state, int root);

// The sum over ranks, added in rank order and equal to the last bit everywhere.
double sum(Transport&, double value);

}  // namespace mlpint
