// The block layout, in which each rank owns consecutive layers, and so a stretch of every level.
#pragma once

#include <vector>

#include "grid.hpp"

namespace mlpint {

class BlockLayout {
 public:
  // ranks[s] is the rank at slot s along the direction of the solve; `rank` is this one of `size` ranks.
  BlockLayout(Grid grid, Partition partition, std::vector<int> ranks, int rank, int size);

  const Grid& grid() const { return grid_; }
  // Own steps of a level are begin(level) .. end(level) - 1.
  int begin(int level) const { return begin_[level]; }
  int end(int level) const { return end_[level]; }
  bool owns_steps(int level) const { return begin_[level] < end_[level]; }
  int rank_of_step(int level, int k) const { return ranks_[partition_.owner(grid_.position(level, k))]; }
  // Returns the index, among the own points of level 1, of point k of a coarse level.
  int node_index(int level, int k) const { return level_1_point_[level][k] - begin_[1]; }

  // Returns how many ranks have steps of the coarsest level.
  int chain_length() const { return chain_length_; }
  // Returns how many of them are before this one.
  int chain_place() const { return chain_place_; }

  // Throws std::invalid_argument if the layers of any coarse step are on several ranks. The last step of a level does
  // not matter: nothing is computed from the point it arrives at.
  void require_whole_intervals() const;

 private:
  Grid grid_;
  Partition partition_;
  std::vector<int> ranks_;
  std::vector<int> begin_, end_;                 // [level]
  std::vector<std::vector<int>> level_1_point_;  // [level][point]
  int chain_length_ = 0, chain_place_ = 0;
};

}  // namespace mlpint
