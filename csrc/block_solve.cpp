// This file has the phases of a solve in the block layout: those of the V-cycle, from relaxation and restriction over
// the coarsest level to prolongation, the sweeps over all fine steps, residuals, and learning.
#include "block_solve.hpp"

#include <stdexcept>

#include "transport/tags.hpp"

namespace mlpint {

BlockSolve::BlockSolve(const BlockLayout& layout, const CoarseOperator& coarse, Transport& transport,
                       Propagator& propagator, const SolverOptions& options, Where& where)
    : MgritSolve(layout.grid(), transport, propagator, options, where), layout_(layout), coarse_(coarse) {}

// One rank after the other takes its steps, with one slice of the batch after the other.
State BlockSolve::exact_sweep(State initial) {
  where_.operation = "exact sweep";
  where_.level = 0;
  if (!layout_.owns_steps(0)) return nullptr;
  const int begin = layout_.begin(0), end = layout_.end(0);
  if (begin == 0 && !initial) throw std::logic_error("the rank that owns point 0 was given no initial value");
  std::vector<State> finals;
  for (int i = 0; i < slices_; ++i) {
    State value =
        begin > 0 ? receive(tag::chain, 0, layout_.rank_of_step(0, begin - 1), slice_index(i)) : slice(initial, i);
    for (int k = begin; k < end; ++k) {
      std::vector<Evaluation> one{{k, std::move(value), nullptr}};
      evaluate(one, 0, Sweep::final_fine, slice_index(i));
      value = std::move(one[0].output);
    }
    if (end < grid_.steps(0))
      post(tag::chain, 0, layout_.rank_of_step(0, end), value);
    else
      finals.push_back(std::move(value));
  }
  return finals.empty() ? nullptr : join(std::move(finals));
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
  if (!layout_.owns_steps(l) || layout_.begin(l) == 0) return;
  coarsest_values_.resize(slices_);
  for (int i = 0; i < slices_; ++i)
    coarsest_arrivals_.push_back(
        expect(tag::chain, l, layout_.rank_of_step(l, layout_.begin(l) - 1), coarsest_values_[i], slice_index(i)));
}

// This is serial over the ranks, but for the slices of the batch. The step onto the last point is left out: nothing is
// computed from it.
void BlockSolve::coarsest_solve(Sweep sweep) {
  if (coarsest_arrivals_.empty()) expect_coarsest();
  where_.operation = "coarsest sweep";
  const int l = where_.level = grid_.levels() - 1;
  const int begin = layout_.begin(l), end = layout_.end(l), steps = grid_.steps(l);
  if (begin == end) return;
  const bool is_done = finishes_on_chain(sweep);
  struct Slices {
    std::vector<State> values, steps;
  };
  std::vector<Slices> own(end - begin);
  for (int i = 0; i < slices_; ++i) {
    State value;
    if (begin > 0) {
      finish(std::move(coarsest_arrivals_[i]));
      value = std::move(coarsest_values_[i]);
    } else {
      value = slice(node(l, 0).value, i);
    }
    for (int k = begin; k < end; ++k) {
      own[k - begin].values.push_back(value);
      const Sweep visit = is_done ? Sweep::final_fine : sweep;
      State step;
      if (k + 1 < steps) {
        value = chain_step(k, value, step, visit, i);
      } else {
        // The last fine sweep's work, for the time until the next slice comes.
        if (slices_ == 1 || sweep == Sweep::intermediate || !coarse_.uses_fine_step()) break;
        step = chain_fine_step(k, value, visit, i);
      }
      own[k - begin].steps.push_back(std::move(step));
    }
    if (end < steps) post(tag::chain, l, layout_.rank_of_step(l, end), value);
  }
  coarsest_arrivals_.clear();
  for (int k = begin; k < end; ++k) {
    Node& n = node(l, k);
    // The value of the first point stays, with what was evaluated at it.
    if (k > 0) set(n, join(std::move(own[k - begin].values)));
    if (own[k - begin].steps.empty() || !coarse_.uses_fine_step()) continue;
    n.step = join(std::move(own[k - begin].steps));
    n.is_final = n.is_final || sweep != Sweep::intermediate;
    n.is_done = is_done;
  }
}

// Returns whether this rank takes its last steps of the coarsest level as steps of the final fine sweep, which spares a
// second visit but sends each slice on later, by one unit of work for each of its steps. The last rank holds nobody up.
// With c units a slice and rank, rank s of P is through with everything but the work that is the same for all after
// s c + m c units if it comes back later, and if ranks s0, s0 + 1, ... do not, after s0 c + 2 (s - s0) c: the longest
// of these are as short as can be at s0 = P - (m + 1) / 2.
bool BlockSolve::finishes_on_chain(Sweep sweep) {
  const int first = (2 * layout_.chain_length() - slices_) / 2;
  return sweep == Sweep::final_coarse && layout_.chain_place() >= first && propagator_.finishes_on_chain();
}

// Takes the fine step that serves step k of the coarsest level, with slice i of the batch.
State BlockSolve::chain_fine_step(int k, const State& value, Sweep sweep, int i) {
  const int l = grid_.levels() - 1;
  const Node& n = node(l, k);
  if (k == 0 && n.step && (n.is_final || sweep == Sweep::intermediate)) return slice(n.step, i);
  std::vector<Evaluation> one{{grid_.position(l, k), value, nullptr}};
  evaluate(one, l, sweep, slice_index(i));
  return std::move(one[0].output);
}

// Takes step k of the coarsest level with slice i of the batch, right-hand side included, and sets `step` to the fine
// step that serves it.
State BlockSolve::chain_step(int k, const State& value, State& step, Sweep sweep, int i) {
  const int l = grid_.levels() - 1, position = grid_.position(l, k);
  if (coarse_.uses_fine_step()) step = chain_fine_step(k, value, sweep, i);
  State next = coarse_.step(propagator_, {l, position, grid_.length(l, k), slice_index(i)}, value, step);
  const State& g = g_[l][k - layout_.begin(l)];
  return g ? propagator_.axpy(1.0, slice(g, i), next) : next;
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
