// BlockSolve is one MGRIT solve in the block layout.
//
// A fine step evaluated at a C-point serves the coarse step there, the tau correction of the next cycle and the first
// step of the following relaxation. The coarse right-hand side at C-point K + 1,  g_c = g + Phi(u_last F) - Phi_c(u_K),
// needs nothing but what the rank that owns interval K has. Ranks are never synchronised unless a residual norm is
// asked for.
#pragma once

#include <vector>

#include "block_layout.hpp"
#include "coarse.hpp"
#include "mgrit.hpp"

namespace mlpint {

class BlockSolve final : public MgritSolve {
 public:
  BlockSolve(const BlockLayout& layout, const CoarseOperator& coarse, Transport& transport, Propagator& propagator,
             const SolverOptions& options, Where& where);

 private:
  // What is known at a point of level 1.
  struct Node {
    State value;
    State step;             // Phi_0(value), where it has been evaluated
    bool is_final = false;  // whether that was in a final sweep, so that the final fine sweep need not redo it
    bool is_done = false;   // whether nothing is owed at it any more
  };
  // What a coarse operator learns from: the first fine step of an interval, as the final sweep took it.
  struct FirstStep {
    State from, to;
  };
  // The part of one interval that this rank steps through.
  struct Segment {
    int interval;       // K: the interval begins at C-point K of its level
    int begin, end;     // own steps are begin .. end - 1
    bool from_c_point;  // whether the first of them leaves the interval's C-point
    bool to_c_point;    // whether the last of them arrives at the next C-point
    State value;        // at the point reached so far
  };
  struct Relaxation {
    bool returns_ends;   // whether what arrives at the end of each interval is wanted
    bool last_interval;  // whether the last interval is relaxed too; it serves only the final sweep and prolongation
  };

  // The phases are in block_solve.cpp.
  State exact_sweep(State initial) override;
  void begin(State initial) override;
  double relax_and_restrict(int level, bool norms) override;
  void coarsest_solve(Sweep sweep) override;
  void prolong(int level, Sweep sweep) override;
  State final_sweep(StoppingRule& rule) override;
  void restrict(int level, const std::vector<State>& ends);
  void expect_coarsest();
  bool finishes_on_chain(Sweep sweep);
  State chain_fine_step(int k, const State& value, Sweep sweep, int i);
  State chain_step(int k, const State& value, State& step, Sweep sweep, int i);
  std::vector<State> c_values() const;
  double squared_residual(const std::vector<State>& values, const std::vector<State>& ends);
  void observe(const std::vector<State>& ends);

  // Stepping through intervals is in relaxation.cpp.
  std::vector<State> relax(int level, Sweep sweep, Relaxation what);
  void advance(std::vector<Segment>& segments, int level, Sweep sweep);
  std::vector<State> coarse_step(int level, const std::vector<int>& ks, Sweep sweep);
  std::vector<State> fine_step(const std::vector<Segment*>& segments, const std::vector<int>& ks, Sweep sweep,
                               bool first);
  void need_fine_steps(const std::vector<Node*>& nodes, const std::vector<int>& positions, int level, Sweep sweep);
  void c_relax(int level, std::vector<State> ends);

  Node& node(int level, int k) { return nodes_[layout_.node_index(level, k)]; }
  void set(Node& n, State value) { n = Node{std::move(value), nullptr, false, false}; }

  const BlockLayout& layout_;
  const CoarseOperator& coarse_;
  std::vector<Node> nodes_;             // own points of level 1
  std::vector<FirstStep> first_steps_;  // [own interval]; empty unless the coarse operator learns from this solve
  std::vector<std::vector<State>> g_;   // [level][own step]: right-hand side at the end of the step, null for zero
  // The value that this rank's part of the coarsest level begins with, slice by slice, and its arrival.
  std::vector<TransferPtr> coarsest_arrivals_;
  std::vector<State> coarsest_values_;
  State final_value_;
};

}  // namespace mlpint
