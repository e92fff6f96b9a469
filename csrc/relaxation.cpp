// This file has relaxation in the block layout: it steps through intervals that may begin on one rank and end on
// another.
#include <algorithm>

#include "block_solve.hpp"
#include "transport/tags.hpp"

namespace mlpint {

// F-relaxation: steps through every interval from its C-point and sets the F-points of levels above 0 (those of level 0
// are not stored). Returns, if asked, the value that arrives at the end of each interval this rank begins, except the
// last interval.
std::vector<State> BlockSolve::relax(int l, Sweep sweep, Relaxation what) {
  where_.level = l;
  const int last_interval = grid_.steps(l + 1) - 1;
  std::vector<Segment> own, incoming;
  for (int k = layout_.begin(l); k < layout_.end(l);) {
    const int K = grid_.interval(l, k), next_c_point = grid_.c_point(l, K + 1);
    Segment segment{
        K,      k, std::min(next_c_point, layout_.end(l)), k == grid_.c_point(l, K), next_c_point <= layout_.end(l),
        nullptr};
    k = segment.end;
    if (K == last_interval) {
      if (!what.last_interval) continue;
      // On coarse levels nothing is computed from the last point.
      if (l > 0 && segment.to_c_point) segment.end -= 1, segment.to_c_point = false;
    }
    (segment.from_c_point ? own : incoming).push_back(std::move(segment));
  }

  // An interval that began on an earlier rank comes in while this rank works on its own.
  TransferPtr arrival, end_arrival;
  if (!incoming.empty())
    arrival = expect(tag::f_point, l, layout_.rank_of_step(l, incoming[0].begin - 1), incoming[0].value);
  State arriving_end;
  const bool awaits_end =
      what.returns_ends && !own.empty() && !own.back().to_c_point && own.back().interval != last_interval;
  if (awaits_end) {
    const int next_c_point = grid_.c_point(l, own.back().interval + 1);
    end_arrival = expect(tag::interval_end, l, layout_.rank_of_step(l, next_c_point - 1), arriving_end);
  }

  advance(own, l, sweep);
  if (arrival) {
    finish(std::move(arrival));
    Segment& segment = incoming[0];
    if (l > 0) set(node(l, segment.begin), segment.value);
    advance(incoming, l, sweep);
    if (what.returns_ends && segment.to_c_point && segment.interval != last_interval)
      post(tag::interval_end, l, layout_.rank_of_step(l, grid_.c_point(l, segment.interval)), segment.value);
  }

  for (std::vector<Segment>* segments : {&own, &incoming})
    for (Segment& segment : *segments)
      if (l == 0 && segment.to_c_point && segment.interval == last_interval) final_value_ = std::move(segment.value);
  if (!what.returns_ends) return {};
  std::vector<State> ends(layout_.end(l + 1) - layout_.begin(l + 1));
  if (awaits_end) {
    finish(std::move(end_arrival));
    own.back().value = std::move(arriving_end);
  }
  for (Segment& segment : own)
    if (segment.interval != last_interval) ends[segment.interval - layout_.begin(l + 1)] = std::move(segment.value);
  return ends;
}

// Takes step j of all segments at once, for every j.
void BlockSolve::advance(std::vector<Segment>& segments, int l, Sweep sweep) {
  int longest = 0;
  for (const Segment& segment : segments) longest = std::max(longest, segment.end - segment.begin);
  for (int j = 0; j < longest; ++j) {
    std::vector<Segment*> active;
    std::vector<int> ks;
    for (Segment& segment : segments)
      if (segment.begin + j < segment.end) {
        active.push_back(&segment);
        ks.push_back(segment.begin + j);
      }
    std::vector<State> values = l > 0 ? coarse_step(l, ks, sweep) : fine_step(active, ks, sweep, j == 0);
    for (std::size_t i = 0; i < active.size(); ++i) {
      Segment& segment = *active[i];
      const int arrived = ks[i] + 1;
      if (arrived == layout_.end(l) && !segment.to_c_point)
        post(tag::f_point, l, layout_.rank_of_step(l, arrived), values[i]);
      else if (l > 0 && !(segment.to_c_point && arrived == segment.end))
        set(node(l, arrived), values[i]);
      segment.value = std::move(values[i]);
    }
  }
}

// Takes the coarse steps `ks` of a level from the nodes they leave, right-hand side included.
std::vector<State> BlockSolve::coarse_step(int l, const std::vector<int>& ks, Sweep sweep) {
  where_.level = l;
  std::vector<Node*> nodes;
  std::vector<int> positions;
  for (int k : ks) {
    nodes.push_back(&node(l, k));
    positions.push_back(grid_.position(l, k));
  }
  if (coarse_.uses_fine_step()) need_fine_steps(nodes, positions, l, sweep);
  std::vector<State> values;
  for (std::size_t i = 0; i < ks.size(); ++i) {
    State value = coarse_.step(propagator_, {l, positions[i], grid_.length(l, ks[i])}, nodes[i]->value, nodes[i]->step);
    const State& g = g_[l][ks[i] - layout_.begin(l)];
    values.push_back(g ? propagator_.axpy(1.0, g, value) : std::move(value));
  }
  return values;
}

// Takes fine steps from the C-points (first) or from where the segments have got to. The final sweep is through with
// the C-points once it has left them.
std::vector<State> BlockSolve::fine_step(const std::vector<Segment*>& segments, const std::vector<int>& ks, Sweep sweep,
                                         bool first) {
  std::vector<State> values;
  std::vector<Evaluation> batch;
  const bool from_nodes = first && segments[0]->from_c_point;
  if (from_nodes && sweep == Sweep::intermediate) {
    std::vector<Node*> nodes;
    for (const Segment* segment : segments) nodes.push_back(&node(1, segment->interval));
    need_fine_steps(nodes, ks, 0, sweep);
    for (const Node* n : nodes) values.push_back(n->step);
    return values;
  }
  const bool learns = from_nodes && !first_steps_.empty();
  for (std::size_t i = 0; i < segments.size(); ++i) {
    Evaluation e{ks[i], std::move(segments[i]->value), nullptr};
    bool done = false;
    segments[i]->value.reset();
    if (from_nodes) {
      Node& n = node(1, segments[i]->interval);
      e.input = std::move(n.value);
      if (n.is_final) e.output = std::move(n.step);
      done = n.is_done;
      n = Node{};
      if (learns) first_steps_[segments[i]->interval - layout_.begin(1)].from = e.input;
    }
    values.push_back(done ? std::move(e.output) : nullptr);
    if (!done) batch.push_back(std::move(e));
  }
  evaluate(batch, 0, sweep);
  auto evaluated = batch.begin();
  for (State& value : values)
    if (!value) value = std::move((evaluated++)->output);
  if (learns)
    for (std::size_t i = 0; i < segments.size(); ++i)
      first_steps_[segments[i]->interval - layout_.begin(1)].to = values[i];
  return values;
}

// Evaluates the fine steps from nodes that lack them.
void BlockSolve::need_fine_steps(const std::vector<Node*>& nodes, const std::vector<int>& positions, int level,
                                 Sweep sweep) {
  std::vector<Evaluation> batch;
  std::vector<Node*> lacking;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    Node& n = *nodes[i];
    if (n.step && (n.is_final || sweep == Sweep::intermediate)) continue;
    batch.push_back({positions[i], n.value, nullptr});
    lacking.push_back(&n);
  }
  evaluate(batch, level, sweep);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    lacking[i]->step = std::move(batch[i].output);
    lacking[i]->is_final = sweep != Sweep::intermediate;
  }
}

// C-relaxation: moves every C-point to where the interval before it arrives.
void BlockSolve::c_relax(int l, std::vector<State> ends) {
  if (!layout_.owns_steps(l + 1)) return;
  const int b = layout_.begin(l + 1), e = layout_.end(l + 1);
  State first;
  TransferPtr arrival;
  if (b > 0) arrival = expect(tag::c_point, l, layout_.rank_of_step(l + 1, b - 1), first);
  for (int K = b; K < e && K + 1 < grid_.steps(l + 1); ++K) {
    if (K + 1 < e)
      set(node(l + 1, K + 1), std::move(ends[K - b]));
    else
      post(tag::c_point, l, layout_.rank_of_step(l + 1, K + 1), ends[K - b]);
  }
  if (arrival) {
    finish(std::move(arrival));
    set(node(l + 1, b), std::move(first));
  }
}

}  // namespace mlpint
