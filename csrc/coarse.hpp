// A coarse operator says what one step of a coarse level does in place of the fine steps it spans.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "propagator.hpp"

namespace mlpint {

class CoarseOperator {
 public:
  virtual ~CoarseOperator() = default;
  // Returns whether `step` needs the fine step taken from u, v = Phi_0(u). That is evaluated once and reused by the
  // fine sweep.
  virtual bool uses_fine_step() const = 0;
  // Returns whether the operator has parameters to be learnt from the fine sweeps.
  virtual bool learnt() const { return false; }
  // Returns whether a step evaluates all fine steps that it spans, so that they have to be on one rank.
  virtual bool spans_fine_steps() const { return false; }
  virtual State step(Propagator&, const CoarseStep&, const State& u, const State& v) const = 0;
};

// The first fine step is stretched over the interval: u + length (Phi_0(u) - u). See arXiv 2601.09026.
class Injection final : public CoarseOperator {
 public:
  bool uses_fine_step() const override { return true; }
  State step(Propagator& p, const CoarseStep& s, const State& u, const State& v) const override {
    return s.length == 1 ? v : p.extrapolate(u, v, s.length);
  }
};

// Nothing moves: the coarse sweep only carries corrections along. See arXiv 2501.17086, 2605.17842.
class Identity final : public CoarseOperator {
 public:
  bool uses_fine_step() const override { return false; }
  State step(Propagator&, const CoarseStep&, const State& u, const State&) const override { return u; }
};

// The step is u + W (Phi_0(u) - u) + b with W a number (scaled) or a matrix (fitted), which the propagator fits for
// each interval to its fine steps.
class Learnt final : public CoarseOperator {
 public:
  bool uses_fine_step() const override { return true; }
  bool learnt() const override { return true; }
  State step(Propagator& p, const CoarseStep& s, const State& u, const State& v) const override {
    return s.length == 1 ? v : p.learnt_step(s, u, v);
  }
};

// All fine steps are taken from the same point and added up: u + sum_q (Phi_q(u) - u). In the adjoint each is the
// product with the layer at its own fine state. That costs what the fine steps cost, but they do not wait for each
// other.
class Sum final : public CoarseOperator {
 public:
  bool uses_fine_step() const override { return true; }
  bool spans_fine_steps() const override { return true; }
  State step(Propagator& p, const CoarseStep& s, const State& u, const State& v) const override {
    std::vector<Evaluation> others;
    for (int q = 1; q < s.length; ++q) others.push_back({s.position + q, u, nullptr});
    if (others.empty()) return v;
    p.evaluate(others, s.level, Sweep::intermediate, s.slice);
    std::vector<State> outputs;
    for (const Evaluation& e : others) outputs.push_back(e.output);
    return p.axpy(1.0, p.increments(u, outputs), v);
  }
};

inline std::unique_ptr<CoarseOperator> make_coarse_operator(const std::string& name) {
  if (name == "injection") return std::make_unique<Injection>();
  if (name == "identity") return std::make_unique<Identity>();
  if (name == "scaled" || name == "fitted") return std::make_unique<Learnt>();
  if (name == "sum") return std::make_unique<Sum>();
  throw std::invalid_argument("unknown coarse operator '" + name +
                              "'; there are injection, scaled, fitted, sum, identity");
}

}  // namespace mlpint
