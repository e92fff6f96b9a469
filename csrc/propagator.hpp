// A propagator knows what a step is. The solver decides which steps are taken, where and when; the propagator takes
// them.
#pragma once

#include <vector>

#include "state.hpp"

namespace mlpint {

// Sweep is the kind of sweep in which a fine step is evaluated; a propagator does no more work than that sweep needs.
enum class Sweep {
  // What the step arrives at is thrown away later.
  intermediate,
  // The step leaves from a value that will not change any more, on the critical path: only what it arrives at is wanted
  // at once.
  final_coarse,
  // The step leaves from a value that will not change any more, and everything that is still owed there (graph,
  // parameter gradients) is done now.
  final_fine,
};

struct Evaluation {
  int position;  // depth that the fine step leaves from, along the direction of the solve
  State input;
  State output;  // set already where an earlier sweep evaluated the step from the same input
};

// Stands for the whole batch where a slice of it can be named.
constexpr int whole_batch = -1;

// CoarseStep names a step of a coarse level.
struct CoarseStep {
  int level;
  int position;             // depth that its first fine step leaves from
  int length;               // number of fine steps that it spans
  int slice = whole_batch;  // which slice of the batch takes it
};

class Propagator {
 public:
  virtual ~Propagator() = default;
  // Evaluates independent fine steps, all at once, and sets every output. This is the hot call. The states are those of
  // one slice of the batch, or of the whole.
  virtual void evaluate(std::vector<Evaluation>& batch, int level, Sweep sweep, int slice = whole_batch) = 0;
  virtual State extrapolate(const State& u, const State& v, int length) = 0;        // returns u + length (v - u)
  virtual State axpy(double a, const State& x, const State& y) = 0;                 // returns a x + y
  virtual State increments(const State& u, const std::vector<State>& outputs) = 0;  // returns the sum of output - u
  virtual double squared_norm(const State& x) = 0;
  virtual State empty(int slice = whole_batch) = 0;  // returns memory that a state can be received into

  // What is serial over the ranks (the coarsest level, the exact sweep) may take the batch in slices, one sent on while
  // the next is worked on, since samples do not depend on each other. slices() says in how many.
  virtual int slices() = 0;
  virtual State slice(const State& x, int index) = 0;
  virtual State join(const std::vector<State>& slices) = 0;
  // Returns whether a step that is visited in the chain and again in the final fine sweep is dearer than one visit as a
  // step of the final fine sweep.
  virtual bool finishes_on_chain() = 0;

  // The last three serve coarse operators that are learnt; their parameters are the propagator's. learns() says whether
  // this solve is to be learnt from: then every coarse step this rank takes from a point of level 1 is observed once,
  // after the final sweep, with the fine step v taken from its start u and what the fine steps arrive at.
  virtual State learnt_step(const CoarseStep&, const State& u, const State& v) = 0;
  virtual bool learns() = 0;
  virtual void observe(const CoarseStep&, const State& u, const State& v, const State& end) = 0;
};

}  // namespace mlpint
