// MgritSolve is one solve of u_{n+1} = Phi_n(u_n), u_0 given, by MGRIT in its full-approximation (FAS) form. It serves
// the states forwards over the layers and the adjoint backwards. See arXiv 2601.09026 and Falgout et al., SISC 36
// (2014), C635.
//
// Iteration 1 is the coarse solve alone, from the initial value; each further iteration is one V-cycle; the solve ends
// with one sweep over the fine steps of every interval from its C-point. With zero iterations it is the exact serial
// sweep.
//
// Coarse points coincide with fine ones, so the coarse-grid correction is an assignment: what a coarse level computes
// is the new value of the C-points, and prolongation is the relaxation that carries it on to the F-points.
//
// An object holds what belongs to one solve and ends with it, also when an exception ends it. The layouts of the layers
// (block, cyclic) say how each phase is spread over the ranks.
#pragma once

#include <vector>

#include "grid.hpp"
#include "propagator.hpp"
#include "stopping.hpp"
#include "transport/transport.hpp"
#include "transport/wait_clock.hpp"
#include "where.hpp"

namespace mlpint {

struct SolverOptions {
  bool fcf = false;        // whether relaxation is FCF- instead of F-relaxation
  double tolerance = 0.0;  // iterations stop once the residual norm is at most this times that of the initial value
  bool norms = false;      // whether residual norms are reported, which costs an all-reduce for each

  bool stops_early() const { return tolerance > 0; }
};

struct SolveResult {
  State final_value;                   // value of the last point, on the rank that owns the last step; null elsewhere
  int iterations = 0;                  // number that was done
  std::vector<double> residual_norms;  // after iteration 1, 2, ... where they were asked for
  double waited = 0;                   // seconds that this rank waited for others
  std::vector<Wait> waits;             // each of them, where they are noted
  std::vector<Sent> sent;              // messages, likewise
};

class MgritSolve {
 public:
  MgritSolve(const Grid& grid, Transport& transport, Propagator& propagator, const SolverOptions& options,
             Where& where);
  virtual ~MgritSolve() = default;

  // `initial` is the value of point 0 on the rank that owns it, and null elsewhere. This is called once.
  SolveResult run(State initial, int iterations);

 protected:
  // Takes all fine steps one after another and returns the last value on the rank that owns the last step.
  virtual State exact_sweep(State initial) = 0;
  // Takes up the initial value before the first iteration.
  virtual void begin(State initial) = 0;
  // Relaxes a level and forms the right-hand side of the next one (the tau correction). Returns, if norms are asked
  // for, this rank's part of the squared residual norm before the relaxation changed C-points.
  virtual double relax_and_restrict(int level, bool norms) = 0;
  // Solves the coarsest level exactly, which gives its C-points their new values.
  virtual void coarsest_solve(Sweep sweep) = 0;
  // Brings new values from the C-points of a level between the finest and the coarsest to its F-points.
  virtual void prolong(int level, Sweep sweep) = 0;
  // Takes all fine steps from the C-points, with everything owed at them, and records the residual norm unless the rule
  // is met already. Returns the last value on the rank that owns the last step.
  virtual State final_sweep(StoppingRule& rule) = 0;

  // Every phase is made of these parts. Kinds of messages are those of tags.hpp.
  void evaluate(std::vector<Evaluation>& batch, int level, Sweep sweep, int slice = whole_batch);
  void post(int kind, int level, int to, const State& value);
  // Begins to receive, and sets `into` to the memory that the value arrives in.
  TransferPtr expect(int kind, int level, int from, State& into, int slice = whole_batch);
  void finish(TransferPtr transfer);
  State receive(int kind, int level, int from, int slice = whole_batch);
  // What the slices of a chain are made of. Undivided, the batch is its own only slice.
  int slice_index(int i) const { return slices_ > 1 ? i : whole_batch; }
  State slice(const State& x, int i) { return x && slices_ > 1 ? propagator_.slice(x, i) : x; }
  State join(std::vector<State> parts) { return slices_ > 1 ? propagator_.join(parts) : std::move(parts[0]); }

  const Grid& grid_;
  Transport& transport_;
  Propagator& propagator_;
  const SolverOptions& options_;
  const int slices_;  // of the batch, in chains
  Where& where_;
  WaitClock clock_;
};

}  // namespace mlpint
