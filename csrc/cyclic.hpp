// The cyclic layout is MGRIT with the `sum` operator for layers dealt out within the intervals.
//
// The coarse step u_K + sum_q (Phi_q(u_K) - u_K) evaluates all layers of an interval at the same state, so the ranks
// that share the interval do it at once: each takes its own layers, one reduction adds the increments up, and the
// coarse sweep costs N / cfactor layers instead of N. The fine sweep is a pipeline through the ranks of the interval
// with the intervals as its stream. There are two levels, and relaxation is F-relaxation; the tau correction of an
// interval is added to the reduction by the rank that owns the interval's last layer, where the fine sweep arrives. Any
// ownership of the layers works; a group of cfactor ranks with one layer of each interval is the one that pays.
#pragma once

#include <memory>
#include <vector>

#include "grid.hpp"
#include "mgrit.hpp"
#include "propagator.hpp"
#include "transport/transport.hpp"

namespace mlpint {

// CyclicLayout says who owns the layers, seen from one rank.
struct CyclicLayout {
  struct Interval {
    int begin, end;            // fine steps are begin .. end - 1
    std::vector<int> members;  // ranks that own some of them, in the order of the steps
    std::vector<int> own;      // own steps, ascending
    bool owns_first, owns_last;

    bool is_member() const { return !own.empty(); }
  };

  CyclicLayout(Grid grid, std::vector<int> owners, int rank);

  const Grid grid;
  const std::vector<int> owners;  // [depth that a fine step leaves from] -> rank
  const int rank;                 // this one
  std::vector<Interval> intervals;
};

// As Solver for the block layout, CyclicSolver holds only what no solve changes.
class CyclicSolver {
 public:
  // owners[p] is the rank that owns the fine step from depth p along the direction of the solve.
  CyclicSolver(Grid grid, std::vector<int> owners, std::shared_ptr<Transport> transport, SolverOptions options);

  // `initial` is the value of point 0 on the rank that owns it, and null elsewhere.
  SolveResult solve(Propagator& propagator, State initial, int iterations);

  // After an exception this says what failed.
  const Where& where() const { return where_; }

 private:
  const std::shared_ptr<Transport> transport_;
  const CyclicLayout layout_;
  const SolverOptions options_;
  Where where_;
};

}  // namespace mlpint
