#include "stopping.hpp"

#include <cmath>

#include "transport/collectives.hpp"

namespace mlpint {

StoppingRule::StoppingRule(double tolerance, bool norms, Transport& transport, Propagator& propagator,
                           const State& initial)
    : transport_(transport), has_tolerance_(tolerance > 0), needs_norms_(norms || has_tolerance_) {
  if (has_tolerance_) limit_ = tolerance * std::sqrt(sum(transport, initial ? propagator.squared_norm(initial) : 0.0));
}

void StoppingRule::record(double own_square) {
  pending_.push_back(own_square);
  if (has_tolerance_) sum_pending();
}

bool StoppingRule::met() const { return has_tolerance_ && !norms_.empty() && norms_.back() <= limit_; }

std::vector<double> StoppingRule::norms() {
  sum_pending();
  return norms_;
}

void StoppingRule::sum_pending() {
  for (double square : pending_) norms_.push_back(std::sqrt(sum(transport_, square)));
  pending_.clear();
}

}  // namespace mlpint
