#include "cyclic.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "transport/collectives.hpp"
#include "transport/tags.hpp"

namespace mlpint {

namespace {

void append_new(std::vector<int>& ranks, int rank) {
  if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) ranks.push_back(rank);
}

}  // namespace

CyclicSolver::CyclicSolver(Grid grid, std::vector<int> owners, std::shared_ptr<Transport> transport,
                           SolverOptions options)
    : grid_(std::move(grid)),
      owners_(std::move(owners)),
      transport_(std::move(transport)),
      options_(options),
      rank_(transport_->rank()) {
  if (static_cast<int>(owners_.size()) != grid_.steps(0))
    throw std::invalid_argument("one owner for each of the " + std::to_string(grid_.steps(0)) + " steps, got " +
                                std::to_string(owners_.size()));
  if (grid_.levels() != 2) throw std::invalid_argument("the cyclic layout has two levels");
  for (int K = 0; K < grid_.steps(1); ++K) {
    Interval i{};
    i.begin = grid_.position(1, K);
    i.end = grid_.position(1, K + 1);
    for (int p = i.begin; p < i.end; ++p) {
      append_new(i.members, owner(p));
      if (owner(p) == rank_) i.mine.push_back(p);
    }
    i.member = !i.mine.empty();
    i.owns_first = owner(i.begin) == rank_;
    i.owns_last = owner(i.end - 1) == rank_;
    intervals_.push_back(std::move(i));
  }
}

// --- exchanges -------------------------------------------------------------------------------------------------------

void CyclicSolver::post(int tag, int to, const State& value) { transport_->post(to, tag::of_level(tag, 0), value); }

State CyclicSolver::receive(int tag, int from) {
  State into = propagator_->empty();
  const auto started = std::chrono::steady_clock::now();
  auto transfer = transport_->receive(from, tag::of_level(tag, 0), into);
  transport_->progress();
  transfer->wait(transport_->stall_limit);
  waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return into;
}

void CyclicSolver::evaluate(std::vector<Evaluation>& batch, int level, Visit visit) {
  if (batch.empty()) return;
  transport_->progress();
  level_ = level;
  position_ = batch.front().position;
  propagator_->evaluate(batch, level, visit);
}

// Hands the value of ranks[0] to the others along a binomial tree.
void CyclicSolver::share(const std::vector<int>& ranks, State& value) {
  const int size = static_cast<int>(ranks.size());
  const int me = static_cast<int>(std::find(ranks.begin(), ranks.end(), rank_) - ranks.begin());
  if (me == size) return;
  int bit = 1;
  for (; bit < size; bit <<= 1)
    if (me & bit) {
      value = receive(tag::chain, ranks[me - bit]);
      break;
    }
  for (bit >>= 1; bit > 0; bit >>= 1)
    if (me + bit < size) post(tag::chain, ranks[me + bit], value);
}

// Adds the members' increments up on the first of them, along the same tree; null elsewhere.
State CyclicSolver::reduce(const Interval& interval, State own) {
  const auto& ranks = interval.members;
  const int size = static_cast<int>(ranks.size());
  const int me = static_cast<int>(std::find(ranks.begin(), ranks.end(), rank_) - ranks.begin());
  for (int bit = 1; bit < size; bit <<= 1) {
    if (me & bit) {
      post(tag::interval_end, ranks[me - bit], own);
      return nullptr;
    }
    if (me + bit < size) own = propagator_->axpy(1.0, receive(tag::interval_end, ranks[me + bit]), own);
  }
  return own;
}

// --- the solve -------------------------------------------------------------------------------------------------------

SolveResult CyclicSolver::solve(Propagator& propagator, State initial, int iterations) {
  propagator_ = &propagator;
  waited_ = 0;
  SolveResult result;
  if (iterations <= 0) {
    result.final_value = exact(std::move(initial));
    result.waited = waited_;
    return result;
  }
  const bool stops_early = options_.tolerance > 0;
  const bool norms = options_.norms || stops_early;
  double limit = 0;
  if (stops_early)
    limit = options_.tolerance * std::sqrt(sum(*transport_, initial ? propagator.squared_norm(initial) : 0.0));
  auto record_norm = [&] { result.residual_norms.push_back(std::sqrt(sum(*transport_, squared_residual()))); };

  for (Interval& i : intervals_) i.start = i.step = i.next = i.tau = i.arrived = nullptr;
  initial_ = std::move(initial);
  for (int k = 1; k <= iterations; ++k) {
    if (k > 1) {
      operation_ = "F-relaxation";
      fine_sweep(Visit::relax, false);
      if (norms) record_norm();
      if (stops_early && result.residual_norms.back() <= limit) break;
      for (Interval& i : intervals_)
        if (i.owns_last && i.arrived) {
          // tau = arrived - Phi_c(u_K), and u_{K + 1} = Phi_c(u_K) + the tau before.
          State change = propagator.axpy(-1.0, i.next, i.arrived);
          i.tau = i.tau ? propagator.axpy(1.0, i.tau, change) : change;
          i.arrived = nullptr;
        }
    }
    operation_ = "coarsest sweep";
    coarse_sweep(k == iterations);
    result.iterations = k;
  }

  operation_ = "last sweep";
  const bool norm_known = stops_early && result.iterations < iterations;
  fine_sweep(Visit::last, true);
  if (norms && !norm_known) record_norm();
  if (intervals_.back().owns_last) result.final_value = std::move(intervals_.back().arrived);
  for (Interval& i : intervals_) i.start = i.step = i.next = i.tau = i.arrived = nullptr;
  initial_ = nullptr;
  result.waited = waited_;
  operation_ = "idle";
  return result;
}

