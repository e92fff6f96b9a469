// Grid says which points of depth each level has and how they form intervals, and Partition which rank owns them.
//
// Level 0 has a point before and after every layer: N steps, N + 1 points. Level l + 1 keeps every cfactor-th point of
// level l (its C-points) and always the last one, so that the last interval of a level may be ragged. Interval K of
// level l runs from C-point K to C-point K + 1 and is one step of level l + 1.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlpint {

class Grid {
 public:
  Grid(int steps, int cfactor, int levels) {
    if (steps < 1) throw std::invalid_argument("a grid needs at least one step, got " + std::to_string(steps));
    if (cfactor < 2) throw std::invalid_argument("cfactor must be at least 2, got " + std::to_string(cfactor));
    if (levels < 1) throw std::invalid_argument("levels must be at least 1, got " + std::to_string(levels));
    points_.emplace_back(steps + 1);
    for (int p = 0; p <= steps; ++p) points_[0][p] = p;
    // A level with one step cannot be coarsened to any purpose, except that a two-level method always has its level 1.
    while (this->levels() < levels && (this->levels() == 1 || this->steps(this->levels() - 1) > 1)) {
      const std::vector<int>& fine = points_.back();
      const int last = static_cast<int>(fine.size()) - 1;
      std::vector<int> c_points;
      for (int k = 0; k < last; k += cfactor) c_points.push_back(k);
      c_points.push_back(last);
      std::vector<int> coarse;
      for (int k : c_points) coarse.push_back(fine[k]);
      c_points_.push_back(std::move(c_points));
      points_.push_back(std::move(coarse));
    }
  }

  // Returns the same intervals met from the other end. That is the grid of the adjoint, whose first interval is the
  // ragged one.
  Grid mirrored() const {
    Grid m = *this;
    for (auto& p : m.points_) {
      std::reverse(p.begin(), p.end());
      for (int& q : p) q = steps(0) - q;
    }
    for (int l = 0; l + 1 < levels(); ++l) {
      std::reverse(m.c_points_[l].begin(), m.c_points_[l].end());
      for (int& k : m.c_points_[l]) k = steps(l) - k;
    }
    return m;
  }

  int levels() const { return static_cast<int>(points_.size()); }
  int steps(int level) const { return static_cast<int>(points_[level].size()) - 1; }
  // Returns the depth of a point, in layers from the start.
  int position(int level, int point) const { return points_[level][point]; }
  // Returns how many layers step k of a level spans.
  int length(int level, int k) const { return points_[level][k + 1] - points_[level][k]; }
  // Returns the index on `level` of its C-point K, which is point K of level + 1.
  int c_point(int level, int K) const { return c_points_[level][K]; }
  // Returns the interval of `level` that contains step k.
  int interval(int level, int k) const {
    const auto& c = c_points_[level];
    return static_cast<int>(std::upper_bound(c.begin(), c.end(), k) - c.begin()) - 1;
  }
  // Returns the first point of a level that lies at or after a depth.
  int first_at(int level, int position) const {
    const auto& p = points_[level];
    return static_cast<int>(std::lower_bound(p.begin(), p.end(), position) - p.begin());
  }

 private:
  std::vector<std::vector<int>> points_;    // [level][point] -> depth
  std::vector<std::vector<int>> c_points_;  // [level][K] -> point
};

// Ownership is contiguous: slot s (a rank's place along the direction of the solve) owns the steps that start at depths
// offsets[s] .. offsets[s + 1] - 1, on every level.
class Partition {
 public:
  Partition(std::vector<int> offsets, int steps) : offsets_(std::move(offsets)) {
    if (offsets_.size() < 2 || offsets_.front() != 0 || offsets_.back() != steps ||
        !std::is_sorted(offsets_.begin(), offsets_.end()))
      throw std::invalid_argument("offsets must rise from 0 to the number of steps, " + std::to_string(steps));
  }

  // Deals whole intervals of `granularity` steps out evenly and returns the offsets. The earlier slots take what is
  // left over, since they start first. With fewer intervals than slots the last slots own nothing.
  static std::vector<int> even(int steps, int granularity, int slots) {
    const int intervals = (steps + granularity - 1) / granularity;
    std::vector<int> offsets{0};
    for (int s = 0; s < slots; ++s) {
      const int mine = intervals / slots + (s < intervals % slots ? 1 : 0);
      offsets.push_back(std::min(steps, offsets.back() + mine * granularity));
    }
    return offsets;
  }

  int slots() const { return static_cast<int>(offsets_.size()) - 1; }
  int begin(int slot) const { return offsets_[slot]; }
  int end(int slot) const { return offsets_[slot + 1]; }
  int owner(int position) const {
    return static_cast<int>(std::upper_bound(offsets_.begin(), offsets_.end(), position) - offsets_.begin()) - 1;
  }
  Partition mirrored() const {
    std::vector<int> m;
    for (auto it = offsets_.rbegin(); it != offsets_.rend(); ++it) m.push_back(offsets_.back() - *it);
    return Partition(std::move(m), offsets_.back());
  }

 private:
  std::vector<int> offsets_;
};

}  // namespace mlpint
