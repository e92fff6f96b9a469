// Solver is the MGRIT solver for the block layout. It holds only what no solve changes, so that a solve that an
// exception ended leaves nothing behind for the next one.
#pragma once

#include <memory>
#include <vector>

#include "block_layout.hpp"
#include "coarse.hpp"
#include "grid.hpp"
#include "mgrit.hpp"
#include "propagator.hpp"
#include "transport/transport.hpp"

namespace mlpint {

class Solver {
 public:
  // ranks[s] is the rank at slot s along the direction of the solve.
  Solver(Grid grid, Partition partition, std::vector<int> ranks, std::shared_ptr<Transport> transport,
         std::unique_ptr<CoarseOperator> coarse, SolverOptions options);

  // `initial` is the value of point 0 on the rank that owns it, and null elsewhere.
  SolveResult solve(Propagator& propagator, State initial, int iterations);

  // After an exception this says what failed.
  const Where& where() const { return where_; }

 private:
  const std::shared_ptr<Transport> transport_;
  const BlockLayout layout_;
  const std::unique_ptr<const CoarseOperator> coarse_;
  const SolverOptions options_;
  Where where_;
};

}  // namespace mlpint
