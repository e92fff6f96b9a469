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
  void share(const std::vector<int>& ranks, State& value);
  State reduce_increments(const Interval& interval, State own);
  State own_increments(const Interval& i, Values& v, Sweep sweep);
  void fine_sweep(Sweep sweep);
  double squared_residual();

  const CyclicLayout& layout_;
  State initial_;
  std::vector<Values> values_;  // [interval]
};

// --- exchanges -------------------------------------------------------------------------------------------------------

// Hands the value of ranks[0] to the others.
void CyclicSolve::share(const std::vector<int>& ranks, State& value) {
  if (contains(ranks, layout_.rank) && ranks[0] != layout_.rank) value = propagator_.empty();
  broadcast(transport_, ranks, tag::of_level(tag::chain, 0), value, clock_);
}

// Adds the members' increments up on the first of them, and returns null on other ranks.
State CyclicSolve::reduce_increments(const Interval& interval, State own) {
  return reduce(
      transport_, interval.members, tag::of_level(tag::interval_end, 0), std::move(own),
      [this] { return propagator_.empty(); },
      [this](const State& arrived, const State& sum) { return propagator_.axpy(1.0, arrived, sum); }, clock_);
}

// --- phases ----------------------------------------------------------------------------------------------------------

State CyclicSolve::exact_sweep(State value) {
  where_.operation = "exact sweep";
  for (int p = 0; p < grid_.steps(0); ++p) {
    if (!is_own(p)) continue;
    if (p > 0 && !is_own(p - 1)) value = receive(tag::f_point, 0, layout_.owners[p - 1]);
    if (!value) throw std::logic_error("the rank that owns point 0 was given no initial value");
    std::vector<Evaluation> one{{p, std::move(value), nullptr}};
    evaluate(one, 0, Sweep::final_fine);
    value = std::move(one[0].output);
    if (p + 1 == grid_.steps(0)) return value;
    if (!is_own(p + 1)) post(tag::f_point, 0, layout_.owners[p + 1], value);
  }
  return nullptr;
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

// The last interval takes no coarse step: nothing is computed from where it would arrive.
void CyclicSolve::coarsest_solve(Sweep sweep) {
  where_.operation = "coarsest sweep";
  const std::vector<Interval>& intervals = layout_.intervals;
  State u = initial_;
  share(intervals[0].members, u);
  for (std::size_t K = 0; K < intervals.size(); ++K) {
    const Interval& i = intervals[K];
    Values& v = values_[K];
    // A value that stays (that of the first point) keeps what was evaluated at it.
    if (i.is_member() && (K > 0 || !v.start)) {
      v.start = u;
      v.step = nullptr;
      v.is_final = false;
    }
    if (K + 1 == intervals.size()) break;
    State total;
    if (i.is_member()) total = reduce_increments(i, own_increments(i, v, sweep));
    State next;
    if (i.owns_first) next = propagator_.axpy(1.0, total, v.start);
    std::vector<int> ranks = i.members;
    for (int rank : intervals[K + 1].members) append_new(ranks, rank);
    share(ranks, next);
    if (i.owns_last) v.next = next;
    u = std::move(next);
  }
}

// Returns what this rank adds to u_K: its layers' increments at u_K, and tau where the interval ends.
State CyclicSolve::own_increments(const Interval& i, Values& v, Sweep sweep) {
  std::vector<Evaluation> others;
  for (int p : i.own) {
    if (p != i.begin) {
      others.push_back({p, v.start, nullptr});
    } else if (!v.step || (sweep == Sweep::final_coarse && !v.is_final)) {
      std::vector<Evaluation> first{{p, v.start, nullptr}};
      evaluate(first, 1, sweep);
      v.step = std::move(first[0].output);
      v.is_final = sweep == Sweep::final_coarse;
    }
  }
  evaluate(others, 1, Sweep::intermediate);
  State own;
  auto add = [&](State increment) { own = own ? propagator_.axpy(1.0, increment, own) : std::move(increment); };
  if (i.owns_first) add(propagator_.axpy(-1.0, v.start, v.step));
  for (const Evaluation& e : others) add(propagator_.axpy(-1.0, v.start, e.output));
  if (i.owns_last && v.tau) add(v.tau);
  return own;
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
