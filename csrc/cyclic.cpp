#include "cyclic.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "transport/collectives.hpp"
#include "transport/tags.hpp"

namespace mlpint {

namespace {

bool contains(const std::vector<int>& ranks, int rank) {
  return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

void append_new(std::vector<int>& ranks, int rank) {
  if (!contains(ranks, rank)) ranks.push_back(rank);
}

}  // namespace

CyclicLayout::CyclicLayout(Grid grid_, std::vector<int> owners_, int rank_)
    : grid(std::move(grid_)), owners(std::move(owners_)), rank(rank_) {
  if (static_cast<int>(owners.size()) != grid.steps(0))
    throw std::invalid_argument("one owner for each of the " + std::to_string(grid.steps(0)) + " steps, got " +
                                std::to_string(owners.size()));
  if (grid.levels() != 2) throw std::invalid_argument("the cyclic layout has two levels");
  for (int K = 0; K < grid.steps(1); ++K) {
    Interval i{};
    i.begin = grid.position(1, K);
    i.end = grid.position(1, K + 1);
    for (int p = i.begin; p < i.end; ++p) {
      append_new(i.members, owners[p]);
      if (owners[p] == rank) i.own.push_back(p);
    }
    i.owns_first = owners[i.begin] == rank;
    i.owns_last = owners[i.end - 1] == rank;
    intervals.push_back(std::move(i));
  }
}

namespace {

using Interval = CyclicLayout::Interval;

// CyclicSolve is one solve in the cyclic layout.
class CyclicSolve final : public MgritSolve {
 public:
  CyclicSolve(const CyclicLayout& layout, Transport& transport, Propagator& propagator, const SolverOptions& options,
              Where& where)
      : MgritSolve(layout.grid, transport, propagator, options, where), layout_(layout) {}

 private:
  // What is known at an interval.
  struct Values {
    State start;            // u_K, on members
    State step;             // the first fine step from it, on its owner
    bool is_final = false;  // whether that was evaluated in a final sweep
    State next;             // u_{K + 1} as the coarse sweep left it, on the owner of the last step
    State tau;              // right-hand side, there
    State arrived;          // what the fine sweep arrives at, there
  };

  State exact_sweep(State initial) override;
  void begin(State initial) override;
  double relax_and_restrict(int level, bool norms) override;
  void coarsest_solve(Sweep sweep) override;
  void prolong(int, Sweep) override {}  // two levels leave none in between
  State final_sweep(StoppingRule& rule) override;

  bool is_own(int position) const { return layout_.owners[position] == layout_.rank; }
  void share(const std::vector<int>& ranks, State& value, int i);
  State reduce_increments(const Interval& interval, State own, int i);
  State own_increments(const Interval& interval, const Values& v, const State& start, State& step, Sweep sweep, int i);
  void fine_sweep(Sweep sweep);
  double squared_residual();

