#include "solver.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

#include "transport/collectives.hpp"
#include "transport/tags.hpp"

namespace mlpint {

struct Solver::Run {
  int interval;     // K: it starts at C-point K of its level
  int first, last;  // own steps first .. last - 1
  bool starts;      // first leaves the interval's C-point
  bool ends;        // last - 1 arrives at the next C-point
  State value;      // at the point reached so far
};

Solver::Solver(Grid grid, Partition partition, std::vector<int> ranks, std::shared_ptr<Transport> transport,
               std::unique_ptr<CoarseOperator> coarse, SolverOptions options)
    : grid_(std::move(grid)),
      partition_(std::move(partition)),
      ranks_(std::move(ranks)),
      transport_(std::move(transport)),
      coarse_(std::move(coarse)),
      options_(options) {
  if (static_cast<int>(ranks_.size()) != partition_.slots() || partition_.slots() != transport_->size())
    throw std::invalid_argument("one slot of the partition for each rank: " + std::to_string(partition_.slots()) +
                                " slots, " + std::to_string(ranks_.size()) + " ranks given, " +
                                std::to_string(transport_->size()) + " in the transport");
  for (int s = 0; s < partition_.slots(); ++s)
    if (ranks_[s] == transport_->rank()) slot_ = s;
  const int levels = grid_.levels();
  for (int l = 0; l < levels; ++l) {
    begin_.push_back(std::min(grid_.first_at(l, partition_.begin(slot_)), grid_.steps(l)));
    end_.push_back(std::min(grid_.first_at(l, partition_.end(slot_)), grid_.steps(l)));
  }
  if (coarse_->spans_fine_steps())
    for (int l = 1; l < levels; ++l)
      for (int k = 0; k + 1 < grid_.steps(l); ++k) {
        const int start = grid_.position(l, k), end = grid_.position(l, k + 1) - 1;
        if (partition_.owner(start) != partition_.owner(end))
          throw std::invalid_argument("this coarse operator evaluates all layers of an interval at once, and the " +
                                      std::to_string(grid_.length(l, k)) + " layers of level " + std::to_string(l) +
                                      " from depth " + std::to_string(start) + " are on ranks " +
                                      std::to_string(ranks_[partition_.owner(start)]) + " and " +
                                      std::to_string(ranks_[partition_.owner(end)]) +
                                      "; take the cfactor the stack was made with and 2 levels, or fewer ranks");
      }
  node_index_.resize(levels);
  for (int l = 1; l < levels; ++l)
    for (int k = 0; k <= grid_.steps(l); ++k)
      node_index_[l].push_back(l == 1 ? k : node_index_[l - 1][grid_.c_point(l - 1, k)]);
}

// --- the parts every phase is made of --------------------------------------------------------------------------------

Solver::Node& Solver::node(int level, int k) { return nodes_[node_index_[level][k] - begin_[1]]; }

void Solver::set(Node& n, State value) {
  n.value = std::move(value);
  n.step.reset();
  n.kept = false;
}

void Solver::post(int level, int kind, int to_slot, const State& value) {
  transport_->post(ranks_[to_slot], tag::of_level(kind, level), value);
}

TransferPtr Solver::expect(int level, int kind, int from_slot, State& into) {
  into = propagator_->empty();
  return transport_->receive(ranks_[from_slot], tag::of_level(kind, level), into);
}

void Solver::finish(TransferPtr transfer) {
  const auto started = std::chrono::steady_clock::now();
  transport_->progress();
  transfer->wait(transport_->stall_limit);
  waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

void Solver::evaluate(std::vector<Evaluation>& batch, int level, Visit visit) {
  if (batch.empty()) return;
  transport_->progress();
  position_ = batch.front().position;
  propagator_->evaluate(batch, level, visit);
}

// Evaluates the fine steps from nodes that lack them.
void Solver::need_fine_steps(const std::vector<Node*>& nodes, const std::vector<int>& positions, int level,
                             Visit visit) {
  std::vector<Evaluation> batch;
  std::vector<Node*> lacking;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    Node& n = *nodes[i];
    if (n.step && (n.kept || visit == Visit::relax)) continue;
    batch.push_back({positions[i], n.value, nullptr});
    lacking.push_back(&n);
  }
  evaluate(batch, level, visit);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    lacking[i]->step = std::move(batch[i].output);
    lacking[i]->kept = visit != Visit::relax;
  }
}

// --- the solve -------------------------------------------------------------------------------------------------------