State CyclicSolver::exact(State value) {
  operation_ = "exact sweep";
  for (int p = 0; p < grid_.steps(0); ++p) {
    if (owner(p) != rank_) continue;
    if (p > 0 && owner(p - 1) != rank_) value = receive(tag::f_point, owner(p - 1));
    if (!value) throw std::logic_error("the rank that owns point 0 was given no initial value");
    std::vector<Evaluation> one{{p, std::move(value), nullptr}};
    evaluate(one, 0, Visit::last);
    value = std::move(one[0].output);
    if (p + 1 == grid_.steps(0)) return value;
    if (owner(p + 1) != rank_) post(tag::f_point, owner(p + 1), value);
  }
  return nullptr;
}

// The last interval takes no coarse step: nothing is computed from where it would arrive.
void CyclicSolver::coarse_sweep(bool last) {
  State u = initial_;
  share(intervals_[0].members, u);
  for (std::size_t K = 0; K < intervals_.size(); ++K) {
    Interval& i = intervals_[K];
    if (i.member) {
      // A value that stays (that of the first point) keeps what was evaluated at it.
      if (K > 0 || !i.start) {
        i.start = u;
        i.step = nullptr;
        i.kept = false;
      }
    }
    if (K + 1 == intervals_.size()) break;
    State total;
    if (i.member) total = reduce(i, own_increments(i, last));
    State next;
    if (i.owns_first) next = propagator_->axpy(1.0, total, i.start);
    std::vector<int> ranks = i.members;
    for (int rank : intervals_[K + 1].members) append_new(ranks, rank);
    share(ranks, next);
    if (i.owns_last) i.next = next;
    u = std::move(next);
  }
}

// What this rank adds to u_K: its layers' increments at u_K, and tau where the interval ends.
State CyclicSolver::own_increments(Interval& i, bool last) {
  std::vector<Evaluation> others;
  for (int p : i.mine) {
    if (p != i.begin) {
      others.push_back({p, i.start, nullptr});
    } else if (!i.step || (last && !i.kept)) {
      std::vector<Evaluation> first{{p, i.start, nullptr}};
      evaluate(first, 1, last ? Visit::chain : Visit::relax);
      i.step = std::move(first[0].output);
      i.kept = last;
    }
  }
  evaluate(others, 1, Visit::relax);
  State own;
  auto add = [&](State increment) { own = own ? propagator_->axpy(1.0, increment, own) : std::move(increment); };
  if (i.owns_first) add(propagator_->axpy(-1.0, i.start, i.step));
  for (const Evaluation& e : others) add(propagator_->axpy(-1.0, i.start, e.output));
  if (i.owns_last && i.tau) add(i.tau);
  return own;
}

// A pipeline: interval after interval, each rank takes its steps as the state comes by.
void CyclicSolver::fine_sweep(Visit visit, bool with_last) {
  const std::size_t count = intervals_.size() - (with_last ? 0 : 1);
  for (std::size_t K = 0; K < count; ++K) {
    Interval& i = intervals_[K];
    State value;
    for (int p : i.mine) {
      std::vector<Evaluation> one{{p, nullptr, nullptr}};
      if (p == i.begin) {
        one[0].input = i.start;
        if (i.step && (i.kept || visit == Visit::relax)) one[0].output = i.step;
      } else {
        one[0].input = owner(p - 1) == rank_ ? std::move(value) : receive(tag::f_point, owner(p - 1));
      }
      if (visit == Visit::last || !one[0].output) evaluate(one, 0, visit);
      value = std::move(one[0].output);
      if (p + 1 < i.end && owner(p + 1) != rank_) post(tag::f_point, owner(p + 1), value);
    }
    if (visit == Visit::last && i.member) i.start = i.step = nullptr;
    if (i.owns_last) i.arrived = std::move(value);
  }
}

double CyclicSolver::squared_residual() {
  double square = 0;
  for (std::size_t K = 0; K + 1 < intervals_.size(); ++K) {
    const Interval& i = intervals_[K];
    if (i.owns_last) square += propagator_->squared_norm(propagator_->axpy(-1.0, i.next, i.arrived));
  }
  return square;
}

}  // namespace mlpint
