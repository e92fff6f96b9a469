// What a step is. The solver decides which steps are taken, where and when; the propagator takes them.
#pragma once

#include <vector>

#include "state.hpp"

namespace mlpint {

// Why a fine step is evaluated; a propagator does no more work than the visit asks for.
enum class Visit {
  relax,  // an intermediate value, thrown away later
  chain,  // at a value that will not change any more, on the critical path: only the value is wanted at once
  last,   // at a value that will not change any more: everything still owed (graph, parameter gradients) is done now
};

struct Evaluation {
  int position;  // of the fine step, along the direction of the solve
  State input;
  State output;  // set already where an earlier visit at the same input found it
};

// A step of a coarse level.
struct CoarseStep {
  int level;
  int position;  // of its first fine step
  int length;    // fine steps spanned
};

class Propagator {
 public:
  virtual ~Propagator() = default;
  // Independent fine steps, all at once: sets every output. This is the hot call.
  virtual void evaluate(std::vector<Evaluation>& batch, int level, Visit visit) = 0;
  virtual State extrapolate(const State& u, const State& v, int length) = 0;  // u + length (v - u)
  virtual State axpy(double a, const State& x, const State& y) = 0;           // a x + y
  virtual double squared_norm(const State& x) = 0;
  virtual State empty() = 0;  // memory for a state to be received

  // For coarse operators that are learnt; their parameters are the propagator's. learns() says whether this solve is to
  // be learnt from: then every coarse step this rank takes from a point of level 1 is observed once, after the last
  // sweep, with the fine step v taken from its start u and what the fine steps arrive at.
  virtual State learnt_step(const CoarseStep&, const State& u, const State& v) = 0;
  virtual bool learns() = 0;
  virtual void observe(const CoarseStep&, const State& u, const State& v, const State& end) = 0;
};

}  // namespace mlpint
