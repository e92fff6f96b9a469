// Coarse operators: what one step of a coarse level does in place of the fine steps it spans.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "propagator.hpp"

namespace mlpint {

struct CoarseStep {
  int level;
  int position;  // of its first fine step
  int length;    // fine steps spanned
};

class CoarseOperator {
 public:
  virtual ~CoarseOperator() = default;
  // Whether `step` needs the fine step taken from u, v = Phi_0(u). It is evaluated once and reused by the fine sweep.
  virtual bool uses_fine_step() const = 0;
  virtual State step(Propagator&, const CoarseStep&, const State& u, const State& v) const = 0;
};

// The first fine step stretched over the interval: u + length (Phi_0(u) - u). arXiv 2601.09026.
class Injection final : public CoarseOperator {
 public:
  bool uses_fine_step() const override { return true; }
  State step(Propagator& p, const CoarseStep& s, const State& u, const State& v) const override {
    return s.length == 1 ? v : p.extrapolate(u, v, s.length);
  }
};

// Nothing moves: the coarse sweep only carries corrections along. arXiv 2501.17086, 2605.17842.
class Identity final : public CoarseOperator {
 public:
  bool uses_fine_step() const override { return false; }
  State step(Propagator&, const CoarseStep&, const State& u, const State&) const override { return u; }
};

inline std::unique_ptr<CoarseOperator> make_coarse_operator(const std::string& name) {
  if (name == "injection") return std::make_unique<Injection>();
  if (name == "identity") return std::make_unique<Identity>();
  throw std::invalid_argument("unknown coarse operator '" + name + "'; there are injection, identity");
}

}  // namespace mlpint