  const CyclicLayout& layout_;
  State initial_;
  std::vector<Values> values_;  // [interval]
};

// --- exchanges -------------------------------------------------------------------------------------------------------

// Hands the value of ranks[0], of slice i of the batch, to the others.
void CyclicSolve::share(const std::vector<int>& ranks, State& value, int i) {
  if (contains(ranks, layout_.rank) && ranks[0] != layout_.rank) value = propagator_.empty(slice_index(i));
  broadcast(transport_, ranks, tag::of_level(tag::chain, 0), value, clock_);
}

// Adds the members' increments up on the first of them, and returns null on other ranks.
State CyclicSolve::reduce_increments(const Interval& interval, State own, int i) {
  return reduce(
      transport_, interval.members, tag::of_level(tag::interval_end, 0), std::move(own),
      [this, i] { return propagator_.empty(slice_index(i)); },
      [this](const State& arrived, const State& sum) { return propagator_.axpy(1.0, arrived, sum); }, clock_);
}

// --- phases ----------------------------------------------------------------------------------------------------------

State CyclicSolve::exact_sweep(State initial) {
  where_.operation = "exact sweep";
  std::vector<State> finals;
  for (int i = 0; i < slices_; ++i) {
    State value = slice(initial, i);
    for (int p = 0; p < grid_.steps(0); ++p) {
      if (!is_own(p)) continue;
      if (p > 0 && !is_own(p - 1)) value = receive(tag::f_point, 0, layout_.owners[p - 1], slice_index(i));
      if (!value) throw std::logic_error("the rank that owns point 0 was given no initial value");
      std::vector<Evaluation> one{{p, std::move(value), nullptr}};
      evaluate(one, 0, Sweep::final_fine, slice_index(i));
      value = std::move(one[0].output);
      if (p + 1 == grid_.steps(0))
        finals.push_back(std::move(value));
      else if (!is_own(p + 1))
        post(tag::f_point, 0, layout_.owners[p + 1], value);
    }
  }
  return finals.empty() ? nullptr : join(std::move(finals));
}

void CyclicSolve::begin(State initial) {
  initial_ = std::move(initial);
  values_.resize(layout_.intervals.size());
}

double CyclicSolve::relax_and_restrict(int, bool norms) {
  where_.operation = "F-relaxation";
  fine_sweep(Sweep::intermediate);
  const double square = norms ? squared_residual() : 0.0;
  for (Values& v : values_)
    if (v.arrived) {
      // tau = arrived - Phi_c(u_K), and u_{K + 1} = Phi_c(u_K) + the tau before.
      State change = propagator_.axpy(-1.0, v.next, v.arrived);
      v.tau = v.tau ? propagator_.axpy(1.0, v.tau, change) : change;
      v.arrived = nullptr;
    }
  return square;
}

// The last interval takes no coarse step: nothing is computed from where it would arrive. All ranks go through slices
// and intervals in the same order, so that nobody waits for one that waits for him.
void CyclicSolve::coarsest_solve(Sweep sweep) {
  where_.operation = "coarsest sweep";
  const std::vector<Interval>& intervals = layout_.intervals;
  struct Slices {
    std::vector<State> starts, steps, nexts;
  };
  std::vector<Slices> own(intervals.size());
  for (int i = 0; i < slices_; ++i) {
    State u = slice(initial_, i);
    share(intervals[0].members, u, i);
    for (std::size_t K = 0; K < intervals.size(); ++K) {
      const Interval& interval = intervals[K];
      if (interval.is_member()) own[K].starts.push_back(u);
      if (K + 1 == intervals.size()) break;
      State total, step, next;
      if (interval.is_member())
        total = reduce_increments(interval, own_increments(interval, values_[K], u, step, sweep, i), i);
      if (step) own[K].steps.push_back(std::move(step));
      if (interval.owns_first) next = propagator_.axpy(1.0, total, u);
      std::vector<int> ranks = interval.members;
      for (int rank : intervals[K + 1].members) append_new(ranks, rank);
      share(ranks, next, i);
      if (interval.owns_last) own[K].nexts.push_back(next);
      u = std::move(next);
    }
  }
  for (std::size_t K = 0; K < intervals.size(); ++K) {
    Values& v = values_[K];
    if (own[K].starts.empty()) continue;
    // A value that stays (that of the first point) keeps what was evaluated at it.
    if (K > 0 || !v.start) {
      v.start = join(std::move(own[K].starts));
      v.step = nullptr;
      v.is_final = false;
    }
    if (!own[K].steps.empty()) {
      v.step = join(std::move(own[K].steps));
      v.is_final = v.is_final || sweep == Sweep::final_coarse;
    }
    if (!own[K].nexts.empty()) v.next = join(std::move(own[K].nexts));
  }
}

// Returns what this rank adds to slice i of u_K: its layers' increments at u_K, and tau where the interval ends. Sets
// `step` where the first of the layers is this rank's.
State CyclicSolve::own_increments(const Interval& interval, const Values& v, const State& start, State& step,
                                  Sweep sweep, int i) {
  std::vector<Evaluation> others;
  for (int p : interval.own) {
    if (p != interval.begin) {
      others.push_back({p, start, nullptr});
    } else if (interval.begin == 0 && v.step && (v.is_final || sweep != Sweep::final_coarse)) {
      step = slice(v.step, i);
    } else {
      std::vector<Evaluation> first{{p, start, nullptr}};
      evaluate(first, 1, sweep, slice_index(i));
      step = std::move(first[0].output);
    }
  }
  evaluate(others, 1, Sweep::intermediate, slice_index(i));
  std::vector<State> outputs;
  if (step) outputs.push_back(step);
  for (const Evaluation& e : others) outputs.push_back(e.output);
  State own = outputs.empty() ? State() : propagator_.increments(start, outputs);
  if (!interval.owns_last || !v.tau) return own;
  State tau = slice(v.tau, i);
  return own ? propagator_.axpy(1.0, tau, own) : tau;
}

State CyclicSolve::final_sweep(StoppingRule& rule) {
  where_.operation = "last sweep";
  fine_sweep(Sweep::final_fine);
  if (rule.needs_norms() && !rule.met()) rule.record(squared_residual());
  return std::move(values_.back().arrived);
}

// The sweep is a pipeline: interval after interval, each rank takes its steps as the state comes by. Only the final
// sweep takes the last interval too.
void CyclicSolve::fine_sweep(Sweep sweep) {
  const bool is_final = sweep == Sweep::final_fine;
  const std::size_t count = values_.size() - (is_final ? 0 : 1);
  for (std::size_t K = 0; K < count; ++K) {
    const Interval& i = layout_.intervals[K];
    Values& v = values_[K];
    State value;
    for (int p : i.own) {
      std::vector<Evaluation> one{{p, nullptr, nullptr}};
      if (p == i.begin) {
        one[0].input = v.start;
        if (v.step && (v.is_final || !is_final)) one[0].output = v.step;
      } else {
        one[0].input = is_own(p - 1) ? std::move(value) : receive(tag::f_point, 0, layout_.owners[p - 1]);
      }
      if (is_final || !one[0].output) evaluate(one, 0, sweep);
      value = std::move(one[0].output);
      if (p + 1 < i.end && !is_own(p + 1)) post(tag::f_point, 0, layout_.owners[p + 1], value);
    }
    if (is_final && i.is_member()) v.start = v.step = nullptr;
    if (i.owns_last) v.arrived = std::move(value);
  }
}

// Returns this rank's part of the squared residual norm, that of the intervals whose last steps it owns.
double CyclicSolve::squared_residual() {
  double square = 0;
  for (std::size_t K = 0; K + 1 < values_.size(); ++K)
    if (layout_.intervals[K].owns_last)
      square += propagator_.squared_norm(propagator_.axpy(-1.0, values_[K].next, values_[K].arrived));
  return square;
}

}  // namespace

CyclicSolver::CyclicSolver(Grid grid, std::vector<int> owners, std::shared_ptr<Transport> transport,
                           SolverOptions options)
    : transport_(std::move(transport)),
      layout_(std::move(grid), std::move(owners), transport_->rank()),
      options_(options) {}

SolveResult CyclicSolver::solve(Propagator& propagator, State initial, int iterations) {
  return CyclicSolve(layout_, *transport_, propagator, options_, where_).run(std::move(initial), iterations);
}

}  // namespace mlpint