SolveResult Solver::solve(Propagator& propagator, State initial, int iterations) {
  propagator_ = &propagator;
  waited_ = 0;
  SolveResult result;
  if (iterations <= 0 || grid_.levels() == 1) {
    result.final_value = exact(std::move(initial));
    result.waited = waited_;
    return result;
  }

  const bool stops_early = options_.tolerance > 0;
  const bool norms = options_.norms || stops_early;
  double limit = 0;
  if (stops_early) {
    const double square = sum(*transport_, initial ? propagator.squared_norm(initial) : 0.0);
    limit = options_.tolerance * std::sqrt(square);
  }
  auto record_norm = [&](double square) { result.residual_norms.push_back(std::sqrt(sum(*transport_, square))); };

  nodes_.assign(participates(1) ? end_[1] - begin_[1] : 0, {});
  g_.assign(grid_.levels(), {});
  for (int l = 1; l < grid_.levels(); ++l) g_[l].resize(end_[l] - begin_[l]);
  if (initial) {
    if (nodes_.empty() || begin_[1] != 0) throw std::logic_error("initial value given to a rank that lacks point 0");
    set(nodes_[0], std::move(initial));
  }

  const int coarsest = grid_.levels() - 1;
  std::vector<double> squares;
  for (int i = 1; i <= iterations; ++i) {
    // Posted before the relaxation that the wait will be hidden behind, unless this cycle may turn out not to be run.
    if (!stops_early) post_chain_receive();
    if (i > 1) {
      const double square = down(0, norms);
      if (stops_early) {
        record_norm(square);
        if (result.residual_norms.back() <= limit) break;
      } else if (norms) {
        squares.push_back(square);
      }
      for (int l = 1; l < coarsest; ++l) down(l, false);
    }
    if (stops_early) post_chain_receive();
    const Visit visit = i == iterations ? Visit::chain : Visit::relax;
    coarsest_sweep(visit);
    for (int l = coarsest - 1; l >= 1; --l) {
      operation_ = "relaxation on the way up";
      relax(l, visit, {/*ends=*/false, /*last_interval=*/true});
    }
    result.iterations = i;
  }

  operation_ = "last sweep";
  const bool learns = coarse_->learnt() && propagator.learns();
  const auto values = norms ? c_values() : std::vector<State>{};
  if (learns) starts_.assign(nodes_.size(), {});
  const auto ends = relax(0, Visit::last, {/*ends=*/norms || learns, /*last_interval=*/true});
  const bool norm_known = stops_early && result.iterations < iterations;
  if (norms && !norm_known) squares.push_back(squared_residual(values, ends));
  if (learns) observe(ends);
  for (double square : squares) record_norm(square);
  result.final_value = std::move(final_value_);
  final_value_.reset();
  nodes_.clear();
  g_.clear();
  result.waited = waited_;
  operation_ = "idle";
  return result;
}

// The exact serial sweep, rank after rank.
State Solver::exact(State value) {
  operation_ = "exact sweep";
  level_ = 0;
  if (!participates(0)) return nullptr;
  const int b = begin_[0], e = end_[0];
  if (b > 0) finish(expect(0, tag::chain, slot_of_step(0, b - 1), value));
  if (!value) throw std::logic_error("the rank that owns point 0 was given no initial value");
  for (int k = b; k < e; ++k) {
    std::vector<Evaluation> one{{k, std::move(value), nullptr}};
    evaluate(one, 0, Visit::last);
    value = std::move(one[0].output);
  }
  if (e == grid_.steps(0)) return value;
  post(0, tag::chain, slot_of_step(0, e), value);
  return nullptr;
}

// --- the coarsest level ----------------------------------------------------------------------------------------------

void Solver::post_chain_receive() {
  const int l = grid_.levels() - 1;
  if (participates(l) && begin_[l] > 0)
    chain_receive_ = expect(l, tag::chain, slot_of_step(l, begin_[l] - 1), chain_value_);
}

// Serial over the ranks. The step onto the last point is left out: nothing is computed from it.
void Solver::coarsest_sweep(Visit visit) {
  operation_ = "coarsest sweep";
  const int l = level_ = grid_.levels() - 1;
  if (!participates(l)) return;
  if (chain_receive_) {
    finish(std::move(chain_receive_));
    set(node(l, begin_[l]), std::move(chain_value_));
  }
  for (int k = begin_[l]; k < end_[l] && k + 1 < grid_.steps(l); ++k) {
    State value = coarse_step(l, {k}, visit)[0];
    if (k + 1 < end_[l])
      set(node(l, k + 1), std::move(value));
    else
      post(l, tag::chain, slot_of_step(l, k + 1), value);
  }
}

