// This file has the phases of a solve in the block layout: those of the V-cycle, from relaxation and restriction over
// the coarsest level to prolongation, the sweeps over all fine steps, residuals, and learning.
#include "block_solve.hpp"

#include <stdexcept>

#include "transport/tags.hpp"

namespace mlpint {

BlockSolve::BlockSolve(const BlockLayout& layout, const CoarseOperator& coarse, Transport& transport,
                       Propagator& propagator, const SolverOptions& options, Where& where)
    : MgritSolve(layout.grid(), transport, propagator, options, where), layout_(layout), coarse_(coarse) {}

// One rank after the other takes its steps.
State BlockSolve::exact_sweep(State value) {
  where_.operation = "exact sweep";
  where_.level = 0;
  if (!layout_.owns_steps(0)) return nullptr;
  const int begin = layout_.begin(0), end = layout_.end(0);
  if (begin > 0) value = receive(tag::chain, 0, layout_.rank_of_step(0, begin - 1));
  if (!value) throw std::logic_error("the rank that owns point 0 was given no initial value");
  for (int k = begin; k < end; ++k) {
    std::vector<Evaluation> one{{k, std::move(value), nullptr}};
    evaluate(one, 0, Sweep::final_fine);
    value = std::move(one[0].output);
  }
  if (end == grid_.steps(0)) return value;
  post(tag::chain, 0, layout_.rank_of_step(0, end), value);
  return nullptr;
}

void BlockSolve::begin(State initial) {
  nodes_.resize(layout_.end(1) - layout_.begin(1));
  g_.resize(grid_.levels());
  for (int l = 1; l < grid_.levels(); ++l) g_[l].resize(layout_.end(l) - layout_.begin(l));
  if (!initial) return;
  if (nodes_.empty() || layout_.begin(1) != 0)
    throw std::logic_error("initial value given to a rank that lacks point 0");
  set(nodes_[0], std::move(initial));
}

double BlockSolve::relax_and_restrict(int l, bool norms) {
  // The coarsest level's receive is posted before the relaxation that the wait will be hidden behind, unless this cycle
  // may turn out not to be run.
  if (l == 0 && !options_.stops_early()) expect_coarsest();
  where_.operation = options_.fcf ? "FCF-relaxation" : "F-relaxation";
  const Relaxation what{/*returns_ends=*/true, /*last_interval=*/false};
  std::vector<State> ends = relax(l, Sweep::intermediate, what);
  const double square = norms ? squared_residual(c_values(), ends) : 0.0;
  if (options_.fcf) {
    c_relax(l, std::move(ends));
    ends = relax(l, Sweep::intermediate, what);
  }
  restrict(l, ends);
  return square;
}

// Forms the right-hand side of the next level (the tau correction) from where the intervals of this one end.
void BlockSolve::restrict(int l, const std::vector<State>& ends) {
  const int b = layout_.begin(l + 1), e = layout_.end(l + 1);
  for (int K = b; K < e && K + 1 < grid_.steps(l + 1); ++K) {
    const Node& n = node(l + 1, K);
    const State coarse =
        coarse_.step(propagator_, {l + 1, grid_.position(l + 1, K), grid_.length(l + 1, K)}, n.value, n.step);
    g_[l + 1][K - b] = propagator_.axpy(-1.0, coarse, ends[K - b]);
  }
}

void BlockSolve::expect_coarsest() {
  const int l = grid_.levels() - 1;
  if (layout_.owns_steps(l) && layout_.begin(l) > 0)
    coarsest_arrival_ = expect(tag::chain, l, layout_.rank_of_step(l, layout_.begin(l) - 1), coarsest_value_);
}

// This is serial over the ranks. The step onto the last point is left out: nothing is computed from it.
void BlockSolve::coarsest_solve(Sweep sweep) {
  if (!coarsest_arrival_) expect_coarsest();
  where_.operation = "coarsest sweep";
  const int l = where_.level = grid_.levels() - 1;
  const int begin = layout_.begin(l), end = layout_.end(l);
  if (coarsest_arrival_) {
    finish(std::move(coarsest_arrival_));
    set(node(l, begin), std::move(coarsest_value_));
  }
  for (int k = begin; k < end && k + 1 < grid_.steps(l); ++k) {
    State value = coarse_step(l, {k}, sweep)[0];
    if (k + 1 < end)
      set(node(l, k + 1), std::move(value));
    else
      post(tag::chain, l, layout_.rank_of_step(l, k + 1), value);
  }
}

// This relaxation from the corrected C-points is what XBraid calls F-interpolation.
void BlockSolve::prolong(int l, Sweep sweep) {
  where_.operation = "prolongation";
  relax(l, sweep, {/*returns_ends=*/false, /*last_interval=*/true});
}

State BlockSolve::final_sweep(StoppingRule& rule) {
  where_.operation = "last sweep";
  const bool learns = coarse_.learnt() && propagator_.learns();
  if (learns) first_steps_.resize(nodes_.size());
  const auto values = rule.needs_norms() ? c_values() : std::vector<State>{};  // the sweep takes them from the nodes
  const auto ends =
      relax(0, Sweep::final_fine, {/*returns_ends=*/rule.needs_norms() || learns, /*last_interval=*/true});
  if (rule.needs_norms() && !rule.met()) rule.record(squared_residual(values, ends));
  if (learns) observe(ends);
  return std::move(final_value_);
}

std::vector<State> BlockSolve::c_values() const {
  std::vector<State> values;
  for (const Node& n : nodes_) values.push_back(n.value);
  return values;
}

// Returns the square of the residual at the C-points where this rank's intervals end. The value at a C-point is its
// owner's, so neighbours exchange one state; at the last point there is no residual, since its value is what arrives
// there.
double BlockSolve::squared_residual(const std::vector<State>& values, const std::vector<State>& ends) {
  if (!layout_.owns_steps(1)) return 0.0;
  const int b = layout_.begin(1), e = layout_.end(1);
  if (b > 0) post(tag::c_point, 0, layout_.rank_of_step(1, b - 1), values.front());
  State next;
  if (e < grid_.steps(1)) next = receive(tag::c_point, 0, layout_.rank_of_step(1, e));
  double square = 0;
  for (int K = b; K < e && K + 1 < grid_.steps(1); ++K) {
    const State& at_end = K + 1 < e ? values[K + 1 - b] : next;
    square += propagator_.squared_norm(propagator_.axpy(-1.0, at_end, ends[K - b]));
  }
  return square;
}

// Shows the propagator what the coarse steps of level 1 should have arrived at.
void BlockSolve::observe(const std::vector<State>& ends) {
  where_.operation = "learning the coarse operator";
  const int b = layout_.begin(1);
  for (int K = b; K < layout_.end(1) && K + 1 < grid_.steps(1); ++K) {
    const FirstStep& first = first_steps_[K - b];
    if (grid_.length(1, K) > 1)
      propagator_.observe({1, grid_.position(1, K), grid_.length(1, K)}, first.from, first.to, ends[K - b]);
  }
}

}  // namespace mlpint
