#include "solver.hpp"

#include "block_solve.hpp"

namespace mlpint {

Solver::Solver(Grid grid, Partition partition, std::vector<int> ranks, std::shared_ptr<Transport> transport,
               std::unique_ptr<CoarseOperator> coarse, SolverOptions options)
    : transport_(std::move(transport)),
      layout_(std::move(grid), std::move(partition), std::move(ranks), transport_->rank(), transport_->size()),
      coarse_(std::move(coarse)),
      options_(options) {
  if (coarse_->spans_fine_steps()) layout_.require_whole_intervals();
}

SolveResult Solver::solve(Propagator& propagator, State initial, int iterations) {
  return BlockSolve(layout_, *coarse_, *transport_, propagator, options_, where_).run(std::move(initial), iterations);
}

}  // namespace mlpint
