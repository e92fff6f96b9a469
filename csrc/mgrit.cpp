#include "mgrit.hpp"

#include "transport/tags.hpp"

namespace mlpint {

MgritSolve::MgritSolve(const Grid& grid, Transport& transport, Propagator& propagator, const SolverOptions& options,
                       Where& where)
    : grid_(grid),
      transport_(transport),
      propagator_(propagator),
      options_(options),
      slices_(propagator.slices()),
      where_(where),
      clock_(where) {
  where_ = Where{};
}

SolveResult MgritSolve::run(State initial, int iterations) {
  SolveResult result;
  if (iterations <= 0 || grid_.levels() == 1) {
    result.final_value = exact_sweep(std::move(initial));
  } else {
    StoppingRule rule(options_.tolerance, options_.norms, transport_, propagator_, initial);
    begin(std::move(initial));
    const int coarsest = grid_.levels() - 1;
    for (int i = 1; i <= iterations; ++i) {
      where_.iteration = i;
      if (i > 1) {
        const double square = relax_and_restrict(0, rule.needs_norms());
        if (rule.needs_norms()) rule.record(square);
        if (rule.met()) break;
        for (int l = 1; l < coarsest; ++l) relax_and_restrict(l, false);
      }
      const Sweep sweep = i == iterations ? Sweep::final_coarse : Sweep::intermediate;
      coarsest_solve(sweep);
      for (int l = coarsest - 1; l >= 1; --l) prolong(l, sweep);
      result.iterations = i;
    }
    result.final_value = final_sweep(rule);
    result.residual_norms = rule.norms();
  }
  result.waited = clock_.seconds();
  result.waits = clock_.waits();
  result.sent = clock_.messages();
  where_.operation = "idle";
  return result;
}

void MgritSolve::evaluate(std::vector<Evaluation>& batch, int level, Sweep sweep, int slice) {
  if (batch.empty()) return;
  transport_.progress();
  where_.level = level;
  where_.position = batch.front().position;
  propagator_.evaluate(batch, level, sweep, slice);
}

void MgritSolve::post(int kind, int level, int to, const State& value) {
  clock_.sends(to);  // before it goes: the other rank may have it at once
  transport_.post(to, tag::of_level(kind, level), value);
}

TransferPtr MgritSolve::expect(int kind, int level, int from, State& into, int slice) {
  into = propagator_.empty(slice);
  return transport_.receive(from, tag::of_level(kind, level), into);
}

void MgritSolve::finish(TransferPtr transfer) { clock_.wait(transport_, std::move(transfer)); }

State MgritSolve::receive(int kind, int level, int from, int slice) {
  State value;
  finish(expect(kind, level, from, value, slice));
  return value;
}

}  // namespace mlpint
