#include "block_layout.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mlpint {

BlockLayout::BlockLayout(Grid grid, Partition partition, std::vector<int> ranks, int rank, int size)
    : grid_(std::move(grid)), partition_(std::move(partition)), ranks_(std::move(ranks)) {
  if (static_cast<int>(ranks_.size()) != partition_.slots() || partition_.slots() != size)
    throw std::invalid_argument("one slot of the partition for each rank: " + std::to_string(partition_.slots()) +
                                " slots, " + std::to_string(ranks_.size()) + " ranks given, " + std::to_string(size) +
                                " in the transport");
  int slot = 0;
  for (int s = 0; s < partition_.slots(); ++s)
    if (ranks_[s] == rank) slot = s;
  const int levels = grid_.levels();
  for (int l = 0; l < levels; ++l) {
    begin_.push_back(std::min(grid_.first_at(l, partition_.begin(slot)), grid_.steps(l)));
    end_.push_back(std::min(grid_.first_at(l, partition_.end(slot)), grid_.steps(l)));
  }
  for (int k = 0; k < grid_.steps(levels - 1); ++k) {
    if (k == begin_[levels - 1]) chain_place_ = chain_length_;
    if (k == 0 || rank_of_step(levels - 1, k) != rank_of_step(levels - 1, k - 1)) ++chain_length_;
  }
  level_1_point_.resize(levels);
  for (int l = 1; l < levels; ++l)
    for (int k = 0; k <= grid_.steps(l); ++k)
      level_1_point_[l].push_back(l == 1 ? k : level_1_point_[l - 1][grid_.c_point(l - 1, k)]);
}

void BlockLayout::require_whole_intervals() const {
  for (int l = 1; l < grid_.levels(); ++l)
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
}

}  // namespace mlpint
