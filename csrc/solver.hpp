// MGRIT in its full-approximation (FAS) form for u_0 given, u_{n+1} = Phi_n(u_n): one solver, used for the states
// forwards over the layers and for the adjoint backwards. arXiv 2601.09026; Falgout et al., SISC 36 (2014), C635.
//
// Iteration 1 is the coarse solve alone, from the initial value; each further iteration is one V-cycle; the solve ends
// with one sweep over the fine steps of every interval from its C-point. Zero iterations: the exact serial sweep.
//
// Work: a fine step evaluated at a C-point serves the coarse step there, the tau term of the next cycle and the first
// step of the following relaxation. Coarse points coincide with fine ones, so the correction is an assignment and the
// coarse right-hand side at C-point K + 1,  g_c = g + Phi(u_last F) - Phi_c(u_K),  needs nothing but what the rank that
// owns interval K has. Ranks are never synchronised unless a residual norm is asked for.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "coarse.hpp"
#include "grid.hpp"
#include "propagator.hpp"
#include "transport/transport.hpp"

namespace mlpint {

struct SolverOptions {
  bool fcf = false;        // FCF- in place of F-relaxation
  double tolerance = 0.0;  // stop once the residual norm is at most this times the norm of the initial value
  bool norms = false;      // report residual norms (costs an all-reduce)
};

struct SolveResult {
  State final_value;                   // of the last point, on the rank that owns the last step; null elsewhere
  int iterations = 0;                  // done
  std::vector<double> residual_norms;  // after iteration 1, 2, ... where asked for
  double waited = 0;                   // seconds this rank waited for others
};

class Solver {
 public:
  // ranks[s]: the rank at slot s along the direction of the solve.
  Solver(Grid grid, Partition partition, std::vector<int> ranks, std::shared_ptr<Transport> transport,
         std::unique_ptr<CoarseOperator> coarse, SolverOptions options);

  // initial: the value of point 0, on the rank that owns it (null elsewhere).
  SolveResult solve(Propagator& propagator, State initial, int iterations);

  // What this rank is doing, for error messages: operation, level, depth along the direction of the solve.
  std::tuple<std::string, int, int> where() const { return {operation_, level_, position_}; }

 private:
  struct Node {  // a point of level 1
    State value;
    State step;         // Phi_0(value), where evaluated
    bool kept = false;  // evaluated for good (Visit::chain): the last sweep need not redo it
  };
  struct Run;  // the part of one interval that this rank steps through

  bool participates(int level) const { return begin_[level] < end_[level]; }
  int slot_of_step(int level, int k) const { return partition_.owner(grid_.position(level, k)); }
  Node& node(int level, int k);
  void set(Node& n, State value);

  void post(int level, int kind, int to_slot, const State& value);
  TransferPtr expect(int level, int kind, int from_slot, State& into);
  void finish(TransferPtr transfer);
  void evaluate(std::vector<Evaluation>& batch, int level, Visit visit);
  void need_fine_steps(const std::vector<Node*>& nodes, const std::vector<int>& positions, int level, Visit visit);

  struct Relaxation {
    bool ends;           // return what arrives at the end of each interval
    bool last_interval;  // the last interval too, which serves only the last sweep and the way up
  };

  State exact(State initial);
  void post_chain_receive();
  void coarsest_sweep(Visit visit);
  std::vector<State> coarse_step(int level, const std::vector<int>& ks, Visit visit);
  double down(int level, bool norms);
  std::vector<State> relax(int level, Visit visit, Relaxation what);
  void advance(std::vector<Run>& runs, int level, Visit visit);
  std::vector<State> fine_step(const std::vector<Run*>& runs, const std::vector<int>& ks, Visit visit, bool first);
  void c_relax(int level, std::vector<State> ends);
  std::vector<State> c_values() const;
  void observe(const std::vector<State>& ends);
  double squared_residual(const std::vector<State>& values, const std::vector<State>& ends);

  const Grid grid_;
  const Partition partition_;
  const std::vector<int> ranks_;
  const std::shared_ptr<Transport> transport_;
  const std::unique_ptr<CoarseOperator> coarse_;
  const SolverOptions options_;
  int slot_ = 0;
  std::vector<int> begin_, end_;              // [level] own steps
  std::vector<std::vector<int>> node_index_;  // [level][point] -> point of level 1

  // Of the solve under way.
  Propagator* propagator_ = nullptr;
  std::vector<Node> nodes_;            // own points of level 1
  std::vector<Node> starts_;           // first fine steps of own intervals in the last sweep, where learnt from
  std::vector<std::vector<State>> g_;  // [level][own step]: right-hand side at the end of the step, null for zero
  TransferPtr chain_receive_;
  State chain_value_, final_value_;
  const char* operation_ = "idle";
  int level_ = 0, position_ = 0;
  double waited_ = 0;
};

}  // namespace mlpint
