// StoppingRule decides when a solve stops iterating, and keeps the residual norms that it reports.
#pragma once

#include <vector>

#include "propagator.hpp"
#include "transport/transport.hpp"

namespace mlpint {

class StoppingRule {
 public:
  // Iterations stop once the residual norm is at most `tolerance` times the norm of the initial value, with 0 for
  // never. `norms` says whether residual norms are reported even if no tolerance needs them. `initial` is the value of
  // point 0 on the rank that owns it, and null elsewhere. With a tolerance all ranks take part in a sum here.
  StoppingRule(double tolerance, bool norms, Transport& transport, Propagator& propagator, const State& initial);

  bool needs_norms() const { return needs_norms_; }

  // Takes this rank's part of the squared residual norm after one more iteration. Ranks are brought together here only
  // if the tolerance asks for a decision; otherwise norms() does it, after the solve.
  void record(double own_square);
  // Returns whether the norm recorded last is within the tolerance.
  bool met() const;

  // Returns the residual norms in the order in which they were recorded. All ranks call it together.
  std::vector<double> norms();

 private:
  void sum_pending();

  Transport& transport_;
  const bool has_tolerance_, needs_norms_;
  double limit_ = 0;             // of the residual norm
  std::vector<double> pending_;  // own parts of squared norms that have not been summed over the ranks
  std::vector<double> norms_;
};

}  // namespace mlpint