// Coarse steps `ks` of a level from the nodes they leave, right-hand side included.
std::vector<State> Solver::coarse_step(int l, const std::vector<int>& ks, Visit visit) {
  level_ = l;
  std::vector<Node*> nodes;
  std::vector<int> positions;
  for (int k : ks) {
    nodes.push_back(&node(l, k));
    positions.push_back(grid_.position(l, k));
  }
  if (coarse_->uses_fine_step()) need_fine_steps(nodes, positions, l, visit);
  std::vector<State> values;
  for (std::size_t i = 0; i < ks.size(); ++i) {
    State value =
        coarse_->step(*propagator_, {l, positions[i], grid_.length(l, ks[i])}, nodes[i]->value, nodes[i]->step);
    const State& g = g_[l][ks[i] - begin_[l]];
    values.push_back(g ? propagator_->axpy(1.0, g, value) : std::move(value));
  }
  return values;
}

// --- relaxation ------------------------------------------------------------------------------------------------------

// Steps through every interval from its C-point; sets the F-points of levels above 0 (those of level 0 are not kept).
// Returns, if asked, the value that arrives at the end of each interval this rank starts, except the last interval.
std::vector<State> Solver::relax(int l, Visit visit, Relaxation what) {
  level_ = l;
  const int last_interval = grid_.steps(l + 1) - 1;
  std::vector<Run> local, incoming;
  for (int k = begin_[l]; k < end_[l];) {
    const int K = grid_.interval(l, k), c_end = grid_.c_point(l, K + 1);
    Run run{K, k, std::min(c_end, end_[l]), k == grid_.c_point(l, K), c_end <= end_[l], nullptr};
    k = run.last;
    if (K == last_interval) {
      if (!what.last_interval) continue;
      // On coarse levels nothing is computed from the last point.
      if (l > 0 && run.ends) run.last -= 1, run.ends = false;
    }
    (run.starts ? local : incoming).push_back(std::move(run));
  }

  // An interval that began on an earlier rank comes in while this rank works on its own.
  TransferPtr arrival, end_arrival;
  if (!incoming.empty()) arrival = expect(l, tag::f_point, slot_of_step(l, incoming[0].first - 1), incoming[0].value);
  State arriving_end;
  const bool awaits_end = what.ends && !local.empty() && !local.back().ends && local.back().interval != last_interval;
  if (awaits_end) {
    const int c_end = grid_.c_point(l, local.back().interval + 1);
    end_arrival = expect(l, tag::interval_end, slot_of_step(l, c_end - 1), arriving_end);
  }

  advance(local, l, visit);
  if (arrival) {
    finish(std::move(arrival));
    Run& run = incoming[0];
    if (l > 0) set(node(l, run.first), run.value);
    advance(incoming, l, visit);
    if (what.ends && run.ends && run.interval != last_interval)
      post(l, tag::interval_end, slot_of_step(l, grid_.c_point(l, run.interval)), run.value);
  }

  std::vector<State> ends;
  for (std::vector<Run>* runs : {&local, &incoming})
    for (Run& run : *runs)
      if (l == 0 && run.ends && run.interval == last_interval) final_value_ = std::move(run.value);
  if (!what.ends) return ends;
  ends.resize(end_[l + 1] - begin_[l + 1]);
  if (awaits_end) {
    finish(std::move(end_arrival));
    local.back().value = std::move(arriving_end);
  }
  for (Run& run : local)
    if (run.interval != last_interval) ends[run.interval - begin_[l + 1]] = std::move(run.value);
  return ends;
}

// Sub-step j of all runs at once.
void Solver::advance(std::vector<Run>& runs, int l, Visit visit) {
  int longest = 0;
  for (const Run& run : runs) longest = std::max(longest, run.last - run.first);
  for (int j = 0; j < longest; ++j) {
    std::vector<Run*> active;
    std::vector<int> ks;
    for (Run& run : runs)
      if (run.first + j < run.last) {
        active.push_back(&run);
        ks.push_back(run.first + j);
      }
    std::vector<State> values = l > 0 ? coarse_step(l, ks, visit) : fine_step(active, ks, visit, j == 0);
    for (std::size_t i = 0; i < active.size(); ++i) {
      Run& run = *active[i];
      const int arrived = ks[i] + 1;
      if (arrived == end_[l] && !run.ends)
        post(l, tag::f_point, slot_of_step(l, arrived), values[i]);
      else if (l > 0 && !(run.ends && arrived == run.last))
        set(node(l, arrived), values[i]);
      run.value = std::move(values[i]);
    }
  }
}

