// MGRIT with the `sum` operator for layers dealt out within the intervals: the cyclic layout.
//
// The coarse step u_K + sum_q (Phi_q(u_K) - u_K) evaluates all layers of an interval at the same state, so the ranks
// that share the interval do it at once: each takes its own layers, one reduction adds the increments up, and the
// coarse sweep costs N / cfactor layers instead of N. The fine sweep is a pipeline through the ranks of the interval
// with the intervals as its stream. Two levels, F-relaxation; the tau correction of an interval is added to the
// reduction by the rank that owns the interval's last layer, where the fine sweep arrives. Any ownership of the layers
// works; a group of cfactor ranks with one layer of each interval is the one that pays.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "grid.hpp"
#include "propagator.hpp"
#include "solver.hpp"
#include "transport/transport.hpp"

namespace mlpint {

class CyclicSolver {
 public:
  // owners[p]: the rank that owns the fine step from depth p along the direction of the solve.
  CyclicSolver(Grid grid, std::vector<int> owners, std::shared_ptr<Transport> transport, SolverOptions options);

  // As Solver::solve.
  SolveResult solve(Propagator& propagator, State initial, int iterations);
  std::tuple<std::string, int, int> where() const { return {operation_, level_, position_}; }

 private:
  struct Interval {
    int begin, end;            // fine steps begin .. end - 1
    std::vector<int> members;  // ranks that own some of them, in the order of the steps
    std::vector<int> mine;     // own steps, ascending
    bool member;               // whether this rank owns any
    bool owns_first, owns_last;
    // Of the solve under way.
    State start;    // u_K, on members
    State step;     // the first fine step from it, on its owner
    bool kept;      // evaluated for good
    State next;     // u_{K + 1} as the coarse sweep left it, on the owner of the last step
    State tau;      // right-hand side, there
    State arrived;  // what the fine sweep arrives at, there
  };

  int owner(int position) const { return owners_[position]; }
  void post(int tag, int to, const State& value);
  State receive(int tag, int from);
  void evaluate(std::vector<Evaluation>& batch, int level, Visit visit);
  void share(const std::vector<int>& ranks, State& value);
  State reduce(const Interval& interval, State own);

  State exact(State initial);
  void coarse_sweep(bool last);
  State own_increments(Interval& interval, bool last);
  void fine_sweep(Visit visit, bool with_last);
  double squared_residual();

  const Grid grid_;
  const std::vector<int> owners_;
  const std::shared_ptr<Transport> transport_;
  const SolverOptions options_;
  const int rank_;
  std::vector<Interval> intervals_;

  Propagator* propagator_ = nullptr;
  State initial_;
  const char* operation_ = "idle";
  int level_ = 0, position_ = 0;
  double waited_ = 0;
};

}  // namespace mlpint