// Fine steps from the C-points (first) or from where the runs have got to. The last sweep is through with the C-points.
std::vector<State> Solver::fine_step(const std::vector<Run*>& runs, const std::vector<int>& ks, Visit visit,
                                     bool first) {
  std::vector<State> values;
  std::vector<Evaluation> batch;
  const bool from_nodes = first && runs[0]->starts;
  if (from_nodes && visit == Visit::relax) {
    std::vector<Node*> nodes;
    for (const Run* run : runs) nodes.push_back(&node(1, run->interval));
    need_fine_steps(nodes, ks, 0, visit);
    for (const Node* n : nodes) values.push_back(n->step);
    return values;
  }
  for (std::size_t i = 0; i < runs.size(); ++i) {
    Evaluation e{ks[i], runs[i]->value, nullptr};
    if (from_nodes) {
      Node& n = node(1, runs[i]->interval);
      e.input = std::move(n.value);
      if (n.kept) e.output = std::move(n.step);
      n = Node{};
      if (!starts_.empty()) starts_[runs[i]->interval - begin_[1]].value = e.input;
    }
    runs[i]->value.reset();
    batch.push_back(std::move(e));
  }
  evaluate(batch, 0, visit);
  for (Evaluation& e : batch) values.push_back(std::move(e.output));
  if (from_nodes && !starts_.empty())
    for (std::size_t i = 0; i < runs.size(); ++i) starts_[runs[i]->interval - begin_[1]].step = values[i];
  return values;
}

// Shows the propagator what the coarse steps of level 1 should have arrived at.
void Solver::observe(const std::vector<State>& ends) {
  operation_ = "learning the coarse operator";
  for (int K = begin_[1]; K < end_[1] && K + 1 < grid_.steps(1); ++K) {
    const Node& start = starts_[K - begin_[1]];
    if (grid_.length(1, K) > 1)
      propagator_->observe({1, grid_.position(1, K), grid_.length(1, K)}, start.value, start.step, ends[K - begin_[1]]);
  }
  starts_.clear();
}

// --- one half of a V-cycle -------------------------------------------------------------------------------------------

// Relaxes on a level and forms the right-hand side of the next. Returns this rank's part of the squared residual norm
// before the cycle, if asked.
double Solver::down(int l, bool norms) {
  operation_ = options_.fcf ? "FCF-relaxation" : "F-relaxation";
  const Relaxation what{/*ends=*/true, /*last_interval=*/false};
  std::vector<State> ends = relax(l, Visit::relax, what);
  const double square = norms ? squared_residual(c_values(), ends) : 0.0;
  if (options_.fcf) {
    c_relax(l, std::move(ends));
    ends = relax(l, Visit::relax, what);
  }
  for (int K = begin_[l + 1]; K < end_[l + 1] && K + 1 < grid_.steps(l + 1); ++K) {
    const Node& n = node(l + 1, K);
    const State coarse =
        coarse_->step(*propagator_, {l + 1, grid_.position(l + 1, K), grid_.length(l + 1, K)}, n.value, n.step);
    g_[l + 1][K - begin_[l + 1]] = propagator_->axpy(-1.0, coarse, ends[K - begin_[l + 1]]);
  }
  return square;
}

// Moves every C-point to where the interval before it arrives.
void Solver::c_relax(int l, std::vector<State> ends) {
  const int b = begin_[l + 1], e = end_[l + 1];
  if (b == e) return;
  State first;
  TransferPtr arrival;
  if (b > 0) arrival = expect(l, tag::c_point, slot_of_step(l + 1, b - 1), first);
  for (int K = b; K < e && K + 1 < grid_.steps(l + 1); ++K) {
    if (K + 1 < e)
      set(node(l + 1, K + 1), std::move(ends[K - b]));
    else
      post(l, tag::c_point, slot_of_step(l + 1, K + 1), ends[K - b]);
  }
  if (arrival) {
    finish(std::move(arrival));
    set(node(l + 1, b), std::move(first));
  }
}

std::vector<State> Solver::c_values() const {
  std::vector<State> values;
  for (const Node& n : nodes_) values.push_back(n.value);
  return values;
}

// Of the residual at the C-points where this rank's intervals end. The value at a C-point is its owner's, so neighbours
// exchange one state; at the last point there is no residual, since its value is what arrives there.
double Solver::squared_residual(const std::vector<State>& values, const std::vector<State>& ends) {
  const int b = begin_[1], e = end_[1];
  if (b == e) return 0.0;
  if (b > 0) post(0, tag::c_point, slot_of_step(1, b - 1), values.front());
  State next;
  if (e < grid_.steps(1)) finish(expect(0, tag::c_point, slot_of_step(1, e), next));
  double square = 0;
  for (int K = b; K < e && K + 1 < grid_.steps(1); ++K) {
    const State& at_end = K + 1 < e ? values[K + 1 - b] : next;
    square += propagator_->squared_norm(propagator_->axpy(-1.0, at_end, ends[K - b]));
  }
  return square;
}

}  // namespace mlpint
